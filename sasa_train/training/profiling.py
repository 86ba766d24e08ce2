"""Profile a run (trainer.profile_steps); save a Chrome trace and a table of the slowest operators in the run folder."""

import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from sasa_train.files import inside, write_outputs
from sasa_train.runs.folder import RunFolder
from sasa_train.terminal import say

WAIT, WARMUP = 5, 2  # the first steps are slower and not recorded
NUM_ROWS = 30


def build_profiler(num_steps: int, run: RunFolder, device: torch.device) -> profile:
    """Build a profiler that writes `profile/trace.json` and `profile/operators.txt`; call `step()` after each step."""

    def write(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as aside:  # the exporter writes through links
            trace = Path(aside, "trace.json")
            profiler.export_chrome_trace(str(trace))
            shown = trace.read_bytes()
        order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=NUM_ROWS, max_name_column_width=60)
        if not run.is_ours():  # the next save says why
            say(f"no profile: {run.path} is not this run's any more")
            return
        folder = inside(run.path, "profile")
        write_outputs(folder, {"trace.json": shown, "operators.txt": table.encode()})
        say(f"profile: {folder}/operators.txt, and trace.json for chrome://tracing or Perfetto")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    when = schedule(wait=WAIT, warmup=WARMUP, active=num_steps, repeat=1)
    return profile(activities=activities, schedule=when, on_trace_ready=write, record_shapes=True)
