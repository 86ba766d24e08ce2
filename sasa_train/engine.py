"""One training step, one epoch, one evaluation: tensors in, numbers out. No files, no printing, no Hydra.

Under torchrun each process takes its share of a step's or an evaluation's images; what comes out is of all of them.

Nothing in a step leaves the device without work: sums stay there until a log row asks for them, and the loss is looked
at while the backward pass runs.
"""

import contextlib
import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn

from sasa_train import distributed
from sasa_train.batch_norm import frozen_running_stats
from sasa_train.config import TrainerConfig, accumulation
from sasa_train.data.randomness import seed_step
from sasa_train.losses import build_criterion
from sasa_train.nonfinite import LossWatch, NonFiniteError, not_finite
from sasa_train.ranks import rank, world_size

Batches = Iterator[tuple[Tensor, Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HYPERPARAMETERS = ("initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps")  # of a parameter group


class Window:
    """Sums on the device since the last train row, over this process's images."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, hits
        self.num_images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Of mixed labels [B, num_classes] the larger share counts for top1."""
        hits = (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
        self.sums += torch.stack([loss.double() * len(labels), hits.double()])
        self.num_images += len(labels)

    def state_dict(self) -> dict[str, Any]:
        """Where there are several processes, a row of `sums` and a number for each."""
        if world_size() == 1:
            return {"sums": self.sums, "num_images": self.num_images}
        sums, num_images = zip(*distributed.gather((self.sums.cpu(), self.num_images)), strict=True)
        return {"sums": torch.stack(sums), "num_images": list(num_images)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Each process takes its own part; where they were another number, the first one takes all."""
        sums, counts = saved["sums"].reshape(-1, 2), saved["num_images"]
        counts = counts if isinstance(counts, list) else [counts]
        if len(counts) != world_size():
            sums, counts = sums.sum(0, keepdim=True), [sum(counts)]
        if rank() < len(counts):
            self.sums.copy_(sums[rank()])
            self.num_images = counts[rank()]

    def averages(self) -> tuple[float, float]:
        """Loss and top1 in percent over all processes since the last call; starts anew. Waits for the device."""
        num_images = int(distributed.total(torch.tensor(self.num_images)))
        loss, hits = (distributed.total(self.sums) / num_images).tolist()
        self.sums.zero_()
        self.num_images = 0
        return loss, 100 * hits


@dataclass
class TrainState:
    """What must survive a restart; everything else is made anew from the config."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    window: Window
    ema: ModelEmaV3 | None = None
    step: int = 0  # optimizer updates done
    epoch: int = 0  # whole epochs trained
    evaluated_step: int = 0  # the step of the last evaluation
    best: dict[str, Any] | None = None  # {"top1", "step", "epoch"} of the best evaluation
    seconds: float = 0.0  # of training, over all restarts
    hyperparameters: tuple[str, ...] = HYPERPARAMETERS  # keys of a parameter group that are the config's

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values alone, so that `torch.load(..., weights_only=True)` reads it."""
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": self.window.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "evaluated_step": self.evaluated_step,
            "best": self.best,
            "seconds": self.seconds,
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def check(self) -> None:
        """Raise NonFiniteError where the weights, statistics or averages are not finite. Waits for the device."""
        parts = {"": self.model} | ({"the average's ": self.ema.module} if self.ema else {})
        for whose, module in parts.items():
            floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
            if not nn.utils.get_total_norm(floats, norm_type=math.inf).isfinite():
                wrong = not_finite(module.state_dict().items())
                raise NonFiniteError(
                    f"the weights after step {self.step} are not finite, {whose}{wrong[0]} first of {len(wrong)}"
                )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        if self.ema:
            self.ema.module.load_state_dict(saved["ema"] or saved["model"])
        # Hyperparameters are the config's: they differ from the checkpoint's only where the user allowed it. What else
        # a group holds is its optimizer's state.
        groups = [{k: g[k] for k in self.hyperparameters if k in g} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(configured)
        self.scaler.load_state_dict(saved["scaler"])
        self.window.load_state_dict(saved["window"])
        self.step, self.epoch, self.evaluated_step = saved["step"], saved["epoch"], saved["evaluated_step"]
        self.best, self.seconds = saved["best"], saved["seconds"]
        torch.set_rng_state(saved["rng"]["torch"])
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])

    @property
    def device(self) -> torch.device:
        return self.window.sums.device


def build_state(
    config: TrainerConfig,
    model: nn.Module,
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    device: torch.device,
) -> TrainState:
    """Put the model on the device and build around it what `config` asks for."""
    model.to(device).to(memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    return TrainState(
        model,
        build_optimizer(model),
        torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        Window(device),
        ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup) if config.ema_decay else None,
    )


class Stepper:
    """What a step needs and no checkpoint keeps: the compiled forward pass, the loss, the schedule.

    `seed` is that of dropout where there are several processes: each draws its own, by (seed, step, rank) alone. One
    process goes on with torch's generators, which the checkpoint has.
    """

    def __init__(self, config: TrainerConfig, state: TrainState, schedule: Scheduler, seed: int = 0):
        self.config, self.state, self.schedule, self.seed = config, state, schedule, seed
        self.grad_accum_steps = accumulation(config, world_size())
        self.shared = distributed.share_gradients(state.model)
        self.forward = torch.compile(self.shared) if config.compile else self.shared
        self.criterion = build_criterion(config)
        self.loss_watch = LossWatch(state.device)
        self.clips = config.grad_clip_norm or config.grad_clip_value or config.grad_clip_agc

    def train_step(self, batches: Batches, want_grad_norm: bool = False) -> Tensor | None:
        """One optimizer update from `grad_accum_steps` micro-batches; returns the gradient's L2 norm before clipping.

        The norm is None where nobody asked for it and nothing clips. Processes add their gradients in the backward pass
        of the last micro-batch alone.

        Raises:
            NonFiniteError: a loss is not finite; the weights are those before the step.
        """
        config, state = self.config, self.state
        self.schedule.step_update(state.step)
        state.optimizer.zero_grad()
        if world_size() > 1:
            seed_step(self.seed, state.step, rank())
        for number in range(self.grad_accum_steps):
            images, labels = next(batches)
            with self._gradients_stay_here() if number < self.grad_accum_steps - 1 else contextlib.nullcontext():
                with autocast(state.device, config.precision):
                    logits = self.forward(images)
                    loss = self.criterion(logits.float(), labels)
                self.loss_watch.begin(loss)
                with frozen_running_stats(state.model) if config.grad_checkpointing else contextlib.nullcontext():
                    state.scaler.scale(loss / self.grad_accum_steps).backward()
            state.window.add(loss.detach(), logits.detach(), labels)
            if not self.loss_watch.is_finite():
                raise NonFiniteError(f"the loss of step {state.step + 1} is not finite", number, images)
        grad_norm = self._clip() if want_grad_norm or self.clips else None
        if state.scaler.is_enabled():  # it waits for the device, and with it for all processes: see that they are there
            distributed.wait_for_all()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.step += 1
        if state.ema:
            state.ema.update(state.model, step=state.step)
        return grad_norm

    def _gradients_stay_here(self) -> contextlib.AbstractContextManager:
        return self.shared.no_sync() if world_size() > 1 else contextlib.nullcontext()  # type: ignore[operator]

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


def _without_classifier(model: nn.Module) -> list[nn.Parameter]:
    """Adaptive clipping spares the last layer (arXiv 2102.06171, section 4.1)."""
    classifier = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple) else (classifier,)  # distilled models have two
    last = {id(p) for head in heads for p in head.parameters()}
    return [p for p in model.parameters() if id(p) not in last]


@dataclass
class StepReport:
    """After a step: the gradient's norm where it was taken, and the seconds it waited for data."""

    grad_norm: Tensor | None
    wait_seconds: float


def train_one_epoch(stepper: Stepper, batches: Batches, num_steps: int, log_every_steps: int) -> Iterator[StepReport]:
    """Take `num_steps` steps and report after each; what happens between steps is the caller's."""
    stepper.state.model.train()
    timed = _Timed(batches)
    for _ in range(num_steps):
        timed.seconds = 0.0
        is_logged = (stepper.state.step + 1) % log_every_steps == 0
        grad_norm = stepper.train_step(timed, want_grad_norm=is_logged)
        yield StepReport(grad_norm, timed.seconds)


class _Timed:
    """An iterator that counts the seconds its caller waits for the next batch."""

    def __init__(self, batches: Batches):
        self.batches, self.seconds = iter(batches), 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        batch = next(self.batches)
        self.seconds += time.perf_counter() - start
        return batch


@dataclass
class Evaluation:
    """Metrics over every image once: mean cross-entropy, top1 and top5 in percent.

    `confusion` int64 [num_classes, num_classes] counts images by label (row) and prediction (column).
    """

    loss: float
    top1: float
    top5: float
    num_images: int
    confusion: Tensor = field(repr=False)

    @property
    def class_hits(self) -> list[int]:
        return self.confusion.diagonal().tolist()

    @property
    def class_images(self) -> list[int]:
        return self.confusion.sum(1).tolist()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    num_classes: int,
    device: torch.device,
    precision: str,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate `model` in eval mode over `batches`; None where `stop_requested()` became true on the way.

    Each process gives its share of the batches, perhaps none, and gets the numbers of all. Never compiled, so that the
    number does not depend on `trainer.compile`.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, top5 hits
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
    is_stopped = False
    for images, labels in batches:
        if is_stopped := stop_requested():
            break
        with autocast(device, precision):
            logits = model(images)
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        ranked = rank_classes(logits)
        is_ranked = (ranked == labels[:, None]).any(1)
        sums += torch.stack([losses.double().sum(), is_ranked.sum().double()])
        confusion.index_add_(0, labels * num_classes + ranked[:, 0], torch.ones_like(labels))
    if distributed.largest(is_stopped):
        return None
    sums, confusion = distributed.total(sums), distributed.total(confusion).view(num_classes, num_classes).cpu()
    num_images = int(confusion.sum())
    loss, top5_hits = (sums / num_images).tolist()
    top1 = 100 * int(confusion.diagonal().sum()) / num_images
    return Evaluation(loss, top1, 100 * top5_hits, num_images, confusion)


def rank_classes(logits: Tensor) -> Tensor:
    """int64 [B, 5], or as many as there are classes: the best first, which is the prediction."""
    return logits.topk(min(5, logits.shape[1]), dim=1).indices


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def resolve_device(config: TrainerConfig) -> tuple[torch.device, TrainerConfig]:
    """The device, and the config with `precision=auto` replaced by what it means there.

    Raises:
        ValueError: a CUDA device is asked for and there is none, or it has no bf16; or what only CUDA can do is asked
            of the CPU.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ValueError("trainer.device=cuda, but torch sees no CUDA device; use trainer.device=auto or cpu")
    device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
    if world_size() > 1 and device.type == "cuda":
        distributed.use_own_device()
    if config.sync_batch_norm and device.type == "cpu":
        raise ValueError(
            "trainer.sync_batch_norm=true, but PyTorch has it on CUDA alone; leave it out on the CPU: batch norm then "
            "sees each process's own micro-batches"
        )
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError(f"trainer.precision=bf16, but {torch.cuda.get_device_name()} has none; use fp16 or fp32")
    config = copy.copy(config)
    if config.precision == "auto":
        config.precision = "bf16" if has_bf16 else "fp32"
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses cuBLAS without it
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(config.deterministic)
    torch.set_float32_matmul_precision(config.matmul_precision)
    torch.backends.cudnn.allow_tf32 = config.matmul_precision != "highest"  # convolutions and attention alike
    return device, config
