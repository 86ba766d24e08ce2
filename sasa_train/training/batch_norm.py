"""Batch norm's running statistics, where they need more care than a forward pass gives them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sasa_train.processes import collectives

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """The recomputation of gradient checkpointing must not move batch norm's running statistics a second time."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
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


def recalibrate(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device) -> None:
    """Take batch norm's running statistics anew, as the plain average over `batches`; weights stay as they are.

    What precise statistics do for a model whose weights are themselves an average: arXiv 1803.05407, section 3.2.
    Processes give as many batches each, and all get the average over all.
    """
    update_bn(batches, model, device)
    for norm in (m for m in model.modules() if isinstance(m, BATCH_NORMS)):
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None:
                collectives.average(buffer)
