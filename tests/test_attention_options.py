"""Every option of `local_attention` in every combination, on each backend, against loops over single numbers."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import assert_larger_cases, assert_threads_change_no_bit, draw, run_narrower, run_with_grads
from attention_oracle import assert_equal_loops, by_loops, random_case, window_along

from sasa_train.attention import attention_weights, cpu, local_attention, local_attention_qkv
from sasa_train.attention.dilation import by_remainder
from sasa_train.attention.plain import local_attention_forward as plain_forward
from sasa_train.attention.reference import Inputs, Window
from sasa_train.models.layers import LocalSelfAttention2d


def why_not_built() -> str | None:
    return cpu.why_not_built("local_attention_any", 0)


needs_kernel = pytest.mark.skipif(why_not_built() is not None, reason=f"no compiled kernel: {why_not_built()}")


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_reference_and_the_cpu_kernels_equal_the_loops(first):
    backends = ["reference"] if why_not_built() else ["reference", "cpu"]
    for seed in range(first, first + 10):
        assert_equal_loops(seed, backends)


def test_programs_that_are_exported_equal_the_reference():
    for seed in range(60):
        inputs, options = random_case(seed)
        window = Window(*options["kernel_size"], options["border"], options["scale"], options["null_key"])
        rel = inputs[3:]
        ours = by_remainder(
            lambda q, k, v, rel=rel, window=window: plain_forward(Inputs(q, k, v, *rel), window),
            options["dilation"],
            *inputs[:3],
        )
        expected = local_attention(*inputs, backend="reference", **options)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12, msg=lambda m, s=seed: f"case {s}: {m}")


def test_weights_are_those_that_the_loops_give_to_each_position():
    """With a value that names its position, the output of the loops is the weight of each position."""
    for seed in range(0, 60, 6):
        (q, key, _, *rel), options = random_case(seed)
        batch, num_heads, height, width, _ = q.shape
        names = torch.eye(height * width, dtype=torch.float64).view(height, width, -1)
        loops = {name: value for name, value in options.items() if name != "content"}
        expected = by_loops(q, key, names.expand(batch, num_heads, -1, -1, -1), *rel, **loops)
        weights = attention_weights(q, key, *rel, **options)
        ours = torch.zeros_like(expected)
        (k_h, k_w), (d_h, d_w), border = options["kernel_size"], options["dilation"], options["border"]
        for i in range(height):
            for j in range(width):
                places = [
                    (y, x)
                    for y, _ in window_along(i, height, k_h, d_h, border)
                    for x, _ in window_along(j, width, k_w, d_w, border)
                ]
                for index, (y, x) in enumerate(places):
                    if 0 <= y < height and 0 <= x < width:
                        ours[:, :, i, j, y * width + x] += weights[:, :, i, j, index]
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
        sums = weights.sum(-1)
        assert (sums < 1).all() if options["null_key"] else torch.allclose(sums, torch.ones_like(sums), atol=1e-12)


@needs_kernel
@pytest.mark.parametrize("first", range(0, 60, 20))
def test_the_cpu_kernels_equal_the_reference_at_larger_sizes(first):
    assert_larger_cases(first, first + 20)


@needs_kernel
def test_the_cpu_kernels_with_a_narrower_instruction_set():
    """The kernel with every option computes all cases, so that only one library is built."""
    run_narrower(
        "avx2",
        "from attention_cases import assert_larger_cases, cpu\n"
        "cpu.library_for = lambda *_: ('local_attention_any', 0)\n"
        "assert_larger_cases(0, 10)",
    )


@needs_kernel
def test_a_window_of_hundreds_of_rows_sees_the_whole_map():
    torch.manual_seed(0)
    q, key, v = torch.randn(3, 1, 2, 3, 5, 4)
    everything = torch.softmax(q.flatten(2, 3) @ key.flatten(2, 3).mT, -1) @ v.flatten(2, 3)
    for kernel_size in (301, (301, 9), (5, 301)):
        ours = local_attention(q, key, v, kernel_size=kernel_size, backend="cpu")
        torch.testing.assert_close(ours.flatten(2, 3), everything)


@needs_kernel
@pytest.mark.parametrize("border", ["mask", "zero", "shift"])
def test_the_number_of_threads_changes_no_bit_with_options(border):
    """There are few planes, so that rows are divided among threads and each computes the halo rows of its keys."""
    generator = torch.Generator().manual_seed(0)
    q, key, v = draw((1, 2, 41, 9, 6), "channels_last", torch.float32, generator)
    options = {"kernel_size": (9, 3), "border": border, "scale": 0.5, "null_key": border != "zero", "backend": "cpu"}
    tables = [torch.randn(2 * k - 1 if border == "shift" else k, 3, generator=generator) for k in (9, 3)]
    inputs = [x.requires_grad_() for x in (q, key, v[..., :5], *tables)]
    assert_threads_change_no_bit(lambda: run_with_grads(local_attention, inputs, options), (1, 2, 3, 16))


def assert_dilation_is_right(backend: str, num_cases: int) -> None:
    """Compare square windows, dilated, with the loops."""
    for seed in range(num_cases):
        fixed = {"kernel_size": (3, 3), "border": ("mask", "zero")[seed % 2], "scale": 1.0, "null_key": seed % 4 < 2}
        assert_equal_loops(seed, [backend], has_other_values=False, dilation=(2, 1 + seed % 3), **fixed)


def test_triton_has_dilation_and_a_null_key():
    pytest.importorskip("triton")
    run_alone("assert_dilation_is_right('triton', 4)", interpret="1")


def run_alone(call: str, interpret: str) -> None:
    """Run a function of this file in a process of its own, as Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    program = f"from test_attention_options import *; {call}"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parent)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernel)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pool_after_a_dilated_window(backend, dtype):
    """Each image of 8 rows has as many rows as there are heads; the map has an odd width."""
    torch.manual_seed(0)
    projections, rel = torch.randn(3, 2, 8, 8, 5, 4).to(dtype), torch.randn(2, 3, 2)
    options = {"kernel_size": 3, "dilation": (1, 2)}
    given = [x.clone().requires_grad_() for x in (projections, *rel)]
    pooled = local_attention_qkv(*given, stride=2, backend=backend, **options)
    exact = [x.double().requires_grad_() for x in (projections, *rel)]
    expected = local_attention_qkv(*exact, stride=2, backend="reference", **options)
    weights = torch.randn(pooled.shape).to(dtype)
    unit = 1e-5 + (torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(pooled.double(), expected, rtol=unit, atol=unit)
    pairs = zip(
        torch.autograd.grad(pooled, given, weights), torch.autograd.grad(expected, exact, weights.double()), strict=True
    )
    for x, y in pairs:
        torch.testing.assert_close(x.double(), y, rtol=unit, atol=unit * max(1.0, float(y.abs().max())))


@pytest.mark.parametrize("border", ["mask", "shift"])
def test_the_op_with_options_is_a_well_behaved_library_op(border):
    torch.manual_seed(0)
    q, key = torch.randn(2, 1, 2, 7, 6, 4, requires_grad=True).unbind(0)
    value, rows = torch.randn(1, 2, 7, 6, 3, requires_grad=True), (5, 9) if border == "shift" else (3, 5)
    rel = [torch.randn(size, 2, requires_grad=True) for size in rows]
    arguments = (q, key, value, *rel, [3, 5], [2, 1], border, 0.5, True, "auto")
    torch.library.opcheck(torch.ops.sasa_train.local_attention.default, arguments)
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    options = {"kernel_size": (3, 5), "dilation": (2, 1), "border": border, "scale": 0.5, "null_key": True}
    assert torch.equal(compiled(q, key, value, *rel, **options), local_attention(q, key, value, *rel, **options))


def assert_launches_ahead_are_those_of_the_op() -> None:
    """An op that is recorded has lists for options; its kernels must be those of the pool, with no remainders."""
    from sasa_train.attention.compiling import launches_of, step_launches

    layer = LocalSelfAttention2d(16, 16, 3, 2, stride=2)
    device, layout = torch.device("cpu"), torch.channels_last
    launches = launches_of(layer, (16, 8, 8), device, layout, contextlib.nullcontext(), torch.bfloat16)
    projections = torch.empty(2, 8, 8, 3, 2, 8, dtype=torch.bfloat16).permute(3, 0, 4, 1, 2, 5)
    rel = layer.rel_height, layer.rel_width
    expected = step_launches(projections, *rel, (3, 3), (1, 1), "mask", 1.0, False, 2)
    assert [(x.kernel, x.constants) for x in launches] == [(x.kernel, x.constants) for x in expected]
    assert 2 in [x.constants.get("POOL") for x in launches]


def test_the_kernels_that_are_compiled_ahead_are_those_of_the_op():
    pytest.importorskip("triton")
    run_alone("assert_launches_ahead_are_those_of_the_op()", interpret="0")


HALF = torch.zeros(1, 2, 6, 6, 4, dtype=torch.float16)
LACKING = [
    ({"kernel_size": (3, 5)}, r"Triton's windows are square; kernel_size is \(3, 5\)"),
    ({"border": "shift"}, "border='shift' has no Triton kernel"),
    (dict.fromkeys(("query", "key", "value"), HALF) | {"scale": 0.5}, "Triton would round queries of torch.float16"),
    ({"value": torch.zeros(1, 2, 6, 6, 3)}, "Triton's values have query's head_dim, 4; value has 3"),
]


@pytest.mark.parametrize("change,reason", LACKING)
def test_triton_says_by_name_what_it_lacks(change, reason):
    pytest.importorskip("triton")
    x = torch.zeros(1, 2, 6, 6, 4)
    arguments = {"query": x, "key": x, "value": x, "kernel_size": 3} | change
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run: {reason}"):
        local_attention(**arguments, backend="triton")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"dilation": 0}, "dilation=0 must be a whole number, at least 1"),
        ({"dilation": (1, 2, 3)}, r"dilation=\(1, 2, 3\) must be a whole number, or a pair"),
        ({"kernel_size": (3, 4)}, r"kernel_size=\(3, 4\) must be odd"),
        ({"null_key": 1}, "null_key=1 must be True or False"),
        ({"scale": 0}, "scale=0 must be a finite number above 0"),
        ({"scale": float("nan")}, "scale=nan must be a finite number above 0"),
        ({"border": "shift", "dilation": 3}, "kernel_size=3 and dilation=3 span 9 rows; query has 6"),
        ({"border": "shift", "rel_height": torch.zeros(3, 2), "rel_width": torch.zeros(3, 2)},
         r"rel_height must be \[5, 2\] or \[2, 5, 2\] with border='shift'"),
        ({"value": torch.zeros(1, 2, 6, 5, 4)}, "value must match query's shape, apart from head_dim"),
    ],
)  # fmt: skip
def test_an_illegal_option_is_refused_with_its_value_and_rule(change, message):
    x = torch.zeros(1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match=message):
        local_attention(**({"query": x, "key": x, "value": x, "kernel_size": 3} | change))
