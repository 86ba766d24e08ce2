"""The output files of sasa-evaluate: predictions, all results as JSON, and the reliability diagram."""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_train.extras import why_not
from sasa_train.files import kind
from sasa_train.refusal import ConfigError

if TYPE_CHECKING:
    from sasa_train.data.datasets import ImageSet
    from sasa_train.evaluate.val_pass import Answers

SUFFIXES = {"predictions": (".csv", ".jsonl"), "json": (".json",), "plot": (".png", ".svg", ".pdf")}


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ConfigError if an output file cannot be written; call this before the evaluation."""
    if options.bins is not None and options.bins < 1:
        raise ConfigError(f"--bins {options.bins}: must be 1 or more")
    if options.plot and (reason := why_not("--plot", "plots")):
        raise ConfigError(reason)
    for name, suffixes in SUFFIXES.items():
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        if path.suffix.lower() not in suffixes:
            raise ConfigError(f"--{name} {path}: the name must end in {' or '.join(suffixes)}")
        if not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}; make it first")
        if os.path.lexists(path) and (found := kind(path)) not in ("a file", "a symbolic link"):
            raise ConfigError(f"--{name} {path}: is {found}, and would be replaced; give another place")
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
            raise ConfigError(f"--{name} {path}: no file can be written there; give another place")


def write_outputs(
    options: argparse.Namespace, figures: dict[str, Any], answers: "Answers | None", images: "ImageSet"
) -> Iterator[Path]:
    """Write the requested files, each atomically, and yield their paths.

    Raises:
        OSError: a file cannot be written; the message names it.
    """
    from sasa_train.files import csv_text, write_atomic

    contents: list[tuple[Path, bytes]] = []
    if options.predictions and answers is not None:
        rows = list(prediction_rows(answers, images))
        if options.predictions.suffix.lower() == ".csv":
            text = csv_text([rows[0], *(row.values() for row in rows)])
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows)
        contents.append((options.predictions, text.encode("utf-8", "surrogateescape")))
    if options.json:
        contents.append((options.json, json.dumps(figures, indent=1, default=dataclasses.asdict).encode() + b"\n"))
    if options.plot:
        from sasa_train.evaluate.reliability_diagram import draw_reliability
        from sasa_train.figures import rendered

        views = ", averaged with the mirror image" if "tta" in figures else ""
        figure = draw_reliability(figures["calibration"].bins, f"val, {figures['num_images']:,} images{views}")
        contents.append((options.plot, rendered(figure, options.plot.suffix.lower()[1:])))
    for path, content in contents:
        try:
            write_atomic(path, content)
        except OSError as error:
            raise OSError(f"{path}: cannot be written ({error.strerror}); give another place") from error
        yield path


def prediction_rows(answers: "Answers", images: "ImageSet") -> Iterator[dict[str, Any]]:
    """Yield a row for each readable image in the order of val, with probabilities from 0 to 1.

    Names are those of the files, as in sasa-predict's tables, so that both can be joined.
    """
    from sasa_train.evaluate.calibration import confidences_of

    names = images.classes
    labels, predictions = answers.labels.tolist(), answers.predictions.tolist()
    probabilities = confidences_of(answers.logits, answers.predictions).tolist()
    of_labels = confidences_of(answers.logits, answers.labels).tolist()
    for i, index in enumerate(answers.indices):
        yield {
            "image": images.name(int(index)),
            "label": names[labels[i]],
            "prediction": names[predictions[i]],
            "probability": probabilities[i],
            "label_probability": of_labels[i],
        }
