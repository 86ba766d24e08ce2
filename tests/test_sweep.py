"""Kill sweeps and their jobs, and break a config; rerunning the command must finish each job exactly once."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from reading_runs import rows
from running_commands import TINY, start, wait_for

from sasa_train import sweep as command_line
from sasa_train.config.compose import compose_config
from sasa_train.config.groups import choices
from sasa_train.config.overrides import parse_overrides
from sasa_train.files import holder
from sasa_train.refusal import ConfigError
from sasa_train.runs.ledger import Job, Ledger
from sasa_train.signals import StopRequest
from sasa_train.sweep.display import best, table_of
from sasa_train.sweep.planning import build_job, read_plan
from sasa_train.sweep.scheduler import JobList, Processes, Running, behind_torchrun, finish, job_arguments

SMALL = [argument for argument in TINY if not argument.startswith("output_dir")]
start_sweep = functools.partial(start, command="sweep")


def finished(process: subprocess.Popen, expect: int) -> str:
    output, _ = process.communicate(timeout=280)
    assert process.returncode == expect, output
    return output


def read_ledger(folder: Path) -> dict:
    """Return the ledger in the folder, or an empty one if it does not exist yet."""
    found = list(folder.glob("outputs/*/ledger.json"))
    return json.loads(found[0].read_text()) if found else {"jobs": {}}


def status(folder: Path, name: str) -> str:
    (path,) = folder.glob(f"outputs/*/{name}/run.json")
    return json.loads(path.read_text())["status"]


def running_jobs(folder: Path) -> list[tuple[int, str]]:
    """Return the process and run folder of each job that has locked its folder and started training."""
    found = []
    for lock in folder.glob("outputs/*/digits-*/.lock"):
        metrics = lock.with_name("metrics.jsonl")
        if metrics.exists() and metrics.stat().st_size:
            process = json.loads(lock.read_text())["process"]
            if Path(f"/proc/{process}").exists():
                found.append((process, lock.parent.name))
    return found


@pytest.mark.slow
def test_a_sweep_survives_kills_and_a_broken_config(tmp_path):
    """One of seven jobs is broken; two jobs and then the sweep are killed, and no completed work may be lost."""
    broken = tmp_path / "seven.yaml"
    broken.write_text(
        "overrides: [" + ", ".join(f'"{a}"' for a in SMALL) + ", trainer.epochs=6, trainer.checkpoint_every_steps=2]\n"
        "rows:\n" + "".join(f"  - [seed={n}]\n" for n in range(6)) + "  - [seed=6, model.kernel_size=4]\n"
    )
    arguments = ["sweep=seven.yaml", "sweep.max_parallel=3"]
    sweep = start_sweep(tmp_path, *arguments)
    killed = []
    for _ in range(2):
        process, name = wait_for(lambda: [job for job in running_jobs(tmp_path) if job[1] not in killed])[0]
        os.kill(process, signal.SIGKILL)
        killed.append(name)
    wait_for(lambda: any(job["state"] == "done" for job in read_ledger(tmp_path)["jobs"].values()))
    at_work = [name for _, name in wait_for(lambda: running_jobs(tmp_path))]
    assert all(read_ledger(tmp_path)["jobs"][name]["state"] in ("running", "done") for name in at_work)
    sweep.kill()
    finished(sweep, -signal.SIGKILL)
    done_before = {n for n, job in read_ledger(tmp_path)["jobs"].items() if job["state"] == "done"}
    # The jobs save and stop instead of running on unnoticed.
    wait_for(lambda: all(status(tmp_path, name) in ("interrupted", "finished") for name in at_work))

    output = finished(start_sweep(tmp_path, *arguments), expect=1)  # one job is refused
    jobs = read_ledger(tmp_path)["jobs"]
    states = [job["state"] for job in jobs.values()]
    assert states.count("done") == 6 and states.count("refused") == 1, output
    (refused,) = (job for job in jobs.values() if job["state"] == "refused")
    assert "must be odd" in refused["reason"] and refused["tries"] == [] and "must be odd" in output
    for name in killed:
        reasons = [one["reason"] for one in jobs[name]["tries"]]
        assert "killed by SIGKILL" in reasons and reasons[-1] == "finished", reasons
    for job in jobs.values():  # none if the run ended just when the sweep was killed
        assert [one["reason"] for one in job["tries"]].count("finished") <= 1
    reasons = [one["reason"] for job in jobs.values() for one in job["tries"]]
    assert "the sweep ended before it did" in reasons
    for name in done_before:  # it was not run again
        assert all(one["exit_code"] is not None for one in jobs[name]["tries"])
        starts = json.loads(next(tmp_path.glob(f"outputs/*/{name}/run.json")).read_text())["starts"]
        assert len(starts) == sum(one["reason"] != "refused" for one in jobs[name]["tries"])
    assert all(job["last"]["epoch"] == 6 for job in jobs.values() if job["state"] == "done")

    before = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("outputs/*/digits-*/checkpoints/last.pt"))]
    output = finished(start_sweep(tmp_path, *arguments), expect=1)
    assert "started" not in output
    assert before == [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("outputs/*/digits-*/checkpoints/last.pt"))]


@pytest.mark.slow
def test_a_stopped_sweep_saves_its_jobs_and_a_grid_grows_in_place(tmp_path):
    """Check that Ctrl-C during a sweep loses no work, and that adding a sixth seed does not rerun the first five."""
    arguments = [*SMALL, "trainer.epochs=15", "sweep.max_parallel=2"]
    sweep = start_sweep(tmp_path, *arguments, "seed=0,1")
    wait_for(lambda: [job["state"] for job in read_ledger(tmp_path)["jobs"].values()] == ["running"] * 2)
    sweep.send_signal(signal.SIGINT)  # while jobs are being started
    finished(sweep, expect=75)
    assert {job["state"] for job in read_ledger(tmp_path)["jobs"].values()} == {"interrupted"}

    sweep = start_sweep(tmp_path, *arguments, "seed=0,1")
    wait_for(lambda: len(running_jobs(tmp_path)) == 2)
    sweep.send_signal(signal.SIGINT)
    output = finished(sweep, expect=75)
    jobs = read_ledger(tmp_path)["jobs"]
    assert {job["state"] for job in jobs.values()} == {"interrupted"}, output
    assert all(job["reason"].startswith("Ctrl-C (SIGINT): saved at step") for job in jobs.values())  # not SIGTERM

    finished(start_sweep(tmp_path, *arguments, "seed=0,1,2"), expect=0)
    grown = read_ledger(tmp_path)["jobs"]
    assert [len(job["tries"]) for job in grown.values()] == [3, 3, 1] and list(grown)[:2] == list(jobs)
    assert {job["state"] for job in grown.values()} == {"done"}


@pytest.mark.slow
def test_a_failing_job_shows_its_traceback_and_is_tried_three_times(tmp_path):
    """Check that a job that cannot succeed neither stops the others nor is restarted forever."""
    sweep = start_sweep(tmp_path, *SMALL, "trainer.epochs=1", "optimizer.lr=0.1,1e30", "trainer.grad_clip_norm=null")
    output = finished(sweep, expect=1)
    good, failed = read_ledger(tmp_path)["jobs"].values()
    assert good["state"] == "done" and failed["label"] == "optimizer.lr=1e+30"
    assert failed["state"] == "failed" and [one["exit_code"] for one in failed["tries"]] == [1, 1, 1]
    assert output.count("  | ") >= 3 and "not finite" in output


@pytest.mark.slow
def test_a_search_prunes_stops_and_goes_on(tmp_path):
    """Check that a search that is stopped and continued runs the requested number of trials, each exactly once."""
    pytest.importorskip("optuna")
    arguments = [*SMALL, "trainer.epochs=4", "optimizer.lr=tag(log,interval(1e-4,1))", "model.kernel_size=3,5"]
    arguments += ["sweep.num_trials=6", "sweep.max_parallel=2"]
    sweep = start_sweep(tmp_path, *arguments)
    wait_for(lambda: sum(job["state"] == "done" for job in read_ledger(tmp_path)["jobs"].values()) >= 2)
    sweep.send_signal(signal.SIGTERM)
    finished(sweep, expect=75)
    begun = read_ledger(tmp_path)["jobs"]
    assert len(begun) < 6
    output = finished(start_sweep(tmp_path, *arguments), expect=0)
    jobs = read_ledger(tmp_path)["jobs"]
    assert sorted(number for job in jobs.values() for number in job["trials"]) == list(range(6)), output
    assert begun.keys() <= jobs.keys() and {job["state"] for job in jobs.values()} <= {"done", "pruned"}
    import optuna
    from optuna.storages.journal import JournalFileBackend

    (journal,) = tmp_path.glob("outputs/*/optuna.journal")
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.load_study(study_name="sasa_train", storage=storage)
    values = {trial.number: trial.value for trial in study.trials if trial.state.name == "COMPLETE"}
    top1s = {number: job["last"]["top1"] for job in jobs.values() for number in job["trials"]}
    assert values and all(top1s[number] == value for number, value in values.items())
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "PRUNED"}
    finished(start_sweep(tmp_path, *arguments), expect=0)
    assert read_ledger(tmp_path)["jobs"] == jobs


def test_names_come_from_content():
    """Check that run names do not depend on the order of the overrides or on the other jobs of the sweep."""
    one = read_plan(["experiment=debug", "seed=0,1", "model.kernel_size=3"])
    other = read_plan(["model.kernel_size=3", "seed=0,1", "experiment=debug"])
    grown = read_plan(["experiment=debug", "seed=range(5)", "model.kernel_size=3"])
    assert [job.name for job in one.jobs] == [job.name for job in other.jobs] == [job.name for job in grown.jobs][:2]
    assert one.folder == other.folder == grown.folder
    assert one.folder != read_plan(["experiment=debug", "seed=0,1", "model.kernel_size=5"]).folder
    assert [job.label for job in one.jobs] == ["seed=0", "seed=1"]


def test_a_file_and_what_the_command_line_puts_in_its_place(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "overrides: [experiment=debug, 'model.kernel_size=3,5']\n"
        "rows:\n  - [model.position=none]\n  - [model.position=relative, seed=3]\nmax_parallel: 3\n"
    )
    plan = read_plan([f"sweep={path}", "sweep.max_tries=2"])
    assert (plan.config.max_parallel, plan.config.max_tries) == (3, 2)
    assert [job.label for job in plan.jobs] == [
        "model.kernel_size=3 model.position=none",
        "model.kernel_size=5 model.position=none",
        "model.kernel_size=3 model.position=relative seed=3",
        "model.kernel_size=5 model.position=relative seed=3",
    ]
    plan = read_plan([f"sweep={path}", "model.kernel_size=7", "seed=0,1"])
    assert [job.overrides[-3:] for job in plan.jobs] == [
        ["model.kernel_size=7", f"seed={seed}", f"model.position={position}"]
        for position in ("none", "relative")
        for seed in (0, 1)
    ]
    path.write_text(
        "overrides: [experiment=debug]\nrows:\n  - []\n  - [model.kernel_size=5]\n"
    )  # the first: no changes
    assert [job.overrides[1:] for job in read_plan([f"sweep={path}"]).jobs] == [[], ["model.kernel_size=5"]]


def test_texts_of_a_sweep_stay_as_they_are_typed(tmp_path):
    """The folder of sweep.name=2024_01_15 was 20240115, and each job read its images from another folder."""
    path = tmp_path / "mine.yaml"
    overrides = "[experiment=debug, data=image_folder, 'data.root=1e5,012']"
    path.write_text(f"overrides: {overrides}\nname: 12e4567\noutput_dir: 1:30\n")
    plan = read_plan([f"sweep={path}"])
    assert plan.folder == Path("1:30/12e4567")
    assert [compose_config(job.overrides).data.root for job in plan.jobs] == ["1e5", "012"]
    plan = read_plan([f"sweep={path}", "sweep.name=2024_01_15", "sweep.output_dir=1e5"])
    assert plan.folder == Path("1e5/2024_01_15")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=digits_gird"], "sweep=digits_gird must be one of border_at_full_width"),
        (["sweep.max_paralel=2", "seed=0,1"], "did you mean max_parallel"),
        (["sweep.max_parallel=0", "seed=0,1"], "sweep.max_parallel=0 must be positive"),
        (["sweep.max_parallel=many", "seed=0,1"], "max_parallel"),
        (["trainer.epoch=1,2"], "did you mean trainer.epochs"),
        (["run_name=mine", "seed=0,1"], "run_name=mine: is not a sweep's to set"),
        (["output_dir=x", "seed=0,1"], "sweep.output_dir"),
        (["seed=range(5000)"], "more than 1,000 jobs"),
        (["optimizer.lr=interval(0,1)"], "cannot be swept over"),
        (["sweep.num_trials=5", "seed=0"], "nothing to search"),
        (["sweep.pruner=best", "seed=0,1"], "must be one of none, median, hyperband"),
        (["sweep.worker=b", "seed=0,1"], "only a search"),
        (["trainer.epochs=0"], "no job can be started"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_begins(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command_line.run_command(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("outputs/*/logs"))


def hold(folder: Path) -> subprocess.Popen:
    """Start a process that locks the folder until it receives a line on stdin."""
    folder.mkdir(parents=True)
    code = "import sys, pathlib, sasa_train.files as l; f = l.lock_folder(pathlib.Path(sys.argv[1])); input()"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE)
    wait_for(lambda: (folder / ".lock").exists() and (folder / ".lock").read_text())
    return process


def test_two_sweeps_in_one_folder_are_refused(tmp_path, monkeypatch, in_process):
    """Check that a second sweep in a folder is refused, because both would start every job."""
    monkeypatch.chdir(tmp_path)
    plan = read_plan(["experiment=debug", "seed=0,1"])
    other = hold(plan.folder)
    assert f"in use by process {other.pid}" in in_process("sweep", "experiment=debug", "seed=0,1", expect=2).stderr
    other.communicate(b"\n")


def test_a_run_that_somebody_holds_is_waited_for(tmp_path):
    """Check that a sweep waits for a run still locked by a killed sweep's job; starting it again would be refused."""
    other = hold(tmp_path / "held")
    jobs = JobList([Job("held", [], ""), Job("free", [], "")], tmp_path)
    first = jobs.next()
    assert first is not None and first.name == "free"
    (tmp_path / "held/.lock").write_text("[" * 100_000)
    assert holder(tmp_path / "held") == "another run"
    assert jobs.next() is None and jobs.has_more()
    other.communicate(b"\n")
    second = jobs.next()
    assert second is not None and second.name == "held"


def test_a_damaged_ledger_is_kept_aside_and_made_again_from_the_run_folders(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "trainer.epochs=1", "seed=0,1"]
    finished(start_sweep(tmp_path, *arguments), expect=0)
    (path,) = tmp_path.glob("outputs/*/ledger.json")
    good = json.loads(path.read_text())["jobs"]
    monkeypatch.chdir(tmp_path)
    name, job = next(iter(good.items()))
    edits = ({"tries": [5]}, {"state": "finished", "best": 5}, {"epochs": None, "last": {"top1": "50"}})
    edited = (json.dumps({"format_version": 1, "jobs": good | {name: job | edit}}) for edit in edits)
    for text in (path.read_text()[:100], *edited):
        path.write_text(text)
        assert command_line.run_command(arguments) == 0
        captured = capsys.readouterr()
        assert "is damaged" in captured.err and "started" not in captured.out
        again = json.loads(path.read_text())["jobs"]
        assert {job["state"] for job in again.values()} == {"done"}
        assert {n: job["last"] for n, job in again.items()} == {n: job["last"] for n, job in good.items()}
        assert path.with_name("ledger.json.damaged").read_text() == text
    (aside := path.with_name("ledger.json.damaged")).unlink()
    aside.mkdir()
    path.write_text("{")
    assert command_line.run_command(arguments) == 2
    told = capsys.readouterr().err
    assert f"it cannot be kept as {aside.relative_to(tmp_path)}, which is a folder: move that away" in told


def test_states_follow_exit_codes(tmp_path):
    entry, refusal = Job("a", [], ""), "seed=-1 must not be negative"
    cases = [(75, "", "interrupted", None), (1, "", "waiting", None)] * 2
    cases += [
        (-9, "", "failed", "killed by SIGKILL"),
        (-40, "", "failed", "killed by signal 40"),
        (2, refusal, "refused", refusal),
    ]
    cases += [(2, "train: out/a is in use by process 7 on host, which ...", "waiting", None)]
    for code, said, state, reason in cases:
        entry.begin()
        finish(entry, tmp_path, code, 1.0, max_tries=2, said=said)
        assert entry.state == state and reason in (None, entry.reason)
    torchrun = ["train: data.root=x: no such folder", "  exitcode  : 2 (pid: 7)", "=" * 60]
    assert behind_torchrun(1, torchrun) == (2, torchrun[:1]) and behind_torchrun(-9, []) == (-9, [])


@pytest.mark.slow
def test_a_job_runs_no_code_of_the_working_directory(tmp_path):
    """A tqdm.py in a folder of somebody's data once ran in every job."""
    (tmp_path / "tqdm.py").write_text("open('RAN', 'w')\n")
    arguments = [*SMALL, "trainer.max_steps=1", "seed=0"]
    command = [sys.executable, "-P", "-m", "sasa_train.sweep", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "1 jobs: 1 done" in done.stdout, f"{done.stdout}\n{done.stderr}"
    assert not (tmp_path / "RAN").exists()


def test_what_is_no_longer_asked_for_does_not_decide_the_exit_code(tmp_path):
    """Check that the exit code ignores jobs that are no longer requested, so that a retry loop can end."""
    ledger, stop = Ledger(tmp_path / "ledger.json", {}), StopRequest()
    stop.restore()
    left, asked = ledger.add(Job("left", [], "")), ledger.add(Job("asked", [], ""))
    left.state, asked.state = "interrupted", "done"
    assert command_line.exit_code(ledger, stop) == 75
    ledger.save()
    again = Ledger(ledger.path, {})
    again.add(Job("asked", [], ""))
    assert command_line.exit_code(again, stop) == 0 and again.jobs.keys() == {"left", "asked"}


@pytest.mark.parametrize("name", ["plain", "a b", "it's", 'say "hi"', "1,2", "k=v", "o é", "back\\slash", "${x}"])
def test_a_jobs_folder_is_the_sweeps_whatever_its_name(name):
    """Check that any folder name is passed on unchanged; a job in another folder would never be recognised as done."""
    (override,) = parse_overrides(job_arguments(Job("a", [], ""), Path(name)))
    assert str(override.value()) == name


def test_a_bad_trial_is_given_up_and_a_good_one_is_not(tmp_path):
    pytest.importorskip("optuna")
    from sasa_train.sweep.search import Search

    arguments = ["experiment=debug", "optimizer.lr=interval(0.1,1)", "trainer.epochs=9", f"sweep.output_dir={tmp_path}"]
    plan = read_plan([*arguments, "sweep.num_trials=6"])
    plan.folder.mkdir(parents=True)
    search = Search(plan, Ledger(plan.folder / "ledger.json", {}))

    def evaluate(entry: Job, top1: float, epochs: range) -> list[bool]:
        given_up = []
        for epoch in epochs:
            entry.last = {"top1": top1, "epoch": epoch}
            given_up.append(search.look(entry))
        return given_up

    for top1 in (50.0, 60.0, 70.0, 80.0):
        entry = search.next()
        assert evaluate(entry, top1, range(1, 10)) == [False] * 9  # too few trials to compare with
        entry.end("done", "finished")
        search.ended(entry)
    assert evaluate(search.next(), 75.0, range(1, 10)) == [False] * 9
    assert evaluate(search.next(), 40.0, range(1, 4)) == [False, False, True]  # not in the first third of the run


def test_a_search_whose_journal_was_deleted_starts_again(tmp_path):
    """Check that trials of a ledger that the study does not have are forgotten, instead of ending the search."""
    pytest.importorskip("optuna")
    from sasa_train.sweep.search import Search

    arguments = ["experiment=debug", "seed=0,1", "sweep.pruner=none", f"sweep.output_dir={tmp_path}"]
    plan = read_plan([*arguments, "sweep.num_trials=4"])
    plan.folder.mkdir(parents=True)
    ledger = Ledger(plan.folder / "ledger.json", {})
    for seed in (0, 1):
        job = ledger.add(build_job(["experiment=debug", f"seed={seed}"], {"experiment"}, tmp_path))
        job.trials, job.state = [7 + seed], "failed"
    assert Search(plan, ledger).next() is None, "both were tried before"
    assert sorted(number for job in ledger.jobs.values() for number in job.trials) == [0, 1, 2, 3]


def test_a_done_job_is_worth_what_its_run_reached(tiny_run, tmp_path):
    """An edited ledger's 99 % of a job that was done were shown to the end."""
    shutil.copytree(tiny_run, tmp_path / "run")
    job = Job("run", [], "", state="done", last={"top1": 99.0, "step": 12, "epoch": 3}, best={"top1": 99.0})
    ledger = Ledger(tmp_path / "ledger.json", {})
    ledger.jobs["run"] = job
    ledger.add(Job("run", [], ""))
    val = [row for row in rows(tmp_path / "run") if row["split"] == "val"]
    assert (job.state, job.last["top1"]) == ("done", val[-1]["top1"]) and job.best["top1"] < 99


def test_a_grid_trains_a_job_that_its_ledger_calls_pruned(tmp_path):
    """Only a search prunes; a grid's job with that state, by hand or from a search, was skipped with exit code 0."""
    plan = SimpleNamespace(
        config=SimpleNamespace(num_trials=None, max_tries=3), folder=tmp_path, jobs=[Job("a", [], "")]
    )
    ledger = Ledger(tmp_path / "ledger.json", {})
    ledger.jobs["a"] = Job("a", [], "", state="pruned")
    assert command_line.job_source(plan, ledger).next().name == "a"


END = ', "datetime_complete": "2026-11-28T20:15:37.6"}'
LINE = '{"op_code": 4, "worker_id": "x", "study_id": 0, "datetime_start": "2026-11-28T20:15:37.6"}'


@pytest.mark.parametrize(
    "lines,reason",
    [
        ("{}", "KeyError"),
        ("[]", "TypeError"),
        ("1", "TypeError"),
        ("null", "TypeError"),
        ("[" * 60_000, "RecursionError"),
        ('{"op_code": 99, "worker_id": "x"}', "AssertionError"),
        ('{"op_code": 4, "worker_id": "x"}', "KeyError"),
        (LINE.replace("2026", "then"), "ValueError"),
        (
            LINE + '\n{"op_code": 6, "worker_id": "x", "trial_id": 0, "state": 1, "values": ["x"]' + END,
            "values[0]='x' must",
        ),
        (
            LINE + '\n{"op_code": 6, "worker_id": "x", "trial_id": 0, "state": 1, "values": [1e999]' + END,
            "values[0]=inf must",
        ),
    ],
)
def test_a_journal_that_optuna_cannot_read_is_refused_by_name(lines, reason, tmp_path):
    pytest.importorskip("optuna")
    from sasa_train.sweep.search import Search

    space = ["experiment=debug", "optimizer.lr=interval(0.01,0.1)", f"sweep.output_dir={tmp_path}"]
    plan = read_plan([*space, "sweep.num_trials=4"])
    plan.folder.mkdir(parents=True)
    ledger, journal = Ledger(plan.folder / "ledger.json", {}), plan.folder / "optuna.journal"
    Search(plan, ledger)
    begun = journal.read_text()
    journal.write_text(f"{begun}{lines}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{journal}: is damaged ({reason}")):
        Search(plan, ledger)
    distribution = json.dumps({"name": "CategoricalDistribution", "attributes": {"choices": ["[evil.py]"]}})
    of_trial = {"op_code": 5, "worker_id": "x", "trial_id": 0, "param_name": "imports", "param_value_internal": 0}
    journal.write_text(f"{begun}{LINE}\n{json.dumps(of_trial | {'distribution': distribution})}\n")
    with pytest.raises(ConfigError, match="is damaged .a trial sets imports, which this search does not"):
        Search(plan, ledger)  # it would run the file
    for directions in ("[1]", "[2,2]"):
        journal.write_text(begun.replace('"directions":[2]', f'"directions":{directions}'))
        with pytest.raises(ConfigError, match="is damaged .its study does not maximize one value"):
            Search(plan, ledger)


@pytest.mark.parametrize("torn", ['{"op_code": 4, "work', LINE])
def test_a_line_of_the_journal_that_was_cut_off_is_left_out(torn, tmp_path, capsys):
    """After a full disk, Optuna appended to such a line, and no command could continue the search."""
    pytest.importorskip("optuna")
    from sasa_train.sweep.search import Search

    space = ["experiment=debug", "optimizer.lr=interval(0.01,0.1)", f"sweep.output_dir={tmp_path}"]
    plan = read_plan([*space, "sweep.num_trials=4"])
    plan.folder.mkdir(parents=True)
    ledger, journal = Ledger(plan.folder / "ledger.json", {}), plan.folder / "optuna.journal"
    first = Search(plan, ledger)
    first.next()
    with journal.open("a") as file:  # while another worker of the search goes on
        file.write(torn)
    first.next()
    with journal.open("a") as file:
        file.write(torn)
    assert len(Search(plan, ledger).study.get_trials()) == 2
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    assert capsys.readouterr().err.count(f"{journal}: its last line was cut off, and is left out") == 2


def test_a_run_of_another_config_is_not_the_jobs(tiny_run, tmp_path):
    """A finished run that was moved into another job's folder gave that job's figure, with exit code 0."""
    shutil.copytree(tiny_run, tmp_path / "run")
    ledger = Ledger(tmp_path / "ledger.json", {})
    assert ledger.add(Job("run", ["seed=1", "seed=0"], "")).state == "done"
    other = ledger.add(Job("run", ["seed=1", "model=hybrid_resnet26"], "", state="waiting"))
    other.state = "waiting"
    finish(other, tmp_path, 2, 1.0, max_tries=2, said="seed: 0 -> 1")
    assert other.state == "refused" and other.reason == "seed: 0 -> 1"


def test_the_lock_of_a_search_that_was_killed_is_not_waited_for_forever(tmp_path, monkeypatch):
    """Optuna's lock is a link to the journal. Its path was relative, so that the link led nowhere."""
    pytest.importorskip("optuna")
    from sasa_train.sweep.search import Search

    monkeypatch.chdir(tmp_path)
    plan = read_plan(["experiment=debug", "optimizer.lr=interval(0.01,0.1)", "sweep.num_trials=1"])
    plan.folder.mkdir(parents=True)
    (lock := plan.folder / "optuna.journal.lock").symlink_to(plan.folder / "optuna.journal")
    Search(plan, Ledger(plan.folder / "ledger.json", {}))
    assert not lock.is_symlink()


def test_each_place_has_devices_of_its_own(tmp_path, monkeypatch):
    """Check that jobs use different GPUs, because sharing one GPU while another is idle would waste time."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    ledger, stop = Ledger(tmp_path / "ledger.json", {}), StopRequest()
    try:

        def environments(*sweep_keys: str) -> list[dict[str, str]]:
            config = read_plan(["experiment=debug", "seed=0,1", *sweep_keys]).config
            processes = Processes(config, tmp_path, ledger, JobList([], tmp_path), stop)
            return [processes._environment(n) for n in range(len(processes.places))]

        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments()] == ["0", "2", "5", "7"]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("sweep.devices_per_job=2")] == ["0,2", "5,7"]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("sweep.max_parallel=2")] == ["0", "2"]
        with pytest.raises(ConfigError, match=re.escape("sweep.devices_per_job=8, but this machine has 4 GPUs")):
            environments("sweep.devices_per_job=8")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr("sasa_train.sweep.scheduler.usable_processors", lambda: 8)
        assert [e["OMP_NUM_THREADS"] for e in environments("sweep.max_parallel=3")] == ["2"] * 3
        assert [e["OMP_NUM_THREADS"] for e in environments("sweep.max_parallel=12")] == ["1"] * 12
    finally:
        stop.restore()


def test_every_sweep_that_is_shipped_composes(tmp_path, monkeypatch):
    for name in choices("sweep"):
        plan = read_plan([f"sweep={name}"])
        refused = [job.reason for job in plan.jobs if job.reason]
        assert not refused and (plan.jobs or plan.space), (name, refused)


def test_the_live_table_judges_finished_jobs_and_knows_the_time_left_of_continued_ones(tmp_path, monkeypatch):
    """The best top1 of the headline fell, as a running job's does, and a continued sweep had no ETA for minutes."""
    ledger = Ledger(tmp_path / "ledger.json", {})
    jobs = [
        ledger.add(Job(f"job-{i}", [f"seed={i}"], f"augment.policy=trivial, seed={i}", epochs=20)) for i in range(3)
    ]
    for job, top1, epoch in zip(jobs, (30.0, 90.0), (20, 10), strict=False):
        job.last = job.best = {"top1": top1, "epoch": epoch}
    stop = StopRequest()
    try:
        processes = Processes(read_plan(["seed=0,1,2"]).config, tmp_path, ledger, JobList(jobs[2:], tmp_path), stop)
        # It had done 10 epochs before it was continued, and two more take a second each: 8 s, and 20 s for the third.
        processes.running = [Running(jobs[1], None, 0, tmp_path / "log", 0, first_epoch=10)]
        jobs[1].last = {"top1": 80.0, "epoch": 12}
        processes.running[0].started -= 2
        assert processes.seconds_left() == pytest.approx(28, abs=0.5)
        assert best(ledger) is None  # none has finished
        jobs[0].state, jobs[0].tries = "done", [{"seconds": 30.0}, {"seconds": 10.0}]
        monkeypatch.setenv("COLUMNS", "60")
        _, headline, top, line = table_of(processes)
        assert "best 30.00 of those done" in top and headline.endswith("ETA 28 s")
        assert all(len(text) < 60 for text in (headline, top, line)) and "policy=trivial, seed=0" in top
        assert Processes(processes.config, tmp_path, ledger, JobList([], tmp_path), stop).seconds == [40.0]
    finally:
        stop.restore()


def test_a_stopped_sweep_says_that_the_same_command_continues_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Processes, "run", lambda self, show: None)  # as if it were stopped at once
    assert command_line.run_command(["experiment=debug", "seed=0,1"]) == 75
    assert "the same command continues: sasa-sweep experiment=debug seed=0,1\n" in capsys.readouterr().out
