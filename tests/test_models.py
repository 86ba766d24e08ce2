"""Check that parameter counts are exact, that published figures are closely matched, and that timm's API works."""

import itertools

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from sasa_train import machine
from sasa_train.config.keys import OWN_MODELS, ModelConfig
from sasa_train.models import AttentionStem, LocalSelfAttention2d, build_model, check_model, fold_batch_norms
from sasa_train.models.counting import count_flops, count_params, meta_model
from sasa_train.models.layers import PointwiseConv2d, sinusoid
from sasa_train.paper import ROWS
from sasa_train.refusal import ConfigError

TINY = {"width": 0.25, "num_heads": 2, "kernel_size": 3, "num_classes": 5}


@pytest.mark.parametrize(
    "name,params",
    [
        ("hybrid_resnet26", 10_331_264),
        ("hybrid_resnet38", 14_173_384),
        ("hybrid_resnet50", 18_015_504),
        ("conv_resnet26", 13_696_552),
        ("conv_resnet38", 19_626_792),
        ("conv_resnet50", 25_557_032),
    ],
)
def test_parameters_equal_the_paper_to_the_digit(name, params):
    assert count_params(meta_model(lambda: timm.create_model(name))) == params


# Table cells that our exact count does not match when rounded; docs/paper.md explains why.
NOT_ROUNDED = {
    (1, "baseline, R38", "gflops"),
    (1, "conv stem + attention, R38", "mparams"),
    (1, "full attention, R38", "gflops"),
    (1, "full attention, R38", "mparams"),
    (3, "convolution in 1 2", "gflops"),
    (3, "convolution in 3 4", "gflops"),
    (3, "convolution in 3 4", "mparams"),
    (4, "kernel_size 3", "gflops"),
    (4, "kernel_size 11", "gflops"),
    (5, "position none", "gflops"),
    (5, "position absolute", "gflops"),
    (6, "q.r alone", "mparams"),
}


def test_every_printed_figure_is_met():
    """Figures must be within 0.11 GFLOPs and 0.1 M parameters of the paper's; any that round differently are listed."""
    missed = set()
    for row in ROWS:
        model = meta_model(lambda row=row: timm.create_model(row.model, **row.keys))
        ours = {"gflops": count_flops(model, 224) / 1e9, "mparams": count_params(model) / 1e6}
        for figure, tolerance in (("gflops", 0.11), ("mparams", 0.1)):
            printed = getattr(row, figure)
            if printed is None:
                continue
            # Table 5 gives 6.9 for "none", but all implementations that we know of, including ours, give 6.78.
            if (row.table, row.label) != (5, "position none"):
                assert abs(ours[figure] - printed) <= tolerance, (row, ours)
            if round(ours[figure], 1) != printed:
                missed.add((row.table, row.label, figure))
    assert missed == NOT_ROUNDED


@pytest.mark.parametrize("name", OWN_MODELS)
def test_timm_users_find_their_api(name):
    stem = "conv_small" if name.startswith("conv") else "attention_small"
    keys = TINY | ({} if name.startswith("conv") else {"drop_path_rate": 0.1})
    model = timm.create_model(name, stem=stem, **keys)
    images = torch.randn(2, 3, 16, 16)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 2)
    assert model.forward_head(features).shape == (2, 5)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.fc
    model.reset_classifier(7)
    assert model(images).shape == (2, 7) and model.num_classes == 7
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}
    assert bool(model.no_weight_decay()) != name.startswith("conv")


def test_features_only_gives_the_stem_and_four_stages():
    model = timm.create_model("hybrid_resnet26", features_only=True, width=0.25, num_heads=2)
    maps = model(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [16, 64, 128, 256, 512]
    assert [64 // m.shape[-1] for m in maps] == model.feature_info.reduction() == [4, 4, 8, 16, 32]


def test_every_parameter_is_trained():
    """Check that every parameter receives a gradient; a module that was built but not connected would receive none."""
    for stem in ("attention_small", "attention", "attention_convvalues"):
        model = timm.create_model("sasa_resnet26", stem=stem, **TINY)
        for block in model.modules():
            if hasattr(block, "bn3"):
                nn.init.ones_(block.bn3.weight)  # its initial value of zero would hide the rest of the block
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
def test_positions(position):
    """Only a layer with a position encoding can distinguish a map from its mirror image."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2, position=position).double()
    x = torch.randn(1, 8, 5, 6, dtype=torch.float64)
    is_blind = torch.allclose(layer(x.flip(-1)).flip(-1), layer(x))
    assert is_blind == (position == "none")


def test_absolute_positions_are_what_the_projections_read():
    """Adding the projected sinusoid to the outputs must equal adding the sinusoid to the inputs of W_Q and W_K only."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 12, kernel_size=3, num_heads=2, position="absolute").double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    rows = sinusoid(4, 5).double()[:, :, None].expand(-1, -1, 6)
    cols = sinusoid(4, 6).double()[:, None, :].expand(-1, 5, -1)
    with_position, without = layer.qkv(x + torch.cat([rows, cols])), layer.qkv(x)
    expected = torch.cat([with_position[:, :24], without[:, 24:]], 1)
    torch.testing.assert_close(layer.qkv(x) + layer._projected_sinusoid(x), expected)


@pytest.mark.parametrize("name", ["hybrid_resnet26", "sasa_resnet26", "conv_resnet26"])
def test_odd_maps_are_halved_upwards_like_the_shortcut(name):
    stem = "conv" if name.startswith("conv") else "conv_small"
    model = timm.create_model(name, **TINY | {"stem": stem})
    assert model.forward_features(torch.randn(2, 3, 20, 28)).shape[2:] == ((1, 1) if stem == "conv" else (3, 4))


def stem_oracle(stem: AttentionStem, x: torch.Tensor) -> torch.Tensor:
    """Compute equations 8 and 9 position by position, before batch norm and pooling."""
    batch, _, height, width = x.shape
    channels, heads, m = stem.bn.num_features, stem.num_heads, stem.nu.shape[0]
    d = channels // heads
    w_q, w_k = stem.qk.weight[:, :, 0, 0].chunk(2)
    w_v = stem.value.weight[:, :, 0, 0].unflatten(1, (m, -1))  # [C', m, C]
    out = torch.zeros(batch, channels, height, width, dtype=x.dtype)
    for b, y, z in itertools.product(range(batch), range(height), range(width)):
        q = (w_q @ x[b, :, y, z]).view(heads, d)
        scores, values = [], []
        for a, c in itertools.product(range(4), repeat=2):
            pixel = x[b, :, y // 4 * 4 + a, z // 4 * 4 + c]
            p = ((stem.emb_row[a] + stem.emb_col[c]) @ stem.nu.T).softmax(0)
            values.append(sum(p[i] * (w_v[:, i] @ pixel) for i in range(m)).view(heads, d))
            r = torch.cat([stem.rel_height[a - y % 4 + 3], stem.rel_width[c - z % 4 + 3]])
            scores.append((q * (w_k @ pixel).view(heads, d)).sum(1) + q @ r)
        weights = torch.stack(scores).softmax(0)  # [16, heads]
        out[b, :, y, z] = (weights[..., None] * torch.stack(values)).sum(0).flatten()
    return out


def test_the_stem_matches_its_equations():
    torch.manual_seed(0)
    stem = AttentionStem(3, 16, pool=False).double().eval()  # initial BN in eval mode: x / sqrt(1 + eps)
    x = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    torch.testing.assert_close(stem(x) * (1 + stem.bn.eps) ** 0.5, stem_oracle(stem, x))
    torch.testing.assert_close(stem.mixture_weights().sum(0), torch.ones(4, 4, dtype=torch.float64))
    pooled = AttentionStem(3, 16).double().eval()
    pooled.load_state_dict(stem.state_dict())
    torch.testing.assert_close(pooled(x), nn.functional.max_pool2d(stem(x), 4))


def test_the_stem_attends_in_float32_under_autocast():
    torch.manual_seed(0)
    stem = AttentionStem(3, 16, pool=False).eval()
    q, k, v = (torch.randn(1, 4, 2, 16, 4, dtype=torch.bfloat16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = stem._attend(q, k, v)
    assert torch.equal(out, stem._attend(q.float(), k.float(), v.float()).bfloat16())


def test_stem_blocks_do_not_see_each_other():
    stem = AttentionStem(3, 16, pool=False).eval()
    x = torch.randn(1, 3, 8, 8)
    before = stem(x)
    x[..., 4:, 4:] += 1
    changed = (stem(x) != before).any(1)[0]
    assert changed[4:, 4:].all() and not changed[:4].any() and not changed[:, :4].any()


def test_attention_stems_name_the_next_size():
    model = timm.create_model("sasa_resnet26", **TINY)
    with pytest.raises(ValueError, match="image of 30 x 33: .* the next size is 32 x 36"):
        model(torch.randn(1, 3, 30, 33))


@pytest.mark.parametrize(
    "keys,message",
    [
        ({"num_heads": 7}, "num_heads=7 must divide the layer's 16 channels"),
        ({"num_heads": 16}, "leaves head_dim=1; relative positions need it even"),
        ({"stage_ops": ["conv"]}, "must be four of conv, attention"),
        ({"stem": "none"}, "stem='none' must be one of conv, attention"),
        ({"position": "rotary"}, "position='rotary' must be one of"),
        ({"content": False, "position": "none"}, "leaves no score"),
        ({"stem": "attention"}, "image of 30 x 30: the attention stem needs sides that 4 divides"),
    ],
)
def test_build_model_refuses_before_training(keys, message):
    config = ModelConfig(name="sasa_resnet26", **({"width": 0.25, "num_heads": 2, "stem": "conv_small"} | keys))
    with pytest.raises(ConfigError, match=message):
        check_model(config, 30)


def test_an_unknown_model_and_one_that_cannot_take_the_size_are_refused():
    with pytest.raises(ConfigError, match="did you mean .*resnet50"):
        build_model(ModelConfig(name="sasa_resnet5"), 10, 32)
    with pytest.raises(
        ConfigError, match="halonet26t cannot take images of 32 pixels: .*block_size.*image_size=256 works"
    ):
        check_model(ModelConfig(name="halonet26t"), 32)


@pytest.mark.parametrize(
    "name,size",
    [
        ("resnet18", 32),
        ("vit_tiny_patch16_224", 32),
        ("swin_tiny_patch4_window7_224", 64),
        ("halonet26t", 256),
        ("botnet26t_256", 64),
        ("lambda_resnet26t", 64),
    ],
)
def test_timms_models_take_the_data_sets_size(name, size):
    model = build_model(ModelConfig(name=name, bn_momentum=0.01), 10, size)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, size, size)).shape == (1, 10)
    assert all(m.momentum == 0.01 for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_drop_path_grows_along_the_blocks_and_keeps_the_expectation():
    """With a rate of 0.35, R26's 8 blocks have rates of 0, 0.05, ..., 0.35; a block is dropped for whole images."""
    model = timm.create_model("hybrid_resnet26", **TINY, drop_path_rate=0.35)
    drops = [m for m in model.modules() if isinstance(m, DropPath)]
    assert [round(m.drop_prob, 6) for m in drops] == [round(0.05 * i, 6) for i in range(1, 8)]
    torch.manual_seed(0)
    out = drops[-1].train()(torch.ones(4000, 2, 3, 3))
    kept = out.flatten(1).mean(1) > 0
    assert torch.equal(out.flatten(1).min(1).values, out.flatten(1).max(1).values)
    assert 0.62 < kept.float().mean() < 0.68 and abs(out.mean() - 1) < 0.05 and torch.equal(drops[-1].eval()(out), out)


@pytest.mark.parametrize("name", ["conv_resnet26", "hybrid_resnet26", "sasa_resnet26"])
@pytest.mark.parametrize("border", ["mask", "zero"])
def test_folded_batch_norms_change_nothing_but_speed(name, border):
    torch.manual_seed(0)
    stem = "attention" if name.startswith("sasa") else "conv"
    model = timm.create_model(name, **TINY | {"stem": stem, "border": border})
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, -1.5, 1.5)
        torch.nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    images = torch.randn(2, 3, 36, 44).double()
    model = model.double().eval()
    folded = fold_batch_norms(model)
    torch.testing.assert_close(folded(images), model(images))
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    blocks = 8  # with attention and a zero border
    assert left == (stem == "attention") + (blocks if border == "zero" and name != "conv_resnet26" else 0)


@pytest.mark.parametrize("vendor,products", [("GenuineIntel", (1, 1, 0)), ("AuthenticAMD", (1, 0, 0))])
def test_a_pointwise_convolution_is_the_convolution(vendor, products, monkeypatch):
    """Maps of 5 x 5, 8 x 8 and 30 x 30 are products or convolutions by what is faster on the processor."""
    monkeypatch.setattr(machine, "_processor_fields", lambda: {"vendor_id": vendor})
    torch.manual_seed(0)
    conv = PointwiseConv2d(6, 10)
    for size, is_product in zip((5, 8, 30), products, strict=True):
        assert (size * size <= conv.max_positions) == is_product
        images = torch.randn(2, 6, size, size)
        expected = torch.nn.functional.conv2d(images, conv.weight)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            out = conv(images.contiguous(memory_format=memory_format))
            torch.testing.assert_close(out, expected)
            assert out.is_contiguous(memory_format=memory_format)
