"""What stands on the page as pictures, inside the file, or as a sentence in their place that says why they do not."""

import base64
import io
from dataclasses import dataclass, field

from PIL import Image

from sasa_train.extras import NO_MATPLOTLIB

NO_PLOTS = f"No plots: {NO_MATPLOTLIB}"
DPI = 150  # of chart_style, which needs matplotlib
MAX_BYTES = 300_000  # of a picture without loss
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

    webp: bytes
    width: int  # on the page, in CSS pixels of 1/96 inch
    height: int
    alt: str
    caption: str

    @property
    def base64(self) -> str:
        return base64.b64encode(self.webp).decode()


def picture(png: bytes, alt: str, caption: str) -> Picture:
    """As WebP, which takes a third of a chart's PNG without a change; with one where photographs would take more."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    file = io.BytesIO()
    image.save(file, "webp", lossless=True)
    if file.tell() > MAX_BYTES:
        file = io.BytesIO()
        image.save(file, "webp", quality=90)
    return Picture(file.getvalue(), image.width * 96 // DPI, image.height * 96 // DPI, alt, caption)


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
    return [picture(png, *CAPTIONS[name]) for name, png in charts.items()]
