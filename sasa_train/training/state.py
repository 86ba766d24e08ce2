"""The training state, which is saved in checkpoints."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sasa_train.config.keys import TrainConfig
from sasa_train.processes import collectives
from sasa_train.processes.ranks import rank, world_size
from sasa_train.runs.checkpoint import first_misfit
from sasa_train.training.nonfinite import NonFiniteError, not_finite
from sasa_train.training.optim import build_optimizer

HYPERPARAMETERS = (  # of a group
    "initial_lr", "lr_scale", "weight_decay", "momentum", "betas", "eps", "fused", "foreach", "maximize", "capturable",
    "differentiable", "nesterov", "amsgrad",
)  # fmt: skip
# Entries of a group that timm's optimizers or the schedule change.
CHANGING = {"lr", "step", "lookahead_step", "max_lr_snapshot"}
PROGRESS = ("step", "epoch", "evaluated_step", "best", "seconds")  # fields of TrainState that are saved unchanged


class Window:
    """Running sums over this process's images since the last train log row, kept on the device."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, hits
        self.num_images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a micro-batch; for mixed labels [B, num_classes], top1 uses the class with the larger weight."""
        hits = (logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))).sum()
        self.sums += torch.stack([loss.double() * len(labels), hits.double()])
        self.num_images += len(labels)

    def scale_last(self, losses: list[Tensor], factor: Tensor, num_images: int) -> None:
        """Multiply the mean `losses` of the last micro-batches, of `num_images` each, which have been added already."""
        self.sums[0] += (factor.double() - 1) * torch.stack(losses).double().sum() * num_images

    def state_dict(self) -> dict[str, Any]:
        """Return the sums and the number of images; if there are several processes, one row and one number for each."""
        if world_size() == 1:
            return {"sums": self.sums, "num_images": self.num_images}
        sums, num_images = zip(*collectives.gather((self.sums.cpu(), self.num_images)), strict=True)
        return {"sums": torch.stack(sums), "num_images": list(num_images)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load this process's part; if the number of processes has changed, the first one receives everything."""
        sums, counts = saved["sums"].reshape(-1, 2), saved["num_images"]
        counts = counts if isinstance(counts, list) else [counts]
        if len(counts) != world_size():
            sums, counts = sums.sum(0, keepdim=True), [sum(counts)]
        if rank() < len(counts):
            self.sums.copy_(sums[rank()])
            self.num_images = counts[rank()]

    def averages(self) -> tuple[float, float]:
        """Wait for the device, return the loss and top1 (percent) over all processes since the last call, and reset."""
        num_images = int(collectives.total(torch.tensor(self.num_images)))
        loss, hits = (collectives.total(self.sums) / num_images).tolist()
        self.sums.zero_()
        self.num_images = 0
        return loss, 100 * hits


@dataclass
class TrainState:
    """Everything that must be preserved across restarts; the rest is rebuilt from the config."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    window: Window
    ema: ModelEmaV3 | None = None
    step: int = 0  # number of optimizer updates
    epoch: int = 0  # number of complete epochs
    evaluated_step: int = 0  # the step of the last evaluation
    best: dict[str, Any] | None = None  # {"top1", "step", "epoch"} and trainer.best_metric of the best evaluation
    seconds: float = 0.0  # training time, over all restarts
    hyperparameters: tuple[str, ...] = HYPERPARAMETERS  # entries of a parameter group that come from the config

    def state_dict(self) -> dict[str, Any]:
        """Return only tensors and plain values, so that `torch.load(..., weights_only=True)` can read them."""
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": self.window.state_dict(),
            **{name: getattr(self, name) for name in PROGRESS},
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
        }

    def check(self) -> None:
        """Raise NonFiniteError if the weights, statistics or averages are not finite. This waits for the device."""
        # A single norm over all tensors is used, because checking each tensor would wait for the device every time.
        parts = {"": self.model} | ({"the average's ": self.ema.module} if self.ema else {})
        for whose, module in parts.items():
            floats = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
            if not nn.utils.get_total_norm(floats, norm_type=math.inf).isfinite():
                wrong = not_finite(module.state_dict().items())
                raise NonFiniteError(
                    f"the weights after step {self.step} are not finite, {whose}{wrong[0]} first of {len(wrong)}",
                    self.step - 1,
                )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        averaged = {"ema": self.ema.module} if self.ema else {}
        for key, module in ({"model": self.model} | averaged).items():
            tensors = saved["model"] if saved[key] is None else saved[key]
            if wrong := first_misfit(module, tensors):
                raise ValueError(f"{key}.{wrong}")
            module.load_state_dict(tensors)
        # Hyperparameters come from the config and differ from the checkpoint's only if the user allowed it. The other
        # entries of a group are optimizer state. The hyperparameters are inserted before loading, because `fused`
        # determines on which device an optimizer keeps its state.
        configured = [{k: g[k] for k in self.hyperparameters if k in g} for g in self.optimizer.param_groups]
        pairs = zip(saved["optimizer"]["param_groups"], configured, strict=True)
        # A group that lacks one of them, such as lr_scale, has no use for the checkpoint's.
        groups = [{k: group[k] for k in group if k not in self.hyperparameters} | ours for group, ours in pairs]
        self.optimizer.load_state_dict(saved["optimizer"] | {"param_groups": groups})
        self.scaler.load_state_dict(saved["scaler"])
        self.window.load_state_dict(saved["window"])
        for name in PROGRESS:
            setattr(self, name, saved[name])
        torch.set_rng_state(saved["rng"]["torch"])
        if self.device.type == "cuda" and saved["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(saved["rng"]["cuda"])

    @property
    def device(self) -> torch.device:
        return self.window.sums.device


def build_state(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainState:
    """Move the model to the device and build the rest of the state."""
    trainer = config.trainer
    model.to(device).to(memory_format=torch.channels_last if trainer.channels_last else torch.preserve_format)
    optimizer = build_optimizer(config, model)
    # What an optimizer of the user's own keeps in a group may be its state.
    is_known = type(optimizer).__module__.partition(".")[0] in ("torch", "timm")
    arguments = optimizer.defaults.keys() - CHANGING if is_known else ()
    return TrainState(
        model,
        optimizer,
        torch.amp.GradScaler(device.type, enabled=trainer.precision == "fp16"),
        Window(device),
        ModelEmaV3(model, decay=trainer.ema_decay, use_warmup=trainer.ema_warmup) if trainer.ema_decay else None,
        hyperparameters=tuple(dict.fromkeys([*HYPERPARAMETERS, *config.optimizer.args, *sorted(arguments)])),
    )
