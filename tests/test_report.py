"""Check that sasa-report matches hand calculations and omits no job, and that the paper's tables work as sweeps."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import timm
from marking import slow_but_for
from measuring_text import wrong_texts
from PIL import Image
from screens import lines_in_terminal
from tensorboard import context
from tensorboard.backend.event_processing import data_ingester, data_provider, plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from writing_runs import BASE, write_run, write_sweep

from sasa_train import report as command
from sasa_train import train, visualize
from sasa_train.config.compose import compose_config
from sasa_train.config.groups import config_dir
from sasa_train.config.saved import to_yaml
from sasa_train.models import build_model, check_model
from sasa_train.models.counting import count_params, meta_model
from sasa_train.paper import ROWS, matching_row, reference_row
from sasa_train.refusal import ConfigError
from sasa_train.report.intervals import mean_interval, still_exclude_zero
from sasa_train.report.jobs import find_jobs
from sasa_train.report.rows import build_report, paired_difference
from sasa_train.report.run_list import list_runs
from sasa_train.report.tables import for_terminal, markdown, notes
from sasa_train.runs.info import has_finished
from sasa_train.runs.metrics import read_metrics
from sasa_train.sweep.planning import read_plan

SWEEPS = sorted(path.stem for path in (config_dir() / "sweep").glob("*table*.yaml"))


@pytest.fixture
def without_matplotlib(monkeypatch):
    """Simulate an installation without the extra `plots`, which also saves a few seconds."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def report_of(folder: Path, reference: str | None = None):
    found = find_jobs([folder])
    table = next(iter(found.paper_tables), None)
    return build_report(found.jobs, table, reference, found.commands)


# Statistics


def test_students_t_is_the_printed_tables():
    """Check the quantiles of Student's t against printed tables; every interval in every report depends on them."""
    printed = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, t in printed.items():
        n, spread = degrees + 1, [0.0] * (degrees - 1) + [-1.0, 1.0]
        assert round(mean_interval(spread).half_width * math.sqrt(n * degrees / 2), 3) == t


def test_a_mean_and_its_interval_solved_by_hand():
    # 50, 52, 54: mean 52, s = 2, so 4.303 x 2 / sqrt(3) = 4.968.
    found = mean_interval([50.0, 52.0, 54.0])
    assert (found.mean, found.n) == (52.0, 3) and found.half_width == pytest.approx(4.303 * 2 / math.sqrt(3), rel=1e-4)
    assert mean_interval([7.0]).half_width is None and mean_interval([7.0]).excludes_zero is None
    assert mean_interval([3.0, 3.0]).half_width == 0 and mean_interval([3.0, 3.0]).excludes_zero


def test_holms_correction_is_that_of_its_definition():
    """In ascending order, the i-th of m p-values is compared with 0.05 / (m - i), up to the first above it."""
    rng = np.random.default_rng(0)
    counts = set()
    for shift in np.linspace(0.0, 3.0, 40):
        samples = rng.normal(shift * rng.integers(0, 2, (6, 1)), 1.0, (6, 5))
        p_values = scipy.stats.ttest_1samp(samples, 0, axis=1).pvalue
        order = np.argsort(p_values)
        is_below = p_values[order] < 0.05 / np.arange(6, 0, -1)
        expected = np.zeros(6, bool)
        expected[order] = np.logical_and.accumulate(is_below)
        assert still_exclude_zero([mean_interval(list(sample)) for sample in samples]) == list(expected)
        counts.add(int(expected.sum()))
    assert {0, 1, 2, 3} <= counts
    # Without any spread, the difference is as certain as can be; one value alone says nothing.
    assert still_exclude_zero([mean_interval([3.0, 3.0]), mean_interval([0.0, 0.0]), mean_interval([7.0])]) == [
        *(True, False, False)
    ]


def test_the_note_names_the_rows_that_holms_correction_leaves(tmp_path):
    """The interval of 9 excludes 0 by itself (p = 0.04), but not as one of three."""
    top1 = {3: (40.0, 41.0, 42.0), 5: (50.0, 51.1, 52.0), 7: (41.0, 40.5, 42.1), 9: (40.9, 41.6, 42.5)}
    results = {((f"model.kernel_size={k}",), seed): [x] for k in top1 for seed, x in enumerate(top1[k])}
    report = report_of(write_sweep(tmp_path / "s", results), "kernel_size=3")
    assert [row.difference.excludes_zero for row in report.rows[1:]] == [True, False, True]
    note = next(line for line in notes(report) if "differences" in line)
    assert note.endswith("still excludes 0; after Holm's correction for their number, only model.kernel_size=5")


def test_a_paired_difference_solved_by_hand(tmp_path):
    """The seeds shift both rows by 10 points; the differences are 1, 2 and 3, so the result is 2 +- 2.484."""
    k3, k5 = ("model.kernel_size=3",), ("model.kernel_size=5",)
    results = {(k3, 0): [40.0], (k3, 1): [50.0], (k3, 2): [60.0], (k5, 0): [41.0], (k5, 2): [63.0], (k5, 1): [52.0]}
    results[k5, 4] = [99.0]  # a seed without a counterpart
    first, second = report_of(write_sweep(tmp_path / "s", results)).rows
    difference = paired_difference(second, first)
    assert (difference.mean, difference.n) == (2.0, 3)
    assert difference.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5) and not difference.excludes_zero
    assert second.reference is first and first.difference is None and second.last.mean == pytest.approx(255 / 4)


# From folders to rows


def test_every_job_is_in_the_figures_or_listed_with_its_reason(tmp_path, without_matplotlib, in_process):
    """Check that failed jobs are listed; without them, a report would show only the mean of the successful runs."""
    k3, k5, k7 = (("model.kernel_size=3",), ("model.kernel_size=5",), ("model.kernel_size=7",))
    results = {(k3, 0): [50.0, 60.0, 58.0], (k3, 1): [50.0, 54.0, 54.0], (k5, 0): [61.0], (k7, 0): ("waiting", "")}
    results |= {(k5, 1): ("failed", "exit code 1: OutOfMemoryError\nTraceback"), (k5, 2): ("pruned", "step 3")}
    sweep = write_sweep(tmp_path / "s", results)
    more = {(k3, 2): [70.0], (("model.width=0.3",), 0): ("refused", "width")}
    write_sweep(sweep, more, name="ledger-b.json")
    (sweep / "ledger-b-0/metrics.jsonl").write_text('{"split": "val"')  # a job that continued elsewhere left half a row
    write_sweep(sweep, {(k7, 1): [1.0]}, name="ledger-c.json")
    (sweep / "ledger-c-0/config.yaml").unlink()
    text = in_process("report", str(sweep), "--reference", "kernel_size=3").stdout
    saved = json.loads((sweep / "report/table.json").read_text())
    assert {job["job"]: job["state"] for job in saved["not_counted"]} == {
        "ledger-3": "waiting", "ledger-4": "failed", "ledger-5": "pruned", "ledger-b-0": "no val",
        "ledger-b-1": "refused", "ledger-c-0": "gone",
    }  # fmt: skip
    rows = {row["row"]: row for row in saved["rows"]}
    assert {label: (row["seeds_done"], row["seeds"]) for label, row in rows.items()} == {
        "model.kernel_size=3": (2, 3), "model.kernel_size=5": (1, 3), "model.kernel_size=7": (0, 2),
        "model.width=0.3": (0, 1),
    }  # fmt: skip
    assert rows["model.kernel_size=3"]["top1"] == 56.0 and rows["model.kernel_size=3"]["best_top1"] == 57.0
    assert rows["model.kernel_size=5"]["difference"] == 3.0 and rows["model.kernel_size=5"]["difference_seeds"] == 1
    assert all(part in text for part in ("3 of 9 jobs", "exit code 1: OutOfMemoryError  ", "few seeds"))
    assert "Traceback" not in text
    assert (sweep / "report/table.md").read_text() in text
    with (sweep / "report/table.csv").open() as file:
        assert [row["top1"] for row in csv.DictReader(file)] == ["56.0", "61.0", "", ""]


def test_the_list_has_the_best_run_first_and_only_what_differs(tmp_path, in_process, monkeypatch):
    """The last epoch decides, one best run per data set; an unfinished run, and one that was killed at its start."""
    monkeypatch.setenv("COLUMNS", "80")
    for name, overrides, top1, status in (
        ("a", ["optimizer.lr=0.2"], [50.0, 40.0], "finished"),
        ("b", ["optimizer.lr=0.3", "model.width=0.5"], [45.0, 60.0], "interrupted"),
        ("b2", ["optimizer.lr=0.3"], [45.0, 39.0], "finished"),
        ("c" * 60, ["optimizer.lr=0.4"], [], "running"),
        ("d", ["data=image_folder", "data.root=photos"], [99.0, 50.0], "finished"),
        ("e", ["data=image_folder", "data.root=photos", "seed=1"], [60.0, 70.0], "finished"),
    ):
        overrides = [*overrides, "data.max_val_images=72"]
        write_run(tmp_path / "out" / name, overrides, top1, status=status, num_val_images=10**7)
    lines = in_process("report", "--list", "out").stdout.splitlines()
    assert all(len(line) <= 80 or line.startswith("killed: ") for line in lines)
    words = [line.split() for line in lines]
    assert words[0] == ["digits"] and words[1] == ["top1", "best", "epoch", "run", "state", "lr", "width"]
    assert words[2] == ["60.00", "60.00", "2/100", "b", "interrupted", "0.3", "0.5"]
    assert words[3] == ["40.00", "50.00", "2/100", "a", "done", "0.2", "null"]
    assert words[5][:3] == ["-", "-", "0/100"] and "..." in words[5][3] and words[5][4] == "killed"
    assert lines[6] == "highest  sasa-evaluate out/a/checkpoints/last.pt"  # b has not finished
    assert lines[7] == "on 72 val images, one run's top1 is accurate to about ± 11 points"
    assert "no process runs it; the same command" in lines[8]
    assert lines[10] == "image_folder  photos" and words[12][3:] == ["e", "1"] and "width" not in lines[11]
    assert lines[-2] == "highest  sasa-evaluate out/e/checkpoints/last.pt"
    assert not (tmp_path / "out/report").exists()


def test_the_list_shows_first_what_the_commands_set_and_keeps_its_command_whole(tmp_path):
    """At 80 columns, it showed warmup_epochs, which follows from the epochs, and hid the models of the sweep."""
    names = [f"my_photos-{model}_resnet26-e25-s0-5d028b6{i}" for i, model in enumerate(("conv", "hybrid", "sasa"))]
    for i, name in enumerate(names):
        model = f"model.name={name.split('-')[1]}"
        command = f"sasa-train data.root=my_photos {model}"
        top1 = [60.0 + i] if i < 2 else []
        write_run(tmp_path / "outputs" / name, [model], top1, status="finished" if top1 else "failed", command=command)
        config = compose_config([model, f"schedule.warmup_epochs={i + 1}"])
        text = to_yaml(dataclasses.replace(config, derive=["schedule.warmup_epochs"]))
        (tmp_path / "outputs" / name / "config.yaml").write_text(text)
    for width, keys in ((80, ["model", "warmup_epochs"]), (60, ["model"])):
        lines = lines_in_terminal(tmp_path, width, "report", "--list")
        assert lines[1].split()[4:] == keys and ("(1 more key differs; a wider terminal shows more)" in lines) == (
            width < 80
        )
        at = lines.index("highest")
        assert lines[at + 1] == f"sasa-evaluate outputs/{names[1]}/checkpoints/last.pt"


def test_one_folder_is_one_data_set_however_its_runs_wrote_it(tmp_path, in_process, without_matplotlib):
    """Each way to write it was a data set of its own: the best run was compared with nothing, and another was best."""
    for folder in ("my_photos", "other/my_photos", "birds"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a link").symlink_to("my_photos")
    for name, root, here, top1 in (
        ("inside", ".", "my_photos", 70.0), ("above", "my_photos", ".", 60.0), ("linked", "a link", ".", 50.0),
        ("whole", str(tmp_path / "my_photos"), "other", 40.0), ("other", "my_photos", "other", 30.0),
        ("birds", "../birds", "other", 20.0), ("old", "birds", None, 10.0),
    ):  # fmt: skip
        directory = {} if here is None else {"directory": str((tmp_path / here).resolve())}
        overrides = ["data=image_folder", f"data.root={root}", f"optimizer.lr={top1}"]
        write_run(tmp_path / "out" / name, overrides, [top1], **directory)
    lines = in_process("report", "--list", "out").stdout.splitlines()
    names = ["image_folder  birds", *(f"image_folder  {tmp_path}/{name}" for name in ("my_photos", "other/my_photos"))]
    assert [line for line in lines if line.startswith("image_folder")] == names
    best = [line.split("/")[1] for line in lines if line.startswith("highest ")]
    assert best == ["birds", "inside"]  # of the two runs on birds, and of the four on my_photos
    in_process("report", "out", "--out", "page")
    told = (tmp_path / "page/report.html").read_text()
    assert f"of 4 rows on image_folder  {tmp_path}/my_photos is row " in told
    assert "of 2 rows on image_folder  birds is row " in told
    assert len({row.settings["data.root"] for row in report_of(tmp_path / "out").rows}) == 3


def test_the_list_shows_what_tells_runs_apart_even_where_it_is_narrow(tmp_path):
    """Preset and seed, which tell all runs apart, come before the many keys that vary with the preset. What a waiting
    job will derive from its images is unknown."""
    for preset, seed in itertools.product(("none", "crop_flip", "trivial_cutmix"), (0, 1)):
        epochs = 20 if preset == "none" else 30
        overrides = [f"augment={preset}", f"seed={seed}", f"trainer.epochs={epochs}"]
        write_run(tmp_path / f"s/{preset}-{seed}", overrides, [50.0])
    waiting = {(("augment=none",), 2): ("waiting", "")}
    jobs = find_jobs([write_sweep(tmp_path / "t", waiting, base=()), *sorted((tmp_path / "s").iterdir())]).jobs
    lines = list_runs(jobs, 80).splitlines()
    assert lines[1].split()[5:7] == ["seed", "augment"]
    (line,) = (line.split() for line in lines if "waiting" in line)
    assert line[:3] == ["-", "-", "-"] and line[5:7] == ["2", "none"]
    names = {"model": "conv_resnet26", "model.width": "0.25", "optimizer.lr": "0.2", "trainer.label_smoothing": "0.5"}
    for key, value in (names | {"seed": "0"}).items():  # the last changes nothing
        write_run(tmp_path / f"changes/a-run-with-a-long-name-{key}-0123abcd", [*BASE, f"{key}={value}"], [50.0])
    lines = list_runs(find_jobs([tmp_path / "changes"]).jobs, 60).splitlines()
    said = {line.split("  ")[-1] for line in lines[2:-1]}
    assert said == {"base", *(f"{key.rpartition('.')[2]}={value}" for key, value in names.items())}
    assert all(line.split()[2].endswith("-0123abcd") and len(line) <= 60 for line in lines[2:-1])


def test_a_run_that_nobody_runs_is_killed_and_one_in_progress_is_running(tmp_path):
    """A sweep's job that has just started holds no folder yet; a lock is another process's, so it takes one."""
    sweep = write_sweep(tmp_path / "s", {((), 0): ("running", ""), ((), 1): [50.0]})
    write_run(tmp_path / "run", [*BASE], [50.0], status="running")

    def states() -> list[str]:
        return [job.state for job in find_jobs([sweep, tmp_path / "run"]).jobs]

    assert states() == ["killed", "done", "killed"]
    lock = "import sys; from pathlib import Path; from sasa_train.files import lock_folder\n"
    lock += "held = [lock_folder(Path(path)) for path in sys.argv[1:]]; print('held', flush=True); sys.stdin.read()"
    command_line = [sys.executable, "-c", lock, str(sweep), str(tmp_path / "run")]
    with subprocess.Popen(command_line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        assert held.stdout.readline() == b"held\n"
        assert states() == ["running", "done", "running"]
    assert states() == ["killed", "done", "killed"]


def test_two_seeds_have_a_mean_and_no_interval(tmp_path):
    """Nor does a note, a legend or a bar of a chart speak of intervals."""
    from sasa_train.report import charts

    results = {((f"model.kernel_size={k}",), seed): [50.0 + k + 11 * seed] for k in (3, 5) for seed in (0, 1)}
    report = report_of(write_sweep(tmp_path / "s", results))
    text = markdown(report)
    assert "58.50 (2 seeds: too few)" in text and "few seeds (2): fewer than 3 have no interval here" in text
    assert "±" not in text and "normally distributed" not in text
    (axis,) = charts.draw_figures(report)["differences"].axes
    assert [label.get_text() for label in axis.get_legend().get_texts()] == ["difference", "a seed"]


def test_a_seed_that_ran_twice_counts_once(tmp_path):
    results = {((), 0): [50.0], ((), 1): [52.0], (("trainer.log_every_steps=7",), 1): [58.0]}
    report = report_of(write_sweep(tmp_path / "s", results))
    assert len(report.rows) == 1 and report.rows[0].last.mean == 51.0
    assert [(job.name, job.state) for job, _ in report.not_counted] == [("ledger-2", "repeated")]


def test_a_ledger_that_names_other_values_than_its_runs_is_not_followed(tmp_path, capsys):
    """An edited ledger labelled the rows of two runs with learning rates that they never had."""
    sweep = write_sweep(tmp_path / "s", {((f"optimizer.lr={lr}",), 0): [50.0] for lr in (0.1, "2e-1")})
    assert [row.label for row in report_of(sweep).rows] == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    assert not capsys.readouterr().err
    ledger = sweep / "ledger.json"
    ledger.write_text(ledger.read_text().replace("lr=0.1", "lr=0.7"))
    assert [row.label for row in report_of(sweep).rows] == ["optimizer.lr=0.1", "optimizer.lr=0.2"]
    told = capsys.readouterr().err
    assert f"WARNING: {sweep}/ledger-0: the sweep's ledger says optimizer.lr=0.7, but the run has 0.1; the r" in told


def test_plain_run_folders_need_no_ledger(tmp_path, capsys, without_matplotlib):
    """`sasa-train -m` keeps no ledger, so states are read from run.json and keys from config.yaml."""
    for width, seed in itertools.product((0.125, 0.25), (0, 1)):
        overrides = [*BASE, f"model.width={width}", f"seed={seed}"]
        write_run(tmp_path / f"outputs/w{width}-{seed}", overrides, [50.0 + 8 * width + seed])
    write_run(tmp_path / "outputs/stopped", [*BASE, "model.width=0.25", "seed=2"], [9.0], status="interrupted")
    (tmp_path / "outputs/multirun").mkdir()
    assert command.run_command([str(tmp_path / "outputs")]) == 0
    saved = json.loads((tmp_path / "outputs/report/table.json").read_text())
    assert [(row["row"], row["seeds_done"], row["seeds"], row["top1"]) for row in saved["rows"]] == [
        ("model.width=0.125", 2, 2, 51.5), ("model.width=0.25", 2, 3, 52.5),
    ]  # fmt: skip
    assert saved["not_counted"][0]["state"] == "interrupted"
    runs = [str(tmp_path / f"outputs/w{width}-0") for width in (0.125, 0.25)]
    assert command.run_command(runs) == 2 and "--out" in capsys.readouterr().err
    assert command.run_command([*runs, "--out", str(tmp_path / "two")]) == 0 and (tmp_path / "two/table.md").exists()


@pytest.mark.parametrize(
    "text,reason",
    [
        ("{", "cannot be read as a ledger"),
        ("[1]", "is damaged"),
        ('{"format_version": 2, "jobs": {}}', "format_version=2"),
        ('{"format_version": 1, "sweep": {"paper_table": 2}, "jobs": {}}', "paper_table=2"),
        ('{"format_version": 1, "jobs": {"a": {"state": "done"}}}', "jobs.a.overrides is missing"),
        ('{"format_version": 1, "jobs": {"../a": {"overrides": []}}}', "'../a' must be the name of a run folder"),
        (
            '{"format_version": 1, "jobs": {"a": {"overrides": [], "reason": {}}}}',
            "jobs.a.reason (dict) must be a text",
        ),
        ('{"format_version": 1, "jobs": {"a": {"state": "done", "overrides": ["seed"]}}}', "is damaged"),
    ],
)
def test_a_damaged_ledger_is_refused_by_its_path(text, reason, tmp_path, capsys):
    (tmp_path / "ledger.json").write_text(text)
    assert command.run_command([str(tmp_path)]) == 2
    assert f"{tmp_path}/ledger.json" in (error := capsys.readouterr().err) and reason in error


def test_a_row_of_metrics_without_what_is_drawn_is_damage(tmp_path):
    """Check that a log that was edited or written by another program is reported on the page, without a traceback."""
    write_run(tmp_path / "run", ["experiment=debug"], [20.0])
    log = tmp_path / "run/metrics.jsonl"
    log.write_text(log.read_text().replace('"epoch"', '"round"'))
    with pytest.raises(ConfigError, match="metrics.jsonl: cannot be read .ValueError: epoch is missing"):
        read_metrics(log)
    assert command.run_command([str(tmp_path / "run"), "--quick"]) == 0


@pytest.mark.parametrize("change", ["newline", "tail", "old rows", "old run", "order", "middle", "no end", "stopped"])
def test_a_log_that_does_not_end_as_its_run_did_gives_no_figure(change, tiny_run, tmp_path, in_process):
    """The top1 of an earlier epoch was called the figure to publish."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    log, info = run / "metrics.jsonl", json.loads((run / "run.json").read_text())
    lines, reason = log.read_text().splitlines(keepends=True), "its last val row is of step 4 with top1 "
    first = [line for line in lines if json.loads(line)["epoch"] == 1]
    if change == "newline":
        log.write_text("".join(lines).rstrip("\n"))
        assert f"{info['last']['top1']:.2f} %, after epoch 3 of 3; the figure to publish" in (
            in_process("report", str(run), "--quick").stdout
        )
        return
    log.write_text("".join({"old rows": [*lines, *first], "order": [*first, *lines]}.get(change, first)))
    if change == "middle":
        better = json.loads(first[-1]) | {"top1": 99.0}
        log.write_text("".join([*first[:-1], json.dumps(better) + "\n", *lines[len(first) :]]))
        reason = "it was changed after the run had ended"
    if change == "no end":
        log.write_text("".join(json.dumps(json.loads(line) | {"top1": 99.0}) + "\n" for line in lines))
        info["last"], reason = None, "it was changed after the run had ended"
    if change == "stopped":
        log.write_text("".join(lines))
        info["status"], reason = "stopped", "run.json says that a hook stopped the run, but not which"
    if change in ("old run", "order"):  # of a version that did not record the end
        del info["last"], info["log_sha256"]
        reason = (
            "its last val row is of epoch 1 of 3, but run.json"
            if change == "old run"
            else "its val rows are not in order"
        )
    (run / "run.json").write_text(json.dumps(info))
    (job,) = find_jobs([run]).jobs
    assert (job.state, job.val) == ("damaged", []) and reason in job.reason
    if change == "tail":
        assert reason in (told := in_process("report", str(run), "--quick").stdout) and "publish" not in told
        in_process("train", *shlex.split(job.reason)[-1:])
        assert log.read_text() == "".join(lines) and find_jobs([run]).jobs[0].state == "done"


def test_a_config_that_was_changed_after_the_end_gives_no_figure(tiny_run, tmp_path, in_process):
    """The report showed another seed and learning rate than the run had been trained with."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("seed: 0", "seed: 5"))
    (job,) = find_jobs([run]).jobs
    assert (job.state, job.val) == ("damaged", [])
    assert f"{run}/config.yaml: it was changed after the run had ended" in job.reason
    in_process("train", *shlex.split(job.reason)[-1:])
    assert (run / "config.yaml").read_text() == config and find_jobs([run]).jobs[0].state == "done"


def test_a_log_that_does_not_end_as_the_ledger_says_gives_no_figure(tmp_path):
    """With a damaged run.json, a changed log was shown as done, though the sweep's ledger had another top1."""
    sweep = write_sweep(tmp_path / "s", {((), 0): [20.0]})
    ledger = json.loads((sweep / "ledger.json").read_text())
    (job,), (info,) = ledger["jobs"].values(), sweep.glob("*/run.json")
    info.write_text("{")
    last = {"split": "val", "step": 1, "epoch": 1, "loss": None, "top1": 10.0, "top5": 99.0}
    for top1, state in ((20.0, "done"), (10.0, "damaged")):
        job["last"] = last | {"top1": top1}
        (sweep / "ledger.json").write_text(json.dumps(ledger))
        (found,) = find_jobs([sweep]).jobs
        assert found.state == state and ("by the ledger the run ended at step 1" in found.reason) == (top1 == 10.0)


@pytest.mark.parametrize("key,value", [("top1", 1.5e308), ("top1", 101), ("loss", -1.7e308), ("lr", 1.7e308)])
def test_numbers_too_large_to_compute_with_are_damage(key, value, tmp_path):
    """Their sums and the ticks of their charts overflowed, with a traceback."""
    runs = write_sweep(tmp_path / "sweep", {((), 0): [20.0], ((), 1): [30.0]})
    for log in runs.glob("*/metrics.jsonl"):
        text = log.read_text().splitlines()
        log.write_text("".join(json.dumps(json.loads(line) | {key: value}) + "\n" for line in text))
    assert command.run_command([str(runs)]) == 0
    assert f"{key}={value!r} must be null or a finite number" in (runs / "report/table.md").read_text().replace(
        "\\", ""
    )
    assert visualize.run_command([str(log.parent), "training_curves", "lr_schedule"]) == 2


def test_a_run_that_is_called_finished_by_hand_is_not(tmp_path, in_process):
    """The report called 13 % after epoch 1 of 30 the figure to publish, and the sweep never trained the rest."""
    run = tmp_path / "run"
    write_run(run, [*BASE, "trainer.epochs=3"], [20.0], last={"step": 1, "epoch": 1, "top1": 20.0})
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last.pt").touch()
    assert not has_finished(run)
    (job,) = find_jobs([run]).jobs
    assert job.state == "damaged" and "epoch 1 of 3, but run.json says that the run finished" in job.reason
    for last in (None, {}, {"step": 1}, "x"):  # then, its log tells
        (run / "run.json").write_text(json.dumps({"status": "finished"} | ({"last": last} if last is not None else {})))
        assert not has_finished(run)
    for name, overrides in (("patient", ["trainer.patience=1"]), ("done", ["trainer.epochs=1"])):
        write_run(tmp_path / name, [*BASE, *overrides], [20.0], last={"step": 1, "epoch": 1, "top1": 20.0})
        shutil.copytree(run / "checkpoints", tmp_path / name / "checkpoints")
        assert has_finished(tmp_path / name) and find_jobs([tmp_path / name]).jobs[0].state == "done"
    config = (tmp_path / name / "config.yaml").read_text()
    long = "x:\n" + "- a: [1, b]\n" * 2_000_000  # PyYAML would read this for minutes
    for odd in ("[" * 5000 + "]" * 5000, "x: !!int ''", "x: !!timestamp abc", f"x: 1{':00' * 200}.0", long):
        (tmp_path / name / "config.yaml").write_text(f"{config}\n{odd}\n")
        assert has_finished(tmp_path / name)  # and whoever needs the config says what is wrong with it


def test_a_training_time_too_large_to_compute_with_is_unknown(tmp_path):
    runs = write_sweep(tmp_path / "sweep", {((), 0): [20.0], ((), 1): [30.0]})
    for info in runs.glob("*/run.json"):
        info.write_text(json.dumps({"status": "finished", "seconds": 1.7e308}))
    assert command.run_command([str(runs)]) == 0
    assert "training_seconds" in (text := (runs / "report/table.csv").read_text()) and "308" not in text


def test_a_run_given_twice_counts_once(tmp_path):
    """`sasa-report outputs outputs/sweep` listed and counted the sweep's runs twice."""
    sweep = write_sweep(tmp_path / "s", {(("model.kernel_size=3",), 0): [1.0], (("model.kernel_size=5",), 0): [2.0]})
    write_run(tmp_path / "alone", BASE, [1.0])
    once = [job.run_dir.resolve() for job in find_jobs([tmp_path]).jobs]
    several = find_jobs([tmp_path, sweep, tmp_path / "alone", tmp_path / "s/..", *sweep.glob("*/")]).jobs
    assert len(once) == 3 and [job.run_dir.resolve() for job in several] == once


def test_a_folder_that_is_not_there_is_refused_before_torch_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "load_torch", lambda: pytest.fail("torch was loaded"))
    assert command.run_command([str(tmp_path / "x")]) == 2 and "there is no such folder" in capsys.readouterr().err


def test_what_cannot_be_reported_is_refused(tmp_path, capsys, in_process):
    assert command.run_command([str(tmp_path)]) == 2 and "is not a sweep" in capsys.readouterr().err
    sweep = write_sweep(tmp_path / "s", {(("model.kernel_size=3",), 0): [1.0], (("model.kernel_size=5",), 0): [2.0]})
    write_run(tmp_path / "digits-k7-s0-1f2e3d4c", BASE, [1.0])
    for typo, meant in (("digits-k7", "digits-k7-s0-1f2e3d4c"), ("digits-k7-s0-1f2e3d4", "digits-k7-s0-1f2e3d4c")):
        told = in_process("report", str(tmp_path / typo), expect=2).stderr
        assert f"{typo}: there is no such folder; did you mean {tmp_path / meant}?" in told
        told = in_process("visualize", str(sweep), str(tmp_path / typo), "--out", "x", expect=2).stderr
        assert f"did you mean {tmp_path / meant}?" in told
    sweep.rename(tmp_path / "windows")
    assert "did you mean windows?" in in_process("report", "window", expect=2).stderr
    (tmp_path / "windows").rename(sweep)
    for wrong in ("9", "kernel_size", "width"):
        assert "model.kernel_size=5" in in_process("report", str(sweep), "--reference", wrong, expect=2).stderr
    assert report_of(sweep, "2").rows[0].reference.label == "model.kernel_size=5"
    write_sweep(tmp_path / "empty", {})
    assert command.run_command([str(tmp_path / "empty")]) == 2 and "no jobs" in capsys.readouterr().err


# The plots


def windows(folder: Path) -> Path:
    results = {((f"model.kernel_size={k}",), seed): [40.0, 50.0 + k + seed] for k in (3, 5, 7) for seed in (0, 1, 2)}
    return write_sweep(folder, results, table=4)


def test_plots_are_drawn_beside_the_table(tmp_path):
    sweep = windows(tmp_path / "s")
    assert command.run_command([str(sweep)]) == 0
    pictures = sorted(path.name for path in (sweep / "report").glob("*.png"))
    assert pictures == ["accuracy.png", "curves.png", "differences.png", "window.png"]
    assert all(min(Image.open(sweep / "report" / name).size) > 300 for name in pictures)


def test_tables_and_page_need_no_matplotlib(tmp_path, capsys, without_matplotlib):
    assert command.run_command([str(windows(tmp_path / "s")), "--out", str(tmp_path / "plain")]) == 0
    names = ["report.html", "table.csv", "table.json", "table.md"]
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == names
    remedy, page = "pip install 'sasa_train[plots]'", (tmp_path / "plain/report.html").read_text()
    assert remedy in capsys.readouterr().err and remedy.replace("'", "&#39;") in page


def test_the_curves_are_the_seeds_mean_and_range(tmp_path):
    from sasa_train.report.charts import curve, window_lines

    results = {(("model.kernel_size=3",), 0): [10.0, 20.0, 30.0], (("model.kernel_size=3",), 1): [20.0, 40.0]}
    results[("model.kernel_size=7",), 0] = [1.0]
    results[("model.kernel_size=[7,7,5,3]",), 0] = [2.0]  # has no place on an axis of window sizes
    rows = report_of(write_sweep(tmp_path / "s", results)).rows
    assert curve(rows[0]) == ([1, 2], [15.0, 30.0], [10.0, 20.0], [20.0, 40.0])
    assert [[size for size, _ in line] for line in window_lines(rows)] == [[3, 7]]


def test_no_text_of_a_chart_covers_another_or_leaves_the_page(tmp_path):
    """Rows whose labels are longer than a panel is wide, in a panel each and in one panel; accuracies near 100."""
    from sasa_train.report import charts

    for count in (3, 4):
        rows = [(f"model.kernel_size={3 + 2 * (i % 2)}", f"optimizer.weight_decay=0.00012345{i}",
                 f"trainer.grad_clip_norm=1.00{i}", f"trainer.label_smoothing=0.100{i}")
                for i in range(count)]  # fmt: skip
        results = {(row, seed): [97.0, 98.0, 99.5 + seed / 4] for row in rows for seed in (0, 1, 2)}
        report = report_of(write_sweep(tmp_path / f"{count}", results))
        drawn = charts.draw_figures(report)
        assert set(drawn) == {"curves", "accuracy", "differences"}
        assert [line for figure in drawn.values() for line in wrong_texts(figure)] == []
        panels = [axis for axis in drawn["curves"].axes if axis.get_visible()]
        assert len(panels) == (1 if count == 3 else 4)
        for axis in (panels[0], *drawn["accuracy"].axes):
            assert 0 <= axis.get_ylim()[0] < axis.get_ylim()[1] <= 100
        assert all(float(tick).is_integer() for tick in panels[0].get_xticks())
    dots = [line for line in drawn["differences"].axes[0].lines if line.get_label() == "a seed"]
    assert len(dots[0].get_xdata()) == 3 * 3


def test_one_reference_in_all_charts(tmp_path):
    from sasa_train.report import charts

    drawn = charts.draw_figures(report_of(windows(tmp_path / "s"), "kernel_size 3"))
    assert wrong_texts(drawn["window"]) == []
    ours = drawn["window"].axes[0].containers[0].lines[0]
    assert dict(zip(*ours.get_data(), strict=True)) == {3: 0.0, 5: 2.0, 7: 4.0}
    named = drawn["window"].axes[0].get_ylabel(), drawn["differences"].axes[0].get_xlabel()
    assert all(" ".join(text.split()) == "top1, percentage points above kernel_size 3" for text in named)
    assert "kernel_size 3 (the reference)" in [text.get_text() for text in drawn["curves"].legends[0].texts]


def changes(folder: Path, *more: tuple[str, ...]) -> Path:
    """Create a sweep whose rows change one key each, apart from one that changes two, and `more` rows."""
    rows = [("model.kernel_size=5",), ("augment=none",), ("optimizer.lr=1e-2", "model.kernel_size=7")]
    results = {(row, 0): [40.0, 41.0 + i] for i, row in enumerate([*rows, ("model.width=0.25",), *more])}
    return write_sweep(folder, results)


def test_rows_are_named_by_what_they_change_and_compared_with_the_row_that_changes_nothing(tmp_path):
    """Given with the run that changes nothing, each row of a sweep was named by the same many keys of every row."""
    from sasa_train.report import charts

    write_run(tmp_path / "base", BASE, [40.0, 60.0])
    given = build_report(find_jobs([changes(tmp_path / "s"), tmp_path / "base"]).jobs, None, None, [])
    assert "from the commonest values: augment=" in markdown(given)
    for report in (given, report_of(changes(tmp_path / "with a base", ()))):
        assert {row.label for row in report.rows} == {
            "base", "model.kernel_size=5", "augment=none", "model.width=0.25",
            "model.kernel_size=7, optimizer.lr=0.01",
        }  # fmt: skip
        assert report.rows[0].label == "base" and {row.reference for row in report.rows} == {report.rows[0]}
        drawn = charts.draw_figures(report)
        assert "base (the reference)" in [axis.get_title() for axis in drawn["curves"].axes]
        assert drawn["differences"].axes[0].get_xlabel() == "top1, percentage points above base"
        assert "window" not in drawn  # a single difference; the row that also changes the learning rate is no point
        lines = [[row.label for _, row in line] for line in charts.window_lines(report.rows)]
        assert lines == [["base", "model.kernel_size=5"]]
    assert report_of(changes(tmp_path / "without a base")).rows[0].reference.label == "model.kernel_size=5"


def test_no_chart_of_a_single_dot(tmp_path):
    from sasa_train.report import charts

    one = report_of(write_sweep(tmp_path / "one", {((), 0): [50.0]}))
    assert charts.draw_figures(one) == {}
    rates = {((f"optimizer.lr=0.{i}",), 0): [50.0, 60.0] for i in (1, 2)}  # models of one size
    assert set(charts.draw_figures(report_of(write_sweep(tmp_path / "rates", rates)))) == {"curves"}


# The paper's tables


def jobs_of(*arguments: str) -> tuple[int | None, list[list[str]]]:
    """Read the arguments as sasa-sweep does; return the number of the paper's table and each job's overrides."""
    plan = read_plan(list(arguments))
    assert not any(job.reason for job in plan.jobs)
    return plan.config.paper_table, [job.overrides for job in plan.jobs]


@pytest.mark.parametrize("sweep", slow_but_for(["paper_table5", "paper_table7"], SWEEPS))
def test_every_row_of_the_papers_table_is_one_job(sweep):
    """Each job must have its row's ImageNet parameter count and also work at 32 pixels with another experiment."""
    table, jobs = jobs_of(f"sweep={sweep}")
    wanted = [row for row in ROWS if row.table == table]
    configs = [compose_config(job) for job in jobs]
    rows = [matching_row(vars(config.model), table) for config in configs]
    assert sorted(map(ROWS.index, rows)) == [ROWS.index(row) for row in wanted]
    assert all((config.data.holdout_fraction == 0.04) == (table in (3, 5)) for config in configs)
    if sweep.startswith("paper"):
        for row, config in zip(rows, configs, strict=True):
            of_paper = meta_model(lambda row=row: timm.create_model(row.model, **row.keys))
            ours = meta_model(lambda config=config: build_model(config.model, 1000, 224))
            assert count_params(ours) == count_params(of_paper), row
        if table == 1:
            return
        experiment = "cifar10_sasa_resnet26" if table == 7 else "cifar10_hybrid_resnet26"
        configs = [compose_config(job) for job in jobs_of(f"sweep={sweep}", f"experiment={experiment}")[1]]
        assert [matching_row(vars(config.model), table) for config in configs] == rows
    for config in configs:
        check_model(config.model, 32)


def test_the_six_tables_are_there_with_their_commands():
    assert [sweep for sweep in SWEEPS if sweep.startswith("paper")] == [f"paper_table{n}" for n in (1, 3, 4, 5, 6, 7)]
    for sweep in SWEEPS:
        head = (config_dir() / f"sweep/{sweep}.yaml").read_text().split("paper_table:")[0]
        assert head.startswith(f"# sasa-sweep sweep={sweep}") and "GPU" in head and "CPU" in head, sweep
        assert "Expected" in head or "not measured" in head, sweep


def test_the_papers_figures_stand_beside_ours(tmp_path):
    """Check that our differences and the paper's are relative to the same row, even for models of a different depth."""
    stages = {"aaaa": [50.0, 51.0], "ccaa": [52.0, 52.5]}
    results = {}
    for letters, top1s in stages.items():
        ops = ",".join({"a": "attention", "c": "conv"}[letter] for letter in letters)
        results |= {((f"model.stage_ops=[{ops}]",), seed): [top1] for seed, top1 in enumerate(top1s)}
    rows = report_of(write_sweep(tmp_path / "s", results, table=3)).rows
    of_paper = [(row.label, row.paper.top1) for row in rows]
    assert of_paper == [("attention in stages 1 2 3 4", 80.2), ("convolution in 1 2", 80.7)]
    assert rows[1].difference.mean == pytest.approx(1.75) and rows[1].paper_difference == pytest.approx(0.5)


def test_table_1_compares_within_a_depth():
    for row in ROWS:
        reference = reference_row(row)
        assert reference.table == row.table and reference_row(reference) is reference
        if row.table == 1:
            assert reference.label == f"baseline, {row.label[-3:]}"


def test_other_models_are_no_row_of_the_paper():
    wider = ["model=hybrid_resnet26", "model.kernel_size=13"]
    for overrides, table in ((["model=timm", "model.name=resnet50"], 1), (wider, 4)):
        assert matching_row(vars(compose_config(overrides).model), table) is None


# TensorBoard


def test_tensorboard_shows_the_sweep(tmp_path, monkeypatch):
    """Check that TensorBoard shows one session per run and only the keys that differ, not seventy identical columns."""
    monkeypatch.chdir(tmp_path)
    tiny = ["experiment=debug", "output_dir=sweep", "trainer.max_steps=1"]
    for kernel_size in ("3", "null"):
        arguments = [*tiny, f"model.kernel_size={kernel_size}", f"run_name=k{kernel_size}"]
        assert train.run_command(arguments) == 0
    events = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance={"hparams": 0})
    events.AddRunsFromDirectory("sweep")
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, "sweep")
    page = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = context.RequestContext()
    known = provider.list_hyperparameters(request, experiment_ids=["sweep"], limit=None)
    experiment = page.experiment_from_metadata(request, "sweep", True, page.hparams_metadata(request, "sweep"), known)
    assert [info.name for info in experiment.hparam_infos if info.differs] == ["model.kernel_size"]
    assert {"val/top1", "val/loss"} <= {info.name.tag for info in experiment.metric_infos}
    query = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_SUCCESS])
    query.col_params.add(hparam="model.kernel_size")
    query.col_params.add(metric=api_pb2.MetricName(tag="val/top1"))
    groups = list_session_groups.Handler(request, page, "sweep", query).run().session_groups
    assert {group.sessions[0].name for group in groups} == {"k3/tensorboard", "knull/tensorboard"}
    for group in groups:
        rows = read_metrics(Path("sweep", group.sessions[0].name).with_name("metrics.jsonl"))
        top1 = next(row["top1"] for row in rows if row["split"] == "val")
        assert [value.value for value in group.metric_values if value.name.tag == "val/top1"] == pytest.approx([top1])


def test_tensorboard_names_the_runs_by_what_differs(tmp_path, capsys, without_matplotlib):
    """Folders of runs end in a hash. Links under other names made TensorBoard show each run twice."""
    results = {((f"model.kernel_size={k}",), seed): [50.0 + k + seed] for k in (3, 5) for seed in (0, 1)}
    sweep = write_sweep(tmp_path / "a sweep", results)
    for i in range(4):
        (sweep / f"ledger-{i}/tensorboard").mkdir()
    assert command.run_command([str(sweep)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("curves  "))
    program, option, spec = shlex.split(line)[1:]
    assert (program, option) == ("tensorboard", "--logdir_spec")
    read = data_ingester._parse_event_files_spec(spec)  # as TensorBoard reads it
    named = {f"kernel_size={k}+seed={seed}": f"ledger-{2 * i + seed}" for i, k in enumerate((3, 5)) for seed in (0, 1)}
    assert {name: path for path, name in read.items()} == {
        name: str(sweep / job / "tensorboard") for name, job in named.items()
    }
    assert not (sweep / "report/tensorboard").exists()
    comma = sweep.rename(tmp_path / "a,sweep")
    assert command.run_command([str(comma)]) == 0
    assert f"curves  tensorboard --logdir {comma}\n" in capsys.readouterr().out.replace("'", "")


def test_the_report_fits_a_terminal(tmp_path):
    """At 80 columns a line of the table was 130 wide and broken inside words."""
    keys = ("optimizer.weight_decay=0.00012345", "trainer.label_smoothing=0.1001")
    results = {((f"model.kernel_size={k}", *keys[: i + 1]), seed): [50.0 + k + seed, 60.0]
               for i, k in enumerate((7, 3)) for seed in (0, 1, 2)}  # fmt: skip
    report = report_of(write_sweep(tmp_path / "s", results | {(("model.width=0.5",), 0): ("failed", "out of memory")}))
    assert report.rows[1].reference.settings["model.kernel_size"] == "7"  # as the command names it, not the smallest
    for width in (60, 80, 200):
        lines = for_terminal(report, width).splitlines()
        assert all(len(line) <= width for line in lines), max(lines, key=len)
        table = "\n".join(lines)
        for text in ("weight_decay=0.00012345", "label_smoothing=0.1001", "60.00", "out of memory"):
            assert text in table
        assert ("training time" in lines[2]) == (width == 200) and ("difference" in lines[2]) == (width >= 80)
        assert ("table.md also show" in table) == (width < 200)


def test_a_refused_config_is_still_a_row(tmp_path):
    """Check that a job with a refused config, of which only the overrides are known, is listed as a row."""
    sweep = write_sweep(tmp_path / "s", {(("model.kernel_size=4",), 0): ("refused", "odd"), ((), 0): [50.0]})
    refused = next(row for row in report_of(sweep).rows if row.settings)
    assert (refused.config, refused.params, refused.num_jobs) == (None, None, 1)


def test_runs_that_a_sweeps_ledger_does_not_list_are_named(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "s", {(("model.kernel_size=3",), seed): [50.0] for seed in (0, 1)})
    ledger = json.loads((sweep / "ledger.json").read_text())
    ledger["jobs"] = {name: job for name, job in ledger["jobs"].items() if name == "ledger-0"}
    (sweep / "ledger.json").write_text(json.dumps(ledger))
    assert len(find_jobs([sweep]).jobs) == 1
    assert "left out, as its ledger does not list them" in " ".join(capsys.readouterr().err.split())
