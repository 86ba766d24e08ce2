"""Check that a sample depends only on (seed, epoch, index), not on the process, and that bad folders are refused."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from making_data import CPU, assert_same, batches, config_for, encoded, make_ten_classes
from PIL import Image
from torchvision import datasets as tv
from torchvision.transforms import v2

from sasa_train.config.compose import compose_config
from sasa_train.data import listing
from sasa_train.data.datasets import Files, ImageSet, load_image_sets, load_val_set, split
from sasa_train.data.decoding import to_rgb
from sasa_train.data.loader import build_eval_loader, build_loaders
from sasa_train.data.randomness import epoch_order, sample_draws
from sasa_train.data.resident import ResidentLoader
from sasa_train.data.streaming import StreamingLoader
from sasa_train.data.transforms import Augment
from sasa_train.refusal import ConfigError

FLIPS = ("augment.hflip=true", "augment.crop_padding=2", "data.max_train_images=100")


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_streamed_equals_resident_at_any_number_of_workers(num_workers):
    resident = batches(config_for(*FLIPS), epoch=3)
    streamed = batches(config_for(*FLIPS, "data.resident=false", f"data.num_workers={num_workers}"), epoch=3)
    assert_same(resident, streamed)


@pytest.mark.parametrize("resident", ["true", "false"])
def test_an_epoch_continues_at_any_step_without_replay(resident):
    config = config_for(*FLIPS, f"data.resident={resident}", "data.num_workers=0")
    assert_same(batches(config, epoch=1)[2:], batches(config, epoch=1, first_step=2))


def test_accumulation_only_cuts_the_batches_smaller():
    whole, cut = batches(config_for(*FLIPS)), batches(config_for(*FLIPS, "trainer.grad_accum_steps=4"))
    assert torch.equal(torch.cat([x for x, _ in whole]), torch.cat([x for x, _ in cut])) and len(cut) == 4 * len(whole)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_large_images_are_streamed_with_their_own_randomness(image_folder, num_workers):
    """Random-resized crops use torchvision, which draws from torch's global generator; its state must not change."""
    overrides = ("data=image_folder", f"data.root={image_folder}", "data.image_size=72", "trainer.global_batch_size=4")
    torch.manual_seed(5)
    first = batches(config_for(*overrides, f"data.num_workers={num_workers}"))
    after = torch.rand(1)
    torch.manual_seed(6)
    assert_same(first, batches(config_for(*overrides, "data.num_workers=0")))
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    other_epoch = batches(config_for(*overrides, "data.num_workers=0"), epoch=1)
    assert not torch.equal(first[0][0], other_epoch[0][0]) and first[0][0].shape == (4, 3, 72, 72)


def test_seed_and_epoch_change_order_and_crops():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed, epoch in itertools.product((0, 1), (0, 1))]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(50)) for order in orders)
    draws = [sample_draws(seed, epoch, np.arange(50), 3) for seed, epoch in itertools.product((0, 1), (0, 1))]
    assert len({d.tobytes() for d in draws}) == 4


def test_draws_are_uniform_and_independent_of_the_batch():
    draws = sample_draws(7, 2, np.arange(40_000), 3)
    counts = np.stack([np.histogram(column, bins=16, range=(0, 1))[0] for column in draws.T])
    chi_square = ((counts - 2500) ** 2 / 2500).sum(1)
    assert (chi_square < 40).all()  # 15 degrees of freedom: 40 is exceeded once in 2,000; seeds are fixed
    assert abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.02
    assert np.array_equal(sample_draws(7, 2, np.array([123, 5]), 3), draws[[123, 5]])


def test_small_crops_are_torchvisions():
    """Each crop is a possible result of padding and cropping, and 400 images together get all offsets and flips."""
    config = compose_config(["data=cifar10", "augment.crop_padding=1"])
    augment = Augment(config.data, config.augment, 0, (0.5,) * 3)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    padded = v2.functional.pad(image, [1])
    possible = {}
    for top, left, flip in itertools.product(range(3), range(3), (False, True)):
        crop = v2.functional.crop(padded, top, left, 32, 32)
        possible[(v2.functional.horizontal_flip(crop) if flip else crop).numpy().tobytes()] = (top, left, flip)
    out = augment.batch(augment.pad(image.expand(400, -1, -1, -1)), np.arange(400), epoch=0, indices=np.arange(400))
    seen = [possible[x.contiguous().numpy().tobytes()] for x in out]
    assert set(seen) == set(possible.values())


def test_the_normalised_training_set_has_mean_0_and_std_1():
    loaders = build_loaders(config_for("augment=none", "trainer.global_batch_size=1438"), CPU)
    images, _ = next(iter(loaders.train.train_batches(0)))
    assert images.mean().abs() < 1e-3 and (images.std() - 1).abs() < 1e-3


def test_val_is_every_image_once_in_order():
    for resident in ("true", "false"):
        loaders = build_loaders(config_for(f"data.resident={resident}", "data.num_workers=1"), CPU)
        assert isinstance(loaders.val, ResidentLoader if resident == "true" else StreamingLoader)
        labels = torch.cat([labels for _, labels in loaders.val.eval_batches()])
        assert len(labels) == 359 and torch.equal(labels, torch.cat([y for _, y in loaders.val.eval_batches()]))
        loaders.close()
    evaluated, images = build_eval_loader(config_for(), CPU, list("0123456789"))
    assert torch.equal(labels, torch.cat([y for _, y in evaluated.eval_batches()])) and len(images.classes) == 10


def test_digits_flip_only_when_asked():
    def flips(data):
        return Augment(data, config_for().augment, 0, (0.5,) * 3).hflip

    assert not flips(config_for().data) and flips(compose_config(["data=cifar10"]).data)


def imbalanced() -> ImageSet:
    labels = np.array([0] * 40 + [1] * 20 + [2] * 4)
    return ImageSet(["a", "b", "c"], labels, np.arange(64), Files([str(i) for i in range(64)]))


def test_the_holdout_is_stratified_fixed_and_disjoint():
    train, val = split(imbalanced(), 0.25)
    assert np.bincount(val.labels).tolist() == [10, 5, 1] and np.bincount(train.labels).tolist() == [30, 15, 3]
    assert not set(train.positions) & set(val.positions)
    assert list(split(imbalanced(), 0.25)[1].positions) == list(val.positions)


def test_the_holdout_names_the_classes_that_it_cannot_split():
    images = ImageSet(["a", "b", "c"], np.array([0, 0, 1, 2]), np.arange(4), Files(list("0123")))
    with pytest.raises(ConfigError, match="fewer than 2 images are of b, c; add images"):
        split(images, 0.5)


def test_subsets_are_as_balanced_as_the_set_allows_and_nested():
    small = load_image_sets(config_for("data.max_train_images=25", "data.max_val_images=10").data)
    large = load_image_sets(config_for("data.max_train_images=40").data)
    assert np.bincount(small[0].labels).tolist() == [3] * 5 + [2] * 5 and len(small[1]) == 10
    assert set(small[0].positions) < set(large[0].positions)


def test_image_folder_reads_classes_by_name(image_folder):
    for resident in ("true", "false"):
        config = config_for(
            "data=image_folder", f"data.root={image_folder}", "data.image_size=16", "trainer.global_batch_size=9",
            f"data.resident={resident}", "augment=none", "data.num_workers=0",
        )  # fmt: skip
        loaders = build_loaders(config, CPU)
        assert loaders.classes == ["blue", "red"]
        for images, labels in [*loaders.train.train_batches(0), *loaders.val.eval_batches()]:
            redder = images[:, 0].mean((1, 2)) > images[:, 2].mean((1, 2))
            assert torch.equal(redder.long(), labels)


def test_holdout_needs_no_val_folder(image_folder):
    (image_folder / "val").rename(image_folder / "elsewhere")
    config = config_for("data=image_folder", f"data.root={image_folder}", "data.holdout_fraction=0.2").data
    train, val = load_image_sets(config)
    assert (len(train), len(val)) == (15, 3)


def test_cifar_is_read_from_class_folders_where_they_are(tmp_path):
    train, val = load_image_sets(compose_config(["data=cifar10", f"data.root={make_ten_classes(tmp_path)}"]).data)
    assert len(train) == len(val) == 10 and train.classes == list("abcdefghij")


NAMES = {"a.gif": "GIF", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.dat": "PNG", "e": "BMP"}
NAMES |= {"f.avif": "AVIF", "g.jp2": "JPEG2000", "h": "AVIF"}


def test_images_are_read_under_whatever_name(image_folder, capsys):
    """GIF, JFIF and other names were left out of class folders in silence, although sasa-predict read them."""
    image = Image.new("RGB", (19, 17), (200, 10, 10))
    there = {name: kind for name, kind in NAMES.items() if kind in listing.FORMATS}
    for name, kind in there.items():
        (image_folder / "val/red" / name).write_bytes(encoded(image, kind))
    (image_folder / "val/red/z.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (image_folder / "val/notes.txt").write_text("P1 is no image")
    _, val = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    assert {val.name(i).rpartition("/")[2] for i in range(3, len(val))} == {*there, *(f"{i}.png" for i in range(5))}
    assert all(val.read(i, to_rgb).getpixel((9, 9))[0] > 140 for i in range(3, len(val)))
    other = "in formats that are not read, convert them to JPEG or PNG: 1 (red/z.heic)"
    assert f"{image_folder}/val: left out, {other}; not images: 1 (notes.txt)\n" in capsys.readouterr().err


def test_each_file_is_read_once_whatever_links_lead_to_it(image_folder, tmp_path, capsys):
    """Links in a circle made 16 images into 336, and two of them made training hang; other links are followed."""
    blue = image_folder / "train/blue"
    for name, to in (("l1", ".."), ("l2", "."), ("l3", "../red"), ("a", "z"), ("out", tmp_path / "out")):
        (blue / name).symlink_to(to)
    (image_folder / "train/loop").symlink_to("../..")
    for folder in (blue / "z", tmp_path / "out"):
        folder.mkdir()
        Image.new("RGB", (19, 17)).save(folder / "0.png")
    train, _ = load_image_sets(config_for("data=image_folder", f"data.root={image_folder}").data)
    names = [train.name(i).removeprefix(f"{blue}/") for i in range(13)]
    assert train.classes == ["blue", "red"] and np.bincount(train.labels).tolist() == [13, 7]
    assert names == [*sorted(f"{i}.png" for i in range(11)), "out/0.png", "z/0.png"]
    told = "links to folders read already: 5 (loop, blue/a, blue/l1, blue/l2, blue/l3)"
    assert f"{image_folder}/train: left out, {told}\n" in capsys.readouterr().err


def test_an_empty_class_in_val_is_allowed_and_named(image_folder, capsys):
    for path in (image_folder / "val/red").iterdir():
        path.unlink()
    config = config_for("data=image_folder", f"data.root={image_folder}").data
    train, val = load_image_sets(config)
    assert val.classes == train.classes == ["blue", "red"] and len(val) == 3
    assert "no image of red in val; averages over classes leave such a class out" in capsys.readouterr().err
    (image_folder / "val/red").rmdir()
    assert load_val_set(config, train.classes).labels.tolist() == [0, 0, 0]
    shutil.rmtree(image_folder / "val/blue")
    with pytest.raises(ConfigError, match="no class folder"):
        load_image_sets(config)


def test_data_split_selects_val_or_test(image_folder):
    """The folder test/ was never read where val/ was there."""
    shutil.copytree(image_folder / "val", image_folder / "test")
    (image_folder / "test/red/4.png").unlink()

    def count(*overrides: str) -> int:
        return len(load_image_sets(config_for("data=image_folder", f"data.root={image_folder}", *overrides).data)[1])

    assert [count(), count("data.split=val"), count("data.split=test")] == [8, 8, 7]
    shutil.rmtree(image_folder / "val")
    assert [count(), count("data.split=test")] == [7, 7]
    with pytest.raises(ConfigError, match="there is no folder .*val; expected"):
        count("data.split=val")
    with pytest.raises(ConfigError, match=r"data.holdout_fraction=0.2 takes val from train: set one"):
        count("data.split=test", "data.holdout_fraction=0.2")


class FakeCifar:
    """Stands in for torchvision's class, which would download its files."""

    def __init__(self, root, train, download):
        assert download
        self.classes, self.targets = [f"class {i}" for i in range(10)], list(range(10)) * (2 if train else 1)
        self.data = np.arange(len(self.targets) * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(-1, 32, 32, 3)


def test_cifar_from_torchvision_keeps_its_pixels(monkeypatch, tmp_path):
    monkeypatch.setattr(tv, "CIFAR10", FakeCifar)
    train, val = load_image_sets(compose_config(["data=cifar10", f"data.root={tmp_path}"]).data)
    assert len(train) == 20 and len(val) == 10
    assert np.array_equal(np.array(train.read(3, to_rgb)), FakeCifar(tmp_path, True, True).data[3])


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(tv, "CIFAR10", refuse)
    with pytest.raises(ConfigError, match=r"holds no CIFAR10, and it was not downloaded \(no network\)"):
        load_image_sets(compose_config(["data=cifar10", f"data.root={tmp_path}"]).data)


def test_folders_beside_the_splits_are_named(image_folder, capsys, in_process):
    (image_folder / "val").rename(image_folder / "validation")  # as Keras names it
    shutil.copy(image_folder / "train/red/0.png", image_folder / "loose.png")
    shutil.copytree(image_folder / "validation", image_folder / "test")
    config = compose_config(["data=image_folder", f"data.root={image_folder}"]).data
    left_out = "left out, beside train/, val/ and test/: validation, loose.png\n"
    train, _ = load_image_sets(config)
    assert capsys.readouterr().err.endswith(left_out)
    load_val_set(config, train.classes)
    assert capsys.readouterr().err.endswith(left_out)
    out = in_process("dataset_tool", "verify", str(image_folder)).stdout
    assert "not read    beside train/, val/ and test/: validation, loose.png\n" in out
    shutil.rmtree(image_folder / "test")  # which training refuses
    out = in_process("dataset_tool", "verify", str(image_folder), expect=1).stdout
    assert "no val/ or test/, but validation, which training refuses" in out


@pytest.mark.parametrize(
    "renamed,overrides,message",
    [
        (("train", "training"), [], "there is no folder .*train .did you mean .*training..; expected train/ and val/"),
        (("val", "validation"), [], "there is no folder .*test; expected train/ and val/"),
        (("train/red/*", "red-*"), [], "train: no image of the classes red"),
        (("val/red", "val/green"), [], "only in train: red; only in val: green"),
        (("val/red", "val/Red "), [], r"only in val: Red  \('Red ' is 'red' but for case, spaces or signs\)"),
        (("val/red", "val/rad"), [], r"only in val: rad \(did you mean 'red'\?\)"),
        (None, ["model.num_classes=3"], r"model.num_classes=3, but image_folder has 2 classes \(blue, red\)"),
        (None, ["trainer.global_batch_size=19"], "global_batch_size=19 exceeds the 18 training images"),
        (None, ["data=imagenet"], "imagenet has 1000 classes, but 2 are there; use data=image_folder"),
    ],
)
def test_bad_folders_are_refused_before_training(image_folder, renamed, overrides, message):
    old, new = renamed or ("nothing", "")
    for path in image_folder.glob(old):
        path.rename(image_folder / new.replace("*", path.name))
    small = ["data=image_folder", "data.image_size=16", "trainer.global_batch_size=9"]
    config = compose_config([*small, *overrides, f"data.root={image_folder}"])
    with pytest.raises(ConfigError, match=message):
        build_loaders(config, CPU)
