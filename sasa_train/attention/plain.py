"""Local attention as a few matrix products, for exported programs: no operator of ours, no loop over the window.

Each row of queries meets K whole rows of keys, all but the window's columns masked out. That multiplies much in vain,
so a wide row is cut into tiles; but a runtime without our kernels is faster with it than with the reference's K*K
shifted windows, and the graph has a tenth of the nodes (docs/export.md has the numbers).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 16  # queries of a row at most; each tile reads K - 1 columns of its neighbours


def local_attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """As the reference's, in the inputs' own dtype (float32 or float64), without anything in place."""
    height, width = query.shape[2:4]
    num_tiles = math.ceil(width / TILE)
    tile = math.ceil(width / num_tiles)
    surplus = num_tiles * tile - width  # columns of zeros, cut off again
    q = F.pad(query, (0, 0, 0, surplus)).unflatten(3, (num_tiles, tile))  # [B, N, H, tiles, tile, D]
    scores = None if key is None else q @ _windows(key, num_tiles, tile, kernel_size).mT
    if rel_height is not None and rel_width is not None:
        relative = _relative(q, rel_height, rel_width, kernel_size)
        scores = relative if scores is None else scores + relative
    assert scores is not None
    mask = _mask(height, width, num_tiles, tile, kernel_size, border, query.device)
    # Not -inf, whose softmax is NaN where a surplus query sees nothing.
    attn_weights = torch.where(mask, scores, torch.finfo(scores.dtype).min).softmax(-1)
    output = attn_weights @ _windows(value, num_tiles, tile, kernel_size)
    return output.flatten(3, 4)[:, :, :, :width]


def _windows(x: Tensor, num_tiles: int, tile: int, kernel_size: int) -> Tensor:
    """[B, N, H, W, D] -> [B, N, H, tiles, K * span, D]: for each tile of a row what its queries may look at."""
    radius, height, span = kernel_size // 2, x.shape[2], tile + kernel_size - 1
    padded = F.pad(x, (0, 0, radius, radius + num_tiles * tile - x.shape[3], radius, radius))
    tiles = torch.stack([padded[:, :, :, i * tile : i * tile + span] for i in range(num_tiles)], 3)
    return torch.cat([tiles[:, :, dy : dy + height] for dy in range(kernel_size)], 4)


def _relative(q: Tensor, rel_height: Tensor, rel_width: Tensor, kernel_size: int) -> Tensor:
    """q.r, [B, N, H, tiles, tile, K * span]; what is outside the window gets some value too."""
    num_heads, tile = q.shape[1], q.shape[4]
    q_top, q_bottom = q.chunk(2, dim=-1)
    offset = _column_offset(tile, kernel_size, q.device).clamp(0, kernel_size - 1)
    rows = torch.einsum("bnhtqd,nkd->bnhtqk", q_top, rel_height.expand(num_heads, -1, -1))
    cols = torch.einsum("bnhtqd,nqsd->bnhtqs", q_bottom, rel_width.expand(num_heads, -1, -1)[:, offset])
    return (rows[..., :, None] + cols[..., None, :]).flatten(-2)


def _column_offset(tile: int, kernel_size: int, device: torch.device) -> Tensor:
    """[tile, span]: the column of a query's window that each column of the span is, from 0 to K - 1 inside it."""
    return torch.arange(tile + kernel_size - 1, device=device) - torch.arange(tile, device=device)[:, None]


def _mask(
    height: int, width: int, num_tiles: int, tile: int, kernel_size: int, border: str, device: torch.device
) -> Tensor:
    """[H, tiles, tile, K * span]: True where a position of the span is in the query's window, and takes part there."""
    offset = _column_offset(tile, kernel_size, device)
    mask = ((offset >= 0) & (offset < kernel_size))[None, None, :, None, :]
    rows = torch.arange(height, device=device)[:, None] + torch.arange(kernel_size, device=device) - kernel_size // 2
    cols = torch.arange(num_tiles, device=device)[:, None] * tile + torch.arange(offset.shape[1], device=device)
    cols = cols - kernel_size // 2
    row_inside, col_inside = (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)
    if border == "mask":
        mask = mask & row_inside[:, None, None, :, None] & col_inside[None, :, None, None, :]
    return mask.expand(height, num_tiles, tile, kernel_size, -1).flatten(3)
