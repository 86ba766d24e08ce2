"""Check the reference implementation, which is the specification, against independent calculations."""

import itertools
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sasa_train.attention import attention_weights as attend_weights
from sasa_train.attention import dispatch, local_attention, local_attention_qkv, reference, triton_kernels
from sasa_train.attention.reference import Inputs, Window, attention_weights
from sasa_train.models import AttentionStem, LocalSelfAttention2d

B, N, H, W, D, K = 2, 3, 5, 7, 4, 3  # all different, so that swapped dimensions are noticed


def tensors(dtype=torch.float64, shared=True, n=N, h=H, w=W, d=D, k=K, b=B, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, key, v = (torch.randn(b, n, h, w, d, generator=generator, dtype=dtype) for _ in range(3))
    rel_shape = (k, d // 2) if shared else (n, k, d // 2)
    rel_height, rel_width = (torch.randn(rel_shape, generator=generator, dtype=dtype) for _ in range(2))
    return q, key, v, rel_height, rel_width


def loop_oracle(q, key, v, rel_height, rel_width, kernel_size, content=True, border="mask") -> Tensor:
    """Compute the paper's equation 3 with Python floats, one element at a time."""
    b_, n_, h_, w_, d_ = q.shape
    p, half = kernel_size // 2, d_ // 2
    out = torch.zeros_like(v)
    for b, n, i, j in itertools.product(range(b_), range(n_), range(h_), range(w_)):
        scores, values = [], []
        for dy, dx in itertools.product(range(-p, p + 1), repeat=2):
            y, x = i + dy, j + dx
            inside = 0 <= y < h_ and 0 <= x < w_
            if border == "mask" and not inside:
                continue
            score = 0.0
            if content and inside:
                score += sum(float(q[b, n, i, j, c]) * float(key[b, n, y, x, c]) for c in range(d_))
            if rel_height is not None:
                row = (rel_height if rel_height.dim() == 2 else rel_height[n])[dy + p]
                col = (rel_width if rel_width.dim() == 2 else rel_width[n])[dx + p]
                score += sum(float(q[b, n, i, j, c]) * float(row[c]) for c in range(half))
                score += sum(float(q[b, n, i, j, half + c]) * float(col[c]) for c in range(half))
            scores.append(score)
            values.append([float(v[b, n, y, x, c]) if inside else 0.0 for c in range(d_)])
        top = max(scores)
        weights = [math.exp(score - top) for score in scores]
        for c in range(d_):
            out[b, n, i, j, c] = sum(w * value[c] for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out


CASES = [
    pytest.param(3, True, True, True, "mask", id="all terms"),
    pytest.param(3, True, True, True, "zero", id="zero border"),
    pytest.param(3, True, True, False, "mask", id="embeddings per head"),
    pytest.param(3, False, True, True, "mask", id="relative alone"),
    pytest.param(3, False, True, False, "zero", id="relative alone, zero border"),
    pytest.param(5, True, False, True, "mask", id="content alone"),
    pytest.param(1, True, True, True, "mask", id="window of one"),
    pytest.param(9, True, True, True, "mask", id="window larger than the image"),
]


@pytest.mark.parametrize("kernel_size,content,relative,shared,border", CASES)
def test_matches_the_loop_oracle(kernel_size, content, relative, shared, border):
    q, key, v, rel_height, rel_width = tensors(k=kernel_size, shared=shared)
    rel = (rel_height, rel_width) if relative else (None, None)
    key_or_none = key if content else None
    ours = local_attention(q, key_or_none, v, *rel, kernel_size=kernel_size, content=content, border=border)
    expected = loop_oracle(q, key, v, *rel, kernel_size, content, border)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel_size,content,relative,shared,border", CASES)
def test_gradients_match_finite_differences(kernel_size, content, relative, shared, border):
    q, key, v, rel_height, rel_width = tensors(k=kernel_size, shared=shared, b=1, n=2, h=3, w=2)
    rel = (rel_height, rel_width) if relative else (None, None)
    inputs = [t.requires_grad_() if t is not None else None for t in (q, key if content else None, v, *rel)]

    def attend(*given):
        return local_attention(*given, kernel_size=kernel_size, content=content, border=border)

    assert torch.autograd.gradcheck(attend, inputs)


def test_two_heads_on_paper():
    """Check one row of two pixels with K=3, D=2 and two heads against a result computed by hand.

    Head 0 has q=(1, 0) on the left and k = 0. Both keys are in the same row, so only rel_height[1] = 2 counts, the
    scores are equal, and the output is the mean of v. Head 1 has q=(0, 1): rel_width is 0 for the pixel itself and ln 3
    for its right neighbour, so the left pixel gives its neighbour weight 3/4; the right pixel's neighbour is on the
    left, with rel_width[0] = ln 2 and weight 2/3.
    """
    q = torch.tensor([[[[[1.0, 0.0], [1.0, 0.0]]], [[[0.0, 1.0], [0.0, 1.0]]]]], dtype=torch.float64)
    key = torch.zeros_like(q)
    v = torch.tensor([[[[[4.0, 0.0], [8.0, 0.0]]], [[[4.0, 0.0], [8.0, 0.0]]]]], dtype=torch.float64)
    rel_height = torch.tensor([[5.0], [2.0], [7.0]], dtype=torch.float64)  # 5 and 7 belong to rows outside the map
    rel_width = torch.tensor([[math.log(2)], [0.0], [math.log(3)]], dtype=torch.float64)
    out = local_attention(q, key, v, rel_height, rel_width, kernel_size=3)[0, :, 0, :, 0]
    expected = torch.tensor([[6.0, 6.0], [4 / 4 + 8 * 3 / 4, 4 * 2 / 3 + 8 / 3]], dtype=torch.float64)
    torch.testing.assert_close(out, expected)


def test_scores_are_not_scaled():
    """Scores are q.k = 4 ln 3 over D=4 channels; scaling them by 1/sqrt(D) would change the odds from 81 to 9."""
    q = torch.full((1, 1, 1, 2, 4), math.log(3), dtype=torch.float64)
    key = torch.tensor([1.0, 0.0], dtype=torch.float64)[None, None, None, :, None].expand(1, 1, 1, 2, 4)
    weights = attention_weights(Inputs(q, key, q, None, None), Window(3, 3))[0, 0, 0, 0]
    assert float(weights[4] / weights[5]) == pytest.approx(81)


@pytest.mark.parametrize("border", ["mask", "zero"])
def test_weights_sum_to_one_with_one_map_a_head(border):
    q, key, _, rel_height, rel_width = tensors()
    weights = attention_weights(Inputs(q, key, q, rel_height, rel_width), Window(K, K, border))
    assert weights.shape == (B, N, H, W, K * K)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, N, H, W, dtype=torch.float64))
    corner = weights[:, :, 0, 0].unflatten(-1, (K, K))
    outside = torch.cat([corner[..., 0, :].flatten(), corner[..., 0].flatten()])
    assert (outside == 0).all() if border == "mask" else (outside > 0).all()


def test_a_head_depends_on_its_own_query_alone():
    """Check that heads have separate softmaxes; some public implementations share one between the heads."""
    q, key, v, rel_height, rel_width = tensors()
    before = local_attention(q, key, v, rel_height, rel_width, kernel_size=K)
    q[:, 1] += 1
    after = local_attention(q, key, v, rel_height, rel_width, kernel_size=K)
    changed = (before != after).flatten(2).any(2).any(0)
    assert changed.tolist() == [False, True, False]


def test_every_head_reaches_both_embeddings():
    """Check that all heads use both embeddings; some public implementations split them between the heads."""
    q, key, v, rel_height, rel_width = tensors(shared=False)
    rel_height.requires_grad_(), rel_width.requires_grad_()
    local_attention(q, key, v, rel_height, rel_width, kernel_size=K).pow(2).sum().backward()
    assert (rel_height.grad.abs().sum((1, 2)) > 0).all() and (rel_width.grad.abs().sum((1, 2)) > 0).all()


def test_transposing_the_image_transposes_the_output():
    """Check that swapping rows and columns in the image, the embeddings, q and k transposes the output."""
    q, key, v, rel_height, rel_width = tensors()

    def turn(t):
        return t.transpose(2, 3)

    def swap(t):
        return torch.cat([t[..., D // 2 :], t[..., : D // 2]], -1)

    out = local_attention(q, key, v, rel_height, rel_width, kernel_size=K)
    turned = local_attention(turn(swap(q)), turn(swap(key)), turn(v), rel_width, rel_height, kernel_size=K)
    torch.testing.assert_close(turn(turned), out)


def test_a_zero_query_takes_the_mean_of_the_window():
    q, key, v, rel_height, rel_width = tensors()
    out = local_attention(torch.zeros_like(q), key, v, rel_height, rel_width, kernel_size=K)
    torch.testing.assert_close(out[:, :, 2, 3], v[:, :, 1:4, 2:5].mean((2, 3)))  # inside the map
    torch.testing.assert_close(out[:, :, 0, 0], v[:, :, :2, :2].mean((2, 3)))  # a corner: only existing positions


def test_content_term_agrees_with_timms_halo_attention():
    """Compare 7x7 windows with timm's HaloAttn (blocks of 1, halo of 3); it scales queries and pads with zeros."""
    halo = HaloAttn(12, num_heads=3, dim_head=4, block_size=1, halo_size=3).double().eval()
    with torch.no_grad():
        for parameter in halo.pos_embed.parameters():  # use only the content term
            parameter.zero_()
        x = torch.randn(2, 12, 5, 7, dtype=torch.float64)
        kv = halo.kv(x).unflatten(1, (3, 8))  # the keys and values of a head are adjacent
        q = halo.q(x).unflatten(1, (3, 4)) * 4**-0.5  # HaloAttn scales the query, local_attention does not
        key, value = kv.permute(0, 1, 3, 4, 2).split(4, -1)
        ours = local_attention(q.permute(0, 1, 3, 4, 2), key, value, kernel_size=7, border="zero")
        torch.testing.assert_close(ours.permute(0, 1, 4, 2, 3).flatten(1, 2), halo(x))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, backend):
    """The reference gets the same rounded inputs, so only the final rounding (at most half an ulp) may differ."""
    inputs = [t.to(dtype) for t in tensors(torch.float32)]
    embeddings = [t.float() for t in inputs[3:]]  # float32 embeddings with half-precision q, k and v
    out = local_attention(*inputs[:3], *embeddings, kernel_size=K, backend=backend)
    exact = local_attention(*(t.double() for t in inputs), kernel_size=K)
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    # half a unit of rounding plus float32 rounding errors
    torch.testing.assert_close(out.double(), exact, rtol=eps / 2 + 4e-6, atol=4e-6 if dtype == torch.float32 else 1e-6)


def test_any_strides_give_the_same_numbers_and_gradients():
    q, key, v, rel_height, rel_width = tensors()
    fused = torch.stack([q, key, v]).permute(1, 0, 3, 4, 2, 5).contiguous().requires_grad_()  # [B, 3, H, W, N, D]
    plain = [t.clone().requires_grad_() for t in (q, key, v)]
    strided = fused.permute(1, 0, 4, 2, 3, 5).unbind(0)
    out_strided = local_attention(*strided, rel_height, rel_width, kernel_size=K)
    out_plain = local_attention(*plain, rel_height, rel_width, kernel_size=K)
    assert torch.equal(out_strided, out_plain)
    weight = torch.randn_like(out_plain)
    (out_strided * weight).sum().backward()
    (out_plain * weight).sum().backward()
    for grad, t in zip(fused.grad.permute(1, 0, 4, 2, 3, 5), plain, strict=True):
        torch.testing.assert_close(grad, t.grad, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("content,shared", [(True, True), (False, False)])
def test_the_op_is_a_well_behaved_library_op(content, shared, backend):
    """Check the schema, fake tensors, autograd registration and compilation with torch.library.opcheck."""
    q, key, v, rel_height, rel_width = (t.requires_grad_() for t in tensors(torch.float32, shared=shared))
    arguments = (q, key if content else None, v, rel_height, rel_width, [K, K], [1, 1], "mask", 1.0, False, backend)
    torch.library.opcheck(torch.ops.sasa_train.local_attention.default, arguments)


@pytest.mark.parametrize("backend", ["reference", "cpu", "auto"])
def test_compiles_without_a_graph_break_and_exports(backend):
    q, key, v, rel_height, rel_width = tensors(torch.float32)

    class Attend(torch.nn.Module):
        def forward(self, q, key, v, rel_height, rel_width):
            return local_attention(q, key, v, rel_height, rel_width, kernel_size=K, backend=backend)

    expected = Attend()(q, key, v, rel_height, rel_width)
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, key, v, rel_height, rel_width), expected)
    exported = torch.export.export(Attend(), (q, key, v, rel_height, rel_width))
    torch.testing.assert_close(exported.module()(q, key, v, rel_height, rel_width), expected)


@pytest.mark.parametrize("content,relative,products", [(True, True, 3), (True, False, 2), (False, True, 2)])
def test_flops_are_the_papers(content, relative, products):
    q, key, v, rel_height, rel_width = (t.to("meta").requires_grad_() for t in tensors())
    rel = (rel_height, rel_width) if relative else (None, None)
    with FlopCounterMode(display=False) as counter:
        out = local_attention(q, key if content else None, v, *rel, kernel_size=K, content=content)
    forward = products * 2 * K * K * D * B * N * H * W
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * forward
    if content:
        with FlopCounterMode(display=False) as counter:
            local_attention_qkv(fused().to("meta").requires_grad_(), *rel, kernel_size=K).sum().backward()
        assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(
    "change,message",
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"border": "reflect"}, "border='reflect' must be one of mask, zero"),
        ({"backend": "fast"}, "backend='fast' must be one of"),
        ({"key": None}, "key=None goes with content=False"),
        ({"rel_width": None}, "rel_height and rel_width go together"),
        ({"content": False, "rel_height": None, "rel_width": None}, "leaves no score"),
        ({"value": torch.zeros(1, 2, 3, 4, 4)}, "value must match query's shape"),
        ({"rel_height": torch.zeros(5, 2)}, r"rel_height must be \[3, 2\] or \[3, 3, 2\]; got \[5, 2\]"),
        ({"query": torch.zeros(3, 4)}, r"query must be \[B, N, H, W, D\]"),
        ({"query": None}, "query must be a tensor; got NoneType"),
        ({"rel_width": torch.zeros(3, 2, dtype=torch.int64)}, "rel_width must be a dense tensor with a floating dtype"),
        ({"rel_width": torch.zeros(3, 2, device="meta")}, "rel_width must be on query's device, cpu; it is on meta"),
        ({"content": "false"}, "content='false' must be True or False"),
        *(
            ({"kernel_size": bad}, r"kernel_size=.* must be a whole number")
            for bad in ((3, 5, 7), 3.0, "3", None, True)
        ),
    ],
)
def test_refusals_name_the_argument_and_the_rule(change, message):
    names = ("query", "key", "value", "rel_height", "rel_width")
    arguments = dict(zip(names, tensors(torch.float32), strict=True)) | {"kernel_size": K} | change
    with pytest.raises(ValueError, match=message):
        local_attention(**arguments)


@pytest.mark.parametrize("bad", [(3, 5), 3.0, "3", None, True], ids=str)
def test_layers_and_weights_refuse_what_is_no_whole_number(bad):
    q, key, _, *rel = tensors()
    with pytest.raises(ValueError, match="kernel_size=.* must be a whole number"):
        attend_weights(q, key, *rel, kernel_size=(bad, bad))
    for name in ("kernel_size", "num_heads", "stride")[isinstance(bad, tuple) :]:  # a pair is a window's size
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            LocalSelfAttention2d(8, 8, **{"num_heads": 2, name: bad})
    for name in ("num_heads", "num_mixtures", "out_channels"):
        with pytest.raises(ValueError, match=f"{name}=.* must be a whole number"):
            AttentionStem(**{"in_channels": 3, "out_channels": 8, name: bad})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("empty", range(1, 6))
def test_empty_inputs_have_empty_outputs(empty, stride, backend):
    """A width of 0 ended the process with a floating point exception."""
    shape = [3, 2, 2, 4, 5, 4]
    shape[empty] = 0
    projections = torch.zeros(shape, requires_grad=True)
    rel = [torch.ones(3, shape[5] // 2, requires_grad=True) for _ in range(2)]
    local_attention_qkv(projections, *rel, kernel_size=3, stride=stride, backend=backend).sum().backward()
    assert projections.grad.numel() == 0 and not any(x.grad.any() for x in rel)


def fused(content=True, dtype=torch.float32) -> Tensor:
    """Return a tensor [3 or 2, B, N, H, W, D] laid out as a channels_last projection, [B, H, W, 3 or 2, N, D]."""
    q, key, v, *_ = tensors(dtype)
    stacked = torch.stack([q, key, v] if content else [q, v])
    return stacked.permute(1, 3, 4, 0, 2, 5).contiguous().permute(3, 0, 4, 1, 2, 5)


@pytest.mark.parametrize(
    "backend,dtype", [("reference", torch.float64), ("cpu", torch.float32), ("cpu", torch.float16)]
)
@pytest.mark.parametrize("content,relative", [(True, True), (False, True), (True, False)])
def test_fused_projections_give_the_same_and_one_gradient(content, relative, backend, dtype):
    """The gradient must have the projection's strides; otherwise, it is copied, which takes longer than attention."""
    rel = [t.requires_grad_() for t in tensors(dtype)[3:]] if relative else [None, None]
    projections = fused(content, dtype).requires_grad_()
    options = {"kernel_size": K, "content": content, "backend": backend}
    out = local_attention_qkv(projections, *rel, **options)
    q, *key, v = projections.unbind(0)
    expected = local_attention(q, key[0] if content else None, v, *rel, **options)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    weight = torch.randn_like(out)
    leaves = [x for x in (projections, *rel) if x is not None]
    ours, theirs = (torch.autograd.grad((x * weight).sum(), leaves) for x in (out, expected))
    assert ours[0].stride() == projections.stride()
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("content,stride", [(True, 1), (True, 2), (False, 1)])
def test_the_fused_op_is_a_well_behaved_library_op(content, stride, backend):
    rel = [t.requires_grad_() for t in tensors(torch.float32)[3:]]
    arguments = (fused(content).requires_grad_(), *rel, [K, K], [1, 1], "mask", 1.0, False, stride, backend)
    torch.library.opcheck(torch.ops.sasa_train.local_attention_qkv.default, arguments)


def test_fused_projections_must_be_three():
    with pytest.raises(ValueError, match=r"projections must be \[3, B, N, H, W, D\] with content=True; got \[2, "):
        local_attention_qkv(fused(content=False), kernel_size=K)


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 4), (3, 1)])
def test_stride_is_the_average_pool_of_the_output(size):
    """If a side has an odd length, the last average covers only existing positions."""
    projections = torch.randn(3, 2, 3, *size, 4, dtype=torch.float64, requires_grad=True)
    out = local_attention_qkv(projections, kernel_size=3, stride=2, backend="reference")
    whole = local_attention_qkv(projections, kernel_size=3, backend="reference")
    pooled = torch.nn.AvgPool2d(2, ceil_mode=True)(whole.permute(0, 1, 4, 2, 3).flatten(1, 2))
    pooled = pooled.unflatten(1, (3, 4)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(out, pooled)
    grad_output = torch.randn_like(out)
    ours, expected = (torch.autograd.grad(x, projections, grad_output) for x in (out, pooled))
    torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="stride=3 must be 1 or 2"):
        local_attention_qkv(projections, kernel_size=3, stride=3)


@pytest.mark.parametrize(
    "device,hip,reason",
    [("mps", None, "there is no compiled kernel for mps"), ("cuda", "7.2", "the kernels are for NVIDIA GPUs")],
)
def test_apples_and_amds_gpus_run_the_reference_and_this_is_said_once(device, hip, reason, monkeypatch, caplog):
    """ROCm calls its devices cuda. No such device is needed here, because nothing is computed."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    dispatch._say_once.cache_clear()
    x = SimpleNamespace(device=torch.device(device), dtype=torch.float32, shape=(1, 1, 3, 3, 2))
    inputs, window = Inputs(x, x, x, None, None), Window(3, 3, "mask")
    with caplog.at_level(logging.INFO):
        assert [dispatch._resolve("auto", inputs, window) for _ in range(2)] == [reference] * 2
    (record,) = caplog.records
    assert "runs the reference" in record.message and reason in record.message
    assert dispatch.describe_backend("auto", inputs, window) == f"reference, because {reason}"
    for backend in ("cpu", "triton"):
        with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run: the"):
            dispatch._resolve(backend, inputs, window)


def test_the_backward_pass_makes_no_zeros_for_the_outputs_that_nothing_differentiates():
    """PyTorch filled a tensor with zeros for the softmax's statistics, which took 1 % of a training step."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.append(str(function))
            return function(*arguments, **(options or {}))

    projections = fused(True).requires_grad_()
    out = local_attention_qkv(projections, kernel_size=K, backend="reference")
    with Recorder():
        torch.autograd.grad(out, projections, torch.ones_like(out))
    assert any("local_attention_qkv_backward" in name for name in called)
    assert not [name for name in called if "zeros" in name or "fill" in name], called
