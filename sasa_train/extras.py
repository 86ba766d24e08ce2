"""Optional packages: every command names missing ones in the same words, with the extra that installs them."""

import importlib.util

EXTRAS = {"plots": ("matplotlib",), "search": ("optuna",), "export": ("onnx", "onnxscript", "onnxruntime")}


def why_not(what: str, extra: str) -> str | None:
    """Tell which packages `what` needs that are not installed, with the remedy; None where all are."""
    missing = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    return (
        f"{what} needs {', '.join(missing)}, not installed here: pip install 'sasa_train[{extra}]'" if missing else None
    )
