"""Communication between the processes of a run under torchrun. With a single process, nothing is exchanged.

Gradients are exchanged with NCCL on CUDA. Everything else uses the CPU (gloo), so that it never waits for a device. If
a process ends, the processes that wait for it in gloo receive an error within moments.
"""

import atexit
import contextlib
import datetime
import os
import platform
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sasa_train.processes.ranks import local_rank, max_restarts, num_machines, num_restarts, rank, world_size
from sasa_train.refusal import ConfigError

Result = TypeVar("Result")
Error = type[Exception]

TIMEOUT = datetime.timedelta(minutes=30)  # per wait; longer than a save, a download or data.worker_timeout
STOP, FAILURE = "stop", "failure"  # keys of the store
STORE_FIX = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Phrases in the errors that gloo, NCCL and the store raise when another process has ended.
LOST = ("gloo", "NCCL", "TCPStore", "Connection closed", "Connection reset", "Connection refused", "Broken pipe")

_store: dist.Store | None = None


def join() -> None:
    """Join the process group, waiting until all processes have joined."""
    global _store
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # torchrun may keep its store across restarts, so the prefix separates the keys of this attempt from earlier ones.
    _store = dist.PrefixStore(f"sasa_train/{num_restarts()}", store)
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=_store, rank=rank(), world_size=world_size(), timeout=TIMEOUT,
    )  # fmt: skip


def leave(code: int, may_wait: bool) -> NoReturn:
    """Exit this process with `code`; if `may_wait` is true, first leave the process group and run exit functions."""
    if may_wait:
        if dist.is_initialized():
            dist.destroy_process_group()
        atexit._run_exitfuncs()
    # Python's normal exit may, after a failure, wait for a message that never arrives. After success, a thread of gloo
    # that releases a tensor meanwhile aborts the process ("terminate called without an active exception"), and torchrun
    # reports that a finished run has failed.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def use_own_device() -> None:
    """Select this process's CUDA device; raise ConfigError if there are fewer devices than processes."""
    if local_rank() >= (count := torch.cuda.device_count()):
        remedy = f"use torchrun --nproc-per-node={count}, or trainer.device=cpu"
        raise ConfigError(f"LOCAL_RANK={local_rank()}, but torch sees {count} CUDA devices; {remedy}")
    torch.cuda.set_device(local_rank())


def restart_warning() -> str | None:
    """Return a warning if restarts may fail because there are several torchrun instances, otherwise None."""
    if num_machines() == 1 or not max_restarts() or os.environ.get(STORE_FIX) == "1":
        return None
    return (
        f"torchrun --max-restarts={max_restarts()} on {num_machines()} machines without {STORE_FIX}=1 in its "
        "environment: after a restart the processes may not find each other (pytorch issue 135712); set it there"
    )


def from_first(function: Callable[[], Result], *errors: Error) -> Result:
    """Call `function` on the first process; return its result or raise its error (one of `errors`) on all processes."""
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
    """Call `function` on all processes; if it raises one of `errors` on any of them, raise that error on all."""
    if world_size() == 1:
        return function()
    # `function` must not communicate itself: if it failed on one process, the others would wait for that process.
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
    """Return an error's message and the process it comes from, or None if the first process prints it for all."""
    source = getattr(error, "process", rank())
    if getattr(error, "is_shared", False):
        if rank() != 0:
            return None
        return str(error) if source == 0 else f"process {source}: {error}"
    return str(error) if world_size() == 1 else f"process {rank()} on {platform.node()}: {error}"


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, ordered by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def total(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on the CPU if there are several processes."""
    if world_size() == 1:
        return tensor
    summed = tensor.cpu()
    dist.all_reduce(summed)
    return summed


def largest(number: float) -> float:
    """Return the maximum of a number over all processes."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def wait_for_all() -> None:
    """Block on the CPU until all processes have reached this call."""
    largest(0.0)


def share_gradients(model: nn.Module) -> nn.Module:
    """Wrap the model so that backward passes average gradients over the processes, unless there is only one process."""
    if world_size() == 1:
        return model
    # If a process has failed before this call, gloo reports it, while NCCL's first call would wait for it.
    wait_for_all()
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # copied for 1x1 maps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older versions lack the new name of broadcast_buffers
        # `find_unused_parameters` keeps the gradient buckets unchanged from the first step on. Without it, they are
        # rearranged after the first step of each start, which changes the order of summation of more than two values:
        # with three processes, a run resumed after its first step differed by 1e-6 from an uninterrupted one.
        return DistributedDataParallel(
            model, broadcast_buffers=False, find_unused_parameters=True, gradient_as_bucket_view=True
        )


def any_of(flag: Tensor) -> Tensor:
    """Return 1.0 on the flag's device if the flag is set on any process, else 0.0, without waiting for the device."""
    flag = flag.float()
    if world_size() > 1:
        dist.all_reduce(flag, dist.ReduceOp.MAX)
    return flag


def sum_everywhere(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, on its device, without waiting for the device."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def copy_buffers(model: nn.Module) -> None:
    """Copy the first process's buffers, such as batch norm's running statistics, to all processes in one message."""
    buffers = list(model.buffers())
    if world_size() == 1 or not buffers:
        return
    as_bytes = [buffer.reshape(-1).view(torch.uint8) for buffer in buffers]
    message = torch.cat(as_bytes)
    dist.broadcast(message, src=0)
    for buffer, part in zip(buffers, message.split([len(each) for each in as_bytes]), strict=True):
        buffer.copy_(part.view(buffer.dtype).view(buffer.shape))


def average(tensor: Tensor) -> None:
    """Average a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()


def stop_is_wanted(here: bool) -> bool:
    """Return True if this process must stop (`here`) or if another process has already called this with `here=True`."""
    # Processes may get different answers at a given moment, so use this only for work that can be aborted at any point.
    if _store is None or world_size() == 1:
        return here
    if here:
        _store.set(STOP, "1")
    return here or _store.check([STOP])


def tell_failure(text: str) -> None:
    """If this process is the first to end, store the reason so that the others can read it."""
    if _store is not None:
        with contextlib.suppress(RuntimeError):  # torchrun itself has ended
            _store.compare_set(FAILURE, "", text)


def lost_partner(error: BaseException) -> str | None:
    """If `error` was caused by another process exiting, return why that process exited; otherwise return None."""
    if world_size() == 1 or not (isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)):
        return None
    with contextlib.suppress(RuntimeError):
        if _store is not None and _store.check([FAILURE]):
            return _store.get(FAILURE).decode()
    return f"another process of the run ended, or torchrun; its own messages say why (here: {error})"
