"""Kill runs with SIGKILL at random instants, continue them by the same command, and compare with a run never stopped.

Every tensor of the last and best checkpoints and every row of metrics.jsonl (but its timings) must be equal. The
embedded digits are written as class folders and as tar shards. The runs that are killed keep them resident or stream
them at 0, 1 and 3 workers, from folders and from shards, in turn; the run never stopped is in the first of these modes:
so the comparison crosses all of them. Kills fall mid-epoch, while a checkpoint is being written and during evaluation,
in turn; only those that hit after the first step count. Three recipes share the framework's augmentations, losses and
optimizer paths out among them; all have a moving average, accumulation and mixing.

usage: python scripts/kill_and_resume.py [--recipe rand|trivial|large] [--kills 10] [--keep FOLDER] [key=value ...]
Further overrides go to every run. Exit code 0 when all is equal.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sasa_train.compose import compose_config
from sasa_train.data.datasets import load_image_sets
from sasa_train.data.prepare import shard

RUN = [
    "experiment=debug",
    "data=image_folder",
    "data.image_size=8",
    "data.max_train_images=1000",
    "data.max_val_images=null",
    "allow_config_change=[data.root]",  # folders and shards are to be the same data set
    "model.width=0.25",
    "model.drop_path_rate=0.2",
    "trainer.ema_decay=0.99",
    "augment.mixup=0.2",
    "augment.cutmix=1.0",
    "augment.mix_off_epochs=1",
    "trainer.epochs=6",
    "trainer.max_steps=null",
    "trainer.global_batch_size=40",
    "trainer.grad_accum_steps=2",
    "trainer.checkpoint_every_steps=4",
]
RECIPES = {
    "rand": [
        "augment.policy=rand_augment",
        "optimizer=adamw",
        "optimizer.layer_decay=0.8",
        "trainer.label_smoothing=0.1",
        "trainer.grad_clip_norm=1.0",
        "trainer.bn_recalibration_batches=3",
    ],
    "trivial": [
        "augment.policy=trivial_augment",
        "augment.erasing_prob=0.5",
        "augment.brightness=0.3",
        "augment.hue=0.2",
        "optimizer.name=lookahead_sgd",
        "schedule.name=wsd",
        "trainer.loss=bce",
        "trainer.label_smoothing=0.1",
        "trainer.grad_clip_agc=0.05",
        "trainer.grad_checkpointing=true",
    ],
    "large": [  # random-resized crops of images above 64 pixels
        "data.image_size=72",
        "model.stem=attention",
        "augment.policy=auto_augment_imagenet",
        "augment.erasing_prob=0.5",
        "augment.saturation=0.3",
        "optimizer.name=muon",
        "trainer.grad_clip_value=0.1",
    ],
}
RESIDENT = ["data.resident=auto", "data.num_workers=0"]  # large images stream all the same
STREAMED = [["data.resident=false", f"data.num_workers={n}"] for n in (0, 1, 3)]
Mode = tuple[str, list[str]]
MODES: list[Mode] = [
    ("folders", RESIDENT),
    ("folders", STREAMED[1]),
    ("shards", STREAMED[2]),
    ("shards", RESIDENT),
    ("folders", STREAMED[2]),
    ("shards", STREAMED[0]),
]
TIMINGS = {"images_per_sec", "data_wait_fraction", "memory_mib", "seconds"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--recipe", choices=RECIPES, default="rand")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments, overrides = parser.parse_known_args()
    overrides = [*RECIPES[arguments.recipe], *overrides]
    random.seed(0)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="kill_and_resume."))
    folder.mkdir(parents=True, exist_ok=True)
    write_digits(folder)
    whole, broken = folder / "whole", folder / "broken"
    run_to_the_end(folder, "whole", MODES[0], overrides)
    print(f"a run never stopped: {len(read_rows(whole))} rows")
    moments = itertools.cycle(["mid-epoch", "during a save", "during evaluation"])
    modes, num_kills, moment = itertools.cycle(MODES), 0, next(moments)
    while num_kills < arguments.kills:
        mode = next(modes)
        hit = kill_once(folder, mode, overrides, moment)
        if hit is None:  # it ended first: begin again, so that all kills are made
            print("  the run ended before the next kill; its result is compared, then another is begun")
            compare(whole, broken)
            shutil.rmtree(broken)
            continue
        if hit:
            num_kills, moment = num_kills + 1, next(moments)
        told = f"{mode[0]} {' '.join(mode[1])}"
        print(f"  kill {num_kills}: {hit}, {told}" if hit else f"  a miss, not {moment}", flush=True)
    run_to_the_end(folder, "broken", MODES[-1], overrides)
    compare(whole, broken)
    print(f"equal after {num_kills} kills: every tensor of last.pt and best.pt, every row of metrics.jsonl")
    if arguments.keep is None:
        shutil.rmtree(folder)
    return 0


def write_digits(folder: Path) -> None:
    """The embedded digits as PNG in class folders, and as tar shards."""
    for split, images in zip(("train", "val"), load_image_sets(compose_config([]).data), strict=True):
        for index, label in enumerate(images.labels):
            target = folder / "folders" / split / images.classes[label]
            target.mkdir(parents=True, exist_ok=True)
            images.read(index, Image.Image.copy).save(target / f"{index:04d}.png")
    shard(folder / "folders", folder / "shards", images_per_shard=300)


def command(folder: Path, name: str, mode: Mode, overrides: list[str]) -> list[str]:
    place = [f"data.root={folder / mode[0]}", f"output_dir={folder}", f"run_name={name}"]
    return [sys.executable, "-m", "sasa_train.train", *RUN, *overrides, *place, *mode[1]]


def run_to_the_end(folder: Path, name: str, mode: Mode, overrides: list[str]) -> None:
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command(folder, name, mode, overrides), check=True, stdout=log, stderr=log, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}  # so that sums are added up in one order on every machine


def kill_once(folder: Path, mode: Mode, overrides: list[str], moment: str) -> str | None:
    """Start or continue the run and kill it at `moment`; what was hit, "" for another moment, None at its end."""
    run_dir = folder / "broken"
    num_rows = len(read_rows(run_dir))
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command(folder, "broken", mode, overrides), stdout=log, stderr=log, env=environment()
        )
    first_new_row = num_rows + random.randint(1, 12)
    while process.poll() is None:
        rows = read_rows(run_dir)
        if len(rows) >= first_new_row and is_moment(run_dir, rows, moment):
            if moment == "mid-epoch":
                time.sleep(random.random() * 0.2)
            process.kill()
            process.wait()
            rows = read_rows(run_dir)
            was_late = moment == "during a save" and not is_moment(run_dir, rows, moment)
            return "" if was_late else f"{moment}, after the row of step {rows[-1]['step']}"
        time.sleep(0.0005)
    if process.returncode != 0:
        raise SystemExit(f"the run failed with exit code {process.returncode}; see {folder}/log.txt")
    return None


def is_moment(run_dir: Path, rows: list[dict[str, Any]], moment: str) -> bool:
    if moment == "during a save":
        return any((run_dir / "checkpoints").glob("*.tmp"))
    if moment == "during evaluation":  # the epoch's last train row is there, its val row is not yet
        return rows[-1]["split"] == "train" and rows[-1]["step"] % 25 == 0
    return rows[-1]["step"] % 25 != 0


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Whole rows of metrics.jsonl, without timings."""
    path, rows = run_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append({key: value for key, value in json.loads(line).items() if key not in TIMINGS})
        except ValueError:
            break  # being written
    return rows


def compare(one: Path, other: Path) -> None:
    """Raise SystemExit naming the first difference."""
    rows, other_rows = read_rows(one), read_rows(other)
    for row, other_row in itertools.zip_longest(rows, other_rows):
        if row != other_row:
            raise SystemExit(f"DIFFERENT rows:\n{row}\n{other_row}")
    for name in ("last.pt", "best.pt"):
        state, other_state = (torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other))
        difference = first_difference(state, other_state, name)
        if difference:
            raise SystemExit(f"DIFFERENT: {difference}")


def first_difference(one: Any, other: Any, where: str) -> str | None:
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return where
        keys = [key for key in one if key not in ("seconds", "config")]  # a timing; workers and run_name differ
        return next((d for key in keys if (d := first_difference(one[key], other[key], f"{where}.{key}"))), None)
    if isinstance(one, list | tuple):
        pairs = enumerate(itertools.zip_longest(one, other))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}[{i}]"))), None)
    return None if one == other else where


if __name__ == "__main__":
    sys.exit(main())
