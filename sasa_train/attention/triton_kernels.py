"""The Triton backend: launches the kernels of triton_fold.py or, for larger windows and other heads, of triton_walk.py.

reference.py contains the definition. Fixed rules choose the launch configuration; `scripts/kernel_counts.py` counts the
instructions that result. No configurations are timed at run time, so results do not vary from run to run.
"""

import functools
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sasa_train.attention import triton_fold, triton_walk
from sasa_train.attention.reference import Grads, Inputs, Window, pool, spread, table_gradient

MAX_KERNEL_SIZE = 15  # triton_walk.py pads the tables' rows to 16
MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads this when it decorates the kernels
FOLD_KERNEL_SIZE = 7
HALF = (torch.bfloat16, torch.float16)
# Head sizes by dtype for which the fold's values fit in a thread's registers; the walk serves all others.
FOLD_FORWARD: Mapping[torch.dtype, tuple[int, ...]] = dict.fromkeys(HALF, (8, 16, 32, 64)) | {torch.float32: ()}
FOLD_BACKWARD: Mapping[torch.dtype, tuple[int, ...]] = dict.fromkeys(HALF, (8, 16, 32, 64)) | {torch.float32: (8, 16)}
FOLD_PROGRAMS = 4096  # enough to fill the largest GPUs several times; beyond it, a program computes several heads
WALK_POSITIONS = 16  # of a tile
WINDOW_COLUMNS = 16  # padded number of columns that a tile reads; for 16 positions, 32 columns mean more work for any K

Images = tuple[Tensor | None, ...]  # [B, N, H, W, D] each, or None if absent

# Triton 3.6 leaves the constants of a called function out of a kernel's key in its cache on disk unless that function
# has its own key by then. So the keys are computed here, in the order of definition, callees first. Otherwise the order
# in which threads compile kernels would decide them, and the next process would compile the kernels again.
for _function in (*vars(triton_fold).values(), *vars(triton_walk).values()):
    getattr(_function, "cache_key", None)


def unavailable(inputs: Inputs, window: Window) -> str | None:
    """Return the reason why the kernels cannot run on these tensors, or None if they can."""
    return unsupported(inputs, window) or unavailable_on(inputs.query.device)


def unsupported(inputs: Inputs, window: Window) -> str | None:
    """Return the reason why there are no kernels for these sizes, or None."""
    query, kernel_size = inputs.query, max(window.rows, window.columns)
    if query.dtype not in DTYPES:
        return f"the tensors are {query.dtype}; the kernels compute in float32"
    if kernel_size > MAX_KERNEL_SIZE:
        return f"kernel_size={kernel_size} is above {MAX_KERNEL_SIZE}"
    head_dim, value_dim = query.shape[-1], inputs.value.shape[-1]
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is above {MAX_HEAD_DIM}"
    if window.rows != window.columns:
        return f"Triton's windows are square; kernel_size is ({window.rows}, {window.columns})"
    if window.border == "shift":
        return "border='shift' has no Triton kernel"
    is_exact = query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and math.frexp(window.scale)[0] == 0.5)
    if window.scale != 1 and not is_exact:
        return f"Triton would round queries of {query.dtype} times a scale; scale is {window.scale}"
    if head_dim != value_dim:
        return f"Triton's values have query's head_dim, {head_dim}; value has {value_dim}"
    return None


def _scaled(inputs: Inputs, window: Window) -> Inputs:
    """Return inputs whose scores have the scale, which all terms of the scores take from the query."""
    return inputs if window.scale == 1 else inputs._replace(query=inputs.query * window.scale)


def unavailable_on(device: torch.device) -> str | None:
    """Return the reason why the kernels cannot run on a device, or None."""
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type} (TRITON_INTERPRET=1 runs the kernels there, slowly, to test)"
    if torch.version.hip is not None:
        return "the kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


def local_attention_forward(
    inputs: Inputs, output: Tensor, logsumexp: Tensor, unpooled: Tensor, window: Window, stride: int
) -> None:
    """Write the output [B, N, ceil(H / stride), ceil(W / stride), D], and values for the backward pass.

    These are `logsumexp`, log2(sum(exp(score))) of each window, [B, N, H, W] in float32, and with a stride of 2
    `unpooled`, the output before it is averaged over 2 x 2 positions, [B, N, H, W, D].
    """
    inputs = _scaled(inputs, window)
    query, key, value, rel_height, rel_width = inputs
    kernel_size, border = window.rows, window.border
    full, pooled = (output, None) if stride == 1 else (unpooled, output)
    images = (query, key, value, full)
    if _folds(images, kernel_size, FOLD_FORWARD):
        launch = _Fold(inputs, kernel_size, {"ZERO_BORDER": border == "zero", "NULL_KEY": window.null_key})
        launch(triton_fold.forward_kernel, (*images, pooled), (logsumexp, launch.tables))
        return
    rel = (rel_height, rel_width)
    constants = {"NULL_KEY": window.null_key}
    _Walk(inputs, kernel_size, border)(triton_walk.forward_kernel, images, (logsumexp,), rel, constants)
    if pooled is not None:
        pooled.copy_(pool(full))


def local_attention_backward(
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    inputs: Inputs,
    window: Window,
    stride: int,
    grads: Grads,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of query, key and value to `grads`, and return those of rel_height and rel_width.

    `output` is that of the forward pass before pooling.
    """
    inputs, kernel_size, border = _scaled(inputs, window), window.rows, window.border
    is_folded = _folds((*inputs[:3], output, *grads), kernel_size, FOLD_BACKWARD)
    if is_folded and not _folds((grad_output,), kernel_size, FOLD_BACKWARD):
        grad_output = grad_output.contiguous()  # its strides are too large
    images = (grad_output, *inputs[:3])
    backward = _fold_backward if is_folded else _walk_backward
    partial_rel = backward(images, output, logsumexp, inputs, kernel_size, border, stride, grads)
    if window.scale != 1:
        grads[0].mul_(window.scale)
    if partial_rel is None or inputs.rel_height is None or inputs.rel_width is None:
        return None, None
    by_head = partial_rel.sum(0, dtype=torch.float64)  # [N or 1, 2, K, D/2]
    return table_gradient(by_head[:, 0], inputs.rel_height), table_gradient(by_head[:, 1], inputs.rel_width)


# ---- the fold


def _folds(images: Images, kernel_size: int, head_dims: Mapping[torch.dtype, tuple[int, ...]]) -> bool:
    """Return whether the kernels of triton_fold.py support these tensors."""
    present = [x for x in images if x is not None]
    dtype, head_dim = present[0].dtype, present[0].shape[-1]
    # Offsets within an image have 32 bits there, also those of the 8 numbers that are kept for each position of a head.
    extents = (sum(stride * size for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True)) for x in present)
    fits = max(extents) < 2**31 and present[0].shape[2] * present[0].shape[3] < 2**28
    return fits and kernel_size <= FOLD_KERNEL_SIZE and head_dim in head_dims[dtype]


def _fold_backward(
    images: Images, output: Tensor, logsumexp: Tensor, inputs: Inputs, kernel_size: int, border: str, stride: int,
    grads: Grads,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of the images; return the embeddings' as summands [programs, N or 1, 2, K, D/2]."""
    batch, num_heads, height, width, head_dim = inputs.query.shape
    grad_query, *other_grads = grads
    # More rows would not fit in a thread's registers.
    unroll = kernel_size + 1 if head_dim <= 16 and inputs.query.dtype in HALF else 1
    launch = _Fold(inputs, kernel_size, {"POOL": stride})
    is_per_head = launch.table_stride > 0
    by_key = logsumexp.new_empty(batch, num_heads, height, width, 8)
    partial_rel = None
    if launch.tables is not None:
        num_sums = launch.num_programs * (launch.heads_per_program if is_per_head else 1)
        partial_rel = logsumexp.new_empty(num_sums, 2, kernel_size, head_dim // 2)
        partial_rel = partial_rel.unflatten(0, (-1, num_heads if is_per_head else 1))
    # The order matters, because the second kernel reads what the first writes to by_key.
    constants = {"ZERO_BORDER": border == "zero", "PER_HEAD": is_per_head, "UNROLL": unroll}
    others = (logsumexp, by_key, launch.tables, partial_rel)
    launch(triton_fold.backward_queries_kernel, (*images, output, grad_query), others, constants)
    constants = {"UNROLL": 2 if head_dim <= 32 else 1}
    launch(triton_fold.backward_keys_kernel, (*images, *other_grads), (by_key, launch.tables), constants)
    return partial_rel


class _Fold:
    """Launches the kernels of triton_fold.py on one problem."""

    def __init__(self, inputs: Inputs, kernel_size: int, constants: dict[str, Any]):
        self.query = inputs.query
        batch, num_heads, height, width, head_dim = self.query.shape
        self.num_programs, self.heads_per_program = _fold_programs(batch, num_heads, height, width)
        self.tables, self.table_stride = _relative_tables(inputs)
        self.sizes = (self.table_stride, num_heads, height, width, self.heads_per_program)
        precision = "tf32x3" if self.query.dtype == torch.float32 else "tf32"
        self.constants = constants | {"K": kernel_size, "D": head_dim, "PRECISION": precision}

    def __call__(
        self, kernel: Any, images: Images, others: tuple[Tensor | None, ...], constants: dict[str, Any] | None = None
    ) -> None:
        align, strides = _strides(images)
        arguments = (*images, *others, *strides, *self.sizes)
        constants = {**self.constants, **(constants or {}), "ALIGN": align}
        _launch(Launch(kernel, arguments, constants, num_warps=1), self.num_programs, self.query)


@functools.cache
def _fold_programs(batch: int, num_heads: int, height: int, width: int) -> tuple[int, int]:
    """Return the number of programs and the number of heads that each computes."""
    num_tiles = batch * triton.cdiv(height, 2) * triton.cdiv(width, 8)
    divisors = [heads for heads in range(min(num_heads, 8), 0, -1) if num_heads % heads == 0]
    heads = next((x for x in divisors if num_tiles * num_heads // x >= FOLD_PROGRAMS), 1)
    return num_tiles * num_heads // heads, heads


def _relative_tables(inputs: Inputs) -> tuple[Tensor | None, int]:
    """Return the embeddings in the layout of triton_fold.py and the inputs' dtype, and the stride between heads.

    The stride is 0 if the heads share both embeddings.
    """
    query, _, _, rel_height, rel_width = inputs
    if rel_height is None or rel_width is None:
        return None, 0
    is_per_head = 3 in (rel_height.dim(), rel_width.dim())
    kernel_size, half = rel_height.shape[-2:]
    head_dim, channels = 2 * half, max(2 * half, 16)
    height, width = (
        rel.to(query.dtype).reshape(-1, kernel_size, half).expand(query.shape[1] if is_per_head else 1, -1, -1)
        for rel in (rel_height, rel_width)
    )
    upper = F.pad(height, (0, channels - half, 1, 8 - kernel_size))
    lower = F.pad(width, (half, channels - head_dim, 0, 8 - kernel_size))
    pairs = torch.cat([F.pad(height, (0, 0, 0, 1)), F.pad(height, (0, 0, 1, 0))], dim=-1)
    tables = torch.cat([x.flatten(1) for x in (upper, lower, pairs)], dim=1)
    return tables, tables.shape[1] if is_per_head else 0


# ---- the walk


def _walk_backward(
    images: Images, output: Tensor, logsumexp: Tensor, inputs: Inputs, kernel_size: int, border: str, stride: int,
    grads: Grads,
) -> Tensor | None:  # fmt: skip
    """Write the gradients of the images; return the embeddings' as summands [programs, N, 2, K, D/2]."""
    batch, num_heads, height, width, head_dim = inputs.query.shape
    grad_query, *other_grads = grads
    grad_output, *others = images
    if stride == 2 and grad_output is not None:
        grad_output = spread(grad_output, height, width)
    images = (grad_output, *others)
    launch = _Walk(inputs, kernel_size, border)
    delta = torch.empty_like(logsumexp)
    partial_rel = relative = None
    if inputs.rel_height is not None:
        relative = logsumexp.new_empty(batch, num_heads, height, width, 2 * kernel_size)
        partial_rel = logsumexp.new_empty(launch.num_programs, 2, kernel_size, head_dim // 2)
        partial_rel = partial_rel.unflatten(0, (-1, num_heads))
    # The order matters, because the second kernel reads what the first writes to delta and relative.
    results = (logsumexp, delta, relative, partial_rel)
    launch(triton_walk.backward_queries_kernel, (*images, output, grad_query), results, inputs[3:])
    launch(triton_walk.backward_keys_kernel, (*images, *other_grads), (logsumexp, delta, relative))
    return partial_rel


class _Walk:
    """Launches the kernels of triton_walk.py on one problem."""

    def __init__(self, inputs: Inputs, kernel_size: int, border: str):
        self.query = query = inputs.query
        batch, num_heads, height, width, head_dim = query.shape
        *tile, num_tiles = _tile(height, width, kernel_size, WALK_POSITIONS)
        self.num_programs = batch * num_tiles * num_heads
        self.sizes = (num_heads, height, width, *tile)
        # Precision: sums, the softmax and all intermediate values are float32. Products of half-precision inputs are
        # exact. For float32 and float16 inputs, a product with an intermediate value (weights, dS) is three TF32
        # products (`tf32x3`, 22 of float32's 24 bits). For bfloat16 it is one TF32 product, so a weight is rounded to
        # 11 bits in a sum that is itself rounded to 8.
        self.constants = {
            "K": kernel_size,
            "D": head_dim,
            "D_PADDED": max(16, triton.next_power_of_2(head_dim)),
            "P": WALK_POSITIONS,
            "W": WINDOW_COLUMNS,
            "ZERO_BORDER": border == "zero",
            "INPUTS": "tf32x3" if query.dtype == torch.float32 else "tf32",
            "COMPUTED": "tf32" if query.dtype == torch.bfloat16 else "tf32x3",
        }

    def __call__(
        self, kernel: Any, images: Images, others: tuple[Tensor | None, ...], rel: tuple[Tensor | None, ...] = (),
        constants: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        align, strides = _strides(images)
        rel_strides = (x if x is None else (0, *x.stride())[-3:] for x in rel)
        arguments = (*images, *others, *rel, *strides, *rel_strides, *self.sizes)
        constants = {**self.constants, **(constants or {}), "ALIGN": align}
        _launch(Launch(kernel, arguments, constants, _num_warps(kernel, self.query)), self.num_programs, self.query)


def _num_warps(kernel: Any, query: Tensor) -> int:
    """Return the number of warps per tile: the fewest whose registers hold the tile's values."""
    head_dim = query.shape[-1]
    if query.dtype == torch.float32 and kernel is triton_walk.backward_queries_kernel:
        return 1 if head_dim <= 16 else 2 if head_dim <= 32 else 8
    return 1 if head_dim <= 32 else 2 if head_dim <= 64 else 4


@functools.cache
def _tile(height: int, width: int, kernel_size: int, positions: int) -> tuple[int, int, int]:
    """Choose the tile size that reads the fewest key rows per map; return the height, width and number of tiles."""

    def cut(columns: int) -> tuple[int, int, int]:
        tiles_w = triton.cdiv(width, columns)
        tiles_h = triton.cdiv(height, min(positions // columns, height))
        return triton.cdiv(height, tiles_h), triton.cdiv(width, tiles_w), tiles_h * tiles_w

    widest = min(WINDOW_COLUMNS - kernel_size + 1, positions, width)
    return min(map(cut, range(widest, 0, -1)), key=lambda tile: tile[2] * (tile[0] + kernel_size - 1))


# ---- launching


class Launch(NamedTuple):
    """A kernel with the arguments and constants of its launch."""

    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        # Loops are not pipelined, because that needs more registers.
        return {**self.constants, "num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


def _strides(images: Images) -> tuple[int, list[tuple[int, ...] | None]]:
    """Return the vector length, in elements, that suits all images, and their strides as multiples of it."""
    present = [x for x in images if x is not None]
    align = math.gcd(16 // present[0].itemsize, *(s for x in present for s in x.stride()[:4]))
    return align, [None if x is None else (*(s // align for s in x.stride()[:4]), x.stride(4)) for x in images]


def _launch(launch: Launch, num_programs: int, query: Tensor) -> None:
    if _collected is not None:
        _collected.append(launch)
    elif num_programs:
        with torch.cuda.device_of(query):
            launch.kernel[(num_programs,)](*launch.arguments, **launch.options)


_collected: list[Launch] | None = None


@contextmanager
def collected_launches() -> Iterator[list[Launch]]:
    """Collect launches instead of running kernels; the tensors may be on device "meta"."""
    global _collected
    launches: list[Launch] = []
    _collected = launches
    try:
        yield launches
    finally:
        _collected = None
