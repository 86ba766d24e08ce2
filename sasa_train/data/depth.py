"""Signs that images of 16 bits per channel use fewer, so that they would be read as almost black."""

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


def warn_of_dark(images: ImageSet, decoding: Decoding) -> str:
    """Do the same for up to SAMPLE images, spread over the set; unreadable ones are left to those that read them."""
    peaks = []
    for index in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int)).tolist():
        try:
            peaks.append(images.read(index, lambda image: peak_of(image, decoding)))
        except UnreadableImage:
            continue
    return describe_dark([peak for peak in peaks if peak is not None])
