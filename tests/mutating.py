"""Corrupt bytes at random, as failing disks, network errors and untrusted sources may do."""

import random
from collections.abc import Sequence
from typing import Any

EXTREMES = (b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff")


def mutated(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Flip bits, truncate, overwrite/copy/repeat/remove/insert a block, edit the header, or splice in another file."""
    at, start, header = (rng.randrange(end) for end in (len(data) + 1, len(data) + 1, 64))
    size, extreme, other = rng.choice((1, 2, 8, 64, 600)), rng.choice(EXTREMES), rng.choice(others)
    block = data[start : start + size]
    return rng.choice(
        [
            with_flipped_bits(data, rng),
            data[:at],
            data[:at] + rng.randbytes(size) + data[at + size :],
            data[:at] + block + data[at + size :],
            data[:at] + block + data[at:],
            data[:at] + data[at + size :],
            data[:at] + rng.randbytes(size) + data[at:],
            data[:header] + extreme + data[header + len(extreme) :],
            data[:at] + other[rng.randrange(len(other) + 1) :],
        ]
    )


def with_flipped_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 16)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def with_another_part(value: Any, rng: random.Random, others: Sequence[Any]) -> Any:
    """Return a copy of nested dicts and lists in which one part, at any depth, is replaced, removed or added."""
    if not isinstance(value, dict | list) or not value:
        return rng.choice(others)
    copied: Any = value.copy()
    keys = list(copied) if isinstance(copied, dict) else range(len(copied))
    key, kind = rng.choice(keys), rng.random()
    if kind < 0.1:
        del copied[key]
    elif kind < 0.2 and isinstance(copied, dict):
        copied[rng.choice(("new", "", "a/b", "..", "step", 3))] = rng.choice(others)
    elif kind < 0.2:
        copied.append(rng.choice([*others, *copied]))
    elif kind < 0.4:
        copied[key] = rng.choice(others)
    else:
        copied[key] = with_another_part(copied[key], rng, others)
    return copied


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value
