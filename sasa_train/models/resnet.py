"""A configurable ResNet that covers the paper's attention models, hybrids and convolutional baselines.

It is registered with timm as `{sasa,hybrid,conv}_resnet{26,38,50}`. The paper's block counts differ from timm's: R26
has [1, 2, 4, 1] and R38 [2, 3, 5, 2] blocks (2 and 1 fewer per stage than R50's [3, 4, 6, 3]). The stride is applied in
the 3x3 convolution or in the pool after attention; shortcuts keep their strided 1x1 convolution.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from timm.layers import DropPath, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from sasa_train.attention.dispatch import Pair, check_whole, pair
from sasa_train.models.layers import AttentionStem, LocalSelfAttention2d, PointwiseConv2d
from sasa_train.models.pretrained import checkpoint_filter_fn

BLOCK_COUNTS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}
STEM_CHANNELS = 64
STAGE_CHANNELS = (64, 128, 256, 512)
EXPANSION = 4
STEMS = ("conv", "attention", "conv_small", "attention_small", "attention_plain", "attention_convvalues")
STAGE_OPS = ("conv", "attention")
# With "reflect", a map is continued by its mirror image, so that a convolution cannot read its position off the border.
Padding = Literal["zeros", "reflect"]
PADDINGS = get_args(Padding)


class Bottleneck(nn.Module):
    """Bottleneck: 1x1-BN-ReLU, 3x3 convolution or local attention, BN-ReLU, 1x1-BN, addition of the shortcut, ReLU."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, op: str, drop_path: float, padding: Padding, attention: dict
    ):
        super().__init__()
        out_channels = channels * EXPANSION
        self.conv1 = PointwiseConv2d(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        # Attention runs at the input's resolution and is pooled afterwards, which gives R50 the paper's 6.97 GFLOPs.
        self.conv2: nn.Module = (
            nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False, padding_mode=padding)
            if op == "conv"
            else _build_attention(channels, stride, **attention)
        )
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = PointwiseConv2d(channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.drop_path(self.bn3(self.conv3(out)))
        out += self.downsample(x)  # in place, because batch norm does not need its output
        return self.act(out)


def _build_attention(channels: int, stride: int, kernel_size: Pair, axial: bool, **options) -> nn.Module:
    """Return attention over a K x K window or, as in Axial-DeepLab (arXiv 2003.07853), over K x 1 and then 1 x K."""
    if not axial:
        return LocalSelfAttention2d(channels, channels, kernel_size, stride=stride, **options)
    rows, columns = pair(kernel_size)
    return nn.Sequential(
        LocalSelfAttention2d(channels, channels, (rows, 1), **options),
        nn.BatchNorm2d(channels),
        LocalSelfAttention2d(channels, channels, (1, columns), stride=stride, **options),
    )


class ResNet(nn.Module):
    """ResNet with a stem, four stages of bottlenecks, a global average pool and a classifier.

    Args:
        depth: 26, 38 or 50.
        stem: "conv" (7x7/2, BN, ReLU, 3x3/2 max pool), "attention" (4x4 blocks, value mixture, BN, 4x4 max pool);
            for images of up to 64 pixels, "conv_small" (3x3/1, no pool) and "attention_small" (no pool); for the
            paper's Table 7, "attention_plain" and "attention_convvalues".
        stage_ops: "conv" or "attention" for each of the four stages.
        kernel_size: the window size of all stages, or a list of four, one per stage; the attention stem keeps its own.
        num_heads, position, content, border, share_rel, dilation, scale, null_key, own_value: see
            `LocalSelfAttention2d`; those after `border` are for the stages.
        axial: whether attention in the stages is over a column of K positions and then, after a batch norm, over a row.
        padding: of the 3x3 and larger convolutions of stem and stages, "zeros" or "reflect" (see `PADDINGS`).
        width: multiplier for the number of channels of every layer.
        drop_path_rate: stochastic depth rate of the last block; the rates increase linearly from 0 at the first block.

    Raises:
        ValueError: arguments are incompatible; the message states the argument, its value and the rule. In forward,
            a window of `border="shift"` does not fit into the map of its stage.
    """

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 1000,
        in_chans: int = 3,
        stem: str = "attention",
        stage_ops: Sequence[str] = ("attention",) * 4,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int = 8,
        width: float = 1.0,
        position: str = "relative",
        content: bool = True,
        border: str = "mask",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
        dilation: int = 1,
        scale: float | str = 1.0,
        null_key: bool = False,
        share_rel: bool = True,
        padding: Padding = "zeros",
        own_value: bool = False,
        axial: bool = False,
    ):
        super().__init__()
        _check_arguments(stage_ops, width, dilation, padding)
        kernel_sizes = _per_stage(kernel_size)
        attention = {"num_heads": num_heads, "position": position, "content": content, "border": border}
        attention |= {"backend": backend, "dilation": dilation, "scale": scale, "null_key": null_key}
        attention |= {"share_rel": share_rel, "own_value": own_value, "axial": axial}
        # timm reads num_classes and in_chans when it exports or adapts a model.
        self.num_classes, self.in_chans = num_classes, in_chans
        self.drop_rate, self.grad_checkpointing, self.border = drop_rate, False, border
        channels = round(STEM_CHANNELS * width)
        self.stem, reduction = build_stem(stem, in_chans, channels, backend, padding)
        self.feature_info = [{"num_chs": channels, "reduction": reduction, "module": "stem"}]
        stages: list[nn.Module] = []
        last_block, num_built = sum(BLOCK_COUNTS[depth]) - 1, 0
        for i, (num_blocks, op) in enumerate(zip(BLOCK_COUNTS[depth], stage_ops, strict=True)):
            stage_channels = round(STAGE_CHANNELS[i] * width)
            blocks = []
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                drop_path = drop_path_rate * num_built / last_block
                options = attention | {"kernel_size": kernel_sizes[i]}
                blocks.append(Bottleneck(channels, stage_channels, stride, op, drop_path, padding, options))
                channels, num_built = stage_channels * EXPANSION, num_built + 1
            stages.append(nn.Sequential(*blocks))
            reduction *= 2 if i > 0 else 1
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"layer{i + 1}"})
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.num_features = self.head_hidden_size = channels
        self.global_pool, self.fc = create_classifier(channels, num_classes, pool_type=global_pool)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise convolutions outside attention (Kaiming, fan-out), and set each block's last BN weight to 0."""
        attention = [m for m in self.modules() if isinstance(m, LocalSelfAttention2d | AttentionStem)]
        own_init = {module for layer in attention for module in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in own_init:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.border == "shift":
            _check_fit(stages, *x.shape[2:])
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        weight = next(self.layer4.parameters())
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=weight.device, dtype=weight.dtype
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of all position and mixture embeddings; timm itself already excludes norms and biases."""
        names = ("rel_height", "rel_width", "emb_row", "emb_col", "nu")
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in names}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}


def _check_arguments(stage_ops: Sequence[str], width: float, dilation: int, padding: str) -> None:
    if len(stage_ops) != 4 or not set(stage_ops) <= set(STAGE_OPS):
        raise ValueError(f"stage_ops={list(stage_ops)} must be four of {', '.join(STAGE_OPS)}")
    if not 1 <= STEM_CHANNELS * width < 2**31:
        raise ValueError(f"width={width} makes {STEM_CHANNELS * width:g} channels of the first layer's {STEM_CHANNELS}")
    check_whole("dilation", dilation)
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} must be one of {', '.join(PADDINGS)}")


def _per_stage(kernel_size: int | Sequence[int]) -> Sequence[int]:
    """Return the window size of each of the four stages."""
    if not isinstance(kernel_size, Sequence) or isinstance(kernel_size, str):
        return (kernel_size,) * 4
    if len(kernel_size) != 4:
        raise ValueError(f"kernel_size={list(kernel_size)} must be a whole number, or four, one per stage")
    for size in kernel_size:
        check_whole("kernel_size", size)
    return kernel_size


def _check_fit(stages: Sequence[nn.Module], height: int, width: int) -> None:
    """Raise ValueError if a shifted window does not fit into a map of its stage; the stem's map is height x width."""
    misfit, fitting = "", []
    for i, stage in enumerate(stages):
        kernel_size = 1
        for j, block in enumerate(stage.children()):
            assert isinstance(block, Bottleneck)
            layers = [layer for layer in block.conv2.modules() if isinstance(layer, LocalSelfAttention2d)]
            if layers:
                kernel_size = max(max(pair(layer.kernel_size)) for layer in layers)
                dilation = max(pair(layers[0].dilation))
                most = min(height, width) // dilation
                if kernel_size > most and not misfit:
                    misfit = f"layer{i + 1} has maps of {height} x {width} positions, and kernel_size={kernel_size} "
                    misfit += f"with dilation={dilation} spans {kernel_size * dilation}"
                kernel_size = min(kernel_size, most - 1 + most % 2)
            if i > 0 and j == 0:  # this block halves the map
                height, width = (height + 1) // 2, (width + 1) // 2
        fitting.append(kernel_size)
    if misfit:
        sizes = ",".join(map(str, fitting))
        remedy = f"kernel_size=[{sizes}]" if min(fitting) > 0 else "a smaller dilation, or border='mask',"
        raise ValueError(f"border='shift' needs windows that fit: {misfit}; {remedy} fits")


def build_stem(
    stem: str, in_chans: int, channels: int, backend: str = "auto", padding: Padding = "zeros"
) -> tuple[nn.Module, int]:
    """Return the stem and its reduction (input pixels per output position in each dimension)."""
    if stem == "conv":
        conv = nn.Conv2d(in_chans, channels, 7, 2, padding=3, bias=False, padding_mode=padding)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)), 4
    if stem == "conv_small":
        conv = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False, padding_mode=padding)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)), 1
    if stem == "attention_small":
        return AttentionStem(in_chans, channels, pool=False, backend=backend), 1
    values = {"attention": "mixture", "attention_plain": "plain", "attention_convvalues": "conv"}
    if stem not in values:
        raise ValueError(f"stem={stem!r} must be one of {', '.join(STEMS)}")
    return AttentionStem(in_chans, channels, values=values[stem], backend=backend), 4


def _register(family: str, depth: int, stem: str, op: str) -> None:
    def create(pretrained: bool = False, **kwargs) -> ResNet:
        # pretrained=True works with folders from sasa-export (local-dir:, hf-hub:); otherwise timm reports that it has
        # no weights.
        return build_model_with_cfg(
            ResNet,
            f"{family}_resnet{depth}",
            pretrained,
            feature_cfg={"flatten_sequential": False},
            pretrained_filter_fn=checkpoint_filter_fn,
            **{"stem": stem, "stage_ops": (op,) * 4, **kwargs, "depth": depth},
        )

    create.__name__ = f"{family}_resnet{depth}"
    create.__doc__ = f"{family}_resnet{depth}: {stem} stem, {op} in all stages (arXiv 1906.05909, Table 1)."
    create.__module__ = __name__
    globals()[create.__name__] = create
    register_model(create)


default_cfgs = generate_default_cfgs(
    {
        f"{family}_resnet{depth}": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "classifier": "fc",
            "first_conv": ("stem.0", "stem.qk", "stem.value", "stem.value.1"),  # names that exist in the stem are used
        }
        for family in ("sasa", "hybrid", "conv")
        for depth in BLOCK_COUNTS
    }
)

for _depth in BLOCK_COUNTS:
    _register("sasa", _depth, "attention", "attention")
    _register("hybrid", _depth, "conv", "attention")
    _register("conv", _depth, "conv", "conv")
