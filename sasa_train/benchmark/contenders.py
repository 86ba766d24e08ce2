"""The contenders of `sasa-benchmark attention`, the shapes they run on, and the check that each must pass.

Attention contenders take a single channels_last projection, as the layer produces it, and compute the gradients of all
five tensors. A contender is timed only after its output and gradients agree with the float64 reference.
"""

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sasa_train.attention import local_attention_qkv
from sasa_train.benchmark.timing import extra_memory
from sasa_train.device import check_compiled_code
from sasa_train.refusal import ConfigError

YARDSTICK = "conv"
OWN_BACKENDS = ("cpu", "triton", "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Maximum error, relative to the size of the result, that passes the check. Scores reach 40, so their rounding error,
# and therefore the relative error of the weights, is 40 x 2^-24 in float32 and 40 x 2^-22 if three TF32 products
# replace one float32 product. In half precision, weights and their gradients are rounded to 8 or 11 bits before they
# are summed, and results are rounded again. A wrong sign, border or embedding causes an error as large as the result.
TOLERANCE = {"fp32": 1e-4, "bf16": 2**-5, "fp16": 2**-8}  # half precision: four units of rounding for weights and dS
FLEX_MIN_HEAD_DIM = 16

# heads [3, B, N, H, W, D], rel_height, rel_width -> [B, N, H, W, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer's shape; at the start of a stage, a 2x2 pool follows attention and the convolution has stride 2."""

    height: int
    width: int
    channels: int
    begins_stage: bool
    batch_size: int
    num_heads: int
    kernel_size: int
    dtype: str
    device: str

    @property
    def label(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}" + ("/2" if self.begins_stage else "")

    @property
    def stride(self) -> int:
        return 2 if self.begins_stage else 1

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """The output shape [B, C, H, W]; with a stride of 2, height and width are halved and rounded up."""
        return self.batch_size, self.channels, -(-self.height // self.stride), -(-self.width // self.stride)


@dataclass
class Contender:
    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    grad_output: Tensor

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.forward()

    def train(self) -> tuple[Tensor, ...]:
        """Run the forward and backward passes and return the gradients of the leaf tensors."""
        return torch.autograd.grad(self.forward(), self.leaves, self.grad_output)


def build_contender(backend: str, case: Case, arithmetic: torch.dtype | None = None) -> Contender:
    """Build `backend` with the shared random inputs, which are rounded to the case's dtype and cast to `arithmetic`."""
    dtype, generator = DTYPES[case.dtype], torch.Generator(case.device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=case.device).to(dtype).to(arithmetic or dtype)
        return (tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor).requires_grad_()

    batch, channels, size = case.batch_size, case.channels, (case.height, case.width)
    if backend == YARDSTICK:
        x, weight = draw(batch, channels, *size), draw(channels, channels, 3, 3)
        leaves = [x, weight]

        def forward() -> Tensor:
            return F.conv2d(x, weight, stride=case.stride, padding=1)
    else:
        fused = draw(batch, 3 * channels, *size)
        rel = [draw(case.kernel_size, channels // case.num_heads // 2, dtype=torch.float32) for _ in range(2)]
        leaves = [fused] if backend == "natten" else [fused, *rel]
        attend = _attend(backend, case)

        def forward() -> Tensor:
            heads = fused.unflatten(1, (3, case.num_heads, -1)).permute(1, 0, 2, 4, 5, 3)
            out = attend(heads, rel[0], rel[1]).permute(0, 1, 4, 2, 3).flatten(1, 2)  # [B, C, H, W]
            return F.avg_pool2d(out, 2, ceil_mode=True) if out.shape != case.output_shape else out  # flex, natten

    generator.manual_seed(1)
    return Contender(forward, leaves, draw(*case.output_shape).detach())


def _attend(backend: str, case: Case) -> Attend:
    if backend == "flex":
        return _flex(case)
    if backend == "natten":
        return _natten(case)
    return lambda heads, rel_height, rel_width: local_attention_qkv(
        heads, rel_height, rel_width, kernel_size=case.kernel_size, stride=case.stride, backend=backend
    )


def _flex(case: Case) -> Attend:
    """Build FlexAttention with q.rel in its score_mod and the window as its block mask; it is compiled on CUDA.

    q.rel is computed in float32 because scores rounded to half precision would fail the check. Head dimensions
    that are too small for the kernels are padded with zeros.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    height, width, reach = case.height, case.width, case.kernel_size // 2

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = key // width - query // width, key % width - query % width
        return (rows.abs() <= reach) & (columns.abs() <= reach)

    block_mask = create_block_mask(mask_mod, None, None, height * width, height * width, device=case.device)

    def attend(heads: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
        query, key, value = heads.flatten(3, 4)  # each [B, N, H*W, D]
        head_dim = query.shape[-1]
        top, bottom = query.to(rel_height.dtype).chunk(2, dim=-1)
        by_row, by_column = top @ rel_height.T, bottom @ rel_width.T  # [B, N, H*W, K]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # The kernel also evaluates pairs that the mask excludes; clamping keeps their indices valid.
            row = (k // width - q // width + reach).clamp(0, 2 * reach)
            column = (k % width - q % width + reach).clamp(0, 2 * reach)
            return score + by_row[b, h, q, row] + by_column[b, h, q, column]

        if head_dim < FLEX_MIN_HEAD_DIM:
            query, key, value = (F.pad(x, (0, FLEX_MIN_HEAD_DIM - head_dim)) for x in (query, key, value))
        out = flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=1.0)
        assert isinstance(out, Tensor)
        return out[..., :head_dim].unflatten(2, (height, width))

    if case.device == "cpu":
        return attend
    torch._dynamo.config.recompile_limit = 1000  # one compilation per shape; past the limit it runs unfused
    check_compiled_code()
    return torch.compile(attend, dynamic=False)


def _natten(case: Case) -> Attend:
    """Build NATTEN, which has no relative terms and shifts windows inwards at the border instead of clipping them."""
    from natten import na2d

    def attend(heads: Tensor, rel_height: Tensor, rel_width: Tensor) -> Tensor:
        query, key, value = heads.permute(0, 1, 3, 4, 2, 5)  # each [B, H, W, N, D]
        return na2d(query, key, value, kernel_size=case.kernel_size, scale=1.0).permute(0, 3, 1, 2, 4)

    return attend


def missing(backend: str, device: torch.device) -> str | None:
    """Return the reason why a backend cannot run on this machine, or None if it can (perhaps not for all shapes)."""
    if backend in ("natten", "triton") and importlib.util.find_spec(backend) is None:
        return f"{backend} is not installed"
    if backend == "triton" and device.type == "cpu":
        from sasa_train.attention import triton_kernels

        return None if triton_kernels.INTERPRETED else "it needs --device cuda (or TRITON_INTERPRET=1, to test)"
    if backend == "cpu" and device.type == "cuda":
        return "it needs --device cpu"
    if backend == "flex" and device.type == "cpu":
        try:
            with warnings.catch_warnings(action="ignore"):  # FlexAttention warns that it runs unfused here
                build_contender("flex", Case(4, 4, 32, False, 1, 2, 3, "fp32", "cpu")).train()
        except NotImplementedError as error:
            return str(error)
    return None


def check(backend: str, case: Case) -> str | None:
    """Compare a backend with the float64 reference; return None if they agree, otherwise a description of the problem.

    On the CPU, two images are checked. On CUDA, the whole batch is checked, because the number of images decides how
    Triton's programs divide the work.

    NATTEN computes a different function, so only its output away from the border is compared, without relative terms.

    Raises:
        RuntimeError, NotImplementedError, ValueError: the backend does not support this case.
    """
    if case.device == "cpu":
        case = dataclasses.replace(case, batch_size=min(2, case.batch_size))
    contender = build_contender(backend, case)
    if backend == "natten":
        return _check_inside(contender, case)
    exact = build_contender("reference", case, torch.float64)
    num_positions = case.batch_size * case.num_heads * case.height * case.width
    names = ("output", "query", "key", "value", "rel_height", "rel_width")
    for name, ours, theirs in zip(names, _results(contender), _results(exact), strict=True):
        # an embedding's gradient adds terms of size 1 and may itself be 0
        size = max(1.0, float(theirs.abs().max()), num_positions**0.5 if "rel" in name else 0.0)
        if problem := _error(name, ours, theirs, size, case):
            return problem
    return None


def _results(contender: Contender) -> list[Tensor]:
    """Return the output and the gradients of query, key, value, rel_height and rel_width."""
    of_fused, *of_rel = contender.train()
    return [contender.infer(), *of_fused.chunk(3, dim=1), *of_rel]


def _check_inside(contender: Contender, case: Case) -> str | None:
    reach = case.kernel_size // 2
    if min(case.height, case.width) < case.kernel_size:
        raise ValueError("its window does not fit into the map")
    if case.begins_stage:
        return None  # pooling mixes positions; the same kernel is compared on the other shapes
    heads = contender.leaves[0].detach().double().unflatten(1, (3, case.num_heads, -1)).permute(1, 0, 2, 4, 5, 3)
    exact = local_attention_qkv(heads, kernel_size=case.kernel_size, backend="reference")
    exact = exact.permute(0, 1, 4, 2, 3).flatten(1, 2)
    inside = (..., slice(reach, case.height - reach), slice(reach, case.width - reach))
    theirs = exact[inside]
    return _error("output", contender.infer()[inside], theirs, max(1.0, float(theirs.abs().max())), case)


def _error(name: str, ours: Tensor, theirs: Tensor, size: float, case: Case) -> str | None:
    error = float((ours.detach().double() - theirs).abs().max()) / size
    if error <= TOLERANCE[case.dtype]:  # false for NaN
        return None
    of = name if name == "output" else f"the gradient of {name}"
    return f"{of} differs from the reference by {error:.1e} of its size; {TOLERANCE[case.dtype]:.1e} is allowed"


def admitted(backends: Sequence[str], by_name: bool, result: dict[str, Any], case: Case) -> dict[str, Contender]:
    """Return the contenders that support this case and pass the check; `result` records why the others are excluded."""
    contenders = {}
    for backend in backends:
        try:
            problem = None if backend == YARDSTICK else check(backend, case)
            if problem:
                result["failed"] = True
                result["notes"].append(f"{backend} at {case.label} is wrong and was not timed: {problem}")
                continue
            contenders[backend] = build_contender(backend, case)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if by_name and backend in OWN_BACKENDS:
                raise ConfigError(f"--backends {backend}: {error}") from error
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            result["left_out"].setdefault(f"{backend}: {reason}", []).append(case.label)
    return contenders


def new_result(kind: str, notes: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": kind, "rows": [], "summary": [], "notes": [*notes], "left_out": {}, "failed": False}


def op_memory(backend: str, case: Case, num_threads: int) -> int:
    small = dataclasses.replace(case, height=case.kernel_size, width=case.kernel_size, batch_size=1)
    return first_pass_memory(lambda case: build_contender(backend, case), small, case, num_threads)


def first_pass_memory(build: Callable[[Case], Contender], small: Case, case: Case, num_threads: int) -> int:
    """Return the peak extra memory of a forward and backward pass, which must be this process's largest so far."""
    torch.set_num_threads(num_threads)
    build(small).train()  # loads libraries, so that their memory is not counted
    return extra_memory(build(case).train, torch.device(case.device))
