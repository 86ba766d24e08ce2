"""Check that hostile class and file names are escaped and kept on one line in terminal output and lists."""

import io
import logging
import sys

import pytest
from making_data import SMALL_RUN

from sasa_train import evaluate, terminal, train
from sasa_train.refusal import ConfigError
from sasa_train.sweep import display
from sasa_train.terminal import fail
from sasa_train.train import PrintableFormatter

HOSTILE = "\x1b[31mred\n<script>"
ESCAPED = "\\x1b[31mred\\n<script>"


@pytest.fixture
def hostile_folder(image_folder):
    """Give the red class of `image_folder` a hostile name, and add a non-image file with another hostile name."""
    for split in ("train", "val"):
        (image_folder / split / "red").rename(image_folder / split / HOSTILE)
        (image_folder / split / HOSTILE / "bad\r\u2028\udcff.png").write_bytes(b"no image")
    return image_folder


def test_names_are_escaped_from_training_to_evaluation(hostile_folder, tmp_path, capfd, caplog, monkeypatch):
    """A name that clears the screen could hide a warning, and one with a newline could split a line of a list."""
    monkeypatch.chdir(tmp_path)
    data = ["data=image_folder", f"data.root={hostile_folder}", "data.image_size=16", "model.stem=conv_small"]
    assert train.run_command([*data, "data.num_workers=0", *SMALL_RUN]) == 0
    assert evaluate.run_command(["out/bad"]) == 0
    out, err = capfd.readouterr()
    assert f"\n{ESCAPED}  " in out  # the per-class table
    for text in (out, err, caplog.text):
        assert not set(text) & set("\x1b\u2028\udcff") and "red\n<script>" not in text
    warnings = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(warnings) == 3 and all(f"{ESCAPED}/bad\\r\\u2028\\udcff.png" in text for text in warnings)
    lines = (tmp_path / "out/bad/unreadable.txt").read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{hostile_folder}/{split}/{ESCAPED}/bad\\r\\u2028\\udcff.png" for split in ("train", "val")
    ]


def test_refusals_quote_names_escaped(hostile_folder, capsys, in_process):
    arguments = ["data=image_folder", f"data.root={hostile_folder}", "data.image_size=16", "model.stem=conv_small"]
    refusals = in_process("train", *arguments, "model.num_classes=7", expect=2).stderr
    (hostile_folder / "val" / HOSTILE).rename(hostile_folder / "val" / "green")
    assert train.run_command(arguments) == 2
    refusals += capsys.readouterr().err
    assert refusals.count(ESCAPED) == 2 and "\x1b" not in refusals and len(refusals.splitlines()) == 2


def test_long_lines_break_between_words_and_commands_stay_whole(monkeypatch):
    """model.safetenso/rs, and commands that did not work when they were copied."""
    monkeypatch.setattr(terminal, "columns", lambda file: 40)
    command, path = "sasa-evaluate outputs/digits-hybrid_resnet26/checkpoints/last.pt", "outputs/" + "x" * 30
    lines = {
        f"best  {command}": ["best", command],
        f"            {command}": [command],
        "as set      model=a,b: nets at full width; for others, write": [
            "as set      model=a,b: nets at full",
            "            width; for others, write",
        ],
        f"first       {path}, step 12: top1 50.00": ["first", f"  {path},", "  step 12: top1 50.00"],
        "60.00  60.00  run  a row of a table, which stays as it is": None,
    }
    for line, expected in lines.items():
        assert terminal.wrapped(line, sys.stdout).split("\n") == (expected or [line])
    monkeypatch.setenv("COLUMNS", "40")
    event = "interrupted seed=0  stopped before training began; run it again"
    assert display._in_lines(event).split("\n") == [
        "interrupted seed=0  stopped before",
        "            training began; run it again",
    ]
    assert terminal.with_command("to continue:", command) == f"to continue:\n{command}"


def test_boundaries_escape_what_slipped_through_but_keep_line_breaks(capsys):
    fail(ConfigError("a\x1b[2J\nb"))
    assert capsys.readouterr().err.endswith(": a\\x1b[2J\nb\n")
    record = logging.LogRecord("sasa_train", logging.INFO, "", 0, "a\x1b[2J\nb", None, None)
    assert PrintableFormatter("%(message)s").format(record) == "a\\x1b[2J\nb"


def test_letters_that_stdout_lacks_are_escaped(monkeypatch):
    """A class name in Japanese ended a run whose output went into an ASCII log."""
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", log)
    with pytest.raises(UnicodeEncodeError):
        terminal.say("\u65e5\u672c")
    terminal.escape_unknown_letters()
    terminal.say("\u65e5\u672c")
    assert log.buffer.getvalue() == b"\\u65e5\\u672c\n"


def test_messages_break_between_words_in_a_terminal_alone(monkeypatch, capsys, in_process):
    """At 80 columns, refusals and warnings broke in the middle of words."""
    line = ("train", "experiment=debug", "data.max_unreadable=-1")
    (piped,) = in_process(*line, expect=2).stderr.splitlines()
    monkeypatch.setattr(terminal, "columns", lambda file: 30)
    shown = in_process(*line, expect=2).stderr.splitlines()
    assert len(shown) > 1 and " ".join(shown) == piped and max(map(len, shown)) <= 30
    terminal.warn(f"a list:\n  {'word ' * 9}end")
    assert all(len(part) <= 30 and part.startswith("  word ") for part in capsys.readouterr().err.splitlines()[1:])
    # Rows of tables and commands to paste stay whole; a text behind a name goes on below itself.
    rows = f"top1  98.61  {'word ' * 9}end\nsasa-train {'word ' * 9}end\n"
    terminal.say(rows.strip())
    assert capsys.readouterr().out == rows
    terminal.say(f"time        {'word ' * 5}end")
    assert capsys.readouterr().out == "time        word word word\n            word word end\n"
