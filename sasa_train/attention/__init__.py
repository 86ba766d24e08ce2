"""Local self-attention over a K x K window: tensors in, tensors out; no configuration and no modules."""

from sasa_train.attention.dispatch import attention_weights, local_attention, local_attention_qkv, plain_decompositions

__all__ = ["attention_weights", "local_attention", "local_attention_qkv", "plain_decompositions"]
