"""Local self-attention over a K x K window: tensors in, tensors out; no configuration and no modules."""

from sasa_train.attention.dispatch import local_attention

__all__ = ["local_attention"]
