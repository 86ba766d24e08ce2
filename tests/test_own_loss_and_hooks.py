"""Check losses and hooks of the user's own, and what is printed where they fail."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from making_data import CPU
from marking import slow_but_for
from reading_runs import assert_same_run, last, rows
from running_commands import TINY, launch
from taking_steps import batches, setup, weights
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.device import RunPlan
from sasa_train.refusal import ConfigError
from sasa_train.runs.info import has_finished
from sasa_train.runs.ledger import Job
from sasa_train.sweep.scheduler import finish
from sasa_train.training.own_loss import check_loss
from sasa_train.training.step import Stepper

LOSSES = """
    import torch
    from torch import nn

    def smooth(logits, labels):
        assert logits.dtype == torch.float32
        if labels.ndim == 1:
            labels = nn.functional.one_hot(labels, logits.shape[1]).float()
        return -(logits.log_softmax(1) * labels).sum(1).mean()

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(10))

        def forward(self, logits, labels):
            return nn.functional.cross_entropy(logits, labels, self.weight)

    class Learned(Weighted):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

    class Counting(Weighted):
        def forward(self, logits, labels):
            self.weight += 1
            return super().forward(logits, labels)

    def not_reduced(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    def detached(logits, labels):
        return smooth(logits, labels).detach()

    def a_number(logits, labels):
        return smooth(logits, labels).item()

    def infinite(logits, labels):
        return smooth(logits, labels) / 0

    def constant(logits, labels):
        return torch.ones((), requires_grad=True)

    def of_hard_labels(logits, labels):
        return logits.gather(1, labels[:, None]).neg().mean()

    calls = []

    def fails_later(logits, labels):
        calls.append(len(logits))
        if len(calls) > 3:
            raise ArithmeticError("the fourth call")
        return smooth(logits, labels)

    def changes_its_mind(logits, labels):
        calls.append(len(logits))
        return smooth(logits, labels) if len(calls) < 4 else not_reduced(logits, labels)
"""
RULE = "must return a finite scalar tensor with a gradient, the mean over the images"
REFUSED = {
    "not_reduced": f"on int64 labels [8]: {RULE}, but returned float32 [8] with a gradient",
    "detached": f"on int64 labels [8]: {RULE}, but returned float32 [] without a gradient",
    "a_number": f"on int64 labels [8]: {RULE}, but returned float",
    "infinite": f"on int64 labels [8]: {RULE}, but returned inf",
    "constant": f"on int64 labels [8]: {RULE}, but no gradient reaches the logits",
    "Learned": "=scale must have no parameters, which would be neither trained nor saved",
    "Counting": "must not change its buffers, which checkpoints do not contain",
    "smoth": "smoth is not in {file}; did you mean own_losses.smooth?",
    "of_hard_labels": "on mixed float32 labels [8, 10]: {file}:45 in of_hard_labels: RuntimeError: ",
    "Weighted.forward": "there is no module own_losses.Weighted in the working directory",
}


def loss_of(*overrides: str) -> Stepper:
    """Return a stepper after three steps, one of them with mixed labels."""
    stepper, given = setup(*overrides), list(batches(3))
    given[1] = given[1][0], nn.functional.one_hot(given[1][1], 3).float() * 0.7 + 0.1
    for batch in given:
        stepper.train_step(iter([batch]))
    return stepper


def test_a_loss_of_ones_own_trains_as_the_same_loss_by_name(own_module):
    own_module("own_losses", LOSSES.replace("torch.ones(10)", "torch.ones(3)"))
    by_name = loss_of()
    for name in ("smooth", "Weighted"):
        own = loss_of(f"trainer.loss_target=own_losses.{name}")
        torch.testing.assert_close(weights(own), weights(by_name), rtol=1e-4, atol=1e-6)
        assert own.state.window.averages() == pytest.approx(by_name.state.window.averages())
        by_name = loss_of()
    assert not torch.allclose(weights(loss_of("trainer.loss=bce")), weights(by_name), rtol=1e-2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_is_none_is_refused(name, own_module):
    """A run would otherwise fail, or train on nonsense, after its images have been read."""
    file = own_module("own_losses", LOSSES)
    mixing = ["augment.mixup=0.2"] if name == "of_hard_labels" else []
    config = compose_config([*TINY, f"trainer.loss_target=own_losses.{name}", *mixing])
    with pytest.raises(ConfigError) as caught:
        check_loss(RunPlan(config, CPU), num_classes=10)
    told = str(caught.value)
    assert told.startswith(f"trainer.loss_target=own_losses.{name}")
    assert REFUSED[name].format(file=file) in told


def test_it_is_refused_before_any_image_is_read(own_module, in_process, tmp_path):
    own_module("own_losses", LOSSES)
    told = in_process("train", *TINY, "trainer.loss_target=own_losses.not_reduced", expect=2).stderr
    assert REFUSED["not_reduced"] in told and not (tmp_path / "out").exists()


# Twelve steps of a small network with dropout, so that random numbers matter.
MINI = (
    "model.target=own_hooks.Net", "data=digits", "data.max_train_images=70", "data.max_val_images=30",
    "trainer.global_batch_size=16", "trainer.epochs=3", "trainer.log_every_steps=2", "trainer.ema_decay=0.5",
    "trainer.checkpoint_every_steps=2", "trainer.keep_checkpoints=9", "output_dir=out", "run_name=own",
)  # fmt: skip
HOOKS = """
    import json
    import os

    import torch
    from torch import nn

    class Net(nn.Sequential):
        def __init__(self, num_classes):
            body = nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)
            super().__init__(*body, nn.Linear(16, num_classes))

        def forward(self, images):
            fail_at = os.environ.get("FAIL_AT")
            if self.training and (fail_at == "training" or (fail_at == "real images" and not images.is_meta)):
                images = images @ torch.zeros(3, 3)
            return super().forward(images)

    seen = []

    def look(event, view):
        seen.append((event, view.step, view.epoch, view.finished))
        torch.rand(7)
        torch.manual_seed(99)
        assert not view.model.training and not torch.is_grad_enabled()
        shape = 1, 3, view.config["data.image_size"] or 8, 8
        assert view.model(torch.rand(shape)).shape == (1, 10)
        view.model.train()

    def keep(event, view):
        with open("events.txt", "a") as file:
            train, val = (row and (row["step"], row["loss"]) for row in (view.train, view.val))
            best = view.best and dict(view.best)
            print(json.dumps([event, view.step, view.epoch, view.finished, train, val, best]), file=file)
        assert str(view.path) == "out/own" and view.num_steps == 12 and view.config["trainer.epochs"] == 3

    def stop_at_start(event, view):
        return "stop" if event == "start" else None

    def stop_at_step(event, view):
        return "stop" if event == "step" and view.step in (2, 6) else None

    def stop_when_evaluated(event, view):
        return "stop" if event == "evaluated" else None

    def stop_when_saved(event, view):
        return "stop" if event == "saved" and view.step >= 4 else None

    def number(event, view):
        return 3 if event == "step" else None

    def fails(event, view):
        check(event, view)

    def check(event, view):
        if event == os.environ.get("FAIL_AT", "step"):
            raise LookupError(f"no such thing at {view.step}")

    def exits(event, view):
        if event == "evaluated":
            raise SystemExit(0)

    def writes(event, view):
        if event == "step" and view.step == 6:
            with torch.no_grad():
                next(view.model.parameters()).mul_(2)

    def assigns(event, view):
        view.config["seed"] = 3

    def one_argument(event):
        pass

    class Kept:
        def __call__(self, event, view):
            seen.append(event)

    kept = Kept()
"""


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """The run without hooks, once it has been made."""
    return {}


@pytest.fixture
def reference(made, trained, tmp_path_factory) -> Path:
    """Return the run of MINI without hooks."""
    if not made:
        folder = tmp_path_factory.mktemp("reference")
        trained(f"output_dir={folder}", "run_name=reference")
        made["run"] = folder / "reference"
    return made["run"]


@pytest.fixture
def trained(own_module, in_process, monkeypatch):
    """Return a function that trains MINI with overrides and returns what was printed."""
    own_module("own_hooks", HOOKS)

    def train(*overrides: str, expect: int = 0, fail_at: str = ""):
        monkeypatch.setenv("FAIL_AT", fail_at)
        return in_process("train", *MINI, *overrides, expect=expect)

    return train


def status(run: Path) -> tuple[str, str | None]:
    info = json.loads((run / "run.json").read_text())
    return info["status"], info["reason"]


def test_hooks_see_every_event_and_change_nothing(trained, reference, tmp_path):
    """Hooks that draw random numbers, run the model and set its mode leave the run bit-identical."""
    trained("hooks=[own_hooks.look,own_hooks.keep,own_hooks.kept]")
    assert_same_run(tmp_path / "out/own", reference)
    assert status(tmp_path / "out/own") == ("finished", None)
    seen = [json.loads(line) for line in (tmp_path / "events.txt").read_text().splitlines()]
    assert [(event, step) for event, step, *_ in seen] == [
        ("start", 0), ("step", 2), ("saved", 2), ("step", 4), ("saved", 4), ("evaluated", 4), ("saved", 4),
        ("step", 6), ("saved", 6), ("step", 8), ("saved", 8), ("evaluated", 8), ("saved", 8),
        ("step", 10), ("saved", 10), ("step", 12), ("saved", 12), ("evaluated", 12), ("saved", 12), ("end", 12),
    ]  # fmt: skip
    found = rows(tmp_path / "out/own")
    val = {row["step"]: row for row in found if row["split"] == "val"}
    assert seen[0] == ["start", 0, 0, False, None, None, None]
    first = next(one for one in seen if one[0] == "evaluated")
    train = next(row for row in found if row["split"] == "train" and row["step"] == 4)
    best = {"top1": val[4]["top1"], "step": 4, "epoch": 1}
    assert first == ["evaluated", 4, 1, False, [4, train["loss"]], [4, val[4]["loss"]], best]
    assert seen[-1][:4] == ["end", 12, 3, True] and seen[-1][5] == [12, val[12]["loss"]]
    imported = sys.modules["own_hooks"].seen
    assert [one for one in imported if isinstance(one, str)] == [event for event, *_ in seen]


STOPS = {  # the steps at which the command ends, given again and again
    "stop_at_start": [0, 0],
    "stop_at_step": [2, 6, 12],
    "stop_when_evaluated": [4, 8, 12],
    "stop_when_saved": [4, 4, 6, 8, 8, 10, 12],
}


@pytest.mark.parametrize("name", slow_but_for(["stop_when_evaluated"], STOPS))
def test_a_hook_stops_a_run_which_the_same_command_continues(name, trained, reference, tmp_path):
    run = tmp_path / "out/own"
    for step in STOPS[name]:
        told = trained(f"hooks=own_hooks.{name}").stdout
        if (step, last(run)["finished"]) == (12, True):
            break
        reason = f'hooks=own_hooks.{name} at "{name.rpartition("_")[2]}"'
        assert last(run)["step"] == step and status(run) == ("stopped", reason)
        assert f"{reason}: saved at step {step}; to continue: the same command again" in told
    trained()
    assert status(run) == ("finished", None)
    assert_same_run(run, reference)


FAILURES = {"start": None, "step": 2, "evaluated": 4, "saved": 2, "end": 12}  # the step that is saved then


@pytest.mark.parametrize("event", slow_but_for(["evaluated"], FAILURES))
def test_the_failure_of_a_hook_ends_the_run_after_it_is_saved(event, trained, reference, tmp_path):
    run = tmp_path / "out/own"
    done = trained("hooks=own_hooks.fails", expect=1, fail_at=event)
    step = FAILURES[event] or 0
    lines = done.stderr.splitlines()
    assert lines[0] == f'train: hooks=own_hooks.fails at "{event}": your own code failed:'
    assert lines[1].startswith(f'  File "{tmp_path}/own_hooks.py", line ') and lines[1].endswith("in fails")
    assert lines[-1] == f"LookupError: no such thing at {step}" and len(lines) < 10
    assert last(run)["step"] == step and status(run) == ("failed", None)
    assert f"a checkpoint of step {step} is saved" in done.stdout
    trained()
    assert status(run)[0] == "finished"
    assert_same_run(run, reference)


WRONG = {
    "number": ('hooks=own_hooks.number at "step": must return None or "stop", but returned 3', 2),
    "exits": ('hooks=own_hooks.exits at "evaluated": your own code failed:\n', 4),
    "assigns": ("TypeError: 'mappingproxy' object does not support item assignment", 0),
    "writes": ('hooks=own_hooks.writes at "step": has changed the weights or buffers of view.model', 4),
}


@pytest.mark.parametrize("name", slow_but_for(["writes"], WRONG))
def test_what_a_hook_must_not_do_ends_the_run(name, trained, reference, tmp_path):
    """A checkpoint with weights that a hook has changed is never written."""
    message, step = WRONG[name]
    assert message in trained(f"hooks=own_hooks.{name}", expect=1).stderr
    assert last(tmp_path / "out/own")["step"] == step
    trained()
    assert_same_run(tmp_path / "out/own", reference)


REFUSED_HOOKS = {
    "one_argument": "must take two arguments, event and view (too many positional arguments)",
    "Kept": "is a class; name a function, or an object of the class",
    "loook": "loook is not in",
}


@pytest.mark.parametrize("name", slow_but_for(["one_argument"], REFUSED_HOOKS))
def test_what_is_no_hook_is_refused_before_any_image_is_read(name, own_module, in_process, tmp_path):
    own_module("own_hooks", HOOKS)
    told = in_process("train", *MINI, f"hooks=own_hooks.{name}", expect=2).stderr
    assert f"hooks=own_hooks.{name}: {REFUSED_HOOKS[name]}" in told and not (tmp_path / "out").exists()


def test_errors_of_a_model_or_a_loss_show_the_users_lines(trained, reference, own_module, tmp_path):
    file = own_module("own_losses", LOSSES)
    told = trained("trainer.loss_target=own_losses.fails_later", "run_name=loss", expect=1).stderr.splitlines()
    assert told[0] == "train: your own code failed:"
    assert told[1].startswith(f'  File "{file}", line ') and told[-1] == "ArithmeticError: the fourth call"
    assert len(told) == 4 and status(tmp_path / "out/loss") == ("failed", None)
    told = trained("run_name=no", expect=2, fail_at="training").stderr
    assert f"model.target=own_hooks.Net on micro-batches of 16 images of 8 pixels: {tmp_path}/own_hooks.py:" in told
    told = trained(expect=1, fail_at="real images").stderr.splitlines()
    assert told[0] == "train: your own code failed:" and told[1].endswith("in forward")
    assert told[-1].startswith("RuntimeError: ") and "sasa_train" not in "".join(told)
    trained()
    assert_same_run(tmp_path / "out/own", reference)
    sys.modules["own_losses"].calls.clear()
    told = trained("trainer.loss_target=own_losses.changes_its_mind", "run_name=mind", expect=1).stderr
    assert f"trainer.loss_target=own_losses.changes_its_mind: {RULE}, but returned float32 [16] with a grad" in told


@pytest.mark.slow
def test_a_run_stopped_by_its_hook_counts_as_done_for_reports_and_sweeps(trained, in_process, tmp_path):
    """Its own code has ended it, so that a sweep neither retries it nor takes it for killed."""
    run = tmp_path / "out/own"
    trained("hooks=own_hooks.stop_when_evaluated")
    assert has_finished(run)
    shutil.copytree(run, tmp_path / "out/other")  # of several runs, the list shows the best
    listed = in_process("report", "--list", "out").stdout
    assert " 1/3 " in listed and "own" in listed and "state" not in listed and "highest  sasa-evaluate" in listed
    (tmp_path / "out/other/checkpoints/last.pt").unlink()
    assert not has_finished(tmp_path / "out/other")
    told = in_process("report", "out/own").stdout
    assert 'done, stopped by hooks=own_hooks.stop_when_evaluated at "evaluated"' in told
    assert "not finished" not in told
    job = Job("own", list(MINI))
    job.begin()
    finish(job, tmp_path / "out", 0, 1.0, 1, "said last")
    assert (job.state, job.last["step"], job.failures_in_a_row()) == ("done", 4, 0)


@pytest.mark.slow
def test_a_sweep_does_not_repeat_jobs_that_their_hooks_stop(own_module, in_process, tmp_path):
    own_module("own_hooks", HOOKS)
    sweep = [*(o for o in MINI if not o.startswith(("run_name", "output_dir"))), "hooks=own_hooks.stop_when_evaluated"]
    for number in range(2):
        told = in_process("sweep", *sweep, "seed=0,1", "sweep.name=own", "sweep.output_dir=out").stdout
        assert "2 done" in told and ("started" in told) == (number == 0)
    jobs = json.loads((tmp_path / "out/own/ledger.json").read_text())["jobs"].values()
    assert [(job["state"], len(job["tries"]), job["last"]["step"]) for job in jobs] == [("done", 1, 4)] * 2


@pytest.mark.slow
def test_two_processes_stop_and_fail_together(own_module, trained, reference, tmp_path):
    """All end with the same exit code; the error is told once, by the first one."""
    stopping = "hooks=[own_hooks.look,own_hooks.stop_when_evaluated]"
    code, told = launch(tmp_path, 2, *MINI, stopping)
    assert code == 0, told
    reason = 'hooks=own_hooks.stop_when_evaluated at "evaluated"'
    assert status(tmp_path / "out/own") == ("stopped", reason) and last(tmp_path / "out/own")["step"] == 4
    assert told.count(f"{reason}: saved at step 4") == 1
    code, told = launch(tmp_path, 2, *MINI, "hooks=own_hooks.fails", "run_name=failed")
    assert code == 1 and told.count("LookupError: no such thing at 2") == 1 and "sasa_train" not in told
    assert last(tmp_path / "out/failed")["step"] == 2 and status(tmp_path / "out/failed")[0] == "failed"
    code, told = launch(tmp_path, 2, *MINI, "run_name=model", FAIL_AT="real images")
    assert code == 1 and "your own code failed:" in told and f'File "{tmp_path}/own_hooks.py", line ' in told
