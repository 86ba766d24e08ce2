"""Check that exported models match the trained model, exactly or up to rounding from a different order of summation."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from making_data import make_image_folder
from marking import slow_but_for
from PIL import Image
from running_commands import TINY
from torch import nn

import sasa_train.models
from sasa_train import export as command
from sasa_train import train
from sasa_train.attention import plain, reference
from sasa_train.data.transforms import val_shape
from sasa_train.export import formats
from sasa_train.export.checking import load_images, measure
from sasa_train.export.description import model_card, timm_data_config
from sasa_train.files import locked
from sasa_train.models import AttentionStem, LocalSelfAttention2d
from sasa_train.trained import load_trained


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Return the run of a tiny, briefly trained network with attention in the stem and only two stages, for speed."""
    out = tmp_path_factory.mktemp("out")
    model = "model.stage_ops=[conv,attention,conv,attention]"
    assert train.run_command([*TINY, model, "trainer.epochs=1", f"output_dir={out}", "run_name=tiny"]) == 0
    return out / "tiny"


@pytest.fixture(scope="module")
def exported(run_dir) -> Path:
    """Export the run in all formats."""
    assert command.run_command([str(run_dir)]) == 0
    return run_dir / "export"


@pytest.fixture(scope="module")
def logits(run_dir):
    """Return images and the trained model's outputs for them."""
    trained = load_trained(run_dir)
    images, _ = load_images(trained, None)
    with torch.inference_mode():
        return images, trained.model(images)


# height, width, K: one column, one tile, tiles with unequal work, a window larger than the map
@pytest.mark.parametrize(
    ("height", "width", "kernel_size"), [(5, 1, 3), (7, 13, 5), (3, 37, 7), (2, 3, 11), (2, 19, 1)]
)
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("scores", ["content", "content and shared r", "r of each head"])
def test_plain_attention_is_the_reference(height, width, kernel_size, border, scores):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, height, width, 4, dtype=torch.float64)
    shape = (3, kernel_size, 2) if scores == "r of each head" else (kernel_size, 2)
    rel_height, rel_width = torch.randn(2, *shape, dtype=torch.float64) if "r" in scores else (None, None)
    inputs = reference.Inputs(query, None if scores == "r of each head" else key, value, rel_height, rel_width)
    window = reference.Window(kernel_size, kernel_size, border)
    expected = reference.local_attention_forward(inputs, window)
    torch.testing.assert_close(plain.local_attention_forward(inputs, window), expected, rtol=0, atol=1e-13)


LAYERS = {
    "stride 2 of odd sides": lambda: LocalSelfAttention2d(16, 16, 7, 8, stride=2),  # 2 images x 8 heads fill the lanes
    "absolute": lambda: LocalSelfAttention2d(16, 6, 3, 3, position="absolute"),
    "no content, border zero, r a head": lambda: LocalSelfAttention2d(
        16, 12, 5, 3, content=False, border="zero", share_rel=False, stride=2
    ),
    "shifted and dilated": lambda: LocalSelfAttention2d(16, 8, (3, 5), 2, border="shift", dilation=2, scale=0.5),
    "stem": lambda: nn.Sequential(nn.ZeroPad2d((0, 3, 0, 1)), AttentionStem(16, 8)),
    "stem, plain values, no pool": lambda: nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 1)), AttentionStem(16, 8, values="plain", pool=False)
    ),
}


@pytest.mark.parametrize("name", slow_but_for(["stride 2 of odd sides", "stem"], LAYERS))
def test_layers_become_programs_of_common_operators_for_any_batch(name):
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    program = formats.plain_program(layer, torch.zeros(2, 16, 11, 13))
    session = onnxruntime.InferenceSession(formats.onnx_program(program).model_proto.SerializeToString())
    for batch_size in (1, 7):
        images = torch.randn(batch_size, 16, 11, 13)
        with torch.inference_mode():
            expected = layer(images)
            of_torch = program.module()(images)
        (of_onnx,) = session.run(["logits"], {"images": images.numpy()})
        atol = 2e-6 * float(expected.abs().max())  # one layer's sums in float32
        torch.testing.assert_close(of_torch, expected, rtol=0, atol=atol)
        torch.testing.assert_close(torch.from_numpy(of_onnx), expected, rtol=0, atol=atol)


def test_one_command_makes_every_format(exported):
    assert sorted(path.name for path in exported.iterdir()) == ["hub", "model.onnx", "model.pt2", "model.safetensors"]
    in_hub = sorted(path.name for path in (exported / "hub").iterdir())
    assert in_hub == ["README.md", "config.json", "model.safetensors"]
    modes = {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()}
    assert modes == {(exported.parent / "config.yaml").stat().st_mode & 0o777}  # the run's permissions
    assert "images of 8 x 8 pixels" in (exported / "hub" / "README.md").read_text()


def test_safetensors_holds_what_it_takes_to_build_the_model(exported, logits):
    images, expected = logits
    model = formats.load_safetensors(exported / "model.safetensors")
    with torch.inference_mode():
        assert torch.equal(model(images), expected)


def test_timm_loads_the_hub_folder_to_the_bit(exported, logits, tmp_path, monkeypatch):
    """Check that timm loads the same model from the folder and from a cache with the Hub client's layout."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--digits"
    shutil.copytree(exported / "hub", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    images, expected = logits
    for source in (f"local-dir:{exported / 'hub'}", "hf-hub:someone/digits"):
        model = timm.create_model(source, pretrained=True, cache_dir=tmp_path).eval()
        with torch.inference_mode():
            assert torch.equal(model(images), expected), source
        assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    finetuned = timm.create_model(source, pretrained=True, num_classes=3, cache_dir=tmp_path)
    assert finetuned.get_classifier().out_features == 3


def test_pretrained_without_a_source_is_refused():
    assert sasa_train.models.ResNet
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("sasa_resnet26", pretrained=True, width=0.25)


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        *((size, []) for size in (8, 64, 65, 224, 817)),
        *((size, ["data.interpolation=bicubic", "data.val_crop=0.95"]) for size in (24, 224)),
    ],
)
def test_timms_transform_gives_the_pixels_of_val(run_dir, size, keys):
    """For size 817, timm would resize to floor(817 / (817 / 934)), which is 933 rather than 934 in floating point."""
    trained = load_trained(run_dir, keys)
    trained.config.data.image_size = size
    transform = timm.data.create_transform(**timm_data_config(trained))
    normalize = trained.normalize(torch.device("cpu"))
    rng = np.random.default_rng(0)
    for shape in ((size, size), (71, 97), (307, 211)):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        ours = normalize(torch.from_numpy(val_shape(trained.config.data)(image).copy()).permute(2, 0, 1)[None])[0]
        torch.testing.assert_close(transform(image), ours, rtol=0, atol=1e-6)  # normalisation in another order


def test_a_torch_export_program_runs_without_this_package(exported, logits, tmp_path):
    images, expected = logits
    torch.save((images, expected), tmp_path / "logits.pt")
    code = """
import json, sys, torch
extra = {"sasa_train.json": ""}
model = torch.export.load(sys.argv[1], extra_files=extra).module()
images, expected = torch.load(sys.argv[2])
for batch in (slice(0, 1), slice(3, 10)):
    assert (model(images[batch]) - expected[batch]).abs().max() <= 1e-5 * expected.abs().max()
about = json.loads(extra["sasa_train.json"])
assert json.loads(about["classes"])[3] == "3" and json.loads(about["input_size"]) == [3, 8, 8]
assert not {"sasa_train", "timm"} & set(sys.modules)
"""
    arguments = [sys.executable, "-P", "-c", code, str(exported / "model.pt2"), str(tmp_path / "logits.pt")]
    process = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


def test_onnx_says_what_it_needs(exported):
    model = onnx.load(exported / "model.onnx")
    described = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(described["classes"]) == [str(digit) for digit in range(10)]
    assert (described["image_size"], described["resize"], json.loads(described["mean"])) == ("8", "8", [0.305] * 3)
    (images,) = model.graph.input
    assert images.name == "images"
    assert [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim] == ["batch", 3, 8, 8]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": formats.OPSET}


def test_a_format_that_differs_is_not_written(run_dir, tmp_path, monkeypatch, capsys):
    """Check that if a format has wrong logits, its earlier file is kept, and only the other formats are written."""
    (tmp_path / "model.safetensors").write_text("an earlier one")
    right = formats.load_safetensors

    def wrong(path):
        model = right(path)
        return lambda images: model(images) * 1.001

    broken = formats.Format("model.safetensors", formats.write_safetensors, wrong)
    monkeypatch.setitem(formats.FORMATS, "safetensors", broken)
    assert command.run_command([str(run_dir), "--formats", "safetensors", "hub", "--out", str(tmp_path)]) == 1
    assert "safetensors: its logits differ from PyTorch's by 1.0e-03 of the largest" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_text() == "an earlier one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "model.safetensors"]


def test_a_format_with_other_weights_is_not_written(run_dir, tmp_path, monkeypatch, capsys):
    def load(path):
        model = formats.load_safetensors(path)
        with torch.no_grad():
            model.get_classifier().bias[0] *= 1 + 1e-6
        return model

    changed = formats.FORMATS["safetensors"]._replace(load=load)
    monkeypatch.setitem(formats.FORMATS, "safetensors", changed)
    assert command.run_command([str(run_dir), "--formats", "safetensors", "--out", str(tmp_path)]) == 1
    assert "safetensors: its weights differ from the checkpoint's" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_logits_that_are_no_numbers_differ():
    expected = measure(lambda images: images, torch.ones(2, 3))
    assert expected.difference(expected) == 0
    found = measure(lambda images: images * float("nan"), torch.ones(2, 3))
    assert not found.difference(expected) <= 1.0


def test_an_export_again_replaces_the_one_before(run_dir, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "stale.bin").write_text("of another model")
    assert command.run_command([str(run_dir), "--formats", "hub", "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "hub" / "stale.bin").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_what_a_killed_export_left_is_swept_up(run_dir, tmp_path):
    """Check the cleanup after an export was killed between moving the old folder aside and moving in the new one."""
    aside = tmp_path / ".making-killed"
    (aside / "hub").mkdir(parents=True)
    (aside / "hub.old").mkdir()
    (aside / "hub.old" / "config.json").write_text("whole")
    assert command.run_command([str(run_dir), "--formats", "safetensors", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "model.safetensors"]
    assert (tmp_path / "hub" / "config.json").read_text() == "whole"


def test_two_exports_do_not_write_into_one_folder(run_dir, tmp_path, capsys):
    """Check that a concurrent export is refused, as each export would mistake the other's files for leftovers."""
    with locked(tmp_path, "the first"):
        assert command.run_command([str(run_dir), "--formats", "safetensors", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is being written by another command" in capsys.readouterr().err


def test_the_card_tells_of_the_training_not_of_the_overrides(run_dir):
    plain, other = load_trained(run_dir), load_trained(run_dir, ["data.image_size=12", "model.border=zero"])
    assert "is not so here" not in model_card(plain)
    card = model_card(other)
    assert "images of 12 x 12 pixels" in card
    assert "It was trained and evaluated with data.image_size=8, model.border=null, which is not so here." in card
    elsewhere = ["data.name=image_folder", "data.root=photos", "model.num_classes=10"]
    assert model_card(load_trained(run_dir, elsewhere)) == model_card(plain)


def test_images_of_a_folder_take_the_place_of_data_that_is_gone(run_dir, tmp_path, capsys, in_process):
    gone = ["data.name=image_folder", f"data.root={tmp_path / 'gone'}", "data.image_size=8", "model.num_classes=10"]
    arguments = [str(run_dir), "--formats", "safetensors", "--out", str(tmp_path / "out"), *gone]
    assert command.run_command(arguments) == 2
    assert "--images" in capsys.readouterr().err
    images = make_image_folder(tmp_path / "images")
    told = in_process("export", *arguments, "--images", str(images)).stdout
    assert f"checked on 26 images of {images}; images/s with 1 CPU thread of this machine\n" in told
    assert told.endswith("\nnext        docs/export.md: use the files in timm, onnxruntime or plain PyTorch\n")
    (tmp_path / "none").mkdir()
    assert command.run_command([*arguments, "--images", str(tmp_path / "none")]) == 2
    assert f"--images {tmp_path / 'none'}: holds no image" in capsys.readouterr().err


def test_without_onnx_the_other_formats_are_made(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert command.available_formats(None) == ["safetensors", "hub", "torch_export"]
    assert "left out: onnx needs onnxscript" in capsys.readouterr().err
    assert command.run_command(["no such checkpoint", "--formats", "onnx"]) == 2
    assert "pip install 'sasa_train[export]'" in capsys.readouterr().err


def test_the_names_of_the_formats_are_those_that_there_are():
    assert tuple(formats.FORMATS) == command.FORMAT_NAMES
