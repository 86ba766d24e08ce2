"""Run jobs and sweeps on a real local Slurm, including time limits, preemption, cancellation and refusal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reading_runs import assert_same_run
from running_commands import TINY, wait_for

from sasa_train.signals import StopRequest
from sasa_train.train import run_command

SLURM = Path(__file__).parents[1] / "scripts" / "slurm"
PATIENCE = 240  # seconds
needs_slurm = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0,
        reason="needs root, and: apt-get install slurmctld slurmd slurm-client munge",
    ),
]
# A replacement for sasa-train: until its job has been stopped often enough, its steps are slow enough to interrupt.
SLOW = """
import os, time
from pathlib import Path
from sasa_train.signals import StopRequest
from sasa_train.train import run_command
from sasa_train.train import main
log = Path(f"sasa-train-{os.environ.get('SLURM_JOB_ID')}.out")
if log.exists() and log.read_text().count(": saved at step") < int(os.environ["SLOW_UNTIL_STOPPED"]):
    requested = StopRequest.requested  # is looked at once a step

    def requested_within_seconds(self):
        for _ in range(30):
            if requested(self):
                return True
            time.sleep(0.1)
        return False

    StopRequest.requested = requested_within_seconds
main()
"""
RUN = (*TINY, "trainer.epochs=20", "run_name=a")


class Cluster:
    """A Slurm cluster and the folder in which its jobs run."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment

    def call(self, *command: str, **more: str) -> str:
        options = {"cwd": self.folder, "env": self.environment | more, "check": True}
        return subprocess.run(command, capture_output=True, text=True, **options).stdout

    def submit(self, *options: str, num_stops: int = 0, run: tuple[str, ...] = RUN) -> str:
        command = ("sbatch", "--parsable", "--cpus-per-task=1", *options, str(SLURM / "train.sbatch"), *run)
        return self.call(*command, SLOW_UNTIL_STOPPED=str(num_stops)).strip()

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", "-o", number)))

    def log(self, number: str) -> str:
        path = self.folder / f"sasa-train-{number}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, *states: str) -> dict[str, str]:
        wait_for(lambda: self.job(number)["JobState"] in states, what=f"job {number} is {states}")
        return self.job(number)


def num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster that claims eight CPUs, more than this machine has, because jobs mostly wait."""
    folder = tmp_path_factory.mktemp("slurm")
    script = str(SLURM / "local_cluster.sh")
    exports = subprocess.run([script, "up", str(folder / "slurm"), "8"], check=True, stdout=subprocess.PIPE, text=True)
    (folder / "slow.py").write_text(SLOW)
    stub = folder / "bin/sasa-train"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/slow.py "$@"\n')
    stub.chmod(0o755)
    slurm_conf = exports.stdout.split("SLURM_CONF=")[1].splitlines()[0]
    path = f"{stub.parent}:{SLURM}:{os.environ['PATH']}"
    try:
        yield Cluster(folder, os.environ | {"OMP_NUM_THREADS": "1", "SLURM_CONF": slurm_conf, "PATH": path})
    finally:
        subprocess.run([script, "down", str(folder / "slurm")], check=True)


@pytest.fixture(scope="module")
def overdue(cluster: Cluster) -> str:
    """Submit a run that exceeds its time limit twice while the other tests run.

    No other job can preempt it. Slurm checks every 30 seconds which jobs to warn; this one is warned 30 to 60 seconds
    after each start. A limit of one minute would leave too little time to start on a busy machine.
    """
    limits = ("--partition=high", "--time=2", "--signal=B:USR2@30")
    return cluster.submit(*limits, num_stops=2, run=(*RUN, "output_dir=overdue"))


class TestOnSlurm:
    pytestmark = needs_slurm

    def test_a_preempted_run_goes_on_and_a_cancelled_one_does_not(self, cluster, overdue):
        run = (*RUN, "output_dir=preempted")
        number = cluster.submit(num_stops=9, run=run)
        wait_for(lambda: num_rows(cluster.folder / "preempted/a") >= 1, what="the first row")
        cluster.call("sbatch", "--partition=high", "--cpus-per-task=7", "--wrap=true")
        wait_for(lambda: "SIGTERM: saved at step" in cluster.log(number), what="the run was preempted")
        saved = int(re.findall(r"SIGTERM: saved at step (\d+)", cluster.log(number))[-1])
        wait_for(lambda: num_rows(cluster.folder / "preempted/a") > saved, what="a row after the restart")
        assert cluster.job(number)["Restarts"] == "1"

        cluster.call("scancel", number)
        wait_for(lambda: cluster.log(number).count("SIGTERM: saved at step") == 2, what="the run was cancelled")
        assert cluster.wait(number, "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
        starts = json.loads((cluster.folder / "preempted/a/run.json").read_text())["starts"]
        assert [start["step"] for start in starts] == [0, saved]

    def test_what_is_refused_or_done_is_not_requeued(self, cluster, overdue):
        refused = cluster.submit(run=("trainer.epoch=3",))
        job = cluster.wait(refused, "FAILED", "COMPLETED")
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
        assert "did you mean trainer.epochs?" in cluster.log(refused)
        run = (*TINY, "run_name=a", "trainer.epochs=1", "output_dir=done")
        for _ in range(2):
            number = cluster.submit(run=run)
            job = cluster.wait(number, "FAILED", "COMPLETED")
            assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), cluster.log(number)
        assert "Nothing to do" in cluster.log(number)

    def test_a_sweep_of_four_jobs_by_submitit(self, cluster, overdue):
        launcher = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.timeout_min=5")
        run = (*TINY, "trainer.epochs=1", "output_dir=sweep", "seed=0,1,2,3")
        cluster.call(sys.executable, "-m", "sasa_train.train", "-m", *launcher, *run)
        found = [json.loads(path.read_text()) for path in (cluster.folder / "sweep").glob("digits-*/run.json")]
        assert [info["status"] for info in found] == ["finished"] * 4

    def test_every_job_ends_with_its_own_code(self, cluster, overdue):
        """Check that refused, failed, cancelled and requeued jobs return their own exit codes and errors are shown."""
        make_lost_run(cluster.folder / "codes/lost")
        names = ("done", "misspelt", "missing", "lost", "cancelled", "warned")
        endings = (["trainer.epochs=1"], ["trainer.epoch=1"], ["data=image_folder"], [], *[["trainer.epochs=60"]] * 2)
        jobs = [[*TINY, "output_dir=codes", f"run_name={n}", *more] for n, more in zip(names, endings, strict=True)]
        launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=low", "hydra.launcher.max_num_timeout=9"]
        process = start_launch(jobs, launcher, cluster.folder, cluster.environment)
        try:
            for name in names[-2:]:
                wait_for(lambda name=name: num_rows(cluster.folder / "codes" / name) > 2, what=f"{name} trains")
            (array,) = {path.name.split("_")[0] for path in (cluster.folder / "hydra/.submitit").glob("[0-9]*_*")}
            cluster.call("scancel", f"{array}_3")  # its index among the jobs that were not refused
            cluster.call("scancel", "--signal=USR2", f"{array}_4")  # as Slurm sends before the time limit
            out, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert json.loads(out.splitlines()[-1]) == [0, 2, 2, 1, 1, 0], err
        for text in ("did you mean trainer.epochs?", "data.root=data", "they are gone", "state: CANCELLED"):
            assert text in err
        starts = json.loads((cluster.folder / "codes/warned/run.json").read_text())["starts"]
        assert len(starts) == 2 and starts[1]["step"] > 0

    def test_a_run_twice_past_its_time_limit_ends_as_one_never_touched(self, cluster, overdue):
        cluster.call("sasa-train", *RUN, "output_dir=whole", SLOW_UNTIL_STOPPED="0")
        job = cluster.wait(overdue, "COMPLETED", "FAILED", "TIMEOUT")
        log = cluster.log(overdue)
        assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 2, log
        assert log.count("SIGUSR2: saved at step") >= 2, log
        assert_same_run(cluster.folder / "overdue/a", cluster.folder / "whole/a")


def make_lost_run(run_dir: Path) -> None:
    """Create a run that fails with exit code 1 because its checkpoints have been deleted."""
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text('{"has_checkpoint": true}')


def start_launch(jobs: list[list[str]], launcher: list[str], folder: Path, environment: dict[str, str]):
    """Start a process that calls `launch` and prints the exit codes of the jobs."""
    code = f"""
import json
from pathlib import Path
from sasa_train.training.hydra_launch import launch
print(json.dumps(launch({jobs}, {launcher}, Path("hydra"))))"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, **pipes)


@pytest.mark.slow
def test_every_job_here_ends_with_its_own_code(tmp_path):
    make_lost_run(tmp_path / "out/lost")
    run = [*TINY, "trainer.epochs=1"]
    jobs = [[*run, "trainer.epoch=1"], [*run, "data=image_folder"], [*run, "run_name=lost"], [*run, "run_name=done"]]
    process = start_launch(jobs, [], tmp_path, os.environ | {"OMP_NUM_THREADS": "1"})
    out, err = process.communicate(timeout=PATIENCE)
    assert json.loads(out.splitlines()[-1]) == [2, 2, 1, 0], err
    for text in ("did you mean trainer.epochs?", "data.root=data", "they are gone"):
        assert text in err


def test_a_signal_ends_a_sweep_here_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "-m", "sasa_train.train", "-m", *TINY, "seed=0,1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "trainer.epochs=300"], cwd=tmp_path, env=environment)
    wait_for(lambda: any(num_rows(path) for path in tmp_path.glob("out/digits-*")), what="the first row")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 75
    (run_dir,) = tmp_path.glob("out/digits-*")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize(
    "launcher, message", [("submitit_slrum", r"submitit_slrum.*sasa_train\[slurm\]"), ("basic", "partition")]
)
def test_a_launcher_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys, launcher, message):
    monkeypatch.chdir(tmp_path)
    overrides = (f"hydra/launcher={launcher}", "hydra.launcher.partition=low", *TINY, "seed=0,1")
    assert run_command(["-m", *overrides]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)
    assert not (tmp_path / "out").exists()


def test_other_sweepers_are_refused_rather_than_ignored(capsys):
    assert run_command(["-m", "hydra/sweeper=basic", "experiment=debug", "seed=0,1"]) == 2
    assert "use sasa-sweep" in capsys.readouterr().err


def test_a_signal_is_handed_on_to_a_launchers_handler_alone():
    """Check that submitit's USR2 handler (it requeues the job) runs after our save; Python's handlers must not run."""
    handed = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: handed.append(number))
    try:
        for number, handed_on in ((signal.SIGUSR2, [signal.SIGUSR2]), (signal.SIGTERM, []), (signal.SIGINT, [])):
            stop = StopRequest()
            stop.begin_training()
            os.kill(os.getpid(), number)
            stop.restore()
            assert stop.requested() and handed == []
            assert stop.hand_on() == bool(handed_on) and handed == handed_on
            handed.clear()
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda path: path.name)
def test_the_scripts_are_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
