"""Check batch norm's running statistics under gradient checkpointing and recalibration."""

import copy

import pytest
import torch
from reading_runs import assert_equal_state
from taking_steps import CPU, setup
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.models import build_model, enable_grad_checkpointing
from sasa_train.refusal import ConfigError
from sasa_train.training.evaluation import recalibrate
from sasa_train.training.step import Stepper


def trained(checkpointing: bool, steps: int = 2) -> Stepper:
    model_keys = ("model.width=0.125", "model.num_heads=2", "model.stem=attention_small", "model.drop_path_rate=0.5")
    torch.manual_seed(0)
    model = build_model(compose_config([*model_keys]).model, 5, 8)
    if checkpointing:
        enable_grad_checkpointing(model)
    stepper = setup("trainer.grad_accum_steps=2", f"trainer.grad_checkpointing={checkpointing}", model=model)
    generator = torch.Generator().manual_seed(1)
    given = (
        (torch.randn(4, 3, 8, 8, generator=generator), torch.randint(0, 5, (4,), generator=generator))
        for _ in range(2 * steps)
    )
    model.train()
    for _ in range(steps):
        stepper.train_step(given)
    return stepper


def test_gradient_checkpointing_changes_nothing():
    """Weights, random state and statistics must match plain training; naive recomputation updates statistics twice."""
    plain = trained(False)
    after = torch.rand(1)
    recomputed = trained(True)
    assert torch.equal(torch.rand(1), after)
    assert_equal_state(plain.state.model.state_dict(), recomputed.state.model.state_dict())


def test_gradient_checkpointing_keeps_less():
    """Check that autograd saves less than half as many tensor elements as it does without checkpointing."""

    def saved(checkpointing: bool) -> int:
        model = trained(checkpointing, steps=1).state.model
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(torch.randn(4, 3, 8, 8))
        return total

    assert saved(True) < 0.5 * saved(False)


def test_a_model_without_checkpointing_is_refused():
    with pytest.raises(ConfigError, match="trainer.grad_checkpointing=true: Linear cannot do it"):
        enable_grad_checkpointing(nn.Linear(1, 1))


def test_recalibration_takes_the_plain_average_over_the_batches():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(9.0)
    model = nn.Sequential(norm)
    model.eval()
    given = [torch.randn(8, 3, 4, 4) * 2 + 1 for _ in range(5)]
    before = copy.deepcopy(dict(model.named_parameters()))
    recalibrate(model, iter((images, torch.zeros(8)) for images in given), CPU)
    means = torch.stack([images.mean((0, 2, 3)) for images in given]).mean(0)
    variances = torch.stack([images.transpose(0, 1).flatten(1).var(1) for images in given]).mean(0)
    torch.testing.assert_close(norm.running_mean, means)
    torch.testing.assert_close(norm.running_var, variances)
    assert norm.momentum == 0.1 and not model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
