"""The config: its keys, their rules, derived values, and composition by Hydra."""

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
