"""Benchmark results as a Markdown table with a summary and notes below it."""

from typing import Any

# For each kind of result, the row keys to show and their column titles.
COLUMNS = {
    "attention": {
        "layer": "layer", "backend": "backend", "forward_seconds": "forward, ms",
        "forward_backward_seconds": "forward+backward, ms", "forward_ratio": "forward/conv",
        "forward_backward_ratio": "both/conv", "memory_bytes": "peak extra MiB",
    },
    "layers": {
        "layer": "map", "backend": "layer", "forward_backward_seconds": "forward+backward, ms",
        "forward_backward_ratio": "both/conv", "memory_bytes": "peak extra MiB",
    },
    "growth": {
        "axis": "grows", "layer": "map", "kernel_size": "K", "backend": "backend",
        "seconds_per_image": "forward+backward, ms per image", "memory_bytes_per_image": "peak extra MiB per image",
    },
    "model": {
        "model": "model", "parameters": "parameters", "memory_format": "format", "batch_size": "batch",
        "training_images_per_sec": "training, images/s", "training_ratio": "ratio",
        "inference_images_per_sec": "inference, images/s", "inference_ratio": "ratio ",
        "memory_bytes": "training's peak MiB",
    },
}  # fmt: skip


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table, the summary, and the notes on what was left out."""
    rows = [{"layer": _layer(row), **row} for row in result["rows"]]
    shown = {key: title for key, title in COLUMNS[result["kind"]].items() if any(key in row for row in rows)}
    lines = []
    if rows:
        cells = [[_text(key, row[key]) if key in row else "" for key in shown] for row in rows]
        lines = [_join(shown.values()), "|" + "---|" * len(shown), *map(_join, cells), ""]
    notes = [*result["notes"], *(f"left out at {', '.join(at)}: {what}" for what, at in result["left_out"].items())]
    return [*lines, *result["summary"], *(f"note: {note}" for note in notes)]


def _layer(row: dict[str, Any]) -> str:
    shape = f"{row['side']}x{row['side']}x{row['channels']}" if "side" in row else row.get("shape")
    return f"{shape}, batch {row['batch_size']}"


def _text(key: str, value: Any) -> str:
    """Format a ratio with quartiles, a time (ms) or speed with its range, memory in MiB, or any other value."""
    if key.endswith("_ratio"):
        middle, low, high = (f"{x:.3f}" if x < 10 else _digits(x) for x in (value["median"], *value["quartiles"]))
        return f"{middle} ({low} to {high})"
    if isinstance(value, dict):
        unit = 1e3 if "seconds" in key else 1
        middle, low, high = (_digits(value[which] * unit) for which in ("median", "min", "max"))
        return f"{middle} ({low} to {high})"
    if key == "parameters":
        return f"{value / 1e6:.2f} M"
    return _digits(value / 2**20) if "bytes" in key else str(value)


def _digits(number: float) -> str:
    """Format a number with at least three significant digits."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:.3g}"


def _join(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"
