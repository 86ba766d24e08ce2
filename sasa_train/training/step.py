"""Training steps and epochs. This module does not access files, print or use Hydra.

A step never leaves the device idle: sums stay on the device until a log row needs them, and the loss is checked during
the backward pass.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import adaptive_clip_grad
from torch import Tensor, nn

from sasa_train.config.keys import TrainerConfig
from sasa_train.data.randomness import seed_step
from sasa_train.device import RunPlan
from sasa_train.processes import collectives
from sasa_train.training.distillation import Teacher
from sasa_train.training.evaluation import Batches, batch_norms
from sasa_train.training.freezing import set_to_train
from sasa_train.training.imbalance import WeightedLoss, focal_loss, scale_gradients
from sasa_train.training.nonfinite import LossWatch
from sasa_train.training.optim import backward
from sasa_train.training.own_loss import Loss, build_own_loss
from sasa_train.training.state import TrainState


class Stepper:
    """The parts of a training step that checkpoints do not contain: the compiled forward pass, loss and schedule."""

    def __init__(
        self,
        plan: RunPlan,
        state: TrainState,
        schedule: Scheduler,
        class_weights: np.ndarray | None = None,
        teacher: Teacher | None = None,
    ):
        self.plan, self.state, self.schedule = plan, state, schedule
        self.config = config = plan.trainer
        self.shared = collectives.share_gradients(state.model)
        self.forward = torch.compile(self.shared) if config.compile else self.shared
        self.criterion = build_criterion(config, state.device, class_weights)
        self.teacher = teacher if plan.config.distill.weight > 0 else None
        # Only torch's fused optimizers take `found_inf`; timm's lookahead just copies the defaults of the one it wraps.
        is_torchs = type(state.optimizer).__module__.startswith("torch.optim.")
        is_late = plan.device.type == "cuda" and is_torchs and bool(state.optimizer.defaults.get("fused"))
        self.loss_watch = LossWatch(state.device, plan.grad_accum_steps, is_late)
        self.clips = config.grad_clip_norm or config.grad_clip_value or config.grad_clip_agc

    def next_lr(self) -> float:
        """Return the learning rate of the next step, the highest of all groups."""
        self.schedule.step_update(self.state.step)
        return max(group["lr"] for group in self.state.optimizer.param_groups)

    def train_step(self, batches: Batches, want_grad_norm: bool = False) -> Tensor | None:
        """Update the weights once, using `grad_accum_steps` micro-batches; return the gradient norm before clipping.

        The L2 norm is None if `want_grad_norm` is false and no clipping is configured.

        Raises:
            NonFiniteError: a loss of this or the previous step is not finite; the weights are those before that step.
        """
        plan, config, state = self.plan, self.config, self.state
        self.loss_watch.check()
        self.schedule.step_update(state.step)
        state.optimizer.zero_grad()
        # With several processes, each draws its own dropout, which depends only on (seed, step, rank). A single process
        # uses torch's generators, whose state is saved in the checkpoint.
        if plan.world_size > 1:
            seed_step(plan.config.seed, state.step, plan.rank)
        losses = []
        for number in range(plan.grad_accum_steps):
            images, labels = next(batches)
            is_last = number == plan.grad_accum_steps - 1
            # Gradients are averaged over the processes once per step, in the backward pass of the last micro-batch.
            with contextlib.nullcontext() if is_last or plan.world_size == 1 else self.shared.no_sync():  # type: ignore[operator]
                with plan.autocast():
                    logits = self.forward(images)
                    loss = self.criterion(logits.float(), labels)
                    if self.teacher is not None:
                        weights = self.criterion.of_images(labels) if isinstance(self.criterion, WeightedLoss) else None
                        loss = self.teacher.added_to(loss, logits.float(), images, weights)
                self.loss_watch.begin(loss, state.step, number)
                losses.append(loss.detach())
                with frozen_running_stats(state.model) if config.grad_checkpointing else contextlib.nullcontext():
                    backward(state.scaler.scale(loss / plan.grad_accum_steps), state.optimizer)
            state.window.add(loss.detach(), logits.detach(), labels)
            if not self.loss_watch.is_late:
                self.loss_watch.check()
        if isinstance(self.criterion, WeightedLoss):
            factor = self.criterion.factor(config.global_batch_size)
            scale_gradients(state.model, factor)
            state.window.scale_last(losses, factor, len(labels))
        grad_norm = self._clip() if want_grad_norm or self.clips else None
        # The scaler waits for the device and therefore for all processes. First make sure on the CPU that all are
        # still running.
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
        self.state.scaler.unscale_(self.state.optimizer)  # the norm of scaled gradients is meaningless
        config, parameters = self.config, list(self.state.model.parameters())
        if config.grad_clip_norm:
            return nn.utils.clip_grad_norm_(parameters, config.grad_clip_norm)
        grad_norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.grad_clip_value:
            nn.utils.clip_grad_value_(parameters, config.grad_clip_value)
        elif config.grad_clip_agc:
            adaptive_clip_grad(_without_classifier(self.state.model), config.grad_clip_agc)
        return grad_norm


def build_criterion(config: TrainerConfig, device: torch.device, class_weights: np.ndarray | None = None) -> Loss:
    """Build the training loss of float32 logits and labels (int64 [B], or float32 [B, num_classes] if mixed)."""
    smoothing = config.label_smoothing
    if config.loss_target is not None:
        return build_own_loss(config.loss_target, device)
    if class_weights is None:
        means: dict[str, Loss] = {
            "cross_entropy": nn.CrossEntropyLoss(label_smoothing=smoothing),
            "bce": partial(binary_cross_entropy, label_smoothing=smoothing),
            "focal": lambda logits, labels: focal_loss(logits, labels, config.focal_gamma, smoothing).mean(),
        }
        return means[config.loss]
    of_images: dict[str, Loss] = {
        "cross_entropy": nn.CrossEntropyLoss(label_smoothing=smoothing, reduction="none"),
        "bce": lambda logits, labels: binary_cross_entropy(logits, labels, smoothing, "none").mean(1),
        "focal": partial(focal_loss, gamma=config.focal_gamma, label_smoothing=smoothing),
    }
    weights = torch.tensor(class_weights, dtype=torch.float32, device=device)
    return WeightedLoss(of_images[config.loss], weights)


def binary_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, reduction: str = "mean") -> Tensor:
    """Compute the mean binary cross-entropy over classes and images, as in "ResNet strikes back" (arXiv 2110.00476)."""
    # Mixed labels keep their weights and are smoothed as for cross-entropy. (timm's loss class smooths only labels that
    # are not mixed, and can set each mixed class to 1.)
    if labels.ndim == 1:
        labels = nn.functional.one_hot(labels, logits.shape[1])
    labels = labels * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Context manager that leaves batch norm's running statistics unchanged."""
    # Gradient checkpointing runs the forward pass a second time, which would update the statistics twice.
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
    """Return the parameters for adaptive clipping: all except the last layer's (arXiv 2102.06171, section 4.1)."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # distilled models have two
    last = {id(p) for head in heads for p in head.parameters()}
    return [p for p in model.parameters() if id(p) not in last]


class StepReport(NamedTuple):
    """The gradient norm, if it was computed, and the time in seconds that the step spent waiting for data."""

    grad_norm: Tensor | None
    wait_seconds: float


def train_one_epoch(
    stepper: Stepper, batches: Batches, num_steps: int, is_logged: Callable[[int], bool]
) -> Iterator[StepReport]:
    """Run `num_steps` steps and yield a report after each one, so that the caller can act between steps.

    The gradient norm is computed in the steps for which `is_logged` is true; they are counted from 1.
    """
    set_to_train(stepper.state.model)
    waits: list[float] = []
    timed = _timed(batches, waits)
    for _ in range(num_steps):
        waits.clear()
        grad_norm = stepper.train_step(timed, want_grad_norm=is_logged(stepper.state.step + 1))
        yield StepReport(grad_norm, sum(waits))


def _timed(batches: Batches, waits: list[float]) -> Batches:
    """Yield the batches unchanged, and append the seconds spent waiting for each one to `waits`."""
    start = time.perf_counter()
    for batch in batches:
        waits.append(time.perf_counter() - start)
        yield batch
        start = time.perf_counter()
