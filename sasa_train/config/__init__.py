"""The config: its keys and their rules, what follows from them, and how Hydra composes them."""

from sasa_train.config.keys import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    TrainerConfig,
)

__all__ = [
    "AugmentConfig", "DataConfig", "ModelConfig", "OptimizerConfig", "ScheduleConfig", "TrainConfig", "TrainerConfig",
]  # fmt: skip
