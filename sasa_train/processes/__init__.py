"""The processes of a run under torchrun: their ranks and the communication between them."""
