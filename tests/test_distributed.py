"""Check that several processes, started by torchrun with gloo, match the results of one process and write one log."""

import functools
import json
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import make_image_folder
from marking import slow_but_for
from reading_runs import assert_same_run, last, rows
from running_commands import launch
from writing_runs import write_teacher

from sasa_train.config.compose import compose_config
from sasa_train.config.derived import accumulation, micro_batch_size
from sasa_train.config.identity import differing_keys
from sasa_train.config.rules import check_world_size
from sasa_train.data.plan import BatchPlan
from sasa_train.data.randomness import seed_step
from sasa_train.device import resolve
from sasa_train.processes.collectives import restart_warning
from sasa_train.refusal import ConfigError
from sasa_train.train import read_config

# With 38 digits, batches of 12 give 3 steps per epoch and 6 in all. The model has no batch statistics, all kinds of
# augmentation are on, and a teacher has half of the loss. The class weights differ much, so that a mean over a
# process's own images would be noticed.
RUN = (
    "model=timm", "model.name=convnext_atto", "data=digits", "data.image_size=32", "data.max_train_images=38",
    "data.max_val_images=31", "augment.policy=trivial_augment", "augment.brightness=0.3", "augment.erasing_prob=0.5",
    "trainer.global_batch_size=12", "trainer.grad_accum_steps=2", "trainer.epochs=2", "trainer.ema_decay=0.9",
    "trainer.class_weights={0: 9, 1: 9, 2: 9, 3: 0.1}",
    "trainer.log_every_steps=1", "trainer.checkpoint_every_steps=1", "data.num_workers=0", "output_dir=out",
    "distill.teacher=teacher.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_teacher(folder / "teacher.safetensors", map(str, range(10)), "experiment=debug", "model=conv_resnet26")
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Callable[[int], Path]:
    """Return a function that runs n processes once, records their inputs in `notes/n`, and returns the run folder."""

    @functools.cache
    def run_by(n: int) -> Path:
        code, said = launch(folder, n, *RUN, f"run_name={n}", NOTES=f"notes/{n}")
        assert code == 0, said
        assert said.count("step 6/6") == 1 and said.count("next        sasa-report out/") == 1, said
        cut = "12 = 2 x 6 images" if n == 1 else f"12 = {n} processes x 2 x {6 // n} images"
        assert cut in said and "arning" not in said and said.count("teacher     conv_resnet26") == 1, said
        return folder / f"out/{n}"

    return run_by


def noted(run: Path, kind: str) -> dict[str, list[str]]:
    """Return the recorded notes by step, concatenated over all processes in rank order."""
    paths = sorted((run.parents[1] / "notes" / run.name).iterdir())
    parts = [json.loads(path.read_text())[kind] for path in paths]
    return {step: [entry for part in parts for entry in part.get(step, [])] for step in parts[0]}


several_processes = pytest.mark.parametrize("num_processes", slow_but_for([2], [2, 3]))


@several_processes
def test_each_global_batch_has_the_same_images_augmented_the_same(undisturbed, num_processes):
    one = noted(undisturbed(1), "train")
    assert noted(undisturbed(num_processes), "train") == one
    assert all(len(set(images)) == 12 for images in one.values())


@several_processes
def test_rows_are_those_of_one_process(undisturbed, num_processes):
    assert_close_rows(undisturbed(num_processes), undisturbed(1))


def assert_close_rows(run: Path, expected_run: Path) -> None:
    """Compare metrics with a tolerance for a different order of summation; observed differences are 1e-7."""
    found, expected = rows(run), rows(expected_run)
    assert len(expected) == 6 + 2 and [row.pop("split") for row in found] == [row.pop("split") for row in expected]
    assert found == [pytest.approx(row, rel=1e-3) for row in expected]


@several_processes
def test_an_evaluation_sees_every_image_once(undisturbed, num_processes):
    """Raw and averaged weights must each be evaluated once on all 31 val images, although 31 cannot be split evenly."""
    one, several = noted(undisturbed(1), "val"), noted(undisturbed(num_processes), "val")
    assert one.keys() == several.keys() == {"3", "6"}
    assert all(len(set(images)) == 31 and sorted(images) == sorted(several[step]) for step, images in one.items())


def test_gradients_are_added_once_a_step(folder, undisturbed):
    """After the first of two micro-batches, the processes' gradients differ; after the second, they are equal."""
    undisturbed(2)
    one, other = (json.loads((folder / f"notes/2/{rank}.json").read_text())["grad"] for rank in (0, 1))
    for step in one:
        (after_first, after_step), (others_after_first, others_after_step) = one[step], other[step]
        assert after_first != others_after_first and after_step == others_after_step


@pytest.mark.slow
def test_a_killed_process_is_restarted_by_torchrun_and_nothing_is_lost(folder, undisturbed):
    """Check that a killed process is restarted; this needs a separate store key per attempt (pytorch issue 135712)."""
    options = ("--standalone", "--max-restarts=1")
    code, said = launch(folder, 2, *RUN, "run_name=killed", options=options, DISTURB="SIGKILL:1:4")
    assert code == 0 and "continues   at step 3" in said, said
    assert_same_run(folder / "out/killed", undisturbed(2))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_any_number_goes_on(folder, undisturbed):
    code, said = launch(folder, 2, *RUN, "run_name=stopped", DISTURB="SIGUSR1:1:2")
    assert code == 1 and said.count("SIGUSR1: saved at step 2; to continue") == 1 and "exitcode  : 75" in said, said
    assert last(folder / "out/stopped")["step"] == 2
    shutil.copytree(folder / "out/stopped", folder / "out/stopped3")
    for n, name in ((1, "stopped"), (3, "stopped3")):
        code, said = launch(folder, n, *RUN, f"run_name={name}")
        assert code == 0 and f"processes: 2 -> {n}" in said and "continues   at step 2" in said, said
        assert_close_rows(folder / "out" / name, undisturbed(1))


@pytest.mark.slow
def test_two_torchruns_as_two_machines_make_one_run(folder, undisturbed):
    """Each machine has its own folder to simulate separate disks, and the second one's folder stays empty."""
    (folder / "other").mkdir()
    options = ("--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=1", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    options += ("--local-addr=127.0.0.1",)
    with ThreadPoolExecutor() as pool:
        together = functools.partial(pool.submit, launch, options=options)
        starts = [together(at, 1, *RUN, "run_name=nodes") for at in (folder, folder / "other")]
    ended = [start.result() for start in starts]
    assert [code for code, _ in ended] == [0, 0], ended
    run = next(path for path in (folder / "out/nodes", folder / "other/out/nodes") if path.exists())
    assert_same_run(run, undisturbed(2))
    assert len([path for path in (folder / "out/nodes", folder / "other/out") if path.exists()]) == 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_a_refusal_is_said_once_and_ends_all_with_2(folder):
    code, said = launch(folder, 2, *RUN, "trainer.global_batch_size=10")
    rule = "trainer.global_batch_size=10 must be divisible by 2 processes x trainer.grad_accum_steps=2; the nearest"
    assert code == 1 and said.count(f"{rule} that fit are 8 and 12") == 1 and said.count("exitcode  : 2") == 2, said
    code, said = launch(folder, 2, *RUN, "seed=0,1", "-m")
    assert code == 1 and said.count("-m under torchrun") == 1 and "exitcode  : 2" in said, said


@pytest.mark.slow
def test_a_failure_of_one_process_ends_all_and_says_which(folder):
    """The run must end within the timeout of `launch`; gloo itself would wait for half an hour."""
    code, said = launch(folder, 2, *RUN, "run_name=nan", DISTURB="NAN:1:2")
    assert code == 1 and "the loss of step 2 is not finite" in said, said
    failed = [line for line in said.splitlines() if "the loss of step 2" in line]
    assert all("process 1 on " in line for line in failed) and "Traceback (most recent call last)" in said
    assert json.loads((folder / "out/nan/run.json").read_text())["status"] == "failed"
    assert last(folder / "out/nan")["step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every_steps", ["1", "null"])
def test_a_loss_that_is_checked_late_changes_no_weights_and_is_never_saved(folder, checkpoint_every_steps):
    """The NaN loss is detected before the step's checkpoint is written or, if none is due, at the next step."""
    name = f"late{checkpoint_every_steps}"
    late = (
        f"run_name={name}",
        "optimizer.args={fused:true}",
        f"trainer.checkpoint_every_steps={checkpoint_every_steps}",
    )
    code, said = launch(folder, 2, *RUN, *late, "trainer.log_every_steps=50", DISTURB="LATE_NAN:1:2")
    assert code == 1 and "process 1" in said and "the loss of step 2 is not finite" in said, said
    checkpoint = folder / f"out/{name}/checkpoints/last.pt"
    assert last(folder / f"out/{name}")["step"] == 1 if checkpoint_every_steps == "1" else not checkpoint.exists()


@pytest.mark.slow
def test_unreadable_images_are_named_once_and_counted_over_all(tmp_path):
    """Check that each bad file is reported once, including one read by the second process (the last val image)."""
    root = make_image_folder(tmp_path / "images")
    broken = [root / "train/blue/3.png", root / "val/red/4.png"]
    for path in broken:
        path.write_bytes(b"no image")
    run = ("experiment=debug", "data=image_folder", f"data.root={root}", "data.image_size=16", "data.resident=false")
    run += ("data.num_workers=1", "trainer.global_batch_size=8", "run_name=a", "output_dir=out")
    code, said = launch(tmp_path, 2, *run)
    assert code == 0 and all(said.count(f"WARNING: {path}: cannot be read") == 1 for path in broken), said
    listed = (tmp_path / "out/a/unreadable.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in listed] == [str(path) for path in broken]
    val = [row for row in rows(tmp_path / "out/a") if row["split"] == "val"]
    assert val and all((row["num_images"], row["unreadable"]) == (7, 1) for row in val)


# Without torchrun


@pytest.mark.parametrize("world_size,grad_accum_steps", [(2, 1), (3, 2), (6, 1)])
def test_processes_share_each_batch_in_its_order(world_size, grad_accum_steps):
    whole = BatchPlan(seed=3, num_images=41, global_batch_size=12, grad_accum_steps=1)
    plans = [BatchPlan(3, 41, 12, grad_accum_steps, rank, world_size) for rank in range(world_size)]
    expected = [micro.indices.tolist() for micro in whole.train(epoch=2, first_step=1)]
    found = [[] for _ in expected]
    for plan in plans:
        for micro in plan.train(epoch=2, first_step=1):
            found[micro.step - 2 * 3 - 1] += micro.indices.tolist()
    assert found == expected and plans[0].steps_per_epoch == 3
    evaluated = np.concatenate([micro.indices for plan in plans for micro in plan.all()])
    assert evaluated.tolist() == list(range(41))


def test_a_process_may_have_nothing_to_evaluate():
    shares = [list(BatchPlan(0, 2, 3, 1, rank, 3).all()) for rank in range(3)]
    assert [sum(len(micro.indices) for micro in share) for share in shares] == [0, 1, 1]


def test_processes_drop_differently_and_again_the_same():
    def draw(step, rank):
        seed_step(0, step, rank)
        return torch.rand(5).tolist()

    assert draw(4, 1) == draw(4, 1)
    assert len({tuple(draw(step, rank)) for step in range(3) for rank in range(3)}) == 9


def test_micro_batches_are_each_processs_and_a_config_means_the_same_to_any_number():
    trainer = compose_config(["trainer.global_batch_size=24", "trainer.grad_accum_steps=2"]).trainer
    assert [(micro_batch_size(trainer, n), accumulation(trainer, n)) for n in (1, 2, 3)] == [(12, 2), (6, 2), (4, 2)]
    config = compose_config(["trainer.global_batch_size=24", "trainer.micro_batch_size=4"])
    trainer = config.trainer
    assert [(micro_batch_size(trainer, n), accumulation(trainer, n)) for n in (1, 2, 3)] == [(4, 6), (4, 3), (4, 2)]
    rule = r"=24 must be divisible by 4 processes x trainer.micro_batch_size=4; .* 16 and 32"
    with pytest.raises(ConfigError, match=rule):
        check_world_size(config, 4)


def test_mixing_needs_two_images_in_each_processs_micro_batch():
    config = compose_config(["trainer.global_batch_size=24", "augment.mixup=0.2"])
    check_world_size(config, 12)
    with pytest.raises(ConfigError, match="micro-batches of=1 image leave mixup and cutmix no other"):
        check_world_size(config, 24)


def test_another_number_of_processes_may_cut_the_batch_otherwise():
    one, two = (compose_config([f"trainer.grad_accum_steps={n}", f"optimizer.lr={n}"]) for n in (4, 2))
    assert differing_keys(one, two) == ["optimizer.lr", "trainer.grad_accum_steps"]
    assert differing_keys(one, two, same_world_size=False) == ["optimizer.lr"]


def test_sync_batch_norm_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="sync_batch_norm=true, but PyTorch has it on CUDA alone"):
        resolve(compose_config(["trainer.sync_batch_norm=true", "trainer.device=cpu"]))


def test_restarts_on_several_machines_need_a_variable(monkeypatch):
    for name, value in {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        assert restart_warning() is None
        monkeypatch.setenv(name, value)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in restart_warning()
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    assert restart_warning() is None


def test_restarts_never_begin_anew(monkeypatch):
    """Check that resume=never is refused with restarts, because each restart would create another numbered folder."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert read_config(["experiment=debug"]).resume == "auto"
    with pytest.raises(ConfigError, match="resume=never with torchrun --max-restarts=3"):
        read_config(["experiment=debug", "resume=never"])
