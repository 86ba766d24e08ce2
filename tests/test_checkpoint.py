"""A checkpoint appears whole or not at all; what cannot be trusted is named, and no code in it runs."""

import errno
import os

import pytest
import torch

from sasa_train.checkpoint import REQUIRED, CheckpointError, Checkpoints, load_checkpoint


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
