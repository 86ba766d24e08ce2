"""THE definition of local self-attention, in plain PyTorch; every other backend is judged by it.

Stand-Alone Self-Attention (Ramachandran et al. 2019, arXiv 1906.05909, Eq. 3). For each image, head and position i j,
with a b running over the K x K window centred on i j:

    score_ab  = q_ij . k_ab  +  q_ij[:D/2] . rel_height[a - i + K//2]  +  q_ij[D/2:] . rel_width[b - j + K//2]
    output_ij = sum_ab softmax_ab(score) v_ab

Conventions, where public codes disagree:
- The scores are sums over the head's D channels (one map of weights a head) and are **not** divided by sqrt(D).
- The first half of a head's channels meets the row embedding, the second half the column embedding.
- `rel_height[K//2 + dy]` belongs to the key `dy` rows *below* the query, `rel_width[K//2 + dx]` to the key `dx` columns
  to its *right*.
- Embeddings enter the scores alone, never the values.
- `border="mask"`: positions outside the image take no part in the softmax. `border="zero"`: they take part with key 0
  and value 0; their relative term stays, so they draw weight away from the image.
- Half-precision inputs are computed in float32 and rounded once at the end.

Shapes: query, key, value and output are [B, N, H, W, D] (batch, heads, height, width, head_dim) with any strides; the
embeddings are [K, D/2], shared by the heads, or [N, K, D/2].
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def local_attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Return the attended values, [B, N, H, W, D] in value's dtype. The q.k term is left out where `key` is None."""
    weights = attention_weights(query, key, rel_height, rel_width, kernel_size, border)
    padded_value = _pad(_planar(value), kernel_size)
    output = torch.zeros_like(_planar(value))
    for weight, window in zip(weights, _windows(padded_value, kernel_size), strict=True):
        output.addcmul_(weight.unsqueeze(2), window)
    return output.permute(0, 1, 3, 4, 2).to(value.dtype)


def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> Tensor:
    """Return the softmax weights [K*K, B, N, H, W], window rows outermost; they sum to 1 over the first dimension."""
    query = _planar(query)
    batch, num_heads, _, height, width = query.shape
    scores = query.new_zeros(kernel_size, kernel_size, batch, num_heads, height, width)
    if key is not None:
        for score, window in zip(scores.flatten(0, 1), _windows(_pad(_planar(key), kernel_size), kernel_size), strict=True):
            score += (query * window).sum(2)
    if rel_height is not None and rel_width is not None:
        top, bottom = query.chunk(2, dim=2)
        scores += torch.einsum("bndhw,nkd->kbnhw", top, _per_head(rel_height, query))[:, None]
        scores += torch.einsum("bndhw,nkd->kbnhw", bottom, _per_head(rel_width, query))[None, :]
    scores = scores.flatten(0, 1)
    if border == "mask":
        scores.masked_fill_(~_inside(height, width, kernel_size, query.device)[:, None, None], float("-inf"))
    return scores.softmax(0)


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of query, key, value, rel_height and rel_width (None where the input is None).

    The chain rule of the definition above, written out so that nothing of size K*K is kept between forward and
    backward: the weights are computed again. `tests/test_attention.py` checks it with gradcheck.
    """
    weights = attention_weights(query, key, rel_height, rel_width, kernel_size, border)
    grad, q, v = _planar(grad_output), _planar(query), _planar(value)

    grad_padded_value = torch.zeros_like(_pad(v, kernel_size))
    grad_weights = torch.empty_like(weights)
    value_windows = _windows(_pad(v, kernel_size), kernel_size)
    for j, (window, grad_window) in enumerate(
        zip(value_windows, _windows(grad_padded_value, kernel_size), strict=True)
    ):
        grad_weights[j] = (grad * window).sum(2)
        grad_window.addcmul_(weights[j].unsqueeze(2), grad)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(0))  # softmax; 0 where masked

    grad_q = torch.zeros_like(q)
    grad_key = grad_rel_height = grad_rel_width = None
    if key is not None:
        padded_key = _pad(_planar(key), kernel_size)
        grad_padded_key = torch.zeros_like(padded_key)
        key_windows = _windows(padded_key, kernel_size)
        for grad_score, window, grad_window in zip(
            grad_scores, key_windows, _windows(grad_padded_key, kernel_size), strict=True
        ):
            grad_q.addcmul_(grad_score.unsqueeze(2), window)
            grad_window.addcmul_(grad_score.unsqueeze(2), q)
        grad_key = _unpad(grad_padded_key, kernel_size, key.dtype)
    if rel_height is not None and rel_width is not None:
        by_offset = grad_scores.unflatten(0, (kernel_size, kernel_size))
        grad_top, grad_rel_height = _relative_backward(by_offset.sum(1), q.chunk(2, dim=2)[0], rel_height)
        grad_bottom, grad_rel_width = _relative_backward(by_offset.sum(0), q.chunk(2, dim=2)[1], rel_width)
        grad_q += torch.cat([grad_top, grad_bottom], dim=2)
    grad_query = grad_q.permute(0, 1, 3, 4, 2).to(query.dtype)
    return grad_query, grad_key, _unpad(grad_padded_value, kernel_size, value.dtype), grad_rel_height, grad_rel_width


def _relative_backward(grad_scores: Tensor, q_half: Tensor, rel: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of one half of q [B, N, D/2, H, W] and of its embedding, from grad_scores [K, B, N, H, W]."""
    grad_q_half = torch.einsum("kbnhw,nkd->bndhw", grad_scores, _per_head(rel, q_half))
    grad_rel = torch.einsum("kbnhw,bndhw->nkd", grad_scores, q_half)
    return grad_q_half, (grad_rel if rel.dim() == 3 else grad_rel.sum(0)).to(rel.dtype)


def _planar(tensor: Tensor) -> Tensor:
    """[B, N, H, W, D] -> contiguous [B, N, D, H, W] in float32, or float64 where the input is."""
    arithmetic = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.permute(0, 1, 4, 2, 3).to(arithmetic).contiguous()


def _per_head(rel: Tensor, like: Tensor) -> Tensor:
    """[K, D/2] or [N, K, D/2] -> [N, K, D/2] in the arithmetic's dtype."""
    return rel.to(like.dtype).expand(like.shape[1], -1, -1)


def _pad(planar: Tensor, kernel_size: int) -> Tensor:
    return F.pad(planar, [kernel_size // 2] * 4)


def _unpad(padded: Tensor, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Drop the border of [B, N, D, H+2p, W+2p] and return [B, N, H, W, D]."""
    p = kernel_size // 2
    inner = padded[..., p : padded.shape[-2] - p, p : padded.shape[-1] - p]
    return inner.permute(0, 1, 3, 4, 2).to(dtype)


def _windows(padded: Tensor, kernel_size: int) -> Iterator[Tensor]:
    """Yield the K*K shifted views [..., H, W] of a padded tensor, row by row of the window."""
    height, width = padded.shape[-2] - kernel_size + 1, padded.shape[-1] - kernel_size + 1
    for dy in range(kernel_size):
        for dx in range(kernel_size):
            yield padded[..., dy : dy + height, dx : dx + width]


def _inside(height: int, width: int, kernel_size: int, device: torch.device) -> Tensor:
    """[K*K, H, W]: True where the window's position lies inside the image."""
    ones = _pad(torch.ones(1, 1, 1, height, width, device=device), kernel_size)
    return torch.stack([window[0, 0, 0] > 0 for window in _windows(ones, kernel_size)])
