"""Check features of the training loop (limits, profiling, images, memory) by inspecting the files that runs write."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reading_runs import assert_same_run, board, rows
from running_commands import TINY, run_in_process

from sasa_train import evaluate, terminal
from sasa_train.config.compose import compose_config
from sasa_train.config.saved import load_config
from sasa_train.device import RunPlan, resolve
from sasa_train.files import lock_folder
from sasa_train.machine import waited_for_processors
from sasa_train.models import LocalSelfAttention2d
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import Checkpoints, load_checkpoint
from sasa_train.runs.folder import RunFolder
from sasa_train.training import announce
from sasa_train.training.log import RunLogger
from sasa_train.training.memory import largest_micro_batch, settle_auto
from sasa_train.training.snapshots import captions_of, confusion_picture, contact_sheet, embedding_pictures

CPU = torch.device("cpu")
RUN = (*TINY, "run_name=run", "data.max_train_images=70")


def test_a_narrow_terminal_keeps_the_command_that_continues_on_one_line(tmp_path, monkeypatch, capsys):
    for module in (announce, terminal):
        monkeypatch.setattr(module, "columns", lambda file: 80)
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.max_hours=1e-9") == 75
    assert "to continue: the same command again, or\nsasa-train resume=out/run\n" in capsys.readouterr().out


def test_busy_processors_are_named_with_the_remedy(tmp_path, monkeypatch, capsys, one_thread):
    """Threads that wait for one another once cost a newcomer 95 % of the speed, and nothing said why."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    stop = [*RUN, "trainer.max_hours=1e-9"]
    for load, num_threads, is_said in ((5.1, 2, True), (2.9, 2, False), (5.1, 1, False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        torch.set_num_threads(num_threads)
        assert run_in_process(tmp_path, monkeypatch, *stop, f"run_name=of-{load}-{num_threads}") == 75
        said = " ".join(capsys.readouterr().out.split())
        line = (
            "threads 2, but other programs use these processors (load 5.1 on 2): OMP_NUM_THREADS=1 before the command"
        )
        assert (line in said) == is_said and ("other programs" in said) == is_said


def test_a_run_that_becomes_slow_names_its_threads_once(tmp_path, monkeypatch, capsys, one_thread):
    """The load is looked at when a run begins; a program that started later made it crawl without a word."""
    from sasa_train.training import loop

    clock, real = [0.0], loop.Loop.count

    def count(self, report):
        real(self, report)
        clock[0] += 1.0 if self.state.step in (8, 9) else 0.1

    monkeypatch.setattr(loop.Loop, "count", count)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.max_steps=9") == 0
    told = "training is at 16 images/s, after 160: its 2 threads wait for one another, and "
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize(("share", "is_said"), [(0.6, True), (0.2, False)])
def test_threads_that_lack_processors_are_named_after_the_first_epoch(
    tmp_path, monkeypatch, capsys, one_thread, share, is_said
):
    """On a busy machine, a run crawled from its start, so that it never was slower than its own top speed."""
    from sasa_train.training import loop

    monkeypatch.setattr(loop, "WATCHED", 0)
    monkeypatch.setattr(loop, "waited_for_processors", lambda: 2 * share * time.perf_counter())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.max_steps=9") == 0
    said = " ".join(capsys.readouterr().err.split())
    told = "its 2 threads wait for one another, and other programs had their processors for 60% of the time; stop it"
    assert (said.count(told), said.count("had their processors")) == ((1, 1) if is_said else (0, 0))


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's statistics of its scheduler")
def test_waiting_for_a_processor_is_measured():
    """Two programs that compute on one processor each wait for half of the time."""
    before, mine = waited_for_processors(), os.sched_getaffinity(0)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for process in (0, other.pid):
            os.sched_setaffinity(process, {min(mine)})
        end = time.perf_counter() + 1
        while time.perf_counter() < end:
            pass
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, mine)
    assert waited_for_processors() - before > 0.1


def test_an_hour_limit_saves_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    """Check that a run stopped by its time limit (exit code 75) continues and ends like an uninterrupted run."""
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.max_hours=1e-9") == 75
    assert "trainer.max_hours: saved at step 1; to continue" in capsys.readouterr().out
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    assert "sasa-report --list" not in capsys.readouterr().out
    assert run_in_process(tmp_path, monkeypatch, *RUN, "run_name=whole") == 0
    assert_same_run(tmp_path / "out/run", tmp_path / "out/whole")
    following = [
        "next        sasa-report out/whole",
        "sasa-evaluate out/whole",
        "sasa-report --list out",
        "tensorboard",
    ]
    said = capsys.readouterr().out
    assert "\n            ".join(following) in said
    assert "chance      this top1 is not above chance (" in said  # after 3 epochs of 70 images
    assert "12 steps are few, so train longer (trainer.epochs=...) first" in " ".join(said.split())


@pytest.mark.parametrize("every,expected", [(50, [4, 8, 10]), (3, [3, 6, 9, 10]), (6, [4, 8, 10])])
def test_every_epoch_has_a_train_row(every, expected, tmp_path, monkeypatch):
    """The run has epochs of 4 steps and ends in the middle of the third; rows at 4, 6, 8 looked irregular."""
    short = ["trainer.max_steps=10", f"trainer.log_every_steps={every}"]
    assert run_in_process(tmp_path, monkeypatch, *RUN, *short) == 0
    assert [row["step"] for row in rows(tmp_path / "out/run") if row["split"] == "train"] == expected


def test_a_loss_on_val_that_is_not_finite_is_told_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    """A diverging run may recover; its weights are finite, or it would have stopped."""
    from sasa_train.training import loop

    real, num = loop.evaluate, iter(range(9))

    def overflowing(*arguments):
        found = real(*arguments)
        return dataclasses.replace(found, loss=float("inf")) if next(num) == 1 else found

    monkeypatch.setattr(loop, "evaluate", overflowing)
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    assert capsys.readouterr().err.count("the loss on val after step 8 is inf; the run goes on") == 1
    assert [row["loss"] is None for row in rows(tmp_path / "out/run") if row["split"] == "val"] == [False, True, False]


def test_tensorboard_and_the_run_folder_hold_the_pictures(tmp_path, monkeypatch):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.log_histograms=true", "augment.mixup=0.2") == 0
    run = tmp_path / "out/run"
    sheet = Image.open(run / "augmented.png")
    assert sheet.size == (4 * 98 + 2, 4 * (98 + 26) + 2)  # 16 images of 8 pixels, enlarged to 96, above two lines
    events = board(run / "tensorboard")
    tags = events.Tags()
    assert {"visualize/augmented", "visualize/confusion_best"} <= set(tags["images"])
    assert (
        "visualize/rel_embeddings/layer1.0.conv2" in tags["images"] and len(tags["images"]) == 2 + 9
    )  # the stem and 8 blocks
    best = max((row for row in rows(run) if row["split"] == "val"), key=lambda row: row["top1"])
    assert events.Images("visualize/confusion_best")[-1].step == best["step"]
    # TensorBoard sorts its groups by name and opens on the first: scalars come before pictures and histograms.
    assert max(tags["scalars"]) < min(tags["images"] + tags["distributions"] + tags["histograms"])
    assert "weights/fc.weight" in tags["distributions"] + tags["histograms"]
    assert len(events.Histograms("weights/fc.weight")) == 3  # one per evaluation
    assert {"perf/memory_mib", "perf/data_wait_fraction"} <= set(tags["scalars"])
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in content and b"model.kernel_size" in content


def test_a_profile_names_the_attention(tmp_path, monkeypatch):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.profile_steps=2") == 0
    profile = tmp_path / "out/run/profile"
    assert "sasa_train::local_attention" in (profile / "operators.txt").read_text()
    names = {event.get("name") for event in json.loads((profile / "trace.json").read_text())["traceEvents"]}
    assert any("sasa_train::local_attention" in str(name) for name in names)


@pytest.mark.parametrize("given", ["trainer.micro_batch_size=4", "trainer.grad_accum_steps=4"])
def test_a_micro_batch_size_is_accumulation_by_another_name(tmp_path, monkeypatch, given):
    assert run_in_process(tmp_path, monkeypatch, *RUN, given, "run_name=one") == 0
    saved = load_config(load_checkpoint(tmp_path / "out/one/checkpoints/last.pt")["config"]).trainer
    assert saved.grad_accum_steps == 4 and saved.global_batch_size == 16


def test_auto_takes_what_fits_and_a_resume_keeps_it(monkeypatch, in_process):
    """Check that a run resumed on another machine keeps its micro-batch size, because batch norm depends on it."""
    memory = 5_400_000  # enough for 8 images, or 16 with checkpointing
    monkeypatch.setattr("sasa_train.training.memory.available_memory", lambda _: memory)
    arguments = (*RUN, "trainer.micro_batch_size=auto")
    said = in_process("train", *arguments, "trainer.max_hours=1e-9", expect=75).stdout
    found = int(said.partition("trainer.micro_batch_size=auto: ")[2].split()[0])
    assert 1 < found < 16 and f"16 = {16 // found} x {found} images per step" in said
    monkeypatch.setattr("sasa_train.training.memory.available_memory", lambda _: 10**12)
    assert f"16 = {16 // found} x {found} images per step" in in_process("train", *arguments).stdout
    assert "is finished" in in_process("train", *arguments).stdout


def test_auto_counts_what_checkpointing_saves_and_a_run_killed_early_keeps_its_size(tmp_path, monkeypatch):
    """Check that a run killed before its first checkpoint keeps the micro-batch size recorded in config.yaml."""
    monkeypatch.setattr("sasa_train.training.memory.available_memory", lambda _: 5_400_000)
    config = compose_config([*RUN, "trainer.micro_batch_size=auto"])
    plan = RunPlan(config, CPU)
    assert largest_micro_batch(plan) == 8
    config.trainer.grad_checkpointing = True
    assert largest_micro_batch(plan) == 16
    config.trainer.grad_checkpointing = False
    run = RunFolder(tmp_path, lock_folder(tmp_path), Checkpoints(tmp_path / "checkpoints", 0), None)
    run.write_config(settle_auto(plan, run))
    monkeypatch.setattr("sasa_train.training.memory.available_memory", lambda _: 10**12)
    assert settle_auto(plan, run).trainer.grad_accum_steps == 2
    config.trainer.global_batch_size = 36  # another batch size, not divisible by 8
    trainer = settle_auto(plan, run).trainer
    assert (trainer.micro_batch_size, trainer.grad_accum_steps) == (6, 6)


def test_auto_is_refused_where_not_one_image_fits(monkeypatch):
    monkeypatch.setattr("sasa_train.training.memory.available_memory", lambda _: 1000)
    with pytest.raises(ConfigError, match="not even one image of 224 pixels fits into the memory of cpu"):
        largest_micro_batch(RunPlan(compose_config(["experiment=imagenet_sasa_resnet50"]), CPU))


@pytest.mark.parametrize("precision,allows", [("highest", False), ("high", True)])
def test_one_key_rules_tf32_of_matrices_and_convolutions(precision, allows):
    """Check that one key sets TF32 for both convolutions and matrix products; otherwise comparisons would be unfair."""
    try:
        resolve(compose_config([f"trainer.matmul_precision={precision}"]))
        assert torch.get_float32_matmul_precision() == precision
        assert torch.backends.cudnn.allow_tf32 == allows
    finally:
        resolve(compose_config([]))


def test_recalibrated_statistics_are_in_the_checkpoint(tmp_path, monkeypatch, capsys):
    """Check that recalibrated batch norm statistics are saved, so that sasa-evaluate reproduces the logged loss."""
    arguments = (*RUN, "trainer.bn_recalibration_batches=2", "trainer.ema_decay=0.99", "model.drop_path_rate=0.3")
    assert run_in_process(tmp_path, monkeypatch, *arguments) == 0
    last = [row for row in rows(tmp_path / "out/run") if row["split"] == "val"][-1]
    capsys.readouterr()
    assert evaluate.run_command([str(tmp_path / "out/run/checkpoints/last.pt")]) == 0
    assert f"loss   {last['loss']:.4f}" in capsys.readouterr().out
    ema = load_checkpoint(tmp_path / "out/run/checkpoints/last.pt")["ema"]
    assert ema["layer1.0.bn1.num_batches_tracked"] == 2


def test_the_contact_sheet_shows_the_images():
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 32, 32)
    sheet = contact_sheet(images, [f"{i}" * 40 for i in range(8)] + [""])
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 3 * 124 + 2, 3 * 98 + 2)
    assert [int(sheet[0, 50 + 124 * (i // 3), 50 + 98 * (i % 3)]) for i in range(9)] == list(range(9))
    below = [sheet[:, 98 + 124 * (i // 3) :, 2 + 98 * (i % 3) :][:, :26, :96] for i in range(9)]
    assert [bool((strip[:, :13] < 128).any() and (strip[:, 13:] < 128).any()) for strip in below] == [True] * 8 + [
        False
    ]
    assert (sheet[:, :, [0, 1, 98, 99, -2, -1]] == 255).all()  # no caption leaves its column


def test_captions_name_the_class_or_the_shares_of_mixed_labels():
    assert captions_of(torch.tensor([1, 0]), ["cat", "dog\n"]) == ["dog\\n", "cat"]
    mixed = torch.tensor([[0.3, 0.0, 0.7], [1.0, 0.0, 0.0]])
    assert captions_of(mixed, ["cat", "cow", "dog"]) == ["70 % dog\n30 % cat", "100 % cat"]


def test_the_confusion_picture_darkens_with_the_part_of_the_row():
    picture = confusion_picture(torch.tensor([[9, 1], [0, 0]]))
    assert picture.shape == (3, 400, 400) and picture[:, 300, 100].tolist() == [255] * 3  # an empty row is white
    assert picture[0, 100, 100] < picture[0, 100, 300] < 255


def test_embeddings_are_blue_below_and_red_above_zero():
    layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2)
    with torch.no_grad():
        layer.rel_height.fill_(1.0)
        layer.rel_width.fill_(-1.0)
    ((_, picture),) = embedding_pictures(torch.nn.Sequential(layer)).items()
    colours = np.unique(picture.permute(1, 2, 0).reshape(-1, 3).numpy(), axis=0).tolist()
    assert colours == [[8, 48, 107], [165, 15, 21]]


def test_embeddings_of_an_axial_window_are_drawn_above_white():
    """A run with model.axial=true failed at its first evaluation."""
    layer = LocalSelfAttention2d(8, 8, kernel_size=(3, 1), num_heads=2)
    assert layer.rel_height is not None and layer.rel_width is not None
    with torch.no_grad():
        layer.rel_height.fill_(1.0)
        layer.rel_width.fill_(1.0)
    ((_, picture),) = embedding_pictures(torch.nn.Sequential(layer)).items()
    rows, columns = picture.chunk(2, dim=2)
    height = picture.shape[1] // 3
    assert (columns[:, height:] == 255).all() and torch.equal(columns[:, :height], rows[:, :height])


def test_a_run_too_short_for_its_profile_says_so(tmp_path, monkeypatch, capsys):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.profile_steps=2", "trainer.max_steps=3") == 0
    assert "no profile: the run ended before step 8 after its start" in capsys.readouterr().out


def test_the_time_left_counts_evaluations_before_a_resume_too(tmp_path, monkeypatch):
    """Check that a resumed run reads the evaluation time from metrics.jsonl, so that the time left includes it."""
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    last = [row for row in map(json.loads, (tmp_path / "out/run/metrics.jsonl").open()) if row["split"] == "val"][-1]
    metrics = (tmp_path / "out/run/metrics.jsonl").read_text()
    logger = RunLogger(tmp_path / "out/run", metrics, last["step"], last["step"])
    assert logger.eval_seconds == last["seconds"] > 0
    logger.close()
