"""Open images, and refuse files that Pillow would decode to something else than they show, without a word."""

import math
import zlib
from numbers import Real
from typing import BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

# TIFF's tags
SUBFILE, BITS, PHOTOMETRIC, FILL_ORDER, MAX_SAMPLE, PLANAR, COLOUR_MAP = 254, 258, 262, 266, 281, 284, 320
OLD_SUBFILE, SUB_IFDS, SAMPLE_FORMAT, SMIN_SAMPLE, SMAX_SAMPLE = 255, 330, 339, 340, 341
# Values of PHOTOMETRIC, SAMPLE_FORMAT, PLANAR, FILL_ORDER and OLD_SUBFILE, and bits of SUBFILE
WHITE_IS_ZERO, SIGNED, IN_PLANES, REVERSED, OLD_REDUCED, REDUCED, MASK = 0, 2, 2, 2, 2, 1, 4
MAX_PAGES = 100  # of a file to look at; the time that Pillow takes grows with the square of their number
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_image(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Open an image without decoding it; of a raw photo, choose the page that is not a thumbnail.

    Raises:
        ValueError: the image has more than Image.MAX_IMAGE_PIXELS pixels, a PNG is damaged, or Pillow does not know a
            TIFF's kind of pixels or would misread them.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        assert limit is not None  # or Pillow would not check it
        raise ValueError(f"more than {2 * limit:,} pixels exceed the limit of {limit:,} (MAX_IMAGE_PIXELS)") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) not in TIFF_STARTS:
            raise
        raise ValueError(
            "a damaged TIFF, or one whose pixels Pillow cannot read, such as 64-bit floats or several channels of "
            "floats; convert it to 8 bits per channel"
        ) from error
    if image.format == "TIFF":
        _skip_thumbnails(image)
        _check_planes(image)
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {limit:,} (MAX_IMAGE_PIXELS)")
    if image.format == "PNG":
        _check_pixel_chunks(file)
    return image


def tags(image: Image.Image) -> dict[int, object]:
    """Return the tags of a TIFF's page; other images have none."""
    return getattr(image, "tag_v2", {})


def numbers(image: Image.Image, tag: int) -> list[float]:
    """Return the finite numbers of a TIFF's tag, one per channel or one for all."""
    value = tags(image).get(tag, ())
    found = value if isinstance(value, tuple) else (value,)
    return [float(n) for n in found if isinstance(n, Real) and math.isfinite(n)]


def _skip_thumbnails(image: Image.Image) -> None:
    """Go to the first page that is not a thumbnail; raw photos such as DNG begin with one."""
    reason: Exception | None = None
    for page in range(1, MAX_PAGES):
        skipped = REDUCED if page == 1 else REDUCED | MASK
        if not any(int(n) & skipped for n in numbers(image, SUBFILE)) and OLD_REDUCED not in numbers(
            image, OLD_SUBFILE
        ):
            return
        try:
            image.seek(page)
        except Exception as error:  # Pillow's plugins have no common base class
            if page == 1 and isinstance(error, EOFError) and SUB_IFDS not in tags(image):
                return  # it is the file's only image
            reason = error
            break
    raise ValueError(
        "its first page is a thumbnail, and Pillow cannot read the image itself; convert it, for example to PNG"
    ) from reason


def _check_planes(image: Image.Image) -> None:
    """Check that Pillow reads channels that are stored one after the other, as planes."""
    if IN_PLANES not in numbers(image, PLANAR):
        return
    assert isinstance(image, ImageFile.ImageFile)
    is_right = image.mode not in ("LA", "La", "PA", "LAB")  # their alpha would stay 0, their colours lack an offset
    if image.tile and image.tile[0].codec_name != "libtiff":
        # Pillow keeps one letter of its name for the layout, which loses the bits, their order and the inversion.
        bits = set(numbers(image, BITS)) or {1}
        as_named = bits == {8} or image.mode == "1" or (bits == {32} and getattr(tags(image), "prefix", b"") == b"II")
        is_inverted = image.mode in ("1", "L") and numbers(image, PHOTOMETRIC) in ([], [WHITE_IS_ZERO])
        is_right = is_right and as_named and not is_inverted and REVERSED not in numbers(image, FILL_ORDER)
    if not is_right:
        raise ValueError(
            "its channels are stored as planes (PlanarConfiguration=2), which Pillow misreads for this kind of pixels; "
            "store them interleaved (PlanarConfiguration=1)"
        )


def _check_pixel_chunks(file: BinaryIO) -> None:
    """Check the checksums of a PNG's IDAT chunks, which Pillow skips."""
    file.seek(0)
    content, start = memoryview(file.read()), 8
    while start + 12 <= len(content):
        end = start + 8 + int.from_bytes(content[start : start + 4], "big")
        stated = int.from_bytes(content[end : end + 4], "big")
        is_whole = end + 4 <= len(content)  # or decoding tells that the file is cut
        if is_whole and content[start + 4 : start + 8] == b"IDAT" and zlib.crc32(content[start + 4 : end]) != stated:
            raise ValueError("a damaged PNG: the checksum (CRC) of its pixels is wrong; replace the file")
        start = end + 4
