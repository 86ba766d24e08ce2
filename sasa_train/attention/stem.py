"""Two torch.library ops that run the attention stem with the compiled float32 CPU kernel, `csrc/attention_stem.cpp`.

`AttentionStem` in sasa_train/models/layers.py defines the stem and runs it in PyTorch on all other devices. It calls
`attention_stem` (all positions) or, if batch norm and max pooling follow, `attention_stem_pooled` (the maximum of each
block, and the mean and variance of each channel).
"""

import ctypes
import functools
import logging

import torch
from torch import Tensor

from sasa_train.attention import cpu
from sasa_train.attention.operators import define_operator

SIDE = 4  # height and width of a block
# A score costs in_channels multiplications here instead of head_dim, so the gain is larger with fewer channels.
MAX_IN_CHANNELS = 8
LOG2_E = 1.4426950408889634  # the kernel computes exponentials in base 2

log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
def can_run(
    backend: str, device: str, dtype: torch.dtype, in_channels: int, weights: torch.dtype, autocast: bool
) -> bool:
    """Return whether the kernel supports this image and these weights; build the kernel at first use.

    If the kernel cannot run on a CPU, `backend="auto"` logs the reason once, and the caller falls back to PyTorch.

    Raises:
        RuntimeError: `backend="cpu"` is requested but cannot run.
    """
    reason = _unavailable(device, dtype, in_channels, weights, autocast)
    if backend == "cpu" and reason is not None:
        raise RuntimeError(f"backend='cpu' cannot run: {reason}")
    if device == "cpu" and reason is not None:
        _say_once(reason)
    return reason is None


@functools.cache
def _say_once(reason: str) -> None:
    log.warning(
        f"attention stem: backend=auto runs PyTorch, many times slower than the compiled kernel, because {reason}"
    )


def _unavailable(device: str, dtype: torch.dtype, in_channels: int, weights: torch.dtype, autocast: bool) -> str | None:
    if device != "cpu":
        return f"the image is on {device}"
    if weights != torch.float32 or dtype not in (torch.float32, *([torch.bfloat16, torch.float16] if autocast else [])):
        return f"the image is {dtype} and the weights are {weights}; the kernel computes in float32"
    if in_channels > MAX_IN_CHANNELS:
        return f"in_channels={in_channels} is above {MAX_IN_CHANNELS}"
    return cpu.why_not_built("attention_stem", in_channels)


def attention_stem(
    x: Tensor,
    w_qk: Tensor,
    w_v: Tensor,
    mixture: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    num_heads: int,
) -> Tensor:
    """Compute full attention inside each 4x4 block; return float32 [B, C, H, W] in channels_last memory format.

    Args:
        x: the image [B, C_in, H, W], any strides; H and W are divisible by 4.
        w_qk: [2C, C_in], the query weights followed by the key weights.
        w_v, mixture: [C, m, C_in] and [m, 4, 4]; values at (a, b) in a block are sum_m mixture[m, a, b] w_v[:, m] x.
        rel_height, rel_width: [7, D/2], or both None.
    """
    return _attention_stem(x.float(), w_qk, w_v, mixture, rel_height, rel_width, num_heads)


def attention_stem_pooled(
    x: Tensor,
    w_qk: Tensor,
    w_v: Tensor,
    mixture: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    num_heads: int,
    sign: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute only those parts of `attention_stem`'s output that a per-channel affine map and 4x4 max pooling require.

    Args:
        sign: [C], for each channel, 1 if the affine map is increasing, -1 if it is decreasing and 0 if it is constant.

    Returns:
        The maximum of each block (the minimum if `sign` is -1, the first value if it is 0), [B, C, H/4, W/4] in the
        stride order of x; and the mean and biased variance [C] of each channel over all positions.
    """
    picked, _, mean, variance = _attention_stem_pooled(
        x.float(), w_qk, w_v, mixture, rel_height, rel_width, num_heads, sign
    )
    return picked, mean, variance


# ---- the kernel


class _Image(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "bchw"))


class _Problem(ctypes.Structure):
    """Mirror of the struct `Problem` in the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "height", "width", "num_heads", "head_dim", "num_threads")),
        *((name, _Image) for name in ("x", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("tables", "grad_tables", "map", "pooled")),
        *((name, ctypes.c_int64) for name in ("pooled_b", "pooled_c", "pooled_p")),
        *((name, ctypes.c_void_p) for name in ("places", "sign", "mean", "variance", "grad_mean", "grad_variance")),
        ("workspace", ctypes.c_void_p),
    )


# w_qk, w_v, mixture, rel_height, rel_width
_Weights = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _problem(x: Tensor, weights: _Weights, num_heads: int) -> tuple[_Problem, Tensor]:
    """Return the C++ struct and the tables that it points to, which the caller must keep alive."""
    batch, _, height, width = x.shape
    tables = _tables(weights, num_heads)
    problem = _Problem(batch, height, width, num_heads, len(weights[1]) // num_heads, torch.get_num_threads())
    problem.x = _Image(x.data_ptr(), *x.stride())
    problem.tables = tables.data_ptr()
    return problem, tables


def _set_pooled(problem: _Problem, x: Tensor, pooled: Tensor, places: Tensor) -> None:
    area, num_channels = x.shape[2] * x.shape[3] // SIDE**2, len(places)
    strides = (1, num_channels) if _memory_format(x) == torch.channels_last else (area, 1)
    problem.pooled, problem.places = pooled.data_ptr(), places.data_ptr()
    problem.pooled_b, (problem.pooled_c, problem.pooled_p) = num_channels * area, strides


def _memory_format(x: Tensor) -> torch.memory_format:
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_channels_last else torch.contiguous_format


# The products of weights below are computed in float64 and rounded once, because their error affects every score.
def _heads(w_qk: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Return W_Q and W_K, [N, D, C_in], in float64."""
    w_q, w_k = w_qk.double().unflatten(0, (2, num_heads, -1))
    return w_q, w_k


def _tables(weights: _Weights, num_heads: int) -> Tensor:
    """Return the kernel's tables: M, row and col for each head (see the C++ source), W_V for each block position."""
    w_qk, w_v, mixture, rel_height, rel_width = weights
    w_q, w_k = _heads(w_qk, num_heads)
    form = torch.einsum("ndi,ndj->nij", w_q, w_k)
    if rel_height is None or rel_width is None:
        relative = w_q.new_zeros(2, num_heads, 2 * SIDE - 1, w_qk.shape[1])
    else:
        halves = zip((rel_height, rel_width), w_q.chunk(2, dim=1), strict=True)
        relative = torch.stack([torch.einsum("rd,ndi->nri", rel.double(), half) for rel, half in halves])
    value = torch.einsum("ndmi,mp->npdi", w_v.double().unflatten(0, (num_heads, -1)), mixture.double().flatten(1))
    return torch.cat([LOG2_E * form.flatten(), LOG2_E * relative.flatten(), value.flatten()]).float()


def _tables_backward(grad: Tensor, weights: _Weights, num_heads: int) -> list[Tensor]:
    """Return the gradients of all weights that are not None, given those of the tables (without the factor log2(e))."""
    w_qk, w_v, mixture, rel_height, rel_width = weights
    w_q, w_k = _heads(w_qk, num_heads)
    in_channels, num_offsets = w_qk.shape[1], 2 * SIDE - 1
    sizes = [num_heads * in_channels**2, *[num_heads * num_offsets * in_channels] * 2, SIDE**2 * w_v[:, 0].numel()]
    of_form, of_row, of_col, of_value = grad.double().split(sizes)
    of_form = of_form.view(num_heads, in_channels, in_channels)
    grad_q, grad_k = torch.einsum("nij,ndj->ndi", of_form, w_k), torch.einsum("nij,ndi->ndj", of_form, w_q)
    grad_rel = []
    if rel_height is not None and rel_width is not None:
        halves = zip((rel_height, rel_width), (of_row, of_col), w_q.chunk(2, 1), grad_q.chunk(2, 1), strict=True)
        for rel, of_table, w_half, grad_half in halves:
            of_table = of_table.view(num_heads, num_offsets, in_channels)
            grad_half += torch.einsum("nri,rd->ndi", of_table, rel.double())
            grad_rel.append(torch.einsum("nri,ndi->rd", of_table, w_half))
    of_value = of_value.view(num_heads, SIDE**2, -1, in_channels)
    heads = w_v.double().unflatten(0, (num_heads, -1))
    grad_v = torch.einsum("npdi,mp->ndmi", of_value, mixture.double().flatten(1)).flatten(0, 1)
    grad_mixture = torch.einsum("npdi,ndmi->mp", of_value, heads).view_as(mixture)
    grads = [torch.stack([grad_q, grad_k]).view_as(w_qk), grad_v, grad_mixture, *grad_rel]
    present = [weight for weight in weights if weight is not None]
    return [torch.empty_like(weight).copy_(grad) for weight, grad in zip(present, grads, strict=True)]


def _run_backward(problem: _Problem, x: Tensor, weights: _Weights, tables: Tensor, needs_x: bool) -> list[Tensor]:
    """Return the gradients of x (if `needs_x`) and of the weights, given the output's gradients in `problem`."""
    grad_tables = torch.empty_like(tables)
    problem.grad_tables = grad_tables.data_ptr()
    grads = [torch.empty_like(x)] if needs_x else []
    for grad in grads:
        problem.grad_x = _Image(grad.data_ptr(), *grad.stride())
    cpu.run("attention_stem", x.shape[1], "backward", problem)
    return [*grads, *_tables_backward(grad_tables, weights, problem.num_heads)]


# ---- all positions


def _forward(x, w_qk, w_v, mixture, rel_height, rel_width, num_heads) -> Tensor:
    output = _empty_map(x, w_qk, w_v)
    problem, _tables_alive = _problem(x, (w_qk, w_v, mixture, rel_height, rel_width), num_heads)
    problem.map = output.data_ptr()
    cpu.run("attention_stem", x.shape[1], "forward", problem)
    return output


def _empty_map(x: Tensor, w_qk: Tensor, w_v: Tensor, *_) -> Tensor:
    shape = (x.shape[0], w_v.shape[0], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _backward(grad_output, x, w_qk, w_v, mixture, rel_height, rel_width, num_heads, needs_x) -> list[Tensor]:
    weights = (w_qk, w_v, mixture, rel_height, rel_width)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    problem, tables = _problem(x, weights, num_heads)
    problem.map = grad_output.data_ptr()
    return _run_backward(problem, x, weights, tables, needs_x)


# ---- the maximum of each block


def _forward_pooled(
    x, w_qk, w_v, mixture, rel_height, rel_width, num_heads, sign
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the selected values, their positions in their blocks (uint8 [C, number of blocks]), mean and variance."""
    outputs = picked, places, mean, variance = _empty_pooled(x, w_qk, w_v)
    problem, _tables_alive = _problem(x, (w_qk, w_v, mixture, rel_height, rel_width), num_heads)
    _set_pooled(problem, x, picked, places)
    sign = sign.to(torch.float32).contiguous()
    problem.sign, problem.mean, problem.variance = sign.data_ptr(), mean.data_ptr(), variance.data_ptr()
    cpu.run("attention_stem", x.shape[1], "forward", problem)
    return outputs


def _empty_pooled(x: Tensor, w_qk: Tensor, w_v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width = len(x), *x.shape[2:]
    shape = (batch, w_v.shape[0], height // SIDE, width // SIDE)
    picked = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_memory_format(x))
    places = x.new_empty((shape[1], batch * shape[2] * shape[3]), dtype=torch.uint8)
    return picked, places, x.new_empty(shape[1]), x.new_empty(shape[1])


def _backward_pooled(
    grad_picked, grad_mean, grad_variance, places, mean,
    x, w_qk, w_v, mixture, rel_height, rel_width, num_heads, _sign, needs_x,
) -> list[Tensor]:  # fmt: skip
    weights = (w_qk, w_v, mixture, rel_height, rel_width)
    grad_picked = grad_picked.contiguous(memory_format=_memory_format(x))
    grad_mean, grad_variance = grad_mean.contiguous(), grad_variance.contiguous()
    problem, tables = _problem(x, weights, num_heads)
    _set_pooled(problem, x, grad_picked, places)
    problem.mean = mean.data_ptr()
    problem.grad_mean, problem.grad_variance = grad_mean.data_ptr(), grad_variance.data_ptr()
    return _run_backward(problem, x, weights, tables, needs_x)


# ---- both in PyTorch, for derivatives that the kernel lacks


def _compose(x, w_qk, w_v, mixture, rel_height, rel_width, num_heads) -> Tensor:
    blocks = _compose_blocks(x, w_qk, w_v, mixture, rel_height, rel_width, num_heads)
    return blocks.unflatten(3, (SIDE, SIDE)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _compose_pooled(
    x, w_qk, w_v, mixture, rel_height, rel_width, num_heads, sign
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks = _compose_blocks(x, w_qk, w_v, mixture, rel_height, rel_width, num_heads)
    places = torch.where(sign == 0, 0, (blocks.detach() * sign).argmax(3)).unsqueeze(3)
    picked, positions = blocks.gather(3, places).squeeze(3).permute(0, 3, 1, 2), (0, 1, 2, 3)
    return picked, places, blocks.mean(positions), blocks.var(positions, correction=0)


def _compose_blocks(x, w_qk, w_v, mixture, rel_height, rel_width, num_heads) -> Tensor:
    """Return the output of each position of each block, [B, H/4, W/4, 16, C]."""
    blocks = x.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4)
    q, k = (blocks @ w_qk.T).unflatten(-1, (2, num_heads, -1)).unbind(-3)  # [B, H/4, W/4, 16, N, D]
    v = torch.einsum("byxpi,cmi,mp->byxpc", blocks, w_v, mixture.flatten(1)).unflatten(-1, (num_heads, -1))
    scores = torch.einsum("byxpnd,byxqnd->byxnpq", q, k)
    if rel_height is not None and rel_width is not None:
        place = torch.arange(SIDE**2, device=x.device)
        for rel, half, of in zip((rel_height, rel_width), q.chunk(2, -1), (place // SIDE, place % SIDE), strict=True):
            table = rel[of - of[:, None] + SIDE - 1]  # the key's row or column minus the query's
            scores = scores + torch.einsum("byxpnd,pqd->byxnpq", half, table)
    return torch.einsum("byxnpq,byxqnd->byxpnd", scores.softmax(-1), v).flatten(-2)


# ---- the ops


def _forward_flops(x, w_qk, w_v, mixture, rel_height, *_, **__) -> int:
    """Count the FLOPs of the definition (projections, q.k, q.r, weights times values); the kernel performs fewer."""
    batch, in_channels, height, width = x
    num_channels, num_mixtures = w_v[:2]
    projections = (2 + num_mixtures) * in_channels * num_channels
    attention = (2 + (rel_height is not None)) * SIDE**2 * num_channels
    return 2 * (projections + attention) * batch * height * width


_define = functools.partial(
    define_operator,
    tensors="Tensor x, Tensor w_qk, Tensor w_v, Tensor mixture, Tensor? rel_height, Tensor? rel_width",
    options="SymInt num_heads",
    skips_first=True,  # images rarely need gradients
    flops=_forward_flops,
    device_types="cpu",
)

_attention_stem = _define(
    "attention_stem",
    outputs="Tensor",
    forward=_forward,
    fake=_empty_map,
    backward=_backward,
    composition=_compose,
    backward_inputs="Tensor grad_output",
)

_attention_stem_pooled = _define(
    "attention_stem_pooled",
    outputs="(Tensor, Tensor, Tensor, Tensor)",
    options="SymInt num_heads, Tensor sign",
    forward=_forward_pooled,
    fake=_empty_pooled,
    backward=_backward_pooled,
    composition=_compose_pooled,
    backward_inputs="Tensor grad_picked, Tensor grad_mean, Tensor grad_variance, Tensor places, Tensor mean",
    grads=(0, 2, 3),
    kept=(1, 2),
)
