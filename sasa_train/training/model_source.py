"""Replace the source in model.name (local-dir:, hf-hub:) by what it holds, when a run begins and when it goes on."""

from dataclasses import replace

from sasa_train.config.keys import MODEL_KEYS, ModelConfig, TrainConfig, names_source
from sasa_train.config.overrides import as_written
from sasa_train.config.rules import validate
from sasa_train.models.sources import Unreachable, resolve
from sasa_train.runs.folder import begun_config
from sasa_train.terminal import printable, warn

OF_SOURCE = ("name", "args", "pretrained", "drop_path_rate", "source", *MODEL_KEYS)


def settle_model(config: TrainConfig, run_name: str) -> TrainConfig:
    """Return the config with the plain name and arguments of the source that model.name names, if it names one.

    A run that has begun goes on with its own if the source can no longer be reached. Warns if the source has changed.

    Raises:
        ConfigError: the source is refused (see `resolve`), or its keys do not fit the rest of the config.
        CheckpointError: the checkpoint given by `resume` is damaged.
    """
    if config.model.target is not None or not names_source(config.model.name):
        return config
    begun = begun_config(config, run_name)
    before = begun.model if begun is not None and begun.model.source == config.model.name else None
    try:
        model = resolve(config.model)
    except Unreachable as error:
        if before is None:
            raise
        warn(f"{error}\nThe run goes on with the model that it began with.")
        model = _as_before(config.model, before)
    if before is not None and (changed := _differences(before, model)):
        warn(f"model.name={printable(config.model.name)} has changed since the run began: {changed}")
    # What the source says is not chosen from the images.
    open_keys = [key for key in config.derive if not key.startswith("model.")]
    config = replace(config, model=model, derive=open_keys)
    if not open_keys:
        validate(config)
    return config


def _as_before(asked: ModelConfig, before: ModelConfig) -> ModelConfig:
    """Return the model of a saved config, with the arguments and keys that are asked for, which may have changed."""
    values = {name: getattr(before, name) for name in OF_SOURCE}
    values |= {name: getattr(asked, name) for name in MODEL_KEYS if getattr(asked, name) is not None}
    values |= {"args": before.args | asked.args, "drop_path_rate": asked.drop_path_rate or before.drop_path_rate}
    return replace(asked, **values)


def _differences(before: ModelConfig, now: ModelConfig) -> str:
    pairs = {name: (getattr(before, name), getattr(now, name)) for name in OF_SOURCE}
    changed = {name: map(as_written, pair) for name, pair in pairs.items() if pair[0] != pair[1]}
    return printable("; ".join(f"model.{name}: {' -> '.join(values)}" for name, values in changed.items()))
