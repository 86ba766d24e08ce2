"""Numbers that are not finite: the first module of a forward pass that gave one, and for which images."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sasa_train.refusal import ExpectedFailure


class NonFiniteError(ExpectedFailure):
    """The loss or the weights are NaN or infinite; the message names the step.

    Where a loss showed it, `images` [B, C, H, W] are those of micro-batch `number` of the step, and the weights are
    still those before the step.
    """

    def __init__(self, message: str, number: int | None = None, images: Tensor | None = None):
        super().__init__(message)
        self.number, self.images = number, images


class LossWatch:
    """Whether a loss is finite, without making a CUDA device wait."""

    def __init__(self, device: torch.device):
        self._is_there = torch.cuda.Event() if device.type == "cuda" else None
        self._on_host = torch.empty((), pin_memory=self._is_there is not None)

    def begin(self, loss: Tensor) -> None:
        """Copy `loss`, a scalar, to the host as soon as the device has it."""
        # The copy is queued before the backward pass, so it is there while the device works on that.
        if self._is_there is None:
            self._on_host = loss.detach()
        else:
            self._on_host.copy_(loss.detach(), non_blocking=True)
            self._is_there.record()

    def is_finite(self) -> bool:
        """Whether the last loss was finite."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return bool(self._on_host.isfinite())


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that are not finite."""
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


@torch.no_grad()
def find_origin(model: nn.Module, images: Tensor, autocast: contextlib.AbstractContextManager) -> tuple[str, list[int]]:
    """Describe the first thing that was not finite, and list the images [B, C, H, W] concerned, by row; maybe none.

    Makes a forward pass as in training, which changes batch norm's running statistics.
    """
    # Parameters only: the running statistics have already seen the images.
    if wrong := not_finite(model.named_parameters()):
        return f"the weights were not finite before the step, {wrong[0]} first of {len(wrong)}", []
    names = {module: name or "the model" for name, module in model.named_modules()}
    found: list[tuple[str, Tensor]] = []  # in the order in which they ended

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append((names.get(module, type(module).__name__), output))

    with register_module_forward_hook(look), autocast:
        model.train()(images)
    if not found:
        return "every module's output was finite in a second forward pass; only the loss was not", []
    name, output = found[0]
    rows = []
    if output.ndim > 1 and len(output) == len(images):
        rows = (~output.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    return f"the first output that was not finite is that of module {name}", rows
