"""What tells several runs apart: their differing keys, those first that together separate the most runs."""

import functools
import re
from collections import Counter
from typing import Any

import yaml

from sasa_train.config.groups import choices, config_dir
from sasa_train.config.identity import data_name, trajectory
from sasa_train.config.keys import AugmentConfig, TrainConfig
from sasa_train.config.overrides import as_written
from sasa_train.terminal import printable

MAX_NAMED = 3  # a run with one key changed often differs in others that follow from it, and names must fit a legend


def shown_keys(config: TrainConfig) -> dict[str, str]:
    """Return the keys that affect what a run computes, as written, with the preset of its augmentation as `augment`."""
    keys = {key: printable(as_written(value)) for key, value in trajectory(config).items()}
    used = vars(config.augment)
    return keys | {"augment": next((name for name, preset in _presets().items() if preset == used), "own")}


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    """Return all keys of each augmentation preset."""
    files = {name: config_dir() / f"augment/{name}.yaml" for name in choices("augment")}
    return {name: vars(AugmentConfig(**yaml.safe_load(path.read_text()))) for name, path in files.items()}


def short(key: str) -> str:
    """Return a key without its group; of a group's name, the group, as in model=... on the command line."""
    group, _, own = key.rpartition(".")
    return group if group and own == "name" else own


def without_groups(text: str) -> str:
    """Return a text with its key=value parts, at its start or after a space or comma, as `short` writes the keys."""
    text = re.sub(r"(?<![^ ,])(model|data|optimizer|schedule)\.name=", r"\1=", text)
    return re.sub(r"(?<![^ ,])[a-z_.]+\.(?=[a-z_0-9]+=)", "", text)


def of_presets(keys: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Leave out the augmentation's own keys where its presets, among the differing keys, say all about them."""
    if "own" in keys.get("augment", ["own"]):
        return keys
    return {key: values for key, values in keys.items() if not key.startswith("augment.")}


def differing(runs: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the keys that differ between the runs, with each run's value: first those that tell most runs apart."""
    names = dict.fromkeys(key for run in runs for key in run)
    left = {key: [run.get(key, "-") for run in runs] for key in names}
    left = of_presets({key: values for key, values in left.items() if len({*values} - {"-"}) > 1})
    chosen: list[tuple[str, list[str]]] = []
    groups = [""] * len(runs)  # the values of all chosen keys, by run
    while left:
        num_groups = {key: len(set(zip(groups, values, strict=True))) for key, values in left.items()}
        key = max(left, key=lambda key: (num_groups[key], -max(map(len, (short(key), *left[key])))))
        groups = [f"{group}, {value}" for group, value in zip(groups, left[key], strict=True)]
        chosen.append((key, left.pop(key)))
    return chosen


def commonest(values: list[Any]) -> list[Any]:
    """Return the commonest value in a list, or an empty list if several are equally common."""
    counts = Counter(values).most_common(2)
    return [counts[0][0]] if len(counts) == 1 or counts[0][1] > counts[1][1] else []


def names_by_difference(configs: list[TrainConfig]) -> list[str] | None:
    """Name runs by the keys that differ, such as "augment=none, seed=1"; None if no keys tell them apart.

    The data set comes first. Of more than MAX_NAMED keys, only as many are named as tell the runs apart.
    """
    sets = [data_name(config) for config in configs]
    parts = [[f"data={name}"] if len(set(sets)) > 1 else [] for name in sets]
    keys = [shown_keys(config) for config in configs]
    for name in ("data.name", "data.target"):  # the name of the data set says it
        keys = [{key: value for key, value in run.items() if key != name} for run in keys]
    for number, (key, values) in enumerate(differing(keys), len(parts[0])):
        if number >= MAX_NAMED and len({*map(tuple, parts)}) == len(configs):
            break
        for part, value in zip(parts, values, strict=True):
            part.append(f"{short(key)}={value}")
    return [", ".join(part) for part in parts] if len({*map(tuple, parts)}) == len(configs) else None
