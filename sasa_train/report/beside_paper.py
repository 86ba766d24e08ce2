"""Which printed row of the paper a config of ours stands for: the same setting of what the table varies.

Depth, data and width may differ, so the numbers themselves cannot be compared, only differences within a table.
"""

from typing import Any

from sasa_train.config.keys import MODEL_KEYS, OWN_MODELS, TrainConfig
from sasa_train.paper import ROWS, Row

VARIED = {
    1: ("family", "depth"),
    3: ("stage_ops",),
    4: ("kernel_size",),
    5: ("position",),
    6: ("content",),
    7: ("stem",),
}
# The paper's own default in each table; in Table 1 the baseline of the same depth.
REFERENCES = {
    1: ("baseline, R26", "baseline, R38", "baseline, R50"),
    3: ("attention in stages 1 2 3 4",),
    4: ("kernel_size 7",),
    5: ("position relative",),
    6: ("q.k + q.r",),
    7: ("stem: value mixture",),
}


def paper_row(config: TrainConfig, table: int) -> Row | None:
    """The row of that table, or None: another model, or a setting that the paper does not have."""
    if config.model.name not in OWN_MODELS:
        return None
    ours = settings(config.model.name, _dials(config))
    rows = [row for row in ROWS if row.table == table]
    return next((row for row in rows if _same(settings(row.model, row.dials), ours, VARIED[table])), None)


def paper_reference(row: Row) -> Row:
    """What the paper's row is compared with."""
    candidates = [other for other in ROWS if other.table == row.table and other.label in REFERENCES[row.table]]
    depth = settings(row.model, row.dials)["depth"]
    return next(other for other in candidates if settings(other.model, other.dials)["depth"] == depth)


def settings(name: str, dials: dict[str, Any]) -> dict[str, Any]:
    """The dials of one of our models, those included that its name implies."""
    family, _, depth = name.partition("_resnet")
    op = "conv" if family == "conv" else "attention"
    implied = {
        "family": family,
        "depth": int(depth),
        "stem": "attention" if family == "sasa" else "conv",
        "stage_ops": [op] * 4,
        "kernel_size": 7,
        "position": "relative",
        "content": True,
        "num_heads": 8,
        "width": 1.0,
        "border": "mask",
    }
    return implied | dials


def _dials(config: TrainConfig) -> dict[str, Any]:
    """Those that are set."""
    return {dial: getattr(config.model, dial) for dial in MODEL_KEYS if getattr(config.model, dial) is not None}


def _same(one: dict[str, Any], other: dict[str, Any], keys: tuple[str, ...]) -> bool:
    return all(one[key] == other[key] for key in keys)


def nearest_row(config: TrainConfig) -> Row | None:
    """The printed row whose model is most like ours; None for a model that is none of ours.

    Of rows that are one model, which the paper prints in several tables, the first.
    """
    if config.model.name not in OWN_MODELS:
        return None
    return min(ROWS, key=lambda row: len(differing_dials(row, config)))


def differing_dials(row: Row, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The dials in which a model of ours is another than the row's -> (the row's, ours)."""
    papers, ours = settings(row.model, row.dials), settings(config.model.name, _dials(config))
    return {key: (papers[key], ours[key]) for key in ours if papers[key] != ours[key]}
