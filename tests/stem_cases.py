"""Compare the attention stem's kernel with its PyTorch module in float64: output, gradients and statistics."""

import copy

import torch
from torch import Tensor, nn

from sasa_train.models import AttentionStem

# Float32 against float64: sums of up to several thousand products with independent signs, each accurate to 6e-8, have
# an error of about 1e-6 of the tensor's maximum; the tolerance is ten times that. A gradient that batch norm nearly
# cancels (on a map of few positions, that of W_V is almost parallel to W_V, whose length does not affect the output) is
# only as accurate as the terms that cancel, so `FLOOR` is relative to the largest of all gradients.
TOLERANCE = 3e-5


FLOOR = 0.05


def build(in_channels: int = 3, channels: int = 16, **keys) -> AttentionStem:
    """Build a stem with positive, negative and zero batch norm weights and non-default running statistics."""
    module = AttentionStem(in_channels, channels, **{"num_heads": 2, "backend": "cpu"} | keys)
    nn.init.normal_(module.bn.weight)
    nn.init.normal_(module.bn.bias)
    nn.init.zeros_(module.bn.weight[1:2].detach())
    module.bn.running_mean.normal_()
    module.bn.running_var.uniform_(0.5, 2)
    return module


def run(module: nn.Module, x: Tensor, weight: Tensor | float = 1.0) -> dict[str, Tensor]:
    """Return the output, the gradients for a seeded random output gradient times `weight`, and the updated buffers."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = module(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * weight
    out.backward(grad.to(out.dtype))
    results = {"out": out.detach(), "grad x": x.grad}
    results |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in module.named_buffers()}


def clear_of_near_ties(exact_module: AttentionStem, x: Tensor) -> Tensor | float:
    """Return 0 for each window whose two largest values could be swapped by rounding, and 1 for all other windows."""
    if not isinstance(exact_module.pool, nn.MaxPool2d):
        return 1.0
    seen, module = [], copy.deepcopy(exact_module)
    module.pool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    module(x)
    windows = seen[0].unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)
    return ((first - second > 1e-5) | (first == second)).float()


def assert_exact(module: AttentionStem, x: Tensor) -> None:
    exact_module = copy.deepcopy(module).double()
    exact_module.backend = "reference"
    weight = clear_of_near_ties(exact_module, x.double())
    ours, exact = run(module, x, weight), run(exact_module, x.double(), weight)
    largest = max(float(value.abs().max()) for name, value in exact.items() if name.startswith("grad"))
    for name, value in exact.items():
        scale = max(float(value.abs().max()), FLOOR * largest if name.startswith("grad") else 0)
        within = {"rtol": 0, "atol": TOLERANCE * scale, "msg": lambda text, n=name: f"{n}: {text}"}
        torch.testing.assert_close(ours[name].double(), value.double(), **within)
