"""Compile the Triton kernels of local attention without a GPU, count their instructions, and estimate their speed.

For each kernel, in the launch configuration chosen by the rules, the script prints the number of warp instructions per
query and head (counting a loop's body once per iteration), registers per thread, spilled bytes, shared memory, and the
instructions by type. It then estimates the time on an H100, compared with convolution, and prints the assumptions of
the estimate. Finally it prints how many kernels are compiled for the first training step of an experiment.

usage: python scripts/kernel_counts.py                     (bf16 and fp32, K = 7, sm_80 and sm_90)
       python scripts/kernel_counts.py --arch sm_90 --dtype bf16 --border zero --tables per_head --json counts.json
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from sasa_train.attention import compiling, triton_fold
from sasa_train.attention.triton_kernels import Launch
from sasa_train.config.compose import compose_config
from sasa_train.config.derived import expected_num_classes, input_size
from sasa_train.models import build_model

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAPS = {8: 56, 16: 28, 32: 14, 64: 7}  # a ResNet's, with 8 heads
NUM_HEADS, BATCH = 8, 128
PASSES = {"forward_kernel": "forward", "backward_queries_kernel": "backward_queries"}
PASSES |= {"backward_keys_kernel": "backward_keys"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PIPES = {  # by the first part of an instruction's name
    "MUFU": "exponentials", "SHFL": "shuffles", "IMAD": "integer products",
    **dict.fromkeys(["FFMA", "FADD", "FMUL", "FFMA2", "FMUL2", "FADD2"], "float32"),
    **dict.fromkeys(["HFMA2", "HADD2", "HMUL2"], "half"),
    **dict.fromkeys(["F2F", "F2FP", "I2F", "F2I", "I2FP", "FRND", "F2IP"], "conversions"),
    **dict.fromkeys(["LDG", "STG", "LDGSTS", "UTMALDG"], "global memory"),
    **dict.fromkeys(["LDS", "STS", "LDSM", "STSM"], "shared memory"),
    **dict.fromkeys(["LDL", "STL"], "spills"),
}  # fmt: skip

# Assumptions of the estimate: an H100 (SXM), and what of its figures kernels reach
ISSUE_RATE = 132 * 4 * 1.7e9 * 0.65  # warp instructions per second
MEMORY_RATE = 3.0e12  # bytes per second
MATMUL_RATE = 989e12 * 0.62  # bf16 FLOP/s of a convolution
STEP_SECONDS = 0.040  # of conv_resnet50 with 128 images at 224 pixels
# Stages of ResNet-50: channels, map size, blocks. The first block of a stage has the previous map size and pools.
STAGES = ((64, 56, 3), (128, 28, 4), (256, 14, 6), (512, 7, 3))


class Compiler:
    """A substitute for a GPU's driver that answers the compiler's questions about the GPU."""

    def __init__(self, arch: str):
        self.capability = int(arch.removeprefix("sm_"))
        memory = {80: 166912, 90: 232448}.get(self.capability, 101376)
        properties = {"max_shared_mem": memory, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = argparse.Namespace(get_device_properties=lambda device: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", nargs="+", default=["sm_80", "sm_90"], help="compute capabilities (%(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="%(default)s")
    add("--kernel-size", nargs="+", type=int, default=[7], metavar="K", help="%(default)s")
    add("--head-dim", nargs="+", type=int, default=list(MAPS), metavar="D", help="%(default)s")
    add("--border", nargs="+", choices=("mask", "zero"), default=["mask"], help="%(default)s")
    add("--tables", nargs="+", choices=("none", "shared", "per_head"), default=["shared"], help="%(default)s")
    add("--no-content", action="store_true", help="scores without q.k")
    add("--stride", nargs="+", type=int, choices=(1, 2), default=[1], help="2: with pooling (%(default)s)")
    add("--experiment", default="imagenet_hybrid_resnet50", help="whose kernels are counted (%(default)s; none: none)")
    add("--json", metavar="FILE", type=Path, help="write the rows to a file")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 compiles nothing; unset it")
    rows = []
    for arch in options.arch:
        driver.set_active(Compiler(arch))
        cases = itertools.product(
            options.dtype, options.kernel_size, options.head_dim, options.border, options.tables, options.stride
        )
        rows += [row for case in cases for row in count_case(arch, not options.no_content, *case)]
    if options.json:
        options.json.write_text(json.dumps(rows))
    print_estimate(rows)
    if options.experiment != "none":
        driver.set_active(Compiler(options.arch[-1]))
        launches = launches_of_experiment(options.experiment)
        print(f"\nexperiment={options.experiment}: {len(launches)} kernels for the first training step", flush=True)
        compiling.compile_ahead(launches)
    return 0


def count_case(
    arch: str, content: bool, dtype: str, kernel_size: int, head_dim: int, border: str, tables: str, stride: int
) -> list[dict[str, Any]]:
    """Compile and count the three kernels of one problem; print and return a row for each."""
    side = MAPS.get(head_dim, 14)
    shape = (3 if content else 2, BATCH, NUM_HEADS, side, side, head_dim)
    channels = shape[0] * NUM_HEADS * head_dim
    strides = (NUM_HEADS * head_dim, side * side * channels, head_dim, side * channels, channels, 1)
    projections = torch.empty_strided(shape, strides, dtype=DTYPES[dtype], device="meta")
    size = (kernel_size, head_dim // 2) if tables == "shared" else (NUM_HEADS, kernel_size, head_dim // 2)
    rel = None if tables == "none" else torch.empty(size, device="meta")
    window = ((kernel_size, kernel_size), (1, 1), border, 1.0, False)
    launches = compiling.step_launches(projections, rel, rel, *window, stride)
    rows = []
    for launch, compiled in zip(launches, compiling.compile_ahead(launches), strict=True):
        tiling = "fold" if launch.kernel in vars(triton_fold).values() else "walk"
        row = {
            "arch": arch, "dtype": dtype, "kernel_size": kernel_size, "head_dim": head_dim,
            "pass": PASSES[launch.kernel.__name__], "border": border, "content": content, "tables": tables,
            "stride": stride, "tiling": tiling, "chosen": True, **count(compiled, launch, tiling),
        }  # fmt: skip
        rows.append(row)
        by_pipe = ", ".join(f"{name} {number}" for name, number in row["by_pipe"].items())
        print(
            f"{arch} {dtype} K={kernel_size} head_dim={head_dim:<2} {row['pass']:16} {tiling}: "
            f"{row['per_query_and_head']:5.1f} instructions per query and head, {row['registers']} registers, "
            f"{row['spill_bytes']} B spilled, {row['shared_bytes']} B shared; in the code: {by_pipe}",
            flush=True,
        )
    return rows


def count(compiled: Any, launch: Launch, tiling: str) -> dict[str, Any]:
    """Count the instructions of a compiled kernel, from its disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.asm["cubin"])
        usage, text = (
            subprocess.run(
                [TOOLS / name, option, file], capture_output=True, text=True, check=True
            ).stdout
            for name, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    names, loops = instructions(text)
    # The outermost loop is over heads (of the fold) or key rows (of the walk), the one within over key rows.
    kernel_size = launch.constants["K"]
    if tiling == "fold":
        heads = launch.arguments[-1]
        trips = (heads, (kernel_size + 1) // launch.constants.get("UNROLL", kernel_size + 1))
        queries = 16 * heads
    else:
        tile_h, tile_w = launch.arguments[-2:]
        trips, queries = (tile_h + kernel_size - 1, 1), tile_h * tile_w
    loops.sort(reverse=True)
    outer = loops[0] if loops else 0
    inner = sum(loops[1:])
    total = len(names) - outer + trips[0] * (outer - inner + trips[1] * inner)
    pipes = collections.Counter(PIPES.get(name, "products" if "MMA" in name else "other") for name in names)
    num_warps = compiled.metadata.num_warps
    return {
        "per_query_and_head": round(total * num_warps / queries, 1),
        "registers": registers,
        "spill_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "num_warps": num_warps,
        "by_pipe": dict(pipes.most_common()),
    }


def instructions(disassembly: str) -> tuple[list[str], list[int]]:
    """Return the name of each instruction (e.g. HMMA) and the length of each loop."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            body = re.sub(r"^(\{\s*)?(@!?U?P\w+\s+)?", "", found[1].strip())
            names.append(re.split(r"[.\s,]", body)[0])
            target = re.search(r"(\.L_x_\d+)", body) if names[-1] == "BRA" else None
            begin = labels.get(target[1]) if target else None
            if begin is not None and len(names) - begin > 4:  # a kernel ends with a branch to itself
                loops.append(len(names) - begin)
    return names, loops


def print_estimate(rows: list[dict[str, Any]]) -> None:
    """Print the estimated time of attention relative to convolution, for the layers of a ResNet-50."""
    wanted = {"arch": "sm_90", "dtype": "bf16", "kernel_size": 7, "border": "mask", "tables": "shared", "stride": 1}
    found = [row for row in rows if row["content"] and all(row[name] == value for name, value in wanted.items())]
    instructions_of = {
        head_dim: sum(row["per_query_and_head"] for row in found if row["head_dim"] == head_dim) for head_dim in MAPS
    }
    if not all(instructions_of.values()):
        return
    print(
        f"\nEstimate, not a measurement (H100, bf16, batch {BATCH}; {ISSUE_RATE:.2e} warp instructions/s, "
        f"{MEMORY_RATE:.1e} bytes/s, {MATMUL_RATE:.2e} FLOP/s; a step of conv_resnet50 in {1e3 * STEP_SECONDS:.0f} ms):"
    )
    saved = []
    for channels, side, num_blocks in STAGES:
        per_query = instructions_of[channels // NUM_HEADS]
        ours = attention_seconds(channels, side, per_query)
        conv = matmul_seconds(channels, side, 9, 1, 1)
        print(f"  {side}x{side}x{channels}: attention takes {ours / conv:.2f} of the convolution's time")
        # The projections to q, k and v replace the convolution's weights.
        per_block = ours + matmul_seconds(channels, side, 3, 1, 3) - conv
        first = per_block
        if channels > 64:
            first = attention_seconds(channels, 2 * side, per_query) - conv
            first += matmul_seconds(channels, 2 * side, 3, 1, 3)
        saved.append(first + (num_blocks - 1) * per_block)
    for first_stage, name in ((0, "all four stages (hybrid_resnet50)"), (1, "stages 2 to 4"), (2, "stages 3 and 4")):
        ratio = STEP_SECONDS / (STEP_SECONDS + sum(saved[first_stage:]))
        print(f"  ResNet-50 with attention in {name}: {ratio:.2f} of the convolutional images/s")


def attention_seconds(channels: int, side: int, per_query_and_head: float) -> float:
    """Estimate the time of a forward and backward pass, limited by either instructions or memory traffic."""
    queries = BATCH * NUM_HEADS * -(-side // 2) * 2 * -(-side // 8) * 8  # with the tiles' padding
    # Forward: read three maps, write one; backward: read five and four, write one and two. Per query and head, the
    # logsumexp and 8 float32 numbers for the keys' kernel are written and read.
    num_bytes = 16 * BATCH * side * side * channels * 2 + 72 * queries
    return max(queries * per_query_and_head / ISSUE_RATE, num_bytes / MEMORY_RATE)


def matmul_seconds(channels: int, side: int, taps: int, num_inputs: int, num_outputs: int) -> float:
    """Estimate the time of a convolution's three products, each limited by either arithmetic or memory traffic."""
    flops = 2 * taps * channels**2 * BATCH * side * side
    num_bytes = (num_inputs + num_outputs) * BATCH * side * side * channels * 2
    return 3 * max(flops / MATMUL_RATE, num_bytes / MEMORY_RATE)


def launches_of_experiment(name: str) -> list[Launch]:
    """Return the kernels that the first training step of `experiment=name` compiles, in bf16."""
    config = compose_config([f"experiment={name}"])
    size = input_size(config.data)
    model = build_model(config.model, expected_num_classes(config) or 1000, size)
    model.to(memory_format=(layout := torch.channels_last))
    device, no_autocast = torch.device("cuda"), contextlib.nullcontext()
    return compiling.launches_of(model, size, device, layout, no_autocast, torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
