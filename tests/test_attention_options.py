"""Every option of `local_attention` in every combination, on each backend, against loops over single numbers."""

import pytest
import torch
from attention_oracle import assert_equals_loops


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_reference_equals_the_loops(first):
    for seed in range(first, first + 10):
        assert_equals_loops(seed, "reference", torch.float64, rtol=1e-11, atol=1e-11)
