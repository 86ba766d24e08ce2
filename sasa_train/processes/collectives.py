"""The exchanges between the processes of a run under torchrun. With one process, nothing here does anything.

Gradients take NCCL on CUDA. Everything else goes through the CPU (gloo), so that no device is waited for. A process
whose partner has ended gets an error from gloo within moments, whatever it was waiting for there.
"""

import contextlib
import datetime
import os
import platform
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sasa_train.processes.ranks import local_rank, max_restarts, num_machines, num_restarts, rank, world_size
from sasa_train.refusal import ConfigError

Result = TypeVar("Result")
Error = type[Exception]

TIMEOUT = datetime.timedelta(minutes=30)  # per wait: longer than a save, a download or data.worker_timeout
STOP, FAILURE = "stop", "failure"  # keys of the store
STORE_FIX = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Words in the errors of gloo, NCCL and the store when another process has ended.
LOST = ("gloo", "NCCL", "TCPStore", "Connection closed", "Connection reset", "Connection refused", "Broken pipe")

_store: dist.Store | None = None


def join() -> None:
    """Join the other processes; returns when all have joined."""
    global _store
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun may keep its store over restarts: keys of an earlier attempt must not be taken for this one's.
    _store = dist.PrefixStore(f"sasa_train/{num_restarts()}", store)
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=_store, rank=rank(), world_size=world_size(), timeout=TIMEOUT,
    )  # fmt: skip


def leave(code: int, may_wait: bool) -> None:
    """Leave the group; unless `may_wait`, end this process at once with `code`."""
    if may_wait:
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    # After a failure Python's own exit may wait for a message that never comes.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def use_own_device() -> None:
    """Make this process's CUDA device the current one; ConfigError if there are fewer devices than processes."""
    if local_rank() >= (count := torch.cuda.device_count()):
        remedy = f"use torchrun --nproc-per-node={count}, or trainer.device=cpu"
        raise ConfigError(f"LOCAL_RANK={local_rank()}, but torch sees {count} CUDA devices; {remedy}")
    torch.cuda.set_device(local_rank())


def restart_warning() -> str | None:
    """A warning if restarts of several torchruns may fail, else None."""
    if num_machines() == 1 or not max_restarts() or os.environ.get(STORE_FIX) == "1":
        return None
    return (
        f"torchrun --max-restarts={max_restarts()} on {num_machines()} machines without {STORE_FIX}=1 in its "
        "environment: after a restart the processes may not find each other (pytorch issue 135712); set it there"
    )


def from_first(function: Callable[[], Result], *errors: Error) -> Result:
    """Call `function` on the first process alone; return its result, or raise its error (one of `errors`), on all."""
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except errors as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise _shared(outcome[1])
    return outcome[0]


def everywhere(function: Callable[[], Result], *errors: Error) -> Result:
    """Call `function` on all processes; where it raises one of `errors` on one of them, raise that on all."""
    if world_size() == 1:
        return function()
    # `function` must not exchange anything itself: where it fails on one process, the others would wait for its part.
    result, error = None, None
    try:
        result = function()
    except errors as caught:
        error = caught
    for source, raised in enumerate(gather(error)):
        if raised is not None:
            raised.process = source
            raise _shared(raised)
    return result  # type: ignore[return-value]


def _shared(error: Exception) -> Exception:
    error.is_shared = True  # type: ignore[attr-defined]
    return error


def describe(error: BaseException) -> str | None:
    """An error's text, with the process that it comes from; None where the first process prints it for all."""
    source = getattr(error, "process", rank())
    if getattr(error, "is_shared", False):
        if rank() != 0:
            return None
        return str(error) if source == 0 else f"process {source}: {error}"
    return str(error) if world_size() == 1 else f"process {rank()} on {platform.node()}: {error}"


def gather(value: Any) -> list[Any]:
    """All processes' values, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(tensor: Tensor) -> Tensor:
    """The sum over all processes; a tensor on the CPU where there are several."""
    if world_size() == 1:
        return tensor
    summed = tensor.cpu()
    dist.all_reduce(summed)
    return summed


def largest(number: float) -> float:
    """The largest number of all processes."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def wait_for_all() -> None:
    """Wait, on the CPU, until all processes have come here."""
    largest(0.0)


def share_gradients(model: nn.Module) -> nn.Module:
    """Wrap the model so that the backward pass averages gradients over the processes; with one process, return it."""
    if world_size() == 1:
        return model
    # gloo reports a process that has failed on its way here; NCCL's first call would wait for it.
    wait_for_all()
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # they are copied, in 1x1 maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the new name of broadcast_buffers is not in older versions
        # `find_unused_parameters` keeps the buckets of gradients as they are from the first step on. Without it they
        # are arranged anew after the first step of each start, and more than two numbers are then added in another
        # order: with three processes, a run resumed after its first step ended 1e-6 away from one never stopped.
        return DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


def any_of(flag: Tensor) -> Tensor:
    """Return 1.0 on the flag's device if any process's is set, else 0.0; nothing waits for the device."""
    flag = flag.float()
    if world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def copy_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, in one message: batch norm's running statistics differ."""
    buffers = list(model.buffers())
    if world_size() == 1 or not buffers:
        return
    as_bytes = [buffer.reshape(-1).view(torch.uint8) for buffer in buffers]
    message = torch.cat(as_bytes)
    dist.broadcast(message, src=0)
    for buffer, part in zip(buffers, message.split([len(each) for each in as_bytes]), strict=True):
        buffer.copy_(part.view(buffer.dtype).view(buffer.shape))


def average(tensor: Tensor) -> None:
    """Replace a tensor, in place, by the average over all processes."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()


def stop_is_wanted(here: bool) -> bool:
    """Whether this process, or another one that asked this, must stop."""
    # Answers may differ between processes at one moment: this is for work that each may leave at any point.
    if _store is None or world_size() == 1:
        return here
    if here:
        _store.set(STOP, "1")
    return here or _store.check([STOP])


def tell_failure(text: str) -> None:
    """Leave the reason why this process ends for the others, if it is the first to end."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):  # torchrun itself is gone
            _store.compare_set(FAILURE, "", text)


def lost_partner(error: BaseException) -> str | None:
    """The reason why a process ended, if its end caused this `error`; None for any other error."""
    if world_size() == 1 or not (isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)):
        return None
    with contextlib.suppress(RuntimeError):
        if _store is not None and _store.check([FAILURE]):
            return _store.get(FAILURE).decode()
    return f"another process of the run ended, or torchrun; its own messages say why (here: {error})"
