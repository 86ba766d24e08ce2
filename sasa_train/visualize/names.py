"""Names of the figures in drawing order; this module imports nothing, so that `--help` is instant."""

FIGURES = {
    "training_curves": "loss and top1 over epochs, train and val",
    "lr_schedule": "the learning rate, as logged",
    "augmented_samples": "train images beside what the run's augmentation makes of them",
    "attention_maps": "where query pixels look, by layer, mean over heads",
    "attention_heads": "where one query pixel looks, by layer and head",
    "attention_distance": "mean distance between query and key, by layer and head",
    "relative_embeddings": "the learned relative embeddings as K x K maps",
    "class_accuracy": "top1 by class, the worst first",
    "confusion_matrix": "labels by predictions",
    "mistakes": "the most confident mistakes",
}
NAMES = tuple(FIGURES)
OF_SEVERAL = ("training_curves", "lr_schedule")  # figures that can overlay several runs
OF_ATTENTION = ("attention_maps", "attention_heads", "attention_distance", "relative_embeddings")
OF_CLASSES = ("class_accuracy", "confusion_matrix", "mistakes")
