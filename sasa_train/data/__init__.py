"""Data loading: from images on disk, in tar shards or in the package to batches on the device."""
