"""Check that the measurement scripts run and print the expected output; the measured values are not checked."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from marking import slow_but_for

SCRIPTS = Path(__file__).parents[1] / "scripts"


RIVALS = {"streamed": ["timm", "torchvision"], "resident": ["files", "array"]}


@pytest.mark.parametrize("mode", slow_but_for(["resident"], RIVALS))
def test_loader_throughput(image_folder, mode):
    command = [sys.executable, str(SCRIPTS / "loader_throughput.py"), str(image_folder), "--size=16", "--images=128"]
    command += ["--rounds=2", *(["--resident"] if mode == "resident" else [])]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200).stdout
    assert re.findall(r"^ours/(\w+), median of 2 pairs: \d+\.\d\d", out, re.MULTILINE) == RIVALS[mode]
    assert re.findall(r"^(\w+) +[\d,]+ images/s", out, re.MULTILINE) == ["ours", *RIVALS[mode]]
