"""Create pictures for TensorBoard and the run folder as uint8 tensors [3, H, W]."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.utils import make_grid

from sasa_train.terminal import printable

SHEET_IMAGES, SHEET_PIXELS = 64, 96  # images on a contact sheet; approximate size to which small images are enlarged
CAPTION_LINES, CAPTION_PIXELS = 2, 13  # below each image; height of a line
MAX_CAPTION = 200  # characters
MATRIX_PIXELS = 400
BLUE, RED = (8, 48, 107), (165, 15, 21)


def contact_sheet(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Arrange the first 64 of the uint8 images [B, 3, H, W] in a grid, each above its own of `captions`."""
    images = enlarge(images[:SHEET_IMAGES], SHEET_PIXELS)
    strips = [_strip(caption, images.shape[-1]) for caption in captions[:SHEET_IMAGES]]
    tiles = torch.cat([images, torch.stack(strips)], 2)
    return make_grid(tiles, nrow=math.ceil(math.sqrt(len(tiles))), padding=2, pad_value=255)


def captions_of(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Return each image's class or, for labels [B, num_classes] that mixup or cutmix mixed, the two largest shares."""
    if labels.dim() == 1:
        return [printable(classes[label]) for label in labels.tolist()]
    shares, indices = labels.topk(min(2, len(classes)))
    return [
        "\n".join(
            f"{100 * share:.0f} % {printable(classes[label])}" for share, label in zip(*pair, strict=True) if share
        )
        for pair in zip(shares.tolist(), indices.tolist(), strict=True)
    ]


def _strip(caption: str, width: int) -> Tensor:
    """Draw a caption, broken or cut to the width, as a white strip, uint8 [3, H, width]."""
    font = ImageFont.load_default(CAPTION_PIXELS - 2)
    strip = Image.new("RGB", (width, CAPTION_LINES * CAPTION_PIXELS), "white")
    # Measuring takes time in proportion to the square of the length.
    lines = [_without_middle(line) for line in caption.split("\n")]
    caption = "\n".join(lines)
    if len(lines) == 1 and font.getlength(caption) > width:
        end = next(n for n in range(len(caption), 0, -1) if n == 1 or font.getlength(caption[:n]) <= width)
        lines = [caption[:end], caption[end:]]
    for place, line in enumerate(lines[:CAPTION_LINES]):
        shown, kept = line, len(line)
        while font.getlength(shown) > width and kept > 1:
            kept -= 1
            shown = f"{line[: kept - kept // 3]}\u2026{line[len(line) - kept // 3 :]}"
        ImageDraw.Draw(strip).text((0, place * CAPTION_PIXELS), shown, "black", font)
    return pil_to_tensor(strip)


def _without_middle(line: str) -> str:
    return line if len(line) <= MAX_CAPTION else f"{line[: MAX_CAPTION // 2]}\u2026{line[-MAX_CAPTION // 2 :]}"


def confusion_picture(confusion: Tensor) -> Tensor:
    """Draw counts [C, C] by label (row) and prediction (column); darker cells contain larger fractions of their row."""
    parts = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    return enlarge(_tint(parts, BLUE)[None], MATRIX_PIXELS)[0]


def embedding_pictures(model: nn.Module) -> dict[str, Tensor]:
    """Draw each layer's relative embeddings [K, D] (left: rows, right: columns; blue: negative, red: positive)."""
    pictures = {}
    for name, module in model.named_modules():
        found = [getattr(module, half, None) for half in ("rel_height", "rel_width")]
        halves = [half.detach().float().cpu().flatten(0, -2) for half in found if isinstance(half, Tensor)]
        if len(halves) == 2:
            # An axial window has one row or column, which stands above white.
            size = max(map(len, halves))
            both = torch.cat([F.pad(half, (0, 0, 0, size - len(half))) for half in halves], dim=1)
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
