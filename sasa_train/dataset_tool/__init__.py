"""sasa-data: check a data set, prepare ImageNet from its archives, or pack class folders into tar shards."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sasa_train.commands import described, is_interrupt, positive, run
from sasa_train.files import did_you_mean
from sasa_train.machine import usable_processors
from sasa_train.refusal import ConfigError
from sasa_train.terminal import INTERRUPTED, escape_unknown_letters, fail, load_torch, printable

if TYPE_CHECKING:
    from sasa_train.config.keys import DataConfig

EPILOG = """examples:
  sasa-data verify data/flowers                           every image decoded: what is there, and what is wrong with it
  sasa-data verify train.csv data.val=val.csv             the same for the images of lists
  sasa-data verify saved                                  the same for a Hugging Face data set in a folder
  sasa-data prepare imagenet downloads data/imagenet      ImageNet's archives -> class folders
  sasa-data prepare imagenet downloads data/imagenet --shards
  sasa-data shard data/flowers data/flowers-shards        class folders -> tar shards, the same data set

A stopped prepare or shard goes on where it was when the same command is given again.
Exit codes: 0 done, and for verify nothing is wrong; 1 verify found problems, or failed; 75 stopped; 2 refused."""

VERIFY = """Decode every image of ROOT and report classes, sizes, modes, unreadable files, duplicates, mean and std.

ROOT holds train/ and val/ (or test/) with one folder per class, or tar shards, or class folders alone, or is a CSV file
of paths and labels (data.train), or a folder that Hugging Face's save_to_disk has written. Duplicates are images with
the same decoded pixels, whatever their files look like. Problems are unreadable files, duplicates across splits, and
classes that are empty or that one split lacks. Warnings are channels that are constant or saturated, and 16-bit files
that use less than a quarter of their range."""

PREPARE = """Make a data set from its archives, without unpacking anything on the way.

imagenet: ARCHIVES holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which
image-net.org hands out to those who accept its terms. DEST becomes train/ and val/ with one folder per class, named by
its WordNet id, or with --shards tar shards, which a network disk reads much faster."""

SHARD = """Copy class folders, ROOT/train and ROOT/val (or ROOT/test), to tar shards in DEST.

DEST is the same data set: the same images in the same order, byte by byte. Classes are mixed within a shard."""

IMAGES_PER_SHARD = 1000  # about 100 MB of ImageNet


def main() -> None:
    escape_unknown_letters()
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Run the command with the given arguments; return the exit code."""
    overrides: list[str] = []
    if arguments[:1] == ["verify"] and any("=" in word for word in arguments):
        from sasa_train.config.overrides import split_overrides

        arguments, overrides = split_overrides(arguments)  # argparse takes them only where they follow ROOT at once
    try:
        return run(build_parser(), arguments, partial(work, overrides=overrides), has_subcommands=True)
    except (KeyboardInterrupt, Exception) as error:
        if not is_interrupt(error):
            raise
        fail(RuntimeError("stopped; run the same command again"))
        return INTERRUPTED


def work(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    # Before the seconds that PyTorch takes. A list or a folder is meant.
    if options.command != "prepare" and not (options.root.is_file() or options.root.is_dir()):
        raise ConfigError(
            f"ROOT={options.root} must be a folder that is there{did_you_mean(options.root)}; give the one that holds "
            "train/ and val/"
        )
    if options.command == "verify":
        config = read_config(options.root, [*options.overrides, *overrides])
        load_torch()
        from sasa_train.dataset_tool.verify import verify

        return verify(options.root, options.workers or usable_processors(), options.all_classes, config)
    if options.command == "prepare" and options.images_per_shard is not None and not options.shards:
        raise ConfigError(f"--images-per-shard={options.images_per_shard} needs --shards")
    load_torch()
    from sasa_train.dataset_tool import prepare

    if options.command == "shard":
        return prepare.shard(options.root, options.dest, options.images_per_shard)
    images_per_shard = (options.images_per_shard or IMAGES_PER_SHARD) if options.shards else None
    return prepare.prepare_imagenet(options.archives, options.dest, images_per_shard, options.checksums)


def read_config(root: Path, overrides: Sequence[str]) -> "DataConfig":
    """Return how pixels are read and where: `root` may be the list of train, or a folder of a Hugging Face data set.

    Raises:
        ConfigError: an override sets another key than those of pixels and lists, or is invalid.
    """
    from sasa_train.config.compose import compose_config
    from sasa_train.config.overrides import as_written
    from sasa_train.data.decoding import Decoding
    from sasa_train.data.hf_sets import is_saved

    is_list, is_hf = root.is_file(), is_saved(root)
    names = [f"data.{field.name}" for field in fields(Decoding)]
    names += ["data.val", "data.columns", "data.root"] if is_list else ["data.args", "data.columns"] if is_hf else []
    for text in overrides:
        if text.partition("=")[0] not in names:
            raise ConfigError(f"{printable(text)}: must be key=value with one of the keys {', '.join(names)}")
    lists = ["data=list", f"data.train={as_written(str(root))}"] if is_list else []
    lists = ["data=hf", f"data.dataset={as_written(str(root))}"] if is_hf else lists
    return compose_config([*lists, *overrides]).data


def build_parser() -> argparse.ArgumentParser:
    parser = described(prog="sasa-data", description=__doc__, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add_to(name: str, about: str, description: str) -> Callable[..., argparse.Action]:
        return described(commands.add_parser, name=name, help=about, description=description).add_argument

    add = add_to("verify", "decode and check every image", VERIFY)
    add("root", metavar="ROOT", type=_path, help="the data set's folder, or the list of train")
    about = "how pixels are read: data.background, data.exif, data.value_range, data.clip_values, data.mode; "
    about += "lists: data.val, data.columns, data.root; Hugging Face: data.columns, data.args"
    add("overrides", metavar="key=value", nargs="*", help=about)
    add("--workers", metavar="N", type=positive, help="processes (one per processor)")
    add("--all-classes", action="store_true", help="one line per class, even for more than 50 classes")

    add = add_to("prepare", "from archives to a data set", PREPARE)
    add("dataset", metavar="imagenet", choices=["imagenet"], help="the only data set so far")
    add("archives", metavar="ARCHIVES", type=_path, help="the folder that holds the archives")
    add("dest", metavar="DEST", type=_path, help="the data set's folder, made where it is not there")
    add("--shards", action="store_true", help="write tar shards, not class folders")
    add("--images-per-shard", metavar="N", type=positive, help=f"images per shard, with --shards ({IMAGES_PER_SHARD})")
    add("--no-checksums", dest="checksums", action="store_false", help="trust the archives: MD5 takes minutes")

    add = add_to("shard", "from class folders to tar shards", SHARD)
    add("root", metavar="ROOT", type=_path, help="the data set's folder")
    add("dest", metavar="DEST", type=_path, help="the shards' folder, made where it is not there")
    number = f"images per shard ({IMAGES_PER_SHARD})"
    add("--images-per-shard", metavar="N", type=positive, default=IMAGES_PER_SHARD, help=number)
    return parser


def _path(text: str) -> Path:
    if "://" in text:
        remedy = "verify shards on their disk, and upload them with their indexes"
        raise argparse.ArgumentTypeError(f"{printable(text)} must be a folder; {remedy}")
    # Unlike Path.expanduser, this keeps the name of a user who does not exist.
    return Path(text if os.path.lexists(text) else os.path.expanduser(text))
