"""Check that a training step reads nothing back from a GPU, since each read stalls first the host, then the GPU."""

from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from making_data import make_image_folder
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import v2

from sasa_train.config.compose import compose_config
from sasa_train.data.loader import build_loaders
from sasa_train.data.mixing import Mixing
from sasa_train.data.policies import NUM_DRAWS, OPERATIONS, Policy, apply_operation, parameters_of, table_of
from sasa_train.data.randomness import POLICY, sample_draws
from sasa_train.device import RunPlan, resolve
from sasa_train.models import build_model
from sasa_train.training.run import build_stepper

READ = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
HOST = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item, torch.Tensor.__bool__}


class Operators(TorchDispatchMode):
    """Counts operators that compute, and separately those that read values back, such as `.item()` and `bool()`."""

    def __init__(self):
        super().__init__()
        self.calls, self.reads, self.is_paused = 0, Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += not func.is_view and func is not torch.ops.aten.unsqueeze_.default
        if func in READ and not self.is_paused:
            self.reads[str(func)] += 1
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Counts calls such as `.cpu()`, which do nothing on a CPU tensor and are therefore invisible to `Operators`."""

    def __init__(self, operators: Operators):
        super().__init__()
        self.operators, self.copies = operators, Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # The test's device is cpu:0, which can be distinguished from the host.
        to_host = func is torch.Tensor.to and "cpu" in map(str, [*args[1:], *(kwargs or {}).values()])
        if (func in HOST or to_host) and not self.operators.is_paused:
            self.copies[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch):
    """Count all calls except those in the random draws of mixup and cutmix, which always use the host's generator."""
    operators, draw = Operators(), Mixing.draw
    copies = HostCopies(operators)

    def paused(self, *arguments):
        operators.is_paused = True
        try:
            return draw(self, *arguments)
        finally:
            operators.is_paused = False

    monkeypatch.setattr(Mixing, "draw", paused)
    with operators, copies:
        yield operators, copies


def recipes(folder) -> dict[str, list[str]]:
    """Return overrides by experiment, for a narrow model on 32-pixel digits in memory or 72-pixel photos on disk."""
    small = ["model.width=0.125", "model.num_heads=2", "trainer.precision=fp32", "augment.policy=trivial_augment"]
    return {
        "cifar10_hybrid_resnet26": [*small, "data=digits", "data.image_size=32", "trainer.global_batch_size=16"],
        "imagenet_hybrid_resnet50": [
            *small, "data=image_folder", f"data.root={make_image_folder(folder)}", "data.image_size=72",
            "data.num_workers=1", "trainer.global_batch_size=8", "trainer.micro_batch_size=4",
            "trainer.class_weights=balanced", "trainer.loss=focal", "data.sampler=balanced",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("experiment", ["cifar10_hybrid_resnet26", "imagenet_hybrid_resnet50"])
@pytest.mark.parametrize("planted", [False, True])
def test_a_training_step_reads_nothing_back(experiment, planted, tmp_path, monkeypatch):
    """The counters must also detect a `.cpu()` call planted in the model's forward pass."""
    config = compose_config([f"experiment={experiment}", *recipes(tmp_path / "images")[experiment]])
    _, config = resolve(config)
    device = torch.device("cpu:0")
    loaders = build_loaders(config, device)
    loaders.train.device = device  # device of a streaming loader's batches
    plan = RunPlan(config, device, steps_per_epoch=loaders.train.plan.steps_per_epoch)
    model = build_model(config.model, len(loaders.classes), plan.input_size)
    stepper = build_stepper(plan, model, loaders.class_weights)
    batches = loaders.train.train_batches(0)
    model.train()
    stepper.train_step(batches)  # one-time setup may read values: tables, the CPU kernels
    if planted:
        model.register_forward_hook(lambda _module, _inputs, logits: logits.cpu())
    with counted(monkeypatch) as (operators, copies):
        stepper.train_step(batches)
    loaders.close()
    assert dict(operators.reads) == {}
    assert dict(copies.copies) == ({"cpu": plan.grad_accum_steps} if planted else {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_training_step_does_not_make_a_gpu_wait(monkeypatch):
    config = compose_config(["experiment=cifar10_hybrid_resnet26", *recipes("unused")["cifar10_hybrid_resnet26"]])
    device, config = resolve(config)
    loaders = build_loaders(config, device)
    plan = RunPlan(config, device, steps_per_epoch=loaders.train.plan.steps_per_epoch)
    stepper = build_stepper(plan, build_model(config.model, len(loaders.classes), plan.input_size))
    batches = loaders.train.train_batches(0)
    stepper.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stepper.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_trivial_augment_makes_few_calls_whatever_the_batch(monkeypatch):
    """An earlier version made 2,251 calls for 128 images; no GPU work could hide those 66 ms of host time."""
    policy = Policy(compose_config(["augment.policy=trivial_augment"]).augment)
    images = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8)
    draws = sample_draws(0, 0, np.arange(512), NUM_DRAWS, POLICY)
    policy.batch(images, draws)
    with counted(monkeypatch) as (operators, copies):
        policy.batch(images, draws)
    assert 0 < operators.calls <= 600 and not operators.reads and not copies.copies


@pytest.mark.parametrize("size", [8, 31, 32])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_a_batch_is_torchvisions_on_each_image(name, size):
    """All magnitudes and signs of the widest table must give torchvision's results bit for bit, in at most 20 calls."""
    transform = v2.TrivialAugmentWide()
    magnitudes_of, is_signed = (table_of(transform) | {"Invert": (lambda *_: None, False)})[name]
    table = magnitudes_of(31, size, size)
    magnitudes = [0.0] if table is None else [float(m) * sign for m in table for sign in (1, -1)[: 1 + is_signed]]
    torch.manual_seed(0)
    images = torch.randint(0, 256, (len(magnitudes), 3, size, size), dtype=torch.uint8)
    images[::3] = images[::3] // 8 + 60  # low contrast
    parameters = torch.from_numpy(np.array([parameters_of(name, magnitude, (size, size)) for magnitude in magnitudes]))
    OPERATIONS[name](images, parameters)
    with Operators() as operators:
        together = OPERATIONS[name](images, parameters)
    assert operators.calls <= 20
    for image, magnitude, ours in zip(images, magnitudes, together, strict=True):
        assert torch.equal(ours, apply_operation(transform, image, name, magnitude)), magnitude
