"""The plan of a sweep (jobs, names, folder), built from a file in `configs/sweep/` and the command line."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from sasa_train.config.bounds import key
from sasa_train.config.compose import compose_config, quote_texts
from sasa_train.config.groups import choice_file, choices
from sasa_train.config.keys import OWN_MODELS, TrainConfig, key_table, text_keys
from sasa_train.config.overrides import (
    TEXT_KEYS,
    UNREADABLE,
    check_override_keys,
    expand,
    for_own_images,
    nearest,
    one_list_each,
    parse_overrides,
)
from sasa_train.config.own_keys import use_presets
from sasa_train.config.rules import check_bounds
from sasa_train.config.saved import shallow_events
from sasa_train.refusal import ConfigError, shorten
from sasa_train.runs.begun import find_begun
from sasa_train.runs.ledger import Job
from sasa_train.sweep.naming import Naming, key_of, name_in

# The sweep sets these keys itself for each of its jobs.
SET_BY_SWEEP = {
    "output_dir": "a job's run folder lies in the sweep's; sweep.output_dir moves that",
    "run_name": "a job's name comes from its content",
    "resume": "a job's run goes on by itself",
}


@dataclass
class SweepConfig:
    """The keys of a file in `configs/sweep/`, prefixed with `sweep.` on the command line."""

    overrides: list[str] = key([], "overrides of all jobs; keys with several values span a grid or the search space")
    rows: list[list[str]] = key([], "a list of jobs with their own overrides; each is combined with the grid")
    name: str | None = key(
        None, "name of the sweep's folder; null: derived from the file and the overrides", name_length=151
    )
    output_dir: str = key(
        "outputs", "folder in which the sweep's folder, with its run folders, is created", is_path=True
    )
    max_parallel: int | None = key(None, "maximum parallel jobs; null: one per GPU, or one without a GPU", above=0)
    devices_per_job: int = key(1, "GPUs per job; if more than 1, torchrun starts one process per GPU", above=0)
    max_tries: int = key(3, "consecutive failed starts after which a job counts as failed", above=0)
    num_trials: int | None = key(None, "run an Optuna search with this many trials instead of a grid", above=0)
    pruner: str = key(
        "median",
        "for a search: median and hyperband stop trials that do poorly on val",
        choices=("none", "median", "hyperband"),
    )
    worker: str | None = key(
        None, "for a search: unique name of each sasa-sweep process that shares the folder", name_length=151
    )
    paper_table: int | None = key(None, "table of the paper that sasa-report shows next to the results")


TEXT_KEYS_OF_SWEEP = TEXT_KEYS | {"sweep", *text_keys(key_table(SweepConfig, "sweep."))}


@dataclass
class SweepPlan:
    config: SweepConfig
    folder: Path
    fixed: list[str]  # overrides that apply to every job
    space: list[str]  # for a search: overrides with several values
    jobs: list[Job]  # for a grid or list
    hydra: list[str]  # Hydra's own keys, which select the launcher


def read_plan(overrides: Sequence[str]) -> SweepPlan:
    """Parse a command line: `sweep=NAME`, `sweep.KEY=value`, and overrides for the jobs.

    An override on the command line replaces the file's overrides of the same key.

    Raises:
        ConfigError: a file or key is unknown, a value is invalid, or the grid is too large.
    """
    parsed = parse_overrides(overrides, TEXT_KEYS_OF_SWEEP)
    ours = [o for o in parsed if o.key_or_group == "sweep" or o.key_or_group.startswith("sweep.")]
    hydra = _launcher_keys(parsed)
    given = [str(o.input_line) for o in parsed if o not in ours and str(o.input_line) not in hydra]
    use_presets(given)
    config = _read_config(ours)
    given_keys = {o.key_or_group for o in parse_overrides(given)}
    common = one_list_each([o for o in config.overrides if key_of(o) not in given_keys] + given)
    rows = [[o for o in row if key_of(o) not in given_keys] for row in config.rows] or [[]]
    asked, common = common, for_own_images(common)
    use_presets(common)
    for row in rows:
        check_override_keys([*common, *row], is_sweep=True)
    for override in parse_overrides([*common, *(o for row in rows for o in row)]):
        if reason := SET_BY_SWEEP.get(override.key_or_group):
            raise ConfigError(f"{override.input_line}: is not a sweep's to set: {reason}")
    swept = [o for o in common if parse_overrides([o])[0].is_sweep_override()]
    fixed = [o for o in common if o not in swept]
    stem = [str(o.value()) for o in ours if o.key_or_group == "sweep"]
    within = Path(config.output_dir).expanduser()
    naming = Naming(Path(stem[-1]).stem if stem else None, fixed, swept, is_short=common != asked)
    folder = within / (config.name or name_in(within, naming))
    is_search = config.num_trials is not None
    if is_search and (len(rows) > 1 or rows[0]):
        raise ConfigError(f"sweep.num_trials={config.num_trials}: a search has no rows; put them into its space")
    if is_search and not swept:
        raise ConfigError(f"sweep.num_trials={config.num_trials}: nothing to search; give a key several values")
    jobs = [] if is_search else _jobs([[*common, *row] for row in rows], {key_of(o) for o in fixed}, folder)
    return SweepPlan(config, folder, fixed, swept if is_search else [], jobs, hydra)


def _launcher_keys(parsed: list[Override]) -> list[str]:
    """Return Hydra's own keys, which select and configure a launcher."""
    keys = [str(o.input_line) for o in parsed if o.key_or_group.startswith("hydra")]
    if keys and not any(o.startswith("hydra/launcher=") for o in keys):
        raise ConfigError(f"{' '.join(keys)}: has a meaning with hydra/launcher=... alone")
    if sweeper := [o for o in keys if "sweeper" in o]:
        raise ConfigError(f"{' '.join(sweeper)}: sasa-sweep is the sweeper; hydra/launcher=... starts the jobs")
    return keys


def _read_config(ours: list[Override]) -> SweepConfig:
    merged = OmegaConf.structured(SweepConfig)
    try:
        for override in ours:
            if override.is_sweep_override() or override.is_delete() or override.is_add():
                raise ConfigError(f"{override.input_line}: is of the sweep itself, and takes one value: key=value")
            if override.key_or_group == "sweep":
                path = _sweep_file(str(override.value()))
                merged = _merge(merged, _read_file(path), str(path))
        for override in ours:
            if override.key_or_group != "sweep":
                key = override.key_or_group.removeprefix("sweep.")
                merged = _merge(merged, {key: override.value()}, f"sweep.{key}={override.value()}")
        config = cast(SweepConfig, OmegaConf.to_object(merged))
    except (*UNREADABLE, OSError) as error:
        raise ConfigError(f"sweep: {shorten(str(error).splitlines()[0])}") from error
    _validate(config)
    return config


def _merge(merged: Any, values: Any, where: str) -> Any:
    known = list(key_table(SweepConfig))
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: is not a sweep file; it must hold keys and values of {', '.join(known)}")
    for given in values:
        if given not in known:
            raise ConfigError(f"{where}: unknown key {given!r}: {nearest(str(given), known)}")
    try:
        return OmegaConf.merge(merged, values)
    except UNREADABLE as error:
        raise ConfigError(f"{where}: {shorten(str(error).splitlines()[0])}") from error


def _read_file(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if any(isinstance(event, yaml.AliasEvent) for event in shallow_events(text, str(path))):
        raise ConfigError(f"{path}: YAML's aliases are not taken, because a few can stand for any amount of data")
    text = quote_texts(text, text_keys(key_table(SweepConfig)))
    return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))


def _sweep_file(name: str) -> Path:
    """Return the path of `configs/sweep/NAME.yaml` or of the user's own file."""
    if path := choice_file("sweep", name):
        return path
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return Path(name)
    raise ConfigError(f"sweep={name} must be one of {', '.join(choices('sweep'))}, or an existing .yaml file")


def _validate(config: SweepConfig) -> None:
    check_bounds(config, "sweep.")
    if config.worker is not None and config.num_trials is None:
        raise ConfigError(f"sweep.worker={config.worker}: only a search (sweep.num_trials) is shared by several")


def _jobs(rows: list[list[str]], fixed_keys: set[str], folder: Path) -> list[Job]:
    """Return the jobs of all rows without duplicates."""
    grids = [expand(row) for row in rows]
    jobs: dict[str, Job] = {}
    for job in (build_job(list(overrides), fixed_keys, folder) for grid in grids for overrides in grid):
        equal = jobs.setdefault(job.name, job)
        if set(equal.overrides) != set(job.overrides):
            raise ConfigError(
                f"{equal.label} and {job.label} are the same run: they differ in nothing that it computes"
            )
    return list(jobs.values())


def build_job(overrides: list[str], fixed_keys: set[str], folder: Path) -> Job:
    """Build and name a job for `folder`; one with an invalid config is marked as refused, and the others can run."""
    label = " ".join(o for o in overrides if key_of(o) not in fixed_keys) or "all as given"
    try:
        config = compose_config(overrides)
        name = find_begun(config, folder)[0]
        return Job(name, overrides, label, _epochs(config), config.trainer.best_metric)
    except ConfigError as error:
        digest = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:8]
        return Job(f"refused-{digest}", overrides, label, state="refused", reason=str(error))


def at_full_width(jobs: list[Job]) -> list[str]:
    """Return those of our models that jobs on the user's own images take as groups, which keep their full width."""
    first = {o.removeprefix("model="): job for job in reversed(jobs) for o in job.overrides if o.startswith("model=")}
    found = []
    for name, job in sorted(first.items()):
        if name in OWN_MODELS and job.state != "refused":
            config = compose_config(job.overrides)
            is_chosen = not {"data.holdout_fraction"}.issuperset(config.derive)
            found += [name] if is_chosen and config.model.width is None and config.model.pretrained is None else []
    return found


def _epochs(config: TrainConfig) -> int:
    """Return the epochs of a run, or 0 if they are chosen from the images when it begins."""
    return 0 if "trainer.epochs" in config.derive else config.trainer.epochs
