"""Run all checks that need a GPU, in two calls that take a few minutes each: correctness and speed, then training.

Each part runs in a separate process with a time limit and writes PART.md, PART.json, PART.log and, if it draws a chart,
PART.png to FOLDER as it proceeds. The first call starts with `right`, the part that checks the kernels, and stops if
one is wrong. If another part fails or times out, the rest still run. summary.md and summary.json collect all results.
Running the same command again runs the parts that are not done yet; --only always runs the given parts.

usage: python scripts/gpu_check.py FOLDER --call 1
       python scripts/gpu_check.py FOLDER --call 2 --data CIFAR10     (class folders, train/ and test/)
       python scripts/gpu_check.py FOLDER --dry-run                   (both calls; tiny sizes, interpreted on a CPU)
"""

import argparse
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    call: int
    seconds: int
    what: str


PARTS = {  # most important first
    "right": Part(1, 30, "forward and gradients of two shapes against float64"),
    "compile": Part(1, 130, "all kernels and nets of this call, at once in many processes"),
    "tests": Part(1, 60, "the tests marked gpu, until the first that fails"),
    "op_bf16": Part(1, 60, "the op beside a convolution, at the paper's shapes"),
    "models_bf16": Part(1, 80, "training images/s of three ResNet-50"),
    "resume": Part(1, 60, "40 steps on CIFAR-10, a kill and a resume bit for bit, and a profile"),
    "train": Part(2, 240, "a hybrid ResNet-26 of full width on CIFAR-10"),
    "op_fp32": Part(2, 40, "the op in float32"),
    "flex_bf16": Part(2, 40, "the op beside FlexAttention"),
    "roofline": Part(2, 20, "the op beside a copy and a matrix product"),
}
SHAPES = ("56x56x64", "28x28x128", "14x14x256", "7x7x512", "56x56x128/2", "28x28x256/2", "14x14x512/2")
MODELS = ("conv_resnet50", "hybrid_resnet50", "hybrid_resnet50,stage_ops=[conv,conv,attention,attention]")
TINY_SHAPES = ("3x5x8", "4x4x8/2")
TINY_MODELS = tuple(f"{family}_resnet26,stem=conv_small,width=0.125,num_heads=2" for family in ("conv", "hybrid"))
TRAINING = [  # a short version of the CIFAR-10 recipe
    "experiment=cifar10_hybrid_resnet26", "trainer.global_batch_size=512", "trainer.eval_every_epochs=5",
]  # fmt: skip
TINY_TRAINING = [
    "experiment=cifar10_hybrid_resnet26", "data=digits", "model.width=0.125", "model.num_heads=2",
    "data.max_train_images=300", "data.max_val_images=60", "trainer.global_batch_size=16", "trainer.device=cpu",
    "augment.mix_off_epochs=0", "schedule.warmup_epochs=0",
]  # fmt: skip
SECONDS_TO_SAVE = 30  # at the end of the part train
MAX_BYTES = 15 * 2**20  # per file of weights, small enough for most file transfers
TENSOR_PASSES = 12  # forward: read q, k, v, write the output; backward: read these and grad_output, write three
FULL_SHAPES = ((56, 64), (28, 128), (14, 256), (32, 64))  # map size, channels
COPY_BYTES, MATMUL_SIDE = 2**30, 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--call", type=int, choices=(1, 2), help="1 or 2 (default: both)")
    parser.add_argument("--only", metavar="PART", nargs="+", choices=PARTS, help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10 as class folders (default: digits)")
    parser.add_argument("--epochs", type=int, default=35, help="epochs of the part train (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data:
        options.data = options.data.resolve()  # the parts run in another folder
        if not options.data.is_dir():
            parser.error(f"--data {options.data}: there is no such folder; give the one that holds train/ and test/")
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = options.folder.resolve()
    if options.measure:
        return MEASURES[options.measure](options)
    chosen = options.only or [p for p in PARTS if options.call in (None, PARTS[p].call) and not _is_done(options, p)]
    print_plan(chosen)
    for part in chosen:
        if not run_part(part, options) and part == "right":
            print("the kernels are wrong: nothing else is worth its time")
            break
    return gather(options)


def print_plan(chosen: list[str]) -> None:
    for call, parts in itertools.groupby(PARTS, lambda part: PARTS[part].call):
        names = list(parts)
        print(f"call {call}: {sum(PARTS[part].seconds for part in names)} s at most")
        for part in names:
            print(
                f"  {part:<12} {PARTS[part].seconds:>4} s  {PARTS[part].what}{'' if part in chosen else ' (not now)'}"
            )


def run_part(part: str, options: argparse.Namespace) -> bool:
    """Run a part within its time limit and record whether it succeeded."""
    print(f"{part} ...", end=" ", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if options.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    start, folder = time.perf_counter(), options.folder
    limit = PARTS[part].seconds * (4 if options.dry_run else 1)  # the interpreter is slow, and the machine may be busy
    with (folder / f"{part}.md").open("w") as out, (folder / f"{part}.log").open("w") as log:
        command = [sys.executable, *part_command(part, options)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=log, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = "timeout"
            os.killpg(process.pid, signal.SIGKILL)  # including the processes that it started
            process.wait()
    status = {"exit_code": code, "seconds": round(time.perf_counter() - start, 1), "dry_run": options.dry_run}
    (folder / f"{part}.status.json").write_text(json.dumps(status))
    print(f"{'done' if code == 0 else f'failed ({code}, see {part}.log and {part}.md)'}, {status['seconds']} s")
    return code == 0


def part_command(part: str, options: argparse.Namespace) -> list[str]:
    """Return the arguments of the Python command that runs a part."""
    if part == "tests":
        # Without a GPU, the marked tests are only collected, not run.
        chosen = ["--collect-only"] if options.dry_run else ["-x"]
        # Only the modules with such tests are named, because others may need extras that this machine lacks.
        modules = [str(path) for path in (ROOT / "tests").glob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
        return ["-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "gpu", *chosen, *sorted(modules)]
    if part in MEASURES:
        more = [f"--data={options.data}"] if options.data else []
        more += ["--dry-run"] if options.dry_run else []
        return [
            str(Path(__file__).resolve()),
            str(options.folder),
            "--measure",
            part,
            f"--epochs={options.epochs}",
            *more,
        ]
    kind, dtype = part.split("_")
    written = [f"--json={options.folder / part}.json", f"--plot={options.folder / part}.png"]
    return [*benchmark(kind, dtype, options.dry_run), *written]


def benchmark(kind: str, dtype: str, dry_run: bool, only: str | None = None, repeats: int = 9) -> list[str]:
    """Return the Python arguments that run sasa-benchmark with all its shapes or models, or with only one of them."""
    command = ["-m", "sasa_train.benchmark", "model" if kind == "models" else "attention"]
    rest = [f"--dtype={dtype}", f"--repeats={1 if dry_run else repeats}", f"--device={'cpu' if dry_run else 'cuda'}"]
    if kind == "models":
        models = [only] if only else [*(TINY_MODELS if dry_run else MODELS)]
        size = ["--image-size=8", "--batch-size=2", "--num-classes=5"]
        full = ["--image-size=224", "--batch-size=128", "--compile", "--memory-format=channels_last"]
        return [*command, *models, *(size if dry_run else full), *rest]
    # FlexAttention is recompiled for every shape, forward and backward, so only a few shapes are run.
    shapes = [only] if only else list(TINY_SHAPES if dry_run else SHAPES[:2] if kind == "flex" else SHAPES)
    backends = ["conv", "triton"] + (["cpu" if dry_run else "flex"] if kind == "flex" else [])
    tiny = ["--num-heads=2", "--kernel-size=3", "--batch-size=1"]
    return [*command, "--backends", *backends, "--shapes", *shapes, *(tiny if dry_run else ["--batch-size=128"]), *rest]


def measure_right(options: argparse.Namespace) -> int:
    """Compare outputs and gradients with float64 results, and stop at the first difference."""
    import torch

    from sasa_train.benchmark.contenders import Case, check

    device = torch.device("cpu" if options.dry_run else "cuda")
    print(
        f"torch {torch.__version__}, {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU, interpreted'}\n"
    )
    for side, channels in ((3, 16),) if options.dry_run else ((56, 64), (14, 256)):
        for dtype in ("bf16", "fp32", "fp16"):
            kernel_size, batch_size = (3, 1) if options.dry_run else (7, 4)
            case = Case(side, side, channels, False, batch_size, 8, kernel_size, dtype, device.type)
            problem = check("triton", case)
            print(f"- {case.label}, {dtype}: {problem or 'right'}", flush=True)
            if problem:
                return 1
    return 0


def measure_compile(options: argparse.Namespace) -> int:
    """Fill the caches on disk by running each benchmark of this call once, in one process per shape or model."""
    whole = [("op", shape) for shape in SHAPES] + [("models", model) for model in MODELS]
    tiny = [("op", TINY_SHAPES[0]), ("models", TINY_MODELS[1])]
    started = {}
    for kind, only in tiny if options.dry_run else whole:
        command = [sys.executable, *benchmark(kind, "bf16", options.dry_run, only, repeats=1)]
        started[only] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    start, code = time.perf_counter(), 0
    for only, process in started.items():
        failed = process.wait()
        print(f"- {only}: {'failed' if failed else 'done'} by {time.perf_counter() - start:.0f} s", flush=True)
        code = code or failed
    return code


def training(options: argparse.Namespace, out: Path, *more: str) -> list[str]:
    """Return the command for a training run that writes to `out`."""
    overrides = TINY_TRAINING if options.dry_run else TRAINING
    if not options.dry_run:
        overrides = [*overrides, f"data.root={options.data}"] if options.data else [*overrides, "data=digits"]
    return [sys.executable, "-m", "sasa_train.train", *overrides, f"output_dir={out}", *more]


def measure_resume(options: argparse.Namespace) -> int:
    """Train twice for 40 steps, killing and resuming one of the runs, and compare the two; then profile a run."""
    import torch

    num_steps = 6 if options.dry_run else 40
    out = Path(tempfile.mkdtemp())
    # Two epochs in these steps; each of the four starts reads the images anew.
    few = ["data.max_train_images=10240", "data.max_val_images=1000"] if options.data and not options.dry_run else []
    exact = [
        *few,
        f"trainer.max_steps={num_steps}",
        "trainer.deterministic=true",
        f"trainer.checkpoint_every_steps={num_steps // 2}",
    ]
    subprocess.run(training(options, out, *exact, "run_name=whole"), check=True, stdout=subprocess.DEVNULL)
    killed = subprocess.Popen(training(options, out, *exact, "run_name=killed"), stdout=subprocess.DEVNULL)
    while killed.poll() is None and not (out / "killed/checkpoints/last.pt").exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    subprocess.run(training(options, out, *exact, "run_name=killed"), check=True, stdout=subprocess.DEVNULL)
    states = [torch.load(out / name / "checkpoints/last.pt", map_location="cpu") for name in ("whole", "killed")]
    differing = [
        f"{kind}.{name}"
        for kind in ("model", "ema")
        for name, tensor in states[0][kind].items()
        if not torch.equal(tensor, states[1][kind][name])
    ]
    print(
        f"- killed and resumed with trainer.deterministic=true: {len(differing)} tensors differ {differing[:3]}",
        flush=True,
    )
    profile = [
        *few,
        "run_name=profiled",
        f"trainer.profile_steps={2 if options.dry_run else 20}",
        f"trainer.max_steps={2 * num_steps}",
    ]
    subprocess.run(training(options, out, *profile), check=True, stdout=subprocess.DEVNULL)
    for table in (out / "profiled/profile").glob("*.txt"):
        print(f"\n```\n{table.read_text()}\n```")
    shutil.copy(out / "profiled/metrics.jsonl", options.folder / "resume.metrics.jsonl")
    shutil.rmtree(out)
    return 1 if differing else 0


def measure_train(options: argparse.Namespace) -> int:
    """Train, and save the run's small files and its averaged weights in half precision.

    A run that is too slow for its epochs stops early, so that its results are not lost.
    """
    out = Path(tempfile.mkdtemp())
    epochs = 1 if options.dry_run else options.epochs
    seconds = PARTS["train"].seconds - SECONDS_TO_SAVE
    limits = (f"trainer.epochs={epochs}", f"trainer.max_hours={seconds / 3600}")
    code = subprocess.run(training(options, out, "run_name=train", *limits), check=False).returncode
    run = out / "train"
    for path in (
        *(run / name for name in ("metrics.jsonl", "run.json", "config.yaml")),
        *run.glob("tensorboard/events*"),
    ):
        if path.exists():
            shutil.copy(path, options.folder / f"train.{path.name}")
    if (run / "checkpoints/last.pt").exists():
        for number, piece in enumerate(half_pieces(run / "checkpoints/last.pt")):
            import torch

            torch.save(piece, options.folder / f"train.weights-{number}.pt")
    shutil.rmtree(out)
    return code


def half_pieces(checkpoint: Path) -> Iterator[dict[str, Any]]:
    """Yield the averaged weights in half precision, in pieces of at most MAX_BYTES."""
    import torch

    piece: dict[str, Any] = {}
    size = 0
    for name, tensor in torch.load(checkpoint, map_location="cpu")["ema"].items():
        half = tensor.half() if tensor.is_floating_point() else tensor
        if size + half.nbytes > MAX_BYTES:
            yield piece
            piece, size = {}, 0
        piece[name] = half
        size += half.nbytes
    yield piece


def measure_roofline(options: argparse.Namespace) -> int:
    """Compare the op's throughput with the device's measured copy and matrix-multiply throughput."""
    import torch

    from sasa_train.benchmark.contenders import DTYPES, Case, build_contender, check
    from sasa_train.benchmark.timing import time_in_turn
    from sasa_train.terminal import progress_bar

    folder, dry_run = options.folder, options.dry_run
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
        with progress_bar(total=repeats, desc=f"roofline {name}") as bar:
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
    """Return a row for `bandwidth` in bytes/s and `rate` in FLOP/s, counting 3 products, or 9 including backward."""
    num_values = case.batch_size * case.channels * case.height * case.width
    bytes_per_sec = TENSOR_PASSES * num_values * (4 if case.dtype == "fp32" else 2) / seconds
    flops_per_sec = 3 * 3 * 2 * case.kernel_size**2 * num_values / seconds
    return {
        "shape": case.label, "batch_size": case.batch_size, "dtype": case.dtype, "seconds": seconds,
        "bytes_per_sec": bytes_per_sec, "of_copy": bytes_per_sec / bandwidth, "copy_bytes_per_sec": bandwidth,
        "flops_per_sec": flops_per_sec, "of_matmul": flops_per_sec / rate, "matmul_flops_per_sec": rate,
    }  # fmt: skip


def gather(options: argparse.Namespace) -> int:
    """Write the summaries; return 0 if every part of the chosen call is done."""
    folder = options.folder
    statuses = {part: _status(options, part) for part in PARTS}
    results = {part: folder / f"{part}.json" for part in PARTS if _is_done(options, part)}
    summary = {
        "parts": statuses,
        "results": {part: json.loads(path.read_text()) for part, path in results.items() if path.exists()},
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    sections = []
    for part, status in statuses.items():
        state = "not run" if status is None else f"exit code {status['exit_code']}, {status['seconds']} s"
        text = (folder / f"{part}.md").read_text() if status else ""
        chart = f"\n![{part}]({part}.png)\n" if (folder / f"{part}.png").exists() else ""
        sections.append(f"## {part}: {PARTS[part].what} ({state})\n\n{text}{chart}")
    (folder / "summary.md").write_text("# GPU check\n\n" + "\n".join(sections))
    wanted = [part for part in PARTS if options.call in (None, PARTS[part].call)]
    num_done = sum(_is_done(options, part) for part in wanted)
    print(f"{num_done} of {len(wanted)} parts done: {folder}/summary.md")
    return 0 if num_done == len(wanted) else 1


def _status(options: argparse.Namespace, part: str) -> dict[str, Any] | None:
    path = options.folder / f"{part}.status.json"
    return json.loads(path.read_text()) if path.exists() else None


def _is_done(options: argparse.Namespace, part: str) -> bool:
    """Return whether a part has succeeded with the currently requested sizes."""
    status = _status(options, part)
    return status is not None and status["exit_code"] == 0 and status["dry_run"] == options.dry_run


MEASURES = {
    "right": measure_right,
    "compile": measure_compile,
    "resume": measure_resume,
    "train": measure_train,
    "roofline": measure_roofline,
}

if __name__ == "__main__":
    sys.exit(main())
