"""The command line of sasa-train. The run itself is implemented in training/, so that `--help` does not import torch.

`torchrun --nproc-per-node=N -m sasa_train.train` accepts the same arguments.
"""

import logging
import os
import signal
import stat
import sys
import time
import traceback
from pathlib import Path

from sasa_train import __version__
from sasa_train.config import own_code
from sasa_train.config.bounds import print_entry, print_keys
from sasa_train.config.compose import compose_config
from sasa_train.config.groups import GROUPS, choices
from sasa_train.config.keys import TrainConfig, key_table
from sasa_train.config.overrides import check_override_keys, chooses_group, expand, for_own_images, parse_overrides
from sasa_train.config.own_keys import targets_of, use_code, use_code_of, use_presets
from sasa_train.config.rules import check_world_size
from sasa_train.config.saved import check_overrides, to_yaml
from sasa_train.files import inside, is_there
from sasa_train.processes.ranks import max_restarts, rank, world_size
from sasa_train.refusal import ConfigError
from sasa_train.signals import ignore_until_the_end
from sasa_train.terminal import DONE, FAILED, REFUSED, escape_unknown_letters, fail, load_torch, printable_lines
from sasa_train.training.endings import foreseen, tell, train_safely

USAGE = """[group=choice ...] [key=value ...] [-m | --multirun] [--cfg] [--plan] [-h] [--version]

Train an image classifier into a folder of its own in outputs/. The same command continues an unfinished run.

  sasa-train experiment=quickstart                                    a first run, about a minute on a CPU
  sasa-train model=hybrid_resnet26 data=cifar10 trainer.epochs=100
  sasa-train data.root=/path/to/images                                your own, one folder per class
  sasa-train resume=outputs/RUN_NAME                                  continue this run
  sasa-train experiment=quickstart --cfg                              print all keys with their values; train nothing
  sasa-train experiment=quickstart --plan                             print what it is and takes; write nothing
  sasa-train experiment=quickstart seed=0,1,2 -m                      a plain Hydra sweep; sasa-sweep can do more
  torchrun --nproc-per-node=8 -m sasa_train.train ...                 the same on several GPUs"""


def main() -> None:
    escape_unknown_letters()
    end(run_command(sys.argv[1:]))


def end(code: int) -> None:
    """Exit this process with `code`, ignoring any signals that arrive meanwhile."""
    ignore_until_the_end()
    if world_size() > 1:
        from sasa_train.processes.collectives import leave

        leave(code, may_wait=code == DONE)
    sys.exit(code)


def run_command(arguments: list[str]) -> int:
    """Run sasa-train with command-line arguments and return the exit code."""
    if {"-h", "--help"} & set(arguments):
        if rank() == 0:
            print_help("sasa-train", USAGE)
        return DONE
    if not arguments:
        if rank() == 0:
            print(f"usage: sasa-train {USAGE}\n\nsasa-train --help lists all groups and keys.", file=sys.stderr)
        return REFUSED
    if arguments == ["--version"]:
        print(f"sasa_train {__version__}")
        return DONE
    set_up_logging()
    try:
        only_plan, arguments = "--plan" in arguments, [a for a in arguments if a != "--plan"]
        if only_plan and (others := {"-m", "--multirun", "--cfg"} & set(arguments)):
            raise ConfigError(f"--plan and {others.pop()} exclude each other: --plan describes one run, with its keys")
        if world_size() > 1:
            return train_together(arguments, only_plan)
        if {"-m", "--multirun"} & set(arguments):
            return multirun(arguments)
        if "--cfg" in arguments:
            print(to_yaml(read_config([a for a in arguments if a not in ("--cfg", "job", "all")])), end="")
            return DONE
        return train_safely(read_config(arguments), only_plan=only_plan)
    except ConfigError as error:
        return fail(error)
    except OSError as error:
        if (text := foreseen(error)) is None:
            raise
        fail(RuntimeError(text))
        return FAILED


class PrintableFormatter(logging.Formatter):
    """Formatter that removes terminal control characters from messages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def set_up_logging() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("sasa_train").setLevel(logging.INFO if rank() == 0 else logging.ERROR)


def read_config(arguments: list[str]) -> TrainConfig:
    """Compose the config. With `resume=<run folder>` and no group choice, it is based on that run's own config.

    Raises:
        ConfigError: the command line or a config file is invalid, or a group choice is not that of the run.
    """
    resume = [o.value() for o in parse_overrides(arguments) if o.key_or_group == "resume"]
    folder = Path(str(resume[-1])) if resume else None
    if folder is not None and not is_there(folder / "config.yaml", stat.S_ISREG):
        folder = None
    if folder is not None and not chooses_group(arguments):
        check_overrides(arguments, source=str(folder))
        use_code(arguments)
        load_torch()
        from sasa_train.runs.folder import load_to_continue

        # Permission to change keys applies to a single continuation only.
        config = load_to_continue(folder, ["allow_config_change=[]", *arguments])
        own_code.check_named(config.imports, targets_of(config), str(folder))
        use_code_of(config)
    else:
        config = compose_config(for_own_images(arguments))
        if folder is not None:
            load_torch()
            from sasa_train.runs.folder import check_groups

            check_groups(folder, config, arguments)
    if not config.derive:  # otherwise, the batch is checked once it has been chosen
        check_world_size(config, world_size())
    if config.resume == "never" and max_restarts():
        raise ConfigError(
            f"resume=never with torchrun --max-restarts={max_restarts()}: each restart would begin a new run; leave it "
            "out and give the run a run_name"
        )
    return config


def multirun(arguments: list[str]) -> int:
    """Run a sweep with one of Hydra's launchers and one run folder per job; return the first nonzero exit code, else 0.

    Raises:
        ConfigError: a job's config is refused; all configs are checked before the first job starts.
    """
    from sasa_train.training.hydra_launch import launch

    overrides = for_own_images([a for a in arguments if a not in ("-m", "--multirun")])
    use_presets(overrides)
    check_override_keys(overrides, is_sweep=True)
    of_hydra = [o for o in overrides if parse_overrides([o])[0].key_or_group.startswith("hydra")]
    if sweepers := [o for o in of_hydra if "hydra/sweeper" in o or "hydra.sweeper" in o]:
        raise ConfigError(f"{' '.join(sweepers)}: -m is a plain grid, without Hydra's sweepers; use sasa-sweep")
    jobs = [list(job) for job in expand([o for o in overrides if o not in of_hydra])]
    configs = [compose_config(job) for job in jobs]
    inside(Path(configs[0].output_dir).resolve(), "multirun")
    folder = Path(configs[0].output_dir) / "multirun" / time.strftime("%Y-%m-%d_%H-%M-%S")
    codes = launch(jobs, of_hydra, folder)
    return next((code for code in codes if code != DONE), DONE)


def train_together(arguments: list[str], only_plan: bool) -> int:
    """Train as one of the processes started by torchrun. The first process reads the config for all of them."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={world_size()}, but torchrun did not start this process; several are started by "
            "torchrun --nproc-per-node=N -m sasa_train.train ..., and one without WORLD_SIZE"
        )
    # This silences C++ warnings: each process would warn about a DDP option that is set intentionally.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    load_torch()
    from sasa_train.processes import collectives

    def read() -> TrainConfig:
        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError("-m under torchrun, which starts the processes of one run: use sasa-sweep, or one job")
        return read_config(arguments)

    try:
        collectives.join()
        config = collectives.from_first(read, ConfigError)
        collectives.everywhere(lambda: use_code_of(config), ConfigError)
        return train_safely(config, only_plan=only_plan)
    except ConfigError as error:
        return tell(error)
    except Exception as error:
        if (text := foreseen(error)) is not None:
            tell(RuntimeError(text))
            return FAILED
        collectives.tell_failure(f"process {rank()}: {type(error).__name__}: {error}")
        traceback.print_exc()
        return FAILED


def print_help(command: str, usage: str) -> None:
    """Print the usage, the groups with their choices, and every key with its default, meaning and bounds."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `--help | head` ends without an error
    print(f"usage: {command} {usage}\n")
    print("Config groups (group=choice; the files are in configs/; an experiment chooses in all groups at once):")
    for group in GROUPS:
        print_entry(group, ", ".join(choices(group)), column=14)
    print("\nKeys (key=value; with the defaults that hold where no group's file says otherwise; null: not set):")
    print_keys(key_table(), column=42)
    print("\nExit codes: 0 done, 75 stopped and ready to continue (run the same command), 2 refused, 1 failed.")
