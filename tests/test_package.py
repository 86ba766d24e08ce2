"""Check the single table of commands, fast imports, tab completion and matching version numbers."""

import errno
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import sasa_train
from sasa_train.__main__ import completion_script, run_command
from sasa_train.commands import COMMANDS, end_command, is_interrupt
from sasa_train.extras import EXTRAS
from sasa_train.refusal import ConfigError, causes, is_of_disk
from sasa_train.terminal import WAITING

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
INSTALLED = {script: COMMANDS[script.removeprefix("sasa-")] for script in SCRIPTS}


def python(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


def test_the_table_of_commands_is_what_is_installed():
    assert {f"sasa-{name}": f"{command.module}:main" for name, command in COMMANDS.items()} == SCRIPTS


def test_the_changelog_begins_with_this_version_which_is_the_one_to_cite():
    version, date = re.search(r"^## (\d[\w.]*) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    assert version == sasa_train.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation or date == "not released yet"


def test_the_extras_that_messages_name_bring_what_is_missing():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {name: tuple(extras[name]) for name in EXTRAS} == EXTRAS


def test_types_are_shipped():
    """Check that py.typed is shipped; without it, type checkers treat everything in the package as Any."""
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in files["sasa_train"] and (Path(sasa_train.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("method", ["build_wheel", "build_editable"])
def test_without_a_compiler_a_wheel_is_for_every_platform_and_says_so_once(tmp_path, method):
    """An editable install, which has no compiled kernels either, says nothing; .ci/run builds the wheel with them."""
    pytest.importorskip("setuptools", "77")
    for name in ("sasa_train", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    code = f"from setuptools import build_meta; print('built', build_meta.{method}('.'))"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    command, environment = [sys.executable, "-c", code], environment | {"PATH": "/nowhere"}
    out = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    said = re.findall("^no CPU kernels in the wheel, which is for every platform: (.+)$", out, re.MULTILINE)
    assert len(said) == (method == "build_wheel"), out
    assert all(re.match(r"no C\+\+ compiler found|they are compiled in advance for Linux", reason) for reason in said)
    name = "-0.editable" if method == "build_editable" else ""
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sasa_train-{sasa_train.__version__}{name}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so") or "prebuilt" in name]


def test_importing_the_package_costs_little_beyond_torch_and_timm():
    """Check that importing the models does not load the `heavy` modules, which would add most of a second.

    Those who use the op alone need nothing of what the commands do.
    """
    of_commands = ["hydra", "omegaconf", "tensorboard", "timm", "torchvision"]
    heavy = ["hydra", "matplotlib", "tensorboard", "triton", "sklearn", "scipy", "onnx", "onnxruntime", "optuna"]
    code = f"""
import sys, sasa_train
print("torch" in sys.modules)
from sasa_train.attention import local_attention
print(sorted(set(sys.modules) & set({of_commands})))
import torch, timm
before = set(sys.modules)
import sasa_train.models, sasa_train.attention, sasa_train.trained
print(sorted((set(sys.modules) - before) & set({heavy})))"""
    assert python(code) == "False\n[]\n[]\n"


def test_no_help_imports_torch():
    """The check covers every command and subcommand, because importing torch would delay the help by seconds."""
    code = """
import contextlib, importlib, io, sys
def run(module, arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = module.run_command([*arguments, "--help"])
    is_heavy = bool({"torch", "matplotlib"} & set(sys.modules))
    print(module.__name__, arguments, code, is_heavy, "usage: sasa-" in out.getvalue())
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    parts = {"sasa_train.benchmark": ("attention", "model"), "sasa_train.dataset_tool": ("verify", "prepare", "shard")}
    for arguments in [[], *([part] for part in parts.get(name, ()))]:
        run(module, arguments)
"""
    lines = python(code, *(command.module for command in INSTALLED.values())).splitlines()
    assert len(lines) == len(INSTALLED) + 5
    assert [line for line in lines if not line.endswith(" 0 False True")] == []


def test_no_refusal_of_an_argument_imports_torch(tmp_path, monkeypatch):
    """A misspelt option once took 23 seconds to be refused. Keys, types, bounds, options and paths need no torch."""
    (tmp_path / "outputs/run").mkdir(parents=True)
    (tmp_path / "outputs/run/config.yaml").write_text("seed: 0")
    (tmp_path / "outputs/run/last.pt").touch()
    monkeypatch.chdir(tmp_path)
    refused = {
        "train trainer.epoch=3": "did you mean trainer.epochs?",
        "train resume=outputs/run trainer.epochs=0": "trainer.epochs=0 must be positive",
        "sweep trainer.epoch=3": "did you mean trainer.epochs?",
        "summary trainer.epoch=3": "did you mean trainer.epochs?",
        "export outputs/run --formats tflite": "invalid choice: 'tflite'",
        "benchmark model x --dtype fp8": "invalid choice: 'fp8'",
        "data verify outputs trainer.epoch=3": "must be key=value with one of the keys data.background",
        "evaluate outputs": "holds the runs run; give one of them",
        "report outputs/run trainer.epoch=3": "did you mean trainer.epochs?",
    }
    for name in ("evaluate", "export", "visualize", "demo", "predict"):
        words = f"{name} outputs/run/last.pt{' a.png' if name == 'predict' else ''} "
        refused |= {
            words + "trainer.devise=cpu": "did you mean trainer.device?",
            words + "seed=a": "seed=a must be a whole number",
        }
        refused |= {words + "trainer.epochs=0": "must be positive", words.replace("last", "gone"): "No such file"}
    code = """
import contextlib, importlib, io, json, sys
from sasa_train.commands import COMMANDS
for line, message in json.loads(sys.argv[1]).items():
    name, *arguments = line.split()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = importlib.import_module(COMMANDS[name].module).run_command(arguments)
    if code != 2 or message not in err.getvalue() or "loading" in err.getvalue() or "torch" in sys.modules:
        print(line, code, err.getvalue(), "torch" in sys.modules)
"""
    assert python(code, json.dumps(refused)) == ""


@pytest.mark.parametrize("given,count", [("", "10000"), ("OMP_WAIT_POLICY", None), ("GOMP_SPINCOUNT", "7")])
def test_threads_soon_sleep_while_they_wait_unless_the_user_says_how(monkeypatch, given, count):
    """Beside other programs, threads that spun while they waited trained at less than a sixth of the speed."""
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(given, count or "active")
    code = """
import os, sys
from sasa_train.predict import run_command
class Torch:  # stands for the import of torch, which takes seconds
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit(print(os.environ.get("GOMP_SPINCOUNT")))
sys.meta_path.insert(0, Torch())
run_command([sys.argv[1], "a.png"])
"""
    assert python(code, __file__) == f"{count}\n"


def test_the_garbage_collector_leaves_alone_what_the_imports_made():
    """It took two of the five seconds of a short command."""
    code = """
import gc
from sasa_train.terminal import load_torch
load_torch()
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    assert python(code) == "True True\n"


def test_weights_and_biases_is_not_imported_unasked():
    """timm imported it for half a second in every command."""
    code = """
import sys
from sasa_train.terminal import load_torch
load_torch()
print("timm" in sys.modules, "wandb" in sys.modules)
import wandb
"""
    pytest.importorskip("wandb")
    assert python(code) == "True False\n"


def test_what_only_linux_has_is_not_needed(tmp_path):
    code = """
import errno, os, sys
del errno.EREMOTEIO, errno.EUCLEAN, os.O_PATH, os.sched_getaffinity
from pathlib import Path
from sasa_train import files, machine, refusal, train
from sasa_train.training import endings
print(files.lock_folder(folder := Path(sys.argv[1])).holds(folder), errno.EIO in refusal.DISK_FAILED)
"""
    assert python(code, str(tmp_path)) == "True True\n"


def test_python_m_lists_and_runs_the_commands(capsys):
    assert run_command([]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w", listed, re.MULTILINE) for name in [*COMMANDS, "completion"])
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out == f"sasa_train {sasa_train.__version__}\n"
    assert run_command(["trian"]) == 2 and "there is no trian; the commands are train" in capsys.readouterr().err
    assert run_command(["complete"]) == 2 and "there is no complete" in capsys.readouterr().err  # typed by hand
    assert run_command(["completion", "csh"]) == 2 and "bash, zsh or fish" in capsys.readouterr().err
    command = [sys.executable, "-m", "sasa_train", "train", "trainer.epoch=3"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "sasa-train: unknown key 'trainer.epoch': did you mean trainer.epochs?\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Create a folder whose `outputs` contains a file and a folder with a name that a shell would split."""
    (tmp_path / "outputs/first run:1").mkdir(parents=True)
    (tmp_path / "outputs/table.md").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "line,offered",
    [
        ("sasa-train trainer.ep", ["trainer.epochs="]),
        ("sasa-train sch", ["schedule=", "schedule."]),
        ("path/to/sasa-train model=sasa", [f"model=sasa_resnet{n}" for n in (26, 38, 50)]),
        ("sasa-train optimizer.lr_basis=", ["optimizer.lr_basis=absolute", "optimizer.lr_basis=per_256"]),
        ("sasa-train augment.hflip=", ["augment.hflip=true", "augment.hflip=false"]),  # null is also valid
        ("sasa-train model=conv_resnet26,h", []),  # several values are a sweep, which requires -m
        ("sasa-train -m model=timm,sasa_resnet2", ["model=timm,sasa_resnet26"]),
        ("sasa-train --m", ["--multirun"]),
        ("sasa-sweep sweep=paper_table4 schedule=step,con", ["schedule=step,constant"]),
        ("sasa-sweep sweep.max_p", ["sweep.max_parallel="]),
        ("sasa-summary --p", ["--paper"]),
        ("sasa-train data.root=o", ["data.root=outputs/"]),
        ("sasa-evaluate ", ["outputs/"]),
        ("sasa-evaluate outputs/", ["outputs/first run:1/", "outputs/table.md"]),
        ("sasa-evaluate outputs weights=", ["weights=ema", "weights=raw"]),
        ("sasa-evaluate outputs exp", []),  # a saved config is complete, so no group can be chosen
        ("sasa-demo outputs trainer.dev", ["trainer.device="]),
        ("sasa-data prepare --im", ["--images-per-shard"]),
        ("sasa-data prepare ima", ["imagenet"]),
        ("sasa-benchmark attention --dtype ", ["fp32", "bf16", "fp16"]),
        ("sasa-report --out o", ["outputs/"]),
        ("sasa-report outputs data.ro", ["data.root="]),
    ],
)
def test_what_tab_offers(folder, tmp_path_factory, line, offered):
    """Request completions as argcomplete does for fish; its output, plain words with descriptions, is easy to parse."""
    answer = tmp_path_factory.mktemp("answer") / "words"
    environment = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "", "_ARGCOMPLETE": "1"}
    environment |= {"_ARGCOMPLETE_SHELL": "fish", "_ARGCOMPLETE_DFS": "\t", "_ARGCOMPLETE_IFS": "\n"}
    environment |= {"_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    command = [sys.executable, "-P", "-m", "sasa_train", "complete"]
    subprocess.run(command, env=os.environ | environment, check=True, cwd=folder)
    words = answer.read_text().split("\n")
    assert sorted(word.partition("\t")[0] for word in words if word) == sorted(offered)


@needs("bash")
def test_bash_completes(folder):
    line = "sasa-train model=hyb"
    driver = f"{completion_script('bash')}\nCOMP_LINE='{line}'; COMP_POINT={len(line)}; "
    driver += "_python_argcomplete__sasa_train sasa-train; "
    driver += "printf '%s|' \"${COMPREPLY[@]}\"; complete -p sasa-data"
    process = subprocess.run(["bash", "--norc", "-c", driver], capture_output=True, text=True, check=True)
    words = "".join(f"hybrid_resnet{depth}|" for depth in (26, 38, 50))
    assert process.stdout.replace(" |", "|").startswith(words) and "_sasa_train sasa-data" in process.stdout


@needs("fish")
def test_fish_completes(folder):
    driver = f"{completion_script('fish')}\ncomplete -C 'sasa-train trainer.ep'; complete -C 'sasa-report outputs/fi'"
    out = subprocess.run(["fish", "--no-config", "-c", driver], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[0].startswith("trainer.epochs=\tpasses over") and "outputs/first run:1/" in out


@needs("zsh")
def test_zsh_completes(folder):
    """Check zsh completion in a pseudo-terminal, which zsh requires."""
    (folder / "completion.zsh").write_text(completion_script("zsh"))
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe("zsh", ["zsh", "-f", "-i"], os.environ | {"TERM": "dumb", "HOME": str(folder)})
    try:
        os.write(terminal, b"source ./completion.zsh; print rea''dy\n")
        wait_for(terminal, "ready")
        os.write(terminal, b"sasa-train trainer.ep\t")
        wait_for(terminal, "trainer.epochs=")
        os.write(terminal, b"3 model=tim\t")
        wait_for(terminal, "model=timm ")
        os.write(terminal, b"\x15sasa-report outputs/fi\t")
        wait_for(terminal, r"outputs/first\ run:1/")
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def wait_for(terminal: int, text: str, seconds: float = 60) -> None:
    shown, deadline = "", time.monotonic() + seconds
    while text not in shown:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {shown!r}"
        shown += os.read(terminal, 65536).decode(errors="replace")


@pytest.mark.parametrize("arguments", [["sweep", "--help"], ["summary", "--help"]])
def test_a_reader_that_went_away_is_no_error_in_the_code(arguments):
    """Check that `sasa-sweep --help | head` does not end in a traceback."""
    command = [sys.executable, "-m", "sasa_train", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait()


def test_errors_that_libraries_chain_in_a_cycle_have_an_end():
    """With OC_CAUSE=1, OmegaConf raises an error from itself."""
    error, refused = OSError(errno.EIO, "Input/output error"), ConfigError("x: cannot be read")
    error.__cause__, refused.__cause__ = refused, error
    assert list(causes(refused)) == [refused, error] and is_of_disk(refused) and not is_interrupt(refused)


@pytest.mark.parametrize("cleanup", ["whole", "half-way"])
def test_ctrl_c_is_said_in_a_word(capsys, cleanup):
    def run_command(arguments: list[str]) -> int:
        try:
            raise KeyboardInterrupt
        finally:
            if cleanup == "half-way":  # as of a library that was cut short while it built an object
                raise AttributeError("'NoneType' object has no attribute 'flags'")

    with pytest.raises(SystemExit) as ended:
        end_command(run_command)
    assert ended.value.code == 1 and capsys.readouterr().err.endswith(": stopped\n")
