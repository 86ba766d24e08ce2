"""Check the FLOPs that runs log, plan and buy against counts made by hand, and what reports say that runs have cost."""

import csv
import json
import re
from pathlib import Path

import pytest
from reading_runs import assert_same_run
from running_commands import TINY, kill_after, launch
from writing_runs import write_run

from sasa_train.config.compose import compose_config
from sasa_train.models.counting import step_flops
from sasa_train.report.costs import front, points, unit_of
from sasa_train.report.jobs import Job
from sasa_train.report.rows import Row
from sasa_train.training.utilisation import known_peak, scaled

STEP = 3 * 16 * 1_477_888  # FLOPs of a step of TINY


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def test_the_flops_of_a_step_are_those_of_a_net_counted_by_hand(own_module):
    """A convolution of 3 to 4 channels, 3x3, on 8x8 pixels, and a layer of 256 to 5: 2 FLOPs per multiply-add."""
    own_module(
        "nets",
        """
        from torch import nn
        def Net(num_classes):
            conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(256, num_classes))
        """,
    )
    own = ["experiment=debug", "imports=[nets]", "model.target=nets.Net", "trainer.global_batch_size=7"]
    config = compose_config(
        [*own, "model.stem=null", "model.kernel_size=null", "model.num_heads=null", "model.width=null"]
    )
    forward = 2 * (8 * 8) * 4 * (3 * 3 * 3) + 2 * 256 * 5
    assert step_flops(config, 5) == 3 * 7 * forward


def test_the_flops_of_a_step_are_three_times_those_of_sasa_summary(in_process):
    """Rows, --plan, budgets and reports take the figure that sasa-summary prints, so that they agree."""
    net = ["model=hybrid_resnet26", "data=cifar10"]
    printed = re.search(r"([\d.]+) GFLOPs\n", in_process("summary", *net).stdout)
    config = compose_config([*net, "trainer.global_batch_size=100"])
    assert printed is not None and f"{step_flops(config, 10) / 300 / 1e9:.2f}" == printed[1]


def test_rows_have_the_tflops_of_their_own_images_per_sec(in_process, tmp_path):
    """A row's tflops is the FLOPs of its steps by their time, and mfu its share of trainer.peak_tflops."""
    told = in_process(
        "train", *TINY, "run_name=run", "trainer.peak_tflops=0.5", "trainer.grad_checkpointing=true"
    ).stdout
    assert f"compute     {scaled(STEP)}FLOPs per step (forward and backward), {scaled(12 * STEP)}FLOPs in all" in told
    assert step_flops(compose_config(TINY), 10) == STEP
    rows = [row for row in log_of(tmp_path / "out/run") if row["split"] == "train"]
    for row in rows:
        assert row["tflops"] == pytest.approx(row["images_per_sec"] / 16 * STEP / 1e12)
        assert row["mfu"] == pytest.approx(100 * row["tflops"] / 0.5)


def test_a_model_that_cannot_be_counted_has_no_tflops_and_buys_no_budget(in_process, own_module, tmp_path):
    """The counter knows no products of elements, as in this layer: it trains all the same, but not to a budget."""
    own_module(
        "nets",
        """
        import torch
        from torch import nn
        class Net(nn.Module):
            def __init__(self, num_classes):
                super().__init__()
                self.weight = nn.Parameter(0.1 * torch.randn(num_classes, 192))
            def forward(self, images):
                return (images.flatten(1)[:, None] * self.weight).sum(2)
        """,
    )
    unset = [f"model.{key}=null" for key in ("stem", "kernel_size", "num_heads", "width")]
    own = [*TINY, "imports=[nets]", "model.target=nets.Net", *unset, "trainer.epochs=1", "run_name=own"]
    told = " ".join(in_process("train", *own).stdout.split())
    assert "compute unknown: model.target=nets.Net: no FLOPs are found, as in operators that torch cannot" in told
    assert all("tflops" not in row for row in log_of(tmp_path / "out/own"))
    refused = in_process("train", *own, "trainer.max_pflops=1", expect=2).stderr
    assert "trainer.max_pflops=1: model.target=nets.Net: no FLOPs are found" in refused
    assert "use trainer.max_steps instead" in refused


def test_a_budget_ends_two_arms_at_equal_flops(in_process, tmp_path):
    """A comparison of conv and attention at equal compute ends each within one step of the budget, its lr at 0."""
    budget, net = 1.2e-6, ["trainer.max_pflops=1.2e-6", "trainer.epochs=20", "model.stem=conv_small"]
    for name in ("sasa_resnet26", "conv_resnet26"):
        keys = ["model.kernel_size=null", "model.num_heads=null"] if name[0] == "c" else []
        arm = [*TINY, *net, f"model.name={name}", *keys, f"run_name={name}", "trainer.log_every_steps=2"]
        told = in_process("train", *arm).stdout
        rows, flops = log_of(tmp_path / f"out/{name}"), step_flops(compose_config(arm), 10)
        steps = rows[-1]["step"]
        assert steps * flops <= budget * 1e15 < (steps + 1) * flops
        assert f"trainer.max_pflops=1.2e-06 buys {steps} steps" in told
        assert 0 < rows[-2]["lr"] < 0.05 * rows[0]["lr"]
    small = in_process("train", *TINY, f"trainer.max_pflops={0.99 * STEP / 1e15:.6g}", expect=2).stderr
    assert f"must buy a step of 16 images, so at least {1.0001 * STEP / 1e15:.4g}" in small
    assert len(list((tmp_path / "out").iterdir())) == 2  # it was refused before there was a run folder
    told = in_process("train", *TINY, "trainer.max_pflops=1", "trainer.max_steps=2").stdout
    assert "steps, but trainer.max_steps=2 ends the run after 2" in " ".join(told.split())


def test_a_killed_run_with_a_budget_equals_an_undisturbed_one(in_process, tmp_path):
    """The end that a budget buys is derived anew at each start; mixing stops an epoch before it."""
    bought = ["trainer.max_pflops=5e-7", "augment.mixup=0.2", "augment.mix_off_epochs=1", "run_name=run"]
    line = [*TINY, *bought, "trainer.checkpoint_every_steps=1"]
    kill_after(4, tmp_path / "out/run", *line)
    plan = in_process("train", *line, "--plan").stdout
    assert "continues   at step" in plan and "trainer.max_pflops=5e-07 buys 7 steps" in plan
    in_process("train", *line)
    in_process("train", *line, "output_dir=whole")
    assert_same_run(tmp_path / "out/run", tmp_path / "whole/run")
    assert log_of(tmp_path / "out/run")[-1]["step"] == 7
    assert "is finished: 7 steps" in in_process("train", *line).stdout
    other = in_process("train", f"resume={tmp_path}/out/run", "trainer.max_pflops=6e-7", expect=2).stderr
    assert "trainer.max_pflops: 5e-07 -> 6e-07" in other


def test_two_processes_buy_the_same_steps_and_count_all_of_their_work(tmp_path):
    """The FLOPs of a step are those of the global batch, and a device's peak counts once for each process."""
    line = [*TINY, "trainer.max_pflops=5e-7", "trainer.peak_tflops=0.5", "run_name=two"]
    assert launch(tmp_path, 2, *line)[0] == 0
    rows = log_of(tmp_path / "out/two")
    assert rows[-1]["step"] == 7
    assert rows[0]["tflops"] == pytest.approx(rows[0]["images_per_sec"] / 16 * STEP / 1e12)
    assert rows[0]["mfu"] == pytest.approx(100 * rows[0]["tflops"] / (2 * 0.5))


@pytest.mark.slow
def test_two_processes_plan_a_run_once(tmp_path):
    """Under torchrun, all processes take the steps, and the first one prints."""
    code, plan = launch(tmp_path, 2, *TINY, "trainer.max_pflops=5e-7", "--plan")
    assert code == 0 and plan.count("trainer.max_pflops=5e-07 buys 7 steps") == 1 and not (tmp_path / "out").exists()


def test_a_plan_says_what_the_run_will_be_and_writes_nothing(in_process, tmp_path):
    """Its parameters, steps and FLOPs are the run's; there is no folder, lock or cache after it; wrong keys exit 2."""
    plan = in_process("train", *TINY, "run_name=run", "--plan").stdout
    assert list(tmp_path.iterdir()) == []
    told = in_process("train", *TINY, "run_name=run").stdout
    for name in ("model", "data", "batch", "compute", "lr"):
        said = [re.search(rf"^{name} +(.*)$", text, re.MULTILINE) for text in (plan, told)]
        assert said[0] is not None and said[1] is not None and said[0][1] == said[1][1]
    assert "12 steps" in plan and "3 evaluations" in plan and re.search(r"ETA +\d+ s: \d{4}-\d\d-\d\d \d\d:\d\d", plan)
    before = files(tmp_path)
    assert "is finished: 12 steps" in in_process("train", "resume=out/run", "--plan").stdout
    longer = ["resume=out/run", "trainer.epochs=5", "allow_config_change=[trainer.epochs]", "--plan"]
    plan = in_process("train", *longer).stdout
    assert "continues   at step 12" in plan and " for 8 steps" in plan
    assert "out/run-2," in in_process("train", *TINY, "run_name=run", "resume=never", "--plan").stdout
    assert "trainer.epoch" in in_process("train", *TINY, "trainer.epoch=3", "--plan", expect=2).stderr
    assert "exclude each other" in in_process("train", *TINY, "seed=0,1", "-m", "--plan", expect=2).stderr
    missing = in_process("train", "model=conv_resnet26", "data=cifar10", "data.root=none", "--plan", expect=2).stderr
    assert "--plan downloads no images" in missing
    assert files(tmp_path) == before


def test_the_peaks_of_gpus_are_found_by_their_names():
    """A100 is not A10, and a slice or a laptop's chip of a similar name has another peak."""
    assert known_peak("NVIDIA A100-SXM4-80GB", "bf16", "highest") == 312
    assert known_peak("NVIDIA A100-SXM4-80GB", "fp32", "high") == 156
    assert known_peak("NVIDIA A100 80GB PCIe", "fp32", "highest") == 19.5
    assert known_peak("NVIDIA A10", "bf16", "highest") == 125
    assert known_peak("NVIDIA H100 80GB HBM3", "fp16", "highest") == known_peak("NVIDIA H200", "bf16", "high") == 989.5
    assert known_peak("NVIDIA H100 PCIe", "bf16", "highest") == 756.5
    assert known_peak("Tesla V100-SXM2-16GB", "fp16", "highest") == 125
    others = ("NVIDIA A10G", "NVIDIA T400", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert {known_peak(name, "bf16", "highest") for name in others} == {None}


# Reports


def write_costs(folder: Path) -> None:
    """Create two runs of 4 epochs of 10 steps of 20 images, at 100 and 400 images/s, rows every 4 steps."""
    for name, keys, speed, top1s in (
        ("narrow", [], 100, (30.0, 50, 45, 60)),
        ("wide", ["model.width=0.25"], 400, (20.0, 40, 70, 65)),
    ):
        write_run(folder / name, ["experiment=debug", "trainer.epochs=4", "trainer.global_batch_size=20", *keys], [])
        train = [
            {"split": "train", "step": n, "epoch": 1, "loss": 1.0, "images_per_sec": speed} for n in range(4, 41, 4)
        ]
        val = [
            {"split": "val", "step": 10 * i, "epoch": i, "loss": 1.0, "top1": top1} for i, top1 in enumerate(top1s, 1)
        ]
        train[0]["images_per_sec"] = speed / 4  # of the first steps
        rows = sorted(train + val, key=lambda row: (row["step"], row["split"]))
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_report_has_what_training_cost_and_the_front(in_process, tmp_path):
    """The costs in the table equal those computed by hand from steps, batch, speeds and the model's FLOPs."""
    pytest.importorskip("matplotlib")
    write_costs(tmp_path / "runs")
    told = in_process("report", "runs", "--x", "hours").stdout
    records = {record["row"]: record for record in csv.DictReader((tmp_path / "runs/report/table.csv").open())}
    assert len(records) == 2
    for record, keys, speed in zip(records.values(), ([], ["model.width=0.25"]), (100, 400), strict=True):
        config = compose_config(["experiment=debug", "trainer.global_batch_size=20", *keys])
        seconds = 4 * 20 / (speed / 4) + 36 * 20 / speed
        assert float(record["training_hours"]) == pytest.approx(seconds / 3600)
        assert float(record["training_flops"]) == 40 * step_flops(config, 10)
        assert (float(record["training_images"]), float(record["training_epochs"])) == (800, 4)
    assert "| hours " in told and "| train PFLOPs" in told and "highest val top1 at each cost (hours): row 2" in told
    assert (tmp_path / "runs/report/cost.png").stat().st_size > 10_000
    assert "training_hours" not in in_process("report", "runs", "--out", "plain").stdout
    assert not (tmp_path / "plain/cost.png").exists()
    assert "training" not in (tmp_path / "plain/table.csv").read_text().replace("training_seconds", "")


def test_the_front_is_what_no_cheaper_point_reaches():
    """Of points at one cost, the highest counts; a dearer point must be higher than all cheaper ones."""
    assert front([(3, 50.0), (1, 20.0), (1, 30.0), (2, 30.0), (4, 45.0), (5, 51.0)]) == [
        (1, 30.0),
        (3, 50.0),
        (5, 51.0),
    ]
    assert unit_of("flops", 3e16)[0] == 1e15 and unit_of("hours", 1.5)[1].startswith("minutes")


def test_a_run_that_cannot_be_rebuilt_or_logged_no_speed_still_has_costs():
    """Its own rows say what an image took; without speeds, time is shared out evenly; without both, it is not known."""
    config = compose_config(["experiment=debug", "trainer.global_batch_size=20"])
    val = [{"step": 10, "epoch": 1, "top1": 1.0}, {"step": 40, "epoch": 4, "top1": 2.0}]
    job, row = Job("run", "done", config=config, val=val, seconds=7200.0), Row({})
    assert points(job, row, "flops") == [] and points(job, row, "hours") == [(0.5, 1.0), (2.0, 2.0)]
    job.train = [{"step": 40, "tflops": 0.5, "images_per_sec": 100.0}]
    assert points(job, row, "flops") == [(200 * 5e9, 1.0), (800 * 5e9, 2.0)]
