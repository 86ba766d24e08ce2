"""Run everything that needs a GPU in one command: tests on the device, the speed of the op and of models.

Each part is a process of its own and writes PART.json, PART.md, PART.log and, if it makes a chart, PART.png to FOLDER.
A part that fails or runs out of time does not affect the others. summary.md and summary.json gather all results. The
same command again runs the parts that are not done; --only runs its parts in any case. It takes ten minutes at most.

usage: python scripts/gpu_check.py FOLDER [--only PART ...] [--dry-run]   (--dry-run: tiny, on a CPU, interpreted)
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SECONDS = {
    "tests": 150,
    "op_bf16": 70,
    "op_fp32": 70,
    "flex_bf16": 80,
    "flex_fp32": 30,
    "roofline": 40,
    "models_bf16": 160,
}
TENSOR_PASSES = 12  # forward reads q, k, v and writes out; backward reads those and the gradient, writes three
FULL_SHAPES = ((56, 64), (28, 128), (14, 256), (32, 64))  # map's side, channels
COPY_BYTES, MATMUL_SIDE = 2**30, 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--only", metavar="PART", nargs="+", choices=SECONDS, help=", ".join(SECONDS))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--measure-roofline", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_roofline:
        return measure_roofline(options.folder, options.dry_run)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    for part in options.only or [part for part in SECONDS if not _is_done(folder, part)]:
        run_part(part, folder, options.dry_run)
    return gather(folder)


def run_part(part: str, folder: Path, dry_run: bool) -> None:
    print(f"{part} ...", end=" ", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    with (folder / f"{part}.md").open("w") as out, (folder / f"{part}.log").open("w") as log:
        try:
            command = [sys.executable, *part_command(part, folder, dry_run)]
            code: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=out, stderr=log, timeout=SECONDS[part]
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    status = {"exit_code": code, "seconds": round(time.perf_counter() - start, 1), "dry_run": dry_run}
    (folder / f"{part}.status.json").write_text(json.dumps(status))
    print(f"{'done' if code == 0 else f'failed ({code}, see {part}.log and {part}.md)'}, {status['seconds']} s")


def part_command(part: str, folder: Path, dry_run: bool) -> list[str]:
    """Return the arguments of Python for a part."""
    if part == "tests":
        # Without a GPU there is nothing to run, so the marked tests are only collected.
        chosen = ["-m", "gpu", "--collect-only"] if dry_run else []
        files = {path for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
        files |= {ROOT / "tests/test_attention.py", ROOT / "tests/test_attention_triton.py"}
        return ["-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, *map(str, sorted(files))]
    if part == "roofline":
        return [str(Path(__file__).resolve()), str(folder), "--measure-roofline", *(["--dry-run"] if dry_run else [])]
    kind, dtype = part.split("_")
    written = [f"--json={folder / part}.json", f"--plot={folder / part}.png", f"--dtype={dtype}"]
    device = "--device=cpu" if dry_run else "--device=cuda"
    return ["-m", "sasa_train.benchmark", *(_tiny(kind) if dry_run else _full(kind, dtype)), *written, device]


def _full(kind: str, dtype: str) -> list[str]:
    if kind == "models":
        models = ["conv_resnet50", "hybrid_resnet50", "--image-size=224", "--batch-size=128", "--compile"]
        return ["model", *models, "--memory-format=channels_last", "--repeats=7"]
    # FlexAttention compiles anew for every shape, forward and backward, so it gets only a few.
    shapes = ["56x56x64", "28x28x128", "14x14x256"] if dtype == "bf16" else ["56x56x64"]
    return ["attention", "--repeats=9"] + {
        "op": ["--backends", "conv", "triton"],
        "flex": ["--backends", "conv", "triton", "flex", "--batch-size=128", "--shapes", *shapes],
    }[kind]


def _tiny(kind: str) -> list[str]:
    if kind == "models":
        models = [f"{family}_resnet26,stem=conv_small,width=0.125,{heads}" for family, heads in (
            ("conv", "num_heads=2"), ("hybrid", "num_heads=2"))]  # fmt: skip
        return ["model", *models, "--image-size=8", "--batch-size=2", "--num-classes=5", "--repeats=1"]
    small = ["--num-heads=2", "--kernel-size=3", "--repeats=1", "--batch-size=1"]
    shapes = ["--shapes", "3x5x8", "4x4x8/2"]
    return ["attention", *small] + {
        "op": ["--backends", "conv", "triton", *shapes],
        "flex": ["--backends", "conv", "cpu", *shapes],
    }[kind]  # fmt: skip


def measure_roofline(folder: Path, dry_run: bool) -> int:
    """Compare the op with the device's speed of copying and of multiplying, both measured here."""
    import torch

    from sasa_train.benchmark.contenders import DTYPES, Case, build_contender, check
    from sasa_train.benchmark.timing import progress_bar, time_in_turn

    device = torch.device("cpu" if dry_run else "cuda")
    backend, repeats = ("cpu", 1) if dry_run else ("triton", 9)
    num_copied, side = (2**16, 64) if dry_run else (COPY_BYTES, MATMUL_SIDE)
    rows = []
    for name in ("bf16", "fp32"):
        source, target = (torch.zeros(num_copied, dtype=torch.uint8, device=device) for _ in range(2))
        left, right = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        runs: dict[str, Any] = {"copy": lambda s=source, t=target: t.copy_(s), "matmul": lambda a=left, b=right: a @ b}
        cases = {}
        for map_side, channels in ((4, 16),) if dry_run else FULL_SHAPES:
            case = Case(map_side, map_side, channels, False, 1 if dry_run else 128, 8, 7, name, device.type)
            problem = check(backend, case)
            if problem:
                print(f"{backend} at {case.label} is wrong and was not timed: {problem}")
                return 1
            cases[case.label] = case
            runs[case.label] = build_contender(backend, case).train
        with progress_bar(repeats, f"roofline {name}") as bar:
            seconds = time_in_turn(runs, repeats, device, bar)
        middle = {key: sorted(values)[len(values) // 2] for key, values in seconds.items()}
        bandwidth, rate = 2 * num_copied / middle["copy"], 2 * side**3 / middle["matmul"]
        rows += [_fractions(case, middle[label], bandwidth, rate) for label, case in cases.items()]
    (folder / "roofline.json").write_text(json.dumps({"kind": "roofline", "rows": rows}, indent=1))
    print(f"Forward and backward of backend={backend}, against a copy and a matrix product measured beside it.\n")
    print("| layer | dtype | ms | GB/s | of copy | TFLOP/s | of matmul |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['shape']}, batch {row['batch_size']} | {row['dtype']} | {1e3 * row['seconds']:.3f} "
              f"| {row['bytes_per_sec'] / 1e9:,.0f} | {row['of_copy']:.3f} | {row['flops_per_sec'] / 1e12:,.2f} "
              f"| {row['of_matmul']:.4f} |")  # fmt: skip
    return 0


def _fractions(case: Any, seconds: float, bandwidth: float, rate: float) -> dict[str, Any]:
    """Return a row; `bandwidth` in bytes/s, `rate` in FLOP/s. FLOPs: three products, thrice with gradients."""
    num_values = case.batch_size * case.channels * case.height * case.width
    bytes_per_sec = TENSOR_PASSES * num_values * (4 if case.dtype == "fp32" else 2) / seconds
    flops_per_sec = 3 * 3 * 2 * case.kernel_size**2 * num_values / seconds
    return {
        "shape": case.label, "batch_size": case.batch_size, "dtype": case.dtype, "seconds": seconds,
        "bytes_per_sec": bytes_per_sec, "of_copy": bytes_per_sec / bandwidth, "copy_bytes_per_sec": bandwidth,
        "flops_per_sec": flops_per_sec, "of_matmul": flops_per_sec / rate, "matmul_flops_per_sec": rate,
    }  # fmt: skip


def gather(folder: Path) -> int:
    """Write the summaries; return 0 if every part is done."""
    statuses = {part: _status(folder, part) for part in SECONDS}
    paths = {part: folder / f"{part}.json" for part in SECONDS if _is_done(folder, part)}
    results = {part: json.loads(path.read_text()) for part, path in paths.items() if path.exists()}
    (folder / "summary.json").write_text(json.dumps({"parts": statuses, "results": results}, indent=1))
    sections = []
    for part, status in statuses.items():
        state = "not run" if status is None else f"exit code {status['exit_code']}, {status['seconds']} s"
        text = (folder / f"{part}.md").read_text() if status else ""
        chart = f"\n![{part}]({part}.png)\n" if (folder / f"{part}.png").exists() else ""
        sections.append(f"## {part} ({state})\n\n{text}{chart}")
    (folder / "summary.md").write_text("# GPU check\n\n" + "\n".join(sections))
    print(f"{sum(_is_done(folder, part) for part in SECONDS)} of {len(SECONDS)} parts done: {folder}/summary.md")
    return 0 if all(_is_done(folder, part) for part in SECONDS) else 1


def _status(folder: Path, part: str) -> dict[str, Any] | None:
    path = folder / f"{part}.status.json"
    return json.loads(path.read_text()) if path.exists() else None


def _is_done(folder: Path, part: str) -> bool:
    status = _status(folder, part)
    return status is not None and status["exit_code"] == 0


if __name__ == "__main__":
    sys.exit(main())
