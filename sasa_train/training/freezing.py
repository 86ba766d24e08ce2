"""Train a part of the model only (`trainer.train_only`); the rest keeps its weights and its batch norms' statistics."""

from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from sasa_train.refusal import ConfigError
from sasa_train.terminal import some
from sasa_train.training.evaluation import batch_norms

CLASSIFIER = "classifier"  # stands for the model's head, whatever its parameters are called


def freeze(model: nn.Module, patterns: Sequence[str] | None) -> None:
    """Leave gradients to the parameters that the patterns choose; None trains all.

    A pattern is the name of a parameter or of a module, with `*` and `?` as in a shell, or `classifier`.

    Raises:
        ConfigError: a pattern chooses no parameter.
    """
    if patterns is None:
        return
    names = [name for name, _ in model.named_parameters()]
    of_head = _names_of_head(model)
    for pattern in patterns:
        if not (pattern == CLASSIFIER and of_head) and not any(_matches(name, pattern) for name in names):
            raise _matches_nothing(model, pattern, names)
    for name, parameter in model.named_parameters():
        is_trained = any(_matches(name, pattern) for pattern in patterns) or (
            CLASSIFIER in patterns and name in of_head
        )
        parameter.requires_grad_(is_trained)
    norms = {id(norm) for norm in batch_norms(model)}
    for name, module in model.named_modules():
        if id(module) in norms:
            module.is_frozen = not any(_matches(f"{name}.weight", pattern) for pattern in patterns)


def set_to_train(model: nn.Module) -> nn.Module:
    """Put a model in training mode, except its frozen batch norms; return it."""
    model.train()
    for norm in batch_norms(model):
        if getattr(norm, "is_frozen", False):
            norm.eval()
    return model


def describe_trained(model: nn.Module) -> str:
    """Format what is trained of a model: "12,300 of 528,734 parameters: fc.weight and fc.bias"; "" if all of it is."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    count = sum(number for _, number in trained)
    return "" if count == total else f"{count:,} of {total:,} parameters: {some([name for name, _ in trained])}"


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _names_of_head(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the model's classifier; distilled models have two."""
    if not hasattr(model, "get_classifier"):
        return set()
    head = model.get_classifier()  # type: ignore[operator]
    parts = {id(p) for each in (head if isinstance(head, tuple) else (head,)) for p in each.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parts}


def _matches_nothing(model: nn.Module, pattern: str, names: list[str]) -> ConfigError:
    known = {name.rpartition(".")[0] for name in names} | set(names) | {CLASSIFIER}
    close = get_close_matches(pattern.rstrip("*."), sorted(known), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    if pattern == CLASSIFIER:
        hint = f"{type(model).__name__} has no get_classifier(). "
    parts = some([name for name, part in model.named_children() if any(True for _ in part.parameters())])
    wrong = f"trainer.train_only: {pattern} is no parameter or module of the model"
    return ConfigError(f"{wrong}; {hint}Its parts: {parts}")
