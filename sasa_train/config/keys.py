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


def key(default: Any, meaning: str) -> Any:
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata={"help": meaning})
    return field(default=default, metadata={"help": meaning})


@dataclass
class ModelConfig:
    name: str = key("sasa_resnet26", "a name in timm's registry: {sasa,hybrid,conv}_resnet{26,38,50} or any timm model")
    num_classes: int | None = key(None, "null: from the data set")
    # The dials of our own models; null: as the name says.
    stem: str | None = key(
        None, "conv, attention; for images <= 64 px conv_small, attention_small; attention_plain, attention_convvalues"
    )
    stage_ops: list[str] | None = key(None, "four of conv / attention")
    kernel_size: int | None = key(None, "the attention window's side, odd (7)")
    num_heads: int | None = key(None, "attention heads; divides each stage's channels (8)")
    width: float | None = key(None, "factor on every layer's channels (1.0)")
    position: str | None = key(None, "relative, absolute or none (relative)")
    content: bool | None = key(None, "q.k as part of the score (true)")
    border: str | None = key(None, "mask: positions outside the image take no part; zero: they do (mask)")
    drop_path_rate: float = key(0.0, "stochastic depth of the last block, linear from 0 at the first")
    bn_momentum: float | None = key(None, "batch norm's momentum, PyTorch's sense; null: the model's own (0.1)")
    pretrained: str | None = key(
        None, "begin with the weights of a checkpoint, run folder, .safetensors or hub folder; timm: its published ones"
    )


@dataclass
class DataConfig:
    name: str = key("digits", "digits, cifar10, cifar100, imagenet or image_folder")
    root: str = key("data", "folder of the images; digits need none")
    image_size: int | None = key(None, "pixels; null: 8 digits, 32 CIFAR, 224 others. <= 64 takes the small transforms")
    num_workers: int | None = key(None, "decoding processes; 0: none; null: half of the processors, 8 at most")
    worker_timeout: float = key(600.0, "seconds without a micro-batch from them after which the run ends")
    resident: str = key("auto", "auto, true or false: the whole set decoded in memory (images <= 64 px)")
    max_train_images: int | None = key(None, "a fixed class-balanced subset, independent of the seed")
    max_val_images: int | None = key(None, "likewise for val")
    holdout_fraction: float = key(0.0, "> 0: val is this stratified, fixed part of train (0.04 in the paper's Table 3)")
    mean: list[float] | None = key(
        None, "per channel, of [0, 1] values; null: the set's own (image_folder: ImageNet's)"
    )
    std: list[float] | None = key(None, "likewise")
    max_unreadable: float = key(
        0.001, "part of a split's images that may be unreadable before the run stops; 10 always may, unless it is 0"
    )


@dataclass
class OptimizerConfig:
    name: str = key("sgd", "a name in timm's list_optimizers(); timm's sgd is Nesterov's, momentum is without")
    lr: float = key(0.1, "the peak learning rate, in lr_basis")
    lr_basis: str = key("per_256", "per_256: lr x global_batch_size / 256; absolute")
    weight_decay: float = key(1e-4, "not on norms, biases and position embeddings")
    momentum: float | None = key(None, "null: timm's default (0.9) where the optimizer has one")
    betas: list[float] | None = key(None, "null: the optimizer's default")
    eps: float | None = key(None, "null: the optimizer's default")
    layer_decay: float | None = key(None, "each layer's lr is layer_decay x that of the next; null: one lr for all")
    args: dict[str, Any] = key({}, "the optimizer's own arguments, as in optimizer.args={rho:0.9}")


@dataclass
class ScheduleConfig:
    name: str = key("cosine", "a name of timm's: cosine, step, multistep, poly, tanh, wsd, rsqrt, constant")
    warmup_epochs: float = key(0.0, "epochs of linear warm-up from warmup_lr, within trainer.epochs")
    warmup_lr: float = key(0.0, "lr of the first step, absolute")
    min_lr: float = key(0.0, "the lower end, absolute")
    decay_epochs: float | None = key(
        None, "step: epochs between decays (null: 30); wsd, rsqrt: epochs of the decay (null: the last fifth)"
    )
    decay_rate: float = key(0.1, "schedule.name=step or multistep: factor; poly: power")
    decay_milestones: list[float] = key([30.0, 60.0, 90.0], "schedule.name=multistep: epochs of the decays")
    args: dict[str, Any] = key({}, "other arguments of timm's create_scheduler_v2, as in schedule.args={k_decay:1.5}")


@dataclass
class AugmentConfig:
    crop: bool = key(True, "random crop, see crop_mode; false: centre crop")
    crop_padding: int | None = key(None, "pixels, crop_mode=padded; null: image_size / 8")
    crop_scale: list[float] = key([0.08, 1.0], "crop_mode=resized: area of the crop, as a part of the image")
    crop_ratio: list[float] = key([0.75, 1.3333], "its aspect ratio")
    crop_mode: str = key("auto", "padded, resized; auto: padded for images <= 64 px, resized for larger ones")
    hflip: bool | None = key(None, "random horizontal flip; null: yes, but not for digits")
    policy: str = key("none", "none, rand_augment, trivial_augment or auto_augment_{imagenet,cifar10,svhn}")
    policy_ops: int = key(2, "operations an image, rand_augment")
    policy_magnitude: int = key(9, "their magnitude, 0 to 30, rand_augment")
    brightness: float = key(0.0, "colour jitter: factors from 1 - x to 1 + x")
    contrast: float = key(0.0, "likewise")
    saturation: float = key(0.0, "likewise")
    hue: float = key(0.0, "colour jitter: shift from -x to x of the circle, 0.5 at most")
    erasing_prob: float = key(0.0, "random erasing: probability for an image")
    erasing_scale: list[float] = key([0.02, 0.33], "its area, as a part of the image")
    mixup: float = key(0.0, "mixup's alpha; 0: none")
    cutmix: float = key(0.0, "cutmix's alpha; 0: none")
    mix_prob: float = key(1.0, "probability of mixing a micro-batch at all")
    mix_switch_prob: float = key(0.5, "of cutmix, where both are on")
    mix_off_epochs: int = key(0, "the last epochs go without mixup and cutmix")


@dataclass
class TrainerConfig:
    epochs: int = key(100, "passes over the training images; an epoch drops its incomplete last batch")
    max_steps: int | None = key(None, "ends the run, and its schedule, after so many steps")
    max_hours: float | None = key(None, "saves and exits with code 75 after so many hours; run again to continue")
    global_batch_size: int = key(256, "images a step, over all devices and accumulation")
    grad_accum_steps: int = key(1, "micro-batches a step, for each process; divides global_batch_size")
    micro_batch_size: int | str | None = key(
        None, "images of a process's micro-batch; auto: the most that fit into memory; null: from grad_accum_steps"
    )
    sync_batch_norm: bool = key(False, "under torchrun: batch norm over all processes' micro-batches; CUDA alone")
    eval_every_epochs: int = key(1, "epochs between evaluations on val; the last epoch is always evaluated")
    precision: str = key("auto", "fp32, bf16, fp16; auto: bf16 on a CUDA device that has it, else fp32")
    channels_last: bool = key(False, "channels-last memory format")
    matmul_precision: str = key("highest", "of fp32: highest; high and medium allow TF32 on CUDA, convolutions too")
    compile: bool = key(False, "torch.compile the training forward pass")
    deterministic: bool = key(False, "bit-identical runs on CUDA too, slower; the CPU is deterministic anyway")
    grad_clip_norm: float | None = key(None, "clip the gradient's global L2 norm; null: no clipping")
    grad_clip_value: float | None = key(None, "clip each number of the gradient instead")
    grad_clip_agc: float | None = key(
        None, "adaptive clipping instead: each unit's gradient to this part of its weight's norm, not in the classifier"
    )
    grad_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    ema_decay: float | None = key(
        None, "exponential moving average of the weights; val and best then use it; null: none"
    )
    ema_warmup: bool = key(True, "let the decay grow to ema_decay: min(ema_decay, 1 - step^(-2/3))")
    loss: str = key("cross_entropy", "cross_entropy or bce (a sigmoid a class)")
    label_smoothing: float = key(0.0, "of the training loss")
    bn_recalibration_batches: int = key(
        0, "before each evaluation batch norm's statistics are taken anew from so many training micro-batches"
    )
    log_every_steps: int = key(50, "steps between train rows in metrics.jsonl")
    checkpoint_every_steps: int | None = key(None, "null: at the end of each epoch alone")
    on_failed_save: str = key(
        "stop", "when a checkpoint cannot be written, on a full disk say: stop, or continue and try the next one"
    )
    log_histograms: bool = key(False, "histograms of all weights in TensorBoard at each evaluation")
    profile_steps: int = key(0, "profile so many steps, soon after a start: trace and table in the run folder")
    keep_checkpoints: int = key(3, "step-numbered checkpoints kept beside last and best")
    device: str = key("auto", "auto, cpu or cuda")


@dataclass
class TrainConfig:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    seed: int = key(0, "of initialisation, order, crops and flips")
    run_name: str | None = key(None, "null: readable, from those keys that change the trajectory")
    output_dir: str = key("outputs", "run folders are made here")
    resume: str = key("auto", "auto; never (a new numbered run); a run folder (in place); a checkpoint (a new run)")
    allow_config_change: list[str] = key([], "keys that may differ from the checkpoint's on resume")


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


def key_table() -> dict[str, dataclasses.Field]:
    """Each knob's dotted key and its dataclass field, in order; top-level knobs last."""
    table: dict[str, dataclasses.Field] = {}
    for group in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(group.type):
            table.update({f"{group.name}.{f.name}": f for f in dataclasses.fields(group.type)})
    table.update({f.name: f for f in dataclasses.fields(TrainConfig) if not dataclasses.is_dataclass(f.type)})
    return table


DIALS = ("stem", "stage_ops", "kernel_size", "num_heads", "width", "position", "content", "border")
