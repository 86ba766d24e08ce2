"""The name of a sweep's folder, and how the folder of an earlier command is found again."""

import contextlib
import glob
import hashlib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from sasa_train.config.identity import as_data_name
from sasa_train.config.keys import NOT_TRAJECTORY, PLACES
from sasa_train.config.overrides import parse_overrides
from sasa_train.config.places import real
from sasa_train.files import is_there
from sasa_train.refusal import ConfigError
from sasa_train.runs.ledger import read_ledger


class Naming(NamedTuple):
    """What a sweep's folder is named after: its file, the overrides of all its jobs, and those with several values.

    is_short: whether the command names no experiment, but only where the user's own images are.
    """

    stem: str | None
    fixed: list[str]
    swept: list[str]
    is_short: bool

    def places(self) -> dict[str, str]:
        parsed = parse_overrides(self.fixed)
        return {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in PLACES and o.value()}

    def real_places(self) -> dict[str, str]:
        return {key: real(os.path.expanduser(path)) for key, path in self.places().items()}

    def prefix(self, by_images: bool = True) -> str:
        """Return the readable part: the file, and the images' folder or list, or the experiment or model."""
        chosen = {key_of(o): str(parse_overrides([o])[0].value()) for o in self.fixed}
        what, place = chosen.get("experiment") or chosen.get("model"), self.places()
        if self.is_short and by_images and (path := place.get("data.train") or place.get("data.root")):
            what = as_data_name(os.path.basename(os.path.abspath(os.path.expanduser(path)))) or what
        return "-".join([part for part in (self.stem, what) if part] or ["sweep"])

    def name(self, by_images: bool = True) -> str:
        """Return a name that does not depend on the values or seeds, so that a grid can be extended in place."""
        shaping = sorted(o for o in self.fixed if key_of(o) not in NOT_TRAJECTORY - PLACES and key_of(o) != "seed")
        identity = [shaping, sorted(key_of(o) for o in self.swept if key_of(o) != "seed")]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:6]
        return re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", f"{self.prefix(by_images)}-{digest}")


def key_of(override: str) -> str:
    return parse_overrides([override])[0].key_or_group


def name_in(within: Path, naming: Naming) -> str:
    """Return the name of a sweep's folder in `within`.

    An existing folder is found if an earlier version named it after the experiment, or if it was begun with the places
    of its images written in another way.
    """
    names = [naming.name(), naming.name(by_images=False)]
    if found := [name for name in names if is_there(within / name)]:
        return found[0]
    given = naming.real_places()
    for name in names if given else []:
        for path in sorted(within.glob(f"{glob.escape(name[:-6])}??????/ledger.json")):
            with contextlib.suppress(ConfigError):
                begun = read_ledger(path)[0].get("overrides")
                begun = [o for o in begun if isinstance(o, str)] if isinstance(begun, list) else []
                kept = [o for o in naming.fixed if key_of(o) not in PLACES]
                other = naming._replace(fixed=kept + [o for o in begun if key_of(o) in PLACES])
                if other.real_places() == given and path.parent.name in (other.name(), other.name(by_images=False)):
                    return path.parent.name
    return names[0]
