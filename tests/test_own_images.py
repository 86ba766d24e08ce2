"""Check the run that data.root=FOLDER alone begins: what it chooses from the images, says, saves and keeps."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reading_runs import rows
from running_commands import launch

from sasa_train.config.compose import compose_config
from sasa_train.config.identity import default_run_name, run_name_in
from sasa_train.config.keys import TrainConfig, flatten
from sasa_train.config.overrides import for_own_images
from sasa_train.config.saved import load_config_file, to_yaml
from sasa_train.runs.ledger import Ledger
from sasa_train.runs.weights import Weights
from sasa_train.sweep.planning import at_full_width, read_plan
from sasa_train.training.own_images import RULES, Facts, look

SHORT = ("trainer.epochs=2", "trainer.log_every_steps=1", "data.num_workers=0")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Create a folder of 12 x 10 pixel images in three class folders: 20 red, 12 green and 2 blue ones."""
    rng = np.random.default_rng(0)
    for channel, (name, count) in enumerate({"red": 20, "green": 12, "blue": 2}.items()):
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 80, (10, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "my photos"


def flat(text: str) -> str:
    """Undo the wrapping of lines."""
    return " ".join(text.split())


def only_run(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "outputs").iterdir()
    return found


def with_choices(facts: Facts, *overrides: str) -> TrainConfig:
    config = compose_config(["experiment=my_images", *overrides])
    for key, rule in RULES.items():
        if key in config.derive:
            group, _, name = key.partition(".")
            setattr(getattr(config, group), name, rule(config, facts)[0])
    return config


def test_one_line_trains_and_a_stopped_run_keeps_what_it_chose(photos, tmp_path, in_process):
    line = ["data.root=my photos", *SHORT]
    said = flat(in_process("train", *line, "trainer.max_hours=1e-9", expect=75).stdout)
    run = only_run(tmp_path)
    assert run.name.startswith("my-photos-e2-s0-")
    assert "7 of 34 images, a fixed part of each class, are held out as val" in said
    assert "data.image_size=8: the images' shorter sides have a median of 10 pixels" in said
    assert "27 train and 7 val images of 8 pixels, 3 classes" in said
    began = load_config_file(run / "config.yaml")
    assert (began.data.holdout_fraction, began.trainer.global_batch_size, began.model.width) == (0.2, 4, 0.25)
    assert "trainer.global_batch_size" in began.derive and "trainer.epochs" not in began.derive

    # With three times as many images, other values would be chosen.
    for i in range(60):
        shutil.copy(photos / "red/0.png", photos / f"red/new-{i}.png")
    message = in_process("train", *line, expect=2).stderr
    assert "the images are not those that this run began with" in message
    said = in_process("train", *line, "allow_config_change=[data.root]").stdout
    assert "chosen" not in said
    now = flatten(load_config_file(run / "config.yaml"))
    may_change = {"trainer.max_hours", "allow_config_change"}
    assert {key for key, value in flatten(began).items() if now[key] != value} == may_change
    again = shlex.split(json.loads((run / "run.json").read_text())["reproduce"])[1:]
    assert flatten(compose_config(for_own_images(again))) | {"derive": began.derive} == now
    assert "is finished" in in_process("train", f"resume={run}", "allow_config_change=[data.root]").stdout

    # With an absolute path, a second run was once trained beside the finished one.
    rest = [*SHORT, "allow_config_change=[data.root]"]
    for root, here, output in (
        (photos, "", "outputs"), ("./my photos/", "", "outputs"), ("../my photos", "my photos", "../outputs"),
    ):  # fmt: skip
        told = in_process("train", f"data.root={root}", f"output_dir={output}", *rest, here=here)
        assert "is finished" in told.stdout and f"{run.name} was begun on the same images" in told.stderr
    assert only_run(tmp_path) == run and load_config_file(run / "config.yaml").data.root == "my photos"
    other = in_process("train", f"data.root={photos}", *rest, "seed=1", "trainer.max_hours=1e-9", expect=75)
    assert "was begun" not in other.stderr and len(list((tmp_path / "outputs").iterdir())) == 2


@pytest.mark.parametrize(
    "root,words,message",
    [
        ("my photos", ["model.kernel_size=4"], "model.kernel_size=4 must be odd"),
        ("my photos", ["model.name=hybrid_resnet27"], "is not in timm's registry: did you mean hybrid_resnet26 or"),
        ("my photos", ["model.width=0.3"], "must divide the layer's 19 channels; model.width=0.25 or 0.375 works"),
        ("my photos", ["data.std=[58,57,57]"], "must be of values in [0, 1]"),
        (
            "my photos",
            ["trainer.global_batch_size=99"],
            "trainer.global_batch_size=99 exceeds the 27 training images that data.holdout_fraction leaves",
        ),
        ("my photos/*", [], "there is no such folder (a folder is wanted, not a pattern: 'my photos'); give one"),
        ("my photos/red", [], "take the folder above it, which has 3: 'data.root=my photos'; to classify"),
        ("my photos/red/red", [], "expected one folder of images per class\n"),
    ],
)
def test_what_the_user_set_is_checked_before_anything_is_chosen(root, words, message, photos, tmp_path, in_process):
    """A window of 4 was once refused after ten seconds, below 16 lines of choices."""
    if root.endswith("red/red"):
        (photos / "red/red").mkdir()
        shutil.copy(photos / "red/0.png", photos / "red/red")
    told = in_process("train", f"data.root={root}", *words, expect=2)
    assert message in told.stderr
    knows_images = "global_batch_size" in message or "width" in message  # the hold-out is said, as it is in messages
    assert told.stdout.count("chosen ") == knows_images
    assert not (tmp_path / "outputs").exists()


def test_the_folder_above_the_right_one_is_refused_and_the_right_one_named(photos, tmp_path, in_process):
    """With data.root=.., a training on the folders beside the photos' folder ended with a fine top1."""
    for run in ("a", "b", "c", "d"):  # more folders than the classes, of one image each
        (tmp_path / "results" / run).mkdir(parents=True)
        shutil.copy(photos / "red/0.png", tmp_path / "results" / run)

    def refused(root: str) -> str:
        return in_process("train", f"data.root={root}", *SHORT, expect=2).stderr

    told = refused(".")
    assert (
        "its folder my photos would be one class, but holds only further folders of images (blue, green, red)" in told
    )
    assert "give the folder that holds them: 'data.root=my photos'; if each folder in . is a class" in told
    (tmp_path / "notes").mkdir()
    assert (
        "no image of the classes notes; if the classes are in my photos, give that folder: 'data.root=my photos'"
        in refused(".")
    )
    shutil.rmtree(tmp_path / "notes")
    shutil.move(tmp_path / "results", photos)
    told = refused("my photos")
    assert "its folder results would be one class" in told and "not of the set, move results elsewhere" in told
    assert not (tmp_path / "outputs").exists()
    allowed = ["data.root=my photos", "data.holdout_fraction=0.2", "trainer.max_steps=1", *SHORT[1:]]
    said = flat(in_process("train", *allowed).stdout)
    plan = "classes red 16, green 10, results 3, blue 1 WARNING: results/a, results/b, results/c, results/d: they are"
    assert plan in said and "if the 4 in results are the classes, give that folder" in said
    shutil.rmtree(tmp_path / "outputs")

    shutil.rmtree(photos / "results")
    for name in ("training_set", "test_set"):
        shutil.copytree(photos, tmp_path / "kaggle" / name)
    told = refused("kaggle")
    assert "if they are splits of the same classes (blue, green, red), make them train/ and val/ of a folder" in told
    for name in ("training_set", "test_set"):
        (tmp_path / "kaggle" / name).rename(tmp_path / "inner")
        (tmp_path / "kaggle" / name).mkdir()
        (tmp_path / "inner").rename(tmp_path / "kaggle" / name / name)
    assert "holds only further folders of images (blue, green, red)" in refused("kaggle")
    (tmp_path / "kaggle").rename(tmp_path / "train")
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "train").rename(tmp_path / "kaggle/train")
    assert "make them train/ and val/ of a folder" in refused("kaggle")
    shutil.rmtree(tmp_path / "kaggle")

    (tmp_path / "top").mkdir()
    photos.rename(tmp_path / "top/my photos")
    assert "the classes: give the folder that holds them, 'data.root=top/my photos'\n" in refused("top")


def test_what_is_set_later_is_no_choice_any_more(photos, tmp_path, in_process):
    """Beside model=conv_resnet26, a net 16 times as large as the chosen one was trained without a word.

    A learning rate 100 times as high as the chosen one was not even among the keys, because it is a default.
    """
    line = ["data.root=my photos", "trainer.max_steps=1", *SHORT[1:]]
    said = flat(in_process("train", *line, "model=conv_resnet26", "optimizer.lr=0.1").stdout)
    assert "as set optimizer.lr=0.1; 0.001 would be chosen for these images: 0.002 for 16 images per step" in said
    assert " optimizer.name=adamw optimizer.lr=0.1 optimizer.lr_basis=absolute " in said  # among the keys
    assert "as set model=conv_resnet26 is the net at full width, with about 16 times the parameters" in said
    assert "for model.width=0.25, write model.name=conv_resnet26 instead" in said
    shutil.rmtree(tmp_path / "outputs")
    assert "as set" not in in_process("train", *line, "model.name=conv_resnet26", "model.num_heads=2").stdout
    assert load_config_file(only_run(tmp_path) / "config.yaml").model.width == 0.25
    shutil.rmtree(tmp_path / "outputs")

    in_process("train", *line)
    run = only_run(tmp_path)
    longer = [f"resume={run}", "trainer.epochs=20", "trainer.max_steps=2"]
    message = in_process("train", *longer, expect=2).stderr
    assert "trainer.epochs: 100 -> 20" in message
    in_process("train", *longer, "allow_config_change=[trainer.epochs,trainer.max_steps]")
    config = load_config_file(run / "config.yaml")
    assert config.trainer.epochs == 20 and "trainer.epochs" not in config.derive
    assert rows(run)[-1]["step"] == 2


def test_a_size_far_above_the_images_own_is_warned_of(photos, tmp_path, in_process):
    """A size of 1000 for photographs of 64 pixels once took all memory without a word."""
    line = ["data.root=my photos", "trainer.max_steps=1", *SHORT[1:]]
    said = in_process("train", *line, "data.image_size=32").stderr
    assert (
        "WARNING: the images are 10 pixels (median of their shorter sides); data.image_size=32 enlarges them 3.2"
        in said
    )
    assert "enlarges" not in in_process("train", *line, "data.image_size=16").stderr


def test_pages_of_errors_are_no_copies(photos, tmp_path, in_process):
    """A web page saved as two images made training warn of copies, of which sasa-data verify found none."""
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set/train")
    for seed, image in enumerate(sorted((tmp_path / "set/train").glob("*/*.*"))):
        other = tmp_path / "set/val" / image.relative_to(tmp_path / "set/train")
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + seed, 20), 90).save(other.with_suffix(".png"))
    for split in ("train", "val"):
        (tmp_path / "set" / split / "blue/page.png").write_text("<html>404</html>")
    done = in_process("train", "data.root=set", "trainer.max_steps=1", *SHORT[1:])
    (unreadable,) = tmp_path.glob("outputs/*/unreadable.txt")
    assert "it is a web page" in unreadable.read_text() and "byte for byte" not in done.stdout + done.stderr


def test_images_that_are_in_train_and_in_val_are_named(photos, tmp_path, in_process):
    """A val/ that links to train/, and copies that a tool keeps beside its originals, gave a top1 without a word."""
    (tmp_path / "linked").mkdir()
    photos.rename(tmp_path / "linked/train")
    (tmp_path / "linked/val").symlink_to("train")
    told = in_process("train", "data.root=linked", "trainer.max_steps=1", *SHORT[1:]).stderr
    assert "in train and in val, byte for byte: 34 of 34 that were compared, as in linked/val/blue/0.png = " in told

    root = (tmp_path / "linked/train").rename(tmp_path / "copied")
    for image in list((root / "red").iterdir()):
        shutil.copy(image, f"{image}_original")
    told = in_process("train", "data.root=copied", "trainer.max_steps=1", *SHORT[1:]).stderr
    assert re.search(r"byte for byte: \d of 11 that were compared", told)
    out = in_process("dataset_tool", "verify", "copied").stdout
    assert "20 groups within all" in out and "some images are equal: a hold-out may put one into train" in out


def test_a_run_that_was_trained_inside_its_folder_finds_its_images_from_elsewhere(photos, tmp_path, in_process):
    """`data.root=.` was the present folder for every later command, whose name the pages and model cards then had."""
    line = ["data.root=.", "output_dir=../outputs", *SHORT]
    in_process("train", *line, "trainer.max_hours=1e-9", expect=75, here=photos.name)
    run, told = only_run(tmp_path), f"data.root=. is {photos}, where the run was trained"
    began = flatten(load_config_file(run / "config.yaml"))
    assert told in in_process("train", f"resume=outputs/{run.name}", "trainer.max_hours=null").stderr
    now, info = flatten(load_config_file(run / "config.yaml")), json.loads((run / "run.json").read_text())
    assert {key for key, value in began.items() if now[key] != value} == {"trainer.max_hours", "resume"}
    assert (now["data.root"], now["resume"], info["directory"]) == (".", f"../outputs/{run.name}", str(photos))
    again = shlex.split(info["reproduce"])[1:]
    assert "is finished" in in_process("train", *again, here=photos.name).stdout
    assert "is finished" in in_process("train", *line, here=photos.name).stdout
    assert only_run(tmp_path) == run

    done = in_process("evaluate", str(run))
    assert told in done.stderr and "WARNING" not in done.stdout + done.stderr
    assert "fewer than 2 images are of outputs" in in_process("evaluate", str(run), "data.root=.", expect=2).stderr
    assert told in in_process("export", str(run), "--formats", "hub").stderr
    (card,) = run.glob("export/**/README.md")
    assert "on val (my photos)" in card.read_text().lower()
    in_process("report", str(run), "--quick")
    assert "my photos at 8 pixels" in (run / "report/report.html").read_text()

    # Once the folder is gone from where it was, a relative path is seen from the working directory again.
    (tmp_path / "elsewhere").mkdir()
    photos.rename(tmp_path / "elsewhere/photos")
    again = in_process("evaluate", str(run), here="elsewhere/photos")
    assert "where the run was trained" not in again.stderr
    assert "/" not in torch.load(run / "checkpoints/last.pt")["config"].partition("root: ")[2].partition("\n")[0]


@pytest.mark.parametrize("here", [".", "outputs"])
def test_runs_are_not_written_among_the_class_folders(photos, tmp_path, in_process, here):
    """With data.root=., the first run made a folder `outputs` beside the classes, which the next took for one."""
    for name in os.listdir(photos):
        (photos / name).rename(tmp_path / name)
    photos.rmdir()
    line = ["data.root=.", f"output_dir={here}", "trainer.max_steps=1", *SHORT[1:]]
    told = in_process("train", *line, expect=2).stderr
    assert (
        "would lie among the class folders of data.root=. and be a class themselves; add output_dir=../outputs" in told
    )
    assert sorted(os.listdir()) == ["blue", "green", "red"]


@pytest.mark.parametrize("num_images", [30, 100, 300, 5000, 100_000])
def test_an_epoch_has_20_steps_where_the_images_suffice(num_images):
    config = with_choices(Facts(num_images, 12, side=64))
    steps = num_images // config.trainer.global_batch_size
    assert steps >= 20 or config.trainer.global_batch_size == 4
    assert 20 <= config.trainer.epochs <= 100
    assert config.schedule.warmup_epochs < config.trainer.epochs


def test_small_images_get_a_small_net_and_a_gpu_takes_larger_ones():
    small, large = with_choices(Facts(300, 12, side=30)), with_choices(Facts(50_000, 12, side=500, has_cuda=True))
    assert (small.data.image_size, small.model.stem, small.model.width) == (24, "conv_small", 0.25)
    assert (large.data.image_size, large.model.stem, large.model.width) == (224, None, None)


def test_a_key_or_group_that_is_set_is_not_chosen():
    config = with_choices(Facts(300, 12, side=64), "model=sasa_resnet50", "trainer.epochs=7", "optimizer=sgd")
    assert not any(key.startswith(("model.", "optimizer.")) or key == "trainer.epochs" for key in config.derive)
    assert (config.model.name, config.model.width, config.trainer.epochs) == ("sasa_resnet50", None, 7)
    assert (config.optimizer.name, config.optimizer.lr) == ("sgd", 0.1)
    assert (config.augment.policy, with_choices(Facts(300, 12, side=64), "augment=none").augment.policy) == (
        "trivial_augment",
        "none",
    )
    accumulating = with_choices(Facts(300, 12, side=64), "trainer.grad_accum_steps=6")
    assert accumulating.trainer.global_batch_size % 6 == 0


def test_fine_tuning_takes_the_model_of_the_weights():
    keys = {"name": "sasa_resnet38", "width": 0.125, "kernel_size": [9, 9, 5, 5], "dilation": 2, "scale": 0.25}
    source = Weights({}, model=keys, image_size=40)
    config = with_choices(Facts(300, 12, side=500, source=source), "model.pretrained=x")
    assert {key: getattr(config.model, key) for key in keys} == keys
    assert (config.data.image_size, config.model.num_heads) == (40, None)
    scratch = with_choices(Facts(300, 12, side=500))
    assert config.optimizer.lr < scratch.optimizer.lr and config.trainer.epochs < scratch.trainer.epochs


def test_weights_in_the_line_are_fine_tuned(photos, tmp_path, in_process, tiny_run):
    line = ["data.root=my photos", *SHORT, "trainer.max_steps=1"]
    told = in_process("train", *line, f"model.pretrained={tiny_run}")
    assert "decay" not in told.stderr  # timm's warning about another model
    said = flat(told.stdout)
    config, source = (load_config_file(run / "config.yaml") for run in (only_run(tmp_path), tiny_run))
    assert config.model == dataclasses.replace(source.model, pretrained=str(tiny_run))
    assert f"model.width=0.125: as model.pretrained={tiny_run} has it" in said and "of the parameters" in said

    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "bare.pt")
    message = in_process("train", *line, "model.pretrained=bare.pt", expect=2).stderr
    assert "bare.pt: does not say of which model it is; add model=..." in message
    assert "add its name" in in_process("train", *line, "model.pretrained=timm", expect=2).stderr.lower()


def test_only_a_root_without_other_words_means_own_images():
    assert for_own_images(["data.root=x", "seed=1,2"])[0] == "experiment=my_images"
    assert for_own_images(["data.root=x", "model.pretrained=y", "resume=never"])[0] == "experiment=finetune"
    for words in (["data=cifar10"], ["experiment=debug"], ["resume=outputs/x"], ["data.name=digits"]):
        assert for_own_images(["data.root=x", *words]) == ["data.root=x", *words]
    (job,) = read_plan(["data.root=x"]).jobs
    assert job.overrides == ["experiment=my_images", "data.root=x"] and job.name.startswith("x-s0-")
    # A group keeps its full width, which a sweep's jobs said in their logs alone.
    line = ["data.root=x", "model=hybrid_resnet26,conv_resnet26", "trainer.epochs=2"]
    assert at_full_width(read_plan(line).jobs) == ["conv_resnet26", "hybrid_resnet26"]
    assert at_full_width(read_plan([*line, "model.width=0.5"]).jobs) == []
    assert at_full_width(read_plan(["data=digits", *line[1:]]).jobs) == []


def test_a_sweep_on_own_images_has_their_name_and_is_found_again(tmp_path, monkeypatch):
    """The sweep on my_photos lay in my_images-1a9ac1, and with an absolute path, it began once more beside that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_photos").mkdir()
    grid = ["model.name=hybrid_resnet26,conv_resnet26", "seed=0,1"]
    spelt = ["data.root=my_photos", "data.root=./my_photos/", f"data.root={tmp_path}/my_photos"]
    plan = read_plan([spelt[0], *grid])
    assert re.fullmatch("outputs/my_photos-[0-9a-f]{6}", str(plan.folder))
    assert len({read_plan([root, *grid]).folder for root in spelt}) == 3  # so far, no folder is there
    earlier = plan.folder.with_name(plan.folder.name.replace("my_photos", "my_images"))
    for folder in (earlier, plan.folder):
        folder.mkdir(parents=True)
        Ledger(folder / "ledger.json", {"overrides": plan.fixed}).save()
        job = plan.jobs[0]
        (folder / job.name).mkdir()
        (folder / job.name / "config.yaml").write_text(to_yaml(compose_config(job.overrides)))
        for root in spelt:
            again = read_plan([root, *grid])
            assert again.folder == folder and again.jobs[0].name == job.name
    assert read_plan([f"data.root={tmp_path}/others", *grid]).folder.name.startswith("others-")
    assert read_plan([spelt[1], *grid, "trainer.epochs=3"]).folder != plan.folder


def test_a_hydra_sweep_and_the_summary_choose_as_the_run_does(photos, tmp_path, in_process):
    in_process("train", "data.root=my photos", "trainer.max_steps=1", *SHORT, "seed=0,1", "-m")
    widths = {load_config_file(p).model.width for p in (tmp_path / "outputs").glob("my-photos-*/config.yaml")}
    assert widths == {0.25}
    said = flat(in_process("summary", "data.root=my photos").stdout)
    assert "hybrid_resnet26: 3 classes, 8 x 8 pixels" in said and "chosen model.width=0.25" in said


def test_a_run_that_began_as_image_folder_is_found_by_its_command(image_folder, tmp_path, in_process):
    """Runs on own images were named image_folder-...; they are named after the folder of the images now."""
    line = ["data=image_folder", "data.root=images", "data.image_size=8", "model.width=0.125", "model.num_heads=2"]
    line += [*SHORT, "trainer.global_batch_size=9"]
    in_process("train", *line, "trainer.max_hours=1e-9", expect=75)
    run = only_run(tmp_path)
    config = compose_config(line)
    assert run.name == default_run_name(config) and run.name.startswith("images-sasa_resnet26-e2-s0-")
    earlier = run.rename(run.with_name(run.name.replace("images-", "image_folder-")))
    assert run_name_in(str(earlier.parent), config) == earlier.name
    in_process("train", *line)
    assert only_run(tmp_path) == earlier and rows(earlier)[-1]["epoch"] == 2


@pytest.mark.slow
def test_the_first_of_several_processes_chooses_for_all(photos, tmp_path):
    code, said = launch(tmp_path, 2, "data.root=my photos", "trainer.max_steps=1", *SHORT)
    assert code == 0 and said.count("chosen      trainer.global_batch_size=4") == 1, said
    assert "4 = 2 processes x 1 x 2 images per step" in said


def beside_train(root: Path) -> None:
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train/red", root / "green")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "train/red")


def no_class_folders(root: Path) -> None:
    shutil.rmtree(root / "val")
    for path in root.glob("train/*/?.png"):
        path.rename(root / f"{path.parent.name}-{path.name}")
    shutil.rmtree(root / "train")


def empty_classes(root: Path) -> None:
    no_class_folders(root)
    (root / "red").mkdir()
    (root / "blue").mkdir()


@pytest.mark.parametrize(
    "spoil,message",
    [
        (beside_train, "holds train/ and, beside it, other folders of images (green): move them into train/"),
        (one_class, "blue is the only class, but at least two are needed"),
        (no_class_folders, "images: holds no class folder (found blue-0.png, "),
        (empty_classes, "no image of the classes blue, red (left out, images outside class folders: 17"),
        (shutil.rmtree, "data.root=images: there is no such folder"),
    ],
)
def test_folders_that_are_not_a_set_are_refused_with_what_was_found(image_folder, tmp_path, in_process, spoil, message):
    spoil(image_folder)
    assert message in in_process("train", "data.root=images", expect=2).stderr
    assert not (tmp_path / "outputs").exists()


def test_a_mistyped_folder_is_followed_by_the_one_that_was_meant(image_folder, tmp_path, capsys, in_process):
    hint = "(did you mean images?)"
    assert hint in in_process("train", "data.root=image", expect=2).stderr
    assert hint in in_process("train", "data=image_folder", "data.root=image", expect=2).stderr
    assert hint in in_process("dataset_tool", "verify", "imagse", expect=2).stderr
    (tmp_path / "train.csv").touch()
    assert "(did you mean train.csv?)" in in_process("train", "data.train=trian.csv", expect=2).stderr


def test_val_or_test_is_taken_where_it_is_there_and_else_a_part_of_train(image_folder, in_process):
    config = compose_config(["experiment=my_images", f"data.root={image_folder}"])

    def found() -> tuple[int, float]:
        settled, facts = look(config)
        return facts.num_images, settled.data.holdout_fraction

    shutil.copytree(image_folder / "val/red", image_folder / "extra")
    assert found() == (18, 0.0)
    shutil.rmtree(image_folder / "extra")
    (image_folder / "val").rename(image_folder / "test")
    assert found() == (18, 0.0)
    shutil.rmtree(image_folder / "test")
    assert found() == (15, 0.2)
    said = flat(in_process("train", "data.root=images", "trainer.max_steps=1", *SHORT).stdout)
    assert "15 train and 3 val images" in said and "so 3 of 18 images, a fixed part of each class" in said
