"""Images on disk or embedded -> batches on the device."""

from sasa_train.data.loader import Loaders, build_loaders

__all__ = ["Loaders", "build_loaders"]
