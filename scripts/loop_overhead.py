"""Measure how much slower the trainer is than a bare loop with the same model, optimizer and in-memory batches.

The bare loop runs forward, loss, backward and update. The trainer adds the schedule, sums for the log, the non-finite
check, a log row every --log-every steps (metrics.jsonl, TensorBoard, console) and polling for signals. After a warm-up,
the two take turns, training one epoch at a time. The script prints the median and range of the images/s, and the ratio.

usage: python scripts/loop_overhead.py [--rounds 40] [--log-every 50] [key=value ...]   (overrides of the run's config)
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sasa_train.benchmark.timing import ratio, spread, time_in_turn
from sasa_train.config.compose import compose_config
from sasa_train.config.keys import TrainConfig
from sasa_train.data.loader import build_loaders
from sasa_train.device import RunPlan, resolve
from sasa_train.files import lock_folder
from sasa_train.models import build_model
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.runs.folder import RunFolder
from sasa_train.signals import StopRequest
from sasa_train.terminal import progress_bar
from sasa_train.training.loop import Loop
from sasa_train.training.run import build_stepper
from sasa_train.training.step import Stepper

RUN = [
    "model=conv_resnet26", "model.stem=conv_small", "model.width=0.25", "data=digits", "data.resident=true",
    "trainer.global_batch_size=64", "trainer.epochs=1000", "trainer.eval_every_epochs=1000",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=50)
    arguments, overrides = parser.parse_known_args()
    config = compose_config([*RUN, f"trainer.log_every_steps={arguments.log_every}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        runs, device, images = build_both(config, Path(folder))
        with progress_bar(total=arguments.rounds, desc="rounds") as bar:
            seconds = time_in_turn(runs, arguments.rounds, device, bar)
    for name, values in seconds.items():
        speed = spread([images / s for s in values])
        print(f"{name:<8} {speed['median']:8.1f} images/s (from {speed['min']:.1f} to {speed['max']:.1f})")
    found = ratio(seconds["bare"], seconds["trainer"])  # ratio of the speeds
    low, high = found["quartiles"]
    median = f"median of {arguments.rounds} pairs: {found['median']:.4f}"
    print(f"ratio trainer/bare, {median} (quartiles {low:.4f} to {high:.4f})")
    return 0


def build_both(config: TrainConfig, folder: Path) -> tuple[dict[str, Callable[[], None]], torch.device, int]:
    """Return two functions that train one epoch (bare loop and trainer), the device and the images per epoch."""
    device, config = resolve(config)
    loaders = build_loaders(config, device)
    plan = RunPlan(config, device, steps_per_epoch=loaders.train.plan.steps_per_epoch)

    def new_stepper() -> Stepper:
        torch.manual_seed(0)
        model = build_model(config.model, len(loaders.classes), plan.input_size)
        return build_stepper(plan, model)

    plain, loop_stepper = new_stepper().state, new_stepper()
    (folder / "run").mkdir()
    run = RunFolder(folder / "run", lock_folder(folder / "run"), Checkpoints(folder / "run/checkpoints", 0), None)
    stop = StopRequest()
    stop.begin_training()
    loop = Loop(run, loaders, loop_stepper, stop)
    loop.save = lambda *_, **__: True  # type: ignore[method-assign,assignment,misc]  # not part of a step's cost
    criterion = nn.CrossEntropyLoss()
    epochs = iter(range(10**6))

    def bare() -> None:
        plain.model.train()
        for images, labels in loaders.train.train_batches(next(epochs)):
            plain.optimizer.zero_grad()
            with plan.autocast():
                loss = criterion(plain.model(images), labels)
            loss.backward()
            plain.optimizer.step()

    def trainer() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train_epoch()

    return {"bare": bare, "trainer": trainer}, device, plan.steps_per_epoch * plan.trainer.global_batch_size


if __name__ == "__main__":
    sys.exit(main())
