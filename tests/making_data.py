"""Create valid and damaged images and data sets for tests, and read batches from them."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sasa_train.config.compose import compose_config
from sasa_train.data.datasets import Files, ImageSet
from sasa_train.data.loader import build_loaders
from sasa_train.data.plan import BatchPlan

CPU = torch.device("cpu")


def config_for(*overrides: str):
    return compose_config(["data=digits", "trainer.global_batch_size=32", *overrides])


def batches(config, epoch=0, first_step=0):
    loaders = build_loaders(config, CPU)
    found = [(images.clone(), labels.clone()) for images, labels in loaders.train.train_batches(epoch, first_step)]
    loaders.close()
    return found


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for (images, labels), (other_images, other_labels) in zip(one, other, strict=True):
        assert torch.equal(labels, other_labels) and torch.equal(images, other_images)


# Overrides for a run on such a folder; the run takes a few seconds.
SMALL_RUN = (
    "model.width=0.125", "model.num_heads=2", "model.kernel_size=3", "trainer.global_batch_size=4", "output_dir=out",
    "trainer.epochs=2", "run_name=bad", "trainer.log_every_steps=1",
)  # fmt: skip


def make_image_folder(root: Path, size: tuple[int, int] = (19, 17)) -> Path:
    rng = np.random.default_rng(0)
    for split, counts in (("train", (11, 7)), ("val", (3, 5))):
        for label, name in enumerate(("blue", "red")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(counts[label]):
                pixels = rng.integers(0, 80, (size[1], size[0], 3), dtype=np.uint8)
                pixels[..., 0 if name == "red" else 2] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def make_ten_classes(root: Path, num_train: int = 1) -> Path:
    """Create class folders as CIFAR-10's, with `num_train` images per class in train/ and one in test/."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", 1)):
        for name in "abcdefghij":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def spoil(folder: Path) -> None:
    """Add an intact file and one file per common defect; the last two files are readable, but not in RGB mode."""
    noise = Image.effect_noise((40, 30), 80)
    noise.convert("RGB").save(folder / "a-whole.jpg")
    content = (folder / "a-whole.jpg").read_bytes()
    (folder / "b-truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "c-empty.jpg").write_bytes(b"")
    (folder / "d-text.jpg").write_text("this is no image")
    noise.convert("CMYK").save(folder / "e-cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 1200, dtype=np.uint16).reshape(30, 40)).save(folder / "f-16-bit.png")


BAD = ("b-truncated.jpg", "c-empty.jpg", "d-text.jpg")


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Return the image encoded in the format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rows_of_png(rows: bytes, bits: int, colour_type: int, interlaced: bool = False, key: bytes = b"") -> bytes:
    """Return a PNG of 8 x 8 pixels with these filtered rows, which may be too few."""
    header = chunk(b"IHDR", struct.pack(">LLBBBBB", 8, 8, bits, colour_type, 0, 0, interlaced))
    header += chunk(b"tRNS", key) if key else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tar_of(files: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar archive that contains the given (name, bytes) files in this order."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def tar_header(name: str, kind: bytes, size: bytes) -> bytes:
    """Return a tar header with a valid checksum whose field for the size contains `size`."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = size.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Fill up the last block of a member in a tar archive."""
    return data + bytes(-len(data) % 512)


def pax_record(field: bytes, length: int | None = None) -> bytes:
    """Return a record of a pax header, which begins with its own length or with another one."""
    true_length = len(field) + 3
    while len(b"%d %s\n" % (true_length, field)) != true_length:
        true_length += 1
    return b"%d %s\n" % (true_length if length is None else length, field)


def pax_header(*fields: bytes) -> bytes:
    """Return a pax header with KEY=VALUE fields for the member after it."""
    records = b"".join(map(pax_record, fields))
    return tar_header("x", tarfile.XHDTYPE, b"%011o" % len(records)) + padded(records)


def one_image(path: Path | str) -> ImageSet:
    return ImageSet(["a"], np.zeros(1, dtype=np.int64), np.arange(1), Files([str(path)]))


class Reader:
    """Reads micro-batches of 5 from 35 images; the worker calls `accident()` before it reads the second micro-batch."""

    def __init__(self, accident: Callable[[], object]):
        names = [f"{chr(97 + i % 26)}{i}\n.png" for i in range(35)]
        self.images = ImageSet(["a"], np.zeros(35, dtype=np.int64), np.arange(35), Files(names))
        self.accident = accident

    def __call__(self, micro):
        if micro.indices[0] == 5:
            self.accident()
        return torch.from_numpy(micro.indices + 100)


def keys():
    return BatchPlan(0, 35, 5, 1).all()
