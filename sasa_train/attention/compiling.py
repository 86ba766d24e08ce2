"""Compile the Triton kernels that a model needs before its first step, several at a time.

Triton compiles a kernel when it is first launched, which takes seconds, and keeps it in a cache folder
($TRITON_CACHE_DIR). A ResNet-50 needs 21 kernels, most of them in its first backward pass. Several can be compiled at
once by threads of this process, because Triton's compiler releases Python's global lock.
"""

import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from sasa_train.attention import triton_kernels
from sasa_train.attention.cpu import empty_output
from sasa_train.attention.dispatch import empty_kept, pair, run_backward, run_forward, split_projections
from sasa_train.attention.reference import Inputs, Window
from sasa_train.attention.triton_kernels import Launch

MAX_THREADS = 16
SLOW_SECONDS = 1.0  # after this time a progress bar appears


def launches_of(
    model: nn.Module,
    input_size: Sequence[int],
    device: torch.device,
    layout: torch.memory_format,
    autocast: AbstractContextManager,
    dtype: torch.dtype | None = None,
) -> list[Launch]:
    """Return the distinct kernels of local attention in a training step, with the arguments of their first launch.

    `input_size` is an image's channels, height and width. The forward pass runs on tensors without memory, so nothing
    is computed and `device` need not exist. `dtype` replaces the dtype of attention's inputs; it is needed without a
    GPU, where autocast has no effect.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    calls = _Calls()
    with mode:

        def on_device(tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

        state = {name: on_device(x) for name, x in (*model.named_parameters(), *model.named_buffers())}
        images = torch.empty(2, *input_size, device=device).to(memory_format=layout)
        # In evaluation mode, no layer draws random numbers or exchanges statistics with other processes.
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad(), autocast, calls:
                torch.func.functional_call(model, state, (images,))
        finally:
            for module, is_training in modes:
                module.training = is_training
    found: dict[Hashable, Launch] = {}
    for projections, *others in calls.of_attention:
        projections = projections if dtype is None else projections.to(dtype)
        for launch in step_launches(projections, *others):
            found.setdefault(_identity(launch), launch)
    return list(found.values())


def step_launches(
    projections: Tensor, rel_height: Tensor | None, rel_width: Tensor | None,
    kernel_size: Sequence[int], dilation: Sequence[int], border: str, scale: float, null_key: bool,
    stride: int,
) -> list[Launch]:  # fmt: skip
    """Return the kernel launches of `local_attention_qkv`, forward and backward, for tensors with these shapes.

    There are none for options that the kernels do not support.
    """

    def meta(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    projections, window = meta(projections), Window(*pair(kernel_size), border, scale, null_key)
    inputs = Inputs(*split_projections(projections), *(None if x is None else meta(x) for x in (rel_height, rel_width)))
    if triton_kernels.unsupported(inputs, window) is not None:
        return []
    output, kept = empty_output(inputs.value, stride), empty_kept(inputs.value, stride, "triton")
    full = output if stride == 1 else kept[1]
    with triton_kernels.collected_launches() as launches:
        run_forward(triton_kernels, inputs, output, *kept, window, pair(dilation), stride)
        grads = split_projections(torch.empty_like(projections))
        grad_output = torch.empty_like(output)
        run_backward(triton_kernels, grad_output, full, kept[0], inputs, window, pair(dilation), stride, grads)
    return launches


def compile_ahead(launches: Sequence[Launch], is_quiet: bool | None = None) -> list[Any]:
    """Compile kernels, several at a time, or load them from Triton's cache; return them in the same order.

    A progress bar appears if this takes more than a second, unless `is_quiet` (None: if stderr is not a terminal).
    """
    num_threads = max(1, min(MAX_THREADS, len(launches), os.cpu_count() or 1))
    bar = tqdm(
        total=len(launches), desc="compiling attention kernels", unit="kernel", delay=SLOW_SECONDS, disable=is_quiet,
        dynamic_ncols=True,
        leave=False,
    )  # fmt: skip
    with bar, ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(_compile, launch) for launch in launches]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _compile(launch: Launch) -> Any:
    return launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)


class _Calls(TorchDispatchMode):
    """Record the arguments of each call to `local_attention_qkv`."""

    def __init__(self) -> None:
        super().__init__()
        self.of_attention: list[tuple] = []

    def __torch_dispatch__(self, function: Callable, types: Any, arguments: tuple = (), options: Any = None) -> Any:
        if function is torch.ops.sasa_train.local_attention_qkv.default:
            *call, backend = arguments
            if backend in ("auto", "triton"):
                self.of_attention.append(tuple(call))
        return function(*arguments, **(options or {}))


def _identity(launch: Launch) -> Hashable:
    """Return what determines the compiled code: dtypes, constants, and which integers are 1 or divisible by 16."""
    unspecialized = {p.num for p in launch.kernel.params if p.do_not_specialize}

    def kind(x: Any) -> Hashable:
        if isinstance(x, Tensor):
            return x.dtype, x.storage_offset() * x.itemsize % 16 == 0
        if isinstance(x, tuple):
            return tuple(map(kind, x))
        return (x == 1, x % 16 == 0) if isinstance(x, int) else x

    kinds = tuple(None if i in unspecialized else kind(x) for i, x in enumerate(launch.arguments))
    return launch.kernel.__name__, kinds, tuple(launch.options.items())
