"""Metadata for exported weights: their classes, preprocessing and origin."""

import json
import math
from typing import Any

import sasa_train
from sasa_train.config.derived import as_image_size, resolved_interpolation, resolved_size
from sasa_train.config.keys import TrainConfig, with_values
from sasa_train.config.places import where_trained
from sasa_train.config.saved import load_config, to_yaml
from sasa_train.data.datasets import mean_std
from sasa_train.data.decoding import decoding_of
from sasa_train.data.transforms import VAL_CROP, covered_size
from sasa_train.trained import TrainedModel

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
---
# {name} on {data}

An image classifier trained with sasa_train {version}: {num_classes} classes, images of {size}.
{measured}

```python
import timm
import sasa_train.models  # registers the architecture with timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

`config.json` has the architecture with its keys, the preprocessing and the names of the classes; the metadata of
`model.safetensors` the whole training config. No licence is given here: add yours, and the terms of the data.

Trained by:

```
{command}
```
"""


OF_MODES = {
    "rgb": "",
    "grey": ' in grey (Pillow\'s `image.convert("L")`)',
    "grey16": " in 16-bit grey, which timm's transform does not scale: divide them by 65,535, then normalise",
}


def describe(trained: TrainedModel) -> dict[str, str]:
    """Return a file's metadata as strings (lists in JSON); `resize` is `covered_size`, for squares one number."""
    mean, std = mean_std(trained.config.data)
    return {
        "sasa_train": sasa_train.__version__,
        "model": trained.config.model.title,
        "classes": json.dumps(trained.classes),
        "mode": trained.config.data.mode,
        "input_size": json.dumps(list(trained.input_size)),  # channels, height, width
        "image_size": json.dumps(trained.image_size),
        "resize": json.dumps(as_image_size(*covered_size(trained.input_size[1:], trained.config.data.val_crop))),
        "interpolation": resolved_interpolation(trained.config.data),
        "mean": json.dumps(list(mean)),
        "std": json.dumps(list(std)),
        "weights": trained.weights,
        "step": str(trained.checkpoint["step"]),
        "config": to_yaml(with_values(trained.config, trained.given)),
    }


def timm_data_config(trained: TrainedModel) -> dict[str, Any]:
    """Return timm's data config, with which timm's `create_transform` produces the same pixels as validation."""
    data = trained.config.data
    mean, std = mean_std(data)
    size, covered = trained.input_size[1:], covered_size(trained.input_size[1:], data.val_crop)
    return {
        "input_size": trained.input_size,
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": _crop_pct(size, covered, data.val_crop),
        "crop_mode": "center",
        "interpolation": resolved_interpolation(data),
    }


def _crop_pct(size: tuple[int, int], covered: tuple[int, int], val_crop: float | None) -> float:
    """Return the fraction by which timm divides `size`, rounding down, to get `covered`."""
    if size == covered:
        return 1.0
    if size[0] != size[1]:  # rounded down here too
        return val_crop or VAL_CROP
    exact = math.floor(size[0] / (size[0] / covered[0])) == covered[0]  # rounding may lose a pixel
    return size[0] / covered[0] if exact else size[0] / (covered[0] + 0.5)


def model_card(trained: TrainedModel) -> str:
    """Return the model card, which describes the run as it was trained, without the overrides given to the export."""
    saved = where_trained(load_config(trained.checkpoint["config"]), trained.directory)
    return CARD.format(
        name=trained.config.model.title,
        data=saved.data.title,
        version=sasa_train.__version__,
        num_classes=len(trained.classes),
        size=f"{trained.input_size[1]} x {trained.input_size[2]} pixels{OF_MODES[trained.config.data.mode]}",
        measured=_measured(trained, saved),
        command=trained.checkpoint["provenance"].get("reproduce", "unknown"),
    )


def _measured(trained: TrainedModel, saved: TrainConfig) -> str:
    """Describe the val metrics that the run logged at the checkpoint's step."""
    rows = [json.loads(line) for line in trained.checkpoint["metrics"].splitlines()]
    at_step = [row for row in rows if row["split"] == "val" and row["step"] == trained.checkpoint["step"]]
    row = at_step[-1] if at_step else {}
    top1 = row.get("top1_raw" if trained.weights == "raw" and "top1_raw" in row else "top1")
    if top1 is None:
        return "It was not evaluated at this step."
    best = trained.checkpoint["best"]
    text = f"Top1 on val ({saved.data.title}): {top1:.2f} % at step {row['step']:,}."
    if best and best["step"] == row["step"]:
        text += " This checkpoint was selected on val, so the figure is optimistic."
    was, now = _keys_of_logits(saved), _keys_of_logits(trained.config)
    if changed := [f"{key}={'null' if value is None else value}" for key, value in was.items() if now[key] != value]:
        text += f" It was trained and evaluated with {', '.join(changed)}, which is not so here."
    return text


def _keys_of_logits(config: TrainConfig) -> dict[str, Any]:
    """Return the keys that affect the logits, apart from weights and files, with their values."""
    mean, std = mean_std(config.data)
    data = {f"data.{key}": value for key, value in vars(decoding_of(config.data)).items()} | {
        "data.image_size": as_image_size(*resolved_size(config.data)),
        "data.val_image_size": config.data.val_image_size,
        "data.mean": list(mean),
        "data.std": list(std),
        "data.interpolation": resolved_interpolation(config.data),
        "data.val_crop": config.data.val_crop or VAL_CROP,
    }
    model = {f"model.{key}": value for key, value in vars(config.model).items()}
    return {key: value for key, value in (data | model).items() if key not in ("model.num_classes", "model.pretrained")}
