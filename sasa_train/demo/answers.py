"""What the page shows: the classes of an image, and the attention weights of one of its pixels by layer and head."""

import base64
import io
import threading
from typing import Any

import numpy as np
import torch
from PIL import Image

from sasa_train.data.datasets import read_image, why_unreadable
from sasa_train.data.transforms import as_shown, val_shape
from sasa_train.device import autocast
from sasa_train.machine import is_out_of_memory
from sasa_train.predict.inference import Predictor
from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.terminal import printable
from sasa_train.trained import TrainedModel, most_probable
from sasa_train.visualize.capture import attention_layers, attention_of
from sasa_train.visualize.geometry import Window, window_at

MAX_BYTES = 64 * 2**20  # of an image file
DIGITS = 6  # decimal places of attention weights


class Demo:
    """Answers the page's questions about a trained model, one at a time.

    Raises:
        ConfigError: the config's device or precision is not available.
    """

    def __init__(self, trained: TrainedModel, top_k: int):
        self.predictor = Predictor(trained, top_k)
        self.path, self.size, self.name = trained.path, trained.input_size[1:], trained.config.model.title
        self.layers = attention_layers(trained.model)
        self._lock = threading.Lock()  # a model whose layers are watched can run only once at a time

    def about(self) -> dict[str, Any]:
        """Describe the model and the limits of an upload."""
        why = f"{self.name} has no local self-attention of ours: the page shows its classes, not where it looks."
        what = {"model": self.name, "checkpoint": printable(self.path), "classes": len(self.predictor.classes)}
        height, width = self.size
        return what | {"height": height, "width": width, "note": "" if self.layers else why, "max_bytes": MAX_BYTES}

    def warm_up(self) -> None:
        """Answer once, so that kernels are compiled before the first visitor waits, and a broken model is found."""
        file = io.BytesIO()
        Image.new("RGB", self.size[::-1]).save(file, "PNG")
        self.look(file.getvalue())

    def finish(self) -> None:
        """Wait until the model is idle, and answer no more."""
        self._lock.acquire()

    def look(self, content: bytes, pixel: tuple[int, int] | None = None) -> dict[str, Any]:
        """Return an image file as the model sees it, its most probable classes, and where one of its pixels looks.

        Args:
            content: the image file's bytes.
            pixel: (row, column) in the image as the model sees it; None takes the centre.

        Returns:
            `image`: a PNG as a data URL; `classes`: pairs of name and probability; `pixel`; `layers`: see `of_layer`.

        Raises:
            ConfigError: the file cannot be read as an image, or the pixel lies outside.
            ExpectedFailure: the model's output or attention is not finite, or memory ran out.
        """
        height, width = self.size
        row, column = pixel or (height // 2, width // 2)
        if not (0 <= row < height and 0 <= column < width):
            last = f"{height - 1},{width - 1}"
            raise ConfigError(f"pixel {row},{column} must lie in the image as the model sees it, 0,0 to {last}")
        try:
            image = self._read(content)
            classes, windows = self._run(image, (row, column))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise ExpectedFailure(f"out of memory ({error})") from error
        layers = [of_layer(name, window) for name, window in windows.items()]
        return {
            "image": as_data_url(as_shown(torch.tensor(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()),
            "classes": classes,
            "pixel": [row, column],
            "layers": layers,
        }

    def _read(self, content: bytes) -> np.ndarray:
        """Decode, resize and crop an image file as for val, to [H, W, C]."""
        try:
            return read_image(io.BytesIO(content), val_shape(self.predictor.data))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders have no common base class
            raise ConfigError(f"cannot be read as an image ({printable(why_unreadable(error))})") from error

    @torch.inference_mode()
    def _run(self, image: np.ndarray, pixel: tuple[int, int]) -> tuple[list[tuple[str, float]], dict[str, Window]]:
        """Return the most probable classes, and the pixel's window in each layer."""
        predictor, pixels = self.predictor, torch.tensor(image).permute(2, 0, 1)[None]
        with self._lock, autocast(predictor.device, predictor.precision):
            logits, weights = attention_of(predictor.model, predictor.normalize(pixels.to(predictor.device)))
        if not logits.isfinite().all():
            raise ExpectedFailure(f"the model's output is not finite in {predictor.precision}")
        [best] = most_probable(logits, predictor.classes, predictor.top_k)
        classes = [(printable(name), share) for name, share in best]
        layers = attention_layers(predictor.model)
        windows = {name: window_at(layers[name], found[0].cpu(), pixel, self.size) for name, found in weights.items()}
        return classes, windows


def of_layer(name: str, window: Window) -> dict[str, Any]:
    """Return a layer's window ready for JSON: its boxes in pixels, and the weights [N, h, w] of each head."""
    boxes = {"box": window.box, "query": window.query_box, "reduction": window.reduction}
    heads = np.round(window.weights.double().numpy(), DIGITS).tolist()
    return {"name": name, **boxes, "heads": heads}


def as_data_url(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
