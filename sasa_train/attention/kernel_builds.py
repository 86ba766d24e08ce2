"""How the CPU kernels in `csrc/` are compiled, and where the wheel keeps those that are compiled in advance.

cpu.py compiles a library at first use. setup.py compiles all of `COMMON` into the wheel, in `PREBUILT`; it loads this
file alone, before torch and the package are installed.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import DEVNULL
from typing import NamedTuple

SOURCES = Path(__file__).with_name("csrc")
PREBUILT = Path(__file__).with_name("prebuilt")
HEADERS = ("vectors.h", "planes.h")
SIZES = {"local_attention": "KERNEL_SIZE", "attention_stem": "IN_CHANNELS"}  # macro of each source that needs a size
MAX_KERNEL_SIZE = 15  # of local_attention.cpp
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-fno-exceptions", "-w")
INSTRUCTION_SETS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "baseline": (),
}
# Pairs of compile and link flags, for torch's OpenMP, the compiler's own OpenMP and a single thread. The first pair
# that builds and loads is used. If possible, the library is linked without OpenMP and uses the runtime that torch has
# already loaded, because a second OpenMP runtime would keep a second thread pool spinning alongside torch's.
OPENMP = ((("-fopenmp",), ()), (("-fopenmp",), ("-fopenmp",)), ((), ()))
COMPILERS = ("g++", "c++", "clang++")
VERSION_SECONDS, BUILD_SECONDS = 20, 300
# What a manylinux wheel may need from the system, apart from symbols of the C library.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}


class Library(NamedTuple):
    source: str
    size: int  # 0 for a source without one
    instruction_set: str


# All windows, and the stem for grey and RGB images; the slowest to compile come first.
COMMON = tuple(
    Library(source, size, instruction_set)
    for instruction_set in INSTRUCTION_SETS
    for source, sizes in {
        "local_attention": range(MAX_KERNEL_SIZE, 0, -2),
        "local_attention_any": (0,),
        "attention_stem": (3, 1),
    }.items()
    for size in sizes
)


def find_compiler() -> str | None:
    """Return `$CXX`, or the first compiler that is installed."""
    return os.environ.get("CXX") or next((name for name in COMPILERS if shutil.which(name)), None)


@functools.cache
def version_of(compiler: str) -> str | Exception:
    """Return what `--version` prints, or the reason why the compiler does not run."""
    command = [compiler, "--version"]
    try:
        return subprocess.run(
            command,
            stdin=DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
            timeout=VERSION_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return error


def flags_of(library: Library, compile_flags: tuple[str, ...]) -> tuple[str, ...]:
    """Return all flags that compile a library, given those for OpenMP."""
    source, size, instruction_set = library
    macro = (f"-D{SIZES[source]}={size}",) if source in SIZES else ()
    return (*FLAGS, *INSTRUCTION_SETS[instruction_set], *macro, *compile_flags)


def name_of(source: str, version: str, flags: tuple[str, ...], link_flags: tuple[str, ...]) -> str:
    """Return a file name with a hash of the sources, flags and compiler, so that no stale library is loaded."""
    texts = [(SOURCES / name).read_text() for name in (f"{source}.cpp", *HEADERS)]
    return f"{source}-{digest(chr(0).join([*texts, version, '-c', *flags, '-shared', *link_flags]).encode())}"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compile_library(
    source: str, compiler: str, flags: tuple[str, ...], link_flags: tuple[str, ...], target: str | Path
) -> None:
    """Compile and link a source; raise SubprocessError or OSError if this fails."""
    run = functools.partial(
        subprocess.run, stdin=DEVNULL, capture_output=True, text=True, check=True, timeout=BUILD_SECONDS
    )
    # In two steps: -fopenmp in a command that also links would make the library load the compiler's own OpenMP.
    with tempfile.TemporaryDirectory(prefix="sasa_train-") as folder:
        run([compiler, *flags, "-c", SOURCES / f"{source}.cpp", "-o", f"{folder}/{source}.o"])
        run([compiler, "-shared", f"{folder}/{source}.o", "-o", target, *link_flags])


# ---- the libraries in the wheel


def prebuilt(library: Library) -> tuple[Path, str] | None:
    """Return the wheel's library for these sources and flags, and its compiler's version, or None if it has none."""
    try:
        version = (PREBUILT / "compiler.txt").read_text(encoding="utf-8")
    except OSError:  # of an editable install, or a wheel for every platform
        return None
    compile_flags, link_flags = OPENMP[0]
    name = name_of(library.source, version, flags_of(library, compile_flags), link_flags)
    return next(((path, version) for path in PREBUILT.glob(f"{name}-*.so")), None)


def build_prebuilt(folder: Path, compiler: str, libraries: Iterable[Library] = COMMON) -> None:
    """Compile libraries into a new folder; raise SubprocessError or OSError if one cannot be compiled."""
    if isinstance(version := version_of(compiler), Exception):
        raise version
    folder.mkdir(parents=True)
    (folder / "compiler.txt").write_text(version, encoding="utf-8")
    compile_flags, link_flags = OPENMP[0]

    def build(library: Library) -> None:
        flags = flags_of(library, compile_flags)
        name = name_of(library.source, version, flags, link_flags)
        compile_library(library.source, compiler, flags, link_flags, aside := folder / f"{name}.tmp")
        if b"__kmpc_" in (content := aside.read_bytes()):
            raise OSError("it compiles for LLVM's OpenMP, but torch has GCC's")
        aside.chmod(0o755)
        aside.rename(folder / f"{name}-{digest(content)}.so")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, libraries))


def wheel_platform(folder: Path) -> str:
    """Return the platform tag of a wheel with these libraries: the oldest C library that has all that they need."""
    # An ELF file's table of strings has the libraries that it loads, and the versions of the symbols that it needs.
    name = re.compile(rb"\0(lib[\w+-]+\.so[\w.]*|ld-[\w.-]+|[A-Z][A-Z_]*_[\d.]+|GLIBC_[A-Z]\w+)(?=\0)")
    needed = {found.decode() for path in folder.glob("*.so") for found in name.findall(path.read_bytes())}
    versions = [re.fullmatch(r"GLIBC_2\.(\d+)(\.\d+)?", one) for one in needed - SYSTEM_LIBRARIES]
    if None in versions or "libc.so.6" not in needed:
        return "linux_x86_64"
    return f"manylinux_2_{max(17, *(int(version[1]) for version in versions if version))}_x86_64"
