"""Launch training runs with one of Hydra's launchers: sequentially (basic) or as jobs on Slurm, Ray or another backend.

With every launcher, a job does the same as `sasa-train` with the same overrides.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hydra import compose
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from sasa_train.config.compose import as_asked, compose_config, initialize_hydra
from sasa_train.config.overrides import UNREADABLE, for_hydra
from sasa_train.refusal import ConfigError, shorten
from sasa_train.signals import StopRequest
from sasa_train.terminal import DONE, FAILED, INTERRUPTED, REFUSED, fail
from sasa_train.training.endings import train_safely

LOG_LINES = 20  # number of log lines shown for a job that failed elsewhere


def launch(jobs: list[list[str]], hydra_overrides: list[str], folder: Path) -> list[int]:
    """Run each job, a list of `sasa-train` arguments, with the launcher in `hydra_overrides`, and wait for all jobs.

    Returns each job's exit code, with the same meaning as for `sasa-train`: 1 for a job that died (its error is
    printed), 2 for a job that was refused. The launcher writes its own files to `folder`.

    Raises:
        ConfigError: the launcher does not exist, or one of its keys is invalid.
    """
    refusals = [_refusal(job) for job in jobs]
    accepted = [for_hydra(job) for job, code in zip(jobs, refusals, strict=True) if code == DONE]
    with _build_launcher(hydra_overrides, folder) as (launcher, ended):
        codes = iter(_launch(launcher, accepted, ended) if accepted else [])
    return [code if code == REFUSED else next(codes) for code in refusals]


def _refusal(job: Sequence[str]) -> int:
    """Return the exit code of a refusal if the job's config is refused, otherwise DONE."""
    # This is checked before the launch, because a launcher drops all jobs if composing one of their configs fails.
    try:
        compose_config(job)
    except ConfigError as error:
        return fail(error)
    return DONE


@contextmanager
def _build_launcher(overrides: Sequence[str], folder: Path) -> Iterator[tuple[Launcher, list[int]]]:
    """Yield the launcher and a list to which each job that ends in this process appends its exit code."""
    ended: list[int] = []
    sweep_dir = QuotedString(str(folder), Quote.single).with_quotes()
    GlobalHydra.instance().clear()
    with initialize_hydra():
        try:
            everything = [f"hydra.sweep.dir={sweep_dir}", *overrides]
            config = compose("train", everything, return_hydra_config=True)
            context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks(config))
            launcher = Plugins.instance().instantiate_launcher(context, partial(_train_job, ended), config)
        except UNREADABLE as error:
            raise ConfigError(
                f"{' '.join(overrides)}: {shorten(error)}\n(submitit's launchers: pip install 'sasa_train[slurm]'; "
                "every key of a launcher is one of hydra.launcher.*)"
            ) from error
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)  # the launcher logs each job
        yield launcher, ended


def _launch(launcher: Launcher, jobs: list[list[str]], ended: list[int]) -> list[int]:
    try:
        with _deaths_as_results():
            codes = [_exit_code(job) for job in launcher.launch(jobs, initial_job_idx=0)]
    except SystemExit:  # a signal stopped a job in this process, which also stops the sweep
        codes = ended
    except KeyboardInterrupt:
        print("the sweep is no longer waited for; jobs that a cluster has been given go on there", file=sys.stderr)
        codes = ended
    except Exception as error:
        if not ended:  # the launcher's own failure, not a job's
            traceback.print_exc()
            raise ConfigError(f"the launcher failed ({shorten(error)}); jobs that it had started may go on") from error
        codes = ended + [FAILED] * (len(jobs) - len(ended))
    return codes + [INTERRUPTED] * (len(jobs) - len(codes))


def _train_job(ended: list[int], composed: DictConfig) -> int:
    """Execute a run in this process, or in one to which a launcher sent the pickled call; return the exit code."""
    is_here = HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
    if not is_here:  # errors and run.json show sys.argv as the command
        sys.argv = ["sasa-train", *(o.removeprefix("++") for o in HydraConfig.get().overrides.task)]
    stop = StopRequest()
    code = FAILED
    try:
        code = train_safely(as_asked(composed, HydraConfig.get().overrides.task), stop)
    except ConfigError as error:
        code = fail(error)
    except Exception:
        traceback.print_exc()  # printed here because the launcher does not receive the traceback
    finally:
        stop.restore()
    ended.append(code)
    if code == INTERRUPTED and is_here:
        sys.exit(INTERRUPTED)  # ends the sweep; running the same command again continues it
    if code == INTERRUPTED:
        _hand_over(stop)
    return code


def _hand_over(stop: StopRequest) -> None:
    """Pass the signal that stopped a job to the launcher's own handler."""
    # On USR2, submitit requeues the job and ends this process immediately.
    try:
        was_handled = stop.hand_on()
    except Exception as error:  # it has been requeued the maximum number of times
        print(error, file=sys.stderr)
        return
    # submitit ignores SIGTERM, which Slurm sends when it preempts a job (to requeue it itself) or cancels it. In both
    # cases, there is no result to return yet.
    if was_handled:
        sys.exit(INTERRUPTED)


def _exit_code(job: JobReturn) -> int:
    try:
        return job.return_value
    except Exception as error:  # return_value raises the error of a failed job
        print(f"a job was lost: {error}", file=sys.stderr)
        return FAILED


@contextmanager
def _deaths_as_results() -> Iterator[None]:
    """Context manager that makes submitit return results even for dead jobs and prints the end of failed jobs' logs."""
    # Without this, submitit's launcher would drop all jobs if one of them died.
    try:
        from submitit import Job
        from submitit.core.utils import UncompletedJobError
    except ImportError:
        yield
        return
    wait = Job.results

    def results(job: Job) -> list[JobReturn]:
        try:
            returned = wait(job)[0]  # the result of the first task, as in submitit's launcher
        except UncompletedJobError as error:
            returned = JobReturn(status=JobStatus.FAILED)
            returned.return_value = RuntimeError("\n".join(str(error).splitlines()[:2]))
        if returned.status != JobStatus.COMPLETED or returned.return_value in (FAILED, REFUSED):
            log = (job.stderr() or "").splitlines()[-LOG_LINES:]
            print("\n".join([f"the end of {job.paths.stderr}:", *log]), file=sys.stderr)
        return [returned]

    Job.results = results  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Job.results = wait  # type: ignore[method-assign]
