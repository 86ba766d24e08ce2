"""The FLOPs of a step, and the device's peak, with which mfu (model FLOPs utilisation) compares what a run achieves."""

import re

import torch

from sasa_train.config.derived import bought_steps
from sasa_train.config.keys import TrainConfig
from sasa_train.device import RunPlan
from sasa_train.models.counting import bought_flops, step_flops
from sasa_train.refusal import ConfigError

# Dense peaks (without sparsity) in TFLOP/s by NVIDIA's data sheets: fp16 and bf16 with sums in fp32, TF32, fp32. Each
# key is a part, in whole words, of the names by torch.cuda.get_device_name; the first that matches holds.
PEAKS: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75),
    "GH200": (989.5, 494.5, 67),
    "H200 NVL": (835.5, 417.5, 60),
    "H200": (989.5, 494.5, 67),
    "H100 PCIe": (756.5, 378, 51),
    "H100 NVL": (835.5, 417.5, 60),
    "H100": (989.5, 494.5, 67),
    "A100": (312, 156, 19.5),
    "A40": (149.7, 74.8, 37.4),
    "A30": (165, 82, 10.3),
    "A10": (125, 62.5, 31.2),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
    "V100S": (130, 16.4, 16.4),  # Volta and Turing have no TF32
    "V100-PCIE": (112, 14, 14),
    "V100-SXM2": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}
OTHERS = r"\b(Laptop|MIG|RTX 4090 D|RTX 3090 Ti)\b"  # slower or faster than the name suggests


def known_peak(name: str, precision: str, matmul_precision: str) -> float | None:
    """Return the dense peak of a GPU in TFLOP/s at a precision, or None if it is not in `PEAKS`."""
    found = next((peaks for key, peaks in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
    if found is None or re.search(OTHERS, name):
        return None
    return found[0] if precision != "fp32" else found[1] if matmul_precision != "highest" else found[2]


def peak_tflops(plan: RunPlan) -> float | None:
    """Return the peak of all of a run's devices in TFLOP/s, or None if it is unknown."""
    trainer, peak = plan.trainer, plan.trainer.peak_tflops
    if peak is None and plan.device.type == "cuda":
        peak = known_peak(torch.cuda.get_device_name(plan.device), trainer.precision, trainer.matmul_precision)
    return None if peak is None else peak * plan.world_size


def utilisation(plan: RunPlan, peak: float | None, seconds_per_step: float) -> dict[str, float]:
    """Return what steps of this duration achieve: `tflops` (TFLOP/s) and, if the peak is known, `mfu` in percent."""
    if not plan.step_flops:
        return {}
    tflops = plan.step_flops / seconds_per_step / 1e12
    return {"tflops": tflops} | ({"mfu": 100 * tflops / peak} if peak else {})


def check_budget(config: TrainConfig, num_classes: int) -> None:
    """Raise ConfigError if trainer.max_pflops is less than a step, or the model's FLOPs cannot be counted."""
    bought_steps(config.trainer, bought_flops(config, num_classes))


def count_step(config: TrainConfig, num_classes: int) -> tuple[int | None, str]:
    """Return the FLOPs of a step, or None with the reason; they are counted on the meta device if possible.

    Raises:
        ConfigError: see `check_budget`.
    """
    check_budget(config, num_classes)
    try:
        return step_flops(config, num_classes), ""
    except ConfigError as error:
        return None, str(error)


def describe_compute(plan: RunPlan, reason: str) -> str:
    """Format the FLOPs of a step and of the run, and what trainer.max_pflops buys; `reason`: why they are not known."""
    if plan.step_flops is None:
        return f"unknown: {reason}"
    text = f"{scaled(plan.step_flops)}FLOPs per step (forward and backward), {scaled(plan.step_flops * plan.num_steps)}"
    text += "FLOPs in all"
    bought = bought_steps(plan.trainer, plan.step_flops)
    if bought is None:
        return text
    text += f"\ntrainer.max_pflops={plan.trainer.max_pflops:g} buys {bought:,} steps"
    if plan.num_steps < bought:
        key = "max_steps" if plan.num_steps == plan.trainer.max_steps else "epochs"
        text += f", but trainer.{key}={getattr(plan.trainer, key)} ends the run after {plan.num_steps:,}"
    return text


def scaled(number: float) -> str:
    """Write a number of FLOPs with the prefix of its size, as in "1.84 P" for 1.84e15."""
    for prefix, unit in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if number >= unit:
            return f"{number / unit:.3g} {prefix}"
    return f"{number / 1e6:.3g} M"
