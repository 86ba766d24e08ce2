"""Check the keys of the attention window: dilation, the shifted border, scale, and a window size per stage."""

import itertools
import math
import re

import pytest
import timm
import torch
import yaml
from attention_oracle import by_loops, window_along
from reading_runs import rows
from running_commands import TINY
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, pad

from sasa_train.attention.dispatch import pair
from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.keys import MODEL_KEYS
from sasa_train.config.saved import load_config, to_yaml
from sasa_train.models import LocalSelfAttention2d, fold_batch_norms
from sasa_train.models.counting import count_flops, count_params, meta_model
from sasa_train.models.pretrained import load_pretrained
from sasa_train.refusal import ConfigError
from sasa_train.trained import load_trained
from sasa_train.visualize.capture import attention_layers
from sasa_train.visualize.geometry import mean_distances, uniform_distance, window_at

KEYS = ("model.border=shift", "model.dilation=2", "model.scale=inverse_sqrt", "model.kernel_size=[5,3,1,1]",
        "model.null_key=true", "model.share_rel=false", "model.own_value=true", "model.padding=reflect")  # fmt: skip
NET = {"stem": "conv_small", "width": 0.125, "num_heads": 2, "num_classes": 5}


def by_hand(layer: LocalSelfAttention2d, x: Tensor) -> Tensor:
    """Return the layer's output from a list of neighbours for each query."""
    query, key, value = layer.qkv(x).unflatten(1, (3, layer.num_heads, -1)).permute(1, 0, 2, 4, 5, 3)
    height, width = x.shape[2:]
    windows, distances = pair(layer.kernel_size), pair(layer.dilation)
    out = torch.zeros_like(value)
    for i, j in itertools.product(range(height), range(width)):
        rows = window_along(i, height, windows[0], distances[0], layer.border)
        columns = window_along(j, width, windows[1], distances[1], layer.border)
        near = [(y, x, row, column) for y, row in rows for x, column in columns if 0 <= y < height and 0 <= x < width]
        ys, xs, in_height, in_width = (list(numbers) for numbers in zip(*near, strict=True))
        r = torch.cat([layer.rel_height[..., in_height, :], layer.rel_width[..., in_width, :]], -1)  # [(N,) keys, D]
        scores = ((key[:, :, ys, xs] + r) * query[:, :, i, j, None]).sum(-1)  # [B, N, keys]
        exponentials = (layer.scale * scores).exp()
        weights = exponentials / (exponentials.sum(-1, keepdim=True) + (1 if layer.null_key else 0))
        out[:, :, i, j] = (weights[..., None] * value[:, :, ys, xs]).sum(2)
    if layer.own_value is not None:
        out = out + layer.own_value.unflatten(0, (layer.num_heads, 1, 1, -1)) * value
    out = out.permute(0, 1, 4, 2, 3).flatten(1, 2)
    return avg_pool2d(out, 2, ceil_mode=True) if layer.stride == 2 else out


def compute_by_hand(model: nn.Module) -> nn.Module:
    for layer in attention_layers(model).values():
        if isinstance(layer, LocalSelfAttention2d):
            layer.forward = lambda x, layer=layer: by_hand(layer, x)
    return model


@pytest.mark.parametrize(
    "keys",
    [
        {"border": "shift", "share_rel": False},
        {"border": "shift", "kernel_size": (3, 1), "dilation": (2, 3), "stride": 2},
        {"dilation": 2, "scale": 0.25},
        {"border": "mask", "kernel_size": (1, 5), "dilation": (1, 2), "scale": 2.0, "null_key": True},
        {"scale": "inverse_sqrt", "null_key": True, "share_rel": False},
        {"own_value": True, "share_rel": False},
        {"own_value": True, "stride": 2},
    ],
    ids=str,
)
def test_a_layer_has_every_option_of_the_op(keys):
    """The output and the gradient of each parameter equal those of attention built from a list of neighbours."""
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(6, 8, num_heads=2, backend="reference", **{"kernel_size": 3} | keys).double()
    if layer.own_value is not None:
        assert torch.equal(layer.own_value, torch.zeros(8).double())  # at first, the key changes nothing
        nn.init.normal_(layer.own_value)
    x = torch.randn(2, 6, 6, 7, dtype=torch.float64)
    expected, ours = by_hand(layer, x), layer(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)  # sums of 15 products near 1 in float64
    grad = torch.randn_like(ours)
    parameters = list(layer.parameters())
    pairs = zip(*(torch.autograd.grad(out, parameters, grad) for out in (ours, expected)), strict=True)
    for of_op, of_hand in pairs:
        torch.testing.assert_close(of_op, of_hand, rtol=0, atol=1e-11)
    num_rows = (2 * k - 1 if layer.border == "shift" else k for k in pair(layer.kernel_size))
    assert [layer.rel_height.shape[-2], layer.rel_width.shape[-2]] == list(num_rows)
    if layer.stride == 1 and layer.own_value is None:
        query, key, value = layer._projections(x)
        options = {"dilation": pair(layer.dilation), "border": layer.border, "scale": layer.scale}
        options["null_key"] = layer.null_key
        loops = by_loops(query, key, value, layer.rel_height, layer.rel_width, pair(layer.kernel_size), **options)
        torch.testing.assert_close(ours, loops.permute(0, 1, 4, 2, 3).flatten(1, 2), rtol=0, atol=1e-12)


def test_a_run_with_every_key_trains_resumes_and_leaves_the_project(in_process, tmp_path):
    """The checkpoint's logits are those of attention built by hand; no command takes the run for one without keys."""
    run = (*TINY, "data.image_size=16", *KEYS, "run_name=shifted")
    assert "layer1.0" in in_process("summary", *run[:-1]).stdout
    in_process("train", *run, "trainer.max_steps=2")
    in_process("train", *run, "trainer.max_steps=4", "allow_config_change=[trainer.max_steps]")
    folder = tmp_path / "out/shifted"
    assert [row["step"] for row in rows(folder) if row["split"] == "train"] == [1, 2, 3, 4]
    trained = load_trained(folder)
    layers = {name: layer for name, layer in attention_layers(trained.model).items() if name != "stem"}
    keys = ("kernel_size", "dilation", "border", "scale", "null_key")
    found = {name[:6]: tuple(getattr(layer, key) for key in keys) for name, layer in layers.items()}
    head_dims = (4, 8, 16, 32)  # of 2 heads at an eighth of the width
    expected = {f"layer{i + 1}": (k, 2, "shift", head_dims[i] ** -0.5, True) for i, k in enumerate((5, 3, 1, 1))}
    assert found == expected and all(layer.rel_height.shape[0] == 2 for layer in layers.values())
    images = torch.rand(2, 3, 16, 16)
    logits = trained.model(images)
    torch.testing.assert_close(logits, compute_by_hand(trained.model)(images), rtol=1e-4, atol=1e-5)  # float32 sums

    top1 = [row["top1"] for row in rows(folder) if row["split"] == "val"][-1]
    assert f"top1   {top1:.2f}" in in_process("evaluate", "out/shifted/checkpoints/last.pt").stdout
    figures = ("attention_maps", "attention_distance")
    in_process("visualize", "out/shifted", *figures, "--num-images", "4")
    assert {path.stem for path in (folder / "figures").iterdir()} == set(figures)
    in_process("export", "out/shifted", "--formats", "safetensors", "hub")
    hub = timm.create_model(f"local-dir:{folder / 'export/hub'}", pretrained=True).eval()
    torch.testing.assert_close(hub(images), logits, rtol=0, atol=0)


def test_a_window_that_does_not_fit_is_refused_with_sizes_that_do(in_process):
    """Digits have maps of 8, 4, 2 and again 2 positions, because the only block of the last stage pools afterwards."""
    refused = in_process("train", *TINY, "model.border=shift", expect=2).stderr
    assert "layer3 has maps of 2 x 2 positions, and kernel_size=3 with dilation=1 spans 3" in refused
    fitting = re.search(r"kernel_size=(\S+) fits", refused)[1]
    assert fitting == "[3,3,1,1]"
    timm.create_model("hybrid_resnet26", border="shift", kernel_size=yaml.safe_load(fitting), **NET)(
        torch.randn(2, 3, 8, 8)
    )
    with pytest.raises(ValueError, match=r"dilation=3 spans 9; a smaller dilation, or border='mask', fits"):
        timm.create_model("hybrid_resnet26", border="shift", kernel_size=3, dilation=3, **NET)(torch.randn(2, 3, 8, 8))


def test_illegal_values_are_named():
    for key, value, rule in (
        ("kernel_size", [3, 3], "must be a whole number, or four, one per stage"),
        ("kernel_size", [3, 3, 3, 4], "must be odd"),
        ("kernel_size", [3, 3, 3, 1.0], "must be a whole number, at least 1"),
        ("dilation", 0, "must be a whole number, at least 1"),
        ("dilation", (1, 2), "must be a whole number, at least 1"),
        ("scale", -1.0, "must be a finite number above 0"),
        ("border", "wrap", "must be one of mask, zero, shift"),
        ("null_key", 1, "must be True or False"),
        ("padding", "circular", "must be one of zeros, reflect"),
    ):
        with pytest.raises(ValueError, match=f"{key}=.* {rule}"):
            timm.create_model("hybrid_resnet26", **NET, **{key: value})
    for override, message in (
        ("model.kernel_size=[5,5]", r"model.kernel_size=\[5,5\] must be a whole number, or four, one per stage"),
        ("model.kernel_size=[7,4,3,3]", r"model.kernel_size=\[7, ?4, ?3, ?3\] must be odd"),
        ("model.kernel_size=[3,3,3,17]", "must be 15 at most for images of 8 pixels"),
        ("model.kernel_size=wide", "model.kernel_size=wide must be a whole number, or four"),
        ("model.dilation=0", "model.dilation=0 must be positive"),
        ("model.dilation=8", "model.dilation=8 must be 7 at most for images of 8 pixels: no window reaches further"),
        ("model.dilation=1.5", "model.dilation=1.5 must be a whole number"),
        ("model.scale=0", "model.scale=0.0 must be a positive number, or inverse_sqrt"),
        ("model.scale=auto", "model.scale=auto must be a positive number, or inverse_sqrt"),
    ):
        with pytest.raises(ConfigError, match=message):
            compose_config([override])


def test_earlier_configs_and_run_names_mean_what_they_meant():
    """A config without the keys has their defaults, and runs of `my_images` from before are found by their names."""
    before = compose_config(["model.kernel_size=5", "model.border=zero"])
    values = yaml.safe_load(to_yaml(before))
    for key in ("dilation", "scale", "null_key", "share_rel", "own_value", "axial", "padding"):
        assert key in MODEL_KEYS and values["model"].pop(key) is None
    assert load_config(yaml.safe_dump(values)) == before
    assert compose_config(["model.kernel_size=[5,5,5,5]"]) == compose_config(["model.kernel_size=5"])
    own = compose_config(["experiment=my_images", "data.root=pictures"])
    assert default_run_name(own) == "pictures-s0-37794b6a"
    fields = {
        key: getattr(timm.create_model("hybrid_resnet26", **NET).layer1[0].conv2, key) for key in ("dilation", "scale")
    }
    assert fields == {"dilation": 1, "scale": 1.0}


def test_costs_of_each_key():
    """A shifted window of K x K has 2 K - 1 embeddings instead of K in each of two tables; no key changes the FLOPs."""
    plain = meta_model(lambda: timm.create_model("hybrid_resnet26"))
    for keys in ({"border": "shift", "kernel_size": 7}, {"dilation": 3}, {"scale": 0.1}):
        model = meta_model(lambda keys=keys: timm.create_model("hybrid_resnet26", **keys))
        assert count_flops(model, 224) == count_flops(plain, 224)
        tables = [p for name, p in plain.named_parameters() if name.endswith(("rel_height", "rel_width"))]
        extra = sum(6 * table.shape[-1] for table in tables) if "border" in keys else 0
        assert count_params(model) == count_params(plain) + extra
    per_stage = meta_model(lambda: timm.create_model("hybrid_resnet26", kernel_size=[7, 5, 3, 3]))
    assert count_flops(per_stage, 224) < count_flops(plain, 224)


@pytest.mark.parametrize("key", [None, "null_key", "own_value"])
def test_norms_fold_where_outputs_are_averages_of_values(key):
    torch.manual_seed(0)
    keys = {"border": "shift", "kernel_size": [3, 3, 1, 1], "padding": "reflect"} | ({key: True} if key else {})
    model = timm.create_model("hybrid_resnet26", **keys, **NET).eval()
    for layer in attention_layers(model).values():
        if layer.own_value is not None:
            nn.init.normal_(layer.own_value)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.weight)
    folded, images = fold_batch_norms(model), torch.randn(2, 3, 8, 8)
    kept = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(name.endswith("bn2") for name in kept) and len(kept) == (8 if key else 0)  # those after attention
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)


def test_own_values_are_added_in_half_precision_and_are_not_decayed():
    layer = LocalSelfAttention2d(4, 4, 3, 1, own_value=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(1, 4, 5, 5)).dtype == torch.bfloat16
    model = timm.create_model("hybrid_resnet26", own_value=True, **NET)
    decayed = param_groups_weight_decay(model, 1.0, model.no_weight_decay())[1]["params"]
    assert all(parameter.dim() > 1 for parameter in decayed)


def test_axial_attention_sees_a_column_and_then_a_row():
    """Each half equals attention built from a list of neighbours."""
    torch.manual_seed(0)
    model = timm.create_model("hybrid_resnet26", axial=True, kernel_size=[5, 3, 3, 3], **NET).eval()
    shapes = [layer.kernel_size for layer in attention_layers(model).values()]
    assert shapes == [(5, 1), (1, 5), *[(3, 1), (1, 3)] * 7]
    assert [layer.stride for layer in attention_layers(model).values()][2:4] == [1, 2]  # pooled at the end
    images = torch.randn(2, 3, 8, 8)
    logits = model(images)
    torch.testing.assert_close(fold_batch_norms(model)(images), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compute_by_hand(model)(images), logits, rtol=1e-4, atol=1e-5)  # float32 sums
    with pytest.raises(ValueError, match=r"layer1 has maps of 8 x 8 .*kernel_size=9 .*kernel_size=\[7,3,1,1\] fits"):
        timm.create_model("hybrid_resnet26", axial=True, kernel_size=[9, 3, 1, 1], border="shift", **NET)(images)


@pytest.mark.parametrize("name", ["conv_resnet26", "hybrid_resnet26"])
def test_reflect_padding_continues_maps_by_their_mirror_image(name):
    """Each convolution larger than 1x1 sees the same numbers beyond the border as inside; the others see no border."""
    model = timm.create_model(name, padding="reflect", **(NET | {"stem": "conv"})).eval()
    plain = timm.create_model(name, **(NET | {"stem": "conv"})).eval()
    assert plain.load_state_dict(model.state_dict()) and count_params(plain) == count_params(model)
    seen = []

    def compare(conv: nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> None:
        beyond = pad(inputs[0], [conv.padding[0]] * 4, mode="reflect")
        torch.testing.assert_close(out, conv2d(beyond, conv.weight, stride=conv.stride))
        seen.append(conv.kernel_size)

    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1):
        conv.register_forward_hook(compare)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(images), plain(images))
    assert seen == [(7, 7), *[(3, 3)] * (8 if name == "conv_resnet26" else 0)]


def test_each_offset_keeps_its_embedding_at_another_border_or_window():
    def build(**keys) -> nn.Module:
        return timm.create_model("hybrid_resnet26", **NET, **keys)

    given = build(kernel_size=5)
    shifted = build(kernel_size=[3, 3, 1, 1], border="shift")
    report = load_pretrained(shifted, given.state_dict())
    assert set(report.adapted.values()) == {"offsets 5 -> 1"} and report.share == 1
    assert torch.equal(shifted.layer1[0].conv2.rel_height, given.layer1[0].conv2.rel_height)  # -2 to 2 in both
    back = build(kernel_size=3)
    assert set(load_pretrained(back, shifted.state_dict()).adapted.values()) == {"window 5 -> 3", "window 1 -> 3"}
    assert torch.equal(back.layer2[0].conv2.rel_width, shifted.layer2[0].conv2.rel_width[1:-1])


# ---- figures


def test_a_shifted_dilated_window_is_drawn_where_it_lies():
    """On a map of 8 x 8 positions of 4 pixels, the query at (0, 7) sees rows 0, 2, 4 and columns 3, 5, 7."""
    layer = LocalSelfAttention2d(2, 2, 3, 1, border="shift", dilation=2)
    weights = torch.arange(8 * 8 * 9.0).view(1, 8, 8, 9)
    window = window_at(layer, weights, (0, 31), (32, 32))
    assert (window.query, window.box, window.query_box) == ((0, 7), (12, 0, 32, 20), (28, 0, 32, 4))
    assert torch.equal(window.weights[:, ::2, ::2], weights[:, 0, 7].view(1, 3, 3))
    assert window.weights.sum() == weights[:, 0, 7].sum()  # nothing between the keys
    layer.border = "mask"
    assert window_at(layer, weights, (0, 31), (32, 32)).box == (20, 0, 32, 12)
    layer.kernel_size, layer.dilation = (1, 3), (1, 3)
    assert window_at(layer, weights[..., :3], (9, 17), (32, 32)).box == (4, 8, 32, 12)


def test_distances_of_shifted_and_dilated_windows():
    """On 3 x 3 positions, every shifted 3 x 3 window is the whole map; a dilated one reaches twice as far."""
    layer = LocalSelfAttention2d(2, 2, 3, 1, border="shift")
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0))
    assert uniform_distance(layer, 3, 3) == pytest.approx(torch.cdist(places, places).mean().item())
    weights = torch.zeros(1, 1, 9, 9, 9)
    weights[..., 0] = 1  # the key above and to the left
    layer = LocalSelfAttention2d(2, 2, 3, 1, dilation=(2, 3), null_key=True)
    weights[..., 0] = 0.25  # the rest goes to the null key, which is nowhere
    assert mean_distances(layer, weights).item() == pytest.approx(math.hypot(2, 3))
    layer = LocalSelfAttention2d(2, 2, 3, 1, border="shift", dilation=3)
    corner = torch.zeros(1, 1, 9, 9, 9)
    corner[..., 0, 0, 8] = 1  # the query in the corner sees the key two steps below and to the right
    assert mean_distances(layer, corner).item() == pytest.approx(6 * math.sqrt(2) / 81)
