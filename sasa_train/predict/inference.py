"""Predict the classes of image files in batches with a trained model, preprocessing them as for validation."""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sasa_train.data.loader import resolved_num_workers
from sasa_train.data.reading import Read, image_files, read_batches
from sasa_train.device import autocast, resolve
from sasa_train.predict.find_images import Found
from sasa_train.predict.table import Row
from sasa_train.trained import Ranking, TrainedModel, most_probable


class Predictor:
    """Predicts the `top_k` classes of each image, or all classes if the model has fewer.

    Raises:
        ConfigError: the config's device or precision is not available.
    """

    def __init__(self, trained: TrainedModel, top_k: int):
        trained.config.trainer.sync_batch_norm = False  # only used in training
        self.device, config = resolve(trained.config)
        self.precision, self.num_threads = config.trainer.precision, resolved_num_workers(config)
        self.normalize = trained.normalize(self.device)
        self.model = trained.model.to(self.device).to(memory_format=self.normalize.memory_format)
        self.classes, self.top_k = trained.classes, min(top_k, len(trained.classes))
        self.data = config.data

    def rows(self, found: Iterable[Found], batch_size: int) -> Iterator[list[Row]]:
        """Yield lists of `batch_size` rows, one row per file, in order. The next batch is read in the meantime."""
        iterator = iter(found)
        named, to_read = itertools.tee(iter(lambda: list(itertools.islice(iterator, batch_size)), []))
        files = (image_files([one.path for one in batch if not one.fault]) for batch in to_read)
        for batch, read in zip(named, read_batches(files, self.data, self.num_threads), strict=True):
            yield self._predict(batch, read)

    def _predict(self, batch: list[Found], read: Read) -> list[Row]:
        """Return the rows of a batch; `read` contains its images and the reasons for unreadable files."""
        best = dict(zip(read.rows.tolist(), self.best(read.pixels) if len(read.rows) else (), strict=True))
        reasons, places = dict(read.unreadable), itertools.count()
        rows = []
        for one in batch:
            answer = None if one.fault else best.get(next(places))
            if not answer:
                rows.append(Row(one.path, error=one.fault or reasons[one.path]))
            elif any(math.isnan(share) for _, share in answer):
                rows.append(Row(one.path, error=f"the model's output is not finite in {self.precision}"))
            else:
                rows.append(Row(one.path, answer))
        return rows

    @torch.inference_mode()
    def best(self, pixels: Tensor) -> list[Ranking]:
        """Return the top classes, with softmax probabilities, for images [B, C, H, W] preprocessed as for val."""
        with autocast(self.device, self.precision):
            logits = self.model(self.normalize(pixels.to(self.device)))
        return most_probable(logits, self.classes, self.top_k)
