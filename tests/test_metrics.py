"""Metrics of classes alike, what chooses the best model and ends a run early: against scikit-learn, and by hand."""

import json
import re

import numpy as np
import pytest
import torch
from reading_runs import assert_same_run, rows
from running_commands import TINY, kill_after
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_recall_fscore_support
from writing_runs import write_sweep

from sasa_train.evaluate.auroc import class_aurocs, mean_auroc
from sasa_train.evaluate.probes import TEMPERATURE, Features, collect_features, knn_top1, probe_top1
from sasa_train.evaluate.val_pass import open_val
from sasa_train.report.jobs import find_jobs
from sasa_train.report.rows import build_report
from sasa_train.report.tables import markdown
from sasa_train.runs.checkpoint import load_checkpoint
from sasa_train.runs.info import read_info
from sasa_train.runs.ledger import Job
from sasa_train.runs.metrics import best_row, score
from sasa_train.trained import load_trained
from sasa_train.training.evaluation import Evaluation


def answers(num_classes=5, num_images=60, without=()):
    """Draw labels that lack some classes, and predictions that are right in half of the cases."""
    rng = np.random.default_rng(0)
    labels = rng.choice([i for i in range(num_classes) if i not in without], num_images)
    predictions = np.where(rng.random(num_images) < 0.5, labels, rng.integers(0, num_classes, num_images))
    return labels, predictions


def evaluation(labels, predictions, num_classes=5) -> Evaluation:
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        confusion[label, prediction] += 1
    return Evaluation(1.0, 100 * float((labels == predictions).mean()), 100.0, len(labels), confusion)


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
@pytest.mark.parametrize("without", [(), (1, 4)])
def test_f1_and_balanced_accuracy_are_scikit_learns(without):
    labels, predictions = answers(without=without)
    found, present = evaluation(labels, predictions), sorted(set(labels))
    assert found.f1_macro == pytest.approx(100 * f1_score(labels, predictions, labels=present, average="macro"))
    assert found.balanced_accuracy == pytest.approx(100 * balanced_accuracy_score(labels, predictions))
    expected = precision_recall_fscore_support(labels, predictions, labels=range(5), zero_division=0)
    for number, scores in enumerate(found.by_class):
        its = [None] * 3 if number in without else [pytest.approx(100 * part[number]) for part in expected[:3]]
        assert list(scores) == its


def test_auroc_counts_pairs():
    """It is the share of pairs of an image of the class and another one in which the former has more of it."""
    labels, _ = answers(num_classes=3, num_images=30, without=(2,))
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 3))).float()
    logits[:, :2] += torch.nn.functional.one_hot(torch.from_numpy(labels), 3)[:, :2]
    logits[3], logits[4] = logits[0], logits[1]  # ties count half
    found, share = class_aurocs(logits, torch.from_numpy(labels)), logits.double().softmax(1).numpy()
    assert found[2] is None and mean_auroc(found) == pytest.approx((found[0] + found[1]) / 2)
    for number in (0, 1):
        own, others = share[labels == number, number], share[labels != number, number]
        wins = sum((a > b) + (a == b) / 2 for a in own for b in others)
        assert found[number] == pytest.approx(100 * wins / (len(own) * len(others)))


def val_rows(*values, metric="top1"):
    return [{"split": "val", "step": i, metric: value} for i, value in enumerate(values)]


def test_the_lowest_loss_is_the_best_and_none_is_the_worst():
    assert best_row(val_rows(1.0, 3.0, 3.0, metric="f1_macro"), "f1_macro")["step"] == 1
    assert best_row(val_rows(None, 2.0, 0.5, 0.7, metric="loss"), "loss")["step"] == 2
    assert score({"top1": 1.0}, "f1_macro") == -np.inf  # a row of an earlier version
    assert best_row([], "top1") is None


@pytest.mark.parametrize("metric", ["loss", "f1_macro"])
def test_the_metric_chooses_the_best_and_patience_ends_the_run(tmp_path, in_process, metric):
    """The run is done: the same command does nothing, the report counts it, and more patience continues it."""
    delta = {"loss": 5, "f1_macro": 60}[metric]
    run = [*TINY, "run_name=a", f"trainer.best_metric={metric}", "trainer.patience=1", f"trainer.min_delta={delta}"]
    printed = in_process("train", *run).stdout
    folder, reason = tmp_path / "out/a", f"trainer.patience=1: an evaluation did not improve {metric} by more than"
    assert f"ended       {reason} trainer.min_delta={delta}" in re.sub(r"\s*\n {12}", " ", printed)
    val = [row for row in rows(folder) if row["split"] == "val"]
    assert [row["epoch"] for row in val] == [1, 2]  # of three
    best = load_checkpoint(folder / "checkpoints/best.pt")["best"]
    assert best == {key: best_row(val, metric)[key] for key in ("top1", "step", "epoch", metric)}
    info = read_info(folder)
    assert info["status"] == "finished" and info["reason"].startswith(reason) and info["best"] == best
    assert f"ended early by {reason}" in in_process("train", *run).stdout
    (job,) = find_jobs([folder]).jobs
    assert job.state == "done" and job.figure == {"loss": "top1", "f1_macro": metric}[metric]
    more = [*run[:-2], "trainer.patience=3", run[-1], "allow_config_change=[trainer.patience]"]
    in_process("train", *more)
    assert [row["epoch"] for row in rows(folder) if row["split"] == "val"] == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_run_with_patience_ends_as_one_never_touched(tmp_path, in_process):
    run = [*TINY, "trainer.epochs=8", "trainer.best_metric=balanced_accuracy", "trainer.patience=2"]
    run += ["trainer.min_delta=8"]
    in_process("train", *run, "run_name=whole")
    for count in (3, 11):
        kill_after(count, tmp_path / "out/cut", *run, "run_name=cut")
    in_process("train", *run, "run_name=cut")
    assert_same_run(tmp_path / "out/whole", tmp_path / "out/cut")


def test_min_delta_alone_is_refused(in_process):
    said = in_process("train", *TINY, "trainer.min_delta=1", expect=2).stderr
    assert "trainer.min_delta=1.0 is for trainer.patience, which is not set" in said


def test_jobs_of_one_metric_are_compared_by_it(tmp_path):
    """Runs of several metrics, or of an earlier version without the column, are compared by top1."""
    results = {((f"optimizer.lr={lr}", "trainer.best_metric=f1_macro"), seed): [50.0 + lr, 60.0 + lr + seed]
               for lr in (1, 2) for seed in (0, 1)}  # fmt: skip
    sweep = write_sweep(tmp_path / "s", results)
    assert {job.figure for job in find_jobs([sweep]).jobs} == {"top1"}
    for log in sweep.glob("*/metrics.jsonl"):
        parsed = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(r | {"f1_macro": 99 - r["top1"]}) + "\n" for r in parsed))
    report = build_report(find_jobs([sweep]).jobs, None, None, [])
    text = markdown(report)
    assert report.figure == "f1_macro" and "f1_macro, last epoch" in text and "f1_macro in percent" in text
    assert [row.last.mean for row in report.rows] == [99 - 61.5, 99 - 62.5]
    assert [row.mean("best").mean for row in report.rows] == [99 - 51, 99 - 52]


def test_a_sweep_ranks_its_jobs_by_their_metric():
    jobs = [Job(name, [], metric="loss", last={"loss": loss}) for name, loss in (("a", 2.0), ("b", 0.5), ("c", None))]
    assert [job.name for job in sorted(jobs, key=lambda job: -job.score)] == ["b", "a", "c"]


def test_frozen_features_are_what_the_classifier_gets_and_neighbours_vote(tiny_run, capsys):
    trained = load_trained(tiny_run)
    features = collect_features(open_val(trained))
    assert len(features.train) == 70 and len(features.val) == 30  # without the last batch being dropped
    with torch.inference_mode():
        logits = trained.model.get_classifier()(features.val)
    (logged,) = (row for row in rows(tiny_run) if (row["split"], row["step"]) == ("val", trained.checkpoint["step"]))
    assert 100 * (logits.argmax(1) == features.val_labels).double().mean().item() == pytest.approx(logged["top1"])
    train, val = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (features.train, features.val))
    hits = 0
    for image, label in zip(val, features.val_labels, strict=True):
        cosines = train @ image
        votes = [0.0] * 10
        for i in cosines.argsort(descending=True)[:7].tolist():
            votes[features.train_labels[i]] += float((cosines[i] / TEMPERATURE).exp())
        hits += int(np.argmax(votes)) == label
    assert knn_top1(features, 7, 10) == pytest.approx(100 * hits / 30)


def test_a_probe_is_a_logistic_regression():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (90,), generator=generator)
    points = torch.randn(90, 4, generator=generator) + 2 * torch.eye(4)[labels]
    features = Features(points[:60], labels[:60], points[60:], labels[60:])
    mean, deviation = points[:60].mean(0), points[:60].std(0)
    fitted = LogisticRegression().fit(((points[:60] - mean) / deviation).numpy(), labels[:60].numpy())
    expected = fitted.score(((points[60:] - mean) / deviation).numpy(), labels[60:].numpy())
    assert probe_top1(features) == {"top1": pytest.approx(100 * expected), "has_converged": True}


def test_sasa_evaluate_prints_and_writes_them(tiny_run, in_process, tmp_path):
    out = in_process("evaluate", str(tiny_run), "--auroc", "--knn", "5", "--probe", "--json", "f.json").stdout
    figures = json.loads((tmp_path / "f.json").read_text())
    for key in ("f1_macro", "balanced_accuracy"):
        assert f"{key} {figures[key]:.2f}\n" in out
    assert f"knn    {figures['knn']['top1']:.2f} top1, 5 nearest" in out
    assert f"probe  {figures['probe']['top1']:.2f} top1" in out
    assert f"AUROC  {figures['auroc']['mean']:.2f}" in out and len(figures["auroc"]["classes"]) == 10
    assert set(figures["classes"][0]) >= {"precision", "recall", "f1"}
    said = in_process("evaluate", str(tiny_run), "--knn", "71", expect=2).stderr
    assert "--knn 71: must be 70 at most" in said
