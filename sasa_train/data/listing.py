"""Which files are images, and in which order: for class folders, tar shards and the folders of sasa-predict.

Hidden files and folders, whose names start with a dot, are not data, and neither are folders of a system such as
__MACOSX, which hold copies or thumbnails; all are called hidden here. A file with the extension of an image format is
taken as an image; any other file is opened and identified by its content. Each folder is read once, however many links
lead to it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import BinaryIO

from PIL import Image, features

from sasa_train.data.tiff import is_part
from sasa_train.files import open_regular
from sasa_train.terminal import printable, some

OPTIONAL = {"avif": "AVIF", "jpg_2000": "JPEG2000"}  # Pillow's name of a decoder that it may lack -> format
# MPO files open as JPEG. No other format is tried: EPS would start Ghostscript, and every decoder adds to the attack
# surface.
DECODERS = {name for name in (*features.modules, *features.codecs) if name in OPTIONAL and features.check(name)}
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", *(OPTIONAL[name] for name in sorted(DECODERS)))

# Folders that macOS, Windows, Linux, Python, and the network disks of Synology and QNAP make.
SYSTEM = re.compile(
    r"__MACOSX|Network Trash Folder|Temporary Items|TheVolumeSettingsFolder|\$(?:RECYCLE\.BIN|Recycle\.Bin)|RECYCLER|"
    r"System Volume Information|found\.\d{3}|lost\+found|__pycache__|@eaDir|@tmp|@sharebin|@Recycle|@Recently-Snapshot|"
    r"@__thumb|#recycle|#snapshot|~snapshot|_gsdata_|FOUND\.\d{3}|#SharedFolders|OneDriveTemp"
)
# Extensions of photos, pictures and scans in formats that are not read.
OTHER_FORMATS = re.compile(
    r"\.(heic|heif|hif|jxl|svg|psd|xcf|raw|dng|cr2|cr3|nef|arw|orf|rw2|raf|exr|hdr|tga|pam|pcx|ico|icns|eps|pdf|ai|dcm|nii|"
    r"svs|ndpi|czi|nd2|lif|fits|djvu)",
    re.IGNORECASE,
)
Identity = tuple[int, int]  # a folder's device and inode


@dataclass
class LeftOut:
    """The paths of files and folders that are not read, by the reason.

    `outside` lists images beside the class folders, `unsupported` images in OTHER_FORMATS, `foreign` files that are not
    images, and `broken` links to nothing.
    `beside` lists archives and images beside tar shards.
    `dotted` lists the members of tar shards that would be images or labels if their keys did not end at the first dot.
    `inner` lists folders of images within class folders, and `unnamed` images whose names do not say so; both are read.
    """

    hidden: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    dotted: list[str] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)
    unnamed: list[str] = field(default_factory=list)

    def add(self, other: "LeftOut") -> None:
        for name, paths in vars(other).items():
            getattr(self, name).extend(paths)

    def describe(self, top: str = "") -> str:
        """Count and name what was left out, in paths relative to `top`; return "" if there is nothing."""
        kinds = {"hidden": self.hidden, "images outside class folders": self.outside}
        kinds |= {"in formats that are not read, convert them to JPEG or PNG": self.unsupported}
        kinds |= {"not images": self.foreign}
        kinds |= {"broken links": self.broken, "links to folders read already": self.repeated}
        kinds |= {"beside the shards": self.beside}
        kinds |= {"names with a second dot, of no sample because keys end at the first": self.dotted}
        prefix = os.path.join(top, "")
        found = {kind: [path.removeprefix(prefix) for path in paths] for kind, paths in kinds.items() if paths}
        return "; ".join(f"{kind}: {len(paths):,} ({some(paths)})" for kind, paths in found.items())

    def describe_doubtful(self, top: str = "", folder: str | None = None) -> list[str]:
        """Name what is read, though perhaps not meant: folders within the class folders of `folder`, and odd files.

        Paths are relative to `top`, which is by default the same folder.
        """
        found, prefix = [self._describe_inner(top, folder or top)] if self.inner else [], os.path.join(top, "")
        if self.unnamed:
            names = some([path.removeprefix(prefix) for path in self.unnamed])
            found.append(f"read as images for their content, whatever their names: {len(self.unnamed):,} ({names})")
        return found

    def _describe_inner(self, top: str, folder: str) -> str:
        prefix, above = os.path.join(top, ""), os.path.join(folder, "")
        inner = [path.removeprefix(prefix) for path in sorted(self.inner)]
        classes = Counter(path.removeprefix(above).partition("/")[0] for path in self.inner)
        name, count = min(classes.items(), key=lambda item: (-item[1], item[0]))
        name = os.path.join(folder, name).removeprefix(prefix)
        remedy = f"; if the {count} in {printable(name)} are the classes, give that folder" if count > 1 else ""
        are = (
            "they are not classes of their own, and their images count"
            if len(inner) > 1
            else ("it is not a class of its own, and its images count")
        )
        return f"{some(inner)}: {are} as the class folder's around it{remedy}"


@cache
def image_extensions() -> frozenset[str]:
    """Return the lower-case extensions of FORMATS: .jpg, .png, ..."""
    known = Image.registered_extensions().items()
    return frozenset({".mpo", *(extension for extension, kind in known if kind in FORMATS)})


def is_hidden(path: str) -> bool:
    """Return whether a file or one of its folders is hidden; `path` is relative, as in an archive."""
    return any(is_hidden_name(name) and name not in (".", "..") for name in path.split("/"))


def is_hidden_name(name: str) -> bool:
    return name.startswith(".") or (name[:1] in "_NTRSfl@#$" and SYSTEM.fullmatch(name) is not None)


def is_image(file: BinaryIO) -> bool:
    """Return whether the content of an open file is in one of FORMATS, judged by its header.

    A TIFF that is only the pyramid or mask of another file, as GDAL writes them beside it, is not.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            return not is_part(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True  # reading it reports the size
    except Exception:  # Pillow's plugins have no common base class
        return False


def images_among(folder: str, names: list[str], left_out: LeftOut) -> list[str]:
    """Return the paths of the images among the files of a folder, sorted by name; note the others."""
    found = []
    for name in sorted(names):
        path = os.path.join(folder, name)
        if is_hidden_name(name):
            left_out.hidden.append(path)
        elif os.path.splitext(name)[1].lower() in image_extensions():
            found.append(path)
        elif _holds_image(path):
            left_out.unnamed.append(path)
            found.append(path)
        elif not os.path.exists(path):
            left_out.broken.append(path)
        else:
            is_picture = OTHER_FORMATS.fullmatch(os.path.splitext(name)[1])
            (left_out.unsupported if is_picture else left_out.foreign).append(path)
    return found


def _holds_image(path: str) -> bool:
    try:
        with open_regular(path) as file:
            return is_image(file)
    except OSError:
        return False


def identity_of(folder: str) -> Identity:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def visible_folders(folder: Path) -> list[str]:
    """Return the sorted names of a folder's subfolders that are not hidden."""
    return sorted(name for name in os.listdir(folder) if not is_hidden_name(name) and (folder / name).is_dir())


def read_class_folders(top: str) -> tuple[dict[str, list[str]], LeftOut]:
    """Return the image files of each class folder in `top`, in torchvision's order, and what is left out.

    Raises:
        OSError: a folder cannot be listed.
    """
    left_out, classes = LeftOut(), dict[str, list[str]]()
    folders = visible_folders(Path(top))
    for path in images_among(top, list(set(os.listdir(top)) - set(folders)), left_out):
        (left_out.outside if os.path.exists(path) else left_out.broken).append(path)
    seen = _above(Path(top))
    paths = [os.path.join(top, name) for name in folders]
    for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):  # a link yields to the folder itself
        if identity_of(path) in seen:
            left_out.repeated.append(path)
        else:
            seen.add(identity_of(path))
            classes[os.path.basename(path)] = []
    # Links are followed once all folders of all classes are read, because they yield to the folders themselves.
    links = {name: list[str]() for name in sorted(classes)}
    found = {name: list(_walk(os.path.join(top, name), seen, left_out, links[name])) for name in links}
    for name, of_class in links.items():
        for link in of_class:
            found[name] += _walk(link, seen, left_out)
    return {name: _sorted(found[name], os.path.join(top, name), left_out) for name in links}, left_out


def folders_with_images(top: Path) -> list[str]:
    """Return the sorted names of the visible subfolders that contain an image, at any depth.

    Raises:
        OSError: a folder cannot be listed.
    """
    names = [name for name in visible_folders(top) if identity_of(str(top / name)) not in _above(top)]
    return [name for name in names if any(paths for _, paths in _walk(str(top / name), _above(top), LeftOut()))]


def _above(top: Path) -> set[Identity]:
    """Return the folder itself and those that contain it: a link to one of them leads round in a circle."""
    return {identity_of(str(above)) for above in (top.resolve(), *top.resolve().parents)}


def _sorted(found: list[tuple[str, list[str]]], top: str, left_out: LeftOut) -> list[str]:
    """Return the images that `_walk` found in a class folder, sorted by folder, then by name."""
    left_out.inner += [place for place, paths in found if paths and place != top]
    return in_order(found)


def in_order(found: list[tuple[str, list[str]]]) -> list[str]:
    """Return the images of a class, given by their folders, sorted by folder, then by name."""
    return [path for _, paths in sorted(found) for path in paths]


def _walk(
    top: str, seen: set[Identity], left_out: LeftOut, links: list[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder in `top` that is not in `seen`, with its images; add it there.

    links: if given, `top` is a class folder, which is in `seen` already; links to folders are added to `links` and not
        followed. Otherwise, they are followed last.
    """
    waiting = [top]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=_refuse):
            identity = identity_of(place)
            if identity in seen and (place != top or links is None):
                left_out.repeated.append(place)
                folders.clear()
                continue
            seen.add(identity)
            left_out.hidden += (os.path.join(place, name) for name in sorted(folders) if is_hidden_name(name))
            folders[:] = sorted(name for name in folders if not is_hidden_name(name))
            found = (path for name in folders if os.path.islink(path := os.path.join(place, name)))
            (waiting if links is None else links).extend(found)
            yield place, images_among(place, names, left_out)


def _refuse(error: OSError) -> None:
    raise error
