"""Create pictures for TensorBoard and the run folder as uint8 tensors [3, H, W]."""

import math

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid

SHEET_IMAGES, SHEET_PIXELS = 64, 64  # images on a contact sheet; approximate size to which small images are enlarged
MATRIX_PIXELS = 400
BLUE, RED = (8, 48, 107), (165, 15, 21)


def contact_sheet(images: Tensor) -> Tensor:
    """Arrange the first 64 of the uint8 images [B, 3, S, S] in a grid."""
    images = enlarge(images[:SHEET_IMAGES], SHEET_PIXELS)
    return make_grid(images, nrow=math.ceil(math.sqrt(len(images))), padding=2, pad_value=255)


def confusion_picture(confusion: Tensor) -> Tensor:
    """Draw counts [C, C] by label (row) and prediction (column); darker cells contain larger fractions of their row."""
    parts = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    return enlarge(_tint(parts, BLUE)[None], MATRIX_PIXELS)[0]


def embedding_pictures(model: nn.Module) -> dict[str, Tensor]:
    """Draw each layer's relative embeddings [K, D] (left: rows, right: columns; blue: negative, red: positive)."""
    pictures = {}
    for name, module in model.named_modules():
        halves = [getattr(module, half, None) for half in ("rel_height", "rel_width")]
        if all(isinstance(half, Tensor) for half in halves):
            both = torch.cat([half.detach().float().cpu().reshape(-1, half.shape[-1]) for half in halves], dim=1)  # type: ignore[union-attr]
            both = both / both.abs().max().clamp(min=1e-12)
            tinted = torch.where(both < 0, _tint(-both, BLUE), _tint(both, RED))
            pictures[name] = enlarge(tinted[None], 8 * min(both.shape))[0]
    return pictures


def enlarge(images: Tensor, pixels: int) -> Tensor:
    """Enlarge images [..., H, W] by an integer factor, so that the shorter side has about `pixels` pixels."""
    factor = max(1, round(pixels / min(images.shape[-2:])))
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _tint(parts: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Convert values [H, W] between 0 (white) and 1 (`color`) to a uint8 picture [3, H, W]."""
    shade = 255 - parts * (255 - torch.tensor(color, dtype=torch.float32)[:, None, None])
    return shade.round().clamp(0, 255).to(torch.uint8)
