"""Check the guarantees in docs/reliability.md by running the command: signals, locks, disks, data, memory, numerics."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from marking import slow_but_for
from reading_runs import assert_same_run, rows
from running_commands import TINY, run_in_process, start, wait_for_rows
from taking_steps import batches, setup
from torch import nn

import sasa_train
from sasa_train import evaluate, files
from sasa_train.config.compose import compose_config
from sasa_train.config.saved import to_yaml
from sasa_train.refusal import ConfigError
from sasa_train.report.facts import headline
from sasa_train.report.jobs import find_jobs
from sasa_train.runs import info, provenance
from sasa_train.runs.checkpoint import CheckpointError, Checkpoints, load_checkpoint
from sasa_train.signals import SIGNALS, StopRequest
from sasa_train.training import loop
from sasa_train.training.endings import foreseen
from sasa_train.training.nonfinite import LossWatch, find_origin
from sasa_train.training.step import Stepper

RUN = (*TINY, "run_name=a", "trainer.checkpoint_every_steps=1")
LONG = (*RUN, "trainer.epochs=400", "trainer.keep_checkpoints=1")
NO_AUTOCAST = torch.autocast("cpu", enabled=False)


# Signals


@pytest.mark.parametrize("number", slow_but_for([signal.SIGUSR1], [signal.SIGUSR1, signal.SIGUSR2]))
def test_a_schedulers_warning_is_served_as_sigterm_is(tmp_path, number):
    """Slurm and submitit send these signals before a kill; the run must save instead of being terminated by them."""
    process = start(tmp_path, *LONG)
    wait_for_rows(tmp_path / "out/a", 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75 and f"{number.name}: saved at step" in output


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest()
    yield request
    request.restore()


def test_before_the_first_step_a_signal_ends_a_run_at_once_and_later_it_waits_for_the_step(stop):
    for number in SIGNALS:
        with pytest.raises(BaseException, match="^$") as caught:
            signal.raise_signal(number)
        assert type(caught.value).__name__ == "Interrupted"
        stop.signal = None
    stop.begin_training()
    signal.raise_signal(signal.SIGUSR2)
    assert stop.requested() and stop.reason == "SIGUSR2"


def test_a_stop_within_code_whose_cleanup_fails_is_still_a_stop(tmp_path):
    """OmegaConf's cleanup, for one, fails over an object that is only half built, and hides what it was told."""
    text = """
        import os, signal

        def half_built():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                raise SystemError("the signal was not heard")
            finally:
                raise AttributeError("'NoneType' object has no attribute 'flags'")
    """
    (tmp_path / "my_data.py").write_text(textwrap.dedent(text))
    process = start(tmp_path, *RUN, "imports=[./my_data.py]", "data.target=my_data.half_built")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert output.endswith("stopped before training began; run the same command again\n")


def test_a_second_ctrl_c_ends_a_run_that_does_not_get_to_its_next_step(tmp_path):
    code = "import signal, sys; from sasa_train.signals import StopRequest; s = StopRequest(); s.begin_training()\n"
    code += "signal.raise_signal(signal.SIGINT); print('still here', flush=True); signal.raise_signal(signal.SIGINT)\n"
    process = subprocess.run([sys.executable, "-c", code + "print('never')"], capture_output=True, text=True)
    assert process.returncode == 130 and process.stdout == "still here\n"


def test_a_signal_in_the_first_step_ends_the_run_at_once(tmp_path, monkeypatch, in_process):
    """Check that a signal in the first step, which may include an hour of compilation, ends the run immediately."""
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "train_step", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
        assert "stopped before training began" in in_process("train", *RUN, expect=75).stderr
    assert not list((tmp_path / "out/a").glob("checkpoints/*"))
    assert json.loads((tmp_path / "out/a/run.json").read_text())["status"] == "interrupted"
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0


def test_a_signal_between_two_looks_is_served_after_a_save(tmp_path, monkeypatch):
    """Check that a signal that arrives just after the run has checked for signals still causes it to save."""
    real, looks = StopRequest.requested, []

    def requested(self):
        looks.append(real(self))
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)
        return looks[-1]

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "requested", requested)
        assert run_in_process(tmp_path, monkeypatch, *TINY, "run_name=a") == 75
    stopped = load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")
    assert stopped["step"] == json.loads((tmp_path / "out/a/metrics.jsonl").read_text().splitlines()[-1])["step"]


def test_sigterm_and_then_ctrl_c_still_saves(stop):
    """Check that only a second Ctrl-C ends a run immediately, not a Ctrl-C after a scheduler's SIGTERM."""
    stop.begin_training()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.reason == "SIGTERM"


def test_a_signal_after_the_end_does_not_change_what_the_run_ended_with():
    """Check that a signal during interpreter shutdown, which takes seconds, does not change the exit code."""
    code = """
import atexit, os, signal, sys, sasa_train.train as t

class Last:
    def __del__(self, kill=os.kill, process=os.getpid()):
        kill(process, 15)

sys.last_of_all = Last()
atexit.register(signal.raise_signal, signal.SIGTERM)
t.run_command = lambda _: 75
t.main()
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 75


@pytest.mark.parametrize("phase", ["evaluate", "recalibrate", "save"])
def test_a_signal_in_any_phase_saves_and_the_run_ends_as_one_undisturbed(tmp_path, monkeypatch, phase):
    """The signal arrives at the beginning of the second evaluation, recalibration or save."""
    run = (*TINY, "trainer.bn_recalibration_batches=2", "trainer.ema_decay=0.9")
    assert run_in_process(tmp_path, monkeypatch, *run, "run_name=whole") == 0
    owner = Checkpoints if phase == "save" else loop
    real, calls = getattr(owner, phase), []

    def with_signal(*arguments, **options):
        calls.append(phase)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, phase, with_signal)
        assert run_in_process(tmp_path, monkeypatch, *run, "run_name=a") == 75
    assert json.loads((tmp_path / "out/a/run.json").read_text())["status"] == "interrupted"
    assert run_in_process(tmp_path, monkeypatch, *run, "run_name=a") == 0
    assert_same_run(tmp_path / "out/a", tmp_path / "out/whole")


# Locks


def test_a_second_run_is_told_who_holds_the_folder_and_a_dead_ones_lock_is_taken_over(tmp_path, in_process):
    process = start(tmp_path, *LONG)
    wait_for_rows(tmp_path / "out/a", 1, process)
    refused = in_process("train", *LONG, expect=2)
    assert f"out/a is in use by process {process.pid} on " in refused.stderr and "started at" in refused.stderr
    process.kill()
    process.communicate()
    held = json.loads((tmp_path / "out/a/.lock").read_text())
    assert held["process"] == process.pid
    in_process("train", *LONG, "trainer.max_hours=1e-9", expect=75)


def test_of_two_starts_at_once_exactly_one_takes_the_folder(tmp_path):
    """Two processes race to lock each of 20 folders; scripts/chaos.py tests such races with the commands themselves."""
    code = f"""
import sys, time
from pathlib import Path
from sasa_train.refusal import ConfigError
from sasa_train.files import lock_folder
for number in range(20):
    folder = Path({str(tmp_path)!r}) / str(number)
    folder.mkdir(exist_ok=True)
    (folder / sys.argv[1]).touch()
    while len(list(folder.glob("[ab]"))) < 2:
        pass
    try:
        lock = lock_folder(folder)
    except ConfigError:
        print(number, flush=True)
    (folder / f"{{sys.argv[1]}}.done").touch()
    while len(list(folder.glob("*.done"))) < 2:
        time.sleep(0.001)
"""
    command = [sys.executable, "-c", code]
    pair = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"]
    refused = " ".join(process.communicate(timeout=120)[0] for process in pair).split()
    assert sorted(map(int, refused)) == list(range(20))


@pytest.mark.parametrize("name", [".lock", "checkpoints", "tensorboard/events", "metrics.jsonl"])
def test_a_link_in_a_run_folder_does_not_lead_out_of_it(tmp_path, name, in_process):
    """Check that symbolic links in a run folder are refused, because writing to them would destroy other files."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "out/a" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    assert f"out/a/{name} is a symbolic link" in in_process("train", *RUN, expect=2).stderr
    assert victim.read_text() == "precious"


# Disks


def fail_to_write(monkeypatch, steps: set[int]) -> None:
    real = Checkpoints.save

    def save(self, content, is_best):
        if content["step"] in steps:
            raise CheckpointError(f"step {content['step']}: cannot write (No space left on device)")
        return real(self, content, is_best)

    monkeypatch.setattr(Checkpoints, "save", save)


def test_when_a_checkpoint_cannot_be_written_a_run_stops_or_goes_on_as_configured(tmp_path, monkeypatch, in_process):
    with monkeypatch.context() as patch:
        fail_to_write(patch, {5, 6})
        assert "step 5: cannot write" in in_process("train", *RUN, expect=1).stderr
        assert load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")["step"] == 4
        to_go_on = (*RUN, "run_name=b", "trainer.on_failed_save=continue")
        assert "tries again at the next checkpoint" in in_process("train", *to_go_on).stderr
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    assert_same_run(tmp_path / "out/a", tmp_path / "out/b", ["last"])


def test_a_best_model_that_was_not_saved_is_not_the_best(tmp_path, monkeypatch, capsys):
    """Check that a best model whose save failed is not recorded as the best, so that best.pt and last.pt agree.

    A later, worse one was then called the best, although the log has the better one.
    """
    real, top1s = loop.evaluate, iter([10.0, 20.0, 15.0])
    with monkeypatch.context() as patch:
        fail_to_write(patch, {8})
        patch.setattr(loop, "evaluate", lambda *a: dataclasses.replace(real(*a), top1=next(top1s)))
        assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.on_failed_save=continue") == 0
    last, best = (load_checkpoint(tmp_path / f"out/a/checkpoints/{name}.pt") for name in ("last", "best"))
    assert last["best"] == best["best"] and best["best"]["step"] == best["step"] == 12
    told = capsys.readouterr()
    assert "WARNING: the best model so far (top1 20.00 after epoch 2) is not kept" in told.err
    end = "best 15.00 after epoch 3 (the model of 20.00 after epoch 2 was not kept)"
    assert f"15.00 at the end; {end}" in told.out
    assert [told.out.count(f"best so far{rest}\n") for rest in ("", ", but a better one was not kept")] == [2, 1]
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0 and f"12 steps, {end}. " in capsys.readouterr().out
    said = dict((name, note) for name, _, note in headline(find_jobs([tmp_path / "out/a"]).jobs[0]))
    assert said["top1, best epoch"].endswith("best.pt is another, because the save of this one failed")


def test_a_file_server_that_fails_for_a_moment_is_no_lost_lock(tmp_path, monkeypatch, capsys):
    """One ESTALE while a run looked at its lock, before a save, ended it as if another run had taken the folder."""
    holds, write, saving, failed = files.FolderLock.holds, loop.Loop.write, list[int](), list[int]()

    def failing_once(lock, path):
        if saving and not failed:
            failed.append(1)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return holds(lock, path)

    def noted(self, *arguments):
        saving.append(1)
        try:
            return write(self, *arguments)
        finally:
            saving.clear()

    monkeypatch.setattr(files.FolderLock, "holds", failing_once)
    monkeypatch.setattr(loop.Loop, "write", noted)
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.on_failed_save=continue") == 0
    assert "Stale file handle" in (text := capsys.readouterr().err) and "tries again at the next" in text
    failed.clear()
    assert run_in_process(tmp_path, monkeypatch, *RUN, "run_name=b") == 1
    assert "the disk failed at out/b (Stale file handle)" in capsys.readouterr().err


def test_a_file_that_cannot_be_looked_at_now_is_not_missing(tiny_run, tmp_path, monkeypatch, in_process):
    """ESTALE at config.yaml was reported as another config, with the advice to allow changes of all its keys."""
    run, real = shutil.copytree(tiny_run, tmp_path / "run"), os.stat
    for name, command in (("config.yaml", ["train", f"resume={run}"]), ("best.pt", ["evaluate", str(run)])):

        def failing(path, *arguments, name=name, **options):
            if str(path).endswith(f"/{name}"):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return real(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", failing)
            told = in_process(*command, expect=1).stderr
        assert "Stale file handle" in told and name in told and "Traceback" not in told


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOLCK])
def test_what_the_system_lacks_for_now_is_one_line(tmp_path, monkeypatch, capsys, number):
    def failing(*_):
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr("sasa_train.training.run.build_loaders", failing)
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 1
    error = capsys.readouterr().err
    assert f"cannot use somewhere now ({os.strerror(number)}); run the same command again" in error
    assert "Traceback" not in error


def test_a_best_checkpoint_exchanged_while_a_run_goes_on_is_told_at_the_end(tmp_path, monkeypatch, capsys):
    real = Checkpoints.save

    def save(self, content, is_best):
        real(self, content, is_best)
        if content["finished"]:
            for name in ("best.pt", "best.pt.json"):
                (self.folder / name).unlink()

    monkeypatch.setattr(Checkpoints, "save", save)
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    assert "best.pt is not the one of step" in (text := capsys.readouterr().err) and "it is gone" in text


def test_checkpoints_that_were_taken_away_are_missed(tmp_path, monkeypatch, in_process):
    """Check that a run whose checkpoints were purged from a scratch disk fails instead of starting over."""
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    metrics = (tmp_path / "out/a/metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "out/a/checkpoints")
    assert "this run had checkpoints, and they are gone" in in_process("train", *RUN, expect=1).stderr
    (tmp_path / "out/a/run.json").write_text("{")
    assert "metrics.jsonl has rows, and neither" in in_process("train", *RUN, expect=1).stderr
    assert (tmp_path / "out/a/metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("number", slow_but_for([errno.EIO], [errno.EIO, errno.EHOSTDOWN]))
def test_a_disk_that_fails_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys, name, number):
    """Writing a file of the run folder fails, as on a disk that is pulled out or a file server that restarts."""
    real = os.replace

    def failing(source, target):
        if Path(target).name == name:
            raise OSError(number, os.strerror(number), str(target))
        real(source, target)

    def failing_open(path, *rest, **more):
        if Path(path).name == name == "metrics.jsonl":
            raise OSError(number, os.strerror(number), str(path))
        return real_open(path, *rest, **more)

    real_open = Path.open
    monkeypatch.setattr(os, "replace", failing)
    monkeypatch.setattr(Path, "open", failing_open)
    assert run_in_process(tmp_path, monkeypatch, *TINY, "run_name=failing", "trainer.epochs=1") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "the disk failed at" in error and f"{name} ({os.strerror(number)}); run the same command once" in error


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_about_a_file_is_one_line(number):
    """A file server that was down, or a name too long for it, ended a run in a traceback."""
    text = foreseen(OSError(number, os.strerror(number), "out/a/run.json"))
    assert foreseen(OSError(number, os.strerror(number))) is not None  # of a write, which names no file
    assert text is not None and re.search(r"out/a/run.json (now )?\(", text) and f"({os.strerror(number)}); " in text


def test_a_disk_error_while_run_json_is_read_does_not_empty_it(tmp_path, tiny_run, monkeypatch, in_process):
    """One failed read of the file made an update write it anew, without provenance, starts and has_checkpoint."""
    folder, real = shutil.copytree(tiny_run, tmp_path / "run"), info.read_regular
    before, left = (folder / "run.json").read_bytes(), [1]

    def failing_once(path):
        if left and left.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(info, "read_regular", failing_once)
    error = in_process("train", "resume=run", expect=1).stderr
    assert "the disk failed at" in error and "run.json (Input/output error); run the same command once" in error
    assert (folder / "run.json").read_bytes() == before
    left.append(1)
    with pytest.raises(
        ConfigError, match=r"run.json: cannot be read \(Input/output error\); run the same command once"
    ):
        find_jobs([folder])
    left.append(1)
    assert info.read_info(folder) == {}  # a sweep goes on without it
    in_process("train", "resume=run")
    assert json.loads((folder / "run.json").read_bytes()) == json.loads(before)


@pytest.mark.parametrize(
    "reason,told",
    [
        ("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory", "memory ran out"),
        (
            "Both TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD and its counterpart are set",
            "is undamaged, but PyTorch",
        ),
    ],
)
def test_a_good_checkpoint_that_cannot_be_loaded_now_is_not_put_aside(tmp_path, monkeypatch, in_process, reason, told):
    """One moment without memory made a run call all of its checkpoints damaged, and it could not go on later."""
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=RuntimeError(reason)))
    in_process("train", *RUN, "trainer.max_hours=1e-9", expect=75)
    before = {path: path.read_bytes() for path in (tmp_path / "out/a/checkpoints").iterdir()}
    error = in_process("train", "resume=out/a", expect=1).stderr
    assert told in error and reason in error and "out/a/checkpoints/last.pt: " in error
    assert {path: path.read_bytes() for path in (tmp_path / "out/a/checkpoints").iterdir()} == before
    monkeypatch.undo()
    in_process("train", f"resume={tmp_path}/out/a", "trainer.max_hours=null")


def test_a_console_on_a_full_disk_does_not_end_a_run(tmp_path):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "sasa_train.train", *RUN]
        process = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert len(rows(tmp_path / "out/a")) == 15


def test_a_run_that_started_from_a_checkpoint_goes_on_without_it(tmp_path, monkeypatch):
    """Check that a run continues without its source checkpoint, which the parent run may delete after newer saves."""
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    source = tmp_path / "out/a/checkpoints/step-00000009.pt"
    again = [*RUN, "resume=out/a/checkpoints/step-00000009.pt"]
    assert run_in_process(tmp_path, monkeypatch, *again, "trainer.max_hours=1e-9") == 75
    source.unlink()
    assert run_in_process(tmp_path, monkeypatch, *again) == 0
    assert run_in_process(tmp_path, monkeypatch, *again) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "a-2"]
    assert json.loads((tmp_path / "out/a-2/run.json").read_text())["versions"]["torch"]
    assert run_in_process(tmp_path, monkeypatch, *RUN, "resume=out/a/checkpoints/step-00000008.pt") == 2


def test_a_run_folder_is_continued_with_its_checkpoints_config(tmp_path, monkeypatch):
    """Check that a run continues with its checkpoint's config if a full disk has truncated config.yaml."""
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.keep_checkpoints=7", "trainer.max_hours=1e-9") == 75
    path = tmp_path / "out/a/config.yaml"
    path.write_text(path.read_text().split("  keep_checkpoints")[0])
    assert run_in_process(tmp_path, monkeypatch, "resume=out/a", "trainer.max_hours=null") == 0
    assert len(list((tmp_path / "out/a/checkpoints").glob("step-*.pt"))) == 7


def test_a_run_never_counts_as_done_without_its_last_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fail_to_write(patch, {12})
        assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.on_failed_save=continue") == 1
    assert json.loads((tmp_path / "out/a/run.json").read_text())["status"] == "failed"
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0


def test_a_finished_runs_log_is_mended_by_the_same_command(tmp_path, monkeypatch):
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    path = tmp_path / "out/a/metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    assert path.read_bytes() == whole


# Data


def on_images(root: Path) -> list[str]:
    data = ["data=image_folder", f"data.root={root}", "data.image_size=16", "data.max_train_images=null"]
    return [*RUN, *data, "data.max_val_images=null", "trainer.global_batch_size=8", "model.stem=conv_small"]


def test_a_resume_on_changed_images_is_refused_by_name_and_elsewhere_they_may_lie(
    tmp_path, monkeypatch, capsys, image_folder, in_process
):
    run = on_images(image_folder)
    assert run_in_process(tmp_path, monkeypatch, *run, "trainer.max_hours=1e-9") == 75
    shutil.move(image_folder, tmp_path / "moved")
    run = on_images(tmp_path / "moved")
    assert run_in_process(tmp_path, monkeypatch, *run, "trainer.max_hours=1e-9") == 75  # moved, same images
    shutil.copy(tmp_path / "moved/train/red/0.png", tmp_path / "moved/train/red/7.png")
    shutil.copy(tmp_path / "moved/val/red/0.png", tmp_path / "moved/val/red/1.png")
    capsys.readouterr()
    assert evaluate.run_command(["out/a/checkpoints/last.pt"]) == 0
    assert "not the images that the run was evaluated on: val: the content of class 'red'" in capsys.readouterr().out
    message = in_process("train", *run, expect=2).stderr
    assert "train: class 'red' had 7 images, now 8" in message and "val: the content of class 'red' changed" in message
    assert run_in_process(tmp_path, monkeypatch, *run, "allow_config_change=[data.root]") == 0
    assert "WARNING: the images are not those that this run began with" in capsys.readouterr().err


# Provenance


def test_a_checkpoint_says_what_made_it(tmp_path, monkeypatch):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "seed=3") == 0
    saved = load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")
    made = saved["provenance"]
    names = {"command", "reproduce", "commit", "dirty", "difference", "versions", "host", "gpu", "threads"}
    assert names <= made.keys()
    assert made["seed"] == 3 and made["versions"]["torch"] == str(torch.__version__)
    assert saved["fingerprint"]["train"]["classes"][0]["num_images"] == 7


def test_what_was_not_committed_is_kept_beside_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "_git", lambda *arguments: "diff --git" if "diff" in arguments else "0123456")
    assert run_in_process(tmp_path, monkeypatch, *RUN) == 0
    made = json.loads((tmp_path / "out/a/run.json").read_text())
    assert made["dirty"] and (tmp_path / "out/a" / made["difference"]).read_text() == "diff --git\n"
    assert made["starts"][0]["difference"] == made["difference"]


def test_somebody_elses_checkout_is_not_ours(tmp_path):
    """Check that if the package is installed inside another project's repository, that repository is not recorded."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copytree(Path(sasa_train.__file__).parent, tmp_path / "site/sasa_train")
    code = "from sasa_train.runs import provenance; print(provenance._git('status'))"
    run = subprocess.run([sys.executable, "-P", "-c", code], env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout == "None\n"


def test_other_code_or_packages_are_named_on_resume(tmp_path, monkeypatch, in_process):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "trainer.max_hours=1e-9") == 75
    monkeypatch.setattr(provenance, "_git", lambda *arguments: "0123456" if "rev-parse" in arguments else None)
    monkeypatch.setattr(provenance, "_version", lambda package: "99.9")
    monkeypatch.setattr(provenance, "_sources", lambda: "sha256 0")
    message = in_process("train", *RUN).stderr
    assert "changed since the checkpoint was written:\n  the code: commit" in message and "-> 0123456" in message
    assert "\n  timm: " in message and "-> 99.9" in message


def test_run_json_has_a_command_that_makes_the_run_again(tmp_path, monkeypatch):
    assert run_in_process(tmp_path, monkeypatch, *RUN, "optimizer=adamw", "data.mean=[0.5,0.5,0.5]") == 0
    again = shlex.split(json.loads((tmp_path / "out/a/run.json").read_text())["reproduce"])
    assert again[0] == "sasa-train" and "experiment=debug" not in again
    assert to_yaml(compose_config(again[1:])) == (tmp_path / "out/a/config.yaml").read_text()
    assert run_in_process(tmp_path, monkeypatch, *again[1:], "run_name=b") == 0
    assert rows(tmp_path / "out/a") == rows(tmp_path / "out/b")


# Numbers and memory


@pytest.mark.parametrize("is_late", [False, True])
def test_a_non_finite_loss_names_the_module_and_the_images(tmp_path, monkeypatch, in_process, is_late):
    """Losses on a GPU are checked one step late, but even then no checkpoint of the bad step may be written."""
    if is_late:
        monkeypatch.setattr(LossWatch, "is_late", property(lambda _: True, lambda _, value: None), raising=False)
    run = (*RUN, "optimizer.lr=1e30", "optimizer.lr_basis=absolute", "optimizer.args={fused:true}")
    message = in_process("train", *run, expect=1).stderr
    assert "the loss of step 2 is not finite: the first output that was not finite is that of module stem" in message
    listed = (tmp_path / "out/a/nonfinite.txt").read_text().splitlines()
    assert listed[0] in message and len(listed[2:]) == 16 and all(line.startswith("image ") for line in listed[2:])
    assert load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")["step"] == 1
    assert json.loads((tmp_path / "out/a/run.json").read_text())["status"] == "failed"
    assert "Go on from a checkpoint with gentler settings" in message
    early = in_process("train", *run, "run_name=b", "trainer.checkpoint_every_steps=null", expect=1).stderr
    assert "There is no checkpoint yet: run the same command with a lower optimizer.lr (now 1e+30)" in early


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, in_process):
    """Check that non-finite weights are not saved even if the loss was finite, as after a non-finite gradient."""
    real = Stepper.train_step

    def train_step(self, *arguments, **options):
        grad_norm = real(self, *arguments, **options)
        if self.state.step == 3:
            with torch.no_grad():
                self.state.model.fc.weight[0, 0] = torch.nan
        return grad_norm

    monkeypatch.setattr(Stepper, "train_step", train_step)
    message = in_process("train", *RUN, expect=1).stderr
    assert "the weights after step 3 are not finite, fc.weight first of 1; the images that it came from" in message
    assert len((tmp_path / "out/a/nonfinite.txt").read_text().splitlines()) == 2 + 16
    assert load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")["step"] == 2


def test_the_origin_is_the_first_module_and_its_images():
    """Image 2 overflows in the second layer, and the following batch norm spreads the overflow to all images."""
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 7, 1), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7, 2))
    images = torch.ones(4, 3, 1, 1)
    images[2] = 1e20
    with torch.no_grad():
        model[1].weight.mul_(1e20)
    assert find_origin(model, images, NO_AUTOCAST) == ("the first output that was not finite is that of module 1", [2])
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    assert find_origin(model, images, NO_AUTOCAST)[0].startswith("the weights were not finite before the step, 0.bias")


@pytest.mark.slow
def test_memory_that_does_not_suffice_ends_with_what_to_set(tmp_path):
    """Check the advice given if a step needs gigabytes but the process may allocate only another 600 MiB."""
    code = f"""
import resource, sys
import sasa_train.training.run as run
from sasa_train.train import run_command
from sasa_train.data import loader
def limited(*arguments, real=run.build_loaders):
    loaders = real(*arguments)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.RLIM_INFINITY))
    return loaders
run.build_loaders = limited
sys.exit(run_command({[*RUN, "data.image_size=64", "model.width=1.0", "model.stem=conv_small"]!r}))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 1, process.stderr
    assert "cpu is out of memory with micro-batches of 16 images of 64 pixels" in process.stderr
    remedy = "Try trainer.micro_batch_size=8 (the same global batch), or trainer.grad_checkpointing=true"
    assert remedy in process.stderr


# Bugs known from other frameworks


def test_seed_zero_is_a_seed(tmp_path, monkeypatch):
    """Check that `seed: 0` is used as a seed; one project template treated it as if no seed were given."""
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert run_in_process(tmp_path, monkeypatch, *TINY, f"run_name={name}", f"seed={seed}") == 0
    one, two, three = (rows(tmp_path / "out" / name) for name in ("one", "two", "three"))
    assert one == two != three


def test_a_job_of_a_sweep_is_the_run_alone(tmp_path, command, in_process):
    """Check that a job of a sweep is not affected by earlier jobs, although Hydra runs all of them in one process."""
    run = [*TINY, "model.drop_path_rate=0.2"]
    command("train", *run, "trainer.epochs=1", "seed=5,6", "-m")
    in_process("train", *run, "trainer.epochs=1", "seed=6", "output_dir=alone")
    (alone,) = (tmp_path / "alone").iterdir()
    assert rows(alone) == rows(tmp_path / "out" / alone.name)


def test_a_resumed_run_remembers_its_best(tmp_path, monkeypatch):
    """Check that a resumed run keeps the best metric; in one framework, a worse checkpoint replaced the best one."""
    run = (*TINY, "run_name=a", "trainer.checkpoint_every_steps=1")
    with monkeypatch.context() as patch:
        top1s = iter((90.0, 10.0, 20.0))
        real = loop.Loop.evaluate_model

        def evaluate_model(self, model):
            result = real(self, model)
            result.top1 = next(top1s)
            if result.top1 == 10.0:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        patch.setattr(loop.Loop, "evaluate_model", evaluate_model)
        assert run_in_process(tmp_path, monkeypatch, *run) == 75
        assert run_in_process(tmp_path, monkeypatch, *run) == 0
    best = load_checkpoint(tmp_path / "out/a/checkpoints/best.pt")
    assert best["step"] == 4 and best["best"]["top1"] == 90.0


def test_a_kill_between_best_and_last_after_a_save_of_the_same_step(tmp_path, monkeypatch):
    """The step was saved before its evaluation, whose best.pt then seemed to be nobody's, and nothing could go on."""
    run = (*TINY, "run_name=a", "trainer.checkpoint_every_steps=4")
    code = """
import itertools, os, sys
from sasa_train import train

def dies(source, target, replace=os.replace, count=itertools.count(1)):
    if str(target).endswith("checkpoints/last.pt") and next(count) == 2:
        os._exit(9)
    replace(source, target)

os.replace = dies
train.run_command(sys.argv[1:])
"""
    assert subprocess.run([sys.executable, "-c", code, *run], cwd=tmp_path, capture_output=True).returncode == 9
    folder = tmp_path / "out/a/checkpoints"
    last = load_checkpoint(folder / "last.pt")
    assert (last["step"], last["evaluated_step"]) == (4, 0) and load_checkpoint(folder / "best.pt")["step"] == 4
    assert run_in_process(tmp_path, monkeypatch, *run) == 0
    assert run_in_process(tmp_path, monkeypatch, *run[:-2], "run_name=b", run[-1]) == 0
    assert_same_run(tmp_path / "out/a", tmp_path / "out/b")


def test_gradients_are_clipped_once_and_before_the_one_update(monkeypatch):
    """Check that clipping precedes a single update; an old script clipped afterwards and updated twice with AMP."""
    stepper, events = setup("trainer.grad_clip_norm=1.0"), []
    stepper.state.scaler = torch.amp.GradScaler("cpu")
    real = stepper.state.optimizer.step
    monkeypatch.setattr(stepper.state.optimizer, "step", lambda *a, **k: (events.append("update"), real(*a, **k))[1])
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *a: (events.append("clip"), clip(*a))[1])
    stepper.train_step(batches(1))
    assert events == ["clip", "update"]
