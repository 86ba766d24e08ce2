"""Initial weights from the source in `model.pretrained`: a sasa_train checkpoint or export, or timm's weights."""

import argparse
import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from timm.models import clean_state_dict
from torch import nn

from sasa_train.config.derived import as_image_size, input_size, resolved_size
from sasa_train.config.keys import MODEL_KEYS, PUBLISHED, TrainConfig
from sasa_train.config.overrides import as_written
from sasa_train.config.saved import load_config
from sasa_train.files import is_there, open_regular
from sasa_train.models.build import build_published
from sasa_train.models.pretrained import PretrainedReport, StateDict, load_pretrained
from sasa_train.models.sources import is_source, read_source, source_folder, timm_source
from sasa_train.refusal import ConfigError, shorten
from sasa_train.runs.checkpoint import bytes_of, check_content, is_dense, load_checkpoint, manifest_of
from sasa_train.runs.preprocessing import Stated, stated_by_config, stated_by_json, stated_by_timm
from sasa_train.runs.source import find_checkpoint
from sasa_train.terminal import printable

# The names under which training programs save weights. Averaged weights come first, because sasa_train and timm prefer
# them.
WEIGHT_KEYS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
SOURCES = "a checkpoint, a run folder, a .safetensors file, a hub folder (model.safetensors), hf-hub:USER/NAME or timm"
MAX_WEIGHTS = 2**35  # bytes: timm's largest models have 20 GB


@dataclass
class Weights:
    """Weights and what their source states: classes, preprocessing, the keys of its model, and its image size."""

    state_dict: StateDict
    classes: list[str] | None = None
    model: dict[str, Any] = field(default_factory=dict)  # name, and those of MODEL_KEYS that are set
    image_size: int | list[int] | None = None  # as in data.image_size
    preprocessing: Stated = field(default_factory=dict)
    sha256: str = ""  # of the file, or of the tensors of timm's published weights


def read_weights(config: TrainConfig) -> Weights:
    """Read the weights given by `model.pretrained` (averaged ones if available), executing no code in the file.

    Raises:
        ConfigError: the file does not exist, is damaged, or contains no weights.
    """
    source = str(config.model.pretrained)
    if source == PUBLISHED or (is_source(source) and not _is_file(source)):
        return _published(config, source)
    path = weights_file(source)
    if is_there(path) and (size := path.stat().st_size) > MAX_WEIGHTS:  # it may be sparse, and reading it takes hours
        raise ConfigError(
            f"model.pretrained={printable(source)}: has {size / 2**30:,.0f} GiB, and must have "
            f"{MAX_WEIGHTS / 2**30:.0f} GiB at most"
        )
    try:
        digest, weights = sha256_of(path), _read(path)
        changed = sha256_of(path) != digest
    except MemoryError:
        raise
    except Exception as error:  # errors of zipfile, torch, pickle and safetensors have no common base class
        raise ConfigError(f"model.pretrained={printable(source)}: cannot be read ({_reason(error)})") from error
    if changed:
        raise ConfigError(f"model.pretrained={printable(source)}: a run wrote its next checkpoint meanwhile; try again")
    if not weights.state_dict:
        raise ConfigError(f"model.pretrained={printable(source)}: holds no weights: a dict of names and tensors")
    return replace(weights, sha256=digest)


def _published(config: TrainConfig, source: str) -> Weights:
    """Return the weights that timm's create_model loads for the model's name, or from local-dir:PATH or hf-hub:NAME."""
    size = input_size(config.data)
    if source == PUBLISHED:
        model = build_published(config.model.name, size)
    else:
        model = build_published(read_source(source, "model.pretrained").architecture, size, timm_source(source))
    described, state_dict = cast(dict, model.pretrained_cfg), model.state_dict()
    classes = described.get("label_names") if source != PUBLISHED else None
    return Weights(
        state_dict,
        classes if _are_names(classes) else None,
        image_size=as_image_size(*described["input_size"][-2:]),
        preprocessing=stated_by_timm(described),
        sha256=digest_of(state_dict),
    )


def _is_file(source: str) -> bool:
    """Return whether `weights_file` finds a source's weights: in a hub folder, timm may find those in other files."""
    folder = source_folder(source)
    return os.path.exists(source) if folder is None else (folder / "model.safetensors").is_file()


def weights_file(source: str) -> Path:
    """Return the file that contains the weights of `source`; raise ConfigError if there is none."""
    path, where = source_folder(source) or Path(source), f"model.pretrained={printable(source)}"
    if os.path.isdir(path):  # also for a name that is invalid on any file system
        exported = path / "model.safetensors"
        path = exported if os.path.isfile(exported) else find_checkpoint(path)
        if not os.path.isfile(path):
            raise ConfigError(f"{where}: the folder has no checkpoints and no model.safetensors; name {SOURCES}")
    if not os.path.isfile(path):
        raise ConfigError(f"{where} is not a file; name {SOURCES}")
    return path


def sha256_of(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(model: nn.Module, weights: Weights, classes: list[str], source: str) -> PretrainedReport:
    """Load weights with `load_pretrained`, including the classifier if the class names match or are unknown.

    Raises:
        ConfigError: `load_pretrained` refuses the weights; the message adds the keys of the file's model, if known.
    """
    try:
        return load_pretrained(model, weights.state_dict, weights.classes in (None, classes))
    except ConfigError as error:
        overrides = " ".join(f"model.{key}={as_written(value)}" for key, value in weights.model.items())
        remedy = f"; its own model: {overrides}" if overrides else ""
        raise ConfigError(f"model.pretrained={printable(source)}: {error}{remedy}") from error


def _read(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    if manifest_of(path).exists():
        return _of_checkpoint(load_checkpoint(path))
    content = _load(path)
    if "format_version" in content:  # a sasa_train checkpoint without its manifest
        return _of_checkpoint(load_checkpoint(path))
    nested = [content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)]
    arguments = content.get("args")  # of timm's train.py, null or empty where the model's defaults held
    stated = stated_by_timm(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
    return Weights(_tensors(clean_state_dict(_named(nested[0] if nested else content))), preprocessing=stated)


def _load(path: Path) -> dict[Any, Any]:
    if zipfile.is_zipfile(path):
        with open_regular(path) as file:
            check_content(file, None)  # torch.load does not verify the checksums
    with torch.serialization.safe_globals([argparse.Namespace]):  # timm's checkpoints contain one with their arguments
        content = torch.load(path, map_location="cpu", weights_only=True)
    return content if isinstance(content, dict) else {}


def _of_checkpoint(checkpoint: dict[str, Any]) -> Weights:
    averaged = checkpoint["ema"] if checkpoint["ema"] is not None else checkpoint["model"]
    return Weights(_tensors(averaged), checkpoint["classes"], *_stated(checkpoint["config"]))


def _stated(yaml_text: str) -> tuple[dict[str, Any], int | list[int] | None, Stated]:
    """Return a saved config's model, image size and preprocessing; nothing if it has keys of a later version."""
    try:
        config = load_config(yaml_text)
    except ConfigError:
        return {}, None, {}
    given = {key: value for key in ("name", *MODEL_KEYS) if (value := getattr(config.model, key)) is not None}
    return given, as_image_size(*resolved_size(config.data)), stated_by_config(config.data)


def read_safetensors(path: Path) -> tuple[dict[str, str], StateDict]:
    """Return the metadata and tensors of a .safetensors file."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _of_safetensors(path: Path) -> Weights:
    # sasa-export writes classes and config to the metadata; a hub folder's config.json also has classes, preprocessing.
    described, state_dict = read_safetensors(path)
    of_hub = bytes_of(path.with_name("config.json")) or ""
    classes = class_names(described.get("classes", "")) or class_names(of_hub)
    model, size, stated = _stated(described["config"]) if "config" in described else ({}, None, {})
    return Weights(_tensors(clean_state_dict(state_dict)), classes, model, size, stated or stated_by_json(of_hub))


def class_names(text: str | bytes) -> list[str] | None:
    """Parse class names from a JSON list or from `label_names` in timm's config.json; return None otherwise."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    names = found.get("label_names") if isinstance(found, dict) else found
    return names if _are_names(names) else None


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _named(content: dict[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if isinstance(name, str)}


def _tensors(content: dict[Any, Any]) -> StateDict:
    """Keep only the entries that a model could load, which are named, dense, real tensors."""
    return {name: value for name, value in _named(content).items() if is_dense(value)}


def digest_of(state_dict: StateDict) -> str:
    """Return the SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else than tensors, which could run as code; save a state_dict() alone"
    return printable(shorten((str(error).splitlines() or [type(error).__name__])[0]))
