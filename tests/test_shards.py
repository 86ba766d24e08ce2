"""Check that tar shards yield the same data set as class folders, and that an index is discarded if files change."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import assert_same, batches, config_for, tar_of

from sasa_train.data.datasets import load_image_sets
from sasa_train.data.shards import find_shards, load_shards
from sasa_train.dataset_tool.prepare import shard
from sasa_train.refusal import ConfigError


@pytest.fixture
def shards(image_folder, tmp_path):
    shard(image_folder, tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


@pytest.mark.parametrize("size", [16, 72])
def test_shards_give_the_batches_of_their_folders(image_folder, shards, size):
    """Check that shards and folders give identical batches, both loaded into memory (size 16) and streamed (72)."""
    overrides = ("data=image_folder", f"data.image_size={size}", "trainer.global_batch_size=4", "data.num_workers=1")
    from_folders = batches(config_for(*overrides, f"data.root={image_folder}"), epoch=1)
    assert_same(from_folders, batches(config_for(*overrides, f"data.root={shards}"), epoch=1))


def write_webdataset(folder: Path, name: str, samples: list[tuple[str, bytes]]) -> None:
    """Write KEY.jpg, KEY.cls and other files in any order, as third-party tools do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar_of(samples))


def test_other_peoples_shards_are_read(image_folder, tmp_path):
    png = (image_folder / "train/red/0.png").read_bytes()
    for split, keys in (("train", "dbca"), ("validation", "ba")):
        samples = [(f"{k}.{ext}", data) for k in keys for ext, data in (("json", b"{}"), ("png", png), ("cls", b"1"))]
        samples[2] = (f"{keys[0]}.cls", b"0")
        write_webdataset(tmp_path / "wds", f"set-{split}-0000.tar", samples)
    config = config_for("data=image_folder", f"data.root={tmp_path / 'wds'}").data
    train, val = load_image_sets(config)
    assert train.classes == ["0", "1"] and train.labels.tolist() == [0, 1, 1, 1] and len(val) == 2
    assert [train.name(i).rpartition(":")[2] for i in range(4)] == ["d.png", "a.png", "b.png", "c.png"]
    assert (tmp_path / "wds/train.index.npz").exists() and (tmp_path / "wds/val.index.npz").exists()


def test_the_index_is_used_again_and_made_anew_when_a_shard_changes(image_folder, shards, monkeypatch):
    paths = find_shards(shards, "train")
    before, labels = load_shards(paths, "train")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)  # makes reading the tars an error
        again, same_labels = load_shards(paths, "train")
    assert np.array_equal(before.offset, again.offset) and np.array_equal(labels, same_labels)
    png = (image_folder / "train/red/0.png").read_bytes()
    write_webdataset(paths[0].parent, paths[0].name, [("x.png", png), ("x.cls", b"1")])
    members, labels = load_shards(paths, "train")
    assert len(labels) == 18 - 5 + 1 and members.open(int(np.flatnonzero(members.names == "x.png")[0])).read() == png


def test_shards_on_a_disk_that_cannot_be_written_are_scanned(shards, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sasa_train.data.shards.write_atomic", refuse)
    assert len(load_shards(find_shards(shards, "train"), "train")[1]) == 18
    assert "cannot be written (Read-only file system); the shards will be scanned" in capsys.readouterr().out


def test_imagenets_archives_beside_its_class_folders_are_no_shards(image_folder):
    (image_folder / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert find_shards(image_folder, "train") == []


def test_a_truncated_shard_is_named(shards):
    path = find_shards(shards, "train")[0]
    os.truncate(path, 1000)
    with pytest.raises(ConfigError, match=r"train-000000.tar: cannot be read as a shard"):
        load_shards(find_shards(shards, "train"), "train")


def test_an_image_cut_off_after_indexing_is_quarantined(shards):
    """Check that the run continues with the next image, as it does after a truncated image file."""
    config = config_for("data=image_folder", f"data.root={shards}", "data.image_size=16", "data.num_workers=0")
    config.trainer.global_batch_size = 9
    load_image_sets(config.data)  # creates the index
    path = find_shards(shards, "train")[1]
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(600)
        file.write(b"\0" * 300)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = batches(config)
    assert len(found) == 2 and torch.isfinite(found[0][0]).all()


@pytest.mark.parametrize(
    "samples,message",
    [
        ([("a.jpg", b"x")], "a.jpg has no label"),
        ([("a.jpg", b"x"), ("a.cls", b"cat")], "cannot be read as a shard .*cat"),
        ([("a.txt", b"x")], "its shards hold no image"),
        ([("a.jpg", b"x"), ("a.png", b"x"), ("a.cls", b"1")], "a.jpg and a.png are two images of one sample"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "labels go from -1"),
    ],
)
def test_bad_shards_are_refused_by_name(tmp_path, samples, message):
    write_webdataset(tmp_path / "train", "0.tar", samples)
    with pytest.raises(ConfigError, match=message):
        load_image_sets(config_for("data=image_folder", f"data.root={tmp_path}", "data.holdout_fraction=0.5").data)


def test_masks_beside_images_are_no_images(tmp_path):
    write_webdataset(tmp_path / "train", "0.tar", [("a.jpg", b"x"), ("a.seg.png", b"y"), ("a.cls", b"0")])
    members, labels = load_shards(find_shards(tmp_path, "train"), "train")
    assert members.names.tolist() == ["a.jpg"] and labels.tolist() == [0]


def test_splits_are_found_as_words(tmp_path):
    for name in ("set-trainval-0.tar", "interval-train-1.tar", "set_train_2.tar", "set-validation-3.tar", "val.tar"):
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in find_shards(tmp_path, "train")] == ["interval-train-1.tar", "set_train_2.tar"]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["val.tar"]


@pytest.mark.parametrize("content", [b"", b"PK half an index", b"\x93NUMPY"])
def test_any_damaged_index_is_made_anew(shards, content):
    paths = find_shards(shards, "train")
    before, _ = load_shards(paths, "train")
    (shards / "train/train.index.npz").write_bytes(content)
    assert np.array_equal(before.offset, load_shards(paths, "train")[0].offset)
