"""Figures written to a run's TensorBoard folder, next to its curves."""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sasa_train.files import write_outputs

FOLDER = "figures"  # a separate TensorBoard run inside the run's folder


def write_to_board(board_dir: Path, name: str, png: bytes, step: int) -> None:
    """Write an image with the tag `visualize/NAME` at `step`, replacing any earlier image at the same step."""
    # The folder is separate because TensorBoard reads the files of a folder one after another: a second file would hide
    # what an active run still writes, and a resumed run makes TensorBoard discard the steps after its checkpoint.
    # With one file per name and step, a later command replaces only the figures that it draws again.
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    with tempfile.TemporaryDirectory() as aside:
        with SummaryWriter(aside) as writer:
            writer.add_image(f"visualize/{name}", pixels, step, dataformats="HWC")
        (events,) = Path(aside).iterdir()
        write_outputs(board_dir / FOLDER, {f"events.out.tfevents.{step:010d}.{name}": events.read_bytes()})
