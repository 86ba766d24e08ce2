"""`sasa-benchmark model`: images/s in training and inference, and the peak memory of a training step."""

import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sasa_train.benchmark.contenders import new_result
from sasa_train.benchmark.timing import (
    extra_memory,
    in_fresh_process,
    ratio,
    spread,
    time_calls,
    time_in_turn,
)
from sasa_train.config.compose import compose_config
from sasa_train.config.keys import ModelConfig
from sasa_train.device import autocast, check_compiled_code
from sasa_train.models import ResNet, build_model, check_model, enable_grad_checkpointing, fold_batch_norms
from sasa_train.models.sources import resolve
from sasa_train.refusal import ConfigError
from sasa_train.terminal import progress_bar

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
BATCH_SIZES = {"cpu": 32, "cuda": 128}
NUM_WARM_UPS = 8  # on a CPU the heap settles within several steps; before that, each step allocates new pages
NUM_MEMORY_STEPS = 2  # momentum buffers exist from the second step on


def measure(options: Namespace, device: torch.device) -> dict[str, Any]:
    """Measure the models and return one row per model, with ratios to the first model."""
    settled = {"device": device.type, "batch_size": options.batch_size or BATCH_SIZES[device.type]}
    setting = Namespace(**vars(options) | settled | {"threads": torch.get_num_threads()})
    models = list(dict.fromkeys(options.models))
    for spec in models:
        checked = check_model(parse_model(spec, setting.num_classes), setting.image_size)
        if options.fold_batch_norms and not isinstance(checked, ResNet):
            raise ConfigError(f"--fold-batch-norms knows sasa_train's own models alone; {spec} is not one of them")
    built = {spec: BenchmarkedModel(spec, setting) for spec in models}
    with progress_bar(total=2 * options.repeats, desc="models") as bar:
        training = time_in_turn(
            {spec: model.train for spec, model in built.items()}, options.repeats, device, bar, NUM_WARM_UPS
        )
        for model in built.values():
            model.prepare_inference(options.fold_batch_norms)
        inference = time_in_turn({spec: model.infer for spec, model in built.items()}, options.repeats, device, bar)
    result = new_result("model")
    for spec, model in built.items():
        row: dict[str, Any] = {"model": spec, "memory_format": model.memory_format}
        row |= {"parameters": sum(p.numel() for p in model.module.parameters()), "batch_size": setting.batch_size}
        for what, seconds in (("training", training), ("inference", inference)):
            row[f"{what}_images_per_sec"] = spread([setting.batch_size / s for s in seconds[spec]])
            row[f"{what}_ratio"] = ratio(seconds[models[0]], seconds[spec])  # ratio of speeds
        result["rows"].append(row)
    if options.memory:
        del built
        for row in result["rows"]:
            row["memory_bytes"] = in_fresh_process(training_memory, row["model"], setting, row["memory_format"])
    return result


def parse_model(spec: str, num_classes: int) -> ModelConfig:
    """Parse `name,key=value,...`, with lists in brackets: `hybrid_resnet26,stage_ops=[conv,conv,conv,attention]`.

    Raises:
        ConfigError: a key is unknown or a value is invalid; an unknown name is detected when the model is built.
    """
    name, *keys = re.split(r",(?![^\[]*\])", spec)
    for key in keys:
        if "=" not in key:
            raise ConfigError(f"{spec}: {key!r} must be key=value, as in {name},stem=conv_small")
    overrides = [f"model.{key}" for key in keys]
    config = compose_config(["model=timm", f"model.name={name}", f"model.num_classes={num_classes}", *overrides])
    return resolve(config.model)


class BenchmarkedModel:
    """A model with random images and labels, trained by SGD with momentum."""

    def __init__(self, spec: str, setting: Namespace):
        self.setting, self.device = setting, torch.device(setting.device)
        torch.manual_seed(0)
        config = parse_model(spec, setting.num_classes)
        self.module: nn.Module = build_model(config, setting.num_classes, setting.image_size)
        if setting.grad_checkpointing:
            enable_grad_checkpointing(self.module)
        self.module.to(self.device).train()
        if setting.compile:
            check_compiled_code()
        self.forward: Callable = torch.compile(self.module) if setting.compile else self.module
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        self.scaler = torch.amp.GradScaler(setting.device, enabled=setting.dtype == "fp16")
        size = (setting.batch_size, 3, setting.image_size, setting.image_size)
        self.images = torch.randn(size, device=self.device)
        self.labels = torch.randint(setting.num_classes, size[:1], device=self.device)
        self.memory_format = self._faster_format() if setting.memory_format == "best" else setting.memory_format
        self.use_format(self.memory_format)

    def use_format(self, name: str) -> None:
        self.module.to(memory_format=FORMATS[name])  # type: ignore[call-overload]
        self.images = self.images.contiguous(memory_format=FORMATS[name])

    def _faster_format(self) -> str:
        def seconds(name: str) -> float:
            self.use_format(name)
            self.train()
            return min(time_calls(self.train, 1, self.device) for _ in range(2))

        return min(FORMATS, key=seconds)

    def train(self) -> None:
        """Run one training step: forward pass, cross entropy, backward pass, update."""
        self.optimizer.zero_grad()
        with autocast(self.device, self.setting.dtype):
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def prepare_inference(self, fold: bool) -> None:
        self.optimizer.zero_grad()
        if fold and isinstance(self.module, ResNet):
            self.module = fold_batch_norms(self.module)
            self.forward = torch.compile(self.module) if self.setting.compile else self.module
        self.module.eval()

    def infer(self) -> torch.Tensor:
        with torch.inference_mode(), autocast(self.device, self.setting.dtype):
            return self.forward(self.images)


def training_memory(spec: str, setting: Namespace, memory_format: str) -> int:
    """Return the peak memory of a model's first steps, including weights, minus the memory used before."""
    torch.set_num_threads(setting.threads)
    setting.memory_format = memory_format  # changes only this process's copy

    def run() -> None:
        model = BenchmarkedModel(spec, setting)
        for _ in range(NUM_MEMORY_STEPS):
            model.train()

    return extra_memory(run, torch.device(setting.device))
