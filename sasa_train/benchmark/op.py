"""`sasa-benchmark attention`: measure the operation, whole layers (`--layers`) or scaling with size (`--growth`)."""

import dataclasses
import statistics
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sasa_train.benchmark.contenders import (
    DTYPES,
    YARDSTICK,
    Case,
    Contender,
    admitted,
    check,
    first_pass_memory,
    missing,
    new_result,
    op_memory,
)
from sasa_train.benchmark.growth import measure_growth
from sasa_train.benchmark.timing import peak_of, ratio, spread, time_in_turn
from sasa_train.device import autocast
from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.refusal import ConfigError
from sasa_train.terminal import progress_bar

SHAPES = {
    32: ("32x32x64", "16x16x128", "8x8x256", "4x4x512", "32x32x128/2", "16x16x256/2", "8x8x512/2"),
    224: ("56x56x64", "28x28x128", "14x14x256", "56x56x128/2", "28x28x256/2", "14x14x512/2"),
}
BATCH_SIZES = {("cpu", 32): 32, ("cpu", 224): 8, ("cuda", 32): 512, ("cuda", 224): 128}
HALO_SIZE = 3
PASSES = {"forward": "infer", "forward_backward": "train"}  # names in the rows -> methods of a contender


def measure(options: Namespace, device: torch.device) -> dict[str, Any]:
    """Run the measurements; return rows, summary lines, notes on what was left out, and whether a check failed."""
    if options.layers:
        result, memory, passes = new_result("layers"), layer_memory, {"forward_backward": "train"}
        build = partial(layer_contenders, result)
    else:
        backends, notes = choose_backends(options.backends, device)
        if options.growth:
            result = measure_growth(options, backends, device)
            return result | {"notes": [*notes, *result["notes"]]}
        if "natten" in backends:
            notes.append("natten: no relative terms, and another border")
        result, memory, passes = new_result("attention", notes), op_memory, PASSES
        build = partial(admitted, backends, options.backends is not None, result)
    cases, repeats = build_cases(options, device), options.repeats
    with progress_bar(total=len(passes) * len(cases) * repeats, desc=result["kind"]) as bar:
        for case in cases:
            contenders, timings = build(case), {}
            for what, method in passes.items():
                runs = {name: getattr(each, method) for name, each in contenders.items()}
                timings[what] = time_in_turn(runs, repeats, device, bar)
            for name in contenders:
                row = {"shape": case.label, **dataclasses.asdict(case), "backend": name}
                for what, seconds in timings.items():
                    row[f"{what}_seconds"] = spread(seconds[name])
                    if YARDSTICK in seconds:
                        row[f"{what}_ratio"] = ratio(seconds[name], seconds[YARDSTICK])
                taken = peak_of(contenders[name].train, device, options.memory, memory, name, case)
                result["rows"].append(row if taken is None else row | {"memory_bytes": taken})
            del contenders, runs
    result["summary"] = summarize(result["rows"])
    return result


def choose_backends(wanted: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """Return the requested backends (by default, all that can run on the device), and notes on those left out.

    The reference is slow, so it runs only if it is requested by name.
    """
    named = wanted or ("conv", "cpu" if device.type == "cpu" else "triton", "flex", "natten")
    reasons = {backend: missing(backend, device) for backend in named}
    for backend, reason in reasons.items():
        if wanted and reason:
            raise ConfigError(f"--backends {backend}: {reason}")
    notes = [f"{backend} left out: {reason}" for backend, reason in reasons.items() if reason]
    return [backend for backend, reason in reasons.items() if not reason], notes


def build_cases(options: Namespace, device: torch.device) -> list[Case]:
    """Return the requested shapes (by default, those of the paper's ResNets); shapes that begin a stage come last."""
    texts = [(text, size) for size in options.image_size for text in SHAPES[size]]
    if options.shapes:
        texts = [(text, 32) for text in options.shapes]
    cases = []
    for text, image_size in sorted(texts, key=lambda pair: pair[0].endswith("/2")):
        height, width, channels = map(int, text.removesuffix("/2").split("x"))
        if channels % (2 * options.num_heads):
            raise ConfigError(
                f"--num-heads {options.num_heads} must divide the {channels} channels of {text} into even head_dims"
            )
        batch_size = options.batch_size or BATCH_SIZES[device.type, image_size]
        begins_stage = text.endswith("/2")
        rest = (begins_stage, batch_size, options.num_heads, options.kernel_size, options.dtype, device.type)
        cases.append(Case(height, width, channels, *rest))
    return cases


def summarize(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return each backend's geometric mean and worst ratio; shapes that begin a stage count only if no others exist."""
    lines = []
    inner = [row for row in rows if not row["begins_stage"]] or rows
    scope = "all shapes" if len(inner) == len(rows) else "shapes at which no stage begins"
    for backend in dict.fromkeys(row["backend"] for row in rows):
        ratios = {
            row["shape"]: row["forward_backward_ratio"]["median"]
            for row in inner
            if row["backend"] == backend and "forward_backward_ratio" in row
        }
        if backend != YARDSTICK and ratios:
            worst, mean = max(ratios, key=lambda shape: ratios[shape]), statistics.geometric_mean(ratios.values())
            words = f"forward+backward, {scope}: geometric mean {mean:.3f}, worst {ratios[worst]:.3f} ({worst})"
            lines.append(f"{backend}/{YARDSTICK}, {words}")
    return lines


def layer_contenders(result: dict[str, Any], case: Case) -> dict[str, Contender]:
    """Return the layers for a case, or none if local attention fails its check; the notes list omitted layers."""
    if problem := check("auto", case):
        result["failed"] = True
        result["notes"].append(f"local attention at {case.label} is wrong and was not timed: {problem}")
        return {}
    layers = build_layers(case)
    if "halo" not in layers:
        result["left_out"].setdefault("halo: neither 8 nor 7 divides the map", []).append(case.label)
    return {name: _on_random_map(layer, case) for name, layer in layers.items()}


def build_layers(case: Case) -> dict[str, nn.Module]:
    """Build the 3x3 convolution, our layer, and timm's HaloAttn if blocks of size 8 or 7 divide the map evenly."""
    from timm.layers.halo_attn import HaloAttn

    dim, heads, stride = case.channels, case.num_heads, case.stride
    layers: dict[str, nn.Module] = {
        YARDSTICK: nn.Conv2d(dim, dim, 3, stride, padding=1, bias=False),
        "attention": LocalSelfAttention2d(dim, dim, case.kernel_size, heads, stride),
    }
    block_size = next((size for size in (8, 7) if case.height % size == 0 and case.width % size == 0), None)
    if block_size:
        layers["halo"] = HaloAttn(dim, stride=stride, num_heads=heads, block_size=block_size, halo_size=HALO_SIZE)
    return {name: layer.to(case.device).to(memory_format=torch.channels_last) for name, layer in layers.items()}


def _on_random_map(layer: nn.Module, case: Case) -> Contender:
    """Build a contender that computes the gradients of a layer's input and weights; half precision uses autocast."""
    device = torch.device(case.device)
    x = torch.randn(case.batch_size, case.channels, case.height, case.width, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward() -> Tensor:
        with autocast(device, case.dtype):
            return layer(x)

    dtype = DTYPES[case.dtype]  # the dtype that autocast gives the output
    grad_output = torch.randn(case.output_shape, device=device).to(dtype, memory_format=torch.channels_last)
    return Contender(forward, [x, *layer.parameters()], grad_output)


def layer_memory(backend: str, case: Case, num_threads: int) -> int:
    small = dataclasses.replace(case, height=8, width=8, batch_size=1)
    return first_pass_memory(lambda case: _on_random_map(build_layers(case)[backend], case), small, case, num_threads)
