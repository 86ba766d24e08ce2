"""Train a part of a model only: what changes, what stays to the bit, and what is refused."""

import re

import pytest
import torch
from reading_runs import assert_same_run
from running_commands import TINY, kill_after
from torch import nn

from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import load_checkpoint
from sasa_train.training.freezing import describe_trained, freeze, set_to_train

# A fine-tuning of the tiny run's last stage and classifier, whose moving average follows
FROZEN = [*TINY, "run_name=part", "trainer.train_only=[classifier,layer4]", "trainer.ema_decay=0.5"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))
        self.late = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def get_classifier(self):
        return self.head


def trained(patterns) -> set[str]:
    freeze(net := Net(), patterns)
    return {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_patterns_choose_parameters_by_name_and_modules_with_all_in_them():
    assert trained(["classifier"]) == trained(["head"]) == trained(["head.*"]) == {"head.weight", "head.bias"}
    assert trained(["body.?.weight", "late"]) == {"body.0.weight", "body.1.weight", "late.weight", "late.bias"}
    assert trained(["*.bias"]) == {"body.0.bias", "body.1.bias", "late.bias", "head.bias"}
    assert trained(None) == trained(["*"]) == {name for name, _ in Net().named_parameters()}


def test_batch_norms_of_the_frozen_part_keep_their_statistics():
    """One without parameters of its own counts as what its name is in."""
    freeze(net := Net(), ["late", "head"])
    set_to_train(net)
    norms = [net.body[1], net.body[2], net.late]
    assert [norm.training for norm in norms] == [False, False, True]
    freeze(net, ["body"])
    assert [norm.training for norm in [set_to_train(net).body[1], net.body[2], net.late]] == [True, True, False]


def test_what_is_trained_is_described():
    freeze(net := Net(), ["classifier"])
    assert describe_trained(net) == "10 of 138 parameters: head.weight, head.bias"
    assert describe_trained(Net()) == ""


@pytest.mark.parametrize(
    "pattern,hint",
    [
        ("heads", "heads is no parameter or module of the model; did you mean head? Its parts: body, late, head"),
        ("qqq.*", "qqq.* is no parameter or module of the model; Its parts: body, late, head"),
    ],
)
def test_a_pattern_for_nothing_is_refused_with_the_nearest(pattern, hint):
    with pytest.raises(ConfigError, match=re.escape(f"trainer.train_only: {hint}")):
        freeze(Net(), ["head", pattern])


def test_a_model_without_a_classifier_says_so():
    with pytest.raises(ConfigError, match=r"Sequential has no get_classifier\(\). Its parts: 0"):
        freeze(nn.Sequential(nn.Linear(2, 3)), ["classifier"])


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["trainer.train_only=[]"], "trainer.train_only=[] must name a parameter or a module"),
        (["'trainer.train_only=[\"layer[34]\"]'"], "must hold no brackets"),
        (["trainer.train_only=[fc]", "trainer.bn_recalibration_batches=2"], "trainer.train_only keeps as they are"),
        (["trainer.train_only=[fcc]"], "fcc is no parameter or module of the model; did you mean fc?"),
    ],
)
def test_wrong_values_are_refused_before_images_are_read(in_process, overrides, message):
    said = in_process("train", *TINY, *(text.strip("'") for text in overrides), "data.root=nowhere", expect=2).stderr
    assert message in said


def test_only_that_part_changes(tmp_path, in_process, tiny_run):
    """Weights, statistics and averages of the rest stay to the bit, also with gradient checkpointing."""
    run = [*FROZEN, f"model.pretrained={tiny_run}", "trainer.grad_checkpointing=true"]
    printed = in_process("train", *run).stdout
    assert re.search(r"training    [\d,]+ of 135,700 parameters: layer4", printed)
    before = load_checkpoint(tiny_run / "checkpoints/best.pt")
    after = load_checkpoint(tmp_path / "out/part/checkpoints/last.pt")
    for source in ("model", "ema"):
        changed = {name for name, tensor in after[source].items() if not torch.equal(tensor, before["ema"][name])}
        assert changed and all(name.startswith(("layer4.", "fc.")) for name in changed), source
        assert any("running_mean" in name for name in changed) and {"fc.weight", "fc.bias"} <= changed
    num_trained = sum(name.startswith(("layer4.", "fc.")) for name in before["ema"] if "running" not in name)
    num_trained -= sum(name.startswith("layer4.") and name.endswith("num_batches_tracked") for name in before["ema"])
    assert len(after["optimizer"]["state"]) == num_trained


@pytest.mark.slow
def test_a_killed_run_ends_as_one_never_touched(tmp_path, in_process, tiny_run):
    run = [*FROZEN, f"model.pretrained={tiny_run}", "trainer.epochs=6"]
    in_process("train", *run, "run_name=whole")
    for count in (3, 9):
        kill_after(count, tmp_path / "out/cut", *run, "run_name=cut")
    in_process("train", *run, "run_name=cut")
    assert_same_run(tmp_path / "out/whole", tmp_path / "out/cut")
