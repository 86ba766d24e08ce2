"""Models that model.name takes from a hub folder (local-dir:PATH) or the Hugging Face hub (hf-hub:USER/NAME)."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timm.models import resolve_model_input_args

from sasa_train.config.keys import MODEL_KEYS, OWN_MODELS, PUBLISHED, ModelConfig, names_source
from sasa_train.models.build import is_sized
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, shorten
from sasa_train.terminal import printable

LOCAL, HUB = "local-dir:", "hf-hub:"


class Unreachable(ConfigError):
    """Raised if there is no config.json at a source, or no network to get it."""


@dataclass(frozen=True)
class Source:
    """What the config.json of a source says: a name in timm's registry, and arguments."""

    architecture: str
    args: dict[str, Any]


def is_source(text: str) -> bool:
    """Whether a text has the form of a source: local-dir:PATH or hf-hub:USER/NAME."""
    return text.startswith((LOCAL, HUB)) and text not in (LOCAL, HUB)


def source_folder(source: str) -> Path | None:
    """Return the folder of local-dir:PATH, seen from the working directory, or None for another source."""
    return Path(os.path.expanduser(source.removeprefix(LOCAL))) if source.startswith(LOCAL) else None


def timm_source(source: str) -> str:
    """Return a source as timm's create_model takes it."""
    folder = source_folder(source)
    return source if folder is None else f"{LOCAL}{folder}"


def read_source(source: str, key: str) -> Source:
    """Read the architecture and arguments of a source, which `key` names.

    Raises:
        Unreachable: there is no config.json, or it cannot be fetched.
        ConfigError: it is not timm's, or names a model that is not in timm's registry.
    """
    what = f"{key}={printable(source)}"
    if not is_source(source):
        raise ConfigError(f"{what} must be a name in timm's registry, {LOCAL}PATH or {HUB}USER/NAME")
    try:
        found = resolve_model_input_args(timm_source(source))
        args = {name: value for name, value in found.pop("pretrained_model_args", {}).items() if value is not None}
        return Source(found["model_name"], args)
    except OSError as error:
        raise Unreachable(f"{what}: {_not_there(source, error)}") from error
    except LIBRARY_ERRORS as error:
        raise ConfigError(
            f"{what}: its config.json does not describe a model of timm ({_first_line(error)})"
        ) from error
    except Exception as error:  # those of httpx and huggingface_hub have no common base class
        raise Unreachable(f"{what}: {_not_there(source, error)}") from error


def resolve(config: ModelConfig) -> ModelConfig:
    """Return a model's keys with the plain name and arguments of the source that model.name names, if it names one.

    Arguments and keys that are set have precedence over the source's; `model.pretrained=timm` becomes the source.

    Raises:
        ConfigError: see `read_source`.
    """
    if not names_source(config.name):
        return config
    source = read_source(config.name, "model.name")
    args = dict(source.args)
    args.pop("num_classes", None)  # the data's
    if is_sized(source.architecture):
        args.pop("img_size", None)  # data.image_size
    values: dict[str, Any] = {"name": source.architecture, "source": config.name}
    if (in_chans := args.pop("in_chans", 3)) != 3:
        values["in_chans"] = config.in_chans or in_chans  # data.mode must have as many
    values["drop_path_rate"] = config.drop_path_rate or args.get("drop_path_rate", 0.0)
    args.pop("drop_path_rate", None)
    if source.architecture in OWN_MODELS:
        of_keys = {name: args.pop(name) for name in MODEL_KEYS if name in args}
        values |= {name: value for name, value in of_keys.items() if getattr(config, name) is None}
        if args.get("global_pool") == "avg":  # their only one, which timm writes into every config.json
            del args["global_pool"]
    values["args"] = args | config.args
    if config.pretrained == PUBLISHED:
        values["pretrained"] = config.name
    return replace(config, **values)


def _not_there(source: str, error: Exception) -> str:
    if (folder := source_folder(source)) is not None:
        path = printable(str(folder / "config.json"))
        return f"{path} cannot be read; name a folder that has timm's config.json and weights"
    return (
        f"cannot be had ({type(error).__name__}: {_first_line(error)}); it comes from the Hugging Face hub or its "
        f"cache ($HF_HOME): run once where there is a network, or name a folder: {LOCAL}PATH"
    )


def _first_line(error: Exception) -> str:
    return printable(shorten((str(error).strip().splitlines() or [type(error).__name__])[0]))
