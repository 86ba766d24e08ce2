"""Train image classifiers built from stand-alone self-attention (SASA), and compare them with convolutions.

Nothing is imported here, so that `--help` is instant; `import sasa_train.models` registers the models with timm.
"""

__version__ = "0.1.0"
