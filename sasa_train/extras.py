"""Checks for optional packages, and messages that name the extra that installs the missing ones."""

import importlib.util

EXTRAS = {"plots": ("matplotlib",), "search": ("optuna",), "export": ("onnx", "onnxscript", "onnxruntime")}


def why_not(what: str, extra: str) -> str | None:
    """Return a message naming the missing packages that `what` requires, or None if all are installed."""
    missing = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    return (
        f"{what} needs {', '.join(missing)}, not installed here: pip install 'sasa_train[{extra}]'" if missing else None
    )
