"""Check that scripts/gpu_check.py returns its results even if a part fails, since it gets only minutes of GPU time."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check.py"


@pytest.fixture
def check():
    """Import the script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), str(folder), "--dry-run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def status(folder: Path, part: str) -> dict:
    return json.loads((folder / f"{part}.status.json").read_text())


def test_a_part_that_takes_too_long_is_killed_with_its_children_and_the_next_one_runs(check, tmp_path, monkeypatch):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])"
    monkeypatch.setattr(check, "PARTS", {"right": check.Part(1, 1, ""), "tests": check.Part(1, 9, "")})
    monkeypatch.setattr(check, "part_command", lambda part, _: ["-c", program if part == "right" else "print('text')"])
    options = Namespace(folder=tmp_path, dry_run=False, call=None)
    assert not check.run_part("right", options) and check.run_part("tests", options)
    assert status(tmp_path, "right")["exit_code"] == "timeout" and status(tmp_path, "right")["seconds"] < 9
    assert check.gather(options) == 1 and "text" in (tmp_path / "summary.md").read_text()


def test_a_wrong_kernel_ends_the_call_at_once(check, tmp_path, monkeypatch, capsys):
    """Check that the call ends after a failed kernel check, because later measurements would be worthless."""
    monkeypatch.setattr(check, "part_command", lambda *_: ["-c", "raise SystemExit(1)"])
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path), "--call", "1"])
    assert check.main() == 1
    assert "right ... failed (1" in (said := capsys.readouterr().out) and "compile ..." not in said
    assert "call 1: " in said and "call 2: " in said and "(not now)" in said


def test_a_data_folder_is_found_from_the_parts_too_and_refused_at_once_if_missing(check, tmp_path, monkeypatch, capsys):
    """The parts, which run in another folder, must find the data; a missing folder must be reported at the start."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    started = []
    monkeypatch.setattr(check, "run_part", lambda part, options: started.append(check.part_command(part, options)))
    for name in ("cifar10", "cifar01"):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "out", "--only", "train", "--data", name])
        with pytest.raises(SystemExit) if name == "cifar01" else contextlib.nullcontext():
            check.main()
    assert len(started) == 1 and f"--data={tmp_path / 'cifar10'}" in started[0]
    assert f"--data {tmp_path / 'cifar01'}: there is no such folder" in capsys.readouterr().err


def test_weights_come_back_in_pieces(check, tmp_path):
    """Check that each piece of a weights file fits the size limit for returned files."""
    import torch

    ema = {"a": torch.arange(1000.0), "b": torch.arange(1000.0), "c": torch.tensor(3)}
    torch.save({"ema": ema}, tmp_path / "last.pt")
    check.MAX_BYTES = 3000
    pieces = list(check.half_pieces(tmp_path / "last.pt"))
    assert [list(piece) for piece in pieces] == [["a"], ["b", "c"]]
    assert torch.equal(pieces[1]["b"], ema["b"].half()) and pieces[1]["c"] == 3


@pytest.mark.slow
def test_a_training_without_time_for_its_epochs_returns_what_it_has(check, tmp_path, monkeypatch):
    monkeypatch.setitem(check.PARTS, "train", check.Part(2, check.SECONDS_TO_SAVE + 1, ""))
    assert check.measure_train(Namespace(folder=tmp_path, dry_run=True, data=None, epochs=1)) == 75
    assert {path.name for path in tmp_path.glob("train.*")} >= {"train.metrics.jsonl", "train.weights-0.pt"}


@pytest.mark.slow
def test_a_failed_part_leaves_the_others(tmp_path):
    (tmp_path / "op_fp32.json").mkdir()  # cannot be written
    process = dry_run(tmp_path, "--only", "op_fp32", "roofline")
    assert process.returncode == 1 and "op_fp32 ... failed (2" in process.stdout
    assert "roofline ... done" in process.stdout and "1 of 10 parts done" in process.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parts"]["op_bf16"] is None and summary["parts"]["roofline"]["exit_code"] == 0
    for row in summary["results"]["roofline"]["rows"]:
        passes = 12 * 16 * 16 * (4 if row["dtype"] == "fp32" else 2)  # bytes in a 4x4x16 map
        assert row["bytes_per_sec"] * row["seconds"] == pytest.approx(passes)
        assert row["of_copy"] == pytest.approx(row["bytes_per_sec"] / row["copy_bytes_per_sec"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_runs(tmp_path):
    process = dry_run(tmp_path)
    assert process.returncode == 0 and "10 of 10 parts done" in process.stdout, process.stdout
    charts = {path.stem for path in tmp_path.glob("*.png")}
    assert charts == {"op_bf16", "op_fp32", "flex_bf16", "models_bf16"}
    assert {path.name for path in tmp_path.glob("train.*")} >= {"train.metrics.jsonl", "train.weights-0.pt"}
    again = dry_run(tmp_path)
    assert "10 of 10 parts done" in again.stdout and " ... " not in again.stdout
