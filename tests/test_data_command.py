"""Check that sasa-data reports every planted defect, completes interrupted data sets, and never mixes two sets."""

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from making_data import encoded, make_image_folder, padded, pax_header, rows_of_png, tar_header, tar_of
from PIL import Image

from sasa_train import dataset_tool
from sasa_train.config.compose import compose_config
from sasa_train.data.class_names import look_alikes
from sasa_train.data.datasets import load_image_sets, load_val_set
from sasa_train.data.decoding import to_rgb
from sasa_train.data.doubtful import describe_dark
from sasa_train.data.shards import find_shards
from sasa_train.dataset_tool import imagenet, prepare, run_command, writing
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable

ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
ARCHIVES["devkit"] = "ILSVRC2012_devkit_t12.tar.gz"
WNIDS = {"n00000002": 5, "n00000003": 3, "n00000011": 2}  # class -> number of train images
VAL_WNIDS = ["n00000011", "n00000002", "n00000003", "n00000002"]


def verify(capsys: pytest.CaptureFixture, *arguments: object, expect: int = 0) -> str:
    assert run_command(["verify", *map(str, arguments), "--workers=2"]) == expect
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    assert run_command([str(a) for a in arguments]) == 2
    return capsys.readouterr().err


def last_line(text: str) -> str:
    return text.rstrip().splitlines()[-1]


def assert_same_sets(root: Path, other: Path) -> None:
    """Check that the data sets have the same classes, labels and decoded pixels, image by image."""
    for expected, images in zip(*(load(r) for r in (root, other)), strict=True):
        assert images.classes == expected.classes
        assert np.array_equal(images.labels, expected.labels)
        for i in range(len(expected)):
            assert images.read(i, to_rgb).tobytes() == expected.read(i, to_rgb).tobytes()


def load(root: Path):
    return load_image_sets(compose_config(["data=image_folder", f"data.root={root}"]).data)


# verify


def test_arguments_are_checked(capsys):
    assert run_command([]) == 2 and run_command(["--help"]) == 0
    assert "at least 1" in refused(capsys, "verify", "x", "--workers=0")
    assert "unrecognized" in refused(capsys, "verify", "x", "--all")
    assert "needs --shards" in refused(capsys, "prepare", "imagenet", "a", "b", "--images-per-shard=7")


def test_a_clean_set_is_counted_and_passes(image_folder, capsys):
    out = verify(capsys, image_folder)
    assert [line.split() for line in out.splitlines()[2:5]] == [
        ["class", "train", "val"],
        ["blue", "11", "3"],
        ["red", "7", "5"],
    ]
    assert "19 x 17 pixels" in out and "26 RGB" in out
    assert last_line(out) == "26 images, nothing wrong"


def test_sizes_and_modes_are_listed(image_folder, capsys):
    Image.new("L", (5, 3)).save(image_folder / "train" / "red" / "grey.png")
    Image.new("CMYK", (101, 67)).save(image_folder / "train" / "red" / "ink.jpg")
    Image.fromarray(np.full((7, 7), 40000, np.uint16)).save(image_folder / "val" / "red" / "deep.png")
    out = verify(capsys, image_folder)
    assert "5 x 3 smallest, 19 x 17 median, 101 x 67 largest, 4 distinct" in out
    assert "26 RGB, 1 L, 1 CMYK, 1 I;16" in out.replace("1 I;16, 1 L, 1 CMYK", "1 L, 1 CMYK, 1 I;16")


def test_broken_files_are_named(image_folder, capsys):
    """Check that each broken file is reported with the reason, since training might otherwise fail hours later."""
    folder = image_folder / "train" / "red"
    pixels = np.random.default_rng(0).integers(0, 256, (67, 67, 3), dtype=np.uint8)
    (folder / "cut.jpg").write_bytes(encoded(Image.fromarray(pixels), "JPEG")[:1500])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("404 not found")
    (folder / "notes.txt").write_text("not an image, and not called one")
    out = verify(capsys, image_folder, expect=1)
    for name, reason in (("cut.jpg", "truncated"), ("empty.png", "cannot identify"), ("text.jpg", "cannot identify")):
        assert any(f"train/red/{name}: " in line and reason in line for line in out.splitlines())
    assert "not read    not images: 1 (train/red/notes.txt)" in out
    assert last_line(out) == "3 problems: 3 unreadable files"


def test_duplicates_are_found_by_their_pixels(image_folder, capsys):
    """Check that a val image that is also in train is found in any format, because it would inflate top1."""
    train, val = image_folder / "train", image_folder / "val"
    shutil.copy(train / "blue" / "2.png", val / "blue" / "copy.png")
    Image.open(train / "red" / "3.png").save(val / "blue" / "other_format.bmp")
    shutil.copy(train / "blue" / "5.png", train / "red" / "wrong_label.png")
    out = verify(capsys, image_folder, expect=1)
    assert "2 groups across train and val" in out
    assert "train/blue/2.png = val/blue/copy.png" in out
    assert "train/red/3.png = val/blue/other_format.bmp" in out
    assert "1 group within train, 1 with different labels" in out
    assert "train/blue/5.png = train/red/wrong_label.png" in out
    assert "warning     2 groups of equal images with different labels: keep the right one" in out
    assert last_line(out) == "2 problems: 2 duplicates across splits"


def test_classes_and_files_that_may_not_be_meant_are_named(image_folder, capsys, in_process):
    """Labels typed by hand made `blue` and `Blue ` two classes, and copies that editors keep were trained on."""
    shutil.copytree(image_folder / "train/blue", image_folder / "train/Blue\u200b ")
    shutil.copytree(image_folder / "val/blue", image_folder / "val/Blue\u200b ")
    shutil.copy(image_folder / "train/red/1.png", image_folder / "train/red/1.png_original")
    for kind in (1, 4):  # as GDAL writes the pyramid and the mask of a.tif beside it
        Image.new("L", (9, 7)).save(image_folder / f"train/red/a.tif.{kind}", "TIFF", tiffinfo={254: kind})
    Image.fromarray(np.full((7, 9), 300, np.uint16)).save(image_folder / "train/red/dark.png")
    said = verify(capsys, image_folder, expect=0)
    dark = "1 16-bit file stays below 0.8% of their range: rescale them, or state their largest value"
    assert f"warning     {dark}" in said
    alike = r"'Blue\u200b ' and 'blue' are classes of their own, though their names differ only in case, "
    alike += "spaces or a copy's number or mark"
    original = "read as images for their content, whatever their names: 1 ({}red/1.png_original)"
    assert f"warning     {alike}" in said and f"warning     {original.format('train/')}" in said
    assert "not images: 2 (train/red/a.tif.1, train/red/a.tif.4)" in said
    run = ["experiment=debug", "data=image_folder", "data.root=images", "data.image_size=16", "trainer.max_steps=1"]
    run += ["trainer.global_batch_size=8"]
    done = in_process("train", *run)
    said = " ".join((done.stdout + done.stderr).split())
    assert f"WARNING: {alike}" in said and f"WARNING: {dark}" in said and f"WARNING: {original.format('')}" in said


def test_icons_that_vanish_in_their_background_are_named(image_folder, in_process):
    """White icons on transparency became white images, and only the accuracy told."""
    shape = np.zeros((17, 19, 4), np.uint8)
    shape[4:9, 3:11] = 255
    for image in image_folder.rglob("*.png"):
        Image.fromarray(np.roll(shape, int(image.stem), 0)).save(image)
    run = ["experiment=debug", "data=image_folder", "data.root=images", "data.image_size=16", "trainer.max_steps=1"]
    run += ["trainer.global_batch_size=8"]
    told = "images with transparent pixels are of one colour with data.background=white: set another colour, or none"
    assert told in " ".join(in_process("train", *run).stdout.split())
    assert "of one colour" not in in_process("train", *run, "data.background=black", "run_name=black").stdout


def test_further_frames_are_counted(image_folder, capsys):
    """Only the first page of a scan is read; a phone's photo with a preview (MPO) has no page that is left out."""
    folder, pages = image_folder / "train/red", [Image.new("RGB", (19, 17), colour) for colour in ("red", "lime")]
    pages[0].save(folder / "alone.tiff")
    assert "\nframes" not in verify(capsys, image_folder, expect=0)
    for kind in ("tiff", "gif", "webp", "png", "mpo"):
        pages[0].save(folder / f"several.{kind}", save_all=True, append_images=pages[1:])
    pages[0].save(folder / "stack.tiff", tiffinfo={270: "ImageJ=1.54f\nimages=3\nslices=3\n"})
    pages[0].save(folder / "no_stack.tiff", tiffinfo={270: "ImageJ=1.54f\nimages=1\n"})
    out = verify(capsys, image_folder, expect=0)
    assert "frames      5 images with further frames or pages, which are not read" in out


def test_a_group_across_splits_is_also_one_within_a_split(image_folder, capsys):
    """Two copies in train, with different labels, were "none within train", because a third is in val."""
    for copy in ("train/blue/copy.png", "train/red/copy.png", "val/blue/copy.png"):
        shutil.copy(image_folder / "train/blue/2.png", image_folder / copy)
    out = verify(capsys, image_folder, expect=1)
    assert "1 group across train and val" in out and "1 group within train, 1 with different labels" in out


def test_many_duplicates_are_cut_short(tmp_path, capsys):
    """If every val image is also in train, check that 20 groups of duplicates are listed and the rest only counted."""
    for i in range(23):
        for split in ("train", "val"):
            (tmp_path / split / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 5), (i, 7, 7)).save(tmp_path / split / "a" / f"{i}.png")
    out = verify(capsys, tmp_path, expect=1)
    assert out.count(" = ") == 20 and "and 3 more" in out


def test_mean_and_std_weigh_every_image_the_same(tmp_path, capsys):
    """Check that every image has the same weight; a mean over all pixels would favour large images."""
    rng = np.random.default_rng(1)
    images = [
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) // (1, 2, 3) for h, w in ((3, 5), (31, 29), (7, 11), (2, 3))
    ]
    for i, pixels in enumerate(images):
        (tmp_path / "train" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "train" / f"class{i % 2}" / f"{i}.png")
    out = verify(capsys, tmp_path)
    mean = np.mean([(image / 255).mean((0, 1)) for image in images], axis=0)
    std = np.sqrt(np.mean([((image / 255) ** 2).mean((0, 1)) for image in images], axis=0) - mean**2)
    overrides = next(line for line in out.splitlines() if line.startswith("mean, std")).split()[2:]
    data = compose_config(overrides).data  # as a user would paste them
    assert data.mean == pytest.approx(mean, abs=6e-5) and data.std == pytest.approx(std, abs=6e-5)


def test_classes_without_images_are_problems(image_folder, capsys):
    """Check that all empty or missing classes are listed; torchvision would stop at the first one."""
    shutil.rmtree(image_folder / "val" / "red")
    (image_folder / "train" / "green").mkdir()
    out = verify(capsys, image_folder, expect=1)
    for fault in ("green: no image in train", "green: no folder in val", "red: no folder in val"):
        assert fault in out
    assert last_line(out) == "3 problems: 3 empty or missing classes"
    (image_folder / "val" / "Green ").mkdir()
    assert "('green' is 'Green ' but for case, spaces or signs): no folder in val" in verify(
        capsys, image_folder, expect=1
    )


def test_what_is_no_data_is_named_and_harmless(image_folder, tmp_path, capsys):
    """Jupyter's .ipynb_checkpoints became a class, and verify, which ended with "nothing wrong", did not mention it."""
    for split in ("train", "val"):
        hide(image_folder / split, image_folder / "train/red/0.png")
    out = verify(capsys, image_folder)
    assert "2 classes" in out and last_line(out) == "26 images, nothing wrong"
    for split in ("train", "val"):
        hidden = [
            f"{split}/{name}" for name in (".ipynb_checkpoints", "@Recycle", "__MACOSX", "found.000", "red/@eaDir")
        ]
        assert f"hidden: 6 ({', '.join(hidden)} and 1 more)" in out
        assert f"not images: 1 ({split}/red/Thumbs.db); links to folders read already: 1 ({split}/blue/loop)" in out
    assert run_command(["shard", str(image_folder), str(tmp_path / "shards")]) == 0
    assert (
        "left out, hidden: 6 (.ipynb_checkpoints, @Recycle, __MACOSX, found.000, red/@eaDir and 1 more)"
        in capsys.readouterr().out
    )
    assert_same_sets(image_folder, tmp_path / "shards")


def test_a_class_may_be_named_recycled_but_images_and_masks_are_doubted(image_folder, capsys):
    """Images beside their masks, as segmentation sets have them, trained as two classes without a word."""
    for split in ("train", "val"):
        (image_folder / split / "red").rename(image_folder / split / "Recycled")
    assert last_line(verify(capsys, image_folder)) == "26 images, nothing wrong"
    for split in ("train", "val"):
        (image_folder / split / "Recycled").rename(image_folder / split / "masks")
        (image_folder / split / "blue").rename(image_folder / split / "images")
    out = verify(capsys, image_folder)
    assert "images, masks are read as classes, but named as the parts of one data set" in out
    assert last_line(out) == "26 images, no problems, 2 warnings"


def test_an_empty_val_is_not_doubted_for_its_names(image_folder, capsys):
    shutil.rmtree(image_folder / "val")
    (image_folder / "val").mkdir()
    assert "warning" not in verify(capsys, image_folder, expect=1)


def test_images_are_decoded_in_the_mode_of_training(tmp_path, capsys):
    """In grey16, a 16-bit colour PNG is unreadable to training, and verify called it fine, with the mean of RGB."""
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for name, step in (("a", 0), ("b", 7)):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(ramp + np.uint16(step)).save(tmp_path / "train" / name / "0.png")
        Image.fromarray(ramp // 2 + np.uint16(step)).save(tmp_path / "train" / name / "1.png")
    mean = np.mean([ramp.mean(), ramp.mean() + 7, (ramp // 2).mean(), (ramp // 2).mean() + 7]) / 65535
    run_command(["verify", str(tmp_path), "data.mode=grey16"])
    out = capsys.readouterr().out
    assert f"data.mean=[{mean:.4f}] data.std=[0." in out and last_line(out).endswith("nothing wrong")
    (tmp_path / "train/a/2.png").write_bytes(rows_of_png(bytes(8 * 49), 16, 2))
    assert run_command(["verify", str(tmp_path), "data.mode=grey16"]) == 1
    assert "2.png: 16 bits per channel in colour or with transparency" in capsys.readouterr().out
    assert run_command(["verify", str(tmp_path)]) == 0


def hide(split: Path, image: Path) -> None:
    """Add what systems leave behind: folders with copies and thumbnails, hidden files, and a link in a circle."""
    for folder in (".ipynb_checkpoints", "@Recycle", "__MACOSX", "found.000", "red/@eaDir"):
        (split / folder).mkdir()
        shutil.copy(image, split / folder / "0-checkpoint.png")
    (split / "red/._0.png").write_bytes(b"\0\5\x16\7")
    (split / "red/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (split / "blue/loop").symlink_to("../../..")


def test_folders_within_class_folders_are_named(image_folder, tmp_path, capsys):
    """Cats and dogs in a folder of animals became one class, and nothing said so."""
    for split in ("train", "val"):
        (image_folder / split / "red/dark").mkdir()
        shutil.move(image_folder / split / "red/0.png", image_folder / split / "red/dark/0.png")
    out = verify(capsys, image_folder)
    told = "it is not a class of its own, and its images count as the class folder's around it"
    assert f"train/red/dark: {told}" in out
    assert last_line(out) == "26 images, no problems, 2 warnings"
    load(image_folder)
    assert f"{image_folder}/val: red/dark: {told}" in capsys.readouterr().err
    (image_folder / "train/red/light").mkdir()
    shutil.move(image_folder / "train/red/1.png", image_folder / "train/red/light/1.png")
    assert "if the 2 in train/red are the classes, give that folder" in verify(capsys, image_folder)


def test_a_link_yields_to_a_folder_of_another_class(image_folder, capsys):
    """The link took the images into its own class, and the folder was called a link."""
    (image_folder / "train/red/dark").mkdir()
    shutil.move(image_folder / "train/red/0.png", image_folder / "train/red/dark/0.png")
    (image_folder / "train/blue/more").symlink_to("../red/dark")
    assert "links to folders read already: 1 (train/blue/more)" in verify(capsys, image_folder)
    train, _ = load(image_folder)
    assert np.bincount(train.labels).tolist() == [11, 7] and train.name(11 + 6).endswith("train/red/dark/0.png")


@pytest.mark.parametrize("order", [["ROOT", "--workers=1", "KEY"], ["--workers=1", "ROOT", "KEY"], ["KEY", "ROOT"]])
def test_keys_may_stand_anywhere(image_folder, capsys, order):
    words = [{"ROOT": str(image_folder), "KEY": "data.exif=ignore"}.get(word, word) for word in order]
    assert run_command(["verify", *words]) == 0
    assert "nothing wrong" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation")])
def test_splits_under_other_names_are_not_taken_as_classes(image_folder, capsys, names):
    """A model learned to tell training images from validation images, and verify found nothing wrong."""
    for split, name in zip(("train", "val"), names, strict=True):
        (image_folder / split).rename(image_folder / name)
    both = ", ".join(sorted(names))
    expected = f"{both} would be a class, but holds folders of images (blue, red) as splits do; name splits train/ and"
    assert expected in refused(capsys, "verify", image_folder)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load_image_sets(
            compose_config(["data=image_folder", f"data.root={image_folder}", "data.holdout_fraction=0.2"]).data
        )


def test_members_of_shards_with_a_second_dot_are_named_at_each_start(image_folder, tmp_path, capsys):
    """A key ends at the first dot, so img.v2.png belongs to img; it was left out in silence."""
    png = (image_folder / "train/red/0.png").read_bytes()
    members = [(f"{n}.{end}", data) for n in range(4) for end, data in (("png", png), ("cls", b"%d" % (n % 2)))]
    members += [("0.seg.png", png), ("img.v2.png", png), ("img.v2.cls", b"1")]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "0.tar").write_bytes(tar_of(members))
    told = "names with a second dot, of no sample because keys end at the first: {} (0.tar:img.v2.png, 0.tar:img.v2.cls"
    assert told.format(4) in verify(capsys, tmp_path, expect=1)
    for _ in range(2):  # with an index
        load(tmp_path)
        assert capsys.readouterr().err.count(told.format(2)) == 2
    (tmp_path / "train/0.tar").write_bytes(tar_of(members[-2:]))
    with pytest.raises(ConfigError, match=r"a key ends at the first dot, unlike in 0.tar:img.v2.png"):
        load(tmp_path)


def test_hidden_members_of_shards_are_named(image_folder, tmp_path, capsys):
    """Tars made on macOS hold a hidden file for each image, which made verify and training refuse them."""
    png = (image_folder / "train/red/0.png").read_bytes()
    members = [("./a.png", png), ("./a.cls", b"0"), ("./._a.png", b"x"), ("./.git/a.png", png), ("./b.cls", b"0")]
    members += [("./d.heic", b"\0\0\0\x18ftypheic"), ("./d.cls", b"1"), ("./e.svg", b"<svg/>"), ("./a.json", b"{}")]
    for label, shade in (("0", 7), ("1", 77), ("1", 177)):
        members += [(f"c{shade}", encoded(Image.new("L", (5, 3), shade), "GIF")), (f"c{shade}.cls", label.encode())]
    (tmp_path / "train").mkdir()
    (tmp_path / "train/0.tar").write_bytes(tar_of(members))
    (tmp_path / "train/._0.tar").write_bytes(b"x")
    for _ in range(2):  # without and with an index
        out = verify(capsys, tmp_path)
        assert "hidden: 2 (0.tar:./._a.png, 0.tar:./.git/a.png); in formats that are not read, convert them to" in out
        assert "JPEG or PNG: 2 (0.tar:./d.heic, 0.tar:./e.svg); not images: 1 (0.tar:./b.cls)" in out
        assert last_line(out) == "4 images, nothing wrong"


def test_names_in_two_unicode_forms(image_folder, capsys):
    """macOS may write an é as two characters; such a class was "only in train: café; only in val: café"."""
    (image_folder / "train/red").rename(image_folder / "train/cafe\u0301")
    (image_folder / "val/red").rename(image_folder / "val/caf\u00e9")
    assert last_line(verify(capsys, image_folder)) == "26 images, nothing wrong"
    assert [images.classes for images in load(image_folder)] == [["blue", "cafe\u0301"]] * 2
    shutil.copytree(image_folder / "train/cafe\u0301", image_folder / "train/caf\u00e9")
    out = verify(capsys, image_folder, expect=1)
    assert "'cafe\\u0301' and 'caf\\xe9': one name in two Unicode forms in train" in out
    assert "1 ambiguous class name" in last_line(out)
    with pytest.raises(
        ConfigError, match="same name in different Unicode forms: 'cafe.u0301' and 'caf.xe9'; merge them"
    ):
        load(image_folder)


def test_a_class_that_no_holdout_can_split_is_named(tmp_path, capsys):
    for name, count in (("many", 3), ("one", 1)):
        for i in range(count):
            (tmp_path / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 5), (i, 7, 50 * count)).save(tmp_path / "train" / name / f"{i}.png")
    out = verify(capsys, tmp_path, expect=1)
    assert "data.holdout_fraction cannot split: one\n" in out and last_line(out) == "1 problem: 1 class of one image"


def test_values_in_another_range_than_they_were_written_in_are_warned_of(tmp_path, capsys):
    """Check that nearly black, clipped and empty channels are noticed before a training that would end at chance."""
    rng = np.random.default_rng(0)
    for i, label in enumerate("aab"):
        for name in ("dark", "clipped", "floats"):
            (tmp_path / name / label).mkdir(parents=True, exist_ok=True)
        twelve_bits = rng.integers(0, 4096, (13, 11)).astype(np.uint16)
        Image.fromarray(twelve_bits).save(tmp_path / "dark" / label / f"{i}.png")
        pixels = rng.integers(0, 2, (13, 11, 3)).astype(np.uint8) * 255
        Image.fromarray(pixels * np.array((1, 1, 0), np.uint8)).save(tmp_path / "clipped" / label / f"{i}.png")
        Image.fromarray(twelve_bits.astype(np.float32)).save(tmp_path / "floats" / label / f"{i}.tif")
    out = verify(capsys, tmp_path / "dark")
    assert "warning     3 16-bit files stay below 6.7% of their range: rescale them" in out
    assert last_line(out) == "3 images, no problems, 1 warning"
    out = verify(capsys, tmp_path / "clipped")
    assert "red is saturated: 0 in 5" in out and "green is saturated" in out and "blue is constant, 0.0000" in out
    out = verify(capsys, tmp_path / "floats", expect=1)
    assert "a/1.tif: its pixels are floats" in out and "class       b: no image in all can be read\n" in out
    assert last_line(out) == "5 problems: 3 unreadable files, 2 classes without a readable image"
    assert last_line(verify(capsys, tmp_path / "floats", "data.value_range=[0,4095]")) == "3 images, nothing wrong"
    assert "red is constant, 1.0000" in verify(capsys, tmp_path / "floats", "data.value_range=[0,1]")
    assert "one of the keys data.background" in refused(capsys, "verify", tmp_path, "data.root=x")


def test_turned_and_transparent_images_are_counted(image_folder, capsys):
    """Check that images which other programs show differently are counted, and read as the keys say."""
    exif = Image.Exif()
    exif[274] = 6
    Image.effect_noise((9, 5), 50).save(image_folder / "train" / "red" / "photo.jpg", exif=exif)
    Image.new("RGBA", (3, 3)).save(image_folder / "train" / "red" / "logo.png")
    out = verify(capsys, image_folder)
    assert "turned      1 image by EXIF orientation" in out and "transparent 1 image" in out and "5 x 9" not in out
    assert "by EXIF" not in verify(capsys, image_folder, "data.exif=ignore")


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_beside_class_folders_are_refused(image_folder, tmp_path, capsys, split):
    """A tar among the class folders of a split took their place in silence: 18 labelled images were not read."""
    png = (image_folder / "train/red/0.png").read_bytes()
    tar = image_folder / split / "extra.tar"
    tar.write_bytes(tar_of([("a.png", png), ("a.cls", b"0"), ("b.png", png), ("b.cls", b"1")]))
    message = f"{tar.parent}: holds class folders with images (blue, red), but {tar} is a shard of the same split; move"
    assert message in refused(capsys, "verify", image_folder)
    assert message in refused(capsys, "shard", image_folder, tmp_path / "shards")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(image_folder)
    if split == "val":
        with pytest.raises(ConfigError, match=re.escape(message)):
            load_val_set(compose_config(["data=image_folder", f"data.root={image_folder}"]).data, ["blue", "red"])
    (tar.parent / "loop").symlink_to("..")
    for name in ("blue", "red"):
        shutil.rmtree(tar.parent / name)
    assert find_shards(image_folder, split) == [tar]  # the link leads to images, but not to images of this split


@pytest.mark.parametrize("packed", ["train", "val"])
def test_splits_of_two_kinds_are_a_problem(image_folder, tmp_path, capsys, packed):
    """verify left out val/ beside train.tar, and val.tar beside train/, and ended with "nothing wrong"."""
    png = (image_folder / "train/red/0.png").read_bytes()
    shutil.rmtree(image_folder / packed)
    samples = [("a.png", png), ("a.cls", b"0"), ("b.png", encoded(Image.new("RGB", (3, 5)), "PNG")), ("b.cls", b"1")]
    (image_folder / f"{packed}.tar").write_bytes(tar_of(samples))
    kinds = ("class folders", "tar shards")[:: 1 if packed == "train" else -1]
    message = f"val consists of {kinds[0]}, but the rest of {kinds[1]}; make all of one kind"
    out = verify(capsys, image_folder, expect=1)
    assert f"split       {message}" in out and last_line(out) == "1 problem: 1 split of another kind or name"
    with pytest.raises(ConfigError, match=message):
        load(image_folder)
    (image_folder / "test").mkdir()  # was read instead of val
    with pytest.raises(ConfigError, match=message):
        load(image_folder)


def test_one_class_alone_is_refused(image_folder, tmp_path, capsys):
    """A folder too many between train/ and the class folders made one class of all: top1 was 100 %."""
    for split in ("train", "val"):
        (image_folder / split).rename(image_folder / "images")
        (image_folder / split).mkdir()
        (image_folder / "images").rename(image_folder / split / "images")
    train = image_folder / "train"
    inner = "images is the only class, but at least two are needed; its folders with images (blue, red) look like {}"
    inner = inner.format(f"the classes: move them up into {train}")
    out = verify(capsys, image_folder, expect=1)
    assert f"class       {inner}\n" in out and last_line(out) == "1 problem: only one class"
    assert f"{train}: {inner}" in refused(capsys, "shard", image_folder, tmp_path / "shards")
    with pytest.raises(ConfigError, match=re.escape(f"{train}: {inner}")):
        load(image_folder)
    shutil.rmtree(train / "images/blue")
    (train / "images/red/0.png").rename(train / "images/0.png")
    shutil.rmtree(train / "images/red")
    with pytest.raises(ConfigError, match="images is the only class.*; add a folder of images for each other class"):
        load(image_folder)
    png = encoded(Image.new("RGB", (3, 5)), "PNG")
    for split in ("train", "val"):
        (tmp_path / f"{split}.tar").write_bytes(tar_of([("a.png", png), ("a.cls", b"0")]))
    assert ", only one class" in last_line(verify(capsys, tmp_path, expect=1))
    with pytest.raises(ConfigError, match="train: 0 is the only class"):
        load(tmp_path)


def test_the_root_of_splits_one_level_down_is_named(image_folder, tmp_path, capsys):
    (tmp_path / "top").mkdir()
    image_folder.rename(tmp_path / "top/set")
    out = verify(capsys, tmp_path / "top", expect=1)
    assert f"its folders (train, val) look like splits: give {tmp_path / 'top/set'} as the root\n" in out


def test_images_outside_class_folders_and_broken_links_are_named(image_folder, capsys):
    """A readable image beside the class folders, and links to nothing, were "not images"."""
    train = image_folder / "train"
    shutil.copy(train / "red/0.png", train / "loose.png")
    (train / "notes.txt").write_text("x")
    for link in ("gone", "gone.png", "red/gone"):
        (train / link).symlink_to("nowhere")
    out = verify(capsys, image_folder)
    told = "images outside class folders: 1 (train/loose.png); not images: 1 (train/notes.txt); broken links: 3 (train/"
    assert f"not read    {told}gone, train/gone.png, train/red/gone)\n" in out


def test_a_class_without_a_readable_image_is_a_problem(image_folder, capsys):
    for path in (image_folder / "val/blue").iterdir():
        path.write_bytes(b"404 not found")
    out = verify(capsys, image_folder, expect=1)
    assert "class       blue: no image in val can be read\n" in out and "red: no image" not in out
    assert last_line(out) == "4 problems: 3 unreadable files, 1 class without a readable image"


def test_class_folders_without_splits(image_folder, capsys):
    """Check that a folder of classes is treated as a single split, even if one class is called train."""
    (image_folder / "train" / "red").rename(image_folder / "train" / "train")
    out = verify(capsys, image_folder / "train")
    assert "18 all" in out and last_line(out) == "18 images, nothing wrong"


def test_many_classes_are_summed_up(tmp_path, capsys):
    for i in range(53):
        (tmp_path / f"class{i:02d}").mkdir()
        for n in range(1 + (i == 0)):
            Image.new("RGB", (3, 5), (i, n, 0)).save(tmp_path / f"class{i:02d}" / f"{n}.png")
    out = verify(capsys, tmp_path)
    assert "min 1, median 1, max 2 images in all" in out and "class07" not in out
    assert "class07" in verify(capsys, tmp_path, "--all-classes")


def test_shards_are_verified_like_the_folders_they_come_from(image_folder, tmp_path, capsys):
    shutil.copy(image_folder / "train" / "red" / "1.png", image_folder / "val" / "red" / "again.png")
    (image_folder / "val" / "blue" / "text.jpg").write_text("404 not found")
    shards = tmp_path / "shards"
    assert run_command(["shard", str(image_folder), str(shards), "--images-per-shard=5"]) == 0
    capsys.readouterr()
    of_folders, of_shards = (verify(capsys, root, expect=1).splitlines() for root in (image_folder, shards))
    assert last_line("\n".join(of_shards)) == "2 problems: 1 unreadable file, 1 duplicate across splits"
    differing = [(a, b) for a, b in zip(of_folders, of_shards, strict=True) if a != b]
    assert all("tar shards" in b or ".tar:" in b for _, b in differing)


def test_a_root_that_is_not_there_is_refused_before_torch_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset_tool, "load_torch", lambda: pytest.fail("torch was loaded"))
    for words in (["verify", tmp_path / "nowhere"], ["shard", tmp_path / "nowhere", tmp_path / "dest"]):
        assert "must be a folder that is there" in refused(capsys, *words)


def test_roots_that_are_refused(tmp_path, capsys):
    assert "no class folder\n" in refused(capsys, "verify", tmp_path)
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").touch()
    said = refused(capsys, "verify", tmp_path)
    assert "no class folder in train/ and val/, which are taken as splits; if these are the classes, move both" in said


def test_names_cannot_write_on_the_terminal(tmp_path, capsys):
    """Check that class names are escaped, because an escape sequence could clear the screen or hide lines."""
    folder = tmp_path / "train" / "\x1b[2Jcat"
    folder.mkdir(parents=True)
    (folder / "a\rb.png").write_text("no image")
    out = verify(capsys, tmp_path, expect=1)
    assert "\\x1b[2Jcat" in out and "a\\rb.png" in out and "\x1b" not in out and "\r" not in out
    assert "\x1b" not in refused(capsys, "verify", folder / "\x1b[2J")
    assert printable("\udcff\n") == "\\udcff\\n"


# shard


def test_a_shard_that_was_emptied_or_cut_is_made_again(image_folder, tmp_path, capsys):
    """The same command again once said that they are all there already."""
    command = ["shard", str(image_folder), str(tmp_path / "shards"), "--images-per-shard", "6"]
    assert run_command(command) == 0
    first, second, *_ = shards = sorted((tmp_path / "shards/train").glob("*.tar"))
    before = [path.read_bytes() for path in shards]
    first.write_bytes(b"")
    second.write_bytes(before[1][:5000])
    assert run_command(command) == 0
    assert [path.read_bytes() for path in shards] == before


def test_shards_are_the_same_data_set(image_folder, tmp_path, capsys):
    """Check that labels, order and pixels match those of the folders, so that a run gives the same results."""
    shards = tmp_path / "shards"
    assert run_command(["shard", str(image_folder), str(shards), "--images-per-shard=7"]) == 0
    assert sorted(p.name for p in (shards / "train").glob("*.tar")) == [f"train-00000{i}.tar" for i in range(3)]
    assert_same_sets(image_folder, shards)
    capsys.readouterr()
    assert run_command(["shard", str(image_folder), str(shards), "--images-per-shard=7"]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_images_of_any_name_and_test_are_packed(image_folder, tmp_path, capsys):
    """Files named otherwise than their content, or not at all, and test/, which data.split selects, are copied too."""
    shutil.copytree(image_folder / "val", image_folder / "test")
    image = Image.new("RGB", (5, 3), (200, 10, 10))
    for name, kind in (("x.cls", "JPEG"), ("noname", "PNG"), ("a.gif", "GIF"), ("b.jfif", "JPEG"), ("c.dat", "WEBP")):
        (image_folder / "train/red" / name).write_bytes(encoded(image, kind))
    assert run_command(["shard", str(image_folder), str(tmp_path / "shards"), "--images-per-shard=7"]) == 0
    assert_same_sets(image_folder, tmp_path / "shards")
    assert "23 train, 8 val, 8 test" in verify(capsys, tmp_path / "shards", expect=1)  # val and test are equal


def test_shards_of_two_sources_are_not_mixed(image_folder, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert run_command(["shard", str(image_folder), str(shards), "--images-per-shard=7"]) == 0
    assert "images_per_shard: 7 there, 5 here" in refused(capsys, "shard", image_folder, shards, "--images-per-shard=5")
    Image.new("RGB", (3, 3)).save(image_folder / "train" / "red" / "new.png")
    assert "another source" in refused(capsys, "shard", image_folder, shards, "--images-per-shard=7")
    (shards / "shards.json").unlink()
    assert "did not write" in refused(capsys, "shard", image_folder, shards, "--images-per-shard=7")
    for content in ("{", "3", "[" * 60_000, "é" * 10**6, '"' + "x" * 10**8):
        (shards / "shards.json").write_text(content)
        assert "shards.json: cannot be read" in refused(capsys, "shard", image_folder, shards, "--images-per-shard=7")


def test_places_that_shards_may_not_go_to(image_folder, tmp_path, capsys, monkeypatch):
    """Check that shards cannot be written inside the source (they would become part of it) or next to class folders."""
    assert "must not be inside" in refused(capsys, "shard", image_folder, image_folder / "train" / "shards")
    other = make_image_folder(tmp_path / "other")
    assert "holds class folders already" in refused(capsys, "shard", image_folder, other)
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(capsys, "shard", image_folder, tmp_path / "file")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
    assert "0.00 GB are free" in refused(capsys, "shard", image_folder, tmp_path / "full")
    assert not list((tmp_path / "full").rglob("*.tar"))


# prepare imagenet


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (11, 13, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def devkit() -> bytes:
    """Return a devkit like the real one: leaf and inner synsets, with ids ordered differently from the WordNet ids."""
    savemat = pytest.importorskip("scipy.io", reason="scikit-learn, in the extra dev, brings scipy").savemat
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [(3, "n00000002", "a, b", "-", 0, [], 0), (1, "n00000011", "c", "-", 0, [], 0)]
    rows += [(2, "n00000003", "d", "-", 0, [], 0), (4, "n00000001", "animal", "-", 3, [3, 1, 2], 1)]
    synsets = np.array(rows, dtype=[(name, object) for name in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    ids = {wnid: number for number, wnid, *_ in rows}
    truth = "".join(f"{ids[wnid]}\n" for wnid in VAL_WNIDS).encode()
    return gzip.compress(tar_of([(imagenet.META, meta.getvalue()), (imagenet.GROUND_TRUTH, truth)]))


def train_files() -> dict[str, dict[str, bytes]]:
    """Return {wnid: {name: JPEG}}, unsorted as in the real archive."""
    return {w: {f"{w}_{n}.JPEG": jpeg(100 * n + int(w[1:])) for n in range(WNIDS[w])[::-1]} for w in list(WNIDS)[::-1]}


def train_archive(files: dict[str, dict[str, bytes]]) -> bytes:
    return tar_of((f"{wnid}.tar", tar_of(inside.items())) for wnid, inside in files.items())


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the three archives of a three-class ImageNet, and replace the expected checksums with theirs."""
    folder = tmp_path / "archives"
    folder.mkdir()
    contents = {
        "train": train_archive(train_files()),
        "val": tar_of((f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(7000 + i)) for i in (2, 0, 3, 1)),
        "devkit": devkit(),
    }
    for part, data in contents.items():
        (folder / ARCHIVES[part]).write_bytes(data)
    sums = {part: (ARCHIVES[part], hashlib.md5(data).hexdigest()) for part, data in contents.items()}
    monkeypatch.setattr(prepare, "ARCHIVE_META", sums)
    monkeypatch.setattr(writing.os, "sync", lambda: None)  # it would sync the whole machine
    return folder


def prepare_imagenet(archives: Path, dest: Path, *more: str) -> int:
    return run_command(["prepare", "imagenet", str(archives), str(dest), *more])


def test_imagenet_as_class_folders(archives, tmp_path, capsys):
    """Every image is stored byte for byte under its label, so a wrong offset or shifted val labels would be noticed."""
    dest = tmp_path / "imagenet"
    assert prepare_imagenet(archives, dest) == 0
    assert f"data=imagenet data.root={dest}" in capsys.readouterr().out
    expected = {f"train/{w}/{name}": data for w, files in train_files().items() for name, data in files.items()}
    expected |= {f"val/{w}/ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(7000 + i) for i, w in enumerate(VAL_WNIDS)}
    assert {str(p.relative_to(dest)): p.read_bytes() for p in dest.rglob("*") if p.is_file()} == expected
    assert last_line(verify(capsys, dest)) == "14 images, nothing wrong"
    assert prepare_imagenet(archives, dest) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_imagenet_as_shards_is_the_same_data_set(archives, tmp_path, capsys):
    assert prepare_imagenet(archives, tmp_path / "folders") == 0
    assert prepare_imagenet(archives, tmp_path / "shards", "--shards", "--images-per-shard=3") == 0
    assert_same_sets(tmp_path / "folders", tmp_path / "shards")
    capsys.readouterr()
    again = ("prepare", "imagenet", archives, tmp_path / "shards")
    assert "images_per_shard: 3 there, 1000 here" in refused(capsys, *again, "--shards")
    assert "holds tar shards already" in refused(capsys, *again)


@pytest.mark.parametrize("arguments", [(), ("--shards", "--images-per-shard=3")], ids=["folders", "shards"])
def test_a_stopped_command_goes_on(archives, tmp_path, capsys, monkeypatch, arguments):
    """If stopped at the second class or shard, a rerun keeps the first and gives the same result as a single run."""
    dest, whole = tmp_path / "imagenet", tmp_path / "whole"
    reads, read = [], writing.Originals.read

    def stop_at_the_seventh(self, index):
        reads.append(index)
        if len(reads) == 7:
            raise KeyboardInterrupt
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Originals, "read", stop_at_the_seventh)
        assert prepare_imagenet(archives, dest, *arguments) == 75
    finished = [p for p in dest.rglob("*") if p.is_file() and ".tmp" not in str(p)]
    assert list(dest.rglob("*.tmp")) and [p for p in finished if p.parent != dest]
    before = {path: path.stat().st_mtime_ns for path in finished if path.suffix in (".JPEG", ".tar")}
    assert prepare_imagenet(archives, dest, *arguments) == prepare_imagenet(archives, whole, *arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    tree, expected = ({p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()} for r in (dest, whole))
    assert tree == expected


def test_class_folders_of_something_else_are_refused(archives, tmp_path, capsys):
    """Check that DEST may not contain other class folders; they could be mistaken for finished ones or add classes."""
    dest = tmp_path / "imagenet"
    (dest / "train" / "n00000002").mkdir(parents=True)
    assert "holds 0 files, the archive 5" in refused(capsys, "prepare", "imagenet", archives, dest)
    (dest / "train" / "n00000002").rename(dest / "train" / "cat")
    assert "cat is there" in refused(capsys, "prepare", "imagenet", archives, dest)


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "a/b.JPEG", "..\\evil.JPEG", "a..JPEG", "evil.sh"])
def test_hostile_names_are_refused(archives, tmp_path, capsys, name):
    """Check that extracting an untrusted archive cannot write files outside DEST."""
    dest = tmp_path / "imagenet"
    files = train_files()
    files["n00000003"][name] = jpeg(1)
    (archives / ARCHIVES["train"]).write_bytes(train_archive(files))
    assert repr(name) in refused(capsys, "prepare", "imagenet", archives, dest, "--no-checksums")
    assert not dest.exists() and not (tmp_path / "evil.JPEG").exists()


def test_links_are_refused(archives, tmp_path, capsys):
    link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(archives / ARCHIVES["val"], "w:") as archive:
        archive.addfile(link)
    assert "is refused" in refused(capsys, "prepare", "imagenet", archives, tmp_path / "imagenet", "--no-checksums")


def unfinished(name: str, data: bytes) -> bytes:
    """Return a tar archive of one file without its end mark."""
    return padded(tar_header(name, b"0", b"%011o" % len(data)) + data)


@pytest.mark.parametrize("place", ["train", "class", "val"])
@pytest.mark.parametrize(
    "hostile,reason",
    [
        (pax_header(b"size=" + b"9" * 30), "a pax header has the size"),
        (tar_header("n00000001.tar", b"S", b"00000000001") + bytes(512), "n00000001.tar is sparse"),
        (tar_header("n00000001.tar", b"0", b"77777777777"), "n00000001.tar must end within the archive"),
        (b"?" * 512, "its header at byte .* is damaged"),
        (b"", "it ends without an end mark"),
    ],
    ids=["pax", "sparse", "size", "damaged", "cut"],
)
def test_archives_with_hostile_headers_are_refused(archives, tmp_path, capsys, place, hostile, reason):
    """Check that no header causes a traceback or is taken for the end of an archive, which would lose its images."""
    content = unfinished("ILSVRC2012_val_00000001.JPEG", jpeg(7000)) + hostile
    if place == "train":
        content = unfinished("n00000002.tar", tar_of([])) + hostile
    elif place == "class":
        content = tar_of([("n00000002.tar", content)])
    path = archives / ARCHIVES["val" if place == "val" else "train"]
    path.write_bytes(content)
    message = refused(capsys, "prepare", "imagenet", archives, tmp_path / "imagenet", "--no-checksums")
    assert re.search(f"{path}: cannot be read as a tar .{reason}", message)


@pytest.mark.parametrize(
    "content",
    [
        b"\x1f\x8b half",
        bytes(2**26 + 1),
        pax_header(b"size=" + b"9" * 30) + tar_of([(imagenet.META, b"x")]),
        tar_of([]),
    ],
    ids=["cut", "bomb", "pax", "empty"],
)
def test_a_wrong_devkit_is_refused(archives, tmp_path, capsys, content):
    (archives / ARCHIVES["devkit"]).write_bytes(content if content[:1] == b"\x1f" else gzip.compress(content))
    message = refused(capsys, "prepare", "imagenet", archives, tmp_path / "imagenet", "--no-checksums")
    assert f"{ARCHIVES['devkit']}: cannot be read as ImageNet's devkit" in message


def test_archives_that_are_not_the_original(archives, tmp_path, capsys, monkeypatch):
    """Check that a wrong checksum, truncated download, missing archive or full disk is reported before writing."""
    command = ("prepare", "imagenet", archives, tmp_path / "imagenet")
    with monkeypatch.context() as patch:
        patch.setattr(writing.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1000))
        assert "are to be written" in refused(capsys, *command)
    train = archives / ARCHIVES["train"]
    data = bytearray(train.read_bytes())
    data[1700] ^= 1  # inside an image
    train.write_bytes(data)
    assert "its MD5 is" in refused(capsys, *command)
    train.write_bytes(data[:9000])
    assert "fetch it again" in refused(capsys, *command, "--no-checksums")
    train.unlink()
    assert "must hold ILSVRC2012_img_train.tar" in refused(capsys, *command)
    assert not list((tmp_path / "imagenet").rglob("*.JPEG"))


def test_shards_json_says_where_the_shards_are_from(archives, tmp_path):
    assert prepare_imagenet(archives, tmp_path / "shards", "--shards") == 0
    told = json.loads((tmp_path / "shards" / "shards.json").read_text())
    assert told["images_per_shard"] == 1000 and told["train"].startswith("10 images")
    assert (tmp_path / "shards" / "classes.txt").read_text().split() == sorted(WNIDS)


def test_a_folder_whose_name_begins_with_a_tilde_is_that_folder(image_folder, tmp_path, monkeypatch, capsys):
    """`~tmp` was taken for the home of a user who does not exist, with a traceback."""
    monkeypatch.chdir(tmp_path)
    image_folder.rename("~tmp")
    assert "18 train" in verify(capsys, Path("~tmp"), expect=0)
    assert "must be a folder that is there" in refused(capsys, "verify", "~nobody_of_this_name/x")


def test_classes_of_nearly_one_name_are_told_from_others():
    copies = ("red (1)", "red - Copy", "red copy 2", "red - Kopie", "Copy of red", "red (Case Conflict)")
    copies += ("red (Ann's conflicted copy 2024-01-02)",)
    alike = [["Cat", "cat"], ["great_white", "great white"], *(["red", name] for name in copies)]
    assert [len(look_alikes(names)) for names in alike] == [1] * 9
    others = ["C", "C++", "C#", "12", "1-2", "copy", "(1)", "dog", "dogs", "a b", "ab", "copy of", "war (conflict)"]
    assert look_alikes(others) == []


def test_a_few_bright_files_do_not_hide_that_most_are_dark():
    """One pixel that is white, in one of 24 files of which 10 bits are used, silenced the warning."""
    assert describe_dark([0.01] * 23 + [1.0]).startswith("23 of 24 16-bit files stay below 1.4% of their range")
    assert describe_dark([0.01, 0.9]) == describe_dark([]) == ""
