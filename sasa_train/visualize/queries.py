"""Which query pixels to look at where none are asked for."""

import numpy as np


def default_pixels(image: np.ndarray) -> list[tuple[int, int]]:
    """Of uint8 [S, S, 3] the centre, and the place of the strongest contrast a quarter of the image away from it."""
    size = len(image)
    centre = (size // 2, size // 2)
    contrast = smoothed_contrast(image)
    place = np.arange(size)
    away = np.hypot(place[:, None] - centre[0], place[None, :] - centre[1]) >= size / 4
    row, column = np.unravel_index(np.where(away, contrast, -1).argmax(), contrast.shape)
    return [centre, (int(row), int(column))]


def smoothed_contrast(image: np.ndarray) -> np.ndarray:
    """Length of the grey value's gradient, [S, S], mean over a square of about an eighth of the side."""
    rows, columns = np.gradient(image.mean(2))
    reach = len(image) // 16
    padded = np.pad(np.hypot(rows, columns), reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return windows.mean((2, 3))
