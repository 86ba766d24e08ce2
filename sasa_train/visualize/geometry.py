"""The geometry of attention in the image: a query's window, the choice of queries, and attention distances.

A position of a map covers `reduction` x `reduction` pixels starting at (reduction * row, reduction * column); the last
ones may cover fewer. A position's receptive field is larger, as earlier layers have combined it with its neighbours.

Distances are Euclidean, between the centres of positions (arXiv 2010.11929, Fig. 7). "Uniform" is the distance if all
keys within the same borders have equal weights.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sasa_train.attention import attention_weights
from sasa_train.models.layers import BLOCK_SIZE, AttentionStem
from sasa_train.visualize.capture import AttentionLayer

Size = tuple[int, int]  # height and width
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass
class Window:
    """A query's window: `weights` [N, h, w] of the keys inside the image; the first key is at (`top`, `left`).

    `query` is the position of the query on the map as (row, column).
    """

    query: tuple[int, int]
    top: int
    left: int
    weights: Tensor
    reduction: int

    @property
    def box(self) -> Box:
        """The window in pixels, clipped at the map border; the map may exceed the image by less than one position."""
        return self._pixels(self.top, self.left, *self.weights.shape[1:])

    @property
    def query_box(self) -> Box:
        return self._pixels(*self.query, 1, 1)

    def _pixels(self, top: int, left: int, height: int, width: int) -> Box:
        r = self.reduction
        return left * r, top * r, (left + width) * r, (top + height) * r


@dataclass
class Distances:
    """A layer's mean query-key distances in input pixels, for each head and for uniform attention."""

    layer: str
    heads: list[float]
    uniform: float


def is_stems(weights: Tensor) -> bool:
    """Whether weights are an attention stem's, [..., blocks, 16, 16], rather than a layer's, [..., H, W, K*K]."""
    return weights.shape[-1] == BLOCK_SIZE**2


def reduction_of(map_size: Size, image_size: Size) -> int:
    """Return the width of a position in pixels, a power of two because each stride halves the map, rounding up."""
    return max(2 ** math.ceil(math.log2(pixels / places)) for pixels, places in zip(image_size, map_size, strict=True))


def window_at(weights: Tensor, pixel: tuple[int, int], size: Size) -> Window:
    """Return the window of the query that contains pixel (row, column) of an image of `size`.

    weights: [N, H, W, K*K] for a layer, or [N, blocks, 16, 16] for an attention stem on the image itself.
    """
    if is_stems(weights):
        (row, row_in_block), (column, column_in_block) = (divmod(at, BLOCK_SIZE) for at in pixel)
        block, place = row * (size[1] // BLOCK_SIZE) + column, row_in_block * BLOCK_SIZE + column_in_block
        inside = weights[:, block, place].unflatten(-1, (BLOCK_SIZE, BLOCK_SIZE))
        return Window(pixel, row * BLOCK_SIZE, column * BLOCK_SIZE, inside, 1)
    height, width, kernel_size = weights.shape[1], weights.shape[2], round(weights.shape[3] ** 0.5)
    reduction = reduction_of((height, width), size)
    row, column = (at // reduction for at in pixel)
    window = weights[:, row, column].unflatten(-1, (kernel_size, kernel_size))
    top, left = row - kernel_size // 2, column - kernel_size // 2
    inside = window[:, max(0, -top) : height - top, max(0, -left) : width - left]
    return Window((row, column), max(0, top), max(0, left), inside, reduction)


def default_pixels(image: np.ndarray) -> list[tuple[int, int]]:
    """Return the centre of a uint8 [H, W, 3] image and the highest-contrast pixel away from it.

    The distance is at least a quarter of the shorter side.

    Contrast is the gradient magnitude of the grey values, averaged over a square of about 1/8 of this side.
    """
    (height, width), side = image.shape[:2], min(image.shape[:2])
    reach = side // 16
    padded = np.pad(np.hypot(*np.gradient(image.mean(2))), reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
    away = np.hypot(rows[:, None], columns[None, :]) >= side / 4
    row, column = np.unravel_index(np.where(away, windows.mean((2, 3)), -1).argmax(), away.shape)
    return [(height // 2, width // 2), (int(row), int(column))]


def mean_distances(weights: Tensor) -> Tensor:
    """Return each head's mean distance in positions, [N]; weights: [B, N, H, W, K*K] or [B, N, blocks, 16, 16]."""
    if is_stems(weights):
        distances = block_distances(weights.device)
    else:
        kernel_size = round(weights.shape[-1] ** 0.5)
        offset = (torch.arange(kernel_size, device=weights.device) - kernel_size // 2).float()
        distances = torch.hypot(offset[:, None], offset[None, :]).flatten()
    return (weights * distances).sum(-1).mean((0, 2, 3))


def block_distances(device: torch.device | None = None) -> Tensor:
    """Return the distances between the positions of a 4x4 block, [16, 16]."""
    place = torch.cartesian_prod(*[torch.arange(BLOCK_SIZE, device=device)] * 2).float()
    return torch.cdist(place, place)


def uniform_distance(layer: AttentionLayer, height: int, width: int) -> float:
    """Return the mean distance in positions over all queries of the map if all keys have equal weights."""
    if isinstance(layer, AttentionStem):
        return block_distances().mean().item()
    zero = torch.zeros(1, 1, height, width, 1)  # equal scores
    weights = attention_weights(zero, zero, kernel_size=layer.kernel_size, border=layer.border)
    return mean_distances(weights).item()
