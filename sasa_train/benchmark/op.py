"""`sasa-benchmark attention`: the op, whole layers (`--layers`), and how time and memory grow (`--growth`)."""

import dataclasses
import statistics
from argparse import Namespace
from collections.abc import Sequence
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
    missing,
    new_result,
    op_memory,
)
from sasa_train.benchmark.growth import measure_growth
from sasa_train.benchmark.timing import (
    Run,
    extra_memory,
    in_fresh_process,
    progress_bar,
    ratio,
    spread,
    time_in_turn,
)
from sasa_train.device import autocast
from sasa_train.models.layers import LocalSelfAttention2d
from sasa_train.refusal import ConfigError

SHAPES = {
    32: ("32x32x64", "16x16x128", "8x8x256", "4x4x512", "32x32x128/2", "16x16x256/2", "8x8x512/2"),
    224: ("56x56x64", "28x28x128", "14x14x256", "56x56x128/2", "28x28x256/2", "14x14x512/2"),
}
BATCH_SIZES = {("cpu", 32): 32, ("cpu", 224): 8, ("cuda", 32): 512, ("cuda", 224): 128}
HALO_SIZE = 3


def measure(options: Namespace, device: torch.device) -> dict[str, Any]:
    """Rows, summary lines, notes on what was left out, and whether a backend failed its gate."""
    if options.layers:
        return _measure_layers(options, device)
    backends, notes = choose_backends(options.backends, device)
    result = (measure_growth if options.growth else _measure_op)(options, backends, device)
    return result | {"notes": [*notes, *result["notes"]]}


def choose_backends(wanted: Sequence[str] | None, device: torch.device) -> tuple[list[str], list[str]]:
    """Those asked for by name, or all that can run on the device; the reference, slow as it is, by name alone.

    With them notes on those left out.
    """
    named = wanted or ("conv", "cpu" if device.type == "cpu" else "triton", "flex", "natten")
    reasons = {backend: missing(backend, device) for backend in named}
    for backend, reason in reasons.items():
        if wanted and reason:
            raise ConfigError(f"--backends {backend}: {reason}")
    notes = [f"{backend} left out: {reason}" for backend, reason in reasons.items() if reason]
    return [backend for backend, reason in reasons.items() if not reason], notes


def build_cases(options: Namespace, device: torch.device) -> list[Case]:
    """The shapes asked for, or those of the paper's ResNets; stage beginnings last."""
    texts = [(text, size) for size in options.image_size for text in SHAPES[size]]
    if options.shapes:
        texts = [(text, 32) for text in options.shapes]
    cases = []
    for text, image_size in sorted(texts, key=lambda pair: pair[0].endswith("/2")):
        height, width, channels = (int(number) for number in text.removesuffix("/2").split("x"))
        if channels % (2 * options.num_heads):
            raise ConfigError(
                f"--num-heads {options.num_heads} must divide the {channels} channels of {text} into even head_dims"
            )
        batch_size = options.batch_size or BATCH_SIZES[device.type, image_size]
        begins_stage = text.endswith("/2")
        rest = (begins_stage, batch_size, options.num_heads, options.kernel_size, options.dtype, device.type)
        cases.append(Case(height, width, channels, *rest))
    return cases


def _measure_op(options: Namespace, backends: list[str], device: torch.device) -> dict[str, Any]:
    result = new_result("attention")
    if "natten" in backends:
        result["notes"].append("natten: no relative terms, and another border")
    cases = build_cases(options, device)
    with progress_bar(2 * len(cases) * options.repeats, "attention") as bar:
        for case in cases:
            contenders = admitted(backends, case, options.backends is not None, result)
            forward = time_in_turn({name: c.infer for name, c in contenders.items()}, options.repeats, device, bar)
            both = time_in_turn({name: c.train for name, c in contenders.items()}, options.repeats, device, bar)
            for name in contenders:
                row = {"backend": name, **_compare(name, {"forward": forward, "forward_backward": both})}
                if device.type == "cuda":
                    row["memory_bytes"] = extra_memory(contenders[name].train, device)
                elif options.memory:
                    row["memory_bytes"] = in_fresh_process(op_memory, name, case, torch.get_num_threads())
                result["rows"].append({"shape": case.label, **dataclasses.asdict(case), **row})
            del contenders
    result["summary"] = summarize(result["rows"])
    return result


def _compare(name: str, timings: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Seconds of each timing, and its ratio to the yardstick where that ran."""
    row: dict[str, Any] = {}
    for what, seconds in timings.items():
        row[f"{what}_seconds"] = spread(seconds[name])
        if YARDSTICK in seconds:
            row[f"{what}_ratio"] = ratio(seconds[name], seconds[YARDSTICK])
    return row


def summarize(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each backend the geometric mean and the worst of its ratios; stage beginnings do not count beside others."""
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
            worst = max(ratios, key=lambda shape: ratios[shape])
            lines.append(
                f"{backend}/{YARDSTICK}, forward+backward, {scope}: geometric mean "
                f"{statistics.geometric_mean(ratios.values()):.3f}, worst {ratios[worst]:.3f} ({worst})"
            )
    return lines


def _measure_layers(options: Namespace, device: torch.device) -> dict[str, Any]:
    result = new_result("layers")
    cases = build_cases(options, device)
    with progress_bar(len(cases) * options.repeats, "layers") as bar:
        for case in cases:
            problem = check("auto", case)
            if problem:
                result["failed"] = True
                result["notes"].append(f"local attention at {case.label} is wrong and was not timed: {problem}")
                continue
            layers = build_layers(case)
            if "halo" not in layers:
                result["left_out"].setdefault("halo: neither 8 nor 7 divides the map", []).append(case.label)
            contenders = {name: _train_layer(layer, case, device) for name, layer in layers.items()}
            seconds = time_in_turn(contenders, options.repeats, device, bar)
            for name in contenders:
                row = {"backend": name, **_compare(name, {"forward_backward": seconds})}
                if device.type == "cuda":
                    row["memory_bytes"] = extra_memory(contenders[name], device)
                elif options.memory:
                    row["memory_bytes"] = in_fresh_process(layer_memory, name, case, torch.get_num_threads())
                result["rows"].append({"shape": case.label, **dataclasses.asdict(case), **row})
    result["summary"] = summarize(result["rows"])
    return result


def build_layers(case: Case) -> dict[str, nn.Module]:
    """The 3x3 convolution, ours, and timm's HaloAttn where its blocks of 8, or 7, tile the map."""
    from timm.layers.halo_attn import HaloAttn

    stride = 2 if case.begins_stage else 1
    dim, heads = case.channels, case.num_heads
    layers: dict[str, nn.Module] = {
        YARDSTICK: nn.Conv2d(dim, dim, 3, stride, padding=1, bias=False),
        "attention": LocalSelfAttention2d(dim, dim, case.kernel_size, heads, stride),
    }
    block_size = next((size for size in (8, 7) if case.height % size == 0 and case.width % size == 0), None)
    if block_size:
        layers["halo"] = HaloAttn(dim, stride=stride, num_heads=heads, block_size=block_size, halo_size=HALO_SIZE)
    return {name: layer.to(case.device).to(memory_format=torch.channels_last) for name, layer in layers.items()}


def _train_layer(layer: nn.Module, case: Case, device: torch.device) -> Run:
    """Forward and backward, differentiated in the input and all weights; half precision as autocast has it."""
    x = torch.randn(case.batch_size, case.channels, case.height, case.width, device=device)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *layer.parameters()]

    def forward() -> Tensor:
        with autocast(device, case.dtype):
            return layer(x)

    dtype = DTYPES[case.dtype]  # what autocast makes of the output
    grad_output = torch.randn(case.output_shape, device=device).to(dtype, memory_format=torch.channels_last)
    return Contender(forward, leaves, grad_output).train


def layer_memory(name: str, case: Case, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    device = torch.device(case.device)
    small = dataclasses.replace(case, height=8, width=8, batch_size=1)
    _train_layer(build_layers(small)[name], small, device)()
    return extra_memory(_train_layer(build_layers(case)[name], case, device), device)
