"""Dilated windows: the positions whose rows and columns leave the same remainders form an image of their own.

A query of a dilated window sees only keys of its own image, in which the window is not dilated. So no backend knows of
dilation: each is called once per image, with strided views.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Remainder(NamedTuple):
    """One of the images into which `dilation` divides the positions of a map."""

    row: int
    column: int
    dilation: tuple[int, int]

    def of(self, x: Tensor) -> Tensor:
        """Return the image's view of a map [B, N, H, W, D]."""
        return x[:, :, self.row :: self.dilation[0], self.column :: self.dilation[1]]


def remainders(dilation: tuple[int, int], height: int, width: int) -> Iterator[Remainder]:
    """Yield the images that have positions, row by row."""
    for row in range(min(dilation[0], height)):
        for column in range(min(dilation[1], width)):
            yield Remainder(row, column, dilation)


def by_remainder(run: Callable[..., Tensor], dilation: tuple[int, int], *maps: Tensor | None) -> Tensor:
    """Apply `run` to the images of maps [B, N, H, W, D], and put its results [B, N, h, w, D] together, not in place."""
    if dilation == (1, 1):
        return run(*maps)
    height, width = next(x for x in maps if x is not None).shape[2:4]
    parts = [run(*(x if x is None else one.of(x) for x in maps)) for one in remainders(dilation, height, width)]
    num_columns = min(dilation[1], width)
    rows = [torch.cat(parts[i : i + num_columns], 3) for i in range(0, len(parts), num_columns)]
    result = torch.cat(rows, 2)
    for dim, size, step in ((2, height, dilation[0]), (3, width, dilation[1])):
        places = torch.cat([torch.arange(start, size, step, device=result.device) for start in range(min(step, size))])
        result = result.index_select(dim, places.argsort())
    return result
