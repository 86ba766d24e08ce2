"""A model of one's own: a few convolutions, then local self-attention."""

import torch
from torch import nn

from sasa_train.models.layers import LocalSelfAttention2d


class TinyNet(nn.Module):
    """Two convolutions with stride 2, then attention in windows of 5 x 5 or, without it, a convolution."""

    def __init__(self, num_classes: int, width: int = 16, attention: bool = True):
        super().__init__()
        middle = (
            LocalSelfAttention2d(2 * width, 2 * width, kernel_size=5, num_heads=4)
            if attention
            else nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1, bias=False)
        )
        self.body = nn.Sequential(
            nn.Conv2d(3, width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            middle,
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits [B, num_classes] for normalised images [B, 3, H, W]."""
        return self.head(self.body(images).mean((2, 3)))
