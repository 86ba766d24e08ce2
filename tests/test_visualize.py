"""Check that the weights, distances and windows shown by sasa-visualize are the model's own; test the command."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from measuring_text import wrong_texts
from PIL import Image
from reading_runs import board
from tensorboard import context
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from torch.nn import functional
from writing_runs import write_run

from sasa_train import train
from sasa_train import visualize as command
from sasa_train.attention import attention_weights
from sasa_train.config.compose import compose_config
from sasa_train.data.datasets import balanced
from sasa_train.data.loader import build_loaders
from sasa_train.figures import rendered
from sasa_train.models import AttentionStem, LocalSelfAttention2d, ResNet
from sasa_train.refusal import ConfigError
from sasa_train.runs.metrics import read_metrics
from sasa_train.trained import load_trained
from sasa_train.visualize import geometry
from sasa_train.visualize.attention_figures import (
    View,
    draw_attention_heads,
    draw_attention_maps,
    draw_distances,
    draw_relative_embeddings,
)
from sasa_train.visualize.capture import WeightsError, attention_layers, attention_of
from sasa_train.visualize.class_figures import draw_class_accuracy, draw_confusion, draw_mistakes
from sasa_train.visualize.curve_figures import draw_curves, draw_lr_schedule, draw_training_curves
from sasa_train.visualize.geometry import Distances, Window, default_pixels, mean_distances, uniform_distance, window_at
from sasa_train.visualize.names import NAMES, OF_SEVERAL
from sasa_train.visualize.sample_figures import augmented_samples, draw_augmented
from sasa_train.visualize.val_sample import Prediction

# All values are float64: sums of several hundred products near 1, each accurate to 1e-16.
EXACT = {"rtol": 0, "atol": 1e-12}
HEIGHT, WIDTH, HEADS, KERNEL = 5, 7, 2, 3
KEYS = [{}, {"position": "absolute"}, {"position": "none"}, {"content": False}, {"stride": 2}]
KEYS += [{"border": "zero", "share_rel": False}]


def build_layer(kernel_size=KERNEL, **keys) -> LocalSelfAttention2d:
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(8, 12, kernel_size, HEADS, backend="reference", **keys)
    return layer.double()


def windows_of(maps: torch.Tensor) -> torch.Tensor:
    """Rearrange [B, C, H, W] into windows [B, N, H, W, K*K, D] with torch's own unfold, with zeros outside the map."""
    columns = functional.unfold(maps, KERNEL, padding=KERNEL // 2)  # [B, C * K * K, H * W]
    split = columns.unflatten(1, (HEADS, -1, KERNEL**2)).unflatten(-1, maps.shape[-2:])  # [B, N, D, K*K, H, W]
    return split.permute(0, 1, 4, 5, 3, 2)


# ---- weights


@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_weights_times_values_are_the_layers_output(keys):
    """Check that attention maps show the weights that the model used; they would be meaningless otherwise."""
    layer, x = build_layer(**keys), torch.randn(3, 8, HEIGHT, WIDTH, dtype=torch.float64)
    weights = layer.attention_weights(x)
    assert weights.shape == (3, HEADS, HEIGHT, WIDTH, KERNEL**2)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **EXACT)
    values = windows_of(functional.conv2d(x, layer.qkv.weight[-12:]))
    expected = (weights[..., None] * values).sum(-2).permute(0, 1, 4, 2, 3).flatten(1, 2)
    if layer.stride == 2:
        expected = functional.avg_pool2d(expected, 2, ceil_mode=True)
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_weights_times_values_are_the_stems_output():
    torch.manual_seed(0)
    stem = AttentionStem(3, 12, num_heads=HEADS, pool=False, backend="reference").double().eval()
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    weights = stem.attention_weights(x)
    assert weights.shape == (2, HEADS, 2 * 3, 16, 16)
    value = stem.value(stem._mix(x))
    expected = torch.zeros_like(value)
    for block in range(6):
        top, left = 4 * (block // 3), 4 * (block % 3)
        inside = value[:, :, top : top + 4, left : left + 4].flatten(2).unflatten(1, (HEADS, -1))  # [B, N, D, 16]
        attended = torch.einsum("bnij,bndj->bndi", weights[:, :, block], inside)
        expected[:, :, top : top + 4, left : left + 4] = attended.flatten(1, 2).unflatten(-1, (4, 4))
    torch.testing.assert_close(stem(x), stem.bn(expected), **EXACT)
    with pytest.raises(ValueError, match="8 x 8"):
        stem.attention_weights(x[:, :, :5, :8])


def test_equal_scores_share_the_weight_among_the_keys_that_take_part():
    """At a corner, a 3 x 3 window has 4 keys inside the map; with border=zero, the 5 others also receive weight."""
    zero = torch.zeros(1, 1, 4, 4, 2)
    corner = attention_weights(zero, zero, kernel_size=3)[0, 0, 0, 0]
    assert corner.tolist() == [0, 0, 0, 0, 0.25, 0.25, 0, 0.25, 0.25]
    everywhere = attention_weights(zero, zero, kernel_size=3, border="zero")
    torch.testing.assert_close(everywhere, torch.full_like(everywhere, 1 / 9))
    inputs = [torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rel = [torch.randn(3, 1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *tensors: attention_weights(*tensors, kernel_size=3), (*inputs, *rel))
    with pytest.raises(ValueError, match="kernel_size=4 must be odd"):
        attention_weights(zero, zero, kernel_size=4)
    with pytest.raises(ValueError, match="pass a key or content=False"):
        attention_weights(zero, None, kernel_size=3)


@pytest.mark.parametrize("share_rel", [True, False])
def test_relative_scores_are_the_mean_of_every_querys_own(share_rel):
    layer, x = build_layer(share_rel=share_rel), torch.randn(3, 8, HEIGHT, WIDTH, dtype=torch.float64)
    query = functional.conv2d(x, layer.qkv.weight[:12]).unflatten(1, (HEADS, -1))  # [B, N, D, H, W]
    rows, columns = (rel.expand(HEADS, -1, -1) for rel in (layer.rel_height, layer.rel_width))
    scores = torch.einsum("bndhw,nkd->bnkhw", query[:, :, :3], rows)[:, :, :, None]
    scores = scores + torch.einsum("bndhw,nkd->bnkhw", query[:, :, 3:], columns)[:, :, None]
    torch.testing.assert_close(layer.relative_scores(x), scores.mean((0, 4, 5)), **EXACT)
    assert build_layer(position="none").relative_scores(x) is None


def test_weights_are_captured_in_one_pass_and_checked():
    """Only the requested layers are captured, the model is left unchanged, and invalid weights raise an error."""
    torch.manual_seed(0)
    model = ResNet(26, 5, stem="attention_small", width=0.125, num_heads=2, kernel_size=3).eval()
    images, passes = torch.randn(2, 3, 8, 8), []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    logits, found = attention_of(model, images, ["stem", "layer2.1.conv2"])
    handle.remove()
    assert {name: tuple(weights.shape) for name, weights in found.items()} == {
        "stem": (2, 4, 4, 16, 16), "layer2.1.conv2": (2, 2, 4, 4, 9),
    }  # fmt: skip
    assert len(passes) == 1 and not any(layer._forward_pre_hooks for layer in attention_layers(model).values())
    torch.testing.assert_close(logits, model(images).detach())
    with torch.no_grad():
        model.layer3[0].conv2.qkv.weight[0, 0] = math.nan
    with pytest.raises(WeightsError, match=r"layer3\.0\.conv2"):
        attention_of(model, images)


# ---- distances and windows, by hand


def test_distance_of_uniform_attention_by_hand():
    """With 3 x 3 windows on a 3 x 3 map, there are nine keys at the centre, six at an edge and four in a corner."""
    layer, root = build_layer(), math.sqrt(2)
    centre, edge, corner = (4 + 4 * root) / 9, (3 + 2 * root) / 6, (2 + root) / 4
    zero = torch.zeros(1, 1, 3, 3, 1)
    uniform = attention_weights(zero, zero, kernel_size=3)
    at = {place: mean_distances(layer, uniform[:, :, y : y + 1, x : x + 1]).item() for place, (y, x) in
          {"centre": (1, 1), "edge": (0, 1), "corner": (2, 2)}.items()}  # fmt: skip
    assert at == pytest.approx({"centre": centre, "edge": edge, "corner": corner})
    assert uniform_distance(layer, 3, 3) == pytest.approx((centre + 4 * edge + 4 * corner) / 9)
    assert uniform_distance(build_layer(border="zero"), 3, 3) == pytest.approx(centre)


def test_distance_of_attention_to_one_key():
    """Head 0 attends to its own position, and head 1 to the one two columns to the left and one row up."""
    weights = torch.zeros(1, 2, 4, 4, 25)
    weights[:, 0, ..., 12] = 1
    weights[:, 1, ..., 5] = 1
    assert mean_distances(build_layer(5), weights).tolist() == pytest.approx([0, math.sqrt(5)])
    assert geometry.block_distances()[0, 15].item() == pytest.approx(3 * math.sqrt(2))
    assert mean_distances(AttentionStem(3, 8), torch.eye(16).expand(1, 1, 6, 16, 16)).item() == 0


def test_a_window_is_drawn_where_it_lies_and_ends_at_the_border():
    """Check 5 x 5 windows on an 8 x 8 map of a 32-pixel image, where each position covers 4 x 4 pixels."""
    weights = torch.arange(2 * 8 * 8 * 25.0).view(2, 8, 8, 25)
    layer = build_layer(5)
    inside = window_at(layer, weights, (13, 18), (32, 32))
    assert (inside.query, inside.box, inside.query_box) == ((3, 4), (8, 4, 28, 24), (16, 12, 20, 16))
    assert torch.equal(inside.weights, weights[:, 3, 4].view(2, 5, 5))
    image = Prediction(np.zeros((32, 32, 3), dtype=np.uint8), None, "a", 0.5)
    figure = draw_attention_maps([View(image, (13, 18), {"layer1.0.conv2": inside})])
    outlined = {(box.get_x(), box.get_y(), box.get_width()) for box in figure.axes[1].patches}
    assert outlined == {(8, 4, 20), (16, 12, 4)}  # the window, and the query's position in it
    assert "enlarged" not in figure.get_suptitle()  # nothing is
    # In deep layers, a dark blue of 85 % opacity for weights of 0 once hid nearly the whole photograph.
    shown = figure.axes[1].images[-1]
    opacities = [shown.cmap(shown.norm(part * inside.weights.mean(0).max().item()))[3] for part in (0, 0.5, 1)]
    assert opacities[0] == 0 and 0.5 < opacities[1] < opacities[2] == 0.9 and shown.get_alpha() is None
    assert "row 13, column 18" in figure.axes[0].get_ylabel()
    corner = window_at(layer, weights, (0, 31), (32, 32))
    assert (corner.query, corner.box) == ((0, 7), (20, 0, 32, 12))
    assert torch.equal(corner.weights, weights[:, 0, 7].view(2, 5, 5)[:, 2:, :3])
    bottom = window_at(layer, weights, (31, 4), (32, 32))
    assert (bottom.box, bottom.weights.shape) == ((0, 20, 16, 32), (2, 3, 4))


def test_a_map_whose_side_was_rounded_up_lies_where_its_strides_put_it():
    """Sides of 50, 25, 13 and 7 put the seven positions 8 pixels apart, not 50 / 7; the last one covers two pixels."""
    weights = torch.arange(1 * 7 * 7 * 9.0).view(1, 7, 7, 9)
    window = window_at(build_layer(), weights, (39, 49), (50, 50))
    assert (window.query, window.reduction, window.box) == ((4, 6), 8, (40, 24, 56, 48))
    assert torch.equal(window.weights, weights[:, 4, 6].view(1, 3, 3)[:, :, :2])


def test_a_layer_whose_queries_have_one_key_has_no_distance():
    """Check a layer with a kernel_size of 1 or a 1x1 map, as in the last blocks of a ResNet-38 on digits."""
    layers = [Distances("layer1", [2.0, 3.0], 2.5), Distances("layer4", [0.0, 0.0], 0.0)]
    figure = draw_distances(layers, 30)
    heads = [dict(zip(*axis.lines[0].get_data(), strict=True)) for axis in figure.axes]
    assert [set(points) for points in heads] == [{0}, {0}]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["layer1", "layer4 (one key)"]
    assert rendered(figure) and rendered(draw_distances(layers[1:], 30))


def test_names_are_shown_to_the_letter():
    """Check that a class named $5 or \\frac$ is not shown as a formula, and that a run named _1 is in the legend."""
    names = ["$5 or \\frac$", "_under", "a\nb"]
    figure = draw_confusion(torch.eye(3, dtype=torch.int64), names)
    rendered(figure)  # parses the labels
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["\\$5 or \\frac\\$", " _under", "a\\nb"]
    rows = [{"split": "val", "step": 5, "epoch": 1, "loss": 1.0, "top1": 50.0}]
    legend = draw_training_curves({"_1": rows, "$x_{$": rows}).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [" _1", "\\$x_{\\$"]


@pytest.mark.parametrize("num_classes", [3, 200])
def test_no_text_covers_another_or_leaves_the_page(num_classes):
    """Class names of 40 characters that differ only at their end, as those of real data sets do."""
    names = [f"n01443537_fish_seen_from_the_side, no{i:03d}" for i in range(num_classes)]
    assert {len(name) for name in names} == {40}
    confusion = torch.eye(num_classes, dtype=torch.int64) * 50_000 + 1
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    mistakes = [Prediction(image, names[0], names[-1], 0.99, "a_photo_of_a_fish_by_the_sea_20231017_123456.jpeg")] * 7
    windows = {f"layer{i}.0.conv2": Window((2, 3), 2, 3, torch.full((3, 5, 5), 0.03), 4) for i in (1, 2, 3)}
    views = [View(mistakes[0], (10, 12), windows)] * 2
    scores = {f"layer{i}.0.conv2": torch.randn(4, 7, 7) for i in (1, 2)}
    plain, config = torch.zeros(2, 3, 32, 32), compose_config(["augment.mixup=0.2", "augment.policy=trivial_augment"])
    accuracy = draw_class_accuracy(confusion, names)
    figures = [accuracy, draw_confusion(confusion, names), draw_mistakes(mistakes, 10_000, 1234)]
    if num_classes == 3:
        figures += [
            draw_attention_maps(views), draw_attention_heads(views[0]),
            draw_augmented(plain, [plain] * 7, names, config),
            draw_relative_embeddings({name: scores[name][0] for name in scores}, scores, 512),
            draw_distances([Distances(f"layer{i}.0.conv2", [1.0, 2.0], 1.5) for i in range(16)], 512),
        ]  # fmt: skip
    assert [wrong_texts(figure) for figure in figures] == [[]] * len(figures)
    shown = [label.get_text() for label in accuracy.axes[0].get_yticklabels()]
    assert len(set(shown)) == len(shown) == min(num_classes, 40) and all("…" in name for name in shown)
    assert accuracy.axes[0].get_xlim() == (0, 100)


def log_of(num_epochs: int, **keys) -> list[dict]:
    """Return the rows of a log with one train and one val row per epoch."""
    row = {"loss": 1.0, "top1": 99.9, "lr": 0.1} | keys
    return [
        row | {"split": split, "step": 5 * e, "epoch": e}
        for e in range(1, num_epochs + 1)
        for split in ("train", "val")
    ]


def test_accuracies_end_at_100_and_epochs_are_whole():
    runs = {f"photographs_of_flowers-hybrid_resnet26-e2-s{i}-b4dbb30e": log_of(2) for i in range(10)}
    for figure in (
        draw_training_curves(runs),
        draw_lr_schedule(runs),
        draw_training_curves({"": log_of(2, loss=None)}),
    ):
        assert wrong_texts(figure) == []
        assert all(float(tick).is_integer() for axis in figure.axes for tick in axis.get_xticks())
        assert all(line.get_xydata().size for axis in figure.axes for line in axis.lines)
    *_, of_top1 = draw_training_curves(runs).axes
    assert 0 <= of_top1.get_ylim()[0] < of_top1.get_ylim()[1] <= 100


def test_one_large_loss_does_not_flatten_the_rest():
    """The loss of the first step was 919, and the others, below 3, lay on the axis."""
    rows = log_of(30)
    axis = draw_training_curves({"": rows}).axes[0]
    assert axis.get_yscale() == "linear"
    rows[0]["loss"] = 919.0
    figure = draw_training_curves({"": rows})
    assert figure.axes[0].get_yscale() == "log" and figure.get_suptitle().startswith("loss (logarithmic) and top1")
    assert not wrong_texts(figure)
    rows[0]["loss"] = 9e30
    figure = draw_training_curves({"": rows})
    assert not wrong_texts(figure) and len(figure.axes[0].get_yticks()) > 3
    rows[-1]["loss"] = -1.0  # of a user's own loss
    assert draw_training_curves({"": rows}).axes[0].get_yscale() == "linear"


def test_no_figure_is_drawn_of_fewer_than_two_points(run_dir, tmp_path, in_process):
    """A run of one epoch, or one that was stopped before its first train row."""
    log, drawn = run_dir / "metrics.jsonl", run_dir / "figures"
    for rows, num_rows in ((log_of(1), 1), (log_of(3, lr=None), 0)):
        log.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        said = in_process("visualize", str(run_dir), "lr_schedule", expect=2)
        reason = f"a curve takes two rows, and the log has {num_rows} with a learning rate"
        assert f"lr_schedule cannot be drawn: {reason}" in said.stderr
    assert not drawn.exists()
    out = "--out", str(tmp_path / "both")
    twice = in_process("visualize", str(run_dir), str(run_dir), *out, expect=2)
    assert "tiny: a run is given twice; give each run once" in twice.stderr
    runs = [str(run_dir), str(shutil.copytree(run_dir, tmp_path / "other")), *out]
    assert "not drawn: lr_schedule" in in_process("visualize", *runs).stdout
    assert [path.stem for path in (tmp_path / "both").iterdir()] == ["training_curves"]
    assert not list(draw_curves({"": log_of(1)}))


def test_a_stems_window_is_the_block_of_its_pixel():
    weights = torch.arange(2 * 9 * 256.0).view(2, 9, 16, 16)
    window = window_at(AttentionStem(3, 8), weights, (5, 10), (12, 12))
    assert (window.box, window.query_box) == ((8, 4, 12, 8), (10, 5, 11, 6))
    assert torch.equal(window.weights, weights[:, 5, 6].view(2, 4, 4))


def test_queries_are_the_centre_and_the_strongest_contrast():
    image = np.full((32, 32, 3), 100, dtype=np.uint8)
    image[4:8, 24:28] = 255
    centre, (row, column) = default_pixels(image)
    assert centre == (16, 16) and 3 <= row <= 8 and 23 <= column <= 28


def test_runs_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ConfigError, match="11 runs"):
        next(draw_curves({str(i): [] for i in range(11)}))


# ---- the command


@pytest.fixture
def run_dir(tiny_run, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny"))


def board_images(folder: Path) -> dict[str, list[int]]:
    events = board(folder)
    return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}


def test_all_figures_into_the_run_folder_and_tensorboard(run_dir, in_process):
    before = board(run_dir / "tensorboard")
    said = in_process("visualize", str(run_dir), "--num-images", "20", "trainer.device=cpu").stdout
    assert "over 20 of val's 30 images" in said and "not drawn" not in said
    assert sorted(path.name for path in (run_dir / "figures").iterdir()) == sorted(f"{name}.png" for name in NAMES)
    step = torch.load(run_dir / "checkpoints/best.pt", weights_only=True)["step"]
    expected = {f"visualize/{name}": [step] for name in NAMES}
    assert board_images(run_dir / "tensorboard/figures") == expected

    # A figure drawn again replaces its earlier version; the run's own series is unchanged and continues after a resume.
    assert command.run_command([str(run_dir), "lr_schedule", "--formats", "png", "svg"]) == 0
    assert (run_dir / "figures/lr_schedule.svg").read_bytes().startswith(b"<?xml")
    more = ["trainer.epochs=4", "allow_config_change=[trainer.epochs]"]
    assert train.run_command([f"resume={run_dir}", *more]) == 0
    assert board_images(run_dir / "tensorboard/figures") == expected
    after = board(run_dir / "tensorboard")
    steps = [[event.step for event in events.Scalars("val/top1")] for events in (before, after)]
    assert steps[1] == [*steps[0], steps[0][-1] // 3 * 4]
    boards = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(run_dir)).Reload()
    provider = data_provider.MultiplexerDataProvider(boards, str(run_dir))
    shown = provider.list_blob_sequences(context.RequestContext(), experiment_id="", plugin_name="images")
    assert set(shown["tensorboard/figures"]) == set(expected)
    assert not set(shown["tensorboard"]) & set(expected)


def test_augmented_samples_are_those_of_the_runs_epochs(tiny_run):
    """Check that augmented samples match training exactly; random draws depend on an image's index in the train set."""
    run = load_trained(tiny_run, ["augment.policy=trivial_augment", "augment.hflip=true"])
    loaders = build_loaders(run.config, torch.device("cpu"))
    _, augmented, labels = augmented_samples(run, loaders.train_set, 3, 2)
    undo, compared = run.normalize(torch.device("cpu")).undo, 0
    chosen = balanced(loaders.train_set, 3).tolist()
    for epoch in range(2):
        batches = zip(loaders.train.plan.train(epoch, 0), loaders.train.train_batches(epoch), strict=True)
        for micro, (images, _) in batches:
            for index, image in zip(micro.indices.tolist(), undo(images), strict=True):
                if index in chosen:
                    assert torch.equal(image, augmented[epoch][chosen.index(index)])
                    compared += 1
    assert labels == [run.classes[loaders.train_set.labels[index]] for index in chosen]
    assert compared >= 4 and not torch.equal(*augmented)  # an epoch drops its last, incomplete batch


def test_figures_of_other_images_than_the_runs_say_so(run_dir, tmp_path, caplog):
    arguments = [str(run_dir), "class_accuracy", "--out", str(tmp_path)]
    assert command.run_command(arguments) == 0 and caplog.text == ""
    assert command.run_command([*arguments, "data.max_val_images=20"]) == 0
    assert "not the images that the run was evaluated on: val: class '0' had 3 images, now 2" in caplog.text


def test_a_checkpoint_in_the_current_folder_is_its_runs(run_dir, monkeypatch, capsys):
    monkeypatch.chdir(run_dir / "checkpoints")
    assert command.run_command(["last.pt", "lr_schedule"]) == 0
    assert (run_dir / "figures/lr_schedule.png").is_file()


def test_maps_of_ones_own_images_pixels_layers_and_heads(run_dir, tmp_path, capsys):
    """Check attention maps of the user's own images, which require no data set."""
    Image.new("RGB", (50, 40), "orange").save(tmp_path / "mine.png")
    choice = ["--images", str(tmp_path / "mine.png"), "--pixels", "1,2", "0,7", "--layers", "layer1.0.conv2"]
    gone = ["data.name=image_folder", "data.root=gone", "data.image_size=8"]
    names = ["attention_maps", "attention_heads"]
    out = ["--out", str(tmp_path / "out"), "--formats", "svg"]
    assert command.run_command([str(run_dir), *names, *choice, "--heads", "1", *gone, *out]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attention_heads.svg", "attention_maps.svg"]
    for path in (tmp_path / "out").iterdir():
        assert "mine.png" in path.read_text()  # in a comment beside its letters' shapes
    assert not (run_dir / "figures").exists()
    (tmp_path / "mine.png").write_text("no image")
    assert command.run_command([str(run_dir), *names, *choice, *out]) == 2
    assert "mine.png: cannot be read as an image" in capsys.readouterr().err


def test_without_the_data_what_needs_none_is_drawn_and_the_rest_named(run_dir, capsys):
    gone = ["data.name=image_folder", "data.root=gone", "data.image_size=8"]
    assert command.run_command([str(run_dir), "mistakes", *OF_SEVERAL, *gone]) == 1
    assert sorted(path.stem for path in (run_dir / "figures").iterdir()) == sorted(OF_SEVERAL)
    assert "not drawn: mistakes: data.root=gone" in capsys.readouterr().err
    assert command.run_command([str(run_dir), "mistakes", *gone]) == 2


@pytest.mark.slow
def test_a_model_without_attention_says_so(tmp_path, capsys):
    arguments = ["experiment=debug", "model=conv_resnet26", "model.stem=conv_small", "model.width=0.125"]
    keys = ["model.num_heads=null", "model.kernel_size=null", f"output_dir={tmp_path}", "run_name=conv"]
    assert train.run_command([*arguments, *keys]) == 0
    assert command.run_command([str(tmp_path / "conv"), "attention_maps"]) == 2
    assert "attention_maps cannot be drawn: conv_resnet26 has no local self-attention" in capsys.readouterr().err
    assert command.run_command([str(tmp_path / "conv")]) == 0
    names = "attention_maps, attention_heads, attention_distance, relative_embeddings"
    assert f"not drawn: {names}: conv_resnet26 has no local self-attention" in capsys.readouterr().out
    assert len(list((tmp_path / "conv/figures").iterdir())) == len(NAMES) - 4


def test_several_runs_are_overlaid_in_their_curves(tiny_run, run_dir, tmp_path, capsys):
    runs = [str(tiny_run), str(run_dir)]
    assert command.run_command(runs) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert command.run_command([*runs, "mistakes", "--out", str(tmp_path / "both")]) == 2
    assert command.run_command([*runs, "--out", str(tmp_path / "both")]) == 0
    assert sorted(path.stem for path in (tmp_path / "both").iterdir()) == sorted(OF_SEVERAL)


def test_compared_runs_are_named_by_what_differs(tmp_path):
    """Their folders end in hashes, which say nothing in a legend."""
    runs = {"a": ["augment=none"], "b": ["augment=crop_flip"], "c": ["augment=crop_flip", "model.kernel_size=5"]}
    for name, overrides in runs.items():
        write_run(tmp_path / name, ["experiment=debug", *overrides], [30.0, 40.0])
    assert command.names_of([tmp_path / "a", tmp_path / "b"]) == ["augment=none", "augment=crop_flip"]
    assert command.names_of([tmp_path / name for name in runs])[2] == "augment=crop_flip, kernel_size=5"
    for folder in ("photos", "drawings"):
        write_run(tmp_path / folder, ["experiment=debug", "data=image_folder", f"data.root=my/{folder}"], [30.0, 40.0])
    assert command.names_of([tmp_path / "photos", tmp_path / "drawings"]) == ["data=photos", "data=drawings"]
    assert all(name.startswith("data=") for name in command.names_of([tmp_path / "a", tmp_path / "photos"]))
    write_run(tmp_path / "again", ["experiment=debug", "augment=none"], [30.0, 40.0])
    assert command.names_of([tmp_path / "a", tmp_path / "again"]) is None
    assert command.names_of([tmp_path / "a", tmp_path / "not a run"]) is None
    shown = next(draw_curves({"augment=none": read_metrics(tmp_path / "a/metrics.jsonl"), "augment=crop_flip": []}))
    assert "augment=none" in [text.get_text() for text in shown[1].legends[0].texts] and "memorises" in shown[2]


def test_captions_tell_how_to_read_the_figures(run_dir, capsys, monkeypatch):
    """A terminal of 80 columns broke them within words."""
    monkeypatch.setattr("sasa_train.terminal.columns", lambda file: 80)
    assert command.run_command([str(run_dir), "attention_maps", "confusion_matrix", "training_curves"]) == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 80 or line.endswith(".png") for line in said.splitlines())
    said = " ".join(said.split())
    for text in (
        "do not explain the predicted class",
        "follow a square root",
        "If val loss rises while train loss falls",
    ):
        assert text in said


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["confusion_matrx"], "did you mean confusion_matrix?"),
        (["--pixels", "8,0"], "--pixels 8,0 must lie in the image as the model sees it, 0,0 to 7,7"),
        (["--layers", "layer9"], "--layers layer9 must be one of stem, layer1.0.conv2"),
        (["--layers", "layer1.0.conv2", "--heads", "2"], "--heads 2 must be below 2"),
        (["--formats", "gif"], "invalid choice: 'gif'"),
        (["model.width=0.25"], "make another model"),
    ],
)
def test_refused_before_anything_is_drawn(tiny_run, arguments, says, in_process):
    assert says in in_process("visualize", str(tiny_run), *arguments, expect=2).stderr
    assert not (tiny_run / "figures").exists()


def test_links_out_of_a_run_folder_are_refused(run_dir, tmp_path, in_process):
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "figures").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in in_process("visualize", str(run_dir), "lr_schedule", expect=2).stderr
    assert not list((tmp_path / "elsewhere").iterdir())


def test_without_matplotlib_the_extra_is_named(tiny_run, monkeypatch, in_process):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'sasa_train[plots]'" in in_process("visualize", str(tiny_run), expect=2).stderr


def test_help_names_the_figures(in_process):
    help_text = in_process("visualize", "--help").stdout
    assert all(name in help_text for name in NAMES)
