"""A trained model on its device, from files to their best classes: images as val sees them, a batch at a time."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from sasa_train.data.datasets import Files, ImageSet, UnreadableImage
from sasa_train.data.loader import resolved_num_workers
from sasa_train.data.transforms import Shape, fit
from sasa_train.device import autocast, resolve
from sasa_train.predict.find_images import Found
from sasa_train.predict.table import Row
from sasa_train.trained import TrainedModel

Read = tuple[Found, np.ndarray | None]  # with uint8 [S, S, 3], or with a fault


class Predictor:
    """`top_k`: classes an image, at most all of the model's.

    Raises:
        ConfigError: the device or the precision that the config asks for is not there.
    """

    def __init__(self, trained: TrainedModel, top_k: int):
        trained.config.trainer.sync_batch_norm = False  # of training alone
        self.device, config = resolve(trained.config)
        self.precision, self.num_threads = config.trainer.precision, resolved_num_workers(config)
        self.normalize = trained.normalize(self.device)
        self.model = trained.model.to(self.device).to(memory_format=self.normalize.memory_format)
        self.classes, self.top_k = trained.classes, min(top_k, len(trained.classes))
        self.shape: Shape = partial(fit, size=trained.image_size)

    def rows(self, found: Iterable[Found], batch_size: int) -> Iterator[list[Row]]:
        """A row for each of `found`, in their order; `batch_size` at a time, while the next ones are read."""
        images = read_ahead(found, self.shape, self.num_threads, max(batch_size, self.num_threads))
        while batch := list(itertools.islice(images, batch_size)):
            yield self._predict(batch)

    def _predict(self, batch: list[Read]) -> list[Row]:
        pixels = [image for _, image in batch if image is not None]
        best = iter(self.best(np.stack(pixels)) if pixels else ())
        return [self._row(found, next(best) if image is not None else []) for found, image in batch]

    def _row(self, found: Found, best: list[tuple[str, float]]) -> Row:
        if any(share != share for _, share in best):
            return Row(found.path, error=f"the model's output is not finite in {self.precision}")
        return Row(found.path, best, found.fault)

    @torch.inference_mode()
    def best(self, pixels: np.ndarray) -> list[list[tuple[str, float]]]:
        """uint8 [B, S, S, 3] as `fit` makes them -> of each image the best classes with their softmax probabilities."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device)
        with autocast(self.device, self.precision):
            logits = self.model(self.normalize(images))
        logits = logits.float()
        labels = logits.topk(self.top_k, dim=1).indices  # ranked as evaluation does: probabilities may tie at 1
        shares = logits.softmax(1).gather(1, labels)
        return [
            [(self.classes[label], share) for label, share in zip(*pair, strict=True)]
            for pair in zip(labels.tolist(), shares.tolist(), strict=True)
        ]


def read_ahead(found: Iterable[Found], shape: Shape, num_threads: int, num_ahead: int) -> Iterator[Read]:
    """Each of `found` with its pixels, read by `num_threads` threads (0: none), `num_ahead` before they are asked for.

    Threads suffice, as Pillow decodes and resizes without Python's lock.
    """
    if not num_threads:
        yield from (read(one, shape) for one in found)
        return
    pool, waiting = ThreadPoolExecutor(num_threads), deque[Future[Read]]()
    try:
        for one in found:
            waiting.append(pool.submit(read, one, shape))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def read(found: Found, shape: Shape) -> Read:
    """With the fault of a file that is no image, or is one that cannot be read."""
    if found.fault:
        return found, None
    position = np.zeros(1, dtype=np.int64)
    try:
        return found, ImageSet([], position, position, Files([found.path])).read(0, shape)
    except UnreadableImage as error:
        return Found(found.path, error.reason), None
