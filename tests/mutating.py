"""Corrupt bytes at random, as failing disks, network errors and untrusted sources may do."""

import random
from collections.abc import Sequence

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
