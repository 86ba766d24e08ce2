"""Regenerate the figures in docs/attention.md with the code shown on that page."""

import os
import re
import shutil
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def main() -> None:
    page = (DOCS / "attention.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        exec("\n".join(snippets), {"__name__": "__main__"})
        for picture in sorted(Path(folder).glob("*.png")):
            shutil.copy(picture, DOCS / "images")
            print(f"{picture.name}: {picture.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
