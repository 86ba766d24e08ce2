"""Check fine-tuning: matching weights are loaded, others are reported by name, and damaged files are refused."""

import argparse
import json
import math
import os
import shutil
import signal
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import yaml
from marking import slow_but_for
from PIL import Image
from reading_runs import assert_equal_state, assert_same_run, last, rows
from running_commands import TINY, launch, run_in_process, start, wait_for_rows
from safetensors.torch import load_file, save_file

import sasa_train.models
from sasa_train import export, train
from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.keys import TrainConfig
from sasa_train.config.saved import load_config, to_yaml
from sasa_train.data.datasets import mean_std
from sasa_train.data.transforms import Normalize, val_shape
from sasa_train.models.pretrained import load_pretrained, resize_window
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import Checkpoints, load_checkpoint
from sasa_train.runs.preprocessing import stated_by_json, with_preprocessing
from sasa_train.runs.weights import load_into, read_weights

KEYS = {"width": 0.125, "num_heads": 2, "stem": "conv_small", "kernel_size": 5}


def build(num_classes: int = 3, name: str = "hybrid_resnet26", seed: int = 0, **keys) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=num_classes, **KEYS | keys)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    """Return weights that look trained: their batch norm statistics differ from those of a new model."""
    state_dict = state_of(build(seed=1))
    for name, tensor in state_dict.items():
        if name.endswith("running_mean"):
            tensor += 0.5
    return state_dict


def test_each_offset_keeps_its_embedding():
    """Check embedding tables, shared or per head, after resizing from three offsets to five, to one, and back."""
    table = torch.tensor([[-1.0, 10.0], [0.0, 20.0], [1.0, 40.0]])
    wider = torch.tensor([[-1.0, 10.0], [-1.0, 10.0], [0.0, 20.0], [1.0, 40.0], [1.0, 40.0]])
    assert torch.equal(resize_window(table, 5), wider)
    assert torch.equal(resize_window(table, 1), table[1:2])
    assert torch.equal(resize_window(wider, 3), table) and torch.equal(resize_window(table, 3), table)
    assert torch.equal(resize_window(torch.stack([table, -table]), 5), torch.stack([wider, -wider]))


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
def test_another_window_that_sees_the_same_positions_gives_the_same_logits(given, kernel_size):
    """Maps have 2 x 2 positions, so every window of 3 or more covers them and no offset exceeds 1."""
    images = torch.rand(4, 3, 2, 2)
    source, model = build().eval(), build(kernel_size=kernel_size).eval()
    load_pretrained(source, given)
    report = load_pretrained(model, given)
    assert torch.allclose(model(images), source(images), atol=1e-6)
    expected = set() if kernel_size == 5 else {f"window 5 -> {kernel_size}"}
    assert set(report.adapted.values()) == expected and report.share == 1
    assert len(report.adapted) == (0 if kernel_size == 5 else 16)
    if kernel_size == 5:
        assert_equal_state(state_of(model), given)


def test_another_number_of_classes_leaves_the_classifier_as_initialised(given):
    model, fresh = build(num_classes=7), state_of(build(num_classes=7))
    report = load_pretrained(model, given)
    assert report.left == dict.fromkeys(["fc.weight", "fc.bias"], "3 classes in the file, 7 here")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith("fc.") else given[name]), name
    num_parameters = sum(p.numel() for p in model.parameters())
    assert report.share == pytest.approx(1 - (7 * 256 + 7) / num_parameters)
    assert f"loaded {len(given) - 2} of {len(given)} tensors, {100 * report.share:.1f} %" in report.describe()
    assert "left as initialised, 3 classes in the file, 7 here: weight, bias of fc" in report.describe()


def test_another_stem_and_another_stage_are_named(given):
    model = build(stem="attention_small", stage_ops=["conv", "attention", "attention", "attention"])
    report = load_pretrained(model, given)
    left = {name.rpartition(".")[0] for name in report.left}
    assert left == {"stem", "stem.qk", "stem.value", "stem.bn", "layer1.0.conv2"}
    assert set(report.left.values()) == {"not in the file"}
    assert {name.rpartition(".")[0] for name in report.unused} >= {"stem.0", "layer1.0.conv2.qkv", "layer1.0.conv2"}
    assert "in the file but not in this model: weight of stem.0" in report.describe()
    assert torch.equal(model.layer2[0].conv2.qkv.weight, given["layer2.0.conv2.qkv.weight"])


def test_other_heads_keep_their_own_embeddings(given):
    report = load_pretrained(build(num_heads=1), given)
    assert {name.rpartition(".")[2] for name in report.left} == {"rel_height", "rel_width"}
    assert report.left["layer1.0.conv2.rel_width"] == "[5, 2] in the file, [5, 4] here"


@pytest.mark.parametrize("keys", [{"width": 0.25}, {"name": "conv_resnet26", "width": 0.25}])
def test_another_models_file_is_refused_and_changes_nothing(given, keys):
    model = build(**keys)
    before = state_of(model)
    with pytest.raises(ConfigError, match=r"only 0.0 % of ResNet's parameters outside the classifier fit"):
        load_pretrained(model, given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_weights_that_no_training_leaves_are_refused(given):
    """Negative variances became a run whose own checkpoints were refused, and whole numbers were taken for weights."""
    model, before = build(), state_of(build())
    for name, value, message in (
        ("weight", math.inf, r"not finite, layer1.0.bn1.weight first of 1"),
        ("running_var", -1.0, "layer1.0.bn1.running_var has negative variances"),
        ("bias", torch.int8, "layer1.0.bn1.bias is torch.int8, which has lost the fractions"),
    ):
        tensor = given[f"layer1.0.bn1.{name}"]
        wrong = tensor.to(value) if isinstance(value, torch.dtype) else torch.full_like(tensor, value)
        with pytest.raises(ConfigError, match=message):
            load_pretrained(model, given | {f"layer1.0.bn1.{name}": wrong})
    assert torch.equal(model.stem[0].weight, before["stem.0.weight"])


def test_one_channel_in_takes_the_sum_of_three(given):
    """As in timm, the adapted weights for one channel must be the sum of the original weights for three channels."""
    model = build(in_chans=1)
    report = load_pretrained(model, given)
    assert torch.allclose(model.stem[0].weight, given["stem.0.weight"].sum(1, keepdim=True))
    assert report.adapted == {"stem.0.weight": "[8, 3, 3, 3] -> [8, 1, 3, 3]"}


@pytest.mark.parametrize("stem", ["attention", "attention_plain", "attention_convvalues"])
def test_one_channel_into_an_attention_stem_gives_what_three_equal_ones_gave(stem):
    """Check that all query, key and value projections are adapted; one with random weights would change the output."""
    grey = torch.rand(2, 1, 8, 8)
    source, model = (build(name="sasa_resnet26", stem=stem, in_chans=in_chans).eval() for in_chans in (3, 1))
    report = load_pretrained(model, state_of(source))
    assert not report.left and len(report.adapted) == 2
    assert torch.allclose(model.stem(grey), source.stem(grey.expand(-1, 3, -1, -1)), atol=1e-5)


def test_a_vit_keeps_its_position_embeddings_at_another_size():
    """Check that timm's filter resizes position embeddings: a constant one stays constant on a larger grid."""
    torch.manual_seed(0)
    small, large = (timm.create_model("test_vit", img_size=size, num_classes=3) for size in (32, 64))
    state_dict = state_of(small)
    state_dict["pos_embed"][:, 1:] = 0.25
    report = load_pretrained(large, state_dict)
    assert large.pos_embed.shape[1] == 17 and torch.allclose(large.pos_embed[:, 1:], torch.tensor(0.25))
    assert list(report.adapted) == ["pos_embed"] and not report.left and report.share == 1


# Sources of weights.


def save_all(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """Save the averaged weights of `checkpoint` in every supported file format."""
    saved = load_checkpoint(checkpoint)
    averaged, raw = saved["ema"], saved["model"]
    bare = folder / "copied.pt"
    shutil.copy(checkpoint, bare)
    hub = folder / "hub"
    hub.mkdir()
    save_file(averaged, hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({"architecture": "x", "label_names": saved["classes"]}))
    save_file(averaged, folder / "bare.safetensors")
    described = {"classes": json.dumps(saved["classes"]), "config": saved["config"]}
    save_file(averaged, folder / "exported.safetensors", described)
    wrapped = {f"module.{name}": tensor for name, tensor in averaged.items()}
    timms = {"state_dict": raw, "state_dict_ema": wrapped, "args": argparse.Namespace(lr=1), "epoch": 3}
    torch.save(timms, folder / "timm.pth.tar")
    torch.save(averaged, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return {
        "run": checkpoint.parents[1], "checkpoint": checkpoint, "copied": bare, "hub": hub,
        "exported": folder / "exported.safetensors", "bare": folder / "bare.safetensors",
        "timm": folder / "timm.pth.tar", "legacy": folder / "legacy.pth",
    }  # fmt: skip


def read(source: Path | str):
    return read_weights(compose_config([*TINY, f"model.pretrained='{source}'"]))


def test_every_source_gives_the_averaged_weights(tiny_run, tmp_path):
    expected = load_checkpoint(tiny_run / "checkpoints/best.pt")
    for kind, source in save_all(tmp_path, tiny_run / "checkpoints/best.pt").items():
        weights = read(source)
        assert_equal_state(dict(weights.state_dict), expected["ema"], kind)
        knows_classes = kind in ("run", "checkpoint", "copied", "exported", "hub")
        assert weights.classes == (expected["classes"] if knows_classes else None), kind
        knows_model = knows_classes and kind != "hub"
        assert (weights.model.get("width") == 0.125) == knows_model, kind
        assert weights.image_size == (8 if knows_model else None), kind
    assert not torch.equal(expected["ema"]["fc.weight"], expected["model"]["fc.weight"])


def test_the_classifier_is_loaded_for_the_same_classes_alone(tiny_run):
    weights = read(tiny_run)
    digits = weights.classes
    config = compose_config([*TINY])
    for classes, is_loaded in ((digits, True), ([f"{name}th" for name in digits], False), (digits[::-1], False)):
        model = sasa_train.models.build_model(config.model, 10, 8)
        report = load_into(model, weights, classes, "x")
        assert torch.equal(model.fc.weight, weights.state_dict["fc.weight"]) == is_loaded
        assert ("other classes in the file: weight, bias of fc" in report.describe()) != is_loaded


class Bait:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def damaged(folder: Path, checkpoint: Path) -> list[tuple[Path, str]]:
    """Return unusable files and the expected message for each."""
    content = checkpoint.read_bytes()
    files = {
        "cut.pt": (content[: len(content) // 2], "cannot be read"),
        "flipped.pt": (content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:], "the checksum of"),
        "empty.pth": (b"", "cannot be read"),
        "text.safetensors": (b"hello", "cannot be read"),
        "cut.safetensors": (b"\xff" * 8 + b"{}", "cannot be read"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    torch.save({"state_dict": {"x": Bait()}}, folder / "bait.pt")
    torch.save({"state_dict": {"epoch": 3}}, folder / "numbers.pt")
    torch.save([torch.ones(3)], folder / "list.pt")
    torch.save({"x": torch.ones(3, device="meta"), "y": torch.ones(3) * 1j}, folder / "odd.pt")
    with zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * 10_000)
    (folder / "folder").mkdir()
    return [(folder / name, said) for name, (_, said) in files.items()] + [
        (folder / "bait.pt", "it holds something else than tensors, which could run as code"),
        (folder / "numbers.pt", "holds no weights"),
        (folder / "list.pt", "holds no weights"),
        (folder / "odd.pt", "holds no weights"),
        (folder / "packed.pt", "compressed"),
        (folder / "folder", "has no checkpoints and no model.safetensors"),
        (folder / "nowhere.pt", "is not a file"),
        (Path("/dev/zero"), "is not a file"),
    ]


def test_damaged_and_hostile_files_are_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, said in damaged(tmp_path, tiny_run / "checkpoints/best.pt"):
        with pytest.raises(ConfigError) as refused:
            read(path)
        assert str(refused.value).startswith(f"model.pretrained={path}") and said in str(refused.value), refused.value
        assert len(str(refused.value)) < 500 and "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


def assert_pixels_of_timm(published: torch.nn.Module, config: TrainConfig) -> None:
    """Check that val images reach the weights as they do in timm, whose mean, filter and crop differ from our own."""
    config, _ = with_preprocessing(config, read_weights(config).preprocessing)
    assert (config.data.mean, config.data.interpolation, config.data.val_crop) == ([0.5] * 3, "bicubic", 0.95)
    size = config.data.image_size
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(published) | {"input_size": (3, size, size)}
    )
    image = Image.effect_noise((131, 173), 80).convert("RGB")
    pixels = torch.from_numpy(val_shape(config.data)(image).copy()).permute(2, 0, 1)[None]
    ours = Normalize(*mean_std(config.data), pixels.device, channels_last=False)(pixels)[0]
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-6)  # normalisation in another order


def test_weights_of_timm_come_from_its_cache(tmp_path, monkeypatch):
    """The Hub cache is created without a network; the classifier is not loaded, but initialised from the seed."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    overrides = ["model=timm", "model.name=test_vit", "data.image_size=64", "model.pretrained=timm"]
    config = compose_config(overrides)
    with pytest.raises(ConfigError, match=r"the weights of test_vit cannot be had .*network"):
        read_weights(config)
    published = timm.create_model("test_vit")
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots/1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1")
    save_file(published.state_dict(), repository / "snapshots/1/model.safetensors")
    torch.manual_seed(5)
    weights = read_weights(config)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(weights.state_dict["blocks.0.attn.qkv.weight"], published.blocks[0].attn.qkv.weight)
    assert_pixels_of_timm(published, compose_config([*overrides, "data=image_folder", "data.image_size=96"]))
    model = sasa_train.models.build_model(config.model, 10, 64)
    assert set(load_into(model, weights, [str(n) for n in range(10)], "timm").left) == {"head.weight", "head.bias"}
    with pytest.raises(ConfigError, match="no weights of sasa_resnet26 are published"):
        compose_config(["model.pretrained=timm"])
    with pytest.raises(ConfigError, match="timm has no weights of"):
        read_weights(compose_config([*overrides, "model.name=resnet10t.nowhere"]))


# Runs that start from pretrained weights.


def test_a_run_is_named_after_what_it_begins_with():
    names = [default_run_name(compose_config([f"model.pretrained={source}"])) for source in ("null", "a", "b.pt")]
    assert len(set(names)) == 3 and names[0] == default_run_name(compose_config([]))


def finetuning(source: Path) -> list[str]:
    return [*TINY, f"model.pretrained={source}", "model.kernel_size=5", "trainer.ema_decay=0.9", "optimizer.lr=0.02"]


# The preprocessing of a source, and of no data set.
OTHER = {"mean": [0.4, 0.5, 0.6], "std": [0.5, 0.25, 0.3], "interpolation": "nearest"}
WRITTEN = "data.mean=[0.4,0.5,0.6] data.std=[0.5,0.25,0.3] data.interpolation=nearest"


def preprocessing_of(run_dir: Path) -> list[dict]:
    """Return the preprocessing in config.yaml and in the last checkpoint."""
    texts = ((run_dir / "config.yaml").read_text(), last(run_dir)["config"])
    return [{key: getattr(load_config(text).data, key) for key in OTHER} for text in texts]


@pytest.fixture(scope="module")
def other_run(tmp_path_factory) -> Path:
    """Return the run of a model whose images are normalised and resized in an unusual way; it is also exported."""
    folder = tmp_path_factory.mktemp("other_run")
    run = [*TINY, *WRITTEN.split(), "data.image_size=12", "trainer.ema_decay=0.5", "trainer.epochs=1"]
    assert train.run_command([*run, f"output_dir={folder}", "run_name=other"]) == 0
    assert export.run_command([str(folder / "other"), "--formats", "safetensors", "hub"]) == 0
    save = folder / "other/export/foreign"  # a hub folder of another program: all that it states is in config.json
    shutil.copytree(folder / "other/export/hub", save)
    save_file(load_file(save / "model.safetensors"), save / "model.safetensors")
    return folder / "other"


@pytest.mark.parametrize(
    "kind", slow_but_for([".", "export/foreign"], [".", "export/model.safetensors", "export/hub", "export/foreign"])
)
def test_pretrained_weights_see_images_as_they_did_in_their_own_training(other_run, in_process, tmp_path, kind):
    """The data set's own mean and std were once used in silence; the val loss changed although no weight did."""
    still = ["optimizer.lr=1e-30", "model.bn_momentum=0", "trainer.epochs=1", "data.image_size=12"]
    said = in_process("train", *TINY, *still, f"model.pretrained={other_run / kind}", "run_name=still")
    assert f"preprocessing of the source: {WRITTEN}" in " ".join(said.stdout.split()) and not said.stderr
    (here,), (there,) = (
        [row for row in rows(run) if row["split"] == "val"] for run in (tmp_path / "out/still", other_run)
    )
    assert here["loss"] == there["loss"] and here["top1"] == there["top1"]
    assert preprocessing_of(tmp_path / "out/still") == [OTHER] * 2
    with_raw = in_process("evaluate", "out/still", "weights=raw").stdout
    assert f"loss   {here['loss']:.4f}" in with_raw


def test_keys_that_are_set_are_kept_with_a_warning(other_run, in_process, tmp_path):
    """Check that a key set to the source's value gives no warning, and that another one is named with both values."""
    run = [*TINY, f"model.pretrained={other_run}", "trainer.epochs=1", "trainer.max_steps=1"]
    said = in_process("train", *run, "data.std=[0.5,0.5,0.5]", "data.interpolation=nearest", "run_name=a").stderr
    assert said == (
        f"WARNING: data.std=[0.5,0.5,0.5], but model.pretrained={other_run} was trained with [0.5,0.25,0.3]; leave "
        "data.std out to take that\n"
    )
    assert preprocessing_of(tmp_path / "out/a") == [OTHER | {"std": [0.5] * 3}] * 2


def test_another_reading_of_the_images_is_named(in_process, tmp_path, monkeypatch, capsys):
    """Weights trained with a black background and without EXIF were fine-tuned with white and EXIF, in silence."""
    reading = ["data.background=black", "data.exif=ignore", "data.value_range=[0.0,4095.0]"]
    run = [*TINY, *WRITTEN.split(), "trainer.epochs=1", "trainer.max_steps=1"]
    monkeypatch.chdir(tmp_path)
    in_process("train", *run, *reading, "run_name=source")
    assert export.run_command(["out/source", "--formats", "safetensors", "hub"]) == 0
    ours = ["data.background=white", "data.exif=apply", "data.value_range=null"]

    def warnings(source: str) -> str:
        lines = (
            f"WARNING: {source} was trained with {there}, but this run reads images with {here}; add {there} to read "
            "alike\n"
            for here, there in zip(ours, reading, strict=True)
        )
        return "".join(lines)

    for kind in (".", "checkpoints/last.pt", "export/model.safetensors", "export/hub"):
        source = f"model.pretrained=out/source/{kind}"
        config = compose_config([*run, source])
        capsys.readouterr()
        read_with, _ = with_preprocessing(config, read_weights(config).preprocessing)
        assert read_with.data.background == "white" and capsys.readouterr().err == warnings(source)
    assert in_process("train", *run, source, "run_name=other").stderr == warnings(source)
    capsys.readouterr()
    config = compose_config([*run, *reading, source])
    with_preprocessing(config, read_weights(config).preprocessing)
    assert capsys.readouterr().err == ""


def test_a_run_that_began_before_its_keys_goes_on_as_it_began(other_run, in_process, tmp_path):
    """An older run used the data set's own mean and std; its config.yaml and checkpoint say null, or lack the keys."""
    run = [*TINY, f"model.pretrained={other_run}", "trainer.epochs=1"]
    own = ["data.mean=[0.305,0.305,0.305]", "data.std=[0.3756,0.3756,0.3756]", "data.interpolation=bilinear"]
    in_process("train", *run, *own, "run_name=whole")
    in_process("train", *run, *own, "run_name=old", "trainer.max_hours=1e-9", expect=75)
    folder, checkpoint = tmp_path / "out/old", last(tmp_path / "out/old")
    written = yaml.safe_load(checkpoint["config"])
    written["data"] |= {"mean": None, "std": None}
    for key in ("interpolation", "val_crop"):
        del written["data"][key]
    text = yaml.safe_dump(written)
    (folder / "config.yaml").write_text(text)
    Checkpoints(folder / "checkpoints", 0).save(checkpoint | {"config": text}, is_best=False)
    said = in_process("train", *run, "run_name=old")
    assert "WARNING: data" not in said.stderr
    assert_same_run(folder, tmp_path / "out/whole")
    assert preprocessing_of(folder) == [dict.fromkeys(OTHER)] * 2
    in_process("train", *run, "run_name=old", *own[:2], expect=2)


def test_null_is_not_a_value_that_was_set(other_run, in_process, tmp_path):
    """Only a run with pretrained weights may have taken a mean; for others, leaving out the key changes the run."""
    shutil.copytree(other_run, tmp_path / "out/other")
    run = [*TINY, "data.image_size=12", "trainer.ema_decay=0.5", "trainer.epochs=1", "run_name=other"]
    said = in_process("train", *run, "data.interpolation=nearest", expect=2).stderr
    assert "data.mean: [0.4, 0.5, 0.6] -> None" in said and "data.interpolation" not in said


STATED = {
    '{"mean": [0.5, 0.5], "std": [0.5, 0.5, 0.5]}': ("data.mean=[0.5, 0.5] must be three numbers", ["std"]),
    '{"mean": [0.5, NaN, 0.5]}': ("data.mean=[0.5, nan, 0.5] must be finite", []),
    '{"mean": [124, 116, 104]}': ("data.mean=[124, 116, 104] must be from 0 to 1", []),
    '{"mean": 0.5, "std": [true, 1, 1]}': ("data.std=[True, 1, 1] must be a list of numbers", []),
    '{"std": [0, 0.5, 0.5]}': ("data.std=[0, 0.5, 0.5] must be positive", []),
    '{"pretrained_cfg": {"interpolation": "random", "crop_pct": 0.9}}': (
        "data.interpolation=random must be",
        ["val_crop"],
    ),
    '{"pretrained_cfg": {"interpolation": "lanczos", "crop_pct": 1.15}}': (
        "data.val_crop=1.15 must be",
        ["interpolation"],
    ),
    '{"crop_pct": "0.9"}': ("data.val_crop=0.9 must be a number", []),
    '{"std": [1%s, 1, 1]}' % ("0" * 400): ("data.std=[1000", []),
    '{"crop_mode": "squash", "crop_pct": 1}': ("trained with crop_mode=squash; val keeps the centre", ["val_crop"]),
    '{"mean": "\\u001b[2J", "pretrained_cfg": 5}': (None, []),
    '{"interpolation": "\\u001b[2J"}': ("data.interpolation='\\x1b[2J'", []),
    '{"mean": null, "interpolation": "", "crop_pct": null}': (None, []),
    "[" * 100_000: (None, []),
}


def test_a_stated_value_that_cannot_be_taken_is_named(capsys):
    config = compose_config(["data=imagenet", "model.pretrained=hub"])
    for text, (message, names) in STATED.items():
        taken, line = with_preprocessing(config, stated_by_json(text))
        changed = {key for key, value in vars(taken.data).items() if value != getattr(config.data, key)}
        assert changed == set(names) and load_config(to_yaml(taken)) == taken, text[:100]
        assert ("preprocessing of the source: data." in line) == bool(names), text[:100]
        said = capsys.readouterr().err
        assert ("WARNING: model.pretrained=hub" in said and message in said) if message else not said, text[:100]
        assert len(said) < 700 and "\x1b" not in said


def test_weights_from_timms_training_state_the_arguments_that_were_given(tmp_path):
    """Only arguments that were given are stated; a null stands for the default of timm's model."""
    arguments = argparse.Namespace(mean=(0.4, 0.5, 0.6), std=None, interpolation="", crop_pct=0.9, lr=1)
    torch.save({"state_dict": {"x": torch.ones(3)}, "args": arguments}, tmp_path / "timm.pth")
    assert read(tmp_path / "timm.pth").preprocessing == {"mean": [0.4, 0.5, 0.6], "val_crop": 0.9}


@pytest.mark.usefixtures("one_thread")
def test_a_killed_fine_tuning_ends_as_one_never_touched_and_needs_the_file_no_more(other_run, tmp_path, monkeypatch):
    shutil.copytree(other_run, tmp_path / "source")
    run = [*finetuning(Path("source")), "trainer.checkpoint_every_steps=3"]
    process = start(tmp_path, *run, "run_name=broken")
    wait_for_rows(tmp_path / "out/broken", 6, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert run_in_process(tmp_path, monkeypatch, *run, "run_name=whole") == 0
    shutil.rmtree(tmp_path / "source")
    assert run_in_process(tmp_path, monkeypatch, *run, "run_name=broken") == 0
    assert_same_run(tmp_path / "out/broken", tmp_path / "out/whole")
    broken, whole = (last(tmp_path / f"out/{name}")["provenance"] for name in ("broken", "whole"))
    for note in ("pretrained_sha256", "pretrained_report"):
        assert broken[note] == whole[note]
    info = json.loads((tmp_path / "out/broken/run.json").read_text())
    manifest = json.loads((other_run / "checkpoints/best.pt.json").read_text())
    assert info["pretrained_sha256"] == manifest["sha256"]
    assert "adapted, window 3 -> 5: rel_height" in info["pretrained_report"]
    assert info["pretrained_report"].endswith(f"preprocessing of the source: {WRITTEN}")
    assert preprocessing_of(tmp_path / "out/broken") == [OTHER] * 2


def test_the_first_step_and_the_average_start_from_the_loaded_weights(tiny_run, tmp_path, monkeypatch, capsys):
    """With a learning rate near zero, the trained and averaged weights must still match those of the source."""
    still = [*TINY, f"model.pretrained={tiny_run}", "optimizer.lr=1e-30", "trainer.ema_decay=0.9", "trainer.epochs=1"]
    assert run_in_process(tmp_path, monkeypatch, *still, "run_name=still") == 0
    paths = (tmp_path / "out/still/checkpoints/last.pt", tiny_run / "checkpoints/best.pt")
    saved, source = map(load_checkpoint, paths)
    for name in ("layer1.0.conv2.rel_height", "fc.weight", "stem.qk.weight"):
        assert torch.equal(saved["model"][name], source["ema"][name])
        assert torch.allclose(saved["ema"][name], source["ema"][name], rtol=1e-6)  # an average of equal values
    assert "100.0 % of the parameters" in capsys.readouterr().out


def test_a_run_that_began_with_other_content_is_not_taken_for_it(tiny_run, tmp_path, monkeypatch, capsys):
    """Check that a fine-tuning run whose source has since been retrained is not continued as if nothing had changed."""
    shutil.copytree(tiny_run, tmp_path / "source")
    run = [*finetuning(Path("source")), "trainer.epochs=1", "run_name=a"]
    assert run_in_process(tmp_path, monkeypatch, *run) == 0
    shutil.rmtree(tmp_path / "source/checkpoints")
    assert run_in_process(tmp_path, monkeypatch, *run) == 0
    torch.save(load_checkpoint(tiny_run / "checkpoints/last.pt")["model"], tmp_path / "raw.pt")
    (tmp_path / "source/checkpoints").mkdir()
    (tmp_path / "raw.pt").rename(tmp_path / "source/checkpoints/best.pt")
    assert run_in_process(tmp_path, monkeypatch, *run) == 2
    assert "model.pretrained=source: its content is not what out/a began with" in capsys.readouterr().err
    assert run_in_process(tmp_path, monkeypatch, *run, "allow_config_change=[model.pretrained]") == 0
    assert run_in_process(tmp_path, monkeypatch, *run, "model.width=0.25") == 2


def test_a_model_that_the_file_does_not_fit_is_told_the_files_own_keys(tiny_run, in_process):
    said = in_process("train", *TINY, f"model.pretrained={tiny_run}", "model.width=0.25", expect=2).stderr
    assert "of ResNet's parameters outside the classifier fit" in said and "its own model: model.name=sasa" in said


@pytest.mark.slow
def test_all_processes_begin_with_the_same_weights(tmp_path, monkeypatch):
    """Only the first process reads the file; each process evaluates its share of val with its own moving average."""
    torch.manual_seed(1)
    torch.save(timm.create_model("test_convnext", num_classes=10).state_dict(), tmp_path / "given.pt")
    run = ["model=timm", "model.name=test_convnext", "model.pretrained=given.pt", "data.image_size=32"]
    run += ["data.max_train_images=12", "data.max_val_images=31", "data.num_workers=0", "trainer.global_batch_size=12"]
    run += ["trainer.epochs=1", "optimizer.lr=1e-30", "trainer.ema_decay=0.9", "trainer.log_every_steps=1"]
    run += ["output_dir=out"]
    code, said = launch(tmp_path, 2, *run, "run_name=two")
    assert code == 0 and said.count("loaded 101 of 101 tensors, 100.0 %") == 1, said
    assert run_in_process(tmp_path, monkeypatch, *run, "run_name=one") == 0
    for one, two in zip(rows(tmp_path / "out/one"), rows(tmp_path / "out/two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-6) and two["top1"] == one["top1"]
