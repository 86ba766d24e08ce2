"""Check `train_model`, which trains in the caller's process as the command does in its own."""

import errno
import json
import os
import re
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
from marking import slow_but_for
from nbclient import NotebookClient
from reading_runs import assert_same_run, last
from torch import nn

import sasa_train
from sasa_train import files
from sasa_train.config import own_code
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.training import loop
from sasa_train.training.hooks import OwnCodeError

SMALL = (
    "data=digits", "data.max_train_images=70", "data.max_val_images=30", "trainer.global_batch_size=16",
    "trainer.epochs=2", "trainer.log_every_steps=2", "output_dir=out",
)  # fmt: skip
NETS = """
    from torch import nn

    class Net(nn.Sequential):
        def __init__(self, num_classes, width=16):
            body = nn.Flatten(), nn.Linear(192, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3)
            super().__init__(*body, nn.Linear(width, num_classes))
"""


@pytest.fixture
def nets(own_module, one_thread):
    own_module("own_nets", NETS)
    sys.path.append(".")
    import own_nets

    return own_nets


def test_a_class_trains_as_by_the_command(nets, in_process):
    """The run folder, and so the resumption, are the same; only the process is another."""
    in_process("train", *SMALL, "model.target=own_nets.Net", "run_name=command")
    torch.manual_seed(7)
    expected, before = torch.rand(3), {number: signal.getsignal(number) for number in signal.valid_signals()}
    torch.manual_seed(7)
    run = sasa_train.train_model([*SMALL, "run_name=python"], model=nets.Net)
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers have changed"
    assert {number: signal.getsignal(number) for number in before} == before
    assert run.finished and run.path == Path("out/python")
    assert_same_run(run.path, Path("out/command"))
    assert run.metrics == [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert run.best == last(run.path)["best"]
    assert len(run.load().classes) == 10 and not run.load().model.training
    in_process("evaluate", str(run.path), "imports=[own_nets]")  # the other commands know the class, too


def test_a_module_begins_with_its_own_weights_and_is_not_changed(nets, monkeypatch):
    """The copy that is trained is kept under a name of its own, so that another module is another run."""
    torch.manual_seed(3)
    module, begun = nets.Net(10, width=8), []
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def note(event, view):
        if event == "start":
            begun.append({name: tensor.clone() for name, tensor in view.model.state_dict().items()})

    run = sasa_train.train_model([*SMALL, "trainer.max_steps=4"], model=module, hooks=[note])
    for name, tensor in before.items():
        assert torch.equal(begun[0][name], tensor) and torch.equal(module.state_dict()[name], tensor)
    trained = run.load().model.state_dict()
    assert not torch.equal(trained["1.weight"], before["1.weight"])
    again = sasa_train.train_model([*SMALL, "trainer.max_steps=4"], model=module, hooks=[note])
    assert again == run and len(begun) == 1  # it was found finished
    other = sasa_train.train_model([*SMALL, "trainer.max_steps=4"], model=nets.Net(10, width=8))
    assert other.path != run.path
    monkeypatch.setattr(own_code, "_given", {})  # as in another process
    with pytest.raises(ConfigError, match="needs objects that a Python program has passed to train_model .given.Net_"):
        sasa_train.load_trained(run.path)


def test_functions_with_the_same_name_are_told_apart_by_what_they_build(nets):
    """In a notebook, all are called <lambda>; the second must not find the first one's run."""
    paths = {
        sasa_train.train_model([*SMALL, "trainer.max_steps=1"], model=build).path
        for build in (lambda n: nets.Net(n), lambda n: nets.Net(n, width=8), partial(nets.Net, width=8))
    }
    assert len(paths) == 3


def test_a_preset_with_keys_for_its_own_model_takes_another(nets):
    run = sasa_train.train_model(["experiment=debug", "output_dir=out"], model=nets.Net)
    assert run.finished and [row["step"] for row in run.metrics] == [1, 2, 2]


@pytest.fixture
def ctrl_c():
    """Handle SIGINT as Python does, also where a script has started the tests in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("ending", slow_but_for(["interrupt"], ["stop", "interrupt", "failure"]))
def test_the_same_call_continues_a_run(ending, nets, ctrl_c):
    """A notebook's interrupt saves the run before it raises; a second call goes on as if undisturbed."""

    def end(event, view):
        if (event, view.step) == ("step", 4) and ending == "stop":
            return "stop"
        if (event, view.step) == ("step", 4) and ending == "interrupt":
            signal.raise_signal(signal.SIGINT)
        if (event, view.step) == ("step", 4):
            assert ending != "failure", "the hook's own reason"
        return None

    whole = sasa_train.train_model([*SMALL, "run_name=whole"], model=nets.Net)
    before = signal.getsignal(signal.SIGINT)
    cut = partial(sasa_train.train_model, [*SMALL, "run_name=cut"], model=nets.Net)
    if ending == "stop":
        stopped = cut(hooks=[end])
        assert not stopped.finished and stopped.path == Path("out/cut") and stopped.metrics[-1]["step"] == 4
    else:
        error, text = (KeyboardInterrupt, None) if ending == "interrupt" else (OwnCodeError, "the hook's own reason")
        with pytest.raises(error, match=text):
            cut(hooks=[end])
    assert signal.getsignal(signal.SIGINT) is before
    assert 4 <= last(Path("out/cut"))["step"] <= 5
    assert cut().finished
    assert_same_run(Path("out/cut"), whole.path)


def test_the_best_is_the_one_that_was_kept(nets, monkeypatch):
    """With a full disk at its save, the best evaluation's model is gone, and `best` named it all the same."""
    write = Checkpoints._write

    def fails(checkpoints, content, is_best):
        if is_best and content["evaluated_step"] == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(checkpoints, content, is_best)

    top1s, real = iter((20.0, 50.0, 30.0)), loop.Loop.evaluate_model

    def evaluate_model(self, model):
        result = real(self, model)
        result.top1 = next(top1s)
        return result

    monkeypatch.setattr(Checkpoints, "_write", fails)
    monkeypatch.setattr(loop.Loop, "evaluate_model", evaluate_model)
    run = sasa_train.train_model([*SMALL, "trainer.epochs=3", "trainer.on_failed_save=continue"], model=nets.Net)
    assert max(row["top1"] for row in run.metrics if row["split"] == "val") == 50.0
    assert run.best["top1"] == 30.0 == run.load().checkpoint["best"]["top1"]


def test_a_second_thread_is_kept_out_of_the_folder(nets):
    """A lock of POSIX's does not keep a process from its own files."""
    refused = []

    def also(event, view):
        if event == "start":
            try:
                sasa_train.train_model([*SMALL, "run_name=one"], model=nets.Net)
            except ConfigError as error:
                refused.append(str(error))

    assert sasa_train.train_model([*SMALL, "run_name=one"], model=nets.Net, hooks=[also]).finished
    assert refused == ["out/one is in use by this very process; wait for it, or use another run_name"]


def test_a_full_disk_at_the_lock_file_leaves_the_folder_free(nets, monkeypatch):
    """After a user of a notebook had made room, the folder counted as in use by the process itself."""

    def full() -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "now", full)
        sasa_train.train_model([*SMALL, "run_name=one"], model=nets.Net)
    assert sasa_train.train_model([*SMALL, "run_name=one"], model=nets.Net).finished


def test_it_trains_in_a_thread(nets):
    """Python takes signal handlers in its main thread alone."""
    found = []
    train = lambda: found.append(sasa_train.train_model([*SMALL, "trainer.max_steps=1"], model=nets.Net))  # noqa: E731
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found[0].finished


WRONG = {
    "key": ({"overrides": ["trainer.epoch=3"]}, "did you mean trainer.epochs"),
    "text": ({"overrides": "seed=1"}, "overrides='seed=1' must be a list of texts"),
    "name": ({"model": "own_nets.Net"}, "model=own_nets.Net must be a torch.nn.Module or a function of num_classes"),
    "both": (
        {"overrides": ["model=timm"], "model": nn.Identity()},
        "model and model in the overrides exclude each other",
    ),
    "none": ({"model": lambda n: n}, "model: must return a torch.nn.Module, but returned int"),
    "fails": ({"model": lambda n: 1 / 0}, r"model: .*test_train_model.py:\d+ in <lambda>: ZeroDivisionError"),
    "outputs": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 7))}, "model.num_classes=7"),
    "shape": ({"model": nn.Sequential(nn.Linear(8, 5))}, r"must return logits .*, but returned \[1, 3, 8, 5\]"),
    "images": ({"model": nn.Linear(5, 5)}, "model, on an image of 8 pixels: .*RuntimeError"),
    "hooks": ({"hooks": [3]}, r"hooks=\[3\] must be a list of functions"),
    "hook": ({"hooks": [lambda event: None]}, "must take two arguments, event and view"),
    "val_set": ({"val_set": [1]}, "val_set needs train_set"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_and_leave_no_folder(name, nets):
    arguments, message = WRONG[name]
    overrides = arguments.get("overrides", [])
    overrides = overrides if isinstance(overrides, str) else [*SMALL, *overrides]
    with pytest.raises(ConfigError, match=message):
        sasa_train.train_model(**(arguments | {"overrides": overrides}))
    assert not Path("out").exists()


NOTEBOOK = Path(__file__).parents[1] / "examples/notebooks/attention_vs_convolution.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_plots(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "strip its outputs"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    said = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "step 11/176  epoch 1  loss " in said  # the progress, without a terminal
    top1 = dict(re.findall(r"^(convolution|attention) +(.*) % after the last epoch", said, re.MULTILINE))
    assert len(top1) == 2 and min(map(float, top1.values())) > 80
    assert not any("WARNING" in output.get("text", "") for output in outputs if output.get("name") == "stderr")
