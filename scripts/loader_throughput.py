"""Measure the images/s of our loaders, timm's `create_loader` and a plain torchvision loader on the same files.

By default, the loaders read the files in every epoch, crop (random-resized, bilinear), flip and return normalised
float32 batches. The worker and the main process share one core, so that the result is images/s per core. With
--resident, our loader decodes the data set once, then pads, crops and flips whole batches on all cores; it is compared
with torchvision DataLoaders that process single samples in 2 workers, from files and from an array in memory.

After a warm-up, all loaders deliver the same number of images in alternating order. The script prints the
median and range of each speed, and the median ratio of our loader's speed to that of each other loader.

usage: python scripts/loader_throughput.py ROOT --size 224 [--images 1280] [--rounds 7]
       python scripts/loader_throughput.py ROOT --size 32 --resident
ROOT contains class folders, or train/ with class folders. A small data set is repeated until it has --images images.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from sasa_train.benchmark.timing import ratio, spread, time_in_turn
from sasa_train.config.compose import compose_config
from sasa_train.data.loader import build_loaders
from sasa_train.terminal import progress_bar

BATCH = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
Epoch = Callable[[], Iterable]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--size", type=int, required=True, help="pixels of the crops")
    parser.add_argument("--images", type=int, default=1280, help="images that each loader delivers per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--resident", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        link_images(options.root, Path(folder), options.images)
        if options.resident:
            crop = v2.RandomCrop(options.size, padding=options.size // 8)
            loaders = {
                "ours": our_loader(folder, options.size, True),
                "files": per_sample_loader(folder, crop, num_workers=2),
                "array": per_sample_loader(folder, crop, num_workers=2, in_memory=True),
            }
        else:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
            torch.set_num_threads(1)
            loaders = {
                "ours": our_loader(folder, options.size, False),
                "timm": timm_loader(folder, options.size),
                "torchvision": per_sample_loader(folder, v2.RandomResizedCrop(options.size), num_workers=1),
            }
        report(loaders, options.rounds)
    return 0


def link_images(root: Path, folder: Path, num_images: int) -> None:
    """Create a data set with `num_images` links to the images of `root` in train/ and one link per image in val/."""
    found = ImageFolder(str(root / "train" if (root / "train").is_dir() else root))
    random.seed(0)
    samples = random.sample(found.samples, len(found.samples))
    for number, (path, label) in enumerate(itertools.islice(itertools.cycle(samples), num_images)):
        for split in ("train", "val") if number < len(samples) else ("train",):
            target = folder / split / found.classes[label]
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{number:07d}{Path(path).suffix}").symlink_to(Path(path).resolve())


def our_loader(folder: str, size: int, is_resident: bool) -> Epoch:
    crop = [] if is_resident else ["augment.crop_mode=resized", "data.num_workers=1"]
    overrides = ["data=image_folder", f"data.root={folder}", f"data.image_size={size}", *crop]
    loaders = build_loaders(compose_config([*overrides, f"trainer.global_batch_size={BATCH}"]), CPU)
    assert loaders.kind == ("resident" if is_resident else "streamed")
    epochs = itertools.count()
    return lambda: loaders.train.train_batches(next(epochs))


def timm_loader(folder: str, size: int) -> Epoch:
    loader = create_loader(
        create_dataset("", root=folder, split="train"),
        input_size=size,
        batch_size=BATCH,
        is_training=True,
        color_jitter=0.0,  # the same operations as ours
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=1,
        device=CPU,
        persistent_workers=True,
    )
    return lambda: loader


def per_sample_loader(folder: str, crop: torch.nn.Module, num_workers: int, in_memory: bool = False) -> Epoch:
    to_float = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor(), to_float, v2.Normalize(MEAN, STD)])
    images = ImageFolder(f"{folder}/train", transform)
    if in_memory:  # like torchvision's CIFAR10
        decoded = {path: np.asarray(images.loader(path)) for path, _ in images.samples}
        images.loader = lambda path: Image.fromarray(decoded[path])
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=num_workers, persistent_workers=True)
    return lambda: loader


def report(loaders: dict[str, Epoch], num_rounds: int) -> None:
    num_images = {name: sum(len(images) for images, _ in epoch()) for name, epoch in loaders.items()}
    with progress_bar(total=num_rounds, desc="rounds") as bar:
        runs = {name: partial(deliver, epoch) for name, epoch in loaders.items()}
        seconds = time_in_turn(runs, num_rounds, CPU, bar, num_warm_ups=0)
    speeds = {name: [num_images[name] / s for s in values] for name, values in seconds.items()}
    for name, values in speeds.items():
        found = spread(values)
        print(f"{name:<12} {found['median']:10,.0f} images/s (from {found['min']:,.0f} to {found['max']:,.0f})")
    for name in list(speeds)[1:]:
        found = ratio(speeds["ours"], speeds[name])
        low, high = found["quartiles"]
        print(f"ours/{name}, median of {num_rounds} pairs: {found['median']:.2f} (quartiles {low:.2f} to {high:.2f})")


def deliver(epoch: Epoch) -> None:
    for images, _ in epoch():
        assert images.dtype == torch.float32


if __name__ == "__main__":
    sys.exit(main())
