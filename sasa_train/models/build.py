"""From the model's config to a model: ours or any of timm's, checked against the data before training starts."""

from difflib import get_close_matches

import timm
import torch
from torch import nn

import sasa_train.models.resnet  # noqa: F401  (registers our models with timm)
from sasa_train.config import DIALS, ConfigError, ModelConfig


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build `config.name` for square RGB images of `image_size` pixels and `num_classes` classes.

    Raises:
        ConfigError: an unknown name, dials that cannot go together, or a model that cannot take such images.
    """
    if not timm.is_model(config.name):
        raise ConfigError(_unknown(config.name))
    kwargs = {dial: getattr(config, dial) for dial in DIALS if getattr(config, dial) is not None}
    if config.drop_path_rate:
        kwargs["drop_path_rate"] = config.drop_path_rate
    if timm.get_pretrained_cfg_value(config.name, "fixed_input_size"):
        kwargs["img_size"] = image_size  # vit, swin and their kin are built for one size
    try:
        model = timm.create_model(config.name, num_classes=num_classes, **kwargs)
        check_input_size(config, num_classes, image_size, kwargs)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.name={config.name} {kwargs or ''} on images of {image_size} pixels: {error}"
        ) from error
    if config.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = config.bn_momentum
    return model


def check_input_size(config: ModelConfig, num_classes: int, image_size: int, kwargs: dict) -> None:
    """Run one pass on the meta device: whatever the images' size breaks, it breaks here, in a second."""
    with torch.device("meta"), torch.no_grad():
        timm.create_model(config.name, num_classes=num_classes, **kwargs).eval()(
            torch.empty(1, 3, image_size, image_size)
        )


def _unknown(name: str) -> str:
    close = get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
    return f"model.name={name} is not in timm's registry: {hint}"
