"""Local attention as a few matrix products, for exported programs. It needs no custom operators or window loops.

Each row of queries is multiplied by K whole rows of keys, and all columns outside the window are masked out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Most products are masked out, so wide rows are split into tiles. onnxruntime still runs this faster than the
# reference's K*K shifted windows, and the graph has a tenth of the nodes (see docs/export.md for measurements).
TILE = 16  # maximum number of queries in a tile; each tile also reads K - 1 columns of its neighbours


def local_attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Compute the reference's forward pass in the inputs' dtype (float32 or float64) without in-place operations."""
    height, width = query.shape[2:4]
    num_tiles = math.ceil(width / TILE)
    tile = math.ceil(width / num_tiles)
    surplus = num_tiles * tile - width  # zero columns, removed from the output
    q = F.pad(query, (0, 0, 0, surplus)).unflatten(3, (num_tiles, tile))  # [B, N, H, tiles, tile, D]
    # [tile, span]: the index of each span column in the query's window, 0 to K - 1 if it is inside the window.
    span = torch.arange(tile + kernel_size - 1, device=query.device)
    column = span - torch.arange(tile, device=query.device).view(-1, 1)
    scores = None if key is None else q @ _windows(key, num_tiles, tile, kernel_size).mT
    if rel_height is not None and rel_width is not None:
        relative = _relative(q, rel_height, rel_width, column.clamp(0, kernel_size - 1))
        scores = relative if scores is None else scores + relative
    assert scores is not None
    mask = _inside(column, kernel_size).unsqueeze(1).expand(-1, kernel_size, -1)  # [tile, K, span]
    if border == "mask":
        mask = mask & _inside_image(height, width, num_tiles, tile, kernel_size, query.device)
    # The mask value is not -inf, because a surplus query may see no key, and a softmax over only -inf is NaN.
    attn_weights = torch.where(mask.flatten(-2), scores, torch.finfo(scores.dtype).min).softmax(-1)
    output = attn_weights @ _windows(value, num_tiles, tile, kernel_size)
    return output.flatten(3, 4).narrow(3, 0, width)


def _windows(x: Tensor, num_tiles: int, tile: int, kernel_size: int) -> Tensor:
    """Gather the keys or values that each tile of a row can reach, [B, N, H, W, D] -> [B, N, H, tiles, K * span, D]."""
    radius, height, span = kernel_size // 2, x.shape[2], tile + kernel_size - 1
    padded = F.pad(x, (0, 0, radius, radius + num_tiles * tile - x.shape[3], radius, radius))
    tiles = torch.stack([padded.narrow(3, i * tile, span) for i in range(num_tiles)], 3)
    return torch.cat([tiles.narrow(2, dy, height) for dy in range(kernel_size)], 4)


def _relative(q: Tensor, rel_height: Tensor, rel_width: Tensor, column: Tensor) -> Tensor:
    """Return q.r, [B, N, H, tiles, tile, K * span]; values outside the window are arbitrary and masked out later."""
    num_heads = q.shape[1]
    q_top, q_bottom = q.chunk(2, dim=-1)
    rows = torch.einsum("bnhtqd,nkd->bnhtqk", q_top, rel_height.expand(num_heads, -1, -1))
    cols = torch.einsum("bnhtqd,nqsd->bnhtqs", q_bottom, rel_width.expand(num_heads, -1, -1)[:, column])
    return (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(-2)


def _inside(index: Tensor, size: int) -> Tensor:
    return index == index.clamp(0, size - 1)


def _inside_image(height: int, width: int, num_tiles: int, tile: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return a mask [H, tiles, 1, K, span] that is True if both the row and the column are inside the image."""
    radius, num_columns = kernel_size // 2, num_tiles * tile
    rows = torch.arange(height, device=device).view(-1, 1) + torch.arange(-radius, radius + 1, device=device)
    starts = torch.arange(0, num_columns, tile, device=device).view(-1, 1)
    cols = starts + torch.arange(-radius, tile + radius, device=device)
    return _inside(rows, height).view(height, 1, 1, -1, 1) & _inside(cols, width).view(num_tiles, 1, 1, -1)
