"""Switch on with data.target."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from reading_runs import assert_same_run, last
from torch import nn

import sasa_train
from sasa_train.refusal import ConfigError

SMALL = (
    "trainer.global_batch_size=16", "trainer.epochs=2", "trainer.log_every_steps=2", "output_dir=out",
    "data.image_size=8", "data.num_workers=0", "augment.crop=false", "optimizer.lr=2",
)  # fmt: skip


class Squares:
    """Bright squares at the top or bottom of 8 x 8 images."""

    classes = ("top", "bottom")

    def __init__(self, count, seed=0):
        random = np.random.default_rng(seed)
        self.images = random.integers(0, 99, (count, 8, 8, 3), dtype=np.uint8)
        self.targets = [position % 2 for position in range(count)]
        for image, target in zip(self.images, self.targets, strict=True):
            image[4 * target : 4 * target + 4, 2:6] += 150

    def __len__(self):
        return len(self.images)

    def __getitem__(self, position):
        return self.images[position], self.targets[position]


def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes))


def test_sets_are_given_as_objects(tmp_path, monkeypatch, own_module, one_thread):
    train = partial(sasa_train.train_model, list(SMALL), model=net)
    run = train(train_set=Squares(70), val_set=Squares(30, seed=1))
    assert run.finished and run.best["top1"] > 90 and run.load().classes == ["top", "bottom"]
    stop = lambda event, view: "stop" if event == "step" and view.step == 4 else None  # noqa: E731
    cut = partial(sasa_train.train_model, [*SMALL, "run_name=cut"], model=net)
    assert not cut(train_set=Squares(70), val_set=Squares(30, seed=1), hooks=[stop]).finished
    assert cut(train_set=Squares(70), val_set=Squares(30, seed=1)).finished
    assert_same_run(Path("out/cut"), run.path)
    assert train(train_set=Squares(70), val_set=Squares(30, seed=1)).path == run.path
    assert train(train_set=Squares(70, seed=2), val_set=Squares(30, seed=1)).path != run.path
    by_holdout = sasa_train.train_model([*SMALL, "data.holdout_fraction=0.2"], model=net, train_set=Squares(70))
    assert sum(c["num_images"] for c in last(by_holdout.path)["fingerprint"]["val"]["classes"]) == 14
    module = sasa_train.train_model(list(SMALL), model=net(2), train_set=Squares(70), val_set=Squares(30, seed=1))
    assert module.finished


def test_wrong_sets(tmp_path, monkeypatch, own_module):
    with pytest.raises(ConfigError, match="train_set and data in the overrides exclude each other"):
        sasa_train.train_model(["data=digits", *SMALL], train_set=Squares(70), val_set=Squares(3))
    with pytest.raises(ConfigError, match=r"train_set: .*TypeError"):
        sasa_train.train_model(list(SMALL), model=net, train_set=3)
    with pytest.raises(ConfigError, match="val is None"):
        sasa_train.train_model(list(SMALL), model=net, train_set=Squares(70))


def test_workers_read_given_sets(tmp_path, own_module, one_thread):
    here = sasa_train.train_model(
        [*SMALL, "data.resident=false"], model=net, train_set=Squares(70), val_set=Squares(30)
    )
    in_worker = sasa_train.train_model(
        [*SMALL, "data.resident=false", "data.num_workers=1", "run_name=workers"],
        model=net, train_set=Squares(70), val_set=Squares(30),
    )  # fmt: skip
    assert_same_run(here.path, in_worker.path)
