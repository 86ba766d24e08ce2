"""Hyperparameter search with Optuna: each trial is a job that may be pruned; the study is a file next to the ledger.

The study records the parameters of a trial; the ledger and the run folder record how its run went. A search that was
stopped or killed continues its unfinished trials from their checkpoints. Several sasa-sweep processes can share a
study, each with its own ledger (`sweep.worker`).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from sasa_train.config.overrides import parse_overrides
from sasa_train.extras import why_not
from sasa_train.files import open_own
from sasa_train.refusal import LIBRARY_ERRORS, ConfigError, shorten
from sasa_train.runs.ledger import Job, Ledger
from sasa_train.runs.metrics import MAX_LOG
from sasa_train.runs.schema import TEXT, first_wrong, number
from sasa_train.sweep.planning import SweepPlan, build_job
from sasa_train.sweep.scheduler import JobList
from sasa_train.terminal import printable, some, warn

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, Trial

WORKER = "worker"  # the trial attribute that holds the name of its worker
NUM_RANDOM = 8  # number of random trials before the sampler uses their results
NUM_WHOLE = 4  # number of trials that run to completion before any trial is pruned
FIRST_THIRD = 1 / 3  # the part of a run in which nothing is pruned, because warm-up is not informative
# What Optuna does not check when it reads a trial, and computes with later.
TRIAL = {"values": (None, [number()]), "intermediate_values": [number()], "params": {str: (TEXT, number(), bool, None)}}


class Search(JobList):
    """A queue that takes its next job from the study's next trial; a trial's value is the job's last `score`.

    Raises:
        ConfigError: Optuna is not installed, or the search space is invalid.
    """

    def __init__(self, plan: SweepPlan, ledger: Ledger):
        if reason := why_not("sweep.num_trials", "search"):
            raise ConfigError(reason)
        import optuna

        assert plan.config.num_trials is not None
        self.plan, self.ledger, self.num_trials = plan, ledger, plan.config.num_trials
        self.fixed_keys = {o.key_or_group for o in parse_overrides(plan.fixed)}
        self.space = {o.key_or_group: distribution(o) for o in parse_overrides(plan.space)}
        self.states, self.trial_class = optuna.trial.TrialState, optuna.trial.Trial
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Optuna's lock is a link to this path. It waits half a minute for one that a killed search left behind, but
        # forever for one that leads nowhere, because the path was relative or the folder was moved.
        journal, lock = Path(os.path.abspath(plan.folder / "optuna.journal")), plan.folder / "optuna.journal.lock"
        if lock.is_symlink() and not lock.exists():
            lock.unlink(missing_ok=True)
        if os.path.lexists(journal):
            descriptor = open_own(journal, os.O_RDWR)  # refuses a link, and a pipe, for which Optuna would wait
            size = os.fstat(descriptor).st_size
            os.close(descriptor)
            if size > MAX_LOG:  # Optuna reads it at once
                raise ConfigError(f"{journal}: is larger than {MAX_LOG / 2**20:,.0f} MiB; move it away")
        try:
            self.study = optuna.create_study(
                study_name="sasa_train",
                storage=optuna.storages.JournalStorage(journal_backend(journal)),
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(n_startup_trials=NUM_RANDOM, constant_liar=True),
                pruner=build_pruner(plan.config.pruner),
            )
        # Optuna replays all lines as they are, so that one of another shape can fail anywhere in it.
        except LIBRARY_ERRORS as error:
            raise ConfigError(
                f"{journal}: is damaged ({type(error).__name__}: {printable(shorten(error))}); delete the lines that "
                "are no JSON, or begin another search with sweep.name=..."
            ) from error
        self._check_study(journal)
        super().__init__([], plan.folder)
        numbers = {trial.number for trial in self.study.get_trials(deepcopy=False)}
        for job in ledger.jobs.values():  # the journal may have been deleted since
            job.trials = [number for number in job.trials if number in numbers]
        ended = [job for job in ledger.jobs.values() if job.state not in ("waiting", "interrupted")]
        known = {number for job in ended for number in job.trials}
        ledger.asked |= {name for name, job in ledger.jobs.items() if job.trials}
        for trial in self.study.get_trials():
            is_own = trial.user_attrs.get(WORKER, "nobody") == plan.config.worker
            if is_own and (trial.state == self.states.RUNNING or trial.number not in known):
                self._take_on(trial)

    def _check_study(self, journal: Path) -> None:
        """Raise ConfigError if the study has another space or direction, or values that are no numbers."""
        from optuna.distributions import check_distribution_compatibility
        from optuna.study import StudyDirection

        trials = self.study.get_trials(deepcopy=False)
        try:
            for trial in trials:
                for key in trial.distributions.keys() & self.space.keys():
                    check_distribution_compatibility(trial.distributions[key], self.space[key])
        except ValueError as error:
            raise ConfigError(
                f"{journal}: was begun with another space ({error}); give this one sweep.name=..."
            ) from error
        wrong = None if self.study.directions == [StudyDirection.MAXIMIZE] else "its study does not maximize one value"
        for trial in trials:
            found = {"values": trial.values, "intermediate_values": [*trial.intermediate_values.values()]}
            wrong = wrong or first_wrong(found | {"params": trial.params}, TRIAL)
            # Parameters become overrides, and `imports` would run code.
            foreign = sorted(trial.params.keys() - self.space.keys())
            wrong = wrong or (f"a trial sets {some(foreign)}, which this search does not" if foreign else None)
        if wrong:
            raise ConfigError(f"{journal}: is damaged ({wrong}); begin another search with sweep.name=...")

    def next(self) -> Job | None:
        """Return the job of an unfinished or new trial, until `sweep.num_trials` trials have been started."""
        while (job := super().next()) is None and self._num_left() > 0:
            trial = self.study.ask(self.space)
            trial.set_user_attr(WORKER, self.plan.config.worker)  # set last: a trial without it was cut off by a kill
            self._take_on(trial)
        return job

    def num_waiting(self) -> int:
        return len(self.queue) + max(0, self._num_left())

    def look(self, job: Job) -> bool:
        """Report a new evaluation and return True if the study's pruner stops the trial."""
        assert job.last is not None
        trial = self.trial_class(self.study, self.study.get_trials(deepcopy=False)[job.trials[0]]._trial_id)
        trial.report(job.score, job.last["epoch"])
        return FIRST_THIRD * job.epochs <= job.last["epoch"] < job.epochs and trial.should_prune()

    def ended(self, job: Job) -> None:
        super().ended(job)
        self._tell(job)

    def _num_left(self) -> int:
        return self.num_trials - sum(WORKER in t.user_attrs for t in self.study.get_trials(deepcopy=False))

    def _take_on(self, trial: "Trial | FrozenTrial") -> None:
        """Queue the trial's job unless it has already ended.

        It may have ended in a search that was killed, in another worker, or as the job of an identical trial.
        """
        values = [f"{key}={value}" for key, value in trial.params.items()]
        job = self.ledger.add(build_job([*self.plan.fixed, *values], self.fixed_keys, self.plan.folder))
        if trial.number not in job.trials:
            job.trials.append(trial.number)
        state = getattr(trial, "state", None)  # a new trial has no state
        if job.state in ("waiting", "interrupted"):
            if state is not None and state.is_finished():  # the ledger was lost or could not be written
                job.note_metrics(self.folder / job.name)
                job.end("pruned" if state == self.states.PRUNED else "failed", "as the study has it")
            elif job not in self.queue:
                self.queue.append(job)
        self._tell(job)
        self.ledger.save()

    def _tell(self, job: Job) -> None:
        """Report the results of the job's trials to the study, if they are known."""
        for trial in job.trials:
            if job.state == "done" and job.last:
                self.study.tell(trial, job.score, skip_if_finished=True)
            elif job.state == "pruned":
                self.study.tell(trial, state=self.states.PRUNED, skip_if_finished=True)
            elif job.state in ("failed", "refused"):
                self.study.tell(trial, state=self.states.FAIL, skip_if_finished=True)


def distribution(override: Override) -> "BaseDistribution":
    """Convert an override to a distribution: interval(a,b), int(...), tag(log,...), range(a,b), or a list of choices.

    Choices are kept as written, so that a trial's parameter can be used as the value of an override.

    Raises:
        ConfigError: the bounds are invalid.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    sweep = override.value()
    try:
        if isinstance(sweep, IntervalSweep):
            assert sweep.start is not None and sweep.end is not None
            is_log = "log" in sweep.tags
            if isinstance(sweep.start, int) and isinstance(sweep.end, int):
                return IntDistribution(sweep.start, sweep.end, log=is_log)
            return FloatDistribution(sweep.start, sweep.end, log=is_log)
        values = list(override.sweep_string_iterator())
        if isinstance(sweep, RangeSweep) and isinstance(sweep.step, int) and isinstance(sweep.start, int):
            return IntDistribution(int(values[0]), int(values[-1]), step=sweep.step)
        return CategoricalDistribution(values)
    except (ValueError, LookupError) as error:
        raise ConfigError(f"{override.input_line}: is not a search space ({error})") from error


def journal_backend(path: Path) -> "JournalFileBackend":
    """Return Optuna's journal, before each line of which one that a full disk or a kill has cut off is removed.

    Optuna ignores such a line when it reads, but would append to it, and could not read the result.
    """
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))

    class WholeLines(JournalFileBackend):
        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lock.acquire()  # another worker may be writing the line
            try:
                cut_torn_line(path)
            finally:
                lock.release()
            super().append_logs(logs)

    return WholeLines(str(path), lock)


def cut_torn_line(path: Path) -> None:
    """Remove what follows the last line break of a file, and warn, if anything does."""
    with os.fdopen(open_own(path, os.O_RDWR), "r+b") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return
        file.seek(-1, os.SEEK_END)
        if file.read() == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    warn(f"{path}: its last line was cut off, and is left out")


def build_pruner(name: str) -> "BasePruner":
    """Build a pruner; "median" stops trials below the median of earlier ones (Golovin et al. 2017, section 3.3)."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=NUM_WHOLE)
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()
