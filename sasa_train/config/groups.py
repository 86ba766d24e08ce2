"""The config groups and their files, for composition, help and completion; Hydra is not imported, to keep help fast."""

from pathlib import Path

GROUPS = ("model", "data", "optimizer", "schedule", "augment", "experiment")


def config_dir() -> Path:
    """Return the path of `configs/`, which is inside the package after installation and beside it in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))
