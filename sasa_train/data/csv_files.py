"""CSV files that list images with their labels (`data=list`).

A list is another way to say which file is of which class: its files are looked at as those in class folders are, and
have the same order. Since each line was written on purpose, what a folder would only leave out is often an error here.
"""

import csv
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, NoReturn

from sasa_train.data.class_names import MAX_CLASS_NAME, composed, with_nearest
from sasa_train.data.listing import Identity, LeftOut, identity_of, images_among, in_order, is_hidden
from sasa_train.files import did_you_mean, open_regular
from sasa_train.refusal import ConfigError, shorten
from sasa_train.terminal import printable, some

MAX_LINE = 2**17  # bytes
Image = tuple[Identity, str]  # a file, whichever path leads to its folder


class Line(NamedTuple):
    """A line of a list: its number, the path as it is written there, the file's folder and name, and the label."""

    number: int
    path: str
    folder: str
    name: str
    label: str


@dataclass
class Listed:
    """The images of a list: `classes` maps each class to its files, sorted; `lines` maps each image to its line."""

    path: str
    what: str  # the key and its value, for messages
    classes: dict[str, list[str]]
    left_out: LeftOut
    lines: dict[Image, Line]


def read_list(path: str, what: str, columns: Sequence[str], root: str | None) -> Listed:
    """Read a list and look for its files.

    what: the key and its value, escaped, for messages.
    root: the folder in which relative paths begin, and that no path may leave; None: the list's own folder.

    Raises:
        ConfigError: the list cannot be read, is not CSV in UTF-8, lacks a column, a path or a label, or names a file
            that is not there or outside `root`, or an image twice.
    """
    lines = list(_read_lines(path, what, columns, root))
    if not lines:
        raise ConfigError(f"{what}: lists no image; below its first line, it must have one line per image")
    _check_labels(lines, what)
    in_folder: defaultdict[str, list[Line]] = defaultdict(list)
    for line in lines:
        in_folder[line.folder].append(line)
    found, missing = dict[Image, Line](), list[Line]()
    twice = list[tuple[Line, Line]]()
    for folder, of_folder in in_folder.items():
        identity, names = _names_in(folder, what)
        for line in of_folder:
            if line.name not in names:
                missing.append(line)
            elif (first := found.setdefault((identity, line.name), line)) is not line:
                twice.append((first, line))
    if missing:
        start = f"data.root={root}" if root is not None else f"the list's folder, {os.path.dirname(path) or '.'}"
        texts = [f"{line.path} (line {line.number:,})" for line in missing]
        raise ConfigError(
            f"{what}: {len(missing):,} of {len(lines):,} files are not there: {some(texts)}; relative paths begin in "
            f"{printable(start)}: mend them, or set data.root"
        )
    if twice:
        labels = " with different labels" if any(one.label != other.label for one, other in twice) else ""
        _refuse_twice(what, twice, f"listed more than once{labels}", "keep one line of each")
    classes, left_out = _by_class(found.values())
    return Listed(path, what, classes, left_out, found)


def check_disjoint(train: Listed, val: Listed) -> None:
    """Raise ConfigError if an image is in both lists."""
    both = [(train.lines[image], line) for image, line in val.lines.items() if image in train.lines]
    if both:
        _refuse_twice(val.what, both, f"in {train.what} as well", "an image must not be in both: remove it from one")


def check_known(listed: Listed, classes: Sequence[str], whose: str) -> None:
    """Raise ConfigError if a label is none of `classes`, which are `whose`."""
    known = set(composed(classes))
    unknown = {label for label in listed.classes if composed([label])[0] not in known}
    lines = [line for line in listed.lines.values() if line.label in unknown]
    if lines:
        first = {line.label: line for line in sorted(lines, reverse=True)}
        texts = [f"{with_nearest(label, classes)} from line {line.number:,}" for label, line in sorted(first.items())]
        raise ConfigError(
            f"{listed.what}: {len(lines):,} of {len(listed.lines):,} labels are not among the {len(classes):,} classes "
            f"of {whose}: {', '.join(texts[:5])}" + (f" and {len(texts) - 5:,} more" * (len(texts) > 5))
        )


def _refuse_twice(what: str, pairs: list[tuple[Line, Line]], where: str, remedy: str) -> NoReturn:
    texts = [f"{line.path} (lines {first.number:,} and {line.number:,})" for first, line in pairs]
    raise ConfigError(f"{what}: {_counted(len(pairs))} {where}: {some(texts)}; {remedy}")


def _counted(number: int) -> str:
    return "1 image is" if number == 1 else f"{number:,} images are"


def _read_lines(path: str, what: str, columns: Sequence[str], root: str | None) -> Iterator[Line]:
    """Yield the lines of a list, without those that are empty."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise ConfigError(f"{what}: cannot be read ({error.strerror}){did_you_mean(path)}; give a CSV file") from error
    base = os.path.dirname(path) if root is None else root
    with file:
        reader = csv.reader(_decoded(file, what), strict=True)
        number, places, num_fields = 1, list[int](), 0
        try:
            for fields in reader:
                if not places:
                    places, num_fields = _find_columns(fields, what, columns), len(fields)
                elif fields:
                    if len(fields) != num_fields:
                        raise ConfigError(
                            f"{what}: line {number:,}: has {len(fields)} values, but the first line names "
                            f'{num_fields} columns; quote a value that contains a comma, as in "a,b.png"'
                        )
                    name, label = (fields[place] for place in places)
                    yield Line(number, name, *_place(name, base, root, what, number), label)
                number = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(f"{what}: line {number:,}: is not CSV ({error}); mend it") from error
    if not places:
        raise ConfigError(f"{what}: is empty; its first line must name the columns {', '.join(columns)}")


def _decoded(file: BinaryIO, what: str) -> Iterator[str]:
    """Yield the lines of a file in UTF-8, without the byte order mark."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
        if len(line) > MAX_LINE:
            raise ConfigError(f"{what}: line {number:,}: is longer than {MAX_LINE:,} bytes, so this is not a list")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{what}: line {number:,}: is not in UTF-8 (byte {line[error.start]:#04x}); save the list in UTF-8"
            ) from error
        if "\0" in text:
            raise ConfigError(f"{what}: line {number:,}: has the character NUL; save the list as text in UTF-8")
        yield text


def _find_columns(header: list[str], what: str, columns: Sequence[str]) -> list[int]:
    """Return the positions of the columns of paths and of labels."""
    if missing := [name for name in columns if name not in header]:
        has_other = any(separator in "".join(header) for separator in ";\t")
        remedy = "separate the values by commas" if has_other and len(header) == 1 else "name them in data.columns"
        raise ConfigError(
            f"{what}: line 1: has no column {printable(' or '.join(missing))}, but {some(header)}; {remedy}, as in "
            "data.columns=[path,label]"
        )
    if twice := [name for name in columns if header.count(name) > 1]:
        raise ConfigError(f"{what}: line 1: has the column {printable(twice[0])} more than once; rename one")
    return [header.index(name) for name in columns]


def _place(path: str, base: str, root: str | None, what: str, number: int) -> tuple[str, str]:
    """Return the folder and the name of an image; `path` is as written in line `number` of the list."""
    parts = path.split("/")
    if root is not None:
        above = os.path.join(os.path.abspath(root), "")
        if ".." in parts or (os.path.isabs(path) and not os.path.normpath(path).startswith(above)):
            raise ConfigError(
                f"{what}: line {number:,}: {printable(shorten(path))} is outside data.root={printable(root)}, or may "
                "be because of ..; write paths within it, or leave data.root out"
            )
    if not path or not parts[-1] or parts[-1] in (".", ".."):
        raise ConfigError(f"{what}: line {number:,}: has no path of a file, but {printable(shorten(path))!r}")
    # Not across .., which another folder than it seems may contain if there are links.
    path = path if ".." in parts else os.path.normpath(path)
    folder, name = os.path.split(os.path.join(base, path))
    return folder, name


def _check_labels(lines: list[Line], what: str) -> None:
    empty = [f"line {line.number:,}" for line in lines if not line.label.strip()]
    if empty:
        raise ConfigError(f"{what}: {len(empty):,} of {len(lines):,} lines have no label: {some(empty)}")
    for line in lines:
        if line.label != line.label.strip() or len(line.label) > MAX_CLASS_NAME:
            raise ConfigError(
                f"{what}: line {line.number:,}: the label {printable(shorten(line.label))!r} must be the name of a "
                f"class, of at most {MAX_CLASS_NAME:,} characters, without spaces around it"
            )


def _names_in(folder: str, what: str) -> tuple[Identity, set[str]]:
    """Return the identity of a folder and the names of all files in it; none if there is no such folder."""
    try:
        return identity_of(folder or "."), set(os.listdir(folder or "."))
    except (FileNotFoundError, NotADirectoryError):
        return (0, 0), set()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what}: {printable(folder)}: cannot be listed ({reason})") from error


def _by_class(lines: Iterable[Line]) -> tuple[dict[str, list[str]], LeftOut]:
    """Return the images of each class in the order of class folders, and what is left out."""
    left_out = LeftOut()
    labels: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for line in lines:
        if is_hidden(os.path.dirname(line.path)) and not os.path.isabs(line.path):
            left_out.hidden.append(os.path.join(line.folder, line.name))
        else:
            labels[line.folder][line.name] = line.label
    found: dict[str, list[tuple[str, list[str]]]] = {label: [] for label in sorted({line.label for line in lines})}
    for folder, of_folder in labels.items():
        of_class = defaultdict(list)
        for path in images_among(folder, list(of_folder), left_out):
            of_class[of_folder[os.path.basename(path)]].append(path)
        for label, paths in of_class.items():
            found[label].append((folder, paths))
    return {label: in_order(places) for label, places in found.items()}, left_out
