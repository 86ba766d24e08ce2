"""Check that commands report, count and replace bad images, and that too many of them end the run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import BAD, CPU, SMALL_RUN, assert_same, batches, config_for, make_image_folder, spoil
from PIL import Image

from sasa_train.data.datasets import ImageSet, UnreadableImage, load_image_sets
from sasa_train.data.decoding import to_rgb
from sasa_train.data.loader import build_loaders, check_evaluated
from sasa_train.data.quarantine import Quarantine
from sasa_train.data.reading import read_or_replace
from sasa_train.refusal import ConfigError
from sasa_train.training.run import note_unreadable


@pytest.mark.parametrize("size", ["data.image_size=16", "data.image_size=72"], ids=["resident", "streamed"])
def test_training_and_evaluation_go_on_and_name_each_bad_image_once(command, in_process, tmp_path, size):
    root = make_image_folder(tmp_path / "images")
    for split in ("train", "val"):
        spoil(root / split / "red")
    stem = "model.stem=conv_small" if "16" in size else "model.stem=attention"
    data = ("data=image_folder", f"data.root={root}", size, stem, "data.num_workers=1")
    trained = command("train", *data, *SMALL_RUN)
    said = trained.stdout + trained.stderr
    for name in BAD:
        assert said.count(f"train/red/{name}: cannot be read as an image") == 1
        assert said.count(f"val/red/{name}: cannot be read as an image") == 1
    named = [line for line in said.splitlines() if "byte for byte" not in line]  # the two splits are alike
    assert not any(good in line for line in named for good in ("e-cmyk", "f-16-bit"))
    run = tmp_path / "out/bad"
    assert len((run / "unreadable.txt").read_text().splitlines()) == 6
    val = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["split"] == "val"]
    assert [(row["num_images"], row["unreadable"]) for row in val] == [(8 + 3, 3)] * 2
    evaluated = in_process("evaluate", str(run)).stdout
    assert "3 images could not be read and are left out" in evaluated and "images 11" in evaluated
    assert f"top1   {max(row['top1'] for row in val):.2f}" in evaluated


@pytest.mark.parametrize("size", [16, 72])
def test_too_many_stop_the_run_with_the_list(in_process, tmp_path, size):
    root = make_image_folder(tmp_path / "images")
    for i in range(7):
        for name in ("red", "blue"):
            (root / f"train/{name}/{i}.png").write_bytes(b"not an image")
    stem = "model.stem=conv_small" if size == 16 else "model.stem=attention"
    data = ("data=image_folder", f"data.root={root}", f"data.image_size={size}", stem, "data.num_workers=1")
    refused = in_process("train", *data, *SMALL_RUN, expect=2).stderr
    assert "data.max_unreadable=0.001 allows 10 of 18 images" in refused
    assert sum(line.startswith(f"{root}/train/") for line in refused.splitlines()) >= 11
    if size == 72:  # found during training; resident images are decoded earlier
        assert json.loads((tmp_path / "out/bad/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("resident", ["true", "false"])
def test_a_class_of_which_nothing_can_be_read_is_named_once(image_folder, caplog, resident):
    """Each image was named, but not that its class was lost: training replaced it by images of another one."""
    for path in [*(image_folder / "train/red").iterdir(), image_folder / "train/blue/1.png"]:
        path.write_bytes(b"not an image")
    batches(
        config_for(
            "data=image_folder", f"data.root={image_folder}", "data.image_size=16", "trainer.global_batch_size=9",
            f"data.resident={resident}", "data.num_workers=0",
        )
    )  # fmt: skip
    assert [text for text in caplog.messages if "no image of" in text] == [
        "WARNING: no image of red in train can be read; repair them (see above)"
    ]


def test_one_is_too_many_where_none_is_allowed(image_folder):
    (image_folder / "train/red/3.png").write_bytes(b"not an image")
    config = config_for(
        "data=image_folder", f"data.root={image_folder}", "data.image_size=16", "data.max_unreadable=0",
        "trainer.global_batch_size=9", "data.num_workers=0",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"(?s)1 images of train cannot be read.*allows 0.*train/red/3.png: cannot"):
        build_loaders(config, CPU)


def test_the_allowance_is_one_in_a_thousand_but_ten_at_least_and_never_all():
    assert [Quarantine("train", n, 0.001).allowed for n in (8, 100, 1_281_167)] == [7, 10, 1281]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_replacements_are_the_same_at_any_number_of_workers_resident_or_streamed(image_folder, num_workers):
    """Check that replacements do not depend on which worker finds a bad image first, so that runs are reproducible."""
    (image_folder / "train/blue/10.png").write_bytes(b"")  # in torchvision's order, 10 comes before 2
    (image_folder / "train/red/6.png").unlink()
    (image_folder / "train/red/6.png").mkdir()  # a folder named .png is not an image; torchvision lists only files
    (image_folder / "train/red/5.png").write_bytes(b"gone bad")
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=16", "trainer.global_batch_size=8")
    resident = batches(config_for(*overrides, "data.num_workers=0"))
    streamed = batches(config_for(*overrides, "data.resident=false", f"data.num_workers={num_workers}"))
    assert_same(resident, streamed)


def test_the_next_readable_image_replaces_with_its_own_label(image_folder):
    (image_folder / "train/blue/9.png").write_bytes(b"")  # the last blue image, so the next one is red
    train, _ = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    pixels, label, unreadable = read_or_replace(train, 10, lambda image: np.asarray(to_rgb(image)), num_tries=2)
    assert label == 1 and np.array_equal(pixels, train.read(11, lambda image: np.asarray(to_rgb(image))))
    assert [Path(name).name for name, _ in unreadable] == ["9.png"]
    assert read_or_replace(train, 10, lambda image: np.asarray(to_rgb(image)), num_tries=1)[0] is None


def test_an_image_that_vanished_after_the_start_is_unreadable(image_folder):
    train, _ = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    (image_folder / "train/red/0.png").unlink()
    with pytest.raises(UnreadableImage) as caught:
        train.read(11, to_rgb)
    assert caught.value.name.endswith("train/red/0.png") and "No such file" in caught.value.reason


def test_a_failure_while_converting_counts_too(image_folder):
    def fail(image):
        raise ValueError("unknown colour space")

    train, _ = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    with pytest.raises(UnreadableImage, match="unknown colour space"):
        train.read(0, fail)


def test_every_mode_becomes_rgb(tmp_path):
    """Check that 16-bit grey keeps its shades, whereas Pillow's conversion would make almost all of them white."""
    spoil(tmp_path)
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 4), (255, 0, 0, 10)).save(tmp_path / "alpha.png")
    Image.new("P", (5, 4), 3).save(tmp_path / "palette.png")
    pixels = {}
    for path in tmp_path.iterdir():
        if path.name not in BAD:
            with Image.open(path) as image:
                pixels[path.stem] = np.asarray(to_rgb(image))
            assert pixels[path.stem].dtype == np.uint8 and pixels[path.stem].shape[2] == 3
    grey = pixels["f-16-bit"][..., 0].astype(int)
    assert grey.min() == 0 and grey.max() == 255 and abs(grey.mean() - 127.5) < 1 and (np.diff(grey[0]) >= 0).all()
    assert (pixels["grey"] == 77).all() and (pixels["alpha"] == (255, 245, 245)).all()


def test_images_in_memory_cannot_be_unreadable():
    images = ImageSet(["a"], np.zeros(1, dtype=np.int64), np.arange(1), torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    assert images.read(0, to_rgb).size == (4, 4)


def test_a_val_image_that_comes_back_is_counted_again(image_folder):
    """Check that an image that a network failure hid from one evaluation is counted again in the next."""
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=16", "data.resident=false")
    config = config_for(*overrides, "data.num_workers=0", "trainer.global_batch_size=9")
    path = image_folder / "val/red/1.png"
    content = path.read_bytes()
    val = build_loaders(config, CPU).val
    for data, num_left_out in ((b"", 1), (content, 0)):
        path.write_bytes(data)
        num_images = sum(len(labels) for _, labels in val.eval_batches())
        assert (num_images, val.num_left_out) == (8 - num_left_out, num_left_out)
        check_evaluated(val, num_images, num_left_out)
    with pytest.raises(RuntimeError, match="evaluation saw 7 images instead of 8"):
        check_evaluated(val, 7, 0)


def test_a_read_that_fails_for_a_moment_is_tried_again(image_folder, monkeypatch):
    train, _ = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    failures, really_open = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")], train.source.open

    def open_at_the_third_try(position):
        if failures:
            raise failures.pop()
        return really_open(position)

    monkeypatch.setattr(train.source, "open", open_at_the_third_try)
    monkeypatch.setattr("sasa_train.data.datasets.PAUSES", (0.0, 0.0))
    assert train.read(0, to_rgb).size == (19, 17) and not failures


class Found:
    def unreadable(self):
        yield from ("b.png: truncated", "c.png: empty")


def test_a_disk_that_fails_at_the_list_of_unreadable_images_does_not_hide_why_a_run_ended(tmp_path, capsys):
    (tmp_path / "unreadable.txt").mkdir()
    assert note_unreadable(tmp_path / "unreadable.txt", Found()) == 2
    assert "unreadable images cannot be noted" in capsys.readouterr().err


def test_the_list_of_unreadable_images_outlives_a_resume(tmp_path):
    (tmp_path / "unreadable.txt").write_text("a.png: text\nb.png: truncated\n")
    assert note_unreadable(tmp_path / "unreadable.txt", Found()) == 3
    assert (tmp_path / "unreadable.txt").read_text() == "a.png: text\nb.png: truncated\nc.png: empty\n"
