"""Check `model.args` against a timm model: unknown arguments, those that are set by keys, and those that do nothing."""

import copy
import dataclasses
import difflib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from timm.models import model_entrypoint
from torch import nn

from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import some

Create = Callable[[dict[str, Any]], nn.Module]  # builds the model on the meta device with these arguments

KEYS = {  # arguments that keys set
    "num_classes": "model.num_classes",
    "in_chans": "model.in_chans",
    "drop_path_rate": "model.drop_path_rate",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.pretrained",
}
# Arguments of timm's factory, with which a model would not be an untrained classifier with its own config.
OF_FACTORY = (
    "cache_dir", "cfg", "device", "dtype", "exportable", "feature_cfg", "feature_cls", "features_only",
    "flatten_sequential", "kwargs_filter", "model_cfg", "model_cls", "model_name", "no_jit", "out_indices",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict",
    "pruned", "scriptable", "self", "variant",
)  # fmt: skip


NO_PROBES: Mapping[str, Any] = MappingProxyType({})


def written(value: Any) -> str:
    """Format a value as on the command line."""
    from sasa_train.config.overrides import as_written  # imports Hydra, which takes a tenth of a second

    return as_written(value)


class _Touched(BaseException):
    """Raised by a probe; a BaseException, so that no `except Exception` in a model's code hides it."""


class _Probe:
    """A value that cannot be looked at: its attributes, truth, text, hash and comparisons raise _Touched."""

    def __getattribute__(self, name: str) -> Any:
        raise _Touched

    def _touch(self, *_: Any) -> NoReturn:
        raise _Touched

    __bool__ = __repr__ = __hash__ = __eq__ = __ne__ = _touch  # type: ignore[assignment]


def check_reserved(name: str, args: dict[str, Any], sized: bool) -> None:
    """Raise ConfigError for arguments that keys set, that timm's factory takes for itself, or that are null.

    sized: whether data.image_size sets the model's img_size.
    """
    keys = KEYS | ({"img_size": "data.image_size"} if sized else {})
    for argument, value in args.items():
        what = f"model.args={{{argument}:{shorten(written(value))}}}"
        if argument in keys:
            raise ConfigError(f"{what}: {name}'s {argument} is set by a key: use {keys[argument]} instead")
        if argument in OF_FACTORY:
            raise ConfigError(f"{what}: {argument} is not for training a classifier: leave it out")
        if value is None:
            raise ConfigError(f"{what}: timm ignores arguments that are null: leave it out for {name}'s default")


def check_args(name: str, args: dict[str, Any], create: Create) -> None:
    """Raise ConfigError for arguments that the model does not have, refuses or does not use.

    An argument is in use if the model's code looks at its value, which a probe in its place notices. Whether the code
    then does something with it cannot be known.
    """
    try:
        known = _parameters(name, create({}))
    except Exception:
        return  # the model cannot be built without arguments either, and the error of building it says why
    for argument, value in args.items():
        _check_known(name, argument, known, create)
        if known.get(argument) is bool and not isinstance(value, bool):
            raise ConfigError(f"model.args: {name}'s {argument}={shorten(written(value))} must be true or false")
    if wrong := _outcome(create, args):
        alone = [key for key in args if _outcome(create, {key: args[key]})]
        given = {alone[0]: args[alone[0]]} if len(alone) == 1 else args
        reason = _reason(_outcome(create, given) or wrong)
        raise ConfigError(f"model.args={shorten(written(given))}: {name} cannot be built with it: {reason}")
    for argument in args:
        others = {key: value for key, value in args.items() if key != argument}
        if _outcome(create, others, {argument: _Probe()}) is None:
            _refuse_unknown(name, argument, known)


def _check_known(name: str, argument: str, known: dict[str, Any], create: Create) -> None:
    """Raise ConfigError if the model's code does not take an argument with this name."""
    outcome = str(_outcome(create, {}, {argument: _Probe()}) or "")
    if re.search(rf"unexpected keyword argument(\(s\): \[)? ?'{argument}'", outcome):
        _refuse_unknown(name, argument, known)
    if f"multiple values for keyword argument '{argument}'" in outcome:
        raise ConfigError(f"model.args: {argument} is fixed by the name {name}: leave it out, or choose another model")


def _outcome(create: Create, args: dict[str, Any], probes: Mapping[str, Any] = NO_PROBES) -> Any:
    """Return what building the model raises, be it the touch of a probe, or None."""
    try:
        create({**copy.deepcopy(args), **probes})  # timm changes some of the dicts and lists that it is given
    except (Exception, _Touched) as error:
        return error
    return None


def _reason(error: BaseException) -> str:
    """Return an error's text; an error without one is named with the line of code that raised it."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return shorten((str(error).strip().splitlines() or [f"{type(error).__name__} at `{line}`"])[0])


def _refuse_unknown(name: str, argument: str, known: dict[str, Any]) -> NoReturn:
    names = sorted(set(known) - {*KEYS, *OF_FACTORY, "img_size"})
    close = difflib.get_close_matches(argument, [key for key in names if key != argument], n=1)
    if argument in known:
        raise ConfigError(f"model.args: {name} takes {argument} and does nothing with it: leave it out")
    hint = f"did you mean {close[0]}?" if close else f"it has {some(names)}"
    raise ConfigError(f"model.args: {name} has no argument {argument}: {hint}")


def _parameters(name: str, model: nn.Module) -> dict[str, Any]:
    """Return the annotations of all named parameters of the model's class, its config class and its entry function."""
    found: dict[str, Any] = {}
    for kind in type(model).__mro__:
        parameters = inspect.signature(vars(kind)["__init__"]).parameters if "__init__" in vars(kind) else {}
        found |= _named(parameters) | found
        if (config := parameters.get("cfg")) is not None and dataclasses.is_dataclass(config.annotation):
            found |= {field.name: Any for field in dataclasses.fields(config.annotation)} | found
        if parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return _named(inspect.signature(model_entrypoint(name)).parameters) | found


def _named(parameters: Any) -> dict[str, Any]:
    return {name: p.annotation for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
