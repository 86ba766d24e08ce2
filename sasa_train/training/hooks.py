"""The user's own functions in `hooks`: they see the events of a run and may stop it, but do not change it."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sasa_train.config import own_code
from sasa_train.refusal import ConfigError, ExpectedFailure, shorten

EVENTS = ("start", "step", "evaluated", "saved", "end")
STOP = "stop"


class OwnCodeError(ExpectedFailure):
    """Raised if a hook fails; the message contains the traceback of the user's code. Exit code 1."""


@dataclass(frozen=True)
class RunView:
    """What a hook sees of a run. It cannot be written to; the weights of `model` must not be changed either."""

    path: Path  # the run folder
    config: Mapping[str, Any]  # the values of all keys, by their dotted names
    step: int  # number of completed steps
    num_steps: int
    epoch: int  # of the last step, counted from 1; 0 before the first
    train: Mapping[str, Any] | None  # the last train row of metrics.jsonl
    val: Mapping[str, Any] | None  # the last val row
    best: Mapping[str, Any] | None  # top1, step and epoch of the best evaluation
    finished: bool  # whether the last step and its evaluation are done
    model: nn.Module  # the one that val evaluates (the moving average, if there is one), in eval mode


Hook = Callable[[str, RunView], str | None]


def load_hooks(names: Sequence[str]) -> dict[str, Hook]:
    """Return the hooks by their dotted names.

    Raises:
        ConfigError: one cannot be imported, or cannot be called with an event and a view.
    """
    hooks = {name: own_code.load("hooks", name) for name in names}
    for name, hook in hooks.items():
        if isinstance(hook, type):
            raise ConfigError(f"hooks={name}: is a class; name a function, or an object of the class")
        try:
            inspect.signature(hook).bind("start", None)
        except TypeError as error:
            raise ConfigError(f"hooks={name}: must take two arguments, event and view ({error})") from error
        except ValueError:  # a built-in function without a signature
            continue
    return hooks


def call_hooks(hooks: Mapping[str, Hook], event: str, view: RunView, device: torch.device) -> str:
    """Call all hooks; return which one asks to stop, or "".

    Raises:
        OwnCodeError: a hook fails, or returns something other than None or "stop".
        ExpectedFailure: a hook has changed the weights, so that the run cannot be saved any more.
    """
    asked = ""
    for name, hook in hooks.items():
        what = f'hooks={name} at "{event}"'
        with _looking_on(what, view.model, device):
            try:
                answer: object = hook(event, view)
            except (Exception, SystemExit) as error:
                reason = own_code.own_traceback(error) or f"{type(error).__name__}: {error}"
                raise OwnCodeError(f"{what}: {reason}") from error
        if answer is not None and not (isinstance(answer, str) and answer == STOP):
            raise OwnCodeError(f'{what}: must return None or "stop", but returned {shorten(repr(answer))}')
        asked = asked or (what if answer is not None else "")
    return asked


@contextmanager
def _looking_on(what: str, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager with the model in eval mode, which restores the modes and the states of torch's generators.

    Raises:
        ExpectedFailure: the model's weights or buffers have been changed.
    """
    modes, before = [(module, module.training) for module in model.modules()], _versions(model)
    model.eval()
    try:
        # Gradients would be exchanged between the processes, of which the others wait elsewhere.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        if _versions(model) != before:
            raise ExpectedFailure(
                f"{what}: has changed the weights or buffers of view.model, which hooks must only read; the run stops "
                "without saving them. The same command continues from the last checkpoint"
            )


def _versions(model: nn.Module) -> list[tuple[int, int]]:
    """Return what changes whenever a weight or buffer is replaced or written in place."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_inference())
    return [(id(tensor), tensor._version) for tensor in tensors]
