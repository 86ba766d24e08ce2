"""Open images, and refuse files that Pillow would decode to something else than they show, without a word."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from sasa_train.data import tiff
from sasa_train.data.jpeg2000 import boxes_of, check_jpeg2000
from sasa_train.data.whole import NOT_WHOLE, check_chunks, check_end, check_restarts

NUM_ZEROS = 64  # at the end of an AVIF's pixels, which no encoder writes; those of WebP do
# What files often are that are named as images but are none that Pillow knows, by the expression that they begin with.
OTHERS = (
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "in HEIC; convert it to JPEG or PNG"),
    (rb"(\xff\x0a|....JXL )", "in JPEG XL; convert it to JPEG or PNG"),
    (rb"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (rb"\s*<(!DOCTYPE html|html)", "a web page; download the image again"),
    (rb"....ftyp(qt  |isom|iso2|mp4|avc1|M4V|dash)", "a video; save the frame that counts as an image"),
    (rb"\x89PNG\r\n", "a PNG whose header or metadata are damaged; save it again with another program"),
    (
        rb"\xff\xd8\xff",
        "a JPEG that is damaged at its beginning, or of a rare kind; save it again with another program",
    ),
    (rb".{128}DICM", "in DICOM; convert it to PNG, whose 16 bits keep its greys"),
)
# PNGs of image editors may have larger colour profiles and histories than the 1 MiB that Pillow lets them have.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 16 * 2**20)
DEEP_AVIF = "sasa_train: more than 8 bits"  # key of an AVIF's `info`


def open_image(file: BinaryIO, formats: tuple[str, ...]) -> Image.Image:
    """Open an image without decoding it; of a raw photo, choose the page that is not a thumbnail.

    Raises:
        ValueError: the image has more than Image.MAX_IMAGE_PIXELS pixels, is damaged, or Pillow does not know its kind
            of pixels or would misread them.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        assert limit is not None  # or Pillow would not check it
        raise ValueError(f"more than {2 * limit:,} pixels exceed the limit of {limit:,} (MAX_IMAGE_PIXELS)") from error
    except UnidentifiedImageError as error:
        file.seek(0)
        start = file.read(132)
        if not any(start) and not any(file.read()):
            raise ValueError("cannot identify image file: it is empty, or zeros alone; copy it again") from error
        if (what := next((what for begins, what in OTHERS if re.match(begins, start, re.DOTALL)), None)) is not None:
            raise ValueError(f"cannot identify image file: it is {what}") from error
        if start[:4] not in tiff.STARTS:
            raise
        raise ValueError(
            "a damaged TIFF, or one whose pixels Pillow cannot read, such as 64-bit floats, several channels of "
            "floats, or channels without PhotometricInterpretation; convert it to 8 bits per channel"
        ) from error
    if image.format == "TIFF":
        tiff.skip_thumbnails(image)
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {limit:,} (MAX_IMAGE_PIXELS)")
    _check(file, image)
    return image


def _check(file: BinaryIO, image: Image.Image) -> None:
    """Check what Pillow ignores in the header of each format."""
    if image.format == "TIFF":
        tiff.check_page(file, image)
    elif image.format == "PNG":
        if getattr(image, "default_image", False):
            raise ValueError(
                "an animation (APNG) whose first image is not part of it, but a substitute that viewers do not show; "
                "save the frame that counts as a PNG"
            )
        check_chunks(file)
    elif image.format in ("JPEG", "MPO"):
        check_end(file)
        check_restarts(file)
    elif image.format == "JPEG2000":
        check_jpeg2000(file)
    elif image.format == "WEBP":
        if image.mode == "RGB" and _is_partly_covered(file):
            raise ValueError(
                "an animation (WebP) whose first frame covers a part of it; Pillow makes the rest black instead of "
                "transparent; save the frame as a PNG"
            )
    elif image.format == "AVIF":
        properties = _properties(file)
        if b"clap" in dict(properties):
            raise ValueError("an AVIF with a crop (clap), which Pillow ignores; convert it, for example to PNG")
        file.seek(0)
        if any(kind == b"mdat" and _ends_with_zeros(box) for kind, box in boxes_of(memoryview(file.read()))):
            raise ValueError(f"an AVIF whose pixels end with zeros{NOT_WHOLE}")
        image.info[DEEP_AVIF] = any(kind == b"av1C" and len(box) > 2 and box[2] & 0x40 for kind, box in properties)
    elif image.format == "GIF" and _has_grey_palette_beside_another(file):
        raise ValueError(
            "a GIF whose first frame has a grey palette beside the file's coloured one, which Pillow takes; save the "
            "frame as a PNG"
        )
    elif image.format == "BMP":
        assert isinstance(image, ImageFile.ImageFile)
        if image.tile[0].codec_name == "bmp_rle" and image.tile[0].offset % 2:
            raise ValueError(
                "a compressed BMP whose pixels begin at an odd byte, which Pillow misreads; convert it to PNG"
            )
        # Pillow takes such pixels for single bits.
        if image.mode == "1" and (bits := _bits_of_bmp(file)) != 1:
            raise ValueError(
                f"a BMP of {bits} bits per pixel with a palette of black and white, which Pillow misreads; "
                "convert it to PNG"
            )
        if _has_alpha_of_16_bits(file):
            raise ValueError("a BMP of 16 bits per pixel with transparency, which Pillow ignores; convert it to PNG")


def _bits_of_bmp(file: BinaryIO) -> int:
    """Return the bits per pixel that a BMP's header states."""
    file.seek(14)
    header = file.read(16)
    place = 10 if header[0] == 12 else 14  # the header of OS/2 is shorter
    return int.from_bytes(header[place : place + 2], "little")


def _has_alpha_of_16_bits(file: BinaryIO) -> bool:
    """Whether a BMP of 16 bits per pixel has a mask for transparency: A1R5G5B5, for example."""
    file.seek(14)
    header = file.read(56)
    size, bits, compression = (int.from_bytes(header[i : i + n], "little") for i, n in ((0, 4), (14, 2), (16, 4)))
    return size >= 56 and bits == 16 and compression in (3, 6) and any(header[52:56])


def _ends_with_zeros(codes: memoryview) -> bool:
    """Whether compressed pixels end with zeros, as in a file that was not copied whole."""
    return len(codes) > 4 * NUM_ZEROS and not any(codes[-NUM_ZEROS:])


def _chunks_of_webp(file: BinaryIO) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the kind and the content of each chunk of a WebP."""
    file.seek(0)
    content, place = memoryview(file.read()), 12
    while place + 8 <= len(content):
        size = int.from_bytes(content[place + 4 : place + 8], "little")
        yield bytes(content[place : place + 4]), content[place + 8 : place + 8 + size]
        place += 8 + size + size % 2


def _properties(file: BinaryIO) -> list[tuple[bytes, memoryview]]:
    """Return the properties, by kind, that an AVIF's images have."""
    file.seek(0)
    content = memoryview(file.read())
    for name, version in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0)):
        content = next((box[version:] for kind, box in boxes_of(content) if kind == name), content[:0])
    return list(boxes_of(content))


def _has_grey_palette_beside_another(file: BinaryIO) -> bool:
    """Whether a GIF has a palette, but its first frame another one in which colour i is the grey i."""
    file.seek(0)
    content = file.read()

    def palette(flags: int, start: int) -> bytes:
        return content[start : start + 3 * 2 ** ((flags & 7) + 1)] if flags & 0x80 else b""

    of_file = palette(content[10], 13)
    place = 13 + len(of_file)
    while content[place : place + 1] == b"!":  # an extension: its kind, and blocks that begin with their size
        place += 2
        while size := content[place]:
            place += 1 + size
        place += 1
    of_frame = palette(content[place + 9], place + 10)
    is_grey = of_frame == bytes(i // 3 for i in range(len(of_frame)))
    return bool(of_file and of_frame) and is_grey and of_frame != of_file


def _is_partly_covered(file: BinaryIO) -> bool:
    """Whether the first frame of an animated WebP is smaller than the image."""
    file.seek(0)
    content = file.read()
    frame, start = content.find(b"ANMF"), content.find(b"VP8X")
    if start != 12 or frame < 0:
        return False
    # Both state the width and the height less 1 as three bytes each, the frame after its place.
    return content[start + 12 : start + 18] != content[frame + 14 : frame + 20]
