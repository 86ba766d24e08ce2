"""Output formats for predictions: a table for people, and CSV and JSON lines for programs.

Each of `FORMATS` converts batches of rows to text, one piece per batch, so that millions of rows can be streamed.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sasa_train.files import csv_text
from sasa_train.terminal import printable

DIGITS = 6  # significant digits of probabilities in CSV and JSON; further float32 digits depend on the batch


@dataclass
class Row:
    """The most probable classes of an image with their probabilities, or the reason why it could not be predicted."""

    path: str
    best: list[tuple[str, float]] = field(default_factory=list)
    error: str = ""


Batches = Iterator[list[Row]]


def as_table(batches: Batches, top_k: int, width: int | None = None) -> Iterator[str]:
    """Yield a table whose columns widen as needed, with probabilities in percent and no line for unreadable images.

    width: of the terminal; classes that do not fit into it are left out, except the best one.
    """
    head = ["file", *(text for rank in range(1, top_k + 1) for text in (f"top{rank}", "%"))]
    widths = [len(text) for text in head]
    lines = [head]
    for rows in batches:
        for row in rows:
            cells = [text for name, share in row.best for text in (printable(name), f"{100 * share:.2f}")]
            lines += [] if row.error else [[printable(row.path), *cells][: len(widths)]]
        if lines in ([], [head]):  # no image in this batch, or none yet
            continue
        widths = [max(width, *map(len, column)) for width, column in zip(widths, zip(*lines, strict=True), strict=True)]
        while width is not None and len(widths) > 3 and sum(widths) + 2 * (len(widths) - 1) > width:
            del widths[-2:]
        lines = [line[: len(widths)] for line in lines]
        yield "".join(_aligned(line, widths) for line in lines)
        lines = []


def _aligned(cells: list[str], widths: list[int]) -> str:
    """Align names to the left and numbers to the right."""
    padded = [
        cell.rjust(width) if column and column % 2 == 0 else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip() + "\n"


def as_csv(batches: Batches, top_k: int) -> Iterator[str]:
    """Yield a header and one record per image; strings are quoted because file names may contain line breaks."""
    ranks = range(1, top_k + 1)
    records: list[list] = [["path", *(text for n in ranks for text in (f"class{n}", f"probability{n}")), "error"]]
    for rows in batches:
        for row in rows:
            cells = [cell for name, share in row.best for cell in (name, _rounded(share))]
            records.append([row.path, *(cells or [""] * 2 * top_k), row.error])
        yield csv_text(records, csv.QUOTE_NONNUMERIC)
        records = []


def as_jsonl(batches: Batches, _top_k: int) -> Iterator[str]:
    """Yield one ASCII JSON object per line; bytes that are not UTF-8 become surrogates (\\udc80 to \\udcff)."""
    for rows in batches:
        yield "".join(json.dumps(_as_object(row)) + "\n" for row in rows)


def _as_object(row: Row) -> dict:
    if row.error:
        return {"path": row.path, "error": row.error}
    best = [{"class": name, "probability": _rounded(share)} for name, share in row.best]
    return {"path": row.path, "predictions": best}


def _rounded(share: float) -> float:
    return float(f"{share:.{DIGITS}g}")


FORMATS: dict[str, Callable[[Batches, int], Iterator[str]]] = {"table": as_table, "csv": as_csv, "jsonl": as_jsonl}
