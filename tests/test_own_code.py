"""Check that the user's own code, named by config keys, is trained with exactly, and refused at the door if wrong."""

import random
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from making_data import CPU, assert_same, batches
from marking import slow_but_for
from reading_runs import assert_same_run, rows
from running_commands import kill_after

from sasa_train.config import own_code
from sasa_train.config.compose import compose_config
from sasa_train.config.keys import with_values
from sasa_train.data import workers
from sasa_train.data.datasets import load_image_sets, load_val_set
from sasa_train.data.fingerprint import differences, fingerprint
from sasa_train.data.loader import build_loaders
from sasa_train.data.randomness import own_code_rng
from sasa_train.refusal import ConfigError
from sasa_train.training.run import plan_buildable

# A run of about a second on 8 x 8 pixels.
SMALL = (
    "model.stem=attention_small", "model.width=0.125", "model.num_heads=2", "model.kernel_size=3",
    "trainer.global_batch_size=8", "trainer.epochs=3", "trainer.log_every_steps=1", "output_dir=out",
    "data.image_size=8", "data.num_workers=0", "run_name=a",
)  # fmt: skip

MY_DATA = '''
import random
import time

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, random_split
from torchvision.datasets import FakeData, ImageFolder


class Squares(Dataset):
    """Noise of two brightnesses; `kind` is how it is returned, and `damaged` items cannot be read."""

    classes = ["dark", "light"]

    def __init__(self, count, first=0, kind="array", damaged=()):
        self.count, self.first, self.kind, self.damaged = count, first, kind, damaged
        self.num_read = 0

    def __len__(self):
        return self.count

    def label(self, i):
        return i % 2

    def __getitem__(self, i):
        self.num_read += 1
        if i in self.damaged:
            raise OSError("image file is truncated")
        rng = np.random.default_rng(self.first + i)
        pixels = rng.integers(0, 128, (9, 7, 3), dtype=np.uint8) + np.uint8(100 * (i % 2))
        image = {"array": pixels, "pil": Image.fromarray(pixels), "tensor": torch.tensor(pixels).permute(2, 0, 1),
                 "grey": pixels[:, :, 0]}[self.kind]
        return image, self.label(i)


def build(count=40, kind="array"):
    return Squares(count, kind=kind), Squares(10, 1000, kind)


def tint(image, generator):
    """Darken a part of the images, and draw from all global generators."""
    shift = torch.randint(0, 9, (1,), generator=generator) + random.randrange(5) + int(5 * np.random.rand())
    return (image // 2 + shift + torch.randint(0, 3, image.shape)).to(torch.uint8)
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a function that writes a module of the user's project in the working directory."""
    for name in ("_named", "_imported", "_given", "_files"):
        monkeypatch.setattr(own_code, name, type(getattr(own_code, name))())
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), set(sys.modules)

    def write(text: str = MY_DATA, name: str = "my_data") -> Path:
        file = tmp_path / f"{name}.py"
        file.write_text(text)
        return file

    write()
    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def forget() -> None:
    """Forget the modules of the user's project, as a new process does."""
    for name in own_code.imported():
        sys.modules.pop(name, None)
    for known in (own_code._named, own_code._imported, own_code._files):
        known.clear()


@cache
def small_config():
    return compose_config(SMALL)


def from_my_data(name: str = "build", *overrides: str):
    """Return a config of the images that a function in my_data returns, as a command line that names it allows."""
    own_code.allow(["my_data"])
    texts = dict(override.split("=", 1) for override in overrides)
    values = {key: text if key == "data.resident" else yaml.safe_load(text) for key, text in texts.items()}
    return with_values(small_config(), {"data.name": "own", "data.target": f"my_data.{name}"} | values)


# data.target and augment.target


@pytest.mark.parametrize("end", slow_but_for([("stopped", 0)], [("stopped", 0), ("killed", 0), ("killed", 2)]))
def test_a_run_on_own_images_and_transforms_goes_on_as_if_undisturbed(project, tmp_path, in_process, end):
    """The undisturbed run keeps its images in memory; the other one streams them."""
    ending, num_workers = end
    own = (*SMALL, "imports=[./my_data.py]", "data.target=my_data.build", "augment.target=my_data.tint")
    in_process("train", *own, "run_name=whole")
    forget()
    streamed = (*own, "data.resident=false", f"data.num_workers={num_workers}", "trainer.checkpoint_every_steps=1")
    if ending == "stopped":
        in_process("train", *streamed, "trainer.max_hours=1e-9", expect=75)
        forget()
    else:
        kill_after(6, tmp_path / "out/a", *streamed)
    in_process("train", *streamed)
    assert_same_run(tmp_path / "out/a", tmp_path / "out/whole")


def test_an_evaluation_runs_the_code_of_the_data_only_if_it_is_named(project, tmp_path, image_folder, in_process):
    own = ("imports=[./my_data.py]", "data.target=my_data.build", "augment.target=my_data.tint", "trainer.epochs=1")
    said = in_process("train", *SMALL, *own).stdout
    named = "out/a 'imports=[./my_data.py]'\n"
    assert f"next        sasa-report {named}            sasa-evaluate {named}" in said
    forget()
    refused = in_process("evaluate", "out/a", expect=2).stderr
    assert "data.target=my_data.build: needs your own code (my_data)" in refused
    assert "add 'imports=[./my_data.py]'" in refused
    for folder in image_folder.glob("*/*"):
        folder.rename(folder.with_name({"blue": "dark", "red": "light"}[folder.name]))
    assert "images 8" in in_process("evaluate", "out/a", "data.name=image_folder", "data.root=images").stdout
    assert not own_code.imported() and "my_data" not in sys.modules
    said = in_process("evaluate", "out/a", "imports=[./my_data.py]").stdout
    assert f"top1   {rows(tmp_path / 'out/a')[-1]['top1']:.2f}" in said


@pytest.mark.slow
def test_workers_that_do_not_share_memory_name_the_users_line_as_well(project, monkeypatch):
    """Python 3.14 starts processes by forkserver, macOS by spawn: they get the set by pickle, and know no imports."""
    project(MY_DATA + "\nclass Bad(Squares):\n    targets = [0, 1] * 20\n    def __getitem__(self, i):\n"
            "        assert i != 13 or not torch.utils.data.get_worker_info(), 'bad luck'\n"
            "        return super().__getitem__(i)\ndef bad():\n    return Bad(40), Squares(10)\n")  # fmt: skip
    line = len(Path("my_data.py").read_text().splitlines()) - 3
    loader = workers.DataLoader
    monkeypatch.setattr(workers, "DataLoader", lambda *a, **o: loader(*a, multiprocessing_context="forkserver", **o))
    loaders = build_loaders(from_my_data("bad", "data.resident=false", "data.num_workers=1"), CPU)
    try:
        with pytest.raises(ConfigError, match=rf"train, item 13: .*my_data.py:{line} in __getitem__: .* bad luck"):
            list(loaders.train.train_batches(0))
    finally:
        loaders.close()


def test_a_set_that_cannot_be_sent_to_workers_is_refused(project, monkeypatch):
    project(MY_DATA + "\ndef build():\n    s = Squares(40)\n    s.file = open(__file__)\n    return s, Squares(10)\n")
    monkeypatch.setattr(workers.multiprocessing, "get_start_method", lambda: "spawn")
    with pytest.raises(ConfigError, match=r"data.num_workers=2: .*cannot pickle.*TextIOWrapper.*data.num_workers=0"):
        build_loaders(from_my_data("build", "data.num_workers=2"), CPU)


@pytest.mark.parametrize("kind", ["pil", "tensor", "grey"])
def test_each_kind_of_image_has_the_pixels_it_shows(project, kind):
    array, other = (load_image_sets(from_my_data("build", f"data.args={{kind: {k}}}").data)[0] for k in ("array", kind))
    read = [images.read(5, lambda image: np.array(image.convert("RGB"))) for images in (array, other)]
    assert np.array_equal(read[0][..., :1].repeat(3, 2) if kind == "grey" else read[0], read[1])
    found = differences(fingerprint(array), fingerprint(other), "train")
    assert found == ([f"train: the content of class '{n}' changed" for n in array.classes] if kind == "grey" else [])


def test_own_images_are_held_out_limited_and_fingerprinted_as_files_are(project):
    project(MY_DATA + "\ndef alone():\n    return Squares(40), None\n")
    config = from_my_data("alone", "data.holdout_fraction=0.2", "data.max_train_images=10")
    train, val = load_image_sets(config.data)
    assert len(train) == 10 and np.bincount(train.labels).tolist() == [5, 5]
    assert (
        len(val) == 8 and not set(train.positions) & set(val.positions) and val.name(0) == f"image {val.positions[0]}"
    )
    assert fingerprint(val) == fingerprint(load_val_set(config.data, ["dark", "light"]))
    with pytest.raises(ConfigError, match=r"val is None; return a data set, or set data.holdout_fraction"):
        load_image_sets(from_my_data("alone").data)


def test_labels_come_from_targets_without_reading_the_images(project):
    project(MY_DATA + "\nclass Listed(Squares):\n    targets = torch.arange(400) % 2\n"
            "def build():\n    return Listed(400), Subset(Listed(400), [3, 6, 9])\n")  # fmt: skip
    train, val = load_image_sets(from_my_data().data)
    assert train.labels.tolist() == [0, 1] * 200 and train.source.items.num_read == 2 * 8 + 1
    assert val.labels.tolist() == [1, 0, 1] and val.classes == ["dark", "light"]


def test_torchvisions_sets_serve_and_val_is_matched_by_the_names_of_its_classes(project, image_folder):
    project(MY_DATA + "\ndef build():\n    val = ImageFolder('images/val')\n"
            "    assert val.classes == ['blue', 'red']\n    train = Subset(ImageFolder('images/train'), range(18))\n"
            "    train.dataset.classes = ['red', 'blue']\n    return train, val\n"
            "def fake():\n    sets = FakeData(30, (3, 9, 9), 2), FakeData(8, (3, 9, 9), 2, random_offset=99)\n"
            "    sets[0].classes = ['a', 'b']\n    return sets\n")  # fmt: skip
    train, val = load_image_sets(from_my_data().data)
    assert val.classes == ["red", "blue"] and val.labels.tolist() == [0] * 5 + [1] * 3
    assert val.name(0) == "images/val/red/0.png" and train.name(11) == "images/train/red/0.png"
    assert_same(batches(from_my_data("fake")), batches(from_my_data("fake", "data.resident=false")))


def test_a_damaged_item_is_replaced_as_a_damaged_file_is(project, caplog):
    project(MY_DATA + "\ndef build():\n    s = Squares(40, damaged=(6, 7))\n    s.targets = [0, 1] * 20\n"
            "    return s, Squares(10, 1000)\n")  # fmt: skip
    found = batches(from_my_data("build", "data.resident=false", "data.num_workers=1"))
    assert len(found) == 5 and caplog.text.count("cannot be read as an image (image file is truncated)") == 2
    assert "WARNING: image 6: " in caplog.text
    assert_same(found, batches(from_my_data()))


def test_the_sets_do_not_depend_on_the_state_of_global_generators(project):
    """random_split drew another train for each process, and a resumed run would have been refused."""
    project(MY_DATA + "\ndef build():\n    return random_split(Squares(40), [30, 10])\n")
    found = [fingerprint(load_image_sets(from_my_data().data)[0]) for _ in range(2)]
    state = torch.get_rng_state()
    load_image_sets(from_my_data().data)
    assert found[0] == found[1] and torch.equal(state, torch.get_rng_state())


# What the sets and items may not be: the body of a function `build` in my_data.py, and the message.
REFUSED = {
    "one set": ("return Squares(40)", r"my_data.py:\d+\): must return two data sets, \(train, val\), but returned S"),
    "three": ("return Squares(40), 0, 1", r"must return two data sets, \(train, val\), but returned 3 values"),
    "no set": ("return 7, Squares(9)", r"train must be a map-style data set, with len\(s\) and s\[i\] .* is a int"),
    "stream": ("return type('S', (IterableDataset,), {'__iter__': id, '__len__': id})(), 0", r"map-style"),
    "empty": ("return Squares(40), Squares(0)", r"val has no images: len\(\) is 0"),
    "no classes": ("s = Squares(40); s.classes = None; return s, s", r"train must have the attribute classes.*missing"),
    "one class": ("s = Squares(40); s.classes = ['a']; s.targets = [0] * 40; s.label = lambda i: 0; return s, s",
                  r"a is the only class, but at least two are needed"),
    "unknown class": ("s = Squares(9); s.classes = ['dark', 'lihgt']; return Squares(40), s", r"lihgt.*light"),
    "label outside": ("s = Squares(40); s.label = lambda i: i % 3; return s, s",
                      r"train, item 2: its label is 2, but must be from 0 to 1"),
    "negative": ("s = Squares(40); s.label = lambda i: -1; return s, s", r"item 0: its label is -1"),
    "label a text": ("s = Squares(40); s.label = lambda i: 'dark'; return s, s",
                     r"train, item 0: its label must be an int, .* but is str \(dark\)"),
    "targets differ": ("s = Squares(40); s.targets = [1] * 40; return s, s", r"item 0: its label is 0, but was 1"),
    "targets no ints": ("s = Squares(40); s.targets = [0.5] * 40; return s, s", r"its targets must be 40 ints"),
    "targets too few": ("s = Squares(40); s.targets = [0]; return s, s", r"targets must be 40 ints.*int64 \[1\]"),
    "no pair": ("return type('S', (Squares,), {'__getitem__': lambda s, i: 3})(40), 0",
                r"train, item 0: must be two values, \(image, label\), but is int"),
    "float tensor": ("return type('S', (Squares,), {'__getitem__': lambda s, i: (torch.rand(3, 9, 9), i % 2)})(40), 0",
                     r"item 0: its image must be .* but is a float32 tensor \[3, 9, 9\]; leave out ToTensor"),
    "tensor HWC": ("return type('S', (Squares,), {'__getitem__': lambda s, i: "
                   "(torch.zeros(9, 9, 3, dtype=torch.uint8), i % 2)})(40), 0", r"a uint8 tensor \[9, 9, 3\]"),
    "path": ("return type('S', (Squares,), {'__getitem__': lambda s, i: ('a.png', i % 2)})(40), 0",
             r"item 0: its image must be a PIL image, .* but is str"),
    "random": ("return type('S', (Squares,), {'__getitem__': lambda s, i: "
               "(np.random.randint(0, 255, (9, 9), dtype=np.uint8), i % 2)})(40), 0",
               r"train, item 0: differs when it is read twice, .*augment.target="),
    "damaged": ("return Squares(40, damaged=[5]), 0", r"item 5: cannot be read .*give the set the attribute targets"),
    "error": ("return Squares(40)[0].x", r"my_data.py:\d+ in build: AttributeError"),
}  # fmt: skip


@pytest.mark.parametrize("body,message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_a_data_set_is_refused_by_name(project, body, message):
    project(f"{MY_DATA}\ndef build():\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"data\.target=my_data\.build.*{message}"):
        load_image_sets(from_my_data().data)


def test_code_that_is_not_there_is_refused_before_images_are_read(project):
    for key in ("data.target", "augment.target"):
        config = with_values(from_my_data(), {key: "my_data.biuld"})
        with pytest.raises(
            ConfigError, match=rf"{key}=my_data.biuld: biuld is not in .*my_data.py; did you mean my_da"
        ):
            plan_buildable(config)


def test_transforms_are_a_function_of_seed_epoch_and_index(project):
    """They must not depend on how images are loaded, on the batch, or on numbers drawn elsewhere."""
    tinted = ("augment.target=my_data.tint", "augment.erasing_prob=0.5")
    resident = batches(from_my_data("build", *tinted), epoch=1)
    torch.rand(1)
    assert_same(resident, batches(from_my_data("build", *tinted, "data.resident=false"), epoch=1))
    assert_same(resident[2:], batches(from_my_data("build", *tinted, "data.resident=false"), epoch=1, first_step=2))
    smaller = batches(from_my_data("build", *tinted, "trainer.grad_accum_steps=4"), epoch=1)
    assert torch.equal(torch.cat([i for i, _ in smaller]), torch.cat([i for i, _ in resident]))
    plain = batches(from_my_data("build", "augment.erasing_prob=0.5"), epoch=1)
    assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(plain, resident, strict=True))


def test_streamed_images_above_64_pixels_are_transformed_alike_by_any_workers(project):
    large = ("augment.target=my_data.tint", "data.image_size=72", "model.stem=attention")
    found = [batches(from_my_data("build", *large, f"data.num_workers={n}")) for n in (0, 1)]
    assert_same(*found)


def test_own_code_does_not_shift_global_generators():
    def drawn() -> list:
        return [torch.rand(1).item(), np.random.rand(), random.random()]

    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first = drawn()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    with own_code_rng(0, 3, 7) as generator:
        inside = [*drawn(), torch.rand(1, generator=generator).item()]
    with own_code_rng(0, 3, 7) as generator:
        assert inside == [*drawn(), torch.rand(1, generator=generator).item()]
    with own_code_rng(0, 4, 7):
        assert not set(inside) & set(drawn())
    assert drawn() == first


WRONG_TRANSFORMS = {
    "nothing": ("image.zero_()", r"my_data.py:\d+\): must return a uint8 tensor \[3, 8, 8\], but returned NoneType"),
    "float": (
        "return image / 255",
        r"my_data.py:\d+\): must return a uint8 tensor .* but returned float32 \[3, 8, 8\]",
    ),
    "smaller": ("return image[:, 1:]", r"but returned uint8 \[3, 7, 8\]"),
    "failing": ("return image + missing", r"my_data.py:\d+ in tint: NameError: name 'missing' is not defined"),
    "random": ("return image + (time.perf_counter_ns() // 100 % 251)", r"returns another image for the same image and"),
    "no generator": ("", r"TypeError: plain\(\) takes 1 positional argument but 2 were given"),
}


@pytest.mark.parametrize("body,message", WRONG_TRANSFORMS.values(), ids=WRONG_TRANSFORMS.keys())
def test_a_wrong_transform_is_refused_before_images_are_read(project, body, message):
    name = "tint" if body else "plain"
    project(
        MY_DATA + (f"\ndef tint(image, generator):\n    {body}\n" if body else "\ndef plain(image): return image\n")
    )
    with pytest.raises(ConfigError, match=rf"augment\.target=my_data\.{name}.*{message}"):
        plan_buildable(from_my_data("build", f"augment.target=my_data.{name}"))


def test_a_transform_that_fails_in_training_ends_the_run_with_its_line(project, in_process):
    project(
        MY_DATA + "\ndef picky(image, generator):\n    assert image.min() > 150, 'too dark'\n    return image\n"
        "def late(image, generator):\n    return image if image.float().std() > 70 else picky(image, generator)\n"
    )
    said = in_process("train", *SMALL, "data.target=my_data.build", "augment.target=my_data.late", expect=2).stderr
    line = len(Path("my_data.py").read_text().splitlines()) - 3
    assert re.search(rf"augment.target=my_data.late: \S+my_data.py:{line} in picky: AssertionError: too dark", said)
    assert "Traceback" not in said
