"""Check distillation: its losses by hand, what the teacher sees, exact resuming, and teachers that are refused."""

import json
import math
import os
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from making_data import CPU
from reading_runs import assert_equal_state, assert_same_run, last, rows
from running_commands import TINY, kill_after
from safetensors.torch import save_file
from writing_runs import write_teacher

from sasa_train.config import own_code
from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name
from sasa_train.config.keys import ModelConfig
from sasa_train.data.transforms import Normalize
from sasa_train.device import RunPlan
from sasa_train.refusal import ConfigError
from sasa_train.runs.teacher import TeacherSource
from sasa_train.training.distillation import Teacher, distillation_losses

DIGITS = [str(digit) for digit in range(10)]
CONV = ("experiment=debug", "model=conv_resnet26")
SHORT = (*TINY, "trainer.epochs=2", "augment.cutmix=1", "trainer.grad_accum_steps=2")
MODELS = """
    import torch
    from torch import nn

    class Means(nn.Module):
        size = None

        def __init__(self, num_classes):
            super().__init__()

        def forward(self, images):
            if self.size is not None:
                assert images.shape[2:] == (self.size, self.size), "another size"
            return images.mean((2, 3))

    class OfSize16(Means):
        size = 16

    class Draws(Means):
        def forward(self, images):
            return images.mean((2, 3)) + torch.rand(3)
"""
OURS = {"mean": [0.6, 0.5, 0.4], "std": [0.2, 0.25, 0.3]}
THEIRS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.2]}


def softmax(values: list[float], temperature: float) -> list[float]:
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("kind,temperature", [("soft", 1.0), ("soft", 4.0), ("hard", 3.0)])
def test_losses_and_gradients_are_those_on_paper(kind, temperature):
    """T^2 x sum p log(p / q) and its gradient T (q - p), or -log q of the teacher's class and q - 1; means over images.

    The tolerance is that of float32 sums of six terms.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
    keys = [f"distill.kind={kind}", f"distill.temperature={temperature}"]
    config = compose_config(["distill.teacher=x", *keys]).distill
    loss = distillation_losses(student.requires_grad_(), teacher, config).mean()
    loss.backward()
    expected, gradient = 0.0, []
    for ours, theirs in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        if kind == "soft":
            p, q = softmax(theirs, temperature), softmax(ours, temperature)
            expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
            gradient.append([temperature * (b - a) / 6 for a, b in zip(p, q, strict=True)])
        else:
            q, best = softmax(ours, 1.0), max(range(5), key=theirs.__getitem__)
            expected -= math.log(q[best]) / 6
            gradient.append([(b - (label == best)) / 6 for label, b in enumerate(q)])
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(student.grad, torch.tensor(gradient), rtol=1e-5, atol=1e-6)


@pytest.fixture
def teacher_of(own_module):
    """Return a function that builds a teacher of MODELS for a run on images of 8 pixels normalised with OURS."""
    own_module("my_teachers", MODELS)
    own_code.allow(["my_teachers"])

    def build(name: str, size: int = 8, mode: str = "rgb", classes=("a", "b", "c"), **stated) -> Teacher:
        keys = [f"data.{name}={values}" for name, values in OURS.items()]
        config = compose_config(["data.image_size=8", "distill.teacher=x", "distill.weight=0.25", *keys])
        model = ModelConfig(target=f"my_teachers.{name}")
        source = TeacherSource({}, model, list(classes), (3, size, size), mode, **(THEIRS | stated))
        return Teacher(source, RunPlan(config, CPU))

    return build


@pytest.mark.parametrize("name,size", [("Means", 8), ("OfSize16", 16)])
def test_the_teacher_sees_its_own_normalisation_and_size(teacher_of, name, size):
    """It returns the channels' means of what it gets; resizing keeps those of images of one colour."""
    colours = torch.randint(0, 256, (4, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = Normalize(OURS["mean"], OURS["std"], CPU, channels_last=False)(colours.expand(-1, -1, 8, 8))
    expected = Normalize(THEIRS["mean"], THEIRS["std"], CPU, channels_last=False)(colours)[:, :, 0, 0]
    teacher = teacher_of(name, size)
    torch.testing.assert_close(teacher.logits(images), expected, rtol=0, atol=1e-5)
    assert ("images resized to 16 pixels" in teacher.describe()) == (size == 16)
    assert torch.equal(teacher_of("Means", **OURS).logits(images), images.mean((2, 3)))
    # The training loss is the weighted sum; gradients reach the student's logits alone.
    logits, loss = torch.randn(4, 3, requires_grad=True), torch.tensor(2.0)
    added = teacher.added_to(loss, logits, images.requires_grad_())
    losses = distillation_losses(logits, expected, teacher.config)
    assert added.item() == pytest.approx(1.5 + 0.25 * losses.mean().item(), 1e-5)
    weights = torch.tensor([1.0, 0.5, 3.0, 2.0])
    of_weighted = teacher.added_to(loss, logits, images, weights)
    assert of_weighted.item() == pytest.approx(1.5 + 0.25 * (weights * losses).mean().item(), 1e-5)
    added.backward()
    assert logits.grad is not None and images.grad is None
    # Other classes are left out, and another order is the run's.
    teacher.match(["c", "a"])
    torch.testing.assert_close(teacher.logits(images), expected[:, [2, 0]], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"has no class b3 .*d; it must have each of the run's 3 classes by name"):
        teacher.match(["a", "b3", "d"])


def test_a_teacher_that_would_change_the_student_is_refused(teacher_of):
    with pytest.raises(ConfigError, match="draws random numbers in eval mode, which would change the student's"):
        teacher_of("Draws")
    with pytest.raises(ConfigError, match="was trained with data.mode=grey, and this run has data.mode=rgb"):
        teacher_of("Means", mode="grey")
    with pytest.raises(ConfigError, match=r"cannot take images of 9 pixels \(another size\)"):
        teacher_of("OfSize16", 9)
    with pytest.raises(ConfigError, match=r"must return logits \[1, 2\] for one image, not \[1, 3\]"):
        teacher_of("Means", classes=("a", "b"))


def test_a_weight_of_0_is_no_teacher_bit_by_bit(in_process, tiny_run, tmp_path):
    """Reading and checking the teacher must leave the student's random numbers alone."""
    line = (*SHORT, "model.drop_path_rate=0.2")
    in_process("train", *line, "run_name=none")
    in_process("train", *line, "run_name=zero", f"distill.teacher={tiny_run}", "distill.weight=0")
    assert rows(tmp_path / "out/zero") == rows(tmp_path / "out/none")
    assert_equal_state(last(tmp_path / "out/zero"), last(tmp_path / "out/none"))


def test_a_killed_distillation_goes_on_with_the_same_teacher_alone(in_process, tiny_run, tmp_path):
    """The run that is killed ends as one never touched, from another folder, too; commands need no teacher."""
    shutil.copytree(tiny_run, tmp_path / "teacher")
    line = (*SHORT, "distill.teacher=teacher", "trainer.checkpoint_every_steps=1", "model=conv_resnet26")
    said = in_process("train", *line, "run_name=whole").stdout
    assert "teacher     sasa_resnet26, 10 classes (sha256 " in said
    kill_after(3, tmp_path / "out/broken", *line, "run_name=broken")
    # A run with another teacher is another run, and is not continued with it, wherever it lies.
    names = {default_run_name(compose_config([*line, *keys])) for keys in ([], ["distill.weight=0.1"])}
    assert len(names) == 2
    write_teacher(tmp_path / "other.safetensors", DIGITS, *CONV)
    for other in ("other.safetensors", "null", "timm:resnet18"):
        refused = in_process("train", *line, "run_name=broken", f"distill.teacher={other}", expect=2).stderr
        assert "distill.teacher" in refused and "allow_config_change=[distill.teacher]" in refused
    (tmp_path / "elsewhere").mkdir()
    checkpoints = tmp_path / "teacher/checkpoints"
    checkpoints.rename(tmp_path / "kept")
    gone = in_process("train", "resume=../out/broken", here="elsewhere", expect=2).stderr
    assert "distill.teacher=" in gone and "must be a run, a checkpoint, an export" in gone
    (tmp_path / "kept").rename(checkpoints)
    in_process("train", "resume=../out/broken", here="elsewhere")
    assert_same_run(tmp_path / "out/broken", tmp_path / "out/whole")
    assert "teacher: teacher" in (tmp_path / "out/broken/config.yaml").read_text()
    info = json.loads((tmp_path / "out/broken/run.json").read_text())
    assert info["teacher_sha256"] == json.loads((checkpoints / "best.pt.json").read_text())["sha256"]
    # A moved teacher is the same; a finished run and other commands need none.
    (tmp_path / "teacher").rename(tmp_path / "moved")
    said = in_process("train", *line, "run_name=broken", "distill.teacher=moved").stdout
    assert "finished" in said
    shutil.rmtree(tmp_path / "moved")
    in_process("train", *line, "run_name=broken")
    in_process("evaluate", "out/broken")


def test_an_export_teaches_as_its_run(in_process, tiny_run, tmp_path):
    in_process("export", str(tiny_run), "--formats", "safetensors", "hub", "--out", "made")
    line = (*SHORT, "trainer.epochs=1", "distill.kind=hard")
    for name, teacher in (("run", tiny_run), ("file", "made/model.safetensors"), ("hub", "made/hub")):
        in_process("train", *line, f"run_name={name}", f"distill.teacher={teacher}")
    assert rows(tmp_path / "out/run") == rows(tmp_path / "out/file") == rows(tmp_path / "out/hub")


class Runs:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_teacher_is_guessed_and_none_runs_as_code(in_process, tmp_path):
    """Each is refused before data is loaded: there is none at data.root."""
    write_teacher(tmp_path / "two.safetensors", ["0", "1"], *CONV)
    save_file({"weight": torch.ones(3)}, tmp_path / "bare.safetensors")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"model": Runs()}, tmp_path / "hostile.pt")
    (tmp_path / "folder").mkdir()
    line = ("experiment=debug", "data=cifar10", "data.root=nowhere", "output_dir=out")
    for keys, message in {
        "distill.teacher=nothing": "distill.teacher=nothing must be a run, a checkpoint, an export",
        "distill.teacher=folder": "folder/checkpoints/last.pt is not there",
        "distill.teacher=text.pt": "distill.teacher=text.pt: ",
        "distill.teacher=hostile.pt": "distill.teacher=hostile.pt: ",
        "distill.teacher=bare.safetensors": "does not say of which model and classes it is",
        "distill.teacher=two.safetensors": "has 2 classes (0, 1), and the run 10",
        "distill.teacher=timm:": "must be timm:NAME or timm:NAME.TAG",
        "distill.teacher=timm:resnet81": "distill.teacher=timm:resnet81: resnet81 is not in timm's registry: did you",
        "distill.teacher=timm:sasa_resnet26": "timm has no weights of sasa_resnet26",
        "distill.kind=hard": "distill.kind=hard does nothing without distill.teacher",
        "distill.teacher=a distill.weight=1.1": "distill.weight=1.1 must be from 0 to 1",
        "distill.teacher=a distill.temperature=0": "distill.temperature=0.0 must be positive",
        "distill.teacher=a distill.kind=hard distill.temperature=2": "distill.temperature=2.0 is for distill.kind=soft",
        "distill.teacher=a trainer.micro_batch_size=auto": "with distill.teacher, give a number",
    }.items():
        said = in_process("train", *line, *keys.split(), expect=2).stderr
        assert message in said, said
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_timms_published_weights_teach_some_of_their_classes(in_process, tmp_path, monkeypatch, image_folder):
    """The Hub cache is created without a network; ImageNet's classes are found by their WordNet ids."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "snapshots/1").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1")
    save_file(timm.create_model("test_vit").state_dict(), repository / "snapshots/1/model.safetensors")
    line = (*SHORT, "trainer.epochs=1", "data=image_folder", f"data.root={image_folder}", "data.image_size=16")
    line = (*line, "trainer.global_batch_size=8", "distill.teacher=timm:test_vit")
    said = in_process("train", *line, "run_name=a", expect=2).stderr
    assert "distill.teacher=timm:test_vit: has no class blue" in said and "n01440764" in said
    for split in ("train", "val"):
        for name, wnid in (("blue", "n01443537"), ("red", "n01440764")):
            Path(image_folder, split, name).rename(Path(image_folder, split, wnid))
    said = in_process("train", *line, "run_name=a").stdout
    assert "test_vit, 1,000 classes, 2 of them this run's, found by name" in " ".join(said.split())
