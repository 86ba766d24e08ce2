"""Signs that images are read as almost black (16 bits per channel, of which fewer are used) or of one colour."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sasa_train.data.datasets import ImageSet, UnreadableImage
from sasa_train.data.decoding import Decoding, is_16_bit, to_rgb

DARK = 0.25  # largest level, as a share of white, of 16-bit images of which probably fewer bits are used
LEVEL = 1 / 255
SAMPLE = 64  # images that are looked at before a training


def peak_of(image: Image.Image, decoding: Decoding) -> float | None:
    """Return the largest level in an undecoded image of 16 bits per channel, as a share of white; None for others."""
    if not is_16_bit(image):
        return None
    return max(high for _, high in to_rgb(image, decoding).getextrema()) * LEVEL  # type: ignore[misc]


def describe_dark(peaks: Sequence[float]) -> str:
    """Say that most 16-bit images, which have these peaks, are dark, with the remedy; otherwise, return ""."""
    dark = [peak for peak in peaks if peak < DARK]
    if 2 * len(dark) <= len(peaks):
        return ""
    of_all = f" of {len(peaks):,}" if len(dark) < len(peaks) else ""
    count = "1 16-bit file stays" if len(peaks) == 1 else f"{len(dark):,}{of_all} 16-bit files stay"
    return (
        f"{count} below {max(dark) + LEVEL:.1%} of their range: rescale them, or state their largest value "
        "(MaxSampleValue in TIFF, maxval in PGM)"
    )


def doubts_about_pixels(images: ImageSet, decoding: Decoding) -> list[str]:
    """Say that most 16-bit images are dark, or most transparent ones of one colour, of up to SAMPLE over the set.

    Unreadable images are left to those that read them.
    """
    looks = []
    for index in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int)).tolist():
        try:
            looks.append(images.read(index, lambda image: (peak_of(image, decoding), _is_blank(image, decoding))))
        except UnreadableImage:
            continue
    peaks = [peak for peak, _ in looks if peak is not None]
    blanks = [is_blank for _, is_blank in looks if is_blank is not None]
    return [*filter(None, [describe_dark(peaks), _describe_blank(blanks, decoding)])]


def _is_blank(image: Image.Image, decoding: Decoding) -> bool | None:
    """Whether an undecoded image with transparent pixels is of a single colour when decoded; None for others."""
    if not image.has_transparency_data or is_16_bit(image):
        return None
    extrema = to_rgb(image, decoding).getextrema()
    return all(low == high for low, high in extrema)  # type: ignore[misc]


def _describe_blank(blanks: Sequence[bool], decoding: Decoding) -> str:
    if 2 * sum(blanks) <= len(blanks):
        return ""
    return (
        f"{sum(blanks):,} of {len(blanks):,} images with transparent pixels are of one colour with "
        f"data.background={decoding.background}: set another colour, or none to ignore transparency"
    )
