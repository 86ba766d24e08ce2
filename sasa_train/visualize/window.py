"""The window of one query: which keys it holds, with their weights, and where they lie in the image.

A position of a map stands for the `reduction` x `reduction` pixels from (reduction * row, reduction * column) on, the
last ones perhaps for less. What it has seen is more: the layers before it have looked around too.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sasa_train.models.layers import BLOCK_SIZE

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass
class Window:
    """`weights` [N, h, w] of the keys inside the image, by head; the first key is at (`top`, `left`) of the map.

    `query` is the query's own position, (row, column).
    """

    query: tuple[int, int]
    top: int
    left: int
    weights: Tensor
    reduction: int

    @property
    def box(self) -> Box:
        """The window in pixels, clipped at the map's border, which may lie up to a position beyond the image's."""
        return self._pixels(self.top, self.left, *self.weights.shape[1:])

    @property
    def query_box(self) -> Box:
        return self._pixels(*self.query, 1, 1)

    def _pixels(self, top: int, left: int, height: int, width: int) -> Box:
        r = self.reduction
        return left * r, top * r, (left + width) * r, (top + height) * r


def reduction_of(map_side: int, image_side: int) -> int:
    """How many pixels lie from a position to the next: a power of two, for each stride halves the side, rounded up."""
    return 2 ** math.ceil(math.log2(image_side / map_side))


def window_at(weights: Tensor, pixel: tuple[int, int], size: int) -> Window:
    """Of one image's weights those of the query that pixel (row, column) of `size` x `size` belongs to.

    weights: [N, H, W, K*K] of a layer, or [N, blocks, 16, 16] of an attention stem on the image itself.
    """
    if weights.shape[-1] == BLOCK_SIZE**2:  # no square of an odd number
        return _block_at(weights, pixel, size)
    height, width, kernel_size = weights.shape[1], weights.shape[2], round(weights.shape[3] ** 0.5)
    reduction = reduction_of(height, size)
    row, column = (at // reduction for at in pixel)
    window = weights[:, row, column].unflatten(-1, (kernel_size, kernel_size))
    top, left = row - kernel_size // 2, column - kernel_size // 2
    inside = window[:, max(0, -top) : height - top, max(0, -left) : width - left]
    return Window((row, column), max(0, top), max(0, left), inside, reduction)


def _block_at(weights: Tensor, pixel: tuple[int, int], size: int) -> Window:
    row, column = pixel
    block = row // BLOCK_SIZE * (size // BLOCK_SIZE) + column // BLOCK_SIZE
    place = row % BLOCK_SIZE * BLOCK_SIZE + column % BLOCK_SIZE
    inside = weights[:, block, place].unflatten(-1, (BLOCK_SIZE, BLOCK_SIZE))
    return Window(pixel, row - row % BLOCK_SIZE, column - column % BLOCK_SIZE, inside, 1)
