"""Compiled CPU kernels, `csrc/*.cpp`, called through ctypes: the wheel's or, without them, built at first use.

This module calls `csrc/local_attention.cpp` for square windows up to 15 x 15, `csrc/local_attention_any.cpp` for the
options that it lacks; stem.py calls `csrc/attention_stem.cpp`. A library is built in a few seconds for the instruction
set of the CPU (AVX-512, AVX2 or baseline): for the first source, one for each kernel_size, and for the stem, one for
each number of input channels. `$SASA_TRAIN_CACHE` sets the folder that keeps them and `$CXX` the compiler, which then
builds them even if the wheel has them.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sasa_train.attention import kernel_builds
from sasa_train.attention.kernel_builds import (
    BUILD_SECONDS,
    MAX_KERNEL_SIZE,
    OPENMP,
    Library,
    find_compiler,
    version_of,
)
from sasa_train.attention.reference import BORDERS, Grads, Inputs, Window, table_gradient

log = logging.getLogger(__name__)

MAX_LANES = 16
UNFINISHED = re.compile(
    r"(local_attention(_any)?|attention_stem)-[0-9a-f]{16}-\w+\.tmp"
)  # as `_add_to` names its files
MAX_LIBRARY_BYTES = 64 << 20  # a library has about 100 KB
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # other dtypes are converted
_TENSORS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value")


class _Loaded(NamedTuple):
    functions: ctypes.CDLL
    compiler: str  # first line of its version, and a digest of what it built: a wrapper may add flags


class _Strided(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "bnhwd"))


class _Problem(ctypes.Structure):
    """Mirror of the struct `Problem` in the C++ source, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "num_heads", "height", "width", "head_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "border")),
        ("scale", ctypes.c_double),
        ("null_key", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in ("dtype", "num_threads", "rel_per_head")),
        *((name, ctypes.c_int64) for name in ("rel_height_rows", "rel_width_rows", "stride")),
        *((name, _Strided) for name in _TENSORS),
        ("statistics", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("rel_height", "rel_width", "grad_rel_height", "grad_rel_width")),
        ("workspace", ctypes.c_void_p),
    )


def unavailable(inputs: Inputs, window: Window) -> str | None:
    """Build the kernel if necessary; return the reason why it cannot run on these tensors, or None if it can."""
    query = inputs.query
    if query.device.type != "cpu":
        return f"the tensors are on {query.device.type}"
    if query.dtype not in (*DTYPES, torch.float16):
        return f"the tensors are {query.dtype}; the kernel computes in float32"
    return why_not_built(*library_for(inputs, window))


def library_for(inputs: Inputs, window: Window) -> tuple[str, int]:
    """Return the source and the size of the library that computes these tensors."""
    is_square = window.rows == window.columns <= MAX_KERNEL_SIZE
    if is_square and window.border != "shift" and inputs.query.shape[-1] == inputs.value.shape[-1]:
        return "local_attention", window.rows
    return "local_attention_any", 0


def empty_output(value: Tensor, stride: int) -> Tensor:
    """Return an empty tensor [B, N, ceil(H / stride), ceil(W / stride), D] with the stride order of `value`."""
    return torch.empty_like(value[:, :, ::stride, ::stride])


def statistics_shape(query: Tensor) -> tuple[int, int, int, int]:
    """Return the shape [planes, H, 2, W] of the statistics: two float32 values per head and position, in lane order."""
    batch, num_heads, height, width, _ = query.shape
    return (batch * num_heads + MAX_LANES - 1) // MAX_LANES * MAX_LANES, height, 2, width


def local_attention_forward(
    inputs: Inputs, output: Tensor, statistics: Tensor, unpooled: Tensor, window: Window, stride: int
) -> None:
    """Write the output, and the statistics for the backward pass; nothing is kept in `unpooled`.

    The output is [B, N, H, W, Dv]. With a stride of 2, it is averaged over 2 x 2 positions, or fewer at the end
    of an odd dimension. A window's statistics are its largest score and 1 / sum(exp(score - largest)); see
    `statistics_shape`.
    """
    query = inputs.query
    if query.dtype not in DTYPES:
        exact = torch.empty_like(output, dtype=torch.float32)
        local_attention_forward(_float32(inputs), exact, statistics, unpooled, window, stride)
        output.copy_(exact)
        return
    # The kernel never writes the lanes beyond the last plane, so they are set to zero first.
    if query.shape[0] * query.shape[1] % MAX_LANES:
        statistics.zero_()
    problem, _tables_alive = _problem(inputs, window, stride, statistics)
    problem.output = _strided(output)
    run(*library_for(inputs, window), "forward", problem)


def local_attention_backward(
    grad_output: Tensor,
    output: Tensor | None,
    statistics: Tensor,
    inputs: Inputs,
    window: Window,
    stride: int,
    grads: Grads,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the gradients of query, key and value to `grads`, and return those of rel_height and rel_width.

    `statistics` are those of the forward pass, whose output is not needed.
    """
    if inputs.query.dtype not in DTYPES:
        exact = (grads[0].float(), None if grads[1] is None else grads[1].float(), grads[2].float())
        options = (window, stride, exact)
        grad_rel = local_attention_backward(grad_output.float(), output, statistics, _float32(inputs), *options)
        for grad, x in zip(grads, exact, strict=True):
            if grad is not None and x is not None:
                grad.copy_(x)
        return grad_rel
    problem, tables = _problem(inputs, window, stride, statistics)
    problem.grad_output = _strided(grad_output)
    problem.grad_query, problem.grad_key, problem.grad_value = map(_strided, grads)
    grad_tables = [torch.empty_like(table) for table in tables]
    if grad_tables:
        problem.grad_rel_height, problem.grad_rel_width = (grad.data_ptr() for grad in grad_tables)
    run(*library_for(inputs, window), "backward", problem)
    if inputs.rel_height is None or inputs.rel_width is None:
        return None, None
    return table_gradient(grad_tables[0], inputs.rel_height), table_gradient(grad_tables[1], inputs.rel_width)


def _float32(inputs: Inputs) -> Inputs:
    query, key, value = inputs[:3]
    return inputs._replace(query=query.float(), key=None if key is None else key.float(), value=value.float())


def _problem(inputs: Inputs, window: Window, stride: int, statistics: Tensor) -> tuple[_Problem, list[Tensor]]:
    """Return the C++ struct and the contiguous float32 embeddings it points to; the caller must keep these alive."""
    query, key, value, rel_height, rel_width = inputs
    problem = _Problem(*query.shape, value.shape[-1], window.rows, window.columns, BORDERS.index(window.border))
    problem.scale, problem.null_key = window.scale, window.null_key
    problem.stride, problem.dtype = stride, DTYPES[query.dtype]
    problem.num_threads, problem.statistics = torch.get_num_threads(), statistics.data_ptr()
    problem.query, problem.key, problem.value = map(_strided, (query, key, value))
    if rel_height is None or rel_width is None:
        return problem, []
    tables = [rel.to(torch.float32) for rel in (rel_height, rel_width)]
    if tables[0].dim() != tables[1].dim():  # the kernel requires both to be shared or both per head
        tables = [rel.expand(problem.num_heads, -1, -1) for rel in tables]
    tables = [rel.contiguous() for rel in tables]
    problem.rel_per_head = tables[0].dim() == 3
    problem.rel_height_rows, problem.rel_width_rows = window.table_rows()
    problem.rel_height, problem.rel_width = (rel.data_ptr() for rel in tables)
    return problem, tables


def _strided(tensor: Tensor | None) -> _Strided:
    return _Strided() if tensor is None else _Strided(tensor.data_ptr(), *tensor.stride())


# ---- running, building and loading a source


def why_not_built(source: str, size: int) -> str | None:
    """Build a source's library for this size if necessary; return the reason if this fails, otherwise None."""
    library = _library(source, size, _instruction_set())
    return library if isinstance(library, str) else None


def describe_build(source: str, size: int) -> str:
    """Return the instruction set and compiler of a source's library, or the reason why it cannot be built."""
    library = _library(source, size, instruction_set := _instruction_set())
    return library if isinstance(library, str) else f"cpu kernel, {instruction_set}, {library.compiler}"


def run(source: str, size: int, function: str, problem: Any) -> None:
    """Allocate scratch memory and call `sasa_forward` or `sasa_backward` from the library of a source."""
    library = _library(source, size, _instruction_set())
    if isinstance(library, str):
        raise RuntimeError(f"backend='cpu' cannot run: {library}")
    problem.workspace = _workspace(getattr(library.functions, f"sasa_{function}_bytes")(ctypes.byref(problem)))
    getattr(library.functions, f"sasa_{function}")(ctypes.byref(problem))


_kept = threading.local()


def _workspace(num_bytes: int) -> int:
    """Return the address of at least `num_bytes` of scratch memory, which the calling thread keeps for later calls."""
    # A kernel needs a few MB per core. Getting new pages from the system would take longer than the kernel itself.
    if getattr(_kept, "scratch", None) is None or len(_kept.scratch) < num_bytes:
        _kept.scratch = torch.empty(num_bytes, dtype=torch.uint8)
    return _kept.scratch.data_ptr()


def _instruction_set() -> str:
    """Return the widest instruction set available, as detected by torch and limited by ATEN_CPU_CAPABILITY."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    capability = torch.backends.cpu.get_cpu_capability()
    return "avx512" if capability.startswith(("AVX512", "AVX10")) else "avx2" if capability == "AVX2" else "baseline"


@functools.cache
def _library(source: str, size: int, instruction_set: str) -> _Loaded | str:
    """Return the loaded library, or the reason why it cannot be built or loaded."""
    library = Library(source, size, instruction_set)
    if (loaded := _prebuilt(library)) is not None:
        return loaded
    if (compiler := find_compiler()) is None:
        return "no C++ compiler found (install g++, or name one in $CXX)"
    if isinstance(version := version_of(compiler), Exception):
        return f"{compiler} could not build it: {version}"
    reason = ""
    for compile_flags, link_flags in OPENMP:
        try:
            built = _built(source, compiler, version, kernel_builds.flags_of(library, compile_flags), link_flags)
            return _Loaded(_load(built), _describe(version, built))
        except subprocess.TimeoutExpired as error:  # the next flags would hardly help
            return f"{compiler} could not build it: {error}"
        except AttributeError as error:  # such as a wrapper of a compiler that hides the symbols
            built.unlink(missing_ok=True)
            reason = reason or f"{compiler} built a library without our functions: {error}"
        except (OSError, subprocess.SubprocessError) as error:
            reason = reason or f"{compiler} could not build it: {error} {getattr(error, 'stderr', None) or ''}".strip()
    return reason


def _prebuilt(library: Library) -> _Loaded | None:
    """Return the wheel's library, loaded, or None if it has none for these sources and this size.

    `$CXX` asks for one that is built here. A library that cannot be loaded is named in a warning.
    """
    if os.environ.get("CXX") or (found := kernel_builds.prebuilt(library)) is None:
        return None
    path, version = found
    try:
        # What a disk damaged could end the process when it is loaded.
        if not path.stem.endswith(kernel_builds.digest(path.read_bytes())):
            raise OSError("it is damaged; install sasa_train again")
        return _Loaded(_load(path), f"prebuilt, {_describe(version, path)}")
    except (OSError, AttributeError) as error:
        log.warning(f"the installed CPU kernel {path} cannot be used, so that one is built: {error}")
        return None


def _describe(version: str, built: Path) -> str:
    return f"{version.partition(chr(10))[0]}, built {built.stem[-16:-8]}"


def compiler_version() -> str | None:
    """Return the first line of the C++ compiler's version, or None if there is no compiler that runs."""
    version = version_of(find_compiler() or "")
    return None if isinstance(version, Exception) else version.partition("\n")[0]


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    results = {"forward": None, "backward": None, "forward_bytes": ctypes.c_int64, "backward_bytes": ctypes.c_int64}
    for name, result in results.items():
        function = getattr(library, f"sasa_{name}")
        function.argtypes, function.restype = (ctypes.c_void_p,), result
    return library


def _built(source: str, compiler: str, version: str, flags: tuple[str, ...], link_flags: tuple[str, ...]) -> Path:
    """Return the path of the library in the cache; compile it first if it is missing or damaged."""
    # The file name contains a hash of the library's own bytes, so that no damaged library is loaded.
    name, folder = kernel_builds.name_of(source, version, flags, link_flags), _cache_folder()
    compile_to = functools.partial(kernel_builds.compile_library, source, compiler, flags, link_flags)
    try:
        return _kept_in(folder, name) or _add_to(folder, name, compile_to)
    except OSError as error:  # of the folder: a compiler that fails raises SubprocessError
        return _add_to(_temporary_cache(folder, str(error)), name, compile_to)


def _kept_in(folder: Path, name: str) -> Path | None:
    """Return the path of an intact library in the folder, if there is one; remove what else has its name."""
    for kept in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if _is_intact(kept):
                return kept
        with contextlib.suppress(OSError):  # a folder stays
            kept.unlink()
    return None


def _is_intact(library: Path) -> bool:
    """Return whether a file is private and has the bytes from which its name was made; never wait for a pipe."""
    flags = os.O_NONBLOCK | os.O_NOFOLLOW
    with open(library, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        found = os.fstat(file.fileno())
        if not (stat.S_ISREG(found.st_mode) and _is_private(found) and found.st_size <= MAX_LIBRARY_BYTES):
            return False
        return library.stem.endswith(hashlib.file_digest(file, "sha256").hexdigest()[:16])


def _add_to(folder: Path, name: str, compile_to: Callable[[str], None]) -> Path:
    """Compile a library, add it to the folder and return its path."""
    for stale in folder.glob("*.tmp"):  # of a build that was killed, or another program's
        if not UNFINISHED.fullmatch(stale.name):
            continue
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3 * BUILD_SECONDS:
                stale.unlink()
    handle, aside = tempfile.mkstemp(prefix=f"{name}-", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        compile_to(aside)
        os.chmod(aside, 0o700)  # whatever the umask
        built = folder / f"{name}-{kernel_builds.digest(Path(aside).read_bytes())}.so"
        # If two processes build at the same time, the work is done twice, but the rename ensures that neither
        # loads a partial file.
        os.replace(aside, built)
    finally:
        Path(aside).unlink(missing_ok=True)
    return built


def _cache_folder() -> Path:
    """Return the cache folder or, if others can write to it or this process cannot, a private temporary folder."""
    # A library is code. One that somebody else could have put there must not be loaded.
    given = os.environ.get("SASA_TRAIN_CACHE")
    named = Path(given or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sasa_train")
    try:
        # expanduser fails without HOME for a user without a name. The path must be absolute, because dlopen searches
        # LD_LIBRARY_PATH for a name without a slash.
        folder = named.expanduser().absolute()
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            missing.mkdir(
                exist_ok=True, mode=0o700
            )  # `parents=True` would let the umask decide who may write to ~/.cache
        if folder.is_symlink():
            reason = "it is a symbolic link ($SASA_TRAIN_CACHE can name its target)"
        elif not _is_private(folder.lstat()):
            reason = "it belongs to somebody else, or others may write to it (chmod 700 would help)"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "it cannot be written to"
        else:
            return folder
    except (OSError, RuntimeError) as error:
        reason = str(error)
    return _temporary_cache(named, reason)


@functools.cache
def _temporary_cache(unusable: Path, reason: str) -> Path:
    log.warning(f"the CPU kernels are built for this process alone, because {unusable} cannot be used: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="sasa_train-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_private(found: os.stat_result) -> bool:
    """Return whether a file or folder belongs to this user, and nobody else may write to it."""
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode) and not found.st_mode & 0o022
