"""Figures into a run's TensorBoard folder, beside its series."""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from sasa_train.files import write_outputs

FOLDER = "figures"  # a TensorBoard run of its own, within the run's folder


def write_to_board(board_dir: Path, name: str, png: bytes, step: int) -> None:
    """An image with the tag `figures/NAME` at `step`; one drawn before at this step is replaced.

    In a folder of its own: TensorBoard reads one file of a folder after another, and a second writer's file would hide
    what a living run still writes; and a run that goes on makes TensorBoard forget the steps after its checkpoint. A
    file for each name and step, so that another command replaces what it draws again and leaves the rest.
    """
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    with tempfile.TemporaryDirectory() as aside:
        with SummaryWriter(aside) as writer:
            writer.add_image(f"figures/{name}", pixels, step, dataformats="HWC")
        (events,) = Path(aside).iterdir()
        write_outputs(board_dir / FOLDER, {f"events.out.tfevents.{step:010d}.{name}": events.read_bytes()})
