"""Speed and memory of the op, of layers and of whole models: the command `sasa-benchmark`."""
