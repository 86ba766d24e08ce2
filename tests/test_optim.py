"""Check that arguments of timm's optimizers and schedules are validated and that rates depend only on the step."""

import copy
import dataclasses

import pytest
import timm
import torch
from making_data import CPU
from marking import slow_but_for
from taking_steps import batches, setup, weights
from timm.optim import list_optimizers
from torch import nn

from sasa_train.config.compose import compose_config
from sasa_train.device import RunPlan
from sasa_train.models import build_model
from sasa_train.refusal import ConfigError
from sasa_train.runs.checkpoint import SCHEMA
from sasa_train.runs.schema import first_wrong
from sasa_train.training import state
from sasa_train.training.optim import build_optimizer, build_schedule, check_saved, try_loaded
from sasa_train.training.run import check_buildable
from sasa_train.training.step import _without_classifier

# Optimizers that need a package that is not a dependency.
ELSEWHERE = ("bnb", "fused")
OPTIMIZERS = [name for name in map(str, list_optimizers()) if not name.startswith(ELSEWHERE)]


@pytest.mark.parametrize(
    "name",
    slow_but_for(
        ["adamw", "sgd", "lamb", "muon", "adahessian", "lookahead_sgd"],
        [*OPTIMIZERS, "lookahead_sgd", "lookahead_adamw", "lookahead_adahessian"],
    ),
)
@torch.compiler.set_stance("force_eager")  # kron compiles its functions, which takes half a minute
def test_every_optimizer_of_timm_steps_and_resumes_exactly(name):
    """Saving after 2 steps, loading elsewhere and taking 2 more must give exactly the same weights as 4 steps."""
    overrides = (f"optimizer.name={name}", "optimizer.lr=0.01", "optimizer.lr_basis=absolute")
    stepper, start = setup(*overrides), weights(setup(*overrides))
    fresh = copy.deepcopy(stepper.state.optimizer.state_dict()["param_groups"])
    given = list(batches(4))
    for batch in given[:2]:
        stepper.train_step(iter([batch]))
    saved = copy.deepcopy(stepper.state.state_dict())
    other = setup(*overrides)
    other.state.load_state_dict(saved)
    assert first_wrong(saved["optimizer"], SCHEMA["optimizer"]) is None
    check_saved(other.plan.config, other.state.model, saved)
    # What steps change is never the config's: lookahead's count of its steps began anew when it was taken for that.
    groups = zip(saved["optimizer"]["param_groups"], fresh, strict=True)
    changed = {key for group, earlier in groups for key in group if group[key] != earlier.get(key)}
    assert not changed & set(stepper.state.hyperparameters)
    assert ("lookahead_step" in changed) == name.startswith("lookahead_")
    entries = [*saved["optimizer"]["state"].values(), *saved["optimizer"]["param_groups"]]
    if entry := next((entry for entry in entries if "step" in entry), None):
        whole = entry["step"]
        for count in (0.0, 1.5, 3.0):
            entry["step"] = torch.full_like(whole, count) if isinstance(whole, torch.Tensor) else count
            with pytest.raises(ValueError, match="must be a whole number from 1 to step=2"):
                check_saved(other.plan.config, other.state.model, saved)
        entry["step"] = whole
    squares = [(entry, key) for entry in saved["optimizer"]["state"].values() for key in entry if "sq" in key]
    for entry, key in squares[:1]:
        for wrong, message in ((-1.0, "is negative in places"), (torch.inf, "is infinite or not a number")):
            whole, entry[key] = entry[key], torch.full_like(entry[key], wrong)
            with pytest.raises(ValueError, match=f"{key} {message}"):
                check_saved(other.plan.config, other.state.model, saved)
            entry[key] = whole
    assert squares or name != "adamw"
    try_loaded(other.plan.config, other.state.model, other.state.optimizer)  # which changes nothing
    for batch in given[2:]:
        stepper.train_step(iter([batch]))
        torch.manual_seed(stepper.state.step)  # kron draws random numbers; both continue with the same ones
        torch.set_rng_state(saved["rng"]["torch"])
    torch.set_rng_state(saved["rng"]["torch"])
    for batch in given[2:]:
        other.train_step(iter([batch]))
        torch.set_rng_state(saved["rng"]["torch"])
    assert torch.equal(weights(stepper), weights(other)) and not torch.equal(weights(stepper), start)


@pytest.mark.parametrize(
    "name,entry,value",
    [("sgd", "dampening", 0.9), ("lamb", "max_grad_norm", 9.0), ("adamw", "decoupled_weight_decay", 0)],
)
def test_an_optimizers_arguments_are_those_of_the_config(name, entry, value):
    """A checkpoint whose group had a dampening trained with it, while run.json and the config denied it."""
    overrides = (f"optimizer.name={name}", "optimizer.lr=0.01", "optimizer.lr_basis=absolute")
    stepper, other = setup(*overrides), setup(*overrides)
    stepper.train_step(iter([next(iter(batches(1)))]))
    saved = copy.deepcopy(stepper.state.state_dict())
    (usual,) = {group[entry] for group in saved["optimizer"]["param_groups"]}
    for group in saved["optimizer"]["param_groups"]:
        group[entry] = value
    other.state.load_state_dict(saved)
    assert usual != value and {group[entry] for group in other.state.optimizer.param_groups} == {usual}


def test_the_optimizer_is_built_when_the_model_is_on_its_device(monkeypatch):
    """An optimizer may choose its code (fused, foreach) by the device of its parameters."""
    found = []

    def note(config, model):
        found.extend(parameter.is_meta for parameter in model.parameters())
        return build_optimizer(config, model)

    monkeypatch.setattr(state, "build_optimizer", note)
    state.build_state(compose_config(["experiment=debug"]), nn.Linear(2, 2), torch.device("meta"))
    assert found == [True, True]


def test_a_parameter_without_gradients_needs_no_state_in_a_checkpoint():
    """Any other parameter does, since its momentum would start anew in silence; so does one whose tensor is missing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model.register_parameter("unused", nn.Parameter(torch.ones(5)))
    stepper = setup("optimizer.name=momentum", model=model)
    stepper.train_step(batches(1))
    saved, config = stepper.state.state_dict(), stepper.plan.config
    state = saved["optimizer"]["state"]
    assert len(state) == 4
    check_saved(config, model, saved)
    wrong = {
        "no entry": {},
        r"\].momentum_buffer has .*\[2\]": {"momentum_buffer": torch.ones(2)},
        r"\].momentum_buffer is infinite or not a number": {"momentum_buffer": torch.full((3, 4), torch.nan)},
        "missing": {"x": 1},
    }
    for message, entry in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_saved(config, model, saved | {"optimizer": {"state": state | {max(state): entry}}})
    with pytest.raises(ValueError, match="no entry"):
        check_saved(config, model, saved | {"optimizer": {"state": {}}})
    allowed = dataclasses.replace(config, allow_config_change=["optimizer.momentum"])
    check_saved(allowed, model, saved | {"optimizer": {"state": {}}})  # it was 0, and is not any more


@pytest.mark.parametrize("name", [name for name in map(str, list_optimizers()) if name.startswith(ELSEWHERE)])
def test_what_cannot_run_here_says_why(name):
    with pytest.raises(ConfigError, match=f"optimizer.name={name} "):
        setup(f"optimizer.name={name}")


@pytest.mark.parametrize("name", slow_but_for(["sasa_resnet26"], ["sasa_resnet26", "conv_resnet26", "resnet10t"]))
def test_adahessian_trains_attention_and_convolutions(name, recwarn):
    """Both micro-batches take part in z * (H z), where z is drawn from torch's generator, which checkpoints contain."""
    keys = {"sasa_resnet26": {"num_heads": 2, "kernel_size": 3}, "conv_resnet26": {"stem": "conv_small"}}.get(name, {})
    keys |= {"width": 0.125} if keys else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **keys).train()
    plain, images, labels = copy.deepcopy(model), torch.randn(2, 4, 3, 32, 32), torch.randint(0, 3, (2, 4))
    stepper = setup("optimizer.name=adahessian", "trainer.grad_accum_steps=2", "schedule.warmup_epochs=0", model=model)
    torch.manual_seed(7)
    for _ in range(2):
        stepper.train_step(iter(zip(images, labels, strict=True)))
        assert not recwarn.list and not any(p.grad.requires_grad for p in model.parameters())
        if stepper.state.step == 1:
            hessian = [p.hess.clone() for p in model.parameters()]
    assert not torch.equal(model.get_classifier().weight, plain.get_classifier().weight)

    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    number = {id(p): i for i, p in enumerate(model.parameters())}
    order = [number[id(p)] for group in stepper.state.optimizer.param_groups for p in group["params"]]
    parameters = list(plain.parameters())
    z = {i: torch.randint(0, 2, parameters[i].shape, generator=generator) * 2.0 - 1 for i in order}
    loss = sum(torch.nn.functional.cross_entropy(plain(x), y) / 2 for x, y in zip(images, labels, strict=True))
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    products = torch.autograd.grad(grads, parameters, [z[i] for i in range(len(parameters))])
    for i, product in enumerate(products):  # sums of float32 in another order
        assert (hessian[i] - z[i] * product).norm() <= 1e-3 * product.norm() + 1e-4


@pytest.mark.parametrize(
    "name,keys,overrides,message",
    [
        ("vit_tiny_patch16_224", {}, [], "Attention of model.name=vit_tiny_.*optimizer.name=adamw, or .*conv_resnet26"),
        ("resnet10t", {}, ["trainer.compile=true"], "trainer.compile=true does not have; use trainer.compile=false"),
        ("resnet10t", {}, ["trainer.precision=fp16"], "trainer.precision=fp16 scales; use bf16 or fp32"),
        ("resnet10t", {}, ["trainer.grad_checkpointing=true"], "trainer.grad_checkpointing=true does not have"),
        ("resnet10t", {}, ["optimizer.args.update_each=2"], "a resumed run lacks .*use optimizer.args.update_each=1"),
    ],
)
def test_adahessian_names_what_has_no_second_derivatives(name, keys, overrides, message):
    config = compose_config(["optimizer.name=adahessian", f"model.name={name}", *overrides])
    with pytest.raises(ConfigError, match=f"^optimizer.name=adahessian needs second derivatives, which {message}"):
        build_optimizer(config, timm.create_model(name, num_classes=3, **keys))


def test_adahessian_names_an_operation_without_a_second_derivative():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3), torch.nn.Hardsigmoid())
    with pytest.raises(ConfigError, match="optimizer.name=adahessian cannot train this model: .*hardsigmoid_backward"):
        setup("optimizer.name=adahessian", model=model).train_step(batches(1))


def test_arguments_reach_the_optimizer_and_others_are_refused():
    stepper = setup("optimizer.name=rmsprop", "optimizer.args={alpha:0.8,centered:true}")
    assert {(g["alpha"], g["centered"]) for g in stepper.state.optimizer.param_groups} == {(0.8, True)}
    one_by_one = setup("optimizer.name=adamw", "optimizer.args.betas=[0.5,0.6]", "optimizer.args.amsgrad=true")
    assert {(g["betas"], g["amsgrad"]) for g in one_by_one.state.optimizer.param_groups} == {((0.5, 0.6), True)}
    with pytest.raises(ConfigError, match=r"optimizer.args=.*: adamw takes no aplha; it takes amsgrad, betas"):
        setup("optimizer.name=adamw", "optimizer.args={aplha:0.8}")
    with pytest.raises(ConfigError, match="eps is also set as a key of its own"):
        setup("optimizer.name=adamw", "optimizer.eps=1e-7", "optimizer.args={eps:1e-6}")


@pytest.mark.parametrize("model_name", ["sasa_resnet26", "resnet18", "vit_tiny_patch16_224"])
def test_layer_decay_lowers_the_early_layers_rates(model_name):
    """A decay of 0.5 per layer gives the classifier the full rate, the last block half, and the stem the lowest."""
    config = compose_config(["optimizer.name=adamw", "optimizer.layer_decay=0.5"])
    keys = {"width": 0.125, "num_heads": 2} if model_name.startswith("sasa") else {}
    model = timm.create_model(model_name, num_classes=3, **keys)
    optimizer = build_optimizer(config, model)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    of = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(scales) == len(of) and {scales[id(p)] for p in model.get_classifier().parameters()} == {1.0}
    first, before_last = next(iter(of.values())), sorted(set(of.values()))[-2]
    assert before_last == 0.5 and first == min(of.values())
    if model_name.startswith("sasa"):  # the blocks of R26 and the stem
        assert of["layer4.0.conv2.rel_height"] == of["layer4.0.conv1.weight"] == 0.5
        assert first == 0.5 ** (1 + 2 + 4 + 1 + 1)
    schedule = build_schedule(config, optimizer, steps_per_epoch=10)
    schedule.step_update(0)
    rates = {group["lr"] / group["lr_scale"] for group in optimizer.param_groups}
    assert max(rates) - min(rates) < 1e-12


def rates(*overrides: str) -> list[float]:
    """Return the learning rate at each step of ten 10-step epochs, relative to the peak."""
    stepper = setup("trainer.epochs=10", "optimizer.lr=1", "optimizer.lr_basis=absolute", *overrides)
    found = []
    for step in range(100):
        stepper.schedule.step_update(step)
        found.append(stepper.state.optimizer.param_groups[0]["lr"])
    return found


def test_schedules_count_in_epochs_of_the_run():
    multistep = rates("schedule.name=multistep", "schedule.decay_milestones=[3,6]", "schedule.warmup_epochs=1")
    assert multistep[10] == multistep[29] == 1 and multistep[30] == multistep[59] == pytest.approx(0.1)
    assert multistep[60] == multistep[99] == pytest.approx(0.01) and multistep[5] == 0.5
    step = rates("schedule.name=step", "schedule.decay_epochs=4", "schedule.decay_rate=0.5")
    assert (step[39], step[40], step[80]) == (1, 0.5, 0.25)
    poly = rates("schedule.name=poly", "schedule.decay_rate=2")
    assert poly[50] == pytest.approx(0.25)
    wsd = rates("schedule.name=wsd", "schedule.warmup_epochs=1")
    assert wsd[5] == 0.5 and wsd[10] == wsd[81] == 1 and wsd[99] < 0.2 and wsd[82:] == sorted(wsd[82:], reverse=True)
    tanh, constant = rates("schedule.name=tanh"), rates("schedule.name=constant")
    assert tanh[0] > 0.99 and tanh[99] < 0.02 and set(constant) == {1.0}
    rsqrt = rates("schedule.name=rsqrt", "schedule.warmup_epochs=2")
    assert rsqrt[20] == 1 and rsqrt[79] == pytest.approx((20 / 79) ** 0.5, rel=0.01)


def test_cycles_end_with_the_run():
    """The second of two cosine cycles, at a tenth of the rate, starts halfway through the run and ends with it."""
    found = rates("schedule.args={cycle_limit:2,cycle_decay:0.1}")
    assert found[0] == 1 and found[49] < 0.01 and found[50] == pytest.approx(0.1) and found[99] < 0.001
    longer = rates("schedule.args={cycle_limit:2,cycle_mul:3,cycle_decay:1}")
    assert longer[25] == pytest.approx(1) and longer[24] < 0.01


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["optimizer.name=sdg"], r"optimizer.name=sdg: did you mean sgd\? It must be one of adabelief, .*sgd"),
        (["optimizer.betas=[0.9,0.99]"], "optimizer.betas=.*: sgd takes no betas; it takes .*nesterov"),
        (["schedule.name=cosin"], "schedule.name=cosin"),
        (["schedule.name=plateau"], "the learning rate must be a function of the step"),
        (["schedule.args={cycle_limt:2}"], "timm's schedules take no cycle_limt; they take .*cycle_limit"),
        (["schedule.args={warmup_epochs:2}"], "take no warmup_epochs"),
        (["schedule.name=wsd", "schedule.decay_epochs=1000"], "schedule.name=wsd.*decay"),
    ],
)
def test_optimizers_and_schedules_refuse_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message):
        setup(*overrides)


def test_value_clipping_bounds_each_number():
    stepper = setup("trainer.grad_clip_value=0.001", "optimizer.name=momentum")
    norm = stepper.train_step(batches(1))
    gradient = torch.cat([p.grad.flatten() for p in stepper.state.model.parameters()])
    assert gradient.abs().max() == pytest.approx(0.001) and norm > gradient.norm()


def test_adaptive_clipping_bounds_each_unit_and_spares_the_classifier():
    """Check that a unit's gradient norm is at most factor x max(weight norm, 0.001) (arXiv 2102.06171)."""
    torch.manual_seed(0)
    conv = compose_config(["model=conv_resnet26", "model.width=0.125", "model.stem=conv_small"]).model
    model = build_model(conv, 3, 8)
    stepper = setup("trainer.grad_clip_agc=0.002", model=model)
    weight_norms = {name: p.detach().flatten(1).norm(dim=1) for name, p in model.named_parameters() if p.ndim == 4}
    classifier_norm = model.fc.weight.detach().norm(dim=1)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
    stepper.train_step(iter([(images, labels)]))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            limit = 0.002 * weight_norms[name].clamp(min=1e-3)
            assert (parameter.grad.flatten(1).norm(dim=1) <= limit * 1.001).all(), name
    assert (model.fc.weight.grad.norm(dim=1) > 0.002 * classifier_norm).any()


def test_allowed_changes_of_arguments_and_layer_decay_reach_a_resumed_run():
    """Check that new values are kept although the checkpoint's parameter groups contain the old ones."""
    saved = setup("optimizer.name=lamb", "optimizer.args={trust_clip:false}")
    for group in saved.state.optimizer.param_groups:
        group["lr_scale"] = 0.1
    other = setup("optimizer.name=lamb", "optimizer.args={trust_clip:true}")
    for group in other.state.optimizer.param_groups:
        group["lr_scale"] = 0.2
    other.state.hyperparameters += ("trust_clip",)
    other.state.load_state_dict(saved.state.state_dict())
    assert {(g["lr_scale"], g["trust_clip"]) for g in other.state.optimizer.param_groups} == {(0.2, True)}


@pytest.mark.parametrize("value", [100.0, "x"])
def test_a_scale_that_the_config_does_not_ask_for_is_not_taken_from_a_checkpoint(value):
    """Without layer_decay, no group has lr_scale, but timm's schedules obey one that was put into a checkpoint."""
    saved = setup().state.state_dict()
    for group in saved["optimizer"]["param_groups"]:
        group["lr_scale"] = value
    resumed = setup().state
    resumed.load_state_dict(saved)
    assert not any("lr_scale" in group for group in resumed.optimizer.param_groups)


def test_short_runs_may_have_any_schedule():
    """The check before data is loaded does not know the epoch length, so it must accept any schedule that may fit."""
    for overrides in (["trainer.epochs=2"], ["trainer.epochs=10", "schedule.warmup_epochs=9"], ["trainer.max_steps=3"]):
        check_buildable(RunPlan(compose_config(["schedule.name=wsd", "trainer.precision=fp32", *overrides]), CPU))
    with pytest.raises(ConfigError, match="stable_timescale"):
        rates("schedule.name=rsqrt")
    assert rates("schedule.name=rsqrt", "schedule.args={stable_timescale:2}")[79] < 0.6


def test_a_model_with_two_classifiers_is_clipped():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    spared = {id(p) for p in model.parameters()} - {id(p) for p in _without_classifier(model)}
    assert len(spared) == 4
