"""Shared fixtures: a folder of images, and helpers that run the commands as users do."""

import gc
import importlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Set before Triton is imported, which the package does, so that its kernels can be tested without a GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The total number of threads, here and in started processes, equals the number of processors; more would only wait.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    num_threads = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))

pytest.register_assert_rewrite(
    "attention_cases",
    "making_data",
    "measuring_text",
    "reading_runs",
    "running_commands",
    "screens",
    "stem_cases",
)

Command = Callable[..., subprocess.CompletedProcess]


# The first files to begin: at the end of a run, they would keep one process busy while the others wait.
LONG = {
    f"test_{name}.py"
    for name in (
        "attention_triton", "commands", "distributed", "docs", "gpu_check", "kernel_counts", "reliability", "slurm",
        "sweep", "timm_models",
    )
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the millions of objects that the imports made, as `load_torch` does."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_signal_handlers() -> Iterator[None]:
    """Put the handlers of signals back after each test, so that one that stops a run changes nothing for the next."""
    from sasa_train.signals import SIGNALS

    # A command's --help lets SIGPIPE end the process, as a server's broken connection would from then on.
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGPIPE)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Return a function: command("train", "key=value", ...) runs `python -m sasa_train.train` in an empty folder."""

    def run(module: str, *arguments: str, expect: int = 0):
        process = subprocess.run(
            [sys.executable, "-m", f"sasa_train.{module}", *arguments],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert process.returncode == expect, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

    return run


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread, as `command` and `start` do, because the number of threads affects the order of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_thread) -> Command:
    """Return a function like `command` that runs in this process, to save the seconds that importing torch takes.

    here: the folder, within tmp_path, in which the command runs.
    """

    def run(module: str, *arguments: str, expect: int = 0, here: str = ""):
        monkeypatch.chdir(tmp_path / here)
        monkeypatch.setattr(sys, "argv", [module, *arguments])  # used in messages
        capsys.readouterr()
        code = importlib.import_module(f"sasa_train.{module}").run_command(list(arguments))
        out, err = capsys.readouterr()
        assert code == expect, f"exit {code}\n{out}\n{err}"
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Return a function that writes NAME.py in the empty working directory; its import is undone after the test."""
    from sasa_train.config import own_code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, empty in (("_named", set()), ("_imported", {}), ("_given", {})):
        monkeypatch.setattr(own_code, name, empty)
    names = []

    def write(name: str, source: str) -> Path:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        importlib.invalidate_caches()
        return tmp_path / f"{name}.py"

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Create an image folder of 19 x 17 PNG images: 11 blue and 7 red ones in train, 3 blue and 5 red ones in val."""
    from making_data import make_image_folder

    return make_image_folder(tmp_path / "images")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """Return a finished run with a moving average and attention in the stem and stages; copy it before changing it."""
    from running_commands import TINY

    from sasa_train import train

    folder = tmp_path_factory.mktemp("tiny_run")
    assert train.run_command([*TINY, f"output_dir={folder}", "run_name=tiny", "trainer.ema_decay=0.5"]) == 0
    return folder / "tiny"
