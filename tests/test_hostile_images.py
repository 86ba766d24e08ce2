"""Check that malicious image files are quarantined quickly, using no more memory than a normal image requires."""

import os
import resource
import struct
import warnings
import zlib

import numpy as np
import pytest
from making_data import chunk, encoded, one_image
from PIL import Image

from sasa_train.data.datasets import FORMATS, UnreadableImage
from sasa_train.data.decoding import to_rgb
from sasa_train.data.transforms import fit

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n(%pipe%touch /tmp/owned) (w) file\n"


def png(width: int = 5, height: int = 3, before: bytes = b"", after: bytes = b"", data: bytes | None = None) -> bytes:
    rows = b"".join(b"\0" + bytes(3 * width) for _ in range(height)) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + body + after + chunk(b"IEND", b"")


def bmp_of_runs(codes: bytes, width: int, height: int) -> bytes:
    """Return a BMP of run lengths (RLE8) and two colours."""
    palette = bytes((0, 0, 0, 0, 0, 0, 255, 0))
    header = struct.pack("<LllHHLLllLL", 40, width, height, 1, 8, 1, len(codes), 0, 0, 2, 0)
    start = 14 + len(header) + len(palette)
    return struct.pack("<2sLHHL", b"BM", start + len(codes), 0, 0, start) + header + palette + codes


TEXT_BOMB = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(50_000_000)))


@pytest.mark.parametrize(
    "content,reason",
    [
        (EPS, "cannot identify"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "cannot identify image file: it is in HEIC; convert it"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a Git LFS pointer"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "it is a video"),
        (png(before=chunk(b"tEXt", b"key\0text")[:-4] + bytes(4)), "it is a PNG whose header or metadata are damaged"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(50), "it is a JPEG that is damaged at its beginning"),
        (bytes(128) + b"DICM" + bytes(50), "it is in DICOM; convert it"),
        (bytes(5000) + b"x", "cannot identify image file'"),
        (b"", "it is empty"),
        (bytes(5000), "it is empty, or zeros alone"),
        (encoded(Image.new("RGB", (5, 3)), "TGA"), "cannot identify"),
        (png(before=TEXT_BOMB), "too large"),
        (png(after=TEXT_BOMB), "too large"),
        (png(before=chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(50_000_000)))), "too large"),
        (bmp_of_runs(b"\x08\1\0\0\0\0\x08\1\0\0\0\1", 8, 3), "or, in a compressed BMP, empty rows"),
        (png(30_000, 30_000, data=b""), "more than 178,956,970 pixels exceed the limit of 89,478,485"),
        (png(10_000, 10_000, data=b""), "10000 x 10000 pixels exceed the limit of 89,478,485"),
        (png(700, 500)[:-300], "truncated|broken|not enough"),
        (png(7, 5, data=b"\0" * 20), "truncated|broken|not enough"),
    ],
    ids=[
        "eps",
        "heic",
        "html",
        "lfs",
        "video",
        "png-metadata",
        "jpeg-start",
        "dicom",
        "zeros-before",
        "empty",
        "zeros",
        "tga",
        "text-before",
        "text-after",
        "profile",
        "empty-row",
        "900-mpx",
        "100-mpx",
        "cut",
        "short",
    ],
)
def test_a_hostile_file_is_unreadable_and_says_why(tmp_path, content, reason):
    """Check that only known formats are opened: an EPS file named .jpg would otherwise be passed to Ghostscript."""
    (tmp_path / "x.jpg").write_bytes(content)
    with warnings.catch_warnings(), pytest.raises(UnreadableImage, match=reason):
        warnings.simplefilter("ignore")  # as outside pytest; see datasets.py
        one_image(tmp_path / "x.jpg").read(0, to_rgb)


def test_a_png_with_a_large_profile_or_history_is_read(tmp_path):
    """Image editors write such files; Pillow's limit is 1 MiB for each."""
    large = zlib.compress(os.urandom(1000) * 5000)
    whole = png(before=chunk(b"iCCP", b"key\0\0" + large), after=chunk(b"zTXt", b"key\0\0" + large))
    (tmp_path / "x.png").write_bytes(whole)
    assert one_image(tmp_path / "x.png").read(0, to_rgb).size == (5, 3)


def test_the_limit_of_pixels_is_pillows(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(png(7, 5))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with pytest.raises(UnreadableImage, match="7 x 5 pixels exceed the limit of 34"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_image(tmp_path / "x.png").read(0, to_rgb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert one_image(tmp_path / "x.png").read(0, to_rgb).size == (7, 5)


@pytest.mark.parametrize("name", [*FORMATS, "MPO"])
def test_formats_of_real_sets_are_read_under_any_name(tmp_path, name):
    """Check that formats are recognised by content: a camera's .jpg may be MPO, and one from the web may be PNG."""
    image = Image.new("RGB", (7, 5), (200, 10, 10))
    options = {"save_all": True, "append_images": [image]} if name == "MPO" else {}
    (tmp_path / "x.jpg").write_bytes(encoded(image, name, **options))
    assert one_image(tmp_path / "x.jpg").read(0, to_rgb).size == (7, 5)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_very_long_image_shows_its_middle_without_filling_memory(tmp_path, size):
    """Check that a long image is cropped first: resizing all of it would take 12 GB for a file of 200 bytes."""
    pixels = np.zeros((60_000, 1, 3), dtype=np.uint8)
    pixels[30_000:] = 255
    Image.fromarray(pixels if size[0] == 1 else pixels.transpose(1, 0, 2)).save(tmp_path / "x.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = one_image(tmp_path / "x.png").read(0, lambda image: fit(image, (224, 224)))
    assert out.shape == (224, 224, 3) and 100 < out.mean() < 155
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


JPEGS = [
    {"restart_marker_rows": 1}, {"restart_marker_blocks": 4}, {"restart_marker_blocks": 1}, {"restart_marker_rows": 99},
    {"restart_marker_rows": 2, "progressive": True}, {"restart_marker_blocks": 3, "subsampling": 0}, {},
]  # fmt: skip


@pytest.mark.parametrize("options", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_lost_pixels_in_its_middle_is_refused(tmp_path, options, mode):
    """The decoder fills what restart markers leave out with grey, as where a disk's bad sectors were replaced."""
    y, x = np.mgrid[0:161, 0:193]
    pixels = np.stack([x * 255 // 193, y * 255 // 161, (x ^ y) & 255], -1).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.jpg", quality=90, **options)
    assert one_image(tmp_path / "x.jpg").read(0, to_rgb).size == (193, 161)
    if options.get("restart_marker_rows", 0) > 1 or not options:
        return  # it has none, or is progressive: the scans that are left may make up for one that is lost
    whole = (tmp_path / "x.jpg").read_bytes()
    begin, end = len(whole) * 2 // 5, len(whole) * 3 // 5
    for filler in (b"", bytes(end - begin), b"\xff" * (end - begin)):
        (tmp_path / "x.jpg").write_bytes(whole[:begin] + filler + whole[end:])
        with pytest.raises(UnreadableImage):
            one_image(tmp_path / "x.jpg").read(0, to_rgb)


def test_pipes_and_devices_are_no_one_image(tmp_path, monkeypatch):
    """Check that pipes are refused, because opening one would block the run until something writes to it."""
    monkeypatch.setattr("sasa_train.data.datasets.PAUSES", ())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(UnreadableImage, match="is not a regular file"):
            one_image(tmp_path / name).read(0, to_rgb)
