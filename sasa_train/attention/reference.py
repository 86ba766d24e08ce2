"""The definition of local self-attention in plain PyTorch. All other backends are tested against it.

It follows Stand-Alone Self-Attention (Ramachandran et al. 2019, arXiv 1906.05909, Eq. 3). For each image, head and
position (i, j), where (a, b) runs over the K x K window centred on (i, j):

    score_ab  = q_ij . k_ab  +  q_ij[:D/2] . rel_height[a - i + K//2]  +  q_ij[D/2:] . rel_width[b - j + K//2]
    output_ij = sum_ab softmax_ab(score) v_ab

Public implementations differ in their conventions. This one uses the following:
- Scores are summed over the head's D channels (one weight map per head) and are **not** divided by sqrt(D).
- The first half of a head's channels is multiplied by the row embedding, the second half by the column embedding.
- `rel_height[K//2 + dy]` is the embedding of the key `dy` rows *below* the query, and `rel_width[K//2 + dx]` that of
  the key `dx` columns to its *right*.
- Embeddings are added to the scores only, never to the values.
- With `border="mask"`, the softmax excludes positions outside the image. With `border="zero"`, it includes them with
  zero keys and values; they keep their relative term and therefore take weight away from the image.
- With half-precision inputs, all computation is in float32, and the result is rounded once at the end.

Query, key, value and output have shape [B, N, H, W, D] (batch, heads, height, width, head_dim) and any strides. The
embeddings have shape [K, D/2] if the heads share them, otherwise [N, K, D/2].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Grads = tuple[Tensor, Tensor | None, Tensor]  # gradients of query, key and value


class Inputs(NamedTuple):
    """Input tensors, shaped as above. `key` is None if scores omit q.k; the embeddings are None if they omit q.r."""

    query: Tensor
    key: Tensor | None
    value: Tensor
    rel_height: Tensor | None
    rel_width: Tensor | None


def local_attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Return the attention output [B, N, H, W, D] in the dtype of `value`. The scores omit q.k if `key` is None."""
    attn_weights = _attn_weights(query, key, rel_height, rel_width, kernel_size, border)
    v = _batch_last(value)
    output = torch.zeros_like(v)
    for weight, v_window in zip(attn_weights, _windows(_pad(v, kernel_size), kernel_size), strict=True):
        output.addcmul_(weight[:, None], v_window)
    return _batch_first(output, value.dtype)


def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Return the softmax weights [B, N, H, W, K*K] in row-major window order; the last dimension sums to 1."""
    return _attn_weights(query, key, rel_height, rel_width, kernel_size, border).permute(4, 1, 2, 3, 0)


def local_attention_backward(
    grad_output: Tensor, inputs: Inputs, kernel_size: int, border: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key, value, rel_height and rel_width (None for each input that is None).

    They follow from the definition above by the chain rule; `tests/test_attention.py` checks them with gradcheck.
    """
    query, key, value, rel_height, rel_width = inputs
    # The weights are recomputed, so that no tensor of size K*K is kept between forward and backward.
    attn_weights = _attn_weights(query, key, rel_height, rel_width, kernel_size, border)
    grad, q, v = _batch_last(grad_output), _batch_last(query), _batch_last(value)

    padded_v = _pad(v, kernel_size)
    grad_padded_v = torch.zeros_like(padded_v)
    grad_attn_weights = torch.empty_like(attn_weights)
    windows = zip(_windows(padded_v, kernel_size), _windows(grad_padded_v, kernel_size), strict=True)
    for j, (v_window, grad_v_window) in enumerate(windows):
        grad_attn_weights[j] = (grad * v_window).sum(1)
        grad_v_window.addcmul_(attn_weights[j, :, None], grad)
    # Gradient of the softmax: dS = P (dP - sum P dP).
    grad_scores = attn_weights * (grad_attn_weights - (attn_weights * grad_attn_weights).sum(0))

    grad_q = torch.zeros_like(q)
    grad_key = grad_rel_height = grad_rel_width = None
    if key is not None:
        padded_k = _pad(_batch_last(key), kernel_size)
        grad_padded_k = torch.zeros_like(padded_k)
        windows = zip(_windows(padded_k, kernel_size), _windows(grad_padded_k, kernel_size), strict=True)
        for grad_score, (k_window, grad_k_window) in zip(grad_scores, windows, strict=True):
            grad_q.addcmul_(grad_score[:, None], k_window)
            grad_k_window.addcmul_(grad_score[:, None], q)
        grad_key = _batch_first(_unpad(grad_padded_k, kernel_size), key.dtype)
    if rel_height is not None and rel_width is not None:
        by_offset = grad_scores.unflatten(0, (kernel_size, kernel_size))
        q_top, q_bottom = q.chunk(2, dim=1)
        grad_top, grad_rel_height = _relative_backward(by_offset.sum(1), q_top, rel_height)
        grad_bottom, grad_rel_width = _relative_backward(by_offset.sum(0), q_bottom, rel_width)
        grad_q += torch.cat([grad_top, grad_bottom], dim=1)
    grad_value = _batch_first(_unpad(grad_padded_v, kernel_size), value.dtype)
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


def _attn_weights(
    query: Tensor,
    key: Tensor | None,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Return the softmax weights, [K*K, N, H, W, B]."""
    q = _batch_last(query)
    height, width = q.shape[2:4]
    # Not in place, because torch.func.linearize would be wrong in silence.
    scores = q.new_zeros(())
    if key is not None:
        windows = _windows(_pad(_batch_last(key), kernel_size), kernel_size)
        scores = torch.stack([(q * k_window).sum(1) for k_window in windows])
        scores = scores.unflatten(0, (kernel_size, kernel_size))
    if rel_height is not None and rel_width is not None:
        q_top, q_bottom = q.chunk(2, dim=1)
        scores = scores + torch.einsum("ndhwb,nkd->knhwb", q_top, _per_head(rel_height, q))[:, None]
        scores = scores + torch.einsum("ndhwb,nkd->knhwb", q_bottom, _per_head(rel_width, q))[None, :]
    scores = scores.flatten(0, 1)
    if border == "mask":
        outside = ~_inside(height, width, kernel_size, q.device)[:, None, :, :, None]
        scores = scores.masked_fill(outside, float("-inf"))
    return scores.softmax(0)


def _relative_backward(grad_scores: Tensor, q_half: Tensor, rel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of half of q [N, D/2, H, W, B] and of its embedding, given grad_scores [K, N, H, W, B]."""
    grad_q_half = torch.einsum("knhwb,nkd->ndhwb", grad_scores, _per_head(rel, q_half))
    grad_rel = torch.einsum("knhwb,ndhwb->nkd", grad_scores, q_half)
    return grad_q_half, table_gradient(grad_rel, rel)


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


def _pad(tensor: Tensor, kernel_size: int) -> Tensor:
    """Pad the height and width of [..., H, W, B] with zeros."""
    return F.pad(tensor, (0, 0, *[kernel_size // 2] * 4))


def _unpad(padded: Tensor, kernel_size: int) -> Tensor:
    p = kernel_size // 2
    return padded[..., p : padded.shape[-3] - p, p : padded.shape[-2] - p, :]


def _windows(padded: Tensor, kernel_size: int) -> Iterator[Tensor]:
    """Yield the K*K shifted views [..., H, W, B] of a padded tensor, in row-major window order."""
    height, width = padded.shape[-3] - kernel_size + 1, padded.shape[-2] - kernel_size + 1
    for dy in range(kernel_size):
        for dx in range(kernel_size):
            yield padded[..., dy : dy + height, dx : dx + width, :]


def _inside(height: int, width: int, kernel_size: int, device: torch.device) -> Tensor:
    """Return a mask [K*K, H, W] that is True for window positions inside the image."""
    ones = _pad(torch.ones(height, width, 1, device=device), kernel_size)
    return torch.stack([window[..., 0] > 0 for window in _windows(ones, kernel_size)])
