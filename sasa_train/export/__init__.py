"""Trained models in other tools' formats, each checked against PyTorch before it is there."""
