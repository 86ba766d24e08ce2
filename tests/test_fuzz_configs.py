"""Check that any config is either accepted and can be saved, or refused with a message that names the key.

FUZZ_EXAMPLES=25000 sets how many configs are tried, and FUZZ_COMMANDS=200 how often the command is run (both are low
by default). FUZZ_SEED=1 selects different configs. Since 50 configs or one run take about a second, also set pytest's
--timeout=0.
"""

import contextlib
import copy
import io
import os
import re
import signal
import time
from collections.abc import Iterator
from unittest import mock

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from timm.optim import list_optimizers

from sasa_train import train
from sasa_train.config import compose, groups
from sasa_train.config.compose import as_asked, as_overrides, compose_config, quote_texts, to_config
from sasa_train.config.groups import config_dir
from sasa_train.config.keys import CHOICES, FREE_KEYS, TrainConfig, key_table
from sasa_train.config.overrides import (
    UNREADABLE,
    check_override_keys,
    chooses_group,
    expand,
    for_hydra,
    parse_overrides,
)
from sasa_train.config.saved import load_config, to_yaml
from sasa_train.refusal import ConfigError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
COMMANDS = int(os.environ.get("FUZZ_COMMANDS", "0"))
INTERNALS = re.compile(r"Traceback|<class|<function|object at 0x|Error\(|, line \d+, in ")


def examples(few: int, many: int = EXAMPLES):
    """Return a decorator that runs a test on `many` examples (on `few` if `many` is 0), chosen by FUZZ_SEED if set."""
    quiet = settings(
        max_examples=many or few,
        deadline=None,
        database=None,
        derandomize="FUZZ_SEED" not in os.environ,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate] if many else list(Phase),
    )
    return lambda test: quiet(seed(int(os.environ["FUZZ_SEED"]))(test) if "FUZZ_SEED" in os.environ else test)


# Strategies for overrides, written as on a command line.

NONSENSE = (
    *("nan", "inf", "-inf", "1e999", "1e-320", "-1", "-0.5", "0", "1", "2.5", "3", "1e300", "1000000000000", "-0.0"),
    *("9" * 25, "9" * 5000, "18446744073709551616", "null", "true", "FALSE", "''", "", "'  '", "'a b'", "a b", "???"),
    *("[]", "[1]", "[1,2]", "[1,2,3]", "[0.1,0.2,0.3]", "[3,2,1]", "[null]", "[nan,1]", "[a,b]", "[[1]]", "[1,[2]]"),
    *("{}", "{a:1}", "{a:{b:[1,null]}}", "{1:2}", "{true:1}", "{a-b:c}", "{a:nan}", "{a:???}", "{a:'${seed}'}"),
    *("${seed}", "${data}", "${data.root}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${nope}", "'${x'", "'\\${x}'"),
    *("1,2", "range(1,3)", "choice(1,2)", "glob(*)", "interval(0,1)", "int(3.7)", "str(3)", "shuffle(1,2)"),
    *("'\x00'", "'a\nb'", "\x1b[31m", "'\ud800'", "日本", "'日本 é'", "'\u2028'", "'\ufeff'", "'\u00a0'", "'🦙'"),
    *("!!python/object/apply:os.system", "*a", "&a", "<<", "yes", "off", "0x1F", "1_000", "1:30", "~", "../..", "/dev"),
    *("[" * 30 + "]" * 30, "[" * 1500 + "]" * 1500, "x" * 300, "/" + "y" * 5000, "'%s'", "'\\\\'", "a=b", "("),
)  # fmt: skip
FREE_TEXT = st.text(max_size=12)
QUOTED = FREE_TEXT.map(lambda text: "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'")
ARGUMENTS = ("rho", "betas", "momentum", "nesterov", "k_decay", "cycle_limit", "a.b", "true", "", "1", "a-b", "$x")
ALL_KEYS = key_table()


def mistype(word: str, place: int) -> str:
    """Omit, double or change one letter."""
    at = place % len(word)
    return word[:at] + ("", word[at] * 2, "x")[place % 3] + word[at + 1 :]


def numbers(values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(repr)


FLOATS = numbers(st.floats(0, 1) | st.floats(0, 1) | st.floats())
INTEGERS = numbers(st.integers(1, 9) | st.sampled_from([16, 32, 64, 128, 224, 256]) | st.integers(-5, 10**6))
BY_TYPE = {
    "bool": st.sampled_from(["true", "false"]),
    "int": INTEGERS,
    "float": FLOATS,
    "str": st.sampled_from(["auto", "conv", "a/b.c", "'x y'"]) | QUOTED,
    "list[float]": st.lists(FLOATS, max_size=4).map(lambda items: f"[{','.join(items)}]"),
    "list[str]": st.lists(st.sampled_from(["conv", "attention", "seed", "trainer.epochs"]), max_size=5).map(
        lambda items: f"[{','.join(items)}]"
    ),
    "dict[str, typing.Any]": st.dictionaries(
        st.sampled_from(["rho", "a", "_b1", "Nesterov"]),
        FLOATS | INTEGERS | QUOTED | st.sampled_from(["true", "null", "[]", "{}", "[0.9,0.99]", "{c:[x,{d:1}]}"]),
        max_size=3,
    ).map(lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items.items()) + "}"),
}


def right_values(key: str) -> st.SearchStrategy:
    if key in CHOICES:
        return st.sampled_from(CHOICES[key])
    kind = ALL_KEYS[key].type
    names = [kind.__name__] if type(kind) is type else str(kind).split(" | ")
    return st.one_of(*(BY_TYPE.get(name, st.just("null")) for name in names))


RIGHT = st.sampled_from(list(ALL_KEYS)).flatmap(lambda key: right_values(key).map(lambda value: f"{key}={value}"))
WRONG_VALUE = st.builds("{}={}".format, st.sampled_from(list(ALL_KEYS)), st.sampled_from(NONSENSE) | QUOTED | FREE_TEXT)
KEYS = st.sampled_from(
    [*ALL_KEYS, *groups.GROUPS, "hydra", "hydra.verbose", "defaults", "trainer.epochs.x", "data.mean.0"]
)
WRONG_KEY = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", ""]), KEYS, st.sampled_from(NONSENSE)),
    st.builds("{}={}".format, st.builds(mistype, KEYS, st.integers(0, 99)), st.just("1")),
    st.builds("optimizer.args.{}={}".format, st.sampled_from(ARGUMENTS), st.sampled_from(NONSENSE)),
    st.builds("{}@{}={}".format, KEYS, st.sampled_from(["x", "", "_global_", "a.b"]), st.just("digits")),
    FREE_TEXT,
    KEYS.map("~{}".format),
)
OVERRIDES = st.lists(st.one_of(*[RIGHT] * 6, *[WRONG_VALUE] * 3, WRONG_KEY), min_size=1, max_size=4)

with initialize_config_dir(str(config_dir()), version_base="1.3"):
    DEFAULTS = hydra_compose("train")
DEFAULT_CONFIG = to_config(DEFAULTS)


def compose_quickly(overrides: list[str]) -> TrainConfig:
    """Like `compose_config`, but composes the defaults only once and sets the values as Hydra does."""
    check_override_keys(overrides)
    if chooses_group(overrides):
        return compose_config(overrides)
    composed = copy.deepcopy(DEFAULTS)
    try:
        ConfigLoaderImpl._apply_overrides_to_config(parse_overrides(for_hydra(overrides)), composed)
    except UNREADABLE as error:
        raise ConfigError(compose.explain(error)) from error
    return as_asked(composed, overrides)


def assert_refused_well(message: str, overrides: list[str]) -> None:
    assert not INTERNALS.search(message), message
    assert 10 < len(message) < 6000, message
    keys = [override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides]
    named = [key.rpartition(".")[2] for key in keys if key] + [override[:20] for override in overrides]
    named += [free for free in FREE_KEYS if any(key.startswith(free) for key in keys)]
    assert any(name in message for name in named), f"{overrides} -> {message}"


def assert_kept(config: TrainConfig) -> None:
    """Check that saving an accepted config, or writing it as overrides, and reading it back does not change it."""
    assert load_config(to_yaml(config)) == config
    with mock.patch.object(compose, "compose_config", lambda _: DEFAULT_CONFIG):
        written = as_overrides(config)
    assert compose_quickly(written) == config, written


@examples(few=250)
@given(overrides=OVERRIDES)
def test_a_config_is_taken_or_refused(overrides):
    try:
        config = compose_quickly(overrides)
    except ConfigError as error:
        event("refused")
        assert_refused_well(str(error), overrides)
    else:
        event("accepted")
        assert_kept(config)


@examples(few=25, many=EXAMPLES // 100)
@given(overrides=OVERRIDES)
def test_the_command_line_is_taken_or_refused(overrides):
    """The fast composition must give the same result as Hydra's own."""

    def outcome(compose_it):
        try:
            return compose_it(overrides)
        except ConfigError as error:
            assert_refused_well(str(error), overrides)
            return str(error)

    real = outcome(compose_config)
    assert real == outcome(compose_quickly)
    if isinstance(real, TrainConfig):
        assert compose_config(as_overrides(real)) == real


# Texts that Hydra or YAML would read as a number, a date, true or false, and others of the same characters.
NUMERIC = st.one_of(
    st.sampled_from(["2024_01_15", "12e4567", "1e5", "1.50", "012", "0x1F", "1:30", "2024-01-15", "1.5_e5", "1.__e5"]),
    st.sampled_from(["true", "False", "yes", "NO", "on", "Off", "y", "nan", "-inf", "INF", ".inf", ".NaN", "+1", "-0"]),
    st.text("0123456789_.eE+-xnya", min_size=1, max_size=8),
).filter(lambda text: not set(text) <= {"-", "."})  # YAML's own signs


@examples(few=25)
@given(text=NUMERIC)
def test_a_text_stays_as_it_is_typed(text):
    """Check this for the command line, config.yaml, the command in run.json, a sweep, and texts written into files."""
    config = compose_quickly([f"data.root={text}"])
    assert config.data.root == text
    assert_kept(config)
    jobs = expand([f"data.root={text},b"])
    assert [override.value() for (job,) in jobs for override in parse_overrides([job])] == [text, "b"]
    lines = f"data: {{root: {text}}}\nallow_config_change:\n- {text}\nresume: {text} # a comment"
    written = {"data": {"root": text}, "allow_config_change": [text], "resume": text}
    assert OmegaConf.create(quote_texts(lines)) == written


def test_the_command_that_makes_a_config_again_is_short():
    assert as_overrides(compose_config([])) == []
    given = ["optimizer.name=adamp", "optimizer.args={nesterov:true,delta:0.1}", "data.mean=[0.5,0.5,0.5]"]
    given += ["augment.hflip=true", "trainer.log_every_steps=1", "run_name='5'"]
    written = as_overrides(compose_config([*given, "seed=0"]))
    assert sorted(written) == sorted(given)
    strange = ["data.root='it\\'s \\\\ here, 日本'", "output_dir='${seed}/null'", "schedule.decay_milestones=[]"]
    odd = compose_config(strange)
    assert "schedule.decay_milestones=[]" in as_overrides(odd) and compose_config(as_overrides(odd)) == odd


# Saved configs: damaged ones of our own, and untrusted ones.

LINES = (
    *("x: !!python/object/apply:os.system ['touch {bait}']", "seed: !!python/object/new:os.system ['touch {bait}']"),
    *("run_name: !!python/name:os.system", "output_dir: !!python/object/apply:pathlib.Path [x]", "seed: !!int '3'"),
    *("seed: &a 3", "run_name: *a", "<<: *a", "<<: {seed: 3}", "seed: ${oc.env:HOME}", "output_dir: ${oc.env:HOME}"),
    *("output_dir: '${oc.env:HOME}'", "run_name: ???", "seed: " + "9" * 5000, "seed: 1e999", "seed: .nan"),
    *("seed: 1:30", "seed: 0b", "seed: =", "seed: 2001-01-01", "seed: " + "[" * 500 + "]" * 500),
    *("seed: " + "{a: " * 2000, "x: " * 500 + "1", "- " * 3000, "? [a]\n: 3", "seed: 1\nseed: 2", "unknown: 1"),
    *("%YAML 1.9", "---", "...", "\t", "\x00", "\ufeff", "'", "|", "null", "3", "trainer:", "trainer: 3"),
    *("optimizer: {args: [1]}", "seed: !!binary aGVsbG8=", "a: " + "x" * 100_000),
    "lol: &a [x,x]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nd: [*c,*c,*c]",
)  # fmt: skip
SAVED = to_yaml(compose_config(["experiment=quickstart", "optimizer.args={nesterov:false}"]))


@st.composite
def damaged_texts(draw) -> str:
    text = SAVED
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(["flip", "cut", "line", "only"]))
        if kind == "flip":
            text = text[:at] + chr(ord(text[at : at + 1] or "a") ^ 1 << draw(st.integers(0, 7))) + text[at + 1 :]
        elif kind == "cut":
            text = text[:at] + text[at + draw(st.integers(1, 400)) :]
        elif kind == "line":
            start = text.find("\n", at) + 1
            indent = " " * draw(st.sampled_from([0, 2, 4]))
            text = f"{text[:start]}{indent}{draw(st.sampled_from(LINES))}\n{text[start:]}"
        else:
            text = draw(st.sampled_from(LINES))
    return text


@examples(few=120, many=EXAMPLES // 10)
@given(text=damaged_texts())
def test_a_saved_config_is_taken_or_refused(text, tmp_path_factory):
    bait = tmp_path_factory.getbasetemp() / "executed"
    start = time.process_time()
    try:
        config = load_config(text.replace("{bait}", str(bait)), source="here")
    except ConfigError as error:
        event("refused")
        assert str(error) and not INTERNALS.search(str(error)) and len(str(error)) < 6000, str(error)
    else:
        event("accepted")
        assert load_config(to_yaml(config)) == config
    assert time.process_time() - start < 1
    assert not bait.exists()


# Through the command: errors that validation cannot detect, but that timm, torch or the file system report.

SMALL = ("experiment=debug", "trainer.max_steps=1", "data.max_train_images=32", "data.max_val_images=16")
ANY_MODEL = " ".join(f"model.{key}=null" for key in ("stem", "width", "num_heads", "kernel_size"))
REACHING = (
    *("model.kernel_size=15", "model.kernel_size=301", "model.width=1e-9", "model.width=1e6", "model.width=0.02"),
    *("model.num_heads=3", "model.num_heads=1000000", "model.stem=x", "model.stage_ops=[]", "model.border=x"),
    *("model.border=shift", "model.dilation=3", "model.kernel_size=[7,5,3,1]", "model.scale=1e30"),
    *("model.position=x", "model.stage_ops=[a,b,c,d]", f"{ANY_MODEL} model.name=x", "model.num_classes=7"),
    *("model.num_classes=1000000000000", "model.drop_path_rate=0.99", "model.bn_momentum=0"),
    *(f"{ANY_MODEL} model.name={name} data.image_size=32" for name in ("test_vit", "test_resnet", "test_convnext")),
    *(f"model.pretrained={source}" for source in ("timm", "nowhere", ".", "/dev/zero", "/proc", "/etc/hostname")),
    *(f"data.image_size={size}" for size in (1, 2, 3, 4, 5, 12, 16384)),
    *("data.name=imagenet data.root=nowhere", "data.name=image_folder data.root=/dev"),
    *("data.mean=[1,1,1]", "data.std=[1e-38,1,1]", "data.max_train_images=1", "data.max_val_images=1"),
    *("data.resident=false data.num_workers=1",),
    *("data.holdout_fraction=1e-38", "data.holdout_fraction=0.9999", "data.holdout_fraction=0.3"),
    *("optimizer.lr=1e38", "optimizer.lr=1e-38", "optimizer.momentum=1e38", "optimizer.momentum=0"),
    *("optimizer.weight_decay=1e38", "optimizer.layer_decay=1e-38", "optimizer.layer_decay=0.7", "optimizer.eps=1"),
    *(f"optimizer.name=adamw optimizer.betas={betas}" for betas in ("[]", "[0.9]", "[0.9,0.9]", "[0.9,0.9,0.9]")),
    *(f"optimizer.name=lookahead_{name}" for name in ("", "adamw", "lookahead_sgd", "x")),
    *(f"trainer.{key}" for key in ("precision=fp16", "precision=bf16", "device=cuda", "loss=bce", "max_hours=1e-9")),
    *(f"trainer.{key}" for key in ("grad_accum_steps=32", "micro_batch_size=1", "micro_batch_size=auto", "epochs=1")),
    *(f"trainer.{key}={2**63 - 1}" for key in ("epochs", "log_every_steps", "bn_recalibration_batches")),
    *("trainer.global_batch_size=16777216", "trainer.global_batch_size=16777216 trainer.micro_batch_size=auto"),
    *(f"trainer.{key}=1e38" for key in ("grad_clip_norm", "grad_clip_value", "grad_clip_agc", "max_hours")),
    *(f"trainer.{key}=1e-38" for key in ("grad_clip_norm", "grad_clip_value", "grad_clip_agc", "ema_decay")),
    *(f"augment.{key}=1e38" for key in ("mixup", "cutmix", "brightness", "contrast", "saturation")),
    *(f"augment.{key}=1e-38" for key in ("mixup", "cutmix", "brightness", "hue", "erasing_prob")),
    *(f"augment.crop_mode=resized augment.crop_{key}" for key in ("scale=[1e-38,1]", "ratio=[1e-38,1e38]")),
    *(f"augment.policy={name} augment.policy_ops=8" for name in CHOICES["augment.policy"]),
    *("augment.crop_padding=8", "augment.crop_padding=9", "augment.erasing_prob=1 augment.erasing_scale=[1e-38,1]"),
    *("output_dir=/dev/null", "output_dir=/proc/x", "resume=/proc", "resume=/dev/null", "run_name=.."),
)  # fmt: skip
SLOW = ("trainer.compile", "data.num_workers", "data.image_size", "data.name")  # would compile, fork or download
SLOW_TO_COMPILE = ("kron", "kronc", "kronw")  # torch.compile takes half a minute
OPTIMIZERS = [name for name in list_optimizers() if name not in SLOW_TO_COMPILE]
OPTIMIZER_ARGS = ["nesterov", "foreach", "amsgrad", "eps", "betas", "rho", "decoupled", "ns_steps", "delta", "alpha"]
SCHEDULES = ("cosine", "step", "multistep", "poly", "tanh", "wsd", "rsqrt", "constant", "plateau", "none", "x")
SCHEDULE_ARGS = ["k_decay", "cycle_limit", "cycle_mul", "cycle_decay", "noise", "noise_pct", "stable_timescale", "x"]
ARGUMENT_VALUES = st.sampled_from(
    ["0", "1", "-1", "2", "1e38", "1e-38", "0.5", "1000000000", "x", "true", "null", "[]", "[1,2]"]
)
RUNS = st.one_of(
    st.sampled_from(REACHING),
    st.sampled_from(OPTIMIZERS).map("optimizer.name={}".format),
    st.builds("optimizer.name={} optimizer.args={{{}:{}}}".format, st.sampled_from(OPTIMIZERS),
              st.sampled_from(OPTIMIZER_ARGS), ARGUMENT_VALUES),
    st.builds("schedule.name={} schedule.{}".format, st.sampled_from(SCHEDULES), st.sampled_from(
        ["decay_rate=0", "decay_rate=1e38", "decay_epochs=1e-9", "decay_epochs=1e38", "decay_milestones=[]",
         "decay_milestones=[0,0]", "min_lr=1e38", "warmup_epochs=1", "warmup_lr=1e38"])),
    st.builds("schedule.name={} schedule.args={{{}:{}}}".format, st.sampled_from(SCHEDULES),
              st.sampled_from(SCHEDULE_ARGS), ARGUMENT_VALUES),
    RIGHT.filter(lambda override: " " not in override and not override.startswith(SLOW)),
)  # fmt: skip


class TookTooLong(BaseException):
    pass


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def assert_ended_well(code: int, stderr: str, overrides: list[str]) -> None:
    assert code in (0, 1, 2, 75), f"{overrides}: exit code {code}\n{stderr}"
    message = stderr[stderr.rfind("train: ") :] if code in (1, 2) else stderr
    assert not INTERNALS.search(message), f"{overrides}\n{stderr}"
    if code == 1:
        assert "not finite" in stderr or "out of memory" in stderr, f"{overrides}\n{stderr}"
    if code == 2:
        assert_refused_well(message, overrides)


@examples(few=12, many=COMMANDS)
@given(run=RUNS)
def test_a_run_ends_well_or_is_refused(run, tmp_path_factory):
    overrides, stderr = run.split(" "), io.StringIO()
    folder = tmp_path_factory.mktemp("run")
    quietly = contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO())
    with quietly[0], quietly[1], contextlib.chdir(folder), mock.patch("sys.argv", ["train"]), time_limit(60):
        code = train.run_command([*SMALL, *overrides])
    event(f"exit code {code}")
    assert_ended_well(code, stderr.getvalue(), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.width=1e6"],
        ["optimizer.name=adamw", "optimizer.args={capturable:true}"],
        ["schedule.name=step", "schedule.decay_rate=1e38", "schedule.decay_epochs=0.001"],
        ["output_dir=/dev/null"],
    ],
)
def test_the_command_says_what_is_wrong(overrides, in_process):
    process = in_process("train", *SMALL, *overrides, expect=2)
    assert_ended_well(2, process.stderr, overrides)


def test_a_saved_config_that_is_no_text_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(SAVED.encode()[:100] + b"\xff\xfe" + SAVED.encode()[100:])
    assert train.run_command([f"resume={tmp_path}"]) == 2
    assert f"{tmp_path}/config.yaml: cannot be read" in capsys.readouterr().err
    assert train.run_command(["resume=" + "x" * 300]) == 2
    assert "255 bytes per folder" in capsys.readouterr().err
    for text in (None, {"seed": 3}, b"seed: 3", "seed: 3\n" * 20_000):
        with pytest.raises(ConfigError, match="a stranger's: is not a config"):
            load_config(text, source="a stranger's")


@pytest.mark.parametrize(
    "values", ["interval(0,1)", f"range(0,{10**12})", "range(0,9,0)", "range(nan,1)", "glob(*)", "1,x"]
)
def test_a_sweep_that_cannot_be_is_refused(values, capsys):
    start = time.process_time()
    assert train.run_command([f"seed={values}", "-m"]) == 2
    assert_ended_well(2, "train: " + capsys.readouterr().err, [f"seed={values}"])
    assert time.process_time() - start < 5
