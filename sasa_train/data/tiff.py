"""TIFF's tags, and the check that Pillow reads a page as its tags mean it."""

import io
import math
import struct
from numbers import Real
from typing import BinaryIO

from PIL import Image, ImageFile

from sasa_train.data import fax
from sasa_train.data.whole import NOT_WHOLE, segments

SUBFILE, WIDTH, LENGTH, BITS, PHOTOMETRIC, FILL_ORDER, STRIP_OFFSETS, CHANNELS = 254, 256, 257, 258, 262, 266, 273, 277
ROWS_PER_STRIP, STRIP_BYTES, MAX_SAMPLE, PLANAR, COLOUR_MAP, TILE_WIDTH, TILE_LENGTH = 278, 279, 281, 284, 320, 322, 323
TILE_OFFSETS, TILE_BYTES, SUB_IFDS, DOT_RANGE, EXTRA_SAMPLES, SAMPLE_FORMAT = 324, 325, 330, 336, 338, 339
DESCRIPTION, OLD_SUBFILE, FAX_OPTIONS = 270, 255, 292
SMIN_SAMPLE, SMAX_SAMPLE, COEFFICIENTS, SUBSAMPLING, REFERENCE = 340, 341, 529, 530, 532
# Values of PHOTOMETRIC, SAMPLE_FORMAT, PLANAR, FILL_ORDER, EXTRA_SAMPLES and OLD_SUBFILE, and bits of SUBFILE
WHITE_IS_ZERO, COLOURS, YCBCR, SIGNED, IN_PLANES, REVERSED, PREMULTIPLIED, OLD_REDUCED = 0, 2, 6, 2, 2, 2, 1, 2
REDUCED, MASK = 1, 4
# Bytes of a value, by its type
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
MAX_PAGES = 100  # of a file to look at; the time that Pillow takes grows with the square of their number
FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)  # JPEG's markers before the number of rows
# What a whole strip cannot end with, though libtiff takes it for pixels: deflate's checksum is not 0, a JPEG ends with
# its marker, and no fax code has as many zeros.
NO_END = {"tiff_adobe_deflate": bytes(4), "tiff_deflate": bytes(4), "jpeg": bytes(16)}
NO_END |= dict.fromkeys(("tiff_ccitt", "group3", "group4"), bytes(16))
FLIPPED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))  # the bits of each byte from the last to the first
STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Pillow ignores these tags, so only values that leave the pixels' meaning as it is without them are read. Those that
# TIFF 6 calls statistics or hints (Threshholding, Cell*, MinSampleValue, HalftoneHints, BadFaxLines, YCbCrPositioning,
# ...) are harmless. Like ICC profiles, curves and primaries (GrayResponse*, TransferFunction, WhitePoint) are not
# applied. Pillow's table of layouts (OPEN_INFO) judges SampleFormat, FillOrder and ExtraSamples.
MEANINGLESS = {
    332: ("InkSet", (1.0,)),  # CMYK
    334: ("NumberOfInks", (4.0,)),
    346: ("Indexed", (0.0,)),
    433: ("Decode", ()),
    559: ("StripRowCounts", ()),
    32996: ("DataType", (2.0,)),  # unsigned
    32997: ("ImageDepth", (1.0,)),
}
# Tags whose numbers Pillow or this module use.
NUMBERS = {
    SUBFILE: "NewSubfileType", BITS: "BitsPerSample", PHOTOMETRIC: "PhotometricInterpretation", FILL_ORDER: "FillOrder",
    274: "Orientation", CHANNELS: "SamplesPerPixel", MAX_SAMPLE: "MaxSampleValue", PLANAR: "PlanarConfiguration",
    317: "Predictor", EXTRA_SAMPLES: "ExtraSamples", SAMPLE_FORMAT: "SampleFormat",
}  # fmt: skip
COEFFICIENTS_OF_JPEG, REFERENCE_OF_JPEG = (0.299, 0.587, 0.114), (0, 255, 128, 255, 128, 255)


def tags(image: Image.Image) -> dict[int, object]:
    """Return the tags of a TIFF's page; other images have none."""
    return getattr(image, "tag_v2", {})


def numbers(image: Image.Image, tag: int) -> list[float]:
    """Return the finite numbers of a TIFF's tag, one per channel or one for all."""
    value = tags(image).get(tag, ())
    found = value if isinstance(value, tuple) else (value,)
    return [float(n) for n in found if isinstance(n, Real) and math.isfinite(n)]


def one(image: Image.Image, tag: int, default: int) -> int:
    """Return the first number of a TIFF's tag."""
    return int(next(iter(numbers(image, tag)), default))


def is_part(image: Image.Image) -> bool:
    """Whether the first page of a TIFF is marked as a reduced copy or a mask of another image."""
    return any(int(n) & (REDUCED | MASK) for n in numbers(image, SUBFILE))


def skip_thumbnails(image: Image.Image) -> None:
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


def check_page(file: BinaryIO, image: Image.Image) -> None:
    """Check that Pillow reads the pixels as the page's tags mean them.

    Raises:
        ValueError: a tag has a value that Pillow ignores, or pixels are missing.
    """
    assert isinstance(image, ImageFile.ImageFile)
    _check_entries(file, image.tell())
    is_jpeg = image.info.get("compression") == "jpeg"
    is_raw = bool(image.tile) and image.tile[0].codec_name != "libtiff"
    _check_tags(image)
    if one(image, PHOTOMETRIC, 0) == YCBCR:
        _check_ycbcr(image, is_raw, is_jpeg)
    if is_raw or is_jpeg:
        _check_strips(file, image, is_raw)
    if (zeros := NO_END.get(str(image.info.get("compression")))) is not None:
        _check_tails(file, image, zeros)
    if (group := fax.GROUPS.get(str(image.info.get("compression")))) is not None:
        _check_fax(file, image, group)
    if IN_PLANES in numbers(image, PLANAR):
        _check_planes(image, is_raw)


def _check_entries(file: BinaryIO, page: int) -> None:
    """Check that the values of a page's tags lie within the file: Pillow drops all tags from one that does not."""
    end = file.seek(0, io.SEEK_END)

    def read(form: str, place: int) -> tuple[int, ...]:
        file.seek(place)
        return struct.unpack(order + form, file.read(struct.calcsize(order + form)))

    file.seek(0)
    start = file.read(4)
    order, is_big = ("<" if start[:2] == b"II" else ">"), b"+" in start
    count_form, place_form, entry_form, size = ("Q", "Q", "HHQ", 20) if is_big else ("H", "I", "HHI", 12)
    inline, place = struct.calcsize("=" + place_form), 8 if is_big else 4
    for number in range(page + 1):
        (offset,) = read(place_form, place)
        (count,) = read(count_form, offset)
        first = offset + struct.calcsize("=" + count_form)
        place = first + size * count  # of the next page's offset
        for entry in range(first, place, size) if number == page else ():
            tag, kind, length = read(entry_form, entry)
            (value,) = read(place_form, entry + size - inline)
            if (needed := length * SIZES.get(kind, 0)) > inline and value + needed > end:
                raise ValueError(f"a damaged TIFF: the value of tag {tag} lies beyond the end; replace the file")


def _check_tags(image: Image.Image) -> None:
    for tag in NUMBERS.keys() & set(tags(image)):
        if isinstance(tags(image)[tag], str | bytes):
            raise ValueError(f"its tag {NUMBERS[tag]} has the type of texts or bytes, which Pillow ignores; convert it")
    if PHOTOMETRIC not in tags(image):
        raise ValueError("it lacks the tag PhotometricInterpretation, which says whether 0 is black or white; add it")
    for tag in MEANINGLESS.keys() & set(tags(image)):
        name, neutral = MEANINGLESS[tag]
        if not neutral or tuple(numbers(image, tag)) != neutral:
            raise _misread(f"{name}={_shown(image, tag)}")
    most = 2 ** one(image, BITS, 1) - 1
    if DOT_RANGE in tags(image) and set(zip(*[iter(numbers(image, DOT_RANGE))] * 2, strict=False)) != {(0, most)}:
        raise _misread(f"DotRange={_shown(image, DOT_RANGE)}, other than 0,{most}")
    if COLOUR_MAP in tags(image) and image.mode in ("P", "PA") and len(numbers(image, COLOUR_MAP)) != 3 * (most + 1):
        raise _misread(f"a ColorMap of {len(numbers(image, COLOUR_MAP))} numbers instead of {3 * (most + 1)}")
    if image.mode == "RGBA" and not numbers(image, EXTRA_SAMPLES):
        raise ValueError(
            "it has a fourth channel but lacks the tag ExtraSamples, which says whether this is transparency; add the "
            "tag, or convert it to three channels"
        )
    if image.mode in ("1", "L", "I;16", "I;16B", "P") and one(image, CHANNELS, 1) > 1:
        count = one(image, CHANNELS, 1)
        raise ValueError(f"it has {count} channels, of which Pillow reads the first; convert it to one channel or RGB")
    if one(image, PHOTOMETRIC, 0) == COLOURS and REFERENCE in tags(image):
        low, high = numbers(image, REFERENCE)[::2], numbers(image, REFERENCE)[1::2]
        if set(low) != {0} or set(high) != {most}:
            raise _misread(f"ReferenceBlackWhite={_shown(image, REFERENCE)}")


def _check_ycbcr(image: ImageFile.ImageFile, is_raw: bool, is_jpeg: bool) -> None:
    """Check the tags that libtiff applies, but not to uncompressed pixels, nor to JPEG's."""
    if is_raw and numbers(image, SUBSAMPLING) != [1, 1]:
        stated = _shown(image, SUBSAMPLING) if SUBSAMPLING in tags(image) else "2,2, the default"
        raise _misread(f"YCbCrSubSampling={stated}, uncompressed")
    if is_raw or is_jpeg:
        for tag, name, usual in (
            (COEFFICIENTS, "YCbCrCoefficients", COEFFICIENTS_OF_JPEG),
            (REFERENCE, "ReferenceBlackWhite", REFERENCE_OF_JPEG),
        ):
            found = numbers(image, tag)
            is_usual = len(found) == len(usual) and all(abs(a - b) < 1e-3 for a, b in zip(found, usual, strict=True))
            if tag in tags(image) and not is_usual:
                raise _misread(f"{name}={_shown(image, tag)}")


def _check_strips(file: BinaryIO, image: Image.Image, is_raw: bool) -> None:
    """Check that the strips or tiles cover the image: of uncompressed pixels, Pillow looks at the offsets only."""
    channels, (width, length) = one(image, CHANNELS, 1), (one(image, WIDTH, 0), one(image, LENGTH, 0))
    bits = ([int(n) for n in numbers(image, BITS)] or [1])[:channels]
    bits = bits * channels if len(bits) == 1 else bits
    if STRIP_OFFSETS in tags(image):
        kind, offsets, stated = "strips", numbers(image, STRIP_OFFSETS), numbers(image, STRIP_BYTES)
        across, rows = width, min(one(image, ROWS_PER_STRIP, length), length)
    else:
        kind, offsets, stated = "tiles", numbers(image, TILE_OFFSETS), numbers(image, TILE_BYTES)
        across, rows = one(image, TILE_WIDTH, 0), one(image, TILE_LENGTH, 0)
    if rows < 1 or across < 1:
        raise ValueError(f"a damaged TIFF: its {kind} have no pixels; replace the file")
    is_planar = IN_PLANES in numbers(image, PLANAR)
    down, size = math.ceil(length / rows), math.ceil(across * (bits[0] if is_planar else sum(bits)) / 8)
    needed = down * math.ceil(width / across) * (channels if is_planar else 1)
    if len(offsets) != needed:
        raise ValueError(f"a damaged TIFF: it has {len(offsets)} {kind} instead of {needed}; replace the file")
    if 0 in offsets:
        raise ValueError(f"a sparse TIFF, in which {kind} without pixels are left out; write it without SPARSE_OK")
    if 0 in stated:
        raise ValueError(f"a TIFF of which the sizes of its {kind} are not stated (0 bytes); save it anew")
    for number, (offset, count) in enumerate(zip(offsets, stated, strict=False)):
        lines = min(rows, length - rows * (number % down)) if kind == "strips" else rows
        found = int(count) // size if is_raw else _lines_of_jpeg(file, int(offset), int(count))
        if found < lines:
            raise ValueError(
                f"a damaged TIFF: of its {kind}, number {number} has {found} rows instead of {lines}; replace the file"
            )


def _check_tails(file: BinaryIO, image: Image.Image, zeros: bytes) -> None:
    """Check that no strip or tile ends with these zeros."""
    offsets = numbers(image, STRIP_OFFSETS) or numbers(image, TILE_OFFSETS)
    sizes = numbers(image, STRIP_BYTES) or numbers(image, TILE_BYTES)
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=False)):
        tail = min(int(size), len(zeros))
        file.seek(int(offset + size) - tail)
        if file.read(tail) == zeros:
            raise ValueError(f"a TIFF whose strip {number} ends with zeros{NOT_WHOLE}")


def _check_fax(file: BinaryIO, image: Image.Image, group: int) -> None:
    """Check that strips or tiles of fax codes have all their rows."""
    (width, length), is_tiled = (one(image, WIDTH, 0), one(image, LENGTH, 0)), TILE_OFFSETS in tags(image)
    offsets = numbers(image, TILE_OFFSETS if is_tiled else STRIP_OFFSETS)
    sizes = numbers(image, TILE_BYTES if is_tiled else STRIP_BYTES)
    rows = one(image, TILE_LENGTH, 0) if is_tiled else min(one(image, ROWS_PER_STRIP, length), length)
    for number, (offset, size) in enumerate(zip(offsets, sizes, strict=False)):
        if not is_tiled and number * rows >= length:
            break  # further strips are of no row
        file.seek(int(offset))
        codes = file.read(int(size))
        if one(image, FILL_ORDER, 1) == REVERSED:
            codes = codes.translate(FLIPPED)
        across, down = (one(image, TILE_WIDTH, 0), rows) if is_tiled else (width, min(rows, length - rows * number))
        if codes and not fax.has_rows(codes, group, one(image, FAX_OPTIONS, 0), across, down):
            raise ValueError(f"a damaged TIFF: strip {number} lacks rows of pixels; replace the file")


def _lines_of_jpeg(file: BinaryIO, offset: int, count: int) -> int:
    """Return the rows of a strip that is a JPEG of its own; libtiff leaves those that it lacks black."""
    file.seek(offset)
    content = file.read(count)
    frame = next((start for marker, start in segments(content) if marker in FRAMES), len(content))
    return int.from_bytes(content[frame + 5 : frame + 7], "big")


def _check_planes(image: ImageFile.ImageFile, is_raw: bool) -> None:
    """Check that Pillow reads channels that are stored one after the other, as planes."""
    is_right = image.mode not in ("LA", "La", "PA", "LAB")  # their alpha would stay 0, their colours lack an offset
    if is_raw:
        # Pillow keeps one letter of its name for the layout, which loses the bits, their order and the inversion.
        bits = set(numbers(image, BITS)) or {1}
        as_named = bits == {8} or image.mode == "1" or (bits == {32} and getattr(tags(image), "prefix", b"") == b"II")
        is_inverted = image.mode in ("1", "L") and numbers(image, PHOTOMETRIC) == [WHITE_IS_ZERO]
        is_right = is_right and as_named and not is_inverted and REVERSED not in numbers(image, FILL_ORDER)
    if not is_right:
        raise ValueError(
            "its channels are stored as planes (PlanarConfiguration=2), which Pillow misreads for this kind of pixels; "
            "store them interleaved (PlanarConfiguration=1)"
        )


def _shown(image: Image.Image, tag: int) -> str:
    found = numbers(image, tag)
    return ",".join(f"{n:g}" for n in found[:6]) + ",..." * (len(found) > 6)


def _misread(what: str) -> ValueError:
    return ValueError(f"a TIFF with {what}, which Pillow misreads; convert it to RGB or grey with 8 bits per channel")
