"""Create run folders, sweeps and checkpoints as the commands do, but without training."""

import json
import types
from pathlib import Path

import torch

from sasa_train.config.compose import compose_config
from sasa_train.config.saved import to_yaml
from sasa_train.runs.checkpoint import FORMAT_VERSION, REQUIRED, Checkpoints

BASE = ("experiment=debug",)


def write_run(folder: Path, overrides, top1s, **info) -> None:
    """Create a run folder as sasa-train does, with one val row per epoch."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(compose_config(overrides)))
    of_train, rows = {"split": "train", "loss": 1.0, "top1": 9.0, "images_per_sec": 100.0}, []
    for epoch, top1 in enumerate(top1s, 1):
        val = {"split": "val", "loss": None, "top1": top1, "top5": 99.0}
        rows += [row | {"step": epoch, "epoch": epoch} for row in (of_train, val)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text(json.dumps({"status": "finished", "seconds": 60.0} | info))


def write_sweep(folder: Path, results: dict, table=None, name="ledger.json", base=BASE) -> Path:
    """Create a sweep; `results` maps (overrides, seed) to val top1s or, for unfinished jobs, to (state, reason)."""
    jobs = {}
    for i, ((overrides, seed), found) in enumerate(results.items()):
        job, all_overrides = f"{name[:-5]}-{i}", [*base, *overrides, f"seed={seed}"]
        state, reason = ("done", "finished") if isinstance(found, list) else found
        jobs[job] = {"overrides": all_overrides, "state": state, "reason": reason, "tries": []}
        if isinstance(found, list):
            write_run(folder / job, all_overrides, found)
    folder.mkdir(parents=True, exist_ok=True)
    sweep = {"name": folder.name, "command": "sasa-sweep ...", "paper_table": table, "overrides": list(base)}
    (folder / name).write_text(json.dumps({"format_version": 1, "sweep": sweep, "jobs": jobs}))
    return folder


def content(step: int) -> dict:
    empty = {key: None if isinstance(kind, types.UnionType) else kind() for key, kind in REQUIRED.items()}
    return empty | {
        "format_version": FORMAT_VERSION,
        "model": {"weight": torch.full((1000,), float(step))},
        "step": step,
    }


def filled(folder, steps=(1, 2, 3, 4, 5), keep=2, best=(2,)) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(content(step), is_best=step in best)
    return checkpoints
