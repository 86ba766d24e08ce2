"""All keys of the config, with their types, defaults, bounds, units and meanings.

This module does not import torch, so that `--help` is fast. `configs/` contains only named sets of values for keys.
"""

import copy
import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sasa_train.config.bounds import key, local_key

OWN_MODELS = tuple(f"{family}_resnet{depth}" for family in ("sasa", "hybrid", "conv") for depth in (26, 38, 50))
PUBLISHED = "timm"  # the value of model.pretrained for timm's published weights
TIMM_TEACHER = "timm:"  # begins the value of distill.teacher for timm's published weights
SMALL_IMAGE = 64  # pixels; images up to this size use the small-image transforms and may be resident
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest")  # filters of Pillow
POLICIES = (
    "none", "rand_augment", "trivial_augment", "auto_augment_imagenet", "auto_augment_cifar10", "auto_augment_svhn",
)  # fmt: skip


class DataSet(NamedTuple):
    """Properties of a data set that are known in advance; `mean` and `std` are per channel for values in [0, 1]."""

    num_classes: int | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mirrored: bool = True  # default of augment.hflip


# What tells the best evaluation: the highest, in percent, or the lowest loss; all are columns of val rows.
BEST_METRICS = ("top1", "loss", "f1_macro", "balanced_accuracy")
LOGGERS = ("tensorboard", "wandb", "mlflow")
MODES = {"rgb": 3, "grey": 1, "grey16": 1}  # by data.mode, the number of channels

IMAGENET = DataSet(1000, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATA_SETS = {
    "digits": DataSet(10, 8, (0.3050,) * 3, (0.3756,) * 3, mirrored=False),
    "cifar10": DataSet(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSet(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET,
    "image_folder": IMAGENET._replace(num_classes=None),
    "list": IMAGENET._replace(num_classes=None),
    "torchvision": IMAGENET._replace(num_classes=None),
    "hf": IMAGENET._replace(num_classes=None),
    "own": IMAGENET._replace(num_classes=None),
}


@dataclass
class ModelConfig:
    name: str = key(
        "sasa_resnet26",
        "{sasa,hybrid,conv}_resnet{26,38,50}, any timm model (also name.tag), local-dir:PATH or hf-hub:USER/NAME",
    )
    source: str | None = local_key(None, "where name and args came from; written when name is local-dir: or hf-hub:")
    target: str | None = key(None, "your own model instead, as in my_models.TinyNet; called with num_classes and args")
    args: dict[str, Any] = key({}, "arguments of a timm model or of target, as in model.args={drop_rate:0.1}")
    num_classes: int | None = key(None, "number of classes; null: from the data set", above=0)
    in_chans: int | None = key(None, "channels of the images; null: 3, or 1 for data.mode=grey and grey16", above=0)
    # These keys are for sasa_train's own models only; null means that the model's name determines the value.
    stem: str | None = key(
        None, "conv, attention, attention_plain, attention_convvalues; conv_small, attention_small for images <= 64 px"
    )
    stage_ops: list[str] | None = key(None, "the operation in each of the four stages: conv or attention")
    kernel_size: Any = key(  # int | list[int] | None, as in data.image_size
        None, "size of the attention window, odd, or a list of four sizes, one per stage (7)", above=0
    )
    num_heads: int | None = key(None, "number of attention heads; must divide the channels of each stage (8)", above=0)
    width: float | None = key(None, "multiplier for the channels of every layer (1.0)", above=0)
    position: str | None = key(None, "position encoding: relative, absolute or none (relative)")
    content: bool | None = key(None, "include q.k in the attention score (true)")
    border: str | None = key(
        None,
        "mask: exclude positions outside the image; zero: include them as zeros; shift: windows move inside (mask)",
    )
    dilation: int | None = key(None, "distance between neighbouring keys of a window (1)", above=0)
    scale: Any = key(  # float | str | None; OmegaConf takes no whole number for this
        None, "factor on the attention scores of the stages, or inverse_sqrt: 1/sqrt(head_dim) (1.0)"
    )
    null_key: bool | None = key(None, "a key of score 0 and value 0, so that a head may attend to nothing (false)")
    share_rel: bool | None = key(None, "one pair of relative embeddings for all heads of a layer (true)")
    own_value: bool | None = key(None, "add each query's own value times a learned factor per channel (false)")
    axial: bool | None = key(None, "attention along columns and then rows of K instead of K x K windows (false)")
    padding: str | None = key(None, "border of the convolutions: zeros or reflect (zeros)")
    drop_path_rate: float = key(0.0, "stochastic depth: rate of the last block, linear from 0", at_least=0, below=1)
    bn_momentum: float | None = key(None, "batch norm momentum; null: the model's default (0.1)", at_least=0, below=1)
    pretrained: str | None = key(
        None, "initial weights: a checkpoint, run, .safetensors or hub folder; timm: timm's own weights", is_path=True
    )

    @property
    def title(self) -> str:
        """The model's name; a model of the user's own is named after its class or function."""
        return self.target.rpartition(".")[2] if self.target is not None else self.name


def names_source(name: str) -> bool:
    """Whether model.name names a place that says which model it is, as in local-dir:PATH, and not a model."""
    return ":" in name


@dataclass
class DataConfig:
    name: str = key("digits", "the data set", choices=tuple(DATA_SETS))
    target: str | None = key(None, "data=own: your function, called with args; returns train and val sets with classes")
    args: dict[str, Any] = key({}, "arguments of target or of dataset, as in data.args={fold:1}")
    dataset: str | None = key(
        None, "torchvision: a class of torchvision.datasets; hf: a folder, or USER/NAME on the Hub", is_path=True
    )
    train: str | None = local_key(None, "data=list: CSV file of the images to train on and their labels", is_path=True)
    val: str | None = local_key(None, "data=list: CSV file of val; null: a part of train is held out", is_path=True)
    columns: list[str] = key(["path", "label"], "list, hf: the columns of images and labels; hf finds them if it can")
    root: str | None = local_key(
        "data",
        "folder of the images, or URL of tar shards; null, for data=list: each list's folder",
        is_path=True,
    )
    # The size of a larger image in bytes would overflow the 32-bit counters of Pillow and torch.
    image_size: Any = key(  # int | list[int] | None, which OmegaConf cannot express; see `whole_numbers`
        None,
        "pixels, or [height,width]; null: 8 digits, 32 CIFAR, 224 others; <= 64: small-image transforms",
        above=0,
        at_most=2**14,
    )
    val_image_size: Any = key(  # as image_size
        None, "size at which val and all commands see images; null: image_size", above=0, at_most=2**14
    )
    mode: str = key("rgb", "pixels: rgb; grey: one channel; grey16: one channel of 16 bits", choices=tuple(MODES))
    num_workers: int | None = local_key(
        None, "processes that decode images; 0: none; null: half of the processors, at most 8", at_least=0, at_most=1024
    )
    worker_timeout: float = local_key(600.0, "stop the run after this many seconds without a micro-batch", above=0)
    resident: str = local_key("auto", "keep all images in memory (<= 64 px)", choices=("auto", "true", "false"))
    sampler: str | None = key(
        "shuffled",
        "order of train: shuffled; balanced: each class equally often, its images drawn with replacement",
        choices=("shuffled", "balanced"),
    )
    max_train_images: int | None = key(None, "size of a fixed, class-balanced subset; null: all images", above=0)
    max_val_images: int | None = key(None, "the same, for val", above=0)
    holdout_fraction: float = key(
        0.0, "> 0: fixed, stratified fraction of train to use as val (0.04 in the paper's Table 3)", at_least=0, below=1
    )
    split: str | None = key(
        None, "the split that val reads, val or test; null: val or, where there is none, test", choices=("val", "test")
    )
    mean: list[float] | None = key(
        None,
        "mean per channel of [0, 1] values; null: model.pretrained's, or the set's own (image_folder: ImageNet's)",
        at_least=0,
        at_most=1,
    )
    std: list[float] | None = key(None, "standard deviation per channel, likewise", above=0)
    interpolation: str | None = key(
        None, "resizing filter; null: model.pretrained's, or bilinear", choices=INTERPOLATIONS
    )
    val_crop: float | None = key(
        None,
        "> 64 px: val's crop per shorter side; null: likewise, or 0.875",
        at_least=0.1,
        at_most=1,
    )
    background: str = key("white", "colour behind transparent pixels; none: ignore transparency")
    exif: str = key("apply", "apply: turn images as their EXIF orientation says", choices=("apply", "ignore"))
    value_range: list[float] | None = key(
        None, "[low,high]: black and white in float, 32-bit and signed images; null: from TIFF tags"
    )
    clip_values: bool = key(False, "clip such values instead, as earlier versions did")
    max_unreadable: float = local_key(
        0.001, "allowed fraction of unreadable images per split (at least 10 images); 0: none", at_least=0, at_most=1
    )

    @property
    def title(self) -> str:
        """The data set's name; one of the user's own is named after its folder, list or function."""
        if self.name == "list":
            return os.path.basename(self.train or self.val or "")
        if self.name == "image_folder":
            return os.path.basename(os.path.abspath(self.folder))
        if self.name == "hf":
            return os.path.basename(os.path.abspath(self.dataset or ""))
        return self.target or self.dataset or self.name

    @property
    def folder(self) -> str:
        """`root`; empty if it is null."""
        return self.root or ""

    @property
    def is_remote(self) -> bool:
        """Whether the images are in shards behind a URL."""
        return "://" in self.folder

    @property
    def place(self) -> str:
        """The key that says where the images come from, and its value, for messages."""
        found = (key for key in ("target", "dataset", "train", "val") if getattr(self, key) is not None)
        key = next(found, "root")
        return f"data.{key}={getattr(self, key)}"


@dataclass
class OptimizerConfig:
    name: str = key("sgd", "a name in timm's list_optimizers(); sgd uses Nesterov momentum, momentum does not")
    lr: float = key(0.1, "peak learning rate, interpreted according to lr_basis", above=0)
    lr_basis: str = key("per_256", "per_256: lr x global_batch_size / 256; absolute", choices=("absolute", "per_256"))
    weight_decay: float = key(1e-4, "weight decay, not applied to norms, biases and position embeddings", at_least=0)
    momentum: float | None = key(None, "momentum; null: timm's default (0.9) if the optimizer has one", at_least=0)
    betas: list[float] | None = key(None, "betas; null: the optimizer's default", at_least=0, below=1)
    eps: float | None = key(None, "epsilon; null: the optimizer's default", at_least=0)
    layer_decay: float | None = key(None, "ratio of a layer's lr to the next one's; null: 1", above=0, at_most=1)
    args: dict[str, Any] = key({}, "further arguments of the optimizer, as in optimizer.args={rho:0.9}")


@dataclass
class ScheduleConfig:
    name: str = key("cosine", "one of timm's schedules: cosine, step, multistep, poly, tanh, wsd, rsqrt, constant")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up from warmup_lr, within trainer.epochs", at_least=0)
    warmup_lr: float = key(0.0, "absolute lr of the first step of the warm-up", at_least=0)
    min_lr: float = key(0.0, "absolute minimum lr", at_least=0)
    decay_epochs: float | None = key(
        None, "step: epochs between decays (null: 30); wsd, rsqrt: epochs of decay (null: the last fifth)", above=0
    )
    decay_rate: float = key(0.1, "decay factor of step and multistep; power of poly", at_least=0)
    decay_milestones: list[float] = key([30.0, 60.0, 90.0], "multistep: epochs at which the lr decays")
    args: dict[str, Any] = key({}, "further arguments of timm's create_scheduler_v2, as in schedule.args={k_decay:1.5}")


@dataclass
class AugmentConfig:
    target: str | None = key(None, "your own transform of one uint8 image, called with a generator of its own")
    crop: bool = key(True, "random crop (see crop_mode); false: centre crop")
    crop_padding: int | None = key(None, "crop_mode=padded: padding in pixels; null: image_size / 8", at_least=0)
    crop_scale: list[float] = key(
        [0.08, 1.0], "crop_mode=resized: area of the crop as a fraction of the image", is_range=True, at_most=1
    )
    crop_ratio: list[float] = key([0.75, 1.3333], "crop_mode=resized: aspect ratio of the crop", is_range=True)
    crop_mode: str = key(
        "auto", "auto: padded for images <= 64 px, resized for larger ones", choices=("auto", "padded", "resized")
    )
    hflip: bool | None = key(None, "random horizontal flip; null: true, except for digits")
    policy: str = key("none", "automatic augmentation policy", choices=POLICIES)
    policy_ops: int = key(2, "rand_augment: number of operations per image", at_least=0, at_most=8)
    policy_magnitude: int = key(9, "rand_augment: magnitude of the operations", at_least=0, at_most=30)
    brightness: float = key(0.0, "colour jitter: brightness factor from 1 - x to 1 + x", at_least=0)
    contrast: float = key(0.0, "the same, for contrast", at_least=0)
    saturation: float = key(0.0, "the same, for saturation", at_least=0)
    hue: float = key(0.0, "colour jitter: hue shift from -x to x of the colour circle", at_least=0, at_most=0.5)
    erasing_prob: float = key(0.0, "random erasing: probability per image", at_least=0, at_most=1)
    erasing_scale: list[float] = key([0.02, 0.33], "erased area as a fraction of the image", is_range=True, at_most=1)
    mixup: float = key(0.0, "alpha of mixup; 0: no mixup", at_least=0)
    cutmix: float = key(0.0, "alpha of cutmix; 0: no cutmix", at_least=0)
    mix_prob: float = key(1.0, "probability that a micro-batch is mixed", at_least=0, at_most=1)
    mix_switch_prob: float = key(0.5, "probability of cutmix if both are enabled", at_least=0, at_most=1)
    mix_off_epochs: int = key(0, "number of final epochs without mixup and cutmix", at_least=0)


@dataclass
class TrainerConfig:
    epochs: int = key(100, "passes over the training images; each epoch drops its incomplete last batch", above=0)
    max_steps: int | None = key(None, "end the run and its lr schedule after this many steps", above=0)
    max_pflops: float | None = key(
        None,
        "likewise, after the steps that this many PFLOPs (10^15) of training buy, rounded down",
        above=0,
    )
    max_hours: float | None = local_key(None, "save and exit with code 75 after this many hours", above=0)
    global_batch_size: int = key(256, "images per step, over all devices and micro-batches", above=0, at_most=2**24)
    grad_accum_steps: int = key(1, "micro-batches per step and process; must divide global_batch_size", above=0)
    micro_batch_size: int | str | None = key(
        None, "images per micro-batch and process; auto: as many as fit into memory; null: from grad_accum_steps"
    )
    sync_batch_norm: bool = key(False, "under torchrun: batch norm over the micro-batches of all processes; CUDA only")
    eval_every_epochs: int = key(1, "epochs between evaluations on val; the last epoch is always evaluated", above=0)
    best_metric: str = key(
        "top1",
        "metric on val that chooses best.pt, of classes alike: f1_macro, balanced_accuracy",
        choices=BEST_METRICS,
    )
    patience: int | None = key(
        None, "end the run after so many evaluations in a row that do not improve best_metric; null: never", above=0
    )
    min_delta: float = key(0.0, "patience: improvement that counts, in best_metric's unit (percent points)", at_least=0)
    precision: str = key(
        "auto", "auto: bf16 on CUDA devices that support it, otherwise fp32", choices=("auto", "fp32", "bf16", "fp16")
    )
    channels_last: bool = key(False, "use the channels-last memory format")
    matmul_precision: str = key(
        "highest", "high, medium: fp32 as TF32 on CUDA, also in convolutions", choices=("highest", "high", "medium")
    )
    compile: bool = key(False, "apply torch.compile to the training forward pass")
    deterministic: bool = key(False, "make runs bit-identical on CUDA, at lower speed; CPU runs always are")
    grad_clip_norm: float | None = key(None, "clip the global L2 norm of the gradient; null: no clipping", above=0)
    grad_clip_value: float | None = key(None, "clip each element of the gradient instead", above=0)
    grad_clip_agc: float | None = key(
        None, "clip each unit's gradient to this fraction of its weight norm, except in the classifier", above=0
    )
    grad_checkpointing: bool = local_key(False, "recompute activations in the backward pass; saves memory, costs time")
    ema_decay: float | None = key(None, "decay of the EMA that val and best use; null: no EMA", above=0, below=1)
    ema_warmup: bool = key(True, "increase the decay gradually: min(ema_decay, 1 - step^(-2/3))")
    loss: str = key(
        "cross_entropy",
        "training loss; bce: one sigmoid per class; focal: less weight for images already classified well",
        choices=("cross_entropy", "bce", "focal"),
    )
    focal_gamma: float = key(2.0, "focal: exponent of (1 - p) for a class's probability p", at_least=0, at_most=10)
    class_weights: Any = key(  # str | dict[str, float] | None, which OmegaConf cannot express; see braces.py
        None, "weights of the classes in the training loss: balanced, or {name:weight}; 1 for those not named"
    )
    class_weights_power: float = key(1.0, "class_weights=balanced: exponent of the weights", at_least=0, at_most=4)
    loss_target: str | None = key(None, "your own loss instead, called with logits and labels; returns a mean")
    train_only: list[str] | None = key(
        None, "names of the parameters or modules to train, with * and ?; classifier: the head; null: all"
    )
    label_smoothing: float = key(0.0, "label smoothing in the training loss", at_least=0, below=1)
    bn_recalibration_batches: int = key(
        0, "training micro-batches to recompute batch norm statistics before each evaluation; 0: none", at_least=0
    )
    log_every_steps: int = local_key(
        50, "steps between train rows in metrics.jsonl; an epoch's steps if these are fewer", above=0
    )
    checkpoint_every_steps: int | None = local_key(None, "steps between checkpoints; null: at epoch ends only", above=0)
    on_failed_save: str = local_key(
        "stop", "what to do if a checkpoint cannot be written; continue: train on, retry", choices=("stop", "continue")
    )
    log_histograms: bool = local_key(False, "write histograms of all weights to TensorBoard at each evaluation")
    peak_tflops: float | None = local_key(
        None, "peak TFLOP/s of one device, for mfu in train rows; null: a known NVIDIA GPU's at this precision", above=0
    )
    profile_steps: int = local_key(0, "profile this many steps soon after a start, into the run folder", at_least=0)
    keep_checkpoints: int = local_key(3, "step-numbered checkpoints to keep in addition to last and best", at_least=0)
    device: str = local_key("auto", "auto: cuda if there is a GPU, otherwise cpu", choices=("auto", "cpu", "cuda"))


@dataclass
class DistillConfig:
    teacher: str | None = key(
        None,
        "model to imitate: a run, checkpoint or export (.safetensors), or timm:NAME[.TAG] with its published weights",
        is_path=True,
    )
    weight: float = key(
        0.5, "share of the teacher's term in the training loss; the labels have the rest", at_least=0, at_most=1
    )
    kind: str = key(
        "soft",
        "soft: T^2 x KL divergence from the teacher's softmax; hard: cross-entropy with its most probable class",
        choices=("soft", "hard"),
    )
    temperature: float = key(3.0, "T of kind=soft, which divides the logits of both; DeiT's value", above=0)

    @property
    def file(self) -> str | None:
        """The teacher's path, or None if there is none, or it is one of timm's."""
        return None if self.teacher is None or self.teacher.startswith(TIMM_TEACHER) else self.teacher


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    seed: int = key(0, "random seed of initialisation, image order and augmentation", at_least=0)
    run_name: str | None = local_key(None, "run folder's name; null: derived from the config", name_length=200)
    output_dir: str = local_key("outputs", "folder in which run folders are created", is_path=True)
    resume: str = local_key(
        "auto", "auto; never (a new, numbered run); a run folder (in place); a checkpoint (a new run)", is_path=True
    )
    configs: list[str] = local_key([], "folders with your own groups and presets, besides those in $SASA_CONFIGS")
    imports: list[str] = local_key([], "your own modules and .py files, imported before the config is composed")
    hooks: list[str] = local_key([], "your own functions, called at start, step, evaluated, saved and end")
    logger: list[str] = local_key(["tensorboard"], "where copies of metrics.jsonl go: tensorboard, wandb, mlflow")
    derive: list[str] = local_key(
        [], "keys that are chosen from the images when the run begins; a key that is set is not chosen"
    )
    allow_config_change: list[str] = local_key([], "keys that may differ from the checkpoint's config on resume")


FREE_KEYS = ("model.args", "data.args", "optimizer.args", "schedule.args")  # dicts, each treated as a single key
CLASS_WEIGHTS = "trainer.class_weights"  # balanced or a dict from names of classes, which may be any text
WEIGHTS_RULE = "must be balanced, or weights from 1e-6 to 1e6 by class, as in {cat: 3.5, great white shark: 2}"
# Keys that hold dotted names of the user's code.
TARGETS = ("model.target", "data.target", "augment.target", "trainer.loss_target", "hooks")
# Keys of which a command line may give one value, and several of them.
LISTS = ("configs", "imports", "hooks", "logger")
MAX_DEPTH = 5  # maximum nesting of lists and dicts in such an argument
# The names that Hydra parses as strings in {name:value}.
ARGUMENT_NAME = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z_][a-z0-9_]*", re.IGNORECASE | re.ASCII)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a (nested) dataclass or dict to {"trainer.epochs": 100, ...}."""
    items = config if isinstance(config, dict) else dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for name, value in items.items():
        is_group = isinstance(value, dict) and prefix + name not in (*FREE_KEYS, CLASS_WEIGHTS)
        flat.update(flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value})
    return flat


def key_table(config: type = TrainConfig, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Return a dict from each dotted key of a config to its dataclass field, in order, with ungrouped keys last."""
    table: dict[str, dataclasses.Field] = {}
    groups = [f for f in dataclasses.fields(config) if dataclasses.is_dataclass(f.type)]
    for group in groups:
        table |= key_table(cast(type, group.type), f"{prefix}{group.name}.")
    return table | {f"{prefix}{f.name}": f for f in dataclasses.fields(config) if f not in groups}


def text_keys(table: dict[str, dataclasses.Field]) -> set[str]:
    """Return the keys whose values are texts or lists of texts; such values stay as typed, as in 2024_01_15."""
    return {name for name, field in table.items() if _is_text(field.type)}


def _is_text(kind: Any) -> bool:
    parts = [part for part in typing.get_args(kind) if part is not types.NoneType]
    return kind is str or (bool(parts) and all(_is_text(part) for part in parts))


CHOICES = {
    name: bounds.choices for name, f in key_table().items() if (bounds := f.metadata["bounds"]) and bounds.choices
}
PLACES = {"data.root", "data.train", "data.val"}  # of the images: they may move, but other places are other images
NOT_TRAJECTORY = {name for name, f in key_table().items() if f.metadata["may_change"]}
# Keys for sasa_train's own models only; timm's models accept none of them.
MODEL_KEYS = (
    "stem", "stage_ops", "kernel_size", "num_heads", "width", "position", "content", "border", "dilation", "scale",
    "null_key", "share_rel", "own_value", "axial", "padding",
)  # fmt: skip
# Keys that `derive` may list (training/own_images.py).
DERIVABLE = (
    "data.holdout_fraction", "data.image_size", "model.name", *(f"model.{name}" for name in MODEL_KEYS),
    "trainer.global_batch_size", "trainer.epochs", "schedule.warmup_epochs", "optimizer.lr", "optimizer.layer_decay",
)  # fmt: skip


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a copy of a config in which the given dotted keys have the given values."""
    changed = copy.deepcopy(config)
    for name, value in values.items():
        group, _, own = name.rpartition(".")
        setattr(getattr(changed, group) if group else changed, own, value)
    return changed
