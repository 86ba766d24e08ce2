"""Check that a run's log stays one consistent series after any interruption."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from marking import slow_but_for
from reading_runs import board
from running_commands import TINY
from screens import lines_in_terminal

from sasa_train.config.derived import has_top5
from sasa_train.runs.metrics import read_metrics
from sasa_train.terminal import duration, fitting
from sasa_train.training import log
from sasa_train.training.log import RunLogger


def row(split: str, step: int, **more) -> dict:
    return {"split": split, "step": step, "epoch": 1, "loss": 1.0, "top1": 50.0} | more


def board_steps(run_dir, tag: str) -> list[int]:
    return [event.step for event in board(run_dir / "tensorboard").Scalars(tag)]


def test_the_log_is_one_clean_series_after_a_crash(tmp_path):
    """The run was logged up to step 6, evaluated, and killed while writing a line; its checkpoint is from step 4."""
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)
    for step in range(1, 7):
        logger.write(row("train", step, grad_norm=float("inf")))
        if step == 4:
            saved = logger.metrics  # saved in the checkpoint of step 4, before its evaluation
        if step % 2 == 0:
            logger.write(row("val", step))
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    logger = RunLogger(tmp_path, saved, step=4, total_steps=8)
    logger.write(row("val", 4))
    logger.write(row("train", 5))
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["split"] == "train"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in rows if r["split"] == "val"] == [2, 4]
    assert rows[0]["grad_norm"] is None  # JSON has no infinity
    assert board_steps(tmp_path, "train/loss") == [1, 2, 3, 4, 5]
    assert board_steps(tmp_path, "val/top1") == [2, 4]


def test_a_run_killed_before_its_first_checkpoint_leaves_no_curve_behind(tmp_path):
    for _ in range(2):
        logger = RunLogger(tmp_path, "", step=0, total_steps=8)
        logger.write(row("train", 1))
        logger.write(row("train", 2))
        logger.close()
    assert board_steps(tmp_path, "train/loss") == [1, 2]


def test_a_full_disk_costs_the_curves_and_not_the_run(tmp_path, capsys, monkeypatch):
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger._board, "add_scalar", full)
    logger.write(row("train", 1))
    logger.write(row("train", 2))
    logger.close()
    assert capsys.readouterr().err.count("no more TensorBoard curves") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_failing_disk_costs_the_curves_and_not_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "Board", mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)
    logger.write(row("train", 1))
    logger.close()
    assert "no TensorBoard curves for this run" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs paths to open folders, as Linux has them")
def test_curves_stay_in_their_folder_whatever_is_put_in_its_place(tmp_path):
    """TensorBoard opens its file for each write: a link put in the folder's place led the curves out of the run."""
    logger, outside, numbers = RunLogger(tmp_path, "", 0, 9), tmp_path / "outside", os.listdir("/proc/self/fd")
    outside.mkdir()
    (tmp_path / "tensorboard").rename(tmp_path / "moved")
    (tmp_path / "tensorboard").symlink_to(outside)
    logger.write({"split": "val", "step": 1, "epoch": 1, "loss": 1.0, "top1": 50.0, "top5": 90.0})
    logger.close()
    assert list(outside.iterdir()) == []
    assert [event.value for event in board(tmp_path / "moved").Scalars("val/top1")] == [50.0]
    assert len(os.listdir("/proc/self/fd")) < len(numbers)


@pytest.mark.parametrize("how", ["symlink", "link"])
def test_curves_are_not_written_to_what_takes_the_place_of_their_file(how, tmp_path, capsys):
    logger, outside = RunLogger(tmp_path, "", 0, 9), tmp_path / "outside"
    row = {"split": "val", "step": 1, "epoch": 1, "loss": 1.0, "top1": 50.0, "top5": 90.0}
    logger.write(row)
    assert [event.value for event in board(tmp_path / "tensorboard").Scalars("val/top1")] == [50.0]  # without waiting
    (file,) = (tmp_path / "tensorboard").iterdir()
    file.unlink()
    outside.write_text("precious")
    getattr(os, how)(outside, file)
    logger.write(row | {"step": 2})
    logger.close()
    assert outside.read_text() == "precious" and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "no more TensorBoard curves for this run ([Errno 116]" in capsys.readouterr().err


@pytest.mark.slow  # it imports torch in a new process
def test_a_disk_that_fails_in_tensorboards_own_thread_gives_a_warning_and_no_traceback(tmp_path):
    code = """
import pathlib, shutil, time
from sasa_train.training.log import RunLogger
logger = RunLogger(pathlib.Path(), "", step=0, total_steps=8)
shutil.rmtree("tensorboard")
for step in range(1, 50):
    logger.write({"split": "train", "step": step, "epoch": 1, "loss": 1.0, "top1": 50.0})
    time.sleep(0.01)
logger.close()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("no more TensorBoard curves for this run") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 49


@pytest.mark.parametrize("damage", [b"", b'{"split": "train", "step": 9', None])
def test_the_log_comes_back_from_the_checkpoint_whatever_happened_to_it(tmp_path, damage):
    """Check that the log is restored from the checkpoint, even if only one digit in an old row has changed."""
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)
    logger.write(row("train", 1))
    logger.close()
    whole, path = (tmp_path / "metrics.jsonl").read_bytes(), tmp_path / "metrics.jsonl"
    path.write_bytes(whole.replace(b"50.0", b"90.0") if damage is None else damage)
    RunLogger(tmp_path, logger.metrics, step=1, total_steps=8).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize("keeps_rest", [False, True])
def test_rows_wait_while_the_disk_is_full(tmp_path, capsys, keeps_rest):
    """A failing disk may keep what it has of a row, too, which once ended the run."""
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)
    logger.write(row("train", 1))
    file = logger._file
    real, file._file = file._file, FullDisk(file._file)
    if keeps_rest:
        file._file.truncate = mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
    logger.write(row("train", 2))
    logger.write(row("train", 3))
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1  # no whole row
    assert [each["step"] for each in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    file._file = real
    logger.write(row("train", 4))
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("its rows wait for room") == 2


def test_rows_that_waited_are_written_at_the_end(tmp_path):
    logger = RunLogger(tmp_path, "", step=0, total_steps=8)
    file = logger._file
    real, file._file = file._file, FullDisk(file._file)
    file._file.calls = 1
    logger.write(row("train", 1))
    file._file = real
    logger.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


class FullDisk:
    """A file that accepts three bytes and then raises an error."""

    def __init__(self, file):
        self.file, self.truncate, self.calls = file, file.truncate, 0

    def write(self, data) -> int:
        self.calls += 1
        if self.calls % 2 == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data[:3])


@pytest.mark.parametrize("seconds,text", [(4.6, "5 s"), (184, "3 min 04 s"), (3725, "1 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("num_columns", slow_but_for((80,), (60, 80, 120)))
def test_a_terminal_of_any_width_shows_the_bar_below_whole_lines(tmp_path, num_columns):
    """Lines that wrap would break the bar, which is redrawn in place, and leave pieces of it on the screen."""
    keys = ["trainer.epochs=2", "trainer.log_every_steps=2", "trainer.ema_decay=0.9"]
    keys += ["run_name=digits-hybrid_resnet26-e20-s0-b4dbb30e"]  # no path is split, so that it can be copied
    lines = lines_in_terminal(tmp_path, num_columns, "train", *TINY, *keys)
    begin = next(i for i, line in enumerate(lines) if line.startswith("lr "))
    assert lines[0] == "loading PyTorch ..." and lines[1].startswith("run folder")
    end = next(i for i, line in enumerate(lines) if line.startswith("top1 "))
    assert max(map(len, lines[: end if num_columns < 80 else None])) <= num_columns
    plan = " ".join(" ".join(lines[:begin]).split())
    assert "data digits, 70 train and 30 val images of 8 pixels, 10 classes, resident batch 16" in plan
    train = [line for line in lines if line.startswith("step ")]
    assert [line.split("  ")[0] for line in train] == [f"step {n}/8" for n in (2, 4, 6, 8)]
    assert all(re.search(r"  epoch [12]  loss \d\.\d{4}  top1 \d+\.\d\d", line) for line in train)
    val = [line for line in lines if line.startswith("val ")]
    assert [line.split("  ")[1] for line in val] == ["epoch 1", "epoch 2"] and val[0].endswith("best so far")
    assert all(("top5 " in line) == (num_columns >= 80 or "best" not in line) for line in val)
    bar = [line for line in lines if line.startswith("|")][-1]
    wide = (
        r"step 8/8  loss \d\.\d{3}  top1 \d+\.\d  [\d,]+ img/s"
        if num_columns >= 80
        else r"loss \d\.\d{3}  top1 \d+\.\d"
    )
    assert re.fullmatch(rf"\|[^|]+\| epoch 2/2  {wide}  ETA 00:00", bar), bar
    # A terminal shows ^C behind the bar; where it did not fit, the bar was on the screen twice.
    assert max(len(line) for line in lines if line.startswith("|")) <= num_columns - len("^C")


def test_the_least_important_parts_are_left_out_first():
    parts = [(0, "val"), (2, "step 7"), (0, "top1 13.00"), (1, ""), (1, "best so far")]
    assert fitting(parts, None) == fitting(parts, 36) == "val  step 7  top1 13.00  best so far"
    assert fitting(parts, 35) == "val  top1 13.00  best so far"
    assert fitting(parts, 3) == "val  top1 13.00"


def test_top5_of_five_or_fewer_classes_is_logged_and_not_shown(tmp_path, capsys):
    """It is 100 % whatever the model, and would look like a result."""
    for num_classes in (5, 6):
        folder = tmp_path / str(num_classes)
        folder.mkdir()
        logger = RunLogger(folder, "", step=0, total_steps=8, has_top5=has_top5(num_classes))
        logger.write(row("val", 4, top5=100.0))
        logger.show_val(row("val", 4, top5=100.0), is_best=False)
        logger.close()
        assert json.loads((folder / "metrics.jsonl").read_text())["top5"] == 100
        assert ("top5 100.00" in capsys.readouterr().out) == (num_classes == 6)
        assert ("val/top5" in board(folder / "tensorboard").Tags()["scalars"]) == (num_classes == 6)
