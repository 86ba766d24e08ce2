"""Figures in a run's TensorBoard folder, beside its curves."""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sasa_train.files import write_outputs

FOLDER = "figures"  # a TensorBoard run of its own, within the run's folder


def write_to_board(board_dir: Path, name: str, png: bytes, step: int) -> None:
    """Write an image with the tag `figures/NAME` at `step`; it replaces one drawn before at this step."""
    # In its own folder, because TensorBoard reads the files of a folder one after another: a second file would hide
    # what a living run still writes, and a resumed run makes TensorBoard forget the steps after its checkpoint.
    # One file per name and step, so that a later command replaces what it draws again and leaves the rest.
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    with tempfile.TemporaryDirectory() as aside:
        with SummaryWriter(aside) as writer:
            writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")
        (events,) = Path(aside).iterdir()
        write_outputs(board_dir / FOLDER, {f"events.out.tfevents.{step:010d}.{name}": events.read_bytes()})
