"""Run the README's commands with the sasa_train that is installed beside this Python, in a copy of this folder."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
COMMANDS = re.search(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1].splitlines()
TRAIN = [command for command in COMMANDS if "run_name=" in command]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the folder in which the first command has run."""
    folder = tmp_path_factory.mktemp("project") / "own_project"
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    assert "top1" in run(COMMANDS[0], folder)
    return folder


def words_of(command: str, folder: Path) -> list[str]:
    """Return a command's words with this Python's scripts, and patterns replaced by files as a shell does."""
    program, *words = shlex.split(command)
    if program == "torchrun":
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    else:
        start = [str(Path(sys.executable).with_name(program))]
    found = [sorted(folder.glob(word)) if "*" in word else [word] for word in words]
    return start + [str(word) for words in found for word in words]


def run(command: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words_of(command, folder), cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_model_learns(project):
    best = json.loads((project / "outputs/first/run.json").read_text())["best"]
    assert best["top1"] > 90
    assert (project / "outputs/first/notes.txt").read_text().startswith("epoch 1: top1 ")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in TRAIN])
def test_each_command_of_the_readme_runs(project, command):
    run(command, project)


@pytest.mark.parametrize("command", TRAIN)
def test_a_run_that_is_killed_ends_with_the_same_weights(project, command):
    """Kill the run after its first checkpoint, also with two processes, and run the same command again."""
    undisturbed, killed = project / "outputs" / run_name(command), command.replace("run_name=", "run_name=killed_")
    if not undisturbed.exists():
        run(command, project)
    every = "trainer.checkpoint_every_steps=3"
    process = subprocess.Popen(
        [*words_of(killed, project), every],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = project / "outputs" / run_name(killed) / "checkpoints/last.pt"
    end = time.monotonic() + 200
    while not last.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run(f"{killed} {every}", project)
    found, expected = (torch.load(path / "checkpoints/last.pt") for path in (last.parents[1], undisturbed))
    assert found["step"] == expected["step"] and found["model"].keys() == expected["model"].keys()
    assert all(torch.equal(found["model"][name], expected["model"][name]) for name in expected["model"])


def run_name(command: str) -> str:
    return re.search(r"run_name=(\S+)", command)[1]
