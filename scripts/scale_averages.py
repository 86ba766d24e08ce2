"""How lr, ema_decay and bn_momentum go with the batch under the paper's recipe, and what its averages then remember.

usage: python scripts/scale_averages.py [--epochs 130] [--batches 256 512 ...]

An average with decay d, updated once for B images, forgets at the same rate in images as one with d**(B'/B) that is
updated once for B' images. The ages and shares in the table are not from that formula: the averages are followed
update by update to the end of the run. docs/imagenet.md has the table.
"""

import argparse
from collections.abc import Iterable

NUM_TRAIN = 1_281_167
# The paper's recipe, configs/experiment/recipe/imagenet_paper.yaml.
BATCH, EPOCHS, WARMUP_EPOCHS, LR_PER_256, EMA_DECAY, BN_MOMENTUM = 4096, 130, 10, 0.1, 0.9999, 1e-4


def scaled_decay(decay: float, factor: float) -> float:
    """The decay of an average that is updated once for `factor` times as many images."""
    return decay**factor


def scaled_momentum(momentum: float, factor: float) -> float:
    """The same for batch norm, whose momentum in PyTorch is 1 - decay."""
    return 1 - scaled_decay(1 - momentum, factor)


def ema_decay_at(step: int, decay: float, warmup: bool) -> float:
    """timm's ModelEmaV3 after optimizer step `step` (from 1), as sasa_train calls it; the first one copies."""
    if step <= 1:
        return 0.0
    return min(decay, 1 - step ** (-2 / 3)) if warmup else decay


def followed(decays: Iterable[float]) -> tuple[float, float]:
    """Update by update: the mean age, in updates, of what an average is made of at the end, and its start's share."""
    age, start = 0.0, 1.0
    for decay in decays:
        age, start = decay * (age + 1), start * decay
    return age, start


def ema_age(num_steps: int, decay: float, warmup: bool) -> float:
    """Mean age, in steps, of the weights in the moving average at the end of a run."""
    return followed(ema_decay_at(step, decay, warmup) for step in range(1, num_steps + 1))[0]


def bn_start(num_updates: int, momentum: float) -> float:
    """The share of mean 0 and variance 1, where batch norm's running statistics start, in them at the end."""
    return followed(1 - momentum for _ in range(num_updates))[1]


def row(batch: int, epochs: int) -> dict[str, str]:
    """One batch size; batch norm is updated once a step."""
    per_epoch, factor = NUM_TRAIN // batch, batch / BATCH
    steps = per_epoch * epochs
    decay, momentum = scaled_decay(EMA_DECAY, factor), scaled_momentum(BN_MOMENTUM, factor)
    return {
        "batch": f"{batch:,}",
        "steps": f"{steps:,}",
        "lr": f"{LR_PER_256 * batch / 256:g}",
        "warm-up steps": f"{WARMUP_EPOCHS * per_epoch:,}",
        "ema_decay": f"{decay:.8g}",
        "bn_momentum": f"{momentum:.3g}",
        "age, scaled": f"{ema_age(steps, decay, warmup=False) / per_epoch:.1f}",
        "age, 0.9999 kept": f"{ema_age(steps, EMA_DECAY, warmup=False) / per_epoch:.1f}",
        "age, ema_warmup": f"{ema_age(steps, EMA_DECAY, warmup=True) / per_epoch:.1f}",
        "BN's start, scaled": f"{100 * bn_start(steps, momentum):.1f} %",
        "BN's start, 1e-4 kept": f"{100 * bn_start(steps, BN_MOMENTUM):.1f} %",
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[256 * 2**i for i in range(7)], help="images a step (256 to 16384)"
    )
    options = parser.parse_args(arguments)
    if min(options.epochs, *options.batches) < 1 or max(options.batches) > NUM_TRAIN:
        parser.error(f"--epochs and --batches must be at least 1, and a batch at most the {NUM_TRAIN:,} images")
    rows = [row(batch, options.epochs) for batch in options.batches]
    for cells in (rows[0].keys(), ["---"] * len(rows[0]), *(r.values() for r in rows)):
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
