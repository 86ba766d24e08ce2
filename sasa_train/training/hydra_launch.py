"""Training runs through one of Hydra's launchers: here, one after another (basic), or as jobs of Slurm, Ray and others.

Every launcher runs the same job: what `sasa-train` does with the same overrides.
"""

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig

from sasa_train.config.compose import compose_config, to_config
from sasa_train.config.groups import config_dir
from sasa_train.config.overrides import UNREADABLE, with_free_keys
from sasa_train.refusal import ConfigError, shorten
from sasa_train.signals import StopRequest
from sasa_train.terminal import DONE, FAILED, INTERRUPTED, REFUSED, fail
from sasa_train.training.endings import train_safely

LOG_LINES = 20  # lines shown of the log of a job that ended badly elsewhere


def launch(jobs: list[list[str]], hydra_overrides: list[str], folder: Path) -> list[int]:
    """Run each job, a list of arguments of `sasa-train`, by the launcher in `hydra_overrides`, and wait for all.

    Returns each job's exit code, as `sasa-train` gives it: 1 for a job that died (its error is printed), 2 for a job
    that is refused. The launcher writes its own files to `folder`.

    Raises:
        ConfigError: there is no such launcher, or one of its keys is wrong.
    """
    refusals = [_refusal(job) for job in jobs]
    accepted = [with_free_keys(job) for job, code in zip(jobs, refusals, strict=True) if code == DONE]
    with _build_launcher(hydra_overrides, folder) as (launcher, ended):
        codes = iter(_launch(launcher, accepted, ended) if accepted else [])
    return [code if code == REFUSED else next(codes) for code in refusals]


def _refusal(job: Sequence[str]) -> int:
    """The exit code of a job that is refused, or DONE."""
    # Checked before the launch: a launcher that meets a refused config while it composes its jobs gives up all of them.
    try:
        compose_config(job)
    except ConfigError as error:
        return fail(error)
    return DONE


@contextmanager
def _build_launcher(overrides: Sequence[str], folder: Path) -> Iterator[tuple[Launcher, list[int]]]:
    """The launcher, and a list to which each job that ends in this process adds its exit code."""
    ended: list[int] = []
    sweep_dir = QuotedString(str(folder), Quote.single).with_quotes()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), job_name="sasa-train", version_base="1.3"):
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
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)  # the launcher logs each job that it launches
        yield launcher, ended


def _launch(launcher: Launcher, jobs: list[list[str]], ended: list[int]) -> list[int]:
    try:
        with _deaths_as_results():
            codes = [_exit_code(job) for job in launcher.launch(jobs, initial_job_idx=0)]
    except SystemExit:  # a signal stopped a job in this process, and with it the sweep
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
    """Train one run, here or in a process of its own to which a launcher has pickled this; return its exit code."""
    is_here = HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
    if not is_here:  # errors and run.json name sys.argv as the command
        sys.argv = ["sasa-train", *(o.removeprefix("++") for o in HydraConfig.get().overrides.task)]
    stop = StopRequest()
    code = FAILED
    try:
        code = train_safely(to_config(composed), stop)
    except ConfigError as error:
        code = fail(error)
    except Exception:
        traceback.print_exc()  # printed here: a traceback does not survive the way back to the launcher
    finally:
        stop.restore()
    ended.append(code)
    if code == INTERRUPTED and is_here:
        sys.exit(INTERRUPTED)  # ends the sweep; the same command goes on where it stopped
    if code == INTERRUPTED:
        _hand_over(stop)
    return code


def _hand_over(stop: StopRequest) -> None:
    """Pass the signal that stopped a job on to the launcher's own handler."""
    # Upon USR2 submitit requeues the job, and ends this process here and now.
    try:
        was_handled = stop.hand_on()
    except Exception as error:  # it was requeued as often as is allowed
        print(error, file=sys.stderr)
        return
    # SIGTERM, which submitit ignores: Slurm preempts the job and requeues it itself, or was told to cancel it. Either
    # way there is no result to return yet.
    if was_handled:
        sys.exit(INTERRUPTED)


def _exit_code(job: JobReturn) -> int:
    try:
        return job.return_value
    except Exception as error:  # a failed job's return_value raises its error
        print(f"a job was lost: {error}", file=sys.stderr)
        return FAILED


@contextmanager
def _deaths_as_results() -> Iterator[None]:
    """Inside, submitit returns a job that died like any other, and the end of a failed job's log is printed."""
    # Without this its launcher would give up all jobs for one that died.
    try:
        from submitit import Job
        from submitit.core.utils import UncompletedJobError
    except ImportError:
        yield
        return
    wait = Job.results

    def results(job: Job) -> list[JobReturn]:
        try:
            returned = wait(job)[0]  # of its first task, as its launcher does
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
