"""Train image classifiers with stand-alone self-attention (SASA), and compare them with convolutional models.

This module imports nothing, so that `--help` is fast; `import sasa_train.models` registers the models with timm.
"""

__version__ = "0.1.0"
