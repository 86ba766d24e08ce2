"""The teacher of a distillation (`distill.teacher`): a run, checkpoint or export of ours, or one of timm's models."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import timm
from torch import nn

from sasa_train.config import own_code
from sasa_train.config.derived import InputSize, input_size
from sasa_train.config.keys import MODES, TIMM_TEACHER, DistillConfig, ModelConfig
from sasa_train.config.own_keys import targets_of
from sasa_train.config.saved import load_config
from sasa_train.data.datasets import mean_std
from sasa_train.files import is_there
from sasa_train.models import check_model
from sasa_train.models.build import build_published
from sasa_train.models.pretrained import StateDict
from sasa_train.refusal import CheckpointError, ConfigError, shorten
from sasa_train.runs.checkpoint import first_misfit, load_checkpoint
from sasa_train.runs.source import find_checkpoint, similar_runs
from sasa_train.runs.weights import class_names, digest_of, read_safetensors, sha256_of
from sasa_train.terminal import printable


@dataclass
class TeacherSource:
    """A teacher's weights, its model, and what it was trained on: classes, the size, mode and normalisation of images.

    `sha256` is that of the file or, for timm's weights, of the tensors.
    """

    state_dict: StateDict
    model: ModelConfig
    classes: list[str]
    size: InputSize
    mode: str
    mean: list[float]
    std: list[float]
    sha256: str = ""


def teacher_file(distill: DistillConfig) -> Path:
    """Return the file that holds the weights of a teacher that is not timm's; raise ConfigError if there is none."""
    source = Path(str(distill.file))
    exported = source / "model.safetensors"
    path = exported if exported.is_file() else find_checkpoint(source)
    if not is_there(path):
        raise ConfigError(
            f"distill.teacher={printable(source)} must be a run, a checkpoint, an export (.safetensors) or "
            f"{TIMM_TEACHER}NAME, and {printable(path)} is not there{similar_runs(source)}"
        )
    return path


def read_teacher(distill: DistillConfig) -> TeacherSource:
    """Read the teacher that `distill.teacher` names, executing no code in its file.

    Raises:
        ConfigError: there is no such teacher, its file is damaged or does not say what it was trained on, it needs code
            that nobody has named, or its weights are not those of its model.
    """
    what = f"distill.teacher={printable(str(distill.teacher))}"
    try:
        if distill.file is None:
            return _published(str(distill.teacher).removeprefix(TIMM_TEACHER))
        path = teacher_file(distill)
        digest = sha256_of(path)
        found = _exported(path) if path.suffix == ".safetensors" else _trained(path)
        if sha256_of(path) != digest:
            raise ConfigError("a run wrote its next checkpoint meanwhile; try again")
        model = check_model(found.model, found.size, len(found.classes))
        if wrong := first_misfit(model, found.state_dict):
            raise ConfigError(f"the weights are not those of a model of its config: {wrong}")
    except (ConfigError, CheckpointError) as error:
        text = str(error)
        raise ConfigError(text if text.startswith("distill.teacher") else f"{what}: {text}") from error
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({error.strerror or error})") from error
    found.sha256 = digest
    return found


def _trained(path: Path) -> TeacherSource:
    checkpoint = load_checkpoint(path)
    averaged = checkpoint["ema"] if checkpoint["ema"] is not None else checkpoint["model"]
    return _of_config(averaged, checkpoint["config"], checkpoint["classes"], path)


def _exported(path: Path) -> TeacherSource:
    try:
        described, state_dict = read_safetensors(path)
    except OSError:
        raise
    except Exception as error:  # safetensors' own has no public base class
        raise ConfigError(f"cannot be read ({printable(shorten(error))})") from error
    classes = class_names(described.get("classes", ""))
    if classes is None or "config" not in described:
        raise ConfigError("does not say of which model and classes it is; name a run, or a file of sasa-export")
    return _of_config(state_dict, described["config"], classes, path)


def _of_config(state_dict: StateDict, yaml_text: str, classes: list[str], path: Path) -> TeacherSource:
    config = load_config(yaml_text, source=str(path))
    own_code.check_named(config.imports, targets_of(config, ("model.target",)), str(path), later=targets_of(config))
    mean, std = mean_std(config.data)
    size = input_size(config.data)
    return TeacherSource(state_dict, config.model, classes, size, config.data.mode, list(mean), list(std))


def _published(name: str) -> TeacherSource:
    try:
        described = timm.get_pretrained_cfg(name)
        size = cast(InputSize, tuple(described.input_size)) if described is not None else (3, 224, 224)
        model = build_published(name, size)
    except ConfigError as error:  # it names keys of a model that is trained
        text = str(error).removeprefix("model.name=").removeprefix("model.pretrained=timm: ")
        raise ConfigError(text) from error
    used = cast(dict[str, Any], model.pretrained_cfg)
    mode = next((mode for mode, channels in MODES.items() if channels == size[0]), "rgb")
    classes = _classes_of(model, used)
    mean, std = list(used["mean"]), list(used["std"])
    state_dict = model.state_dict()
    return TeacherSource(state_dict, ModelConfig(name=name), classes, size, mode, mean, std, digest_of(state_dict))


def _classes_of(model: nn.Module, described: dict[str, Any]) -> list[str]:
    """Return the names of a timm model's classes: its own or, as timm infers them, ImageNet's WordNet ids."""
    from timm.data import ImageNetInfo, infer_imagenet_subset  # only timm's teachers need it

    if names := described.get("label_names"):
        return list(names)
    with contextlib.suppress(AssertionError, LookupError, OSError):
        if subset := infer_imagenet_subset({"num_classes": model.num_classes}):
            return ImageNetInfo(subset).label_names()
    raise ConfigError(f"timm does not say which {model.num_classes} classes it has; name a run, or another model")
