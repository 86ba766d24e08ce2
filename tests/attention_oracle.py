"""Local attention by loops over single numbers, with every option: the oracle of the reference and of all backends."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sasa_train.attention import local_attention

NAMES = ("query", "key", "value", "rel_height", "rel_width")


def window_along(place: int, size: int, keys: int, dilation: int, border: str) -> list[tuple[int, int]]:
    """Return the position of each key of a window along one axis, also outside the map, and its row in the table."""
    first = place - keys // 2 * dilation
    if border != "shift":
        return [(first + i * dilation, i) for i in range(keys)]
    while first < 0:
        first += dilation
    while first + (keys - 1) * dilation >= size:
        first -= dilation
    places = [first + i * dilation for i in range(keys)]
    return [(other, (other - place) // dilation + keys - 1) for other in places]


def by_loops(
    q: Tensor, key: Tensor | None, v: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    kernel_size: tuple[int, int], dilation: tuple[int, int] = (1, 1), border: str = "mask", scale: float = 1.0,
    null_key: bool = False,
) -> Tensor:  # fmt: skip
    """Return the output [B, N, H, W, Dv]; differentiable, because each number is a tensor without dimensions."""
    (batch, num_heads, height, width, head_dim), out = q.shape, []
    for b, n, i, j in itertools.product(*map(range, (batch, num_heads, height, width))):
        exponentials, values = [], []
        rows = window_along(i, height, kernel_size[0], dilation[0], border)
        columns = window_along(j, width, kernel_size[1], dilation[1], border)
        for (y, row), (x, column) in itertools.product(rows, columns):
            inside = 0 <= y < height and 0 <= x < width
            if border == "mask" and not inside:
                continue
            score = torch.zeros((), dtype=q.dtype)
            for c in range(head_dim):
                if key is not None and inside:
                    score = score + q[b, n, i, j, c] * key[b, n, y, x, c]
                if rel_height is not None and rel_width is not None:
                    table, place = (rel_height, row) if c < head_dim // 2 else (rel_width, column)
                    table = table if table.dim() == 2 else table[n]
                    score = score + q[b, n, i, j, c] * table[place, c % (head_dim // 2)]
            exponentials.append((score * scale).exp())
            values.append([v[b, n, y, x, c] if inside else None for c in range(v.shape[-1])])
        total = sum(exponentials) + (1 if null_key else 0)
        for c in range(v.shape[-1]):
            seen = [e * value[c] for e, value in zip(exponentials, values, strict=True) if value[c] is not None]
            out.append(sum(seen) / total)
    return torch.stack(out).view(batch, num_heads, height, width, v.shape[-1])


def random_case(seed: int, has_other_values: bool = True, **fixed: Any) -> tuple[list[Tensor | None], dict[str, Any]]:
    """Draw float64 inputs of `local_attention` (some None) and options, among all combinations of them.

    `has_other_values`: whether values may have another head_dim than queries; `fixed`: options that are not drawn.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "border": rng.choice(["mask", "zero", "shift"]),
        "kernel_size": tuple(rng.choice(range(1, 8, 2)) for _ in range(2)),
        "dilation": (rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])),
        "scale": rng.choice([1.0, 0.5, 0.3, 2.0]),
        "null_key": rng.random() < 0.3,
    } | fixed
    is_shift = options["border"] == "shift"
    pairs = list(zip(options["kernel_size"], options["dilation"], strict=True))
    height, width = (k * d + rng.randint(0, 2) if is_shift else rng.randint(1, 7) for k, d in pairs)
    if is_shift and height * width > 60:  # loops take a while
        return random_case(seed + 1000, has_other_values, **fixed)
    batch, num_heads, half = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 2)
    head_dim, value_dim = 2 * half, rng.choice([2 * half, 1, 3]) if has_other_values else 2 * half
    has_rel, options["content"] = rng.choice([(True, True), (True, False), (False, True)])

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).double()  # so that float32 kernels get the same numbers

    tables = [
        randn(*([num_heads] if rng.random() < 0.5 else []), 2 * k - 1 if is_shift else k, half) if has_rel else None
        for k in options["kernel_size"]
    ]
    q, key = randn(batch, num_heads, height, width, head_dim), randn(batch, num_heads, height, width, head_dim)
    value = randn(batch, num_heads, height, width, value_dim)
    return [q, key if options["content"] else None, value, *tables], options


def output_and_gradients(run: Any, inputs: list[Tensor | None], seed: int = 0) -> list[Tensor | None]:
    """Return run(*inputs) and the gradients of its product with fixed numbers, in float64."""
    given = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    output = run(*given)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (output.double() * weights.to(output.device)).sum().backward()
    return [output.detach(), *(None if x is None else x.grad for x in given)]


def assert_equal_loops(seed: int, backends: Sequence[str], **fixed: Any) -> None:
    """Compare output and gradients of each backend with the loops, on the same numbers, for one random case."""
    inputs, options = random_case(seed, **fixed)
    loops = {name: value for name, value in options.items() if name != "content"}
    exact = output_and_gradients(lambda *x: by_loops(*x, **loops), inputs)
    for backend in backends:
        dtype, rtol, atol = (torch.float64, 1e-11, 1e-11) if backend == "reference" else (torch.float32, 1e-5, 2e-5)
        given = [None if x is None else x.to(dtype) for x in inputs]
        ours = output_and_gradients(lambda *x, b=backend: local_attention(*x, backend=b, **options), given)
        for name, x, y in zip(("output", *NAMES), ours, exact, strict=True):
            if y is None:
                assert x is None
                continue
            assert x is not None and x.dtype == dtype
            size, what = max(1.0, float(y.abs().max())), f"{backend}'s {name} of case {seed}, {options}"
            torch.testing.assert_close(
                x.double(), y, rtol=rtol, atol=atol * size, msg=lambda m, what=what: f"{what}: {m}"
            )
