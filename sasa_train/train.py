"""sasa-train: from the command line to a run; the run itself is in loop.py, so that `--help` needs no torch."""

import logging
import os
import sys
from pathlib import Path

from sasa_train.compose import (
    check_override_keys,
    chooses_group,
    compose_config,
    config_dir,
    fail,
    load_config,
    parse_overrides,
    print_help,
    to_config,
)
from sasa_train.config import ConfigError, TrainConfig

USAGE = """[group=choice ...] [key=value ...]   (-m, --multirun: a plain Hydra sweep)

  sasa-train experiment=quickstart                                    a first run, two minutes on a CPU
  sasa-train model=hybrid_resnet26 data=cifar10 trainer.epochs=100
  sasa-train resume=outputs/RUN_NAME                                  go on; the first command again does so too"""

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 75


def main() -> None:
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    if {"-h", "--help"} & set(arguments):
        print_help("sasa-train", USAGE)
        return DONE
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sasa_train").setLevel(logging.INFO)
    try:
        refuse_many_processes()
        if {"-m", "--multirun"} & set(arguments):
            return multirun(arguments)
        return train_safely(read_config(arguments))
    except ConfigError as error:
        return fail(error)


def read_config(arguments: list[str]) -> TrainConfig:
    """The composed config; `resume=<run folder>` without a group choice starts from that run's own config.

    Raises:
        ConfigError: what the command line or a file gets wrong.
    """
    resume = [o.value() for o in parse_overrides(arguments) if o.key_or_group == "resume"]
    saved = Path(str(resume[-1])) / "config.yaml" if resume else None
    if saved is not None and saved.is_file() and not chooses_group(arguments):
        return load_config(saved.read_text(), arguments, source=str(saved))
    return compose_config(arguments)


def multirun(arguments: list[str]) -> int:
    """A sweep by Hydra's own launcher: one run folder a job."""
    import hydra
    from omegaconf import DictConfig

    check_override_keys([a for a in arguments if not a.startswith("-")])

    @hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")
    def job(composed: DictConfig) -> None:
        code = train_safely(to_config(composed))
        if code == INTERRUPTED:
            sys.exit(code)  # ends the sweep; the same command goes on where it stopped
        if code != DONE:
            raise RuntimeError(f"the run ended with exit code {code}; its message is above")

    job()
    return DONE


def train_safely(config: TrainConfig) -> int:
    """`loop.train` with every expected ending turned into a message and an exit code."""
    from sasa_train.checkpoint import CheckpointError
    from sasa_train.engine import NonFiniteLoss
    from sasa_train.interrupt import Interrupted, StopRequest
    from sasa_train.loop import train

    stop = StopRequest()
    try:
        return DONE if train(config, stop) else INTERRUPTED
    except ConfigError as error:
        return fail(error)
    except (CheckpointError, NonFiniteLoss) as error:
        fail(error)
        return FAILED
    except Interrupted:
        print("stopped before training began; run the same command again", file=sys.stderr)
        return INTERRUPTED
    finally:
        stop.restore()


def refuse_many_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: this version trains in one process, not under torchrun"
        )


if __name__ == "__main__":
    main()
