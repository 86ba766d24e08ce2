"""The definition of local self-attention in plain PyTorch. All other backends are tested against it.

It follows Stand-Alone Self-Attention (Ramachandran et al. 2019, arXiv 1906.05909, Eq. 3). For each image, head and
position (i, j), where (a, b) runs over the K x K window centred on (i, j):

    score_ab  = q_ij . k_ab  +  q_ij[:D/2] . rel_height[a - i + K//2]  +  q_ij[D/2:] . rel_width[b - j + K//2]
    output_ij = sum_ab softmax_ab(scale * score) v_ab

Public implementations differ in their conventions. This one uses the following:
- Scores are summed over the head's D channels (one weight map per head) and, as `scale` is 1 unless it is given, are
  **not** divided by sqrt(D).
- The first half of a head's channels is multiplied by the row embedding, the second half by the column embedding.
- `rel_height[K//2 + dy]` is the embedding of the key `dy` rows *below* the query, and `rel_width[K//2 + dx]` that of
  the key `dx` columns to its *right*.
- Embeddings are added to the scores only, never to the values.
- With `border="mask"`, the softmax excludes positions outside the image. With `border="zero"`, it includes them with
  zero keys and values; they keep their relative term and therefore take weight away from the image.
- With `border="shift"`, a window that would leave the image is moved inwards, so that each query sees K x K keys
  (Neighborhood Attention, Hassani et al. 2023, arXiv 2204.07143). Keys are up to K - 1 rows and columns away, so the
  embeddings have 2K - 1 rows: `rel_height[K - 1 + dy]` and `rel_width[K - 1 + dx]`.
- A window of K_h x K_w has embeddings of K_h and of K_w rows (2 K_h - 1 and 2 K_w - 1 with `border="shift"`).
- With `null_key=True`, each softmax has one more key, with score 0 and value 0, so that a head may attend to nothing
  (`add_zero_attn` of torch.nn.MultiheadAttention); the weights of a window then sum to less than 1.
- With half-precision inputs, all computation is in float32, and the result is rounded once at the end.

Query and key have shape [B, N, H, W, D] (batch, heads, height, width, head_dim), value and output [B, N, H, W, Dv],
with any strides. The embeddings have shape [K, D/2] if the heads share them, otherwise [N, K, D/2].

Dilation is no concern of a backend. With `dilation=(d_h, d_w)`, a query sees only keys whose rows and columns have the
same remainders by d_h and d_w as its own. The positions of each remainder form an image of their own, with which the
backends are called (see dispatch.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor, Tensor | None, Tensor]  # gradients of query, key and value
BORDERS = ("mask", "zero", "shift")  # in the order of csrc/planes.h


class Inputs(NamedTuple):
    """Input tensors, shaped as above. `key` is None if scores omit q.k; the embeddings are None if they omit q.r."""

    query: Tensor
    key: Tensor | None
    value: Tensor
    rel_height: Tensor | None
    rel_width: Tensor | None


class Window(NamedTuple):
    """The keys that a query sees: a window of `rows` x `columns`, and what happens at the border of the image."""

    rows: int
    columns: int
    border: str = "mask"
    scale: float = 1.0
    null_key: bool = False

    def table_rows(self) -> tuple[int, int]:
        """Return the numbers of rows of `rel_height` and `rel_width`, one for each offset between query and key."""
        return (2 * self.rows - 1, 2 * self.columns - 1) if self.border == "shift" else (self.rows, self.columns)


def local_attention_forward(inputs: Inputs, window: Window) -> Tensor:
    """Return the attention output [B, N, H, W, Dv] in the dtype of `value`, differentiable any number of times."""
    v = _batch_last(inputs.value)
    output = torch.zeros_like(v)
    for weight, v_window in zip(_attn_weights(inputs, window), _windows(_pad(v, window), window), strict=True):
        # Not in place, because torch.func.linearize would be wrong in silence.
        output = torch.addcmul(output, weight[:, None], v_window)
    return _batch_first(output, inputs.value.dtype)


def attention_weights(inputs: Inputs, window: Window) -> Tensor:
    """Return the softmax weights [B, N, H, W, K*K] in row-major window order; sum 1, or less with a null key."""
    return _attn_weights(inputs, window).permute(4, 1, 2, 3, 0)


def local_attention_backward(
    grad_output: Tensor, inputs: Inputs, window: Window
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key, value, rel_height and rel_width (None for each input that is None).

    They follow from the definition above by the chain rule; `tests/test_attention.py` checks them with gradcheck.
    """
    query, key, value, rel_height, rel_width = inputs
    # The weights are recomputed, so that no tensor of size K*K is kept between forward and backward.
    attn_weights = _attn_weights(inputs, window)
    grad, q, v = _batch_last(grad_output), _scaled_query(query, window), _batch_last(value)

    padded_v = _pad(v, window)
    grad_padded_v = torch.zeros_like(padded_v)
    grad_attn_weights = torch.empty_like(attn_weights)
    for j, v_window in enumerate(_windows(padded_v, window)):
        grad_attn_weights[j] = (grad * v_window).sum(1)
        _add_to_window(grad_padded_v, j, window, attn_weights[j, :, None], grad)
    # Gradient of the softmax: dS = P (dP - sum P dP).
    grad_scores = attn_weights * (grad_attn_weights - (attn_weights * grad_attn_weights).sum(0))

    grad_q = torch.zeros_like(q)
    grad_key = grad_rel_height = grad_rel_width = None
    if key is not None:
        padded_k = _pad(_batch_last(key), window)
        grad_padded_k = torch.zeros_like(padded_k)
        for j, k_window in enumerate(_windows(padded_k, window)):
            grad_q.addcmul_(grad_scores[j, :, None], k_window)
            _add_to_window(grad_padded_k, j, window, grad_scores[j, :, None], q)
        grad_key = _batch_first(_unpad(grad_padded_k, window), key.dtype)
    if rel_height is not None and rel_width is not None:
        by_offset = grad_scores.unflatten(0, (window.rows, window.columns))
        q_top, q_bottom = q.chunk(2, dim=1)
        grad_top, grad_rel_height = _relative_backward(by_offset.sum(1), q_top, rel_height, window, 0)
        grad_bottom, grad_rel_width = _relative_backward(by_offset.sum(0), q_bottom, rel_width, window, 1)
        grad_q += torch.cat([grad_top, grad_bottom], dim=1)
    if window.scale != 1:
        grad_q *= window.scale
    grad_value = _batch_first(_unpad(grad_padded_v, window), value.dtype)
    return _batch_first(grad_q, query.dtype), grad_key, grad_value, grad_rel_height, grad_rel_width


def pool(output: Tensor) -> Tensor:
    """Average an output [B, N, H, W, D] over 2 x 2 positions, or fewer at the end of an odd dimension."""
    pooled = F.avg_pool2d(output.permute(0, 1, 4, 2, 3).flatten(1, 2), 2, ceil_mode=True)
    return pooled.unflatten(1, (output.shape[1], -1)).permute(0, 1, 3, 4, 2)


def spread(grad_output: Tensor, height: int, width: int) -> Tensor:
    """Backpropagate through `pool`, dividing each gradient equally among the (at most four) pooled positions."""
    rows, cols = (torch.arange(side, device=grad_output.device) // 2 for side in (height, width))
    num_rows, num_cols = ((2 * rows + 2).clamp(max=height) - 2 * rows, (2 * cols + 2).clamp(max=width) - 2 * cols)
    count = num_rows[:, None] * num_cols[None, :]
    return grad_output[:, :, rows][:, :, :, cols] / count[:, :, None].to(grad_output.dtype)


def _attn_weights(inputs: Inputs, window: Window) -> Tensor:
    """Return the softmax weights, [K*K, N, H, W, B]."""
    query, key, _, rel_height, rel_width = inputs
    q = _scaled_query(query, window)
    height, width = q.shape[2:4]
    # Not in place, because torch.func.linearize would be wrong in silence.
    scores = q.new_zeros(())
    if key is not None:
        windows = _windows(_pad(_batch_last(key), window), window)
        scores = torch.stack([(q * k_window).sum(1) for k_window in windows])
        scores = scores.unflatten(0, (window.rows, window.columns))
    if rel_height is not None and rel_width is not None:
        q_top, q_bottom = q.chunk(2, dim=1)
        scores = scores + _relative(q_top, rel_height, window, 0)[:, None]
        scores = scores + _relative(q_bottom, rel_width, window, 1)[None, :]
    scores = scores.flatten(0, 1)
    if window.border == "mask":
        outside = ~_inside(height, width, window, q.device)[:, None, :, :, None]
        scores = scores.masked_fill(outside, float("-inf"))
    if window.null_key:
        return torch.cat([scores, torch.zeros_like(scores[:1])]).softmax(0)[:-1]
    return scores.softmax(0)


def _scaled_query(query: Tensor, window: Window) -> Tensor:
    q = _batch_last(query)
    return q if window.scale == 1 else q * window.scale


# The embedding of window row (axis 0) or column (axis 1) `a` is the same for all queries, rel[a], but not where windows
# are shifted.
def _relative(q_half: Tensor, rel: Tensor, window: Window, axis: int) -> Tensor:
    """Return the products [K, N, H, W, B] of half of q [N, D/2, H, W, B] with its embedding."""
    rel = _per_head(rel, q_half)
    if window.border != "shift":
        return torch.einsum("ndhwb,nkd->knhwb", q_half, rel)
    offsets = shifted_offsets(q_half.shape[2 + axis], (window.rows, window.columns)[axis], q_half.device)
    return torch.einsum(f"ndhwb,n{'hw'[axis]}kd->knhwb", q_half, rel[:, offsets])


def _relative_backward(
    grad_scores: Tensor, q_half: Tensor, rel: Tensor, window: Window, axis: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of half of q [N, D/2, H, W, B] and of its embedding, given grad_scores [K, N, H, W, B]."""
    tables = _per_head(rel, q_half)
    if window.border != "shift":
        grad_q_half = torch.einsum("knhwb,nkd->ndhwb", grad_scores, tables)
        grad_rel = torch.einsum("knhwb,ndhwb->nkd", grad_scores, q_half)
        return grad_q_half, table_gradient(grad_rel, rel)
    side = "hw"[axis]
    offsets = shifted_offsets(q_half.shape[2 + axis], (window.rows, window.columns)[axis], q_half.device)
    grad_q_half = torch.einsum(f"knhwb,n{side}kd->ndhwb", grad_scores, tables[:, offsets])
    by_place = torch.einsum(f"knhwb,ndhwb->n{side}kd", grad_scores, q_half)
    # A product instead of index_add_, which is not deterministic on a GPU.
    places = F.one_hot(offsets, rel.shape[-2]).to(by_place.dtype)
    return grad_q_half, table_gradient(torch.einsum("nskd,sko->nod", by_place, places), rel)


def shifted_offsets(size: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return the table row of each key in each position's shifted window along one axis, [size, K], 0 to 2K - 2."""
    place = torch.arange(size, device=device)
    start = (place - kernel_size // 2).clamp(0, size - kernel_size)
    return (start - place + kernel_size - 1)[:, None] + torch.arange(kernel_size, device=device)


def table_gradient(grad: Tensor, rel: Tensor) -> Tensor:
    """Return the gradient of an embedding, summed over the heads if `grad` is [N, K, D/2] and `rel` is shared."""
    return (grad if grad.dim() == rel.dim() else grad.sum(0)).to(rel.dtype)


# Internally the batch is the last dimension, so that the K*K shifted windows consist of long contiguous runs.
def _batch_last(tensor: Tensor) -> Tensor:
    """Convert [B, N, H, W, D] to contiguous [N, D, H, W, B] in float32 (in float64 if the input is float64)."""
    arithmetic = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.permute(1, 4, 2, 3, 0).to(arithmetic).contiguous()


def _batch_first(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo `_batch_last` and round to `dtype`."""
    return tensor.permute(4, 0, 2, 3, 1).to(dtype)


def _per_head(rel: Tensor, like: Tensor) -> Tensor:
    """Return an embedding [K, D/2] or [N, K, D/2] as [N, K, D/2] in the dtype of `like`."""
    return rel.to(like.dtype).expand(like.shape[0], -1, -1)


def _pad(tensor: Tensor, window: Window) -> Tensor:
    """Pad the height and width of [..., H, W, B] with zeros, unless windows stay inside the image."""
    if window.border == "shift":
        return tensor
    rows, columns = window.rows // 2, window.columns // 2
    return F.pad(tensor, (0, 0, columns, columns, rows, rows))


def _unpad(padded: Tensor, window: Window) -> Tensor:
    if window.border == "shift":
        return padded
    rows, columns = window.rows // 2, window.columns // 2
    return padded[..., rows : padded.shape[-3] - rows, columns : padded.shape[-2] - columns, :]


def _core(padded: Tensor, index: int, window: Window) -> Tensor:
    """Return the view of a padded tensor at one of the K*K places of a window that no border moves."""
    row, column = divmod(index, window.columns)
    height, width = padded.shape[-3] - window.rows + 1, padded.shape[-2] - window.columns + 1
    return padded[..., row : row + height, column : column + width, :]


def _windows(padded: Tensor, window: Window) -> Iterator[Tensor]:
    """Yield what each query sees at each of the K*K places, [..., H, W, B], in row-major window order."""
    for index in range(window.rows * window.columns):
        core = _core(padded, index, window)
        if window.border == "shift":
            # The first and the last K // 2 queries have the window of the next query inside.
            for dim, size in ((-3, window.rows), (-2, window.columns)):
                core = repeat_ends(core, dim, size // 2)
        yield core


def _add_to_window(padded: Tensor, index: int, window: Window, a: Tensor, b: Tensor) -> None:
    """Add a * b to what `_windows` yielded at one place: the gradient of this view."""
    if window.border != "shift":
        _core(padded, index, window).addcmul_(a, b)
        return
    grad = a * b
    for dim, size in ((-3, window.rows), (-2, window.columns)):
        grad = _sum_ends(grad, dim, size // 2)
    _core(padded, index, window).add_(grad)


def repeat_ends(x: Tensor, dim: int, count: int) -> Tensor:
    """Repeat the first and the last element of a dimension `count` times more."""
    ends = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
    return torch.cat([*[ends[0]] * count, x, *[ends[1]] * count], dim)


def _sum_ends(grad: Tensor, dim: int, count: int) -> Tensor:
    """Backpropagate through `repeat_ends`."""
    size = grad.shape[dim] - 2 * count
    inner = grad.narrow(dim, count, size).clone()
    inner.narrow(dim, 0, 1).add_(grad.narrow(dim, 0, count).sum(dim, keepdim=True))
    inner.narrow(dim, size - 1, 1).add_(grad.narrow(dim, count + size, count).sum(dim, keepdim=True))
    return inner


def _inside(height: int, width: int, window: Window, device: torch.device) -> Tensor:
    """Return a mask [K*K, H, W] that is True for window positions inside the image."""
    ones = _pad(torch.ones(height, width, 1, device=device), window)
    return torch.stack([view[..., 0] > 0 for view in _windows(ones, window)])
