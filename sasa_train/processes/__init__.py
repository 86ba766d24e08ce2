"""The processes of a run under torchrun: which one this is, and what they tell each other."""
