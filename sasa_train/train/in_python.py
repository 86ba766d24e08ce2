"""`train_model`: the public API that trains in this process, in scripts and notebooks."""

import copy
import hashlib
import inspect
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sasa_train.config import own_code
from sasa_train.config.derived import in_pixels, input_size
from sasa_train.config.keys import MODEL_KEYS, TrainConfig, with_values
from sasa_train.config.overrides import parse_overrides
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import ConfigError, ExpectedFailure, shorten
from sasa_train.runs.metrics import read_metrics
from sasa_train.signals import SIGNALS, Interrupted, StopRequest
from sasa_train.train import read_config
from sasa_train.trained import TrainedModel, load_trained
from sasa_train.training.hooks import Hook
from sasa_train.training.run import train

Model = nn.Module | Callable[..., nn.Module]
NUM_SAMPLES = 64  # images of each data set that tell whether a run has begun on them


@dataclass(frozen=True)
class TrainedRun:
    """A run that `train_model` has trained, or found finished."""

    path: Path  # the run folder
    finished: bool  # False: a hook or trainer.max_hours has stopped it; the same call continues it
    metrics: list[dict[str, Any]]  # the rows of metrics.jsonl
    best: dict[str, Any] | None  # top1 in percent, step, epoch and trainer.best_metric of the model that `load` returns

    def load(self) -> TrainedModel:
        """Load the best checkpoint; see `load_trained`."""
        return load_trained(self.path)


def train_model(
    overrides: Sequence[str] = (),
    model: Model | None = None,
    train_set: Any = None,
    val_set: Any = None,
    hooks: Sequence[Hook] = (),
) -> TrainedRun:
    """Train in this process as `sasa-train` with the same overrides does, into the same run folder.

    The same call continues a run that was stopped, and finds one that is finished. A signal that arrives meanwhile
    takes effect once the run is saved: Ctrl-C, or a notebook's interrupt, then raises KeyboardInterrupt.

    Args:
        overrides: as on the command line, for example ["experiment=quickstart", "seed=1"].
        model: a module, which is copied and begins with its own weights, or a function of num_classes that returns one.
        train_set, val_set: map-style data sets of (image, label), with the attribute `classes`.
        hooks: functions of an event and a view of the run; see docs/own_code.md.

    Raises:
        ConfigError: the overrides or an argument are refused.
        CheckpointError: there is no intact checkpoint to continue from, or one cannot be written.
        ExpectedFailure: a foreseeable failure in training, such as of memory or of a hook.
    """
    if world_size() > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size()}: train_model trains in one process; under torchrun, use -m sasa_train.train "
            "with imports=[...]"
        )
    if isinstance(overrides, str) or not all(isinstance(text, str) for text in overrides):
        raise ConfigError(f'overrides={shorten(overrides)!r} must be a list of texts, as in ["experiment=quickstart"]')
    is_main = threading.current_thread() is threading.main_thread()
    stop = StopRequest(SIGNALS if is_main else (), ends_process=False)
    ended = None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with stop.preparing(), torch.random.fork_rng(devices):
            config = read_config([*overrides, *_given(overrides, model, train_set, val_set, hooks)])
            ended = train(_with_outputs(config, model), stop)
    except Interrupted:
        pass
    finally:
        stop.restore()
    if stop.signal is not None:
        signal.raise_signal(stop.signal)
    if ended is None:
        raise ExpectedFailure(f"{stop.reason}: stopped before training began; the same call begins it")
    return TrainedRun(ended.path, ended.finished, read_metrics(ended.path / "metrics.jsonl"), ended.best)


def _given(overrides: Sequence[str], model: Any, train_set: Any, val_set: Any, hooks: Any) -> list[str]:
    """Give names to the objects of a call, and return overrides with these names."""
    keys = {override.key_or_group for override in parse_overrides(overrides)}
    found = []
    if model is not None:
        _exclude("model", keys & {"model", "model.name", "model.target"})
        # A preset may have keys for the model that it names.
        unset = [f"model.{key}=null" for key in MODEL_KEYS if f"model.{key}" not in keys]
        unset += ["model.drop_path_rate=0"] if "model.drop_path_rate" not in keys else []
        found += [f"model.target={_give_model(model)}", *unset]
    if train_set is not None:
        _exclude("train_set", keys & {"data", "data.name", "data.target", "data.root"})
        found.append(f"data.target={_give_sets(train_set, val_set)}")
    elif val_set is not None:
        raise ConfigError("val_set needs train_set; data.target=... names a function that returns both")
    if not isinstance(hooks, Sequence) or not all(map(callable, hooks)):
        raise ConfigError(f"hooks={shorten(hooks)} must be a list of functions of event and view")
    return found + [f"hooks=[{','.join(map(_give_hook, hooks))}]"] * bool(hooks)


def _exclude(argument: str, keys: set[str]) -> None:
    if keys:
        raise ConfigError(f"{argument} and {', '.join(sorted(keys))} in the overrides exclude each other: give one")


def _give_model(model: Model) -> str:
    if isinstance(model, nn.Module):
        with own_code.errors_of("model: cannot be copied"):
            kept = copy.deepcopy(model).cpu()
        name = _name(model, _digest(kept))
        own_code.give(name, _wrapping(model, lambda num_classes, **args: copy.deepcopy(kept)))
        return name
    if not callable(model):
        raise ConfigError(
            f"model={shorten(model)} must be a torch.nn.Module or a function of num_classes; by name: model.target=..."
        )
    parameters = inspect.signature(model).parameters
    takes_name = "num_classes" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_name and (found := _importable(model)) is not None:
        own_code.give(found, model)
        return found

    def make(num_classes: int, **args: Any) -> nn.Module:
        return model(num_classes=num_classes, **args) if takes_name else model(num_classes, **args)

    # Such functions may have the same name, and are told apart by what they build.
    own_code.give(_name(model), _wrapping(model, make))
    with own_code.errors_of("model"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        built = make(10)
    if not isinstance(built, nn.Module):
        raise ConfigError(f"model: must return a torch.nn.Module, but returned {type(built).__name__}")
    name = _name(model, _digest(built))
    own_code.give(name, make)
    return name


def _wrapping(own: Any, function: Callable) -> Callable:
    """Mark a function as a wrapper of the user's own object, so that errors show the lines of its file, not of ours."""
    own = getattr(own, "func", own)  # of a partial
    function.__wrapped__ = own if inspect.isroutine(own) or isinstance(own, type) else type(own)  # type: ignore[attr-defined]
    return function


def _with_outputs(config: TrainConfig, model: Model | None) -> TrainConfig:
    """Set `model.num_classes`, if it is null, to the number of outputs of a model that is given as a module."""
    if not isinstance(model, nn.Module) or config.model.num_classes is not None:
        return config
    size = input_size(config.data)
    what = f"model, on an image of {in_pixels(size)}"
    with own_code.errors_of(what), torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits = own_code.load("model.target", str(config.model.target))(10).eval()(torch.zeros(1, *size))
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        found = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(f"model: must return logits [batch, num_classes], but returned {found}")
    return with_values(config, {"model.num_classes": logits.shape[1]})


def _give_sets(train_set: Any, val_set: Any) -> str:
    digest, make = hashlib.sha256(), _wrapping(train_set, lambda: (train_set, val_set))
    own_code.give(_name(train_set), make)
    for items in (train_set, val_set):
        with own_code.errors_of("val_set" if items is val_set else "train_set"):
            count = len(items) if items is not None else 0
            digest.update(repr((type(items).__name__, count, getattr(items, "classes", None))).encode())
            for position in np.unique(np.linspace(0, count - 1, NUM_SAMPLES, dtype=int)) if count else ():
                image, label = items[int(position)]
                digest.update(np.asarray(image).tobytes() + str(label).encode())
    name = _name(train_set, digest.hexdigest())
    own_code.give(name, make)
    return name


def _give_hook(hook: Hook) -> str:
    name, number = _importable(hook) or _name(hook), 1
    while own_code.given(name) not in (None, hook):
        number += 1
        name = _name(hook, str(number))
    own_code.give(name, hook)
    return name


def _importable(value: Any) -> str | None:
    """Return the dotted name by which commands can import a function or class, or None."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module in (None, "__main__") or not isinstance(name, str) or not name.isidentifier():
        return None
    return f"{module}.{name}" if getattr(sys.modules.get(module), name, None) is value else None


def _name(value: Any, digest: str = "") -> str:
    """Return a name for an object that only this process has."""
    value = getattr(value, "func", value)  # of a partial
    own = getattr(value, "__qualname__", None) or type(value).__qualname__
    word = re.sub(r"\W+", "_", own).strip("_")
    return f"{own_code.GIVEN}.{word}{'_' if digest else ''}{digest[:8]}"


def _digest(model: nn.Module) -> str:
    """Return a digest of a model's structure and weights."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
