"""`local_attention` and its variant for layers. Both check their arguments and call an op that selects a backend.

The backends are `reference` (plain PyTorch, all devices and dtypes), `cpu` (compiled) and `triton` (NVIDIA GPUs). The
last two support float32 and half precision. `auto` selects `triton` for tensors on a GPU and `cpu` for those on a CPU,
and falls back to `reference` if that backend cannot run, and on other devices, such as Apple's. `attention_weights`
always uses the reference, because the other backends never materialise the weights.
"""

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sasa_train.attention import cpu, reference
from sasa_train.attention.dilation import Remainder, by_remainder, remainders
from sasa_train.attention.operators import define_operator
from sasa_train.attention.reference import BORDERS, Grads, Inputs, Window

BACKENDS = ("auto", "reference", "cpu", "triton")

Pair = int | Sequence[int]  # one number for rows and columns, or one for each

log = logging.getLogger(__name__)


def local_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: Pair,
    content: bool = True,
    border: str = "mask",
    dilation: Pair = 1,
    scale: float = 1.0,
    null_key: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attend from each position to the K x K window around it (arXiv 1906.05909, Eq. 3; no scaling of the scores).

    The definition, with every convention, is in `sasa_train/attention/reference.py`.

    Args:
        query, key: [B, N, H, W, D] (batch, heads, height, width, head_dim), one floating dtype, any strides. `key` may
            be None when `content=False`.
        value: [B, N, H, W, Dv], with query's dtype; Dv need not be D.
        rel_height, rel_width: relative embeddings [K, D/2], shared by the heads, or [N, K, D/2]; give both or neither.
            With `border="shift"` they have 2K - 1 rows instead of K. They may be float32 even if q, k and v are in half
            precision; `triton` rounds them to that for windows up to 7 x 7 and heads of 8, 16, 32 or 64 channels.
        kernel_size: the window size K, an odd number, or a pair (rows, columns) of them.
        content: whether the scores include q.k.
        border: "mask" (exclude positions outside the image), "zero" (include them with zero keys and values) or "shift"
            (move the window inwards, so that it is inside the image).
        dilation: the distance between neighbouring keys of a window, at least 1, or a pair (rows, columns).
        scale: a factor above 0 on the scores, relative terms included.
        null_key: whether each window has one more key, with score 0 and value 0, so that a head may attend to nothing.
        backend: "auto", "reference", "cpu" or "triton". A backend requested by name raises an error if it cannot run.

    Returns:
        [B, N, H, W, Dv], with the dtype and stride order of `value`; differentiable with respect to all five tensors.
        The result is deterministic.

    Raises:
        ValueError: an argument is invalid; the message states its name, its value and the rule that it violates.
        RuntimeError: the requested backend cannot run here.
    """
    inputs = Inputs(query, key, value, rel_height, rel_width)
    options = _check(inputs, kernel_size, content, border, dilation, scale, null_key, backend)
    key = key if content else None
    return _local_attention(query, key, value, rel_height, rel_width, *options)[0]


def attention_weights(
    query: Tensor,
    key: Tensor | None,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: Pair,
    content: bool = True,
    border: str = "mask",
    dilation: Pair = 1,
    scale: float = 1.0,
    null_key: bool = False,
) -> Tensor:
    """Compute the weights that `local_attention` assigns to each position's window, using the reference backend.

    The arguments are those of `local_attention`, except `value` and `backend`.

    Returns:
        [B, N, H, W, K*K] in row-major window order, float32 (float64 if `query` is float64), differentiable. The last
        dimension sums to 1, or to less with `null_key=True`; with `border="mask"`, positions outside the image have a
        weight of exactly 0.

    Raises:
        ValueError: an argument is invalid for `local_attention`.
    """
    inputs = Inputs(query, key, query, rel_height, rel_width)
    size, distance, *_ = _check(inputs, kernel_size, content, border, dilation, scale, null_key, "reference")
    window = _window(size, border, scale, null_key)
    return by_remainder(
        lambda q, k: reference.attention_weights(Inputs(q, k, q, rel_height, rel_width), window),
        distance,
        query,
        key if content else None,
    )


def local_attention_qkv(
    projections: Tensor,
    rel_height: Tensor | None = None,
    rel_width: Tensor | None = None,
    *,
    kernel_size: Pair,
    content: bool = True,
    border: str = "mask",
    dilation: Pair = 1,
    scale: float = 1.0,
    null_key: bool = False,
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
    inputs = Inputs(*split_projections(projections), rel_height, rel_width)
    *options, _ = _check(inputs, kernel_size, content, border, dilation, scale, null_key, backend)
    return _local_attention_qkv(projections, rel_height, rel_width, *options, stride, backend)[0]


def split_projections(projections: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return query, key (None if there are only two projections) and value."""
    return projections[0], projections[1] if projections.shape[0] == 3 else None, projections[-1]


def _unpack(kernel_size, dilation, border, scale, null_key, *rest) -> tuple[Window, tuple[int, int], int, str]:
    """Return window, dilation, stride and backend from the options of either op."""
    stride, backend = rest if len(rest) == 2 else (1, *rest)
    return _window(kernel_size, border, scale, null_key), pair(dilation), stride, backend


def _forward(inputs: Inputs, *options) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and what backward needs, see `empty_kept`."""
    window, dilation, stride, backend = _unpack(*options)
    value, module = inputs.value, _resolve(backend, inputs, window)
    output, kept = cpu.empty_output(value, stride), empty_kept(value, stride, backend)
    if output.numel() == 0:
        return output, *kept
    if module is reference:
        output.copy_(_reference_output(inputs, window, dilation, stride))
        return output, kept[0].zero_(), kept[1].zero_()
    run_forward(module, inputs, output, *kept, window, dilation, stride)
    return output, *kept


def run_forward(
    module: Any, inputs: Inputs, output: Tensor, statistics: Tensor, unpooled: Tensor,
    window: Window, dilation: tuple[int, int], stride: int,
) -> None:  # fmt: skip
    """Write the output of a compiled backend, and what it keeps for the backward pass."""
    if dilation == (1, 1):
        module.local_attention_forward(inputs, output, statistics, unpooled, window, stride)
        return
    full = output if stride == 1 else unpooled if unpooled.numel() else torch.empty_like(inputs.value)
    for one, parts, kept in _images(inputs, statistics, dilation):
        module.local_attention_forward(parts, one.of(full), kept, unpooled, window, 1)
    if stride == 2:
        output.copy_(reference.pool(full))


def _reference_output(inputs: Inputs, window: Window, dilation: tuple[int, int], stride: int) -> Tensor:
    rel = inputs[3:]
    output = by_remainder(
        lambda q, k, v: reference.local_attention_forward(Inputs(q, k, v, *rel), window), dilation, *inputs[:3]
    )
    return reference.pool(output) if stride == 2 else output


def _composition(inputs: Inputs, *options) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `_forward` does in operations that PyTorch can differentiate in every way; nothing is kept."""
    window, dilation, stride, _ = _unpack(*options)
    nothing = inputs.value.new_empty(0)
    if inputs.value.numel() == 0:
        return inputs.value[:, :, ::stride, ::stride].clone(), nothing, nothing
    return _reference_output(inputs, window, dilation, stride), nothing, nothing


def _images(
    inputs: Inputs, statistics: Tensor, dilation: tuple[int, int]
) -> Iterator[tuple[Remainder, Inputs, Tensor]]:
    """Yield the images of a dilated window, with their inputs and their part of the statistics, flat."""
    # Embeddings are float32, because their gradients are summed over the images.
    rel = [x if x is None or x.dtype == torch.float64 else x.float() for x in inputs[3:]]
    height, width = inputs.query.shape[2:4]
    num_per_position, first = statistics.numel() // (height * width), 0
    for one in remainders(dilation, height, width):
        key = None if inputs.key is None else one.of(inputs.key)
        parts = Inputs(one.of(inputs.query), key, one.of(inputs.value), *rel)
        rows, columns = parts.query.shape[2:4]
        end = first + rows * columns * num_per_position
        yield one, parts, statistics.flatten()[first:end]
        first = end


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
    grads: Grads, grad_output: Tensor, output, statistics: Tensor, unpooled: Tensor, inputs: Inputs, *options
) -> list[Tensor]:
    """Write the gradients of query, key and value to `grads`; return those of the embeddings, if present."""
    if grad_output.numel() == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return [torch.zeros_like(rel) for rel in inputs[3:] if rel is not None]
    window, dilation, stride, backend = _unpack(*options)
    module = _resolve(backend, inputs, window)
    full = output if stride == 1 else unpooled
    grad_rel = run_backward(module, grad_output, full, statistics, inputs, window, dilation, stride, grads)
    # These are new tensors with the strides that the fake implementation promises.
    pairs = zip(inputs[3:], grad_rel, strict=True)
    return [torch.empty_like(rel).copy_(grad) for rel, grad in pairs if rel is not None and grad is not None]


def run_backward(
    module: Any, grad_output: Tensor, output: Tensor | None, statistics: Tensor, inputs: Inputs,
    window: Window, dilation: tuple[int, int], stride: int, grads: Grads,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Write a backend's gradients of query, key and value to `grads`; return those of rel_height and rel_width.

    `output` is that of the forward pass before pooling, for the backends that keep it.
    """
    if dilation == (1, 1) and module is not reference:
        return module.local_attention_backward(grad_output, output, statistics, inputs, window, stride, grads)
    if stride == 2:
        grad_output = reference.spread(grad_output, *inputs.query.shape[2:4])
    sums: tuple[Tensor | None, Tensor | None] = None, None
    for one, parts, kept in _images(inputs, statistics, dilation):
        into = tuple(x if x is None else one.of(x) for x in grads)
        if module is reference:
            *exact, grad_height, grad_width = reference.local_attention_backward(one.of(grad_output), parts, window)
            for grad, x in zip(into, exact, strict=True):
                if grad is not None and x is not None:
                    grad.copy_(x)
        else:
            full = output if output is None or output.numel() == 0 else one.of(output)
            options = (window, 1, into)
            grad_height, grad_width = module.local_attention_backward(one.of(grad_output), full, kept, parts, *options)
        sums = _plus(sums[0], grad_height), _plus(sums[1], grad_width)
    return sums


def _plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None or y is None else x + y


def _forward_flops(query, key, value, rel_height, rel_width, kernel_size, *_, **__) -> int:
    """Count 2*K*K*D FLOPs per head and position for each product (q.k, q.r, weights times v), assuming full windows."""
    batch, num_heads, height, width, head_dim = query
    channels = ((key is not None) + (rel_height is not None)) * head_dim + value[-1]
    return 2 * math.prod(kernel_size) * channels * batch * num_heads * height * width


def _forward_flops_qkv(projections, rel_height, rel_width, kernel_size, *_, **__) -> int:
    query = projections[1:]
    return _forward_flops(query, query if projections[0] == 3 else None, query, rel_height, rel_width, kernel_size)


def _backward_separate(
    grad_output, output, statistics, unpooled, query, key, value, rel_height, rel_width, *options
) -> list[Tensor]:
    inputs = Inputs(query, key, value, rel_height, rel_width)
    grads = (torch.empty_like(query), None if key is None else torch.empty_like(key), torch.empty_like(value))
    grad_rel = _backward_into(grads, grad_output, output, statistics, unpooled, inputs, *options)
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
)

_WINDOW = "SymInt[2] kernel_size, SymInt[2] dilation, str border, float scale, bool null_key"

_local_attention = _define(
    "local_attention",
    "Tensor query, Tensor? key, Tensor value, Tensor? rel_height, Tensor? rel_width",
    f"{_WINDOW}, str backend",
    forward=lambda query, key, value, rel_height, rel_width, *options: _forward(
        Inputs(query, key, value, rel_height, rel_width), *options
    ),
    fake=lambda query, key, value, *options: (torch.empty_like(value), *empty_kept(value, 1, options[-1])),
    backward=_backward_separate,
    composition=lambda query, key, value, rel_height, rel_width, *options: _composition(
        Inputs(query, key, value, rel_height, rel_width), *options
    ),
    batch_dims=(0, 0, 0, None, None),
    flops=_forward_flops,
)

_local_attention_qkv = _define(
    "local_attention_qkv",
    "Tensor projections, Tensor? rel_height, Tensor? rel_width",
    f"{_WINDOW}, SymInt stride, str backend",
    forward=lambda projections, rel_height, rel_width, *options: _forward(
        Inputs(*split_projections(projections), rel_height, rel_width), *options
    ),
    fake=lambda projections, rel_height, rel_width, kernel_size, dilation, border, scale, null_key, stride, backend: (
        cpu.empty_output(projections[-1], stride),
        *empty_kept(projections[-1], stride, backend),
    ),
    backward=_backward_qkv,
    composition=lambda projections, rel_height, rel_width, *options: _composition(
        Inputs(*split_projections(projections), rel_height, rel_width), *options
    ),
    batch_dims=(1, None, None),
    flops=_forward_flops_qkv,
)


def plain_decompositions() -> dict[Any, Callable]:
    """Return decompositions for `ExportedProgram.run_decompositions` that let a program run without sasa_train."""
    from sasa_train.attention import plain

    def local_attention_qkv(
        projections, rel_height, rel_width, kernel_size, dilation, border, scale, null_key, stride, backend
    ):
        window = _window(kernel_size, border, scale, null_key)
        output = by_remainder(
            lambda q, k, v: plain.local_attention_forward(Inputs(q, k, v, rel_height, rel_width), window),
            pair(dilation),
            *split_projections(projections),
        )
        output = reference.pool(output) if stride == 2 else output
        return output, *empty_kept(projections[-1], stride, backend)

    return {torch.ops.sasa_train.local_attention_qkv.default: local_attention_qkv}


def describe_backend(backend: str, inputs: Inputs, window: Window) -> str:
    """Name what `backend` runs on tensors like `inputs`, and what compiled it or why no compiled kernel runs."""
    name, module, reason = _choose(backend, inputs, window)
    if reason is not None:
        # The rest of the reason may quote a temporary file, which would look different each time.
        return f"reference, because {reason.partition(': ')[0]}"
    return cpu.describe_build(*cpu.library_for(inputs, window)) if module is cpu else name


def _resolve(backend: str, inputs: Inputs, window: Window) -> ModuleType:
    """Return the module of the backend to run. This is called inside the op, where tensors are never fake."""
    name, module, reason = _choose(backend, inputs, window)
    if backend == "auto":
        _say_once(name, reason)
    elif reason is not None:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    return module


def _choose(backend: str, inputs: Inputs, window: Window) -> tuple[str, ModuleType, str | None]:
    """Return the name of the backend to use, and its module; or the reference and the reason why it cannot run."""
    if backend == "reference":
        return backend, reference, None
    device = inputs.query.device.type
    name = backend if backend != "auto" else "triton" if device == "cuda" else "cpu"
    if backend == "auto" and device not in ("cpu", "cuda"):  # Apple's MPS, for example
        return name, reference, f"there is no compiled kernel for {device}"
    module = _module(name)
    if isinstance(module, str):
        return name, reference, module
    reason = module.unavailable(inputs, window)
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


def _check(inputs: Inputs, kernel_size, content, border, dilation, scale, null_key, backend) -> tuple:
    """Check the arguments of `local_attention`; return the options of the op."""
    query, key, value, rel_height, rel_width = inputs
    check_options(kernel_size, content, border, backend, dilation, scale, null_key)
    kernel_size, dilation = pair(kernel_size), pair(dilation)
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
        size = 5 if name == "key" else 4  # a value may have another number of channels
        if tensor.dim() != 5 or tensor.shape[:size] != query.shape[:size] or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name} must match query's shape{', apart from head_dim,' * (size == 4)} and dtype, {_shape(query)} "
                f"{query.dtype}; got {_shape(tensor)} {tensor.dtype}"
            )
    num_heads, height, width, head_dim = query.shape[1:]
    if rel_height is not None and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even with relative embeddings: half for rows, half for columns")
    table_rows = _window(kernel_size, border).table_rows()
    for name, rel, rows in (("rel_height", rel_height, table_rows[0]), ("rel_width", rel_width, table_rows[1])):
        expected = (rows, head_dim // 2)
        if rel is not None and tuple(rel.shape) not in (expected, (num_heads, *expected)):
            reason = " with border='shift', whose keys are up to K - 1 positions away" if border == "shift" else ""
            raise ValueError(f"{name} must be {list(expected)} or {[num_heads, *expected]}{reason}; got {_shape(rel)}")
    for name, size, keys, distance in zip(("rows", "columns"), (height, width), kernel_size, dilation, strict=True):
        if border == "shift" and size < keys * distance:
            raise ValueError(
                f"border='shift' needs windows that fit: kernel_size={keys} and dilation={distance} span "
                f"{keys * distance} {name}; query has {size}"
            )
    return kernel_size, dilation, border, float(scale), null_key, backend


def _window(kernel_size: Pair, border: str, scale: float = 1.0, null_key: bool = False) -> Window:
    rows, columns = pair(kernel_size)
    return Window(rows, columns, border, scale, null_key)


def pair(value: Pair) -> tuple[int, int]:
    """Return `kernel_size` or `dilation` as a number for rows and one for columns."""
    return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)


def check_options(
    kernel_size: Pair, content: bool, border: str, backend: str, dilation: Pair = 1, scale: float = 1.0,
    null_key: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError if one of these arguments of `local_attention` is invalid."""
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        if isinstance(value, Sequence) and (isinstance(value, str) or len(value) != 2):
            raise ValueError(f"{name}={value!r} must be a whole number, or a pair of them (rows, columns)")
        for one in pair(value):
            check_whole(name, one)
            if name == "kernel_size" and one % 2 == 0:
                raise ValueError(f"kernel_size={value} must be odd, so that the window has a centre")
    for name, is_set in (("content", content), ("null_key", null_key)):
        if not isinstance(is_set, bool):
            raise ValueError(f"{name}={is_set!r} must be True or False")
    if border not in BORDERS:
        raise ValueError(f"border={border!r} must be one of {', '.join(BORDERS)}")
    is_number = isinstance(scale, Real) and not isinstance(scale, bool)
    if not is_number or not 0 < scale < math.inf:
        raise ValueError(f"scale={scale!r} must be a finite number above 0")
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
