"""sasa-sweep: start many runs with one command. Running it again skips finished jobs and continues the others."""

import os
import shlex
import signal
import sys
import time

from sasa_train.config.bounds import print_keys
from sasa_train.config.keys import key_table
from sasa_train.files import inside, lock_folder
from sasa_train.refusal import DISK_FULL, ConfigError, ExpectedFailure
from sasa_train.runs.info import has_finished
from sasa_train.runs.ledger import Ledger
from sasa_train.signals import Interrupted, StopRequest, ignore_until_the_end
from sasa_train.sweep.display import Display, counts, final_table
from sasa_train.sweep.planning import SweepConfig, SweepPlan, at_full_width, read_plan
from sasa_train.sweep.scheduler import JobList, Processes, finish, job_arguments
from sasa_train.terminal import DONE, FAILED, INTERRUPTED, escape_unknown_letters, fail, printable, say, with_command

USAGE = """usage: sasa-sweep [sweep=NAME] [key=value,value ...] [sweep.KEY=value ...]

Train many models from one command: each combination of the values, in a run folder of its own.

  sasa-sweep experiment=quickstart seed=0,1,2 model.kernel_size=3,5,7 sweep.max_parallel=2
  sasa-sweep sweep=paper_table4 data.root=/path/to/imagenet      a file in configs/sweep/, or one of your own
  sasa-sweep sweep=digits_search                                 a search with pruning (needs sasa_train[search])
  sasa-sweep sweep=paper_table4 hydra/launcher=submitit_slurm    on Slurm (needs sasa_train[slurm])

Overrides are sasa-train's; several values of a key multiply. One process per job; the sweep's folder holds the
ledger, and a log and a run folder for each job. The same command again skips finished jobs, continues interrupted
ones, retries failed ones, and starts those that were added to the grid. More in docs/sweeps.md.
"""
EXIT_CODES = "Exit codes: 0 all done, 75 stopped (run it again), 2 refused, 1 a job failed or was refused."


def main() -> None:
    escape_unknown_letters()
    code = run_command(sys.argv[1:])
    ignore_until_the_end()
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments and return its exit code."""
    if {"-h", "--help"} & set(arguments):
        print_help()
        return DONE
    stop = StopRequest()
    try:
        with stop.preparing():
            return sweep(read_plan(arguments), arguments, stop)
    except ConfigError as error:
        return fail(error)
    except ExpectedFailure as error:
        fail(error)
        return FAILED
    except OSError as error:
        remedy = "make room" if error.errno in DISK_FULL else "mend this"
        fail(OSError(f"{error}; jobs that run save and stop: {remedy}, and run the same command again"))
        return FAILED
    except Interrupted:
        print("stopped before a job began; run the same command again", file=sys.stderr)
        return INTERRUPTED
    finally:
        stop.restore()


def print_help() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends without a traceback
    print(USAGE, end="")
    print_keys(key_table(SweepConfig, "sweep."), column=33)
    print(f"\n{EXIT_CODES}")


def sweep(plan: SweepPlan, arguments: list[str], stop: StopRequest) -> int:
    """Run the sweep until it is complete or a stop is requested, and return the exit code.

    Raises:
        ConfigError: another sasa-sweep is using the folder, or a required package or file is missing.
    """
    suffix = f"-{plan.config.worker}" if plan.config.worker else ""
    for name in ("logs", "hydra"):
        inside(plan.folder, name)
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(plan.folder, f".lock{suffix}", "another sweep.name")
    except OSError as error:
        raise ConfigError(f"sweep.output_dir: {plan.folder} cannot be made ({error.strerror})") from error
    with lock:
        command = shlex.join(["sasa-sweep", *arguments])
        about = {"name": plan.folder.name, "command": command, "paper_table": plan.config.paper_table}
        ledger = Ledger(plan.folder / f"ledger{suffix}.json", about | {"overrides": plan.fixed}, lock)
        source = job_source(plan, ledger)
        ledger.save()
        say(f"sweep folder  {plan.folder}\n{counts(ledger)}")
        if wide := at_full_width(plan.jobs):
            say(
                f"as set      model={','.join(wide)}: nets at full width; for the width that a run chooses from your "
                f"images, write model.name={','.join(wide)}"
            )
        if plan.hydra:
            stop.restore()  # a launcher's jobs handle signals themselves
            hand_over(plan, ledger, source)
        else:
            stop.begin_training()  # from here on, signals are forwarded to the jobs, which save a checkpoint
            display = Display()
            Processes(plan.config, plan.folder, ledger, source, stop).run(display)
            display.clear()
        say(f"\n{final_table(ledger.asked_for())}\n\n{counts(ledger)}")
        say(f"ledger      {ledger.path}")
        code = exit_code(ledger, stop)
        if code == INTERRUPTED:
            say(with_command("next        the same command continues:", printable(command)))
        say(f"{'then' if code == INTERRUPTED else 'next':<12}sasa-report {printable(plan.folder)}")
        return code


def hand_over(plan: SweepPlan, ledger: Ledger, source: JobList) -> None:
    """Submit all remaining jobs to the requested Hydra launcher, such as a cluster's, and wait for them.

    Raises:
        ConfigError: the launcher does not exist, or the sweep is a search, whose jobs depend on earlier results.
    """
    if plan.config.num_trials is not None:
        raise ConfigError(f"{' '.join(plan.hydra)}: a search starts its own jobs; start a sasa-sweep on each machine")
    from sasa_train.training.hydra_launch import launch

    jobs = list(iter(source.next, None))
    for job in jobs:
        job.begin()
    ledger.save()
    # A new folder for each launch: submitit loads results, which are pickles, from where it expects them.
    folder = plan.folder / "hydra" / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{os.urandom(2).hex()}"
    folder.mkdir(parents=True)
    codes = launch([job_arguments(job, plan.folder) for job in jobs], plan.hydra, folder)
    for job, code in zip(jobs, codes, strict=True):
        finish(job, plan.folder, code, None, plan.config.max_tries, f"see {folder}")
        source.ended(job)
    ledger.save()


def job_source(plan: SweepPlan, ledger: Ledger) -> JobList:
    if plan.config.num_trials is not None:
        from sasa_train.sweep.search import Search

        return Search(plan, ledger)
    jobs = []
    for planned in plan.jobs:
        job = ledger.add(planned)
        if planned.state == "refused":
            continue
        if job.state == "done" and not has_finished(plan.folder / job.name, job.overrides):
            job.end("waiting", "its run folder is gone, or has another run")
        # Only a search gives up a job.
        elif job.state == "pruned" or (job.state == "failed" and job.failures_in_a_row() < plan.config.max_tries):
            job.state = "waiting"
        jobs.append(job)
    if not jobs:
        raise ConfigError("no job can be started:\n" + "\n".join(f"  {job.label}: {job.reason}" for job in plan.jobs))
    return JobList(jobs, plan.folder)


def exit_code(ledger: Ledger, stop: StopRequest) -> int:
    states = {job.state for job in ledger.asked_for()}
    if stop.requested() or states & {"interrupted", "waiting"}:
        return INTERRUPTED
    return FAILED if states & {"failed", "refused"} else DONE
