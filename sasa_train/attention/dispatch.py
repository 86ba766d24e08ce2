"""`local_attention` and its variant for layers. Both check their arguments and call an op that selects a backend.

The backends are `reference` (plain PyTorch, all devices and dtypes), `cpu` (compiled at first use) and `triton` (NVIDIA
GPUs). The last two support float32 and half precision. `auto` selects `triton` for tensors on a GPU and `cpu` for
others, and falls back to `reference` if that backend cannot run. `attention_weights` always uses the reference, because
the other backends never materialise the weights.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable
from numbers import Integral
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sasa_train.attention import cpu, reference
from sasa_train.attention.operators import define_operator
from sasa_train.attention.reference import Grads, Inputs

BACKENDS = ("auto", "reference", "cpu", "triton")
BORDERS = ("mask", "zero")

log = logging.getLogger(__name__)


def local_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: int,
    content: bool = True,
    border: str = "mask",
    backend: str = "auto",
) -> Tensor:
    """Attend from each position to the K x K window around it (arXiv 1906.05909, Eq. 3; no scaling of the scores).

    The definition, with every convention, is in `sasa_train/attention/reference.py`.

    Args:
        query, key, value: [B, N, H, W, D] (batch, heads, height, width, head_dim), one floating dtype, any strides.
            `key` may be None when `content=False`.
        rel_height, rel_width: relative embeddings [K, D/2], shared by the heads, or [N, K, D/2]; give both or neither.
            They may be float32 even if q, k and v are in half precision; `triton` rounds them to that for windows up to
            7 x 7 and heads of 8, 16, 32 or 64 channels.
        kernel_size: the window size K, an odd number.
        content: whether the scores include q.k.
        border: "mask" (exclude positions outside the image) or "zero" (include them with zero keys and values).
        backend: "auto", "reference", "cpu" or "triton". A backend requested by name raises an error if it cannot run.

    Returns:
        [B, N, H, W, D], with the dtype and stride order of `value`; differentiable with respect to all five tensors.
        The result is deterministic.

    Raises:
        ValueError: an argument is invalid; the message states its name, its value and the rule that it violates.
        RuntimeError: the requested backend cannot run here.
    """
    _check(query, key, value, rel_height, rel_width, kernel_size, content, border, backend)
    key = key if content else None
    return _local_attention(query, key, value, rel_height, rel_width, kernel_size, border, backend)[0]


def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: int,
    content: bool = True,
    border: str = "mask",
) -> Tensor:
    """Compute the weights that `local_attention` assigns to each position's window, using the reference backend.

    The arguments are those of `local_attention`, except `value` and `backend`.

    Returns:
        [B, N, H, W, K*K] in row-major window order, float32 (float64 if `query` is float64), differentiable. The last
        dimension sums to 1; with `border="mask"`, positions outside the image have a weight of exactly 0.

    Raises:
        ValueError: an argument is invalid for `local_attention`.
    """
    _check(query, key, query, rel_height, rel_width, kernel_size, content, border, "reference")
    return reference.attention_weights(query, key if content else None, rel_height, rel_width, kernel_size, border)


def local_attention_qkv(
    projections: Tensor,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: int,
    content: bool = True,
    border: str = "mask",
    stride: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Apply `local_attention` to queries, keys and values stacked in one tensor, with optional average pooling.

    Args:
        projections: [3, B, N, H, W, D] with any strides, or [2, B, N, H, W, D] (queries and values) if `content=False`.
        stride: if 2, the output is average-pooled 2x2 to [B, N, ceil(H / 2), ceil(W / 2), D]; at the end of an odd
            dimension, only the existing positions are averaged.
    """
    # A single input tensor has a single gradient tensor with the same strides. Three separate gradients would have to
    # be stacked and copied back into the layout of the projection, which took longer than the attention itself.
    _check_tensor("projections", projections)
    if projections.dim() != 6 or projections.shape[0] != (3 if content else 2):
        raise ValueError(
            f"projections must be [{3 if content else 2}, B, N, H, W, D] with content={content}; "
            f"got {_shape(projections)}"
        )
    check_stride(stride)
    query, key, value = split_projections(projections)
    _check(query, key, value, rel_height, rel_width, kernel_size, content, border, backend)
    return _local_attention_qkv(projections, rel_height, rel_width, kernel_size, border, stride, backend)[0]


def split_projections(projections: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return query, key (None if there are only two projections) and value."""
    return projections[0], projections[1] if projections.shape[0] == 3 else None, projections[-1]


def _forward(inputs: Inputs, kernel_size: int, border: str, stride: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    value = inputs.value
    module = _resolve(backend, inputs.query, kernel_size)
    if module is cpu and value.numel():
        return *cpu.local_attention_forward(inputs, kernel_size, border, stride), value.new_empty(0)
    kept = empty_kept(value, stride, backend)
    output = cpu.empty_output(value, stride)
    if value.numel() == 0:
        return output, *kept
    if module is reference:
        exact = reference.local_attention_forward(*inputs, kernel_size, border)
        output.copy_(reference.pool(exact) if stride == 2 else exact)
        return output, kept[0].zero_(), kept[1].zero_()
    module.local_attention_forward(inputs, output, *kept, kernel_size, border, stride)
    return output, *kept


def empty_kept(value: Tensor, stride: int, backend: str) -> tuple[Tensor, Tensor]:
    """Allocate what the compiled kernels keep for backward: statistics of the softmax, and the output before pooling.

    The CPU kernel keeps no output. The fake implementations call this too, which cannot know the selected backend.
    """
    # A branch on the batch size would fix that size in an exported program.
    if value.device.type == "cpu" and backend != "triton":
        return value.new_empty(cpu.statistics_shape(value), dtype=torch.float32), value.new_empty(0)
    statistics = value.new_empty(value.shape[:4], dtype=torch.float32)
    return statistics, torch.empty_like(value) if stride == 2 else value.new_empty(0)


def _backward_into(
    grads: Grads, grad_output, output, statistics, unpooled, inputs: Inputs, kernel_size, border, stride, backend
) -> list[Tensor]:
    """Write the gradients of query, key and value to `grads`; return those of the embeddings, if present."""
    if inputs.query.numel() == 0:
        return [torch.zeros_like(rel) for rel in inputs[3:] if rel is not None]
    module = _resolve(backend, inputs.query, kernel_size)
    if module is cpu:
        grad_rel = cpu.local_attention_backward(grad_output, statistics, inputs, kernel_size, border, stride, grads)
    elif module is reference:
        if stride == 2:
            grad_output = reference.spread(grad_output, *inputs.query.shape[2:4])
        *exact, grad_rel_height, grad_rel_width = reference.local_attention_backward(
            grad_output, inputs, kernel_size, border
        )
        grad_rel = grad_rel_height, grad_rel_width
        for grad, x in zip(grads, exact, strict=True):
            if grad is not None and x is not None:
                grad.copy_(x)
    else:
        full = output if stride == 1 else unpooled
        grad_rel = module.local_attention_backward(
            grad_output, full, statistics, inputs, kernel_size, border, stride, grads
        )
    # These are new tensors with the strides that the fake implementation promises.
    pairs = zip(inputs[3:], grad_rel, strict=True)
    return [torch.empty_like(rel).copy_(grad) for rel, grad in pairs if rel is not None and grad is not None]


def _forward_flops(query, key, value, rel_height, rel_width, kernel_size, *_, **__) -> int:
    """Count 2*K*K*D FLOPs per head and position for each product (q.k, q.r, weights times v), assuming full windows."""
    batch, num_heads, height, width, head_dim = query
    num_products = 1 + (key is not None) + (rel_height is not None)
    return num_products * 2 * kernel_size**2 * head_dim * batch * num_heads * height * width


def _forward_flops_qkv(projections, rel_height, rel_width, kernel_size, *_, **__) -> int:
    query = projections[1:]
    return _forward_flops(query, query if projections[0] == 3 else None, query, rel_height, rel_width, kernel_size)


def _backward_separate(
    grad_output, output, statistics, unpooled, query, key, value, rel_height, rel_width, kernel_size, border, backend
) -> list[Tensor]:
    inputs = Inputs(query, key, value, rel_height, rel_width)
    grads = (torch.empty_like(query), None if key is None else torch.empty_like(key), torch.empty_like(value))
    kept = (output, statistics, unpooled)
    grad_rel = _backward_into(grads, grad_output, *kept, inputs, kernel_size, border, 1, backend)
    return [grad for grad in (*grads, *grad_rel) if grad is not None]


def _backward_qkv(
    grad_output, output, statistics, unpooled, projections, rel_height, rel_width, *options
) -> list[Tensor]:
    inputs, grad = Inputs(*split_projections(projections), rel_height, rel_width), torch.empty_like(projections)
    return [grad, *_backward_into(split_projections(grad), grad_output, output, statistics, unpooled, inputs, *options)]


# The second and third outputs of both ops are those of `empty_kept`.
_define = functools.partial(
    define_operator,
    outputs="(Tensor, Tensor, Tensor)",
    kept=(0, 1, 2),
    # Only the Triton kernels need the output. Others allow it to be changed in place.
    keeps_output=lambda output, *options: output.device.type != "cpu" or options[-1] == "triton",
    backward_inputs="Tensor grad_output, Tensor? output, Tensor statistics, Tensor unpooled",
    alternative="sasa_train.attention.plain.local_attention_forward, in float32 or float64",
)

_local_attention = _define(
    "local_attention",
    "Tensor query, Tensor? key, Tensor value, Tensor? rel_height, Tensor? rel_width",
    "SymInt kernel_size, str border, str backend",
    forward=lambda query, key, value, rel_height, rel_width, kernel_size, border, backend: _forward(
        Inputs(query, key, value, rel_height, rel_width), kernel_size, border, 1, backend
    ),
    fake=lambda query, key, value, *options: (torch.empty_like(value), *empty_kept(value, 1, options[-1])),
    backward=_backward_separate,
    flops=_forward_flops,
)

_local_attention_qkv = _define(
    "local_attention_qkv",
    "Tensor projections, Tensor? rel_height, Tensor? rel_width",
    "SymInt kernel_size, str border, SymInt stride, str backend",
    forward=lambda projections, rel_height, rel_width, *options: _forward(
        Inputs(*split_projections(projections), rel_height, rel_width), *options
    ),
    fake=lambda projections, rel_height, rel_width, kernel_size, border, stride, backend: (
        cpu.empty_output(projections[-1], stride),
        *empty_kept(projections[-1], stride, backend),
    ),
    backward=_backward_qkv,
    flops=_forward_flops_qkv,
)


def plain_decompositions() -> dict[Any, Callable]:
    """Return decompositions for `ExportedProgram.run_decompositions` that let a program run without sasa_train."""
    from sasa_train.attention import plain

    def local_attention_qkv(projections, rel_height, rel_width, kernel_size, border, stride, backend):
        inputs = (*split_projections(projections), rel_height, rel_width)
        output = plain.local_attention_forward(*inputs, kernel_size, border)
        output = reference.pool(output) if stride == 2 else output
        return output, *empty_kept(projections[-1], stride, backend)

    return {torch.ops.sasa_train.local_attention_qkv.default: local_attention_qkv}


def describe_backend(backend: str, query: Tensor, kernel_size: int) -> str:
    """Name what `backend` runs on tensors like `query`, and what compiled it or why no compiled kernel runs."""
    name, module, reason = _choose(backend, query, kernel_size)
    if reason is not None:
        # The rest of the reason may quote a temporary file, which would look different each time.
        return f"reference, because {reason.partition(': ')[0]}"
    return cpu.describe_build("local_attention", kernel_size) if module is cpu else name


def _resolve(backend: str, query: Tensor, kernel_size: int) -> ModuleType:
    """Return the module of the backend to run. This is called inside the op, where tensors are never fake."""
    name, module, reason = _choose(backend, query, kernel_size)
    if backend == "auto":
        _say_once(name, reason)
    elif reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return module


def _choose(backend: str, query: Tensor, kernel_size: int) -> tuple[str, ModuleType, str | None]:
    """Return the name of the backend to use, and its module; or the reference and the reason why it cannot run."""
    if backend == "reference":
        return backend, reference, None
    name = backend if backend != "auto" else "triton" if query.is_cuda else "cpu"
    module = _module(name)
    if isinstance(module, str):
        return name, reference, module
    reason = module.unavailable(query, kernel_size)
    return name, module if reason is None else reference, reason


def _module(name: str) -> ModuleType | str:
    """Return the module of a compiled backend, or the reason why the backend is unavailable."""
    if name == "cpu":
        return cpu
    # Importing Triton takes a second, so it is imported only when it is needed.
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from sasa_train.attention import triton_kernels

    return triton_kernels


@functools.cache
def _say_once(name: str, reason: str | None) -> None:
    if reason is None:
        log.info(f"local_attention: backend=auto runs the {'Triton kernels' if name == 'triton' else 'CPU kernel'}")
    else:
        log.warning(
            "local_attention: backend=auto runs the reference, many times slower than a compiled kernel, "
            f"because {reason}"
        )


def _check(query, key, value, rel_height, rel_width, kernel_size, content, border, backend) -> None:
    check_options(kernel_size, content, border, backend)
    _check_tensor("query", query)
    if query.dim() != 5:
        raise ValueError(f"query must be [B, N, H, W, D]; got {_shape(query)}")
    if content and key is None:
        raise ValueError("key=None goes with content=False alone; pass a key or content=False")
    if (rel_height is None) != (rel_width is None):
        raise ValueError("rel_height and rel_width go together; pass both or neither")
    if not content and rel_height is None:
        raise ValueError("content=False without rel_height and rel_width leaves no score; pass the embeddings")
    optional = {"key": key, "rel_height": rel_height, "rel_width": rel_width}
    given = {"value": value, **{name: tensor for name, tensor in optional.items() if tensor is not None}}
    for name, tensor in given.items():
        _check_tensor(name, tensor)
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device, {query.device}; it is on {tensor.device}")
    for name in given.keys() & {"key", "value"}:
        tensor = given[name]
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must match query's shape and dtype, {_shape(query)} {query.dtype}; "
                f"got {_shape(tensor)} {tensor.dtype}"
            )
    num_heads, head_dim = query.shape[1], query.shape[4]
    if rel_height is not None and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even with relative embeddings: half for rows, half for columns")
    for name, rel in (("rel_height", rel_height), ("rel_width", rel_width)):
        expected = (kernel_size, head_dim // 2)
        if rel is not None and tuple(rel.shape) not in (expected, (num_heads, *expected)):
            raise ValueError(f"{name} must be {list(expected)} or {[num_heads, *expected]}; got {_shape(rel)}")


def check_options(kernel_size: int, content: bool, border: str, backend: str) -> None:
    """Raise ValueError if one of these arguments of `local_attention` is invalid."""
    check_whole("kernel_size", kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd, so that the window has a centre")
    if not isinstance(content, bool):
        raise ValueError(f"content={content!r} must be True or False")
    if border not in BORDERS:
        raise ValueError(f"border={border!r} must be one of {', '.join(BORDERS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")


def check_stride(stride: int) -> None:
    """Raise ValueError if `stride` is not 1 or 2."""
    check_whole("stride", stride)
    if stride > 2:
        raise ValueError(f"stride={stride} must be 1 or 2")


def check_whole(name: str, value: int) -> None:
    """Raise ValueError if an argument is not a whole number of at least 1."""
    # A program that is being compiled may see its integers as torch.SymInt.
    if not isinstance(value, Integral | torch.SymInt) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.layout != torch.strided or not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be a dense tensor with a floating dtype; got {tensor.dtype}, {tensor.layout}")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
