"""Report every expected ending of a training run as a message and an exit code. This module imports torch lazily."""

import errno
import sys

from sasa_train.config import own_code
from sasa_train.config.keys import TrainConfig
from sasa_train.machine import is_out_of_memory
from sasa_train.processes.ranks import rank, world_size
from sasa_train.refusal import DISK_FAILED, DISK_FULL, CheckpointError, ConfigError, ExpectedFailure, is_of_disk
from sasa_train.signals import Interrupted, StopRequest
from sasa_train.terminal import DONE, FAILED, INTERRUPTED, REFUSED, fail, load_torch

SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOLCK, errno.EAGAIN, errno.EBUSY, errno.ENOMEM, errno.EINTR)


def train_safely(config: TrainConfig, stop: StopRequest | None = None, only_plan: bool = False) -> int:
    """Train, and turn every expected ending into a message and an exit code, even if it occurs during the imports.

    only_plan: print what the run would be and take instead (see training/preview.py).
    """
    stop = stop or StopRequest()
    try:
        return _train(config, stop, only_plan)
    except Interrupted:
        print("stopped before training began; run the same command again", file=sys.stderr)
        return INTERRUPTED
    finally:
        stop.restore()


def _train(config: TrainConfig, stop: StopRequest, only_plan: bool) -> int:
    # Importing torch takes seconds. It is imported here so that a signal in the meantime is a stop request.
    with stop.preparing():
        load_torch()
        from sasa_train.processes.collectives import lost_partner
        from sasa_train.training.run import train

    try:
        with stop.preparing():
            if only_plan:
                from sasa_train.training.preview import show_plan

                show_plan(config)
                return DONE
            return DONE if train(config, stop).finished or stop.asked_by else INTERRUPTED
    except ConfigError as error:
        return tell(error)
    except (CheckpointError, ExpectedFailure) as error:
        tell(error)
    except Exception as error:
        # Check for a lost partner first. If there is one, this process did not fail itself and must not report a
        # failure to the others.
        is_of_torch = isinstance(error, RuntimeError)
        if is_of_torch and (reason := lost_partner(error)) is not None:
            fail(RuntimeError(f"process {rank()}: stopped: {reason}"))
        elif (text := own_code.own_traceback(error) or foreseen(error)) is not None:
            tell(RuntimeError(text))
        else:
            raise
    return FAILED


def foreseen(error: Exception) -> str | None:
    """Return the message for an error of a disk or of memory, or None for any other error."""
    if isinstance(error, OSError):
        place = f" {error.filename}" if error.filename else ""
        if error.errno in DISK_FULL:
            return f"cannot write{place} ({error.strerror}); make room and run the same command again"
        if error.errno in (*DISK_FAILED, errno.EINVAL):
            at = f" at{place}" if place else ""
            return f"the disk failed{at} ({error.strerror}); run the same command once it is back"
        if error.errno in SCARCE:
            return f"cannot use{place} now ({error.strerror}); run the same command again when the system can"
        if error.errno is not None and place:
            return f"cannot use{place} ({error.strerror}); mend it and run the same command again"
        if error.errno is not None:
            return f"the system refused a call ({error.strerror}); mend this and run the same command again"
    # This happens only before the first step; later, the run itself converts the error to an OutOfMemoryError.
    elif isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
        return f"out of memory ({error}); use a smaller model, data.image_size or data.max_train_images"
    return None


def tell(error: Exception) -> int:
    """Print an error and return a code, as `fail` does. If several processes have the same error, one prints it."""
    if world_size() == 1:
        return fail(error)
    from sasa_train.processes import collectives

    text = collectives.describe(error)
    if text is not None:
        collectives.tell_failure(text)
        fail(ConfigError(text))
    return FAILED if is_of_disk(error) else REFUSED
