"""Every expected ending, of runs and of other commands, as a message and an exit code. No torch before a run begins."""

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from sasa_train.compose import fail
from sasa_train.config import ConfigError, TrainConfig
from sasa_train.interrupt import Interrupted, StopRequest
from sasa_train.ranks import rank, world_size

# Done, or done before; anything unexpected; a config or input; stopped and ready to continue.
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def end_command(run_command: Callable[[list[str]], int]) -> NoReturn:
    """Run a command that has no checkpoints to save, and exit; Ctrl-C and a closed pipe are no errors in the code."""
    try:
        code = run_command(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail(RuntimeError("stopped"))
        code = FAILED
    except BrokenPipeError:  # as in `sasa-summary | head`; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    sys.exit(code)


def train_safely(config: TrainConfig, stop: StopRequest | None = None) -> int:
    """Train with every expected ending turned into a message and an exit code, from the first import on."""
    stop = stop or StopRequest()
    try:
        return _train(config, stop)
    except Interrupted:
        print("stopped before training began; run the same command again", file=sys.stderr)
        return INTERRUPTED
    finally:
        stop.restore()


def _train(config: TrainConfig, stop: StopRequest) -> int:
    from sasa_train.checkpoint import CheckpointError
    from sasa_train.data.workers import DataWorkerError
    from sasa_train.distributed import lost_partner
    from sasa_train.nonfinite import NonFiniteError
    from sasa_train.out_of_memory import OutOfMemoryError, is_out_of_memory
    from sasa_train.run import train

    try:
        return DONE if train(config, stop) else INTERRUPTED
    except ConfigError as error:
        tell(error)
        return REFUSED
    except (CheckpointError, DataWorkerError, NonFiniteError, OutOfMemoryError) as error:
        tell(error)
        return FAILED
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        place = f" {error.filename}" if error.filename else ""
        tell(OSError(f"cannot write{place} ({error.strerror}); make room and run the same command again"))
        return FAILED
    except (MemoryError, RuntimeError) as error:  # before the first step
        if (reason := lost_partner(error)) is not None:
            fail(
                RuntimeError(f"process {rank()}: stopped: {reason}")
            )  # not the first to fail, so no word for the others
            return FAILED
        if not is_out_of_memory(error):
            raise
        tell(RuntimeError(f"out of memory ({error}); use a smaller model, data.image_size or data.max_train_images"))
        return FAILED


def tell(error: Exception) -> None:
    """`fail`, in one voice where there are several processes."""
    if world_size() == 1:
        fail(error)
        return
    from sasa_train import distributed

    text = distributed.describe(error)
    if text is not None:
        distributed.tell_failure(text)
        fail(ConfigError(text))
