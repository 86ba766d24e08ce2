"""sasa-benchmark: time and memory of local attention, and of whole models, side by side in one process."""

import argparse
import datetime
import json
import platform
import re
import shlex
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sasa_train.commands import end_command
from sasa_train.extras import why_not
from sasa_train.machine import keep_freed_memory
from sasa_train.refusal import ConfigError
from sasa_train.terminal import fail

if TYPE_CHECKING:
    import torch

EPILOG = """examples:
  sasa-benchmark attention                                       the op at the paper's shapes, beside a 3x3 convolution
  sasa-benchmark attention --layers --image-size 224 --plot layers.png
  sasa-benchmark attention --growth --memory --plot growth.png   exponents over the map and the window
  sasa-benchmark model conv_resnet26,stem=conv_small hybrid_resnet26,stem=conv_small --image-size 32

Contenders take turns in each repetition, in alternating order, after a warm-up. Times are medians with the range;
ratios are medians of the repetitions' own ratios, with quartiles. The table is Markdown.
Exit codes: 0 done; 1 a backend's results are wrong, or it failed; 2 refused."""

ATTENTION = """Time local attention against the 3x3 convolution of the same width that it replaces.

Each backend's output and five gradients are compared with the reference in float64 first; one that fails is not timed.
Backends: conv (the yardstick), cpu, triton, reference (plain PyTorch, slow), flex (torch's FlexAttention), natten
(where installed; a window without relative terms). Left out, all that can run on the device but the reference.
Where a stage begins (32x32x128/2) attention runs on the larger map and is pooled; the convolution has stride 2.
Peak extra memory is what a forward and backward pass takes beyond its inputs and weights: on CUDA the allocator's
count; on the CPU, with --memory, the growth of the resident set in a fresh process."""

MODEL = """Time training steps (forward, cross entropy, backward, SGD with momentum) and inference of timm models.

A model is its name in timm's registry, ours among them, with dials: hybrid_resnet26,stem=conv_small,width=0.5.
Ratios are to the first. --memory: the peak of a model's first two steps, weights and momentum included, in a fresh
process; on the CPU of its resident set, above what it was before the model was built."""

IMAGE_SIZES = (32, 224)
DTYPES = ("fp32", "bf16", "fp16")
BACKENDS = ("conv", "cpu", "triton", "reference", "flex", "natten")
FORMATS = ("channels_last", "contiguous", "best")
FAILED, REFUSED = 1, 2


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return REFUSED
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # after --help or argparse's own refusal
        return int(stop.code or 0)
    try:
        return _run(options, shlex.join(["sasa-benchmark", *arguments]))
    except ConfigError as error:
        return fail(error)


def _run(options: argparse.Namespace, command: str) -> int:
    check_outputs(options)
    device = _set_up(options)
    header = describe_machine(device, command)
    print("\n".join(f"{name}: {text}" for name, text in header.items()) + "\n", flush=True)
    if options.command == "attention":
        from sasa_train.benchmark.op import measure
    else:
        from sasa_train.benchmark.nets import measure
    result = measure(options, device)
    print("\n".join(markdown(result)))
    if options.json:
        from sasa_train.files import write_atomic

        write_atomic(options.json, json.dumps({"header": header, **result}, indent=1).encode())
    if options.plot and result["rows"]:
        from sasa_train.benchmark.plots import draw_chart

        draw_chart(result, f"{header['hardware']}, {options.dtype}", options.plot)
    return FAILED if result["failed"] else 0


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse before anything is measured what could not be written afterwards."""
    if options.plot and (reason := why_not("--plot", "plots")):
        raise ConfigError(reason)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: there is no folder {path.parent}; make it first")


def _set_up(options: argparse.Namespace) -> "torch.device":
    import torch

    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda, but torch sees no CUDA device; use --device auto or cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if has_cuda and options.device != "cpu":
        torch.backends.cudnn.benchmark = True  # convolutions at their best
        return torch.device("cuda")
    if not options.default_malloc:
        keep_freed_memory()
    return torch.device("cpu")


def describe_machine(device: "torch.device", command: str) -> dict[str, str]:
    """What a published figure must name."""
    import torch

    num_threads = torch.get_num_threads()
    hardware = f"{_processor()}, {num_threads} thread{'s' if num_threads > 1 else ''}"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    packages = ["torch", "timm", *(["triton"] if device.type == "cuda" else [])]
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in packages)]
    header = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", "hardware": hardware}
    header |= {"versions": ", ".join(versions), "command": command}
    if device.type == "cuda":
        tf32 = torch.backends.cudnn.allow_tf32
        header["float32"] = f"convolutions {'may' if tf32 else 'may not'} use TF32 (cuDNN's default)"
    return header


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def markdown(result: dict[str, Any]) -> list[str]:
    """The table, then the summary and what was left out."""
    rows = {"attention": _op_row, "layers": _layer_row, "growth": _growth_row, "model": _model_row}[result["kind"]]
    cells = [rows(row) for row in result["rows"]]
    lines = []
    if cells:
        lines = [_join(cells[0].keys()), "|" + "---|" * len(cells[0]), *(_join(row.values()) for row in cells), ""]
    notes = [*result["notes"], *(f"left out at {', '.join(at)}: {what}" for what, at in result["left_out"].items())]
    return [*lines, *result["summary"], *(f"note: {note}" for note in notes)]


def _join(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _op_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"layer": f"{row['shape']}, batch {row['batch_size']}", "backend": row["backend"]}
    cells["forward, ms"] = _spread(row["forward_seconds"], 1e3)
    cells["forward+backward, ms"] = _spread(row["forward_backward_seconds"], 1e3)
    if "forward_ratio" in row:
        cells |= {"forward/conv": _ratio(row["forward_ratio"]), "both/conv": _ratio(row["forward_backward_ratio"])}
    return cells | _memory(row)


def _layer_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"map": f"{row['shape']}, batch {row['batch_size']}", "layer": row["backend"]}
    cells["forward+backward, ms"] = _spread(row["forward_backward_seconds"], 1e3)
    return cells | {"both/conv": _ratio(row["forward_backward_ratio"])} | _memory(row)


def _growth_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"grows": row["axis"], "map": f"{row['side']}x{row['side']}x{row['channels']}, batch {row['batch_size']}"}
    cells |= {"K": str(row["kernel_size"]), "backend": row["backend"]}
    cells["forward+backward, ms an image"] = _spread(row["seconds_per_image"], 1e3)
    if "memory_bytes_per_image" in row:
        cells["peak extra MiB an image"] = f"{row['memory_bytes_per_image'] / 2**20:.2f}"
    return cells


def _model_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"model": row["model"], "parameters": f"{row['parameters'] / 1e6:.2f} M"}
    cells |= {"format": row["memory_format"], "batch": str(row["batch_size"])}
    for what in ("training", "inference"):
        cells[f"{what}, images/s"] = _spread(row[f"{what}_images_per_sec"], 1)
        cells["ratio" if what == "training" else "ratio "] = _ratio(row[f"{what}_ratio"])
    if "memory_bytes" in row:
        cells["training's peak MiB"] = f"{row['memory_bytes'] / 2**20:,.0f}"
    return cells


def _memory(row: dict[str, Any]) -> dict[str, str]:
    return {"peak extra MiB": f"{row['memory_bytes'] / 2**20:.1f}"} if "memory_bytes" in row else {}


def _spread(found: dict[str, Any], unit: float) -> str:
    return f"{_digits(found['median'] * unit)} ({_digits(found['min'] * unit)} to {_digits(found['max'] * unit)})"


def _digits(number: float) -> str:
    """Three or more of them."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}" if number >= 100 else f"{number:.3g}"


def _ratio(found: dict[str, Any]) -> str:
    middle, low, high = (f"{x:.3f}" if x < 10 else _digits(x) for x in (found["median"], *found["quartiles"]))
    return f"{middle} ({low} to {high})"


def build_parser() -> argparse.ArgumentParser:
    parser = _described(argparse.ArgumentParser, prog="sasa-benchmark", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    attention = _described(commands.add_parser, name="attention", help="the op and the layer", description=ATTENTION)
    kind = attention.add_mutually_exclusive_group()
    kind.add_argument("--layers", action="store_true", help="whole layers, with projections, and timm's HaloAttn")
    kind.add_argument("--growth", action="store_true", help="over maps and windows, with fitted exponents")
    attention.add_argument(
        "--image-size", type=int, nargs="+", choices=IMAGE_SIZES, default=[*IMAGE_SIZES], help="whose shapes (both)"
    )
    attention.add_argument(
        "--shapes", type=_shape, nargs="+", metavar="HxWxC", help="own shapes; HxWxC/2 where a stage begins"
    )
    attention.add_argument("--backends", nargs="+", choices=BACKENDS, metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    attention.add_argument("--kernel-size", type=_odd, default=7, metavar="K", help="the window (7)")
    attention.add_argument("--num-heads", type=_positive, default=8, metavar="N", help="attention heads (8)")
    attention.add_argument("--growth-sides", type=_positive, nargs="+", default=[32, 56, 80, 112, 160, 224],
                           metavar="SIDE", help="square maps, pixels (32 to 224)")  # fmt: skip
    attention.add_argument("--growth-kernel-sizes", type=_odd, nargs="+", default=[3, 5, 7, 9, 11], metavar="K",
                           help="windows (3 to 11)")  # fmt: skip
    attention.add_argument(
        "--growth-side", type=_positive, default=56, metavar="SIDE", help="the map on which windows grow (56)"
    )
    attention.add_argument(
        "--growth-channels", type=_positive, default=64, metavar="C", help="channels of all these maps (64)"
    )

    model = _described(commands.add_parser, name="model", help="training steps and inference", description=MODEL)
    model.add_argument("models", metavar="NAME[,dial=value...]", nargs="+", help="models; the first is the yardstick")
    model.add_argument("--image-size", type=_positive, default=224, metavar="PIXELS", help="a side of the images (224)")
    model.add_argument("--num-classes", type=_positive, default=1000, metavar="N", help="classes (1000)")
    model.add_argument("--memory-format", choices=FORMATS, default="channels_last",
                       help="best: each model's faster one (channels_last)")  # fmt: skip
    model.add_argument("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    model.add_argument(
        "--fold-batch-norms", action="store_true", help="fold them into what is before them, in inference"
    )
    model.add_argument("--compile", action="store_true", help="through torch.compile")

    for command in (attention, model):
        command.add_argument("--default-malloc", action="store_true",
                             help="on a CPU: give freed memory back between calls, as the C library does by itself; "
                             "sasa-train keeps it")  # fmt: skip
        command.add_argument("--batch-size", type=_positive, metavar="B", help="images (the device's default)")
        command.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
        )
        command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (fp32)")
        command.add_argument(
            "--repeats", type=_positive, default=7, metavar="N", help="repetitions; 7 or more to publish (7)"
        )
        command.add_argument("--threads", type=_positive, metavar="N", help="the CPU's (torch's default)")
        command.add_argument("--memory", action="store_true", help="peak memory too, each in a fresh process")
        command.add_argument("--json", type=Path, metavar="FILE", help="everything measured, with each repetition")
        command.add_argument("--plot", type=Path, metavar="FILE.png", help="a chart; needs matplotlib")
    return parser


def _described(build: Callable[..., argparse.ArgumentParser], **texts: str) -> argparse.ArgumentParser:
    """A parser whose texts are printed as they stand here."""
    return build(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def _odd(text: str) -> int:
    if _positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} must be odd, so that the window has a centre")
    return int(text)


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*(/2)?", text):
        raise argparse.ArgumentTypeError(f"{text} must be height x width x channels, as in 5x19x48 or 32x32x128/2")
    return text


if __name__ == "__main__":
    main()
