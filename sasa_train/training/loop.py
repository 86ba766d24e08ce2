"""The training loop, which runs steps, writes log rows, evaluates and saves checkpoints."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from sasa_train.config.derived import has_top5
from sasa_train.config.identity import trajectory
from sasa_train.config.keys import flatten
from sasa_train.config.saved import to_yaml
from sasa_train.data.loader import Loaders, check_evaluated
from sasa_train.data.randomness import recalibration_rng
from sasa_train.files import is_there
from sasa_train.machine import peak_memory, waited_for_processors
from sasa_train.processes import collectives
from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.runs.checkpoint import CheckpointError
from sasa_train.runs.folder import RunFolder
from sasa_train.runs.metrics import describe_value, is_out_of_patience, score
from sasa_train.signals import StopRequest
from sasa_train.terminal import say, warn
from sasa_train.training.announce import CROWDED_OUT, describe_threads
from sasa_train.training.evaluation import Batches, Evaluation, evaluate, recalibrate
from sasa_train.training.hooks import OwnCodeError, RunView, call_hooks, load_hooks
from sasa_train.training.log import RunLogger
from sasa_train.training.nonfinite import NonFiniteError, find_origin
from sasa_train.training.profiling import WAIT, WARMUP, build_profiler
from sasa_train.training.snapshots import captions_of, confusion_picture, contact_sheet, embedding_pictures
from sasa_train.training.step import Stepper, StepReport, train_one_epoch
from sasa_train.training.trackers import Tracker, start_trackers
from sasa_train.training.utilisation import peak_tflops, utilisation

NUM_NAMED = 8  # maximum number of images named in an error
WATCHED = 5  # seconds of training, at least, for which threads that lack processors are counted


class Loop:
    """Training loop that runs steps, logs, evaluates and saves checkpoints until the last step or a stop request.

    Under torchrun, all processes run it in lockstep, and only the first one writes files and prints.
    """

    def __init__(self, run: RunFolder, loaders: Loaders, stepper: Stepper, stop: StopRequest):
        self.run_folder, self.loaders, self.stepper, self.stop = run, loaders, stepper, stop
        self.plan, self.state = stepper.plan, stepper.state
        self.config, self.steps_per_epoch = self.plan.config, self.plan.steps_per_epoch
        self.num_steps, self.peak_tflops = self.plan.num_steps, peak_tflops(self.plan)
        is_silent = self.plan.rank > 0
        run.check_lock()  # the folder may have been taken by another run while the images were loaded
        self.logger = RunLogger(
            run.path,
            run.metrics,
            self.state.step,
            self.num_steps,
            is_silent,
            self.steps_per_epoch,
            has_top5(len(loaders.classes)),
            has_board="tensorboard" in self.config.logger,
            best_metric=self.config.trainer.best_metric,
        )
        self.trackers = list[Tracker]()  # in the first process, during `run`
        self.hooks = {} if is_silent else load_hooks(self.config.hooks)  # called in the first process
        self.failure: OwnCodeError | None = None  # of a hook; all processes have it
        self.num_left_out = 0  # unreadable images in the last evaluation
        self._top_speed, self._is_slow = 0.0, False
        self._waited, self._waited_at = waited_for_processors(), time.perf_counter()
        self._saved: tuple[int, int] | None = None  # step and evaluated_step of the last checkpoint
        self.eval_seconds = self.logger.eval_seconds  # duration of the last evaluation, possibly before a resume
        self.profiler: Any = contextlib.nullcontext()
        self.profile_steps = 0 if is_silent else self.config.trainer.profile_steps
        if self.profile_steps:
            self.profiler = build_profiler(self.profile_steps, run, self.state.device)
        self._start_clock()

    def run(self) -> bool:
        """Train from the state's current step to the last; return True when done, False after a stop request.

        Raises:
            OwnCodeError: a hook has failed; the run is saved, if that was possible.
        """
        if self.plan.rank == 0:
            self.trackers = start_trackers(self.config.logger, self.run_folder)
        self.tell_trackers()
        try:
            with self.profiler:
                finished = self.run_epochs()
        except (CheckpointError, ExpectedFailure) as error:
            if self.failure is None:
                raise
            warn(f"after the failure of a hook: {error}")
            raise self.failure from error
        if self.profile_steps and self.profiler.step_num <= WAIT + WARMUP:
            say(f"no profile: the run ended before step {WAIT + WARMUP + 1} after its start")
        if finished:
            self.logger.write_hparams(trajectory(self.config))
        self.tell("end", finished)
        if self.failure is not None:
            say(f"a checkpoint of step {self.state.step} is saved; the same command continues the run, and if you have")
            say("changed your own code, with allow_config_change=[imports]")
            raise self.failure
        return finished

    def run_epochs(self) -> bool:
        self.tell("start")
        if self.stop.asked_by:
            self.save(is_best=False, must_succeed=True)
            return False
        # The next action depends only on the state, so a resumed run proceeds exactly like an uninterrupted one.
        while True:
            if self.evaluation_is_due():
                may_go_on = self.evaluate()
            elif self.is_done():
                return True
            elif self.stop_is_agreed() and self._saved == (self.state.step, self.state.evaluated_step):
                return False
            else:
                may_go_on = self.train_epoch()
            if not may_go_on:
                return False

    def tell(self, event: str, finished: bool = False) -> None:
        """Call the hooks in the first process; if one asks to stop or fails, all processes stop and save."""
        if not self.config.hooks or self.failure is not None:
            return
        with self._off_the_clock():
            try:
                asked = collectives.from_first(lambda: self.call_hooks(event, finished), ExpectedFailure)
            except OwnCodeError as error:  # it is raised once the run is saved
                self.failure, asked = error, f'an error at "{event}"'
        self.stop.asked_by = self.stop.asked_by or asked

    def call_hooks(self, event: str, finished: bool) -> str:
        state = self.state
        train, val = (self.logger.last_rows.get(split) for split in ("train", "val"))
        view = RunView(
            path=self.run_folder.path,
            config=MappingProxyType(flatten(self.config)),
            step=state.step,
            num_steps=self.num_steps,
            epoch=self.epoch_number(),
            train=train and MappingProxyType(dict(train)),
            val=val and MappingProxyType(dict(val)),
            best=state.best and MappingProxyType(dict(state.best)),
            finished=finished,
            model=state.ema.module if state.ema else state.model,
        )
        return call_hooks(self.hooks, event, view, state.device)

    def evaluation_is_due(self) -> bool:
        state = self.state
        if state.step == state.evaluated_step:
            return False
        epoch, rest = divmod(state.step, self.steps_per_epoch)
        return state.step == self.num_steps or (rest == 0 and epoch % self.config.trainer.eval_every_epochs == 0)

    def train_epoch(self) -> bool:
        """Train to the end of the current epoch; return False after a stop request."""
        trainer, state = self.config.trainer, self.state
        epoch, first_step = divmod(state.step, self.steps_per_epoch)
        end = min((epoch + 1) * self.steps_per_epoch, self.num_steps)
        batches = self.loaders.train.train_batches(epoch, first_step)
        if state.step == 0:
            batches = self.show_first(batches)
        for report in self.steps(batches, end - state.step):
            state.epoch = state.step // self.steps_per_epoch
            self.count(report)
            # This is checked once per step, because a signal may arrive between two checks. It is checked before
            # anything waits for the device and therefore for other processes, because it reveals whether one has ended.
            stopping = self.stop_is_agreed()
            if self.is_logged(state.step):
                self.log_train(report)
                self.tell("step")
                stopping = stopping or bool(self.stop.asked_by)
            is_last = state.step == end
            is_due = trainer.checkpoint_every_steps and state.step % trainer.checkpoint_every_steps == 0
            if is_due or stopping or (is_last and not self.evaluation_is_due()):
                self.save(is_best=False, must_succeed=stopping)
            if stopping or self.stop.asked_by:
                return False
        return True

    def is_logged(self, step: int) -> bool:
        """Return whether a train row follows this step: at even distances, at least once per epoch, and at the end."""
        return step % min(self.config.trainer.log_every_steps, self.steps_per_epoch) == 0 or step == self.num_steps

    def stop_is_agreed(self) -> bool:
        """Return whether any process has been asked to stop; all processes get the same answer after the same step."""
        if self.plan.world_size == 1:
            return self.stop.requested()
        asked = int(collectives.largest(self.stop.asked))
        self.stop.hear(asked)
        return asked > 0

    def steps(self, batches: Batches, num_steps: int) -> Iterator[StepReport]:
        try:
            yield from train_one_epoch(self.stepper, batches, num_steps, self.is_logged)
        except NonFiniteError as error:
            raise NonFiniteError(self.explain(error), error.step, error.number) from None

    def explain(self, error: NonFiniteError) -> str:
        """Describe the module and images that caused `error`; write the description and the image names to a file."""
        text, names = str(error), self.loaders.train_names(error.step, error.number)
        if error.number is not None and self.config.trainer.sync_batch_norm and self.plan.world_size > 1:
            text += "; the module is not looked for with trainer.sync_batch_norm, which needs all processes"
        elif error.number is not None:
            try:
                images = self.loaders.train_images(error.step, error.number)
                origin, rows = find_origin(self.state.model, images, self.plan.autocast())
            except (RuntimeError, ExpectedFailure) as another:  # e.g. out of memory
                origin, rows = f"its origin could not be found ({str(another).splitlines()[0]})", []
            text += f": {origin}"
            if rows:
                text += f", for {', '.join(names[row] for row in rows[:NUM_NAMED])}"
                text += f" and {len(rows) - NUM_NAMED} more" if len(rows) > NUM_NAMED else ""
        if self.run_folder.lock is None:
            text += f"; its images began with {', '.join(names[:NUM_NAMED])}"
        else:
            with contextlib.suppress(OSError):  # a full disk must not mask the error
                self.run_folder.write("nonfinite.txt", "".join(f"{line}\n" for line in (text, "", *names)).encode())
                text += f"; the images that it came from are in {self.run_folder.path}/nonfinite.txt"
        lr = self.config.optimizer.lr
        if not is_there(self.run_folder.path / "checkpoints/last.pt"):
            return f"{text}. There is no checkpoint yet: run the same command with a lower optimizer.lr (now {lr:g})"
        return (
            f"{text}. Go on from a checkpoint with gentler settings, in a new run: the same command with "
            f"resume={self.run_folder.path}/checkpoints/last.pt optimizer.lr=... 'allow_config_change=[optimizer.lr]' "
            "(or trainer.grad_clip_norm, or trainer.precision)"
        )

    def show_first(self, batches: Batches) -> Batches:
        """Write a contact sheet of the first batch as the model sees it, including augmentation."""
        images, labels = next(batches)
        shown = self.loaders.train.normalize.undo(images).cpu()
        sheet = contact_sheet(shown, captions_of(labels.cpu(), self.loaders.classes))
        path = self.run_folder.path / "augmented.png" if self.run_folder.is_ours() else None
        self.logger.write_picture("visualize/augmented", sheet, 0, path)
        yield images, labels
        yield from batches

    def count(self, report: StepReport) -> None:
        if self.profile_steps:
            self.profiler.step()
        self._wait_seconds += report.wait_seconds
        self._clock_steps += 1
        self.logger.advance()
        self.stop.begin_training()

    def log_train(self, report: StepReport) -> None:
        state = self.state
        self.check_finite()
        loss, top1 = state.window.averages()
        # The steps are complete only after `averages`, which waits for the device.
        self._lap()
        elapsed = self._clock_seconds
        row = {
            "split": "train",
            "step": state.step,
            "epoch": self.epoch_number(),
            "loss": loss,
            "top1": top1,
            "lr": max(group["lr"] for group in state.optimizer.param_groups),  # layer_decay reduces the others
            "grad_norm": None if report.grad_norm is None else report.grad_norm.item(),
            "images_per_sec": self._clock_steps * self.config.trainer.global_batch_size / elapsed,
            **utilisation(self.plan, self.peak_tflops, elapsed / self._clock_steps),
            "data_wait_fraction": collectives.largest(self._wait_seconds / elapsed),  # all wait for the slowest one
            "memory_mib": round(collectives.largest(peak_memory(state.device)) / 2**20),
        }
        self.logger.write(row)
        self.logger.show_train(row, self.seconds_left(elapsed / self._clock_steps))
        self.warn_if_slow(row["images_per_sec"])
        self._start_clock()

    def warn_if_slow(self, speed: float) -> None:
        """Warn once if threads on a CPU lack processors, or compute at a quarter of this run's own top images/s."""
        num_threads = torch.get_num_threads()
        if self._is_slow or self.state.device.type != "cpu" or num_threads == 1:
            return
        before, now, share = self._top_speed, time.perf_counter(), 0.0
        self._top_speed = max(before, speed)
        if (seconds := now - self._waited_at) >= WATCHED:
            waited = waited_for_processors()
            share = (waited - self._waited) / seconds / num_threads
            self._waited, self._waited_at = waited, now
        self._is_slow = share >= CROWDED_OUT or speed < before / 4
        if self._is_slow:
            fell = f", after {before:,.0f}" if speed < before / 4 else ""
            warn(f"training is at {speed:,.0f} images/s{fell}: {describe_threads(num_threads, share)}")

    def seconds_left(self, seconds_per_step: float) -> float:
        steps = self.num_steps - self.state.step
        evaluations = -(-steps // (self.steps_per_epoch * self.config.trainer.eval_every_epochs))
        return steps * seconds_per_step + evaluations * self.eval_seconds

    def evaluate(self) -> bool:
        """Evaluate on val, log and save; return False after a stop request (a resumed run evaluates again)."""
        state = self.state
        self.check_finite()
        with self._off_the_clock():
            start = time.perf_counter()
            averaged = state.ema.module if state.ema else state.model
            # All processes evaluate with the first process's statistics, which the checkpoint will contain.
            self.copy_buffers()
            self.recalibrate(averaged)
            result = self.evaluate_model(averaged)
            raw = self.evaluate_model(state.model) if state.ema and result else None
            seconds = round(time.perf_counter() - start, 4)
        if result is None or (state.ema and raw is None):
            self.stop_is_agreed()  # so that the first process can report the reason
            self.save(is_best=False, must_succeed=True)
            return False
        # A diverging run may recover, as its batch norm's statistics lag behind its weights.
        if not math.isfinite(result.loss) and self.plan.rank == 0:
            warn(
                f"the loss on val after step {state.step} is {result.loss}; the run goes on, and its top1 means nothing"
            )
        row: dict[str, Any] = {"split": "val", "step": state.step, "epoch": self.epoch_number()}
        row |= {"loss": result.loss, "top1": result.top1, "top5": result.top5}
        row |= {"f1_macro": result.f1_macro, "balanced_accuracy": result.balanced_accuracy}
        row |= ({"top1_raw": raw.top1} if raw else {}) | {"seconds": seconds}
        if self.num_left_out:
            row |= {"num_images": result.num_images, "unreadable": self.num_left_out}
        self.logger.write(row)
        row, metric = self.logger.last_rows["val"], self.config.trainer.best_metric
        best_before, is_best = state.best, state.best is None or score(row, metric) > score(state.best, metric)
        if is_best:
            state.best = {key: row[key] for key in ("top1", "step", "epoch", metric)}
        state.evaluated_step, self.eval_seconds = state.step, seconds
        self.logger.show_val(row | {"loss": result.loss}, is_best)
        self.tell("evaluated")
        if is_best:
            self.logger.write_picture("visualize/confusion_best", confusion_picture(result.confusion), state.step)
            for name, picture in embedding_pictures(averaged).items():
                self.logger.write_picture(f"visualize/rel_embeddings/{name}", picture, state.step)
        if self.config.trainer.log_histograms:
            self.logger.write_histograms(averaged, state.step)
        if not self.save(is_best) and is_best:
            state.best = best_before  # best.pt still contains the previous best
            if self.plan.rank == 0:
                reached = describe_value(row, metric) if metric != "top1" else f"top1 {row['top1']:.2f}"
                warn(f"the best model so far ({reached} after epoch {row['epoch']}) is not kept")
        return True

    def is_done(self) -> bool:
        """Whether the last step is done, or `trainer.patience` has ended the run after its last evaluation."""
        state = self.state
        return state.step >= self.num_steps or (
            state.step == state.evaluated_step and is_out_of_patience(self.config.trainer, self.logger.metrics)
        )

    def recalibrate(self, model: nn.Module) -> None:
        """Recompute batch norm's statistics from the first micro-batches of the epoch."""
        num_batches = self.config.trainer.bn_recalibration_batches
        if not num_batches:
            return
        state = self.state
        first = itertools.islice(self.loaders.train.train_batches(self.epoch_number() - 1), num_batches)
        batches = itertools.takewhile(lambda _: not self.stop_is_agreed(), first)
        # Separate random numbers are used, because advancing the run's generators here would make a resumed run
        # differ.
        with recalibration_rng(self.config.seed, state.step, state.device), self.plan.autocast():
            recalibrate(model, batches, state.device)

    def copy_buffers(self) -> None:
        """Copy the first process's batch norm statistics, which the checkpoint contains, to all processes."""
        collectives.copy_buffers(self.state.model)
        if self.state.ema:
            collectives.copy_buffers(self.state.ema.module)

    def epoch_number(self) -> int:
        """Return the epoch of the last step, counted from 1."""
        return (self.state.step - 1) // self.steps_per_epoch + 1

    def evaluate_model(self, model: nn.Module) -> Evaluation | None:
        result = evaluate(
            model,
            self.loaders.val.eval_batches(),
            len(self.loaders.classes),
            self.state.device,
            self.config.trainer.precision,
            lambda: collectives.stop_is_wanted(self.stop.requested()),
        )
        if result is not None:
            self.num_left_out = int(collectives.total(torch.tensor(self.loaders.val.num_left_out)))
            check_evaluated(self.loaders.val, result.num_images, self.num_left_out)
        return result

    def save(self, is_best: bool, must_succeed: bool = False) -> bool:
        """Write a checkpoint; return False if writing failed but the run may continue.

        Raises:
            CheckpointError: writing failed and the run may not continue, i.e. it is finished, `must_succeed` is true or
                on_failed_save is "stop".
            NonFiniteError: a loss, weight, statistic or average is not finite; no checkpoint is written.
        """
        # From here on, a signal takes effect only after the checkpoint is written.
        self.stop.begin_training()
        state = self.state
        with self._off_the_clock():
            # All processes take part in the next three calls; only the first one writes below.
            self.copy_buffers()
            self.check_finite()
            self.share_unreadable()
            finished = state.step == state.evaluated_step and self.is_done()
            content = state.state_dict() | {
                "config": to_yaml(self.run_folder.as_written(self.config)),
                "classes": self.loaders.classes,
                "finished": finished,
                "metrics": self.logger.metrics,
                "fingerprint": self.loaders.fingerprint,
                "provenance": self.run_folder.provenance,
            }
            may_fail = self.config.trainer.on_failed_save == "continue" and not finished and not must_succeed
            errors = (CheckpointError, ExpectedFailure)
            if not collectives.from_first(lambda: self.write(content, is_best, may_fail), *errors):
                return False
        self._saved = (state.step, state.evaluated_step)
        self.tell_trackers()
        self.tell("saved")
        return True

    def tell_trackers(self) -> None:
        """Let the trackers copy the rows that the last checkpoint contains, except those of a step with more to come.

        A run that is resumed from this checkpoint continues after them, so that they never change.
        """
        if not self.trackers:
            return
        rows, train = self.logger.metrics.splitlines(keepends=True), self.logger.last_rows.get("train")
        if train is not None and train["step"] == self.state.step and self.evaluation_is_due():
            rows.pop()
        for tracker in self.trackers:
            tracker.tell(len("".join(rows)))

    def write(self, content: dict[str, Any], is_best: bool, may_fail: bool) -> bool:
        try:
            self.run_folder.check_lock()
            self.run_folder.checkpoints.save(content, is_best)
        except (CheckpointError, OSError) as error:
            if not may_fail:
                raise
            warn(f"{error}; the run goes on and tries again at the next checkpoint")
            return False
        self.run_folder.note_checkpoint()
        return True

    def share_unreadable(self) -> None:
        """Share the unreadable images among all processes; raise ConfigError if they exceed `data.max_unreadable`."""
        if self.plan.world_size == 1:
            return
        for loader in (self.loaders.train, self.loaders.val):
            for found in collectives.gather(loader.quarantine.found):
                loader.quarantine.note(list(found.items()))
            collectives.everywhere(loader.quarantine.check, ConfigError)

    def check_finite(self) -> None:
        def check() -> None:
            try:
                self.stepper.loss_watch.check()
                self.state.check()
            except NonFiniteError as error:
                raise NonFiniteError(self.explain(error), error.step, error.number) from None

        collectives.everywhere(check, NonFiniteError)

    def _start_clock(self) -> None:
        self._clock_start, self._clock_seconds = time.perf_counter(), 0.0
        self._clock_steps, self._wait_seconds = 0, 0.0

    def _lap(self) -> None:
        """Add the time since the clock was started to the training time, and restart the clock."""
        now = time.perf_counter()
        self._clock_seconds += now - self._clock_start
        self.state.seconds += now - self._clock_start
        self._clock_start = now

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Context manager that stops the clock, to exclude evaluations and saves from training time and throughput."""
        # Training time includes the steps that are still queued.
        if self.state.device.type == "cuda":
            torch.cuda.synchronize()
        self._lap()
        yield
        self._clock_start = time.perf_counter()
