"""sasa-evaluate: compute a checkpoint's top1, top5, loss and per-class top1 on val, exactly as in the training log.

Options add calibration, averaging over mirrored views, ImageNet-ReaL labels, and a paired test with another model.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_train.commands import described, end_command, positive, run
from sasa_train.config.derived import has_top5
from sasa_train.evaluate import sections
from sasa_train.evaluate.outputs import check_outputs, write_outputs
from sasa_train.extras import why_not
from sasa_train.refusal import ConfigError
from sasa_train.runs.source import check_source
from sasa_train.terminal import load_torch, printable, wrapped

if TYPE_CHECKING:
    from sasa_train.evaluate.val_pass import Answers, Val
    from sasa_train.trained import TrainedModel
    from sasa_train.training.evaluation import Evaluation

EPILOG = """examples:
  sasa-evaluate outputs/RUN
  sasa-evaluate outputs/RUN/checkpoints/last.pt weights=raw data.root=/elsewhere trainer.device=cpu
  sasa-evaluate outputs/RUN --calibration --plot reliability.png
  sasa-evaluate outputs/RUN --compare outputs/OTHER_RUN
  sasa-evaluate outputs/RUN --tta hflip --predictions val.csv --json val.json

With --tta the plain figures come first; all further ones are computed from the averaged probabilities.
Exit codes: 0 done, 2 refused, 1 failed."""


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments; return the exit code."""
    return run(build_parser(), arguments, evaluate_checkpoint)


def build_parser() -> argparse.ArgumentParser:
    parser = described(prog="sasa-evaluate", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run folder (its best.pt, or last.pt where there is "
        "no best) or a checkpoint file")  # fmt: skip
    add("overrides", nargs="*", metavar="key=value", help="keys over the checkpoint's config, as in "
        "data.root=/elsewhere; weights=raw for the model's own weights, where the run kept an exponential moving "
        "average (the default then)")  # fmt: skip
    add("--calibration", action="store_true", help="calibration error, Brier score, the temperature that would be best")
    add("--bins", type=int, metavar="N", help="bins of confidence for --calibration (implied); left out: 15")
    add("--plot", type=Path, metavar="FILE", help="reliability diagram, .png, .svg or .pdf (implies --calibration)")
    add("--auroc", action="store_true", help="area under the ROC curve of each class against the rest, in percent")
    add("--knn", type=positive, metavar="K", help="top1 of the K nearest train images by the frozen model's features")
    add("--probe", action="store_true", help="top1 of a logistic regression on the frozen model's features of train")
    add("--tta", choices=("hflip",), help="average the probabilities of each image and its mirror image")
    add("--real", metavar="FILE", help="accuracy by ImageNet-ReaL's labels: its real.json, or timm for timm's copy")
    add("--compare", type=Path, metavar="OTHER", help="another run or checkpoint, on the same images: McNemar's test")
    add("--predictions", type=Path, metavar="FILE", help="the prediction for each image, as .csv or .jsonl")
    add("--json", type=Path, metavar="FILE", help="all figures, as .json")
    return parser


def evaluate_checkpoint(options: argparse.Namespace) -> None:
    """Evaluate the checkpoint, print the results and write the requested files.

    Raises:
        CheckpointError: there is no readable checkpoint.
        ConfigError: options, overrides or data are invalid.
        OSError: a file cannot be written despite the earlier check.
    """
    check_outputs(options)
    for option in ("auroc", "probe"):
        if getattr(options, option) and (reason := why_not(f"--{option}", "metrics")):
            raise ConfigError(reason)
    options.calibration |= options.plot is not None or options.bins is not None
    for source in (options.source, options.compare):
        if source is not None:
            check_source(source, options.overrides)
    load_torch()
    from sasa_train.evaluate.val_pass import open_val
    from sasa_train.trained import load_trained

    trained = load_trained(options.source, options.overrides)
    other = load_other(options, trained) if options.compare else None
    val = open_val(trained)
    other_val = open_other(val, other) if other else None
    real_sets = load_real_sets(options.real, val) if options.real else None

    answers: Answers | None = None
    if any((options.calibration, options.auroc, options.tta, options.real, options.compare, options.predictions)):
        result, answers = val.evaluate_keeping_answers(with_mirrored=options.tta == "hflip")
    else:
        result = val.evaluate()
    print_evaluation(val, result)
    figures = figures_of(val, result)
    if options.knn or options.probe:
        figures |= evaluate_features(options, val)
    if answers is not None:
        figures |= evaluate_further(options, val, answers, result, real_sets, other_val)
    for path in write_outputs(options, figures, answers, val.images):
        print(f"wrote {printable(path)}")


def load_other(options: argparse.Namespace, trained: "TrainedModel") -> "TrainedModel":
    """Load the checkpoint to compare with, using the same overrides."""
    from sasa_train.trained import load_trained

    other = load_trained(options.compare, options.overrides)
    if other.classes != trained.classes:
        raise ConfigError(
            f"--compare {options.compare}: its {len(other.classes)} classes are not the {len(trained.classes)} of "
            f"{trained.path}; two models are compared on the same classes in the same order"
        )
    return other


def open_other(val: "Val", other: "TrainedModel") -> "Val":
    """Open the same images for the other model, with its own image size and normalisation."""
    from sasa_train.data.fingerprint import differences
    from sasa_train.evaluate.val_pass import open_val

    opened = open_val(other)
    if changes := differences(val.fingerprint, opened.fingerprint, "val"):
        told = "\n  ".join([f"--compare {other.path}: its config names other images:", *changes])
        remedy = "a paired test needs the same; data.root=, data.max_val_images=, ... on the command line are for both"
        raise ConfigError(f"{told}\n{remedy}")
    return opened


def load_real_sets(source: str, val: "Val") -> list[frozenset[int]]:
    """Load the ImageNet-ReaL classes of each val image."""
    from sasa_train.evaluate.imagenet_real import load_real_labels

    names = [val.images.name(i) for i in range(len(val.images))]
    return load_real_labels(source, val.images.classes).of(names)


def print_evaluation(val: "Val", result: "Evaluation") -> None:
    trained = val.trained
    kind = "averaged over the steps (EMA)" if trained.weights == "ema" else "as trained, not averaged (raw)"
    weights = f", weights {kind}" if trained.checkpoint["ema"] is not None else ""  # otherwise there is no choice
    changes = trained.changes(val.fingerprint)
    is_selected = trained.path.name == "best.pt" and not changes
    selected = "; selected on these val images, so its figures are optimistic (last.pt is not)" if is_selected else ""
    head = f"{printable(trained.path)}: step {trained.checkpoint['step']:,}{weights}{selected}\n"
    print(wrapped(head, sys.stdout))
    for line in changes:
        print(f"not the images that the run was evaluated on: {line}")
    print("\n".join(sections.lines_of_classes(val.images.classes, result)))
    if missing := val.images_missing(result):
        print(f"\nval has no images of {missing}: left out of f1_macro and balanced_accuracy")
    if lines := val.loader.quarantine.lines():
        print(f"\n{len(lines)} images could not be read and are left out:\n" + "\n".join(lines))
    lines = [f"images {result.num_images}", f"loss   {result.loss:.4f}", f"top1   {result.top1:.2f}"]
    lines += [f"top5   {result.top5:.2f}"] if has_top5(len(trained.classes)) else []
    lines += [f"f1_macro {result.f1_macro:.2f}", f"balanced_accuracy {result.balanced_accuracy:.2f}"]
    print("\n" + "\n".join(lines))


def figures_of(val: "Val", result: "Evaluation") -> dict[str, Any]:
    """Return the results as plain values for --json, with top1 and top5 in percent as in metrics.jsonl."""
    counts = zip(val.images.classes, result.class_images, result.class_hits, result.by_class, strict=True)
    return {
        "checkpoint": str(val.trained.path),
        "step": val.trained.checkpoint["step"],
        "weights": val.trained.weights,
        "num_images": result.num_images,
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "f1_macro": result.f1_macro,
        "balanced_accuracy": result.balanced_accuracy,
        "classes": [
            {
                "name": name,
                "num_images": images,
                "num_right": hits,
                "precision": scores.precision,
                "recall": scores.recall,
                "f1": scores.f1,
            }
            for name, images, hits, scores in counts
        ],
        "unreadable": val.loader.quarantine.found,
    }


def evaluate_features(options: argparse.Namespace, val: "Val") -> dict[str, Any]:
    """Compute and print what the features of the frozen model reach; return the values for --json."""
    from sasa_train.evaluate.probes import collect_features, knn_top1, probe_top1

    features, figures = collect_features(val), dict[str, Any]()
    num_images, size = features.train.shape
    if options.knn:
        if options.knn > num_images:
            raise ConfigError(f"--knn {options.knn}: must be {num_images:,} at most, the number of train images")
        figures["knn"] = {"k": options.knn, "top1": knn_top1(features, options.knn, len(val.images.classes))}
    if options.probe:
        figures["probe"] = probe_top1(features)
    print_section(sections.lines_of_features(figures, num_images, size))
    return figures


def evaluate_further(
    options: argparse.Namespace,
    val: "Val",
    answers: "Answers",
    plain: "Evaluation",
    real_sets: "list[frozenset[int]] | None",
    other_val: "Val | None",
) -> dict[str, Any]:
    """Compute and print the section for each requested option; return the values for --json."""
    from sasa_train.evaluate.calibration import NUM_BINS, calibrate, proper_scores

    figures: dict[str, Any] = {}
    if options.tta:
        nll, _ = proper_scores(answers.logits, answers.labels)
        figures["tta"] = {"views": ["plain", "hflip"], "loss": nll, "top1": answers.top1, "top5": answers.top5}
        print_section(sections.lines_of_mirrored(figures["tta"], plain, val.trained))
    if options.calibration:
        num_bins = NUM_BINS if options.bins is None else options.bins
        figures["calibration"] = calibrate(answers.logits, answers.labels, answers.predictions, num_bins)
        print_section(sections.lines_of_calibration(figures["calibration"]))
    if options.auroc:
        from sasa_train.evaluate.auroc import class_aurocs, mean_auroc

        found = class_aurocs(answers.logits, answers.labels)
        figures["auroc"] = {"mean": mean_auroc(found), "classes": found}
        print_section(sections.lines_of_auroc(val.images.classes, found, figures["auroc"]["mean"]))
    if real_sets is not None:
        from sasa_train.evaluate.imagenet_real import evaluate_real

        sets = [real_sets[i] for i in answers.indices]
        figures["real"] = evaluate_real(sets, answers.predictions.tolist(), answers.labels.tolist())
        print_section(sections.lines_of_real(figures["real"], len(val.images.classes)))
    if other_val is not None:
        figures["compare"] = compare_with(other_val, answers, options)
        print_section(sections.lines_of_comparison(figures["compare"], val.trained, other_val.trained))
    return figures


def compare_with(other_val: "Val", answers: "Answers", options: argparse.Namespace) -> Any:
    """Compare the two models on the images that were read successfully in both evaluations."""
    import numpy as np

    from sasa_train.evaluate.significance import compare

    _, others = other_val.evaluate_keeping_answers(with_mirrored=options.tta == "hflip")
    _, mine, its = np.intersect1d(answers.indices, others.indices, return_indices=True)
    first, other = answers.rows(mine), others.rows(its)
    return compare(first.predictions.numpy(), other.predictions.numpy(), first.labels.numpy())


def print_section(lines: list[str]) -> None:
    print("\n" + wrapped("\n".join(lines), sys.stdout))
