"""Register a differentiable torch.library op with its backward op, fake implementations, autograd and FLOP counts.

Absent optional tensors are passed as None. An op cannot return None, so a backward op returns gradients only for the
tensors that are not None.

The ops are differentiable once, by torch.autograd, and may be called under torch.vmap. Other derivatives are refused,
because PyTorch drops the tangents of an op without a forward-mode formula in silence.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd.forward_ad import unpack_dual
from torch.utils.flop_counter import register_flop_formula

_library = torch.library.Library("sasa_train", "FRAGMENT")


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
    alternative: str,
    grads: Sequence[int] = (0,),
    kept: Sequence[int] = (),
    keeps_output: Callable[..., bool] = lambda output, *options: True,
    forward_only: str = "",
    skips_first: bool = False,
    device_types: str | None = None,
) -> Callable[..., Any]:
    """Register `sasa_train::{name}` and `sasa_train::{name}_backward`; return the first.

    Args:
        tensors, options, forward_only: arguments in torch's schema language; gradients are computed for `tensors`, and
            `forward_only` is not passed to the backward op.
        outputs: those of `forward`. The backward op receives, under the names in `backward_inputs`, the gradients of
            those listed in `grads`, then those listed in `kept`, followed by `tensors` and `options`.
        keeps_output: whether the first output, if listed in `kept`, is needed with these options; if not, it is None.
        skips_first: whether the backward op has a last argument `needs_x`, and omits the first gradient if it is false.
        flops: counts the FLOPs of a forward pass from the same arguments, with shapes for tensors.
        alternative: what to use where the op cannot be differentiated.
    """
    num_before, num_tensors, num_options = len(grads) + len(kept), tensors.count(",") + 1, options.count(",") + 1
    num_without = num_options + forward_only.count("Tensor")
    schemas = {
        name: f"({', '.join(filter(None, (tensors, options, forward_only)))}) -> {outputs}",
        f"{name}_backward": f"({backward_inputs}, {tensors}, {options}{', bool needs_x' * skips_first}) -> Tensor[]",
    }
    op, backward_op = (
        torch.library.custom_op(f"sasa_train::{each}", run, mutates_args=(), schema=schema, device_types=device_types)
        for (each, schema), run in zip(schemas.items(), (forward, backward), strict=True)
    )
    op.register_fake(fake)
    backward_op.register_fake(_fake_gradients(num_before, num_tensors, skips_first))

    def setup_context(ctx, inputs, output):
        found, ctx.options = output if isinstance(output, tuple) else (output,), inputs[num_tensors:][:num_options]
        outputs = (found[i] if i or keeps_output(found[0], *ctx.options) else None for i in kept)
        ctx.save_for_backward(*outputs, *inputs[:num_tensors])

    def run_backward(ctx, *grad_outputs):
        saved, needs_first = ctx.saved_tensors, ctx.needs_input_grad[0] or not skips_first
        arguments = (*(grad_outputs[i] for i in grads), *saved, *ctx.options)
        present = iter(backward_op(*arguments, needs_first) if skips_first else backward_op(*arguments))
        has_grad = (needs_first, *(x is not None for x in saved[len(kept) + 1 :]))
        return (*(next(present) if has else None for has in has_grad), *[None] * num_without)

    op.register_autograd(run_backward, setup_context=setup_context)
    _refuse_others(name, op, backward_op, alternative)
    _register_flops(name, flops, num_before)
    return op


def _refuse_others(name: str, op: Any, backward_op: Any, alternative: str) -> None:
    refuse = functools.partial(_refuse, name, alternative)
    backward_op.register_autograd(functools.partial(refuse, "second derivatives"))
    for each, definition in ((name, op), (f"{name}_backward", backward_op)):
        definition.register_vmap(functools.partial(_run_one_by_one, definition))
        _refuse_transforms(each, definition, refuse)
    # torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True) use this key instead of torch.vmap's.
    batched = "gradients batched by is_grads_batched or vectorize"
    _library.impl(f"{name}_backward", functools.partial(refuse, batched), "Batched")


def _refuse(name: str, alternative: str, what: str, *_) -> None:
    raise NotImplementedError(f"{name} does not support {what}; use {alternative}")


def _refuse_transforms(name: str, definition: Any, refuse: Callable[[str], None]) -> None:
    """Make an op refuse forward-mode differentiation and torch.func.grad where its inputs take part in them."""
    differentiable = make_autograd_impl(getattr(torch.ops.sasa_train, name).default, definition)

    # PyTorch calls this kernel once per nested transform, in eager mode and while it compiles, and shows it the
    # tangents and gradients of that transform only.
    def check(keys, *arguments):
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        if any(unpack_dual(x).tangent is not None for x in tensors):
            refuse("forward-mode differentiation (torch.func.jvp, linearize, dual tensors)")
        is_transformed = torch._C._are_functorch_transforms_active() and torch.is_grad_enabled()
        if is_transformed and any(x.requires_grad for x in tensors):
            refuse("torch.func.grad, vjp and jacrev, unlike torch.autograd.grad")
        return differentiable(keys, *arguments)

    _library.impl(name, check, "Autograd", with_keyset=True)


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
