"""Check class weights, the balanced sampler and the focal loss: values by hand, names of any text, exact resume."""

import itertools
import math

import numpy as np
import pytest
import torch
from reading_runs import assert_same_run
from running_commands import TINY, run_in_process
from sklearn.utils.class_weight import compute_class_weight
from taking_steps import batches, setup
from torch import nn

from sasa_train.config.compose import as_overrides, compose_config
from sasa_train.config.overrides import expand
from sasa_train.config.saved import load_config, to_yaml
from sasa_train.data.class_weights import weights_of
from sasa_train.data.datasets import Files, ImageSet
from sasa_train.data.plan import BatchPlan
from sasa_train.refusal import ConfigError
from sasa_train.training.imbalance import focal_loss
from sasa_train.training.step import Stepper, build_criterion

COUNTS = (2, 3, 7, 13)


def image_set(counts=COUNTS) -> ImageSet:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return ImageSet([f"class {n}" for n in range(len(counts))], labels, np.arange(len(labels)), Files([]))


def weights_for(*overrides: str, counts=COUNTS) -> np.ndarray | None:
    return weights_of(compose_config(list(overrides)).trainer, image_set(counts))


def test_balanced_weights_are_scikit_learns_and_those_by_hand():
    labels = image_set().labels
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    assert np.allclose(weights_for("trainer.class_weights=balanced"), expected, rtol=1e-12)
    assert expected[0] == 25 / (4 * 2)
    rooted = weights_for("trainer.class_weights=balanced", "trainer.class_weights_power=0.5")
    assert np.allclose(rooted, expected**0.5, rtol=1e-12)
    # A class without images, as classes.txt may list, has no part in the others' weights.
    empty = weights_for("trainer.class_weights=balanced", counts=(2, 0, 3))
    assert np.allclose(empty, [5 / (2 * 2), 1, 5 / (2 * 3)])
    assert weights_for("trainer.class_weights={class 3: 0.5}").tolist() == [1, 1, 1, 0.5]
    assert weights_for("trainer.class_weights=balanced", counts=(5, 5)) is None  # equal weights change nothing


NAMES = {  # as typed on the command line: the names and weights
    "{cat: 3.5, great white shark: 2}": {"cat": 3.5, "great white shark": 2.0},
    "{0:2,1e5:1,no: 3,007: 1.0,null:2}": {"0": 2.0, "1e5": 1.0, "no": 3.0, "007": 1.0, "null": 2.0},
    "{'a, b: {c}': 2, \"it's \\\\\": 3}": {"a, b: {c}": 2.0, "it's \\": 3.0},
    "{don't: 1, café: 2}": {"don't": 1.0, "café": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("typed,expected", NAMES.items())
def test_names_of_classes_may_be_any_text(tmp_path, typed, expected):
    """Check this on the command line, in presets, in sweeps, in a saved config and the command that is printed."""
    config = compose_config([f"trainer.class_weights={typed}"])
    assert config.trainer.class_weights == expected
    assert compose_config(as_overrides(config)) == load_config(to_yaml(config)) == config
    assert load_config(to_yaml(compose_config([])), [f"trainer.class_weights={typed}"]) == config
    jobs = expand([f"trainer.class_weights=balanced,{typed},null"])
    weights = [compose_config(job).trainer.class_weights for job in jobs]
    assert weights == ["balanced", expected, None]
    in_yaml = {name if name.isalnum() and name != "null" else repr(name): weight for name, weight in expected.items()}
    entries = "".join(f"    {name}: {weight}\n" for name, weight in in_yaml.items())
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"# @package _global_\ntrainer:\n  class_weights:\n{entries}")
    assert compose_config([f"experiment={preset}"]).trainer.class_weights == expected
    # A command line replaces a preset's weights, and does not add to them.
    assert compose_config([f"experiment={preset}", "trainer.class_weights={x: 2}"]).trainer.class_weights == {"x": 2.0}


@pytest.mark.parametrize(
    "override,message",
    [
        ("trainer.class_weights={cat: 0}", "must be balanced, or weights from 1e-6 to 1e6"),
        ("trainer.class_weights={cat: many}", "must be balanced, or weights"),
        ("trainer.class_weights={cat: true}", "must be balanced, or weights"),
        ("trainer.class_weights={cat: inf}", "must be finite"),
        ("trainer.class_weights={cat: 1, cat: 2}", "must name each class once"),
        ("trainer.class_weights={cat: 1 2}", "must be balanced, or weights"),
        ("trainer.class_weights={a: b: 1}", "quote names with signs"),
        ("trainer.class_weights={a" + 60_000 * " " + "}", "quote names with signs"),
        ("trainer.class_weights={a: 1" + 60_000 * " ", "quote names with signs"),
        ("trainer.class_weights=balance", "must be balanced, or weights"),
        ("trainer.class_weights=[1,2]", "must be balanced, or weights"),
        ("trainer.class_weights_power=0.5", "needs trainer.class_weights=balanced"),
        ("trainer.focal_gamma=1", "needs trainer.loss=focal"),
        ("data.sampler=weighted", "must be one of shuffled, balanced"),
    ],
)
def test_wrong_values_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_config([override])


def test_an_own_loss_takes_no_weights():
    with pytest.raises(ConfigError, match="your own .* weighs its images itself"):
        compose_config(["trainer.loss_target=my.loss", "trainer.class_weights=balanced"])


def test_a_class_that_is_not_there_is_refused_with_the_nearest_once_the_classes_are_listed(image_folder, in_process):
    (image_folder / "train/red/0.png").write_bytes(b"not decoded before the refusal")
    wrong = ("trainer.class_weights={bleu: 2}", "output_dir=out")
    fixed = ("experiment=debug", "data=image_folder", "trainer.global_batch_size=8")
    for more in (fixed, ()):  # without them, keys are chosen from the images
        said = in_process("train", f"data.root={image_folder}", *more, *wrong, expect=2)
        assert "must name classes of the images, but names bleu (did you mean 'blue'?); the classes are " in said.stderr
        assert "chosen " not in said.stdout and "WARNING" not in said.stderr


# Losses


def test_focal_by_hand():
    """Logits (0, ln 3) give probabilities 1/4 and 3/4."""
    logits, labels = torch.tensor([[0.0, math.log(3)]] * 2, dtype=torch.float64), torch.tensor([1, 0])
    found = focal_loss(logits, labels, gamma=2.0, label_smoothing=0.0).tolist()
    assert found == pytest.approx([-((1 / 4) ** 2) * math.log(3 / 4), -((3 / 4) ** 2) * math.log(1 / 4)], rel=1e-14)
    smooth = focal_loss(logits[:1], labels[:1], gamma=1.5, label_smoothing=0.2).item()
    expected = -0.9 * (1 / 4) ** 1.5 * math.log(3 / 4) - 0.1 * (3 / 4) ** 1.5 * math.log(1 / 4)
    assert smooth == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_focal_without_gamma_is_cross_entropy(is_mixed):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    labels = torch.rand(6, 5).softmax(1) if is_mixed else labels
    focal, plain = (
        build_criterion(compose_config([*keys, "trainer.label_smoothing=0.1"]).trainer, torch.device("cpu"))
        for keys in (["trainer.loss=focal", "trainer.focal_gamma=0"], [])
    )
    torch.testing.assert_close(focal(logits, labels), plain(logits, labels))


def test_focal_of_an_image_that_is_certain_has_a_finite_gradient():
    """At p = 1, the derivative of (1 - p)^0.5 is infinite."""
    logits = torch.tensor([[0.0, 300.0, -300.0]], requires_grad=True)
    focal_loss(logits, torch.tensor([1]), gamma=0.5, label_smoothing=0.1).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "focal"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_step_descends_the_weighted_mean_of_its_global_batch(loss, is_mixed):
    """The weights are normalised over all micro-batches, each of which has other classes."""
    weights = np.array([0.25, 1.0, 7.0])
    stepper = setup("trainer.grad_accum_steps=2", "trainer.label_smoothing=0.1", f"trainer.loss={loss}")
    stepper = Stepper(stepper.plan, stepper.state, stepper.schedule, weights)
    given = list(batches(2, size=4))
    if is_mixed:
        one_hot = torch.eye(3)
        given = [(images, 0.3 * one_hot[labels] + 0.7 * one_hot[labels.flip(0)]) for images, labels in given]
    images, labels = map(torch.cat, zip(*given, strict=True))
    logits = stepper.state.model(images)
    one = build_criterion(stepper.config, torch.device("cpu"))
    losses = torch.stack([one(logits[i : i + 1], labels[i : i + 1]) for i in range(8)])
    chances = labels if is_mixed else nn.functional.one_hot(labels, 3)
    of_images = (chances * torch.tensor(weights)).sum(1).float()
    expected = (of_images * losses).sum() / of_images.sum()
    gradients = torch.autograd.grad(expected, list(stepper.state.model.parameters()))
    stepper.train_step(iter(given))
    for parameter, gradient in zip(stepper.state.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert stepper.state.window.averages()[0] == pytest.approx(expected.item(), rel=1e-6)


# The order of images


def test_balanced_draws_take_each_class_equally_often_and_each_of_its_images():
    images = image_set((5, 50, 945))
    plan = BatchPlan(seed=3, num_images=1000, global_batch_size=10, grad_accum_steps=1, labels=images.labels)
    epochs = [np.concatenate([micro.indices for micro in plan.train(epoch, 0)]) for epoch in range(20)]
    assert plan.steps_per_epoch == 100 and all(len(epoch) == 1000 for epoch in epochs)
    drawn = np.concatenate(epochs)
    # 20,000 draws: a third each, with a standard deviation of sqrt(20,000 x 2/9) = 67; within 5 of them.
    assert abs(np.bincount(images.labels[drawn]) - 20_000 / 3).max() < 5 * 67
    counts = np.bincount(drawn, minlength=1000)
    for label, size in enumerate((5, 50, 945)):  # each image of a class as often: about 1,333, 133 and 7 times
        of_class, mean = counts[images.labels == label], 20_000 / 3 / size
        assert abs(of_class - mean).max() < 5.5 * mean**0.5 + 1
    assert not np.array_equal(epochs[0], epochs[1])
    again = np.concatenate([micro.indices for micro in plan.train(1, 30)])
    assert np.array_equal(again, epochs[1][300:])
    both = [list(BatchPlan(3, 1000, 10, 1, rank, 2, images.labels).train(1, 30)) for rank in (0, 1)]
    shared = [micro.indices for pair in zip(*both, strict=True) for micro in pair]
    assert np.array_equal(np.concatenate(shared), again)


def test_an_image_that_is_drawn_again_is_augmented_in_another_way():
    images = image_set((1, 999))
    micros = list(BatchPlan(0, 1000, 10, 1, labels=images.labels).train(0, 0))
    rare = np.flatnonzero(images.labels == 0)[0]
    draws = np.concatenate([micro.draws[micro.indices == rare] for micro in micros])
    assert len(draws) > 400 and len(set(draws)) == len(draws)


# Whole runs


BALANCED = (
    "data.sampler=balanced", "trainer.class_weights={0: 3, 7: 0.25}", "trainer.loss=focal", "augment.cutmix=1.0",
    "augment.policy=trivial_augment", "trainer.grad_accum_steps=2", "trainer.checkpoint_every_steps=1",
)  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_run_killed_in_mid_epoch_ends_as_one_undisturbed(tmp_path, monkeypatch, capsys):
    """The run has class weights, the focal loss and the balanced sampler; the resumed one streams its images."""
    assert run_in_process(tmp_path, monkeypatch, *TINY, *BALANCED, "run_name=whole") == 0
    said = capsys.readouterr().out
    assert "balance     classes are drawn equally often; class weights from 0.25 (7) to 3 (0)" in said, said
    real, numbers = Stepper.train_step, itertools.count(1)

    def dies(self, *arguments, **options):
        if next(numbers) == 7:
            raise RuntimeError("killed")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Stepper, "train_step", dies)
        run_in_process(tmp_path, monkeypatch, *TINY, *BALANCED, "run_name=a")
    assert run_in_process(tmp_path, monkeypatch, *TINY, *BALANCED, "run_name=a", "data.resident=false") == 0
    assert "continues   at step 6" in capsys.readouterr().out
    assert_same_run(tmp_path / "out/whole", tmp_path / "out/a")
    for change in ("data.sampler=shuffled", "trainer.class_weights={0: 3, 8: 0.25}", "trainer.focal_gamma=1"):
        assert run_in_process(tmp_path, monkeypatch, *TINY, *BALANCED, "run_name=a", change) == 2
        assert f"{change.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_weights_of_1_change_no_bit(tmp_path, monkeypatch, capsys):
    debug = ("experiment=debug", "output_dir=out")
    assert run_in_process(tmp_path, monkeypatch, *debug, "run_name=none") == 0
    ones = ("trainer.class_weights={3: 1}", "data.sampler=null", "run_name=ones")
    assert run_in_process(tmp_path, monkeypatch, *debug, *ones) == 0
    assert "all class weights are equal, which changes nothing" in capsys.readouterr().out
    assert_same_run(tmp_path / "out/none", tmp_path / "out/ones")
