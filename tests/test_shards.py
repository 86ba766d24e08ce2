"""Check that tar shards yield the same data set as class folders, and that an index is discarded if files change."""

import gzip
import io
import os
import re
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import assert_same, batches, config_for, encoded, padded, pax_header, tar_header, tar_of
from PIL import Image

from sasa_train.config.compose import compose_config
from sasa_train.data.datasets import Files, load_image_sets
from sasa_train.data.shard_index import index_bytes
from sasa_train.data.shards import find_shards, load_shards
from sasa_train.dataset_tool import run_command
from sasa_train.dataset_tool.prepare import shard
from sasa_train.refusal import ConfigError


@pytest.fixture
def shards(image_folder, tmp_path):
    shard(image_folder, tmp_path / "shards", images_per_shard=5)
    return tmp_path / "shards"


def test_names_of_classes_are_lines_without_a_mark_and_not_endless(image_folder, shards):
    """A name of 5,000 characters stopped training in its first picture, and made checkpoints that nothing read."""
    config = compose_config(["data=image_folder", f"data.root={shards}"]).data
    (shards / "classes.txt").write_bytes("\ufeffred\u2028dark\r\nblue\r\n".encode())
    assert load_image_sets(config)[0].classes == ["red\u2028dark", "blue"]
    (shards / "classes.txt").write_text(f"red\n{'b' * 4097}\n")
    with pytest.raises(ConfigError, match="a name of 4,097 characters; 4,096 are the most"):
        load_image_sets(config)


def test_shards_that_replace_others_are_read_anew(image_folder, shards):
    """A notebook that packed another set to the same place went on reading the images of the old file."""
    config = compose_config(["data=image_folder", f"data.root={shards}"]).data
    before = load_image_sets(config)[0].read_bytes(0)
    Image.new("RGB", (9, 9), "green").save(image_folder / "train/blue/0.png")
    shutil.rmtree(shards)
    shard(image_folder, shards, images_per_shard=5)
    after = load_image_sets(config)[0].read_bytes(0)
    assert after == (image_folder / "train/blue/0.png").read_bytes() != before


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


def test_the_images_after_a_damaged_header_are_not_lost_in_silence(tmp_path):
    """Python's tarfile takes a damaged header, a missing end mark or a zeroed block for the end of the archive."""
    samples = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", b"x"), ("cls", b"0"))]
    whole = tar_of(samples)
    write_webdataset(tmp_path / "train", "0.tar", samples)
    assert len(load_shards(find_shards(tmp_path, "train"), "train")[1]) == 3
    for content, reason in (
        (gzip.compress(whole), "it is compressed, and shards are read at any place in them: decompress it"),
        (whole[:2100] + b"?" + whole[2101:], "its header at byte 2,048 is damaged: bad checksum"),
        (whole[:4096], "it ends without an end mark, so it is incomplete"),
        (whole[:2048] + bytes(512) + whole[2560:], "its end mark at byte 2,048 is followed by more data"),
    ):
        (tmp_path / "train/0.tar").write_bytes(content)
        with pytest.raises(ConfigError, match=f"0.tar: cannot be read as a shard .{reason}"):
            load_shards(find_shards(tmp_path, "train"), "train")


def test_members_of_no_sample_are_named(tmp_path, capsys):
    """An image without a label was left out in silence if its name did not say that it is one."""
    picture = encoded(Image.new("RGB", (4, 4)), "PNG")
    samples = [("0.png", picture), ("0.cls", b"0"), ("0.json", b"{}"), ("README", b"text"), ("clip.mp4", b"x")]
    write_webdataset(tmp_path / "train", "0.tar", samples)
    assert len(load_shards(find_shards(tmp_path, "train"), "train")[1]) == 1
    assert "not images: 2 (0.tar:README, 0.tar:clip.mp4)" in capsys.readouterr().err
    write_webdataset(tmp_path / "train", "0.tar", [*samples, ("IMG_0001", picture)])
    with pytest.raises(ConfigError, match="IMG_0001 has no label; a .cls file of the same name holds it"):
        load_shards(find_shards(tmp_path, "train"), "train")


LABEL = padded(tar_header("a.cls", b"0", b"00000000001") + b"0")


@pytest.mark.parametrize(
    "header,reason",
    [
        (tar_header("a.cls", b"S", b"00000000001"), "a.cls is sparse"),
        (pax_header(b"GNU.sparse.map=0,1,999999999999,1"), "it has a sparse member"),
        (pax_header(b"size=" + b"9" * 30), "a pax header has the size b'999"),
        (tar_header("a.cls", b"0", b"77777777777"), "a.cls must end within the archive, .* is 8,589,934,591 bytes"),
        (tar_header("a.cls", b"0", b"\x80" + b"\xff" * 11), "a.cls must end within the archive"),
        (tar_header("a.cls", b"0", b"\xff" * 12), "a.cls must end within the archive, but its size is -1 bytes"),
        (tar_header("x", b"L", b"77777777777"), "x must end within the archive"),
        (tar_header("x", b"x", b"00001000000") + bytes(2**18), "an extended header must have at most 65,536 bytes"),
        (tar_header("b.jpg", b"1", b"0"), "b.jpg must be stored as a file, but is a link or device"),
        (tar_header("x", b"x", b"00000000000") * 600 + bytes(512), "an extended header has no member after it"),
    ],
)
def test_members_of_absurd_sizes_are_refused_before_memory_is_allocated(tmp_path, capsys, header, reason):
    """Sparse members, sizes of 8 GB and 10^30, and thousands of nested headers: one line and exit code 2."""
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(tar_of([("a.jpg", b"x")])[:1024] + header + LABEL + bytes(1024))
    tracemalloc.start()
    code = run_command(["verify", str(tmp_path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == 2 and peak < 2**24
    assert re.search(rf"0\.tar: cannot be read as a shard \({reason}", capsys.readouterr().err)


def test_pax_and_gnu_headers_with_long_names_are_read(tmp_path):
    key = "é" * 40 + "/" + "b" * 90
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT)):
        path = tmp_path / f"train/{number}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w:", format=kind) as archive:
            for name, data in (
                ("é" * 40 + "/" + "b" * 90 + ".jpg", b"image"),
                ("é" * 40 + "/" + "b" * 90 + ".cls", b"2"),
            ):
                member = tarfile.TarInfo(name)
                member.size, member.uname = len(data), "é\udcff"
                archive.addfile(member, io.BytesIO(data))
    members, labels = load_shards(find_shards(tmp_path, "train"), "train")
    assert labels.tolist() == [2] * 3 and set(members.names.tolist()) == {f"{key}.jpg"}
    assert [members.open(i).read() for i in range(3)] == [b"image"] * 3


def replace(path: Path, kind: str) -> None:
    """Put a pipe, a folder or a link in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nowhere"}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "broken link"])
def test_only_regular_files_are_read(image_folder, shards, capsys, kind):
    """A pipe would make the command wait for ever, and /dev/zero would fill the memory."""
    paths = find_shards(shards, "train")
    for path, command in (
        (shards / "shards.json", ("shard", str(image_folder), str(shards), "--images-per-shard=5")),
        (shards / "classes.txt", ("verify", str(shards))),
        (paths[0], ("verify", str(shards))),
    ):
        replace(path, kind)
        assert run_command(list(command)) == 2
        assert re.search(f"{path}: .*(is not a regular file|Is a directory|No such file)", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "broken link"])
def test_an_index_that_is_not_a_regular_file_is_not_used(shards, capsys, kind):
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, labels = load_shards(paths, "train")
    replace(index, kind)
    members, same_labels = load_shards(paths, "train")
    assert np.array_equal(members.names, before.names) and np.array_equal(labels, same_labels)
    told = capsys.readouterr()
    if kind == "folder":
        assert f"{index}: cannot be written (Is a directory); the shards will be scanned at every start" in told.out
    else:
        assert index.is_file() and not index.is_symlink()
    reason = "Is a directory" if kind == "folder" else "is not a regular file"
    assert (f"{index} is not used ({reason})" in told.err) == (kind != "broken link")


def test_wrong_class_names_are_refused(shards, capsys):
    path = shards / "classes.txt"
    for content, reason in (
        (b"caf\xe9\nred\n", "must hold one class name per line, in UTF-8"),
        (b"a" * 2**24 + b"a", "more than 16,777,216 bytes or 1,000,000 lines"),
        (b"a\n" * 1_000_001, "more than 16,777,216 bytes or 1,000,000 lines"),
        (b"blue\n", "names 1 classes, but labels go from 0 to 1"),
        (b"blue\n\nred\n", "line 2 is empty"),
        (b"blue\nred\n\n", "line 3 is empty"),
        (b"\0\0\n\0\n", "must hold one class name per line, in UTF-8 .a name with the character NUL"),
        (b"".join(b"c%d\n" % i for i in range(999_999)), "names 999,999 classes, but train has 18 images; list"),
    ):
        path.write_bytes(content)
        assert run_command(["verify", str(shards)]) == 2
        assert re.search(f"{path}: .*{reason}", capsys.readouterr().err)


def test_two_classes_of_one_name_are_said_once_and_remain_two(shards, capsys):
    """ImageNet has two classes named crane."""
    (shards / "classes.txt").write_text("crane\ncrane\n")
    train, val = load_image_sets(config_for("data=image_folder", f"data.root={shards}").data)
    assert train.classes == val.classes == ["crane", "crane"] and set(train.labels.tolist()) == {0, 1}
    told = capsys.readouterr().err
    assert told == f"{shards}/classes.txt: more than one class is named crane; they remain different classes\n"


def test_an_image_of_gigabytes_is_unreadable(tmp_path):
    """A sparse file takes no room on the disk, but reading it would take all memory."""
    (tmp_path / "train").mkdir()
    with (tmp_path / "train/0.tar").open("wb") as file:
        file.write(tar_header("a.jpg", b"0", b"\x80" + (2**33).to_bytes(11)))
        file.seek(2**33 + 512)
        file.write(LABEL + bytes(1024))
    members, _ = load_shards(find_shards(tmp_path, "train"), "train")
    with pytest.raises(OSError, match="8,589,934,592 bytes exceed the limit of 1,073,741,824"):
        members.open(0)
    (tmp_path / "b.jpg").touch()
    os.truncate(tmp_path / "b.jpg", 2**33)
    with pytest.raises(OSError, match="8,589,934,592 bytes exceed the limit of 1,073,741,824"):
        Files([str(tmp_path / "b.jpg")]).open(0)


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
        ([("a.jpg", b"x"), ("a.cls", b"0"), ("a.cls", b"1")], "it has two files a.cls"),
        ([("a.jpg", b"x"), ("a.cls", b"1000000")], "a.cls must hold a class number .* holds '1000000'"),
        ([("a.jpg", b"x"), ("a.cls", b"0" * 21)], "a.cls must hold a class number .* has 21 bytes"),
        ([("a.jpg", b"x"), ("a.cls", b"1010")], "1 images, but labels up to 1,010; mend them, or list all classes in"),
        ([("a.jpg", b"x" * 513), ("b" * 513 + ".jpg", b"x")], "the name bbb.*must have at most 512 characters"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], "a.cls must hold a class number from 0 to 999,999, but holds '-1'"),
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


def test_what_lies_beside_shards_is_named(shards, capsys):
    """Half of a set, compressed or in a folder below, was left out without a word."""
    content = find_shards(shards, "train")[0].read_bytes()
    (shards / "train/part2").mkdir()
    for name in ("b.TAR", "c.tar.gz", "d.tgz", "e.zip", "x.png", "part2/b.tar", "notes.txt", ".hidden.tar"):
        (shards / "train" / name).write_bytes(content)
    (shards / "train-9.tar").write_bytes(content)
    named = "beside the shards: 6 (b.TAR, c.tar.gz, d.tgz, e.zip, part2 and 1 more)"
    for _ in range(2):
        load_shards(find_shards(shards, "train"), "train")
        assert f"{shards}/train: left out, {named}" in capsys.readouterr().err
    assert run_command(["verify", str(shards)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"not read {named}" in out and "not read beside train/, val/ and test/: train-9.tar" in out


def test_a_shard_that_takes_the_place_of_one_of_the_same_size_and_time_is_read_anew(shards):
    """It once trained on the old shard's labels, where all files have one time, as in reproducible images."""
    paths = find_shards(shards, "train")
    _, before = load_shards(paths, "train")
    old = paths[0].stat()
    content = paths[0].read_bytes()
    with tarfile.open(paths[0]) as tar:
        places = [member.offset_data for member in tar if member.name.endswith(".cls")]
    for place in places:
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    (new := paths[0].with_suffix(".new")).write_bytes(content)
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    new.rename(paths[0])
    assert (paths[0].stat().st_size, paths[0].stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    _, after = load_shards(paths, "train")
    assert np.bincount(before).tolist() != np.bincount(after).tolist()
    index = shards / "train/train.index.npz"
    written = index.stat().st_mtime_ns
    assert np.array_equal(load_shards(paths, "train")[1], after) and index.stat().st_mtime_ns == written


@pytest.mark.parametrize("content", [b"", b"PK half an index", b"\x93NUMPY"])
def test_any_damaged_index_is_reported_and_made_anew(shards, capsys, content):
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, _ = load_shards(paths, "train")
    index.write_bytes(content)
    assert np.array_equal(before.offset, load_shards(paths, "train")[0].offset)
    assert (
        f"WARNING: {index} is not used (File is not a zip file); the shards are scanned again"
        in capsys.readouterr().err
    )
    load_shards(paths, "train")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "column,value,reason",
    [
        ("labels", 10**11, "labels are not in order, or not from 0 to 999,999"),
        ("labels", -1, "labels are not in order, or not from 0 to 999,999"),
        ("archive", 99, "archive is not from 0 to 3"),
        ("offset", 10**6, "offset and size describe bytes that are not in the shards"),
        ("size", 2**62, "offset and size describe bytes that are not in the shards"),
        ("names", None, "names is not an array of str with one dimension, or is incomplete"),
        ("names", "x" * 600, "names has more than 512 characters in one name"),
    ],
)
def test_an_index_that_is_wrong_inside_is_not_used(shards, capsys, column, value, reason):
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, labels = load_shards(paths, "train")
    with np.load(index) as saved:
        columns = dict(saved)
    columns[column] = np.array(
        [*columns[column][:-1], value], dtype=None if column == "names" else columns[column].dtype
    )
    np.savez(index, **columns)
    members, same_labels = load_shards(paths, "train")
    assert np.array_equal(members.names, before.names) and np.array_equal(labels, same_labels)
    assert f"{index} is not used ({reason}); the shards are scanned again" in capsys.readouterr().err


def spoiled(columns: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Return the columns of an index, consistent in themselves, that do not describe the shards."""
    order = np.arange(len(columns["labels"]))
    if kind == "one label changed":
        last_of_first = np.flatnonzero(columns["labels"] == 0)[-1:]
        return columns | {"labels": np.where(order == last_of_first, 1, columns["labels"])}
    if kind == "images permuted":  # the labels belong to others
        return columns | {name: columns[name][::-1].copy() for name in ("archive", "offset", "size")}
    if kind == "all sizes 0":
        return columns | {"size": columns["size"] * 0}
    rows = {"rows missing": order[:9], "rows twice": np.repeat(order, 2), "a row missing": np.delete(order, 4)}[kind]
    return {name: column if name == "left_out" else column[rows] for name, column in columns.items()}


@pytest.mark.parametrize(
    "kind", ["one label changed", "images permuted", "all sizes 0", "rows missing", "a row missing", "rows twice"]
)
def test_an_index_that_is_consistent_but_wrong_is_made_anew(shards, capsys, kind):
    """Such an index once trained on half of the images, on some twice, or with other images' labels, without a word."""
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, labels = load_shards(paths, "train")
    with np.load(index) as saved:
        found = dict(saved)
    own = {name: found.pop(name) for name in ("identity", "digest")}
    np.savez(index, **own, **spoiled(found, kind))
    capsys.readouterr()
    for expected in ("overlap" if kind == "rows twice" else "its content does not match its digest", None):
        members, same_labels = load_shards(paths, "train")
        for name in ("archive", "offset", "size", "names"):
            assert np.array_equal(getattr(members, name), getattr(before, name))
        assert np.array_equal(labels, same_labels)
        told = capsys.readouterr().err
        assert f"{index} is not used (" in told and expected in told if expected else not told


def test_an_index_with_a_right_digest_is_still_checked_and_an_older_one_is_made_anew(shards, capsys):
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, _ = load_shards(paths, "train")
    with np.load(index) as saved:
        found = {name: column for name, column in saved.items() if name != "digest"}
    identity = found.pop("identity")
    index.write_bytes(index_bytes(identity, spoiled(found, "rows twice")))
    assert np.array_equal(load_shards(paths, "train")[0].offset, before.offset)
    assert f"{index} is not used (offset and size describe images that overlap)" in capsys.readouterr().err
    del found["left_out"]
    np.savez(index, identity=identity, **spoiled(found, "images permuted"))  # as written by versions without a digest
    assert np.array_equal(load_shards(paths, "train")[0].offset, before.offset)
    with np.load(index) as saved:
        assert "digest" in saved and not capsys.readouterr().err


def write_claim(index: Path) -> None:
    """Write an index whose arrays are headers that claim 2^40 elements."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<U9", "fortran_order": False, "shape": (2**40,)})
    with zipfile.ZipFile(index, "w") as archive:
        for name in ("identity", "labels", "archive", "offset", "size", "names", "left_out", "digest"):
            archive.writestr(f"{name}.npy", header.getvalue())


def test_an_index_cannot_take_all_memory(shards, capsys):
    """An index of 8 GB, a compressed bomb and an array that claims to be larger than the file are not read."""
    paths, index = find_shards(shards, "train"), shards / "train/train.index.npz"
    before, _ = load_shards(paths, "train")
    with np.load(index) as saved:
        columns = dict(saved)
    tracemalloc.start()
    for spoil, reason in (
        (lambda: os.truncate(index, 2**33), "its 8,589,934,592 bytes are too many for shards of"),
        (lambda: np.savez_compressed(index, **columns), "identity is compressed or has a wrong size"),
        (lambda: write_claim(index), "identity is not an array of str with one dimension, or is incomplete"),
    ):
        spoil()
        assert np.array_equal(load_shards(paths, "train")[0].offset, before.offset)
        assert f"{index} is not used ({reason}" in capsys.readouterr().err
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
