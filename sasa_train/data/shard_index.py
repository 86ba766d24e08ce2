"""The index of a split's shards, `SPLIT.index.npz`, which is only used if every part of it is valid.

It is a cache that anything may have damaged or replaced, so nothing in it is trusted: sizes are compared with those of
the files before memory is allocated, all positions with the shards, and all of it with a digest that it contains. Only
an index that was made to deceive, digest included, can name other labels or images than the shards do.
"""

import hashlib
import io
import os
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sasa_train.data.tars import MAX_NAME
from sasa_train.files import open_regular

MAX_CLASSES = 1_000_000  # labels are smaller; the memory for a class's name and weights is needed for each
COLUMNS: dict[str, np.dtype] = {  # the arrays with one element per image, ordered by label and key
    "labels": np.dtype(np.int64),
    "archive": np.dtype(np.int32),  # index of the image's shard
    "offset": np.dtype(np.int64),
    "size": np.dtype(np.int64),
    "names": np.dtype(np.str_),
}

LEFT_OUT = "left_out"  # one text: what the shards hold that is not data
DIGEST = "digest"


def index_bytes(identity: np.ndarray, columns: dict[str, np.ndarray]) -> memoryview:
    """Return the content of an index: its columns, LEFT_OUT, and the `identity` of the shards that they describe."""
    buffer = io.BytesIO()
    arrays = columns | {"identity": identity, DIGEST: np.array([_digest(identity, columns)])}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getbuffer()


def _digest(identity: np.ndarray, columns: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in (identity, *(columns[name] for name in (*COLUMNS, LEFT_OUT))):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def read_index(path: Path, identity: np.ndarray, shard_sizes: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return the columns of an index and LEFT_OUT, or None if it describes other shards than those of `identity`.

    Raises:
        FileNotFoundError: there is no index.
        Exception: any other, because zipfile and numpy have no common base class; the message names the wrong part.
    """
    total = int(shard_sizes.sum())
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Three blocks per image: its header, its label's header and label. Its row is at most 28 + 4 * MAX_NAME bytes.
        if size > 2 * total + 2**16:
            raise ValueError(f"its {size:,} bytes are too many for shards of {total:,} bytes")
        return parse_index(file, size, lambda written: shard_sizes if np.array_equal(written, identity) else None)


def parse_index(
    file: BinaryIO, size: int, sizes_of: Callable[[np.ndarray], np.ndarray | None]
) -> dict[str, np.ndarray] | None:
    """Return the columns of an index of `size` bytes and LEFT_OUT, or None if it is of an older version.

    sizes_of: returns the sizes of the shards in bytes for the identity in the index, or None if they are others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by which numpy and Python report a header that is not as numpy writes it
        with zipfile.ZipFile(file) as archive:
            found, expected = (sorted(names) for names in (archive.namelist(), map(_entry, ("identity", *COLUMNS))))
            if found in (expected, sorted([*expected, _entry(DIGEST)])):  # of an older version
                return None
            if found != sorted([*expected, _entry(LEFT_OUT), _entry(DIGEST)]):
                raise ValueError(f"it must hold identity, {', '.join(COLUMNS)}, {LEFT_OUT}, {DIGEST} and nothing else")
            identity = _read_array(archive, "identity", np.dtype(np.str_), size)
            if (shard_sizes := sizes_of(identity)) is None:
                return None
            columns = {name: _read_array(archive, name, dtype, size) for name, dtype in COLUMNS.items()}
            columns[LEFT_OUT] = _read_array(archive, LEFT_OUT, np.dtype(np.str_), size)
            written = _read_array(archive, DIGEST, np.dtype(np.str_), size)
    _check(columns, shard_sizes)
    if written.tolist() != [_digest(identity, columns)]:
        raise ValueError("its content does not match its digest")
    return columns


def _entry(name: str) -> str:
    return f"{name}.npy"


def _read_array(archive: zipfile.ZipFile, name: str, dtype: np.dtype, most: int) -> np.ndarray:
    """Read one array, of at most `most` bytes, with one dimension and the given kind of elements."""
    entry = archive.getinfo(_entry(name))
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.file_size > most:
        raise ValueError(f"{name} is compressed or has a wrong size")
    with archive.open(entry) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name} is of an unknown version")
        shape, _, found = np.lib.format.read_array_header_1_0(file)
        is_expected = found.kind == "U" and found.isnative if dtype.kind == "U" else found == dtype
        if not is_expected or len(shape) != 1 or shape[0] * found.itemsize != entry.file_size - file.tell():
            raise ValueError(f"{name} is not an array of {dtype.name} with one dimension, or is incomplete")
        return np.frombuffer(file.read(), found).copy()  # reading to the end also compares the checksum


def _check(columns: dict[str, np.ndarray], shard_sizes: np.ndarray) -> None:
    """Raise ValueError unless every row can describe an image in the shards."""
    labels, archive, offset, size, names = (columns[name] for name in COLUMNS)
    if not 0 < len(labels) == len(archive) == len(offset) == len(size) == len(names):
        raise ValueError(f"{', '.join(COLUMNS)} differ in length or are empty")
    if labels.min() < 0 or labels.max() >= MAX_CLASSES or (labels[1:] < labels[:-1]).any():
        raise ValueError(f"labels are not in order, or not from 0 to {MAX_CLASSES - 1:,}")
    if archive.min() < 0 or archive.max() >= len(shard_sizes):
        raise ValueError(f"archive is not from 0 to {len(shard_sizes) - 1}")
    if offset.min() < 0 or size.min() < 0 or (size > shard_sizes[archive] - offset).any():
        raise ValueError("offset and size describe bytes that are not in the shards")
    order = np.lexsort((offset, archive))
    is_same_shard = archive[order][1:] == archive[order][:-1]
    if (is_same_shard & (offset[order][1:] < (offset + np.maximum(size, 1))[order][:-1])).any():
        raise ValueError("offset and size describe images that overlap")
    if len(columns[LEFT_OUT]) != 1:
        raise ValueError(f"{LEFT_OUT} must be one text")
    if names.itemsize > 4 * MAX_NAME:
        raise ValueError(f"names has more than {MAX_NAME} characters in one name")
    if names.view(np.uint32).max() > sys.maxunicode:
        raise ValueError("names has characters that Unicode lacks")
    "".join(names.tolist()).encode(errors="surrogateescape")  # raises ValueError for other surrogates
