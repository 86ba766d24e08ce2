"""A command's processes: their ranks under torchrun, the communication between them, and their packages."""
