"""Names that libraries keep to themselves and we lean on: a failure says which library changed, and what uses it.

Each stands behind one line of the package.
"""

import torch
from torch import nn

# ---- torch


def test_a_storage_on_the_meta_device_has_an_identity():
    """`models/counting.py`: whether autograd saved a tensor that is counted already; the public address is 0 there."""
    first, second = torch.empty(2, device="meta"), torch.empty(2, device="meta")
    assert first.untyped_storage()._cdata == first.view(1, 2).untyped_storage()._cdata
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata


def test_a_module_keeps_its_hooks_in_four_dicts():
    """`models/stem_norm.py`: the kernel must not run in place of a module that somebody listens to."""
    module = nn.BatchNorm2d(2)
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert [len(getattr(module, name)) for name in names] == [0, 0, 0, 0]
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert [len(getattr(module, name)) for name in names] == [1, 1, 1, 1]


def test_every_batch_norm_is_of_one_class():
    """`models/build.py`, `training/batch_norm.py`, `processes/collectives.py`: of any number of dimensions."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    assert all(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)


def test_dynamo_limits_how_often_it_compiles_again():
    """`benchmark/contenders.py`: FlexAttention is compiled once a shape."""
    assert isinstance(torch._dynamo.config.recompile_limit, int)
