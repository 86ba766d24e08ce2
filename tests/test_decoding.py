"""Check that every kind of image is read as a person would see it, or refused with the reason and the remedy."""

import base64
import contextlib
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from making_data import (
    SMALL_RUN,
    assert_same,
    batches,
    chunk,
    config_for,
    encoded,
    make_image_folder,
    one_image,
    rows_of_png,
)
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin
from reading_runs import assert_same_run, last, rows

from sasa_train.config.compose import compose_config
from sasa_train.config.saved import BEFORE, load_config
from sasa_train.data.datasets import FORMATS, UnreadableImage
from sasa_train.data.decoding import Decoding, decode, decoding_of, is_16_bit, to_rgb, upright_size
from sasa_train.data.opening import open_image
from sasa_train.data.transforms import decode_box
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.trained import load_trained

RAMP = np.arange(64).reshape(8, 8)
ORIENTATION = 274


NAMES = {
    "Orientation": 274,
    "NewSubfileType": 254,
    "Compression": 259,
    "PhotometricInterpretation": 262,
    "FillOrder": 266,
}
NAMES |= {"MaxSampleValue": 281, "PlanarConfiguration": 284, "ColorMap": 320, "SubIFDs": 330, "ExtraSamples": 338}
NAMES |= {"SMinSampleValue": 340, "SMaxSampleValue": 341, "RowsPerStrip": 278, "StripByteCounts": 279, "InkSet": 332}
NAMES |= {
    "DotRange": 336,
    "Indexed": 346,
    "YCbCrCoefficients": 529,
    "Software": 305,
    "YCbCrSubSampling": 530,
    "ReferenceBlackWhite": 532,
}


def tiff(pixels: np.ndarray, **stated) -> bytes:
    """Return pixels [H, W] or [H, W, C] of any type and byte order as a TIFF; Pillow writes only some of them.

    `stated` may have values of NAMES, or None to leave out a tag; Compression may be 8 (deflate).
    """
    (height, width), channels = pixels.shape[:2], pixels.shape[2] if pixels.ndim == 3 else 1
    is_planar = stated.get("PlanarConfiguration") == 2 and channels > 1
    planes = [pixels[..., i] for i in range(channels)] if is_planar else [pixels]
    strips = [zlib.compress(p.tobytes()) if stated.get("Compression") == 8 else p.tobytes() for p in planes]
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * channels, 259: [1], 262: [1 + (channels == 3)]}
    tags |= {273: [0] * len(strips), 277: [channels], 278: [height], 279: [*map(len, strips)]}
    tags |= {339: [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * channels}
    sizes = [*map(len, strips)]
    tags |= {NAMES[name]: value if isinstance(value, list) else [value] for name, value in stated.items()}
    tags = {tag: values for tag, values in tags.items() if values != [None]}
    order, start = ">" if pixels.dtype.byteorder == ">" else "<", 8 + 2 + 12 * len(tags) + 4
    longs = start + sum(4 * len(values) for values in tags.values())
    tags[273], at, directory, content = [longs + sum(sizes[:i]) for i in range(len(strips))], start, b"", b""
    for tag, values in sorted(tags.items()):
        code, number = ("f", 11) if tag >= 340 else ("L", 4)
        one = struct.pack(f"{order}L", at) if len(values) > 1 else struct.pack(f"{order}{code}", values[0])
        directory += struct.pack(f"{order}HHL", tag, number, len(values)) + one
        at, content = at + 4 * len(values), content + struct.pack(f"{order}{len(values)}{code}", *values)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}LH", 8, len(tags))
    return head + directory + bytes(4) + content + b"".join(strips)


def sparse_tiff() -> bytes:
    """Return a TIFF without its only strip, which is then 0, as GDAL writes it."""
    content = tiff(np.zeros((8, 8), dtype=np.uint8), StripByteCounts=0)
    place = content.index(struct.pack("<HHL", 273, 4, 1)) + 8
    return content[:place] + bytes(4) + content[place + 4 :]


def read(folder: Path, content: bytes, **keys) -> np.ndarray:
    (folder / "x").write_bytes(content)
    return one_image(folder / "x").read(0, lambda image: np.asarray(to_rgb(image, Decoding(**keys))))


UNIT = RAMP / 63
TAGGED = {"SMinSampleValue": 0.0, "SMaxSampleValue": 1.0}


@pytest.mark.parametrize(
    "content,keys",
    [
        (tiff(UNIT.astype("<f4"), **TAGGED), {}),
        (tiff(UNIT.astype("<f4")), {"value_range": (0.0, 1.0)}),
        (tiff((UNIT * 255).astype("<f4"), **TAGGED), {"value_range": (0.0, 255.0)}),
        (tiff((RAMP * 1000 - 3000).astype("<i4")), {"value_range": (-3000.0, 60000.0)}),
        (tiff((RAMP * 1000).astype("<u4"), SMinSampleValue=0.0, SMaxSampleValue=63000.0), {}),
        (tiff((RAMP * 100 - 3000).astype("<i2")), {"value_range": (-3000.0, 3300.0)}),
        (tiff((RAMP - 32).astype("i1")), {"value_range": (-32.0, 31.0)}),
        (tiff(UNIT.astype(">f4"), Compression=8, **TAGGED), {}),
        (tiff((RAMP * 100 - 3000).astype(">i2"), Compression=8), {"value_range": (-3000.0, 3300.0)}),
        (tiff((RAMP * 1000 - 3000).astype(">i4"), Compression=8), {"value_range": (-3000.0, 60000.0)}),
        (tiff((RAMP * 1000 - 3000).astype(">i4")), {"value_range": (-3000.0, 60000.0)}),
        (tiff((RAMP * 2**26).astype("<u4"), SMinSampleValue=0.0, SMaxSampleValue=63.0 * 2**26), {}),
        (tiff(UNIT.astype("<f4"), PlanarConfiguration=2, **TAGGED), {}),
        (tiff(np.stack([RAMP] * 3, -1).astype("u1"), PlanarConfiguration=2, MaxSampleValue=63), {}),
        (tiff((np.stack([RAMP] * 3, -1) * 1040).astype(">u2"), PlanarConfiguration=2, Compression=8), {}),
        (tiff((RAMP * 65).astype("<u2"), MaxSampleValue=4095), {}),
        (tiff((4095 - RAMP * 65).astype("<u2"), MaxSampleValue=4095, PhotometricInterpretation=0), {}),
        (tiff(RAMP.astype("u1"), MaxSampleValue=63), {}),
        (tiff((63 - RAMP).astype("u1"), MaxSampleValue=63, PhotometricInterpretation=0), {}),
        (tiff(np.stack([RAMP] * 3, -1).astype("u1"), MaxSampleValue=63), {}),
        (tiff((np.stack([RAMP] * 3, -1) * 1040).astype("<u2")), {}),
        (b"P5 8 8 4095\n" + (RAMP * 65).astype(">u2").tobytes(), {}),
        (b"P5 8 8 65535\n" + (RAMP * 1040).astype(">u2").tobytes(), {}),
        (encoded(Image.fromarray((RAMP * 1040).astype(np.uint16)), "PNG"), {}),
    ],
    ids=[
        "float-tags", "float", "range-wins", "int32", "uint32-tags", "int16", "int8", "big-float", "big-int16",
        "big-int32", "big-int32-raw", "uint32-large", "planar-float", "planar", "planar-16-bit", "12-bit",
        "12-bit-inverted", "6-bit", "6-bit-inverted", "rgb-6-bit", "rgb-16-bit", "pgm-12-bit", "pgm-16-bit",
        "png-16-bit",
    ],
)  # fmt: skip
def test_a_ramp_from_black_to_white_is_one_however_it_is_stored(tmp_path, content, keys):
    """Check that scientific images keep their shades: Pillow's conversion makes floats in [0, 1] entirely black."""
    pixels = read(tmp_path, content, **keys).astype(int)
    assert np.abs(pixels - (UNIT * 255)[..., None]).max() <= 2.1  # 16-bit channels lose their lower byte


@pytest.mark.parametrize(
    "content,reason",
    [
        (tiff(UNIT.astype("<f4")), r"pixels are floats.*set data.value_range=\[low,high\]"),
        (tiff(RAMP.astype("<i4")), r"signed 32-bit integers.*set data.value_range"),
        (tiff(RAMP.astype("<u4"), SMinSampleValue=5.0, SMaxSampleValue=5.0), r"are 32-bit integers.*data.value_range"),
        (tiff(RAMP.astype("<i2")), r"signed 16-bit integers.*set data.value_range"),
        (tiff(RAMP.astype("i1")), r"signed 8-bit integers.*set data.value_range"),
        (tiff(np.stack([UNIT] * 3, -1).astype("<f4")), "Pillow cannot read.*convert it"),
        (tiff(RAMP.astype("<f8")), "Pillow cannot read.*convert it"),
        (tiff(np.stack([RAMP] * 3, -1).astype("<u2"), MaxSampleValue=63), "MaxSampleValue=63.*convert it"),
        (tiff(np.where(RAMP > 61, np.nan, UNIT).astype("<f4"), **TAGGED), "pixels that are NaN: 2"),
        (b"Pf\n8 8\n-1.0\n" + UNIT.astype("<f4").tobytes(), r"pixels are floats.*data.value_range"),
    ],
    ids=["float", "int32", "uint32", "int16", "int8", "float-rgb", "float64", "rgb-6-of-16", "nan", "pfm"],
)
def test_values_of_unknown_meaning_are_refused_with_the_remedy(tmp_path, content, reason):
    with pytest.raises(UnreadableImage, match=reason):
        read(tmp_path, content)


def test_plain_images_are_read_as_ever(tmp_path):
    """Check that common images do not change by a bit, whatever the keys: published results depend on them."""
    rng = np.random.default_rng(0)
    for shape in ((7, 5), (7, 5, 3)):
        pixels = rng.integers(0, 256, shape, dtype=np.uint8)
        found = read(tmp_path, encoded(Image.fromarray(pixels), "PNG"))
        assert np.array_equal(found, pixels if len(shape) == 3 else np.stack([pixels] * 3, -1))
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(read(tmp_path, encoded(Image.fromarray(deep), "PNG"))[..., 0], (deep / 257 + 0.5).astype(int))


def to_floats(root: Path, keep: int = 0) -> None:
    """Replace an image folder's PNGs by float TIFFs with values in [0, 1], except the first `keep` of each class."""
    for folder in (*root.glob("*/*"),):
        for path in sorted(folder.iterdir())[keep:]:
            pixels = np.asarray(Image.open(path).convert("L"))
            path.with_suffix(".tif").write_bytes(tiff((pixels / 255).astype("<f4")))
            Image.fromarray(pixels).save(path) if keep < 0 else path.unlink()


@pytest.mark.parametrize("size", [16, 72], ids=["resident", "streamed"])
def test_a_set_of_floats_is_refused_at_the_start_and_trained_with_its_range(in_process, tmp_path, size):
    """Check that a set that training would see as black does not train to chance, but says what is missing."""
    root = make_image_folder(tmp_path / "images")
    grey = make_image_folder(tmp_path / "grey")
    for path in grey.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    to_floats(root)
    stem = "model.stem=conv_small" if size == 16 else "model.stem=conv"
    data = ("data=image_folder", f"data.image_size={size}", stem, "data.num_workers=0", *SMALL_RUN, "trainer.epochs=1")
    refused = in_process("train", *data, f"data.root={root}", expect=2).stderr
    assert "train/blue/0.tif: its pixels are floats" in refused and "data.value_range=[low,high]" in refused
    assert "max_unreadable" not in refused and not list((tmp_path / "out").rglob("last.pt"))
    if size == 72:
        return
    data += ("model.name=conv_resnet26",)
    in_process("train", *data, f"data.root={root}", "data.value_range=[0,1]", "run_name=floats")
    in_process("train", *data, f"data.root={grey}", "run_name=grey")
    assert rows(tmp_path / "out/floats") == rows(tmp_path / "out/grey")
    alone = in_process("predict", str(tmp_path / "out/floats"), str(root / "val"), "--format=csv").stdout
    plain = in_process("predict", str(tmp_path / "out/floats"), str(grey / "val"), "--format=csv").stdout
    assert alone.replace(str(root), "").replace(".tif", "") == plain.replace(str(grey), "").replace(".png", "")


def test_floats_among_other_images_are_not_among_the_ten_that_may_be_bad(image_folder, in_process):
    to_floats(image_folder, keep=5)
    data = ("data=image_folder", "data.image_size=16", "model.stem=conv_small", "data.num_workers=0", *SMALL_RUN)
    refused = in_process("train", *data, f"data.root={image_folder}", expect=2).stderr
    assert "8 images of train cannot be read without data.value_range=[low,high]" in refused


def png_with_key(pixels: np.ndarray, mode: str, key) -> bytes:
    return encoded(Image.frombytes(mode, pixels.shape[1::-1], pixels.tobytes()), "PNG", transparency=key)


def transparent_left() -> dict[str, bytes]:
    """Return images of two pixels, left transparent and right black, in every way that a file can say so."""
    rgba = Image.fromarray(np.array([[(9, 9, 9, 0), (0, 0, 0, 255)]], np.uint8))
    palette = Image.fromarray(np.array([[1, 0]], np.uint8)).copy()
    palette.putpalette([0, 0, 0, 9, 9, 9])
    two = np.array([[(9, 9, 9), (0, 0, 0)]], np.uint8)
    found = {f"rgba-{kind}": encoded(rgba, kind) for kind in ("PNG", "TIFF")}
    found["rgba-webp"] = encoded(rgba, "WEBP", lossless=True)
    found |= {f"la-{kind}": encoded(rgba.convert("LA"), kind) for kind in ("PNG", "TIFF")}
    found["p-key"] = encoded(palette, "PNG", transparency=1)
    found["p-bytes"] = encoded(palette, "PNG", transparency=bytes([255, 0]))
    found["p-gif"] = encoded(palette, "GIF", transparency=1)
    found["rgb-key"] = png_with_key(two, "RGB", (9, 9, 9))
    found["l-key"] = png_with_key(two[..., 0], "L", 9)
    found["i16-key"] = png_with_key(two[..., 0].astype("<u2"), "I;16", 9)
    found["bit-key"] = encoded(Image.frombytes("1", (2, 1), b"\x80"), "PNG", transparency=1)
    found["l2-key"] = two_pixels(b"\x40", 2, 0, key=struct.pack(">H", 1))
    return found


def two_pixels(row: bytes, bits: int, colour_type: int, key: bytes) -> bytes:
    """Return a PNG of a kind that Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour_type, 0, 0, 0)) + chunk(b"tRNS", key)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in transparent_left().items()])
def test_transparent_pixels_show_the_background(tmp_path, content):
    """Check that black drawings on nothing do not become black on black, as they are without a background."""
    assert read(tmp_path, content)[0].tolist() == [[255] * 3, [0] * 3]
    assert read(tmp_path, content, background="#102030")[0].tolist() == [[16, 32, 48], [0] * 3]


def test_half_transparent_pixels_are_mixed_and_none_ignores_alpha(tmp_path):
    content = encoded(Image.new("RGBA", (3, 2), (100, 0, 0, 51)), "PNG")
    assert (read(tmp_path, content) == (224, 204, 204)).all()
    assert (read(tmp_path, content, background="none") == (100, 0, 0)).all()


@pytest.mark.parametrize("name", ["nocolour", "#12345", "#11223344", "rgba(1,2,3,4)"])
def test_a_background_that_is_no_colour_is_refused(name):
    with pytest.raises(ConfigError, match="data.background=.* must be a CSS colour's name"):
        compose_config([f"data.background='\"{name}\"'" if "(" not in name else f"data.background='{name}'"])


def test_values_of_the_keys_are_checked_and_travel():
    data = compose_config(["data.value_range=[-1,1]", "data.background=navy", "data.exif=ignore"]).data
    assert decoding_of(data) == Decoding("navy", "ignore", (-1.0, 1.0))
    for wrong in ("data.value_range=[1,1]", "data.value_range=[0]", "data.exif=maybe"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            compose_config([wrong])
    with pytest.raises(ConfigError, match="needs data.clip_values=false"):
        compose_config(["data.value_range=[0,1]", "data.clip_values=true"])


def corners(width: int = 32, height: int = 16) -> Image.Image:
    """Return a picture that none of the eight orientations maps to itself."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = (255, 0, 0), (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


def with_orientation(image: Image.Image, kind: str, orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    if kind == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[ORIENTATION] = orientation
        return encoded(image, kind, tiffinfo=tags, **options)
    return encoded(image, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright_in_all_eight_orientations(tmp_path, kind, orientation):
    content = with_orientation(corners(), kind, orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert expected.size == ((16, 32) if orientation > 4 else (32, 16))
    assert np.array_equal(read(tmp_path, content), expected)
    with Image.open(io.BytesIO(content)) as image:
        assert upright_size(image) == expected.size
    if kind != "TIFF":  # Pillow turns it while it loads
        stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(read(tmp_path, content, exif="ignore"), stored)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("box", [(20, 30, 60, 110), (0, 0, 128, 300)], ids=["whole", "drafted"])
def test_a_crop_of_a_turned_photo_is_that_of_the_upright_one(orientation, box):
    """Check the box of a random-resized crop, which must be in the turned image and may be decoded at half size."""
    raw = corners(300, 128) if orientation > 4 else corners(128, 300)
    content = with_orientation(raw, "JPEG", orientation, quality=95, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    expected = upright.resize((32, 32), Image.Resampling.BILINEAR, box=box)
    with Image.open(io.BytesIO(content)) as image:
        found = decode_box(image, box, (32, 32))
        assert (max(image.size) < 300) == (box[2] == 128)
    assert np.abs(np.asarray(found).astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("size", ["data.image_size=16", "data.image_size=72"], ids=["resident", "streamed"])
def test_training_on_turned_photos_is_training_on_upright_ones(tmp_path, size):
    turned, upright = make_image_folder(tmp_path / "turned", (23, 17)), tmp_path / "upright"
    for number, path in enumerate(sorted(turned.rglob("*.png"))):
        path.write_bytes(with_orientation(Image.open(path), "PNG", number % 8 + 1))
        copy = upright / path.relative_to(turned)
        copy.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.exif_transpose(Image.open(path)).save(copy)
    keys = ("data=image_folder", size, "trainer.global_batch_size=9", "data.num_workers=0")
    both = [config_for(*keys, f"data.root={root}") for root in (turned, upright)]
    assert_same(*map(batches, both))


BROKEN_EXIF = {
    "empty": b"",
    "junk": b"junk",
    "offset": b"II*\0\xff\xff\xff\xff",
    "type": b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\0\0",
}


@pytest.mark.filterwarnings("ignore:(Corrupt EXIF data|Truncated File Read)")  # as outside pytest; see decoding.py
@pytest.mark.parametrize("exif", [pytest.param(b"Exif\0\0" + exif, id=name) for name, exif in BROKEN_EXIF.items()])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_broken_exif_is_ignored(tmp_path, exif, kind):
    expected = read(tmp_path, encoded(corners(), kind))
    assert np.array_equal(read(tmp_path, encoded(corners(), kind, exif=exif)), expected)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_photo_is_turned_though_its_camera_is_cut_off(tmp_path, kind, order):
    """Pillow drops all of EXIF from a value that lies beyond its end, as an upload or a privacy tool leaves it."""
    entries = struct.pack(f"{order}HHII", 0x10F, 2, 8, 0xFFF0) + struct.pack(f"{order}HHIHH", ORIENTATION, 3, 1, 6, 0)
    exif = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)
    whole = Image.Exif()
    whole[ORIENTATION] = 6
    expected = read(tmp_path, encoded(corners(), kind, exif=whole))
    assert np.array_equal(read(tmp_path, encoded(corners(), kind, exif=b"Exif\0\0" + exif)), expected)


def test_a_gif_whose_first_frame_has_a_grey_palette_beside_another_is_refused(tmp_path):
    """Pillow takes the file's palette then: a ramp of grey was orange."""
    greys, reds = bytes(i // 3 for i in range(768)), bytes(v for i in range(256) for v in (255, i // 2, 0))

    def gif(local: bytes) -> bytes:
        """Write two pixels, 10 and 200, as codes of 9 bits: clear, the pixels, end."""
        codes = sum(code << 9 * i for i, code in enumerate((256, 10, 200, 257))).to_bytes(5, "little")
        frame = b"," + struct.pack("<HHHHB", 0, 0, 2, 1, 0x87) + local + b"\x08\x05" + codes + b"\0;"
        return b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0xF7, 0, 0) + reds + b"!\xfe\x02hi\0" + frame

    assert read(tmp_path, gif(greys[::-1])).tolist() == [[[245] * 3, [55] * 3]]
    with pytest.raises(UnreadableImage, match="a GIF whose first frame has a grey palette"):
        read(tmp_path, gif(greys))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_tiff_with_a_tag_beyond_its_end_is_refused(tmp_path):
    """Pillow drops the tags that follow, such as the one that says that the numbers have a sign."""
    whole = tiff(RAMP.astype("<i2"), Software=[65] * 9)
    read(tmp_path, whole, value_range=(0, 63))
    entry = whole.index(struct.pack("<HHL", NAMES["Software"], 4, 9))
    damaged = whole[: entry + 8] + struct.pack("<L", 2**31 - 1) + whole[entry + 12 :]
    with pytest.raises(UnreadableImage, match="the value of tag 305 lies beyond the end"):
        read(tmp_path, damaged, value_range=(0, 63))


@pytest.mark.parametrize(
    "content",
    [
        tiff(np.stack([RAMP] * 3, -1).astype("<u2"), PlanarConfiguration=2),
        tiff(UNIT.astype(">f4"), PlanarConfiguration=2, **TAGGED),
        tiff(RAMP.astype("u1"), PlanarConfiguration=2, PhotometricInterpretation=0),
        tiff(RAMP.astype("u1"), PlanarConfiguration=2, FillOrder=2),
        tiff(np.stack([RAMP] * 2, -1).astype("u1"), PlanarConfiguration=2, ExtraSamples=2, Compression=8),
        tiff(np.stack([RAMP] * 3, -1).astype("u1"), PlanarConfiguration=2, PhotometricInterpretation=8),
    ],
    ids=["16-bit", "big-float", "inverted", "reversed", "alpha", "lab"],
)
def test_planes_that_pillow_misreads_are_refused(tmp_path, content):
    """Check that 16-bit colours do not become 8-bit noise in silence, nor that grey with alpha becomes blank."""
    with pytest.raises(UnreadableImage, match="stored as planes.*which Pillow misreads.*store them interleaved"):
        read(tmp_path, content)


def test_a_palette_of_bytes_is_as_bright_as_one_of_16_bits(tmp_path):
    """Check that old scans do not become black: TIFF's palette has 16 bits, but some programs wrote 8."""
    colours = [255, 9, 0, 200]
    for factor in (1, 257):
        table = [colour * factor for colour in (*colours, *bytes(252))] + [0] * 512
        content = tiff((RAMP % 4).astype("u1"), PhotometricInterpretation=3, ColorMap=table)
        assert np.array_equal(read(tmp_path, content)[..., 0], np.array(colours)[RAMP % 4])


def test_damaged_pixels_of_a_png_are_not_taken_for_others(tmp_path):
    """Check a copy in which bytes were lost: Pillow skips the checksums and shows the rest shifted or in stripes."""
    intact = encoded(corners(), "PNG")
    start = intact.index(b"IDAT") + 4
    stored = zlib.decompress(intact[start : start + int.from_bytes(intact[start - 8 : start - 4], "big")])
    wrong = zlib.compress(stored.replace(b"\xff", b"\x7f"))
    damaged = intact[: start - 8] + struct.pack(">L", len(wrong)) + b"IDAT" + wrong + intact[-16:]
    with pytest.raises(UnreadableImage, match="a damaged PNG.*checksum"):
        read(tmp_path, damaged)
    whole = intact[: start - 8] + chunk(b"IDAT", wrong[:9]) + chunk(b"IDAT", wrong[9:]) + intact[-12:]
    assert read(tmp_path, whole).shape == (16, 32, 3)


@pytest.mark.parametrize("palette", [bytes((255, 0, 0, 0, 0, 255)), bytes((9, 9, 9, 99, 99, 99)), b""])
def test_what_the_first_frame_of_a_gif_leaves_free_shows_the_background(tmp_path, palette):
    """Check that an animation that starts with a part does not show the rest in the palette's first colour."""
    frame = Image.new("P", (3, 2), 1)
    frame.putpalette(palette or bytes(range(6)))
    small = encoded(frame, "GIF")
    canvas = small[:6] + struct.pack("<HH", 5, 2) + small[10:]
    inside, outside = read(tmp_path, canvas)[:, :3], read(tmp_path, canvas)[:, 3:]
    assert np.array_equal(inside, read(tmp_path, small)) and (outside == 255).all()
    with Image.open(io.BytesIO(canvas)) as image:
        assert np.array_equal(read(tmp_path, canvas, background="none"), image.convert("RGB"))


def test_premultiplied_grey_is_read_on_any_background(tmp_path):
    content = tiff(np.stack([RAMP, np.full((8, 8), 128)], -1).astype("u1"), ExtraSamples=1)
    assert np.abs(read(tmp_path, content, background="none")[..., 0] - RAMP * 255 / 128).max() <= 1
    assert np.abs(read(tmp_path, content, background="black")[..., 0] - RAMP).max() <= 1


def boxes(*inserted: tuple[bytes, bytes], image: Image.Image | None = None, bits: int = 8) -> bytes:
    """Return a JPEG 2000 file with further boxes in its header, which states `bits` per channel."""
    content = bytearray(encoded(image or corners(), "JPEG2000", mct=0))
    start, codestream = content.index(b"jp2h") - 4, content.index(b"\xff\x4f\xff\x51")
    content[content.index(b"ihdr") + 14] = bits - 1
    for component in range(len((image or corners()).getbands())):
        content[codestream + 42 + 3 * component] = bits - 1
    size, new = int.from_bytes(content[start : start + 4], "big"), b""
    for kind, body in inserted:
        new += struct.pack(">L4s", 8 + len(body), kind) + body
    head = struct.pack(">L", size + len(new)) + content[start + 4 : start + size]
    return bytes(content[:start] + head + new + content[start + size :])


def cdef(*channels: tuple[int, int, int]) -> tuple[bytes, bytes]:
    return b"cdef", struct.pack(">H", len(channels)) + b"".join(struct.pack(">HHH", *channel) for channel in channels)


def palette(*colours: tuple[int, int, int]) -> list[tuple[bytes, bytes]]:
    entries = struct.pack(">HB3B", len(colours), 3, 7, 7, 7) + b"".join(map(bytes, colours))
    return [(b"pclr", entries), (b"cmap", bytes((0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 2)))]


def indexed(*entries: tuple[int, int, int]) -> bytes:
    """Return a JPEG 2000 file whose pixels are the indices 0 and 1 of a palette."""
    content = boxes(*palette(*entries), image=Image.fromarray((RAMP % 2).astype("u1")))
    return content.replace(struct.pack(">4sBBBL", b"colr", 1, 0, 0, 17), struct.pack(">4sBBBL", b"colr", 1, 0, 0, 16))


def ended_early() -> bytes:
    """Return a JPEG that ends, in good form, after 80 % of its bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), "JPEG", quality=95)
    return content[: len(content) * 4 // 5] + b"\xff\xd9"


def short_in_tiff(image: Image.Image | None = None, compression: str = "jpeg") -> bytes:
    """Return a TIFF with one strip of 32 rows, of which its codes have those of the image, by default 16."""
    content = bytearray(encoded(image or corners(), "TIFF", compression=compression))
    start = int.from_bytes(content[4:8], "little") + 2
    for entry in range(start, start + 12 * int.from_bytes(content[start - 2 : start], "little"), 12):
        if int.from_bytes(content[entry : entry + 2], "little") in (257, 278):
            content[entry + 8 : entry + 10] = struct.pack("<H", 32)
    return bytes(content)


def scan(height: int = 64) -> Image.Image:
    """Return the upper part of a black bar on white paper, as a fax or a scan has it."""
    pixels = np.full((64, 64), 255, "u1")
    pixels[8:12, 16:40] = pixels[24:30, 20:60] = 0
    return Image.fromarray(pixels[:height]).convert("1")


def cropped_avif() -> bytes:
    """Return an AVIF that states that only its right half counts."""
    content = encoded(corners(), "AVIF")
    inserted = struct.pack(">L4s8L", 40, b"clap", 16, 1, 16, 1, 8, 1, 0, 1)
    end = content.index(b"ipma") - 4
    pixels = struct.pack(">L", content.index(b"mdat") + 4)
    content = content[:end] + inserted + content[end:]
    content = content.replace(pixels, struct.pack(">L", int.from_bytes(pixels, "big") + 40))
    for kind in (b"meta", b"iprp", b"ipco"):
        at = content.index(kind) - 4
        content = content[:at] + struct.pack(">L", int.from_bytes(content[at : at + 4], "big") + 40) + content[at + 4 :]
    return content


SLOPE = np.add.outer(2 * np.arange(64), np.arange(64)).astype("u1")
THREE, TWO = np.stack([RAMP] * 3, -1).astype("u1"), np.stack([RAMP] * 2, -1).astype("u1")
FOUR = np.stack([RAMP] * 4, -1).astype("u1")
CMYK = {"PhotometricInterpretation": 5}
YCC = {"PhotometricInterpretation": 6}
FULL = b"".join(b"\0" + bytes([200] * 8) for _ in range(8))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), "u1"))


def zeros_behind(content: bytes) -> bytes:
    """Replace the second half of a file's pixels, as in a copy that was interrupted."""
    if content[:2] == b"\xff\xd8":
        return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    with Image.open(io.BytesIO(content)) as image:
        start, size = image.tag_v2[273][0], image.tag_v2[279][0]
    return content[: start + size // 2] + bytes(size - size // 2) + content[start + size :]


def half_zeros(content: bytes) -> bytes:
    return content[: len(content) // 2] + bytes(len(content) - len(content) // 2)


def sticker(x: int) -> Image.Image:
    image = Image.new("RGBA", (32, 32))
    image.paste((230, 60, 40, 255), (x, 8, x + 16, 24))
    return image


def bmp_with_alpha() -> bytes:
    """Return a BMP of 8 x 8 transparent pixels of 16 bits, A1R5G5B5, as image editors write it."""
    head = struct.pack("<IiiHHIIiiII4I", 56, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0x7C00, 0x3E0, 0x1F, 0x8000)
    return struct.pack("<2sIHHI", b"BM", 14 + 56 + 128, 0, 0, 14 + 56) + head + struct.pack("<H", 0x7C00) * 64


RED = bytes((0, *(255, 0, 0) * 8)) * 8  # the rows of a PNG
RED_KEY = chunk(b"tRNS", b"\0\xff\0\0\0\0")


def png_with(colour_type: int, before: bytes = b"", pixels: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG of 8 x 8 pixels with further chunks before and after its pixels."""
    made = rows_of_png(pixels, 8, colour_type)
    start, end = made.index(b"IDAT") - 4, made.index(b"IEND") - 4
    return made[:start] + before + made[start:end] + after + made[end:]


def turned(orientation: int) -> bytes:
    return chunk(b"eXIf", struct.pack(">2sHLHHHLHHL", b"MM", 42, 8, 1, 274, 3, 1, orientation, 0, 0))


def mask_as_bmp() -> bytes:
    """Return a mask in 8 bits with a palette of black and white, as Pillow itself saves one of mode P."""
    mask = corners().convert("1").convert("L").point(lambda value: value // 255)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    return encoded(mask, "BMP")


def orientation_of_bytes() -> bytes:
    """Return a TIFF that is to be turned, but whose tag says so in a byte."""
    content = tiff(RAMP.astype("u1"), Orientation=6)
    return content.replace(struct.pack("<HHLL", 274, 4, 1, 6), struct.pack("<HHLL", 274, 1, 1, 6))


ANIMATED = {"save_all": True, "default_image": True, "append_images": [corners()] * 2}
MISREAD = {
    "no-photometric": (tiff(RAMP.astype("u1"), PhotometricInterpretation=None), "lacks.*PhotometricInterpretation"),
    "no-extra": (tiff(FOUR, PhotometricInterpretation=2), "fourth channel but lacks the tag ExtraSamples"),
    "bmp-a1r5g5b5": (bmp_with_alpha(), "a BMP of 16 bits per pixel with transparency"),
    "bmp-mask": (mask_as_bmp(), "a BMP of 8 bits per pixel with a palette of black and white"),
    "orientation-bytes": (orientation_of_bytes(), "its tag Orientation has the type of texts or bytes"),
    "two-channels": (tiff(TWO, ExtraSamples=0), "it has 2 channels, of which Pillow reads the first"),
    "ycc-default": (tiff(THREE, **YCC) + bytes(999), "YCbCrSubSampling=2,2, the default.*convert it"),
    "ycc-422": (tiff(THREE, **YCC, YCbCrSubSampling=[2, 1]) + bytes(999), "YCbCrSubSampling=2,1.*convert it"),
    "ycc-video": (
        tiff(THREE, **YCC, YCbCrSubSampling=[1, 1], ReferenceBlackWhite=[16, 235, 128, 240, 128, 240]),
        "ReferenceBlackWhite=16,235,128,240,128,240.*convert it",
    ),
    "ycc-709": (
        tiff(THREE, **YCC, YCbCrSubSampling=[1, 1], YCbCrCoefficients=[0.2126, 0.7152, 0.0722]),
        "YCbCrCoefficients=0.2126,0.7152,0.0722.*convert it",
    ),
    "rgb-video": (tiff(THREE, ReferenceBlackWhite=[16, 235] * 3), "ReferenceBlackWhite=16,235,.*convert it"),
    "dots": (tiff(FOUR, **CMYK, DotRange=[255, 0]), "DotRange=255,0.*convert it"),
    "inks": (tiff(FOUR, **CMYK, InkSet=2), "InkSet=2.*convert it"),
    "indexed": (tiff(RAMP.astype("u1"), Indexed=1), "Indexed=1.*convert it"),
    "short-palette": (tiff((RAMP % 4).astype("u1"), PhotometricInterpretation=3, ColorMap=[9] * 12), "ColorMap of 12"),
    "few-strips": (tiff(RAMP[:4].astype("u1"), RowsPerStrip=2), "1 strips instead of 2"),
    "no-sizes": (tiff(RAMP.astype("u1"), StripByteCounts=0), "the sizes of its strips are not stated"),
    "sparse": (sparse_tiff(), "a sparse TIFF"),
    "short-strip": (tiff(RAMP.astype("u1"), StripByteCounts=63), "number 0 has 7 rows instead of 8"),
    "short-jpeg-strip": (short_in_tiff(), "number 0 has 16 rows instead of 32"),
    "max-565": (tiff(THREE, MaxSampleValue=[31, 63, 31]), "MaxSampleValue=31,63,31.*same value.*convert it"),
    "max-premultiplied": (tiff(TWO, ExtraSamples=1, MaxSampleValue=[127, 255]), "MaxSampleValue.*premultiplied"),
    "max-exceeded": (tiff(RAMP.astype("u1"), MaxSampleValue=62), "value 63, but the header says that white is 62"),
    "max-exceeded-16": (tiff(RAMP.astype("<u2"), MaxSampleValue=60), "value 63, but the header says that white is 60"),
    "pgm-exceeded": (b"P5 8 8 # a comment\n62\n" + RAMP.astype("u1").tobytes(), "value 63, .* that white is 62"),
    "ppm-exceeded": (b"P6\n8 8\n300\n" + np.full((8, 8, 3), 301, ">u2").tobytes(), "value 301, .* that white is 300"),
    "ppm-crlf": (b"P6\r\n8 8\r\n255\r\n" + np.full((8, 8, 3), (200, 100, 0), "u1").tobytes(), "CR LF"),
    "pbm-crlf": (b"P4\r\n# a comment\n8 8\r\n" + bytes(range(8)), "CR LF"),
    "max-lab": (tiff(THREE, PhotometricInterpretation=8, MaxSampleValue=[127] * 3), "MaxSampleValue.*convert it"),
    "max-cmyk-16": (tiff(FOUR.astype("<u2"), **CMYK, MaxSampleValue=[63] * 4), "Pillow keeps only the upper 8 bits"),
    "jp2-5-bits": (boxes(bits=5), "5 bits per channel.*convert it"),
    "j2k-5-bits": (boxes(bits=5)[boxes().index(b"\xff\x4f\xff\x51") :], "5 bits per channel.*convert it"),
    "jp2-12-bits": (boxes(bits=12), "12 bits per channel in 3 channels"),  # Pillow made white of them black
    "jp2-bgr": (boxes(cdef((0, 0, 3), (1, 0, 2), (2, 0, 1))), "channels in another order"),
    "jp2-premultiplied": (
        boxes(image=corners().convert("RGBA")).replace(struct.pack(">HHH", 3, 1, 0), struct.pack(">HHH", 3, 2, 0)),
        "a further channel that is not.*transparency",
    ),
    "j2k-four": (encoded(corners().convert("RGBA"), "JPEG2000", no_jp2=True), "a further channel.*transparency"),
    "jp2-equal-colours": (indexed((9, 9, 9), (9, 9, 9), (80, 0, 0)), "a palette with equal entries"),
    "jp2-lab": (boxes().replace(struct.pack(">BBBL", 1, 0, 0, 16), struct.pack(">BBBL", 1, 0, 0, 14)), "colour space"),
    "j2k-few-tiles": (
        encoded(corners(), "JPEG2000", no_jp2=True, tile_size=(16, 16)).rpartition(b"\xff\x90\0\x0a")[0] + b"\xff\xd9",
        "it has 1 of 2 tiles",
    ),
    "png-few-rows": (rows_of_png(FULL[:45], 8, 0), "fewer rows"),
    "png-few-passes": (rows_of_png(b"\0\xc8\0\xc8\0\xc8\xc8", 8, 0, interlaced=True), "fewer rows"),
    "png-key-16": (rows_of_png(bytes(8 * 49), 16, 2, key=bytes(6)), r"16 bits.*\(tRNS\).*data.background=none"),
    "png-key-1": (rows_of_png(b"\0\x80" * 8, 1, 0, key=b"\1\0"), r"1 bit whose transparent colour \(tRNS\)"),
    "png-key-4": (rows_of_png(bytes(8 * 5), 4, 0, key=b"\0\x15"), r"4 bits whose transparent colour \(tRNS\)"),
    "png-key-early": (rows_of_png(bytes(8 * 9), 8, 3, key=b"\0"), r"\(tRNS\) precedes its palette"),
    "png-key-late": (png_with(2, pixels=RED, after=RED_KEY), r"\(tRNS\) follows its pixels"),
    "png-two-keys": (png_with(2, before=RED_KEY * 2, pixels=RED), "two chunks tRNS"),
    "png-two-exif": (png_with(2, before=turned(6) + turned(1), pixels=RED), "two chunks eXIf"),
    "apng-substitute": (encoded(Image.new("RGB", (32, 16)), "PNG", **ANIMATED), "an animation.*substitute"),
    "jpeg-ends": (ended_early(), "ends before its last pixels"),
    "jpeg-zeros": (zeros_behind(encoded(NOISE, "JPEG", quality=95)), "a JPEG that ends with zeros"),
    "fax-zeros": (zeros_behind(encoded(NOISE.convert("1"), "TIFF", compression="group4")), "strip 0 ends with zeros"),
    "fax-4-few-rows": (short_in_tiff(scan(20), "group4"), "strip 0 lacks rows"),
    "fax-3-few-rows": (short_in_tiff(scan(20), "group3"), "strip 0 lacks rows"),
    "deflate-zeros": (zeros_behind(tiff(SLOPE, Compression=8)), "strip 0 ends with zeros"),
    "jpeg-strip-zeros": (zeros_behind(encoded(NOISE, "TIFF", compression="jpeg")), "strip 0 ends with zeros"),
    "jp2-signed": (boxes().replace(b"\x07\x01\x01" * 3, b"\x87\x01\x01" * 3), "ihdr"),
    "j2k-signed": (
        encoded(corners(), "JPEG2000", no_jp2=True).replace(b"\x07\x01\x01" * 3, b"\x87\x01\x01" * 3),
        "signed numbers",
    ),
    "webp-part": (
        encoded(sticker(0), "WEBP", save_all=True, append_images=[sticker(8)], lossless=True),
        "a part of it",
    ),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["bits-first-to-last", "bits-last-to-first"])
@pytest.mark.parametrize("strip", [{}, {278: 16}, {292: 1}], ids=["one-strip", "strips-of-16", "two-dimensional"])
@pytest.mark.parametrize("group", ["group3", "group4"])
def test_whole_fax_codes_are_read(tmp_path, group, strip, reverse):
    for image in (scan(), NOISE.convert("1"), ImageOps.invert(scan()), scan(5)):
        order = {266: 2} if reverse else {}
        content = encoded(image, "TIFF", compression=group, tiffinfo=strip | order)
        assert np.array_equal(read(tmp_path, content), np.array(image.convert("RGB")))


def test_strips_of_fax_codes_below_the_image_are_ignored(tmp_path):
    content = bytearray(encoded(scan(), "TIFF", compression="group4", tiffinfo={278: 16}))
    content[content.index(struct.pack("<HHII", 257, 3, 1, 64)) + 8] = 20  # ImageLength
    assert np.array_equal(read(tmp_path, bytes(content)), np.array(scan(20).convert("RGB")))


# 16 x 24 greys with arithmetic codes, which Pillow cannot write; the lower two thirds are 128
ARITHMETIC_JPEG = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV04N+DBOVzjBOxO#D=08LWI;SPH#~b-T}fn-fSHz$fQ*WuwC2O0s@koJjL84X+V1uL|Noo8|NsB`|K|Pw`2"
    "WcO3kU!h01yEI5di<p00saM5C#9*00;pA002J#pEif>i+av~&Tg;NC_>rF(T*<Nf8@S(F2>&8c!mGj"
)


def flat_below(height: int, top: Image.Image) -> Image.Image:
    image = Image.new("RGB", (top.width, height), "white")
    image.paste(top)
    return image


def with_fill_bytes() -> bytes:
    """Return a JPEG with 0xFF before a restart marker and before its end, which any marker may have."""
    content = encoded(NOISE, "JPEG", restart_marker_rows=1)
    place = re.compile(rb"\xff\xd0").search(content, content.index(b"\xff\xda")).start()
    return content[:place] + b"\xff\xff" + content[place:-2] + b"\xff" + content[-2:]


def test_whole_files_that_look_as_if_cut_are_read(tmp_path):
    """Such files, a WebP with a flat lower half above all, were once refused as damaged."""
    rng = np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (80, 160, 3), dtype=np.uint8)).resize((1280, 640))
    noise = Image.fromarray(rng.integers(0, 256, (150, 300, 3), dtype=np.uint8))
    lossy = encoded(flat_below(1280, smooth), "WEBP")
    lossless = encoded(flat_below(300, noise), "WEBP", lossless=True, method=0, quality=44)
    black_end = rng.integers(0, 255, (80, 96), dtype=np.uint8)
    black_end[-1, -20:] = 0
    zstd = encoded(Image.fromarray(black_end), "TIFF", compression="zstd")
    assert not any(lossy[-64:]) and not any(lossless[-64:]) and bytes(16) in zstd
    for content in (lossy, lossless, zstd):
        assert np.array_equal(read(tmp_path, content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
    whole = encoded(NOISE, "JPEG", restart_marker_rows=1)
    assert np.array_equal(read(tmp_path, with_fill_bytes()), read(tmp_path, whole))
    grey_end = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    grey_end[24:] = 128
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        whole = encoded(Image.fromarray(grey_end), "JPEG", **options)
        assert np.array_equal(read(tmp_path, whole[:-2] + b"\xff\xff" + whole[-2:]), read(tmp_path, whole))
    assert read(tmp_path, ARITHMETIC_JPEG)[8:].tolist() == [[[128] * 3] * 16] * 16


# 4 x 4 greys of 12 bits, which Pillow cannot write
GREY_AVIF = base64.b85decode(
    "0000SW^{RQVRmU|00000VRmU|ZE0pPZE0a<0002#ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$lO0"
    "00310016oY;R)#0000)000310RR910RR924FCWDApigXC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000XlZbAZ~y=RNo"
    "jCnZvX%Q6lrsCWdHyG000001ONa41ONa44sdCBX#fBK009gD000bOb}>VNKzslI000wXZ)|dIV{CW;0ssO40)PMj02gU+ZD9Za00000009"
    "621OWnr1ONa4DQ#q7bP@mx1y}@sj-WCY5CDe@&G)-5ciy;@EZnhWtkuG$KY#"
)


def test_the_16_bits_of_a_pixel_of_a_bmp_are_not_those_of_a_channel():
    """A BMP of 5, 6 and 5 bits was refused in grey16."""
    head = struct.pack("<IiiHHIIiiII3I", 40, 8, 8, 1, 16, 3, 128, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    content = struct.pack("<2sIHHI", b"BM", 14 + 52 + 128, 0, 0, 14 + 52) + head + struct.pack("<H", 0xFFFF) * 64
    assert not is_16_bit(Image.open(io.BytesIO(content)))
    assert np.asarray(decode(Image.open(io.BytesIO(content)), Decoding(mode="grey16"))).tolist() == [[65535.0] * 8] * 8


@pytest.mark.skipif("AVIF" not in FORMATS, reason="Pillow without AVIF")
def test_grey16_refuses_an_avif_of_which_pillow_keeps_fewer_bits():
    for mode, keeps in (("grey", True), ("grey16", False)):
        image = open_image(io.BytesIO(GREY_AVIF), ("AVIF",))
        with contextlib.nullcontext() if keeps else pytest.raises(ValueError, match="an AVIF of more than 8 bits"):
            assert decode(image, Decoding(mode=mode)).getextrema() == (0, 255)


if "AVIF" in FORMATS:
    MISREAD["avif-zeros"] = (half_zeros(encoded(NOISE, "AVIF", quality=99)), "an AVIF whose pixels end with zeros")
    MISREAD["avif-crop"] = (cropped_avif(), r"a crop \(clap\).*convert it")


@pytest.mark.parametrize("content,reason", [pytest.param(*case, id=name) for name, case in MISREAD.items()])
def test_what_pillow_would_read_otherwise_is_refused_by_name(tmp_path, content, reason):
    """Check that odd files do not train as noise, negatives or half-black images, as Pillow decodes them in silence."""
    Image.open(io.BytesIO(content)).load()  # without a word
    with pytest.raises(UnreadableImage, match=reason):
        read(tmp_path, content)


def test_their_relatives_are_read(tmp_path):
    """Check that files that differ only in what is harmless, and whole files that end in black or grey, stay good."""
    ycc = np.asarray(Image.fromarray(THREE).convert("YCbCr"))
    stated = {"YCbCrSubSampling": [1, 1], "ReferenceBlackWhite": [0, 255, 128, 255, 128, 255]}
    for content in (
        tiff(ycc, **YCC, **stated, YCbCrCoefficients=[0.299, 0.587, 0.114]),
        tiff(np.concatenate([255 - THREE, 0 * FOUR[..., :1]], -1), **CMYK, InkSet=1, DotRange=[0, 255] * 4),
        tiff(THREE, RowsPerStrip=2**32 - 1),
        tiff(THREE, StripByteCounts=None),
    ):
        assert np.abs(read(tmp_path, content).astype(int) - THREE).max() <= 1
    for content in (boxes(), boxes(cdef((0, 0, 1), (1, 0, 2), (2, 0, 3)))):
        assert np.array_equal(read(tmp_path, content), corners())
    assert read(tmp_path, indexed((9, 9, 9), (80, 0, 0)))[0, :2, 0].tolist() == [9, 80]
    assert (read(tmp_path, rows_of_png(FULL[:63] + bytes(9), 8, 0))[6:, 0, 0] == [200, 0]).all()
    assert read(tmp_path, rows_of_png(bytes(8 * 49), 16, 2, key=bytes(6)), background="none").max() == 0
    grey = Image.new("RGB", (40, 40), (128, 128, 128))
    grey.paste(corners())
    for mode, options in (("RGB", {}), ("L", {}), ("RGB", {"progressive": True}), ("RGB", {"restart_marker_rows": 1})):
        content = encoded(grey.convert(mode), "JPEG", **options)
        assert np.array_equal(read(tmp_path, content), Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("background", ["white", "none"])
def test_the_largest_value_applies_to_alpha_and_inks(tmp_path, background):
    """Check that opaque pixels whose alpha ends at 127 do not become half transparent, nor inks of 100 % pale."""
    colours = np.stack([RAMP, 63 - RAMP, RAMP], -1)
    expected = colours * 255 / 63
    alpha = np.full((8, 8, 1), 127)
    content = tiff(
        np.concatenate([colours, alpha], -1).astype("u1"),
        PhotometricInterpretation=2,
        ExtraSamples=2,
        MaxSampleValue=[63, 63, 63, 127],
    )
    assert np.abs(read(tmp_path, content, background=background) - expected).max() <= 1
    inks = np.concatenate([63 - colours, 0 * alpha], -1).astype("u1")
    assert np.abs(read(tmp_path, tiff(inks, **CMYK, MaxSampleValue=[63] * 4)) - expected).max() <= 1


def test_verify_names_what_is_misread(in_process, tmp_path):
    root = make_image_folder(tmp_path / "images")
    names = ("no-photometric", "jp2-bgr", "png-few-rows", "png-key-16", "jpeg-ends")
    for name in names:
        (root / f"train/blue/{name}.png").write_bytes(MISREAD[name][0])
    out = in_process("dataset_tool", "verify", str(root), expect=1).stdout
    for name in names:
        assert re.search(rf"unreadable .*{name}\.png: .*{MISREAD[name][1]}", out)


def pages(*images: bytes) -> bytes:
    """Join TIFFs of little-endian byte order, each with one page that starts at byte 8, as one file."""
    joined = b""
    for left, content in zip(reversed(range(len(images))), images, strict=True):
        at, number = len(joined), int.from_bytes(content[8:10], "little")
        page, end = bytearray(content), 10 + 12 * number
        for entry in range(10, end, 12):
            tag, _, count, value = struct.unpack("<HHLL", page[entry : entry + 12])
            if count > 1 or tag == 273:
                page[entry + 8 : entry + 12] = struct.pack("<L", value + at)
        page[end : end + 4] = struct.pack("<L", (at + len(page) + 8) * (left > 0))
        joined += bytes(page)
    return joined


def test_the_thumbnail_of_a_raw_photo_is_not_taken_for_it(tmp_path):
    """Check that a camera's file of many megapixels is not trained on as a picture of a hundred pixels."""
    small, full = tiff(RAMP[:4].astype("u1"), NewSubfileType=1), tiff(RAMP.astype("u1"))
    mask, unknown = tiff(RAMP.astype("u1"), NewSubfileType=4), tiff(RAMP.astype("<f8"))
    assert np.array_equal(read(tmp_path, pages(small, mask, small, full)), read(tmp_path, full))
    assert read(tmp_path, small).shape == (4, 8, 3)  # it is all that there is
    for others in ((unknown,), (small,), [small] * 200 + [full]):
        with pytest.raises(UnreadableImage, match="first page is a thumbnail.*convert it"):
            read(tmp_path, pages(small, *others))
    with pytest.raises(UnreadableImage, match="first page is a thumbnail"):  # the photo is a sub-image, as in DNG
        read(tmp_path, tiff(RAMP[:4].astype("u1"), NewSubfileType=1, SubIFDs=8))


def test_a_bitmap_whose_fourth_byte_is_unused_is_opaque(tmp_path):
    """Check that screenshots do not become blank: many programs declare an alpha channel but leave it 0."""
    header = struct.pack("<LllHHLLllLL", 124, 2, -1, 1, 32, 3, 8, 0, 0, 0, 0)
    header = (header + struct.pack("<LLLL", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(124, b"\0")
    for alphas, second in (((0, 0), (7, 8, 9)), ((255, 0), (255, 255, 255))):
        pixels = bytes((3, 2, 1, alphas[0], 9, 8, 7, alphas[1]))
        content = b"BM" + struct.pack("<LHHL", 146, 0, 0, 138) + header + pixels
        assert read(tmp_path, content).tolist() == [[[1, 2, 3], list(second)]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("exif", [Image.Exif(), {282: 72.0}], ids=["alone", "beside-exif"])
def test_only_exif_turns_a_photo(tmp_path, kind, exif):
    """Check that data.exif alone decides: Pillow also takes the orientation from XMP, which editors leave outdated."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    tags = Image.Exif()
    tags.update(exif)
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": text}
    else:
        options = {"tiffinfo": {700: xmp}} if kind == "TIFF" else {"xmp": xmp}
    content = encoded(corners(), kind, exif=tags.tobytes(), **options)
    assert Image.open(io.BytesIO(content)).getexif()[ORIENTATION] == 6
    assert read(tmp_path, content).shape == (16, 32, 3)


def make_odd_folder(root: Path) -> Path:
    """Create an image folder with turned, transparent, float and 16-bit images."""
    make_image_folder(root)
    for number, path in enumerate(sorted(root.rglob("*.png"))):
        image = Image.open(path)
        if number % 4 == 0:
            path.write_bytes(with_orientation(image, "PNG", 6))
        elif number % 4 == 1:
            image.putalpha(image.getchannel("R"))
            image.save(path)
        elif number % 4 == 2:
            path.write_bytes(tiff(np.asarray(image.convert("L")).astype("<f4")))
        else:
            path.write_bytes(tiff(np.asarray(image.convert("L")).astype("<u2") * 16, MaxSampleValue=4095))
    return root


def forget_the_keys(run: Path) -> None:
    """Make a run's config look as it did before the keys of BEFORE existed."""

    def older(text: str) -> str:
        config = yaml.safe_load(text)
        for key in BEFORE:
            group, _, name = key.partition(".")
            del config[group][name]
        return yaml.safe_dump(config, sort_keys=False)

    (run / "config.yaml").write_text(older((run / "config.yaml").read_text()))
    content = last(run)
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    Checkpoints(run / "checkpoints", keep=0).save(content | {"config": older(content["config"])}, is_best=False)


def test_a_run_begun_before_goes_on_reading_as_it_began(in_process, tmp_path):
    """Check that an upgrade does not change the images in the middle of a run, nor those that its model is shown."""
    root = make_odd_folder(tmp_path / "images")
    keys = ("data=image_folder", f"data.root={root}", "data.image_size=16", "model.stem=conv_small")
    keys += (*SMALL_RUN, "data.num_workers=0", "trainer.epochs=1", "model.name=conv_resnet26")
    before = ("data.exif=ignore", "data.background=none", "data.clip_values=true")
    in_process("train", *keys, *before, "run_name=whole")
    in_process("train", *keys, *before, "run_name=part", "trainer.max_hours=1e-9", expect=75)
    runs = [tmp_path / "out" / name for name in ("whole", "part")]
    forget_the_keys(runs[1])
    in_process("train", *keys, "run_name=part")
    assert_same_run(*runs, checkpoints=("last",))
    forget_the_keys(runs[1])
    assert decoding_of(load_trained(runs[1]).config.data) == Decoding("none", "ignore", None, clip_values=True)
    assert load_config((runs[1] / "config.yaml").read_text(), ["data.exif=apply"]).data.exif == "apply"


def test_clipped_values_are_those_of_before(tmp_path):
    """Check the reading that old runs keep, against the code that they began with."""

    def as_before(image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")

    contents = [tiff((RAMP * 40 - 100).astype(kind)) for kind in ("<f4", "<i4", "<i2", "<u4")]
    contents += [tiff((RAMP * 65).astype("<u2"), MaxSampleValue=4095), *transparent_left().values()]
    for content in contents:
        expected = np.asarray(as_before(Image.open(io.BytesIO(content))))
        assert np.array_equal(read(tmp_path, content, background="none", exif="ignore", clip_values=True), expected)


def test_predictions_are_made_on_the_background_of_the_run(in_process, tmp_path, tiny_run):
    """Check that sasa-predict shows a transparent logo to the model as the run's config says."""
    rng = np.random.default_rng(0)
    logo = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))
    white = Image.new("RGBA", logo.size, "white")
    white.paste(logo, mask=logo)
    logo.save(tmp_path / "logo.png")
    for name, image in (("white", white), ("dropped", logo)):
        image.convert("RGB").save(tmp_path / f"{name}.png")

    def shares(name: str, *keys: str) -> list[str]:
        return (
            in_process("predict", str(tiny_run), f"{name}.png", "--format=csv", *keys)
            .stdout.splitlines()[1]
            .split(",")[1:]
        )

    assert shares("logo") == shares("white") != shares("dropped")
    assert shares("logo", "data.background=none") == shares("dropped")
