"""Run the commands as users do; check their output, which input they refuse, and that interruptions lose no work."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from making_data import make_image_folder
from marking import slow_but_for
from reading_runs import assert_same_run, last, rows
from running_commands import TINY, run_in_process, start, wait_for, wait_for_rows

from sasa_train import summary, train
from sasa_train.config.groups import config_dir
from sasa_train.config.keys import key_table
from sasa_train.dataset_tool import prepare
from sasa_train.runs.checkpoint import Checkpoints, load_checkpoint
from sasa_train.training import announce, run

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
FAST = ("debug", "overfit", "quickstart", "cifar10_hybrid_resnet26", "imagenet_sasa_resnet26")


@pytest.mark.parametrize("name", slow_but_for(FAST, EXPERIMENTS))
def test_every_experiment_takes_two_steps(name, tmp_path, monkeypatch, image_folder, tiny_run):
    """Each experiment runs on tiny data with a narrow model; all other settings are those of the preset."""
    is_cifar = "cifar" in name or name == "small_images"
    data = ["data=image_folder", f"data.root={image_folder}", "data.image_size=16"] if is_cifar else []
    if name in ("my_images", "finetune"):
        data = [f"data.root={image_folder}", *([f"model.pretrained={tiny_run}"] if name == "finetune" else [])]
    if "imagenet" in name:
        data = [f"data.root={imagenet_root(tmp_path)}", "data.image_size=96", "data.max_val_images=8"]
    keys = ["model.width=0.125", "model.num_heads=2"]
    small = ["trainer.global_batch_size=8", "trainer.max_steps=2", "trainer.log_every_steps=1"]
    assert run_in_process(tmp_path, monkeypatch, f"experiment={name}", *data, *keys, *small, "run_name=two") == 0
    found = rows(tmp_path / "outputs/two")
    assert [row["step"] for row in found if row["split"] == "train"] == [1, 2]
    assert all(isinstance(row["loss"], float) and 0 <= row["top1"] <= 100 for row in found)


@pytest.mark.parametrize("name", slow_but_for(FAST, [name for name in EXPERIMENTS if "imagenet" in name]))
def test_imagenet_presets_read_tar_shards(name, tmp_path, monkeypatch):
    """Check that two steps on shards give exactly the same numbers as two steps on folders."""
    folders, shards = imagenet_root(tmp_path), tmp_path / "shards"
    assert prepare.shard(folders, shards, images_per_shard=9) == 0
    small = ["model.width=0.125", "model.num_heads=2", "trainer.global_batch_size=8", "trainer.max_steps=2"]
    small += ["data.image_size=96", "data.max_val_images=8", "data.num_workers=1", "trainer.log_every_steps=1"]
    for root in (folders, shards):
        arguments = [f"experiment={name}", f"data.root={root}", *small, f"run_name={root.name}"]
        assert run_in_process(tmp_path, monkeypatch, *arguments) == 0
    assert rows(tmp_path / "outputs" / folders.name) == rows(tmp_path / "outputs/shards")


def imagenet_root(tmp_path: Path) -> Path:
    """Return a folder arranged like ImageNet, given by TINY_IMAGENET or else created with synthetic images."""
    if "TINY_IMAGENET" in os.environ:
        return Path(os.environ["TINY_IMAGENET"])
    if not (tmp_path / "imagenet").exists():
        for folder in make_image_folder(tmp_path / "imagenet", size=(120, 90)).glob("*/*"):
            folder.rename(folder.with_name({"blue": "n01784675", "red": "n02085620"}[folder.name]))
    return tmp_path / "imagenet"


def test_every_preset_says_how_to_run_it_and_what_to_expect():
    for name in EXPERIMENTS:
        head = (config_dir() / f"experiment/{name}.yaml").read_text().split("defaults:")[0]
        assert f"sasa-train experiment={name}" in head and "top1" in head and re.search(r"GPU|CPU", head), name


def test_a_run_leaves_what_the_readme_promises(command, in_process, tmp_path):
    run_of = (*TINY, "run_name=first", "trainer.ema_decay=0.9", "trainer.checkpoint_every_steps=1")
    out = command("train", *run_of).stdout
    run = tmp_path / "out/first"
    names = {p.relative_to(run).as_posix() for p in run.rglob("*.*")}
    assert {"config.yaml", "metrics.jsonl", "run.json", "checkpoints/last.pt", "checkpoints/best.pt"} <= names
    assert len([n for n in names if re.fullmatch(r"checkpoints/step-\d+\.pt", n)]) == 3
    assert any(n.startswith("tensorboard/events") for n in names)
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished" and info["versions"]["torch"] == torch.__version__
    saved = torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert {"model", "ema", "optimizer", "step", "epoch", "config", "rng", "best"} <= saved.keys()
    assert (saved["step"], saved["epoch"]) == (12, 3) and saved["ema"].keys() == saved["model"].keys()
    assert saved["config"] == (run / "config.yaml").read_text()
    found = rows(run)
    assert {"split", "step", "epoch", "loss", "top1", "lr", "grad_norm"} <= found[0].keys()
    val = [row for row in found if row["split"] == "val"]
    assert [row["epoch"] for row in val] == [1, 2, 3] and all("top1_raw" in row for row in val)
    assert saved["best"]["top1"] == max(row["top1"] for row in val)
    assert "sasa-evaluate" in out and "step 12/12" in out and "ETA" in out and "\r" not in out
    again = in_process("train", *run_of).stdout
    assert "is finished: 12 steps, best" in again and rows(run) == found
    for weights, key in (("ema", "top1"), ("raw", "top1_raw")):
        printed = in_process("evaluate", "out/first", f"weights={weights}").stdout
        best = next(row for row in val if row["step"] == saved["best"]["step"])
        assert f"top1   {best[key]:.2f}\n" in printed and f"({weights})" in printed.lower().splitlines()[0]
    assert f"loss   {best['loss']:.4f}\n" in in_process("evaluate", "out/first/checkpoints/best.pt").stdout


def test_killed_and_stopped_runs_end_as_one_never_touched(in_process, tmp_path):
    """Interrupt a run with SIGKILL, SIGTERM and SIGINT, vary num_workers, and compare it with an uninterrupted run."""
    run = [*TINY, "trainer.epochs=6", "trainer.ema_decay=0.9", "model.drop_path_rate=0.2", "data.resident=false"]
    run += ["trainer.checkpoint_every_steps=3"]
    in_process("train", *run, "run_name=whole", "data.num_workers=0")
    process = None
    for workers, number, seen in ((1, signal.SIGKILL, 5), (0, signal.SIGTERM, 9), (3, signal.SIGINT, 14)):
        process = start(tmp_path, *run, "run_name=broken", f"data.num_workers={workers}")
        wait_for_rows(tmp_path / "out/broken", seen, process)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), output
        if number != signal.SIGKILL:
            assert re.search(rf"{number.name}\)?: saved at step", output)
            assert json.loads((tmp_path / "out/broken/run.json").read_text())["status"] == "interrupted"
    in_process("train", *run, "run_name=broken", "data.num_workers=2")
    assert_same_run(tmp_path / "out/broken", tmp_path / "out/whole")


@pytest.mark.parametrize("way", ["lock deleted", "folder replaced"])
def test_a_run_whose_folder_is_taken_away_stops_and_leaves_the_other_run_alone(in_process, tmp_path, way):
    """After its lock is deleted or its folder renamed, another run begins in the same place; only that one goes on."""
    run = [*TINY, "run_name=taken", "trainer.epochs=400", "trainer.checkpoint_every_steps=3"]
    first = start(tmp_path, *run)
    folder = tmp_path / "out/taken"
    wait_for_rows(folder, 6, first)
    if way == "lock deleted":
        (folder / ".lock").unlink()
    else:
        folder.rename(tmp_path / "out/moved")
        in_process("train", *TINY, "run_name=taken", "trainer.epochs=1")
    before = {p: p.read_bytes() for p in folder.glob("checkpoints/*")} if way == "folder replaced" else {}
    output = first.communicate(timeout=60)[0]
    assert first.returncode == 1 and "its lock file is gone or another's" in output, output
    assert before == ({p: p.read_bytes() for p in folder.glob("checkpoints/*")} if before else {})
    place = folder if way == "lock deleted" else tmp_path / "out/moved"
    in_process("train", f"resume={place}", "trainer.max_steps=40", "allow_config_change=[trainer.max_steps]")
    assert last(place)["step"] == 40


def test_a_run_whose_folder_is_taken_while_it_loads_images_changes_nothing_there(in_process, tmp_path, monkeypatch):
    """It emptied the log of the run that had begun in its place, and added a file to its curves."""
    folder, real = tmp_path / "out/taken", run.load_together

    def load_slowly(*arguments):
        folder.rename(tmp_path / "out/moved")
        (folder / "tensorboard").mkdir(parents=True)
        (folder / ".lock").touch()
        (folder / "metrics.jsonl").write_text("rows")
        return real(*arguments)

    monkeypatch.setattr(run, "load_together", load_slowly)
    assert "its lock file is gone or another's" in in_process("train", *TINY, "run_name=taken", expect=1).stderr
    assert (folder / "metrics.jsonl").read_text() == "rows" and not list((folder / "tensorboard").iterdir())
    assert not (folder / "run.json").exists()


def test_a_stop_before_training_leaves_nothing_half_done(tmp_path):
    process = start(tmp_path, *TINY, "run_name=early")
    wait_for(lambda: (tmp_path / "out/early/.lock").exists())
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["trainer.epoch=3"], "unknown key 'trainer.epoch': did you mean trainer.epochs?"),
        (["+trainer.epoch=3"], "unknown key 'trainer.epoch': did you mean trainer.epochs?"),
        (["data=image_folder", "data.root=nowhere"], "data.root=nowhere: there is no folder nowhere; expected train/"),
        (["model.num_classes=11"], "model.num_classes=11, but digits has 10 classes"),
    ],
)
def test_refusals_have_exit_code_2_and_leave_nothing(in_process, tmp_path, arguments, message):
    process = in_process("train", *TINY, *arguments, expect=2)
    assert message in process.stderr and "Traceback" not in process.stderr
    assert process.stdout == "" and list(tmp_path.iterdir()) == []
    (tmp_path / "out/mine").mkdir(parents=True)
    in_process("train", *TINY, *arguments, "run_name=mine", expect=2)
    assert (tmp_path / "out/mine").is_dir()  # it was there before


def test_a_truncated_checkpoint_is_named_and_the_run_goes_on(in_process, tmp_path):
    run = [*TINY, "run_name=cut", "trainer.checkpoint_every_steps=2"]
    in_process("train", *run)
    expected = rows(tmp_path / "out/cut")
    last = tmp_path / "out/cut/checkpoints/last.pt"
    os.truncate(last, 1000)
    process = in_process("train", *run)
    assert "WARNING: skipping a damaged checkpoint: " in process.stderr and "last.pt" in process.stderr
    assert "continues   at step" in process.stdout and rows(tmp_path / "out/cut") == expected
    for path in last.parent.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read as a checkpoint" in in_process("evaluate", "out/cut", expect=2).stderr
    for _ in range(2):
        assert "restore one from a copy, or start a new run" in in_process("train", *run, expect=1).stderr


def test_resume_never_folder_and_checkpoint(tmp_path, monkeypatch, capsys, in_process):
    run = [*TINY, "run_name=a", "trainer.checkpoint_every_steps=5"]
    assert run_in_process(tmp_path, monkeypatch, *run, "resume=never") == 0
    out = tmp_path / "out"
    assert run_in_process(tmp_path, monkeypatch, *run, "resume=never") == 0
    assert rows(out / "a-2") == rows(out / "a")
    # If the source is a checkpoint, the rest of the run goes to a new folder, and the old one is unchanged.
    before = (out / "a/checkpoints/last.pt").read_bytes()
    middle = "out/a/checkpoints/step-00000005.pt"
    assert run_in_process(tmp_path, monkeypatch, *run, f"resume={middle}") == 0
    assert rows(out / "a-3") == [row for row in rows(out / "a") if row["step"] > 5]
    assert (out / "a/checkpoints/last.pt").read_bytes() == before
    # If the source is a run folder, the run continues in place, based on its own config if no group is chosen.
    assert "out/a is finished" in in_process("train", "resume=out/a").stdout
    assert "model.kernel_size: 3 -> 5" in in_process("train", "resume=out/a", "model.kernel_size=5", expect=2).stderr
    longer = ["resume=out/a", "trainer.epochs=4", "allow_config_change=[trainer.epochs]"]
    monkeypatch.setattr(announce, "LITTLE", 0.5)  # for a run this short
    said = " ".join(in_process("train", *longer).stdout.split())
    assert rows(out / "a")[-1]["epoch"] == 4 and "the end of the schedule: a new run with" in said
    assert run_in_process(tmp_path, monkeypatch, *run, "resume=nowhere") == 2
    # A permission given to one continuation does not apply to the next, and a finished run stays finished.
    assert "out/a is finished" in in_process("train", "resume=out/a").stdout
    assert run_in_process(tmp_path, monkeypatch, "resume=out/a", "trainer.epochs=5") == 2
    assert run_in_process(tmp_path, monkeypatch, *run, "resume=out/a/checkpoints/last.pt", "trainer.epochs=4") == 2
    assert "last.pt is finished" in capsys.readouterr().err
    starts = json.loads((out / "a/run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 12]


@pytest.mark.parametrize(
    "words,message",
    [
        (["augment=trivial"], "set keys of it, not a group: augment.policy=trivial_augment\n"),
        (
            ["augment=trivial", "optimizer.lr=0.2", "allow_config_change=[optimizer.lr]"],
            "sasa-train {0} optimizer.lr=0.2 augment.policy=trivial_augment "
            "'allow_config_change=[optimizer.lr,augment.policy]'",
        ),
        (["optimizer=sgd"], "which has this choice already; leave it out"),
        (["experiment=quickstart"], "experiment=quickstart: {0} continues with the run's own config, which this would"),
        ([*TINY, "seed=5"], "  seed: 0 -> 5\ngive the old values"),
    ],
)
def test_a_group_cannot_replace_a_runs_config_by_the_defaults(words, message, tiny_run, in_process):
    """With augment=trivial alone, 16 keys that nobody had named were to be changed, among them the data set."""
    resume = f"resume={tiny_run}"
    told = in_process("train", resume, "trainer.ema_decay=0.5", *words, expect=2).stderr
    assert message.format(resume) in told.replace("trainer.ema_decay=0.5 ", "")
    assert "data.name" not in told


def test_the_command_that_began_a_run_may_add_resume(tiny_run, in_process):
    assert "is finished" in in_process("train", *TINY, "trainer.ema_decay=0.5", f"resume={tiny_run}").stdout


def test_an_allowed_change_that_cannot_be_is_refused_and_leaves_the_run_as_it_was(tmp_path, monkeypatch, in_process):
    assert run_in_process(tmp_path, monkeypatch, *TINY, "run_name=a") == 0
    before = (tmp_path / "out/a/config.yaml").read_text()
    wider = ["resume=out/a", "model.width=0.25", "allow_config_change=[model.width]"]
    assert "allow_config_change=['model.width'] asks too much" in in_process("train", *wider, expect=2).stderr
    assert (tmp_path / "out/a/config.yaml").read_text() == before
    (tmp_path / "out/a/config.yaml").write_text(before[: len(before) // 2] + "\n  - [")
    assert run_in_process(tmp_path, monkeypatch, "resume=out/a") == 0  # the checkpoint's own config is complete


def test_the_defaults_train(tmp_path, monkeypatch):
    """Run `sasa-train` with its defaults: the paper's stem and four stages, which reduce 8x8 digits to one position."""
    small = ["trainer.max_steps=1", "trainer.global_batch_size=2", "data.max_val_images=10", "model.width=0.125"]
    assert run_in_process(tmp_path, monkeypatch, *small, "model.num_heads=2", "data.max_train_images=10") == 0


def test_evaluations_and_saves_are_not_training_time(tmp_path, monkeypatch):
    """Each save is slowed down by 0.3 s, which must affect neither the reported speed nor the training time."""
    real = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *a, **k: (time.sleep(0.3), real(*a, **k))[1])
    start = time.perf_counter()
    assert run_in_process(tmp_path, monkeypatch, *TINY, "run_name=a", "trainer.checkpoint_every_steps=4") == 0
    elapsed, seconds = time.perf_counter() - start, load_checkpoint(tmp_path / "out/a/checkpoints/last.pt")["seconds"]
    assert 0 < seconds < elapsed - 6 * 0.3  # three epochs, each saved before and after its evaluation


def test_another_trajectory_in_the_same_folder_is_refused(tmp_path, monkeypatch, in_process):
    assert run_in_process(tmp_path, monkeypatch, *TINY, "run_name=a", "trainer.epochs=1") == 0
    kept = (tmp_path / "out/a/checkpoints/last.pt").read_bytes()
    changed = ["trainer.epochs=1", "seed=1", "optimizer.lr=0.3", "trainer.log_every_steps=2"]
    message = in_process("train", *TINY, "run_name=a", *changed, expect=2).stderr
    assert "optimizer.lr: 0.1 -> 0.3" in message and "seed: 0 -> 1" in message and "log_every" not in message
    assert "allow_config_change=[optimizer.lr,seed]" in message
    assert (tmp_path / "out/a/checkpoints/last.pt").read_bytes() == kept


def test_hydras_sweep_makes_a_run_folder_a_job(command, in_process, tmp_path):
    out = command("train", *TINY, "trainer.epochs=1", "seed=0,1", "-m").stdout
    found = [json.loads((p / "run.json").read_text())["status"] for p in (tmp_path / "out").glob("digits-*")]
    assert found == ["finished"] * 2, out
    process = in_process("train", *TINY, "trainer.epoch=1,2", "-m", expect=2)
    assert "did you mean trainer.epochs?" in process.stderr
    process = in_process("train", *TINY, "trainer.epochs=1,0", "-m", expect=2)  # refused before the first job starts
    assert process.stderr == "train: trainer.epochs=0 must be positive\n"


def test_help_lists_every_key(in_process):
    out = in_process("train", "--help").stdout
    assert all(f"  {key}=" in out for key in key_table()) and "quickstart" in out
    assert "model.drop_path_rate=0.0 " in out and "trainer.grad_accum_steps=1 " in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_the_summary_command(capsys, in_process):
    out = in_process("summary").stdout
    assert len(re.findall(r"^1 ", out, re.M)) == 9
    assert re.search(r"full attention, R50 +7\.15 +7\.2 +18\.01 +18\.0 +77\.6", out)
    out = in_process("summary", "model=hybrid_resnet50").stdout
    assert "18.02 M parameters, 6.97 GFLOPs" in out and "77.4 % top1 in the paper's Table 1" in out
    out = in_process("summary", "experiment=quickstart").stdout
    assert "10 classes, 8 x 8 pixels" in out and "paper" not in out
    assert summary.run_command(["model.widht=2"]) == 2
    assert summary.run_command(["model=hybrid_resnet26", "data.image_size=256"]) == 0
    assert "1000 classes, 256 x 256 pixels" in capsys.readouterr().out
    assert summary.run_command(["model=sasa_resnet26", "data.image_size=30"]) == 2
    assert "the next size is 32 x 32" in capsys.readouterr().err


def test_several_processes_are_refused_without_torchrun(monkeypatch, capsys):
    """Check that WORLD_SIZE left by another job is refused; otherwise, the run would wait for missing processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.run_command(["experiment=debug"]) == 2
    assert "WORLD_SIZE=2, but torchrun did not start this process" in capsys.readouterr().err
