"""The optional packages of `sasa_train[plots]`: whether they are there, and what to say where they are not."""

import importlib.util

NO_MATPLOTLIB = "matplotlib is not installed; pip install 'sasa_train[plots]'"


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
