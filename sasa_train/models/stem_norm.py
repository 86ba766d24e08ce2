"""Batch-normalise the positions that a stem's kernel has selected, using the statistics that the kernel computes."""

import torch
from torch import Tensor, nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module has exactly this type and no hooks, so that other code can replace its forward pass."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def can_normalise_picked(norm: nn.Module) -> bool:
    """Return whether `normalise_picked` supports `norm`: an unsynchronised batch norm with weights and statistics."""
    return is_plain(norm, nn.BatchNorm2d) and None not in (norm.weight, norm.bias, norm.running_mean, norm.running_var)


def normalise_picked(norm: nn.BatchNorm2d, picked: Tensor, mean: Tensor, variance: Tensor, count: int) -> Tensor:
    """Batch-normalise some positions of a map, given the mean and biased variance [C] over all its `count` positions.

    The running statistics are updated as in `nn.BatchNorm2d` and used for normalisation in eval mode.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.training:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        factor = norm.momentum if norm.momentum is not None else 1.0 / norm.num_batches_tracked.to(mean.dtype)
        if norm.momentum != 0.0:
            norm.running_mean.lerp_(mean.detach().to(norm.running_mean.dtype), factor)
            unbiased = variance.detach() * (count / (count - 1))
            norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), factor)
    else:
        mean, variance = norm.running_mean, norm.running_var
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    return torch.addcmul(shift[:, None, None], picked, scale[:, None, None])
