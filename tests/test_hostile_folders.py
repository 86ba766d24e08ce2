"""Run and sweep folders from strangers: no entry of theirs leads a command's writes elsewhere, or makes it wait."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from marking import slow_but_for
from PIL import Image
from running_commands import TINY

from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.saved import load_config
from sasa_train.files import csv_text, kind, lock_folder
from sasa_train.refusal import CheckpointError, ConfigError, ExpectedFailure
from sasa_train.report import illustrations
from sasa_train.report.jobs import find_jobs
from sasa_train.runs.checkpoint import Checkpoints, load_checkpoint
from sasa_train.runs.folder import RunFolder
from sasa_train.runs.ledger import Ledger
from sasa_train.training.profiling import WAIT, WARMUP, build_profiler


@pytest.fixture
def run_dir(tiny_run, tmp_path) -> Path:
    (tmp_path / "out").mkdir()
    return shutil.copytree(tiny_run, tmp_path / "out/a")


@pytest.fixture
def elsewhere(tmp_path) -> Iterator[Path]:
    """A folder with a file, in which nothing may change."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "precious").write_text("precious")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["precious"]
    assert (folder / "precious").read_text() == "precious"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise an exception if the block, which might wait forever, takes longer."""

    def late(number, frame):
        raise TimeoutError(f"not within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Links


def commands(run_dir: Path, name: str) -> list[str]:
    return {
        "report": ["report", str(run_dir)],
        "export": ["export", str(run_dir), "--formats", "safetensors"],
        "figures": ["visualize", str(run_dir), "lr_schedule"],
        "tensorboard/figures": ["visualize", str(run_dir), "lr_schedule"],
        "profile": ["train", f"resume={run_dir}", "trainer.epochs=4", "allow_config_change=[trainer.epochs]"],
    }[name]


@pytest.mark.parametrize("name", ["report", "export", "figures", "tensorboard/figures", "profile"])
def test_a_linked_folder_in_a_run_does_not_lead_a_command_out_of_it(name, run_dir, elsewhere, in_process):
    (run_dir / name).symlink_to(elsewhere)
    assert f"{run_dir}/{name} is a symbolic link" in in_process(*commands(run_dir, name), expect=2).stderr


@pytest.mark.parametrize("name", ["report", "export", "figures", "profile"])
def test_a_run_folder_that_is_a_link_is_refused(name, run_dir, elsewhere, in_process):
    inside = sorted(run_dir.rglob("*"))
    link = run_dir.with_name("b")
    link.symlink_to(run_dir)
    assert f"{link} is a symbolic link" in in_process(*commands(link, name), expect=2).stderr
    in_process("train", *TINY, "run_name=b", expect=2)
    assert sorted(run_dir.rglob("*")) == inside


def test_a_lock_that_is_a_hard_link_is_refused(run_dir, elsewhere, in_process):
    """The lock file holds its holder's details, so a link would overwrite the file that it names."""
    (run_dir / ".lock").unlink(missing_ok=True)
    (run_dir / ".lock").hardlink_to(elsewhere / "precious")
    assert f"{run_dir}/.lock: is a hard link" in in_process("train", f"resume={run_dir}", expect=2).stderr


@pytest.mark.parametrize("name", ["logs", "hydra", "JOB.log", "hard JOB.log", "JOB"])
def test_links_in_a_sweeps_folder_do_not_lead_out_of_it(name, elsewhere, tmp_path, in_process):
    overrides = [o for o in TINY if not o.startswith("output_dir")] + ["seed=0"]
    arguments = ["sweep", *overrides, "sweep.output_dir=out", "sweep.name=s"]
    job = default_run_name(compose_config(overrides))
    logs = tmp_path / "out/s/logs"
    if name in ("logs", "hydra", "JOB"):
        logs.parent.mkdir(parents=True)
        link = logs.parent / (name if name != "JOB" else job)
        link.symlink_to(elsewhere)
    else:
        logs.mkdir(parents=True)
        log = logs / f"{job}.log"
        (log.hardlink_to if name.startswith("hard") else log.symlink_to)(elsewhere / "precious")
    done = in_process(*arguments, expect=1 if name == "JOB" else 2)
    assert "link" in done.stderr + done.stdout


def test_a_launcher_writes_into_a_folder_of_its_own(elsewhere, tmp_path, in_process):
    """A link at hydra/0, or the results that submitit expects there, could be put into a sweep's folder beforehand."""
    (tmp_path / "out/s/hydra").mkdir(parents=True)
    (tmp_path / "out/s/hydra/0").symlink_to(elsewhere)
    overrides = [o for o in TINY if not o.startswith("output_dir")] + ["trainer.epochs=1", "hydra/launcher=basic"]
    before = sorted(elsewhere.iterdir())
    in_process("sweep", *overrides, "sweep.output_dir=out", "sweep.name=s", "seed=0")
    assert sorted(elsewhere.iterdir()) == before
    (folder,) = (path for path in (tmp_path / "out/s/hydra").iterdir() if path.name != "0")
    assert [path.name for path in folder.iterdir()] == ["0"]


@pytest.mark.parametrize("how", ["a pipe", "a symbolic link"])
def test_a_searchs_journal_is_neither_followed_nor_waited_for(how, elsewhere, tmp_path, in_process):
    (tmp_path / "out/s").mkdir(parents=True)
    journal = tmp_path / "out/s/optuna.journal"
    os.mkfifo(journal) if how == "a pipe" else journal.symlink_to(elsewhere / "precious")
    overrides = [o for o in TINY if not o.startswith("output_dir")] + ["optimizer.lr=interval(0.1,0.2)"]
    with time_limit(60):
        search = ("sweep.output_dir=out", "sweep.name=s", "sweep.num_trials=1")
        assert f"optuna.journal: is {how}" in in_process("sweep", *overrides, *search, expect=2).stderr


def test_a_searchs_journal_without_end_is_refused(tmp_path, in_process):
    """Optuna reads it as a whole; this one takes no room on the disk."""
    (tmp_path / "out/s").mkdir(parents=True)
    (tmp_path / "out/s/optuna.journal").touch()
    os.truncate(tmp_path / "out/s/optuna.journal", 2**37)
    overrides = [o for o in TINY if not o.startswith("output_dir")] + ["optimizer.lr=interval(0.1,0.2)"]
    search = ("sweep.output_dir=out", "sweep.name=s", "sweep.num_trials=1")
    assert "optuna.journal: is larger than 1,024 MiB" in in_process("sweep", *overrides, *search, expect=2).stderr


def test_weights_without_end_are_refused(tmp_path, in_process):
    (tmp_path / "x.safetensors").touch()
    os.truncate(tmp_path / "x.safetensors", 2**37)
    said = in_process("train", *TINY, "model.pretrained=x.safetensors", expect=2).stderr
    assert "model.pretrained=x.safetensors: has 128 GiB, and must have 32 GiB at most" in said


def test_a_disk_that_fails_at_the_lock_is_named_as_such(tmp_path, in_process, monkeypatch):
    """It was a folder that cannot be written, and a sweep did not try again."""
    real = os.open

    def fails(path, *arguments, **options):
        if str(path).endswith(".lock"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", fails)
    assert "the disk failed at " in in_process("train", *TINY, expect=1).stderr


@pytest.mark.parametrize(
    "broken,file,words",
    [
        ("open", "best.pt", ("evaluate", "run")),
        ("open", "config.yaml", ("report", "run")),
        ("open", "metrics.jsonl", ("report", "run")),
        ("open", "run.json", ("report", "--list", ".")),
        ("mkdir", "report", ("report", "run")),
        ("mkdir", "s", ("sweep", *TINY[:-1], "seed=1,2", "sweep.output_dir=sweeps", "sweep.name=s")),
        ("fsync", "table.csv", ("report", "run")),
        ("fsync", "predictions.csv", ("predict", "run", "image.png", "--output", "predictions.csv")),
    ],
)
def test_a_failing_disk_is_named_with_its_file_and_exit_code_1(broken, file, words, tmp_path, tiny_run, in_process):
    """It was exit code 2, as for a wrong input, and an error of an open file named none."""
    shutil.copytree(tiny_run, tmp_path / "run")
    Image.new("L", (8, 8)).save(tmp_path / "image.png")
    real = getattr(os, broken)

    def fails(path, *arguments, **options):
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
        if file in where.split("/")[-1]:
            name = () if isinstance(path, int) else (str(path),)
            raise OSError(errno.EIO, os.strerror(errno.EIO), *name)
        return real(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, broken, fails)
        said = in_process(*words, expect=1).stderr
    assert "Input/output error" in said and {"table.csv": "run/report"}.get(file, file) in said


def test_what_a_killed_export_left_is_not_followed_elsewhere(run_dir, elsewhere, tmp_path, in_process):
    """The command restores *.old from its unfinished folders, but not from a link of such a name."""
    (elsewhere / "precious").rename(elsewhere / "hub.old")
    (run_dir / "export").mkdir()
    (run_dir / "export/.making-x").symlink_to(elsewhere)
    in_process(*commands(run_dir, "export"))
    assert not (run_dir / "export/hub").exists()
    (elsewhere / "hub.old").rename(elsewhere / "precious")


def test_shards_are_not_written_through_links(image_folder, elsewhere, tmp_path, in_process):
    (tmp_path / "shards/val").mkdir(parents=True)
    (tmp_path / "shards/val/val-000000.tar.tmp").symlink_to(elsewhere / "precious")
    in_process("dataset_tool", "shard", str(image_folder), "shards")
    assert kind(tmp_path / "shards/val/val-000000.tar") == "a file"
    (tmp_path / "others").mkdir()
    (tmp_path / "others/train").symlink_to(elsewhere)
    assert "is a symbolic link" in in_process("dataset_tool", "shard", str(image_folder), "others", expect=2).stderr


# Pipes, folders, sockets and devices


def make(how: str, path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if how == "a pipe":
        os.mkfifo(path)
    elif how == "a folder":
        path.mkdir()
    elif how == "a file":
        path.write_text("text")
    else:
        with closing(socket.socket(socket.AF_UNIX)) as server:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path may have 107 bytes at most
            server.bind(path.name)
            os.chdir(here)


ENTRIES = [
    *((name, "a pipe") for name in (
        "checkpoints/last.pt", "checkpoints/last.pt.json", "checkpoints/best.pt", "run.json", "config.yaml",
        "metrics.jsonl", "unreadable.txt", ".lock", "left.tmp", "checkpoints/last.pt.1234.tmp",
    )),
    *((name, "a folder") for name in ("checkpoints/last.pt", "run.json", "metrics.jsonl", ".lock")),
    ("checkpoints/last.pt", "a socket"), ("tensorboard", "a file"), ("tensorboard", "a pipe"),
    ("checkpoints", "a file"),
]  # fmt: skip


@pytest.mark.parametrize("entry", slow_but_for([ENTRIES[0], ENTRIES[3]], ENTRIES))
def test_what_stands_in_place_of_a_runs_file_is_named_and_never_waited_for(entry, run_dir, in_process, monkeypatch):
    name, how = entry
    monkeypatch.setattr(illustrations, "model_sections", lambda *_: [])  # slow, and they read the checkpoint alone
    make(how, run_dir / name)
    with time_limit(60):
        told = in_process("train", *TINY, "trainer.ema_decay=0.5", "run_name=a", expect=2).stderr
        assert f"out/a/{name}: is {how}" in told
        run_quietly(in_process, "evaluate" if name.startswith("checkpoints") else "report", str(run_dir))
    assert kind(run_dir / name) == how


def run_quietly(in_process, *arguments: str) -> None:
    """Run a command that may succeed or refuse, but may neither wait nor raise."""
    try:
        in_process(*arguments)
    except AssertionError as error:  # another exit code
        assert str(error).startswith(("exit 1\n", "exit 2\n")) and "Traceback" not in str(error)


# Cells of CSV files


def test_a_sparse_file_is_refused_by_its_size(run_dir, in_process):
    """A file of a few KB on the disk that is 200 GB long ended a command with a MemoryError."""
    limits = {"metrics.jsonl": 1024, "run.json": 64, "ledger.json": 64}
    for name, limit in limits.items():
        (folder := run_dir.parent / name).mkdir()
        shutil.copytree(run_dir, folder / "run")
        sparse = folder / ("ledger.json" if name == "ledger.json" else f"run/{name}")
        sparse.touch()
        os.truncate(sparse, limit * 2**20 + 1)
        if name == "ledger.json":
            reason = in_process("report", str(folder), expect=2).stderr
        else:
            reason = find_jobs([folder / "run"]).jobs[0].reason
        assert str(sparse) in reason and f"is larger than {limit:,} MiB" in reason
    os.truncate(run_dir / "checkpoints/best.pt.json", 2**26 + 1)
    in_process("evaluate", str(run_dir))  # best.pt is verified by its own checksums


def test_texts_that_a_spreadsheet_would_run_are_escaped_and_can_be_restored():
    texts = ["=1+1", "+x", "-x", "@sum", "'=x", "''-x", "\t=x", "\r=x", "'tis", "a=b", "", "1-2", "-", "=-1", "+.5.5"]
    inner = [
        "a;=1+1",
        "a\t@x",
        "a\n=1",
        ";",
        "a;b",
        'a;"=1;',
        "a;'=1",
        "a;''\"=1",
        "x;-1;+2",
        "=1;=2",
        "a,=1",
        ";\t\n=x",
    ]
    numbers = [-1, -1.5, 3, "-1", "+2.5", "-1e-3", "-.5", "-5."]
    text = csv_text([texts, inner, numbers])
    found, found_inner, found_numbers = csv.reader(io.StringIO(text, newline=""))
    assert not [cell for cell in found if cell[:1] in tuple("=+-@\t\r")]
    # As docs/predict.md tells.
    restored = [
        re.sub(r"^'(?='*[=+@\t\r\n-])|(?<=[;\t\r\n])'(?=[\"']*[=+@-])", "", cell) for cell in found + found_inner
    ]
    assert restored == texts + inner and found_numbers == [str(number) for number in numbers]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC])
def test_no_text_is_a_formula_where_cells_end_at_semicolons_or_tabs(quoting):
    """Such a spreadsheet reads our quotes in the middle of a cell as text, so that a class can end its cell."""
    names = ["a;=1+1", 'a;"=1+1;', "a\t=1+1", "a\n=1+1", "a;@x", "a\r+x", "a;-x", "a;\uff1d1", "a';'=1", "a;\t=1"]
    text = csv_text([["image", "label"], *([name, name] for name in names)], quoting)
    for ends in (r"[;\n\r]", r"[\t\n\r]"):
        cells = [cell.lstrip('"') for cell in re.split(ends, text)]
        assert not [cell for cell in cells if cell[:1] in tuple("=+-@\uff1d")]
    assert all(line.startswith('"') for line in csv_text([["a;b"], ["a\tb"]]).splitlines())
    assert csv_text([["a b", -1]]) == "a b,-1\n"
    # Where cells do not end at commas, this would be "-1,5+cmd|...", a number with a formula.
    assert csv_text([[-1, "5+cmd|'/C calc'!A0"], ["-1", "5+F(1)"]]) == '-1,"5+cmd|\'/C calc\'!A0"\n-1,"5+F(1)"\n'


# While a run goes on


def test_checkpoints_that_became_a_link_are_not_written_through(run_dir, elsewhere):
    with lock_folder(run_dir) as lock:
        run = RunFolder(run_dir, lock, Checkpoints(run_dir / "checkpoints", 0), None)
        run.check_lock()
        (run_dir / "checkpoints").rename(run_dir / "cold")
        (run_dir / "checkpoints").symlink_to(elsewhere)
        with pytest.raises(ExpectedFailure, match="checkpoints has become a symbolic link"):
            run.check_lock()
        (run_dir / "checkpoints").unlink()
        (run_dir / "checkpoints").mkdir()  # of another run, whose checkpoints were deleted as this run's older ones
        with pytest.raises(ExpectedFailure, match="checkpoints has been replaced by another folder"):
            run.check_lock()


@pytest.mark.parametrize("way", ["linked", "moved", "none"])
def test_a_folder_is_not_ours_because_our_lock_was_put_there(tmp_path, way):
    """A run whose folder was moved away once went on in an empty one in its place, into which its lock was linked."""
    folder, moved = tmp_path / "run", tmp_path / "moved"
    folder.mkdir()
    with lock_folder(folder) as lock:
        run = RunFolder(folder, lock, Checkpoints(folder / "checkpoints", 0), None)
        ledger = Ledger(folder / "ledger.json", {}, lock)
        run.write("config.yaml", b"")
        ledger.save()
        folder.rename(moved)
        folder.mkdir()
        if way == "linked":
            (folder / ".lock").hardlink_to(moved / ".lock")
        elif way == "moved":
            (moved / ".lock").rename(folder / ".lock")
        for write in (lambda: run.write("config.yaml", b""), ledger.save):
            with pytest.raises(ExpectedFailure, match="its lock file is gone or another's; the folder was moved"):
                write()
        assert [path.name for path in folder.iterdir()] == ([] if way == "none" else [".lock"])
        if way == "moved":
            (folder / ".lock").rename(moved / ".lock")
        (folder / ".lock").unlink(missing_ok=True)
        folder.rmdir()
        moved.rename(folder)
        run.write("config.yaml", b"")  # it is ours again


def test_a_profile_is_not_written_into_the_folder_that_took_the_runs_place(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    with lock_folder(folder) as lock:
        run = RunFolder(folder, lock, Checkpoints(folder / "checkpoints", 0), None)
        with build_profiler(1, run, torch.device("cpu")) as profiler:
            folder.rename(tmp_path / "moved")
            folder.mkdir()
            for _ in range(WAIT + WARMUP + 1):
                profiler.step()
    assert not list(folder.iterdir()) and "run is not this run's any more" in capsys.readouterr().out


@pytest.mark.parametrize("other", ["holds the lock", "has lost it, too"])
def test_of_two_runs_that_think_they_hold_the_lock_one_stops(other, tmp_path, own_module, in_process):
    """A hook copied the run folder, and closing the copied .lock gave the lock up; a second run then began there."""
    own_module(
        "backup",
        """
        import shutil, subprocess, sys
        TAKE = "import sys; from pathlib import Path; from sasa_train.files import lock_folder; "
        TAKE += "held = lock_folder(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
        other = []

        def copy_saved(event, run):
            if event == "saved":
                shutil.copytree(run.path, "backup", dirs_exist_ok=True)
            if event == "evaluated" and run.step == 8:
                command = [sys.executable, "-c", TAKE, str(run.path)]
                other.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
                assert other[0].stdout.readline() == b"taken\\n"
                LOSE
        """.replace("LOSE", "" if other == "holds the lock" else "other[0].communicate()"),
    )
    hook = ["imports=[backup]", "hooks=[backup.copy_saved]"]
    told = in_process("train", *TINY, *hook, "run_name=a", expect=1).stderr
    assert "taken by another run. This run stops without writing" in told
    assert '"step": 4,' in (tmp_path / "out/a/checkpoints/last.pt.json").read_text()
    sys.modules["backup"].other[0].kill()


def test_a_run_does_not_end_well_without_its_last_checkpoint_and_mends_its_log(run_dir):
    with lock_folder(run_dir) as lock:
        run = RunFolder(run_dir, lock, Checkpoints(run_dir / "checkpoints", 0), None)
        (run_dir / "metrics.jsonl").unlink()
        row = '{"split": "train", "step": 1, "epoch": 1}\n'
        run.write_end({"best": None, "step": 1, "metrics": row, "config": ""})
        assert (run_dir / "metrics.jsonl").read_text() == row
        (run_dir / "checkpoints/last.pt").unlink()
        with pytest.raises(CheckpointError, match="last.pt is gone"):
            run.write_end({"best": None, "step": 1, "metrics": "", "config": ""})


def test_code_that_torch_compiles_is_not_loaded_from_where_others_can_write(tmp_path, in_process, monkeypatch):
    """torch's own folder, $TMPDIR/torchinductor_USER, may be another user's, who can put code there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    command = ["train", *TINY, "trainer.compile=true", "data=image_folder", "data.root=missing"]
    for _ in range(2):  # it is made, and found again
        assert "data.root=missing" in in_process(*command, expect=2).stderr
        (folder,) = tmp_path.glob("torchinductor_*")
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o777)  # as torch makes it under umask 0
    folder.chmod(0o700)
    (folder / "fx").mkdir()
    (folder / "fx/code.py").touch()
    (folder / "fx/code.py").chmod(0o666)  # written under umask 0
    assert (
        f"{folder}/fx/code.py: torch.compile loads code from it, but it belongs to"
        in in_process(*command, expect=2).stderr
    )
    (folder / "fx/code.py").unlink()
    (folder / "fx/code.py").symlink_to(tmp_path / "foreign.py")
    (tmp_path / "foreign.py").touch()
    (tmp_path / "foreign.py").chmod(0o666)
    assert f"{folder}/fx/code.py: torch.compile loads code from it, but it" in in_process(*command, expect=2).stderr
    if os.geteuid() == 0:
        (tmp_path / "foreign.py").chmod(0o644)
        os.chown(tmp_path / "foreign.py", 12345, 12345)
        assert f"{folder}/fx/code.py: torch.compile loads code from it" in in_process(*command, expect=2).stderr
    folder.chmod(0o777)
    (folder / "code.so").touch()
    assert f"{folder}: torch.compile loads code from it, but" in in_process(*command, expect=2).stderr
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert f"{folder}: torch.compile loads code from it, but" in in_process(*command, expect=2).stderr
    folder.unlink()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(tmp_path / "elsewhere"))
            assert f"or name another folder with {variable}=..." in in_process(*command, expect=2).stderr


def test_the_best_checkpoint_of_another_run_is_named(run_dir, in_process):
    """The best.pt of another run, of the same step and with its manifest, was evaluated without a word."""
    best = run_dir / "checkpoints/best.pt"
    other = load_checkpoint(best)
    for text in (in_process("evaluate", str(run_dir)).stderr, in_process("train", f"resume={run_dir}").stderr):
        assert "WARNING" not in text
    best.unlink()  # it may be the same file as last.pt
    torch.save(other | {"seconds": 1.0}, best)
    sha256, size = hashlib.sha256(best.read_bytes()).hexdigest(), best.stat().st_size
    best.with_name("best.pt.json").write_text(json.dumps({"step": other["step"], "size": size, "sha256": sha256}))
    for command in (["evaluate", str(run_dir)], ["train", f"resume={run_dir}"]):
        assert "that this run wrote: its SHA-256 is another" in in_process(*command).stderr
    best.with_name("best.pt.json").unlink()
    best.with_name("best.pt.json").mkdir()
    assert "best.pt.json: cannot be read (Is a directory), so that " in in_process("evaluate", str(run_dir)).stderr


def test_dash_m_does_not_write_through_a_link(elsewhere, tmp_path, in_process):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/multirun").symlink_to(elsewhere)
    assert "multirun is a symbolic link" in in_process("train", *TINY, "seed=0,1", "-m", expect=2).stderr


def test_a_device_is_not_replaced_by_an_output_file(tiny_run, tmp_path, in_process):
    os.mkfifo(tmp_path / "answers.json")
    for command in (["evaluate", str(tiny_run)], ["benchmark", "model", "resnet18"]):
        told = in_process(*command, "--json", "answers.json", expect=2).stderr
        assert "answers.json: is a pipe, and would be replaced" in told and kind(tmp_path / "answers.json") == "a pipe"


def test_a_sweep_file_with_aliases_is_refused_before_they_are_expanded(tmp_path, in_process):
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 30))
    (tmp_path / "s.yaml").write_text(f"l0: &l0 [x]\n{levels}\noverrides: [experiment=debug]\n")
    with time_limit(30):
        assert "s.yaml: YAML's aliases are not taken" in in_process("sweep", "sweep=s.yaml", expect=2).stderr


@pytest.mark.parametrize("text", ["[" * 60_000, "[" * 5000 + "]" * 5000, "- " * 30_000, "{a: " * 15_000, "? " * 30_000])
def test_lists_that_are_nested_deeply_are_refused_at_once(text, tmp_path, in_process):
    """PyYAML takes time in proportion to the square of the depth: 13 seconds for 5,000 brackets."""
    (tmp_path / "s.yaml").write_text(f"overrides:\n  {text}\n")
    with time_limit(20):
        assert "nested more than 20 deep" in in_process("sweep", "sweep=s.yaml", expect=2).stderr
    with (
        time_limit(20),
        pytest.raises(ConfigError, match="x.yaml: line 1: lists and keys are nested more than 20 deep"),
    ):
        load_config(f"a: {text}" if text[0] in "[{" else text, source="x.yaml")
