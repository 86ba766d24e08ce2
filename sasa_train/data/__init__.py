"""Images on disk, in tar shards or embedded -> batches on the device."""
