"""Check the weights and preprocessing of a loaded run, as used for evaluation, prediction and export."""

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import sasa_train
from sasa_train import evaluate, trained, visualize
from sasa_train.config.overrides import split_overrides
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import load_checkpoint
from sasa_train.runs.source import find_checkpoint
from sasa_train.trained import load_trained


def test_the_moving_average_is_the_default_and_raw_the_models_own(tiny_run):
    """Check the choice of weights; with the wrong ones, a published result would differ from the log."""
    averaged, raw = load_trained(tiny_run), load_trained(tiny_run, ["weights=raw"])
    assert (averaged.weights, raw.weights) == ("ema", "raw")
    name = "layer1.0.conv1.weight"
    assert torch.equal(averaged.model.state_dict()[name], averaged.checkpoint["ema"][name])
    assert torch.equal(raw.model.state_dict()[name], raw.checkpoint["model"][name])
    assert not torch.equal(averaged.checkpoint["ema"][name], raw.checkpoint["model"][name])
    assert not averaged.model.training


def test_predictions_in_python_are_those_of_the_command(tiny_run, image_folder, tmp_path, in_process):
    paths = sorted(str(path) for path in image_folder.rglob("*.png"))[:5]
    lines = in_process("predict", str(tiny_run), *paths, "--format", "jsonl", "--top-k", "3").stdout.splitlines()
    expected = [[(one["class"], one["probability"]) for one in json.loads(line)["predictions"]] for line in lines]
    trained = sasa_train.load_trained(str(tiny_run))
    found = trained.predict(paths, top=3)
    assert [[name for name, _ in one] for one in found] == [[name for name, _ in one] for one in expected]
    assert all(share == pytest.approx(other, abs=2e-6) for one in zip(found, expected, strict=True)
               for (_, share), (_, other) in zip(*one, strict=True))  # fmt: skip
    # A batch of another size may differ in the last bits.
    alone = trained.predict(Path(paths[0]), top=3)
    assert alone == [(name, pytest.approx(share, rel=1e-5)) for name, share in found[0]]
    assert len(trained.predict(paths[0], top=99)) == 10
    with pytest.raises(ConfigError, match="top=0 must be at least 1"):
        trained.predict(paths[0], top=0)
    with Image.open(paths[0]) as image, torch.no_grad():
        share, label = trained.model(trained.transform(image)[None]).softmax(1)[0].max(0)
    assert (trained.classes[label], share.item()) == (found[0][0][0], pytest.approx(found[0][0][1], rel=1e-5))
    (tmp_path / "bad.png").write_text("this is no image")
    with pytest.raises(ConfigError, match="bad.png: cannot be read as an image"):
        trained.predict([paths[0], tmp_path / "bad.png"])
    with pytest.raises(FileNotFoundError, match="No such file or directory: .*missing.png"):
        trained.predict(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError, match="is a folder; give its files, as in sorted"):
        trained.predict(tmp_path)


def test_a_folder_of_runs_is_answered_with_their_names(tiny_run, tmp_path, in_process):
    told = in_process("evaluate", str(tiny_run.parent), expect=2).stderr
    assert "is not a run folder, but holds the runs tiny; give one of them" in told
    (tmp_path / "new photos").mkdir()  # for which the advice was once to train on them
    told = in_process("evaluate", str(tiny_run.parent), "new photos", expect=2).stderr
    assert "is not a run folder, but holds the runs" in told and "sasa-predict RUN 'new photos'" in told
    for command in ("evaluate", "export"):
        told = in_process(command, str(tiny_run), "new photos", expect=2).stderr
        assert f"new photos: is not a key=value; pictures without labels: sasa-predict {tiny_run} 'new photos'" in told
        assert "'data.root=new photos'" in told


def test_preprocessing_is_that_of_the_runs_data(tiny_run):
    """The digits' own mean and std are used unless the config sets a mean."""
    pixels = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    trained = load_trained(tiny_run)
    assert trained.image_size == 8 and trained.classes == [str(digit) for digit in range(10)]
    found = trained.normalize(torch.device("cpu"))(pixels)
    assert torch.allclose(found, torch.full_like(found, (1 - 0.3050) / 0.3756), atol=1e-6)
    other = load_trained(tiny_run, ["data.mean=[0.5,0.5,0.5]", "data.std=[0.25,0.25,0.25]"])
    assert torch.equal(other.normalize(torch.device("cpu"))(pixels), torch.full((1, 3, 8, 8), 2.0))


def test_other_images_are_prepared_as_the_models_own_were(tiny_run):
    """Check that overriding data.name changes only which files are read; it once also changed mean, std and size."""
    elsewhere = ["data.name=image_folder", "data.root=photos", "model.num_classes=10"]
    own, other = load_trained(tiny_run), load_trained(tiny_run, elsewhere)
    assert other.image_size == own.image_size == 8
    pixels = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    cpu = torch.device("cpu")
    assert torch.equal(other.normalize(cpu)(pixels), own.normalize(cpu)(pixels))
    asked = load_trained(tiny_run, [*elsewhere, "data.image_size=16", "data.mean=[0.5,0.5,0.5]"])
    assert asked.image_size == 16 and asked.config.data.mean == [0.5] * 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights=best"], "weights=best must be ema or raw"),
        (["weight=raw"], "unknown key 'weight': did you mean weights?"),
        (
            ["model.width=0.25"],
            r"^the overrides make another model than the checkpoint's: [^\n]* has shape [^\n]* more like it$",
        ),
        (["model.widht=0.25"], "did you mean model.width"),
    ],
)
def test_overrides_that_make_no_sense_are_refused(tiny_run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_trained(tiny_run, overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            lambda whole: {"model": with_changed(whole["model"], "fc.weight", torch.nan)},
            "config: model.fc.weight is not f",
        ),
        (
            lambda whole: {"ema": with_changed(whole["ema"], "stem.bn.running_var", -1)},
            "ema.stem.bn.running_var has negat",
        ),
        (lambda whole: {"ema": {}}, r"config: ema.stem.emb_row is missing, and \d+ more like it; bring back"),
        (lambda whole: {"ema": None}, "the checkpoint has no moving average, and its config trainer.ema_decay=0.5"),
        (
            lambda whole: {"config": whole["config"].replace("ema_decay: 0.5", "ema_decay: null")},
            "has a moving average, ema",
        ),
        (
            lambda whole: {"config": whole["config"].replace("width: 0.125", "width: 64")},
            r"has shape \[4, 8\], and must",
        ),
        (lambda whole: {"config": whole["config"] + "x: " + "[" * 60_000}, "nested more than 20 deep"),
    ],
)
def test_a_checkpoint_whose_parts_contradict_one_another_is_refused(tiny_run, tmp_path, monkeypatch, changes, message):
    """One with NaN was evaluated to "loss nan" with exit code 0, and a width of 64 filled the memory first."""
    largest: list[int] = []
    monkeypatch.setattr(trained, "build_model", lambda *_: largest.append(1))
    whole = load_checkpoint(tiny_run / "checkpoints/last.pt")
    torch.save(whole | changes(whole), tmp_path / "x.pt")
    for command in ("evaluate", "export", "visualize"):
        run_command = importlib.import_module(f"sasa_train.{command}").run_command
        assert run_command([str(tmp_path / "x.pt")]) == 2
    with pytest.raises(ConfigError, match=message) as error:
        load_trained(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(error.value) and not largest


def with_changed(tensors: dict, name: str, factor: float) -> dict:
    return tensors | {name: tensors[name] * factor}


def test_a_model_whose_output_is_not_finite_is_not_evaluated(tiny_run, tmp_path, capsys):
    """Its weights are finite, but too large; topk would rank NaN first, so that all figures are wrong."""
    whole = load_checkpoint(tiny_run / "checkpoints/last.pt")
    large = {
        key: whole[key] | {"fc.weight": torch.full_like(whole[key]["fc.weight"], 3e38)} for key in ("model", "ema")
    }
    torch.save(whole | large, tmp_path / "x.pt")
    for arguments in ([], ["--calibration"], ["--predictions", str(tmp_path / "p.csv")]):
        assert evaluate.run_command([str(tmp_path / "x.pt"), *arguments]) == 1
        assert "the loss on val is nan, because the model's output is not finite" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
    assert visualize.run_command([str(tmp_path / "x.pt"), "confusion_matrix", "--out", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "x.pt: no figure would be right, because the model's output is not finite, or too large, in fp32;" in told
    assert told.endswith("take an earlier checkpoint\n")  # fp32 is no remedy for fp32


def test_a_run_folder_its_checkpoints_and_a_file_name_the_same(tiny_run):
    best = tiny_run / "checkpoints/best.pt"
    assert find_checkpoint(tiny_run) == find_checkpoint(tiny_run / "checkpoints") == find_checkpoint(best) == best


def test_words_are_overrides_unless_they_are_files(tmp_path, monkeypatch):
    """A photograph may be named seed=3, and a misspelt key must not be reported as a missing photograph."""
    monkeypatch.chdir(tmp_path)
    Path("seed=3").touch()
    os.symlink("nowhere", "weights=raw")
    words = ["a.png", "trainer.device=cpu", "seed=3", "weights=raw", "a/x=1.png", "weights=ema", "trainer.devise=cpu"]
    assert split_overrides(words) == (
        ["a.png", "seed=3", "weights=raw", "a/x=1.png"],
        ["trainer.device=cpu", "weights=ema", "trainer.devise=cpu"],
    )


@pytest.mark.parametrize("name", ["evaluate", "predict", "demo", "visualize", "export", "report"])
def test_every_command_that_reads_a_run_refuses_a_misspelt_key_alike(tiny_run, name, capsys, monkeypatch):
    """Check that all commands reject a misspelt key; some once took it for a figure, a run or an extra argument."""
    command = importlib.import_module(f"sasa_train.{name}").run_command
    more = {"predict": [str(tiny_run / "augmented.png")], "demo": ["--port", "0"]}.get(name, [])
    words = [str(tiny_run), *more, "trainer.devise=cpu"]
    assert command(words) == 2
    assert "unknown key 'trainer.devise': did you mean trainer.device?" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    if name != "report":  # the table of runs is still written
        assert command(words[:-1]) == 2
        assert "WORLD_SIZE=2: this is one process's work" in capsys.readouterr().err
