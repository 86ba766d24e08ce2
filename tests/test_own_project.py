"""Check the user's own presets and modules: configs=, imports= and model.target, and that no checkpoint runs code."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from running_commands import TINY

from sasa_train import evaluate, export, predict, report, sweep, train, visualize
from sasa_train.config import own_code

MODEL = """
from timm.models import register_model
from torch import nn

class TinyNet(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))

@register_model
def {name}_net(pretrained=False, num_classes=10, **kwargs):
    return TinyNet(num_classes)  # timm adds arguments of its own
"""
SHORT = [*(word for word in TINY if not word.startswith("trainer.epochs")), "trainer.epochs=1", "run_name=run"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The user's folder, which is the working directory; what a test imports is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("sasa_train.config.groups._own", [])
    for name in ("_named", "_folders"):
        monkeypatch.setattr(own_code, name, set())
    monkeypatch.setattr(own_code, "_imported", {})
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_presets(folder: Path, model: str) -> None:
    write(folder / "experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /model: mine\nseed: 3\n")
    write(folder / "model/mine.yaml", f"target: {model}.TinyNet\nargs: {{width: 6}}\n")


def test_presets_of_ones_own_train_and_what_they_set_is_saved(project, capsys, monkeypatch):
    write(project / "presets_model.py", MODEL.format(name="presets"))
    write_presets(project / "conf", "presets_model")
    assert train.run_command(["configs=conf", *SHORT[1:], "experiment=mine"]) == 0
    saved = yaml.safe_load((project / "out/run/config.yaml").read_text())
    assert (saved["seed"], saved["model"]["args"], saved["configs"]) == (3, {"width": 6}, ["conf"])
    shutil.move(project / "conf", project / "moved")
    # The same through the variable, and with the experiment given by its path.
    monkeypatch.setenv("SASA_CONFIGS", "moved")
    assert train.run_command([*SHORT[1:], "experiment=moved/experiment/mine.yaml"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_folder_of_presets_that_cannot_be_meant_is_refused(project, capsys):
    write(project / "empty/readme.txt", "")
    write(project / "clash/experiment/quickstart.yaml", "")
    write(project / "one/model/tiny.yaml", "")
    write(project / "two/model/tiny.yaml", "")
    write(project / "bare/experiment/bare.yaml", "seed: 1\n")
    write(project / "bare/short.yml", "seed: 1\n")
    write(project / "wrong/experiment/wrong.yaml", "# @package _global_\ntrainer:\n  epoch: 1\n")
    for words, expected in [
        (["configs=nowhere"], "there is no such folder"),
        (["configs=empty"], "has none of the folders model/, data/"),
        (["configs=clash"], "experiment/quickstart.yaml has the name of a preset in"),
        (["configs=one", "configs=two"], "model/tiny.yaml has the name of a preset in"),
        (["experiment=./nowhere.yaml"], "is not a file"),
        (["experiment=bare/short.yml"], "must end in .yaml"),
        (["experiment=bare/experiment/bare.yaml"], "must begin with the line: # @package _global_"),
        (["configs=wrong", "experiment=wrong"], "unknown key 'trainer.epoch': did you mean trainer.epochs?"),
        (["configs=one", "model=tine"], "did you mean tiny?"),
    ]:
        assert train.run_command(["data=digits", *words]) == 2
        assert expected in capsys.readouterr().err
    assert not (project / "outputs").exists()


def test_a_registered_model_is_trained_and_evaluated_with_its_imports(project, capsys):
    """Registered by one's own module, a model once trained through a script, but no other command knew it."""
    write(project / "registered.py", MODEL.format(name="registered"))
    other = ["model=timm", "model.name=registered_net"]
    assert train.run_command([*SHORT, *other]) == 2
    assert "imports=[...] registers it" in capsys.readouterr().err
    assert train.run_command([*SHORT, *other, "imports=./registered.py"]) == 0
    assert evaluate.run_command(["out/run", "imports=[registered]"]) == 0


@pytest.mark.parametrize(
    "words,expected",
    [
        (["imports=nowhere"], "imports=nowhere: there is no module nowhere in the working directory"),
        (["imports=./nowhere.py"], "imports=./nowhere.py: there is no such file"),
        (["imports=./torch.py"], "another module is named torch"),
        (["imports=./fails.py"], "fails.py:3 in divide: ZeroDivisionError: division by zero"),
        (["imports=[fails_too]"], "fails_too.py:1 in <module>: ModuleNotFoundError: No module named 'not_there'"),
        (["imports=unfinished"], "unfinished.py:1: SyntaxError"),
        (["imports=leaves"], "leaves.py:1 in <module>: SystemExit: 3"),
        (["model.target=TinyNet"], "must be a dotted name of your own code"),
        (["model.target=named.TinyNt"], "named.py; did you mean named.TinyNet?"),
        (["model.target=named.nn"], "nn is not callable"),
        (["model.target=named.TinyNet", "model.args={wdth:3}"], "unexpected keyword argument 'wdth'"),
        (["model.target=returns.text"], "must return a torch.nn.Module, but returned str"),
        (["model.target=returns.other_shape"], "must return logits [1, 10] for one image, but returned [1, 150528]"),
        (["model.target=returns.broken"], "returns.py:9 in forward: RuntimeError"),
        (["model.target=named.TinyNet", "model.stem=conv"], "is a key of our own models, which TinyNet is not"),
    ],
)
def test_own_code_that_cannot_work_is_refused_before_the_images_are_read(project, capsys, words, expected):
    write(project / "torch.py", "")
    write(project / "fails.py", "def divide():\n    # by nothing\n    return 1 / 0\n\ndivide()\n")
    write(project / "fails_too.py", "import not_there\n")
    write(project / "unfinished.py", "x = (\n")
    write(project / "leaves.py", "raise SystemExit(3)\n")
    write(project / "named.py", MODEL.format(name="named"))
    write(
        project / "returns.py",
        "from torch import nn\n\ndef text(num_classes):\n    return 'net'\n\ndef broken(num_classes):\n"
        "    class Net(nn.Module):\n        def forward(self, images):\n            return images @ images[0, 0, :3]\n"
        "    return Net()\n\ndef other_shape(num_classes):\n    return nn.Flatten()\n",
    )
    unread = ["data=image_folder", "data.root=nowhere"]  # reading images would be refused with another message
    for name in ("fails", "fails_too", "unfinished", "leaves", "named", "returns"):
        sys.modules.pop(name, None)
    assert train.run_command([*SHORT, *unread, *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (project / "out").exists()


def test_changed_code_is_not_continued_with_unasked(project, capsys):
    code = write(project / "changing.py", MODEL.format(name="changing"))
    command = [*SHORT, "model.target=changing.TinyNet"]
    assert train.run_command(command) == 0
    code.write_text(code.read_text() + "# another version\n")
    longer = [*command, "trainer.epochs=2", "allow_config_change=[trainer.epochs]"]
    assert train.run_command(longer) == 2
    text = capsys.readouterr().err
    assert f"trained with other code of your own: {code}" in text and "allow_config_change=[imports]" in text
    longer[-1] = "allow_config_change=[trainer.epochs,imports]"
    assert train.run_command(longer) == 0
    assert f"your own code is not what out/run was trained with: {code}" in capsys.readouterr().err


def test_no_saved_config_imports_anything(project, capsys):
    """A stranger's run folder names modules that may lie anywhere; nothing but the user's own command imports them."""
    code = write(project / "stranger.py", MODEL.format(name="stranger"))
    command = [*SHORT, "model.target=stranger.TinyNet", "imports=./stranger.py", "trainer.checkpoint_every_steps=1"]
    assert train.run_command(command) == 0
    shutil.copytree(project / "out", project / "sweep")
    own_code._imported.clear()
    own_code._named.clear()
    del sys.modules["stranger"]
    code.write_text("open('ran.txt', 'w').close()\n")
    write(project / "sweep/ledger.json", LEDGER)
    for command in (
        [train, "resume=out/run"],
        [train, "resume=out/run", "trainer.epochs=2", "allow_config_change=[trainer.epochs,imports]"],
        [evaluate, "out/run"],
        [predict, "out/run", "sweep"],
        [export, "out/run", "--formats", "safetensors"],
        [visualize, "out/run"],
    ):
        assert command[0].run_command(list(command[1:])) == 2, command
        assert "stranger), and a saved config runs none by itself" in (text := capsys.readouterr().err)
        assert "add 'imports=[./stranger.py]'" in text
    assert report.run_command(["out/run"]) == 0
    assert report.run_command(["sweep"]) == 0  # its ledger names code, too
    assert not (project / "ran.txt").exists()
    assert evaluate.run_command(["out/run", "imports=stranger"]) == 2  # now the user has named it
    assert (project / "ran.txt").exists()


LEDGER = """{"format_version": 1, "sweep": {}, "jobs": {"gone": {"overrides":
["experiment=debug", "imports=[./stranger.py]", "model.target=stranger.TinyNet"], "state": "waiting"}}}"""


def test_an_installed_package_announces_its_modules(project):
    """Packages name modules in the entry-point group sasa_train.plugins, and need no imports=."""
    write(project / "announced.py", MODEL.format(name="announced"))
    write(project / "announced-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: announced\nVersion: 1.0\n")
    write(project / "announced-1.0.dist-info/entry_points.txt", "[sasa_train.plugins]\nmodels = announced\n")
    sys.path.insert(0, str(project))
    own_code.use_plugins.cache_clear()
    try:
        assert train.run_command([*SHORT, "model=timm", "model.name=announced_net"]) == 0
    finally:
        own_code.use_plugins.cache_clear()


def test_a_sweep_takes_lists_of_imports_and_no_alternatives(project, capsys):
    assert sweep.run_command(["experiment=debug", "imports=a,b"]) == 2
    assert "several values of imports are written as a list, imports=[a,b]" in capsys.readouterr().err
