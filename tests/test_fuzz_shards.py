"""Check that damaged or hostile shards and indices never yield wrong images, tracebacks or unbounded memory.

FUZZ_EXAMPLES=10000 sets the number of attempts, which is lower by default.
"""

import io
import os
import random
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from making_data import padded, pax_record, tar_header, tar_of
from mutating import mutated, with_flipped_bits

from sasa_train.data import shards as shards_module
from sasa_train.data.shards import load_shards
from sasa_train.data.tars import MAX_NAME
from sasa_train.refusal import ConfigError

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
MAX_MEMORY = 2**24  # bytes per attempt; the shards have a few kilobytes, but /dev/zero or a claimed size has more
Row = tuple[int, int, int, int, str]


def samples(numbers: range) -> list[tuple[str, bytes]]:
    """Return images, which are never decoded here, and labels out of order."""
    pairs = [((f"{i}.png", b"image" * (7 * i)), (f"{i}.cls", b"%d\n" % (i * 5 % 3))) for i in numbers]
    return [file for pair in pairs for file in pair]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    contents = [tar_of(samples(range(4))), tar_of(samples(range(4, 7)))]
    paths = [tmp_path / f"train-{number}.tar" for number in range(2)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture(autouse=True)
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def rows_of(shards: list[Path]) -> list[Row]:
    """Return label, archive, offset, size and name of each image, after checking how much memory loading took."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        members, labels = load_shards(shards, "train")
    finally:
        assert tracemalloc.get_traced_memory()[1] - before < MAX_MEMORY
    columns = labels, members.archive, members.offset, members.size, members.names
    return list(zip(*(column.tolist() for column in columns), strict=True))


# Indices


def npy(descr: str, shape: object, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """Return a .npy file whose header claims whatever is given."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    length = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + length + header + data


def wrong_element(column: np.ndarray, rng: random.Random) -> np.ndarray:
    changed = column.copy()
    if column.dtype.kind == "U":
        codes = changed.view(np.uint32)
        codes[rng.randrange(len(codes))] = rng.choice((0xD800, 0xDFFF, 0x110000, 2**32 - 1))
    else:
        changed[rng.randrange(len(changed))] = rng.choice((-1, np.iinfo(column.dtype).max, np.iinfo(column.dtype).min))
    return changed


def wrong_column(column: np.ndarray, rng: random.Random) -> np.ndarray:
    """Return a column of another type, shape or length, or with an element that is out of bounds."""
    floats = np.full(len(column), rng.choice((0.0, np.nan, np.inf, 1e300)))
    kinds: list[Callable[[], np.ndarray]] = [
        lambda: rng.choice([floats, floats > 1, floats.astype(complex), np.array([None] * len(column))]),
        lambda: column.astype(">U9" if column.dtype.kind == "U" else rng.choice((">i8", "<u8", "<i2", "S5", "U5"))),
        lambda: np.array(["x" * (MAX_NAME + 1)] * len(column)),
        lambda: column[: rng.randrange(len(column))],
        lambda: np.concatenate([column, column[: rng.randrange(1, 4)]]),
        lambda: column.reshape(rng.choice([(-1, 1), (1, -1), (1, -1, 1)])),
        lambda: column[0],
        lambda: wrong_element(column, rng),
    ]
    return rng.choice(kinds)()


def zipped(entries: Iterable[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


BOMB = zipped([("names.npy", npy("'<i8'", (2**22,), bytes(2**25)))], zipfile.ZIP_DEFLATED)
DESCRS = (
    "'<i8'",
    "'<i4'",
    "'<U9'",
    "'<U0'",
    "'<U1000000000'",
    "'|O'",
    "'|V8'",
    "[('a', '<i8')]",
    "8",
    "(" * 3000,
    "'\\d'",
)
SHAPES = ("(10**12,)", "(1000000000000,)", "(-1,)", f"({10**30},)", "()", "(7, 1000000000000)", "(7L,)", "(None,)", "7")


def claiming(entries: dict[str, bytes], name: str, rng: random.Random) -> bytes:
    """Return an index with one entry that claims to be other or more than it is."""
    data = rng.choice((b"", bytes(56), bytes(252)))
    version = rng.choice((b"\1\0", b"\2\0", b"\3\0", b"\x09\0"))
    return zipped((entries | {name: npy(rng.choice(DESCRS), rng.choice(SHAPES), data, version)}).items())


def with_lying_directory(data: bytes, rng: random.Random) -> bytes:
    """Return a ZIP file whose central directory gives an entry other flags, compression, sizes or offset."""
    changed, start = bytearray(data), 0
    for _ in range(rng.randrange(1, 7)):
        start = changed.index(b"PK\1\2", start + 1)
    at = start + rng.choice((6, 8, 10, 16, 20, 24, 28, 30, 42))
    changed[at : at + 4] = rng.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", bytes(4), b"\x08\0\x08\0"))
    return bytes(changed)


def wrong_index(good: bytes, rng: random.Random) -> bytes:
    with np.load(io.BytesIO(good)) as saved:
        columns = dict(saved)
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(columns))
    other = rng.choice(sorted(columns))
    kind = rng.randrange(9)
    if kind == 0:
        return zipped(entries.items(), rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
    if kind == 1:
        return rng.choice((BOMB, zipped([*entries.items(), (f"{name}.npy", entries[f"{other}.npy"])])))
    if kind == 2:
        return with_lying_directory(good, rng)
    if kind == 3:
        return claiming(entries, f"{name}.npy", rng)
    if kind == 4:
        columns[rng.choice(("more", f"{name}/", "../x"))] = columns[other]
    elif kind == 5:
        del columns[name]
    elif kind == 6:
        columns["labels"] = columns["labels"][::-1]
    else:
        columns[name] = wrong_column(columns[name], rng)
    buffer = io.BytesIO()
    np.savez(buffer, **columns)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["mutated", "wrong"])
def test_a_damaged_or_wrong_index_is_reported_and_made_anew(shards, monkeypatch, kind):
    """The index is only a cache, so the images and labels must be those of the shards whatever it contains."""
    rng, warnings, index = random.Random(0), list[str](), shards[0].with_name("train.index.npz")
    monkeypatch.setattr(shards_module, "warn", warnings.append)
    monkeypatch.setattr(shards_module, "write_atomic", Path.write_bytes)  # without fsync
    expected = rows_of(shards)
    good = index.read_bytes()
    for _ in range(NUM_EXAMPLES):
        content = mutated(good, rng, [good]) if kind == "mutated" else wrong_index(good, rng)
        index.write_bytes(content)
        assert rows_of(shards) == expected
        assert index.read_bytes() in (good, content)
    assert all(warning.startswith(f"{index} is not used (") for warning in warnings)
    print(f"{kind}: {len(warnings)} of {NUM_EXAMPLES} were reported")
    assert len(warnings) > NUM_EXAMPLES * 0.6


# Shards


def images_of(path: Path) -> list[tuple[int, int, int, str]]:
    """Return label, offset, size and name of each image according to tarfile."""
    with tarfile.open(path, "r:") as archive:
        files = {member.name: member for member in archive if member.isfile()}
        labels = {n[:-4]: int(archive.extractfile(m).read()) for n, m in files.items() if n.endswith(".cls")}
    return sorted((labels[n[:-4]], m.offset_data, m.size, n) for n, m in files.items() if n.endswith(".png"))


PAX_FIELDS = (
    b"size=1", b"size=512", b"size=-5", b"size=" + b"9" * 30, b"size=" + b"9" * 5000, b"size=1.5", b"path=8.png",
    b"path=" + b"x/" * 5000, b"path=\xff\xfe.png", b"path=", b"uid=" + b"9" * 400, b"mtime=nan", b"hdrcharset=BINARY",
    b"GNU.sparse.map=0,10,999999999999,1", b"GNU.sparse.major=1", b"GNU.sparse.size=" + b"9" * 30, b"comment=a=b\nc",
)  # fmt: skip


def random_pax_header(rng: random.Random) -> bytes:
    fields = rng.sample(PAX_FIELDS, rng.choice((0, 1, 2)))
    records = b"".join(pax_record(field, rng.choice((*[None] * 6, 0, len(field), 10**9))) for field in fields)
    kind = rng.choice((tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE))
    return tar_header("x", kind, b"%011o" % len(records)) + padded(records)


SIZES = (
    b"77777777777", b"\x80" + bytes(3) + b"\xff" * 8, b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\xff" + bytes(11), b"0",
    b"1", b"00000001000", b"00000100000", b" ", b"nine", b"-7", b"\x80" + bytes(10) + b"\1",
)  # fmt: skip
TYPES = [*tarfile.SUPPORTED_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, b"V", b"M", b"D", b"\xff"]


def hostile_tar(rng: random.Random) -> bytes:
    """Return whole samples with up to three hostile headers between them, each perhaps many times."""
    parts = [padded(tar_header(name, b"0", b"%011o" % len(data)) + data) for name, data in samples(range(4))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(("0.png", "8.png", "8.cls", "x" * 100, "a/", "\udcff.png"))
        if rng.random() < 0.4:
            part = random_pax_header(rng)
        elif rng.random() < 0.3:
            part = tar_header("x", tarfile.GNUTYPE_LONGNAME, b"00000000006") + padded(b"9.png\0")
        else:
            part = tar_header(name, rng.choice(TYPES), rng.choice(SIZES)) + bytes(rng.choice((0, 512)))
        parts.insert(rng.randrange(len(parts) + 1), part * rng.choice((1, 1, 1, 1, 50)))
    return b"".join(parts) + rng.choice((*[bytes(1024)] * 9, bytes(512), bytes(10240), b"", b"end", bytes(2**21)))


@pytest.mark.parametrize("kind", ["flipped", "mutated", "hostile"])
def test_a_damaged_or_hostile_shard_is_refused_or_read_as_tarfile_does(shards, monkeypatch, kind):
    """A shard that is accepted must have the images and labels that tarfile finds, and a flipped bit must lose none."""
    rng, path, num_refused = random.Random(0), shards[0], 0
    monkeypatch.setattr(shards_module, "write_atomic", lambda *_: None)
    data, other = path.read_bytes(), shards[1].read_bytes()
    for _ in range(NUM_EXAMPLES):
        content = {
            "flipped": lambda: with_flipped_bits(data, rng),
            "mutated": lambda: mutated(data, rng, [data, other]),
            "hostile": lambda: hostile_tar(rng),
        }[kind]()
        path.write_bytes(content)
        try:
            found = rows_of([path])
        except ConfigError as error:
            num_refused += 1
            if not str(error).startswith(f"{path}: "):
                assert "its shards hold no image" in str(error) and images_of(path) == []
            continue
        assert sorted((label, *row) for label, _, *row in found) == images_of(path)
        assert kind != "flipped" or len(found) == 4
    print(f"{kind}: {num_refused} of {NUM_EXAMPLES} were refused")
    assert NUM_EXAMPLES * 0.2 < num_refused < NUM_EXAMPLES
