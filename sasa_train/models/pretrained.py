"""Load pretrained weights into a model. Matching tensors are loaded or adapted, and all others are reported."""

import contextlib
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, shorten
from sasa_train.terminal import printable

StateDict = dict[str, Tensor]

MAX_LINE = 4000  # maximum characters in a line of the report; the names of a ResNet-50 take 3,000
MIN_SHARE = 0.1  # minimum matching fraction of the parameters outside the classifier; below it, a file is refused


@dataclass
class PretrainedReport:
    """Result of `load_pretrained` for each tensor. `share` is the loaded fraction of the model's parameters."""

    loaded: list[str]
    adapted: dict[str, str]  # loaded tensors whose shape was changed -> the change, e.g. "window 7 -> 5"
    left: dict[str, str]  # tensors left at their initial values -> the reason
    unused: list[str]  # tensors in the file but not in the model
    share: float

    def describe(self) -> str:
        """Format the report as several lines of text, with the tensors grouped by layer."""
        num_all = len(self.loaded) + len(self.left)
        lines = [f"loaded {len(self.loaded)} of {num_all} tensors, {100 * self.share:.1f} % of the parameters"]
        lines += [f"adapted, {how}: {_by_layer(names)}" for how, names in _by_value(self.adapted).items()]
        lines += [f"left as initialised, {why}: {_by_layer(names)}" for why, names in _by_value(self.left).items()]
        if self.unused:
            lines.append(f"in the file but not in this model: {_by_layer(self.unused)}")
        short = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..." for line in lines]
        return "\n".join(textwrap.fill(printable(line), 108, subsequent_indent="    ") for line in short)


@torch.no_grad()
def load_pretrained(model: nn.Module, state_dict: StateDict, keep_classifier: bool = True) -> PretrainedReport:
    """Load the tensors of `state_dict` that match the model by name and shape, or that can be adapted to it.

    The `checkpoint_filter_fn` of the model's module adapts position embeddings to another image size (in timm's
    models) or relative embeddings to another window size (in ours). The first convolution is adapted to another
    number of channels.

    Args:
        keep_classifier: if False, the classifier keeps its initial weights even if the shapes match.

    Raises:
        ConfigError: less than a tenth of the parameters outside the classifier match, or a matching tensor is not
            finite, has negative variances, or whole numbers in place of floats; the model is unchanged.
    """
    own = model.state_dict()
    given = _adapt_first_conv(model, _filtered(model, state_dict))
    classifier = tuple(f"{name}." for name in _classifier_names(model))
    left = {}
    for name, tensor in own.items():
        is_classifier = name.startswith(classifier)
        if name not in given:
            left[name] = "not in the file"
        elif given[name].shape != tensor.shape:
            left[name] = _misfit(given[name], tensor, is_classifier)
        elif is_classifier and not keep_classifier:
            left[name] = "other classes in the file"
    loaded = [name for name in own if name not in left]
    _check_enough(model, loaded, classifier, left)
    _check_values({name: given[name] for name in loaded}, own)
    # All checks precede the first copy, so that a refused file leaves the model unchanged.
    for name in loaded:
        own[name].copy_(given[name])
    return PretrainedReport(
        loaded=loaded,
        adapted={
            name: _change(model, name, state_dict[name], own[name])
            for name in loaded
            if name in state_dict and state_dict[name].shape != own[name].shape
        },
        left=left,
        unused=[name for name in given if name not in own],
        share=_share(dict(model.named_parameters()), loaded),
    )


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Adapt relative embeddings to the window size of one of our models; timm looks for a function with this name."""
    own = model.state_dict()
    return {
        name: resize_window(tensor, own[name].shape[-2]) if _is_other_window(name, tensor, own) else tensor
        for name, tensor in state_dict.items()
    }


def _is_relative(name: str) -> bool:
    return name.rpartition(".")[2] in ("rel_height", "rel_width")


def _is_other_window(name: str, tensor: Tensor, own: dict[str, Any]) -> bool:
    """Return whether an embedding [K, D/2] or [N, K, D/2] differs from the model's only in K."""
    if not _is_relative(name) or name not in own:
        return False
    here, there = own[name].shape, tensor.shape
    return len(here) == len(there) >= 2 and here[-2] != there[-2] and here[:-2] + here[-1:] == there[:-2] + there[-1:]


def resize_window(table: Tensor, num_rows: int) -> Tensor:
    """Convert relative embeddings [..., K, D/2] to another window size or border, [..., num_rows, D/2]."""
    # The middle row belongs to offset 0 whatever the border, and each offset keeps its embedding. A smaller window
    # drops the outer embeddings, and a larger one repeats the outermost. Interpolating the table, as Swin does, was
    # less accurate at 5 of 6 window sizes, even when the image grew by the same factor (docs/finetune.md).
    num_offsets = table.shape[-2]
    offsets = torch.arange(num_rows) + (num_offsets - num_rows) // 2
    return table[..., offsets.clamp(0, num_offsets - 1), :]


def _filtered(model: nn.Module, state_dict: StateDict) -> StateDict:
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if filter_fn is None:
        return dict(state_dict)
    try:
        return dict(filter_fn(dict(state_dict), model))
    except LIBRARY_ERRORS as error:
        raise ConfigError(
            f"{type(model).__name__} cannot read these weights ({type(error).__name__}: {shorten(error)}), so this is "
            "another model's file"
        ) from error


def _adapt_first_conv(model: nn.Module, given: StateDict) -> StateDict:
    """Adapt the weights of a three-channel first convolution to the model's number of input channels, as timm does."""
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    own = model.state_dict()
    for name in (f"{name}.weight" for name in ((names,) if isinstance(names, str) else names)):
        if name in own and name in given and own[name].ndim == given[name].ndim == 4:
            here, there = own[name].shape, given[name].shape
            # The values of the attention stem have 3 input channels per mixture.
            in_chans, rest = divmod(3 * here[1], there[1])
            if here[1] != there[1] and there[1] % 3 == rest == 0 and here[0] == there[0] and here[2:] == there[2:]:
                with contextlib.suppress(NotImplementedError):  # then the tensor is reported as not loaded
                    given[name] = adapt_input_conv(in_chans, given[name])
    return given


def _misfit(given: Tensor, own: Tensor, is_classifier: bool) -> str:
    if is_classifier and given.ndim and given.shape[1:] == own.shape[1:]:
        return f"{len(given)} classes in the file, {len(own)} here"
    return f"{list(given.shape)} in the file, {list(own.shape)} here"


def _change(model: nn.Module, name: str, before: Tensor, after: Tensor) -> str:
    if _is_relative(name):
        # A table has a row for each offset: K, or 2K - 1 where the window is shifted at the border.
        is_shifted = getattr(model.get_submodule(name.rpartition(".")[0]), "border", None) == "shift"
        return f"{'offsets' if is_shifted else 'window'} {before.shape[-2]} -> {after.shape[-2]}"
    return f"{list(before.shape)} -> {list(after.shape)}"


def _classifier_names(model: nn.Module) -> list[str]:
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # distilled models have two
    return [name for name, module in model.named_modules() if any(module is head for head in heads)]


def _share(parameters: Mapping[str, Tensor], loaded: Iterable[str]) -> float:
    """Return the fraction of the model's parameters that belong to the tensors in `loaded`."""
    count = sum(p.numel() for p in parameters.values())
    return sum(parameters[name].numel() for name in loaded if name in parameters) / max(count, 1)


def _check_enough(model: nn.Module, loaded: list[str], classifier: tuple[str, ...], left: dict[str, str]) -> None:
    body = {name: p for name, p in model.named_parameters() if not name.startswith(classifier)}
    if (share := _share(body, loaded)) < MIN_SHARE:
        reasons = "; ".join(f"{why}: {_by_layer(names)}" for why, names in _by_value(left).items())
        raise ConfigError(
            f"only {100 * share:.1f} % of {type(model).__name__}'s parameters outside the classifier fit, so this is "
            f"another model's file ({printable(shorten(reasons))})"
        )


def _check_values(tensors: StateDict, own: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise ConfigError(f"its {printable(name)} is {tensor.dtype}, which has lost the fractions of the weights")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ConfigError(f"its {printable(name)} has negative variances")
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if wrong := [name for name, tensor in floats.items() if not tensor.float().isfinite().all()]:
        raise ConfigError(f"its weights are not finite, {printable(wrong[0])} first of {len(wrong)}")


def _by_value(texts: dict[str, str]) -> dict[str, list[str]]:
    """Group the names in a {name: text} dict by text."""
    return _grouped((text, name) for name, text in texts.items())


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _by_layer(names: Iterable[str]) -> str:
    """Group names by layer, e.g. `rel_height, rel_width of layer1.0.conv2, layer2.0.conv2; weight, bias of fc`."""
    leaves = _grouped(name.rpartition(".")[::2] for name in names)
    layers = _grouped((", ".join(found), layer) for layer, found in leaves.items())
    return "; ".join(f"{found} of {', '.join(where)}" if any(where) else found for found, where in layers.items())
