"""A trained model loaded from a checkpoint, with its classes, image size and normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sasa_train.config.derived import resolved_image_size
from sasa_train.config.keys import DataConfig, TrainConfig
from sasa_train.data.datasets import mean_std
from sasa_train.data.fingerprint import differences
from sasa_train.data.transforms import Normalize
from sasa_train.models import build_model, check_model
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import find_checkpoint, load_checkpoint


@dataclass
class TrainedModel:
    """A `model` in eval mode on the CPU; `weights` states which of the checkpoint's weights it has, "ema" or "raw"."""

    path: Path
    checkpoint: dict[str, Any]
    config: TrainConfig
    model: nn.Module
    weights: str

    @property
    def classes(self) -> list[str]:
        """The class names, in the order of the logits."""
        return self.checkpoint["classes"]

    @property
    def image_size(self) -> int:
        """The side length of the model's input images in pixels."""
        return resolved_image_size(self.config.data)

    def normalize(self, device: torch.device) -> Normalize:
        """Return the normalisation that the model was trained with, for uint8 images [B, 3, H, W] from `val_shape`."""
        return Normalize(*mean_std(self.config.data), device, self.config.trainer.channels_last)

    def changes(self, val: dict[str, Any]) -> list[str]:
        """List the differences between the fingerprint `val` and that of the val images used in training."""
        before = self.checkpoint["fingerprint"]
        return differences(before["val"], val, "val") if before else []


def load_trained(source: Path, overrides: Sequence[str] = ()) -> TrainedModel:
    """Load a checkpoint file or a run folder's best.pt (last.pt if there is no best.pt).

    overrides: overrides of the checkpoint's config; `weights=raw` selects the model's own weights instead of their
        moving average, which is the default if the run kept one.

    Raises:
        CheckpointError: `source` contains no readable checkpoint.
        ConfigError: an override is invalid or changes the model, or this is one of several processes, which would all
            do the same work.
    """
    # Imported here, because importing Hydra takes a tenth of a second.
    from sasa_train.config.overrides import split_weights
    from sasa_train.config.saved import load_config

    if world_size() > 1:
        raise ConfigError(f"WORLD_SIZE={world_size()}: this is one process's work; run it without torchrun")
    path = find_checkpoint(source)
    checkpoint = load_checkpoint(path)
    wanted, others = split_weights(overrides)
    if any(text.startswith("data.name=") for text in others):
        others = _own_preprocessing(load_config(checkpoint["config"], source=str(path)).data) + others
    config = load_config(checkpoint["config"], others, source=str(path))
    weights = wanted or ("ema" if checkpoint["ema"] is not None else "raw")
    if weights == "ema" and checkpoint["ema"] is None:
        raise ConfigError(f"weights=ema: {path} has no moving average; it was trained with trainer.ema_decay=null")
    state_dict = checkpoint["ema"] if weights == "ema" else checkpoint["model"]
    return TrainedModel(path, checkpoint, config, _build(config, state_dict, len(checkpoint["classes"])), weights)


def _own_preprocessing(data: DataConfig) -> list[str]:
    """Return overrides that keep the image size and normalisation used in training when the data set is changed."""
    mean, std = mean_std(data)
    return [f"data.image_size={resolved_image_size(data)}", f"data.mean={list(mean)}", f"data.std={list(std)}"]


def _build(config: TrainConfig, state_dict: dict[str, Any], num_classes: int) -> nn.Module:
    size = resolved_image_size(config.data)
    check_model(config.model, size)
    model = build_model(config.model, num_classes, size)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        _, first, *others = [*str(error).splitlines(), ""]
        more = f" and {len(others) - 1} more like it" if len(others) > 1 else ""
        raise ConfigError(f"the overrides make another model than the checkpoint's: {first.strip()}{more}") from error
    return model.eval()
