"""Check that any file is decoded into the right shape or refused as unreadable, without crashing or wasting memory.

For a longer search: FUZZ_EXAMPLES=10000 pytest -n 0 -s tests/test_fuzz_images.py. Example n is always the same.
"""

import multiprocessing
import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from making_data import encoded, one_image
from mutating import mutated
from PIL import Image

from sasa_train.data.datasets import UnreadableImage
from sasa_train.data.transforms import decode_box, fit, random_resized_box

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "300"))
SIZE = 72
MEMORY = 4 * 2**30  # bytes that an example may allocate; the largest allowed image takes 270 MB in RGB


def whole_files() -> dict[str, bytes]:
    """Return one file of each format with 37 x 29 pixels of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (29, 37, 3), dtype=np.uint8)
    image, deep = Image.fromarray(pixels), Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[274] = 6  # rotated by 90 degrees
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "jpeg": (image, "JPEG", {}),
        "progressive jpeg": (image, "JPEG", {"progressive": True, "exif": exif}),
        "cmyk jpeg": (image.convert("CMYK"), "JPEG", {}),
        "png": (image, "PNG", {}),
        "palette png": (image.convert("P"), "PNG", {"transparency": 3}),
        "16-bit png": (deep, "PNG", {}),
        "webp": (image, "WEBP", {}),
        "lossless webp": (image, "WEBP", {"lossless": True}),
        "tiff": (image, "TIFF", {}),
        "lzw tiff": (image, "TIFF", {"compression": "tiff_lzw"}),
        "jpeg tiff": (image, "TIFF", {"compression": "jpeg"}),
        "bmp": (image, "BMP", {}),
        "gif": (image.convert("P"), "GIF", {}),
        "ppm": (image, "PPM", {}),
    }
    return {name: encoded(picture, kind, **options) for name, (picture, kind, options) in kinds.items()}


def example(files: list[bytes], number: int) -> bytes:
    """Apply one to three changes to one of the files."""
    rng, data = random.Random(number), files[number % len(files)]
    for _ in range(rng.randint(1, 3)):
        data = mutated(data, rng, files)
    return data


def crop(image: Image.Image, number: int) -> np.ndarray:
    draws = np.random.default_rng(number).random(23)
    box = random_resized_box(*image.size, draws, (0.08, 1.0), (0.75, 1.3333))
    return np.asarray(decode_box(image, box, (SIZE, SIZE)))


def judge(path: str, number: int) -> str:
    """Read the file as for val (odd `number`) or training; return "decoded", "refused" or the unexpected result."""
    try:
        out = one_image(path).read(0, lambda image: fit(image, (SIZE, SIZE)) if number % 2 else crop(image, number))
    except UnreadableImage:
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    is_right = out.shape == (SIZE, SIZE, 3) and out.dtype == np.uint8
    return "decoded" if is_right else f"{out.dtype} {out.shape}"


def judge_all(path: str, results) -> None:
    """Send (number, verdict, seconds) for each example; runs in a separate process because a decoder may crash."""
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # suppresses libtiff's messages
    files = list(whole_files().values())
    for number in range(EXAMPLES):
        with open(path, "wb") as file:
            file.write(example(files, number))
        results.send((number, "crashed", 0.0))
        start = time.perf_counter()
        results.send((number, judge(path, number), time.perf_counter() - start))
    results.close()


def test_mutated_files_decode_or_are_refused(tmp_path):
    """A rare decoder error that is not handled as a bad image would end a long run because of one file in a million."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=judge_all, args=(str(tmp_path / "x.img"), sender))
    process.start()
    sender.close()
    verdicts, slowest = {}, (0.0, -1)
    while receiver.poll(None):
        try:
            number, verdict, seconds = receiver.recv()
        except EOFError:
            break
        verdicts[number] = verdict
        slowest = max(slowest, (seconds, number))
    process.join()
    wrong = {n: verdict for n, verdict in verdicts.items() if verdict not in ("decoded", "refused")}
    counts = Counter(verdicts.values())
    print(f"\n{counts['decoded']:,} decoded, {counts['refused']:,} refused; slowest: {slowest[1]}, {slowest[0]:.2f} s")
    assert not wrong and process.exitcode == 0, f"exit code {process.exitcode}; {wrong}"
    assert len(verdicts) == EXAMPLES and min(counts["decoded"], counts["refused"]) > EXAMPLES / 20


def test_whole_files_decode(tmp_path):
    for name, content in whole_files().items():
        (tmp_path / "x.img").write_bytes(content)
        assert [judge(str(tmp_path / "x.img"), number) for number in (0, 1)] == ["decoded"] * 2, name
