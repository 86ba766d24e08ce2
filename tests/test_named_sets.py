"""Check that torchvision's data sets are chosen by name, offline: FakeData, and small files in the layout of others."""

import struct
from pathlib import Path

import numpy as np
import pytest
from marking import slow_but_for
from PIL import Image
from reading_runs import assert_same_run, rows
from running_commands import TINY, kill_after

from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import load_image_sets, load_val_set
from sasa_train.refusal import ConfigError

FAKE = (
    *TINY, "data=torchvision", "data.dataset=FakeData", "data.args={size:80,image_size:[3,9,9],num_classes:3}",
    "data.image_size=8", "data.resident=false", "trainer.checkpoint_every_steps=1",
)  # fmt: skip


@pytest.mark.parametrize("num_workers", slow_but_for([0], [0, 3]))
def test_a_killed_run_on_fake_data_ends_as_one_never_touched(tmp_path, in_process, num_workers):
    said = in_process("train", *FAKE, "run_name=whole").stdout
    assert "data.holdout_fraction=0.2: no val or test" in said
    broken = (*FAKE, "run_name=broken", f"data.num_workers={num_workers}")
    kill_after(4, tmp_path / "out/broken", *broken)
    in_process("train", *broken)
    assert_same_run(tmp_path / "out/broken", tmp_path / "out/whole")
    said = in_process("evaluate", "out/whole/checkpoints/last.pt").stdout
    assert f"top1   {rows(tmp_path / 'out/whole')[-1]['top1']:.2f}\n" in said


def named(root: Path, name: str, **keys) -> DataConfig:
    return DataConfig("torchvision", dataset=name, root=str(root), **keys)


def test_splits_and_paths_of_a_set_are_found(tmp_path, capsys):
    """RenderedSST2 has train, val and test, and opens its images by a loader, which is not needed for their labels."""
    for split, count in (("train", 4), ("valid", 2), ("test", 1)):
        for label, name in enumerate(("negative", "positive")):
            folder = tmp_path / "rendered-sst2" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (9, 7), (200 * label, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "rendered-sst2/train/positive/3.png").write_bytes(b"damaged")
    train, val = load_image_sets(named(tmp_path, "RenderedSST2", args={"download": False}))
    assert (len(train), len(val), train.classes) == (8, 4, ["negative", "positive"])
    assert train.name(7).endswith("train/positive/3.png")
    assert len(load_image_sets(named(tmp_path, "RenderedSST2", split="test", args={"download": False}))[1]) == 2
    train, val = load_image_sets(named(tmp_path, "RenderedSST2", holdout_fraction=0.25, args={"download": False}))
    assert (len(train), len(val)) == (6, 2)


def test_train_and_test_of_a_set_are_found(tmp_path):
    """MNIST has train and test, chosen by train=True or False."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 20), ("t10k", 10)):
        pixels, labels = np.arange(count * 784).astype(np.uint8), np.arange(count, dtype=np.uint8) % 10
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    train, val = load_image_sets(named(tmp_path, "MNIST"))
    assert (len(train), len(val), train.classes[3]) == (20, 10, "3 - three")
    assert load_val_set(named(tmp_path, "MNIST"), train.classes).labels.tolist() == list(range(10))
    with pytest.raises(ConfigError, match="data.split=val: MNIST has train and test alone; use data.split=test"):
        load_image_sets(named(tmp_path, "MNIST", split="val"))


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("Flower102", {}, r"data.dataset=Flower102 \(did you mean 'Flowers102'\?\): is not a data set"),
        ("wrap_dataset_for_transforms_v2", {}, "is not a data set of torchvision.datasets"),
        ("os", {}, "is not a data set of torchvision.datasets"),
        ("FakeData", {"sise": 3}, r"data.args: sise \(did you mean 'size'\?\) is not an argument of FakeData"),
        ("FakeData", {"size": 0}, "data.dataset=FakeData: train has no images"),
        ("FakeData", {"size": 5, "image_size": 3}, "data.dataset=FakeData: train, item 0: TypeError"),
        ("FakeData", {"size": 5}, "data.dataset=FakeData: val is None; set data.holdout_fraction"),
        ("SVHN", {"split": "many"}, r"data.dataset=SVHN: cannot be made \(ValueError: Unknown value 'many'"),
        ("DTD", {"download": False}, "data.root=.* holds no DTD, and it was not downloaded"),
        ("VOCDetection", {"download": False, "year": 1}, "data.dataset=VOCDetection: cannot be made"),
        ("OxfordIIITPet", {"download": False}, "data.root=.* holds no OxfordIIITPet, and it was not downloaded"),
        ("EMNIST", {"download": False, "split": "letters"}, "holds no EMNIST"),
    ],
)
def test_wrong_names_and_arguments_are_refused(tmp_path, name, args, message):
    with pytest.raises(ConfigError, match=message):
        load_image_sets(named(tmp_path, name, args=args))
