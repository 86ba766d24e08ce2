"""ImageNet results published in arXiv 1906.05909, and the mapping from our models to the rows of its tables.

A model is described by the keys of its config, including `name`; missing keys are treated as None. Our depth, data
and width may differ from the paper's, so compare only differences within a table, not the values themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Keys that each table varies. They determine which of its rows corresponds to one of our models.
VARIED = {
    1: ("family", "depth"),
    3: ("stage_ops",),
    4: ("kernel_size",),
    5: ("position",),
    6: ("content",),
    7: ("stem",),
}
HELD_OUT_TABLES = (3, 5)  # evaluated on a held-out 4 % of train; top1 is not comparable with other tables


@dataclass(frozen=True)
class Row:
    """A row of the published tables (GFLOPs, millions of parameters, top1 in percent), with the name of our model."""

    table: int
    label: str
    model: str
    gflops: float
    mparams: float | None
    top1: float
    keys: dict[str, Any] = field(default_factory=dict)


def _ops(stages: str) -> dict[str, Any]:
    """Expand a code such as "ccaa" (convolution in stages 1 and 2, attention in 3 and 4)."""
    return {"stage_ops": [{"c": "conv", "a": "attention"}[letter] for letter in stages]}


ROWS = (
    Row(1, "baseline, R26", "conv_resnet26", 4.7, 13.7, 74.5),
    Row(1, "baseline, R38", "conv_resnet38", 6.5, 19.6, 76.2),
    Row(1, "baseline, R50", "conv_resnet50", 8.2, 25.6, 76.9),
    Row(1, "conv stem + attention, R26", "hybrid_resnet26", 4.5, 10.3, 75.8),
    Row(1, "conv stem + attention, R38", "hybrid_resnet38", 5.7, 14.1, 77.1),
    Row(1, "conv stem + attention, R50", "hybrid_resnet50", 7.0, 18.0, 77.4),
    Row(1, "full attention, R26", "sasa_resnet26", 4.7, 10.3, 74.8),
    Row(1, "full attention, R38", "sasa_resnet38", 6.0, 14.1, 76.9),
    Row(1, "full attention, R50", "sasa_resnet50", 7.2, 18.0, 77.6),
    Row(3, "attention in stages 1 2 3 4", "hybrid_resnet50", 7.0, 18.0, 80.2),
    Row(3, "convolution in 1", "hybrid_resnet50", 7.3, 18.1, 80.7, _ops("caaa")),
    Row(3, "convolution in 1 2", "hybrid_resnet50", 7.5, 18.5, 80.7, _ops("ccaa")),
    Row(3, "convolution in 1 2 3", "hybrid_resnet50", 8.0, 20.8, 80.2, _ops("ccca")),
    Row(3, "convolution in 1 2 3 4", "conv_resnet50", 8.2, 25.6, 79.5),
    Row(3, "convolution in 2 3 4", "hybrid_resnet50", 7.9, 25.5, 79.7, _ops("accc")),
    Row(3, "convolution in 3 4", "hybrid_resnet50", 7.8, 25.0, 79.6, _ops("aacc")),
    Row(3, "convolution in 4", "hybrid_resnet50", 7.2, 22.7, 79.9, _ops("aaac")),
    Row(4, "kernel_size 3", "hybrid_resnet50", 6.6, None, 76.4, {"kernel_size": 3}),
    Row(4, "kernel_size 5", "hybrid_resnet50", 6.7, None, 77.2, {"kernel_size": 5}),
    Row(4, "kernel_size 7", "hybrid_resnet50", 7.0, None, 77.4, {"kernel_size": 7}),
    Row(4, "kernel_size 9", "hybrid_resnet50", 7.3, None, 77.7, {"kernel_size": 9}),
    Row(4, "kernel_size 11", "hybrid_resnet50", 7.7, None, 77.6, {"kernel_size": 11}),
    Row(5, "position none", "hybrid_resnet50", 6.9, 18.0, 77.6, {"position": "none"}),
    Row(5, "position absolute", "hybrid_resnet50", 6.9, 18.0, 78.2, {"position": "absolute"}),
    Row(5, "position relative", "hybrid_resnet50", 7.0, 18.0, 80.2),
    Row(6, "q.r alone", "hybrid_resnet50", 6.1, 16.7, 76.9, {"content": False}),
    Row(6, "q.k + q.r", "hybrid_resnet50", 7.0, 18.0, 77.4),
    Row(7, "stem: plain attention", "sasa_resnet50", 7.1, None, 76.2, {"stem": "attention_plain"}),
    Row(7, "stem: 4x4 convolution for values", "sasa_resnet50", 7.4, None, 77.2, {"stem": "attention_convvalues"}),
    Row(7, "stem: value mixture", "sasa_resnet50", 7.2, None, 77.6),
)
MODELS = frozenset(row.model for row in ROWS)


def matching_row(keys: Mapping[str, Any], table: int) -> Row | None:
    """Return the row that matches the model in all keys that vary in the table, or None if there is no such row."""
    if keys["name"] not in MODELS:
        return None
    ours = all_keys(keys)
    found = (row for row in ROWS if row.table == table and all(_keys_of(row)[k] == ours[k] for k in VARIED[table]))
    return next(found, None)


def reference_row(row: Row) -> Row:
    """Return a row's baseline: the table's first row of equal depth whose keys all follow from its own model name."""
    rows = (other for other in ROWS if other.table == row.table and _keys_of(other) == all_keys({"name": other.model}))
    return next(other for other in rows if _keys_of(other)["depth"] == _keys_of(row)["depth"])


def nearest_row(keys: Mapping[str, Any]) -> Row | None:
    """Return the first of the rows that differ from the model in the fewest keys; None if the model is not ours."""
    return min(ROWS, key=lambda row: len(differing_keys(row, keys))) if keys["name"] in MODELS else None


def differing_keys(row: Row, keys: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return a dict that maps each key in which our model differs from the row to the pair (row's value, our value)."""
    papers, ours = _keys_of(row), all_keys(keys)
    return {key: (papers[key], ours[key]) for key in ours if papers[key] != ours[key]}


def all_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys that define one of our models, including those implied by the name."""
    family, _, depth = keys["name"].partition("_resnet")
    implied = {
        "family": family,
        "depth": int(depth),
        "stem": "attention" if family == "sasa" else "conv",
        "stage_ops": ["conv" if family == "conv" else "attention"] * 4,
        "kernel_size": 7,
        "position": "relative",
        "content": True,
        "num_heads": 8,
        "width": 1.0,
        "border": "mask",
    }
    return implied | {key: keys[key] for key in implied if keys.get(key) is not None}


def _keys_of(row: Row) -> dict[str, Any]:
    return all_keys({"name": row.model, **row.keys})
