"""The checks that no pixels are missing from PNG and JPEG files, where Pillow makes up others in silence."""

import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

PIXELS = zlib.crc32(b"IDAT")  # the checksum begins with the chunk's kind
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by a PNG's colour type
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
# Some programs pad what is whole with zeros, too.
NOT_WHOLE = ", as one that was not copied whole; replace it or, if viewers show all of it, save it anew"
GREY = {127, 128}  # in all channels of a CMYK JPEG's pixels that are missing; Pillow inverts some
FILLER = b"\x5a\xa5\x3c\x96" * 4  # 16 bytes of codes, which would change missing pixels
SCAN, END, INTERVAL, BASELINE = 0xDA, 0xD9, 0xDD, (0xC0, 0xC1)
HUFFMAN = (0xC0, 0xC1, 0xC2, 0xC3)  # frames whose pixels have these codes, not arithmetic ones
RESTART = re.compile(rb"\xff([\xd0-\xd7])")  # numbered from 0 to 7, again and again
# In a JPEG's pixels, 0 or a restart follows 0xFF, of which any number may precede a marker.
NEXT = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)


def check_chunks(file: BinaryIO) -> None:
    """Check the checksums of a PNG's IDAT chunks, which Pillow skips, and what says how its pixels are shown."""
    bits, is_indexed, kinds = 8, False, set()
    for kind, content, stated in _chunks(file):
        if kind == b"IHDR" and len(content) >= 10:
            bits, is_indexed = content[8], content[9] == 3
        # Pillow and libpng, which viewers use, differ in what they make of these.
        if kind == b"tRNS" and is_indexed and b"PLTE" not in kinds:
            raise ValueError("a PNG whose transparency (tRNS) precedes its palette (PLTE); save it anew")
        if kind == b"tRNS" and b"IDAT" in kinds:
            raise ValueError("a PNG whose transparency (tRNS) follows its pixels; save it anew")
        if kind in (b"tRNS", b"eXIf") and kind in kinds:
            raise ValueError(f"a PNG with two chunks {kind.decode()}, of which viewers take the first; save it anew")
        if kind == b"tRNS" and not is_indexed and bits < 8 and int.from_bytes(content, "big") >= 2**bits:
            raise ValueError(
                f"a PNG of {bits} bit{'s' * (bits > 1)} whose transparent colour (tRNS) has more; save it anew"
            )
        is_whole = len(stated) == 4  # or decoding tells that the file is cut
        if kind == b"IDAT" and is_whole and zlib.crc32(content, PIXELS) != int.from_bytes(stated, "big"):
            raise ValueError("a damaged PNG: the checksum (CRC) of its pixels is wrong; replace the file")
        kinds.add(kind)


def check_end(file: BinaryIO) -> None:
    """Check that a JPEG ends with its end marker if the file ends with zeros, as one does that was not copied whole.

    The decoder takes such zeros for pixels.
    """
    file.seek(-2, io.SEEK_END)
    if file.read() != bytes(2):
        return
    file.seek(0)
    if END not in (marker for marker, _ in segments(file.read())):
        raise ValueError(f"a JPEG that ends with zeros{NOT_WHOLE}")


def check_restarts(file: BinaryIO) -> None:
    """Check that a JPEG which has restart markers, as many cameras write, has lost none: the decoder fills the gap."""
    file.seek(0)
    content = file.read()
    interval, num_blocks, num_channels = 0, 0, 0
    for marker, start in segments(content):
        if marker == INTERVAL:
            interval = int.from_bytes(content[start + 4 : start + 6], "big")
        elif marker in BASELINE:
            num_blocks, num_channels = _num_blocks(content[start + 4 :])
        elif marker == SCAN:
            if not interval:
                return
            found = NEXT.search(content, start + 2)
            data = content[start : found.start() if found else len(content)]
            numbers = [byte[0] & 7 for byte in RESTART.findall(data)]
            is_whole = content[start + 4] == num_channels  # or several scans share the blocks
            if any(n != i % 8 for i, n in enumerate(numbers)) or (
                is_whole and len(numbers) + 1 < -(-num_blocks // interval)
            ):
                raise ValueError("a damaged JPEG: pixels in its middle are missing (restart markers); replace the file")


def _num_blocks(frame: bytes) -> tuple[int, int]:
    """Return the number of blocks (MCUs) of a JPEG whose channels are all in one scan, and the number of channels."""
    height, width, count = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]
    factors = [frame[7 + 3 * i] for i in range(count)]
    across, down = (max(f >> 4 for f in factors), max(f & 15 for f in factors)) if count > 1 else (1, 1)
    return -(-width // (8 * across)) * -(-height // (8 * down)), count


def check_whole(file: BinaryIO, image: Image.Image) -> None:
    """Check that a decoded PNG or JPEG has all its pixels; look closer only if the last ones look as if missing.

    Raises:
        ValueError: pixels are missing, or those of a PGM or PPM exceed the maximum in its header.
    """
    if getattr(image, "tile", None) or not image.width or not image.height:
        return  # it was not decoded
    if image.format == "PNG" and _may_lack_rows(image) and _num_bytes(file) < _num_needed(file):
        raise ValueError("a damaged PNG: it has fewer rows of pixels than its header says; replace the file")
    if image.format == "PPM":
        _check_netpbm(file)
    if image.format in ("JPEG", "MPO") and _is_grey(image.getpixel((image.width - 1, image.height - 1))):
        _check_last_pixels(file)


def _check_netpbm(file: BinaryIO) -> None:
    """Check a binary PBM's, PGM's or PPM's header: that no pixel exceeds its maximum, and that it ends with one byte.

    Pillow clips such pixels, and takes the second byte of a Windows line end (CR LF) for a pixel's.
    """
    file.seek(0)
    content = file.read()
    # Magic number, width, height and, but of bits, the maximum, each after blanks and comments; one blank follows.
    number = rb"(?:\s+(?:#[^\n\r]*[\n\r]\s*)*(\d+))"
    if (header := re.match(rb"P4" + number * 2 + rb"\s", content)) is not None:
        most, count = 255, -(-int(header[1]) // 8) * int(header[2])
    elif (header := re.match(rb"P[56]" + number * 3 + rb"\s", content)) is not None:
        most, count = int(header[3]), int(header[1]) * int(header[2]) * (3 if content[1:2] == b"6" else 1)
    else:
        return
    kind, start = np.dtype(np.uint8 if most < 256 else ">u2"), header.end()
    if content[start - 1 : start + 1] == b"\r\n" and len(content) == start + 1 + count * kind.itemsize:
        raise ValueError(
            "its header ends with two bytes (CR LF) where the format has one; write it with \\n, or as PNG"
        )
    if most in (255, 65535):
        return
    pixels = np.frombuffer(content[start:][: count * kind.itemsize], kind)
    if pixels.size and (peak := int(pixels.max())) > most:
        raise ValueError(f"a pixel has the value {peak}, but the header says that white is {most}; mend the header")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, memoryview, memoryview]]:
    """Yield the kind of each chunk of a PNG, its content, and its checksum, which is shorter than 4 if it is cut."""
    file.seek(0)
    content, start = memoryview(file.read()), 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        yield bytes(content[start + 4 : start + 8]), content[start + 8 : end], content[end : end + 4]
        start = end + 4


def _may_lack_rows(image: Image.Image) -> bool:
    """Whether one of the last two rows is empty; the last rows that an interlaced file contains are the odd ones."""
    if image.height == 1 and "interlace" in image.info:
        return True
    return any(_is_empty(image, y) for y in range(max(0, image.height - 2), image.height))


def _is_empty(image: Image.Image, y: int) -> bool:
    first = image.getpixel((0, y))  # saves the time for most images
    if any(first) if isinstance(first, tuple) else first:
        return False
    return not any(image.crop((0, y, image.width, y + 1)).tobytes())


def _num_bytes(file: BinaryIO) -> int:
    """Count the inflated bytes of a PNG, without keeping them."""
    inflate, number = zlib.decompressobj(), 0
    for kind, content, _ in _chunks(file):
        left: bytes | memoryview = content if kind == b"IDAT" else b""
        while left:
            number += len(inflate.decompress(left, 2**20))
            left = inflate.unconsumed_tail
    return number + len(inflate.flush())


def _num_needed(file: BinaryIO) -> int:
    header = next(content for kind, content, _ in _chunks(file) if kind == b"IHDR")
    width, height = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
    bits = header[8] * CHANNELS[header[9]]
    number = 0
    for x, y, across, down in PASSES if header[12] else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // across), -((y - height) // down)
        number += max(rows, 0) * (1 + (columns * bits + 7) // 8) if columns > 0 else 0
    return number


def _is_grey(pixel: object) -> bool:
    return pixel in (128, (128, 128, 128)) or (isinstance(pixel, tuple) and len(pixel) == 4 and set(pixel) <= GREY)


def _check_last_pixels(file: BinaryIO) -> None:
    """Check that a JPEG's pixels do not depend on bytes that are put before its end, as missing ones would."""
    file.seek(0)
    content = file.read()
    markers = dict(reversed([*segments(content)]))
    if not any(frame in markers for frame in HUFFMAN):
        return  # arithmetic codes go on beyond the last of their bytes
    end = len(content[: markers.get(END)].rstrip(b"\xff"))  # fill bytes may precede a marker
    longer = content[:end] + FILLER + content[end:]
    with Image.open(io.BytesIO(content), formats=["JPEG"]) as stored:
        pixels = stored.tobytes()
    try:
        with Image.open(io.BytesIO(longer), formats=["JPEG"]) as other:
            is_whole = other.tobytes() == pixels
    except Exception:  # Pillow's decoders have no common base class
        is_whole = False
    if not is_whole:
        raise ValueError("a damaged JPEG: it ends before its last pixels; replace the file")


def segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of a JPEG, to the end of its first image, and where the marker is."""
    start = 2
    while start + 2 <= len(content) and content[start] == 0xFF:
        marker = content[start + 1]
        if marker == 0xFF:  # padding
            start += 1
            continue
        yield marker, start
        if marker == END:
            return
        start += 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        if marker == SCAN:
            found = NEXT.search(content, start)
            start = found.start() if found else len(content)
