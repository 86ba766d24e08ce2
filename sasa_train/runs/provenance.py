"""The provenance of a run: its command, code (including uncommitted changes), packages and machine.

`CONDITIONS` lists what shapes the last bits of the results although it is not a key of the config.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import features
from torch import nn

from sasa_train.attention.cpu import compiler_version
from sasa_train.config.compose import as_overrides
from sasa_train.config.keys import TrainConfig
from sasa_train.device import RunPlan
from sasa_train.machine import now, processor
from sasa_train.models.layers import AttentionStem, LocalSelfAttention2d
from sasa_train.processes import collectives
from sasa_train.processes.ranks import local_world_size, world_size
from sasa_train.terminal import printable

PACKAGES = ("torchvision", "timm", "hydra-core", "omegaconf", "numpy", "pillow", "triton", "sasa_train")
# Variables that make libraries choose other instructions or algorithms. ATEN_CPU_CAPABILITY and the variables for
# threads are not among them, because torch reports their effects.
VARIABLES = (
    "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS",
    "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "MKL_DISABLE_FAST_MM", "MKL_THREADING_LAYER",
    "MKL_DOMAIN_NUM_THREADS", "MKL_DYNAMIC", "OMP_DYNAMIC", "OMP_SCHEDULE", "OMP_THREAD_LIMIT", "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES", "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE",
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "CUBLAS_EMULATE_SINGLE_PRECISION", "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT", "TORCH_CUDNN_USE_HEURISTIC_MODE_B",
    "TORCH_CUDNN_V8_API_DISABLED", "NCCL_ALGO", "NCCL_PROTO", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NCHANNELS",
    "TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "TORCHINDUCTOR_MAX_AUTOTUNE",
)  # fmt: skip
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
    "compiler": lambda plan, _: compiler_version() if plan.trainer.compile else None,
    "versions": lambda *_: _versions(),
    "libraries": lambda plan, _: _libraries(plan),
    "environment": lambda *_: {name: os.environ.get(name) or None for name in VARIABLES},
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
        return {key: _merged([value[key] for value in values]) for key in first}
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
    lines = []
    if before.get("commit") != now["commit"]:
        lines.append(f"the code: commit {before.get('commit')} -> {now['commit']}")
    elif before.get("difference") != now.get("difference"):
        lines.append("the code: other changes that are not committed")
    old, new = _flat(before), _flat(now)
    changed = [name for name in new if old.get(name, new[name]) != new[name] and name != "world_size"]
    lines += [f"{name}: {old[name]} -> {new[name]}" for name in changed]
    if (processes := before.get("world_size", 1)) != now["world_size"]:
        lines.append(
            f"processes: {processes} -> {now['world_size']}; the same images, but sums are added in another order, and "
            "each process's batch norm sees its own micro-batches"
        )
    return [printable(line) for line in lines]


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
