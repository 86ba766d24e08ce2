"""`sasa-data prepare` and `sasa-data shard`, which create class folders or tar shards from archives or folders."""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.imagenet import ARCHIVE_META

from sasa_train.data.datasets import VAL_SPLITS, Files, ImageSet, check_several, load_class_folders, relabelled
from sasa_train.data.shards import find_shards
from sasa_train.dataset_tool.imagenet import check_md5, index_train, index_val, read_devkit
from sasa_train.dataset_tool.writing import Originals, write_all_shards, write_folders
from sasa_train.files import locked
from sasa_train.refusal import ConfigError
from sasa_train.terminal import printable


def shard(root: Path, dest: Path, images_per_shard: int) -> int:
    """Pack the images of class folders into tar shards, keeping their order; return 0.

    Raises:
        ConfigError: training would refuse the folders, `dest` is in `root` or contains other data, or the disk is full.
    """
    if dest.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"DEST={dest} must not be inside ROOT={root}; give a folder of its own")
    folders = [name for name in VAL_SPLITS[None] if (root / name).is_dir()]
    if any(find_shards(root, name) for name in ("train", *folders)):
        raise ConfigError(f"ROOT={root} must hold class folders, but it holds tar shards already")
    train = load_class_folders(root, "train")
    check_several(train)
    classes, splits = train.classes, {"train": _originals(train)}
    for name in folders:
        images = load_class_folders(root, name)
        splits[name] = _originals(relabelled(images, classes, f"ROOT={root}", "train", name))
    if len(splits) == 1:
        print(f"ROOT={root}: no val/ or test/, train alone is copied; training needs data.holdout_fraction then")
    for name in classes:
        if name.encode(errors="ignore").decode().splitlines() != [name]:  # line breaks, or bytes that are not UTF-8
            raise ConfigError(
                f"{root}: the class {printable(name)} must fit a line of UTF-8 text in classes.txt; rename it"
            )
    with locked(dest, f"DEST={dest}"):
        write_all_shards(dest, splits, images_per_shard)
    print(f"\nnext   sasa-data verify {dest}\n       sasa-train data.root={dest}")
    return 0


def _originals(images: ImageSet) -> Originals:
    assert isinstance(images.source, Files)
    if images.source.left_out:
        print(f"{printable(images.source.folder)}: left out, {images.source.left_out}")
    paths = [images.name(index) for index in range(len(images))]
    sizes = np.array([os.path.getsize(path) for path in paths], dtype=np.int64)
    return Originals(images, [os.path.basename(path) for path in paths], sizes)


def prepare_imagenet(archives: Path, dest: Path, images_per_shard: int | None, checksums: bool) -> int:
    """Create class folders, or tar shards of `images_per_shard` images, from ImageNet's three archives; return 0.

    Raises:
        ConfigError: an archive is missing or altered, `dest` contains other data, or the disk is full.
    """
    paths = {part: archives / name for part, (name, _) in ARCHIVE_META.items()}
    for path in paths.values():
        if not path.is_file():
            raise ConfigError(f"ARCHIVES={archives} must hold {path.name}; image-net.org has it (it needs an account)")
    if dest.resolve() == archives.resolve():
        raise ConfigError(f"DEST={dest} must not be ARCHIVES too; give a folder of its own")
    if checksums:
        check_md5(paths["devkit"], ARCHIVE_META["devkit"][1])
    classes, val_wnids = read_devkit(paths["devkit"])
    splits = {"train": index_train(paths["train"], classes), "val": index_val(paths["val"], classes, val_wnids)}

    def check_archives() -> None:
        for part in ("val", "train") if checksums else ():
            check_md5(paths[part], ARCHIVE_META[part][1])

    with locked(dest, f"DEST={dest}"):
        if images_per_shard is None:
            write_folders(dest, splits, check_archives)
        else:
            write_all_shards(dest, splits, images_per_shard, check_archives)
    print(f"\nnext   sasa-data verify {dest}\n       sasa-train data=imagenet data.root={dest} ...")
    return 0
