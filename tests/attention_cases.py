"""Test cases for local attention, and comparison of a backend's outputs and gradients with the float64 reference."""

import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sasa_train.attention import cpu, local_attention, local_attention_qkv

NAMES = ("output", "query", "key", "value", "rel_height", "rel_width")
LAYOUTS = ("contiguous", "channels_last", "fused channels_last", "planar", "scattered")


def draw(shape, layout: str, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """Return query, key and value, each [B, N, H, W, D], with the strides of the named layout."""
    b, n, h, w, d = shape

    def randn(*size):
        return torch.randn(size, generator=generator).to(dtype)

    if layout == "fused channels_last":
        return list(randn(b, h, w, 3, n, d).permute(3, 0, 4, 1, 2, 5).unbind(0))
    one = {
        "contiguous": lambda: randn(b, n, h, w, d),
        "channels_last": lambda: randn(b, h, w, n, d).permute(0, 3, 1, 2, 4),
        "planar": lambda: randn(b, n, d, h, w).permute(0, 1, 3, 4, 2),
        "scattered": lambda: randn(w, b, n, d, h, 2)[..., 0].permute(1, 2, 4, 0, 3),
    }[layout]
    return [one() for _ in range(3)]


def outputs_and_grads(backend, dtype, inputs, kernel_size, content, border, grad_output, stride=1):
    q, key, v, *rel = (None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs)
    key = key if content else None
    options = {"kernel_size": kernel_size, "content": content, "border": border, "backend": backend}
    if stride == 1:
        out = local_attention(q, key, v, *rel, **options)
    else:
        out = local_attention_qkv(torch.stack([q, key, v] if content else [q, v]), *rel, stride=stride, **options)
    out.backward(grad_output.to(out.dtype))
    return [out.detach(), *(None if x is None else x.grad for x in (q, key, v, *rel))]


def assert_equals_reference(
    shape, kernel_size, dtype=torch.float32, layout="contiguous", border="mask", content=True, rel="shared",
    seed=0, stride=1, *, backend: str, device: str = "cpu",
) -> None:  # fmt: skip
    """Compare output and gradients with the float64 reference on the same (rounded) inputs.

    `rel`: "shared", "per head", "mixed" (rel_height shared, rel_width one per head), "swapped" (the reverse) or None.
    """
    generator = torch.Generator().manual_seed(seed)
    qkv = draw(shape, layout, dtype, generator)
    b, n, h, w, d = shape
    shared, per_head = (kernel_size, d // 2), (n, kernel_size, d // 2)
    sizes = {"shared": [shared] * 2, "per head": [per_head] * 2, "mixed": [shared, per_head]}
    sizes |= {"swapped": [per_head, shared], None: []}
    tables = [torch.randn(size, generator=generator) for size in sizes[rel]] or [None, None]
    if backend == "triton" and rel is not None:  # which rounds embeddings to the inputs' dtype
        tables = [table.to(dtype).float() for table in tables]
    grad_output = torch.randn((b, n, -(-h // stride), -(-w // stride), d), generator=generator).to(dtype)
    inputs = [None if x is None else x.to(device) for x in (*qkv, *tables)]
    case = (inputs, kernel_size, content, border, grad_output.to(device), stride)
    ours, exact = outputs_and_grads(backend, None, *case), outputs_and_grads("reference", torch.float64, *case)
    for name, x, y in zip(NAMES, ours, exact, strict=True):
        if y is None:
            assert x is None
            continue
        assert x.dtype == (torch.float32 if "rel" in name else dtype)
        size = max(1.0, float(y.abs().max()), math.prod(shape[:4]) ** 0.5 if "rel" in name else 0.0)
        rtol, atol = tolerance(name, backend, device, dtype, x.dtype)
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol * size, msg=lambda m, n=name: f"{n}: {m}")


def tolerance(name: str, backend: str, device: str, inputs: torch.dtype, result: torch.dtype) -> tuple[float, float]:
    """Return the relative tolerance, and the absolute tolerance for a result of magnitude 1.

    float32: scores reach 20 to 40, and their rounding error (2e-6) becomes a relative error of the weights. A gradient
    sums terms of magnitude 1 or more (B N H W terms for an embedding), which may cancel. Half precision rounds a result
    once, by at most half an ulp.

    The Triton kernels also round weights and dS to half precision before they multiply, and subtract from dS a sum over
    the rounded output, as FlashAttention does. dS is the difference of such numbers of magnitude sqrt(D), so the
    gradients that it enters have an error of a few ulps. Triton's interpreter truncates bfloat16 instead of rounding.
    """
    unit = 0.0 if result == torch.float32 else torch.finfo(result).eps
    if backend != "triton":
        return unit / 2 + 1e-5, 2e-5
    if inputs == torch.float32:
        return 1e-5, 2e-5 if device == "cpu" else 8e-5  # three TF32 products represent 22 of float32's 24 bits
    ulp = torch.finfo(inputs).eps * (2 if inputs == torch.bfloat16 and device == "cpu" else 1)
    return ulp, ulp if name in ("output", "value") else 4 * ulp


def assert_random_cases(
    num_cases, largest, dtypes, rels, strides=(1,), head_dims=None, kernel_sizes=(1, 3, 5, 7, 9, 11), **where
) -> None:
    """Compare random cases with the reference; `largest` gives the maxima of B, N, H, W and D / 2 (if no head_dims)."""
    rng = random.Random(1)
    for seed in range(num_cases):
        rel = rng.choice(rels)
        *shape, half_dim = (rng.randint(1, size) for size in largest)
        head_dim = rng.choice(head_dims) if head_dims else 2 * half_dim
        choices = [kernel_sizes, dtypes, LAYOUTS, ["mask", "zero"]]
        case = ((*shape, head_dim), *map(rng.choice, choices), rel is None or rng.random() < 0.7, rel, seed)
        assert_equals_reference(*case, rng.choice(strides), **where)


def larger_case(seed: int) -> tuple[Any, list[Tensor | None], dict[str, Any]]:
    """Draw an op, its inputs and options for the CPU kernels: many planes, several tiles, any dtype and strides."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    border, dtype = rng.choice(["mask", "zero", "shift"]), rng.choice([torch.float32, torch.bfloat16, torch.float16])
    rows, columns = (rng.choice([1, 3, 5, 7, 17]) for _ in range(2))
    columns = rows if rng.random() < 0.4 else columns
    least = (rows, columns) if border == "shift" else (1, 1)
    height, width = (size + rng.choice([0, 1, 6, 19]) for size in least)
    batch, num_heads, head_dim = rng.randint(1, 3), rng.choice([1, 3, 9]), rng.choice([2, 4, 8, 10, 16, 32])
    shape = (batch, num_heads, height, width, head_dim)
    q, key, v = (x.requires_grad_() for x in draw(shape, rng.choice(LAYOUTS), dtype, generator))
    sizes = [2 * k - 1 if border == "shift" else k for k in (rows, columns)]
    heads = [num_heads] if rng.random() < 0.3 else []
    tables = [torch.randn(*heads, size, head_dim // 2, generator=generator).requires_grad_() for size in sizes]
    options = {"kernel_size": (rows, columns), "border": border, "scale": rng.choice([1.0, 0.3]), "backend": "cpu"}
    options["null_key"] = rng.random() < 0.3
    if rng.random() < 0.3:
        inputs = [torch.stack([q, key, v]).detach().requires_grad_(), *tables]
        return local_attention_qkv, inputs, options | {"stride": 2}
    if rng.random() < 0.5:
        v = draw((*shape[:4], rng.choice([1, 3, 8, 20])), rng.choice(LAYOUTS), dtype, generator)[0].requires_grad_()
    content = rng.random() < 0.8
    return local_attention, [q, key if content else None, v, *tables], options | {"content": content}


def run_with_grads(op: Any, inputs: list[Tensor | None], options: dict[str, Any]) -> list[Tensor | None]:
    """Return the output, and the gradients of its product with fixed numbers."""
    output, present = op(*inputs, **options), [x for x in inputs if x is not None]
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, present, weights.to(output.dtype))]


def assert_larger_cases(first: int, end: int) -> None:
    """Compare the CPU kernels with the float64 reference. Scratch memory holds NaNs before each call."""
    for seed in range(first, end):
        op, inputs, options = larger_case(seed)
        if getattr(cpu._kept, "scratch", None) is not None:
            cpu._kept.scratch.fill_(255)
        exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
        ours, reference = run_with_grads(op, inputs, options), options | {"backend": "reference"}
        for x, y in zip(ours, run_with_grads(op, exact, reference), strict=True):
            is_table, unit = x.dim() < 4, 0.0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
            size = max(1.0, float(y.abs().max()), math.prod(inputs[0].shape[-5:-1]) ** 0.5 if is_table else 0.0)
            torch.testing.assert_close(
                x.double(), y, rtol=unit + 1e-5, atol=2e-5 * size,
                msg=lambda m, s=seed, o=options, x=x: f"case {s}, {o}, {list(x.shape)}: {m}",
            )  # fmt: skip


def assert_extremes_are_kept(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> int:
    """Check that huge scores give finite gradients; return the number of queries affected by a NaN key (at least 9)."""
    generator = torch.Generator().manual_seed(0)
    q, key, v = (x.to(device) for x in draw((1, 2, 5, 6, 8), "contiguous", dtype, generator))
    tables = torch.randn(2, 3, 4, generator=generator).to(device)
    for rel in [(None, None), tables]:  # scores of up to 1e6
        results = outputs_and_grads(backend, None, (300 * q, 300 * key, v, *rel), 3, True, "mask", torch.ones_like(v))
        assert all(x is None or x.isfinite().all() for x in results)
    key[0, 1, 2, 3, 0] = float("nan")
    reached = local_attention(q, key, v, kernel_size=3, backend=backend).isnan().any(-1)
    assert reached[0, 1, 1:4, 2:5].all()
    return int(reached.sum())


def assert_threads_change_no_bit(run: Callable[[], Sequence[Tensor | None]], counts: Sequence[int]) -> None:
    results, before = [], torch.get_num_threads()
    try:
        for num_threads in counts:
            torch.set_num_threads(num_threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def run_narrower(capability: str, program: str) -> None:
    """Run test code with a narrower CPU instruction set, in a new process because ATEN_CPU_CAPABILITY is read once."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parent)
