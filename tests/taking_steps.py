"""A small model with its optimizer and schedule, and batches for training steps."""

import torch
from making_data import CPU
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.device import RunPlan
from sasa_train.training.optim import build_schedule
from sasa_train.training.state import build_state
from sasa_train.training.step import Stepper


def setup(*overrides: str, model: nn.Module | None = None) -> Stepper:
    config = compose_config(["trainer.global_batch_size=8", "trainer.precision=fp32", *overrides])
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    state = build_state(config, model, CPU)
    return Stepper(RunPlan(config, CPU), state, build_schedule(config, state.optimizer, steps_per_epoch=10))


def batches(num: int, size: int = 8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        yield torch.randn(size, 3, 2, 2, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def weights(stepper: Stepper) -> torch.Tensor:
    return nn.utils.parameters_to_vector(stepper.state.model.parameters()).detach().clone()
