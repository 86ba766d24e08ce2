"""What the trainer costs beside a bare loop: the same model, optimizer and resident batches, with and without it.

The bare loop is forward, loss, backward, update. The trainer's adds the schedule, sums for the log, the non-finite
guard, a log row every --log-every steps (metrics.jsonl, TensorBoard, console) and polling for signals. Both train for
an epoch in turn, in random order, after a warm-up; printed are the median images/s, the spread and the ratio.

usage: python scripts/loop_overhead.py [--rounds 40] [--log-every 50] [key=value ...]   (overrides of the run's config)
"""

import argparse
import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.config.keys import TrainConfig
from sasa_train.data.loader import build_loaders
from sasa_train.device import RunPlan, resolve
from sasa_train.models import build_model
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.runs.folder import RunFolder
from sasa_train.signals import StopRequest
from sasa_train.training.loop import Loop
from sasa_train.training.run import build_stepper
from sasa_train.training.step import Stepper

RUN = [
    "model=conv_resnet26",
    "model.stem=conv_small",
    "model.width=0.25",
    "data=digits",
    "data.resident=true",
    "trainer.global_batch_size=64",
    "trainer.epochs=1000",
    "trainer.eval_every_epochs=1000",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--log-every", type=int, default=50)
    arguments, overrides = parser.parse_known_args()
    config = compose_config([*RUN, f"trainer.log_every_steps={arguments.log_every}", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        bare, trainer, images = build_both(config, Path(folder))
        seconds: dict[str, list[float]] = {"bare": [], "trainer": []}
        for round_number in range(arguments.rounds + 1):
            for name, train_epoch in random.sample([("bare", bare), ("trainer", trainer)], 2):
                start = time.perf_counter()
                train_epoch()
                if round_number:  # the first is the warm-up
                    seconds[name].append(time.perf_counter() - start)
    speeds = {name: [images / s for s in values] for name, values in seconds.items()}
    for name, values in speeds.items():
        print(f"{name:<8} {statistics.median(values):8.1f} images/s (from {min(values):.1f} to {max(values):.1f})")
    ratios = [t / b for t, b in zip(speeds["trainer"], speeds["bare"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        f"ratio trainer/bare, median of {len(ratios)} pairs: {statistics.median(ratios):.4f} "
        f"(quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f})"
    )
    return 0


def build_both(config: TrainConfig, folder: Path) -> tuple[Callable[[], None], Callable[[], None], int]:
    """One epoch of the bare loop, one of the trainer's, and the images of an epoch."""
    device, config = resolve(config)
    loaders = build_loaders(config, device)
    plan = RunPlan(config, device, steps_per_epoch=loaders.train.plan.steps_per_epoch)

    def new_stepper() -> Stepper:
        torch.manual_seed(0)
        model = build_model(config.model, len(loaders.classes), plan.image_size)
        return build_stepper(plan, model)

    plain, loop_stepper = new_stepper().state, new_stepper()
    (folder / "run").mkdir()
    run = RunFolder(folder / "run", io.StringIO(), Checkpoints(folder / "run/checkpoints", 0), None)
    stop = StopRequest()
    stop.begin_training()
    loop = Loop(run, loaders, loop_stepper, stop)
    loop.save = lambda *_: True  # type: ignore[method-assign,assignment,misc]  # no part of a step's cost
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
        if device.type == "cuda":
            torch.cuda.synchronize()

    def trainer() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            loop.train_epoch()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return bare, trainer, plan.steps_per_epoch * plan.trainer.global_batch_size


if __name__ == "__main__":
    sys.exit(main())
