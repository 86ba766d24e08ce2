"""sasa-evaluate: a checkpoint's top1, top5, loss and classes on val; the training log's number to the last digit."""

import sys
from pathlib import Path

from sasa_train.compose import fail
from sasa_train.config import ConfigError, micro_batch_size
from sasa_train.printable import printable
from sasa_train.ranks import world_size

USAGE = """usage: sasa-evaluate RUN_OR_CHECKPOINT [weights=ema|raw] [key=value ...]

RUN_OR_CHECKPOINT  a run folder (its best.pt, or last.pt where there is no best) or a checkpoint file
weights=raw        the model's own weights, where the run kept an exponential moving average (the default then)
key=value          knobs over the checkpoint's config, as in data.root=/elsewhere trainer.device=cpu

Exit codes: 0 done, 2 refused, 1 failed."""


def main() -> None:
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run with command-line arguments; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    from sasa_train.checkpoint import CheckpointError
    from sasa_train.data.workers import DataWorkerError

    try:
        if world_size() > 1:
            raise ConfigError(
                f"WORLD_SIZE={world_size()}: an evaluation is one process's work; run it without torchrun"
            )
        return evaluate_checkpoint(Path(arguments[0]), arguments[1:])
    except (ConfigError, CheckpointError) as error:
        return fail(error)
    except DataWorkerError as error:
        fail(error)
        return 1


def evaluate_checkpoint(source: Path, overrides: list[str]) -> int:
    """Evaluate and print.

    Raises:
        CheckpointError: `source` holds no checkpoint that can be read.
        ConfigError: overrides or data that are refused.
    """
    from sasa_train.data.fingerprint import differences
    from sasa_train.data.loader import build_eval_loader, check_evaluated
    from sasa_train.engine import evaluate
    from sasa_train.run import resolve
    from sasa_train.trained import load_trained

    trained = load_trained(source, overrides)
    checkpoint, config, model = trained.checkpoint, trained.config, trained.model
    config.trainer.sync_batch_norm = False  # of training alone
    if config.trainer.micro_batch_size is None:  # the batches of each process that trained it, one after another
        num_processes = checkpoint["provenance"].get("world_size", 1)
        config.trainer.micro_batch_size = micro_batch_size(config.trainer, num_processes)
        config.trainer.grad_accum_steps = 1
    device, config = resolve(config)
    loader, classes, found = build_eval_loader(config, device)
    if classes != checkpoint["classes"]:
        raise ConfigError(f"data.root={config.data.root}: its {len(classes)} classes are not the checkpoint's")
    model.to(device).to(memory_format=loader.normalize.memory_format)
    try:
        result = evaluate(model, loader.eval_batches(), len(classes), device, config.trainer.precision)
    finally:
        loader.close()
    assert result is not None
    check_evaluated(loader, result.num_images, loader.num_left_out)
    kind = "EMA" if trained.weights == "ema" else "raw"
    print(f"{printable(str(trained.path))}: step {checkpoint['step']:,}, {kind} weights\n")
    for line in differences(checkpoint["fingerprint"]["val"], found, "val") if checkpoint["fingerprint"] else []:
        print(f"not the images that the run was evaluated on: {line}")
    print_classes(classes, result.class_hits, result.class_images)
    if lines := loader.quarantine.lines():
        print(f"\n{len(lines)} images could not be read and are left out:\n" + "\n".join(lines))
    print(f"\nimages {result.num_images}\nloss   {result.loss!r}\ntop1   {result.top1!r}\ntop5   {result.top5!r}")
    return 0


def print_classes(classes: list[str], hits: list[int], images: list[int]) -> None:
    names = [printable(name) for name in classes]
    width = max(len("class"), *(len(name) for name in names))
    print(f"{'class':<{width}}  images    top1")
    for name, num_hits, num_images in zip(names, hits, images, strict=True):
        top1 = f"{100 * num_hits / num_images:6.2f}" if num_images else "     -"
        print(f"{name:<{width}}  {num_images:>6}  {top1}")


if __name__ == "__main__":
    main()
