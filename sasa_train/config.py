"""Every knob, with type, default, unit and meaning; the rules between them; and which of them shape a trajectory.

No torch here, so that `--help` is instant. `configs/` holds named sets of values for these knobs, nothing else.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterator
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


class ConfigError(Exception):
    """A refused config or input: the message names the key, its value, the rule and the remedy. Exit code 2."""


# What timm, torch and their like raise over values that cannot be, or only then where they are used.
LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


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


def trajectory(config: TrainConfig) -> dict[str, Any]:
    """The knobs that change what a run computes."""
    return {key: value for key, value in flatten(config).items() if key not in NOT_TRAJECTORY}


def default_run_name(config: TrainConfig) -> str:
    """Readable and stable: model, data, epochs, seed, and 8 hex digits of the whole trajectory.

    Of what differs from the defaults, so that a knob of a later version does not give all runs other names.
    """
    defaults = flatten(TrainConfig())
    identity = {key: value for key, value in trajectory(config).items() if value != defaults[key]}
    if config.data.name != "digits":
        identity["data.root"] = config.data.root
    if config.resume not in ("auto", "never"):
        identity["resume"] = config.resume
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    model = re.sub(r"[^A-Za-z0-9_.-]+", "-", config.model.name)
    return f"{config.data.name}-{model}-e{config.trainer.epochs}-s{config.seed}-{digest}"


def differing_keys(old: TrainConfig, new: TrainConfig, same_world_size: bool = True) -> list[str]:
    """The knobs that two configs set differently and that change what a run computes.

    How the global batch is cut into micro-batches follows from the number of processes, so where that differs, it may.
    """
    before, after = trajectory(old), trajectory(new)
    if new.trainer.micro_batch_size == "auto" or not same_world_size:  # auto goes on with what the run began with
        for key in ("trainer.micro_batch_size", "trainer.grad_accum_steps"):
            before.pop(key), after.pop(key)
    return sorted(key for key in after.keys() | before.keys() if before.get(key) != after.get(key))


def validate(config: TrainConfig) -> None:
    """Raise ConfigError for values that break a rule or cannot go together; nothing is loaded yet."""
    flat = flatten(config)
    for key, value in flat.items():
        _validate_value(key, value, MAX_DEPTH if key in FREE_KEYS else 1)
    for key, choices in CHOICES.items():
        _rule(flat[key] in choices, key, flat[key], f"must be one of {', '.join(choices)}")
    for key in POSITIVE:
        _rule(flat[key] is None or flat[key] > 0, key, flat[key], "must be positive")
    for key in NOT_NEGATIVE:
        _rule(flat[key] is None or flat[key] >= 0, key, flat[key], "must not be negative")
    for key in FRACTIONS:
        holds = all(0 <= number < 1 for number in _leaves(flat[key]) if number is not None)
        _rule(holds, key, flat[key], "must be at least 0 and below 1")
    for key in config.allow_config_change:
        _rule(key in knob_table(), "allow_config_change", key, "must name knobs, as in [trainer.epochs]")
    for key in PROBABILITIES:
        holds = all(0 <= number <= 1 for number in _leaves(flat[key]) if number is not None)
        _rule(holds, key, flat[key], "must be from 0 to 1")
    for key in RANGES:
        low, high = flat[key] if len(flat[key]) == 2 else (1, 0)
        _rule(0 < low <= high, key, flat[key], "must be [low, high] with 0 < low <= high")
    for key, limit in AT_MOST.items():
        largest = max(flat[key]) if isinstance(flat[key], list) else flat[key]
        _rule(largest is None or largest <= limit, key, flat[key], f"must be {limit} at most")
    _validate_model(config.model, resolved_image_size(config.data))
    _validate_data(config)
    _validate_batches(config)
    trainer = config.trainer
    clips = [key for key in ("grad_clip_norm", "grad_clip_value", "grad_clip_agc") if getattr(trainer, key)]
    _rule(len(clips) <= 1, "trainer.grad_clip_...", clips, "exclude each other: set one")
    _rule(
        config.schedule.warmup_epochs <= trainer.epochs,
        "schedule.warmup_epochs",
        config.schedule.warmup_epochs,
        f"must not exceed trainer.epochs={trainer.epochs}",
    )
    milestones = config.schedule.decay_milestones
    _rule(
        all(0 <= early <= late for early, late in itertools.pairwise([0.0, *milestones])),
        "schedule.decay_milestones",
        milestones,
        "must be epochs in ascending order, none negative",
    )
    _validate_names(config)


def _leaves(value: Any) -> Iterator[Any]:
    """A knob's value, or what its lists and dicts hold."""
    if not isinstance(value, dict | list):
        yield value
        return
    for part in value.values() if isinstance(value, dict) else value:
        yield from _leaves(part)


def _depth(value: Any) -> int:
    """How many lists and dicts are in one another."""
    if not isinstance(value, dict | list):
        return 0
    return 1 + max((_depth(part) for part in (value.values() if isinstance(value, dict) else value)), default=0)


def _argument_names(value: Any) -> Iterator[Any]:
    """The keys of a knob's dicts, however deep."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _argument_names(part)


def _validate_value(key: str, value: Any, depth: int) -> None:
    """Refuse what makes sense in no knob, or in no list or argument of one."""
    _rule(_depth(value) <= depth, key, value, f"must not have more than {depth} lists or dicts in one another")
    for name in _argument_names(value):
        is_name = isinstance(name, str) and ARGUMENT_NAME.fullmatch(name)
        _rule(bool(is_name), key, value, f"must name arguments, as in {{rho:0.9}}: {name!a} is no name")
    for leaf in _leaves(value):
        _validate_leaf(key, value, leaf)


def _validate_leaf(key: str, value: Any, leaf: Any) -> None:
    if isinstance(leaf, str):
        _rule(leaf != "", key, repr(value), "must not be an empty text")
        is_plain = all(unicodedata.category(char) not in ("Cc", "Cs") for char in leaf)
        _rule(is_plain, key, ascii(value), "must be text without control characters or bytes that are no text")
        _rule("${" not in leaf, key, value, "must not hold ${ once it is composed; write the value itself")
    elif isinstance(leaf, float):
        fits = leaf == 0 or 1e-38 <= abs(leaf) <= 1e38
        _rule(fits, key, value, "must be finite, and 0 or of a size from 1e-38 to 1e38, which float32 holds")
    elif isinstance(leaf, int):
        _rule(abs(leaf) < 2**63, key, value, "must fit into 64 bits")
    else:
        _rule(leaf is None, key, value, "must hold numbers, texts, true, false or null alone")


def _validate_names(config: TrainConfig) -> None:
    """Names and paths that no file system would take."""
    paths = {"data.root": config.data.root, "output_dir": config.output_dir, "resume": config.resume}
    if config.model.pretrained is not None:
        paths["model.pretrained"] = config.model.pretrained
    for key, path in paths.items():
        fits = max(len(name.encode()) for name in path.split("/")) <= 255 and len(path.encode()) < 4096
        _rule(fits, key, path, "must be a path: 255 bytes a folder and 4,095 in all")
    if config.run_name is not None:
        _rule(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.=,+-]{0,199}", config.run_name) is not None,
            "run_name",
            config.run_name,
            "must be a plain folder name: letters, digits and _ . = , + -, 200 at most",
        )


POSITIVE = (
    "data.image_size",
    "data.worker_timeout",
    "data.max_train_images",
    "data.max_val_images",
    "model.kernel_size",
    "model.num_classes",
    "model.num_heads",
    "model.width",
    "optimizer.lr",
    "optimizer.layer_decay",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.global_batch_size",
    "trainer.grad_accum_steps",
    "trainer.eval_every_epochs",
    "trainer.grad_clip_norm",
    "trainer.grad_clip_value",
    "trainer.grad_clip_agc",
    "trainer.max_hours",
    "trainer.ema_decay",
    "trainer.log_every_steps",
    "trainer.checkpoint_every_steps",
    "schedule.decay_epochs",
)
NOT_NEGATIVE = (
    "seed",
    "data.num_workers",
    "augment.crop_padding",
    "optimizer.weight_decay",
    "optimizer.momentum",
    "optimizer.eps",
    "schedule.decay_rate",
    "schedule.warmup_epochs",
    "schedule.warmup_lr",
    "schedule.min_lr",
    "trainer.keep_checkpoints",
    "trainer.bn_recalibration_batches",
    "trainer.profile_steps",
    "augment.policy_ops",
    "augment.policy_magnitude",
    "augment.brightness",
    "augment.contrast",
    "augment.saturation",
    "augment.hue",
    "augment.mixup",
    "augment.cutmix",
    "augment.mix_off_epochs",
)
PROBABILITIES = (
    "augment.erasing_prob",
    "augment.mix_prob",
    "augment.mix_switch_prob",
    "data.max_unreadable",
    "data.mean",
)
RANGES = ("augment.crop_scale", "augment.crop_ratio", "augment.erasing_scale")
AT_MOST = {
    "augment.crop_scale": 1,
    "augment.erasing_scale": 1,
    "augment.hue": 0.5,
    "augment.policy_ops": 8,
    "augment.policy_magnitude": 30,
    "data.image_size": 2**14,  # Pillow and torch count the bytes of a larger image in more than 32 bits
    "data.num_workers": 1024,  # processes, which a machine runs out of
    "trainer.global_batch_size": 2**24,  # no data set here has more images
    "optimizer.layer_decay": 1,
}
FRACTIONS = (
    "data.holdout_fraction",
    "model.drop_path_rate",
    "model.bn_momentum",
    "optimizer.betas",
    "trainer.ema_decay",
    "trainer.label_smoothing",
)
DIALS = ("stem", "stage_ops", "kernel_size", "num_heads", "width", "position", "content", "border")


def _validate_model(model: ModelConfig, image_size: int) -> None:
    _rule(
        model.pretrained != PUBLISHED or model.name not in OWN_MODELS,
        "model.pretrained",
        model.pretrained,
        f"is for timm's models: no weights of {model.name} are published; name a checkpoint or an export",
    )
    if model.name not in OWN_MODELS:
        for dial in DIALS:
            _rule(
                getattr(model, dial) is None,
                f"model.{dial}",
                getattr(model, dial),
                f"is a dial of our own models, which model.name={model.name} is not: leave it out, or choose one of "
                + ", ".join(OWN_MODELS),
            )
    _rule(
        model.kernel_size is None or model.kernel_size % 2 == 1,
        "model.kernel_size",
        model.kernel_size,
        "must be odd, so that the window has a centre",
    )
    _rule(
        model.kernel_size is None or model.kernel_size < 2 * image_size,
        "model.kernel_size",
        model.kernel_size,
        f"must be {2 * image_size - 1} at most for images of {image_size} pixels: no window reaches further",
    )


def _validate_batches(config: TrainConfig) -> None:
    trainer = config.trainer
    _rule(
        trainer.global_batch_size % trainer.grad_accum_steps == 0,
        "trainer.global_batch_size",
        trainer.global_batch_size,
        f"must be divisible by trainer.grad_accum_steps={trainer.grad_accum_steps}; the nearest that fit are "
        + " and ".join(str(n) for n in _nearest_multiples(trainer.global_batch_size, trainer.grad_accum_steps)),
    )
    if config.augment.mixup or config.augment.cutmix:
        off = config.augment.mix_off_epochs
        _rule(off < trainer.epochs, "augment.mix_off_epochs", off, f"must be below trainer.epochs={trainer.epochs}")
    micro = trainer.micro_batch_size
    if micro == "auto":
        accum = trainer.grad_accum_steps
        _rule(
            accum == 1, "trainer.grad_accum_steps", accum, "contradicts trainer.micro_batch_size=auto; set one of them"
        )
    _check_mixing(config, micro_batch_size(trainer, world_size=1))
    if micro in (None, "auto"):
        return
    fits = isinstance(micro, int) and micro > 0 and trainer.global_batch_size % micro == 0
    rule = f"must be auto or divide trainer.global_batch_size={trainer.global_batch_size}"
    _rule(fits, "trainer.micro_batch_size", repr(micro), rule)
    _rule(
        trainer.grad_accum_steps in (1, trainer.global_batch_size // int(micro or 1)),
        "trainer.grad_accum_steps",
        trainer.grad_accum_steps,
        f"contradicts trainer.micro_batch_size={micro}; set one of the two",
    )


def _validate_data(config: TrainConfig) -> None:
    data, augment = config.data, config.augment
    size = resolved_image_size(data)
    _rule(
        data.resident != "true" or crops_by_padding(data, augment),
        "data.resident",
        data.resident,
        f"needs images of {SMALL_IMAGE} pixels and less and augment.crop_mode=padded, but data.image_size={size}: a "
        "random-resized crop reads the originals; use data.resident=auto",
    )
    for name in ("mean", "std"):
        value = getattr(data, name)
        _rule(value is None or len(value) == 3, f"data.{name}", value, "must be three numbers, red, green and blue")
    _rule(data.std is None or min(data.std) > 0, "data.std", data.std, "must be positive")
    _rule(
        (augment.crop_padding or 0) <= size,
        "augment.crop_padding",
        augment.crop_padding,
        f"must not exceed data.image_size={size}, or crops would hold nothing of the image",
    )
    _rule(
        augment.crop_mode != "padded" or size <= SMALL_IMAGE,
        "augment.crop_mode",
        augment.crop_mode,
        f"is for images of {SMALL_IMAGE} pixels and less, but data.image_size={size}; use auto or resized",
    )


def crops_by_padding(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether images are fitted to size once and then cropped after padding, which whole batches can be."""
    return resolved_image_size(data) <= SMALL_IMAGE and augment.crop_mode != "resized"


def flips_images(data: DataConfig, augment: AugmentConfig) -> bool:
    """Whether training mirrors half of the images: as `augment.hflip` says; left out, all but digits."""
    return augment.hflip if augment.hflip is not None else data.name != "digits"


def resolved_image_size(data: DataConfig) -> int:
    return data.image_size or {"digits": 8, "cifar10": 32, "cifar100": 32}.get(data.name, 224)


def check_world_size(config: TrainConfig, world_size: int) -> None:
    """Refuse a global batch that so many processes cannot share. Not part of `validate`: a saved config may have been
    another number's.
    """
    trainer = config.trainer
    per_process, key = trainer.grad_accum_steps, "trainer.grad_accum_steps"
    if isinstance(trainer.micro_batch_size, int):
        per_process, key = trainer.micro_batch_size, "trainer.micro_batch_size"
    divisor = world_size * per_process
    _rule(
        trainer.global_batch_size % divisor == 0,
        "trainer.global_batch_size",
        trainer.global_batch_size,
        f"must be divisible by {world_size} processes x {key}={per_process}; the nearest that fit are "
        + " and ".join(str(n) for n in _nearest_multiples(trainer.global_batch_size, divisor)),
    )
    _check_mixing(config, micro_batch_size(trainer, world_size))


def _check_mixing(config: TrainConfig, micro_batch: int) -> None:
    _rule(
        micro_batch != 1 or not (config.augment.mixup or config.augment.cutmix),
        "micro-batches of",
        micro_batch,
        "image leave mixup and cutmix no other to mix with; use larger ones",
    )


def micro_batch_size(trainer: TrainerConfig, world_size: int) -> int:
    """Images of each process's micro-batch; `auto`, before it is settled, counts as no accumulation."""
    if isinstance(trainer.micro_batch_size, int):
        return trainer.micro_batch_size
    return trainer.global_batch_size // (world_size * trainer.grad_accum_steps)


def accumulation(trainer: TrainerConfig, world_size: int) -> int:
    """Micro-batches of each process in a step."""
    return trainer.global_batch_size // (world_size * micro_batch_size(trainer, world_size))


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    planned = config.trainer.epochs * steps_per_epoch
    return min(planned, config.trainer.max_steps or planned)


def _nearest_multiples(value: int, divisor: int) -> list[int]:
    below = value // divisor * divisor
    return [n for n in (below, below + divisor) if n > 0]


def _rule(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise ConfigError(f"{key}={shorten(value)} {rule}")


def shorten(value: Any) -> str:
    """A value as messages show it: its beginning is enough."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"
