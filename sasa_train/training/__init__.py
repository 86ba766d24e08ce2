"""A training run, from a config to a finished run folder. run.py contains the overall sequence."""
