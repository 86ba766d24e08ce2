"""Check that `sasa-benchmark` reports what it measured, skips incorrect backends, and validates options first."""

import importlib.util
import json
import statistics
from pathlib import Path

import pytest
import torch
from measuring_text import wrong_texts
from PIL import Image

from sasa_train import benchmark as benchmark
from sasa_train.attention import cpu
from sasa_train.benchmark import timing
from sasa_train.benchmark.contenders import Case, build_contender, check

SMALL = ["--num-heads=2", "--kernel-size=3", "--batch-size=1", "--device=cpu"]
SHAPES = ["--shapes", "3x5x8", "4x6x8/2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Shorten measurements, as times are not checked, and skip C library settings that would outlive the test."""
    monkeypatch.setattr(timing, "SHORTEST_SECONDS", 1e-9)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)


def run(tmp_path: Path, *arguments: str, expect: int = 0) -> dict:
    path = tmp_path / "result.json"
    assert benchmark.run_command([*arguments, f"--json={path}"]) == expect
    return json.loads(path.read_text())


def assert_consistent(ratio: dict, numerators: list[float], denominators: list[float]) -> None:
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    assert ratio["median"] == pytest.approx(statistics.median(ratios))
    low, high = ratio["quartiles"]
    assert min(ratios) <= low <= ratio["median"] <= high <= max(ratios)


def test_attention_writes_what_it_measured(tmp_path, capsys):
    """Check that the results in the table, the JSON file and the chart are computed from the same repetitions."""
    picture = tmp_path / "chart.png"
    result = run(tmp_path, "attention", *SMALL, *SHAPES, "--repeats=3", f"--plot={picture}")
    rows = {(row["shape"], row["backend"]): row for row in result["rows"]}
    assert list(rows) == [(shape, name) for shape in SHAPES[1:] for name in ("conv", "cpu")]
    for (shape, _), row in rows.items():
        for what in ("forward", "forward_backward"):
            seconds, yardstick = row[f"{what}_seconds"]["all"], rows[shape, "conv"][f"{what}_seconds"]["all"]
            assert len(seconds) == 3 and min(seconds) > 0
            assert row[f"{what}_seconds"]["median"] == statistics.median(seconds)
            assert_consistent(row[f"{what}_ratio"], seconds, yardstick)
    worst = rows["3x5x8", "cpu"]["forward_backward_ratio"]["median"]
    assert result["summary"] == [
        f"cpu/conv, forward+backward, shapes at which no stage begins: geometric mean {worst:.3f}, "
        f"worst {worst:.3f} (3x5x8)"
    ]
    assert any(note.startswith("flex left out: ") for note in result["notes"])
    assert {"date", "hardware", "versions", "command"} == result["header"].keys()
    assert torch.__version__.split("+")[0] in result["header"]["versions"]
    out = capsys.readouterr().out
    assert out.startswith("date: ") and out.count("\n| 3x5x8, batch 1 | ") == 2 and result["summary"][0] in out
    with Image.open(picture) as image:
        assert image.format == "PNG" and min(image.size) > 300 and len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_wrong_backend_is_not_timed(what, tmp_path, monkeypatch, capsys):
    """A fast kernel that computes something else must never appear in a table."""
    name = f"local_attention_{'forward' if what == 'output' else 'backward'}"
    right = getattr(cpu, name)

    def wrong(*arguments):
        result = right(*arguments)
        (arguments[1] if what == "output" else arguments[-1][1]).mul_(1.01)  # the output, or the gradient of key
        return result

    monkeypatch.setattr(cpu, name, wrong)
    result = run(tmp_path, "attention", *SMALL, *SHAPES, "--repeats=1", "--backends", "conv", "cpu", expect=1)
    assert {row["backend"] for row in result["rows"]} == {"conv"} and result["failed"]
    named = "output" if what == "output" else "the gradient of key"
    assert f"note: cpu at 3x5x8 is wrong and was not timed: {named} differs" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("begins_stage", [False, True])
def test_flex_attention_is_the_same_function(begins_stage, monkeypatch):
    """Check that score_mod and the block mask compute the same function as our op, on a CPU and without compilation."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    assert check("flex", Case(5, 7, 16, begins_stage, 2, 2, 3, "fp32", "cpu")) is None


def test_the_contenders_read_one_fused_projection():
    contender = build_contender("cpu", Case(5, 7, 16, False, 2, 2, 3, "bf16", "cpu"))
    fused, rel_height, rel_width = contender.leaves
    assert fused.shape == (2, 48, 5, 7) and fused.is_contiguous(memory_format=torch.channels_last)
    assert fused.dtype == torch.bfloat16 and rel_height.shape == rel_width.shape == (3, 4)
    assert [grad.shape for grad in contender.train()] == [leaf.shape for leaf in contender.leaves]


def test_layers(tmp_path):
    result = run(tmp_path, "attention", "--layers", "--repeats=1", *SMALL, "--shapes", "8x8x16", "4x4x16")
    found = [(row["shape"], row["backend"]) for row in result["rows"]]
    names = {"8x8x16": ("conv", "attention", "halo"), "4x4x16": ("conv", "attention")}
    assert found == [(shape, name) for shape in names for name in names[shape]]
    assert list(result["left_out"].values()) == [["4x4x16"]]


def test_growth_fits_its_own_rows(tmp_path):
    picture = tmp_path / "growth.png"
    sizes = ["--growth-sides", "3", "6", "--growth-kernel-sizes", "3", "7", "--growth-side=6", "--growth-channels=8"]
    result = run(
        tmp_path, "attention", "--growth", "--num-heads=2", "--kernel-size=3", "--device=cpu", "--repeats=2",
        "--backends", "conv", "cpu", *sizes, f"--plot={picture}",
    )  # fmt: skip
    columns = ("axis", "backend", "side", "kernel_size", "batch_size")
    found = [tuple(row[column] for column in columns) for row in result["rows"]]
    assert found == [
        ("map", "conv", 3, 3, 4), ("map", "cpu", 3, 3, 4), ("map", "conv", 6, 3, 1), ("map", "cpu", 6, 3, 1),
        ("window", "cpu", 6, 3, 1), ("window", "cpu", 6, 7, 1),
    ]  # fmt: skip
    fitted = [line.split("^")[0] for line in result["summary"]]
    assert fitted == ["conv: time ~ pixels", "cpu: time ~ pixels", "cpu: time ~ K"]
    with Image.open(picture) as image:
        assert image.format == "PNG"


def test_fitted_exponent_of_a_power_law():
    assert timing.fitted_exponent([2, 3, 7], [5 * n**1.5 for n in (2, 3, 7)]) == pytest.approx(1.5)


def test_memory_is_the_peak_of_a_fresh_process():
    """Each contender needs a new process; otherwise, memory freed by an earlier one would hide the next peak."""
    found = timing.in_fresh_process(_take_and_free, 50)
    assert 49 * 2**20 <= found <= 60 * 2**20


def _take_and_free(mib: int) -> int:
    torch.zeros(200 * 2**20, dtype=torch.uint8).fill_(1)  # an earlier, higher peak
    return timing.extra_memory(lambda: torch.zeros(mib * 2**20, dtype=torch.uint8).fill_(1), torch.device("cpu"))


MODELS = ["conv_resnet26,stem=conv_small,width=0.125", "hybrid_resnet26,stem=conv_small,width=0.125,num_heads=2"]
TINY_MODEL = ["--image-size=8", "--batch-size=2", "--num-classes=5", "--device=cpu"]


def test_models(tmp_path):
    picture = tmp_path / "models.png"
    options = ["--repeats=2", "--memory-format=best", "--memory", f"--plot={picture}"]
    result = run(tmp_path, "model", *MODELS, *TINY_MODEL, *options)
    first, second = result["rows"]
    assert [row["model"] for row in result["rows"]] == MODELS
    for what in ("training", "inference"):
        speeds = second[f"{what}_images_per_sec"]["all"], first[f"{what}_images_per_sec"]["all"]
        assert_consistent(second[f"{what}_ratio"], *speeds)
    assert all(row["memory_bytes"] > 12 * row["parameters"] for row in result["rows"])  # weights, gradients, momentum
    with Image.open(picture) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_models_under_autocast_with_checkpointing(dtype, tmp_path):
    options = ["--repeats=1", f"--dtype={dtype}", "--grad-checkpointing"]
    assert len(run(tmp_path, "model", MODELS[1], *TINY_MODEL, *options)["rows"]) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model", "hybrid_resnet27"], "hybrid_resnet26"),
        (["model", "conv_resnet26,stam=conv"], "stem"),
        (["model", "conv_resnet26,stem"], "key=value"),
        (["model", "sasa_resnet26", "--image-size=30"], "32 x 32"),
        (["attention", "--shapes", "5x19"], "height x width x channels"),
        (["attention", "--shapes", "5x19x12"], "--num-heads 8"),
        (["attention", "--backends", "natten"], "natten is not installed"),
        (["attention", "--backends", "flex", "--device=cpu"], "backward"),
        (["attention", "--kernel-size=4"], "odd"),
        (["attention", "--json=nowhere/out.json"], "the folder nowhere does not exist"),
    ],
)
def test_refusals_name_the_remedy(arguments, message, capsys):
    if "natten" in arguments and importlib.util.find_spec("natten"):
        pytest.skip("natten is installed")
    assert benchmark.run_command(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_a_chart_is_refused_before_anything_is_measured(monkeypatch, capsys):
    """Check that --plot is refused early, so that an hour of measurements cannot end in an ImportError."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    monkeypatch.setattr(benchmark, "_set_up", lambda options: pytest.fail("went on to measure"))
    assert benchmark.run_command(["attention", "--plot=chart.png"]) == 2
    assert "pip install 'sasa_train[plots]'" in capsys.readouterr().err


def test_no_text_of_a_chart_covers_another():
    """Check bars of long model names and speeds of six digits, under a title longer than the page is wide."""
    from sasa_train.benchmark import plots
    from sasa_train.figures import set_title

    speed = {"median": 123456.0, "min": 100000.0, "max": 150000.0}
    name = "sasa_resnet50,width=0.25,stem=attention_small"
    figure = plots._draw_models(
        [{"model": name, "training_images_per_sec": speed, "inference_images_per_sec": speed}] * 3
    )
    set_title(figure, "a GPU with a long name, a processor with a longer one, 2 threads, bfloat16, " * 2, 10)
    assert wrong_texts(figure) == []
