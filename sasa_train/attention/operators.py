"""Register a differentiable torch.library op with its backward op, fake implementations, autograd and FLOP counts.

Absent optional tensors are passed as None. An op cannot return None, so a backward op returns gradients only for the
tensors that are not None.

The ops have compiled kernels for the forward pass and for first gradients by torch.autograd. Wherever PyTorch
differentiates them in another way (forward mode, torch.func, gradients of gradients), they are computed by their
*composition* instead: the same function in PyTorch operations, which PyTorch can differentiate in every way.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._functorch.eager_transforms import enable_inplace_requires_grad
from torch._library.autograd import make_autograd_impl
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("sasa_train", "FRAGMENT")
_WITHOUT_AUTOCAST = ("meta", "lazy", "vulkan")  # `torch.compile` of PyTorch 2.11 cannot call is_autocast_available


def define_operator(
    name: str,
    tensors: str,
    options: str,
    outputs: str,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., list[Tensor]],
    backward_inputs: str,
    flops: Callable[..., int],
    composition: Callable[..., Any],
    batch_dims: Sequence[int | None] = (),
    grads: tuple[int, ...] = (0,),
    kept: tuple[int, ...] = (),
    keeps_output: Callable[..., bool] = lambda output, *options: True,
    skips_first: bool = False,
    device_types: str | None = None,
) -> Callable[..., Any]:
    """Register `sasa_train::{name}` and `sasa_train::{name}_backward`; return the first.

    Args:
        tensors, options: arguments in torch's schema language; gradients are computed for `tensors` only.
        outputs: those of `forward`. The backward op receives, under the names in `backward_inputs`, the gradients of
            those listed in `grads`, then those listed in `kept`, followed by `tensors` and `options`.
        keeps_output: whether the first output, if listed in `kept`, is needed with these options; if not, it is None.
        skips_first: whether the backward op has a last argument `needs_x`, and omits the first gradient if it is false.
        flops: counts the FLOPs of a forward pass from the same arguments, with shapes for tensors.
        composition: computes what `forward` does with operations of PyTorch, none in place.
        batch_dims: the batch dimension of each of `tensors` (None: shared by a batch); by default, torch.vmap loops.
    """
    num_before, num_tensors, _ = sizes = len(grads + kept), tensors.count(",") + 1, options.count(",") + 1
    schemas = {
        name: f"({tensors}, {options}) -> {outputs}",
        f"{name}_backward": f"({backward_inputs}, {tensors}, {options}{', bool needs_x' * skips_first}) -> Tensor[]",
    }
    op, backward_op = (
        torch.library.custom_op(f"sasa_train::{each}", run, mutates_args=(), schema=schema, device_types=device_types)
        for (each, schema), run in zip(schemas.items(), (forward, backward), strict=True)
    )
    op.register_fake(fake)
    backward_op.register_fake(_fake_gradients(num_before, num_tensors, skips_first))

    def setup_context(ctx, inputs, output):
        found, ctx.options = output if isinstance(output, tuple) else (output,), inputs[num_tensors:]
        ctx.set_materialize_grads(len(grads) > 1)  # no zeros for the outputs that nothing differentiates
        outputs = (found[i] if i or keeps_output(found[0], *ctx.options) else None for i in kept)
        ctx.save_for_backward(*outputs, *inputs[:num_tensors])

    run_backward = functools.partial(_run_backward, backward_op, grads, len(kept), sizes, skips_first)
    op.register_autograd(run_backward, setup_context=setup_context)
    gradients = functools.partial(_differentiate, composition, grads, sizes, skips_first)
    _complete(name, op, backward_op, composition, gradients, batch_dims)
    _register_flops(name, flops, num_before)
    return functools.partial(_call, op)


def _run_backward(
    backward_op: Callable[..., list[Tensor]], grads: Sequence[int], num_kept: int, sizes: tuple[int, int, int],
    skips_first: bool, ctx: Any, *grad_outputs: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of an op's tensors and options by its backward op; `sizes`: see `_differentiate`."""
    _, num_tensors, num_options = sizes
    if grad_outputs[grads[0]] is None:
        return (None,) * (num_tensors + num_options)
    saved, needs_first = ctx.saved_tensors, ctx.needs_input_grad[0] or not skips_first
    arguments = (*(grad_outputs[i] for i in grads), *saved, *ctx.options, *[needs_first] * skips_first)
    present = iter(backward_op(*arguments))
    has_grad = (needs_first, *(x is not None for x in saved[num_kept + 1 :]))
    return (*(next(present) if has else None for has in has_grad), *[None] * num_options)


def _call(op: Callable[..., Any], *arguments: Any) -> Any:
    # Within torch.func, PyTorch applies autocast after the kernels that `_compose_transformed` registers.
    return _compose(op, *arguments) if _are_functorch_transforms_active() else op(*arguments)


def _complete(
    name: str, op: Any, backward_op: Any, composition: Callable[..., Any], gradients: Callable[..., list[Tensor]],
    batch_dims: Sequence[int | None],
) -> None:  # fmt: skip
    """Register all that PyTorch may do with the ops apart from first gradients by torch.autograd."""
    op.register_vmap(functools.partial(_run_batched, op, batch_dims))
    backward_op.register_vmap(functools.partial(_run_one_by_one, backward_op))
    _compose_transformed(name, op, composition, has_gradient=True)
    _compose_transformed(f"{name}_backward", backward_op, gradients, has_gradient=False)
    # torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True) use this key instead of torch.vmap's.
    _library.impl(f"{name}_backward", functools.partial(_compose, gradients), "Batched")


def _compose_transformed(name: str, definition: Any, composition: Callable[..., Any], has_gradient: bool) -> None:
    """Make an op run its composition for derivatives that no kernel has: tangents, and gradients within torch.func.

    PyTorch drops the tangents of an op without a forward-mode formula in silence.

    Args:
        has_gradient: whether a kernel computes the op's gradients by torch.autograd.
    """
    differentiable = make_autograd_impl(getattr(torch.ops.sasa_train, name).default, definition)

    # PyTorch calls this kernel once per nested transform, in eager mode and while it compiles, and shows it the
    # tangents and gradients of that transform only.
    def choose(keys, *arguments):
        tensors, is_transformed = [x for x in arguments if isinstance(x, Tensor)], _are_functorch_transforms_active()
        # A compiled jvp enters level 0 (there is no other) without telling `unpack_dual`.
        level = 0 if is_transformed else None
        has_tangents = any(unpack_dual(x, level=level).tangent is not None for x in tensors)
        lacks_gradient = (is_transformed or not has_gradient) and torch.is_grad_enabled()
        if has_tangents or (lacks_gradient and any(x.requires_grad for x in tensors)):
            return _compose(composition, *arguments)
        return differentiable(keys, *arguments)

    with warnings.catch_warnings():  # PyTorch 2.11 warns that this replaces what `custom_op` has registered
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        _library.impl(name, choose, "Autograd", with_keyset=True, allow_override=True)


def _compose(composition: Callable[..., Any], *arguments: Any) -> Any:
    with _without_autocast(arguments[0]):
        return composition(*arguments)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Compute as the kernels do, whose precision does not depend on autocast."""
    device = x.device.type
    return nullcontext() if device in _WITHOUT_AUTOCAST else torch.autocast(device, enabled=False)


def _differentiate(
    composition: Callable[..., Any], grads: Sequence[int], sizes: tuple[int, int, int], skips_first: bool, *arguments
) -> list[Tensor]:
    """Return what the backward op returns for its arguments; with a graph, if gradients are enabled.

    Args:
        sizes: the numbers of the backward op's arguments before the tensors, of tensors, and of options.
    """
    num_before, num_tensors, num_options = sizes
    tensors, options = arguments[num_before:][:num_tensors], arguments[num_before + num_tensors :][:num_options]
    first, keeps_graph = int(skips_first and not arguments[-1]), torch.is_grad_enabled()
    with torch.enable_grad(), enable_inplace_requires_grad(True):
        # Views, because a tensor may be given twice, and may be computed from another that is given.
        given = [x if x is None else x.view_as(x) for x in tensors]
        wanted = [x if x.requires_grad else x.requires_grad_() for x in given[first:] if x is not None]
        results = composition(*given, *options)
    outputs = [results[i] for i in grads] if isinstance(results, tuple) else [results]
    grad_outputs = arguments[: len(grads)]
    return list(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=keeps_graph, materialize_grads=True))


def _run_batched(
    op: Callable[..., Any], batch_dims: Sequence[int | None], info: Any, in_dims: Sequence[Any], *arguments: Any
) -> Any:
    """Run an op under torch.vmap: once, on a larger batch, if the samples share what a batch shares.

    Dimension 0 of the first output must be the batch; the others are for the backward pass of this batch.
    """
    size, num_tensors = info.batch_size, len(batch_dims)
    dims = list(zip(in_dims[:num_tensors], batch_dims, strict=True))
    if not dims or size == 0 or any(of_samples is not None for of_samples, of_batch in dims if of_batch is None):
        return _run_one_by_one(op, info, in_dims, *arguments)
    tensors = [
        x if x is None or of_batch is None else _in_one_batch(x, of_samples, of_batch, size)
        for x, (of_samples, of_batch) in zip(arguments[:num_tensors], dims, strict=True)
    ]
    output, *kept = op(*tensors, *arguments[num_tensors:])
    return (output.unflatten(0, (size, output.shape[0] // size)), *kept), (0, *[None] * len(kept))


def _in_one_batch(x: Tensor, of_samples: int | None, of_batch: int, size: int) -> Tensor:
    if of_samples is None:
        x = x.unsqueeze(of_batch).expand(*x.shape[:of_batch], size, *x.shape[of_batch:])
    else:
        x = x.movedim(of_samples, of_batch)
    return x.flatten(of_batch, of_batch + 1)


def _run_one_by_one(op: Callable[..., Any], info: Any, in_dims: Sequence[int | None], *arguments: Any) -> Any:
    """Run an op under torch.vmap: once per sample."""
    if info.batch_size == 0:
        raise ValueError("torch.vmap over 0 samples; give at least one")
    pairs = list(zip(arguments, in_dims, strict=True))
    results = [
        op(*(x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs)) for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return type(results[0])(torch.stack(parts) for parts in zip(*results, strict=True)), 0


def _fake_gradients(num_before: int, num_tensors: int, skips_first: bool) -> Callable[..., list[Tensor]]:
    def fake(*arguments):
        first, *others = arguments[num_before : num_before + num_tensors]
        given = others if skips_first and not arguments[-1] else (first, *others)
        return [torch.empty_like(x) for x in given if x is not None]

    return fake


def _register_flops(name: str, flops: Callable[..., int], num_before: int) -> None:
    register_flop_formula(getattr(torch.ops.sasa_train, name))(flops)

    # Each product has two gradients of the same cost; recomputation is not counted.
    @register_flop_formula(getattr(torch.ops.sasa_train, f"{name}_backward"))
    def _(*arguments, **_kwargs) -> int:
        return 2 * flops(*arguments[num_before:])
