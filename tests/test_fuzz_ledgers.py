"""Check that a ledger that was edited by hand or damaged is either put aside or continued, and never ends a sweep.

FUZZ_EXAMPLES=10000 sets the number of attempts, which is lower by default; FUZZ_SEED=1 tries others.
"""

import json
import os
import random
from pathlib import Path

from mutating import mutated, nested, with_another_part
from writing_runs import write_sweep

from sasa_train.refusal import ConfigError
from sasa_train.report.jobs import find_jobs
from sasa_train.runs.ledger import Job, Ledger
from sasa_train.sweep.display import counts, final_table
from sasa_train.sweep.scheduler import JobList, describe_end

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
WRONG = [
    None, True, 0, 3, -1, 2**53, 2**63, 10**30, 10**1000, 1.5, -1e308, float("nan"), float("inf"), "", "text", "a=b",
    "a\nb", "\x1b[2J", "\ud800", "\udc80", "running", "done", "/etc", "../up", [], {}, [None], ["a=1"], ["=" * 9], [[]],
    {"a": {"b": [1]}}, {"reason": "x"}, {"top1": 5}, nested(9), nested(900),
]  # fmt: skip


def go_on(path: Path, planned: list[Job]) -> str:
    """Open a ledger, use its jobs as a sweep does, and return all texts that the sweep prints."""
    ledger = Ledger(path, {})
    said = [final_table(ledger.jobs.values())]
    jobs = [ledger.add(Job(job.name, job.overrides, job.label, job.epochs)) for job in planned]
    source = JobList(jobs, path.parent)
    for job in ledger.jobs.values():
        (path.parent / "logs" / f"{job.name}.log").exists()
        said += [describe_end(job, 1.0), str(job.failures_in_a_row())]
    while (begun := source.next()) is not None:
        begun.begin()
        begun.end("interrupted", "stopped", 75, 1.0)
    ledger.save()
    return "\n".join([*said, counts(ledger), final_table(ledger.asked_for())])


def test_a_ledger_with_other_parts_is_put_aside_or_continued(tmp_path, monkeypatch, capsys):
    """Half of the ledgers have one wrong part at any depth, and half have damaged bytes."""
    rng = random.Random(SEED)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    k3, k5 = ("model.kernel_size=3",), ("model.kernel_size=5",)
    sweep = write_sweep(tmp_path / "s", {(k3, 0): [50.0, 60.0], (k3, 1): ("failed", "exit code 1"), (k5, 0): [70.0]})
    for name in ("ledger-0", "ledger-2"):
        (sweep / name / "checkpoints").mkdir()
        (sweep / name / "checkpoints/last.pt").touch()
    path, aside = sweep / "ledger.json", sweep / "ledger.json.damaged"
    ledger = Ledger(path, {"command": "sasa-sweep ...", "paper_table": None})
    for job in ledger.jobs.values():
        job.begin()
        job.end(job.state, job.reason, 1, 2.5)
        job.note_metrics(sweep / job.name)
    ledger.save()
    planned, data, num_aside = list(ledger.jobs.values()), path.read_bytes(), 0
    for number in range(NUM_EXAMPLES):
        is_edited = number % 2 == 0
        edited = with_another_part(json.loads(data), rng, WRONG)
        path.write_bytes(json.dumps(edited, skipkeys=True).encode() if is_edited else mutated(data, rng, [data]))
        try:
            if number % 25 < 2:  # the report also reads all run folders
                jobs = find_jobs([sweep]).jobs
                assert jobs or "its ledger does not list them" in capsys.readouterr().err
        except ConfigError as error:
            assert str(error).startswith(f"{path}: ")
        before = path.read_bytes()
        try:
            go_on(path, planned).encode(errors="surrogateescape")
        except ConfigError as error:
            assert "is not a ledger of format 1" in str(error) or "cannot be read as" in str(error)
            continue
        if aside.exists():
            assert aside.read_bytes() == before, "the damaged ledger is kept"
            aside.unlink()
            num_aside += 1
        again = Ledger(path, {})
        assert {job.name for job in planned} <= again.jobs.keys() and not aside.exists()
        assert [again.jobs[f"ledger-{n}"].state for n in (0, 2)] == ["done", "done"], "nothing runs twice"
        capsys.readouterr()
    with capsys.disabled():
        print(f"put aside: {num_aside} of {NUM_EXAMPLES}")
    assert num_aside > NUM_EXAMPLES / 2
