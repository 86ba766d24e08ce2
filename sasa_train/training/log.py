"""Log a run's metrics to metrics.jsonl, TensorBoard and the console."""

import io
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from sasa_train.files import write_atomic
from sasa_train.runs.metrics import MetricsFile
from sasa_train.terminal import duration, say, warn

# Mapping from a row's keys to TensorBoard tags. loss, top1, top5 and top1_raw are tagged with the name of their split.
TAGS = {
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "images_per_sec": "perf/images_per_sec",
    "data_wait_fraction": "perf/data_wait_fraction",
    "memory_mib": "perf/memory_mib",
}


def _without_tensorboard(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable:
    """Return `threading.excepthook` without the disk errors of TensorBoard's thread, which it raises again later."""

    def excepthook(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
            hook(failed)

    return excepthook


threading.excepthook = _without_tensorboard(threading.excepthook)


def _open_board(folder: Path, step: int) -> SummaryWriter | None:
    """Return a TensorBoard writer, or None with a warning if the folder cannot be written."""
    try:
        return SummaryWriter(str(folder), purge_step=step)
    except OSError as error:
        warn(f"no TensorBoard curves for this run ({error})")
        return None


class RunLogger:
    """Logger for the rows of a run. `metrics` contains the rows from the checkpoint, as a copy of metrics.jsonl.

    With `is_silent`, nothing is written or shown; this is used on all processes except the first.
    """

    def __init__(self, run_dir: Path, metrics: str, step: int, total_steps: int, is_silent: bool = False):
        self._is_silent = is_silent
        self._file = MetricsFile(None if is_silent else run_dir, metrics)
        rows = [json.loads(line) for line in metrics.splitlines()]
        self.eval_seconds = next((row.get("seconds", 0.0) for row in reversed(rows) if row["split"] == "val"), 0.0)
        self._board = None if is_silent else _open_board(run_dir / "tensorboard", step)
        # TensorBoard discards all steps from purge_step on, so the rows of this step are written again.
        for row in rows:
            if row["step"] == step:
                self._write_board(row)
        disable = True if is_silent else None  # None disables it if there is no terminal
        self._bar = tqdm(
            total=total_steps, initial=step, desc="training", unit="step", disable=disable, dynamic_ncols=True
        )
        self._total_steps = total_steps

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl (immediately) and TensorBoard; NaN and infinities become null."""
        self._write_board(self._file.write(row))

    @property
    def metrics(self) -> str:
        """All rows in the format of metrics.jsonl, for the checkpoint."""
        return self._file.text

    def show_train(self, row: dict[str, Any], seconds_left: float) -> None:
        """Show a row on the progress bar or, if the output is not a terminal, print it as a line."""
        speed = f"{row['images_per_sec']:,.0f} img/s  data wait {100 * row['data_wait_fraction']:.0f} %"
        memory = f"{row['memory_mib']:,} MiB"
        if self._bar.disable:
            progress = f"step {row['step']}/{self._total_steps}  epoch {row['epoch']}"
            numbers = f"loss {row['loss']:.4f}  top1 {row['top1']:.2f}  lr {row['lr']:.2e}"
            say(f"{progress}  {numbers}  {speed}  {memory}  ETA {duration(seconds_left)}")
        else:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}, top1 {row['top1']:.1f}, {speed}, {memory}")

    def show_val(self, row: dict[str, Any], is_best: bool) -> None:
        raw = f"  (raw {row['top1_raw']:.2f})" if "top1_raw" in row else ""
        numbers = f"loss {row['loss']:.4f}  top1 {row['top1']:.2f}{raw}  top5 {row['top5']:.2f}"
        say(f"val  epoch {row['epoch']}  step {row['step']}  {numbers}{'  best so far' if is_best else ''}")

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
                if key in TAGS or key in ("loss", "top1", "top5", "top1_raw"):
                    tag = TAGS.get(key, f"{row['split']}/{key}")
                    board.add_scalar(tag, math.nan if value is None else value, row["step"])

        self._to_board(write)

    def _to_board(self, write: Callable[[SummaryWriter], object]) -> None:
        try:
            if self._board:
                write(self._board)
        # TensorBoard's files only duplicate metrics.jsonl, so the run continues if they cannot be written.
        except OSError as error:
            self._board = None
            warn(f"no more TensorBoard curves for this run ({error}); metrics.jsonl goes on")
