"""Functions for local self-attention over a K x K window, which operate on plain tensors."""

from sasa_train.attention.dispatch import attention_weights, local_attention, local_attention_qkv, plain_decompositions

__all__ = ["attention_weights", "local_attention", "local_attention_qkv", "plain_decompositions"]
