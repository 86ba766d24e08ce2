"""Compare the Triton kernels with the float64 reference on the GPU or, for small cases, under Triton's interpreter."""

import functools
import importlib.util
import logging
import os
import subprocess
import sys

import attention_cases as cases
import pytest
import torch
from attention_cases import LAYOUTS, draw, outputs_and_grads
from marking import slow_but_for

from sasa_train.attention import dispatch, local_attention, local_attention_qkv

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from sasa_train.attention import triton_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
assert_equals_reference = functools.partial(cases.assert_equals_reference, backend="triton", device=DEVICE)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """Use large tiles of the walk under the interpreter, whose run time grows with the number of programs."""
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_kernels, "WALK_POSITIONS", 64)


WITHOUT_KEYS = """
from triton import JITFunction
from sasa_train.attention import triton_fold, triton_kernels, triton_walk
functions = [f for f in (*vars(triton_fold).values(), *vars(triton_walk).values()) if isinstance(f, JITFunction)]
print(len(functions), [f.__name__ for f in functions if f.hash is None])
"""


def test_the_keys_of_kernels_do_not_depend_on_what_is_compiled_first():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", WITHOUT_KEYS]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    count, without = printed.split(maxsplit=1)
    assert int(count) > 20 and without == "[]\n"


@pytest.mark.parametrize("kernel_size", slow_but_for([1, 7], range(1, 17, 2)))
def test_every_window_and_map(kernel_size):
    """Maps range from 1x1 to larger than a tile; some are smaller than the window."""
    border = "zero" if kernel_size % 4 == 3 else "mask"
    for h, w in [(1, 1), (1, 7), (5, 2), (9, 11)] if DEVICE == "cpu" else [(1, 1), (7, 1), (8, 8), (5, 19), (33, 57)]:
        assert_equals_reference((1, 1 if h * w > 30 else 2, h, w, 4), kernel_size, border=border)


@pytest.mark.parametrize("positions", slow_but_for([16], [16, 32, 128]))
def test_every_tile_of_the_walk(positions, monkeypatch):
    """The choice of tiles affects only rounding; the cases include partial tiles at two edges."""
    monkeypatch.setattr(triton_kernels, "WALK_POSITIONS", positions)
    assert_equals_reference((1, 1, 5, 9, 6), 5)
    assert_equals_reference((1, 1, 5, 9, 6), 5, stride=2)
    if DEVICE == "cuda":
        for kernel_size, head_dim, dtype in [(9, 8, BF16), (7, 32, torch.float32), (11, 64, BF16), (15, 16, FP16)]:
            assert_equals_reference((3, 5, 17, 23, head_dim), kernel_size, dtype, "fused channels_last")


@pytest.mark.parametrize("head_dim", slow_but_for([8], [8, 32]))
def test_the_fold_at_every_head_dim(head_dim):
    """Two tiles of rows and columns, the last partial; all dtypes, so both tilings in float32."""
    for dtype, border, stride in [(BF16, "mask", 2), (FP16, "zero", 1), (torch.float32, "mask", 2)]:
        assert_equals_reference((1, 1, 3, 10, head_dim), 7, dtype, "fused channels_last", border, stride=stride)


def test_the_output_may_be_changed_in_place_where_the_backward_pass_needs_none():
    q = torch.randn(1, 1, 3, 3, 4, requires_grad=True)
    for backend in ("cpu", "reference"):
        local_attention(q, q, q, kernel_size=3, backend=backend).relu_().sum().backward()


@pytest.mark.parametrize("heads_per_program", [4])
def test_the_number_of_heads_in_a_program_changes_no_bit(heads_per_program, monkeypatch):
    inputs = [x.to(BF16) for x in draw((1, 4, 3, 9, 8), "channels_last", torch.float32, torch.Generator())]
    tables = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(1))
    case = ([*inputs, *tables], 3, True, "mask", torch.ones_like(inputs[0]))
    case = ([x.to(DEVICE) for x in case[0]], *case[1:4], case[4].to(DEVICE))
    one = outputs_and_grads("triton", None, *case)
    programs = (2 * 2 * 4 // heads_per_program, heads_per_program)
    monkeypatch.setattr(triton_kernels, "_fold_programs", lambda *_: programs)
    for name, x, y in zip(cases.NAMES, one, outputs_and_grads("triton", None, *case), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.slow
def test_a_large_odd_map():
    assert_equals_reference((1, 1, 33, 57, 2), 3, layout="planar")


@pytest.mark.parametrize("head_dim", slow_but_for([2, 20], [2, 6, 8, 20, 64, 128]))
def test_every_head_dim(head_dim):
    for layout in LAYOUTS if DEVICE == "cuda" else ("fused channels_last",):
        assert_equals_reference((1, 2, 3, 5, head_dim), 5, layout=layout)
        if DEVICE == "cuda":
            for dtype in (torch.float32, BF16, FP16):
                assert_equals_reference((2, 3, 13, 19, head_dim), 7, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    for head_dim in (4, 8):
        assert_equals_reference((2, 3, 2, 3, head_dim), 3, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_every_option(border, dtype):
    for content, rel in [(True, "per head"), (True, None), (False, "shared"), (True, "mixed")]:
        assert_equals_reference((1, 2, 3, 4, 8), 3, dtype, "fused channels_last", border, content, rel)


def test_odd_head_dims_without_embeddings():
    for head_dim in (1, 3, 17):
        assert_equals_reference((1, 2, 3, 4, head_dim), 3, rel=None)


@pytest.mark.slow
def test_cases_drawn_at_random():
    """A third of the cases is for the walk, the others for the fold: 9 in the interpreter, 120 on a GPU."""
    count = 3 if DEVICE == "cpu" else 40
    largest = (2, 2, 6, 13, 20) if DEVICE == "cpu" else (2, 3, 40, 70, 20)
    dtypes, rels = (torch.float32, BF16, FP16), ("shared", "per head", "mixed", "swapped", None)
    where = {"strides": (1, 2), "backend": "triton", "device": DEVICE}
    cases.assert_random_cases(count, largest, dtypes, rels, **where)
    folded = {"head_dims": (8, 8, 16, 16, 32, 64), "kernel_sizes": (1, 3, 5, 7)}
    cases.assert_random_cases(2 * count, largest, dtypes, rels, **folded, **where)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_huge_scores_stay_finite_and_a_nan_is_not_swallowed(dtype):
    """Heads of 8 channels take the walk in float32 and the fold in half precision."""
    cases.assert_extremes_are_kept("triton", DEVICE, dtype)


def test_the_same_to_the_bit_whatever_memory_held():
    """Check that results are bit-identical: the kernels use no atomics and write scratch memory before reading it."""
    for head_dim, dtype in [(4, torch.float32), (8, BF16)]:
        inputs = [x.to(DEVICE) for x in draw((1, 2, 5, 6, head_dim), "channels_last", dtype, torch.Generator())]
        tables = torch.randn(2, 5, head_dim // 2, device=DEVICE)
        case = ([*inputs, *tables], 5, True, "zero", torch.ones_like(inputs[0]))
        first, second = (outputs_and_grads("triton", None, *case) for _ in range(2))
        for name, x, y in zip(cases.NAMES, first, second, strict=True):
            assert torch.equal(x, y), name


def test_outputs_and_gradients_keep_the_inputs_order_of_strides():
    """A channels_last projection gives channels_last output and one gradient for query, key and value together."""
    stacked = torch.randn(2, 3, 4, 3, 2, 8, device=DEVICE).permute(3, 0, 4, 1, 2, 5).requires_grad_()
    out = local_attention_qkv(stacked, kernel_size=3, backend="triton")
    (grad,) = torch.autograd.grad(out.sum(), stacked)
    assert out.permute(0, 2, 3, 1, 4).is_contiguous()
    assert grad.stride() == stacked.stride()
    inputs = [x.detach().requires_grad_() for x in stacked.unbind(0)]
    grads = torch.autograd.grad(local_attention(*inputs, kernel_size=3, backend="triton").sum(), inputs)
    assert torch.equal(grad, torch.stack(grads))


def test_the_tile_walks_few_key_rows_and_covers_the_map():
    """A tile of 7 columns and 4 rows is chosen although 10 columns fit, because 10 x 3 would visit more key rows."""
    assert triton_kernels._tile(56, 56, 7, 32) == (4, 8, 98)
    assert triton_kernels._tile(14, 14, 7, 32) == (4, 7, 8)
    for height in (1, 2, 5, 14, 33):
        for width in (1, 3, 7, 28, 57):
            for kernel_size in range(1, 17, 2):
                tile_h, tile_w, num_tiles = triton_kernels._tile(height, width, kernel_size, 32)
                assert tile_h * tile_w <= 32
                assert tile_w + kernel_size - 1 <= triton_kernels.WINDOW_COLUMNS
                assert num_tiles == -(-height // tile_h) * -(-width // tile_w)


def test_few_programs_compute_one_head_each_and_many_several():
    assert triton_kernels._fold_programs(128, 8, 56, 56) == (128 * 28 * 7, 8)
    assert triton_kernels._fold_programs(128, 8, 7, 7) == (128 * 4 * 8, 1)
    assert triton_kernels._fold_programs(128, 6, 28, 28)[1] == 6
    assert triton_kernels._fold_programs(0, 4, 3, 3)[0] == 0


def test_offsets_of_more_than_32_bits_are_left_to_the_walk():
    for strides in [(64, 64, 2**31, 8, 1), (64, 2**31, 32, 8, 1)]:
        far = torch.empty_strided((1, 2, 2, 4, 8), strides, dtype=BF16, device="meta")
        assert not triton_kernels._folds((far,), 7, triton_kernels.FOLD_FORWARD)
    assert triton_kernels._folds((torch.empty_like(far),), 7, triton_kernels.FOLD_FORWARD)


@gpu
@pytest.mark.gpu
def test_more_programs_than_a_grid_has_rows():
    """Check a launch with more than 65,535 programs, the limit of a grid's second and third dimensions."""
    assert_equals_reference((9000, 8, 2, 3, 4), 3)


@gpu
@pytest.mark.gpu
def test_a_tensor_of_more_than_2_to_the_31_numbers():
    storage = torch.empty(2**31 + 2**10, dtype=BF16, device=DEVICE)
    for shape, strides in [((2, 1, 3, 4, 8), (2**31, 96, 32, 8, 1)), ((1, 1, 2, 4, 8), (64, 64, 2**31, 8, 1))]:
        far = storage.as_strided(shape, strides).normal_()
        near = far.contiguous()
        exact = local_attention(near, near, near, kernel_size=3, backend="triton")
        assert torch.equal(local_attention(far, far, far, kernel_size=3, backend="triton"), exact)


@gpu
@pytest.mark.gpu
def test_auto_says_what_it_runs(caplog):
    dispatch._say_once.cache_clear()
    q = torch.randn(2, 3, 9, 11, 8, device=DEVICE, requires_grad=True)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            local_attention(q, q, q, kernel_size=3).sum().backward()
    assert [r.message for r in caplog.records] == ["local_attention: backend=auto runs the Triton kernels"]


@gpu
@pytest.mark.gpu
def test_a_training_step_compiles_no_kernel_that_was_not_compiled_ahead(tmp_path):
    program = (
        "import pathlib, sys, timm, torch\n"
        "import sasa_train.models\n"
        "from sasa_train.attention.compiling import compile_ahead, launches_of\n"
        "layout, device = torch.channels_last, torch.device('cuda')\n"
        "model = timm.create_model('hybrid_resnet26', stem='conv_small', width=0.5).to(device, memory_format=layout)\n"
        "bf16 = torch.autocast('cuda', torch.bfloat16)\n"
        "compile_ahead(launches_of(model, (3, 64, 64), device, layout, bf16))\n"
        "kernels = sorted(pathlib.Path(sys.argv[1]).rglob('*.cubin'))\n"
        "images = torch.randn(6, 3, 64, 64, device=device).to(memory_format=layout)\n"
        "with bf16:\n"
        "    model(images).sum().backward()\n"
        "assert kernels and sorted(pathlib.Path(sys.argv[1]).rglob('*.cubin')) == kernels\n"
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)


def test_without_a_gpu_or_an_interpreter_it_is_an_error_that_says_so():
    """Check the error if there is no GPU and no interpreter, and that auto does not import Triton on a CPU."""
    program = (
        "import sys, torch\n"
        "from sasa_train.attention import local_attention\n"
        "q = torch.zeros(1, 1, 3, 3, 2)\n"
        "local_attention(q, q, q, kernel_size=3)\n"
        "assert 'sasa_train.attention.triton_kernels' not in sys.modules\n"
        "local_attention(q, q, q, kernel_size=3, backend='triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "backend='triton' cannot run: the tensors are on cpu" in process.stderr


@pytest.mark.parametrize("kernel_size,stride", [(3, 2), (9, 1)])
def test_a_scale_and_a_null_key(kernel_size, stride):
    """The window of 3 is folded, that of 9 is not; a power of two is exact in bfloat16 and others are refused."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 1, 2, 5, 7, 8), *[(kernel_size, 4)] * 2]
    inputs = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]

    def run(backend, scale, dtype=None):
        given = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        options = {"kernel_size": kernel_size, "stride": stride, "scale": scale, "null_key": True, "backend": backend}
        out = local_attention_qkv(*given, **options)
        return [out, *torch.autograd.grad(out.pow(2).sum(), given)]

    rtol, atol = cases.tolerance("query", "triton", DEVICE, torch.float32, torch.float32)
    for x, y in zip(run("triton", 0.3), run("reference", 0.3, torch.float64), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=rtol, atol=atol * max(1.0, float(y.detach().abs().max())))
    for x, y in zip(run("triton", 0.25, BF16), run("reference", 0.25, BF16), strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=2**-5 * max(1.0, float(y.detach().abs().max())))
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: Triton would round queries of torch.bfloat16"):
        run("triton", 0.3, BF16)


def test_what_the_kernels_cannot_do_is_refused_by_name(monkeypatch):
    q = torch.zeros(1, 1, 3, 3, 2, device=DEVICE)
    for x, kernel_size, reason in [
        (q.double(), 3, "the tensors are torch.float64"),
        (q, 17, "kernel_size=17 is above 15"),
        (torch.zeros(1, 1, 3, 3, 130, device=DEVICE), 3, "head_dim=130 is above 128"),
    ]:
        with pytest.raises(RuntimeError, match=f"backend='triton' cannot run: {reason}"):
            local_attention(x, x, x, kernel_size=kernel_size, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: Triton is not installed"):
        local_attention(q, q, q, kernel_size=3, backend="triton")
