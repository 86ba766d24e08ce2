"""The check that Pillow reads a JPEG 2000 file as its header means it."""

import math
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

SIGNATURE = b"\0\0\0\x0cjP  \r\n\x87\n"
GREY, SRGB, SYCC, CMYK = 17, 16, 18, 12  # enumerated colour spaces
COLOURS = {GREY: 1, SRGB: 3, SYCC: 3, CMYK: 4}
OF_PROFILES = {b"GRAY": GREY, b"RGB ": SRGB, b"CMYK": CMYK}
ALPHA = (1, 0)  # a channel's type and association in the box cdef
SIGNED = 0x80  # in a component's depth
START_OF_TILE = b"\xff\x90"


class Siz(NamedTuple):
    """The codestream's size [pixels], its number of tiles, and the depth and sampling of each component."""

    width: int
    height: int
    num_tiles: int
    depths: list[int]
    sampling: list[tuple[int, int]]


def check_jpeg2000(file: BinaryIO) -> None:
    """Check that Pillow reads the components as the header means them: it has OpenJPEG ignore most of the boxes.

    Raises:
        ValueError: the depth, palette, order or meaning of components is not what Pillow takes it for, or tiles are
            missing.
    """
    file.seek(0)
    content = memoryview(file.read())
    boxes: dict[bytes, memoryview] = {}
    if content[:12] == SIGNATURE:
        outer = list(boxes_of(content))
        header = next((box for kind, box in outer if kind == b"jp2h"), content[:0])
        for kind, box in boxes_of(header):
            boxes.setdefault(kind, box)
        codestream = next((box for kind, box in outer if kind == b"jp2c"), content[:0])
    else:
        codestream = content
    try:
        siz = _siz(codestream)
        fault = _fault(boxes, siz) if boxes else _fault_of_components(siz, None, {})
    except (struct.error, IndexError) as error:
        raise ValueError("a damaged JPEG 2000 file: its header is cut; replace the file") from error
    if fault:
        raise ValueError(f"a JPEG 2000 file with {fault}, which Pillow misreads; convert it, for example to PNG")
    found = len(set(_tiles(codestream)))
    if found < siz.num_tiles:
        raise ValueError(f"a damaged JPEG 2000 file: it has {found} of {siz.num_tiles} tiles; replace the file")


def boxes_of(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the content of each box, of which JPEG 2000 and AVIF files consist."""
    start = 0
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        head = 8
        if size == 1 and start + 16 <= len(content):
            (size,), head = struct.unpack_from(">Q", content, start + 8), 16
        end = len(content) if size == 0 else start + size
        if end < start + head:
            return
        yield kind, content[start + head : end]
        start = end


def _siz(codestream: memoryview) -> Siz:
    x1, y1, x0, y0, width, height, left, top, count = struct.unpack_from(">8IH", codestream, 8)
    parts = [codestream[42 + 3 * i : 45 + 3 * i] for i in range(count)]
    num_tiles = math.ceil((x1 - left) / max(width, 1)) * math.ceil((y1 - top) / max(height, 1))
    return Siz(x1 - x0, y1 - y0, num_tiles, [p[0] for p in parts], [(p[1], p[2]) for p in parts])


def _fault(boxes: dict[bytes, memoryview], siz: Siz) -> str | None:
    """Return what Pillow would misread in a file with a header, or None."""
    height, width, count, depth = struct.unpack_from(">IIHB", boxes[b"ihdr"])
    if (width, height, count) != (siz.width, siz.height, len(siz.depths)) or set(siz.depths) != {depth}:
        return "a header (ihdr) that differs from the pixels' sizes or depths"
    space = _space(boxes.get(b"colr"))
    if space is None:
        return "a colour space other than sRGB, grey, sYCC and CMYK (colr)"
    meanings = boxes.get(b"cdef", memoryview(b""))
    listed = struct.unpack_from(f">{(len(meanings) - 2) // 6 * 3}H", meanings, 2) if len(meanings) > 2 else ()
    channels = {listed[i]: (listed[i + 1], listed[i + 2]) for i in range(0, len(listed), 3)}
    if b"pclr" in boxes:
        return _fault_of_palette(boxes, siz, space, channels)
    return _fault_of_components(siz, space, channels)


def _space(box: memoryview | None) -> int | None:
    """Return the enumerated colour space, or the one that an ICC profile is for; None if it is another."""
    if box is None or len(box) < 7:
        return None
    if box[0] == 1:
        space = int.from_bytes(box[3:7], "big")
        return space if space in COLOURS else None
    return OF_PROFILES.get(bytes(box[19:23])) if box[0] == 2 else None


def _fault_of_components(siz: Siz, space: int | None, channels: dict[int, tuple[int, int]]) -> str | None:
    count = len(siz.depths)
    depths = {(depth & ~SIGNED) + 1 for depth in siz.depths}
    if len(set(siz.depths)) != 1 or not 8 <= min(depths) <= 16:
        return f"{', '.join(map(str, sorted(depths)))} bits per channel"
    if max(depths) > 8 and count > 1:
        # Pillow rounds such colours to 8 bits, and white to 256, of which it keeps 0.
        return f"{max(depths)} bits per channel in {count} channels"
    if siz.depths[0] & SIGNED:
        return "signed numbers"
    if siz.sampling[0] != (1, 1) or (set(siz.sampling) != {(1, 1)} and count != 3):
        return "subsampled channels"
    colours = COLOURS[space] if space else min(count, 3) if count != 2 else 1
    return _fault_of_channels(count, colours, channels)


def _fault_of_channels(count: int, colours: int, channels: dict[int, tuple[int, int]]) -> str | None:
    if count not in (colours, colours + 1):
        return f"{count} channels"
    if any(channels.get(i, (0, i + 1)) != (0, i + 1) for i in range(colours)):
        return "channels in another order (cdef)"
    if count > colours and (channels.get(colours) != ALPHA or colours == COLOURS[CMYK]):
        return "a further channel that is not, or not known to be, plain transparency (cdef)"
    return None


def _fault_of_palette(
    boxes: dict[bytes, memoryview], siz: Siz, space: int, channels: dict[int, tuple[int, int]]
) -> str | None:
    num_entries, columns = struct.unpack_from(">HB", boxes[b"pclr"])
    depths, values = boxes[b"pclr"][3 : 3 + columns], bytes(boxes[b"pclr"][3 + columns :])
    entries = {values[i : i + columns] for i in range(0, columns * num_entries, columns)}
    mapped = b"".join(struct.pack(">HBB", 0, 1, i) for i in range(columns))
    order = list(boxes)
    if siz.depths != [7] or siz.sampling != [(1, 1)] or set(depths) != {7}:
        return "a palette (pclr) that does not have 8 bits"
    if space != SRGB or bytes(boxes.get(b"cmap", b"")) != mapped or order.index(b"ihdr") > order.index(b"pclr"):
        return "an unusual palette (pclr, cmap)"
    if len(entries) != num_entries:
        return "a palette with equal entries (pclr)"
    return _fault_of_channels(columns, COLOURS[space], channels)


def _tiles(codestream: memoryview) -> Iterator[int]:
    """Yield the tile that each tile part belongs to."""
    start = 2
    while start + 12 <= len(codestream):
        if codestream[start : start + 2] != START_OF_TILE:
            start += 2 + int.from_bytes(codestream[start + 2 : start + 4], "big")
            continue
        tile, size = struct.unpack_from(">HI", codestream, start + 4)
        yield tile
        if size < 12:  # 0: the part extends to the end
            return
        start += size
