"""Check that sasa-predict matches evaluation's predictions, in the requested order, for any file type and name."""

import contextlib
import csv
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from making_data import BAD, make_image_folder, spoil
from PIL import Image

from sasa_train import evaluate, predict, train
from sasa_train.data.listing import LeftOut
from sasa_train.data.loader import build_eval_loader
from sasa_train.predict.find_images import Found, find_images
from sasa_train.predict.inference import Predictor
from sasa_train.predict.table import Row, as_csv, as_jsonl, as_table
from sasa_train.refusal import ConfigError
from sasa_train.trained import load_trained

HOSTILE = "a\nb\r\"c',\x1b[2J\udcff.png"  # line breaks, quotes, an escape sequence and a byte that is not UTF-8
RUNS = {
    "ours": ("model=hybrid_resnet26", "model.width=0.125", "model.num_heads=2", "data.image_size=72"),
    "timm": ("model=timm", "model.name=test_resnet", "data.image_size=32"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("predict") / "images", size=(90, 77))


@pytest.fixture(scope="module")
def runs(root) -> dict[str, Path]:
    """Return two runs with moving averages: our model on images read from disk and a timm model on images in memory."""
    for name, model in RUNS.items():
        keys = [f"data.root={root}", f"output_dir={root.parent}", f"run_name={name}", "data.num_workers=0"]
        keys += ["trainer.global_batch_size=6", "trainer.epochs=1", "trainer.ema_decay=0.5", "optimizer.lr=1.0"]
        assert train.run_command(["data=image_folder", *model, *keys]) == 0
    return {name: root.parent / name for name in RUNS}


@pytest.fixture
def run(runs) -> str:
    return str(runs["ours"])


@pytest.fixture
def predicted(capsysbinary, tmp_path):
    """Return a function that runs sasa-predict with --format jsonl and returns the parsed rows and stderr."""

    def call(*words: str, expect: int = 0) -> tuple[list[dict], str]:
        capsysbinary.readouterr()
        assert predict.run_command([*map(str, words), "--format", "jsonl", "data.num_workers=1"]) == expect
        out, err = capsysbinary.readouterr()
        return [json.loads(line) for line in out.decode("ascii").splitlines()], err.decode()

    return call


def best(row: dict) -> list[float]:
    return [entry["probability"] for entry in sorted(row["predictions"], key=lambda entry: entry["class"])]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_predictions_are_evaluations(name, weights, runs, root, predicted, capsysbinary):
    """Check that predictions match evaluation's; a slightly different crop or normalisation would cost accuracy."""
    trained = load_trained(runs[name], [f"weights={weights}", "data.num_workers=0"])
    loader, images = build_eval_loader(trained.config, torch.device("cpu"), trained.classes)
    with torch.inference_mode():
        batches = list(loader.eval_batches())
        expected = torch.cat([trained.model(pixels).softmax(1) for pixels, _ in batches])
    loader.close()
    found, err = predicted(runs[name], root / "val", f"weights={weights}")
    assert [row["path"] for row in found] == [str(path) for path in sorted(root.glob("val/*/*.png"))]
    np.testing.assert_allclose([best(row) for row in found], expected, rtol=1e-4, atol=1e-6)  # six digits are printed
    hits = sum(row["predictions"][0]["class"] == Path(row["path"]).parent.name for row in found)
    assert evaluate.run_command([str(runs[name]), f"weights={weights}", "data.num_workers=0"]) == 0
    assert f"top1   {100 * hits / 8:.2f}\n".encode() in capsysbinary.readouterr().out and "8 images predicted\n" in err
    assert sorted(entry["class"] for entry in found[0]["predictions"]) == images.classes == ["blue", "red"]


def test_the_moving_average_is_not_the_raw_model(runs, root, predicted):
    rows = [predicted(runs["ours"], root / "val", f"weights={weights}")[0] for weights in ("ema", "raw")]
    assert not np.allclose([best(row) for row in rows[0]], [best(row) for row in rows[1]], atol=1e-4)


def test_rows_reach_a_stdout_that_takes_text_alone(run, root):
    """In notebooks, and where stdout is redirected to a StringIO, the command ended with an AttributeError."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert predict.run_command([run, str(root / "val/red"), "--format", "csv"]) == 0
    assert len(list(csv.DictReader(io.StringIO(out.getvalue())))) == 5


def test_a_row_does_not_depend_on_its_batch_or_on_threads(run, root, capsys):
    texts = []
    for options in (["--batch-size", "1", "data.num_workers=0"], ["--batch-size", "5", "data.num_workers=3"]):
        assert predict.run_command([run, str(root / "train"), "--format", "csv", *options]) == 0
        texts.append(list(csv.DictReader(io.StringIO(capsys.readouterr().out))))
    assert len(texts[0]) == 18 and [row["path"] for row in texts[0]] == [row["path"] for row in texts[1]]
    for one, other in zip(*texts, strict=True):
        assert one["class1"] == other["class1"]
        # Float32 sums in a different order.
        assert float(one["probability1"]) == pytest.approx(float(other["probability1"]), abs=1e-5)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named_and_skipped_in_their_place(run, tmp_path, predicted, capsysbinary, monkeypatch):
    monkeypatch.setattr("sasa_train.data.datasets.PAUSES", ())
    spoil(tmp_path)
    os.mkfifo(tmp_path / "g-pipe.png")
    (tmp_path / "h-zero.png").symlink_to("/dev/zero")
    (tmp_path / "i-loop.png").symlink_to("i-loop.png")
    Image.new("RGB", (400, 300)).save(tmp_path / "j-large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 300 - 1)
    (tmp_path / "k-bare").mkdir()
    (tmp_path / "k-bare" / "notes.txt").write_text("not called an image")
    words = [*sorted(tmp_path.iterdir()), tmp_path / "missing.png"]
    found, err = predicted(run, *words, expect=1)
    assert [row["path"] for row in found] == list(map(str, words))
    bad = {Path(row["path"]).name: row["error"] for row in found if "error" in row}
    assert list(bad) == [*BAD, "g-pipe.png", "h-zero.png", "i-loop.png", "j-large.png", "k-bare", "missing.png"]
    assert "truncated" in bad["b-truncated.jpg"] and "cannot identify" in bad["c-empty.jpg"]
    assert bad["g-pipe.png"] == bad["h-zero.png"] == "is not a regular file" and "limit" in bad["j-large.png"]
    assert "symbolic links" in bad["i-loop.png"] and bad["missing.png"] == "is not there"
    assert bad["k-bare"] == "holds no image" and f"left out, not images: 1 ({tmp_path}/k-bare/notes.txt)\n" in err
    for name, reason in bad.items():
        assert f"{name}: {reason}\n" in err
    assert "3 images predicted; 9 could not be" in err
    assert predict.run_command([run, str(tmp_path / "b-truncated.jpg"), "--format", "csv"]) == 1
    out = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode())))
    assert out[0]["class1"] == "" and out[0]["error"] == bad["b-truncated.jpg"]


def test_every_kind_of_image_is_seen_as_in_training(run, tmp_path, predicted):
    """Grey, palette, 16-bit and animated images are covered; photos are turned upright, as in training."""
    noise = Image.effect_noise((90, 80), 80)
    exif = Image.Exif()
    exif[274] = 6
    colour = Image.merge("RGB", (noise, noise.rotate(90), noise.rotate(180)))
    colour.save(tmp_path / "a.png")
    colour.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=exif)
    noise.save(tmp_path / "c.png")
    Image.fromarray(np.asarray(noise).astype(np.uint16) * 257).save(tmp_path / "d.png")
    noise.convert("P").save(tmp_path / "e.gif", save_all=True, append_images=[Image.new("P", (90, 80))])
    colour.convert("CMYK").save(tmp_path / "f.jpg")
    found, _ = predicted(run, tmp_path)
    assert [Path(row["path"]).name for row in found] == ["a.png", "b.png", "c.png", "d.png", "e.gif", "f.jpg"]
    assert best(found[0]) == pytest.approx(best(found[1]), abs=1e-5)
    assert best(found[2]) == pytest.approx(best(found[3]), abs=1e-5)
    assert best(found[2]) == pytest.approx(best(found[4]), abs=1e-5)
    assert best(found[0]) != pytest.approx(best(found[2]), abs=1e-5)


def test_names_reach_programs_unchanged_and_terminals_escaped(run, root, tmp_path, capsysbinary):
    """Check that file names are escaped on terminals, since they may move the cursor or contain line breaks."""
    path = str(tmp_path / HOSTILE)
    os.link(root / "val/red/0.png", path)
    outputs = {}
    for kind in ("table", "csv", "jsonl"):
        assert predict.run_command([run, path, "--format", kind]) == 0
        outputs[kind] = capsysbinary.readouterr().out
    assert json.loads(outputs["jsonl"])["path"] == path and outputs["jsonl"].count(b"\n") == 1
    text = outputs["csv"].decode("utf-8", "surrogateescape")
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))] == ["path", path]
    assert b"\x1b" not in outputs["table"] and outputs["table"].count(b"\n") == 2
    assert rb"""a\nb\r"c',\x1b[2J\udcff.png""" in outputs["table"]


def test_the_formats_solved_by_hand():
    rows = [Row("a.png", [("cat", 0.75), ("dog", 0.25)]), Row("b.png", error="is no image")]
    batches = [rows, [Row("longer.png", [("dog", 0.999999), ("cat", 1.2345678e-9)])]]
    with_bad_ones = [batches[0], [Row("c.png", error="is no image")], batches[1]]
    assert "".join(as_table(iter(with_bad_ones), 2)) == (
        "file   top1      %  top2      %\na.png  cat   75.00  dog   25.00\nlonger.png  dog   100.00  cat    0.00\n"
    )
    assert "".join(as_csv(iter(batches), 2)) == (
        '"path","class1","probability1","class2","probability2","error"\n'
        '"a.png","cat",0.75,"dog",0.25,""\n'
        '"b.png","","","","","is no image"\n'
        '"longer.png","dog",0.999999,"cat",1.23457e-09,""\n'
    )
    assert "".join(as_jsonl(iter(batches[:1]), 2)) == (
        '{"path": "a.png", "predictions": [{"class": "cat", "probability": 0.75}, '
        '{"class": "dog", "probability": 0.25}]}\n{"path": "b.png", "error": "is no image"}\n'
    )


def test_a_terminal_shows_the_classes_that_fit_and_files_all(run, root, tmp_path, capsys, monkeypatch, tiny_run):
    path, out = str(root / "val/red/0.png"), tmp_path / "out.txt"

    def head(*options: str) -> str:
        assert predict.run_command([str(tiny_run), path, *options]) == 0
        text = out.read_text() if "--output" in options else capsys.readouterr().out
        return text.splitlines()[0].split()[-2]

    assert head() == head("--format", "table") == "top5"  # in a pipe
    monkeypatch.setattr(predict, "columns", lambda file: len(path) + 40)
    assert head() == "top3"
    assert head("--top-k", "4") == "top4" and head("--output", str(out)) == "top5"
    monkeypatch.setattr(predict, "columns", lambda file: 10)
    assert head() == "top1"


def test_later_rows_of_a_narrow_table_keep_to_the_columns_that_are_left():
    best = [("cat", 0.5), ("dog", 0.25), ("eel", 0.25)]
    batches = [[Row("a" * 9, best)], [Row("b" * 19, best)], [Row("c", best)]]
    lines = "".join(as_table(iter(batches), 3, width=40)).splitlines()
    assert [line.split()[-2] for line in lines] == ["top2", "dog", "cat", "cat"] and max(map(len, lines)) <= 40


# Finding files


IN_B = ["b/1.JPG", "b/2.png", "b/again.png", "b/a/3.webp"]


@pytest.fixture
def tree(tmp_path, monkeypatch) -> None:
    """Fill the current folder with images in subfolders, one with an unusual name, and with links that form a cycle."""
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.png", "b/1.JPG", "b/notes.txt", "b/a/3.webp", "a.gif", "odd [1].png", "c/x.dat"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    Path("b/a/up").symlink_to("../../b")
    Path("b/again.png").symlink_to("again.png")


def paths(*words: str, **options) -> list[str]:
    return [found.path for found in find_images(words, **options) if not found.fault]


def test_files_folders_and_patterns_are_found_in_order(tree):
    assert paths("c/x.dat", "b", "a.gif") == ["c/x.dat", *IN_B, "a.gif"]
    assert paths("*.gif", "b/[12].*", "odd [1].png") == ["a.gif", "b/1.JPG", "b/2.png", "odd [1].png"]
    assert paths("[bc]") == IN_B  # c contains no image
    assert paths("b/**/*.webp", "c/**") == ["b/a/3.webp", "c/x.dat"]  # not through b/a/up/a
    left_out = LeftOut()
    assert {found.path for found in find_images(["b", "c", "none", "no*"], left_out=left_out) if found.fault} == {
        "c", "none", "no*",
    }  # fmt: skip
    assert (left_out.repeated, left_out.foreign) == (["b/a/up"], ["b/notes.txt", "c/x.dat"])


def test_links_in_a_circle_do_not_repeat_images_or_hang(tree):
    """Two links in a circle made a pattern with ** go on for hours; a link to a folder elsewhere is still followed."""
    Path("b/back").symlink_to("../b")
    Path("b/other").symlink_to("a")
    Path("elsewhere").mkdir()
    Path("elsewhere/far.bmp").write_bytes(b"")
    Path("b/out").symlink_to("../elsewhere")
    Path("b/.hidden").mkdir()
    Path("b/.hidden/h.png").write_bytes(b"")
    assert paths("b") == [*IN_B, "b/out/far.bmp"]
    assert paths("b/**/*.[Jwpb]*") == sorted([*IN_B, "b/out/far.bmp"])
    assert paths("**/out/*", "**/*.gif") == ["b/out/far.bmp", "a.gif"]


def test_a_link_to_a_folder_yields_to_the_folder_itself(tree):
    """The images of d were listed as those of b/d, and d was said to be a link."""
    Path("d").mkdir()
    Path("d/4.png").write_bytes(b"")
    Path("b/d").symlink_to("../d")
    left_out = LeftOut()
    assert "./d/4.png" in [found.path for found in find_images(["."], left_out=left_out)]
    assert left_out.repeated == ["./b/d", "./b/a/up"]


def test_a_folder_that_cannot_be_listed_is_a_fault(tree, monkeypatch):
    """Check that a folder that cannot be listed is reported as an error; os.walk would silently skip it."""
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: real("a.gif") if path == "b/a" else real(path))
    assert [found for found in find_images(["b"]) if found.fault] == [Found("b/a", "Not a directory")]


def test_stdin_lists_names(tree, monkeypatch):
    def listed(content: bytes, **options) -> list[str]:
        Path("list").write_bytes(content)
        with open("list") as file:
            monkeypatch.setattr(sys, "stdin", file)
            return paths("-", **options)

    assert listed(b"a.gif\r\n\nodd [1].png\nc/x.dat\nb") == ["a.gif", "odd [1].png", "c/x.dat", *IN_B]
    Path(HOSTILE).write_bytes(b"")
    assert listed(os.fsencode(HOSTILE) + b"\0a.gif\0", separator=b"\0") == [HOSTILE, "a.gif"]
    assert listed(b"a.gif\n" * 40_000) == ["a.gif"] * 40_000  # more than one read
    with pytest.raises(ConfigError, match="add --null; an image itself is given as a file"):
        listed(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ConfigError, match="one has more than 65,536 bytes"):
        listed(b"x" * 200_000)


def test_no_more_is_read_than_the_next_batch(run, tree):
    """Check that the first rows of an endless list are printed, i.e. that the list is not read to its end first."""
    num_taken = itertools.count()
    endless = (Found("a.gif") for _ in iter(lambda: next(num_taken), None))
    rows = next(Predictor(load_trained(Path(run)), 1).rows(endless, batch_size=4))
    assert [row.error.startswith("cannot identify") for row in rows] == [True] * 4
    assert next(num_taken) == 8


# Errors and exit codes


@pytest.mark.parametrize(
    "words,message",
    [
        (["trainer.device=cpu"], "no PATH is given"),
        (["val", "trainer.devise=cpu"], "unknown key 'trainer.devise': did you mean trainer.device?"),
        (["val", "model=sasa_resnet26"], "chooses a config group"),
        (["val", "--output", "/dev/null"], "--output /dev/null: is not a file"),
        (["val", "--output", "nowhere/x.csv"], "--output nowhere/x.csv: cannot be written (No such file"),
        (["nowhere", "none*.png", "--output", "x.csv"], "no image was found"),
        (["nowhere"], "no image was found"),
        (["val", "--top-k", "0"], "0 must be a whole number, at least 1"),
    ],
)
def test_what_is_refused(words, message, run, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    before = sorted(root.iterdir())
    assert predict.run_command([run, *words]) == 2
    told = capsys.readouterr()
    assert message in told.err and sorted(root.iterdir()) == before
    assert told.out == ""  # not even the head of the table


def test_no_checkpoint_is_refused(root, in_process):
    assert "is not a run folder" in in_process("predict", str(root), str(root / "val"), expect=2).stderr


@pytest.mark.parametrize(
    "source,message",
    [
        ("photos", "photos: is not a run folder; the run, or a checkpoint file, comes first"),
        ("photos/a.png", "photos/a.png: is an image, not a run; the run, or a checkpoint file, comes first"),
        ("runs/cats-s0-12345678/export", "is an export; give the run that it was made from (runs/cats-s0-12345678)"),
        ("runs/cats-s0-12345678/export/hub", "is an export; give the run that it was made from (runs/cats-s0-1234567"),
        ("elsewhere/model.onnx", "elsewhere/model.onnx: is an export; give the run that it was made from, or a .pt"),
        ("runs/cats", "; did you mean runs/cats-s0-12345678, runs/cats-s1-12345678?"),
        ("runs/cats-s0-12345687", "; did you mean runs/cats-s0-12345678?"),
        ("mice-s0", "; did you mean outputs/mice-s0-12345678?"),
        ("runs/cats-s0-12345678", "; this run has saved no checkpoint yet"),
        ("runs/dogs", "runs/dogs: cannot be read (No such file or directory)\n"),
    ],
)
def test_what_is_no_run_is_called_what_it_is(source, message, tmp_path, in_process):
    """The photographs before the run were once answered with a missing photos/checkpoints/last.pt."""
    for name in ("runs/cats-s0-12345678", "runs/cats-s1-12345678", "outputs/mice-s0-12345678"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    for name in ("photos/a.png", "runs/cats-s0-12345678/export/hub/model.safetensors", "elsewhere/model.onnx"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "runs/cats-s0-12345678/export/model.pt2").touch()
    told = in_process("predict", source, "photos", expect=2).stderr
    assert message in told and "loading" not in told
    if "runs/cats" in source and "did you mean" in message:
        assert message in in_process("train", f"resume={source}", expect=2).stderr


def test_an_output_is_whole_or_not_there(run, root, tmp_path, monkeypatch):
    output = tmp_path / "rows.csv"
    output.write_text("old")
    arguments = [run, str(root / "val"), "--batch-size", "3", "--top-k", "1", "--output", str(output)]
    real, num_calls = Predictor.best, itertools.count()

    def fails_later(*arguments):
        if next(num_calls) == 2:
            raise OSError("the disk is gone")
        return real(*arguments)

    monkeypatch.setattr(Predictor, "best", fails_later)
    assert predict.run_command(arguments) == 1
    assert output.read_text() == "old" and list(tmp_path.iterdir()) == [output]
    assert predict.run_command(arguments) == 0
    assert output.read_text().startswith("file") and len(output.read_text().splitlines()) == 9


def test_too_little_memory_and_outputs_that_are_not_finite(run, root, predicted, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(Predictor, "best", no_memory)
    assert "use less than --batch-size 64" in predicted(run, root / "val", expect=1)[1]
    monkeypatch.setattr(Predictor, "best", lambda self, pixels: [[("blue", float("nan"))] * 2] * len(pixels))
    found, _ = predicted(run, root / "val", expect=1)
    assert {row["error"] for row in found} == {"the model's output is not finite in fp32"}


def test_head_ends_it_in_peace(run, root):
    """Check that rows are flushed batch by batch and that a reader that has gone away is not an error."""
    line = '"$0" -m sasa_train.predict "$1" "$2"/train "$2"/train "$2"/train --batch-size 1 | head -n 2'
    done = subprocess.run(["sh", "-c", line, sys.executable, run, str(root)], capture_output=True, text=True)
    assert done.stdout.splitlines()[1].startswith(f"{root}/train/blue/0.png")
    assert "Error" not in done.stderr and "Broken pipe" not in done.stderr


def test_a_file_whose_name_begins_with_a_dash_is_not_an_option(tiny_run, tmp_path, monkeypatch, capsys):
    """A shell's *.png held -x.png, and every file after it was called an unrecognised argument."""
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "-x.png")
    monkeypatch.chdir(tmp_path)
    assert predict.run_command([str(tiny_run), "-x.png"]) == 0
    assert "./-x.png" in capsys.readouterr().out


def test_a_misspelt_option_is_answered_with_the_right_one(capsys):
    assert predict.run_command(["run", "x.png", "--top", "3"]) == 2
    assert "unrecognized arguments: --top 3: did you mean --top-k?" in capsys.readouterr().err
    assert predict.run_command(["run", "x.png", "--format", "xml"]) == 2
    assert "invalid choice: 'xml'" in (told := capsys.readouterr().err) and "did you mean" not in told
