"""Read the files of a run, and compare two runs."""

import json
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sasa_train.runs.checkpoint import load_checkpoint

TIMINGS = ("images_per_sec", "tflops", "mfu", "data_wait_fraction", "memory_mib", "seconds")


def rows(run_dir: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without the values that depend on the clock."""
    parsed = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in parsed]


def assert_equal_state(one, other, path="checkpoint"):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - {"seconds", "config", "metrics", "provenance", "best_sha256"}:
            assert_equal_state(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal_state(a, b, f"{path}[{i}]")
    else:
        assert one == other, path


def assert_same_run(one: Path, other: Path, checkpoints=("last", "best")) -> None:
    assert rows(one) == rows(other)
    for name in checkpoints:
        assert_equal_state(*(load_checkpoint(run / f"checkpoints/{name}.pt") for run in (one, other)), name)


def last(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints/last.pt")


def board(folder: Path) -> EventAccumulator:
    """Load the events in a folder as TensorBoard does."""
    return EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0}).Reload()
