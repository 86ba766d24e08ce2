"""The compiled CPU kernels: built from `csrc/*.cpp` at first use, kept in a cache, called by ctypes.

Called here is `csrc/local_attention.cpp`; stem.py calls `csrc/attention_stem.cpp`. One library a kernel_size (for the
stem: a number of input channels) and instruction set (AVX-512, AVX2, baseline; whatever this CPU runs), a few seconds
each. Its name holds a hash of the sources, the flags and the compiler, so that nothing stale is loaded, and the hash of
its own bytes, so that nothing damaged is. It appears by a rename: processes that build at once do the same work twice
and no harm. `$SASA_TRAIN_CACHE` moves the folder, `$CXX` names the compiler.

OpenMP: the library is linked without a runtime of its own and takes the one that torch has loaded; a second one would
keep a second pool of threads spinning beside torch's.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).with_name("csrc")
HEADER = SOURCES / "vectors.h"
SIZES = {"local_attention": "KERNEL_SIZE", "attention_stem": "IN_CHANNELS"}  # what each source is compiled for
MAX_KERNEL_SIZE = 15
MAX_LANES = 16
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared", "-fno-exceptions", "-w")
INSTRUCTION_SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
# (flags to compile, flags to link), first that builds and loads: torch's OpenMP, the compiler's own, one thread.
OPENMP = ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), ((), ()))
COMPILERS = ("g++", "c++", "clang++")
BUILD_SECONDS = 300
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # others are converted
_TENSORS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")


class _Strided(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "bnhwd"))


class _Problem(ctypes.Structure):
    """`Problem` of the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "num_heads", "height", "width", "head_dim")),
        *((name, ctypes.c_int64) for name in ("zero_border", "dtype", "num_threads", "rel_per_head", "stride")),
        *((name, _Strided) for name in _TENSORS),
        ("statistics", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("rel_height", "rel_width", "grad_rel_height", "grad_rel_width")),
        ("workspace", ctypes.c_void_p),
    )


def unavailable(query: Tensor, kernel_size: int) -> str | None:
    """Why the kernel cannot run on these tensors, or None where it can; builds it where it is not built yet."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type}"
    if query.dtype not in (*DTYPES, torch.float16):
        return f"the tensors are {query.dtype}; the kernel computes in float32"
    if kernel_size > MAX_KERNEL_SIZE:
        return f"kernel_size={kernel_size} is above {MAX_KERNEL_SIZE}"
    return why_not_built("local_attention", kernel_size)


def empty_output(value: Tensor, stride: int) -> Tensor:
    """[B, N, ceil(H / stride), ceil(W / stride), D], order of strides as `value`."""
    return torch.empty_like(value[:, :, ::stride, ::stride])


def statistics_shape(query: Tensor) -> tuple[int, int, int, int]:
    """Two float32 numbers a head and position, [planes, H, 2, W], in the order of the kernel's lanes."""
    batch, num_heads, height, width, _ = query.shape
    return (batch * num_heads + MAX_LANES - 1) // MAX_LANES * MAX_LANES, height, 2, width


def local_attention_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """The attended values, [B, N, H, W, D], dtype and order of strides as `value`; and what the backward pass keeps.

    With a stride of 2 each 2 x 2 of them is averaged, those at an odd side's end alone: weights first, then values.

    That is the largest score of each window and 1 / sum(exp(score - largest)), as `statistics_shape` and the kernel
    have it.
    """
    if query.dtype not in DTYPES:
        inputs = (query.float(), None if key is None else key.float(), value.float(), rel_height, rel_width)
        exact, statistics = local_attention_forward(*inputs, kernel_size, border, stride)
        return empty_output(value, stride).copy_(exact), statistics
    output = empty_output(value, stride)
    is_full = query.shape[0] * query.shape[1] % MAX_LANES == 0  # else some lanes are never written
    statistics = (query.new_empty if is_full else query.new_zeros)(statistics_shape(query), dtype=torch.float32)
    problem = _problem(query, border, stride, statistics)
    problem.query, problem.key, problem.value, problem.output = map(_strided, (query, key, value, output))
    tables = _set_rel(problem, rel_height, rel_width)
    run("local_attention", kernel_size, "forward", problem)
    del tables  # alive until here
    return output, statistics


def local_attention_backward(
    grad_output: Tensor,
    statistics: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor,
    rel_height: Tensor | None,
    rel_width: Tensor | None,
    kernel_size: int,
    border: str,
    stride: int,
    grads: tuple[Tensor, Tensor | None, Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of query, key and value to `grads`, and return those of rel_height and rel_width.

    `statistics` are from forward.
    """
    grad_query, grad_key, grad_value = grads
    if query.dtype not in DTYPES:
        inputs = (query.float(), None if key is None else key.float(), value.float(), rel_height, rel_width)
        exact = (grad_query.float(), None if grad_key is None else grad_key.float(), grad_value.float())
        options = (kernel_size, border, stride, exact)
        grad_rel = local_attention_backward(grad_output.float(), statistics, *inputs, *options)
        for grad, x in zip(grads, exact, strict=True):
            if grad is not None and x is not None:
                grad.copy_(x)
        return grad_rel
    problem = _problem(query, border, stride, statistics)
    problem.query, problem.key, problem.value = _strided(query), _strided(key), _strided(value)
    problem.grad_output = _strided(grad_output)
    problem.grad_query, problem.grad_key, problem.grad_value = map(_strided, grads)
    tables = _set_rel(problem, rel_height, rel_width)
    grad_tables = [torch.empty_like(table) for table in tables]
    if grad_tables:
        problem.grad_rel_height, problem.grad_rel_width = (grad.data_ptr() for grad in grad_tables)
    run("local_attention", kernel_size, "backward", problem)
    if rel_height is None or rel_width is None:
        return None, None
    return _like(grad_tables[0], rel_height), _like(grad_tables[1], rel_width)


def _problem(query: Tensor, border: str, stride: int, statistics: Tensor) -> _Problem:
    fields = {"zero_border": border == "zero", "dtype": DTYPES[query.dtype], "num_threads": torch.get_num_threads()}
    return _Problem(*query.shape, **fields, stride=stride, statistics=statistics.data_ptr())


def _strided(tensor: Tensor | None) -> _Strided:
    return _Strided() if tensor is None else _Strided(tensor.data_ptr(), *tensor.stride())


def _set_rel(problem: _Problem, rel_height: Tensor | None, rel_width: Tensor | None) -> list[Tensor]:
    """The tables as the kernel reads them, contiguous float32; the caller keeps them alive."""
    if rel_height is None or rel_width is None:
        return []
    tables = [rel.to(torch.float32) for rel in (rel_height, rel_width)]
    if tables[0].dim() != tables[1].dim():  # one shared, one a head: the kernel knows one of the two
        tables = [rel.expand(problem.num_heads, -1, -1) for rel in tables]
    tables = [rel.contiguous() for rel in tables]
    problem.rel_per_head = tables[0].dim() == 3
    problem.rel_height, problem.rel_width = (rel.data_ptr() for rel in tables)
    return tables


def _like(grad: Tensor, rel: Tensor) -> Tensor:
    """The gradient of a table that the kernel read one a head, shared or in half precision."""
    return (grad if grad.dim() == rel.dim() else grad.sum(0)).to(rel.dtype)


# ---- running, building and loading a source


def why_not_built(source: str, size: int) -> str | None:
    """Why there is no library of a source for this size, or None; builds it where it is not built yet."""
    library = _library(source, size, _instruction_set())
    return library if isinstance(library, str) else None


def run(source: str, size: int, function: str, problem: Any) -> None:
    """Call `sasa_forward` or `sasa_backward` of a source, with the workspace that it asks for."""
    library = _library(source, size, _instruction_set())
    if isinstance(library, str):
        raise RuntimeError(f"backend='cpu' cannot run: {library}")
    problem.workspace = _workspace(getattr(library, f"sasa_{function}_bytes")(ctypes.byref(problem)))
    getattr(library, f"sasa_{function}")(ctypes.byref(problem))


_kept = threading.local()


def _workspace(num_bytes: int) -> int:
    """The address of scratch that a thread keeps: some MB a core, fresh pages for which would cost more than a call."""
    if getattr(_kept, "scratch", None) is None or len(_kept.scratch) < num_bytes:
        _kept.scratch = torch.empty(num_bytes, dtype=torch.uint8)
    return _kept.scratch.data_ptr()


def _instruction_set() -> str:
    """The widest that both this CPU and its operating system support, as torch finds it (ATEN_CPU_CAPABILITY too)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    capability = torch.backends.cpu.get_cpu_capability()
    return "avx512" if capability.startswith(("AVX512", "AVX10")) else "avx2" if capability == "AVX2" else "baseline"


@functools.cache
def _library(source: str, size: int, instruction_set: str) -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none."""
    compiler = os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        return "no C++ compiler found (install g++, or name one in $CXX)"
    reason = ""
    for compile_flags, link_flags in OPENMP:
        flags = (*FLAGS, *INSTRUCTION_SETS[instruction_set], f"-D{SIZES[source]}={size}", *compile_flags)
        try:
            return _load(_built(source, compiler, flags, link_flags))
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or f"{compiler} could not build it: {error} {getattr(error, 'stderr', None) or ''}".strip()
    return reason


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    results = {"forward": None, "backward": None, "forward_bytes": ctypes.c_int64, "backward_bytes": ctypes.c_int64}
    for name, result in results.items():
        function = getattr(library, f"sasa_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p,), result
    return library


def _built(source: str, compiler: str, flags: tuple[str, ...], link_flags: tuple[str, ...]) -> Path:
    """The path of the library in the cache; compiled where it is missing or damaged."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    path = SOURCES / f"{source}.cpp"
    key = _digest("\0".join([path.read_text(), HEADER.read_text(), version, *flags, "", *link_flags]).encode())
    folder = _cache_folder()
    for kept in folder.glob(f"{source}-{key}-*.so"):
        if kept.stem.endswith(_digest(kept.read_bytes())):
            return kept
        kept.unlink(missing_ok=True)
    handle, aside = tempfile.mkstemp(suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        command = [compiler, *flags, str(path), "-o", aside, *link_flags]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS)
        built = folder / f"{source}-{key}-{_digest(Path(aside).read_bytes())}.so"
        os.replace(aside, built)
    finally:
        Path(aside).unlink(missing_ok=True)
    return built


def _cache_folder() -> Path:
    root = os.environ.get("SASA_TRAIN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sasa_train"
    folder = Path(root).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
