"""Train image classifiers with stand-alone self-attention (SASA), and compare them with convolutional models.

This module imports nothing until a name is used, so that `--help` is fast; `import sasa_train.models` registers the
models with timm.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_train.train.in_python import train_model
    from sasa_train.trained import load_trained

__version__ = "0.2.0"
__all__ = ["load_trained", "train_model"]
HOMES = {"load_trained": "sasa_train.trained", "train_model": "sasa_train.train.in_python"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sasa_train' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
