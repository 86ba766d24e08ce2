"""Check a training step, an evaluation and the optimizer on models small enough to verify by hand."""

import copy
import math

import pytest
import torch
from taking_steps import batches, setup, weights
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.config.derived import total_steps
from sasa_train.device import resolve
from sasa_train.models import build_model
from sasa_train.refusal import ConfigError
from sasa_train.training.evaluation import evaluate
from sasa_train.training.nonfinite import NonFiniteError
from sasa_train.training.optim import build_optimizer, peak_lr
from sasa_train.training.step import train_one_epoch

CPU = torch.device("cpu")


def test_accumulation_equals_the_whole_batch():
    whole, cut = setup(), setup("trainer.grad_accum_steps=4")
    images, labels = next(batches(1))
    for _ in range(3):
        whole.train_step(iter([(images, labels)]))
        cut.train_step(zip(images.split(2), labels.split(2), strict=True))
    torch.testing.assert_close(weights(cut), weights(whole), rtol=1e-5, atol=1e-6)
    assert whole.state.window.averages() == pytest.approx(cut.state.window.averages())


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    stepper = setup("trainer.grad_clip_norm=0.01", "optimizer=sgd", "optimizer.name=momentum", "optimizer.lr=1")
    stepper.config.grad_clip_norm, before = 0.01, weights(stepper)
    stepper.schedule.base_values = [1.0] * len(stepper.schedule.base_values)
    norm = stepper.train_step(batches(1))
    assert norm is not None and norm > 0.1
    assert (weights(stepper) - before).norm() == pytest.approx(0.01, rel=0.02)  # plus a small weight decay


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_agree_on_loss_and_gradient_norm(precision):
    """Losses and norms must be within 2 % of fp32; without unscaling, fp16 norms would be 65,536 times too large."""
    stepper, plain = setup(f"trainer.precision={precision}"), setup()
    norm = stepper.train_step(batches(1), want_grad_norm=True)
    expected = plain.train_step(batches(1), want_grad_norm=True)
    assert norm.item() == pytest.approx(expected.item(), rel=0.02)
    assert stepper.state.window.averages()[0] == pytest.approx(plain.state.window.averages()[0], rel=0.02)


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_non_finite_loss_ends_its_step_with_the_weights_before_it(optimizer, is_late):
    """The loss is NaN in the second micro-batch of step 2 of 4; the error must name the step and micro-batch.

    On a GPU, this is detected one step late (simulated here), and a fused optimizer skips the update itself.
    """
    stepper = setup("trainer.grad_accum_steps=2", f"optimizer.name={optimizer}", "optimizer.args={fused:true}")
    stepper.loss_watch.is_late, before = is_late, torch.empty(0)
    given = list(batches(8))
    given[3][0][1, 0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the loss of step 2 is not finite") as caught:
        for _ in train_one_epoch(stepper, iter(given), 4, lambda step: step % 2 == 0):
            before = weights(stepper) if stepper.state.step == 1 else before
    assert stepper.state.step == 1 + is_late and torch.equal(weights(stepper), before)
    assert (caught.value.step, caught.value.number) == (1, 1)


def test_the_moving_average_follows_its_formula_and_counts_its_steps():
    """The decay is 1 - step^(-2/3) during warm-up, until this exceeds the requested value of 0.9 at step 32."""
    stepper = setup("trainer.ema_decay=0.9", "trainer.ema_warmup=true")
    expected = None
    for step, batch in enumerate(batches(36), start=1):
        stepper.train_step(iter([batch]))
        decay = 0.0 if step == 1 else min(0.9, 1 - (1 + (step - 1)) ** (-2 / 3))
        now = weights(stepper).double()
        expected = now if expected is None else decay * expected + (1 - decay) * now
    average = nn.utils.parameters_to_vector(stepper.state.ema.module.parameters()).double()
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "adafactor", "muon"])
def test_state_survives_a_round_trip_with_its_generators(optimizer):
    stepper = setup("trainer.ema_decay=0.9", f"optimizer.name={optimizer}")
    for _ in range(3):
        stepper.train_step(batches(1))
    saved, expected = copy.deepcopy(stepper.state.state_dict()), torch.rand(2)  # no shared tensors, as from a file
    other = setup("trainer.ema_decay=0.9", f"optimizer.name={optimizer}")
    other.state.load_state_dict(saved)
    assert torch.equal(torch.rand(2), expected)
    for _ in range(3):
        stepper.train_step(batches(1))
        other.train_step(batches(1))
    assert torch.equal(weights(other), weights(stepper)) and other.state.step == 6


def test_an_allowed_change_of_hyperparameters_is_not_undone_by_the_checkpoint():
    saved = setup("optimizer.weight_decay=0.1").state.state_dict()
    other = setup("optimizer.weight_decay=0.2")
    other.state.load_state_dict(saved)
    assert {group["weight_decay"] for group in other.state.optimizer.param_groups} == {0.0, 0.2}


def test_evaluation_counts_every_image_once():
    """The logits of seven images, in batches of 4 and 3, are set by hand: 3 are correct in top1 and 6 in top5."""
    logits = torch.zeros(7, 6)
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    for i, ranking in enumerate(["0", "1", "2", "03", "014", "01234", "0123"]):
        for place, label in enumerate(ranking):
            logits[i, int(label)] = 10 - place
    logits[6, 5] = 5
    model = nn.Sequential(nn.Flatten(), nn.Identity())
    given = zip(logits.view(7, 6, 1, 1).split(4), labels.split(4), strict=True)
    result = evaluate(model, given, 6, CPU, "fp32")
    assert (result.num_images, result.top1, result.top5) == (7, 100 * 3 / 7, pytest.approx(100 * 6 / 7))
    assert result.class_hits == [1, 1, 1, 0, 0, 0] and result.class_images == [1, 1, 1, 1, 1, 2]
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())


def test_an_evaluation_stops_when_asked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert evaluate(model, batches(3), 3, CPU, "fp32", stop_requested=lambda: True) is None


def test_the_learning_rate_is_a_function_of_the_step():
    """The rate rises linearly to 0.1 x 8/256 over two epochs, then follows a cosine to min_lr for 80 steps."""
    stepper = setup("trainer.epochs=10", "schedule.warmup_epochs=2", "schedule.min_lr=0.0001")
    peak = 0.1 * 8 / 256

    def lr_at(step):
        stepper.schedule.step_update(step)
        return stepper.state.optimizer.param_groups[0]["lr"]

    assert lr_at(0) == 0 and lr_at(5) == pytest.approx(peak / 4) and lr_at(10) == pytest.approx(peak / 2)
    assert lr_at(20) == pytest.approx(peak) and lr_at(60) == pytest.approx((peak + 0.0001) / 2)
    assert lr_at(99) == pytest.approx(0.0001 + (peak - 0.0001) * (1 + math.cos(79 / 80 * math.pi)) / 2)
    assert lr_at(10) == pytest.approx(peak / 2)  # independent of earlier calls


def test_lr_basis_and_max_steps():
    config = compose_config(["trainer.global_batch_size=512", "optimizer.lr=0.1", "trainer.epochs=3"])
    assert peak_lr(config) == 0.2 and total_steps(config, 10) == 30
    config.optimizer.lr_basis, config.trainer.max_steps = "absolute", 7
    assert peak_lr(config) == 0.1 and total_steps(config, 10) == 7


def test_norms_biases_and_position_embeddings_do_not_decay():
    config = compose_config(["model.width=0.25", "model.num_heads=2", "model.stem=attention_small"])
    model = build_model(config.model, 10, 8)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(config, model).param_groups
    decayed = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"]}
    spared = {names[id(p)] for group in groups for p in group["params"] if not group["weight_decay"]}
    assert decayed | spared == set(names.values()) and {g["weight_decay"] for g in groups} == {0.0, 1e-4}
    endings = ("bias", "rel_height", "rel_width", "emb_row", "emb_col", "nu")
    is_norm = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert spared == {n for n in names.values() if n.endswith(endings) or n.rpartition(".")[0] in is_norm}


def test_auto_precision_is_fp32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, config = resolve(compose_config([]))
    assert (device.type, config.trainer.precision) == ("cpu", "fp32")
    with pytest.raises(ConfigError, match="trainer.device=cuda, but torch sees no CUDA device"):
        resolve(compose_config(["trainer.device=cuda"]))


def test_a_compiled_run_has_the_same_state_dict(monkeypatch):
    """Check that compiling preserves the weights and state dict keys, with a backend that needs no C++ compiler."""
    compiled, real = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or real(model, backend="aot_eager"))
    stepper = setup("trainer.compile=true")
    plain = setup()
    stepper.train_step(batches(1))
    plain.train_step(batches(1))
    assert compiled == [stepper.state.model]
    assert stepper.state.state_dict()["model"].keys() == plain.state.state_dict()["model"].keys()
    torch.testing.assert_close(weights(stepper), weights(plain))
