"""How well a frozen model's features tell the classes apart: k nearest neighbours, and a linear probe.

Features are what the classifier gets. The train images are read as those of val, without augmentation.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sasa_train.data.loader import Loader, build_plain_train_loader
from sasa_train.device import autocast
from sasa_train.evaluate.val_pass import Val
from sasa_train.refusal import ConfigError

TEMPERATURE = 0.07  # of the neighbours' votes, as in DINO (arXiv 2104.14294, section 4.1)
CHUNK = 256  # val images whose neighbours are found at once
MAX_ITERATIONS = 1000  # of the probe's fit


@dataclass
class Features:
    """Features of train and val, float32 [n, d] on the CPU, and labels, int64 [n]."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor


def collect_features(val: Val) -> Features:
    """Compute the features of all readable train and val images.

    Raises:
        ConfigError: the model has no features apart from its logits, as a model of the user's own.
    """
    model = val.trained.model
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise ConfigError(
            f"--knn and --probe: {val.trained.config.model.title} has no forward_features and forward_head, as timm's "
            "models have; its features cannot be told from its logits"
        )
    config = val.trained.config
    train = build_plain_train_loader(config, val.device)
    return Features(*_features(model, train, val), *_features(model, val.loader, val))


@torch.inference_mode()
def _features(model: nn.Module, loader: Loader, val: Val) -> tuple[Tensor, Tensor]:
    model.eval()
    features, labels = [], []
    try:
        for images, of_batch in loader.eval_batches():
            with autocast(val.device, val.precision):
                found = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
            features.append(found.flatten(1).float().cpu())
            labels.append(of_batch.cpu())
    finally:
        loader.close()
    return torch.cat(features), torch.cat(labels)


def knn_top1(features: Features, k: int, num_classes: int) -> float:
    """Return the top1, in percent, of the k nearest train images' votes, weighted by exp(cosine / TEMPERATURE)."""
    train, hits = nn.functional.normalize(features.train), 0
    for some, labels in zip(features.val.split(CHUNK), features.val_labels.split(CHUNK), strict=True):
        cosines, nearest = (nn.functional.normalize(some) @ train.T).topk(k)
        votes = torch.zeros(len(some), num_classes)
        votes.scatter_add_(1, features.train_labels[nearest], (cosines / TEMPERATURE).exp())
        hits += int((votes.argmax(1) == labels).sum())
    return 100 * hits / len(features.val_labels)


def probe_top1(features: Features) -> dict[str, Any]:
    """Return the top1, in percent, of a logistic regression on standardised features, and whether its fit settled."""
    from sklearn.linear_model import LogisticRegression

    deviation, mean = torch.std_mean(features.train, dim=0)
    train, val = ((x - mean) / deviation.clamp(min=1e-6) for x in (features.train, features.val))
    probe = LogisticRegression(max_iter=MAX_ITERATIONS).fit(train.numpy(), features.train_labels.numpy())
    predictions = torch.from_numpy(probe.predict(val.numpy()))
    top1 = 100 * (predictions == features.val_labels).double().mean().item()
    return {"top1": top1, "has_converged": int(probe.n_iter_[0]) < MAX_ITERATIONS}
