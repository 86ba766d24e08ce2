"""Train image classifiers with stand-alone self-attention (SASA), and compare them with convolutional models.

This module imports nothing until a name is used, so that `--help` is fast; `import sasa_train.models` registers the
models with timm.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasa_train.trained import load_trained

__version__ = "0.1.0"
__all__ = ["load_trained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'sasa_train' has no attribute {name!r}")
    from sasa_train import trained

    return getattr(trained, name)
