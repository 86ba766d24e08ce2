"""The user's own training loss, `trainer.loss_target`, checked on random logits before it is trained with."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sasa_train.config import own_code
from sasa_train.device import RunPlan
from sasa_train.refusal import ConfigError, ExpectedFailure, require

Loss = Callable[[Tensor, Tensor], Tensor]
MAX_IMAGES = 8  # in the check
RULE = "must return a finite scalar tensor with a gradient, the mean over the images"


def load_loss(target: str, device: torch.device) -> Loss:
    """Return the loss with a dotted name; a class is instantiated without arguments, and a module is moved to `device`.

    Raises:
        ConfigError: it cannot be imported or instantiated, or it has parameters.
    """
    what = f"trainer.loss_target={target}"
    loss = own_code.load("trainer.loss_target", target)
    if isinstance(loss, type):
        with own_code.errors_of(what):
            loss = loss()
    if isinstance(loss, nn.Module):
        names = [name for name, _ in loss.named_parameters()]
        rule = "must have no parameters, which would be neither trained nor saved; make them buffers, or parts of the "
        require(not names, what, ", ".join(names), f"{rule}model")
        loss = loss.to(device)
    return loss


def build_own_loss(target: str, device: torch.device) -> Loss:
    """Return the loss as a function that raises ExpectedFailure where its result is no loss."""
    loss = load_loss(target, device)

    def checked(logits: Tensor, labels: Tensor) -> Tensor:
        result = loss(logits, labels)
        if (found := _wrong(result)) is not None:
            raise ExpectedFailure(f"trainer.loss_target={target}: {found}")
        return result

    return checked


def check_loss(plan: RunPlan, num_classes: int) -> None:
    """Call the user's own loss, if there is one, on random logits and each kind of labels that training will have.

    Raises:
        ConfigError: it fails, or its result is no loss; the message names the file and line.
    """
    if plan.trainer.loss_target is None:
        return
    loss, num_images = load_loss(plan.trainer.loss_target, plan.device), min(plan.micro_batch_size, MAX_IMAGES)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    kinds = {f"int64 labels [{num_images}]": labels}
    if plan.config.augment.mixup or plan.config.augment.cutmix:
        mixed = torch.randn(num_images, num_classes, generator=generator).softmax(1)
        kinds[f"mixed float32 labels [{num_images}, {num_classes}]"] = mixed
    for kind, each in kinds.items():
        what = f"trainer.loss_target={plan.trainer.loss_target}, on {kind}"
        devices = [plan.device] if plan.device.type == "cuda" else []
        with own_code.errors_of(what), torch.random.fork_rng(devices):
            found = _tried(loss, logits.to(plan.device), each.to(plan.device))
        if found is not None:
            raise ConfigError(f"{what}: {found}")


def _tried(loss: Loss, logits: Tensor, labels: Tensor) -> str | None:
    """Return what is wrong with a loss on these logits and labels, or None."""
    logits.requires_grad_()
    buffers = [buffer.clone() for buffer in loss.buffers()] if isinstance(loss, nn.Module) else []
    result = loss(logits, labels)
    if (found := _wrong(result)) is not None:
        return found
    if not result.isfinite():
        return f"{RULE}, but returned {result.item()}"
    result.backward()
    if logits.grad is None or not logits.grad.isfinite().all():
        return f"{RULE}, but {'no' if logits.grad is None else 'an infinite'} gradient reaches the logits"
    if isinstance(loss, nn.Module) and not all(map(torch.equal, buffers, loss.buffers())):
        return "must not change its buffers, which checkpoints do not contain"
    return None


def _wrong(result: object) -> str | None:
    if not isinstance(result, Tensor):
        return f"{RULE}, but returned {type(result).__name__}"
    if result.ndim or not result.requires_grad:
        kind = f"{str(result.dtype).removeprefix('torch.')} {list(result.shape)}"
        return f"{RULE}, but returned {kind} with{'' if result.requires_grad else 'out'} a gradient"
    return None
