"""Check that a resumed run names everything that may have changed the last bits of its results, in one warning."""

import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running_commands import TINY
from timm.layers import set_fused_attn

from sasa_train.attention import cpu, kernel_builds
from sasa_train.config.compose import compose_config
from sasa_train.config.keys import TrainConfig, with_values
from sasa_train.device import RunPlan, resolve
from sasa_train.models import build_model
from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.runs import provenance
from sasa_train.runs.checkpoint import Checkpoints
from sasa_train.runs.folder import RunFolder
from sasa_train.runs.provenance import (
    CONDITIONS,
    OTHER_VARIABLES,
    PREFIXES,
    SETTINGS_FILES,
    conditions,
    describe_changes,
)
from sasa_train.training.run import note_conditions

RUN = (*TINY, "run_name=a", "trainer.epochs=1")
CHANGED = "WARNING: changed since the checkpoint was written:"
# Variables by which libraries are known to choose other instructions or algorithms.
SHAPING = """
    CUBLASLT_WORKSPACE_SIZE CUBLAS_EMULATE_SINGLE_PRECISION CUBLAS_WORKSPACE_CONFIG CUDNN_CONV_WSCAP_DBG
    DISABLE_ADDMM_CUDA_LT
    DISABLE_PTXAS_OPT DNNL_DEFAULT_FPMATH_MODE DNNL_MAX_CPU_ISA GLIBC_TUNABLES JSIMD_FORCENONE
    KMP_DETERMINISTIC_REDUCTION MKL_CBWR MKL_DEBUG_CPU_TYPE MKL_DISABLE_FAST_MM MKL_DOMAIN_NUM_THREADS MKL_DYNAMIC
    MKL_ENABLE_INSTRUCTIONS MKL_THREADING_LAYER NCCL_ALGO NCCL_MAX_NCHANNELS NCCL_MIN_NCHANNELS NCCL_P2P_DISABLE
    NCCL_PROTO
    NPY_DISABLE_CPU_FEATURES NVIDIA_TF32_OVERRIDE OMP_DYNAMIC OMP_SCHEDULE OMP_THREAD_LIMIT ONEDNN_CPU_ISA_HINTS
    ONEDNN_DEFAULT_FPMATH_MODE ONEDNN_MAX_CPU_ISA OPENBLAS_CORETYPE PTXAS_OPTIONS PYTORCH_JIT PYTORCH_TUNABLEOP_ENABLED
    TIMM_FUSED_ATTN TIMM_USE_SCIPY_INTERP
    TORCHDYNAMO_DISABLE TORCHDYNAMO_SUPPRESS_ERRORS TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG
    TORCHINDUCTOR_CPP_GEMM_CACHE_BLOCKING TORCHINDUCTOR_CPP_MARCH TORCHINDUCTOR_EMULATE_PRECISION_CASTS
    TORCHINDUCTOR_FREEZING TORCHINDUCTOR_MAX_AUTOTUNE TORCHINDUCTOR_MIX_ORDER_REDUCTION TORCHINDUCTOR_USE_FAST_MATH
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE TORCH_BLAS_PREFER_CUBLASLT TORCH_COMPILE_DISABLE
    TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS TORCH_CUDNN_USE_HEURISTIC_MODE_B TORCH_CUDNN_V8_API_DISABLED
    TORCH_MKLDNN_MATMUL_MIN_DIM TRITON_DEFAULT_FP_FUSION TRITON_F32_DEFAULT TRITON_INTERPRET
"""
# Variables that differ between jobs or machines and do not shape the results; torch reports the effect of some.
NOT_SHAPING = """
    ATEN_CPU_CAPABILITY CUBLAS_LOGINFO_DBG CUDA_CACHE_PATH CUDA_DEVICE_ORDER CUDA_HOME CUDA_LAUNCH_BLOCKING
    CUDA_MODULE_LOADING CUDA_VERSION CUDA_VISIBLE_DEVICES CUDNN_LOGLEVEL_DBG GOMP_CPU_AFFINITY GOMP_SPINCOUNT
    KMP_AFFINITY KMP_BLOCKTIME KMP_DUPLICATE_LIB_OK KMP_INIT_AT_FORK LD_LIBRARY_PATH MKL_NUM_THREADS MKL_VERBOSE
    NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG NCCL_IB_HCA NCCL_SOCKET_IFNAME NVIDIA_VISIBLE_DEVICES OMP_DISPLAY_ENV
    OMP_NUM_THREADS OMP_PLACES OMP_PROC_BIND OMP_STACKSIZE OMP_WAIT_POLICY ONEDNN_VERBOSE OPENBLAS_NUM_THREADS
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_VERSION SLURM_JOB_ID TIMM_USE_OLD_CACHE TMPDIR TORCHELASTIC_RUN_ID
    TORCHINDUCTOR_CACHE_DIR
    TORCHINDUCTOR_COMPILE_THREADS TORCHINDUCTOR_FX_GRAPH_CACHE TORCH_COMPILE_DEBUG TORCH_COMPILE_JOB_ID
    TORCH_CPP_LOG_LEVEL TORCH_DISTRIBUTED_DEBUG TORCH_EXTENSIONS_DIR TORCH_HOME TORCH_LOGS
    TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_SHOW_CPP_STACKTRACES TRITON_CACHE_DIR TRITON_HOME TRITON_PRINT_AUTOTUNING
"""
# A compiler that calls itself by another name.
OTHER_COMPILER = '#!/bin/sh\nif [ "$1" = --version ]; then echo "other 1.0"; else exec {} "$@"; fi\n'


@pytest.fixture
def plan() -> RunPlan:
    return RunPlan(compose_config([*TINY, "trainer.precision=fp32"]), torch.device("cpu"))


@pytest.fixture
def model(plan):
    return build_model(plan.config.model, 10, 8)


@pytest.fixture
def fresh_libraries() -> Iterator[None]:
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


def changes_in(text: str) -> list[str]:
    """Return the lines of the only warning of changes, or an empty list if there is no such warning."""
    assert text.count(CHANGED) <= 1, "there must be one warning, however much has changed"
    lines = text.partition(CHANGED)[2].splitlines()[1:]
    return [line.strip() for line in itertools.takewhile(lambda line: line.startswith("  "), lines)]


def resumed(before: dict[str, Any]) -> RunFolder:
    return RunFolder(Path("a"), None, Checkpoints(Path("a"), 0), {"provenance": before}, provenance={"commit": None})


def one_changed(value: Any) -> dict[str, Any]:
    """Map each part of a condition, or None for a condition without parts, to the condition with that part changed."""
    parts = value if isinstance(value, dict) else ()
    return {part: value | {part: "other"} for part in parts} or {None: "other"}


def test_a_resume_names_each_condition_that_has_changed_and_no_other(plan, model, monkeypatch, capsys):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    before = conditions(plan, model)
    assert before.keys() == CONDITIONS.keys() and before["environment"]["MKL_CBWR"] == "AVX2"
    for name, old in before.items():
        for part, new in one_changed(old).items():
            run = resumed(before)
            with monkeypatch.context() as patch:
                patch.setitem(CONDITIONS, name, lambda *_, new=new: new)
                note_conditions(plan, model, run)
            (line,) = changes_in(capsys.readouterr().err)
            label = {"world_size": "processes", "sources": "the code"}.get(name, part or name)
            assert line.startswith(f"{label}: {old[part] if part else old} -> other")
            assert ("differ in rounding" in line) == (name in ("threads", "processor", "cpu_capability"))
            assert run.provenance[name] == new  # recorded for run.json and the next checkpoint
    run = resumed(before)
    note_conditions(plan, model, run)
    assert not capsys.readouterr().err


def test_switches_of_torch_that_own_code_sets_are_named(plan, model):
    before = conditions(plan, model) | {"commit": None}
    with torch.backends.mkldnn.flags(enabled=False):
        (line,) = describe_changes(before, conditions(plan, model) | {"commit": None})
    assert line == "mkldnn_enabled: True -> False"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        (line,) = describe_changes(before, conditions(plan, model) | {"commit": None})
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"
    assert line == "mkldnn_conv_precision: ieee -> bf16"
    switches = {torch.backends.cuda.enable_flash_sdp: "flash_attention", set_fused_attn: "timm_fused_attention"}
    for switch, name in switches.items():  # a ViT of timm's once went on with other kernels without a word
        switch(False)
        try:
            (line,) = describe_changes(before, conditions(plan, model) | {"commit": None})
        finally:
            switch(True)
        assert (
            line.startswith(f"{name}: ") and describe_changes(before, conditions(plan, model) | {"commit": None}) == []
        )


def test_each_variable_that_shapes_results_is_named_and_no_other(plan, model, monkeypatch):
    """TORCH_COMPILE_DISABLE once gave other results without a word; a cache's path must not give a false alarm."""
    shaping, not_shaping = SHAPING.split(), NOT_SHAPING.split()
    assert {name.partition("_")[0] for name in shaping} >= {*PREFIXES} - {"CUDA", "CUDNN", "FUNCTORCH", "GOMP"}
    assert {*shaping} >= {*OTHER_VARIABLES}
    for name in (*shaping, *not_shaping):
        monkeypatch.delenv(name, raising=False)
    before = {"commit": None} | conditions(plan, model)

    def changes_with(**variables: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            now = before | {"environment": CONDITIONS["environment"](plan, model)}
        back = [" -> ".join(line.partition(": ")[2].split(" -> ")[::-1]) for line in describe_changes(now, before)]
        assert back == [line.partition(": ")[2] for line in describe_changes(before, now)]  # unsetting is a change, too
        return describe_changes(before, now)

    for name in shaping:
        assert changes_with(**{name: "1"}) == [f"{name}: None -> 1"]
    for name in not_shaping:
        assert changes_with(**{name: "1"}) == [], name
    assert changes_with(TORCH_NEW="/scratch/job4711", TORCH_COMPILE_DISABLE="") == []  # a path; an unset variable
    (line,) = changes_with(TORCH_NEW="x" * 100_000)
    assert len(line) < 200 and "sha256" in line
    assert changes_with(TORCH_NEW="\udcff\x1b[2J") == [r"TORCH_NEW: None -> \udcff\x1b[2J"]


@pytest.mark.parametrize("name", [*SETTINGS_FILES, "NCCL_TUNER_PLUGIN"])
def test_a_file_of_settings_is_named_by_its_content(tmp_path, name, plan, model, monkeypatch):
    """NCCL and cuDNN choose algorithms by such files, which once changed without a word, as all paths do."""

    def now_with(content: str | None) -> dict[str, Any]:
        path = tmp_path / str(content)
        if content is not None:
            path.write_text(content)
        monkeypatch.setenv(name, str(path))
        return {"commit": None} | conditions(plan, model)

    before, other = now_with("NCCL_ALGO=Ring"), now_with("NCCL_ALGO=Tree")
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "NCCL_ALGO=Ring", tmp_path / "copy")
    monkeypatch.setenv(name, str(tmp_path / "copy/NCCL_ALGO=Ring"))
    assert describe_changes(before, {"commit": None} | conditions(plan, model)) == []
    (line,) = describe_changes(before, other)
    assert re.fullmatch(f"{name}: sha256 [0-9a-f]{{12}} -> sha256 [0-9a-f]{{12}}", line)
    (line,) = describe_changes(before, now_with(None))
    is_file = name in SETTINGS_FILES
    assert line.endswith("-> cannot be read (No such file or directory)" if is_file else " -> None")


def test_a_value_with_a_slash_that_is_no_path_is_recorded(plan, model, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX512F/-AVX2")
    assert conditions(plan, model)["environment"]["GLIBC_TUNABLES"] == "glibc.cpu.hwcaps=-AVX512F/-AVX2"


def test_code_edited_outside_git_is_noticed(tmp_path, in_process, monkeypatch, capsys):
    """A run in a copy without git, whose optimizer was edited between two starts, once went on without a word."""
    package = tmp_path / "site/sasa_train"
    shutil.copytree(provenance.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", package)
    monkeypatch.setattr(provenance, "_git", lambda *_: None)
    in_process("train", *RUN, "trainer.max_hours=1e-9", expect=75)
    before = provenance._sources()
    for name in (
        "__pycache__/x.py",
        ".ipynb_checkpoints/x.py",
        ".#optim.py",
        "broken.py",
        "notes.txt",
    ):  # no code that could run
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).symlink_to("nowhere")
    assert provenance._sources() == before
    with (package / "training/optim.py").open("a") as file:
        file.write("# edited\n")
    (line,) = changes_in(in_process("train", *RUN).stderr)
    assert line == f"the code: {before} -> {provenance._sources()}" and re.search("sha256 [0-9a-f]{12}$", line)


def test_a_commit_that_leaves_the_code_as_it_was_is_not_a_change(plan, model):
    before = {"commit": "0123456", "difference": None} | conditions(plan, model)
    assert describe_changes(before, before | {"commit": "89abcde"}) == []
    other = {"commit": "89abcde", "sources": "sha256 0"}
    assert describe_changes(before, before | other) == ["the code: commit 0123456 -> 89abcde"]
    older = {name: value for name, value in before.items() if name != "sources"}
    assert describe_changes(older, before | {"commit": "89abcde"}) == ["the code: commit 0123456 -> 89abcde"]
    changed = before | {"versions": dict.fromkeys(map(str, range(99)), "1")}
    assert (
        describe_changes(changed, changed | {"versions": dict.fromkeys(map(str, range(99)), "2")})[-1] == "and 49 more"
    )


def test_the_conditions_are_those_of_this_process(plan, model, one_thread, monkeypatch):
    found = conditions(plan, model)
    assert found["threads"] == 1 and found["device"] == "cpu" and found["precision"] == "fp32"
    for key in ("attention", "attention_stem"):
        assert re.fullmatch(rf"cpu kernel, \w+, {re.escape(cpu.compiler_version())}, built [0-9a-f]{{8}}", found[key])
    assert found["compiler"] is None  # only torch.compile needs it
    kron = dataclasses.replace(plan, config=with_values(plan.config, {"optimizer.name": "kron"}))
    assert conditions(kron, model)["compiler"] == cpu.compiler_version()
    model.to(torch.float64)
    assert conditions(plan, model)["attention"].startswith("reference, because the tensors are torch.float64")
    conv = build_model(compose_config(["model=conv_resnet26"]).model, 10, 32)
    assert conditions(plan, conv)["attention"] is conditions(plan, conv)["attention_stem"] is None


@pytest.mark.parametrize(
    "kernel_size,dtype,backend,expected",
    [
        (17, torch.float32, "auto", "cpu kernel"),
        (3, torch.float64, "auto", "reference, because the tensors are torch.float64"),
        (3, torch.float32, "reference", "reference"),
        (3, torch.float32, "cpu", "cpu kernel"),
    ],
)
def test_the_backend_is_the_one_that_runs(kernel_size, dtype, backend, expected):
    layer = LocalSelfAttention2d(4, 8, kernel_size, num_heads=2, backend=backend).to(dtype)
    assert layer.describe_backend(torch.device("cpu")).startswith(expected)


def test_a_condition_that_differs_between_processes_is_listed_by_process(plan, model, monkeypatch):
    def gather(value):
        return [value, value | {"processor": "other", "libraries": value["libraries"] | {"libc": "other"}}]

    alone = conditions(plan, model)
    monkeypatch.setattr(provenance.collectives, "gather", gather)
    together = conditions(plan, model)
    assert together["processor"] == [alone["processor"], "other"]
    assert together["libraries"] == alone["libraries"] | {"libc": [alone["libraries"]["libc"], "other"]}
    assert together["attention"] == alone["attention"]


def test_an_older_checkpoint_lacks_conditions_and_a_strangers_cannot_move_the_cursor(plan, model):
    now = {"commit": "0123456"} | conditions(plan, model)
    assert describe_changes({"commit": "0123456", "threads": now["threads"], "versions": {}}, now) == []
    (line,) = describe_changes(now | {"processor": "\x1b[2J"}, now)
    assert line.startswith(r"processor: \x1b[2J -> ")


def test_a_compiler_of_the_same_version_that_builds_another_kernel_is_noticed(
    in_process, monkeypatch, fresh_libraries, tmp_path
):
    """As on clusters, where a site's wrapper adds flags of its own."""
    in_process("train", *RUN, "trainer.max_hours=1e-9", expect=75)
    wrapper = tmp_path / "g++"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which(kernel_builds.find_compiler())} "$@" -O1\n')
    wrapper.chmod(0o755)
    for name, value in {"CXX": str(wrapper), "SASA_TRAIN_CACHE": "empty"}.items():
        monkeypatch.setenv(name, value)
    cpu._library.cache_clear()
    attention, stem = changes_in(in_process("train", *RUN).stderr)
    assert re.search(r"attention: (cpu kernel, .*, built )\w{8} -> \1\w{8}", attention) and "stem: cpu" in stem


def test_a_resume_with_other_kernels_warns_once_and_goes_on(in_process, monkeypatch, fresh_libraries, tmp_path):
    """A resume without a compiler once gave other results in 540 places, without a word that anything had changed."""
    once = (*RUN, "trainer.max_hours=1e-9")  # one step
    in_process("train", *once, expect=75)
    assert changes_in(in_process("train", *once, expect=75).stderr) == []
    # A wheel keeps its libraries under the names that they have in the cache.
    shutil.copytree(cpu._cache_folder(), tmp_path / "wheel")
    (tmp_path / "wheel/compiler.txt").write_text(kernel_builds.version_of(kernel_builds.find_compiler()))
    monkeypatch.setattr(kernel_builds, "PREBUILT", tmp_path / "wheel")
    monkeypatch.delenv("CXX", raising=False)
    cpu._library.cache_clear()
    attention, stem = changes_in(in_process("train", *once, expect=75).stderr)
    assert re.fullmatch(r"attention: (cpu kernel, \w+, )(.*) -> \1prebuilt, \2", attention)
    assert re.fullmatch(r"attention_stem: (cpu kernel, \w+, )(.*) -> \1prebuilt, \2", stem)
    for name, value in {"CXX": "/nonexistent", "SASA_TRAIN_CACHE": "empty", "ONEDNN_MAX_CPU_ISA": "AVX2"}.items():
        monkeypatch.setenv(name, value)
    cpu._library.cache_clear()
    attention, stem, variable = changes_in(in_process("train", *RUN).stderr)
    assert attention.startswith("attention: cpu kernel, ")
    assert attention.endswith(" -> reference, because /nonexistent could not build it")
    assert stem.startswith("attention_stem: cpu kernel, ") and stem.endswith(" -> PyTorch")
    assert variable == "ONEDNN_MAX_CPU_ISA: None -> AVX2"


@pytest.mark.slow  # new processes, because torch reads the instructions once
@pytest.mark.parametrize(
    "name,value,expected",
    [
        ("ATEN_CPU_CAPABILITY", "default", ["cpu_capability", "attention", "attention_stem"]),
        ("CXX", "./other", ["attention", "attention_stem"]),
    ],
)
def test_a_new_process_with_other_instructions_or_another_compiler(
    command, tmp_path, monkeypatch, name, value, expected
):
    (tmp_path / "other").write_text(OTHER_COMPILER.format(shutil.which(os.environ.get("CXX", "g++"))))
    (tmp_path / "other").chmod(0o700)
    command("train", *RUN, "trainer.max_hours=1e-9", expect=75)
    monkeypatch.setenv(name, value)
    lines = changes_in(command("train", *RUN).stderr)
    assert [line.partition(": ")[0] for line in lines] == expected
    if name == "CXX":
        assert re.search(r", built (\w{8}) -> cpu kernel, .*, other 1\.0, built \1$", lines[0])


def test_a_run_uses_the_threads_that_openmp_grants(in_process, monkeypatch, one_thread):
    """oneDNN's convolutions once waited forever for a second thread."""
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_THREAD_LIMIT", "1")
    resolve(TrainConfig())
    assert torch.get_num_threads() == 1
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    assert "OMP_DYNAMIC=true" in in_process("train", *RUN, expect=2).stderr
