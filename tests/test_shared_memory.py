"""Check that a run that needs more shared memory than Docker's 64 MiB is refused before a worker dies."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from making_data import CPU, config_for

from sasa_train.data.loader import build_eval_loader, build_loaders
from sasa_train.refusal import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
TRAIN, VAL = 18 * 3 * 72**2, 8 * 3 * 72**2  # bytes of all images, which is less than the queues could hold


@pytest.fixture
def config(image_folder):
    overrides = ("data=image_folder", f"data.root={image_folder}", "trainer.global_batch_size=4")
    return lambda *more: config_for(*overrides, "data.image_size=72", "data.num_workers=2", *more)


def leave(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_the_queues_of_train_and_val_must_fit(config, monkeypatch):
    leave(monkeypatch, TRAIN + VAL)
    build_loaders(config(), CPU).close()
    leave(monkeypatch, TRAIN + VAL - 1)
    with pytest.raises(ConfigError, match=r"data.num_workers=2: .* --shm-size=1g.* data.num_workers=1, or a smaller"):
        build_loaders(config(), CPU)
    build_eval_loader(config(), CPU, ["blue", "red"])[0].close()  # needs only val's share
    build_loaders(config("data.num_workers=0"), CPU).close()


def test_three_micro_batches_a_worker_are_counted(config, monkeypatch):
    queued = (3 * 4 + 8) * 3 * 72**2  # val has only 8 images
    leave(monkeypatch, queued)
    build_loaders(config("data.num_workers=1"), CPU).close()
    leave(monkeypatch, queued - 3 * 72**2)
    with pytest.raises(ConfigError, match=r"/dev/shm has 0 MiB free.*use data.num_workers=0"):
        build_loaders(config("data.num_workers=1"), CPU)


def test_decoding_into_memory_needs_it_too(config, monkeypatch):
    leave(monkeypatch, 18 * 3 * 16**2 - 1)
    with pytest.raises(ConfigError, match=r"--shm-size=1g\), or use data.num_workers=1$"):
        build_loaders(config("data.image_size=16"), CPU)
