"""The sections of the report that sasa-evaluate prints, as lists of lines."""

from typing import TYPE_CHECKING, Any

from sasa_train.config.derived import flips_images, has_top5
from sasa_train.terminal import printable

if TYPE_CHECKING:
    from sasa_train.evaluate.calibration import Calibration
    from sasa_train.evaluate.imagenet_real import RealResult
    from sasa_train.evaluate.significance import Comparison
    from sasa_train.trained import TrainedModel
    from sasa_train.training.evaluation import Evaluation


def lines_of_classes(classes: list[str], result: "Evaluation") -> list[str]:
    """Return a table of the classes' images and scores in percent; a class's top1 is its recall."""
    names = [printable(name) for name in classes]
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':<{width}}  images  precision  recall      F1"]
    for name, num_images, scores in zip(names, result.class_images, result.by_class, strict=True):
        precision, recall, f1 = (shown(score) for score in scores)
        lines.append(f"{name:<{width}}  {num_images:>6}  {precision:>9}  {recall:>6}  {f1:>6}")
    return lines


def shown(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def lines_of_auroc(classes: list[str], found: list[float | None], mean: float | None) -> list[str]:
    """Return the area under each class's ROC curve, and their mean."""
    names = [printable(name) for name in classes]
    width = max(len("class"), *(len(name) for name in names))
    lines = [
        f"{'class':<{width}}   AUROC",
        *(f"{n:<{width}}  {shown(x):>6}" for n, x in zip(names, found, strict=True)),
    ]
    return [*lines, f"AUROC  {shown(mean)}, one class against the rest, mean over the classes"]


def lines_of_features(found: dict[str, Any], num_images: int, size: int) -> list[str]:
    lines = [f"frozen features, {size:,} numbers for each of {num_images:,} train images"]
    if "knn" in found:
        lines.append(f"knn    {found['knn']['top1']:.2f} top1, {found['knn']['k']} nearest train images by cosine")
    if "probe" in found:
        unsettled = "" if found["probe"]["has_converged"] else "; it did not settle, so more may be possible"
        lines.append(f"probe  {found['probe']['top1']:.2f} top1, logistic regression{unsettled}")
    return lines


def lines_of_mirrored(mirrored: dict[str, Any], plain: "Evaluation", trained: "TrainedModel") -> list[str]:
    lines = ["with the mirror image, probabilities averaged over both views; in brackets the change from above"]
    digits = {"loss": 4, "top1": 2} | ({"top5": 2} if has_top5(len(trained.classes)) else {})
    for key, n in digits.items():
        lines.append(f"{key:<6} {mirrored[key]:.{n}f} ({mirrored[key] - getattr(plain, key):+.{n}f})")
    if not flips_images(trained.config.data, trained.config.augment):
        lines.append("the training never mirrored an image (augment.hflip): the second view is new to this model")
    return lines


def lines_of_calibration(found: "Calibration") -> list[str]:
    over, worst = found.confidence - found.top1, max(found.bins, key=lambda each: abs(each.gap))
    images = "1 image" if worst.num_images == 1 else f"{worst.num_images:,} images"
    verdict = f"{'over' if over > 0 else 'under'}confident by {abs(over):.2f} points"
    lines = [
        f"calibration, {len(found.bins)} bins of equal width",
        f"ECE         {found.ece:.2f} %",
        f"MCE         {found.mce:.2f} % in the bin from {worst.low:.1f} to {worst.high:.1f} %, with {images}",
        f"confidence  {found.confidence:.2f} % on average at top1 {found.top1:.2f} %: {verdict}",
        f"NLL         {found.nll:.4f}",
        f"Brier       {found.brier:.4f} (0 to 2)",
    ]
    if (best := found.temperature) is None:
        return [*lines, "temperature none is best: the NLL falls as far as the logits are stretched, or shrunk"]
    text = f"{best.value:.3f} would be best: NLL {best.nll:.4f}, ECE {best.ece:.2f} %; fitted on these very images"
    return [*lines, f"temperature {text}"]


def lines_of_real(found: "RealResult", num_classes: int) -> list[str]:
    lines = [
        f"ImageNet-ReaL, {found.num_images:,} images; {found.num_left_out:,} without a label are left out",
        f"top1   {found.top1:.2f}, by ImageNet's own labels on the same images {found.top1_original:.2f}",
    ]
    if num_classes < 1000:
        lines.append(f"of {num_classes} classes, the labels of others dropped: not comparable with published figures")
    return lines


def lines_of_comparison(found: "Comparison", first: "TrainedModel", other: "TrainedModel") -> list[str]:
    counts = found.counts
    names = [f"{printable(each.path)}, step {each.checkpoint['step']:,}" for each in (first, other)]
    return [
        f"compared on {counts.num_images:,} images",
        f"first       {names[0]}: top1 {found.top1[0]:.2f}",
        f"other       {names[1]}: top1 {found.top1[1]:.2f}",
        f"right       both {counts.both:,}, only the first {counts.only_first:,}, only the other "
        f"{counts.only_other:,}, neither {counts.neither:,}; the same prediction for {found.agreement:.2f} %",
        f"difference  {found.difference:+.2f} points of top1, 95 % interval {found.low:+.2f} to {found.high:+.2f} "
        "(paired; Newcombe 1998, method 10)",
        f"McNemar     p = {found.p:.3g} (exact, two-sided)",
        "This is about these two sets of weights on images like these, not about what made them: another seed gives "
        "other weights. To compare recipes, train several seeds of each (sasa-sweep, sasa-report).",
    ]
