"""Check fine-tuning: matching weights are loaded, others are reported by name, and damaged files are refused."""

import argparse
import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from reading_runs import assert_equal_state, assert_same_run, last, rows
from running_commands import TINY, launch, run_in_process, start, wait_for_rows
from safetensors.torch import save_file

import sasa_train.models
from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.models.pretrained import load_pretrained, resize_window
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import load_checkpoint
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


def test_weights_that_are_not_finite_are_refused(given):
    model, before = build(), state_of(build())
    with pytest.raises(ConfigError, match=r"not finite, layer1.0.bn1.weight first of 1"):
        load_pretrained(model, given | {"layer1.0.bn1.weight": given["layer1.0.bn1.weight"] / 0})
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
        assert ("model.width=0.125" in (weights.model_overrides or "")) == knows_model, kind
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


@pytest.mark.usefixtures("one_thread")
def test_a_killed_fine_tuning_ends_as_one_never_touched_and_needs_the_file_no_more(tiny_run, tmp_path, monkeypatch):
    shutil.copytree(tiny_run, tmp_path / "source")
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
    manifest = json.loads((tiny_run / "checkpoints/best.pt.json").read_text())
    assert info["pretrained_sha256"] == manifest["sha256"]
    assert "adapted, window 3 -> 5: rel_height" in info["pretrained_report"]


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
