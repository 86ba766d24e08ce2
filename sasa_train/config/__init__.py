"""The training config: its keys, validation rules, derived values and composition with Hydra."""

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
