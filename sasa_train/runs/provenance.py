"""The provenance of a run: its command, code (including uncommitted changes), packages and machine.

`CONDITIONS` lists what shapes the last bits of the results although it is not a key of the config.
"""

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import features
from timm.layers import use_fused_attn
from torch import nn

from sasa_train.attention.cpu import compiler_version
from sasa_train.config import own_code
from sasa_train.config.compose import as_overrides
from sasa_train.config.keys import TrainConfig
from sasa_train.config.own_keys import targets_of
from sasa_train.device import RunPlan, compiles
from sasa_train.files import read_regular
from sasa_train.machine import now, processor
from sasa_train.models.layers import AttentionStem, LocalSelfAttention2d
from sasa_train.processes import collectives
from sasa_train.processes.ranks import local_world_size, world_size
from sasa_train.refusal import shorten
from sasa_train.terminal import printable

PACKAGES = ("torchvision", "timm", "hydra-core", "omegaconf", "numpy", "pillow", "triton", "sasa_train")
# Libraries read variables with these prefixes, and choose other instructions or algorithms by some of them. All are
# recorded, because no list of those would stay complete, except what cannot shape results and often differs between
# jobs, such as paths, caches, logs, devices and networks.
PREFIXES = (
    "CUBLAS", "CUBLASLT", "CUDA", "CUDNN", "DNNL", "FUNCTORCH", "GOMP", "JSIMD", "KMP", "MKL", "NCCL", "NPY", "OMP",
    "ONEDNN", "OPENBLAS", "PYTORCH", "TIMM", "TORCH", "TORCHDYNAMO", "TORCHINDUCTOR", "TRITON",
)  # fmt: skip
OTHER_VARIABLES = (
    "DISABLE_ADDMM_CUDA_LT", "DISABLE_PTXAS_OPT", "GLIBC_TUNABLES", "NVIDIA_TF32_OVERRIDE", "PTXAS_OPTIONS",
)  # fmt: skip
# Paths of files with settings, which are recorded by their content.
SETTINGS_FILES = ("CUDNN_ERRATA_JSON_FILE", "NCCL_CONF_FILE", "NCCL_GRAPH_FILE", "NCCL_TOPO_FILE")
# OMP_NUM_THREADS and its like are not recorded, because torch reports their effect.
NOT_SHAPING = re.compile(
    r"(KMP|MKL|OMP|OPENBLAS)_NUM_THREADS|CUDA_DEVICE_(MAX_CONNECTIONS|ORDER)|TORCH_(CUDA_ARCH_LIST|FR_.*|NCCL_.*)|.*_"
    r"(ADDR2LINE|AFFINITY|ALLOC|AUTOLOAD|BIND|BLOCKTIME|BUILD|CACHES?(?!_BLOCKING)|COMM|COMPILE_THREADS|COREDUMP"
    r"|CPROFILE|(?<!WSCAP_)DBG|DEBUG(?!_CPU_TYPE)|DIR|DISPLAY|DUMP|DUPLICATE|ERROR|EXTENSIONS|FILE|FILENAME|FORK|GC|HCA|HOME|HOST"
    r"|HOSTID|HUB|IB|ID|IFNAME|INSTALL|JOB|LAUNCH_BLOCKING|LIBRARY|LINE_INFO|LOADING|LOG[A-Z]*|MEMORY_CACHING|MPS|NET"
    r"|NVML|NVTX|PATH|PIPE|PLACES|PORT|PRINT|PROFILE|PROFILER|REDIS|REMOTE|REPORT|REPRO|ROOT|SAVE|SETTINGS|SHOW|SOCKET"
    r"|SPINCOUNT|STACKSIZE|STACKTRACES|STATS|TIMEOUT|TOOL|TRACE|URL|VERBOSE|VERSION|VISIBLE|WAIT|WARM|WARN|WORKERS?)"
    r"(_.*)?"
)
PACKAGE = Path(__file__).parents[1]
SOURCES = (".py", ".cpp", ".h")  # of the package; the data in digits.npz have a fingerprint
LABELS = {"sources": "the code"}
# What a change of a condition does, where no more than rounding is known to change.
EFFECTS = dict.fromkeys(("threads", "processor", "cpu_capability"), " (results may differ in rounding)")
MAX_LINES = 50  # changes that a warning names
# Name -> function that returns a plain value, or a dict of these. A resumed run warns of each that has changed.
CONDITIONS: dict[str, Callable[[RunPlan, nn.Module], Any]] = {
    "device": lambda plan, _: plan.device.type,
    "precision": lambda plan, _: plan.trainer.precision,
    "matmul_precision": lambda *_: torch.get_float32_matmul_precision(),
    "threads": lambda *_: torch.get_num_threads(),
    "world_size": lambda *_: world_size(),
    "processor": lambda *_: processor(),  # MKL and oneDNN choose their code by it
    "cpu_capability": lambda *_: torch.backends.cpu.get_cpu_capability(),
    "gpu": lambda plan, _: torch.cuda.get_device_name() if plan.device.type == "cuda" else None,
    "attention": lambda plan, model: _backends(plan, model, LocalSelfAttention2d),
    "attention_stem": lambda plan, model: _backends(plan, model, AttentionStem),
    "switches": lambda *_: _switches(),
    "compiler": lambda plan, _: compiler_version() if compiles(plan.config) else None,
    "versions": lambda *_: _versions(),
    "libraries": lambda plan, _: _libraries(plan),
    "environment": lambda *_: _environment(),
    "sources": lambda *_: _sources(),
}


def provenance(config: TrainConfig) -> tuple[dict[str, Any], str]:
    """Return plain values for run.json and checkpoints, and the diff of the code against its last commit.

    `reproduce` is the complete command, even if the config came from presets, a sweep or a script.
    """
    difference = _git("diff", "HEAD", "--no-ext-diff", "--no-color", "--binary") or ""
    name = f"changes-{hashlib.sha256(difference.encode(errors='surrogateescape')).hexdigest()[:8]}.diff"
    made_by = {
        "command": shlex.join(sys.argv),
        "reproduce": shlex.join([*_launcher(), *as_overrides(replace(config, derive=[]))]),
        "seed": config.seed,
        "imports": own_code.digests(config.imports, targets_of(config)),
        "directory": os.getcwd(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(difference),
        "difference": name if difference else None,
        "not_in_git": (_git("ls-files", "--others", "--exclude-standard", "--", ".") or "").splitlines(),
        "host": platform.node(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "started": now(),
    }
    return made_by, difference


def conditions(plan: RunPlan, model: nn.Module) -> dict[str, Any]:
    """Return the values of `CONDITIONS` for a model on its device, for run.json and checkpoints.

    All processes must call this; a value that is not the same on all of them is replaced by the list of all values.
    """
    return _merged(collectives.gather({name: value_of(plan, model) for name, value_of in CONDITIONS.items()}))


def _merged(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _merged([value.get(key) for value in values]) for key in dict.fromkeys(chain(*values))}
    return first if all(value == first for value in values) else values


def _backends(plan: RunPlan, model: nn.Module, kind: type[LocalSelfAttention2d | AttentionStem]) -> str | None:
    """Name what computes the layers of a kind, and its compiler, or None if the model has no such layer."""
    with plan.autocast():
        found = {layer.describe_backend(plan.device) for layer in model.modules() if isinstance(layer, kind)}
    return "; ".join(sorted(found)) or None


def _versions() -> dict[str, str | None]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    return versions | {package: _version(package) for package in PACKAGES}


def _libraries(plan: RunPlan) -> dict[str, Any]:
    """Return the versions of libraries that Python packages may load from the system."""
    built = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    is_cuda = plan.device.type == "cuda"
    return {
        "libc": " ".join(platform.libc_ver()),
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "blas": "; ".join(line for line in built if "Kernel Library" in line or "MKL-DNN" in line),
        "cuda": torch.version.cuda if is_cuda else None,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
    }


def _switches() -> dict[str, Any]:
    """Return torch's global switches that a user's own code may have set."""
    tiny, of_cuda = torch.tensor(2e-38), torch.backends.cuda
    precisions = {name: getattr(torch.backends.mkldnn, name).fp32_precision for name in ("conv", "matmul")}
    return {
        "mkldnn_enabled": torch.backends.mkldnn.enabled,
        "cudnn_enabled": torch.backends.cudnn.enabled,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "denormals": "kept" if (tiny * 0.1).item() > 0 else "flushed",
        **{f"mkldnn_{name}_precision": "ieee" if p == "none" else p for name, p in precisions.items()},
        # Attention in timm's models; those of cuda count on the CPU, too.
        "timm_fused_attention": use_fused_attn(),
        "flash_attention": of_cuda.flash_sdp_enabled(),
        "memory_efficient_attention": of_cuda.mem_efficient_sdp_enabled(),
        "math_attention": of_cuda.math_sdp_enabled(),
        "cudnn_attention": of_cuda.cudnn_sdp_enabled(),
    }


def shapes_results(variable: Any) -> bool:
    """Return whether an environment variable may make a library choose other instructions or algorithms."""
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z0-9_]+", variable):
        return False
    is_known = variable in (*OTHER_VARIABLES, *SETTINGS_FILES) or (
        variable.partition("_")[0] in PREFIXES and "_" in variable
    )
    return is_known and (variable in SETTINGS_FILES or not NOT_SHAPING.fullmatch(variable))


def _environment() -> dict[str, str]:
    """Return the variables that are set and may shape the results, with a digest for a file; folders are left out."""
    found = {name: value for name, value in sorted(os.environ.items()) if value and shapes_results(name)}
    values = {name: _content_or_text(name, value) for name, value in found.items()}
    return {name: printable(value) for name, value in values.items() if value is not None}


def _content_or_text(name: str, value: str) -> str | None:
    """Return what a variable stands for: the content of a file, whose path may differ, or the text; None if neither."""
    if name not in SETTINGS_FILES and "/" not in value:
        return _short(value)
    try:
        return f"sha256 {hashlib.sha256(read_regular(Path(value))).hexdigest()[:12]}"
    except (OSError, ValueError) as error:
        if name in SETTINGS_FILES:
            return f"cannot be read ({getattr(error, 'strerror', None) or error})"
        return None if os.path.isabs(value) or os.path.isdir(value) else _short(value)


def _short(value: str) -> str:
    digest = hashlib.sha256(value.encode(errors="surrogateescape")).hexdigest()[:12]
    return value if len(value) <= 200 else f"{value[:100]}... (sha256 {digest})"


def _sources() -> str:
    """Return a digest of this package's code, so that edits are noticed where there is no git. This takes 10 ms."""
    digest = hashlib.sha256()
    for folder, folders, names in os.walk(PACKAGE):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(SOURCES) and not name.startswith("."):  # editors write hidden files beside them
                path = Path(folder, name)
                with suppress(OSError):  # a broken link, for example; Python could not import it either
                    content = hashlib.sha256(read_regular(path)).hexdigest()
                    digest.update(f"{path.relative_to(PACKAGE)} {content}\n".encode(errors="surrogateescape"))
    return f"sha256 {digest.hexdigest()[:12]}"


def _launcher() -> list[str]:
    if world_size() == 1:
        return ["sasa-train"]
    num_nodes = world_size() // local_world_size()
    counts = [f"--nnodes={num_nodes}", f"--nproc-per-node={local_world_size()}"]
    return ["torchrun", *counts, "-m", "sasa_train.train"]


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the changes since a checkpoint (in the code or in `CONDITIONS`) that may affect the results.

    A condition that the checkpoint does not record, because an older version wrote it, has not changed.
    """
    old, new = _flat(before), _flat(now)
    if isinstance(before.get("environment"), dict):  # a variable that either of the two lacks was not set
        names = dict.fromkeys(filter(shapes_results, [*before["environment"], *now.get("environment", ())]))
        old, new = (flat | {name: None for name in names if name not in flat} for flat in (old, new))
    lines = [] if "sources" in old and old["sources"] == new.get("sources") else _code_changes(before, now)
    skipped = ("world_size", "sources") if lines else ("world_size",)
    changed = [name for name in new if old.get(name, new[name]) != new[name] and name not in skipped]
    for name in changed:
        values = f"{shorten(old[name])} -> {shorten(new[name])}"
        lines.append(f"{LABELS.get(name, name)}: {values}{EFFECTS.get(name, '')}")
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"and {len(lines) - MAX_LINES:,} more"]
    if (processes := before.get("world_size", 1)) != now["world_size"]:
        lines.append(
            f"processes: {processes} -> {now['world_size']}; the same images, but sums are added in another order, and "
            "each process's batch norm sees its own micro-batches"
        )
    return [printable(line) for line in lines]


def _code_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say how the code changed as git sees it, or return an empty list if git sees no change."""
    if before.get("commit") != now["commit"]:
        return [f"the code: commit {before.get('commit')} -> {now['commit']}"]
    is_other = before.get("difference") != now.get("difference")
    return ["the code: other changes that are not committed"] if is_other else []


def _flat(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions in a provenance, with the parts of each dict under their own names."""
    flat: dict[str, Any] = {}
    for name in filter(provenance.__contains__, CONDITIONS):
        value = provenance[name]
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _git(*arguments: str) -> str | None:
    """Return the output of a git command run in this code's checkout, or None if the code is not in one."""
    # A virtual environment may be inside another project's checkout, so the output is used only if git tracks this
    # file.
    here = Path(__file__)
    try:
        for command in (["ls-files", "--error-unmatch", here.name], arguments):
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command],
                capture_output=True, text=True, errors="surrogateescape", check=True, timeout=10,
            )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.removesuffix("\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
