"""The check that no rows are missing from scans in fax codes (TIFF's groups 3 and 4)."""

import io
import re
import struct

from PIL import Image

GROUPS = {"group3": 3, "group4": 4}  # by Pillow's name of the compression
END = re.compile(r"(?:0{11,}11?)+0*$")  # marks of the end: lines without codes, or a block (EOFB)
MOST = 64  # bytes that the marks of the end may have


def has_rows(codes: bytes, group: int, options: int, width: int, rows: int) -> bool:
    """Whether a strip of fax codes has all its rows.

    Codes do not say how many rows they hold, and the decoder leaves the rows that they lack black without a word. So
    the strip is decoded once more with its codes written twice: that changes the image only if rows are missing.

    Args:
        codes: bytes whose first bit is the highest.
        group: 3 or 4.
        options: TIFF's T4Options of group 3.
        width, rows: of the strip, in pixels.
    """
    tail = "".join(f"{byte:08b}" for byte in codes[-MOST:])
    end = END.search(tail)
    dropped = len(tail) - end.start() if end else 0
    kept = 8 * len(codes) - dropped
    value = (int.from_bytes(codes) >> dropped << 8 * len(codes)) | int.from_bytes(codes)
    size = kept + 8 * len(codes)
    twice = (value << -size % 8).to_bytes(-(-size // 8))
    try:
        return _decoded(codes, group, options, width, rows) == _decoded(twice, group, options, width, rows)
    except OSError:
        return False


def _decoded(codes: bytes, group: int, options: int, width: int, rows: int) -> bytes:
    """Return the pixels of a TIFF of one strip."""
    entries = [(256, width), (257, rows), (258, 1), (259, group), (262, 0), (273, 0), (277, 1), (278, rows)]
    entries += [(279, len(codes)), (292 if group == 3 else 293, options)]
    start = 8 + 2 + 12 * len(entries) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else n) for tag, n in entries)
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    with Image.open(io.BytesIO(header + directory + bytes(4) + codes)) as image:
        return image.tobytes()
