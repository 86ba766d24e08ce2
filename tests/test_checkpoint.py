"""A checkpoint appears whole or not at all; what cannot be trusted is named, and no code in it runs."""

import errno
import json
import os

import pytest
import torch

from sasa_train.checkpoint import REQUIRED, CheckpointError, Checkpoints, load_checkpoint
from sasa_train.logger import RunLogger, duration


def content(step: int) -> dict:
    return dict.fromkeys(REQUIRED) | {"model": {"weight": torch.full((1000,), float(step))}, "step": step}


def filled(folder, steps=(1, 2, 3, 4, 5), keep=2, best=(2,)) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(content(step), is_best=step in best)
    return checkpoints


def newest_step(folder, keep=2) -> tuple[int, list[str]]:
    warnings: list[str] = []
    found = Checkpoints(folder, keep).newest(warnings.append)
    return found["step"], warnings


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_last_best_and_the_newest_few_are_kept(tmp_path):
    filled(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "step-00000003.pt", "step-00000004.pt"]
    steps = {p.name: load_checkpoint(p)["step"] for p in tmp_path.iterdir()}
    assert steps == {"best.pt": 2, "last.pt": 5, "step-00000003.pt": 3, "step-00000004.pt": 4}


def test_a_resumed_run_keeps_its_last_checkpoint_too(tmp_path):
    filled(tmp_path, steps=(1, 2))
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.newest(print)
    checkpoints.save(content(3), is_best=False)
    assert [p.name for p in checkpoints.numbered()] == ["step-00000002.pt", "step-00000001.pt"]


def test_saving_the_same_step_again_makes_no_second_copy(tmp_path):
    filled(tmp_path, steps=(7, 7))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_numbered_checkpoints_are_ordered_as_numbers(tmp_path):
    for name in ("step-9.pt", "step-10.pt", "step-x.pt"):
        (tmp_path / name).touch()
    assert [p.name for p in Checkpoints(tmp_path, 3).numbered()] == ["step-10.pt", "step-9.pt"]


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 900), flip_a_bit, lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    filled(tmp_path)
    damage(tmp_path / "last.pt")
    step, warnings = newest_step(tmp_path)
    assert step == 4 and len(warnings) == 1 and "last.pt" in warnings[0]


def test_with_no_good_checkpoint_nothing_begins_anew(tmp_path):
    filled(tmp_path)
    for path in tmp_path.iterdir():
        os.truncate(path, 50)
    with pytest.raises(CheckpointError, match="none of its 4 checkpoints can be read"):
        newest_step(tmp_path)
    assert Checkpoints(tmp_path / "elsewhere", 2).newest(print) is None


def test_what_a_killed_save_left_aside_is_swept(tmp_path):
    filled(tmp_path)
    (tmp_path / "last.pt.tmp").write_bytes(b"half")
    assert newest_step(tmp_path) == (5, []) and not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device.*earlier ones are untouched"):
        checkpoints.save(content(6), is_best=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_hostile_pickle_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(content(1) | {"bomb": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="last.pt: cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_another_programs_file_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is no checkpoint of sasa_train"):
        load_checkpoint(tmp_path / "x.pt")


def row(split: str, step: int, **more) -> dict:
    return {"split": split, "step": step, "epoch": 1, "loss": 1.0, "top1": 50.0} | more


def board_steps(run_dir, tag: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    return [event.step for event in board.Scalars(tag)]


def test_the_log_is_one_clean_series_after_a_crash(tmp_path):
    """A run logged to step 6, evaluated there and was killed in the middle of a line; its checkpoint is of step 4."""
    logger = RunLogger(tmp_path, step=0, evaluated_step=0, total_steps=8)
    for step in range(1, 7):
        logger.write(row("train", step, grad_norm=float("inf")))
        if step % 2 == 0:
            logger.write(row("val", step))
    logger.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')
    logger = RunLogger(tmp_path, step=4, evaluated_step=2, total_steps=8)
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
        logger = RunLogger(tmp_path, step=0, evaluated_step=0, total_steps=8)
        logger.write(row("train", 1))
        logger.write(row("train", 2))
        logger.close()
    assert board_steps(tmp_path, "train/loss") == [1, 2]


def test_a_full_disk_costs_the_curves_and_not_the_run(tmp_path, capsys, monkeypatch):
    logger = RunLogger(tmp_path, step=0, evaluated_step=0, total_steps=8)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger._board, "add_scalar", full)
    logger.write(row("train", 1))
    logger.write(row("train", 2))
    logger.close()
    assert capsys.readouterr().err.count("no more TensorBoard curves") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("seconds,text", [(4.6, "5 s"), (184, "3 min 04 s"), (3725, "1 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text
