"""How far attention reaches: the mean distance between query and key, weighted by attention (arXiv 2010.11929, Fig. 7).

Distances are Euclidean, between the centres of positions, and in pixels of the input: positions times the layer's
reduction. "Uniform" is what equal weights on all keys that take part would give, at the same borders.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sasa_train.attention import attention_weights
from sasa_train.models.layers import BLOCK_SIZE, AttentionStem
from sasa_train.visualize.capture import AttentionLayer


@dataclass
class Distances:
    """Of one layer, in pixels: of each head, and what uniform attention would have."""

    layer: str
    heads: list[float]
    uniform: float


def mean_distances(weights: Tensor) -> Tensor:
    """Weights [B, N, H, W, K*K], or a stem's [B, N, blocks, 16, 16] -> mean distance of each head in positions, [N].

    Of a stem the last two dimensions are queries and keys of a block.
    """
    is_stem = weights.shape[-1] == BLOCK_SIZE**2  # no square of an odd number
    distances = block_distances(weights.device) if is_stem else window_distances(weights.shape[-1], weights.device)
    return (weights * distances).sum(-1).mean((0, 2, 3))


def window_distances(num_keys: int, device: torch.device | None = None) -> Tensor:
    """From the centre of a window of K*K keys to each of them, [K*K]."""
    offset = torch.arange(round(num_keys**0.5), device=device) - round(num_keys**0.5) // 2
    return torch.hypot(offset[:, None].float(), offset[None, :].float()).flatten()


def block_distances(device: torch.device | None = None) -> Tensor:
    """Between the positions of a 4x4 block, [16, 16]."""
    place = torch.cartesian_prod(*[torch.arange(BLOCK_SIZE, device=device)] * 2).float()
    return torch.cdist(place, place)


def uniform_distance(layer: AttentionLayer, height: int, width: int) -> float:
    """In positions, over all queries of a map of height x width: the distance where every key weighs the same."""
    if isinstance(layer, AttentionStem):
        return block_distances().mean().item()
    zero = torch.zeros(1, 1, height, width, 1)  # its scores are equal
    weights = attention_weights(zero, zero, kernel_size=layer.kernel_size, border=layer.border)
    return mean_distances(weights).item()
