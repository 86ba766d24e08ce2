"""The user's own transform of training images (`augment.target`)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sasa_train.config import own_code
from sasa_train.config.derived import InputSize
from sasa_train.config.keys import AugmentConfig
from sasa_train.data.randomness import own_code_rng
from sasa_train.refusal import ConfigError

Transform = Callable[[Tensor, torch.Generator], Tensor]


def load_transform(config: AugmentConfig) -> Transform | None:
    """Return the function that `augment.target` names, or None; raise ConfigError as `own_code.load` does."""
    return None if config.target is None else own_code.load("augment.target", config.target)


def transform_all(
    transform: Transform, target: str, images: Tensor, seed: int, epoch: int, indices: np.ndarray
) -> Tensor:
    """Apply the user's transform, named `target`, to each of the uint8 images [B, 3, S, S], on the CPU.

    Raises:
        ConfigError: the transform fails or returns something else; the message names the user's file and line.
    """
    changed = [
        _transform_one(transform, target, image, seed, epoch, int(index))
        for image, index in zip(images.cpu(), indices, strict=True)
    ]
    return torch.stack(changed).to(images.device)


def check_transform(config: AugmentConfig, size: InputSize, seed: int) -> None:
    """Apply the transform twice to an image of noise, before any data is loaded.

    Raises:
        ConfigError: the transform cannot be imported, fails, or returns another image the second time.
    """
    transform = load_transform(config)
    if transform is None:
        return
    noise = torch.randint(0, 256, (1, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    once, again = (
        transform_all(transform, str(config.target), noise.clone(), seed, 0, np.zeros(1, dtype=np.int64)) for _ in "ab"
    )
    if not torch.equal(once, again):
        raise ConfigError(
            f"augment.target={config.target} ({own_code.place_of(transform)}): returns another image for the same "
            "image and generator, so a stopped run could not go on as if undisturbed; draw all random numbers from "
            "the generator, as in torch.rand(3, generator=generator)"
        )


def _transform_one(transform: Transform, target: str, image: Tensor, seed: int, epoch: int, index: int) -> Tensor:
    with own_code.errors_of(f"augment.target={target}"), own_code_rng(seed, epoch, index) as generator:
        found = transform(image, generator)
    is_image = isinstance(found, Tensor) and found.dtype == torch.uint8 and found.shape == image.shape
    if not is_image:
        dtype = str(getattr(found, "dtype", "")).removeprefix("torch.")
        shown = f"{dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(
            f"augment.target={target} ({own_code.place_of(transform)}): must return a uint8 tensor "
            f"{list(image.shape)}, but returned {shown}"
        )
    return found.cpu()
