"""Check that damaged checkpoints are either refused with an error that names the file, or loaded whole and unaltered.

FUZZ_EXAMPLES=10000 sets the number of attempts, which is lower by default; FUZZ_SEED=1 tries others.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mutating import mutated, nested, with_another_part
from reading_runs import assert_equal_state
from writing_runs import content

from sasa_train.config.compose import compose_config
from sasa_train.config.keys import TrainConfig
from sasa_train.config.saved import load_config
from sasa_train.data.loader import build_loaders
from sasa_train.device import RunPlan, resolve
from sasa_train.export.description import model_card
from sasa_train.refusal import ConfigError
from sasa_train.runs import checkpoint
from sasa_train.runs.checkpoint import CheckpointError, Checkpoints, load_checkpoint, manifest_of
from sasa_train.runs.folder import RunFolder, check_data, check_trajectory, is_finished
from sasa_train.runs.provenance import conditions, describe_changes, provenance
from sasa_train.terminal import duration
from sasa_train.trained import load_trained
from sasa_train.training.announce import describe_finished
from sasa_train.training.log import RunLogger
from sasa_train.training.run import build_model, build_stepper, continue_from
from sasa_train.visualize.curve_figures import steps_per_epoch
from sasa_train.visualize.drawing import read_rows

NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "240"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))


def test_a_mutated_checkpoint_is_refused_or_loaded_whole(tmp_path):
    """Half of the checkpoints have a manifest; the others have none, like a single file received from elsewhere."""
    rng, path = random.Random(SEED), tmp_path / "last.pt"
    original = content(7) | {"ema": {"weight": torch.arange(50.0)}}
    Checkpoints(tmp_path, 0).save(original, is_best=False)
    data, manifest = path.read_bytes(), manifest_of(path).read_bytes()
    original = load_checkpoint(path)
    refused = {True: 0, False: 0}
    for number in range(NUM_EXAMPLES):
        has_manifest = number % 2 == 0
        mutant = mutated(data, rng, [data])
        path.write_bytes(mutant)
        if has_manifest:
            manifest_of(path).write_bytes(manifest if number % 8 else mutated(manifest, rng, [manifest]))
        else:
            manifest_of(path).unlink(missing_ok=True)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            refused[has_manifest] += 1
            continue
        assert mutant == data or not has_manifest, "the manifest's hash is not this file's"
        assert_equal_state(found, original)
    print(f"refused: {refused[True]} of {NUM_EXAMPLES // 2} with a manifest, {refused[False]} without")
    assert refused[False] > NUM_EXAMPLES / 4


CYCLE: list = []
CYCLE.append(CYCLE)
WRONG: list[Any] = [
    None, True, 0, 3, -1, 10**6, 2**53, 2**63, 10**30, 10**5000, 0.0, 1.5, -1e308, float("nan"), float("inf"),
    "", "text", "a\nb", "\x1b[2J", "\ud800", "{}\n", '{"split": "val", "step": 1, "epoch": 1, "top1": NaN}\n',
    [], {}, [None], ["a"], {"weight": 1}, {3: 4}, {"a": {"b": [1]}}, nested(9), nested(300), CYCLE,
    torch.zeros(2), torch.zeros(3, 2, dtype=torch.float64), torch.zeros(16, dtype=torch.uint8), torch.empty(0),
    torch.tensor(float("nan")), torch.tensor(-1), torch.zeros(1).expand(10**9), torch.zeros(2, device="meta"),
    torch.zeros(2, dtype=torch.complex64), torch.eye(2).to_sparse(),
]  # fmt: skip


def test_a_checkpoint_with_other_parts_is_refused_or_has_what_its_readers_expect(tmp_path):
    """One or two parts, at any depth, are replaced, removed or added, as in a file from an untrusted source."""
    rng, val = random.Random(SEED), {"split": "val", "step": 5, "epoch": 1, "top1": 50.0, "seconds": 0.5}
    whole = content(7) | {"best": {"top1": 50.0, "step": 5, "epoch": 1}, "metrics": json.dumps(val) + "\n"}
    whole["evaluated_step"] = 5
    device, resolved = resolve(TrainConfig())
    plan = RunPlan(resolved, device)
    now = provenance(plan.config)[0] | conditions(plan, torch.nn.Identity())
    whole |= {"provenance": now, "optimizer": {"state": {0: {"step": 3}}}}
    whole["optimizer"]["param_groups"] = [{"params": [0], "lr": 0.1}]
    path, num_refused, config = tmp_path / "x.pt", 0, compose_config(["allow_config_change=[data.root]"])
    for number in range(NUM_EXAMPLES):
        changed = with_another_part(whole, rng, WRONG)
        torch.save(with_another_part(changed, rng, WRONG) if number % 4 == 0 else changed, path)
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 1000
            num_refused += 1
            continue
        assert 0 <= found["evaluated_step"] <= found["step"] <= 2**53 and 0 <= found["seconds"] < math.inf
        assert describe_finished(tmp_path, found, TrainConfig()) and duration(found["seconds"])
        json.dumps([found["best"], found["provenance"]])
        describe_changes(found["provenance"], now)
        check_data(found, whole["fingerprint"], config)
        RunLogger(tmp_path, found["metrics"], found["step"], 9, is_silent=True).close()
    print(f"refused: {num_refused} of {NUM_EXAMPLES} with other parts")
    assert NUM_EXAMPLES / 3 < num_refused < NUM_EXAMPLES


@pytest.fixture
def read_everywhere(tiny_run: Path, tmp_path: Path, one_thread) -> Callable[[Path], None]:
    """Return a function that reads a checkpoint of `tiny_run` as the commands do; it raises only expected errors."""
    device, config = resolve(load_config(load_checkpoint(tiny_run / "checkpoints/last.pt")["config"]))
    plan, loaders = RunPlan(config, device), build_loaders(config, device)
    state = build_stepper(plan, build_model(config.model, 10, plan.input_size)).state
    now = provenance(config)[0] | conditions(plan, state.model)

    def read(path: Path) -> None:
        found = load_checkpoint(path)
        check_trajectory(found, config, path)
        is_finished(found, config)
        check_data(found, loaders.fingerprint, config)
        describe_changes(found["provenance"], now)
        trained = load_trained(path)
        trained.changes(loaders.fingerprint["val"])
        model_card(trained).encode(errors="surrogateescape")
        steps_per_epoch(read_rows(trained, None))
        run = RunFolder(tmp_path, None, Checkpoints(tmp_path, 0), found)
        continue_from(run, state, config)
        RunLogger(tmp_path, run.metrics, state.step, 12, is_silent=True).close()
        state.window.averages()

    return read


def test_a_checkpoint_with_other_parts_is_refused_or_read_everywhere(tmp_path, tiny_run, read_everywhere):
    """Half of the changes are inside the optimizer's state, most of which only a step can judge."""
    rng, path, num_examples = random.Random(SEED), tmp_path / "x.pt", NUM_EXAMPLES // 40
    whole, num_refused = load_checkpoint(tiny_run / "checkpoints/last.pt"), 0
    for number in range(num_examples):
        key = rng.choice(sorted(whole)) if number % 2 else "optimizer"
        torch.save(whole | {key: with_another_part(whole[key], rng, WRONG)}, path)
        try:
            read_everywhere(path)
        except (CheckpointError, ConfigError) as error:
            assert len(str(error)) < 5000
            num_refused += 1
    print(f"refused: {num_refused} of {num_examples} of a real run")
    assert num_refused > num_examples / 3
    read_everywhere(tiny_run / "checkpoints/last.pt")  # so it was not the others' fault


def momentum(value: Any) -> dict:
    return {"optimizer": {"state": {0: {"momentum_buffer": value}}}}


def buffer(whole: dict) -> torch.Tensor:
    return whole["optimizer"]["state"][0]["momentum_buffer"]


def without_entry(optimizer: dict) -> dict:
    return optimizer | {"state": {number: entry for number, entry in optimizer["state"].items() if number != 0}}


def with_whole_numbers(tensors: dict) -> dict:
    name = next(name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.is_floating_point())
    return tensors | {name: tensors[name].to(torch.int32)}


def changed(tensors: dict, end: str, factor: float) -> dict:
    name = next(name for name in tensors if name.endswith(end))
    return tensors | {name: tensors[name] * factor}


def test_a_list_without_end_beside_the_parts_of_a_checkpoint_is_refused(tmp_path, monkeypatch):
    """What no reader asks for is not in the schema, and was followed for ever."""
    monkeypatch.setattr(checkpoint, "MAX_PARTS", 10**4)  # fewer, as they take seconds
    again: list = []
    for _ in range(60):
        again = [again, again]
    for without_end in (CYCLE, again):
        part = {"rng": content(7)["rng"] | {"more": without_end}}
        torch.save(content(7) | part, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match="x.pt: is not a checkpoint of sasa_train .it has more than"):
            load_checkpoint(tmp_path / "x.pt")


def rows_of(whole: dict, *more: dict) -> str:
    """Return a checkpoint's metrics without those of the last step, and with more rows."""
    rows = [row for row in map(json.loads, whole["metrics"].splitlines()) if row["step"] < whole["step"]]
    return "".join(json.dumps(row) + "\n" for row in [*rows, *more])


@pytest.mark.parametrize(
    "wrong,code,reason",
    [
        (lambda _: {"step": 10**6}, 2, "the checkpoint's step=1,000,000 must be at most 12"),
        (lambda _: {"step": -5}, 1, "is not a checkpoint of sasa_train (step=-5 must be a whole number from 0)"),
        (lambda _: momentum(torch.zeros(3)), 2, "the checkpoint does not fit this model or optimizer"),
        (lambda _: momentum("text"), 2, "the checkpoint does not fit this model or optimizer"),
        (lambda whole: momentum(buffer(whole).to(torch.int64)), 2, "[0].momentum_buffer has whole numbers [4, 8], and"),
        (lambda whole: momentum(buffer(whole) / 0), 2, "[0].momentum_buffer is infinite or not a number in places"),
        (lambda whole: {"optimizer": without_entry(whole["optimizer"])}, 2, "optimizer.state has no entry 0, and must"),
        (lambda whole: {"model": with_whole_numbers(whole["model"])}, 2, ".weight is torch.int32, and must be torch.f"),
        (lambda whole: {"ema": with_whole_numbers(whole["ema"])}, 2, "(ema."),
        (lambda _: {"finished": True}, 2, "finished=True needs step=8 and evaluated_step=8 to be 12, the last step"),
        (
            lambda whole: {"window": whole["window"] | {"num_images": 10**6}},
            2,
            "window.num_images=1,000,000 must be 0, the images since the last row (step 8), of its config on 70 images",
        ),
        (lambda whole: {"window": whole["window"] | {"num_images": 7}}, 2, "window.num_images=7 must be 0, the images"),
        (lambda whole: {"ema": None}, 2, "no moving average, and its config trainer.ema_decay=0.5"),
        (lambda whole: {"ema": {}}, 2, "fit this model or optimizer (ema.stem.emb_row is missing, and "),
        (lambda whole: {"model": changed(whole["model"], ".weight", torch.nan)}, 2, "weight is not finite"),
        (lambda whole: {"ema": changed(whole["ema"], ".running_var", -1)}, 2, "running_var has negative variances"),
        (
            lambda whole: {"model": changed(whole["model"], ".num_batches_tracked", -7)},
            2,
            "is a negative number of batch",
        ),
        (
            lambda whole: {"config": whole["config"].replace("width: 0.125", "width: 16")},
            2,
            "has shape [4, 8], and mus",
        ),
        (lambda _: {"step": 7, "evaluated_step": 4}, 1, "metrics has a row of step 8, and step=7 must be the last"),
        (lambda _: {"evaluated_step": 4}, 1, "evaluated_step=4 must be the step of the last val row in metrics"),
        (lambda whole: {"metrics": rows_of(whole)}, 1, "evaluated_step=8 must be the step of the last val row"),
        (lambda whole: {"best": whole["best"] | {"step": 9}}, 1, "best (step 9, top1 "),
        (lambda whole: {"best": whole["best"] | {"top1": 99.5}}, 1, "top1 99.5) must be a val row in metrics"),
        (lambda whole: {"metrics": "", "evaluated_step": 0}, 1, ") must be a val row in metrics"),
        (lambda whole: {"classes": whole["classes"][1:]}, 1, "must be fingerprint.train's names ['0', '1', "),
        (lambda whole: {"classes": whole["classes"][::-1]}, 1, "classes=['9', '8', "),
    ],
)
def test_a_run_does_not_go_on_from_a_checkpoint_that_is_wrong_inside(
    tmp_path, tiny_run, in_process, wrong, code, reason
):
    """What a run can never write is refused, and so is what would fail, or go wrong silently, in the next step."""
    whole = load_checkpoint(tiny_run / "checkpoints/step-00000008.pt")
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        path.unlink()
    changes = wrong(whole)
    if list(changes.get("optimizer", {})) == ["state"]:
        state = whole["optimizer"]["state"] | changes["optimizer"]["state"]
        changes = {"optimizer": whole["optimizer"] | {"state": state}}
    torch.save(whole | changes, folder / "checkpoints/last.pt")
    assert reason in in_process("train", f"resume={folder}", expect=code).stderr


def test_a_run_may_end_earlier_than_its_checkpoint(tmp_path, tiny_run, in_process):
    """A checkpoint may come after the last step of a config whose epochs were reduced on purpose."""
    shutil.copytree(tiny_run, tmp_path / "run")
    shorter = ("resume=run", "trainer.epochs=2", "allow_config_change=[trainer.epochs]")
    assert "8 in all" in in_process("train", *shorter).stdout
    assert "8 in all" in in_process("train", *shorter).stdout


def test_a_run_goes_on_whatever_its_run_json_contains(tmp_path, tiny_run, in_process):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    starts = {"starts": 3, "seconds": math.nan, "more": nested(500), "has_checkpoint": True}
    (folder / "run.json").write_text(json.dumps(starts))
    longer = ("resume=run", "trainer.epochs=4", "allow_config_change=[trainer.epochs]")
    in_process("train", *longer)
    info = json.loads((folder / "run.json").read_text())
    assert len(info["starts"]) == 1 and info["has_checkpoint"] and info["status"] == "finished"
