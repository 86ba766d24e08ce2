"""Count a model's parameters, FLOPs and activation memory on the meta device, without weights or data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sasa_train.config.derived import InputSize, as_input_size, input_size
from sasa_train.config.keys import ModelConfig, TrainConfig
from sasa_train.models.build import build_model
from sasa_train.refusal import ConfigError, shorten

_counted: dict[tuple[str, int, InputSize], int] = {}  # what `count_forward` has counted before


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


def count_forward(config: ModelConfig, num_classes: int, size: InputSize) -> int:
    """Count the FLOPs of a configured model's forward pass of one image; see `count_flops`.

    Raises:
        ConfigError: the model cannot be built, or its FLOPs cannot be counted, as in code of the user's own.
    """
    is_own, key = config.target is not None, (repr(config), num_classes, size)
    if is_own or key not in _counted:  # code of the user's own may be another the next time
        flops = _count_own(config, num_classes, size) if is_own else _count_on(config, num_classes, size, "meta")
        if not flops:
            raise ConfigError(f"{_described(config)}: no FLOPs are found, as in operators that torch cannot count")
        _counted[key] = flops
    return _counted[key]


def _count_on(config: ModelConfig, num_classes: int, size: InputSize, device: str) -> int:
    with torch.device(device):
        return count_flops(build_model(config, num_classes, size), size)


def _count_own(config: ModelConfig, num_classes: int, size: InputSize) -> int:
    """Do the same for a model of the user's own, which may need the CPU to be built or run."""
    with torch.random.fork_rng(devices=[]):
        try:
            return _count_on(config, num_classes, size, "meta")
        except Exception:  # such as .item() of a tensor without a value
            try:
                return _count_on(config, num_classes, size, "cpu")
            except Exception as error:
                reason = shorten((str(error).splitlines() or [type(error).__name__])[0])
                raise ConfigError(f"{_described(config)}: its FLOPs cannot be counted ({reason})") from error


def _described(config: ModelConfig) -> str:
    return f"model.name={config.name}" if config.target is None else f"model.target={config.target}"


def step_flops(config: TrainConfig, num_classes: int) -> int:
    """Count the FLOPs of a training step on the global batch: three forward passes, as backward takes twice one.

    The forward passes that grad_checkpointing repeats, and those of a distillation teacher, are not counted.

    Raises:
        ConfigError: see `count_forward`.
    """
    return 3 * config.trainer.global_batch_size * count_forward(config.model, num_classes, input_size(config.data))


def bought_flops(config: TrainConfig, num_classes: int) -> int | None:
    """Return the FLOPs of a step if trainer.max_pflops, for which `total_steps` needs them, is set; otherwise None.

    Raises:
        ConfigError: they cannot be counted.
    """
    if config.trainer.max_pflops is None:
        return None
    try:
        return step_flops(config, num_classes)
    except ConfigError as error:
        raise ConfigError(
            f"trainer.max_pflops={config.trainer.max_pflops:g}: {error}; use trainer.max_steps instead"
        ) from error


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
