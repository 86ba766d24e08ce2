"""Check that configs are typed and validated; invalid ones are refused, with a suggested fix, before data is loaded."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from running_commands import TINY

from sasa_train.config import compose, groups
from sasa_train.config.compose import compose_config
from sasa_train.config.groups import config_dir
from sasa_train.config.identity import default_run_name, differing_keys
from sasa_train.config.keys import TrainConfig, flatten, key_table
from sasa_train.config.saved import load_config, load_config_file, to_yaml
from sasa_train.refusal import ConfigError


@pytest.fixture
def own_configs(tmp_path, monkeypatch) -> Path:
    """Return a copy of `configs/` that is used instead of it, to add files to."""
    folder = tmp_path / "configs"
    shutil.copytree(config_dir(), folder)
    for module in (compose, groups):
        monkeypatch.setattr(module, "config_dir", lambda: folder)
    return folder


def test_a_misspelt_key_in_a_file_is_refused(own_configs):
    (own_configs / "experiment/mine.yaml").write_text("# @package _global_\ntrainer:\n  epoch: 3\n")
    (own_configs / "data/mine.yaml").write_text("nam: digits\n")
    with pytest.raises(ConfigError, match="unknown key 'trainer.epoch': did you mean trainer.epochs?"):
        compose_config(["experiment=mine"])
    with pytest.raises(ConfigError, match="unknown key 'data.nam': did you mean data.name?"):
        compose_config(["data=mine"])


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["model=resnet50"], "model=resnet50 is none of .*: did you mean"),
        (["trainer.epochs=many"], "trainer.epochs=many must be a whole number"),
        (["trainer.global_batch_size=10", "trainer.grad_accum_steps=4"], "the nearest that fit are 8 and 12"),
        (["trainer.precision=fp8"], "trainer.precision=fp8 must be one of auto, fp32, bf16, fp16"),
        (["model.kernel_size=4"], "model.kernel_size=4 must be odd"),
        (["model=timm", "model.kernel_size=5"], "model.kernel_size=5 is a key of our own models"),
        (["data=imagenet", "data.resident=true"], "data.resident=true needs images of 64 pixels and less"),
        (["data.holdout_fraction=1.5"], "must be at least 0 and below 1"),
        (["schedule.warmup_epochs=200"], "must not exceed trainer.epochs=100"),
        (["run_name=../elsewhere"], "must be a plain folder name"),
        (["allow_config_change=[epochs]"], "allow_config_change=epochs must name keys"),
        (["epochs=3"], "unknown key 'epochs': did you mean trainer.epochs?"),
        (["++trainer.epochs=3"], "every key exists already"),
        (["~trainer.epochs"], "every key exists already"),
        (["trainer.epochs"], "an override is key=value"),
        (["model={name: resnet50}"], "set its keys one by one, as in model.name="),
        (["hydra.verbose=true"], "hydra's own keys have an effect with -m alone"),
        (["trainer.ema_decay=0"], "trainer.ema_decay=0.0 must be positive and below 1"),
        (["model.stage_ops='${x}'"], "model.stage_ops: Interpolation key 'x' not found"),
        (["augment=trivial_cutmix", "trainer.epochs=5"], "augment.mix_off_epochs=10 must be below trainer.epochs=5"),
        (["trainer.micro_batch_size=auto", "trainer.grad_accum_steps=8"], "contradicts trainer.micro_batch_size=auto"),
        (["trainer.micro_batch_size=32", "trainer.grad_accum_steps=4"], "contradicts trainer.micro_batch_size=32"),
        (["trainer.micro_batch_size=7"], "must be auto or divide trainer.global_batch_size=256"),
        (["augment.mixup=1", "trainer.micro_batch_size=1"], "micro-batches of=1 image leave mixup and cutmix no other"),
        (["data=list"], "data.train=None must name a CSV file for data=list"),
        (["data.train=a.csv", "data=digits"], "data.train=a.csv is for data=list"),
        (["data.val=a.csv", "data=digits"], "data.val=a.csv is for data=list"),
        (["data.columns=[a,b]"], "data.columns=.* is for data=list"),
        (["data=list", "data.train=a.csv", "data.columns=[a]"], "must name two columns, those of images and labels"),
        (["data=list", "data.train=a.csv", "data.columns=[a,a]"], "must name two columns"),
        (["data=list", "data.train=a.csv", "data.split=test"], "data.split=test is for data.root; a list is chosen by"),
        (
            ["data=list", "data.train=a", "data.val=b", "data.holdout_fraction=0.1"],
            "takes val from train, but data.val",
        ),
        (
            ["trainer.loss=" + "[" * 900 + "]" * 900],
            "cannot be read .it is nested too deeply.; an override is key=value",
        ),
        (["data.root=null"], "data.root=None must be a folder; only for data=list may it be null"),
        (["data=list", "data.train=a.csv", "data.args={a:1}"], "data.args=.* needs data.target or data.dataset"),
        (["data=torchvision"], "data.dataset=None and data.name=torchvision .data=torchvision. need each other"),
        (["data.dataset=MNIST"], "data.dataset=MNIST is for data=torchvision and data=hf"),
        (["data.name=own"], "data.target=None and data.name=own .data=own. need each other"),
        (["data=hf"], "data.dataset=None and data.name=hf .data=hf. need each other"),
        (["data=torchvision", "data.dataset=os.system"], "must be a class of torchvision.datasets, as in Flowers102"),
        (["data.max_unreadable=2"], "data.max_unreadable=2.0 must be from 0 to 1"),
        (["augment.policy=randaugment"], "augment.policy=randaugment must be one of none, rand_augment"),
        (["augment.policy_magnitude=31"], "augment.policy_magnitude=31 must be from 0 to 30"),
        (
            ["data.std=[58,57,57]"],
            r"data.std=.* must be of values in \[0, 1\], so 1 at most; divide numbers for values",
        ),
        (["augment.hue=0.6"], "augment.hue=0.6 must be from 0 to 0.5"),
        (["augment.erasing_scale=[0.5,0.1]"], r"augment.erasing_scale=\[0.5, 0.1\] must be \[low,high\]"),
        (["augment.mix_prob=1.5"], "augment.mix_prob=1.5 must be from 0 to 1"),
        (["augment.mixup=-1"], "augment.mixup=-1.0 must be at least 0"),
        (["data=imagenet", "augment.crop_mode=padded"], "is for images of 64 pixels and less, but data.image_size=224"),
        (["trainer.loss=mse"], "trainer.loss=mse must be one of cross_entropy, bce"),
        (
            ["trainer.grad_clip_norm=1", "trainer.grad_clip_agc=0.01"],
            "agc.*norm.* exclude each other",
        ),
    ],
)
def test_configs_are_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config(overrides)


def test_a_config_survives_its_yaml():
    config = compose_config(["experiment=quickstart", "model.stage_ops=[conv,conv,attention,attention]", "seed=3"])
    assert load_config(to_yaml(config)) == config


def test_a_text_on_the_command_line_stays_as_it_is_typed(in_process, image_folder, tmp_path):
    """run_name=2024_01_15 made the folder 20240115, the git hash 12e4567 made inf, and data.root had the same fault."""
    image_folder.rename(tmp_path / "1e5")
    given = [*TINY, "data=image_folder", "data.image_size=8", "trainer.epochs=1", "data.num_workers=0", "output_dir=."]
    in_process("train", *given, "data.root=1e5", "run_name=2024_01_15,12e4567", "-m")
    assert {path.parent.name for path in tmp_path.glob("*/run.json")} == {"2024_01_15", "12e4567"}

    in_process("train", "resume=12e4567", "trainer.epochs=2", "allow_config_change=[trainer.epochs]")
    config = load_config_file(tmp_path / "12e4567/config.yaml")
    assert (config.run_name, config.data.root, config.resume, config.trainer.epochs) == ("12e4567", "1e5", "12e4567", 2)
    command = shlex.split(json.loads((tmp_path / "12e4567/run.json").read_text())["reproduce"])
    assert compose_config(command[1:]).data == config.data
    in_process("evaluate", "12e4567", "data.root=2024_01_15", expect=2)  # a run folder, not a folder of images
    (tmp_path / "1e5").rename(tmp_path / "1.50")
    in_process("evaluate", "12e4567", "data.root=1.50")


@pytest.mark.parametrize("folder", ["/home/jürgen/Bilder (neu)", "x~1", "a b's;c", "C:\\x=y&z", "ünï"])
def test_a_path_is_taken_as_it_is_typed(folder):
    """Hydra cannot read most signs, so that people named Jürgen had to quote their own home."""
    assert compose_config(["data=image_folder", f"data.root={folder}"]).data.root == folder


def test_a_text_in_a_file_stays_as_it_is_written(own_configs):
    """YAML reads these as numbers, as true or false, and 1:30 as 90; only null is not a text."""
    (own_configs / "data/0x10.yaml").write_text("name: image_folder\nroot: 2024_01_15\n")
    (own_configs / "experiment/012.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: 0x10\nrun_name: 12e4567\noutput_dir: 1:30\nresume: no\n"
        "model: {pretrained: null, stage_ops: [on, y, 1e5, 1.50]}\ntrainer: {epochs: 0x10}\n"
    )
    config = compose_config(["experiment=012"])
    assert (config.data.name, config.data.root) == ("image_folder", "2024_01_15")
    assert (config.run_name, config.output_dir, config.resume) == ("12e4567", "1:30", "no")
    assert (config.model.pretrained, config.model.stage_ops) == (None, ["on", "y", "1e5", "1.50"])
    assert config.trainer.epochs == 16
    assert load_config("data:\n  root: 012  # octal\n").data.root == "012"


def test_true_and_false_are_taken_for_data_resident_in_any_case():
    for typed, kept in {"true": "true", "False": "false", "'TRUE'": "true"}.items():
        assert compose_config([f"data.resident={typed}"]).data.resident == kept
    assert load_config("data: {resident: False}").data.resident == "false"


def test_the_run_name_follows_the_trajectory_alone():
    def name(*overrides: str) -> str:
        return default_run_name(compose_config(list(overrides)))

    same = ["data.num_workers=3", "trainer.device=cpu", "output_dir=x", "trainer.log_every_steps=1", "data.root=y"]
    assert all(name(override) == name() for override in same)
    assert len({name(), name("seed=1"), name("optimizer.lr=0.2"), name("model.border=zero"), name("data=cifar10")}) == 5
    assert name("data=cifar10", "data.root=a") != name("data=cifar10", "data.root=b")
    assert re.fullmatch(r"digits-sasa_resnet26-e100-s0-[0-9a-f]{8}", name())


def test_every_key_has_a_meaning():
    table = key_table()
    assert table.keys() == flatten(TrainConfig()).keys()
    assert all(field.metadata.get("help") for field in table.values())


def test_arguments_of_an_optimizer_are_one_key():
    """The arguments are reported and replaced as a single key, so arguments in a saved config can be removed."""
    old = compose_config(["optimizer.name=adamw", "optimizer.args={amsgrad:true}"])
    new = compose_config(["optimizer.name=adamw", "optimizer.args={amsgrad:false,maximize:true}"])
    assert differing_keys(old, new) == ["optimizer.args"]
    assert compose_config(["allow_config_change=[optimizer.args]"]).allow_config_change == ["optimizer.args"]
    assert load_config(to_yaml(old), ["optimizer.args={}"]).optimizer.args == {}
    assert load_config(to_yaml(old), ["optimizer.args={maximize:true}"]).optimizer.args == {"maximize": True}


def test_of_the_two_batch_keys_the_new_one_decides():
    saved = compose_config(["trainer.global_batch_size=64"])
    saved.trainer.micro_batch_size, saved.trainer.grad_accum_steps = 16, 4
    assert load_config(to_yaml(saved), ["trainer.micro_batch_size=8"]).trainer.grad_accum_steps == 1  # 8 once resolved
    assert load_config(to_yaml(saved), ["trainer.grad_accum_steps=2"]).trainer.micro_batch_size is None


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["--epochs", "3"], "trainer.epochs=3"),
        (["--batch-size=32"], "trainer.global_batch_size=32"),
        (["batch_size=32"], "did you mean trainer.global_batch_size?"),
        (["lr=0.1"], "did you mean optimizer.lr?"),
        (["model=resnet18"], "model=timm model.name=resnet18"),
        (["data=/photos"], "your own images: data.root=/photos"),
        (["./my photos"], "to train on the images in a folder, write 'data.root=./my photos'"),
        (["./photos (1)"], """write 'data.root='"'"'./photos (1)'"'"''"""),
        (["./my_run"], "to continue this run, write resume=./my_run"),
        (["data.root", "=", "photos"], "data.root =: write key=value, with no spaces around ="),
        (["data.root=", "photos"], "data.root= photos: write key=value, with no spaces around ="),
        (["data.root", "=photos"], "data.root =photos: write key=value, with no spaces around ="),
        (["data.holdout=0.3"], "did you mean data.holdout_fraction?"),
        (["data.std=[1,a,1]"], "data.std[1]=a must be a number"),
        (["trainer.compile=perhaps"], "trainer.compile=perhaps must be true or false"),
        (["seed=0,1"], "seed=0,1: several values are a sweep: use sasa-sweep"),
    ],
)
def test_what_newcomers_type_is_answered_with_what_to_type(arguments, line, in_process, tmp_path):
    for name in ("my photos", "photos (1)", "my_run"):
        (tmp_path / name).mkdir()
    (tmp_path / "my_run/config.yaml").touch()
    assert line in in_process("train", *arguments, expect=2).stderr


def test_without_arguments_the_usage_is_shown_and_nothing_is_trained(tmp_path, in_process):
    told = in_process("train", expect=2).stderr
    assert told.startswith("usage: sasa-train") and "experiment=quickstart" in told
    assert not (tmp_path / "outputs").exists()


def test_cfg_prints_the_config_and_trains_nothing(tmp_path, in_process):
    printed = in_process("train", "experiment=quickstart", "--cfg", "job", "seed=7").stdout
    assert load_config(printed) == compose_config(["experiment=quickstart", "seed=7"])
    assert not (tmp_path / "outputs").exists()
