"""Check training losses against known values, including losses for mixed labels."""

import math

import pytest
import torch
from timm.loss import BinaryCrossEntropy
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.training.step import build_criterion


def criterion(*overrides: str):
    return build_criterion(compose_config(list(overrides)).trainer, torch.device("cpu"))


def test_cross_entropy_with_smoothing_by_hand():
    """Logits (0, ln 3) give probabilities 1/4 and 3/4; smoothing of 0.2 turns the label into (0.1, 0.9)."""
    loss = criterion("trainer.label_smoothing=0.2")(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    assert loss.item() == pytest.approx(-0.1 * math.log(0.25) - 0.9 * math.log(0.75))


def test_bce_by_hand_and_as_timms():
    """Logits (0, ln 3) give sigmoids 1/2 and 3/4; without smoothing, the label is (0, 1)."""
    loss = criterion("trainer.loss=bce")(torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
    assert loss.item() == pytest.approx((-math.log(0.5) - math.log(0.75)) / 2)
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5), torch.randint(0, 5, (7,))
    ours = criterion("trainer.loss=bce", "trainer.label_smoothing=0.1")(logits, labels)
    torch.testing.assert_close(ours, BinaryCrossEntropy(smoothing=0.1)(logits, labels))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_mixed_labels_cost_the_mixture_of_their_losses(loss):
    """Both losses are linear in the label, even with smoothing: a mixture of labels must give the mixture of losses."""
    torch.manual_seed(0)
    logits, one, other = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.randint(0, 5, (6,))
    build = criterion(f"trainer.loss={loss}", "trainer.label_smoothing=0.1")
    mixed = 0.3 * nn.functional.one_hot(one, 5) + 0.7 * nn.functional.one_hot(other, 5)
    torch.testing.assert_close(build(logits, mixed), 0.3 * build(logits, one) + 0.7 * build(logits, other))
