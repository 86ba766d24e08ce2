"""Check that data sets of Hugging Face's `datasets` train as class folders of the same files do, all of it offline."""

import importlib.util
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from marking import slow_but_for
from PIL import Image
from reading_runs import assert_equal_state, last, rows
from running_commands import TINY, kill_after

from sasa_train.config.compose import compose_config
from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import UnreadableImage, load_image_sets, load_val_set
from sasa_train.refusal import ConfigError

datasets = pytest.importorskip("datasets", reason="needs the extra hf: pip install 'sasa_train[hf]'")


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def columns(labels: list[Any], feature: Any = None, first: int = 0, **more: Any) -> Any:
    """Return a data set of one image per label, with further columns of images."""
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    table = {"label": labels, "image": images, **{name: images for name in more}}
    features = {"label": feature or datasets.ClassLabel(names=["cat", "dog"]), "image": datasets.Image(), **more}
    return datasets.Dataset.from_dict(table, features=datasets.Features(features))


def saved(folder: Path, **splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def hf(folder: str, **keys: Any) -> DataConfig:
    return DataConfig("hf", dataset=folder, **keys)


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Save digits to class folders and, from these files, to a data set in another folder; return a run's overrides."""
    data = compose_config(["data=digits", "data.max_train_images=70", "data.max_val_images=30"]).data
    for split, images in zip(("train", "val"), load_image_sets(data), strict=True):
        for i, label in enumerate(images.labels.tolist()):
            path = tmp_path / f"images/{split}/{label}/{images.positions[i]:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.read(i, lambda image, path=path: image.save(path))
    names, splits = [str(label) for label in range(10)], {}
    for split, name in (("train", "train"), ("val", "validation")):
        paths = sorted((tmp_path / "images" / split).glob("*/*.png"))
        table = {"digit": [path.parent.name for path in paths], "scan": list(map(str, paths))}
        features = {"digit": datasets.ClassLabel(names=names), "scan": datasets.Image()}
        splits[name] = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    saved(tmp_path / "saved", **splits)
    own = ("data.image_size=8", "data.resident=false", "trainer.checkpoint_every_steps=1")
    return [*TINY, "data=hf", "data.dataset=saved", *own]


@pytest.mark.parametrize("num_workers", slow_but_for([3], [0, 3]))
def test_a_killed_run_ends_as_one_on_class_folders_never_touched(digits, tmp_path, in_process, num_workers):
    """The images are inside the saved set, so that the folders that it was made from may be gone."""
    folders = ("data=image_folder", "data.root=images", "data.image_size=8", "data.resident=false")
    in_process("train", *TINY, *folders, "run_name=folders")
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    own = [*digits, "run_name=hf", f"data.num_workers={num_workers}"]
    kill_after(6, tmp_path / "out/hf", *own)
    said = in_process("train", *own).stdout
    assert "continues   at step" in said and "saved, 70 train and 30 val images" in said
    of_folders, of_hf = (last(tmp_path / "out" / name) for name in ("folders", "hf"))
    before, now = of_folders.pop("fingerprint"), of_hf.pop("fingerprint")
    assert rows(tmp_path / "out/hf") == rows(tmp_path / "out/folders")
    assert_equal_state(of_folders, of_hf)
    for one, other in zip(before["val"]["classes"], now["val"]["classes"], strict=True):
        assert one["content"] == other["content"] and one["num_images"] == other["num_images"]
    # Another command finds the relative folder from elsewhere, and another set of the same classes can be evaluated.
    (tmp_path / "other").mkdir()
    top1 = f"top1   {rows(tmp_path / 'out/hf')[-1]['top1']:.2f}\n"
    assert top1 in in_process("evaluate", "../out/hf/checkpoints/last.pt", here="other").stdout
    assert "is finished: 12 steps" in in_process("train", "resume=../out/hf", here="other").stdout
    on_hf = ("data.name=hf", "data.dataset=saved/validation")
    assert top1 in in_process("evaluate", "out/folders/checkpoints/last.pt", *on_hf).stdout
    assert "100 images, nothing wrong" in in_process("dataset_tool", "verify", "saved").stdout


def test_splits_and_columns_are_found_or_named(tmp_path):
    train, val, test = columns([0, 1, 1, 0]), columns([1, 0], first=9), columns([0], first=20)
    folder = saved(tmp_path / "all", train=train, validation=val, test=test)
    sets = load_image_sets(hf(folder))
    assert [len(images) for images in sets] == [4, 2] and sets[0].classes == ["cat", "dog"]
    assert sets[0].labels.tolist() == [0, 1, 1, 0] and sets[0].read_bytes(2) == png(2)
    assert sets[1].name(1) == f"data.dataset={folder}: val, item 1"
    assert len(load_val_set(hf(folder, split="test"), ["cat", "dog"])) == 1
    assert [len(images) for images in load_image_sets(hf(folder, holdout_fraction=0.5))] == [2, 2]
    alone = hf(folder, args={"split": "test"})
    assert len(load_val_set(alone, ["cat", "dog"])) == 1
    with pytest.raises(ConfigError, match="val is not there; set data.holdout_fraction"):
        load_image_sets(hf(folder, args={"split": "train"}))
    more = {"thumbnail": datasets.Image()}
    texts, other = (columns(labels, datasets.Value("string"), **more) for labels in (["b", "a", "b"], ["b"]))
    sets = load_image_sets(hf(saved(tmp_path / "texts", train=texts, val=other), columns=["thumbnail", "label"]))
    assert (sets[0].classes, sets[0].labels.tolist(), sets[1].labels.tolist()) == (["a", "b"], [1, 0, 1], [1])
    numbers = columns([2, 0, 2], datasets.Value("uint8"))
    sets = load_image_sets(hf(saved(tmp_path / "numbers", train=numbers, val=numbers), columns=["image", "label"]))
    assert (sets[0].classes, sets[0].labels.tolist()) == (["0", "1", "2"], [2, 0, 2])


def test_damaged_images_are_unreadable_and_files_elsewhere_are_refused(tmp_path, monkeypatch):
    """A folder of Parquet files may name images instead of containing them; one from a stranger names any file."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    paths = [tmp_path / name for name in ("set/a.png", "set/gone.png", "secret.png")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(png(3))
    table = {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1, 1, 0]}
    table["image"] += [{"bytes": b"damaged", "path": "x.png"}, None]
    table["image"] += [{"bytes": None, "path": f"{tmp_path}/set/../secret.png"}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "set/train.parquet")
    paths[1].unlink()
    images = load_val_set(hf(str(tmp_path / "set"), args={"split": "train"}), ["cat", "dog"])
    assert images.read(0, lambda image: image.size) == (9, 7)
    for index, reason in ((1, "No such file or directory"), (3, "cannot identify image"), (4, "has no image here")):
        with pytest.raises(UnreadableImage, match=rf"val, item {index}.*{reason}"):
            images.read(index, lambda image: image.size)
    for index in (2, 5):
        with pytest.raises(ConfigError, match=r"item \d: its file .*secret.png is outside the data set; save"):
            images.read(index, lambda image: image.size)


AB = {"train": [0, 1]}


@pytest.mark.parametrize(
    ("splits", "keys", "message"),
    [
        ({"test": [0, 1]}, {}, "has no split train, but test; name one, as in data.args={split:test}"),
        (AB | {"test": [0]}, {"split": "val"}, "data.split=val: .* has no split validation or val or valid, but test"),
        (AB, {}, "val is not there; set data.holdout_fraction"),
        (AB | {"test": [0, -1, None]}, {}, "label has no label for 2 of 3 images; use another split"),
        (AB, {"args": {"split": "dev"}}, "has no split dev, but train"),
        (AB, {"args": {"revision": "main"}}, "only split is for a folder that save_to_disk has written"),
        (AB, {"args": {"streaming": True}}, "streaming is not taken: a stream has no random access"),
        (AB, {"args": {"trust_remote_code": True}}, "code of a data set is never run"),
        (AB, {"args": {"token": "x"}}, "token is not taken: it would be stored with the run"),
        (AB, {"args": {"spilt": "a"}}, r"spilt \(did you mean 'split'\?\) must be one of name, revision"),
        (AB, {"columns": ["img", "label"]}, r"has no column img; it has label \(int64\), image \(Image\)"),
        (AB, {"columns": ["label", "image"]}, "the column label must be of the type Image"),
        (AB, {"columns": ["image", "extra"]}, "extra must hold whole numbers or texts as labels, but holds Image"),
        ({"train": [0.5, 1]}, {}, "of its columns, 1 of the type Image and 0 of the type ClassLabel; name both"),
        ({"train": [10**6]}, {"columns": ["image", "label"]}, "the label 1,000,000, but labels go from 0 to 999,999"),
    ],
)
def test_wrong_sets_and_arguments_are_refused(tmp_path, splits, keys, message):
    kinds = {"0.5": datasets.Value("float32"), "1000000": datasets.Value("int64")}
    more = {"extra": datasets.Image()} if "extra" in str(keys) else {}
    sets = {name: columns(labels, kinds.get(str(labels[0])), **more) for name, labels in splits.items()}
    with pytest.raises(ConfigError, match=message):
        load_image_sets(hf(saved(tmp_path / "set", **sets), **keys))


def test_sets_that_are_not_there_and_a_missing_package_are_refused_at_once(tmp_path, in_process, monkeypatch):
    for name in ("savd", "/none/set", "csv", "a/b/c", "./a"):
        said = in_process("train", *TINY, "data=hf", f"data.dataset={name}", expect=2).stderr
        assert "there is no such folder" in said and "give one, or a data set of the Hub as USER/NAME" in said
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    said = in_process("train", *TINY, "data=hf", "data.dataset=user/none", expect=2).stderr
    assert "data.dataset=user/none: cannot be loaded (ConnectionError: Couldn't reach" in said
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else find(name))
    said = in_process("train", *TINY, "data=hf", "data.dataset=set", expect=2).stderr
    assert "data=hf needs datasets, not installed here: pip install 'sasa_train[hf]'" in said
