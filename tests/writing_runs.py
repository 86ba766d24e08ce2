"""Create run folders, sweeps and checkpoints as the commands do, but without training."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sasa_train.config.compose import compose_config
from sasa_train.config.derived import input_size
from sasa_train.config.saved import to_yaml
from sasa_train.models import build_model
from sasa_train.runs.checkpoint import FORMAT_VERSION, Checkpoints

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
    last = {"last": {"step": len(top1s), "top1": top1s[-1]}} if top1s else {}
    (folder / "run.json").write_text(json.dumps({"status": "finished", "seconds": 60.0} | last | info))


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
    """Return the content of a checkpoint of a model that cannot be built."""
    one = {"name": "cat", "num_images": 9, "names": "0" * 16, "num_read": 9, "num_unreadable": 0, "content": "0" * 16}
    images = {"source": "files", "labels": "0" * 16, "classes": [one]}
    return {
        "format_version": FORMAT_VERSION,
        "model": {"weight": torch.full((1000,), float(step))},
        "ema": None,
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "window": {"sums": torch.zeros(2, dtype=torch.float64), "num_images": 0},
        "step": step,
        "epoch": 0,
        "evaluated_step": 0,
        "best": None,
        "seconds": 0.0,
        "rng": {"torch": torch.get_rng_state(), "cuda": None},
        "config": "",
        "classes": ["cat"],
        "finished": False,
        "metrics": "",
        "fingerprint": {"train": images, "val": images},
        "provenance": {},
    }


def filled(folder, steps=(1, 2, 3, 4, 5), keep=2, best=(2,)) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(content(step), is_best=step in best)
    return checkpoints


def write_teacher(path: Path, classes, *overrides: str, seed: int = 0) -> torch.nn.Module:
    """Write a model as sasa-export does, with random weights; return it in eval mode."""
    config, classes = compose_config(list(overrides)), list(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config.model, len(classes), input_size(config.data)).eval()
    save_file(model.state_dict(), path, {"config": to_yaml(config), "classes": json.dumps(classes)})
    return model
