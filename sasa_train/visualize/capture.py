"""Attention weights of a running model, computed by its own layers from their inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sasa_train.models import AttentionStem, LocalSelfAttention2d
from sasa_train.refusal import ExpectedFailure

AttentionLayer = LocalSelfAttention2d | AttentionStem
SUM_TOLERANCE = 1e-4  # the sum of a float32 softmax over several hundred positions is within 1e-5 of one


class WeightsError(ExpectedFailure):
    """Raised if a query's attention weights do not sum to one, for example because an activation is not finite."""


def attention_layers(model: nn.Module) -> dict[str, AttentionLayer]:
    """Return the local self-attention layers by name, in model order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AttentionLayer)}


def checked_weights(name: str, layer: AttentionLayer, x: Tensor) -> Tensor:
    """Return `layer.attention_weights(x)` after checking that each query's weights sum to one, or less with a null key.

    Raises:
        WeightsError: the weights of a query have another sum.
    """
    weights = layer.attention_weights(x)
    excess = weights.sum(-1) - 1
    worst = (excess.clamp(min=0) if getattr(layer, "null_key", False) else excess.abs()).max().item()
    if not worst <= SUM_TOLERANCE:  # also true for NaN
        raise WeightsError(f"{name}: attention weights are off by {worst:.3g} from a sum of one; is the model finite?")
    return weights


@contextmanager
def watching(
    model: nn.Module, layers: Sequence[str], look: Callable[[str, AttentionLayer, Tensor], None]
) -> Iterator[None]:
    """Call `look(name, layer, x)` with the input of each of `layers` whenever the model runs within this context."""
    found = attention_layers(model)

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: look(name, found[name], inputs[0])

    handles = [found[name].register_forward_pre_hook(hook(name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_of(
    model: nn.Module, images: Tensor, layers: Sequence[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model once and return its logits and the attention weights by layer name, checked to sum to one.

    Args:
        images: normalised, [B, C, H, W].
        layers: names from `attention_layers(model)`, or None for all. The weights of a layer are [B, N, H, W, K*K], and
            those of an attention stem [B, N, blocks, 16, 16]. They are large, so name only the layers that are needed.

    Raises:
        WeightsError: the attention weights of a query do not sum to one.
    """
    kept: dict[str, Tensor] = {}

    def look(name: str, layer: AttentionLayer, x: Tensor) -> None:
        kept[name] = checked_weights(name, layer, x)

    with watching(model, list(attention_layers(model)) if layers is None else layers, look):
        logits = model(images)
    return logits, kept
