"""Decode images of any mode to what a person would see: upright, over a background, in the mode that is asked for.

Pillow itself clips float and 32-bit values to 0..255, makes transparent pixels black, and leaves photos on their side.
"""

import math
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImagePalette

from sasa_train.config.keys import DataConfig
from sasa_train.data.opening import DEEP_AVIF
from sasa_train.data.tiff import (
    BITS,
    COLOUR_MAP,
    EXTRA_SAMPLES,
    MAX_SAMPLE,
    PHOTOMETRIC,
    PREMULTIPLIED,
    SAMPLE_FORMAT,
    SIGNED,
    SMAX_SAMPLE,
    SMIN_SAMPLE,
    WHITE_IS_ZERO,
    YCBCR,
    numbers,
    one,
    tags,
)

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # about broken EXIF data

RANGE_REMEDY = "set data.value_range=[low,high]"
WHITE = {"rgb": 255, "grey": 255, "grey16": 65_535}  # by data.mode
MIN_SHARE = 0.25  # of a type's range: 16-bit channels of which Pillow keeps 8 bits would have fewer than 64 levels
BANDS = {"L": 1, "LA": 1, "RGB": 3, "RGBA": 3, "CMYK": 4}  # modes that MaxSampleValue can scale; bands but for alpha
UNSCALED = ("1", "P", "PA")  # modes of which MaxSampleValue says nothing
SWAPPED = ("F;32BF", "I;16BS", "I;32BS")  # libtiff yields the machine's byte order, and Pillow would swap it again
BYTE, SHORT, LONG = 1, 3, 4  # types of TIFF's values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoding:
    """The keys of the group `data` that determine how pixels are read; see `DataConfig`."""

    background: str = "white"
    exif: str = "apply"
    value_range: tuple[float, float] | None = None
    clip_values: bool = False
    mode: str = "rgb"


DEFAULT = Decoding()


def decoding_of(data: DataConfig) -> Decoding:
    value_range = (data.value_range[0], data.value_range[1]) if data.value_range else None
    return Decoding(data.background, data.exif, value_range, data.clip_values, data.mode)


def decode(image: Image.Image, decoding: Decoding = DEFAULT) -> Image.Image:
    """Decode an image of any mode as `decoding.mode` says: to RGB, L or, for grey16, F with values from 0 to 65,535.

    Raises:
        ValueError: see `to_rgb`; or Pillow lost the low bytes of 16 bits that grey16 needs.
    """
    if decoding.mode == "grey16":
        return _to_grey16(image, decoding)
    rgb = to_rgb(image, decoding)
    return rgb.convert("L") if decoding.mode == "grey" else rgb


def _to_grey16(image: Image.Image, decoding: Decoding) -> Image.Image:
    if is_16_bit(image) and not image.mode.startswith("I"):
        raise ValueError(
            "16 bits per channel in colour or with transparency, of which Pillow keeps only the upper 8 bits; save it "
            "as 16-bit grey, or set data.mode=grey"
        )
    if image.info.get(DEEP_AVIF):
        raise ValueError("an AVIF of more than 8 bits, of which Pillow keeps 8; save it as 16-bit PNG or TIFF")
    turn = _turn(image, decoding)
    _load(image)
    if not _is_deep(image):  # 8 bits, of which 255 becomes 65,535
        return Image.fromarray(np.asarray(to_rgb(image, decoding).convert("L")).astype(np.float32) * 257)
    levels, key = _levels(image, decoding, WHITE["grey16"]), image.info.get("transparency")
    if isinstance(key, int) and decoding.background != "none":
        background = np.asarray(Image.new("RGB", (1, 1), decoding.background).convert("L"))
        levels[_values(image) == key] = 257 * background.item()
    grey = Image.fromarray(levels.astype(np.float32))
    return grey if turn is None else grey.transpose(turn)


def to_rgb(image: Image.Image, decoding: Decoding = DEFAULT) -> Image.Image:
    """Decode an image of any mode to RGB, 8 bits per channel.

    Raises:
        ValueError: the values that mean black and white are unknown, pixels are NaN, or Pillow lost too much precision.
    """
    turn = _turn(image, decoding)
    _load(image)
    image = _clipped(image) if decoding.clip_values else _scaled(image, decoding)
    if image.mode == "La":  # Pillow converts it to LA only
        image = image.convert("LA")
    if decoding.background != "none" and image.has_transparency_data:
        if image.info.get("transparency", 0) is None:
            raise ValueError(
                "a PNG with 16 bits per channel and a transparent colour (tRNS), of which Pillow keeps only the upper "
                "8 bits; save it with an alpha channel, or set data.background=none"
            )
        rgba, image = image.convert("RGBA"), Image.new("RGB", image.size, decoding.background)
        image.paste(rgba, mask=rgba)
    elif image.mode != "RGB":
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image, decoding: Decoding = DEFAULT) -> tuple[int, int]:
    """Return the width and height that `to_rgb` will return; of a JPEG, only the header is read."""
    is_swapped = _turn(image, decoding) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8])
    return (image.height, image.width) if is_swapped else image.size


def is_turned(image: Image.Image, decoding: Decoding = DEFAULT) -> bool:
    """Whether `to_rgb` turns or mirrors the image, apart from a TIFF, which Pillow turns while it loads."""
    return _turn(image, decoding) is not None


def _turn(image: Image.Image, decoding: Decoding) -> Image.Transpose | None:
    if image.format not in ("JPEG", "MPO"):  # PNG may state its orientation after the pixels; loading turns a TIFF
        _load(image)
    if decoding.exif != "apply":
        return None
    try:
        exif = image.info.get("exif", b"")
        if not exif and (
            profile := image.info.get("Raw profile type exif")
        ):  # of a PNG, after two lines and the length
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
        return TURNS.get(_orientation(exif))
    except (ValueError, TypeError, AttributeError, struct.error):  # broken EXIF data; the pixels are intact
        return None


def _orientation(exif: bytes) -> int:
    """Return the orientation in EXIF data, 1 if there is none.

    Pillow's getexif() would take it from XMP, and its parser drops all tags after one whose value is cut off.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    if (order := {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])) is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, place)
        if tag == ExifTags.Base.Orientation and kind in (BYTE, SHORT, LONG):
            (value,) = struct.unpack_from(order + {BYTE: "B", SHORT: "H", LONG: "I"}[kind], exif, place + 8)
            return int(value)
    return 1


def _load(image: Image.Image) -> None:
    """Load the pixels, and correct what Pillow misreads."""
    rawmode, key, tiles = _rawmode(image), image.info.get("transparency"), getattr(image, "tile", [])
    if image.format == "TIFF" and tiles:
        _prepare_tiff(image, rawmode)
    image.load()
    # Pillow leaves the transparent colour of a PNG in the file's bit depth.
    if rawmode in ("L;2", "L;4") and isinstance(key, int):
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    elif rawmode == "RGB;16B" and isinstance(key, tuple):
        image.info["transparency"] = None  # `to_rgb` refuses it: of the pixels, only the upper 8 bits are left
    elif image.format == "GIF" and tiles and key is None and tiles[0].extents != (0, 0, *image.size):
        covered = Image.new("L", image.size)
        covered.paste(255, tiles[0].extents)
        image.putalpha(covered)
    elif image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)  # many programs leave the fourth byte empty


def _prepare_tiff(image: Image.Image, rawmode: str) -> None:
    """Correct what Pillow will use to load the pixels: their byte order, an 8-bit palette, and the orientation."""
    assert isinstance(image, ImageFile.ImageFile)
    tile = image.tile[0]
    if tile.codec_name == "libtiff" and rawmode in SWAPPED and isinstance(tile.args, tuple):
        image.tile = [tile._replace(args=(rawmode.replace("B", "N"), *tile.args[1:]))]
    colours = [int(n) for n in numbers(image, COLOUR_MAP)]
    if image.mode in ("P", "PA") and all(0 <= n < 256 for n in colours):  # libtiff's rule
        image.palette = ImagePalette.raw("RGB;L", bytes(colours))
    image.info.pop("xmp", None)  # of the two orientations that a file may have, only the tag counts


def _rawmode(image: Image.Image) -> str:
    """Return Pillow's name for the layout of the pixels in the file, or "" if they are loaded already."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def is_16_bit(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has 16 bits per channel; some may be unused."""
    if image.format == "PPM":
        return image.mode == "I" or _maximum(image) > 255
    # The 16 bits of BGR;16 in a BMP are those of a pixel.
    return image.mode.startswith("I;16") or (image.format != "BMP" and ";16" in _rawmode(image))


def _maximum(image: Image.Image) -> int:
    """Return the value of white in a PPM that is not loaded yet, or 0 if Pillow reads its bytes as they are."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else ()
    return int(arguments[-1]) if isinstance(arguments, tuple) and isinstance(arguments[-1], int) else 0


def _clipped(image: Image.Image) -> Image.Image:
    """Convert integers of more than 8 bits as if all had 16; Pillow then clips floats to 0..255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).clip(0, 65535) / 257 + 0.5).astype(np.uint8))


def _values(image: Image.Image) -> np.ndarray:
    """Return the pixels [H, W] of one channel with the type that the file states; Pillow has only int32 and uint8."""
    pixels, is_signed = np.asarray(image), SIGNED in numbers(image, SAMPLE_FORMAT)
    if image.mode == "L":
        return pixels.view(np.int8) if is_signed else pixels
    return pixels.view(np.uint32) if image.mode == "I" and tags(image) and not is_signed else pixels


def _needs_range(image: Image.Image) -> bool:
    """Whether an image is of floats, signed or 32-bit integers. Pillow loads 16-bit PPM and PNG files as 32-bit."""
    is_long = image.mode == "I" and image.format not in ("PPM", "PNG", "JPEG2000")
    return image.mode == "F" or is_long or SIGNED in numbers(image, SAMPLE_FORMAT)


def _scaled(image: Image.Image, decoding: Decoding) -> Image.Image:
    """Scale the values in the image's range to 0..255; keep transparency."""
    if not _is_deep(image):
        shares = _shares(image)
        return image if min(shares) == 1 else _brightened(image, shares)
    pixels, grey = _values(image), _levels(image, decoding, 255).astype(np.uint8)
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Image.fromarray(grey)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(((pixels != key) * 255).astype(np.uint8))))


def _levels(image: Image.Image, decoding: Decoding, white: int) -> np.ndarray:
    """Return the pixels of a deep image as whole numbers from 0 (black) to `white`, float64 [H, W]."""
    low, high = check_range(image, decoding)
    levels = _values(image).astype(np.float64)
    if np.isnan(levels).any():
        raise ValueError(f"number of pixels that are NaN: {int(np.isnan(levels).sum()):,}")
    if not _needs_range(image) and levels.max() > high:
        raise ValueError(_above_stated(levels.max(), high))
    # In place, to save memory. For 16 bits, this yields the same as a division by 257.
    np.clip(levels, low, high, out=levels)
    levels -= low
    levels /= (high - low) / white
    levels += 0.5
    np.floor(levels, out=levels)
    # Pillow inverts 8-bit images only.
    return white - levels if tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO else levels


def check_range(image: Image.Image, decoding: Decoding) -> tuple[float, float]:
    """Return the values that mean black and white, judged by the header; channels that Pillow made 8-bit have (0, 255).

    Raises:
        ValueError: the header does not state them, and `decoding` does not either.
    """
    bits = max(numbers(image, BITS), default=16 if image.mode.startswith("I") else 8)
    is_signed = SIGNED in numbers(image, SAMPLE_FORMAT)
    if _needs_range(image):
        if decoding.value_range is not None:
            return decoding.value_range
        stated = *numbers(image, SMIN_SAMPLE)[:1], *numbers(image, SMAX_SAMPLE)[:1]
        if len(stated) == 2 and stated[0] < stated[1]:
            return stated[0], stated[1]
        kind = "floats" if image.mode == "F" else f"{'signed ' if is_signed else ''}{bits:g}-bit integers"
        raise ValueError(
            f"its pixels are {kind}, and no tags SMinSampleValue and SMaxSampleValue say which of them are black and "
            f"white; {RANGE_REMEDY}"
        )
    if _is_deep(image):
        most, peak = 2**bits - 1, max(numbers(image, MAX_SAMPLE), default=0)
        return 0, peak if 0 < peak < most else most
    return 0, 255 * _shares(image)[0]


def _shares(image: Image.Image) -> list[float]:
    """Return how much of its type's range each band uses, by TIFF's MaxSampleValue; bands have 8 bits in memory.

    Raises:
        ValueError: it is unknown how the values have to be scaled, or too few of the upper 8 bits would be left.
    """
    bits, count, stated = max(numbers(image, BITS), default=8), len(image.getbands()), numbers(image, MAX_SAMPLE)
    most, colours = 2**bits - 1, BANDS.get(image.mode, 0)
    shares = [peak / most if 0 < peak < most else 1.0 for peak in stated][:count]
    if image.mode in UNSCALED or all(share == 1 for share in shares):
        return [1.0] * count
    if len(shares) == 1 and colours == count:
        shares *= count
    shown = ",".join(f"{peak:g}" for peak in stated)
    is_mixed = one(image, EXTRA_SAMPLES, 0) == PREMULTIPLIED or one(image, PHOTOMETRIC, 0) == YCBCR
    if not colours or is_mixed or len(shares) < count or len(set(shares[:colours])) > 1:
        raise ValueError(
            f"MaxSampleValue={shown} scales only grey, RGB and CMYK, with the same value for all colours, and alpha "
            "that is not premultiplied; convert it to 8 bits per channel"
        )
    if bits == 16 and min(shares) < MIN_SHARE:
        raise ValueError(
            f"its channels have 16 bits and MaxSampleValue={shown}, but Pillow keeps only the upper 8 bits; "
            "convert it to 8 bits per channel"
        )
    return shares


def _above_stated(value: float, stated: float) -> str:
    return (
        f"a pixel has the value {value:g}, but the header says that white is {stated:g}; one of the two is wrong, so "
        "mend the header or convert the image"
    )


def _is_deep(image: Image.Image) -> bool:
    return image.mode[0] in "IF" or SIGNED in numbers(image, SAMPLE_FORMAT)


def _brightened(image: Image.Image, shares: list[float]) -> Image.Image:
    """Scale each band, of which only this share of 0..255 is used, to 0..255."""
    levels, tables = np.arange(256), []
    for band, share in enumerate(shares):
        table = (levels * (255 / (255 * share))).round().clip(0, 255)
        # Pillow has inverted WhiteIsZero already, but not its alpha.
        is_inverted = band == 0 and tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO
        levels_used = np.asarray(image.getchannel(band))
        if (most := 255 - int(levels_used.min()) if is_inverted else int(levels_used.max())) > math.ceil(255 * share):
            raise ValueError(_above_stated(most, math.ceil(255 * share)))
        tables.append(255 - table[::-1] if is_inverted else table)
    return image.point(np.concatenate(tables).astype(int).tolist())
