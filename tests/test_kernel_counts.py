"""Check the instruction counts of the Triton kernels, compiled for a GPU without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

triton = pytest.importorskip("triton")

pytestmark = pytest.mark.slow  # two minutes of compilation
SCRIPT = Path(__file__).parents[1] / "scripts/kernel_counts.py"
# Warp instructions per query and head, by head_dim: forward, and both kernels of the backward pass
BOUNDS = {8: (55, 165), 16: (75, 210), 32: (115, 300), 64: (170, 480)}


def run_counts(cache: Path, *options: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def test_the_counts_stay_below_their_bounds_and_nothing_is_compiled_twice(tmp_path):
    cache, file = tmp_path / "cache", tmp_path / "counts.json"
    output = run_counts(cache, "--arch", "sm_90", "--json", str(file))
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * 4 * 3
    spills_two_registers = Version(triton.__version__) < Version("3.7")
    most = {"bf16": 8 if spills_two_registers else 0, "fp32": 64}
    for row in rows:
        assert row["chosen"] and row["spill_bytes"] <= most[row["dtype"]], row
    for head_dim, (forward, backward) in BOUNDS.items():
        counts = {
            row["pass"]: row["per_query_and_head"]
            for row in rows
            if (row["dtype"], row["head_dim"]) == ("bf16", head_dim)
        }
        assert 20 < counts["forward"] <= forward
        assert 40 < counts["backward_queries"] + counts["backward_keys"] <= backward
    (line,) = (line for line in output.splitlines() if line.startswith("experiment=imagenet_hybrid_resnet50: "))
    assert 0 < int(line.split()[1]) <= 32
    assert "of the convolutional images/s" in output

    compiled = sorted(cache.rglob("*.cubin"))
    run_counts(cache, "--arch", "sm_90")
    assert compiled and sorted(cache.rglob("*.cubin")) == compiled
