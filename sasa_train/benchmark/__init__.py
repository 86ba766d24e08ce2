"""sasa-benchmark: compare the time and memory of local attention and of whole models, side by side in one process."""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import described, end_command, positive, run
from sasa_train.extras import why_not
from sasa_train.files import kind
from sasa_train.machine import keep_freed_memory, processor
from sasa_train.refusal import ConfigError
from sasa_train.terminal import FAILED, load_torch

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
(where installed; a window without relative terms). Default: all that can run on the device, without the reference.
Where a stage begins (32x32x128/2) attention runs on the larger map and is pooled; the convolution has stride 2.
Peak extra memory is what a forward and backward pass takes beyond its inputs and weights: on CUDA the allocator's
count; on the CPU, with --memory, the growth of the resident set in a fresh process."""

MODEL = """Time training steps (forward, cross entropy, backward, SGD with momentum) and inference of timm models.

A model is its name in timm's registry, ours among them, with keys: hybrid_resnet26,stem=conv_small,width=0.5.
Ratios are to the first. --memory: the peak of a model's first two steps, weights and momentum included, in a fresh
process; on the CPU of its resident set, above what it was before the model was built."""

IMAGE_SIZES = (32, 224)
DTYPES = ("fp32", "bf16", "fp16")
BACKENDS = ("conv", "cpu", "triton", "reference", "flex", "natten")
FORMATS = ("channels_last", "contiguous", "best")


def main() -> None:
    end_command(run_command)


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments and return its exit code."""
    command = shlex.join(["sasa-benchmark", *arguments])
    return run(build_parser(), arguments, lambda options: _run(options, command), has_subcommands=True)


def _run(options: argparse.Namespace, command: str) -> int:
    check_outputs(options)
    device = _set_up(options)
    header = describe_machine(device, command)
    print("\n".join(f"{name}: {text}" for name, text in header.items()) + "\n", flush=True)
    from sasa_train.benchmark import nets, op
    from sasa_train.benchmark.result_table import markdown

    result = (op if options.command == "attention" else nets).measure(options, device)
    print("\n".join(markdown(result)))
    if options.json:
        from sasa_train.files import write_atomic

        write_atomic(options.json, json.dumps({"header": header, **result}, indent=1).encode())
    if options.plot and result["rows"]:
        from sasa_train.benchmark.plots import draw_chart

        draw_chart(result, f"{header['hardware']}, {options.dtype}", options.plot)
    return FAILED if result["failed"] else 0


def check_outputs(options: argparse.Namespace) -> None:
    """Before anything is measured, reject output paths that cannot be written."""
    if options.plot and (reason := why_not("--plot", "plots")):
        raise ConfigError(reason)
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not path.parent.is_dir():
            raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist; make it first")
        if path and os.path.lexists(path) and (found := kind(path)) not in ("a file", "a symbolic link"):
            raise ConfigError(f"{option} {path}: is {found}, and would be replaced; give another place")


def _set_up(options: argparse.Namespace) -> "torch.device":
    load_torch()
    import torch

    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ConfigError("--device cuda, but torch sees no CUDA device; use --device auto or cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    if has_cuda and options.device != "cpu":
        torch.backends.cudnn.benchmark = True  # selects the fastest convolutions, for a fair comparison
        return torch.device("cuda")
    if not options.default_malloc:
        keep_freed_memory()
    return torch.device("cpu")


def describe_machine(device: "torch.device", command: str) -> dict[str, str]:
    """Return the details of the machine and command that must accompany a published figure."""
    import torch

    num_threads = torch.get_num_threads()
    hardware = f"{processor()}, {num_threads} thread{'s' if num_threads > 1 else ''}"
    if device.type == "cuda":
        hardware = f"{torch.cuda.get_device_name()}; {hardware}"
    packages = ["torch", "timm", *(["triton"] if device.type == "cuda" and find_spec("triton") else [])]
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)]
    header = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", "hardware": hardware}
    header |= {"versions": ", ".join(versions), "command": command}
    if device.type == "cuda":
        tf32 = torch.backends.cudnn.allow_tf32
        header["float32"] = f"convolutions {'may' if tf32 else 'may not'} use TF32 (cuDNN's default)"
    return header


def build_parser() -> argparse.ArgumentParser:
    parser = described(prog="sasa-benchmark", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    attention = described(commands.add_parser, name="attention", help="the op and the layer", description=ATTENTION)
    kind = attention.add_mutually_exclusive_group()
    kind.add_argument("--layers", action="store_true", help="whole layers, with projections, and timm's HaloAttn")
    kind.add_argument("--growth", action="store_true", help="over maps and windows, with fitted exponents")
    add, sizes = attention.add_argument, [*IMAGE_SIZES]
    add("--image-size", type=int, nargs="+", choices=IMAGE_SIZES, default=sizes, help="whose shapes (both)")
    add("--shapes", type=_shape, nargs="+", metavar="HxWxC", help="own shapes; HxWxC/2 where a stage begins")
    add("--backends", nargs="+", choices=BACKENDS, metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    add("--kernel-size", type=_odd, default=7, metavar="K", help="the window (7)")
    add("--num-heads", type=positive, default=8, metavar="N", help="attention heads (8)")
    sides, kernel_sizes = [32, 56, 80, 112, 160, 224], [3, 5, 7, 9, 11]
    add("--growth-sides", type=positive, nargs="+", default=sides, metavar="SIDE", help="maps, pixels (32 to 224)")
    add("--growth-kernel-sizes", type=_odd, nargs="+", default=kernel_sizes, metavar="K", help="windows (3 to 11)")
    add("--growth-side", type=positive, default=56, metavar="SIDE", help="the map on which windows grow (56)")
    add("--growth-channels", type=positive, default=64, metavar="C", help="channels of all these maps (64)")

    model = described(commands.add_parser, name="model", help="training steps and inference", description=MODEL)
    add, layout = model.add_argument, "channels_last"
    add("models", metavar="NAME[,key=value...]", nargs="+", help="models; the first is the yardstick")
    add("--image-size", type=positive, default=224, metavar="PIXELS", help="a side of the images (224)")
    add("--num-classes", type=positive, default=1000, metavar="N", help="classes (1000)")
    add("--memory-format", choices=FORMATS, default=layout, help=f"best: each model's faster one ({layout})")
    add("--grad-checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--fold-batch-norms", action="store_true", help="fold them into what is before them, in inference")
    add("--compile", action="store_true", help="through torch.compile")

    for command in (attention, model):
        add = command.add_argument
        add("--default-malloc", action="store_true", help="on a CPU: give freed memory back between calls, as the C "
            "library does by itself; sasa-train keeps it")  # fmt: skip
        add("--batch-size", type=positive, metavar="B", help="images (the device's default)")
        add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
        add("--dtype", choices=DTYPES, default="fp32", help="of weights and images (fp32)")
        add("--repeats", type=positive, default=7, metavar="N", help="repetitions; 7 or more to publish (7)")
        add("--threads", type=positive, metavar="N", help="the CPU's (torch's default)")
        add("--memory", action="store_true", help="peak memory too, each in a fresh process")
        add("--json", type=Path, metavar="FILE", help="write all measurements, with each repetition")
        add("--plot", type=Path, metavar="FILE.png", help="a chart; needs matplotlib")
    return parser


def _odd(text: str) -> int:
    if positive(text) % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} must be odd, so that the window has a centre")
    return int(text)


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*(/2)?", text):
        raise argparse.ArgumentTypeError(f"{text} must be height x width x channels, as in 5x19x48 or 32x32x128/2")
    return text
