"""Compare the class names of two sets, which may come from different systems, in Unicode's composed form (NFC)."""

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

from sasa_train.terminal import printable

# What file managers and services that synchronise folders add to the name of a copy; Dropbox: (Ann's conflicted copy
# 2024-01-02), (Case Conflict), (Selective Sync Conflict); Google Drive: Copy of; Windows in some languages.
COPY = (
    r"(?<=.)(\s*\(\d+\)|[\s_-]+(copy|kopie|copie|copia)( \(?\d+\)?)?|\s*\([^()]*\bconflict(ed)?\b[^()]*\))$"
    r"|^copy of (?=.)"
)
MAX_CLASS_NAME = 4096  # characters; the name of a folder has at most 255


def composed(names: Sequence[str]) -> list[str]:
    """Return the names in NFC: macOS may write é as two characters, other systems as one."""
    return [unicodedata.normalize("NFC", name) for name in names]


def twins(names: Sequence[str]) -> list[str]:
    """Describe each group of names that are equal in NFC, with their characters beyond ASCII escaped."""
    groups = defaultdict(list)
    for name, in_nfc in zip(names, composed(names), strict=True):
        groups[in_nfc].append(name)
    return [" and ".join(map(ascii, group)) for group in groups.values() if len(group) > 1]


def look_alikes(names: Sequence[str]) -> list[str]:
    """Describe each group of names that differ only in case, spaces, invisible characters, - and _, or a copy's end."""
    groups = defaultdict(list)
    for name in names:
        shown = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        whole = re.sub(COPY, "", shown.casefold().strip())
        groups[" ".join(re.split(r"[\s_-]+", whole))].append(name)
    return [
        f"{' and '.join(map(ascii, group))} are classes of their own, though their names differ only in case, "
        "spaces or a copy's number or mark; merge them if they are one"
        for group in groups.values()
        if len(group) > 1
    ]


def with_nearest(name: str, others: Sequence[str]) -> str:
    """Return a name with the most similar one of `others` in brackets, and in what they differ if it is hard to see."""
    letters = {_letters(other): other for other in others}
    if (other := letters.get(_letters(name))) is not None and _letters(name):
        return f"{printable(name)} ('{printable(name)}' is '{printable(other)}' but for case, spaces or signs)"
    close = difflib.get_close_matches(name, others, n=1)
    return f"{printable(name)} (did you mean '{printable(close[0])}'?)" if close else printable(name)


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())
