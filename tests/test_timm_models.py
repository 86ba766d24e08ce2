"""Check timm's models: their arguments, and models that a hub folder or the Hugging Face hub describes."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import yaml
from marking import slow_but_for
from reading_runs import assert_equal_state, last, rows
from timm.models import save_for_hf

from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.keys import ModelConfig, with_values
from sasa_train.export import formats
from sasa_train.export.checking import ROUNDING
from sasa_train.models import build_model, check_model
from sasa_train.models.sources import resolve
from sasa_train.refusal import ConfigError
from sasa_train.signals import StopRequest
from sasa_train.trained import load_trained
from sasa_train.training.run import train

# Name -> image size, and arguments that make the model small.
MODELS = {
    "vit_tiny_patch16_224": (8, "{patch_size:4,embed_dim:24,depth:2,num_heads:2,drop_rate:0.1}"),
    "deit_tiny_distilled_patch16_224": (8, "{patch_size:4,embed_dim:24,depth:2,num_heads:2,proj_drop_rate:0.1}"),
    "swin_tiny_patch4_window7_224": (16, "{patch_size:2,window_size:4,embed_dim:8,depths:[1,1],num_heads:[1,2]}"),
    "convnext_atto": (32, "{depths:[1,1,1,1],dims:[8,8,16,16],drop_rate:0.1}"),
    "resnet18": (32, "{layers:[1,1,1,1],channels:[8,8,16,16],block_args:{attn_layer:se},drop_rate:0.1}"),
    "test_efficientnet": (32, "{drop_rate:0.1,act_layer:relu,fix_stem:true}"),
    "mobilenetv3_small_050": (32, "{drop_rate:0.1,head_bias:false,act_layer:relu}"),
    "regnetx_002": (32, "{w0:8,wa:8.0,wm:2.0,depth:6,group_size:8,drop_rate:0.1}"),
    "mixer_s32_224": (32, "{mlp_ratio:[0.5,0.25],drop_rate:0.1}"),
    "pvt_v2_b0": (32, "{depths:[1,1,1,1],embed_dims:[8,8,16,16],num_heads:[1,1,2,2]}"),
    "xcit_nano_12_p16_224": (16, "{patch_size:8,embed_dim:16,depth:1,num_heads:2,drop_rate:0.1}"),
    "densenet121": (32, "{growth_rate:4,block_config:[1,1,1,1],drop_rate:0.1}"),
    "levit_128s": (32, "{embed_dim:[16,16,16],num_heads:[2,2,2],depth:[1,1,1],key_dim:8}"),
    "test_byobnet": (32, "{stem_chs:8,num_features:32,drop_rate:0.1}"),
}
FAST = ("vit_tiny_patch16_224", "resnet18")
STEPS = (
    "data.max_train_images=32", "data.max_val_images=10", "trainer.global_batch_size=8", "trainer.epochs=1",
    "trainer.log_every_steps=1", "trainer.checkpoint_every_steps=2", "optimizer.lr=0.01", "output_dir=out",
)  # fmt: skip
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def asked(name: str) -> list[str]:
    size, args = MODELS[name]
    return ["model=timm", f"model.name={name}", f"model.args={args}", f"data.image_size={size}"]


def checked(*overrides: str) -> torch.nn.Module:
    config = compose_config(["model=timm", *overrides])
    return check_model(config.model, config.data.image_size or 224)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        checked(*overrides)
    return str(refused.value)


# Arguments.


@pytest.mark.parametrize("name", slow_but_for(FAST, MODELS))
def test_a_model_with_arguments_trains_resumes_and_exports(tmp_path, one_thread, name):
    """Four steps and two resumed from a checkpoint after two end with the same bits; the exports rebuild the model."""
    whole, resumed, exported = tmp_path / "whole", tmp_path / "resumed", tmp_path / "exported"
    config = compose_config([*asked(name), *STEPS, f"output_dir={tmp_path}", "run_name=whole"])
    assert train(config, StopRequest())
    again = {"run_name": "resumed", "resume": str(whole / "checkpoints/step-00000002.pt")}
    assert train(with_values(config, again), StopRequest())
    assert last(resumed)["step"] == 4
    for key in ("model", "optimizer", "rng"):
        assert_equal_state(last(whole)[key], last(resumed)[key])
    assert [row["loss"] for row in rows(whole)[2:]] == [row["loss"] for row in rows(resumed)]
    trained = load_trained(resumed)
    with torch.device("meta"):
        assert str(trained.model) != str(timm.create_model(name, num_classes=10))
    exported.mkdir()
    images = torch.rand(2, 3, trained.image_size, trained.image_size)
    with torch.inference_mode():
        expected = trained.model(images)
        for kind in ("safetensors", "hub", *(["onnx"] if name == "convnext_atto" else [])):
            how, path = formats.FORMATS[kind], exported / formats.FORMATS[kind].target
            how.write(formats.Source(trained), path)
            loaded = how.load(path)
            if how.has_weights:
                assert_equal_state(loaded.state_dict(), trained.model.state_dict())
            difference = (loaded(images) - expected).abs().max() / expected.abs().max()
            assert difference <= ROUNDING, kind
    # What timm has written into the hub folder passes our own check of arguments.
    described = resolve(ModelConfig(name=f"local-dir:{exported / 'hub'}"))
    assert check_model(described, trained.image_size, 10).state_dict().keys() == trained.model.state_dict().keys()


@pytest.mark.parametrize(
    "name,args,message",
    [
        ("test_vit", "{ptch_size:4}", "has no argument ptch_size: did you mean patch_size?"),
        ("test_vit", "{qqq:4}", "has no argument qqq: it has act_layer, attn_drop_rate, attn_layer"),
        ("test_vit", "{patch_size:null}", "ignores arguments that are null: leave it out"),
        ("test_vit", "{num_classes:5}", "use model.num_classes instead"),
        ("test_vit", "{img_size:32}", "use data.image_size instead"),
        ("test_vit", "{drop_path_rate:0.1}", "use model.drop_path_rate instead"),
        ("resnet18", "{in_chans:1}", "use model.in_chans instead"),
        ("resnet18", "{pretrained:true}", "use model.pretrained instead"),
        ("resnet18", "{checkpoint_path:a.pt}", "use model.pretrained instead"),
        ("resnet18", "{features_only:true}", "is not for training a classifier"),
        ("resnet18", "{pretrained_cfg:{file:a.pt}}", "is not for training a classifier"),
        ("test_vit", "{qkv_bias:'no'}", "qkv_bias=no must be true or false"),
        ("test_vit", "{drop_rate:0.1,depth:2.5}", "model.args={depth:2.5}: test_vit cannot be"),
        ("test_vit", "{embed_dim:64,num_heads:5}", "dim should be divisible by num_heads"),
        ("resnet18", "{block:basic}", "'str' object has no attribute 'expansion'"),
        ("efficientnet_b0", "{channel_multiplier:0.5}", "is fixed by the name efficientnet_b0"),
        (
            "vit_tiny_patch16_224",
            "{patch_size:128}",
            "with model.args={patch_size:128} cannot take images of 64 pixels",
        ),
        # timm takes this one without an error: a resnet18 has another stem.
        ("resnet18", "{stem_width:8}", "takes stem_width and does nothing with it"),
        ("sasa_resnet26", "{drop_rate:0.1}", "model.args={'drop_rate': 0.1} is for timm's models"),
    ],
)
def test_wrong_arguments_are_refused_before_any_data(name, args, message):
    assert message in refusal(f"model.name={name}", f"model.args={args}", "data.image_size=64")


def test_an_argument_that_a_registered_model_swallows_is_refused():
    """Such a function takes any name, so only looking at what it does with the value tells that it does nothing."""

    def swallowing_net(pretrained=False, width=4, **kwargs):
        return torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, kwargs["num_classes"])
        )

    swallowing_net.__module__ = __name__
    timm.models.register_model(swallowing_net)
    assert "has no argument widht: did you mean width?" in refusal("model.name=swallowing_net", "model.args={widht:8}")
    assert "takes width and does nothing with it" in refusal("model.name=swallowing_net", "model.args={width:8}")


def test_a_model_that_returns_no_logits_is_refused():
    def feature_net(pretrained=False, **kwargs):
        return torch.nn.AdaptiveAvgPool2d(1)

    feature_net.__module__ = __name__
    timm.models.register_model(feature_net)
    expected = "must return logits [1, 10] for one image, but returned [1, 3, 1, 1]"
    assert expected in refusal("model.name=feature_net")


def test_arguments_in_use_are_not_refused():
    """Arguments of the initialisation alone, and of a config class behind **kwargs, reach the model."""
    checked("model.name=resnet18", "model.args={zero_init_last:false,drop_rate:0.0}")
    checked("model.name=vit_tiny_patch16_224", "model.args={weight_init:jax,class_token:false,global_pool:avg}")
    net = checked("model.name=test_byobnet", "model.args={stem_chs:8}")
    assert net.stem.conv.out_channels == 8
    first, second = (
        build_model(compose_config(["model=timm", "model.name=test_vit", "model.args={mlp_ratio:2}"]).model, 3, 64)
        for _ in "ab"
    )
    assert first.blocks[0].mlp.fc1.out_features == second.blocks[0].mlp.fc1.out_features == 128


# Names.


def test_a_tag_is_checked_and_stays_in_the_name():
    overrides = ["model=timm", "model.name=vit_tiny_patch16_224.augreg_in21k", "data.image_size=32"]
    assert default_run_name(compose_config(overrides)).startswith("digits-vit_tiny_patch16_224.augreg_in21k-e100-s0-")
    assert checked(*overrides[1:]).pretrained_cfg["tag"] == "augreg_in21k"
    assert "did you mean vit_tiny_patch16_224.augreg_in21k" in refusal("model.name=vit_tiny_patch16_224.augreg_in22k")
    assert "did you mean resnet18?" in refusal("model.name=resnet_18.a1_in1k").replace(" or ", "? ")
    assert "it has none: model.name=sasa_resnet26" in refusal("model.name=sasa_resnet26.a1_in1k")
    assert "model.name=hf-hub:timm/resnet18.a1_in1k" in refusal("model.name=timm/resnet18.a1_in1k")


@pytest.fixture
def hub_folder(tmp_path) -> Path:
    """Return a folder that timm has written, with the weights of a tiny ViT."""
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    labels = {"label_names": [str(digit) for digit in range(10)]}
    save_for_hf(model, str(tmp_path / "my vit"), model_config=labels, safe_serialization=True)
    return tmp_path / "my vit"


FROM_FOLDER = ("model=timm", "model.name='local-dir:my vit'", "model.pretrained=timm")


def test_a_hub_folder_gives_a_run_its_model_and_weights_once(in_process, tmp_path, hub_folder):
    """The saved config needs the folder no more: the same command, evaluation and export go on without it."""
    told = in_process("train", *FROM_FOLDER, *STEPS, "trainer.max_steps=2").stdout
    assert "loaded 32 of 32 tensors, 100.0 %" in told and "data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]" in told
    (run_dir,) = (tmp_path / "out").iterdir()
    assert run_dir.name.startswith("digits-my-vit-e1-s0-")
    saved = yaml.safe_load((run_dir / "config.yaml").read_text())["model"]
    assert (saved["name"], saved["source"]) == ("vit_tiny_patch16_224", "local-dir:my vit")
    assert saved["args"] == {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "global_pool": "token"}
    assert "is finished" in in_process("train", *FROM_FOLDER, *STEPS, "trainer.max_steps=2").stdout
    hub_folder.rename(tmp_path / "moved")
    again = in_process("train", *FROM_FOLDER, *STEPS, "trainer.max_steps=2")
    assert (
        "my vit/config.json cannot be read" in again.stderr and "goes on with the model that it began" in again.stderr
    )
    assert "is finished" in again.stdout and len(list((tmp_path / "out").iterdir())) == 1
    in_process("evaluate", str(run_dir))
    in_process("export", str(run_dir), "--formats", "hub")
    refused = in_process("train", *FROM_FOLDER, *STEPS, "seed=1", expect=2).stderr
    assert "model.name=local-dir:my vit: my vit/config.json cannot be read; name a folder" in refused


@pytest.mark.slow
def test_a_folder_that_has_changed_is_noticed(in_process, tmp_path, hub_folder):
    in_process("train", *FROM_FOLDER[:2], *STEPS, "trainer.max_steps=2")
    described = json.loads((hub_folder / "config.json").read_text())
    described["model_args"]["depth"] = 3
    (hub_folder / "config.json").write_text(json.dumps(described))
    refused = in_process("train", *FROM_FOLDER[:2], *STEPS, "trainer.max_steps=2", expect=2).stderr
    assert "model.name=local-dir:my vit has changed since the run began: model.args: {patch_size:4" in refused
    assert "was trained with another config" in refused and "'depth': 2" in refused and "'depth': 3" in refused


@pytest.mark.slow
def test_our_own_export_is_a_source_too(in_process, tmp_path):
    """A net of ours gets its keys back; keys that are set have precedence."""
    in_process("train", "experiment=debug", *STEPS, "trainer.max_steps=1", "run_name=ours")
    in_process("export", "out/ours", "--formats", "hub")
    folder = tmp_path / "out/ours/export/hub"
    ours = load_trained(tmp_path / "out/ours")
    found = resolve(compose_config(["model=timm", f"model.name=local-dir:{folder}", "model.kernel_size=5"]).model)
    before = ours.config.model
    assert (found.name, found.width, found.stem, found.args) == (before.name, before.width, before.stem, {})
    assert found.kernel_size == 5 != before.kernel_size
    name = f"model.name=local-dir:{folder}"
    in_process("train", "model=timm", name, "model.pretrained=timm", *STEPS, "trainer.max_steps=1", "run_name=tuned")
    report = (tmp_path / "out/tuned/config.yaml").read_text()
    assert f"name: {before.name}" in report and f"source: local-dir:{folder}" in report
    assert "sasa" in in_process("summary", "model=timm", name, "data=digits").stdout


def lay_out_in_cache(folder: Path, cache: Path, repository: str) -> None:
    """Copy a hub folder to where the client of the Hugging Face hub looks for a repository without a network."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots/1")
    (place / "refs").mkdir()
    (place / "refs/main").write_text("1")


def test_a_repository_of_the_hub_is_a_source(in_process, tmp_path, hub_folder, monkeypatch):
    """There is no network here: the cache is laid out by hand, and removed before the same command runs again."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    command = ["model=timm", "model.name=hf-hub:someone/vit", "model.pretrained=timm", *STEPS, "trainer.max_steps=2"]
    refused = in_process("train", *command, expect=2).stderr
    assert "model.name=hf-hub:someone/vit: cannot be had" in refused and "run once where there is a network" in refused
    assert not (tmp_path / "out").exists()
    lay_out_in_cache(hub_folder, tmp_path / "cache", "someone/vit")
    told = in_process("train", *command).stdout
    assert "loaded 32 of 32 tensors" in told and "pretrained  hf-hub:someone/vit" in told
    (run_dir,) = (tmp_path / "out").iterdir()
    assert run_dir.name.startswith("digits-someone-vit-e1-s0-")
    shutil.rmtree(tmp_path / "cache")
    assert "is finished" in in_process("train", *command).stdout


@pytest.mark.parametrize(
    "content,message",
    [
        ("[]", "does not describe a model of timm"),
        ("{", "does not describe a model of timm"),
        ('{"architecture": "no_such_net", "pretrained_cfg": {}}', "Unknown model (no_such_net)"),
        (
            '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"in_chans": 1}}',
            "model.in_chans=1 must be 3",
        ),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"widht": 1}}', "has no argument widht"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": [1]}', "does not describe a model of timm"),
        ('{"architecture": 3, "pretrained_cfg": {}}', "does not describe a model of timm"),
    ],
)
def test_a_folder_with_another_config_is_refused(in_process, tmp_path, content, message):
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text(content)
    refused = in_process("train", "model=timm", "model.name=local-dir:net", *STEPS, expect=2).stderr
    assert message in refused and "Traceback" not in refused


def test_a_folder_without_weights_is_refused_by_name(in_process, hub_folder):
    (hub_folder / "model.safetensors").unlink()
    refused = in_process("train", *FROM_FOLDER, *STEPS, expect=2).stderr
    assert "model.pretrained=local-dir:my vit: the weights of vit_tiny_patch16_224 cannot be had" in refused
    assert "put them into the folder" in refused


@pytest.mark.slow
def test_the_real_commands_with_arguments(command, tmp_path):
    command("train", *asked("vit_tiny_patch16_224"), *STEPS, "run_name=whole", "trainer.max_steps=2")
    assert last(tmp_path / "out/whole")["step"] == 2
    command("export", "out/whole", "--formats", "safetensors", "hub", "onnx")
    wrong = command("train", "model=timm", "model.name=resnet18", "model.args={drop_rat:0.1}", *STEPS, expect=2)
    assert "did you mean drop_rate?" in wrong.stderr
