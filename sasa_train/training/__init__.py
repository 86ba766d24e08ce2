"""A training run, from a config to a finished run folder; run.py tells the order of events."""
