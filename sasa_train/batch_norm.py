"""Batch norm's running statistics, where they need more care than a forward pass gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sasa_train import distributed


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """The recomputation of gradient checkpointing must not move batch norm's running statistics a second time."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very kind and nobody listens to it, so that what it does may be done elsewhere."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def can_normalise_picked(norm: nn.Module) -> bool:
    """Whether `normalise_picked` can stand for it: not for one synchronised between processes or with rare options."""
    return is_plain(norm, nn.BatchNorm2d) and None not in (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def normalise_picked(norm: nn.BatchNorm2d, picked: Tensor, mean: Tensor, variance: Tensor, count: int) -> Tensor:
    """Batch norm of some positions of a map, given the mean and biased variance of each channel over all `count`.

    Moves the running statistics as `nn.BatchNorm2d` does; in eval mode it normalises with them.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.training:
        _move_running_stats(norm, mean.detach(), variance.detach() * (count / (count - 1)))
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    return torch.addcmul(shift[:, None, None], picked, scale[:, None, None])


def _move_running_stats(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if norm.momentum == 0.0:
        return
    factor = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.to(mean.dtype)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), factor)


def recalibrate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Take batch norm's running statistics anew, as the plain average over `batches`; weights stay as they are.

    What precise statistics do for a model whose weights are themselves an average: arXiv 1803.05407, section 3.2.
    Processes give as many batches each, and all get the average over all.
    """
    update_bn(batches, model, device)
    distributed.average_buffers(model)
