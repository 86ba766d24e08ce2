"""Local attention as a few matrix products, for exported programs. It needs no custom operators or window loops.

Each row of queries is multiplied by K whole rows of keys, and all columns outside the window are masked out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa_train.attention.reference import Inputs, Window, repeat_ends, shifted_offsets

# Most products are masked out, so wide rows are split into tiles. onnxruntime still runs this faster than the
# reference's K*K shifted windows, and the graph has a tenth of the nodes (see docs/export.md for measurements).
TILE = 16  # maximum number of queries in a tile; each tile also reads K - 1 columns of its neighbours


def local_attention_forward(inputs: Inputs, window: Window) -> Tensor:
    """Compute the reference's forward pass in the inputs' dtype (float32 or float64) without in-place operations."""
    query, key, value, rel_height, rel_width = inputs
    height, width = query.shape[2:4]
    num_offsets = window.table_rows()[1]
    num_tiles = math.ceil(width / TILE)
    tile = math.ceil(width / num_tiles)
    surplus = num_tiles * tile - width  # zero columns, removed from the output
    q = query if window.scale == 1 else query * window.scale
    q = F.pad(q, (0, 0, 0, surplus)).unflatten(3, (num_tiles, tile))  # [B, N, H, tiles, tile, D]
    # [tile, span]: the offset of each span column from the query, 0 to num_offsets - 1 if it can be in its window.
    span = torch.arange(tile + num_offsets - 1, device=query.device)
    column = span - torch.arange(tile, device=query.device).view(-1, 1)
    scores = None if key is None else q @ _windows(key, num_tiles, tile, window).mT
    if rel_height is not None and rel_width is not None:
        relative = _relative(q, rel_height, rel_width, column.clamp(0, num_offsets - 1), window)
        scores = relative if scores is None else scores + relative
    assert scores is not None
    if window.border == "shift":
        mask = _inside_shifted(width, num_tiles, tile, column, window)
    else:
        mask = _inside(column, num_offsets).unsqueeze(1).expand(-1, window.rows, -1)  # [tile, K, span]
    if window.border == "mask":
        mask = mask & _inside_image(height, width, num_tiles, tile, window, query.device)
    # The mask value is not -inf, because a surplus query may see no key, and a softmax over only -inf is NaN.
    scores = torch.where(mask.flatten(-2), scores, torch.finfo(scores.dtype).min)
    attn_weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1] if window.null_key else scores.softmax(-1)
    output = attn_weights @ _windows(value, num_tiles, tile, window)
    return output.flatten(3, 4).narrow(3, 0, width)


def _windows(x: Tensor, num_tiles: int, tile: int, window: Window) -> Tensor:
    """Gather the keys or values that each tile of a row can reach, [B, N, H, W, D] -> [B, N, H, tiles, K * span, D]."""
    height, num_offsets = x.shape[2], window.table_rows()[1]
    reach, span, radius = num_offsets // 2, tile + num_offsets - 1, window.rows // 2
    is_shifted = window.border == "shift"
    above = 0 if is_shifted else radius
    padded = F.pad(x, (0, 0, reach, reach + num_tiles * tile - x.shape[3], above, above))
    tiles = torch.stack([padded.narrow(3, i * tile, span) for i in range(num_tiles)], 3)
    num_rows = height - window.rows + 1 if is_shifted else height
    rows = [tiles.narrow(2, dy, num_rows) for dy in range(window.rows)]
    return torch.cat([repeat_ends(row, 2, radius) for row in rows] if is_shifted else rows, 4)


def _relative(q: Tensor, rel_height: Tensor, rel_width: Tensor, column: Tensor, window: Window) -> Tensor:
    """Return q.r, [B, N, H, tiles, tile, K * span]; values outside the window are arbitrary and masked out later."""
    num_heads = q.shape[1]
    q_top, q_bottom = q.chunk(2, dim=-1)
    by_row, equation = rel_height.expand(num_heads, -1, -1), "bnhtqd,nkd->bnhtqk"
    if window.border == "shift":
        by_row, equation = by_row[:, shifted_offsets(q.shape[2], window.rows, q.device)], "bnhtqd,nhkd->bnhtqk"
    rows = torch.einsum(equation, q_top, by_row)
    cols = torch.einsum("bnhtqd,nqsd->bnhtqs", q_bottom, rel_width.expand(num_heads, -1, -1)[:, column])
    return (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(-2)


def _inside(index: Tensor, size: int) -> Tensor:
    return index == index.clamp(0, size - 1)


def _inside_image(height: int, width: int, num_tiles: int, tile: int, window: Window, device: torch.device) -> Tensor:
    """Return a mask [H, tiles, 1, K, span] that is True if both the row and the column are inside the image."""
    (above, left), num_columns = (window.rows // 2, window.columns // 2), num_tiles * tile
    rows = torch.arange(height, device=device).view(-1, 1) + torch.arange(-above, above + 1, device=device)
    starts = torch.arange(0, num_columns, tile, device=device).view(-1, 1)
    cols = starts + torch.arange(-left, tile + left, device=device)
    return _inside(rows, height).view(height, 1, 1, -1, 1) & _inside(cols, width).view(num_tiles, 1, 1, -1)


def _inside_shifted(width: int, num_tiles: int, tile: int, column: Tensor, window: Window) -> Tensor:
    """Return a mask [tiles, tile, K, span] that is True in the shifted window of each query."""
    place = torch.arange(num_tiles * tile, device=column.device).view(num_tiles, tile, 1)
    start = (place - window.columns // 2).clamp(0, width - window.columns)
    mask = _inside(column + place - (window.columns - 1) - start, window.columns)
    return mask.unsqueeze(2).expand(-1, -1, window.rows, -1)
