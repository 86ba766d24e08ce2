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
from sasa_train.attention.dispatch import pair
from sasa_train.models.layers import BLOCK_SIZE, AttentionStem, LocalSelfAttention2d
from sasa_train.visualize.capture import AttentionLayer

Size = tuple[int, int]  # height and width
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass
class Window:
    """A query's window: `weights` [N, h, w] of the keys inside the image; the first key is at (`top`, `left`).

    Positions between the keys of a dilated window have a weight of 0. `query` is the position of the query on the map,
    as (row, column).
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
    return weights.shape[-1] == BLOCK_SIZE**2  # the window of a layer has odd sides


def key_offsets(layer: AttentionLayer, size: Size) -> tuple[Tensor, Tensor]:
    """Return the rows of a layer's keys below each row of queries of a map, [H, K], and their columns to its right."""
    assert isinstance(layer, LocalSelfAttention2d)
    windows, dilations = pair(layer.kernel_size), pair(layer.dilation)
    rows, columns = (_offsets(*args, layer.border) for args in zip(size, windows, dilations, strict=True))
    return rows, columns


def _offsets(size: int, kernel_size: int, dilation: int, border: str) -> Tensor:
    """Return the offset of each key in the window of each position along one axis, [size, K]."""
    place = torch.arange(size)
    first = place // dilation - kernel_size // 2  # among the positions with the same remainder
    if border == "shift":
        num_places = (size - place % dilation + dilation - 1) // dilation
        first = torch.minimum(first.clamp(min=0), num_places - kernel_size)
    return dilation * ((first - place // dilation)[:, None] + torch.arange(kernel_size))


def reduction_of(map_size: Size, image_size: Size) -> int:
    """Return the width of a position in pixels, a power of two because each stride halves the map, rounding up."""
    return max(2 ** math.ceil(math.log2(pixels / places)) for pixels, places in zip(image_size, map_size, strict=True))


def window_at(layer: AttentionLayer, weights: Tensor, pixel: tuple[int, int], size: Size) -> Window:
    """Return the window of the query that contains pixel (row, column) of an image of `size`.

    weights: [N, H, W, K*K] for a layer, or [N, blocks, 16, 16] for an attention stem on the image itself.
    """
    if is_stems(weights):
        (row, row_in_block), (column, column_in_block) = (divmod(at, BLOCK_SIZE) for at in pixel)
        block, place = row * (size[1] // BLOCK_SIZE) + column, row_in_block * BLOCK_SIZE + column_in_block
        inside = weights[:, block, place].unflatten(-1, (BLOCK_SIZE, BLOCK_SIZE))
        return Window(pixel, row * BLOCK_SIZE, column * BLOCK_SIZE, inside, 1)
    height, width = weights.shape[1:3]
    reduction = reduction_of((height, width), size)
    row, column = (at // reduction for at in pixel)
    below, right = key_offsets(layer, (height, width))
    rows, columns = row + below[row], column + right[column]
    window = weights[:, row, column].unflatten(-1, (len(rows), len(columns)))
    are_inside = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    window, rows, columns = window[:, are_inside[0]][:, :, are_inside[1]], rows[are_inside[0]], columns[are_inside[1]]
    top, left = int(rows[0]), int(columns[0])
    inside = window.new_zeros(len(window), int(rows[-1]) - top + 1, int(columns[-1]) - left + 1)
    inside[:, (rows - top)[:, None], columns - left] = window
    return Window((row, column), top, left, inside, reduction)


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


def mean_distances(layer: AttentionLayer, weights: Tensor) -> Tensor:
    """Return each head's mean distance in positions, [N]; weights: [B, N, H, W, K*K] or [B, N, blocks, 16, 16].

    A null key has no distance and does not count.
    """
    if is_stems(weights):
        distances = block_distances(weights.device)
    else:
        rows, columns = (offsets.float() for offsets in key_offsets(layer, (weights.shape[2], weights.shape[3])))
        distances = torch.hypot(rows[:, None, :, None], columns[None, :, None, :]).flatten(2).to(weights.device)
    means = (weights * distances).sum(-1).mean((0, 2, 3))
    return means / weights.sum(-1).mean((0, 2, 3)) if getattr(layer, "null_key", False) else means


def block_distances(device: torch.device | None = None) -> Tensor:
    """Return the distances between the positions of a 4x4 block, [16, 16]."""
    place = torch.cartesian_prod(*[torch.arange(BLOCK_SIZE, device=device)] * 2).float()
    return torch.cdist(place, place)


def uniform_distance(layer: AttentionLayer, height: int, width: int) -> float:
    """Return the mean distance in positions over all queries of the map if all keys have equal weights."""
    if isinstance(layer, AttentionStem):
        return block_distances().mean().item()
    zero = torch.zeros(1, 1, height, width, 1)  # equal scores
    size, border, dilation = layer.kernel_size, layer.border, layer.dilation
    weights = attention_weights(zero, zero, kernel_size=size, border=border, dilation=dilation)
    return mean_distances(layer, weights).item()
