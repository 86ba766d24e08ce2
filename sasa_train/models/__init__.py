"""Models with timm's model API. Importing this package registers them with timm."""

from sasa_train.models.build import build_model, check_model, check_val_size, enable_grad_checkpointing
from sasa_train.models.folding import fold_batch_norms
from sasa_train.models.layers import AttentionStem, LocalSelfAttention2d
from sasa_train.models.resnet import ResNet

__all__ = [
    "AttentionStem",
    "LocalSelfAttention2d",
    "ResNet",
    "build_model",
    "check_model",
    "check_val_size",
    "enable_grad_checkpointing",
    "fold_batch_norms",
]
