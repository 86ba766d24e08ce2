"""What the page shows of one run's model: curves from its log, classes and attention from its checkpoint and data."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchvision.datasets import CIFAR10, CIFAR100

from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import ImageSet, limit, load_image_sets
from sasa_train.data.fingerprint import fingerprint
from sasa_train.device import resolve
from sasa_train.extras import has_matplotlib
from sasa_train.refusal import ConfigError
from sasa_train.report.jobs import Job
from sasa_train.report.pictures import NO_PLOTS, Picture, Section, picture
from sasa_train.runs.checkpoint import CheckpointError
from sasa_train.runs.metrics import read_metrics
from sasa_train.trained import TrainedModel, load_trained
from sasa_train.visualize.capture import WeightsError
from sasa_train.visualize.names import FIGURES
from sasa_train.visualize.val_sample import ValSample, look_at_val, which_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_ATTENTION = ("attention_maps", "attention_heads", "attention_distance", "relative_embeddings")


def curves_section(job: Job) -> Section:
    """From metrics.jsonl alone."""
    section = Section("curves", "Curves")
    assert job.run_dir is not None
    rows = [] if job.state == "damaged" else read_metrics(job.run_dir / "metrics.jsonl")
    if not rows:
        section.missing.append("There are no rows of metrics to draw.")
    elif not has_matplotlib():
        section.missing.append(NO_PLOTS)
    else:
        from sasa_train.visualize.curve_figures import draw_lr_schedule, draw_training_curves

        of_loss, of_lr = draw_training_curves({"": rows}), draw_lr_schedule({"": rows})
        section.pictures = [
            _picture("training_curves", of_loss, "Loss and top1 on train and val over the epochs."),
            _picture("lr_schedule", of_lr, "The learning rate over the epochs, as the run logged it."),
        ]
    return section


def model_sections(run_dir: Path, overrides: Sequence[str], num_images: int) -> list[Section]:
    """What needs the checkpoint and the images; where one of them is not there, a section that says so.

    Args:
        overrides: as for `load_trained`.
        num_images: of val at most, a class-balanced, fixed part, for what is counted by class.
    """
    try:
        trained = load_trained(newest_checkpoint(run_dir), overrides)
        val = _load_val(trained)
    except (CheckpointError, ConfigError) as error:
        return [Section("model", "Classes and attention", missing=[f"Not drawn: {error}"])]
    classes, attention = Section("classes", "Classes"), Section("attention", "Attention")
    augmentation = Section("augmentation", "Augmentation")
    step, name = trained.checkpoint["step"], f"{trained.path.parent.name}/{trained.path.name}"
    classes.note = f"Classes and attention are those of the {trained.weights} weights of {name}, step {step:,}."
    _fill(classes, lambda: _add_classes(classes, trained, val, num_images))
    if has_matplotlib():
        _fill(attention, lambda: _add_drawn(attention, trained, run_dir, OF_ATTENTION))
        _fill(augmentation, lambda: _add_drawn(augmentation, trained, run_dir, ("augmented_samples",)))
    else:
        attention.missing.append(NO_PLOTS)
    return [section for section in (classes, attention, augmentation) if section.pictures or section.missing]


def newest_checkpoint(run_dir: Path) -> Path:
    """last.pt, whose figures are those to publish; where it is not there, what `load_trained` takes of the folder."""
    last = run_dir / "checkpoints/last.pt"
    return last if last.exists() else run_dir


def _load_val(trained: TrainedModel) -> ImageSet:
    data = trained.config.data
    if not _is_there(data):  # it may be where another directory was the current one; and a report downloads nothing
        what = f"holds no whole {data.name}" if data.name in ("cifar10", "cifar100") else "is not there"
        raise ConfigError(f"data.root={data.root} {what}; say where with data.root=...")
    _, val = load_image_sets(data)
    trained.check_classes(val.classes)
    return val


def _is_there(data: DataConfig) -> bool:
    root = Path(data.root)
    if data.name in ("cifar10", "cifar100"):
        return (root / "train").is_dir() or _has_archive(CIFAR10 if data.name == "cifar10" else CIFAR100, root)
    return data.name == "digits" or root.is_dir()


def _has_archive(dataset: type[CIFAR10], root: Path) -> bool:
    """Unpacked and whole: a damaged one would be fetched again."""
    try:
        dataset(root, train=False, download=False)
    except (OSError, RuntimeError):
        return False
    return True


def _fill(section: Section, add: Callable[[], None]) -> None:
    """What cannot be drawn is said in its place; the rest of the page is worth having."""
    try:
        add()
    except (ConfigError, WeightsError, OSError) as error:
        section.missing.append(f"Not drawn: {error}")


def _add_drawn(section: Section, trained: TrainedModel, run_dir: Path, names: Sequence[str]) -> None:
    """What sasa-visualize draws as well."""
    from sasa_train.visualize.run_figures import draw_run, not_drawable

    reasons = not_drawable(trained, run_dir)
    section.missing += [f"Not drawn: {reason}." for reason in dict.fromkeys(reasons[n] for n in names if n in reasons)]
    for name, figure, caption in draw_run(trained, run_dir, names):
        section.pictures.append(_picture(name, figure, caption))


def _add_classes(section: Section, trained: TrainedModel, val: ImageSet, num_images: int) -> None:
    for line in trained.changes(fingerprint(val)):
        section.missing.append(f"Not the images that the run was evaluated on: {line}")
    device, trained.config = resolve(trained.config)  # with the precision that "auto" is here
    found = look_at_val(trained, limit(val, num_images), device, with_attention=False)
    section.rows = class_rows(found, trained.classes)
    section.rows_title = f"Classes, the worst first, over {which_images(found, len(val))}"
    if not has_matplotlib():
        section.missing.append(NO_PLOTS)
        return
    from sasa_train.visualize.run_figures import OF_CLASSES, draw_classes

    names = [name for name in OF_CLASSES if name != "mistakes" or found.mistakes]
    for name, figure, caption in draw_classes(found, trained.classes, len(val), names):
        section.pictures.append(_picture(name, figure, caption))


def class_rows(found: ValSample, classes: list[str]) -> list[dict[str, str]]:
    counts = found.confusion.tolist()
    rows = []
    for label, name in enumerate(classes):
        images, hits = sum(counts[label]), counts[label][label]
        others = ((count, other) for other, count in enumerate(counts[label]) if other != label)
        most, other = max(others, default=(0, label))  # of a set with one class
        rows.append(
            {
                "class": name,
                "images": str(images),
                "top1": f"{100 * hits / images:.2f}" if images else "-",
                "most often taken for": f"{classes[other]} ({most})" if most else "-",
            }
        )
    return sorted(rows, key=lambda row: float(row["top1"]) if row["top1"] != "-" else 101.0)


def _picture(name: str, figure: "Figure", caption: str) -> Picture:
    from sasa_train.figures import rendered

    alt = FIGURES[name]
    return picture(rendered(figure), alt[0].upper() + alt[1:], caption)
