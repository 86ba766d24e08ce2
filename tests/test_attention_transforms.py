"""Every way in which PyTorch differentiates, batches and compiles `local_attention`, on each backend."""

import itertools
from functools import partial

import pytest
import torch
from attention_oracle import random_case
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sasa_train.attention import attention_weights, cpu, local_attention, local_attention_qkv

needs_kernel = pytest.mark.skipif(cpu.why_not_built("local_attention", 3) is not None, reason="no C++ compiler")
K = 3


def tensors(dtype=torch.float64, batch=2, shape=(2, 3, 5), seed=0):
    """Return query, key, value and embeddings: two heads of 4 channels, of maps of 3 x 5."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, *shape, 4)] * 3 + [(K, 2), (shape[0], K, 2)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in shapes]


def attend(*inputs, backend, **options):
    return local_attention(*inputs, kernel_size=K, backend=backend, **options)


def summed(*inputs, **options):
    return attend(*inputs, **options).pow(2).sum()


# ---- derivatives


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("border", ["mask", "zero", "shift"])
def test_derivatives_of_every_kind_match_finite_differences(border):
    """First and second derivatives, in reverse and forward mode and each over the other, and batches of gradients."""
    fixed = {"kernel_size": (3, 1), "dilation": (1, 2 if border == "mask" else 1), "border": border, "scale": 0.5}
    inputs, options = next(
        (inputs, options)
        for inputs, options in (random_case(seed, **fixed) for seed in itertools.count())
        if inputs[1] is not None and inputs[3] is not None and sum(x.numel() for x in inputs) < 90
    )
    given = [x.requires_grad_() for x in inputs]

    def run(*x):
        return local_attention(*x, backend="reference", **options)

    fast = {"check_batched_grad": border == "shift", "fast_mode": True}
    assert torch.autograd.gradcheck(run, given, check_forward_ad=True, check_batched_forward_grad=True, **fast)
    assert torch.autograd.gradgradcheck(run, given, check_fwd_over_rev=True, **fast)


def second_derivative(*inputs, **options):
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(summed(*leaves, **options), leaves, create_graph=True)
    return first, torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves)


def third_derivative(*inputs, **options):
    q = inputs[0].clone().requires_grad_()
    grad = attend(q, *inputs[1:], **options)
    for _ in range(3):
        (grad,) = torch.autograd.grad(grad.pow(2).sum(), q, create_graph=True)
    return grad.detach()


def shared_query_and_key(*inputs, **options):
    """One tensor that is query, key and value has the sum of three gradients."""
    x = inputs[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(summed(x, x, x, *inputs[3:], **options), x, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), x)


def with_dual_tensors(*inputs, **options):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(summed(*(forward_ad.make_dual(x, x) for x in inputs), **options)).tangent


def over_a_gradient(transform, *inputs, **options):
    """Transform a function of the output's gradient alone, whose graph is older than the transform."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = attend(*leaves, **options)
    ones = torch.ones_like(out)

    def run(grad_output, create_graph=False):
        return torch.autograd.grad(out, leaves, grad_output, retain_graph=True, create_graph=create_graph)

    if transform == "jvp":
        return torch.func.jvp(run, (ones,), (2 * ones,))
    if transform == "vmap":
        return torch.func.vmap(run)(torch.stack([ones, 2 * ones]))
    return torch.func.grad(lambda x: sum(grad.pow(2).sum() for grad in run(x, create_graph=True)))(ones)


def jvp(*inputs, **options):
    return torch.func.jvp(partial(summed, **options), tuple(inputs), tuple(2 * x for x in inputs))


def per_sample(*inputs, **options):
    """Return the gradient of each image, also of the embeddings, which the images share."""
    grad = torch.func.grad(partial(summed, **options), argnums=(0, 1, 2, 3, 4))
    return torch.func.vmap(grad, in_dims=(0, 0, 0, None, None))(*(x.unsqueeze(1) for x in inputs[:3]), *inputs[3:])


def jacobian(strategy, *inputs, **options):
    run = partial(attend, **options)
    return torch.autograd.functional.jacobian(run, tuple(inputs), vectorize=True, strategy=strategy)


TRANSFORMS = {
    "second": second_derivative,
    "third": third_derivative,
    "shared": shared_query_and_key,
    "dual": with_dual_tensors,
    "jvp": jvp,
    "linearize": lambda *x, **o: torch.func.linearize(partial(summed, **o), *x)[1](*x),
    "vjp": lambda *x, **o: torch.func.vjp(partial(attend, **o), *x)[1](torch.ones_like(x[2])),
    "jacrev": lambda *x, **o: torch.func.jacrev(partial(attend, **o), argnums=(3, 4))(*x),
    "jacfwd": lambda *x, **o: torch.func.jacfwd(partial(attend, **o), argnums=3)(*x),
    "hessian": lambda *x, **o: torch.func.hessian(partial(summed, **o), argnums=(3, 4))(*x),
    "reverse over reverse": lambda *x, **o: torch.func.jacrev(torch.func.grad(partial(summed, **o), 3), 4)(*x),
    "per sample": per_sample,
    "reverse mode": partial(jacobian, "reverse-mode"),
    "forward mode": partial(jacobian, "forward-mode"),
    "jvp of a gradient": partial(over_a_gradient, "jvp"),
    "vmap of a gradient": partial(over_a_gradient, "vmap"),
    "grad of a gradient": partial(over_a_gradient, "grad"),
    "compiled jvp": lambda *x, **o: torch.compile(partial(jvp, **o), backend="eager", fullgraph=True)(*x),
    "compiled grad": lambda *x, **o: torch.compile(
        torch.func.grad(partial(summed, **o)), backend="aot_eager", fullgraph=True
    )(*x),
}


# Triton's interpreter takes a while, and other transforms have no part that depends on the backend.
WITH_KERNELS = ("second", "jvp", "per sample", "vmap of a gradient")
CASES = [
    *(pytest.param("cpu", name, marks=needs_kernel) for name in TRANSFORMS),
    *(("triton", name) for name in WITH_KERNELS),
]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Attempted to insert:UserWarning")
@pytest.mark.parametrize("backend,transform", CASES)
def test_a_transform_in_float32_is_that_of_the_reference(backend, transform):
    """In forward mode the op once returned a tangent of 0 in silence; others failed in PyTorch's internal words.

    A derivative sums terms that may cancel, each with float32's error of 1e-6 or so, so the tolerance is relative to
    the largest number; a third derivative is a product of ten such terms.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    run = TRANSFORMS[transform]
    ours = tree_leaves(run(*tensors(torch.float32), backend=backend))
    exact = tree_leaves(run(*(x.double() for x in tensors(torch.float32)), backend="reference"))
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == torch.float32 and y.any()
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-5 * float(y.detach().abs().max()))


@pytest.mark.parametrize("stride,content", [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_projections_and_their_pool_have_these_derivatives_too(stride, content, backend):
    q, key, value, *rel = tensors(torch.float32)
    projections = torch.stack([q, key, value] if content else [q, value])

    def loss(*x, **options):
        options = {"kernel_size": K, "content": content, "stride": stride, "dilation": (1, 2)} | options
        return local_attention_qkv(*x, **options).pow(2).sum()

    def both(*x, **options):
        run = partial(loss, **options)
        tangents = torch.func.jvp(torch.func.grad(run, argnums=(0, 1, 2)), x, x)
        leaves = [y.clone().requires_grad_() for y in x]
        first = torch.autograd.grad(run(*leaves), leaves, create_graph=True)
        return tree_leaves([tangents, torch.autograd.grad(sum(y.pow(2).sum() for y in first), leaves)])

    ours = both(projections, *rel, backend=backend)
    for x, y in zip(ours, both(*(x.double() for x in (projections, *rel)), backend="reference"), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-5 * float(y.detach().abs().max()))


def test_nothing_has_derivatives_of_nothing():
    x = torch.zeros(2, 2, 0, 5, 4, requires_grad=True)
    rel = [torch.ones(K, 2, requires_grad=True) for _ in range(2)]
    first = torch.autograd.grad(summed(x, x, x, *rel, backend="reference"), rel, create_graph=True)
    assert not any(grad.any() for grad in first)
    _, tangent = torch.func.jvp(lambda y: summed(y, y, y, *rel, backend="reference"), (x,), (x,))
    assert tangent == 0


# ---- batches


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
@pytest.mark.parametrize("batched", [(0, 1, 2), (0,), (1, 2), (3,), (0, 1, 2, 3, 4)], ids=str)
def test_vmap_equals_a_loop(batched, backend):
    """The samples become one batch, unless they differ in their embeddings; dimension 1 is of the samples."""
    inputs = tensors(torch.float32)
    inputs = [torch.stack([x, x.flip(0), x + 1], 1) if i in batched else x for i, x in enumerate(inputs)]
    given = [x.requires_grad_() for x in inputs]
    in_dims = [1 if i in batched else None for i in range(5)]
    out = torch.func.vmap(partial(attend, backend=backend), in_dims=tuple(in_dims), out_dims=2)(*given)
    samples = [[x.select(1, i) if j in batched else x for j, x in enumerate(given)] for i in range(3)]
    expected = torch.stack([attend(*x, backend=backend) for x in samples], 2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(out)
    for x, y in zip(*(torch.autograd.grad(z, given, weights) for z in (out, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_vmap_of_projections_equals_a_loop_and_of_nothing_is_refused():
    projections = torch.randn(4, 3, 2, 2, 5, 3, 4)
    run = partial(local_attention_qkv, kernel_size=K, stride=2)
    torch.testing.assert_close(torch.func.vmap(run)(projections), torch.stack([run(x) for x in projections]))
    with pytest.raises(ValueError, match=r"torch.vmap over 0 samples; give at least one"):
        torch.func.vmap(run)(projections[:0])


def test_gradients_per_sample_equal_those_of_a_loop():
    inputs = tensors(torch.float64, batch=3)
    ours = per_sample(*inputs, backend="reference")
    for i in range(3):
        leaves = [x.clone().requires_grad_() for x in (*(x[i : i + 1] for x in inputs[:3]), *inputs[3:])]
        for x, y in zip(ours, torch.autograd.grad(summed(*leaves, backend="reference"), leaves), strict=True):
            torch.testing.assert_close(x[i], y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_a_constant_inside_a_transform_is_a_constant(backend):
    constant = summed(*tensors(torch.float32), backend=backend)
    _, tangent = torch.func.jvp(
        lambda x: x * summed(*tensors(torch.float32), backend=backend), (torch.ones(()),), (torch.ones(()),)
    )
    assert torch.equal(tangent, constant)


# ---- which code runs


def test_only_other_derivatives_leave_the_kernels(monkeypatch):
    """The composition of all K*K places would make each training step many times slower."""
    from sasa_train.attention import dispatch

    calls, compose = [], dispatch._reference_output
    monkeypatch.setattr(dispatch, "_reference_output", lambda *x: calls.append(1) or compose(*x))
    leaves = [x.requires_grad_() for x in tensors(torch.float32)]
    run = partial(summed, backend="auto" if cpu.why_not_built("local_attention", K) is None else "triton")
    torch.autograd.grad(run(*leaves), leaves)
    for use_reentrant in (True, False):
        checkpoint(run, *leaves, use_reentrant=use_reentrant).backward()
    torch.func.vmap(run, in_dims=(0, 0, 0, None, None))(*(x[None] for x in leaves[:3]), *leaves[3:]).sum().backward()
    torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves).backward()
    assert not calls
    torch.autograd.grad(run(*leaves), leaves, create_graph=True)
    assert len(calls) == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_checkpointing_changes_no_bit(backend, use_reentrant):
    leaves = [x.requires_grad_() for x in tensors(torch.float32)]
    run = partial(summed, backend=backend)
    whole = torch.autograd.grad(run(*leaves), leaves)
    checkpoint(run, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, whole, strict=True))


def test_autocast_leaves_derivatives_in_float32():
    """The products of the composition would be in bfloat16."""
    inputs = tuple(tensors(torch.float32))
    run = partial(attend, backend="auto")
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.func.jvp(run, inputs, inputs)
    assert all(torch.equal(x, y) for x, y in zip(ours, torch.func.jvp(run, inputs, inputs), strict=True))


def test_tensors_without_numbers_have_second_derivatives():
    first, second = second_derivative(*(x.to("meta") for x in tensors()), backend="auto")
    shapes = [x.shape for x in tensors()]
    assert [x.shape for x in first] == [x.shape for x in second] == shapes


# ---- compilation


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_kernel), "reference"])
def test_one_program_takes_every_batch_and_size(backend):
    """It is compiled at its first call alone, for training too, and its gradients are those of eager mode."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    count, num_programs = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(partial(attend, backend=backend), fullgraph=True, dynamic=True, backend=count)
    for batch, *shape in ((5, 2, 7, 11), (6, 2, 9, 8), (7, 2, 10, 5)):
        leaves = [x.requires_grad_() for x in tensors(torch.float32, batch, tuple(shape))]
        results = [run(*leaves) for run in (compiled, partial(attend, backend=backend))]
        grads = [torch.autograd.grad(out.pow(2).sum(), leaves) for out in results]
        assert torch.equal(*results) and all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
        num_programs.append(count.frame_count)
    assert len(set(num_programs)) == 1


def test_an_exported_program_takes_every_batch_and_size():
    class Attend(torch.nn.Module):
        def forward(self, q, key, value, rel_height, rel_width):
            return attend(q, key, value, rel_height, rel_width, backend="auto")

    free = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    shapes = (free, free, free, None, None)
    program = torch.export.export(Attend(), tuple(tensors(torch.float32)), dynamic_shapes=shapes).module()
    for inputs in (tensors(torch.float32), tensors(torch.float32, 5, (2, 8, 6))):
        assert torch.equal(program(*inputs), Attend()(*inputs))


def test_pytorch_refuses_second_derivatives_of_a_compiled_program():
    leaves = [x.requires_grad_() for x in tensors(torch.float32)]
    loss = torch.compile(partial(summed, backend="reference"), backend="aot_eager")(*leaves)
    with pytest.raises(RuntimeError, match="create_graph=False|does not currently support double backward"):
        torch.autograd.grad(torch.autograd.grad(loss, leaves, create_graph=True)[0].sum(), leaves)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Attempted to insert:UserWarning")
def test_the_weights_have_every_derivative():
    """Compare tangents and second derivatives with finite differences in float64."""
    inputs = tuple(tensors())
    with_key = inputs[:2] + inputs[3:]

    def loss(*x):
        return attention_weights(*x, kernel_size=K).pow(2).sum()

    given = [x.clone().requires_grad_() for x in with_key]
    assert torch.autograd.gradcheck(loss, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, given, check_fwd_over_rev=True, fast_mode=True)
    linear = torch.func.linearize(loss, *with_key)[1](*with_key)
    torch.testing.assert_close(linear, torch.func.jvp(loss, with_key, with_key)[1])
