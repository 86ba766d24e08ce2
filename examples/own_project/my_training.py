"""A loss and a hook of one's own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def focal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean focal loss (arXiv 1708.02002) with gamma 2 (trainer.loss_target)."""
    loss = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def stop_when_good(event: str, view: Any) -> str | None:
    """Note each evaluation in a file, and end the run at a top1 of 99 % (hooks)."""
    if event != "evaluated":
        return None
    with (Path(view.path) / "notes.txt").open("a") as file:
        file.write(f"epoch {view.val['epoch']}: top1 {view.val['top1']:.2f}\n")
    return "stop" if view.val["top1"] >= 99 else None
