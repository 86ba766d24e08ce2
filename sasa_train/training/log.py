"""Log a run's metrics to metrics.jsonl, TensorBoard and the console."""

import errno
import io
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from sasa_train.files import write_atomic
from sasa_train.runs.metrics import MetricsFile, lost_best
from sasa_train.terminal import columns, duration, fitting, say, warn
from sasa_train.training.tracker_process import TAGS

SHOWN = ("loss", "top1", "top1_raw", "f1_macro", "balanced_accuracy")  # on TensorBoard, besides TAGS


def _without_tensorboard(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable:
    """Return `threading.excepthook` without the disk errors of TensorBoard's thread, which it raises again later."""

    def excepthook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            hook(failed)

    return excepthook


threading.excepthook = _without_tensorboard(threading.excepthook)


class Board(SummaryWriter):
    """A TensorBoard writer that keeps to its folder and file, whatever is put in their places.

    TensorBoard opens its file by its path whenever it writes. Linux has paths to folders that are open.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        path = f"/proc/self/fd/{self._folder}"
        before = set(os.listdir(self._folder))
        super().__init__(path if os.path.isdir(path) else str(folder), purge_step=step)
        new = set(os.listdir(self._folder)) - before
        self._name = next(name for name in new if f".{os.getpid()}." in name)
        # While it is open, no other file gets its inode.
        self._file = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self._folder)

    def check(self) -> None:
        """Raise OSError if another file has taken the place of this writer's."""
        found = os.stat(self._name, dir_fd=self._folder, follow_symlinks=False)
        if not os.path.samestat(found, os.fstat(self._file)):
            raise OSError(errno.ESTALE, "another file has taken the place of the curves'")

    def close(self) -> None:
        super().close()
        os.close(self._file)
        os.close(self._folder)


def _open_board(folder: Path, step: int) -> Board | None:
    """Return a TensorBoard writer, or None with a warning if the folder cannot be written."""
    try:
        return Board(folder, step)
    except OSError as error:
        warn(f"no TensorBoard curves for this run ({error})")
        return None


class ProgressBar(tqdm):
    """The progress of a run on a terminal (stderr), with as much of it as the current width holds."""

    MIN_BAR = 6  # columns, with its ends and the space after it
    CTRL_C = 2  # columns that stay free for ^C, which would otherwise break the line, so that the bar is shown twice

    def __init__(self, step: int, total_steps: int, steps_per_epoch: int, is_silent: bool):
        self._steps_per_epoch, self._end, self._row = steps_per_epoch, math.inf, dict[str, Any]()
        disable = True if is_silent else None  # None disables it if there is no terminal
        super().__init__(total=total_steps, initial=step, unit="step", disable=disable, dynamic_ncols=True)

    def show(self, row: dict[str, Any], seconds_left: float) -> None:
        """Show a train row; the time left then counts down until the next one."""
        self._row, self._end = row, time.monotonic() + seconds_left
        self.refresh()

    @property
    def format_dict(self) -> Any:
        values = super().format_dict
        width = (values["ncols"] or 80) - self.CTRL_C
        return values | {"ncols": width, "bar_format": "|{bar}| " + self._text(width)}

    def _text(self, width: int) -> str:
        row, epochs = self._row, -(-self.total // self._steps_per_epoch)
        left = max(0.0, self._end - time.monotonic())
        parts = [
            (0, f"epoch {min(self.n // self._steps_per_epoch + 1, epochs)}/{epochs}"),
            (4, f"step {self.n}/{self.total}"),
            (1, f"loss {row['loss']:.3f}" if row else ""),
            (2, f"top1 {row['top1']:.1f}" if row else ""),
            (5, f"{row['images_per_sec']:,.0f} img/s" if row else ""),
            (3, f"ETA {tqdm.format_interval(left)}" if row else ""),
        ]
        return fitting(parts, width - self.MIN_BAR)


class RunLogger:
    """Logger for the rows of a run. `metrics` contains the rows from the checkpoint, as a copy of metrics.jsonl.

    With `is_silent`, nothing is written or shown; this is used on all processes except the first. `has_top5` states
    whether val lines and TensorBoard show top5, which metrics.jsonl always has; `has_board`, whether TensorBoard is
    written.
    """

    def __init__(
        self,
        run_dir: Path,
        metrics: str,
        step: int,
        total_steps: int,
        is_silent: bool = False,
        steps_per_epoch: int | None = None,
        has_top5: bool = True,
        has_board: bool = True,
        best_metric: str = "top1",
    ):
        self._is_silent, self._has_top5, self._metric = is_silent, has_top5, best_metric
        self._file = MetricsFile(None if is_silent else run_dir, metrics)
        rows = [json.loads(line) for line in metrics.splitlines()]
        self.last_rows = {row["split"]: row for row in rows}  # the last train row and the last val row
        self.eval_seconds = next((row.get("seconds", 0.0) for row in reversed(rows) if row["split"] == "val"), 0.0)
        self._board = _open_board(run_dir / "tensorboard", step) if has_board and not is_silent else None
        # TensorBoard discards all steps from purge_step on, so the rows of this step are written again.
        for row in rows:
            if row["step"] == step:
                self._write_board(row)
        self._bar = ProgressBar(step, total_steps, steps_per_epoch or total_steps, is_silent)
        self._total_steps = total_steps

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl (immediately) and TensorBoard; NaN and infinities become null."""
        self.last_rows[row["split"]] = self._file.write(row)
        self._write_board(self.last_rows[row["split"]])

    @property
    def metrics(self) -> str:
        """All rows in the format of metrics.jsonl, for the checkpoint."""
        return self._file.text

    def show_train(self, row: dict[str, Any], seconds_left: float) -> None:
        """Print a row as a line, with as much of it as a terminal's width holds, and show it on the progress bar."""
        parts = [
            (0, f"step {row['step']}/{self._total_steps}"),
            (0, f"epoch {row['epoch']}"),
            (0, f"loss {row['loss']:.4f}"),
            (0, f"top1 {row['top1']:.2f}"),
            (2, f"lr {row['lr']:.2e}"),
            (1, f"{row['images_per_sec']:,.0f} img/s"),
            (3, f"data wait {100 * row['data_wait_fraction']:.0f} %"),
            (4, f"{row['memory_mib']:,} MiB"),
            (5, f"ETA {duration(seconds_left)}"),  # a terminal has it on the bar
        ]
        say(fitting(parts, columns(sys.stdout)))
        self._bar.show(row, seconds_left)

    def show_val(self, row: dict[str, Any], is_best: bool) -> None:
        best = (
            "best so far, but a better one was not kept"
            if lost_best(self.metrics, row, self._metric)
            else "best so far"
        )
        parts = [
            (0, "val"),
            (0, f"epoch {row['epoch']}"),
            (4, f"step {row['step']}"),
            (0, f"loss {row['loss']:.4f}"),
            (0, f"top1 {row['top1']:.2f}"),
            (0, f"{self._metric} {row[self._metric]:.2f}" if self._metric not in ("top1", "loss") else ""),
            (3, f"(raw {row['top1_raw']:.2f})" if "top1_raw" in row else ""),
            (2, f"top5 {row['top5']:.2f}" if self._has_top5 else ""),
            (1, best if is_best else ""),
        ]
        say(fitting(parts, columns(sys.stdout)))

    def write_picture(self, tag: str, picture: Tensor, step: int, path: Path | None = None) -> None:
        """Write a picture, uint8 [3, H, W], to TensorBoard and, if a path is given, to a PNG file."""
        if path is not None and not self._is_silent:
            png = io.BytesIO()
            to_pil_image(picture).save(png, "PNG")
            try:
                write_atomic(path, png.getbuffer())
            except OSError as error:
                warn(f"{path} cannot be written ({error.strerror})")
        self._to_board(lambda board: board.add_image(tag, picture, step))

    def write_histograms(self, model: nn.Module, step: int) -> None:
        def write(board: SummaryWriter) -> None:
            for name, parameter in model.named_parameters():
                board.add_histogram(f"weights/{name}", parameter, step)

        self._to_board(write)

    def write_hparams(self, config: dict[str, Any]) -> None:
        """Write the config to TensorBoard's HParams page, which shows it next to the last metrics."""
        shown = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.items()}
        # The first summary would declare this run's keys as those of a whole sweep. Without it, TensorBoard collects
        # the keys from all runs and detects which differ. (add_hparams would create a separate run.)
        _, start, end = hparams(shown, {})
        self._to_board(lambda board: [board._get_file_writer().add_summary(summary) for summary in (start, end)])

    def advance(self) -> None:
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._to_board(lambda board: board.close())

    def _write_board(self, row: dict[str, Any]) -> None:
        def write(board: SummaryWriter) -> None:
            for key, value in row.items():
                if key in TAGS or key in SHOWN or (key == "top5" and self._has_top5):
                    tag = TAGS.get(key, f"{row['split']}/{key}")
                    board.add_scalar(tag, math.nan if value is None else value, row["step"])

        self._to_board(write)

    def _to_board(self, write: Callable[[SummaryWriter], object]) -> None:
        try:
            if self._board:
                self._board.check()
                write(self._board)
                self._board.flush()  # later, the file may be another
        # TensorBoard's files only duplicate metrics.jsonl, so the run continues if they cannot be written.
        except OSError as error:
            self._board = None
            warn(f"no more TensorBoard curves for this run ({error}); metrics.jsonl goes on")
