"""Inject faults into runs, continue them with the same command, and compare them with an undisturbed run.

Processes are killed, signalled, stopped or started twice, disks fill up, files are truncated, corrupted or deleted, and
images and configs change between starts, all at random moments drawn from a seed. After each fault, the run must either
continue or stop with the error that docs/reliability.md documents. At the end, every tensor of last.pt and best.pt and
every row of metrics.jsonl (except timings) must be identical to those of the undisturbed run.

The embedded digits are written as class folders and as tar shards. The disturbed runs alternate between data held
in memory and streaming with 0, 1 or 3 workers, from folders and from shards; the undisturbed run uses the first of
these modes. The recipes together cover the framework's augmentations, losses, optimizers, samplers and teachers. All
of them use a moving average, drop path, accumulation and mixing.

usage: python scripts/chaos.py [--faults 20] [--kinds KIND,...] [--recipe rand|trivial|large|...] [--seed 0]
                               [--tally FILE.json] [--keep FOLDER] [key=value ...]
--tally adds the counts to those of earlier calls. Overrides apply to every run. The exit code is 0 if all checks pass.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sasa_train.config.compose import compose_config
from sasa_train.data.datasets import load_image_sets
from sasa_train.dataset_tool.prepare import shard
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import load_checkpoint
from sasa_train.runs.info import has_finished
from sasa_train.runs.metrics import read_metrics

RUN = [
    "experiment=debug", "data=image_folder", "data.image_size=8", "data.max_train_images=1000",
    "data.max_val_images=null", "model.width=0.25", "model.drop_path_rate=0.2", "augment.mixup=0.2",
    "augment.cutmix=1.0", "augment.mix_off_epochs=1", "trainer.epochs=6", "trainer.max_steps=null",
    "trainer.global_batch_size=40", "trainer.grad_accum_steps=2", "trainer.ema_decay=0.99",
    "trainer.checkpoint_every_steps=4",
]  # fmt: skip
RECIPES = {  # overrides, separated by spaces
    "rand": """
        augment.policy=rand_augment optimizer=adamw optimizer.layer_decay=0.8 trainer.label_smoothing=0.1
        trainer.grad_clip_norm=1.0 trainer.bn_recalibration_batches=3
    """,
    "trivial": """
        augment.policy=trivial_augment augment.erasing_prob=0.5 augment.brightness=0.3 augment.hue=0.2
        optimizer.name=lookahead_sgd schedule.name=wsd trainer.loss=bce trainer.label_smoothing=0.1
        trainer.grad_clip_agc=0.05 trainer.grad_checkpointing=true trainer.max_pflops=9.64e-5
    """,  # 147 of 150 steps
    "large": """
        data.image_size=72 model.stem=attention augment.policy=auto_augment_imagenet augment.erasing_prob=0.5
        augment.saturation=0.3 optimizer.name=muon trainer.grad_clip_value=0.1
    """,  # images above 64 pixels use random-resized crops
    "imbalance": """
        data.sampler=balanced trainer.class_weights={0:3,7:0.25} trainer.loss=focal augment.policy=trivial_augment
        trainer.grad_clip_norm=1.0
    """,
    "part": """
        trainer.train_only=[classifier,layer3,layer4] trainer.best_metric=f1_macro trainer.patience=2
        trainer.min_delta=3 augment.policy=rand_augment trainer.grad_checkpointing=true
    """,
    "distill": "augment.policy=trivial_augment distill.temperature=2 data.val_image_size=12",  # see `add_teacher`
}
RESIDENT = ["data.resident=auto", "data.num_workers=0"]  # large images are still streamed
STREAMED = [["data.resident=false", f"data.num_workers={n}"] for n in (0, 1, 3)]
Mode = tuple[str, list[str]]
MODES: list[Mode] = [
    ("folders", RESIDENT), ("folders", STREAMED[1]), ("shards", STREAMED[2]),
    ("shards", RESIDENT), ("folders", STREAMED[2]), ("shards", STREAMED[0]),
]  # fmt: skip
TIMINGS = {"images_per_sec", "tflops", "mfu", "data_wait_fraction", "memory_mib", "seconds"}
# Parts of a checkpoint that contain timings, or where and how it was written.
NOT_COMPARED = {"seconds", "config", "metrics", "provenance", "fingerprint", "best_sha256"}
STEPS_PER_EPOCH = 25
PATIENCE = 300  # maximum time in seconds for a run to reach a moment or to end
WORKER_TIMEOUT = 4  # seconds
WORKER_GRACE = 15  # seconds: 5 to detect it, 2 for each loader's workers to end, the rest for the process to end
MOMENTS = ("start-up", "mid-epoch", "a save", "evaluation")


# Code that makes the `count`-th renaming of a file to a name ending in `suffix` fail with an error of the disk.
FAILING = """
import errno, os
real, left = os.replace, {count}
def replace(source, target, **options):
    global left
    left -= str(target).endswith({suffix!r})
    if left == 0:
        left = -1
        raise OSError(errno.{error}, os.strerror(errno.{error}), str(target))
    real(source, target, **options)
os.replace = replace
"""
RUN_MODULE = "import runpy\nrunpy.run_module('sasa_train.train', run_name='__main__', alter_sys=True)"


class Failure(Exception):
    """Raised if a run is lost, silently produces different results or does not end as documented."""


class Chaos:
    """A series of disturbed runs in `folder`; each method listed in `KINDS` injects a fault."""

    def __init__(self, folder: Path, overrides: list[str], seed: int):
        self.folder, self.overrides, self.random = folder, overrides, random.Random(seed)
        self.whole, self.broken = folder / "whole", folder / "broken"
        self.checkpoints = self.broken / "checkpoints"
        self.modes = itertools.cycle(MODES)
        self._rows_state, self._rows = (-1, -1), list[dict[str, Any]]()
        self.seconds_to_end: dict[str, list[float]] = defaultdict(list)  # after a signal, by moment
        self.log = folder / "log.txt"  # output of the last start

    # Starting and stopping runs

    def start(
        self, *more: str, name: str = "broken", mode: Mode | None = None, failing: str = "", **options: Any
    ) -> subprocess.Popen:
        """Start the command; `failing` is Python code that runs in the process first, such as FAILING."""
        data, how = mode or next(self.modes)
        place = [f"data.root={self.folder / data}", f"output_dir={self.folder}", f"run_name={name}"]
        module = ["-c", f"{failing}{RUN_MODULE}"] if failing else ["-m", "sasa_train.train"]
        command = [sys.executable, *module, *RUN, *self.overrides, *place, *how, *more]
        # A single thread makes the order of summation the same on every machine.
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
        log = options.pop("log", self.log)
        with log.open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, env=environment, **options)

    def end(self, process: subprocess.Popen, codes: tuple[int, ...], message: str = "", log: Path | None = None) -> int:
        """Wait for the process to end, and check that it exits with one of `codes` and prints `message`."""
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failure(f"it did not end within {PATIENCE} s") from None
        text = (log or self.log).read_text(errors="replace")
        if code not in codes or message not in text or (code != 0 and "Traceback" in text):
            raise Failure(f"exit code {code} instead of {codes}, or no {message!r}:\n{text[-3000:]}")
        return code

    def go_on(self, process: subprocess.Popen, message: str = "") -> None:
        """Let the run write a few rows, stop it, and check that it has printed `message`."""
        self.wait(process, "mid-epoch", self.random.randint(1, 4))
        process.send_signal(signal.SIGTERM)
        self.end(process, (0, 75), message)

    def refused(self, message: str, *more: str, code: int = 2, mode: Mode | None = None) -> None:
        self.end(self.start(*more, mode=mode), (code,), message)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the disturbed run."""
        # The file is read only if it has changed, so that waiting for a moment does not occupy a whole processor.
        path = self.broken / "metrics.jsonl"
        state = (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else (0, 0)
        if state != self._rows_state:
            self._rows_state, self._rows = state, read_rows(self.broken, skip_damaged=True)
        return self._rows

    def wait(self, process: subprocess.Popen, moment: str, num_rows: int) -> bool:
        """Wait until the run has written `num_rows` more rows and reached `moment`; return False if it ends first."""
        first_row, deadline = len(self.rows()) + num_rows, time.monotonic() + PATIENCE
        if moment == "start-up":
            time.sleep(self.random.uniform(0, 6))
            return process.poll() is None
        begun = False
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                raise Failure(f"it did not reach {moment} within {PATIENCE} s")
            rows = self.rows()
            if len(rows) >= first_row and not begun:
                begun = "ETA" in self.log.read_text(errors="replace")  # rows of this start, not of earlier ones
            if begun and len(rows) >= first_row and is_moment(self.broken, rows, moment):
                return True
            time.sleep(0.0005)
        return False

    def need_checkpoints(self, count: int) -> None:
        """Continue the run until it has `count` checkpoints besides best.pt."""
        while len(list(self.checkpoints.glob("[ls]*.pt"))) < count:
            self.go_on(self.start())

    # Process faults

    def signalled(self, number: signal.Signals) -> str:
        moment = self.random.choice(MOMENTS)
        process, start = self.start(), time.monotonic()
        if self.wait(process, moment, self.random.randint(1, 10)):
            process.send_signal(number)
            start = time.monotonic()
        # Until the command's first lines have run, a signal ends it as it would any other process; no work is lost.
        codes = (0, -number) if number == signal.SIGKILL or moment == "start-up" else (0,)
        code = self.end(process, codes if number == signal.SIGKILL else (*codes, 75))
        if code == 75:
            self.seconds_to_end[moment].append(time.monotonic() - start)
        return moment

    def interrupt_twice(self) -> str:
        process = self.start()
        moment = self.random.choice(MOMENTS[1:])
        if self.wait(process, moment, self.random.randint(1, 10)):
            process.send_signal(signal.SIGINT)
            time.sleep(self.random.uniform(0, 0.02))
            process.send_signal(signal.SIGINT)
        self.end(process, (0, 75, 130))
        return moment

    def pause(self) -> None:
        process = self.start()
        if self.wait(process, "mid-epoch", self.random.randint(1, 4)):
            process.send_signal(signal.SIGSTOP)
            time.sleep(1)
            process.send_signal(signal.SIGCONT)
        self.go_on(process)

    def time_limit(self) -> None:
        self.end(self.start(f"trainer.max_hours={self.random.uniform(5, 9) / 3600}"), (0, 75))

    def second_run(self) -> None:
        process, log = self.start(), self.folder / "second.txt"
        if self.wait(process, "mid-epoch", 1):
            process.send_signal(signal.SIGSTOP)  # so that it is still running when the second starts
            second = self.start(log=log)
            try:
                self.end(second, (2,), f"is in use by process {process.pid} on ", log)
            finally:
                process.send_signal(signal.SIGCONT)
        self.go_on(process)

    def race(self) -> None:
        """Start two runs at the same time, and check that one is refused and the other continues."""
        logs = [self.log, self.folder / "second.txt"]
        runners = [self.start("trainer.log_every_steps=1", log=log) for log in logs]
        deadline = time.monotonic() + PATIENCE
        while all(runner.poll() is None for runner in runners) and time.monotonic() < deadline:
            time.sleep(0.01)
        ended = [runner.poll() is not None for runner in runners]
        loser = ended.index(True) if any(ended) else 0
        if all(ended) and runners[loser].returncode != 2:
            loser = 1 - loser
        winner = 1 - loser
        runners[winner].send_signal(signal.SIGTERM)
        self.end(runners[loser], (2,), "is in use by ", logs[loser])
        self.end(runners[winner], (0, 75), "", logs[winner])

    def worker(self, number: signal.Signals, message: str) -> str | None:
        process = self.start(f"data.worker_timeout={WORKER_TIMEOUT}", mode=("folders", STREAMED[2]))
        if not self.wait(process, "mid-epoch", self.random.randint(1, 6)):
            self.end(process, (0,))
            return "too late"
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(self.random.choice(workers)), number)
        start = time.monotonic()
        code = self.end(process, (0, 1))  # 0: the run ended without this worker
        if code == 1:
            self.end(process, (1,), message)
        if time.monotonic() - start > WORKER_TIMEOUT + WORKER_GRACE:
            raise Failure(f"{time.monotonic() - start:.0f} s until the run ended")
        return None

    # Disk and file faults

    def disk_full(self, *more: str) -> None:
        # A file size limit simulates a full disk, because writing fails in both cases.
        self.need_checkpoints(1)
        size = int((self.checkpoints / "last.pt").stat().st_size * self.random.uniform(0.1, 0.9))
        size = max(size, 2 * (self.broken / "metrics.jsonl").stat().st_size)
        process = self.start(*more, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        if more and self.wait(process, "mid-epoch", 12):
            process.send_signal(signal.SIGTERM)
        self.end(process, (1,), "cannot write")

    def disk_full_go_on(self) -> None:
        self.disk_full("trainer.on_failed_save=continue")
        log = self.log.read_text()
        if "tries again at the next checkpoint" not in log and not re.search(r"step (\d+)/\1\b", log):
            raise Failure(f"it did not go on:\n{log[-2000:]}")

    def save_fails_halfway(self) -> None:
        """Fail a save after best.pt has been written, and let the run go on: best.pt must be that of last.pt."""
        code = FAILING.format(count=self.random.randint(1, 3), suffix="/last.pt", error="ENOSPC")
        process = self.start("trainer.on_failed_save=continue", failing=code)
        while process.poll() is None and "tries again at the next checkpoint" not in self.log.read_text():
            time.sleep(0.01)
        self.go_on(process, "" if has_finished(self.broken) else "tries again at the next checkpoint")

    def disk_fails(self) -> str:
        self.need_checkpoints(1)
        name, error = self.random.choice(("run.json", "config.yaml", "metrics.jsonl", "last.pt")), "EIO"
        code = FAILING.format(count=1, suffix=f"/{name}", error=self.random.choice((error, "ESTALE")))
        self.end(self.start(failing=code), (1,), "cannot write a" if name == "last.pt" else "the disk failed at ")
        return name

    def after_damage(self, name: str, damage: Callable[..., object], message: str = "", at_least: int = 1) -> None:
        """Damage a file of a run with >= `at_least` checkpoints; check that the run continues and prints `message`."""
        self.need_checkpoints(at_least)
        path = self.broken / name
        damage(self, next(path.iterdir()) if path.is_dir() else path)
        self.go_on(self.start(), message)

    def last_hostile(self) -> None:
        self.need_checkpoints(2)
        trap = self.folder / "code ran"
        hostile = load_checkpoint(self.checkpoints / "last.pt") | {"trap": Hostile(trap)}
        torch.save(hostile, self.checkpoints / "last.pt")
        (self.checkpoints / "last.pt.json").unlink()
        self.go_on(self.start(), "skipping a damaged checkpoint")
        if trap.exists():
            raise Failure("a checkpoint ran code")

    def every_checkpoint_damaged(self) -> None:
        self.need_checkpoints(2)
        copy = self.folder / "copy"
        shutil.copytree(self.checkpoints, copy)
        for path in self.checkpoints.glob("*.pt"):
            self.random.choice((self.cut, self.flip))(path)
        self.refused("restore one from a copy, or start a new run with resume=never", code=1)
        shutil.rmtree(self.checkpoints)
        copy.rename(self.checkpoints)

    def metrics_damaged(self) -> None:
        self.after_damage("metrics.jsonl", self.random.choice((Chaos.cut, Chaos.flip, Chaos.delete)))

    def other_files_damaged(self) -> str:
        name = self.random.choice(("config.yaml", "run.json", ".lock", "tensorboard"))
        self.after_damage(name, self.random.choice((Chaos.cut, Chaos.flip)))
        return name

    def stranger(self) -> str:
        """Put a pipe or a folder in place of a file; the run names it, without waiting for it."""
        self.need_checkpoints(1)
        name = self.random.choice((LAST, f"{LAST}.json", "run.json", "metrics.jsonl", "config.yaml", ".lock"))
        path, kept = self.broken / name, self.folder / "kept"
        path.rename(kept)
        how = self.random.choice(("a pipe", "a folder"))
        os.mkfifo(path) if how == "a pipe" else path.mkdir()
        self.refused(f"{name}: is {how}")
        path.unlink() if how == "a pipe" else path.rmdir()
        kept.rename(path)
        return f"{how} as {name}"

    def taken_away(self) -> str:
        """Delete the lock of a running run, or put another run in its place; it must stop without writing."""
        process, aside = self.start(), self.folder / "aside"
        how = self.random.choice(("lock deleted", "another run in its place"))
        if not self.wait(process, "mid-epoch", self.random.randint(1, 6)):
            self.end(process, (0,))
            return "too late"
        if how == "lock deleted":
            (self.broken / ".lock").unlink()
        else:
            self.broken.rename(aside)
            self.broken.mkdir()
            (self.broken / ".lock").write_text("of another run")
        self.end(process, (1,), "its lock file is gone or another's")
        if aside.exists():
            if [path.name for path in self.broken.iterdir()] != [".lock"]:
                raise Failure(f"it wrote into another run's folder: {list(self.broken.iterdir())}")
            shutil.rmtree(self.broken)
            aside.rename(self.broken)
        return how

    def other_numerics(self) -> str:
        """Continue a copy of the run with other instructions or without the compiled kernels: it says so."""
        self.need_checkpoints(1)
        copy, cache = self.folder / "copy", self.folder / "empty cache"
        shutil.copytree(self.broken, copy)
        how = self.random.choice(("ATEN_CPU_CAPABILITY=default", "no compiler"))
        without = {"CXX": "/no/compiler", "SASA_TRAIN_CACHE": str(cache)}
        changed = without if how == "no compiler" else dict([how.split("=")])
        self.go_on(self.start(env=changed), "changed since the checkpoint was written")
        shutil.rmtree(self.broken)
        copy.rename(self.broken)
        return how

    def delete(self, path: Path) -> None:
        path.unlink()

    def cut(self, path: Path) -> None:
        os.truncate(path, self.random.randrange(path.stat().st_size))

    def scribble(self, path: Path) -> None:
        path.write_bytes(self.random.randbytes(9999))

    def flip(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        path.write_bytes(data)

    # User errors

    def config_changed(self) -> str:
        self.need_checkpoints(1)
        change = self.random.choice(("seed=1", "trainer.epochs=7", "optimizer.lr=0.2", "augment.cutmix=0.5"))
        self.refused(change.partition("=")[0] + ": ", change)
        return change

    def config_misspelt(self) -> str:
        wrong = self.random.choice(("trainer.epoch=6", "+trainer.epoch=6", "optimiser.lr=0.1", "trainer.epochs=six"))
        self.refused(wrong.strip("+").partition("=")[0], wrong)
        return wrong

    def images_changed(self) -> str:
        self.need_checkpoints(1)
        images = sorted((self.folder / "folders/val").rglob("*.png"))
        victim, kept = self.random.choice(images), self.folder / "kept.png"
        shutil.copy(victim, kept)
        how = self.random.choice(("cut", "replaced", "removed", "another added", "renamed"))
        added = victim.with_name("zzz.png")
        if how == "cut":
            self.cut(victim)
        elif how == "replaced":
            shutil.copy(self.random.choice([path for path in images if path.read_bytes() != kept.read_bytes()]), victim)
        elif how == "removed":
            victim.unlink()
        else:
            (shutil.copy if how == "another added" else shutil.move)(victim, added)
        self.refused("the images are not those that this run began with", mode=MODES[0])
        added.unlink(missing_ok=True)
        kept.rename(victim)
        return how


class Hostile:
    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trap),)


LAST, SKIPPED = "checkpoints/last.pt", "skipping a damaged checkpoint"
NEWEST = partial(Chaos.after_damage, name=LAST, at_least=2)  # with an older checkpoint to continue from
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
KINDS: dict[str, Callable[[Chaos], str | None]] = {
    **{number.name: partial(Chaos.signalled, number=number) for number in SIGNALS},
    "SIGINT twice": Chaos.interrupt_twice,
    "SIGSTOP and SIGCONT": Chaos.pause,
    "time limit": Chaos.time_limit,
    "second run in the folder": Chaos.second_run,
    "two starts at once": Chaos.race,
    "data worker killed": partial(Chaos.worker, number=signal.SIGKILL, message="data worker"),
    "data worker hangs": partial(Chaos.worker, number=signal.SIGSTOP, message="data.worker_timeout"),
    "disk full": Chaos.disk_full,
    "disk full and on_failed_save=continue": Chaos.disk_full_go_on,
    "a save fails halfway": Chaos.save_fails_halfway,
    "disk fails": Chaos.disk_fails,
    "last.pt truncated": partial(NEWEST, damage=Chaos.cut, message=SKIPPED),
    "bit flipped in last.pt": partial(NEWEST, damage=Chaos.flip, message=SKIPPED),
    "last.pt deleted": partial(NEWEST, damage=Chaos.delete, message="the newest good one"),
    "last.pt with code in it": Chaos.last_hostile,
    "manifest damaged": partial(NEWEST, name=f"{LAST}.json", damage=Chaos.cut, message=SKIPPED),
    "half-written file left": partial(Chaos.after_damage, name=f"{LAST}.0123abcd.tmp", damage=Chaos.scribble),
    "every checkpoint damaged": Chaos.every_checkpoint_damaged,
    "metrics.jsonl damaged": Chaos.metrics_damaged,
    "another file of the run damaged": Chaos.other_files_damaged,
    "a pipe or folder instead of a file": Chaos.stranger,
    "folder or lock taken away": Chaos.taken_away,
    "other instructions or kernels": Chaos.other_numerics,
    "config changed": Chaos.config_changed,
    "key misspelt": Chaos.config_misspelt,
    "images changed": Chaos.images_changed,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--kinds", help=f"some of: {', '.join(KINDS)}")
    parser.add_argument("--recipe", choices=RECIPES, default="rand")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tally", type=Path, help="a JSON file of counts to add to")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    arguments, overrides = parser.parse_known_args()
    kinds = arguments.kinds.split(",") if arguments.kinds else list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds {', '.join(unknown)}: none of {', '.join(KINDS)}")
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="chaos."))
    folder.mkdir(parents=True, exist_ok=True)
    chaos = Chaos(folder, [*RECIPES[arguments.recipe].split(), *overrides], arguments.seed)
    tried, failed = disturb(chaos, kinds, arguments.faults)
    print_table(tried, failed)
    for moment, seconds in chaos.seconds_to_end.items():
        middle, count = statistics.median(seconds), len(seconds)
        print(f"from a signal to the end, {moment}: {middle:.2f} s median, {max(seconds):.2f} s at most of {count}")
    if arguments.tally:
        add_to_tally(arguments.tally, tried, failed)
    if arguments.keep is None and not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def disturb(chaos: Chaos, kinds: list[str], num_faults: int) -> tuple[Counter, Counter]:
    """Inject `num_faults` faults, cycling through the kinds, in as many runs as needed; return the counts by kind."""
    write_digits(chaos.folder)
    if any("distill." in override for override in chaos.overrides):
        add_teacher(chaos)
    chaos.end(chaos.start(name="whole", mode=MODES[0]), (0,))
    print(f"a run never disturbed: {len(read_rows(chaos.whole))} rows", flush=True)
    tried, failed, num_runs, kind = Counter[str](), Counter[str](), 0, kinds[0]
    order: list[str] = []
    try:
        for number in range(1, num_faults + 1):
            if has_finished(chaos.broken):
                num_runs += compare(chaos)
            order = order or chaos.random.sample(kinds, len(kinds))
            kind = order.pop()
            tried[kind] += 1
            start = time.monotonic()
            told = KINDS[kind](chaos)
            at = f"{len(chaos.rows())} rows, {time.monotonic() - start:.0f} s"
            print(f"{number:>4}  {kind}{f': {told}' if told else ''}  ({at})", flush=True)
        while not has_finished(chaos.broken):
            chaos.end(chaos.start(), (0,))
        num_runs += compare(chaos)
    except (Failure, ConfigError) as failure:
        failed[kind] += 1  # a difference at the end of a run is attributed to its last fault
        print(f"FAILED  {kind}: {failure}\nwhat is left is in {chaos.folder}")
    print(
        f"{num_runs} runs, {tried.total()} faults: every tensor of last.pt and best.pt and every row of metrics.jsonl"
    )
    return tried, failed


def add_teacher(chaos: Chaos) -> None:
    """Train a convolutional net for one epoch, and let all other runs imitate it."""
    overrides = chaos.overrides
    chaos.overrides = ["model=conv_resnet26", "trainer.epochs=1", "augment.mix_off_epochs=0"]
    chaos.end(chaos.start(name="teacher", mode=MODES[0]), (0,))
    chaos.overrides = [*overrides, f"distill.teacher={chaos.folder / 'teacher'}"]


def print_table(tried: Counter, failed: Counter) -> None:
    print("\n| fault | tried | survived |\n|---|---|---|")
    for kind in KINDS:
        if tried[kind]:
            print(f"| {kind} | {tried[kind]} | {tried[kind] - failed[kind]} |")
    print(f"| all | {tried.total()} | {tried.total() - failed.total()} |")


def add_to_tally(path: Path, tried: Counter, failed: Counter) -> None:
    before = json.loads(path.read_text()) if path.exists() else {"tried": {}, "failed": {}}
    both = {"tried": Counter(before["tried"]) + tried, "failed": Counter(before["failed"]) + failed}
    path.write_text(json.dumps(both, indent=2))
    print(f"\nwith the earlier calls in {path}:")
    print_table(both["tried"], both["failed"])


def write_digits(folder: Path) -> None:
    """Write the embedded digits as PNG files in class folders and as tar shards."""
    if (folder / "shards").exists():
        return
    for split, images in zip(("train", "val"), load_image_sets(compose_config([]).data), strict=True):
        for index, label in enumerate(images.labels):
            target = folder / "folders" / split / images.classes[label]
            target.mkdir(parents=True, exist_ok=True)
            images.read(index, Image.Image.copy).save(target / f"{index:04d}.png")
    shard(folder / "folders", folder / "shards", images_per_shard=300)


def is_moment(run_dir: Path, rows: list[dict[str, Any]], moment: str) -> bool:
    if moment == "a save":
        return any((run_dir / "checkpoints").glob("*.tmp"))
    if moment == "evaluation":  # the epoch's last train row has been written, but not its val row
        return rows[-1]["split"] == "train" and rows[-1]["step"] % STEPS_PER_EPOCH == 0
    return rows[-1]["step"] % STEPS_PER_EPOCH != 0


def read_rows(run_dir: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """Return the complete rows of metrics.jsonl, without their timings."""
    rows = read_metrics(run_dir / "metrics.jsonl", skip_damaged)
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def compare(chaos: Chaos) -> int:
    """Raise Failure on the first difference; if there is none, delete the disturbed run and return 1."""
    rows, other_rows = read_rows(chaos.whole), read_rows(chaos.broken)
    for row, other_row in itertools.zip_longest(rows, other_rows):
        if row != other_row:
            raise Failure(f"SILENT DIFFERENCE of rows:\n{row}\n{other_row}")
    for name in ("last.pt", "best.pt"):
        state, other_state = (load_checkpoint(run / "checkpoints" / name) for run in (chaos.whole, chaos.broken))
        difference = first_difference(state, other_state, name)
        if difference:
            raise Failure(f"SILENT DIFFERENCE: {difference}")
    print("      equal to the run never disturbed", flush=True)
    shutil.rmtree(chaos.broken)
    return 1


def first_difference(one: Any, other: Any, where: str) -> str | None:
    if isinstance(one, torch.Tensor):
        return None if torch.equal(one, other) else where
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return where
        keys = one.keys() - NOT_COMPARED
        return next((d for key in keys if (d := first_difference(one[key], other[key], f"{where}.{key}"))), None)
    if isinstance(one, list | tuple):
        pairs = enumerate(itertools.zip_longest(one, other))
        return next((d for i, (a, b) in pairs if (d := first_difference(a, b, f"{where}[{i}]"))), None)
    return None if one == other else where


if __name__ == "__main__":
    sys.exit(main())
