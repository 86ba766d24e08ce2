"""Small real things to test with: images on disk, and the commands run as users run them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: the kernels are then tested without a GPU

Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """command("train", "key=value", ...) runs `python -m sasa_train.train ...` in an empty folder."""

    def run(module: str, *arguments: str, expect: int = 0, env: dict[str, str] | None = None):
        process = subprocess.run(
            [sys.executable, "-m", f"sasa_train.{module}", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert process.returncode == expect, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

    return run


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes, red and blue, of 11 + 7 training and 3 + 5 val images of odd sizes, as PNG."""
    return make_image_folder(tmp_path / "images")


def make_image_folder(root: Path, size: tuple[int, int] = (19, 17)) -> Path:
    rng = np.random.default_rng(0)
    for split, counts in (("train", (11, 7)), ("val", (3, 5))):
        for label, name in enumerate(("blue", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(counts[label]):
                pixels = rng.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., 0 if name == "red" else 2] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


# A run of seconds: a tiny attention net on a part of the digits.
TINY = (
    "experiment=debug",
    "data.max_train_images=70",
    "data.max_val_images=30",
    "trainer.global_batch_size=16",
    "trainer.max_steps=null",
    "trainer.epochs=3",
    "trainer.log_every_steps=1",
    "output_dir=out",
)
