"""Distillation (`distill`): the loss of a student that imitates a teacher, which sees the same augmented images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sasa_train.config.derived import InputSize, expected_num_classes, in_pixels
from sasa_train.config.keys import DistillConfig, TrainConfig
from sasa_train.data.class_names import composed, twins, with_nearest
from sasa_train.data.datasets import mean_std
from sasa_train.device import RunPlan
from sasa_train.models import build_model
from sasa_train.processes import collectives
from sasa_train.refusal import ConfigError, shorten
from sasa_train.runs.folder import RunFolder, check_teacher
from sasa_train.runs.teacher import TeacherSource, read_teacher
from sasa_train.terminal import printable, say, some


class Teacher:
    """A trained model in eval mode on the run's device, which is not part of checkpoints.

    Raises:
        ConfigError: the teacher cannot take the run's images, draws random numbers or has other classes.
    """

    def __init__(self, source: TeacherSource, plan: RunPlan):
        self.config, self.what = plan.config.distill, f"distill.teacher={printable(str(plan.config.distill.teacher))}"
        self.title, self.classes, self.sha256 = source.model.title, source.classes, source.sha256
        self.columns: Tensor | None = None  # of the teacher's logits that are the run's classes, unless all are
        with torch.random.fork_rng(devices=[]):
            model = build_model(source.model, len(source.classes), source.size)
        model.load_state_dict(source.state_dict)
        self.model = model.eval().requires_grad_(False)
        self.size = self._check_images(source, plan)
        self.scale, self.shift = renormalisation(mean_std(plan.config.data), (source.mean, source.std))
        self.is_alike = bool((self.scale == 1).all() and (self.shift == 0).all())
        self._move(plan)

    def _check_images(self, source: TeacherSource, plan: RunPlan) -> tuple[int, int] | None:
        """Return the height and width to which images are resized, or None if the teacher takes the run's size."""
        if source.mode != plan.config.data.mode:
            raise ConfigError(
                f"{self.what}: was trained with data.mode={source.mode}, and this run has "
                f"data.mode={plan.config.data.mode}; use the same"
            )
        if self._takes(plan.input_size) is None:
            return None
        if (reason := self._takes(source.size)) is not None:
            raise ConfigError(f"{self.what}: cannot take images of {in_pixels(source.size)} ({reason})")
        return source.size[1:]

    def _takes(self, size: InputSize) -> str | None:
        """Return why the model takes no images of a size, or None if it does; raise ConfigError if it is no teacher."""
        before = torch.get_rng_state()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                logits = self.model(torch.zeros(1, *size))
            except Exception as error:  # one of the user's own may raise anything
                return shorten(error) or type(error).__name__
            draws = not torch.equal(before, torch.get_rng_state())
        if draws:
            raise ConfigError(f"{self.what}: draws random numbers in eval mode, which would change the student's")
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if shape != [1, len(self.classes)]:
            raise ConfigError(f"{self.what}: must return logits [1, {len(self.classes)}] for one image, not {shape}")
        return None

    def _move(self, plan: RunPlan) -> None:
        layout = torch.channels_last if plan.trainer.channels_last else torch.preserve_format
        self.model.to(plan.device).to(memory_format=layout)
        self.scale, self.shift = self.scale.to(plan.device), self.shift.to(plan.device)

    def match_together(self, classes: Sequence[str]) -> None:
        """Call `match` on all processes, and say what the teacher is."""
        collectives.everywhere(lambda: self.match(classes), ConfigError)
        say(self.describe())

    def match(self, classes: Sequence[str]) -> None:
        """Find the run's classes among the teacher's by name; raise ConfigError if one is missing."""
        names, theirs = composed(classes), composed(self.classes)
        if names == theirs:
            return
        if missing := [name for name in names if name not in set(theirs)]:
            raise ConfigError(
                f"{self.what}: has no class {', '.join(with_nearest(name, theirs) for name in missing[:5])}"
                + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
                + f"; it must have each of the run's {len(names):,} classes by name, and has {some(self.classes)}"
            )
        if same := twins(self.classes):
            raise ConfigError(f"{self.what}: its classes cannot be matched by name: it has {some(same)}")
        number = {name: column for column, name in enumerate(theirs)}
        self.columns = torch.tensor([number[name] for name in names], device=self.scale.device)

    def describe(self) -> str:
        """Return one line for the start of a run."""
        classes = f"{len(self.classes):,} classes"
        if self.columns is not None:
            classes += f", {len(self.columns):,} of them this run's, found by name"
        resized = f", images resized to {in_pixels(self.size)}" if self.size is not None else ""
        return f"teacher     {self.title}, {classes}{resized} (sha256 {self.sha256[:12]})"

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits [B, num_classes] of the run's classes for images normalised as the run's."""
        if not self.is_alike:
            images = images * self.scale + self.shift
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        logits = self.model(images).float()
        return logits if self.columns is None else logits[:, self.columns]

    def added_to(self, loss: Tensor, logits: Tensor, images: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the training loss: that of the labels, `loss`, and the teacher's term, by `distill.weight`.

        weights: of the images, [B], as in `loss` (`trainer.class_weights`).
        """
        losses = distillation_losses(logits, self.logits(images), self.config)
        mean = (losses if weights is None else weights * losses).mean()
        return (1 - self.config.weight) * loss + self.config.weight * mean


def distillation_losses(logits: Tensor, of_teacher: Tensor, config: DistillConfig) -> Tensor:
    """Return the teacher's term for each image, [B], for float32 logits [B, num_classes].

    soft: T^2 x KL(teacher || student) of softmax(logits / T) (arXiv 1503.02531); hard: cross-entropy with the teacher's
    most probable class, as DeiT's (arXiv 2012.12877). DeiT's code divides the former by the number of classes, too; its
    paper does not.
    """
    if config.kind == "hard":
        return F.cross_entropy(logits, of_teacher.argmax(1), reduction="none")
    student, teacher = (F.log_softmax(each / config.temperature, 1) for each in (logits, of_teacher))
    return config.temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


def renormalisation(
    ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]
) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C, 1, 1] that turn images normalised with mean and std `ours` into `theirs`."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in ours)
    mean_of_teacher, std_of_teacher = (torch.tensor(values, dtype=torch.float64) for values in theirs)
    scale, shift = std / std_of_teacher, (mean - mean_of_teacher) / std_of_teacher
    return scale.float()[:, None, None], shift.float()[:, None, None]


def load_teacher_together(plan: RunPlan, run: RunFolder) -> Teacher | None:
    """Return the teacher, read by the first process for all, or None if there is none.

    Raises:
        ConfigError: it is refused, or is not the one that the run was trained with.
    """
    config = plan.config
    if config.distill.teacher is None:
        return None
    source = collectives.from_first(lambda: read_teacher(config.distill), ConfigError)
    return collectives.everywhere(lambda: _build(source, plan, run), ConfigError)


def _build(source: TeacherSource, plan: RunPlan, run: RunFolder) -> Teacher:
    if run.checkpoint is not None:
        check_teacher(run.checkpoint, plan.config, run.path, source.sha256)
    check_count(source, plan.config)
    teacher = Teacher(source, plan)
    if run.checkpoint is not None:
        teacher.match(run.checkpoint["classes"])
    return teacher


def check_count(source: TeacherSource, config: TrainConfig) -> None:
    """Raise ConfigError if the teacher has fewer classes than the run, as far as it is known before images are read."""
    expected = expected_num_classes(config) or 0
    if len(source.classes) < expected:
        what = f"distill.teacher={printable(str(config.distill.teacher))}"
        raise ConfigError(
            f"{what}: has {len(source.classes):,} classes ({some(source.classes)}), and the run {expected:,}; it must "
            "have each of the run's by name"
        )
