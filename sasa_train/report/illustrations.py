"""The figures on a run's page: curves from its log, and classes and attention from its checkpoint and data."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from sasa_train.config.keys import DataConfig
from sasa_train.config.places import tell_places
from sasa_train.data.datasets import ImageSet, check_whole_set, limit, load_val_set, reads_torchvision
from sasa_train.data.fingerprint import fingerprint
from sasa_train.data.hf_sets import is_cached
from sasa_train.data.urls import ServerError
from sasa_train.refusal import ConfigError
from sasa_train.report.jobs import Job
from sasa_train.report.page import Section
from sasa_train.runs.checkpoint import CheckpointError
from sasa_train.runs.metrics import read_metrics
from sasa_train.trained import TrainedModel, load_trained
from sasa_train.visualize.capture import WeightsError
from sasa_train.visualize.names import FIGURES, OF_ATTENTION, OF_CLASSES
from sasa_train.visualize.val_sample import ValSample, look_at_val, which_images

MAX_TIED = 3  # classes that are named as most often predicted in place of another


def curves_section(job: Job) -> Section:
    """Draw the curves, using only metrics.jsonl."""
    section = Section("curves", "Curves")
    assert job.run_dir is not None
    rows = [] if job.state == "damaged" else read_metrics(job.run_dir / "metrics.jsonl")
    if not rows:
        section.missing.append("There are no metrics to draw.")
    elif section.can_draw():
        from sasa_train.visualize.curve_figures import draw_curves, too_short

        section.add(draw_curves({"": rows}))
        section.missing += [
            f"{FIGURES[name].capitalize()}: not drawn, {why}." for name, why in too_short({"": rows}).items()
        ]
    return section


def model_sections(run_dir: Path, overrides: Sequence[str], num_images: int) -> list[Section]:
    """Draw the figures that require the checkpoint and images; if either is missing, return a section that says so.

    Args:
        overrides: see `load_trained`.
        num_images: maximum number of val images (a fixed, class-balanced subset) for the per-class figures.
    """
    last = run_dir / "checkpoints/last.pt"  # results for publication come from this checkpoint
    try:
        trained = load_trained(last if last.exists() else run_dir, overrides)
        val = _load_val(trained)
    except (CheckpointError, ConfigError, ServerError) as error:
        return [Section("model", "Classes and attention", missing=[f"Not drawn: {error}"])]
    step, name = trained.checkpoint["step"], f"{trained.path.parent.name}/{trained.path.name}"
    note = (
        f"Classes and attention are those of the {trained.weights} weights of {name}, step {step:,}. For a run "
        "folder, sasa-visualize, sasa-evaluate, sasa-predict, sasa-export and sasa-demo take best.pt, whose figures "
        "may differ; give them checkpoints/last.pt to compare."
    )
    classes, attention = Section("classes", "Classes", note), Section("attention", "Attention")
    augmentation = Section("augmentation", "Augmentation")
    _fill(classes, partial(_add_classes, classes, trained, val, num_images))
    if attention.can_draw():
        _fill(attention, partial(_add_drawn, attention, trained, run_dir, OF_ATTENTION))
        _fill(augmentation, partial(_add_drawn, augmentation, trained, run_dir, ("augmented_samples",)))
    return [section for section in (classes, attention, augmentation) if section.pictures or section.missing]


def _load_val(trained: TrainedModel) -> ImageSet:
    data = trained.config.data
    tell_places(trained.given, trained.config)
    # A relative path may still refer to another directory, and a report downloads nothing.
    check_whole_set(data, trained.classes)
    if not _is_there(data, trained.classes):
        raise ConfigError(f"{data.place} is not there; say where with {data.place.partition('=')[0]}=...")
    return load_val_set(data, trained.classes)


def _is_there(data: DataConfig, classes: Sequence[str]) -> bool:
    """Check that the data set is on disk; torchvision's are checked before."""
    if data.name == "list":
        return Path(data.val or data.train or "").is_file()
    if data.name == "hf":
        return is_cached(data)
    is_known = data.name in ("digits", "own", "torchvision") or data.is_remote or reads_torchvision(data, classes)
    return is_known or Path(data.folder).is_dir()


def _fill(section: Section, add: Callable[[], None]) -> None:
    """Add figures to the section or, if they cannot be drawn, the reason, so that the page can still be written."""
    try:
        add()
    except (ConfigError, WeightsError, ServerError, OSError) as error:
        section.missing.append(f"Not drawn: {error}")


def _add_drawn(section: Section, trained: TrainedModel, run_dir: Path, names: Sequence[str]) -> None:
    from sasa_train.visualize.drawing import draw_run, not_drawable

    reasons = not_drawable(trained, run_dir)
    section.missing += [f"Not drawn: {reason}." for reason in dict.fromkeys(reasons[n] for n in names if n in reasons)]
    drawable = [name for name in names if name not in reasons]
    section.add(draw_run(trained, run_dir, drawable), len(drawable))


def _add_classes(section: Section, trained: TrainedModel, val: ImageSet, num_images: int) -> None:
    changes = trained.changes(fingerprint(val))
    section.missing += [f"Not the images that the run was evaluated on: {line}" for line in changes]
    found = look_at_val(trained, limit(val, num_images))
    section.rows = class_rows(found, trained.classes)
    section.rows_title = f"Classes, the worst first, over {which_images(found, len(val))}"
    if section.can_draw():
        from sasa_train.visualize.drawing import draw_classes

        names = [name for name in OF_CLASSES if name != "mistakes" or found.mistakes]
        section.add(draw_classes(found, trained.classes, len(val), names), len(names))


def class_rows(found: ValSample, classes: list[str]) -> list[dict[str, str]]:
    """Return one line per class, with the worst class first and classes without images last."""
    rows = []
    for label, (name, counts) in enumerate(zip(classes, found.confusion.tolist(), strict=True)):
        images, hits = sum(counts), counts[label]
        others = [count for other, count in enumerate(counts) if other != label]
        most = max(others, default=0)  # the default is for data sets with a single class
        taken_for = [classes[other] for other, count in enumerate(counts) if count == most and other != label]
        row = {
            "class": name,
            "images": str(images),
            "top1": f"{100 * hits / images:.2f}" if images else "-",
            "most often taken for": _most_often(taken_for, most) if most else "-",
        }
        rows.append((100 * hits / images if images else 101.0, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _most_often(names: list[str], count: int) -> str:
    """Name the classes that are predicted equally often, `count` times; of many, say only how many they are."""
    if len(names) > MAX_TIED:
        return f"{len(names)} classes ({count} each)"
    return f"{', '.join(names)} ({count}{' each' if len(names) > 1 else ''})"
