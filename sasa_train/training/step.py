"""One training step and one epoch: tensors in, numbers out. No files, no printing, no Hydra.

A step never leaves the device idle: sums stay there until a log row asks for them, and the loss is checked while the
backward pass runs.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from sasa_train.config.keys import TrainerConfig
from sasa_train.data.randomness import seed_step
from sasa_train.device import RunPlan
from sasa_train.processes import collectives
from sasa_train.training.evaluation import Batches, batch_norms
from sasa_train.training.nonfinite import LossWatch
from sasa_train.training.state import TrainState


class Stepper:
    """The parts of a step that no checkpoint keeps: the compiled forward pass, the loss, the schedule."""

    def __init__(self, plan: RunPlan, state: TrainState, schedule: Scheduler):
        self.plan, self.state, self.schedule = plan, state, schedule
        self.config = config = plan.trainer
        self.shared = collectives.share_gradients(state.model)
        self.forward = torch.compile(self.shared) if config.compile else self.shared
        self.criterion = build_criterion(config)
        # Only torch's fused optimizers take `found_inf`; timm's lookahead just copies the defaults of the one inside.
        is_torchs = type(state.optimizer).__module__.startswith("torch.optim.")
        is_late = plan.device.type == "cuda" and is_torchs and bool(state.optimizer.defaults.get("fused"))
        self.loss_watch = LossWatch(state.device, plan.grad_accum_steps, is_late)
        self.clips = config.grad_clip_norm or config.grad_clip_value or config.grad_clip_agc

    def train_step(self, batches: Batches, want_grad_norm: bool = False) -> Tensor | None:
        """Update the weights once, from `grad_accum_steps` micro-batches; return the gradient's norm before clipping.

        The L2 norm is None where it is not wanted and nothing clips.

        Raises:
            NonFiniteError: a loss, perhaps of the step before, is not finite; the weights are those before that step.
        """
        plan, config, state = self.plan, self.config, self.state
        self.loss_watch.check()
        self.schedule.step_update(state.step)
        state.optimizer.zero_grad()
        # Several processes each draw their own dropout, by (seed, step, rank) alone. A single process goes on with
        # torch's generators, which the checkpoint holds.
        if plan.world_size > 1:
            seed_step(plan.config.seed, state.step, plan.rank)
        losses = []
        for number in range(plan.grad_accum_steps):
            images, labels = next(batches)
            is_last = number == plan.grad_accum_steps - 1
            # Processes add their gradients once per step, in the backward pass of the last micro-batch.
            with contextlib.nullcontext() if is_last or plan.world_size == 1 else self.shared.no_sync():  # type: ignore[operator]
                with plan.autocast():
                    logits = self.forward(images)
                    loss = self.criterion(logits.float(), labels)
                self.loss_watch.begin(loss, state.step, number)
                losses.append(loss.detach())
                with frozen_running_stats(state.model) if config.grad_checkpointing else contextlib.nullcontext():
                    state.scaler.scale(loss / plan.grad_accum_steps).backward()
            state.window.add(loss.detach(), logits.detach(), labels)
            if not self.loss_watch.is_late:
                self.loss_watch.check()
        grad_norm = self._clip() if want_grad_norm or self.clips else None
        # The scaler waits for the device, and with it for all processes: see first, on the CPU, that all still run.
        if state.scaler.is_enabled():
            collectives.wait_for_all()
        elif self.loss_watch.is_late:
            state.optimizer.found_inf = collectives.any_of((~torch.stack(losses).isfinite()).any())  # type: ignore[attr-defined]
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        if state.ema:
            state.ema.update(state.model, step=state.step)
        return grad_norm

    def _clip(self) -> Tensor:
        self.state.scaler.unscale_(self.state.optimizer)  # a norm of scaled gradients means nothing
        config, parameters = self.config, list(self.state.model.parameters())
        if config.grad_clip_norm:
            return nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.grad_clip_value:
            nn.utils.clip_grad_value_(parameters, config.grad_clip_value)
        elif config.grad_clip_agc:
            adaptive_clip_grad(_without_classifier(self.state.model), config.grad_clip_agc)
        return grad_norm


def build_criterion(config: TrainerConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss of float32 logits and labels, which are int64 [B] or, mixed, float32 [B, num_classes]."""
    if config.loss == "cross_entropy":
        return nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    return partial(binary_cross_entropy, label_smoothing=config.label_smoothing)


def binary_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """A sigmoid per class, averaged over classes and images, after "ResNet strikes back" (arXiv 2110.00476)."""
    # Mixed labels keep their shares and are smoothed as for cross-entropy. (timm's class smooths only labels that are
    # not mixed, and can make each mixed class a 1.)
    if labels.ndim == 1:
        labels = nn.functional.one_hot(labels, logits.shape[1])
    labels = labels * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Keep batch norm's running statistics as they are inside."""
    # Gradient checkpointing runs the forward pass a second time, which would move them a second time.
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def _without_classifier(model: nn.Module) -> list[nn.Parameter]:
    """The parameters but the last layer's, which adaptive clipping spares (arXiv 2102.06171, section 4.1)."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # distilled models have two
    last = {id(p) for head in heads for p in head.parameters()}
    return [p for p in model.parameters() if id(p) not in last]


class StepReport(NamedTuple):
    """The gradient's norm, where the step took it, and the seconds that the step waited for data."""

    grad_norm: Tensor | None
    wait_seconds: float


def train_one_epoch(stepper: Stepper, batches: Batches, num_steps: int, log_every_steps: int) -> Iterator[StepReport]:
    """Take `num_steps` steps and yield a report after each; the caller decides what happens between steps."""
    stepper.state.model.train()
    waits: list[float] = []
    timed = _timed(batches, waits)
    for _ in range(num_steps):
        waits.clear()
        is_logged = (stepper.state.step + 1) % log_every_steps == 0
        grad_norm = stepper.train_step(timed, want_grad_norm=is_logged)
        yield StepReport(grad_norm, sum(waits))


def _timed(batches: Batches, waits: list[float]) -> Batches:
    """Yield the same batches, and append the seconds that each was waited for to `waits`."""
    start = time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - start)
        yield batch
        start = time.perf_counter()
