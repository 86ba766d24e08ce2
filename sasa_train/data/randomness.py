"""Per-sample random numbers that depend only on (seed, epoch, index), not on workers, batches, resumption or ranks.

They come from a counter-based hash (the finaliser of splitmix64, Steele et al. 2014), so the numbers for any sample
can be computed directly, whether for a single sample in a worker or for a whole batch.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache

import numpy as np
import torch

GOLDEN = np.uint64(0x9E3779B97F4A7C15)

# Each purpose has its own random numbers, so that enabling one feature does not change those of another.
CROP, LIBRARY, POLICY, ERASING, MIXING, RECALIBRATION, STEP, OWN, SAMPLER = (np.uint64(n) for n in range(1, 10))


_numpys = np.random.MT19937(0)  # takes the place of NumPy's global generator in `own_code_rng`


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the permutation of the images for this epoch."""
    return np.argsort(_hash(_key(seed, epoch), np.arange(num_images)), kind="stable")


def balanced_order(seed: int, epoch: int, labels: np.ndarray) -> np.ndarray:
    """Draw as many images as there are, each from a class drawn uniformly among those that have images."""
    by_class = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    draws = sample_draws(seed, epoch, np.arange(len(labels)), 2, SAMPLER)
    chosen = (draws[:, 0] * len(counts)).astype(np.int64)
    return by_class[first[chosen] + (draws[:, 1] * counts[chosen]).astype(np.int64)]


def fixed_order(num_images: int) -> np.ndarray:
    """Return a permutation that is independent of the seed, for subsets and hold-outs."""
    return epoch_order(0x5A5A, 0, num_images)


def sample_draws(seed: int, epoch: int, indices: np.ndarray, num_draws: int, purpose: np.uint64 = CROP) -> np.ndarray:
    """Draw uniform random numbers in [0, 1), float64 [len(indices), num_draws]."""
    state = _hash(_key(seed, epoch) ^ purpose, indices)  # independent of epoch_order, which uses purpose 0
    bits = _mix(state[:, None] + np.arange(1, num_draws + 1, dtype=np.uint64) * GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_rng(seed: int, epoch: int, index: int) -> AbstractContextManager[None]:
    """Seed torch's CPU generator for one sample's torchvision transforms and restore its state afterwards."""
    return _seeded(_hash(_key(seed, epoch) ^ LIBRARY, np.array([index]))[0])


def batch_rng(seed: int, step: int, micro_batch: int) -> AbstractContextManager[None]:
    """Seed torch's CPU generator for mixup and cutmix on one micro-batch and restore its state afterwards."""
    return _seeded(_hash(_key(seed, step) ^ MIXING, np.array([micro_batch]))[0])


def recalibration_rng(seed: int, step: int, device: torch.device) -> AbstractContextManager[None]:
    """Seed torch's generators, including the device's, for batch norm recalibration; restore their state afterwards."""
    value = _hash(_key(seed, step) ^ RECALIBRATION, np.array([0]))[0]
    return _seeded(value, [device] if device.type == "cuda" else [])


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators, including the device's, for dropout and drop path in one process's share of a step."""
    torch.manual_seed(int(_hash(_key(seed, step) ^ STEP, np.array([rank]))[0]))


@contextmanager
def own_code_rng(seed: int, epoch: int, index: int) -> Iterator[torch.Generator]:
    """Yield a generator for the user's own code on one sample; seed the global generators on the CPU likewise.

    The states of torch's, NumPy's and Python's global generators are restored afterwards.
    """
    value = int(_hash(_key(seed, epoch) ^ OWN, np.array([index]))[0])
    of_numpy, of_python = np.random.get_bit_generator(), random.getstate()  # type: ignore[attr-defined]
    try:
        with _seeded(np.uint64(value)):
            # Fifty times as fast as to save and restore the state.
            np.random.set_bit_generator(_numpys)  # type: ignore[attr-defined]
            np.random.seed(value >> 32)
            random.seed(value)
            yield torch.Generator().manual_seed(value)
    finally:
        np.random.set_bit_generator(of_numpy)  # type: ignore[attr-defined]
        random.setstate(of_python)


@contextmanager
def _seeded(value: np.uint64, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    with torch.random.fork_rng(devices):
        (torch.manual_seed if devices else torch.default_generator.manual_seed)(int(value))
        yield


@lru_cache(maxsize=8)
def _key(seed: int, epoch: int) -> np.uint64:
    return _hash(_mix(np.array([seed], dtype=np.uint64) + GOLDEN)[0], np.array([epoch]))[0]


def _hash(key: np.uint64, counters: np.ndarray) -> np.ndarray:
    return _mix(_mix(counters.astype(np.uint64) * GOLDEN + key) ^ key)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
