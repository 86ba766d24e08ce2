"""Detect non-finite values, and find the first module and the images that produced one."""

import contextlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from sasa_train.refusal import ExpectedFailure
from sasa_train.training.freezing import set_to_train


class NonFiniteError(ExpectedFailure):
    """Raised if the loss or the weights are NaN or infinite; the message names the step.

    `step` counts from 0. `number` is the index of the micro-batch whose loss is not finite; the weights are then
    those before the step. `number` is None if the weights themselves are not finite.
    """

    def __init__(self, message: str, step: int, number: int | None = None):
        super().__init__(message)
        self.step, self.number = step, number

    def __reduce__(self) -> tuple[type, tuple[str, int, int | None]]:
        return type(self), (str(self), self.step, self.number)  # processes send this error to one another


class LossWatch:
    """Watcher that stops a run before a non-finite loss affects the weights, without making a CUDA device wait.

    With `is_late`, the losses of a step are checked when the next step begins or before anything is logged, evaluated
    or saved, and the device itself skips the update if a loss is not finite. This requires an optimizer that supports
    `found_inf`, as fused ones do for GradScaler. Otherwise, each loss is checked after its backward pass is queued.
    """

    def __init__(self, device: torch.device, num_losses: int, is_late: bool):
        self.is_late = is_late
        self._are_there = torch.cuda.Event() if device.type == "cuda" else None
        # The host reads the losses through numpy, because a torch operator would wait for the device.
        self._on_host = torch.zeros(num_losses, pin_memory=self._are_there is not None)
        self._losses = self._on_host.numpy()
        self._step: int | None = None  # step whose losses have not been checked yet

    def begin(self, loss: Tensor, step: int, number: int) -> None:
        """Start copying the scalar loss of micro-batch `number` of a step to the host."""
        self._on_host[number].copy_(loss.detach(), non_blocking=True)
        if self._are_there is not None:
            self._are_there.record()
        self._step = step

    def check(self) -> None:
        """Raise NonFiniteError if a loss passed to `begin` since the last call is not finite."""
        if self._step is None:
            return
        if self._are_there is not None:
            self._are_there.synchronize()
        step, self._step = self._step, None
        if not np.isfinite(self._losses).all():
            number = int(np.isfinite(self._losses).argmin())  # the first one that is not
            raise NonFiniteError(f"the loss of step {step + 1} is not finite", step, number)


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of the tensors with non-finite values."""
    return [name for name, tensor in tensors if not tensor.isfinite().all()]


@torch.no_grad()
def find_origin(model: nn.Module, images: Tensor, autocast: contextlib.AbstractContextManager) -> tuple[str, list[int]]:
    """Return a description of the first non-finite tensor, and the indices of the affected images [B, C, H, W], if any.

    This runs a forward pass in train mode, which changes batch norm's running statistics.
    """
    # Only parameters are checked, because the running statistics already include the images.
    if wrong := not_finite(model.named_parameters()):
        return f"the weights were not finite before the step, {wrong[0]} first of {len(wrong)}", []
    names = {module: name or "the model" for name, module in model.named_modules()}
    found: list[tuple[str, Tensor]] = []  # in the order in which the modules finished

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not output.isfinite().all():
            found.append((names.get(module, type(module).__name__), output))

    with register_module_forward_hook(look), autocast:
        set_to_train(model)(images)
    if not found:
        return "every module's output was finite in a second forward pass; only the loss was not", []
    name, output = found[0]
    rows = []
    if output.ndim > 1 and len(output) == len(images):
        rows = (~output.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    return f"the first output that was not finite is that of module {name}", rows
