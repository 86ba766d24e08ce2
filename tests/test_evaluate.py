"""Check metrics beyond top1, first against values computed by hand, then through the command on a small run."""

import copy
import csv
import json
import math
import os
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from sasa_train import evaluate, predict, train, visualize
from sasa_train.data.transforms import fit
from sasa_train.dataset_tool import run_command
from sasa_train.evaluate.calibration import best_temperature, bin_by_confidence, calibrate, expected_error
from sasa_train.evaluate.imagenet_real import RealLabels, evaluate_real, load_real_labels
from sasa_train.evaluate.reliability_diagram import draw_reliability
from sasa_train.evaluate.significance import PairedCounts, compare, mcnemar, paired_difference
from sasa_train.evaluate.val_pass import mean_over_views, open_val
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import load_checkpoint
from sasa_train.trained import load_trained

WNIDS = ("n01440764", "n01443537", "n02102040")  # ImageNet's classes 0, 1 and 217
NUM_VAL = 17  # images per class
BAD = "ILSVRC2012_val_00000005.JPEG"  # in the first class; it is not an image


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Return a four-epoch run on three ImageNet classes that are hard to tell apart, so that it makes many mistakes."""
    folder = tmp_path_factory.mktemp("evaluated")
    rng, number = np.random.default_rng(0), 0
    for split, count in (("train", 20), ("val", NUM_VAL)):
        for label, wnid in enumerate(WNIDS):
            (folder / "images" / split / wnid).mkdir(parents=True)
            for i in range(count):
                number += split == "val"
                pixels = rng.integers(0, 200, (13, 16, 3), dtype=np.uint8)
                pixels[:, : 2 + 4 * label] //= 3  # unlike its mirror image
                name = f"ILSVRC2012_val_{number:08d}.JPEG" if split == "val" else f"{wnid}_{i}.JPEG"
                Image.fromarray(pixels).save(folder / "images" / split / wnid / name)
    (folder / "images/val" / WNIDS[0] / BAD).write_text("no image")
    small = ("model.stem=conv_small", "model.width=0.125", "model.num_heads=2", "model.kernel_size=3")
    data = ("data=imagenet", f"data.root={folder / 'images'}", "data.image_size=16", "data.num_workers=0")
    rest = ("trainer.global_batch_size=15", "optimizer.lr=2", "trainer.epochs=4", "run_name=run")
    assert train.run_command([*small, *data, *rest, f"output_dir={folder / 'out'}"]) == 0
    return folder / "out/run"


def run(capsys, *arguments: object, expect: int = 0) -> str:
    """Return the command's output, or its error message."""
    capsys.readouterr()
    assert evaluate.run_command(list(map(str, arguments))) == expect
    captured = capsys.readouterr()
    return captured.err if expect else captured.out


# Calibration


def test_ece_and_mce_on_paper():
    """Check three bins: 40 and 50 % (one is correct, gap -5), 60 % (wrong, gap 60), 80 and 100 % (correct, gap -10)."""
    confidences, is_right = np.array([0.4, 0.5, 0.6, 0.8, 1.0]), np.array([True, False, False, True, True])
    bins = bin_by_confidence(confidences, is_right, 4)
    assert [each.num_images for each in bins] == [0, 2, 1, 2]  # 0.5 belongs to the bin below the edge, as in the paper
    assert bins[0].confidence is bins[0].top1 is None and bins[0].gap == 0
    assert [each.gap for each in bins[1:]] == pytest.approx([-5, 60, -10])
    assert expected_error(bins) == pytest.approx((2 * 5 + 60 + 2 * 10) / 5)


def test_brier_nll_and_confidence_on_paper():
    """The two images have probabilities (0.7, 0.2, 0.1) and (0.3, 0.6, 0.1) and both belong to class 0."""
    logits, labels = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.6, 0.1]]).log(), torch.tensor([0, 0])
    found = calibrate(logits, labels, logits.argmax(1))
    assert found.brier == pytest.approx((0.09 + 0.04 + 0.01 + 0.49 + 0.36 + 0.01) / 2, rel=1e-6)
    assert found.nll == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2, rel=1e-6)
    assert (found.top1, found.mce) == (50, pytest.approx(60, rel=1e-6))
    assert found.confidence == pytest.approx(65, rel=1e-6) and found.ece == pytest.approx((30 + 60) / 2, rel=1e-6)


def test_the_best_temperature_on_paper():
    """The predicted odds are 9 : 1, but three of four correct means 3 : 1, so the logits must be halved: T = 2."""
    logits = torch.tensor([[math.log(9.0), 0.0]] * 8)
    labels = torch.tensor([0, 0, 0, 1] * 2)
    found = calibrate(logits, labels, logits.argmax(1)).temperature
    assert found is not None and found.value == pytest.approx(2, rel=1e-6)
    assert found.nll == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), rel=1e-6)
    assert found.ece == pytest.approx(0, abs=1e-4)
    assert best_temperature(logits, torch.zeros_like(labels)) is None  # all correct: colder is always better
    assert best_temperature(logits, torch.ones_like(labels)) is None  # all wrong: hotter is always better


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_best_temperature_is_found_from_afar(scale):
    """Check that the search for the temperature does not diverge for logits in the hundreds."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(500, 7, generator=generator)
    labels = torch.multinomial(true.softmax(1), 1, generator=generator)[:, 0]
    found = best_temperature(scale * true, labels)
    assert found is not None and found / scale == pytest.approx(best_temperature(true, labels), rel=1e-5)
    around = [torch.nn.functional.cross_entropy(scale * true.double() / t, labels) for t in
              (found, 0.99 * found, 1.01 * found)]  # fmt: skip
    assert min(around) == around[0]


def test_the_diagram_shows_the_bins():
    bins = bin_by_confidence(np.array([0.3, 0.55, 0.9, 0.95]), np.array([True, False, True, True]), 5)
    upper, lower = draw_reliability(bins, "val").axes
    accuracy, gaps, counts = upper.containers[0], upper.containers[1], lower.containers[0]
    assert [bar.get_height() for bar in accuracy] == [100, 0, 100]
    assert [bar.get_y() + bar.get_height() for bar in gaps] == pytest.approx([30, 55, 92.5])  # the confidences
    assert [bar.get_height() for bar in counts] == [0, 1, 1, 0, 2]


def test_views_are_averaged_as_probabilities():
    """The mean of (0.9, 0.1) and (0.2, 0.8) is (0.55, 0.45); the mean of their logits would give 0.6 : 0.4."""
    views = [torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.2, 0.8]]).log() + 5]
    torch.testing.assert_close(mean_over_views(views).exp(), torch.tensor([[0.55, 0.45]]))


# Two models on the same images


def test_mcnemar_on_paper():
    """For 1 and 7 disagreements, the p-value is 2 P(at most 1 of 8), where P = 9 / 256."""
    for table in ((1, 1, 7, 12), (500, 7, 1, 0)):
        assert mcnemar(PairedCounts(*table)) == pytest.approx(18 / 256, rel=1e-12)
    assert mcnemar(PairedCounts(3, 4, 4, 0)) == mcnemar(PairedCounts(3, 0, 0, 2)) == 1
    tail = Fraction(2 * sum(math.comb(1234, k) for k in range(570)), 2**1234)
    assert mcnemar(PairedCounts(0, 569, 665, 0)) == pytest.approx(float(tail), rel=1e-12)
    assert 0 < mcnemar(PairedCounts(0, 24_000, 26_000, 0)) < 1e-18


@pytest.mark.parametrize(
    "table,published",
    [
        ((59, 6, 16, 80), (-6.21, -11.86, -0.46)),  # Fagerland, Lydersen and Laake, The Paired 2x2 Table
        ((1, 1, 7, 12), (-28.57, -50.7, -2.6)),  # Bentur et al. 2009, in Fagerland et al. 2014
    ],
)
def test_newcombes_interval_is_the_published_one(table, published):
    assert paired_difference(PairedCounts(*table)) == pytest.approx(published, abs=0.05)


def test_newcombes_interval_without_a_single_mistake():
    """If both models get 20 of 20 right, the normal interval has zero width, but Wilson's starts at 83.9 %."""
    difference, low, high = paired_difference(PairedCounts(20, 0, 0, 0))
    assert difference == 0 and low == pytest.approx(-16.1, abs=0.05) and high == pytest.approx(16.1, abs=0.05)


def test_comparison_counts_and_agreement():
    first, other, labels = np.array([0, 1, 2, 2, 1]), np.array([0, 1, 1, 0, 2]), np.array([0, 2, 2, 2, 2])
    found = compare(first, other, labels)
    assert found.counts == PairedCounts(both=1, only_first=2, only_other=1, neither=1)
    assert (found.top1, found.agreement) == ((60, 40), 40) and found.difference == pytest.approx(20)


# ImageNet-ReaL


def test_real_counts_every_label_and_leaves_out_what_has_none():
    sets = [frozenset({0, 3}), frozenset(), frozenset({2}), frozenset({1})]
    found = evaluate_real(sets, predictions=[3, 1, 1, 1], labels=[0, 1, 2, 1])
    assert (found.num_images, found.num_left_out) == (3, 1)
    assert (found.top1, found.top1_original) == (pytest.approx(200 / 3), pytest.approx(100 / 3))
    with pytest.raises(ConfigError, match="none of the 1 images has a label"):
        RealLabels(sets).of(["ILSVRC2012_val_00000002.JPEG"])


def test_reals_own_labels():
    """As in the paper, 46,837 of 50,000 images have labels; indices are mapped to the model's class order."""
    wnids = ImageNetInfo().label_names()
    labels = load_real_labels("timm", wnids)
    assert sum(map(bool, labels.sets)) == 46_837
    mirrored = load_real_labels("timm", wnids[::-1])
    assert mirrored.sets[1] == {999 - label for label in labels.sets[1]} != set()
    names = ["/x/n0/ILSVRC2012_val_00000002.JPEG", "val-0.tar:00000007-ILSVRC2012_val_00050000.jpg"]
    assert labels.of(names) == [labels.sets[1], labels.sets[49_999]]


@pytest.mark.parametrize(
    "content,said",
    [
        ("[[1], [2]]", "must be a list of 50,000 lists"),
        (json.dumps([[1]] * 49_999 + [[1000]]), "numbers from 0 to 999"),
        ("{", "cannot be read"),
    ],
)
def test_real_refuses_other_files(tmp_path, content, said):
    (tmp_path / "real.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        load_real_labels(str(tmp_path / "real.json"), WNIDS)


def test_real_refuses_other_classes_and_names():
    with pytest.raises(ConfigError, match="1 of 2 classes are none of ImageNet's 1,000, as cat"):
        load_real_labels("timm", [WNIDS[0], "cat"])
    other = "a/ILSVRC2012_val_00050001.JPEG"
    with pytest.raises(ConfigError, match=f"1 of 2 images are none of ImageNet's val, as {other}"):
        load_real_labels("timm", WNIDS).of(["ILSVRC2012_val_00000001.JPEG", other])


# The command


def test_plain_figures_do_not_depend_on_what_else_is_asked(run_dir, tmp_path, capsys):
    """One pass with all options enabled must still print exactly the values in the training log."""
    plain = run(capsys, run_dir / "checkpoints/last.pt")
    logged = [row for row in map(json.loads, (run_dir / "metrics.jsonl").open()) if row["split"] == "val"][-1]
    # With three classes, top5 would be 100 whatever the model, so it is not shown.
    further = f"f1_macro {logged['f1_macro']:.2f}\nbalanced_accuracy {logged['balanced_accuracy']:.2f}\n"
    assert plain.endswith(f"loss   {logged['loss']:.4f}\ntop1   {logged['top1']:.2f}\n{further}")
    assert logged["top5"] == 100
    assert "selected on" not in plain and "selected on these val images, so its figures are" in run(capsys, run_dir)
    assert "1 images could not be read" in plain and f"images {3 * NUM_VAL - 1}\n" in plain
    other = min(run_dir.glob("checkpoints/step-*.pt"))
    files = [tmp_path / name for name in ("a.csv", "a.json", "a.png")]
    (tmp_path / "real.json").write_text(json.dumps([[1]] * 50_000))
    for option in ("--tta=hflip", "--calibration", f"--compare={other}", f"--real={tmp_path / 'real.json'}"):
        assert plain + "\n" in run(capsys, run_dir / "checkpoints/last.pt", option), option
    everything = ("--tta", "hflip", "--bins", 3, "--compare", other, "--predictions", files[0], "--json", files[1])
    said = run(capsys, run_dir / "checkpoints/last.pt", *everything, "weights=raw", "--plot", files[2])
    assert plain + "\n" in said and [file.exists() for file in files] == [True] * 3
    assert Image.open(files[2]).format == "PNG"
    figures = json.loads(files[1].read_text())
    assert [figures[key] for key in ("loss", "top1", "top5")] == [logged[key] for key in ("loss", "top1", "top5")]
    assert "top5" not in said
    assert len(figures["calibration"]["bins"]) == 3 and next(iter(figures["unreadable"])).endswith(BAD)


def test_predictions_are_those_of_the_images_they_name(run_dir, tmp_path, capsys):
    """Check that each row belongs to its image; matching by position would fail after a skipped image."""
    printed = run(capsys, run_dir, "--predictions", tmp_path / "p.jsonl", "--json", tmp_path / "f.json")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * NUM_VAL - 1 and not any(row["image"].endswith(BAD) for row in rows)
    assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
    top1 = 100 * sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert f"top1   {top1:.2f}\n" in printed and top1 < 100  # otherwise the wrong predictions would not be tested
    trained = load_trained(run_dir)
    for row in rows[:: NUM_VAL // 2]:
        probabilities = answer(trained, row["image"])
        assert row["prediction"] == WNIDS[probabilities.argmax()]
        assert row["probability"] == pytest.approx(probabilities.max().item(), rel=1e-4)
        assert row["label_probability"] == pytest.approx(probabilities[WNIDS.index(row["label"])].item(), rel=1e-4)
    another_loader = "data.resident=false"  # in the same order
    run(capsys, run_dir, "--predictions", tmp_path / "p.csv", another_loader)
    written = list(csv.DictReader((tmp_path / "p.csv").open()))
    numbers = {"probability": float, "label_probability": float}
    assert [{name: numbers.get(name, str)(text) for name, text in row.items()} for row in written] == rows


def test_odd_names_of_files_are_those_of_sasa_predicts_table(run_dir, tmp_path, capsys):
    """They were escaped here alone, so that the two tables could not be joined."""
    for wnid, name in zip(WNIDS, (b"a\nb.png", b"\xff.png", b"=c.png"), strict=False):
        (tmp_path / "odd" / wnid).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "odd" / wnid / os.fsdecode(name))
    run(capsys, run_dir, "--predictions", tmp_path / "e.csv", f"data.root={tmp_path}/odd")
    words = [str(run_dir), f"{tmp_path}/odd", "--format=csv", f"--output={tmp_path}/p.csv"]
    assert predict.run_command(words) == 0
    tables = [(tmp_path / name).open(errors="surrogateescape", newline="") for name in ("e.csv", "p.csv")]
    evaluated, predicted = ([row[0] for row in csv.reader(file)][1:] for file in tables)
    assert evaluated == predicted and len(evaluated) == 3


def answer(trained, path: str, is_mirrored: bool = False) -> torch.Tensor:
    """Return the probabilities [num_classes] for a file, computed without the evaluation code."""
    pixels = torch.from_numpy(fit(Image.open(path), trained.input_size[1:]).copy()).permute(2, 0, 1)[None]
    images = trained.normalize(torch.device("cpu"))(pixels.flip(3) if is_mirrored else pixels)
    with torch.no_grad():
        return trained.model(images).softmax(1)[0]


def test_mirrored_views_are_those_of_the_mirrored_files(run_dir, tmp_path, capsys):
    run(capsys, run_dir, "--tta", "hflip", "--predictions", tmp_path / "p.jsonl", "--json", tmp_path / "f.json")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    trained = load_trained(run_dir)
    of_label = []
    for row in rows:
        mean = (answer(trained, row["image"]) + answer(trained, row["image"], is_mirrored=True)) / 2
        of_label.append(mean[WNIDS.index(row["label"])].item())
    assert [row["label_probability"] for row in rows] == pytest.approx(of_label, rel=1e-4)
    tta = json.loads((tmp_path / "f.json").read_text())["tta"]
    assert tta["loss"] == pytest.approx(-sum(map(math.log, of_label)) / len(rows), rel=1e-4)
    assert tta["top1"] == 100 * sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert "never mirrored" not in run(capsys, run_dir, "--tta", "hflip")
    assert "never mirrored an image" in run(capsys, run_dir, "--tta", "hflip", "augment.hflip=false")


def test_two_checkpoints_are_compared_image_by_image(run_dir, tmp_path, capsys):
    paths = [run_dir / "checkpoints/last.pt", min(run_dir.glob("checkpoints/step-*.pt"))]
    right = []
    for path in paths:
        run(capsys, path, "--predictions", tmp_path / "p.jsonl")
        rows = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
        right.append(np.array([row["label"] == row["prediction"] for row in rows]))
    printed = run(capsys, paths[0], "--compare", paths[1], "--json", tmp_path / "f.json")
    found = json.loads((tmp_path / "f.json").read_text())["compare"]
    only_first, only_other = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert (found["counts"]["only_first"], found["counts"]["only_other"]) == (only_first, only_other)
    assert only_first + only_other > 0  # otherwise the order of the two would not matter
    assert found["difference"] == pytest.approx(100 * (only_first - only_other) / len(right[0]))
    assert f"McNemar     p = {found['p']:.3g} " in printed and "another seed gives other weights" in printed


def with_classes(content: dict, names: list[str]) -> dict:
    """Return a checkpoint's content with other class names."""
    changed = copy.deepcopy(content) | {"classes": names}
    for split in changed["fingerprint"].values():
        for entry, name in zip(split["classes"], names, strict=True):
            entry["name"] = name
    return changed


def test_models_of_other_classes_or_images_are_not_compared(run_dir, tmp_path, capsys, monkeypatch):
    """Check that models with different classes or images are refused, since a p-value would be meaningless."""
    content = load_checkpoint(run_dir / "checkpoints/last.pt")
    torch.save(with_classes(content, [*WNIDS[:2], "cat"]), tmp_path / "classes.pt")
    fewer = content["config"].replace("max_val_images: null", "max_val_images: 12")
    torch.save(content | {"config": fewer}, tmp_path / "images.pt")
    assert "its 3 classes are not the 3 of" in run(capsys, run_dir, "--compare", tmp_path / "classes.pt", expect=2)
    said = run(capsys, run_dir, "--compare", tmp_path / "images.pt", expect=2)
    assert "class 'n01440764' had 17 images, now 4" in said and "are for both" in said
    monkeypatch.setattr("sasa_train.terminal.columns", lambda file: 80)  # a terminal, which broke lines within words
    said = run(capsys, run_dir, "--compare", tmp_path / "images.pt", "data.max_val_images=12")
    lines = said[said.index("compared on") :].splitlines()
    assert all(len(line) <= 80 or " " not in line.strip() for line in lines), lines
    assert "This is about these two sets of weights" in said and "\n            " in said


def test_a_new_set_needs_no_train_folder(run_dir, tmp_path, capsys):
    """A root with val/ alone was refused for want of train/; class folders alone and shards of val are enough too."""
    root = run_dir.parents[1] / "images"
    plain = run(capsys, run_dir)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/val").symlink_to(root / "val")
    assert run_command(["shard", str(root), str(tmp_path / "shards")]) == 0
    shutil.rmtree(tmp_path / "shards/train")
    for new in (tmp_path / "new", root / "val", tmp_path / "shards"):
        assert run(capsys, run_dir, f"data.root={new}").partition("\nimages")[2] == plain.partition("\nimages")[2]
    said = run(capsys, run_dir, f"data.root={tmp_path / 'new'}", "data.split=test", expect=2)
    assert f"there is no folder {tmp_path / 'new/test'}" in said
    for more in ((), ("data.holdout_fraction=0.2",), ("data.split=test",)):
        assert "data.root=gone: there is no folder gone; expected" in run(
            capsys, run_dir, "data.root=gone", *more, expect=2
        )


def test_test_is_evaluated_where_val_is_there_too(run_dir, tmp_path, capsys):
    """The folder test/ could not be chosen where val/ was there; a class without images has no scores, not 0."""
    (tmp_path / "val").symlink_to(run_dir.parents[1] / "images/val")
    (tmp_path / "test").mkdir()
    for wnid in WNIDS[1:]:
        (tmp_path / "test" / wnid).symlink_to(tmp_path / "val" / wnid)
    arguments = (f"data.root={tmp_path}", "data.split=test", "--json", tmp_path / "f.json")
    assert evaluate.run_command([str(run_dir), *map(str, arguments)]) == 0
    out, err = capsys.readouterr()
    assert "selected on" not in out  # test chose nothing
    assert f"{WNIDS[0]}       0          -       -       -\n" in out and f"images {2 * NUM_VAL}\n" in out
    assert f"no image of {WNIDS[0]} in test; averages over classes leave such a class out" in err
    assert [each["num_images"] for each in json.loads((tmp_path / "f.json").read_text())["classes"]] == [0, 17, 17]


@pytest.mark.parametrize("command", [evaluate, visualize])
def test_no_images_are_downloaded_to_a_place_that_the_checkpoint_alone_names(tiny_run, tmp_path, capsys, command):
    """A stranger's checkpoint had the command make any folder, and fetch 170 MB into it."""
    names = ["confusion_matrix", f"--out={tmp_path / 'out'}"] if command is visualize else []
    arguments = [str(tiny_run), *names, "data.name=cifar10", "data.image_size=8"]
    assert command.run_command(arguments) == 2
    assert "holds no whole cifar10; say where with data.root=..." in capsys.readouterr().err


def test_classes_that_the_run_does_not_know_are_named(run_dir, tmp_path, capsys):
    for name, wnid in zip((WNIDS[0], "N01443537", "cat"), WNIDS, strict=True):
        (tmp_path / name).symlink_to(run_dir.parents[1] / "images/val" / wnid)
    said = run(capsys, run_dir, f"data.root={tmp_path}", expect=2)
    assert "the checkpoint and its folders (there is no val/ or test/) must hold the same classes" in said
    assert "N01443537 ('N01443537' is 'n01443537' but for case, spaces or signs), cat\n" in said


def test_real_through_the_command(run_dir, tmp_path, capsys):
    """The model knows none of the first three images' labels; the others are labelled class 1 and an unknown class."""
    (tmp_path / "real.json").write_text(json.dumps([[], [], [999], *[[1, 999]] * 49_997]))
    files = ("--predictions", tmp_path / "p.csv", "--json", tmp_path / "f.json")
    printed = run(capsys, run_dir, "--real", tmp_path / "real.json", *files)
    rows = [row for row in csv.DictReader((tmp_path / "p.csv").open()) if row["image"][-13:-5] > "00000003"]
    real = json.loads((tmp_path / "f.json").read_text())["real"]
    assert (real["num_images"], real["num_left_out"]) == (len(rows), 3)
    assert real["top1"] == 100 * sum(row["prediction"] == WNIDS[1] for row in rows) / len(rows)
    assert "not comparable with published figures" in printed


def test_a_digits_run_is_refused_by_real_before_it_is_evaluated(run_dir, tmp_path, capsys):
    content = load_checkpoint(run_dir / "checkpoints/last.pt")
    torch.save(with_classes(content, ["0", "1", "2"]), tmp_path / "digits.pt")
    renamed = tmp_path / "images"
    for split in ("train", "val"):
        for i, wnid in enumerate(WNIDS):
            (renamed / split).mkdir(parents=True, exist_ok=True)
            (renamed / split / str(i)).symlink_to(run_dir.parents[1] / "images" / split / wnid)
    arguments = (tmp_path / "digits.pt", f"data.root={renamed}", "data.name=image_folder", "--real", "timm")
    assert "3 of 3 classes are none of ImageNet's 1,000, as 0" in run(capsys, *arguments, expect=2)


@pytest.mark.parametrize(
    "arguments,said",
    [
        (("--bins", "0"), "--bins 0: must be 1 or more"),
        (("--plot", "a.txt"), "--plot a.txt: the name must end in .png or .svg or .pdf"),
        (("--predictions", "no/such/p.csv"), "there is no folder no/such"),
        (("--tta", "crops"), "invalid choice: 'crops'"),
        (("trainer.devise=cpu",), "trainer.device"),
    ],
)
def test_refusals_come_before_the_work(run_dir, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("sasa_train.evaluate.val_pass.open_val", lambda _: pytest.fail("data were opened"))
    assert said in run(capsys, run_dir, *arguments, expect=2)


def test_without_matplotlib_a_plot_is_refused_and_the_rest_goes_on(run_dir, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sasa_train[plots]'" in run(capsys, run_dir, "--plot", "a.png", expect=2)
    assert "ECE" in run(capsys, run_dir, "--calibration")


def test_logits_are_kept_as_the_model_gave_them(run_dir):
    """Check that logits are float32, one row per readable image, and that each row has the label of its file."""
    val = open_val(load_trained(run_dir))
    result, answers = val.evaluate_keeping_answers()
    assert answers.logits.shape == (3 * NUM_VAL - 1, 3) and answers.logits.dtype == torch.float32
    assert 4 not in answers.indices and len(set(answers.indices)) == len(answers.logits)  # BAD is the fifth val image
    assert answers.top1 == result.top1 and answers.top5 == 100
    assert np.array_equal(answers.labels.numpy(), val.images.labels[answers.indices])
