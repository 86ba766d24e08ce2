"""Check that the HTML report is valid, self-contained, safe against hostile names, and correctly shown in a browser."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from making_data import make_image_folder
from running_commands import TINY
from writing_runs import BASE, write_run, write_sweep

from sasa_train import report as command
from sasa_train import train, visualize
from sasa_train.config.compose import compose_config
from sasa_train.paper import differing_keys, nearest_row
from sasa_train.report.advice import advice
from sasa_train.report.illustrations import class_rows
from sasa_train.report.jobs import find_jobs
from sasa_train.report.verdict import chance_of, half_width, of_run, val_note
from sasa_train.runs.chance import Chance
from sasa_train.visualize.val_sample import ValSample

HOSTILE = '<script>alert("1")</script>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Parses a page and requires balanced tags; a browser would silently repair unbalanced ones."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.source = path, path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == [] and self.source.startswith("<!doctype html>")

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"
        self.text += " "

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def check_whole(page: Page) -> None:
    """Check the rules that apply to every page of the report."""
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "base", "form"}
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == len(page.all("main")) == 1
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    for _, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
    for picture in page.all("img"):
        assert picture["src"].startswith("data:image/webp;base64,") and len(picture["alt"]) > 10
    assert not re.search(r"(?:src|href|url\()=?[\"']?\s*(?:https?:)?//", page.source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        inside, target = link["href"].startswith("#"), unquote(link["href"])
        assert target[1:] in ids if inside else (page.path.parent / target).exists(), target
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all(header["scope"] in ("row", "col") for header in page.all("th"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Return a real run with a hostile name, on images with hostile class names."""
    folder = tmp_path_factory.mktemp("page")
    images = make_image_folder(folder / "images", size=(19, 17))
    for split in ("train", "val"):
        (images / split / "red").rename(images / split / HOSTILE.replace("/", "|"))
    data = ["data=image_folder", f"data.root={images}", "data.image_size=16", "data.max_train_images=null"]
    arguments = [*TINY, *data, f"output_dir={folder}", "run_name=run", "trainer.global_batch_size=9"]
    assert train.run_command([*arguments, "trainer.epochs=2"]) == 0
    run_dir = folder / f"a {HOSTILE.replace('/', '|')} #1?%41"
    return (folder / "run").rename(run_dir)


@pytest.fixture(scope="module")
def run_page(run_dir) -> Page:
    assert command.run_command([str(run_dir)]) == 0
    return Page(run_dir / "report/report.html")


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory) -> Page:
    """Return the page of a sweep with three rows; in one of them, one job has failed and the other is waiting."""
    k3, k5, k7 = (("model.kernel_size=3",), ("model.kernel_size=5",), ("model.kernel_size=7",))
    results = {(k3, 0): [50.0, 58.0], (k3, 1): [50.0, 54.0], (k5, 0): [61.0, 60.0], (k5, 1): [59.0, 63.0]}
    results |= {(k7, 0): ("failed", f"exit code 1: {HOSTILE}\nTraceback"), (k7, 1): ("waiting", "")}
    sweep = write_sweep(tmp_path_factory.mktemp("page") / "a sweep", results, table=4)
    (sweep / "ledger-0/report").mkdir()
    (sweep / "ledger-0/report/report.html").touch()
    assert command.run_command([str(sweep), "--reference", "kernel_size 3"]) == 0
    return Page(sweep / "report/report.html")


def test_the_page_of_a_run_tells_all_that_its_folder_does(run_page):
    check_whole(run_page)
    info = json.loads((run_page.path.parents[1] / "run.json").read_text())
    val = [json.loads(line) for line in (run_page.path.parents[1] / "metrics.jsonl").read_text().splitlines()][-1]
    for text in (
        f"{val['top1']:.2f} %", "after epoch 2 of 2", info["reproduce"], info["versions"]["torch"], info["host"],
        "chance (62.50 %: the most frequent of 2 classes)", "all 8 val images",
        "raw weights of checkpoints/last.pt, step 4",
    ):  # fmt: skip
        assert text in run_page.text
    assert "arXiv" not in run_page.text  # the paper's results are of other images
    assert len(run_page.all("img")) >= 9
    links = {unquote(link["href"]) for link in run_page.all("a")}
    assert {"../config.yaml", "../metrics.jsonl", "../checkpoints/last.pt", "../tensorboard/"} <= links
    assert "trainer.epochs" in run_page.text and "data.root" in run_page.text


def test_names_from_a_disk_are_text_and_no_markup(run_page, sweep_page):
    assert HOSTILE.replace("/", "|") in run_page.text and f"exit code 1: {HOSTILE}" in sweep_page.text
    assert "<script" not in run_page.source + sweep_page.source


def test_the_page_of_a_sweep_has_each_job_or_its_reason(sweep_page):
    check_whole(sweep_page)
    for text in (
        "56.00 (2 seeds: too few)",
        "+5.50 (2 seeds: too few)",
        "kernel_size 3",
        "2/2",
        "0/2",
        "sasa-sweep ...",
        "None of its jobs is done",
    ):
        assert text in sweep_page.text
    assert "Traceback" not in sweep_page.text and len(sweep_page.all("img")) == 4
    assert len(sweep_page.all("details")) == 3 + 1  # the rows, and the runs
    links = {unquote(link["href"]) for link in sweep_page.all("a") if not link["href"].startswith("#")}
    assert links == {f"../ledger-{i}/" for i in range(4)} | {"../ledger-0/report/report.html"}
    assert {"failed", "waiting"} <= set(sweep_page.text.split())


def test_the_page_of_a_sweep_opens_with_a_verdict_and_the_best_run_first(sweep_page):
    verdict = (
        "The highest of 2 rows on digits is row 2, kernel_size 5, with top1 61.50 % (mean of 2 seeds), 6.2 times chance"
    )
    start = " ".join(sweep_page.text.split())
    assert verdict in start and "(10.00 %: 10 classes). There are too few seeds to tell whether it is better" in start
    assert start.index(verdict) < start.index("The best first, by top1 of the last epoch") < start.index("Means over")
    listed = re.findall(r"ledger-\d", start[start.index("The best first") :])
    assert listed[:6] == ["ledger-3", "ledger-2", "ledger-0", "ledger-1", "ledger-4", "ledger-5"]
    marked = re.findall(r'<tr class="best">.*?</tr>', sweep_page.source, re.DOTALL)
    assert ["ledger-3" in row or "kernel_size 5" in row for row in marked] == [True, True]
    marks = re.findall(r'class="mark">(.*?)<', sweep_page.source)
    assert marks == ["highest run", "highest"]  # too few seeds to tell


def test_a_verdict_names_the_best_run_of_the_folder_and_a_clear_lead(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no charts, which take seconds
    for name, overrides, top1s in (
        ("good", [], [50.0, 60.0]),
        ("better", ["optimizer.lr=0.2"], [80.0, 70.5]),
        ("other", ["data=image_folder", "data.root=photos"], [99.0]),
        ("bad", ["optimizer.lr=9"], [10.0, 9.0]),
    ):
        write_run(tmp_path / "out" / name, ["experiment=debug", *overrides], top1s)

    jobs = {job.name: job for job in find_jobs([tmp_path / "out"]).jobs}
    chance = chance_of([jobs["good"]])
    best = "top1 is 70.50 % after epoch 2 of 1, 7.0 times chance (10.00 %: 10 classes)"
    assert of_run(jobs["better"], chance) == f"{best}; it is the highest of the 3 finished runs on these images in out."
    assert "; the highest of the 3 finished runs on these images in out is better with 70.50 %." in of_run(
        jobs["good"], chance
    )
    assert Chance(10.0, 10, 32).explains(20.3) and not Chance(10.0, 10, 32).explains(20.5)  # 1.96 x 5.3 points
    assert command.run_command([str(tmp_path / "out/bad"), "--quick"]) == 0
    page = " ".join(Page(tmp_path / "out/bad/report/report.html").text.split())
    assert (
        "top1 is 9.00 % after epoch 2 of 1, not above chance (10.00 %: 10 classes); the highest of the 3 finished runs"
        in page
    )
    assert "top1 9.00 % is not above chance (10.00 %: 10 classes): the model has not" in page
    results = {((f"model.kernel_size={k}",), seed): [10.0 * k + seed] for k in (5, 7) for seed in (0, 1, 2)}
    results |= {(("model.kernel_size=3",), seed): [8.0 + seed] for seed in (0, 1, 2)}
    assert command.run_command([str(write_sweep(tmp_path / "s", results))]) == 0
    page = " ".join(Page(tmp_path / "s/report/report.html").text.split())
    assert "ledger-5 best run" in page and "best row" in page  # row 2 leads by 20 points with each seed
    assert "It is 20.00 points above the next, row 2, and the interval over seeds excludes 0 (± 0.00)." in page
    assert "Row 1 on digits: top1 is not above chance (10.00 %: 10 classes)." in page
    assert page.count("best row") == 1 and "highest" not in page
    results = {((f"model.kernel_size={k}",), seed): [60.0 + seed] for k in (5, 7) for seed in (0, 1, 2)}
    assert command.run_command([str(write_sweep(tmp_path / "tie", results))]) == 0
    page = " ".join(Page(tmp_path / "tie/report/report.html").text.split())
    assert "The highest of 2 rows on digits is row" in page and "It is equal to the next, row 2." in page
    assert "best r" not in page and page.count("highest") == 3


def test_an_unfinished_run_is_not_the_best_of_its_folder(tmp_path):
    """While a sweep ran, each of its runs was the best so far in turn."""
    for name, top1, status in (("slow", 70.0, "interrupted"), ("one", 50.0, "finished")):
        write_run(tmp_path / "out" / name, BASE, [top1], status=status)
    jobs = {job.name: job for job in find_jobs([tmp_path / "out"]).jobs}
    assert of_run(jobs["slow"], None).endswith("; the only finished run on these images in out, one, has 50.00 %.")
    assert of_run(jobs["one"], None) == "top1 is 50.00 % after epoch 1 of 1."
    write_run(tmp_path / "out/two", BASE, [60.0])
    assert of_run(jobs["slow"], None).endswith(
        "; the highest of the 2 finished runs on these images in out is two with 60.00 %."
    )


def test_a_verdict_says_whether_a_model_memorises_and_what_helps_next(tmp_path, capsys):
    """A net at train 54 %, val 39 % with a val loss that had long been flat got no word. A little wobble is no rise."""
    run_dir = tmp_path / "run"
    write_run(run_dir, BASE, [39.0] * 8)
    (job,) = find_jobs([run_dir]).jobs
    log = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]

    def said(val: list[float], train: list[float], train_top1: float | None = 53.9, top1: float = 39.0) -> str:
        changed = [row | {"loss": {"val": val, "train": train}[row["split"]][row["epoch"] - 1]} for row in rows]
        of_last = {"train": train_top1, "val": top1}
        changed = [row | {"top1": of_last[row["split"]]} if row["epoch"] == 8 else row for row in changed]
        log.write_text("".join(json.dumps(row) + "\n" for row in changed))
        return advice(job, Chance(10.0, 10, 320))

    start = "top1 of the last epoch: train 53.9 %, val 39.0 %"
    falls, rises = [2.5 - 0.25 * epoch for epoch in range(8)], [2.4, 2.2, 2.0, 2.1, 2.3, 2.5, 2.6, 2.7]
    gap = f"{start}: a gap of 15 points, no clear memorising; val"
    assert said(falls, falls) == f"{gap} loss still falls at the end: more epochs would help (trainer.max_steps=...)."
    helps = "more images or existing weights (docs/finetune.md) would help more than more epochs."
    assert (
        said([2.4, 2.2, 2.0, 2.1, 2.0, 2.1, 2.0, 2.0], falls) == f"{gap} loss has hardly fallen since epoch 4: {helps}"
    )
    assert said([2.0] * 8, falls, top1=45.0).endswith("val top1 still rises, though val loss has hardly fallen since "
                                                      "epoch 1: more epochs may help.")  # fmt: skip
    risen = said([2.4, 2.2, 2.0, 2.1, 2.0, 2.1, 2.1, 2.1], falls)
    assert risen == f"{gap} loss has risen a little since epoch 3: {helps}"
    higher = [{"split": "val", "epoch": epoch, "loss": 2.0, "top1": 20.0 + epoch % 4} for epoch in range(1, 9)]
    log.write_text("".join(json.dumps(rows[0] | row | {"step": row["epoch"]}) + "\n" for row in higher))
    assert "rises" not in advice(job)  # three evaluations of epochs 5 to 7 are on average above 1 to 3 but no highest
    alike = (
        "no sign of memorising; train and val are alike: a larger net or more epochs (trainer.max_steps=...) may help."
    )
    assert said([2.0] * 8, falls, 40.0) == f"top1 of the last epoch: train 40.0 %, val 39.0 %, {alike}"
    assert said([2.0] * 8, falls, None) == f"top1 of the last epoch: val 39.0 %; val loss has hardly fallen since " \
                                           f"epoch 1: {helps}"  # fmt: skip
    assert said([2.0] * 8, falls, top1=41.0).endswith(helps)  # no more than chance on 320 images gives
    few = "it has not learned yet; 8 steps are few, so train longer (trainer.epochs=...) first."
    assert said(falls, falls, 15.0, 12.5).endswith(few)  # chance
    wild = "it has not learned yet; a lower optimizer.lr (now 0.1) is the first thing to try; then check the labels, or"
    assert wild in said([5.0] * 8, falls, 15.0, 12.5)
    high = "val loss was up to 919.66, and guessing has 2.30, so the steps are too long: a lower optimizer.lr (now 0.1)"
    assert high in said([919.66, *falls[1:]], falls, 15.0, 12.5)  # whose advice was once to train longer
    far = (
        "train 100.0 %, val 39.0 %: the net memorises the train images; more augmentation, a smaller net or more images"
    )
    assert far in said(falls, falls, 100.0)
    sentence = (
        "The val loss was lowest after epoch 3 (2.000) and rose to 2.700, while the train loss fell from 2.000 to 0.750"
    )
    assert said(rises, falls).startswith(f"{start}. {sentence}: since then the model memorises its train images.")
    assert command.run_command([str(run_dir), "--quick"]) == 0
    assert sentence in " ".join(Page(run_dir / "report/report.html").text.split())
    out = capsys.readouterr().out
    assert sentence in out and "top1, last epoch" in out and "reference" not in out and "few seeds" not in out


def test_the_number_of_val_images_says_how_exact_top1_is(run_page, capsys):
    """At 72 images, 36 % is anything between 25 and 47 %; at 10,000, 80 % is within 0.8 points."""
    assert half_width(35.65, 72) == pytest.approx(10.8, abs=0.05) and half_width(80, 10_000) == pytest.approx(
        0.78, abs=0.01
    )
    assert half_width(100, 8) > 10  # eight right answers in a row do not prove that all are right
    assert re.search(r"8 val images: top1 is accurate to about ± \d\d points\.", run_page.text)
    run_dir = str(run_page.path.parents[1])
    jobs = find_jobs([Path(run_dir)]).jobs
    assert "on 8 val images, one run's top1 is accurate to about ± " in val_note(jobs)


def test_the_papers_row_stands_where_the_data_is_the_papers(tmp_path):
    """Next to another data set, the paper's top1 says nothing."""
    keys = ["model=hybrid_resnet50", "model.width=0.5", "data=imagenet", "data.image_size=160"]
    write_run(tmp_path / "run", keys, [60.0])
    assert command.run_command([str(tmp_path / "run"), "--quick"]) == 0
    page = Page(tmp_path / "run/report/report.html")
    check_whole(page)
    for text in ("Table 1: conv stem + attention, R50", "width=0.5 (the paper's 1.0)", "the levels are no comparison"):
        assert text in page.text


def test_a_page_is_written_without_checkpoint_data_or_matplotlib(run_dir, tmp_path, monkeypatch, capsys):
    """Check that a section whose data or packages are missing says what is missing and how to provide it."""

    def write(*arguments: str) -> Page:
        assert command.run_command([str(run_dir), "--out", str(tmp_path), *arguments]) == 0
        return Page(tmp_path / "report.html")

    assert f"data.root={tmp_path}/gone is not there" in write(f"data.root={tmp_path}/gone").text
    assert "data.root=" in capsys.readouterr().err
    assert "holds no whole cifar10" in write("data.name=cifar10", f"data.root={tmp_path}").text  # nor is it downloaded
    page = write("--quick")
    assert len(page.all("img")) == 2 and "Classes" not in page.text  # both curves
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        page = write()
    assert "pip install 'sasa_train[plots]'" in page.text and page.all("img") == [] and "taken for" in page.text
    shutil.copytree(run_dir, tmp_path / "copy")
    (tmp_path / "copy/checkpoints/last.pt").write_bytes(b"PK")
    assert command.run_command([str(tmp_path / "copy")]) == 0
    assert "last.pt: cannot be read as a checkpoint" in Page(tmp_path / "copy/report/report.html").text


def test_a_class_table_has_who_is_taken_for_whom():
    """Check the per-class table of a data set with two classes and of one with a single class."""
    found = ValSample(4, torch.tensor([[1, 2], [0, 1]]), [])
    assert [(row["class"], row["top1"], row["most often taken for"]) for row in class_rows(found, ["a", "b"])] == [
        ("a", "33.33", "b (2)"),
        ("b", "100.00", "-"),
    ]
    tied = class_rows(ValSample(7, torch.tensor([[0, 1, 1], [0, 1, 0], [2, 1, 1]]), []), ["a", "b", "c"])
    assert [row["most often taken for"] for row in tied] == ["b, c (1 each)", "a (2)", "-"]
    many = class_rows(ValSample(4, torch.ones(5, 5, dtype=torch.int64), []), list("abcde"))
    assert many[0]["most often taken for"] == "4 classes (1 each)"
    (row,) = class_rows(ValSample(3, torch.tensor([[3]]), []), ["alone"])
    assert (row["top1"], row["most often taken for"]) == ("100.00", "-")


def test_mistakes_have_the_names_of_their_files(run_dir, tmp_path):
    """An image that the figure shows was to be found by eye among all others."""
    blue, red = sorted((run_dir.parent / "images/val").iterdir(), key=lambda folder: folder.name != "blue")
    shutil.copytree(blue, tmp_path / "val" / red.name)
    shutil.copytree(red, tmp_path / "val/blue")
    arguments = [str(run_dir), "mistakes", f"data.root={tmp_path}", "--formats", "svg", "--out", str(tmp_path)]
    assert visualize.run_command(arguments) == 0
    shown = re.findall(r"(\w+\.png)", (tmp_path / "mistakes.svg").read_text())
    assert sorted(shown) == sorted(path.name for path in (tmp_path / "val").glob("*/*"))  # each is one


def test_the_page_of_a_model_that_is_not_finite_says_so_in_place_of_its_attention(run_dir, tmp_path, monkeypatch):
    shutil.copytree(run_dir, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    state = torch.load(checkpoints / "last.pt", weights_only=True)
    state["model"]["layer1.0.conv2.qkv.weight"].fill_(math.nan)
    for path in checkpoints.iterdir():  # including the digests
        path.unlink()
    torch.save(state, checkpoints / "last.pt")
    monkeypatch.chdir(tmp_path / "run")
    assert command.run_command(["."]) == 0
    page = Page(tmp_path / "run/report/report.html")
    assert "model.layer1.0.conv2.qkv.weight is not finite" in page.text
    assert "<title>run</title>" in page.source  # the name of the folder given as "."


def test_overrides_that_nobody_reads_are_refused(run_dir, sweep_page, capsys):
    for arguments, reason in (
        ([str(run_dir), "weights=both"], "weights=both must be ema or raw"),
        ([str(run_dir), "data.image_size=-1"], "data.image_size=-1"),
        ([str(sweep_page.path.parents[1]), "data.root=x"], "several runs are given"),
        (["data.root=x"], "no sweep or run"),
        ([str(run_dir), "--num-images", "0"], "at least 1"),
    ):
        assert command.run_command(arguments) == 2 and reason in capsys.readouterr().err


def test_what_one_must_know_of_a_run_stands_above_its_figures(tmp_path):
    """Check the warnings about damaged or unusual content in run.json and other files."""
    run_dir = tmp_path / "run"
    write_run(run_dir, ["experiment=debug", "trainer.max_steps=null", "trainer.epochs=9"], [20.0, 40.0, 30.0])
    info = {"status": "interrupted", "starts": [{"step": 0}, {"step": 7}, 5], "versions": 3, "dirty": True}
    (run_dir / "run.json").write_text(json.dumps(info))
    (run_dir / "unreadable.txt").write_text("".join(f"{i}.png: truncated\n" for i in range(30)))
    (run_dir / "nonfinite.txt").write_text("loss at step 3\n")
    (run_dir / "checkpoints").mkdir()
    (run_dir / "checkpoints/last.pt.damaged").touch()
    assert command.run_command([str(run_dir), "--quick"]) == 0
    page = Page(run_dir / "report/report.html")
    assert not list((run_dir / "report").glob("*.png"))  # "all jobs (the reference)", for one run
    check_whole(page)
    for text in (
        "not finished (interrupted): evaluated up to epoch 3 of 9", f"sasa-train resume={run_dir}", "30.00 %",
        "40.00 %", "after epoch 2", "30 images could not be read", "9.png: truncated", "20 more lines", "restarts 1",
        "loss at step 3", "put aside: last.pt.damaged", "The digits prove",
    ):  # fmt: skip
        assert text in page.text
    assert "10.png" not in page.text


@pytest.mark.parametrize(
    "overrides,table,label,differing",
    [
        (["model=hybrid_resnet50"], 1, "conv stem + attention, R50", {}),
        (["model=hybrid_resnet50", "model.kernel_size=9"], 4, "kernel_size 9", {}),
        (["model=hybrid_resnet50", "model.stage_ops=[conv,conv,attention,attention]"], 3, "convolution in 1 2", {}),
        (["model=hybrid_resnet38", "model.width=0.5"], 1, "conv stem + attention, R38", {"width": (1.0, 0.5)}),
    ],
)
def test_a_run_stands_beside_the_nearest_row_of_the_paper(overrides, table, label, differing):
    keys = vars(compose_config(overrides).model)
    row = nearest_row(keys)
    assert (row.table, row.label) == (table, label) and differing_keys(row, keys) == differing


PROBE = """<script>
const wrong = [];
addEventListener("error", event => wrong.push(event.message || event.target.tagName), true);
addEventListener("securitypolicyviolation", event => wrong.push(event.violatedDirective));
addEventListener("load", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const pictures = [...document.images];
  parent.postMessage({
    page: location.pathname.split("/").pop(), width: innerWidth, needed: document.documentElement.scrollWidth,
    pictures: pictures.length, loaded: pictures.filter(picture => picture.naturalWidth > 0).length,
    boxes: [...document.querySelectorAll(".wide")].filter(box => box.scrollWidth > box.clientWidth).length, wrong,
  }, "*");
});
</script>"""
FRAMES = """<!doctype html><pre id="found"></pre><script>
addEventListener("message", event => { found.textContent += JSON.stringify(event.data) + "\\n"; });
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to look at the page with")
def test_a_browser_shows_the_pages_on_a_phone_and_on_a_screen(run_page, sweep_page, tmp_path):
    """At 360 and 1280 pixels, nothing overflows, wide tables scroll inside their boxes, and every picture loads."""
    frames = FRAMES
    for page in (run_page, sweep_page):
        name = f"{page.path.parents[1].name == 'a sweep'}.html"
        copy = page.source.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
        (tmp_path / name).write_text(copy.replace("<head>", f"<head>{PROBE}"))
        frames += "".join(f'<iframe src="{name}" width="{width}" height="800"></iframe>' for width in (360, 1280))
    (tmp_path / "frames.html").write_text(frames.replace("<iframe", '<iframe style="border:0"'))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=20000 --dump-dom"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/profile", "--window-size=1400,4000",
         f"file://{tmp_path}/frames.html"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    measured = [json.loads(line) for line in re.findall(r"\{.*\}(?=\n)", done.stdout.split("<script>")[0])]
    assert sorted((found["page"], found["width"]) for found in measured) == [
        ("False.html", 360), ("False.html", 1280), ("True.html", 360), ("True.html", 1280),
    ]  # fmt: skip
    for found in measured:
        assert found["needed"] <= found["width"] and found["wrong"] == [], found
        assert found["loaded"] == found["pictures"] >= 4
        assert found["boxes"] > 0 or found["width"] > 360
