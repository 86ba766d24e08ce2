"""Names of files and classes as a terminal may show them: they come from disks and archives, and may hold anything."""


def printable(text: str) -> str:
    """`text` with control characters and what no terminal can show escaped: a file's name must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Likewise, but for a message's own line breaks: names must be `printable` before they enter one."""
    return "\n".join(printable(line) for line in text.split("\n"))
