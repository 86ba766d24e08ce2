"""The pictures of the page: drawn here as PNG, or a sentence in their place that says why they are not there."""

import base64
import importlib.util
import struct
from dataclasses import dataclass, field

NO_MATPLOTLIB = "No plots: matplotlib is not installed; pip install 'sasa_train[plots]'"
DPI = 150  # of the charts
CAPTIONS = {
    "accuracy.png": (
        "Two charts of top1 over GFLOPs and over million parameters, a numbered point for each row of the table",
        "top1 of the last epoch over GFLOPs an image and over parameters, with 95 % intervals over seeds. Numbers are "
        "those of the table.",
    ),
    "curves.png": (
        "Curves of val top1 over epochs, a panel for each row",
        "val top1 over epochs: the mean of the seeds, a band from the lowest to the highest, and dashed the reference "
        "row.",
    ),
    "differences.png": (
        "A chart of each row's difference in top1 to the reference row, the figures of the table's column difference",
        "Differences in top1 to the reference row, paired by seed, with 95 % intervals, and the paper's beside them "
        "where it prints one.",
    ),
    "window.png": (
        "A chart of the difference in top1 over kernel_size",
        "The same differences over kernel_size.",
    ),
}


@dataclass
class Picture:
    """`alt` says what kind of picture it is, `caption` what is seen in it."""

    png: bytes
    alt: str
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()

    @property
    def width(self) -> int:
        """On the page, in CSS pixels of 1/96 inch."""
        return self._size[0] * 96 // DPI

    @property
    def height(self) -> int:
        return self._size[1] * 96 // DPI

    @property
    def _size(self) -> tuple[int, int]:
        return struct.unpack(">II", self.png[16:24])  # of the header that begins every PNG


@dataclass
class Section:
    """Pictures of one kind; `missing` are sentences on those that could not be drawn, `rows` a table below them."""

    id: str
    title: str
    note: str = ""
    pictures: list[Picture] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    rows_title: str = ""


def of_charts(charts: dict[str, bytes]) -> list[Picture]:
    """What charts.draw_charts drew."""
    return [Picture(png, *CAPTIONS[name]) for name, png in charts.items()]


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
