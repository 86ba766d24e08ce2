"""Every key of the config, with type, default, unit and meaning.

No torch here, so that `--help` is instant. `configs/` holds named sets of values for these keys, nothing else.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

OWN_MODELS = tuple(f"{family}_resnet{depth}" for family in ("sasa", "hybrid", "conv") for depth in (26, 38, 50))
PUBLISHED = "timm"  # as model.pretrained
SMALL_IMAGE = 64  # pixels: up to here images take the small transforms and may be resident

NUM_CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "imagenet": 1000}

POLICIES = (
    "none", "rand_augment", "trivial_augment", "auto_augment_imagenet", "auto_augment_cifar10", "auto_augment_svhn",
)  # fmt: skip
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")
DATA_NAMES = ("digits", "cifar10", "cifar100", "imagenet", "image_folder")
CHOICES = {
    "data.name": DATA_NAMES,
    "data.resident": ("auto", "true", "false"),
    "augment.crop_mode": ("auto", "padded", "resized"),
    "augment.policy": POLICIES,
    "optimizer.lr_basis": ("absolute", "per_256"),
    "trainer.precision": PRECISIONS,
    "trainer.device": DEVICES,
    "trainer.loss": ("cross_entropy", "bce"),
    "trainer.matmul_precision": ("highest", "high", "medium"),
    "trainer.on_failed_save": ("stop", "continue"),
}


def knob(default: Any, meaning: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


@dataclass
class ModelConfig:
    name: str = knob(
        "sasa_resnet26", "a name in timm's registry: {sasa,hybrid,conv}_resnet{26,38,50} or any timm model"
    )
    num_classes: int | None = knob(None, "null: from the data set")
    # The dials of our own models; null: as the name says.
    stem: str | None = knob(
        None, "conv, attention; for images <= 64 px conv_small, attention_small; attention_plain, attention_convvalues"
    )
    stage_ops: list[str] | None = knob(None, "four of conv / attention")
    kernel_size: int | None = knob(None, "the attention window's side, odd (7)")
    num_heads: int | None = knob(None, "attention heads; divides each stage's channels (8)")
    width: float | None = knob(None, "factor on every layer's channels (1.0)")
    position: str | None = knob(None, "relative, absolute or none (relative)")
    content: bool | None = knob(None, "q.k as part of the score (true)")
    border: str | None = knob(None, "mask: positions outside the image take no part; zero: they do (mask)")
    drop_path_rate: float = knob(0.0, "stochastic depth of the last block, linear from 0 at the first")
    bn_momentum: float | None = knob(None, "batch norm's momentum, PyTorch's sense; null: the model's own (0.1)")
    pretrained: str | None = knob(
        None, "begin with the weights of a checkpoint, run folder, .safetensors or hub folder; timm: its published ones"
    )


@dataclass
class DataConfig:
    name: str = knob("digits", "digits, cifar10, cifar100, imagenet or image_folder")
    root: str = knob("data", "folder of the images; digits need none")
    image_size: int | None = knob(
        None, "pixels; null: 8 digits, 32 CIFAR, 224 others. <= 64 takes the small transforms"
    )
    num_workers: int | None = knob(None, "decoding processes; 0: none; null: half of the processors, 8 at most")
    worker_timeout: float = knob(600.0, "seconds without a micro-batch from them after which the run ends")
    resident: str = knob("auto", "auto, true or false: the whole set decoded in memory (images <= 64 px)")
    max_train_images: int | None = knob(None, "a fixed class-balanced subset, independent of the seed")
    max_val_images: int | None = knob(None, "likewise for val")
    holdout_fraction: float = knob(
        0.0, "> 0: val is this stratified, fixed part of train (0.04 in the paper's Table 3)"
    )
    mean: list[float] | None = knob(
        None, "per channel, of [0, 1] values; null: the set's own (image_folder: ImageNet's)"
    )
    std: list[float] | None = knob(None, "likewise")
    max_unreadable: float = knob(
        0.001, "part of a split's images that may be unreadable before the run stops; 10 always may, unless it is 0"
    )


@dataclass
class OptimizerConfig:
    name: str = knob("sgd", "a name in timm's list_optimizers(); timm's sgd is Nesterov's, momentum is without")
    lr: float = knob(0.1, "the peak learning rate, in lr_basis")
    lr_basis: str = knob("per_256", "per_256: lr x global_batch_size / 256; absolute")
    weight_decay: float = knob(1e-4, "not on norms, biases and position embeddings")
    momentum: float | None = knob(None, "null: timm's default (0.9) where the optimizer has one")
    betas: list[float] | None = knob(None, "null: the optimizer's default")
    eps: float | None = knob(None, "null: the optimizer's default")
    layer_decay: float | None = knob(None, "each layer's lr is layer_decay x that of the next; null: one lr for all")
    args: dict[str, Any] = knob({}, "the optimizer's own arguments, as in optimizer.args={rho:0.9}")


@dataclass
class ScheduleConfig:
    name: str = knob("cosine", "a name of timm's: cosine, step, multistep, poly, tanh, wsd, rsqrt, constant")
    warmup_epochs: float = knob(0.0, "epochs of linear warm-up from warmup_lr, within trainer.epochs")
    warmup_lr: float = knob(0.0, "lr of the first step, absolute")
    min_lr: float = knob(0.0, "the lower end, absolute")
    decay_epochs: float | None = knob(
        None, "step: epochs between decays (null: 30); wsd, rsqrt: epochs of the decay (null: the last fifth)"
    )
    decay_rate: float = knob(0.1, "schedule.name=step or multistep: factor; poly: power")
    decay_milestones: list[float] = knob([30.0, 60.0, 90.0], "schedule.name=multistep: epochs of the decays")
    args: dict[str, Any] = knob({}, "other arguments of timm's create_scheduler_v2, as in schedule.args={k_decay:1.5}")


@dataclass
class AugmentConfig:
    crop: bool = knob(True, "random crop, see crop_mode; false: centre crop")
    crop_padding: int | None = knob(None, "pixels, crop_mode=padded; null: image_size / 8")
    crop_scale: list[float] = knob([0.08, 1.0], "crop_mode=resized: area of the crop, as a part of the image")
    crop_ratio: list[float] = knob([0.75, 1.3333], "its aspect ratio")
    crop_mode: str = knob("auto", "padded, resized; auto: padded for images <= 64 px, resized for larger ones")
    hflip: bool | None = knob(None, "random horizontal flip; null: yes, but not for digits")
    policy: str = knob("none", "none, rand_augment, trivial_augment or auto_augment_{imagenet,cifar10,svhn}")
    policy_ops: int = knob(2, "operations an image, rand_augment")
    policy_magnitude: int = knob(9, "their magnitude, 0 to 30, rand_augment")
    brightness: float = knob(0.0, "colour jitter: factors from 1 - x to 1 + x")
    contrast: float = knob(0.0, "likewise")
    saturation: float = knob(0.0, "likewise")
    hue: float = knob(0.0, "colour jitter: shift from -x to x of the circle, 0.5 at most")
    erasing_prob: float = knob(0.0, "random erasing: probability for an image")
    erasing_scale: list[float] = knob([0.02, 0.33], "its area, as a part of the image")
    mixup: float = knob(0.0, "mixup's alpha; 0: none")
    cutmix: float = knob(0.0, "cutmix's alpha; 0: none")
    mix_prob: float = knob(1.0, "probability of mixing a micro-batch at all")
    mix_switch_prob: float = knob(0.5, "of cutmix, where both are on")
    mix_off_epochs: int = knob(0, "the last epochs go without mixup and cutmix")


@dataclass
class TrainerConfig:
    epochs: int = knob(100, "passes over the training images; an epoch drops its incomplete last batch")
    max_steps: int | None = knob(None, "ends the run, and its schedule, after so many steps")
    max_hours: float | None = knob(None, "saves and exits with code 75 after so many hours; run again to continue")
    global_batch_size: int = knob(256, "images a step, over all devices and accumulation")
    grad_accum_steps: int = knob(1, "micro-batches a step, for each process; divides global_batch_size")
    micro_batch_size: int | str | None = knob(
        None, "images of a process's micro-batch; auto: the most that fit into memory; null: from grad_accum_steps"
    )
    sync_batch_norm: bool = knob(False, "under torchrun: batch norm over all processes' micro-batches; CUDA alone")
    eval_every_epochs: int = knob(1, "epochs between evaluations on val; the last epoch is always evaluated")
    precision: str = knob("auto", "fp32, bf16, fp16; auto: bf16 on a CUDA device that has it, else fp32")
    channels_last: bool = knob(False, "channels-last memory format")
    matmul_precision: str = knob("highest", "of fp32: highest; high and medium allow TF32 on CUDA, convolutions too")
    compile: bool = knob(False, "torch.compile the training forward pass")
    deterministic: bool = knob(False, "bit-identical runs on CUDA too, slower; the CPU is deterministic anyway")
    grad_clip_norm: float | None = knob(None, "clip the gradient's global L2 norm; null: no clipping")
    grad_clip_value: float | None = knob(None, "clip each number of the gradient instead")
    grad_clip_agc: float | None = knob(
        None, "adaptive clipping instead: each unit's gradient to this part of its weight's norm, not in the classifier"
    )
    grad_checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, more time")
    ema_decay: float | None = knob(
        None, "exponential moving average of the weights; val and best then use it; null: none"
    )
    ema_warmup: bool = knob(True, "let the decay grow to ema_decay: min(ema_decay, 1 - step^(-2/3))")
    loss: str = knob("cross_entropy", "cross_entropy or bce (a sigmoid a class)")
    label_smoothing: float = knob(0.0, "of the training loss")
    bn_recalibration_batches: int = knob(
        0, "before each evaluation batch norm's statistics are taken anew from so many training micro-batches"
    )
    log_every_steps: int = knob(50, "steps between train rows in metrics.jsonl")
    checkpoint_every_steps: int | None = knob(None, "null: at the end of each epoch alone")
    on_failed_save: str = knob(
        "stop", "when a checkpoint cannot be written, on a full disk say: stop, or continue and try the next one"
    )
    log_histograms: bool = knob(False, "histograms of all weights in TensorBoard at each evaluation")
    profile_steps: int = knob(0, "profile so many steps, soon after a start: trace and table in the run folder")
    keep_checkpoints: int = knob(3, "step-numbered checkpoints kept beside last and best")
    device: str = knob("auto", "auto, cpu or cuda")


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = knob(0, "of initialisation, order, crops and flips")
    run_name: str | None = knob(None, "null: readable, from those keys that change the trajectory")
    output_dir: str = knob("outputs", "run folders are made here")
    resume: str = knob("auto", "auto; never (a new numbered run); a run folder (in place); a checkpoint (a new run)")
    allow_config_change: list[str] = knob([], "keys that may differ from the checkpoint's on resume")


# Keys that may differ between a run and its continuation: they change where and how fast it runs, not what it computes.
NOT_TRAJECTORY = {
    "run_name",
    "output_dir",
    "resume",
    "allow_config_change",
    "data.root",  # the images themselves are compared
    "data.num_workers",
    "data.worker_timeout",
    "data.resident",
    "data.max_unreadable",
    "trainer.device",
    "trainer.max_hours",
    "trainer.grad_checkpointing",
    "trainer.log_every_steps",
    "trainer.log_histograms",
    "trainer.on_failed_save",
    "trainer.profile_steps",
    "trainer.checkpoint_every_steps",
    "trainer.keep_checkpoints",
}


FREE_KEYS = ("optimizer.args", "schedule.args")  # what is in these, timm knows: a knob each, whatever it holds
MAX_DEPTH = 5  # of lists and dicts in one another, in such an argument
# What Hydra reads as a text in {name:value}.
ARGUMENT_NAME = re.compile(r"(?!(?:true|false|null|nan|inf)$)[a-z_][a-z0-9_]*", re.IGNORECASE | re.ASCII)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"trainer.epochs": 100, ...} of a (nested) dataclass or dict."""
    items = config if isinstance(config, dict) else dataclasses.asdict(config)
    flat: dict[str, Any] = {}
    for key, value in items.items():
        is_group = isinstance(value, dict) and prefix + key not in FREE_KEYS
        flat.update(flatten(value, f"{prefix}{key}.") if is_group else {prefix + key: value})
    return flat


def knob_table() -> dict[str, dataclasses.Field]:
    """Each knob's dotted key and its dataclass field, in order; top-level knobs last."""
    table: dict[str, dataclasses.Field] = {}
    for group in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(group.type):
            table.update({f"{group.name}.{f.name}": f for f in dataclasses.fields(group.type)})
    table.update({f.name: f for f in dataclasses.fields(TrainConfig) if not dataclasses.is_dataclass(f.type)})
    return table


DIALS = ("stem", "stage_ops", "kernel_size", "num_heads", "width", "position", "content", "border")
