"""Check that a list of files trains as class folders of the same files do, and that wrong lists are refused."""

import csv
import os
import random
import unicodedata
from pathlib import Path

import pytest
from marking import slow_but_for
from PIL import Image
from reading_runs import assert_equal_state, last, rows
from running_commands import TINY, kill_after

from sasa_train.config.compose import compose_config
from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import load_image_sets, load_val_set
from sasa_train.data.fingerprint import fingerprint
from sasa_train.refusal import ConfigError


def write(path: Path, lines: list[tuple], header=("path", "label")) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return str(path)


@pytest.fixture
def digits(tmp_path: Path) -> list[str]:
    """Write digits to class folders; return the overrides of a run on lists of the same files, in another order."""
    data = compose_config(["data=digits", "data.max_train_images=70", "data.max_val_images=30"]).data
    for split, images in zip(("train", "val"), load_image_sets(data), strict=True):
        lines = []
        for i, label in enumerate(images.labels.tolist()):
            path = tmp_path / f"images/{split}/{label}/{images.positions[i]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.read(i, lambda image, path=path: image.save(path))
            lines.append((f"x{i}", label, path.relative_to(tmp_path / "images")))
        random.Random(0).shuffle(lines)
        write(tmp_path / f"{split}.csv", lines, ("id", "class", "file"))
    lists = ["data=list", "data.train=train.csv", "data.val=val.csv", "data.columns=[file,class]", "data.root=images"]
    return [*TINY, *lists, "data.image_size=8", "data.resident=false", "trainer.checkpoint_every_steps=1"]


def test_verify_counts_the_images_of_a_class_in_either_unicode_form(digits, tmp_path, in_process):
    """A class in another form in val's list was once said to have no image there, and its images were not looked at."""
    for split, form in (("train", "NFC"), ("val", "NFD")):
        lines = [line.split(",") for line in (tmp_path / f"{split}.csv").read_text().splitlines()[1:]]
        lines = [(path, unicodedata.normalize(form, "\u00e9" * (1 + int(label)))) for _, label, path in lines]
        write(tmp_path / f"{split}.csv", lines)
    said = in_process("dataset_tool", "verify", "train.csv", "data.val=val.csv", "data.root=images").stdout
    assert "70 train" in said and "30 val" in said and "no image in val" not in said


@pytest.mark.parametrize("num_workers", slow_but_for([3], [0, 3]))
def test_a_killed_run_on_lists_ends_as_one_on_class_folders_never_touched(digits, tmp_path, in_process, num_workers):
    own = [*digits, "run_name=list", f"data.num_workers={num_workers}"]
    in_process("train", *TINY, "data=image_folder", "data.root=images", "data.image_size=8", "run_name=folders")
    kill_after(6, tmp_path / "out/list", *own)
    said = in_process("train", *own).stdout
    assert "continues   at step" in said and "train.csv, 70 train and 30 val images" in said
    folders, lists = (last(tmp_path / "out" / name) for name in ("folders", "list"))
    of_lists, of_folders = lists.pop("fingerprint"), folders.pop("fingerprint")
    assert rows(tmp_path / "out/list") == rows(tmp_path / "out/folders")
    assert_equal_state(folders, lists)
    for one, other in zip(of_lists["val"]["classes"], of_folders["val"]["classes"], strict=True):
        assert one["content"] == other["content"] and one["num_images"] == other["num_images"]
    top1 = f"top1   {rows(tmp_path / 'out/list')[-1]['top1']:.2f}\n"
    assert top1 in in_process("evaluate", "out/list/checkpoints/last.pt").stdout
    on_list = ("data.name=list", "data.val=val.csv", "data.root=images", "data.columns=[file,class]")
    assert top1 in in_process("evaluate", "out/folders/checkpoints/last.pt", *on_list).stdout
    header, *lines = (tmp_path / "train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text("".join([header, *sorted(lines)[1:]]))
    more = ("trainer.epochs=4", "allow_config_change=[trainer.epochs]")
    said = in_process("train", *own, *more, expect=2).stderr
    assert "data.train=train.csv: the images are not those that this run began with" in said and "had 7 images" in said


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with five images in a folder, one outside of it, and what is not an image."""
    top = tmp_path_factory.mktemp("photos")
    (top / "in/sub").mkdir(parents=True)
    for number, name in enumerate(("in/a", "in/b", "in/c", "in/d", "in/sub/e", "out")):
        Image.new("RGB", (9, 9), (40 * number, 0, 0)).save(top / f"{name}.png")
    (top / "in/notes.txt").write_text("no image")
    (top / "in/._a.png").write_text("no image")
    (top / "in/link").symlink_to("sub")
    return top


def load(folder: Path, train: bytes, val: bytes = b"path,label\nd.png,x\n", **keys):
    (folder / "train.csv").write_bytes(train)
    (folder / "val.csv").write_bytes(val)
    lists = {"train": f"{folder}/train.csv", "val": f"{folder}/val.csv", "root": None}
    return load_image_sets(DataConfig("list", **lists | keys))


GOOD = b"path,label\na.png,x\nb.png,y\n"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", "is empty; its first line must name the columns path, label"),
        (b"path,label\n", "lists no image"),
        (b"path,label\n\n\n", "lists no image"),
        (b"file,label\na.png,x\n", r"line 1: has no column path, but file, label; name them in data.columns"),
        (b"a.png,x\nb.png,y\n", "line 1: has no column path or label, but a.png, x"),
        (b"path;label\na.png;x\n", "line 1: has no column path or label, but path;label; separate the values by comm"),
        (b"path\tlabel\na.png\tx\n", "line 1: has no column .* separate the values by commas"),
        (b"path, label\na.png, x\n", "line 1: has no column label"),
        (b"path,label,label\na.png,x,y\n", "line 1: has the column label more than once"),
        (GOOD + "c.png,Löwe\n".encode("latin-1"), r"line 4: is not in UTF-8 \(byte 0xf6\)"),
        (GOOD.decode().encode("utf-16"), r"line 1: is not in UTF-8 \(byte 0xff\)"),
        (GOOD.decode().encode("utf-16-be"), "line 1: has the character NUL"),
        (GOOD + b"c.png,\0\n", "line 4: has the character NUL"),
        (GOOD + b"c.png,x," + b"z" * 2**18, "line 4: is longer than 131,072 bytes"),
        (b"path,label\ra.png,x\rb.png,y\r", "line 1: is not CSV"),
        (GOOD + b'"c.png,x\n', "line 4: is not CSV"),
        (GOOD + b'"c"d.png,x\n', "line 4: is not CSV"),
        (GOOD + b"\nc.png\n", "line 5: has 1 values, but the first line names 2 columns"),
        (GOOD + b"c,d.png,x\n", "line 4: has 3 values, but the first line names 2 columns; quote"),
        (GOOD + b"c.png,\nd.png, \n", "2 of 4 lines have no label: line 4, line 5"),
        (GOOD + b"c.png, x\n", "line 4: the label ' x' must be the name of a class"),
        (GOOD + b"c.png," + b"x" * 4097, "line 4: the label 'x+.* must be the name of a class, of at most 4,096"),
        (GOOD + b",x\n", "line 4: has no path of a file, but ''"),
        (GOOD + b"sub/,x\n", "line 4: has no path of a file, but 'sub/'"),
        (GOOD + b"f.png,x\ng/h.png,y\n", r"2 of 4 files are not there: f.png \(line 4\), g/h.png \(line 5\); relative"),
        (GOOD + b"A.png,x\n", r"1 of 3 files are not there: A.png \(line 4\)"),
        (GOOD + b"a.png,x\n", r"1 image is listed more than once: a.png \(lines 2 and 4\); keep one"),
        (GOOD + b"./a.png,y\n", r"listed more than once with different labels: ./a.png \(lines 2 and 4\)"),
        (GOOD + b"sub/e.png,x\nlink/e.png,x\n", r"1 image is listed more than once: link/e.png \(lines 4 and 5\)"),
        (GOOD + b"sub/../a.png,x\n", r"more than once: sub/../a.png \(lines 2 and 4\)"),
        ("path,label\na.png,é\nb.png,e\u0301\n".encode(), "the same in different Unicode forms"),
        (b"path,label\na.png,x\nb.png,x\n", "x is the only class, but at least two are needed; mend the labels"),
        (GOOD + b"notes.txt,z\n", "no image of the classes z .left out, not images: 1 .*; mend the list"),
    ],
)  # fmt: skip
def test_wrong_lists_are_refused_by_line(photos, train, message):
    with pytest.raises(ConfigError, match=f"(?s)train.csv: .*{message}"):
        load(photos / "in", train)


def test_wrong_pairs_and_places_are_refused(photos):
    folder = photos / "in"
    wrong = {
        b"path,label\na.png,x\nd.png,y\nb.png,x\n": r"2 images are in data.train=.*train.csv as well: a.png \(lines 2 "
        r"and 2\), b.png \(lines 3 and 4\)",
        b"path,label\nc.png,X\nd.png,y\nsub/e.png,zebra\n": r"2 of 3 labels are not among the 2 classes of "
        r"data.train=.*train.csv: X \('X' is 'x' but for case, spaces or signs\) from line 2, zebra from line 4",
    }
    for val, message in wrong.items():
        with pytest.raises(ConfigError, match=f"data.val=.*val.csv: {message}"):
            load(folder, GOOD, val)
    with pytest.raises(ConfigError, match=r"data.val=.*: 2 of 3 labels are .* of the checkpoint: X from line 2"):
        load_val_set(DataConfig("list", val=f"{folder}/val.csv", root=None), ["y", "z"])
    for path in ("../out.png", "sub/../a.png", f"{photos}/out.png", f"{folder}2/a.png"):
        with pytest.raises(ConfigError, match=rf"train.csv: line 4: {path} is outside data.root={folder}"):
            load(folder, GOOD + f"{path},x\n".encode(), root=str(folder))
    with pytest.raises(ConfigError, match="train.csv: 2 of 2 files are not there: .* begin in data.root=.*/sub"):
        load(folder, GOOD, root=f"{folder}/sub")
    with pytest.raises(ConfigError, match=r"data.train=.*: cannot be read \(No such file or directory\)"):
        load_image_sets(DataConfig("list", train=f"{folder}/none.csv", root=None, holdout_fraction=0.2))
    os.mkfifo(photos / "pipe.csv")
    with pytest.raises(ConfigError, match=r"data.train=.*: cannot be read \(is not a regular file\)"):
        load_image_sets(DataConfig("list", train=f"{photos}/pipe.csv", root=None, holdout_fraction=0.2))
    with pytest.raises(ConfigError, match=r"data.val=null must name a list, or set data.holdout_fraction"):
        load_image_sets(DataConfig("list", train=f"{folder}/train.csv", root=None))


def test_what_a_folder_would_leave_out_is_named(photos, capsys):
    """A byte order mark, quotes, absolute paths, links and other columns are accepted."""
    folder = photos / "in"
    text = f'\ufeffid,label,path\r\n1,x,"{folder}/a.png"\r\n2,"y, z",../in/b.png\r\n\r\n3,x,link/e.png\r\n'
    train, val = load(folder, (text + "4,x,../out.png\n5,x,notes.txt\n6,x,._a.png\n").encode())
    assert train.classes == val.classes == ["x", "y, z"] and train.labels.tolist() == [0, 0, 0, 1]
    names = [os.path.relpath(train.name(i), folder) for i in range(4)]
    assert names == ["a.png", "../out.png", "link/e.png", "b.png"]
    said = capsys.readouterr().err
    assert "train.csv: left out, hidden: 1" in said and "not images: 1" in said and "no image of y, z in val" in said
    assert fingerprint(train)["source"] == "list"


def test_a_part_of_a_list_is_held_out_and_recorded(image_folder, tmp_path, in_process):
    files = sorted((image_folder / "train").glob("*/*.png"))
    write(tmp_path / "all.csv", [(path.relative_to(tmp_path), path.parent.name) for path in files])
    run = ("data.train=all.csv", "data.image_size=16", "trainer.epochs=1", "model.width=0.125", "model.num_heads=2")
    said = in_process("train", *run, "output_dir=out").stdout
    assert "data.holdout_fraction=0.2: no data.val, so 3 of 18 images" in said.replace("\n            ", " ")
    (run_dir,) = (tmp_path / "out").iterdir()
    assert run_dir.name.startswith("all.csv-")
    counts = [entry["num_images"] for entry in last(run_dir)["fingerprint"]["val"]["classes"]]
    assert counts == [2, 1] and "images 3\n" in in_process("evaluate", str(run_dir)).stdout
    refused = in_process("evaluate", str(run_dir), "data.val=all.csv", expect=2).stderr
    assert "data.holdout_fraction=0.2 takes val from train, but data.val=all.csv is val: set one" in refused
    said = in_process("dataset_tool", "verify", "all.csv", "data.val=none.csv", expect=2).stderr
    assert "data.val=none.csv: cannot be read" in said
    said = in_process("dataset_tool", "verify", "all.csv").stdout
    assert "all.csv: list, 2 classes" in said and "no data.val: training holds out a part" in said
