"""Fold batch norms into the preceding layers for inference."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.models.resnet import Bottleneck, ResNet


def fold_batch_norms(model: ResNet) -> ResNet:
    """Return a copy of `model` in eval mode with batch norms folded into preceding convolutions or value projections.

    Norms are kept after attention with `border="zero"`, `null_key=True` or `own_value=True`, after the first half of
    axial attention, and in attention stems. The outputs of the copy match those of the model up to rounding. The copy
    has no running statistics and cannot be trained further.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for i in range(len(module) - 1):
                if isinstance(module[i], nn.Conv2d):
                    module[i + 1] = _fold(module[i], module[i + 1])
        elif isinstance(module, Bottleneck):
            for i in (1, 2, 3):
                setattr(module, f"bn{i}", _fold(getattr(module, f"conv{i}"), getattr(module, f"bn{i}")))
    return model


def _is_average(layer: LocalSelfAttention2d) -> bool:
    """Whether outputs are averages of values, so that a scale and a bias of the values carry over to them."""
    return layer.border != "zero" and not layer.null_key and layer.own_value is None


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Fold `norm` into `layer` if possible, and return the module that replaces the norm."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return norm
    if isinstance(layer, LocalSelfAttention2d) and _is_average(layer):
        conv: nn.Conv2d = layer.qkv
    elif isinstance(layer, nn.Conv2d):
        conv = layer
    else:
        return norm
    num_kept = conv.out_channels - norm.num_features  # queries and keys are unchanged
    weight, bias = fuse_conv_bn_weights(
        conv.weight[num_kept:],
        None if conv.bias is None else conv.bias[num_kept:],
        *(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias),
    )
    kept_bias = weight.new_zeros(num_kept) if conv.bias is None else conv.bias[:num_kept]
    conv.weight = nn.Parameter(torch.cat([conv.weight[:num_kept], weight]), requires_grad=False)
    conv.bias = nn.Parameter(torch.cat([kept_bias, bias]), requires_grad=False)
    return nn.Identity()
