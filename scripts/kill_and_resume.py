"""Kill runs with SIGKILL at random instants, continue them by the same command, and compare with a run never stopped.

Every tensor of the last and best checkpoints and every row of metrics.jsonl (but its timings) must be equal. The runs
that are killed stream their images, at 0, 1 and 3 workers in turn, or keep them resident, in turn; the run never
stopped is resident: so the comparison crosses all of them. Kills fall mid-epoch, while a checkpoint is being written
and during evaluation, in turn; only those that hit after the first step count.

usage: python scripts/kill_and_resume.py [--kills 10] [--keep FOLDER] [key=value ...]
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

RUN = [
    "experiment=debug",
    "augment.hflip=true",  # digits do not flip by themselves; here flips are to be tested too
    "data.max_train_images=1000",
    "data.max_val_images=null",
    "model.width=0.25",
    "model.drop_path_rate=0.2",
    "optimizer=adamw",
    "trainer.ema_decay=0.99",
    "trainer.epochs=6",
    "trainer.max_steps=null",
    "trainer.global_batch_size=40",
    "trainer.grad_accum_steps=2",
    "trainer.checkpoint_every_steps=4",
]
MODES = [
    ["data.resident=true", "data.num_workers=0"],
    ["data.resident=false", "data.num_workers=0"],
    ["data.resident=false", "data.num_workers=1"],
    ["data.resident=false", "data.num_workers=3"],
]
TIMINGS = {"images_per_sec", "data_wait_fraction", "seconds"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments, overrides = parser.parse_known_args()
    random.seed(0)
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="kill_and_resume."))
    folder.mkdir(parents=True, exist_ok=True)
    whole, broken = folder / "whole", folder / "broken"
    run_to_the_end(folder, "whole", [*overrides, *MODES[0]])
    print(f"a run never stopped: {len(read_rows(whole))} rows")
    moments = itertools.cycle(["mid-epoch", "during a save", "during evaluation"])
    modes, num_kills, moment = itertools.cycle(MODES), 0, next(moments)
    while num_kills < arguments.kills:
        mode = next(modes)
        hit = kill_once(folder, [*overrides, *mode], moment)
        if hit is None:  # it ended first: begin again, so that all kills are made
            print("  the run ended before the next kill; its result is compared, then another is begun")
            compare(whole, broken)
            shutil.rmtree(broken)
            continue
        if hit:
            num_kills, moment = num_kills + 1, next(moments)
        print(f"  kill {num_kills}: {hit}, {' '.join(mode)}" if hit else f"  a miss, not {moment}", flush=True)
    run_to_the_end(folder, "broken", [*overrides, *MODES[-1]])
    compare(whole, broken)
    print(f"equal after {num_kills} kills: every tensor of last.pt and best.pt, every row of metrics.jsonl")
    if arguments.keep is None:
        shutil.rmtree(folder)
    return 0


def command(folder: Path, name: str, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "sasa_train.train", *RUN, f"output_dir={folder}", f"run_name={name}", *overrides]


def run_to_the_end(folder: Path, name: str, overrides: list[str]) -> None:
    with (folder / "log.txt").open("a") as log:
        subprocess.run(command(folder, name, overrides), check=True, stdout=log, stderr=log, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}  # so that sums are added up in one order on every machine


def kill_once(folder: Path, overrides: list[str], moment: str) -> str | None:
    """Start or continue the run and kill it at `moment`; what was hit, "" for another moment, None at its end."""
    run_dir = folder / "broken"
    num_rows = len(read_rows(run_dir))
    with (folder / "log.txt").open("a") as log:
        process = subprocess.Popen(command(folder, "broken", overrides), stdout=log, stderr=log, env=environment())
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
