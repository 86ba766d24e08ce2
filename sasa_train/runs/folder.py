"""The folder of a run, including its creation, its lock and the files that describe the run."""

import contextlib
import itertools
import os
import shlex
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sasa_train.config import own_code
from sasa_train.config.derived import total_steps
from sasa_train.config.identity import differing_keys
from sasa_train.config.keys import PUBLISHED, TrainConfig, TrainerConfig, flatten, with_values
from sasa_train.config.overrides import as_written, is_group, parse_overrides
from sasa_train.config.own_keys import targets_of
from sasa_train.config.places import as_given, kept_places, tell_places, where_trained
from sasa_train.config.saved import BEFORE, as_begun, load_config, load_config_file, to_yaml
from sasa_train.data.fingerprint import differences
from sasa_train.files import (
    LOCK,
    FolderLock,
    inside,
    is_there,
    kind,
    lock_folder,
    read_regular,
    unfinished,
    write_atomic,
)
from sasa_train.models.counting import bought_flops
from sasa_train.processes.ranks import world_size
from sasa_train.refusal import ConfigError, ExpectedFailure
from sasa_train.runs.checkpoint import CheckpointError, Checkpoints, load_checkpoint
from sasa_train.runs.info import read_info, read_info_or_raise, update_info
from sasa_train.runs.metrics import digest_of, end_of, is_out_of_patience, parse_log
from sasa_train.runs.source import similar_runs
from sasa_train.runs.teacher import teacher_file
from sasa_train.runs.weights import sha256_of, weights_file
from sasa_train.terminal import printable, some, warn

# The files of a run at the top of its folder, besides the differences of its code.
FILES = (
    ".lock", "augmented.png", "config.yaml", "metrics.jsonl", "nonfinite.txt", "run.json", "unreadable.txt",
)  # fmt: skip


@dataclass
class RunFolder:
    """A run folder, locked until `lock` is closed; `checkpoint` is the state to continue from, or None.

    Only the first process holds the lock and writes; in the other processes, `lock` is None and nothing is written.
    """

    path: Path
    lock: FolderLock | None
    checkpoints: Checkpoints
    checkpoint: dict[str, Any] | None
    is_new: bool = True  # the folder has no checkpoint yet
    metrics: str = ""  # content of metrics.jsonl at the checkpoint
    provenance: dict[str, Any] = field(default_factory=dict)  # of the current start
    made: list[Path] = field(default_factory=list)  # this folder and those around it, if this start made them
    given: dict[str, str] = field(default_factory=dict)  # paths as they stay in the saved config
    own_checkpoints: os.stat_result | None = None  # the folder of checkpoints, at the last look

    def is_ours(self) -> bool:
        """Return whether this process holds the lock, and the folder is still the one that it locked."""
        try:
            return self.lock is not None and self.lock.holds(self.path)
        except OSError:
            return False

    def check_lock(self) -> None:
        """Raise ExpectedFailure if the folder is not this run's any more, so that nothing of another run is changed.

        Raise OSError if the disk fails.
        """
        if self.lock is not None and not self.lock.holds(self.path):
            raise ExpectedFailure(
                f"{self.path}: its lock file is gone or another's; the folder was moved, deleted or taken by another "
                "run. This run stops without writing; continue it from its folder's new place with resume=..., or once "
                "no other run uses this folder"
            )
        place = self.path / "checkpoints"
        if place.is_symlink():
            raise ExpectedFailure(
                f"{place} has become a symbolic link, through which this run does not write; put there what it links "
                "to, and run the same command again"
            )
        found = place.stat() if self.lock is not None and place.exists() else None
        if found is not None and self.own_checkpoints is not None and not os.path.samestat(found, self.own_checkpoints):
            raise ExpectedFailure(
                f"{place} has been replaced by another folder, in which this run does not write; put its own back, and "
                "run the same command again"
            )
        self.own_checkpoints = found

    @contextlib.contextmanager
    def discarded_if_refused(self) -> Iterator[None]:
        """Context manager that deletes the folder after a ConfigError, as in `_discard`."""
        try:
            yield
        except ConfigError:
            self._discard()
            raise

    def _discard(self) -> None:
        """Delete the folder if this start made it and it holds only what was written before training began."""
        if not self.made or not self.is_ours() or {path.name for path in self.path.iterdir()} - {LOCK, "config.yaml"}:
            return
        with contextlib.suppress(OSError):  # another run may have come into one of the folders
            for name in ("config.yaml", LOCK):
                (self.path / name).unlink(missing_ok=True)
            for folder in self.made:
                folder.rmdir()

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the folder atomically."""
        if self.lock is not None:
            self.check_lock()
            write_atomic(self.path / name, data)

    def write_config(self, config: TrainConfig) -> None:
        self.write("config.yaml", to_yaml(self.as_written(config)).encode())

    def keep_places(self, config: TrainConfig) -> None:
        """Keep relative places of the images in the saved config if the run continues on the same from elsewhere."""
        if self.checkpoint is not None and not self.is_new:
            saved, directory = load_config(self.checkpoint["config"]), self.checkpoint["provenance"].get("directory")
            self.given = kept_places(config, saved, directory)
            if self.given and Path(config.resume) == self.path:  # run.json's command holds in one directory
                self.given["resume"] = os.path.relpath(self.path, directory)

    def as_written(self, config: TrainConfig) -> TrainConfig:
        """Return the config as it is saved."""
        return with_values(config, self.given)

    def write_info(self, **changes: Any) -> None:
        """Update run.json."""
        if self.lock is not None:
            self.check_lock()
            update_info(self.path, changes)

    def write_start(self, difference: str, step: int) -> None:
        """Record the provenance of this start in run.json and append it to `starts`.

        The diff of the code against its last commit, `difference`, is saved in a separate file in the folder.
        """
        now = self.provenance
        if difference:
            self.write(now["difference"], f"{difference}\n".encode(errors="surrogateescape"))
        keys = ("started", "command", "commit", "difference", "host", "world_size")
        start = {key: now.get(key) for key in keys} | {"step": step}
        starts = [*read_info_or_raise(self.path).get("starts", []), start]
        self.write_info(**now, starts=starts, status="running", reason=None)

    def note_checkpoint(self) -> None:
        """Record that a checkpoint exists, so that a later start notices if all checkpoints are gone."""
        if self.is_new:
            self.is_new = not self.try_write_info(has_checkpoint=True)

    def try_write_info(self, **changes: Any) -> bool:
        """Update run.json, but only warn if that fails, for example on a full disk; return whether it succeeded."""
        try:
            self.write_info(**changes)
        except OSError as error:
            warn(f"{self.path}/run.json cannot be written ({error.strerror})")
            return False
        return True

    def write_end(self, checkpoint: dict[str, Any], reason: str = "") -> None:
        """Complete a finished run's folder: update run.json, and restore a changed log or config.

        reason: why it ended before its last step; "" if it did not.

        Raises:
            CheckpointError: the last checkpoint is not there any more.
        """
        if self.lock is None:
            return
        last = self.path / "checkpoints/last.pt"
        if not is_there(last):
            raise CheckpointError(
                f"{last} is gone, though the run wrote it; bring it back, or run the same command again"
            )
        if self.checkpoint is None and (
            other := self.checkpoints.other_best(checkpoint["best"], checkpoint["step"], checkpoint["step"])
        ):
            warn(other)  # otherwise, `open_run` has said it
        self.write_info(
            status="finished",
            reason=reason or None,
            best=checkpoint["best"],
            config_sha256=digest_of(checkpoint["config"]),
            **end_of(checkpoint["metrics"]),
        )
        for name, text in (("metrics.jsonl", checkpoint["metrics"]), ("config.yaml", checkpoint["config"])):
            content, path = text.encode(), self.path / name
            if not is_there(path) or path.stat().st_size != len(content) or read_regular(path, len(content)) != content:
                self.write(name, content)


def open_run(config: TrainConfig, run_name: str) -> RunFolder:
    """Find or create the run's folder, lock it, and load the checkpoint to continue from.

    Raises:
        ConfigError: another process uses the folder, `resume` does not exist, or keys that affect the results differ.
        CheckpointError: the folder has or had checkpoints but none is intact, or the one given by `resume` is damaged.
    """
    wanted = Path(config.output_dir) / run_name
    missing = [folder for folder in (wanted, *wanted.parents) if not is_there(folder)]
    path, given, is_made = _choose_folder(config, wanted)
    check_entries(path)
    lock = lock_folder(path)
    try:
        checkpoints = Checkpoints(path / "checkpoints", config.trainer.keep_checkpoints)
        own = checkpoints.newest(warn)
        for stale in unfinished(path):  # left behind by a start that was killed
            stale.unlink()
        if own is not None:
            check_trajectory(own, config, path)
            if other := checkpoints.other_best(own["best"], own["step"], own["evaluated_step"]):
                warn(other)
            return RunFolder(path, lock, checkpoints, own, is_new=False)
        info, rows = read_info_or_raise(path), path / "metrics.jsonl"
        if not info and is_there(rows) and rows.stat().st_size:  # run.json is written before the first row
            raise CheckpointError(
                f"{path}: metrics.jsonl has rows, and neither checkpoints nor a good run.json say how they came about; "
                "bring those back, or start a new run with resume=never"
            )
        if info.get("has_checkpoint"):
            raise CheckpointError(
                f"{path}: this run had checkpoints, and they are gone; bring them back, or start a new run with "
                "resume=never"
            )
        if Path(config.resume) == path:
            raise ConfigError(f"resume={config.resume}: the folder has no checkpoint to continue from")
        # An earlier start may have ended before its first checkpoint.
        if given is None and is_there(Path(config.resume), stat.S_ISREG):
            given = _load_given(config)
        made = [path, *(folder for folder in missing if folder != wanted)] if is_made else []
        run = RunFolder(path, lock, checkpoints, given, made=made)
        # From here on, running the same command again finds this folder.
        run.write_config(config)
        return run
    except BaseException:
        lock.close()
        raise


def _choose_folder(config: TrainConfig, wanted: Path) -> tuple[Path, dict[str, Any] | None, bool]:
    """Return the run folder, the checkpoint that a new run starts from (or None), and whether the folder was made."""
    source = Path(config.resume)
    try:
        if config.resume == "auto":
            is_made = not is_there(wanted)
            wanted.mkdir(parents=True, exist_ok=True)
            return wanted, None, is_made
        if config.resume == "never":
            return _new_folder(wanted), None, True
        if is_there(source, stat.S_ISDIR):
            return source, None, False
        if (path := _folder_started_from(wanted, config.resume)) is not None:
            return path, None, False
        given = _load_given(config)  # loaded first, so that an error leaves no empty folder
        return _new_folder(wanted), given, True
    except OSError as error:
        raise ConfigError(f"output_dir={config.output_dir}: {wanted} cannot be made ({error.strerror})") from error


def look_at_run(config: TrainConfig, run_name: str) -> RunFolder:
    """Find the run as `open_run` does, without making or locking its folder, or writing to it.

    Raises:
        ConfigError: as in `open_run`.
        CheckpointError: the checkpoint to continue from is damaged.
    """
    wanted, source = Path(config.output_dir) / run_name, Path(config.resume)
    given, path = None, wanted
    if config.resume not in ("auto", "never") and not is_there(source, stat.S_ISDIR):
        path = _folder_started_from(wanted, config.resume) or next(p for p in _numbered(wanted) if not is_there(p))
        given = None if is_there(path) else _load_given(config)
    elif config.resume == "never":
        path = next(p for p in _numbered(wanted) if not is_there(p))
    elif config.resume != "auto":
        path = source
    if is_there(path):
        check_entries(path)
    if is_there(path / "checkpoints/last.pt"):
        given = load_checkpoint(path / "checkpoints/last.pt")
        check_trajectory(given, config, path)
    elif config.resume != "auto" and path == source:
        raise ConfigError(f"resume={config.resume}: the folder has no checkpoint to continue from")
    return RunFolder(path, None, Checkpoints(path / "checkpoints", 0), given)


def _load_given(config: TrainConfig) -> dict[str, Any]:
    """Load the checkpoint given by `resume`, without its best result and metrics, which stay in the old folder."""
    source = Path(config.resume)
    if not is_there(source, stat.S_ISREG):
        raise ConfigError(
            f"resume={config.resume} must be auto, never, a run folder or a checkpoint; it is not there"
            f"{similar_runs(source)}"
        )
    given = load_checkpoint(source) | {"best": None, "metrics": ""}
    check_trajectory(given, config, source)
    if is_finished(given, config):
        raise ConfigError(
            f"resume={source} is finished; to train it further: trainer.epochs=... and {_allow(['trainer.epochs'])}"
        )
    return given


def load_saved_config(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """Return a run folder's config with overrides applied; raise ConfigError as `load_config` does.

    The last checkpoint's config takes precedence, because config.yaml may be damaged or from a start that failed early.
    """
    return _load_saved(path, overrides)[0]


def load_to_continue(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """Do the same, with relative places of the images as seen from where the run was trained; say what they are."""
    saved, directory = _load_saved(path, overrides)
    config = where_trained(saved, directory, overrides)
    tell_places(as_given(saved, config), config)
    return config


def load_as_trained(path: Path) -> TrainConfig:
    """Read a run folder's config.yaml, with relative places of the images as seen from where the run was trained."""
    return where_trained(load_config_file(path / "config.yaml"), read_info(path).get("directory"))


def _load_saved(path: Path, overrides: Sequence[str]) -> tuple[TrainConfig, Any]:
    """Return a run folder's config, and the directory in which the run was trained, if it is recorded."""
    last = path / "checkpoints/last.pt"
    try:
        checkpoint = load_checkpoint(last)
        config = load_config(checkpoint["config"], overrides, source=str(last))
        return config, checkpoint["provenance"].get("directory")
    except CheckpointError:
        return load_config_file(path / "config.yaml", overrides), read_info(path).get("directory")


def check_groups(path: Path, config: TrainConfig, arguments: Sequence[str]) -> None:
    """Raise ConfigError if group choices make `config` another one than that of the run which it continues.

    The whole command that began the run is accepted. A choice alone is not, because all keys outside its group would
    return to their defaults; the message has the choice's keys, to be set over the run's own config.
    """
    saved, given = load_saved_config(path, []), parse_overrides(arguments)
    config = as_begun(config, to_yaml(saved))
    if config.trainer.precision == "auto":  # the run has saved what auto became
        config = with_values(config, {"trainer.precision": saved.trainer.precision})
    named = {o.key_or_group for o in given}.union(config.allow_config_change, BEFORE)
    changed = [key for key in differing_keys(saved, config, same_world_size=False) if key not in named]
    if not changed:
        return
    chosen = [o for o in given if is_group(o)]
    what = f"{' '.join(str(o.input_line) for o in chosen)}: resume={path} continues with the run's own config"
    old, new = flatten(saved), flatten(config)
    if any(o.key_or_group == "experiment" for o in chosen):
        changes = some([f"{key}: {old[key]} -> {new[key]}" for key in changed])
        raise ConfigError(f"{what}, which this would change ({changes}); leave it out, or leave out resume=")
    others = [str(o.input_line) for o in given if o not in chosen and o.key_or_group != "allow_config_change"]
    keys = [key for key in changed if key.startswith(tuple(f"{o.key_or_group}." for o in chosen))]
    if not keys:
        raise ConfigError(f"{what}, which has this choice already; leave it out")
    settings = [f"{key}={as_written(new[key])}" for key in keys]
    words = shlex.join(["sasa-train", *others, *settings])
    command = f"{words} {_allow([*config.allow_config_change, *keys])}"
    raise ConfigError(
        f"{what}; set keys of it, not a group: {' '.join(settings)}\nto change this run from here on: {command}\nfor a "
        "new run with this change: the command that began the run, with this added"
    )


def begun_config(config: TrainConfig, run_name: str) -> TrainConfig | None:
    """Return the config of the run or checkpoint that `config` continues, or None for a new run; lock nothing.

    Raises:
        ConfigError: the folder or its config is damaged, or `resume` does not exist.
        CheckpointError: the checkpoint given by `resume` is damaged.
    """
    wanted = Path(config.output_dir) / run_name
    if config.resume == "never":
        return None
    folder = wanted if config.resume == "auto" else _folder_started_from(wanted, config.resume) or Path(config.resume)
    if is_there(folder, stat.S_ISREG):
        return load_config(load_checkpoint(folder)["config"], source=str(folder))
    if config.resume != "auto" and not is_there(folder):
        _load_given(config)  # refuses it, before any image is looked at
    check_entries(folder)
    has_begun = is_there(folder / "config.yaml") or is_there(folder / "checkpoints/last.pt")
    return load_saved_config(folder, []) if has_begun else None


def check_trajectory(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError if keys that affect results have changed since the checkpoint, unless the user allows it."""
    saved = load_config(checkpoint["config"], source=f"the config in the checkpoint of {path}")
    config = as_begun(config, checkpoint["config"])
    same = has_same_world_size(checkpoint)
    keys = [key for key in differing_keys(saved, config, same) if key not in config.allow_config_change]
    if keys:
        old, new = flatten(saved), flatten(config)
        changes = "\n".join(f"  {key}: {old.get(key)} -> {new.get(key)}" for key in keys)
        raise ConfigError(
            f"{path} was trained with another config (checkpoint -> now):\n{changes}\n"
            "give the old values, or another run_name, or resume=never for a new run; to continue all the same: "
            + _allow(keys)
        )
    check_code(checkpoint, config, path)
    check_step(checkpoint, saved, config, path)
    check_average(checkpoint, saved, path)
    check_pretrained(checkpoint, config, path)
    check_teacher_file(checkpoint, config, path)


def check_code(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError if the user's own code has changed since the checkpoint, unless the user allows it."""
    before = checkpoint["provenance"].get("imports", {})
    now = own_code.digests(config.imports, targets_of(config))
    names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    if not names:
        return
    changes = some([own_code.file_of(name) for name in names])
    if "imports" in config.allow_config_change:
        warn(f"your own code is not what {path} was trained with: {changes}")
        return
    raise ConfigError(
        f"{path} was trained with other code of your own: {changes}; bring the old files back, or start a new run "
        f"(another run_name, or resume=never); to continue all the same: {_allow(['imports'])}"
    )


def check_step(checkpoint: dict[str, Any], saved: TrainConfig, config: TrainConfig, path: Path) -> None:
    """Raise ConfigError if a checkpoint's step, end or rows cannot be those of its own config on its own images."""
    num_images = sum(entry["num_images"] for entry in checkpoint["fingerprint"]["train"]["classes"])
    step_flops = bought_flops(saved, len(checkpoint["classes"]))
    last, step = total_steps(saved, num_images // saved.trainer.global_batch_size, step_flops), checkpoint["step"]
    wrong, ended_early = None, is_out_of_patience(saved.trainer, checkpoint["metrics"])
    # A run whose epochs, batch size or images were changed on purpose may be beyond its new end.
    if step > last and not saved.allow_config_change:
        wrong = f"step={step:,} must be at most {last:,}, the last step"
    elif checkpoint["finished"] and not (step == checkpoint["evaluated_step"] and (step == last or ended_early)):
        wrong = f"finished=True needs step={step:,} and evaluated_step={checkpoint['evaluated_step']:,} to be {last:,}"
        wrong += ", the last step"
    elif not saved.allow_config_change and not config.allow_config_change:
        wrong = _first_lost_row(checkpoint, saved.trainer, num_images // saved.trainer.global_batch_size)
    if wrong is not None:
        raise ConfigError(
            f"{path}: the checkpoint's {wrong} of its config on {num_images:,} images; bring back the one that the run "
            "wrote, or start a new run (resume=never)"
        )


def _first_lost_row(checkpoint: dict[str, Any], trainer: TrainerConfig, steps_per_epoch: int) -> str | None:
    """Describe what contradicts that a checkpoint's last row is the last that the run wrote, or return None."""
    # Which earlier train rows there must be is not known: log_every_steps may change whenever a run goes on.
    rows, step, counts = parse_log(checkpoint["metrics"]), checkpoint["step"], checkpoint["window"]["num_images"]
    in_window, evaluated = sum(counts) if isinstance(counts, list) else counts, checkpoint["evaluated_step"]
    last_row = max((row["step"] for row in rows if row["split"] == "train"), default=0)
    since = (step - last_row) * trainer.global_batch_size
    # The rows of a run that began from a checkpoint start after it, and its first window before it.
    if in_window > since or (last_row and in_window < since):
        return f"window.num_images={in_window:,} must be {since:,}, the images since the last row (step {last_row:,}),"
    if not steps_per_epoch:
        return None
    every = trainer.eval_every_epochs * steps_per_epoch
    due = (step - 1) // every * every
    is_same = all(row["epoch"] == (row["step"] - 1) // steps_per_epoch + 1 for row in rows)  # not so on other images
    if is_same and rows and rows[0]["step"] <= due and evaluated < due:
        return f"evaluated_step={evaluated:,} must be {due:,}, the last that trainer.eval_every_epochs demands,"
    return None


def check_average(checkpoint: dict[str, Any], saved: TrainConfig, path: Path) -> None:
    """Raise ConfigError if a checkpoint has a moving average that its config lacks, or the reverse."""
    if (checkpoint["ema"] is not None) != bool(saved.trainer.ema_decay):
        has = "no moving average" if checkpoint["ema"] is None else "a moving average, ema"
        raise ConfigError(
            f"{path}: the checkpoint has {has}, and its config trainer.ema_decay={saved.trainer.ema_decay}; bring back "
            "the one that the run wrote"
        )


def check_pretrained(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError if the weights in `model.pretrained` are not those that the run started from."""
    # Weights that no longer exist are not compared, because the run does not need them any more.
    source, before = config.model.pretrained, checkpoint["provenance"].get("pretrained_sha256")
    if source in (None, PUBLISHED) or before is None or "model.pretrained" in config.allow_config_change:
        return
    try:
        now = sha256_of(weights_file(source))
    except (ConfigError, OSError):
        return
    if now != before:
        raise ConfigError(
            f"model.pretrained={printable(source)}: its content is not what {path} began with; for a run that begins "
            f"with it give another run_name, or resume=never; to continue all the same: {_allow(['model.pretrained'])}"
        )


def check_teacher_file(checkpoint: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError if the teacher's file, which may have moved, is not that which the run was trained with."""
    if config.distill.file is None:
        return
    try:
        now = sha256_of(teacher_file(config.distill))
    except (ConfigError, OSError):
        return  # a finished run needs no teacher, and training refuses it
    check_teacher(checkpoint, config, path, now)


def check_teacher(checkpoint: dict[str, Any], config: TrainConfig, path: Path, now: str) -> None:
    """Raise ConfigError if `now`, the SHA-256 of the teacher's weights, is not the checkpoint's, unless allowed."""
    before = checkpoint["provenance"].get("teacher_sha256")
    if before not in (None, now) and "distill.teacher" not in config.allow_config_change:
        raise ConfigError(
            f"distill.teacher={printable(str(config.distill.teacher))}: is not the teacher that {path} was trained "
            f"with (sha256 {now[:12]}, and was {before[:12]}); bring that one back; for a run with this one give "
            f"another run_name, or resume=never; to continue all the same: {_allow(['distill.teacher'])}"
        )


def check_data(checkpoint: dict[str, Any], fingerprints: dict[str, Any], config: TrainConfig) -> None:
    """Raise ConfigError listing the changes if the images differ from the checkpoint's, unless the user allows it."""
    saved = checkpoint["fingerprint"]
    found = [line for split in fingerprints for line in differences(saved[split], fingerprints[split], split)]
    if not found:
        return
    changes = "\n".join(f"  {line}" for line in found)
    key = config.data.place.partition("=")[0]
    if key in config.allow_config_change:
        warn(f"the images are not those that this run began with:\n{changes}")
        return
    raise ConfigError(
        f"{config.data.place}: the images are not those that this run began with:\n{changes}\n"
        "bring the old ones back, or start a new run (another run_name, or resume=never); to continue on these all the "
        f"same: {_allow([key])}"
    )


def is_finished(checkpoint: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a run has finished with this config; it has not if an allowed key, such as trainer.epochs, differs."""
    saved, config = load_config(checkpoint["config"]), as_begun(config, checkpoint["config"])
    return checkpoint["finished"] and not differing_keys(saved, config, has_same_world_size(checkpoint))


def has_same_world_size(checkpoint: dict[str, Any]) -> bool:
    return checkpoint["provenance"].get("world_size", 1) == world_size()


def _allow(keys: list[str]) -> str:
    return f"'allow_config_change=[{','.join(keys)}]'"  # zsh would take brackets without quotes as a pattern


def _numbered(wanted: Path) -> Iterator[Path]:
    """Yield `wanted`, `wanted-2`, `wanted-3`, ..."""
    return (wanted if n == 1 else wanted.with_name(f"{wanted.name}-{n}") for n in itertools.count(1))


def _new_folder(wanted: Path) -> Path:
    """Create the first numbered folder that does not exist; `mkdir` ensures that no other run takes the same one."""
    for path in _numbered(wanted):
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


def _folder_started_from(wanted: Path, resume: str) -> Path | None:
    """Return the numbered folder that an earlier start of the same command created, or None."""
    for path in itertools.takewhile(is_there, _numbered(wanted)):
        with contextlib.suppress(ConfigError):
            if load_config_file(path / "config.yaml").resume == resume:
                return path
    return None


def check_entries(path: Path) -> None:
    """Raise ConfigError if a run folder has an entry that would lead a write elsewhere, or block or fail it.

    These are symbolic links, pipes, sockets and devices, and a folder where the run has a file, or the reverse.
    """
    for name in ("", "checkpoints", "tensorboard", "tensorboard/figures", "figures", "profile"):
        folder = inside(path, *name.split("/"))
        for entry in folder.iterdir() if folder.is_dir() else ():
            found = kind(entry)
            if found == "a symbolic link":
                raise ConfigError(
                    f"{entry} is a symbolic link, and a run writes inside its folder alone: put there what it links "
                    "to, or move the whole run with output_dir=..."
                )
            is_file = name == "checkpoints" or entry.name in FILES or entry.name.endswith(".tmp")
            if found != "a file" and (is_file or found != "a folder"):
                raise ConfigError(f"{entry}: is {found}, where a run has files alone; move it away")
