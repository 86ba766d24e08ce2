"""Measure where the text of a figure lies: none may leave the page or cover another."""

from unittest import mock

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

PIXEL = 1.0  # boxes are rounded to whole pixels


def text_boxes(figure: Figure) -> list[tuple[str, float, Bbox]]:
    """Draw the figure; return the text, rotation and box of everything that it writes."""
    drawn: list[Text] = []
    draw = Text.draw

    def record(text: Text, renderer) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)
        draw(text, renderer)

    canvas = FigureCanvasAgg(figure)
    with mock.patch.object(Text, "draw", record):
        canvas.draw()
    seen = {id(text): text for text in drawn}.values()
    boxes = [(text.get_text(), text.get_rotation(), text.get_window_extent(canvas.get_renderer())) for text in seen]
    return [found for found in boxes if found[2].width > 0]


def wrong_texts(figure: Figure) -> list[str]:
    """Return a line for each text that leaves the page and for each pair of texts that cover one another."""
    boxes, page = text_boxes(figure), figure.bbox
    found = [
        f"{text!r} leaves the page: {box.bounds}"
        for text, _, box in boxes
        if box.x0 < -PIXEL or box.y0 < -PIXEL or box.x1 > page.x1 + PIXEL or box.y1 > page.y1 + PIXEL
    ]
    for i, (text, angle, box) in enumerate(boxes):
        for other, other_angle, other_box in boxes[i + 1 :]:
            shared = Bbox.intersection(box, other_box)
            is_oblique = angle == other_angle and angle % 90  # their boxes overlap though they do not
            if shared and min(shared.width, shared.height) > PIXEL and not is_oblique:
                found.append(f"{text!r} and {other!r} overlap by {shared.width:.0f} x {shared.height:.0f} pixels")
    return found
