"""Check that a change in the data set between two starts of a run is detected and described."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import CPU, config_for

from sasa_train.data import fingerprint as module
from sasa_train.data.datasets import ImageSet, load_class_folders, load_shard_set
from sasa_train.data.fingerprint import differences, fingerprint
from sasa_train.data.loader import build_loaders
from sasa_train.dataset_tool.prepare import shard


def of(root: Path) -> dict:
    return fingerprint(load_class_folders(root, "train"))


def replace(red: Path) -> None:
    shutil.copy(red / "0.png", red / "3.png")


def swap(red: Path) -> None:
    for old, new in (("1", "aside"), ("2", "1"), ("aside", "2")):
        (red / f"{old}.png").rename(red / f"{new}.png")


@pytest.mark.parametrize(
    "change,expected",
    [
        (lambda red: shutil.copy(red / "0.png", red / "7.png"), ["train: class 'red' had 7 images, now 8"]),
        (replace, ["train: the content of class 'red' changed"]),
        (swap, ["train: the content of class 'red' changed"]),
        (lambda red: (red / "5.png").write_bytes(b""), ["train: the content of class 'red' changed"]),
        (lambda red: (red / "6.png").rename(red / "7.png"), ["train: names changed in class 'red'"]),
        (
            lambda red: red.rename(red.with_name("\x1b[31mgreen")),
            ["train: class 'red' is gone", "train: class '\\x1b[31mgreen' is new"],
        ),
    ],
)
def test_a_change_is_named_and_nothing_else(image_folder, change, expected):
    """Check that each change is described; silently continuing would mix results from old and new data."""
    before = of(image_folder)
    assert differences(before, of(image_folder), "train") == []
    change(image_folder / "train/red")
    assert differences(before, of(image_folder), "train") == expected


def test_it_is_stored_in_a_checkpoint_and_moving_the_folder_changes_nothing(image_folder, tmp_path):
    before, buffer = of(image_folder), io.BytesIO()
    torch.save(before, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == before == json.loads(json.dumps(before))
    image_folder.rename(tmp_path / "elsewhere")
    assert of(tmp_path / "elsewhere") == before


def test_files_that_cannot_be_read_are_counted_not_raised(image_folder):
    images = load_class_folders(image_folder, "train")
    before = fingerprint(images)
    (image_folder / "train/red/4.png").unlink()
    expected = "of 7 images of class 'red', 0 could not be read, now 1 cannot"
    assert differences(before, fingerprint(images), "val") == [f"val: {expected}"]


def test_shards_are_the_data_set_of_their_folders(image_folder, tmp_path):
    """Check that a run may continue on shards made from its folders, and that shards of other images are detected."""
    before = of(image_folder)
    shard(image_folder, tmp_path / "shards", images_per_shard=5)
    packed = fingerprint(load_shard_set(tmp_path / "shards", "train"))
    assert packed["source"] == "shards" and differences(before, packed, "train") == []
    (image_folder / "train/blue/7.png").unlink()
    replace(image_folder / "train/red")
    shard(image_folder, tmp_path / "others", images_per_shard=5)
    others = fingerprint(load_shard_set(tmp_path / "others", "train"))
    expected = ["train: class 'blue' had 11 images, now 10", "train: the content of class 'red' changed"]
    assert differences(before, others, "train") == differences(packed, others, "train") == expected


def in_memory(labels: list[int], pixels: list[int]) -> ImageSet:
    source = torch.tensor(pixels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 5, 7)
    return ImageSet(["a", "b"], np.array(labels), np.arange(len(labels)), source)


def test_images_in_memory_are_compared_by_every_pixel_and_their_order():
    before = fingerprint(in_memory([0, 1, 0, 1], [10, 11, 12, 13]))
    one_pixel = in_memory([0, 1, 0, 1], [10, 11, 12, 13])
    one_pixel.source = one_pixel.source.clone()
    one_pixel.source[3, 2, 4, 6] += 1
    assert differences(before, fingerprint(one_pixel), "val") == ["val: the content of class 'b' changed"]
    order = fingerprint(in_memory([1, 0, 0, 1], [11, 10, 12, 13]))  # the order within each class is unchanged
    assert differences(before, order, "val") == ["val: the order of the images changed"]
    labels = fingerprint(in_memory([0, 0, 1, 1], [10, 11, 12, 13]))
    assert [line.rpartition(" ")[2] for line in differences(before, labels, "val")] == ["changed"] * 2


def test_pixels_are_not_files(image_folder):
    assert differences(fingerprint(in_memory([0], [1])), of(image_folder), "train") == [
        "train: the images were in memory, now they are in class folders"
    ]


class Recorder:
    """Replaces `ImageSet.read_bytes` for files that do not exist, and records which ones are read."""

    def __init__(self, monkeypatch):
        self.read: list[int] = []
        monkeypatch.setattr(ImageSet, "read_bytes", lambda images, index: self._bytes(images, index))

    def _bytes(self, images, index):
        self.read.append(index)
        return images.name(index).encode()


def named_set(counts: list[int]) -> ImageSet:
    names = [f"{label}/{i}" for label, count in enumerate(counts) for i in range(count)]
    labels = np.repeat(np.arange(len(counts)), counts)
    return ImageSet([str(i) for i in range(len(counts))], labels, np.arange(len(names)), module.Files(names))


def test_of_a_large_set_a_sample_is_read_that_other_classes_do_not_move(monkeypatch):
    """Only a sample is read (2,000 files of ImageNet); if one class grows, the others must not appear changed."""
    recorder = Recorder(monkeypatch)
    before = fingerprint(named_set([1009, 601, 997, 11]))
    assert len(recorder.read) == 500 + 500 + 500 + 11
    of_third = np.array(sorted(i for i in recorder.read if 1610 <= i < 2607)) - 1610
    assert of_third[0] < 2 and of_third[-1] > 994 and set(np.diff(of_third)) == {1, 2}
    after = fingerprint(named_set([1013, 601, 997, 11]))
    assert differences(before, after, "train") == ["train: class '0' had 1,009 images, now 1,013"]
    monkeypatch.setattr(module, "MAX_READ", 3)
    recorder.read.clear()
    fingerprint(named_set([5, 5, 5, 5, 5, 5, 5]))
    assert len(recorder.read) == 3


def test_ten_differences_are_listed_and_the_rest_counted(monkeypatch):
    Recorder(monkeypatch)
    lines = differences(fingerprint(named_set([2] * 13)), fingerprint(named_set([3] * 13)), "train")
    assert len(lines) == 11 and lines[10] == "train: and 3 more"


def test_two_classes_of_one_name_are_two():
    images = in_memory([0, 1], [3, 5])
    images.classes = ["crane", "crane"]
    before = fingerprint(images)
    images.source = images.source + torch.tensor([0, 1], dtype=torch.uint8)[:, None, None, None]
    assert differences(before, fingerprint(images), "train") == ["train: the content of class 'crane' (2) changed"]


def test_classes_in_another_order_are_another_set():
    images = in_memory([0, 0], [3, 5])
    before = fingerprint(images)
    images.classes, images.labels = ["b", "a"], np.array([1, 1])
    assert differences(before, fingerprint(images), "train") == ["train: the order of the classes changed"]


def test_the_loaders_carry_those_of_both_splits(image_folder):
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=16", "trainer.global_batch_size=9")
    found = build_loaders(config_for(*overrides, "data.num_workers=0"), CPU).fingerprint
    assert found["train"] == of(image_folder)
    assert [entry["num_images"] for entry in found["val"]["classes"]] == [3, 5]


def test_names_that_are_no_text_are_digested(image_folder):
    os.rename(image_folder / "train/red/6.png", os.fsencode(image_folder / "train/red") + b"/\xff.png")
    assert differences(of(image_folder), of(image_folder), "train") == []
