"""Compare the attention stem's compiled kernel, with batch norm and max pool, with the float64 PyTorch module."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from attention_cases import assert_threads_change_no_bit, run_narrower
from marking import slow_but_for
from stem_cases import TOLERANCE, assert_exact, build, run
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sasa_train.attention import cpu, stem
from sasa_train.models import AttentionStem, ResNet
from sasa_train.training.step import frozen_running_stats


def needs_compiler() -> str | None:
    return cpu.why_not_built("attention_stem", 3)


pytestmark = pytest.mark.skipif(needs_compiler() is not None, reason=f"no compiled kernel: {needs_compiler()}")


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("keys", [{}, {"values": "plain"}, {"relative": False}, {"num_mixtures": 3}], ids=str)
def test_outputs_gradients_and_statistics(keys, pool):
    """Cases include fewer blocks than lanes, partial groups, groups that span images, and heads of 2 to 32 channels."""
    torch.manual_seed(0)
    for batch, in_channels, channels, num_heads, height, width in [
        (1, 1, 8, 2, 4, 4),
        (2, 3, 16, 4, 12, 20),
        (3, 3, 64, 4, 36, 28),
        (5, 4, 24, 3, 8, 40),
        (4, 3, 64, 2, 4, 52),
        (2, 3, 64, 8, 16, 16),
        (2, 3, 20, 2, 12, 12),
        (1, 3, 16, 8, 28, 4),
    ]:
        module = build(in_channels, channels, num_heads=num_heads, pool=pool, **keys)
        for layout in (torch.contiguous_format, torch.channels_last):
            for is_training in (True, False):
                x = torch.randn(batch, in_channels, height, width).contiguous(memory_format=layout)
                assert_exact(module.train(is_training), x)


@pytest.mark.parametrize("pool", [True, False])
def test_runs_of_many_groups(pool):
    """The work is split into several runs of groups, the last of which is incomplete."""
    torch.manual_seed(0)
    assert_exact(build(pool=pool, num_heads=4), torch.randn(3, 3, 148, 92))


@pytest.mark.parametrize("pool", [True, False])
def test_any_strides(pool):
    torch.manual_seed(0)
    module, x = build(pool=pool), torch.randn(2, 16, 24, 6)
    for view in (x[:, :, ::2, 1:4].permute(0, 3, 1, 2), x.permute(0, 3, 2, 1)[:, 3:], x[:, :3, :, :4].flip(2)):
        assert_exact(module, view)
    assert_exact(module, torch.randn(1, 1, 8, 12).expand(2, 3, 8, 12))
    out = torch.randn(2, 16, *((2, 3) if pool else (8, 12)))
    module(x[:, :3, :8, :4].repeat(1, 1, 1, 3)).backward(out[:, :, :1, :1].expand_as(out))  # a gradient with stride 0


@pytest.mark.parametrize("pool", [True, False])
def test_what_scratch_held_before_does_not_matter(pool):
    torch.manual_seed(0)
    module, x = build(pool=pool), torch.randn(2, 3, 12, 20)
    run(module, x)
    cpu._kept.scratch.fill_(255)
    assert_exact(module, x)


def op_arguments(module: AttentionStem, x: Tensor) -> tuple:
    w_v = module.value.weight.flatten(1).unflatten(1, (-1, x.shape[1]))
    mixture = module.mixture_weights() if module.values == "mixture" else torch.ones(1, 4, 4)
    weights = (module.qk.weight.flatten(1), w_v, mixture, module.rel_height, module.rel_width)
    return (x, *(None if w is None else w.detach().requires_grad_() for w in weights), module.num_heads)


def test_picks_what_torchs_max_pool_picks():
    """Check that the first of equal values is picked; all 16 in a window are equal if the sign or the image is 0."""
    torch.manual_seed(0)
    module, x = build(num_heads=4), torch.randn(3, 3, 12, 20)
    x[1, :, 4:8] = 0
    sign = torch.tensor([1.0, -1, 0, 1] * 4)
    arguments = op_arguments(module, x)
    full = stem.attention_stem(*arguments).detach()
    picked, places, mean, variance = torch.ops.sasa_train.attention_stem_pooled(*arguments, sign)
    _, index = functional.max_pool2d(full * sign[:, None, None], 4, return_indices=True)
    expected = full.flatten(2).gather(2, index.flatten(2)).view_as(index)
    assert torch.equal(picked, expected)
    inside = index // 20 % 4 * 4 + index % 20 % 4
    assert torch.equal(places.view(16, 3, 3, 5).transpose(0, 1), inside.byte())
    channels = full.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), channels.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(variance.double(), channels.var(1, unbiased=False), rtol=1e-5, atol=0)


def test_variance_far_from_zero():
    """Values near 1,000 differ by only 1; summing their squares would leave one correct digit in the variance."""
    torch.manual_seed(0)
    module = build(values="plain", relative=False)
    x = torch.randn(2, 3, 32, 32) * 1e-3 + 1
    _, w_qk, w_v, *rest = op_arguments(module, x)
    arguments = (x, w_qk, w_v.detach() * 1e3, *rest)
    full = stem.attention_stem(*arguments).double().transpose(0, 1).flatten(1)
    _, mean, variance = stem.attention_stem_pooled(*arguments, torch.ones(16))
    torch.testing.assert_close(mean.double(), full.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), full.var(1, unbiased=False), rtol=1e-4, atol=0)


@pytest.mark.parametrize("pool", [True, False])
def test_the_number_of_threads_changes_no_bit(pool):
    """Only our ops are checked, because PyTorch's own sums before and after them depend on the number of threads."""
    torch.manual_seed(0)
    arguments = op_arguments(build(), torch.randn(3, 3, 148, 92).requires_grad_())
    inputs = [t for t in arguments if isinstance(t, Tensor)]

    def results() -> list[Tensor]:
        pooled = stem.attention_stem_pooled(*arguments, torch.ones(16)) if pool else ()
        outputs = pooled or (stem.attention_stem(*arguments),)
        grads = [torch.linspace(-1, 1, out.numel()).view_as(out) for out in outputs]
        return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]

    assert_threads_change_no_bit(results, (1, 2, 3, 4, 5))


@pytest.mark.parametrize("momentum", [0.1, 1.0, None, 0.0])
def test_running_statistics_move_as_batch_norms_do(momentum):
    torch.manual_seed(0)
    module = build()
    module.bn.momentum = momentum
    other = copy.deepcopy(module)
    other.backend = "reference"
    start = copy.deepcopy(module.bn.state_dict())
    for _ in range(3):
        x = torch.randn(2, 3, 8, 12)
        module(x)
        other(x)
    for name, value in module.bn.state_dict().items():
        torch.testing.assert_close(value, other.bn.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert momentum != 0.0 or "running" not in name or torch.equal(value, start[name])


def test_gradient_checkpointing_computes_it_again_unchanged():
    torch.manual_seed(0)
    module, x = build(), torch.randn(2, 3, 8, 12)
    again, plain = copy.deepcopy(module), run(module, x)
    forward = again.forward
    contexts = lambda: (nullcontext(), frozen_running_stats(again))  # noqa: E731
    again.forward = lambda x: checkpoint(forward, x, use_reentrant=False, context_fn=contexts)
    recomputed = run(again, x)
    assert all(torch.equal(value, recomputed[name]) for name, value in plain.items())


@pytest.mark.parametrize("relative", [True, False])
def test_the_ops_keep_torchs_rules(relative):
    torch.manual_seed(0)
    module = build(relative=relative)
    x = torch.randn(2, 3, 8, 12).contiguous(memory_format=torch.channels_last)
    arguments = op_arguments(module, x.requires_grad_())
    torch.library.opcheck(torch.ops.sasa_train.attention_stem, arguments)
    torch.library.opcheck(torch.ops.sasa_train.attention_stem_pooled, (*arguments, torch.ones(16)))


@pytest.mark.parametrize("pool", [True, False])
def test_compiles_and_exports_as_one_graph(pool):
    torch.manual_seed(0)
    module, x = build(pool=pool), torch.randn(2, 3, 8, 12)
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, backend="aot_eager")
    ours, theirs = run(compiled, x), run(copy.deepcopy(module), x)
    for name, value in theirs.items():  # the kernels are the same, but torch may sum in another order
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(module.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), module(x))
    graphs = [str(m.graph) for m in exported.modules() if isinstance(m, torch.fx.GraphModule)]
    assert any("sasa_train.attention_stem" in graph for graph in graphs)


@pytest.mark.parametrize("pool", [True, False])
def test_under_autocast_the_result_alone_is_rounded(pool):
    torch.manual_seed(0)
    module, x = build(pool=pool).eval(), torch.randn(2, 3, 8, 12)
    for image in (x, x.bfloat16()):
        exact = module(image.float())
        with torch.autocast("cpu", torch.bfloat16):
            out = module(image)
        assert out.dtype == torch.bfloat16
        # each value is rounded by at most 2^-8 of itself, in the result and in the map before batch norm
        torch.testing.assert_close(out.float(), exact, rtol=2**-6, atol=2**-5)
        out.sum().backward()


@pytest.mark.parametrize("pool", [True, False])
def test_a_nan_is_not_swallowed(pool):
    module = build(pool=pool).eval()
    x = torch.randn(2, 3, 12, 20)
    x[1, 2, 5, 9] = float("nan")
    reached = module(x).isnan()
    expected = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    expected[1, 0, 1, 2] = True
    if not pool:
        expected = expected.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(reached, expected.expand_as(reached))


def test_huge_scores_stay_finite():
    torch.manual_seed(0)
    results = run(build(), 300 * torch.randn(2, 3, 8, 12))
    assert all(value.isfinite().all() for value in results.values())


def test_who_listens_to_batch_norm_hears_the_whole_map():
    module, x, shapes = build(), torch.randn(2, 3, 8, 12), []
    expected = module.eval()(x)
    module.bn.register_forward_hook(lambda m, inputs, output: shapes.append(tuple(output.shape)))
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)
    assert shapes == [(2, 16, 8, 12)]


@pytest.mark.parametrize("keys", [{}, {"values": "plain"}, {"relative": False}, {"pool": False}], ids=str)
def test_flops_are_those_of_the_definition(keys):
    counts = []
    for backend in ("cpu", "reference"):
        module = build(backend=backend, **keys)
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(2, 3, 8, 12))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("keys", [{}, {"pool": False}, {"relative": False, "values": "plain"}], ids=str)
def test_the_ops_have_every_derivative_of_pytorchs_stem(keys):
    """Forward mode once returned a tangent of 0 in silence, and all but first gradients were refused."""
    torch.manual_seed(0)
    module, x = build(**keys).eval(), torch.randn(2, 3, 4, 8)
    weights = dict(module.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(module, weights, (x,)).pow(2).sum()

    def derivatives():
        first = torch.autograd.grad(loss(weights, x), [*weights.values()], create_graph=True)
        second = torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), [*weights.values()])
        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x[:, None]).values()
        of_image = torch.autograd.functional.vhp(lambda x: loss(weights, x), x, x)
        return [*first, *second, *per_sample, *of_image, *torch.func.jvp(module, (x,), (x,))]

    module.backend = "cpu"
    ours = derivatives()
    module.backend = "reference"
    for mine, exact in zip(ours, derivatives(), strict=True):  # both in float32, as in `TOLERANCE`, twice
        torch.testing.assert_close(mine, exact, rtol=0, atol=2 * TOLERANCE * float(exact.detach().abs().max()))


def test_an_image_with_other_channels_is_refused():
    """The kernel read past the image's channels in silence."""
    shapes = ((1, 4, 8, 8), (3, 8, 8), (1, 3, 0, 8))
    for image in (*map(torch.zeros, shapes), torch.zeros(1, 3, 8, 8).long()):
        with pytest.raises(ValueError, match=r"x must be a floating tensor \[B, 3, H, W\] with sides of at least 1"):
            build()(image)


def test_backends():
    """A backend requested by name runs or raises an error; auto falls back to PyTorch if the kernel cannot run."""
    x = torch.randn(1, 3, 4, 4)
    for module, image, message in [
        (build().double(), x.double(), "the weights are torch.float64"),
        (build(values="conv"), x, "it takes values=mixture or plain"),
        (build(in_channels=9), torch.randn(1, 9, 4, 4), "in_channels=9 is above 8"),
    ]:
        with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: .*{message}"):
            module(image)
        module.backend = "auto"
        assert module(image).shape == (1, 16, 1, 1)
    with pytest.raises(ValueError, match="backend='gpu' must be one of"):
        AttentionStem(3, 16, backend="gpu")
    for name in ("attention", "attention_small", "attention_plain"):
        assert ResNet(26, stem=name, width=0.25, num_heads=2, backend="reference").stem.backend == "reference"


@pytest.mark.parametrize("capability", slow_but_for(["avx2"], ["avx2", "default"]))
def test_narrower_instruction_sets(capability):
    run_narrower(
        capability,
        "import torch\n"
        "from stem_cases import assert_exact, build\n"
        "torch.manual_seed(0)\n"
        "for pool in (True, False):\n"
        "    for channels, num_heads in ((16, 4), (64, 4), (12, 3), (16, 2)):\n"
        "        assert_exact(build(3, channels, num_heads=num_heads, pool=pool), torch.randn(3, 3, 12, 20))\n",
    )


def test_without_a_compiler_auto_says_so_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SASA_TRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    cpu._library.cache_clear()
    stem._say_once.cache_clear()
    module, x = build(backend="auto"), torch.randn(1, 3, 4, 4)
    with caplog.at_level(logging.WARNING):
        assert module(x).shape == module(x).shape == (1, 16, 1, 1)
    (message,) = [record.message for record in caplog.records]
    assert message.startswith("attention stem: backend=auto runs PyTorch") and "false could not build it" in message
    module.backend = "cpu"
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run: false could not build it"):
        module(x)
    cpu._library.cache_clear()
    stem._say_once.cache_clear()
