"""Count a model's parameters, FLOPs and activation memory on the meta device, without weights or data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_train.config.derived import InputSize, as_input_size


@dataclass
class Layer:
    """A row of the per-layer table. `shape` is the output shape without the batch dimension."""

    name: str
    kind: str
    shape: str = ""
    params: int = 0
    flops: int = 0
    activation_bytes: int = 0


def meta_model(build: Callable[[], nn.Module]) -> nn.Module:
    """Call `build()` on the meta device, where tensors have shapes but no data."""
    with torch.device("meta"):
        return build()


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, size: int | InputSize) -> int:
    """Count the FLOPs of one forward pass of a single image in eval mode; see `build_model` for its `size`."""
    device = next(model.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *as_input_size(size), device=device))
    return counter.get_total_flops()


def count_layers(model: nn.Module, size: int | InputSize) -> list[Layer]:
    """Return one row per block of each stage, one per module outside the stages, and a final row with the totals."""
    num_images = 2  # in train mode, batch norm rejects a single value per channel
    layers: dict[str, Layer] = {}
    for name, child in model.named_children():
        is_sequence = isinstance(child, nn.Sequential | nn.ModuleList)
        for path, module in child.named_children() if is_sequence else [("", child)]:
            if count_params(module):
                path = f"{name}.{path}" if path else name
                layers[path] = Layer(path, type(module).__name__, params=count_params(module))
    images = torch.empty(num_images, *as_input_size(size), device=next(model.parameters()).device)
    model.train()
    total = Layer("total", "", params=count_params(model))
    with FlopCounterMode(depth=99, display=False) as counter, _saved_bytes(model, layers, total):
        model(images)
    flops = counter.get_flop_counts()
    root = type(model).__name__
    for name, layer in layers.items():
        layer.flops = sum(flops.get(f"{root}.{name}", {}).values()) // num_images
        layer.activation_bytes //= num_images
    total.flops, total.activation_bytes = counter.get_total_flops() // num_images, total.activation_bytes // num_images
    return [*layers.values(), total]


def _identity(tensor: Tensor) -> int:
    """Return an identifier of the tensor's storage; storages on the meta device have no address to compare."""
    return tensor.untyped_storage()._cdata


@contextmanager
def _saved_bytes(model: nn.Module, layers: dict[str, Layer], total: Layer) -> Iterator[None]:
    """Context manager that records each layer's output shape and the bytes that autograd saves for backward."""
    running: list[Layer] = []
    known = {_identity(p) for p in [*model.parameters(), *model.buffers()]}
    keep = []  # keeps storages alive, because the address of a freed one could be reused

    def save(tensor: Tensor) -> Tensor:
        if _identity(tensor) not in known:
            known.add(_identity(tensor))
            storage = tensor.untyped_storage()
            keep.append(storage)
            for layer in (*running[-1:], total):
                layer.activation_bytes += storage.nbytes()
        return tensor

    def leave(layer: Layer, output: Tensor) -> None:
        running.pop()
        layer.shape = " x ".join(str(n) for n in output.shape[1:])

    modules = dict(model.named_modules())
    handles = []
    for name, layer in layers.items():
        handles.append(modules[name].register_forward_pre_hook(lambda *_, layer=layer: running.append(layer)))
        handles.append(modules[name].register_forward_hook(lambda _m, _i, output, layer=layer: leave(layer, output)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()
