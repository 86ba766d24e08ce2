"""Functions that compute local self-attention over a K x K window, given plain tensors."""

from sasa_train.attention.dispatch import attention_weights, local_attention, local_attention_qkv, plain_decompositions

__all__ = ["attention_weights", "local_attention", "local_attention_qkv", "plain_decompositions"]
