"""Every key of the config, with type, default, bounds, unit and meaning.

No torch here, so that `--help` is instant. `configs/` holds named sets of values for these keys, nothing else.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from sasa_train.config.bounds import key, local_key

OWN_MODELS = tuple(f"{family}_resnet{depth}" for family in ("sasa", "hybrid", "conv") for depth in (26, 38, 50))
PUBLISHED = "timm"  # a value of model.pretrained
SMALL_IMAGE = 64  # pixels: images up to this size take the small transforms and may be resident
POLICIES = (
    "none", "rand_augment", "trivial_augment", "auto_augment_imagenet", "auto_augment_cifar10", "auto_augment_svhn",
)  # fmt: skip


class DataSet(NamedTuple):
    """Facts about a data set before it is read; `mean` and `std` per channel, of train's values in [0, 1]."""

    num_classes: int | None
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mirrored: bool = True  # in training, where augment.hflip is null


IMAGENET = DataSet(1000, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DATA_SETS = {
    "digits": DataSet(10, 8, (0.3050,) * 3, (0.3756,) * 3, mirrored=False),
    "cifar10": DataSet(10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": DataSet(100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": IMAGENET,
    "image_folder": IMAGENET._replace(num_classes=None),
}


@dataclass
class ModelConfig:
    name: str = key("sasa_resnet26", "a name in timm's registry: {sasa,hybrid,conv}_resnet{26,38,50} or any timm model")
    num_classes: int | None = key(None, "null: from the data set", above=0)
    # Keys of our own models alone; null: as the name says.
    stem: str | None = key(
        None, "conv, attention; for images <= 64 px conv_small, attention_small; attention_plain, attention_convvalues"
    )
    stage_ops: list[str] | None = key(None, "four of conv / attention")
    kernel_size: int | None = key(None, "the attention window's side, odd (7)", above=0)
    num_heads: int | None = key(None, "attention heads; divides each stage's channels (8)", above=0)
    width: float | None = key(None, "factor on every layer's channels (1.0)", above=0)
    position: str | None = key(None, "relative, absolute or none (relative)")
    content: bool | None = key(None, "q.k as part of the score (true)")
    border: str | None = key(None, "mask: positions outside the image take no part; zero: they do (mask)")
    drop_path_rate: float = key(0.0, "stochastic depth: the last block's rate, linear from 0", at_least=0, below=1)
    bn_momentum: float | None = key(None, "as in PyTorch; null: the model's own (0.1)", at_least=0, below=1)
    pretrained: str | None = key(
        None, "initial weights: a checkpoint, run, .safetensors or hub folder; timm: its published ones", is_path=True
    )


@dataclass
class DataConfig:
    name: str = key("digits", "the data set", choices=tuple(DATA_SETS))
    root: str = local_key("data", "folder of the images; digits need none", is_path=True)
    # Pillow and torch count the bytes of a larger image in more than 32 bits.
    image_size: int | None = key(
        None, "pixels; null: 8 digits, 32 CIFAR, 224 others; <= 64: the small transforms", above=0, at_most=2**14
    )
    num_workers: int | None = local_key(
        None, "decoding processes; 0: none; null: half of the processors, 8 at most", at_least=0, at_most=1024
    )
    worker_timeout: float = local_key(600.0, "seconds without a micro-batch, which end the run", above=0)
    resident: str = local_key("auto", "the whole set in memory (<= 64 px)", choices=("auto", "true", "false"))
    max_train_images: int | None = key(None, "a fixed class-balanced subset, independent of the seed", above=0)
    max_val_images: int | None = key(None, "the same for val", above=0)
    holdout_fraction: float = key(
        0.0, "> 0: val is this stratified, fixed part of train (0.04 in the paper's Table 3)", at_least=0, below=1
    )
    mean: list[float] | None = key(
        None, "per channel, of [0, 1] values; null: the set's own (image_folder: ImageNet's)", at_least=0, at_most=1
    )
    std: list[float] | None = key(None, "the same", above=0)
    max_unreadable: float = local_key(
        0.001, "part of a split's images that may be unreadable; 10 always may, unless it is 0", at_least=0, at_most=1
    )


@dataclass
class OptimizerConfig:
    name: str = key("sgd", "a name in timm's list_optimizers(); timm's sgd is Nesterov's, momentum is without")
    lr: float = key(0.1, "the peak learning rate, in lr_basis", above=0)
    lr_basis: str = key("per_256", "per_256: lr x global_batch_size / 256; absolute", choices=("absolute", "per_256"))
    weight_decay: float = key(1e-4, "not on norms, biases and position embeddings", at_least=0)
    momentum: float | None = key(None, "null: timm's default (0.9) where the optimizer has one", at_least=0)
    betas: list[float] | None = key(None, "null: the optimizer's default", at_least=0, below=1)
    eps: float | None = key(None, "null: the optimizer's default", at_least=0)
    layer_decay: float | None = key(None, "each layer's lr over the next one's; null: one for all", above=0, at_most=1)
    args: dict[str, Any] = key({}, "the optimizer's own arguments, as in optimizer.args={rho:0.9}")


@dataclass
class ScheduleConfig:
    name: str = key("cosine", "a name of timm's: cosine, step, multistep, poly, tanh, wsd, rsqrt, constant")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up from warmup_lr, within trainer.epochs", at_least=0)
    warmup_lr: float = key(0.0, "lr of the first step, absolute", at_least=0)
    min_lr: float = key(0.0, "the lower end, absolute", at_least=0)
    decay_epochs: float | None = key(
        None, "step: epochs between decays (null: 30); wsd, rsqrt: epochs of the decay (null: the last fifth)", above=0
    )
    decay_rate: float = key(0.1, "schedule.name=step or multistep: factor; poly: power", at_least=0)
    decay_milestones: list[float] = key([30.0, 60.0, 90.0], "schedule.name=multistep: epochs of the decays")
    args: dict[str, Any] = key({}, "other arguments of timm's create_scheduler_v2, as in schedule.args={k_decay:1.5}")


@dataclass
class AugmentConfig:
    crop: bool = key(True, "random crop, see crop_mode; false: centre crop")
    crop_padding: int | None = key(None, "pixels, crop_mode=padded; null: image_size / 8", at_least=0)
    crop_scale: list[float] = key(
        [0.08, 1.0], "crop_mode=resized: area of the crop, as a part of the image", is_range=True, at_most=1
    )
    crop_ratio: list[float] = key([0.75, 1.3333], "crop_mode=resized: its aspect ratio", is_range=True)
    crop_mode: str = key(
        "auto", "auto: padded for images <= 64 px, resized for larger ones", choices=("auto", "padded", "resized")
    )
    hflip: bool | None = key(None, "random horizontal flip; null: yes, but not for digits")
    policy: str = key("none", "the augmentation policy", choices=POLICIES)
    policy_ops: int = key(2, "operations per image, rand_augment", at_least=0, at_most=8)
    policy_magnitude: int = key(9, "their magnitude, rand_augment", at_least=0, at_most=30)
    brightness: float = key(0.0, "colour jitter: factors from 1 - x to 1 + x", at_least=0)
    contrast: float = key(0.0, "the same", at_least=0)
    saturation: float = key(0.0, "the same", at_least=0)
    hue: float = key(0.0, "colour jitter: shift from -x to x of the circle", at_least=0, at_most=0.5)
    erasing_prob: float = key(0.0, "random erasing: probability per image", at_least=0, at_most=1)
    erasing_scale: list[float] = key([0.02, 0.33], "the erased part of the image", is_range=True, at_most=1)
    mixup: float = key(0.0, "mixup's alpha; 0: none", at_least=0)
    cutmix: float = key(0.0, "cutmix's alpha; 0: none", at_least=0)
    mix_prob: float = key(1.0, "probability of mixing a micro-batch at all", at_least=0, at_most=1)
    mix_switch_prob: float = key(0.5, "probability of cutmix, where both are on", at_least=0, at_most=1)
    mix_off_epochs: int = key(0, "number of last epochs without mixup and cutmix", at_least=0)


@dataclass
class TrainerConfig:
    epochs: int = key(100, "passes over the training images; an epoch drops its incomplete last batch", above=0)
    max_steps: int | None = key(None, "ends the run, and its schedule, after so many steps", above=0)
    max_hours: float | None = local_key(None, "after so many hours the run saves and exits with code 75", above=0)
    global_batch_size: int = key(256, "images per step, over all devices and accumulation", above=0, at_most=2**24)
    grad_accum_steps: int = key(1, "micro-batches per step and process; divides global_batch_size", above=0)
    micro_batch_size: int | str | None = key(
        None, "images of a process's micro-batch; auto: the most that fit into memory; null: from grad_accum_steps"
    )
    sync_batch_norm: bool = key(False, "under torchrun: batch norm over all processes' micro-batches; CUDA alone")
    eval_every_epochs: int = key(1, "epochs between evaluations on val; the last epoch is always evaluated", above=0)
    precision: str = key(
        "auto", "auto: bf16 on a CUDA device that has it, else fp32", choices=("auto", "fp32", "bf16", "fp16")
    )
    channels_last: bool = key(False, "channels-last memory format")
    matmul_precision: str = key(
        "highest", "of fp32; high and medium: TF32 on CUDA, in convolutions too", choices=("highest", "high", "medium")
    )
    compile: bool = key(False, "torch.compile the training forward pass")
    deterministic: bool = key(False, "bit-identical runs on CUDA too, slower; the CPU is deterministic anyway")
    grad_clip_norm: float | None = key(None, "clip the gradient's global L2 norm; null: no clipping", above=0)
    grad_clip_value: float | None = key(None, "clip each element of the gradient instead", above=0)
    grad_clip_agc: float | None = key(
        None, "adaptive: each unit's gradient to this part of its weight's norm, not in the classifier", above=0
    )
    grad_checkpointing: bool = local_key(False, "recompute activations in the backward pass: less memory, more time")
    ema_decay: float | None = key(None, "average of the weights, which val and best use; null: none", above=0, below=1)
    ema_warmup: bool = key(True, "let the decay grow to ema_decay: min(ema_decay, 1 - step^(-2/3))")
    loss: str = key("cross_entropy", "bce: a sigmoid per class", choices=("cross_entropy", "bce"))
    label_smoothing: float = key(0.0, "of the training loss", at_least=0, below=1)
    bn_recalibration_batches: int = key(
        0, "training micro-batches for new statistics of batch norm before each evaluation; 0: none", at_least=0
    )
    log_every_steps: int = local_key(50, "steps between train rows in metrics.jsonl", above=0)
    checkpoint_every_steps: int | None = local_key(None, "null: at the end of each epoch alone", above=0)
    on_failed_save: str = local_key(
        "stop", "when a checkpoint cannot be written; continue: try the next", choices=("stop", "continue")
    )
    log_histograms: bool = local_key(False, "histograms of all weights in TensorBoard at each evaluation")
    profile_steps: int = local_key(0, "profile so many steps, soon after a start, into the run folder", at_least=0)
    keep_checkpoints: int = local_key(3, "step-numbered checkpoints kept beside last and best", at_least=0)
    device: str = local_key("auto", "auto: cuda where there is a GPU", choices=("auto", "cpu", "cuda"))


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = key(0, "seed of initialisation, order, crops and flips", at_least=0)
    run_name: str | None = local_key(None, "null: readable, from the keys that change the trajectory", name_length=200)
    output_dir: str = local_key("outputs", "run folders are made here", is_path=True)
    resume: str = local_key(
        "auto", "auto; never (a new numbered run); a run folder (in place); a checkpoint (a new run)", is_path=True
    )
    allow_config_change: list[str] = local_key([], "keys that may differ from the checkpoint's on resume")


FREE_KEYS = ("optimizer.args", "schedule.args")  # dicts with timm's arguments: one key each, whatever it holds
MAX_DEPTH = 5  # of lists and dicts in one another, in such an argument
# The names that Hydra reads as texts in {name:value}.
ARGUMENT_NAME = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z_][a-z0-9_]*", re.IGNORECASE | re.ASCII)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a (nested) dataclass or dict to {"trainer.epochs": 100, ...}."""
    items = config if isinstance(config, dict) else dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for name, value in items.items():
        is_group = isinstance(value, dict) and prefix + name not in FREE_KEYS
        flat.update(flatten(value, f"{prefix}{name}.") if is_group else {prefix + name: value})
    return flat


def key_table(config: type = TrainConfig, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Map each dotted key of a config to its dataclass field, in order; keys without a group come last."""
    table: dict[str, dataclasses.Field] = {}
    groups = [f for f in dataclasses.fields(config) if dataclasses.is_dataclass(f.type)]
    for group in groups:
        table |= key_table(cast(type, group.type), f"{prefix}{group.name}.")
    return table | {f"{prefix}{f.name}": f for f in dataclasses.fields(config) if f not in groups}


CHOICES = {
    name: bounds.choices for name, f in key_table().items() if (bounds := f.metadata["bounds"]) and bounds.choices
}
NOT_TRAJECTORY = {name for name, f in key_table().items() if f.metadata["may_change"]}
# Keys of our own models alone; timm's models take none of them.
MODEL_KEYS = ("stem", "stage_ops", "kernel_size", "num_heads", "width", "position", "content", "border")
