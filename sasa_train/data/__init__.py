"""Data loading: turns images (on disk, in tar shards or in the package) into batches on the device."""
