"""Batch norm folded into the layer before it, for inference."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.models.resnet import Bottleneck, ResNet


def fold_batch_norms(model: ResNet) -> ResNet:
    """A copy of `model` in eval mode whose batch norms are part of the convolutions and value projections before them.

    Attention passes a scale and a bias of its values through, because its weights sum to 1; with `border="zero"` they
    do not inside the image, and those norms stay, as do those of attention stems. Outputs agree to rounding; the
    running statistics are gone, so the copy is not for training.
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


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """Put `norm` into `layer`, if that can be; return what stands in its place."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return norm
    if isinstance(layer, LocalSelfAttention2d):
        if layer.border != "mask":
            return norm
        conv: nn.Conv2d = layer.qkv
        num_kept = layer.qkv.out_channels - norm.num_features  # queries and keys stay
    elif isinstance(layer, nn.Conv2d):
        conv, num_kept = layer, 0
    else:
        return norm
    weight, bias = fuse_conv_bn_weights(
        conv.weight[num_kept:],
        None if conv.bias is None else conv.bias[num_kept:],
        *(norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias),
    )
    kept_bias = weight.new_zeros(num_kept) if conv.bias is None else conv.bias[:num_kept]
    conv.weight = nn.Parameter(torch.cat([conv.weight[:num_kept], weight]), requires_grad=False)
    conv.bias = nn.Parameter(torch.cat([kept_bias, bias]), requires_grad=False)
    return nn.Identity()
