"""Optional packages: what is missing is said in the same words by every command, with the extra that brings it."""

import importlib.util

EXTRAS = {"plots": ("matplotlib",), "search": ("optuna",), "export": ("onnx", "onnxscript", "onnxruntime")}


def why_not(what: str, extra: str) -> str | None:
    """What `what` needs and is not installed, with the remedy; None where all is."""
    missing = [package for package in EXTRAS[extra] if importlib.util.find_spec(package) is None]
    return (
        f"{what} needs {', '.join(missing)}, not installed here: pip install 'sasa_train[{extra}]'" if missing else None
    )
