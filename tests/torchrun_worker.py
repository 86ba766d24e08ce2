"""Run sasa-train for test_distributed.py, record the model's inputs, and inject a fault if DISTURB is set.

NOTES=folder: at exit, each process writes `<rank>.json` to this folder. For each step, it contains the SHA-256 of each
training image given to the model, of each val image, and of the gradient after the first micro-batch and the full step.
DISTURB=SIGKILL:1:3 sends SIGKILL to process 1 before step 3, once; NAN sets its images to NaN instead;
LATE_NAN does the same and checks losses one step late.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from sasa_train import train
from sasa_train.training.step import Stepper

RANK = int(os.environ.get("RANK", "0"))
KIND, AT_RANK, AT_STEP = os.environ.get("DISTURB", "none:-1:-1").split(":")
IS_FIRST_START = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

notes: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "grad": {}}
train_step = Stepper.train_step
step = 0


def sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def note(kind: str, *entries: str) -> None:
    notes[kind].setdefault(str(step), []).extend(entries)


def look(model: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
    note("train" if model.training else "val", *map(sha, inputs[0]))
    gradient = next(model.parameters()).grad
    if model.training and gradient is not None:
        note("grad", sha(gradient))


def watched_step(stepper: Stepper, batches, want_grad_norm: bool = False):
    global step
    step = stepper.state.step + 1
    model = stepper.state.model
    if not model._forward_pre_hooks:
        model.register_forward_pre_hook(look)
    if KIND == "LATE_NAN":  # as on a GPU
        stepper.loss_watch.is_late = True
    if IS_FIRST_START and (int(AT_RANK), int(AT_STEP)) == (RANK, step):
        if KIND in ("NAN", "LATE_NAN"):
            batches = ((images * float("nan"), labels) for images, labels in batches)
        else:
            os.kill(os.getpid(), signal.Signals[KIND])
    norm = train_step(stepper, batches, want_grad_norm)
    note("grad", sha(next(model.parameters()).grad))
    return norm


Stepper.train_step = watched_step
code = train.run_command(sys.argv[1:])
if "NOTES" in os.environ:
    folder = Path(os.environ["NOTES"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{RANK}.json").write_text(json.dumps(notes))
train.end(code)
