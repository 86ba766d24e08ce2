"""The costs, speeds and settings in docs/imagenet.md are what its two scripts compute, and the formulas are right."""

import importlib.util
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from timm.utils import ModelEmaV3
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.training.optim import peak_lr

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "imagenet.md"


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


budget, averages = load_script("training_budget"), load_script("scale_averages")
# 25 MB of gradient are one bucket of 25 MiB; 1 GB/s between machines of 2 GPUs, 10 GB/s inside.
NET = budget.Net("net", 6_250_000, 10**9, training=1000.0, inference=3000.0, source="assumed")
CLUSTER = budget.Cluster(2, 10e9, 1e9, 0.0, 0.5, step_floor=0.0, max_micro_batch=100, cores_per_gpu=10,
                         loader_per_core=500.0)  # fmt: skip


def tables(text: str) -> list[str]:
    return re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def test_the_pages_tables_are_what_its_commands_print(capsys):
    commands = re.findall(r"^`?python scripts/(\w+)\.py\b([^`\n]*)`?", PAGE.read_text(), re.MULTILINE)
    printed = []
    for name, arguments in commands:
        if "gpu.json" not in arguments:  # the reader's own measurement
            {"training_budget": budget, "scale_averages": averages}[name].main(shlex.split(arguments))
            printed += tables(capsys.readouterr().out)
    assert tables(PAGE.read_text()) == printed
    assert len(printed) == 6


def test_ring_all_reduce():
    """Goyal et al. 2017, section 4: 100 MB in 0.125 s need 1.6 GB/s; they take 2 for 2 (n-1)/n, as for many GPUs."""
    assert budget.all_reduce_seconds(100e6, 10**6, 1.6e9, 0) == pytest.approx(0.125, rel=1e-5)
    assert budget.all_reduce_seconds(100e6, 1, 1.6e9, 1) == 0
    # 60 MiB are three buckets; five GPUs pass each on 8 times, 0.01 s a time, and send 8/5 of the bytes.
    assert budget.all_reduce_seconds(60 * 2**20, 5, 2**20, 0.01) == pytest.approx(96 + 0.24)


def test_a_step_on_paper():
    """Four GPUs in two machines, 100 images each: 0.1 s of compute, of whose backward pass 0.0333 s hide 0.0375 s."""
    step = budget.step_times(NET, CLUSTER, 4, 400)
    assert (step.micro_batch, step.num_micro_batches) == (100, 1)
    assert step.all_reduce == pytest.approx(25e6 * 1.5 / 1e9)
    assert step.exposed == step.all_reduce  # a single bucket is ready when the backward pass is over
    assert step.total == pytest.approx(0.1375)
    assert step.limit == "network"


def test_what_can_hide_communication_is_the_last_micro_batch():
    net = replace(NET, params=40 * NET.params)  # 1 GB, 39 buckets
    for num_images, num_micro_batches in ((400, 1), (2000, 5)):
        step = budget.step_times(net, CLUSTER, 4, num_images)
        assert step.num_micro_batches == num_micro_batches
        assert step.exposed == pytest.approx(1.5 - 0.5 * 0.1 * 2 / 3)


def test_each_limit_is_named():
    def limit(**changes) -> str:
        return budget.step_times(NET, replace(CLUSTER, **changes), 2, 200).limit

    assert limit() == "arithmetic"
    assert limit(inside=1e8) == "network"
    assert limit(step_floor=0.2) == "launches"
    assert limit(cores_per_gpu=1) == "data"


def test_a_run_on_paper():
    """One GPU, batch 100: 12,811 steps of 0.1 s, 100,000 images of evaluation at 3,000/s, a save of 75 MB, twice."""
    saved = 75e6 / (217e6 / 0.49)
    assert budget.run_seconds(NET, CLUSTER, 1, 100, 2) == pytest.approx(2 * (1281.1 + 100_000 / 3000 + saved))


def test_micro_batches_fit_and_divide():
    assert budget.split_batch(4096, 64, 256) == (64, 1)
    assert budget.split_batch(4096, 1, 256) == (256, 16)
    assert budget.split_batch(3 * 7 * 11, 3, 20) == (11, 7)
    with pytest.raises(ValueError, match="--global-batch 4096 must be divisible by the number of GPUs, 3"):
        budget.split_batch(4096, 3, 256)


def test_measured_speeds_take_the_place_of_assumed_ones(tmp_path, capsys):
    """What a reader's GPU measured is in the table, and the rest follows from its convolutional net."""
    speed = {"training_images_per_sec": {"median": 500.0}, "inference_images_per_sec": {"median": 1600.0}}
    result = {
        "header": {"hardware": "a GPU", "command": "sasa-benchmark model"},
        "rows": [speed | {"model": "conv_resnet50"}],
    }
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(result))
    budget.main(["--measured", str(path), "--gpus", "1", "--price", "3", "--cores-per-gpu", "100"])
    out = capsys.readouterr().out
    (row,) = re.findall(r"^\| conv_resnet50 \|.*", out, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    hours = 130 * (312 * 4096 / 500 + 100_000 / 1600 + 12 * 25_557_032 / (217e6 / 0.49)) / 3600
    assert cells[4:] == ["500 measured", f"{hours:.1f}", f"{hours:.1f}", f"{3 * hours:,.0f}"]
    assert re.search(rf"^\| conv_resnet26 .*\| {500 * 8178368512 / 4684513280:,.0f} assumed \|", out, re.MULTILINE)
    path.write_text("{}")
    with pytest.raises(SystemExit):
        budget.main(["--measured", str(path)])
    assert "must be what sasa-benchmark model --json wrote" in capsys.readouterr().err


def test_constants_are_those_of_the_recipe_and_of_what_was_measured():
    config = compose_config(["experiment=imagenet_sasa_resnet50"])
    trainer, schedule = config.trainer, config.schedule
    assert (
        (trainer.global_batch_size, trainer.epochs)
        == (budget.BATCH, budget.EPOCHS)
        == (averages.BATCH, averages.EPOCHS)
    )
    assert (trainer.ema_decay, schedule.warmup_epochs) == (averages.EMA_DECAY, averages.WARMUP_EPOCHS)
    assert config.model.bn_momentum == averages.BN_MOMENTUM == budget.BN_MOMENTUM
    assert peak_lr(config) == pytest.approx(averages.LR_PER_256 * 4096 / 256)
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text()
    for name, speed in budget.CPU_IMAGES_PER_SEC.items():
        assert f"| {name} | {speed} (" in benchmarks
    assert "(217 MB;" in (ROOT / "docs" / "reliability.md").read_text()
    assert "0.49 s median" in (ROOT / "docs" / "reliability.md").read_text()


def test_a_scaled_average_forgets_as_fast():
    """Four updates of one decay are one update of the scaled one, on any series that stands still meanwhile."""
    fine = coarse = 0.0
    decay = averages.scaled_decay(0.97, 4)
    for value in (3.0, -7.0, 11.0, 2.0, 5.0):
        coarse = decay * coarse + (1 - decay) * value
        for _ in range(4):
            fine = 0.97 * fine + 0.03 * value
    assert fine == pytest.approx(coarse, rel=1e-12)
    assert averages.scaled_momentum(0.03, 4) == pytest.approx(1 - decay)


def test_averages_followed_are_those_on_paper():
    """After t updates with decay d the mean age is d (1 - d^t) / (1 - d), and the start's share d^t."""
    age, start = averages.followed([0.9] * 50)
    assert age == pytest.approx(0.9 * (1 - 0.9**50) / 0.1)
    assert start == pytest.approx(0.9**50)
    assert averages.bn_start(40_560, 1e-4) == pytest.approx(0.9999**40_560)


def test_batch_norm_smoothed_twice_keeps_more_of_its_start():
    """The page's 8.8 %: a moving average of running statistics, both at decay d, has d^t (1 + t (1-d)) of the start."""
    running = smoothed = 1.0
    for _ in range(40_560):
        running *= 0.9999
        smoothed = 0.9999 * smoothed + 1e-4 * running
    assert smoothed == pytest.approx(0.9999**40_560 * (1 + 40_560 * 1e-4), rel=1e-3)
    assert f"{100 * smoothed:.1f} %" in PAGE.read_text()


@pytest.mark.parametrize("warmup", [True, False])
def test_the_decay_is_that_of_the_average_in_training(warmup):
    average = ModelEmaV3(nn.Linear(2, 3), decay=0.9999, use_warmup=warmup)
    for step in (1, 2, 3, 40, 40_560, 2_000_000):
        assert averages.ema_decay_at(step, 0.9999, warmup) == pytest.approx(average.get_decay(step), rel=1e-12)
