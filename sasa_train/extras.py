"""Checks for optional packages, and messages that name the extra that installs the missing ones."""

import importlib.util
import re

EXTRAS = {  # as in pyproject.toml
    "plots": ("matplotlib",),
    "search": ("optuna",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "metrics": ("scikit-learn",),
    "hf": ("datasets",),
    "url": ("fsspec", "aiohttp"),
    "wandb": ("wandb>=0.31",),
    "mlflow": ("mlflow-skinny", "sqlalchemy", "alembic"),
}
MODULES = {"scikit-learn": "sklearn"}  # of packages whose module has another name


def why_not(what: str, extra: str) -> str | None:
    """Return a message naming the missing packages that `what` requires, or None if all are installed."""
    missing = [package for package in EXTRAS[extra] if not _is_installed(package)]
    return (
        f"{what} needs {', '.join(missing)}, not installed here: pip install 'sasa_train[{extra}]'" if missing else None
    )


def _is_installed(package: str) -> bool:
    # Most modules are called like the first word of their package. A folder of this name, such as the one that W&B
    # makes in the working directory, is found as well, but has no origin.
    spec = importlib.util.find_spec(MODULES.get(package) or re.split(r"\W", package)[0])
    return spec is not None and spec.origin is not None
