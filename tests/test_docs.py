"""Check that README.md and docs/ are correct: links and figures resolve, and commands and code snippets run.

The `sh` and `python` blocks of a page run in order, in a separate folder that contains a finished quickstart run and,
in `data/`, a few images in place of CIFAR-10's; an `output` block must match what the preceding python block prints.
Blocks without a language are not run. A `console` block must match what its `$ command` prints; without a command, its
lines must occur in the source code. In a `console` block, `...` matches any text.
"""

import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from making_data import make_ten_classes
from marking import slow_but_for

from sasa_train.config.compose import compose_config
from sasa_train.refusal import ConfigError
from sasa_train.sweep.planning import read_plan

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
RUN = "outputs/digits-hybrid_resnet26-e20-s0-b4dbb30e"
COMMAND = re.compile(r"^\s*(?:sasa-\w+|python3?|torchrun|sbatch|pip|tensorboard)\b", re.MULTILINE)
# Reasons why a block of commands is displayed but not run, keyed by a pattern that occurs in the block.
NOT_RUN = {
    r"^python3 -m venv": "an environment of its own; .ci/run runs it",
    r"/path/to/|/data/": "the reader's own images",
    r"TABLE|RUN_NAME|RUN_1|outputs/(?:RUN|SWEEP)\b|YOU/": "a name to be filled in",
    r"=(?:data/)?(?:cifar10|imagenet)": "a download, and minutes to days",
    r"torchrun|sbatch|slurm": "several GPUs or a cluster; tests/test_distributed.py and test_slurm.py run the like",
    r"hydra/launcher=ray": "Ray, in an environment of its own",
    r"\bbf16\b|gpu_check\.py": "a GPU",
    r"seed=range\(|sweep=digits_|sasa-benchmark|chaos\.py": "minutes; docs/tutorial.md runs a smaller sweep",
    r"^\s*(?:tensorboard|sasa-demo)": "a server, until it is stopped",
}


@dataclass
class Block:
    page: Path
    line: int  # line number of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    fences = re.finditer(r"^```(.*)\n((?s:.*?))^```$", source, re.MULTILINE)
    return [Block(page, source.count("\n", 0, fence.start(2)) + 1, fence[1], fence[2]) for fence in fences]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
# The source code, with string literals that span several lines joined.
SOURCE = re.sub(
    r"\"\s*\n\s*(?:\+ )?f?\"",
    "",
    "".join(path.read_text(encoding="utf-8") for path in (ROOT / "sasa_train").rglob("*.py")),
)
RUN_PAGES = [page for page in PAGES if any(b.language in ("sh", "python", "console") for b in blocks_of(page))]
FAST = [ROOT / "docs" / page for page in ("api.md", "op.md", "troubleshooting.md")]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return a page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> Iterator[str]:
    """Yield the targets of links and images."""
    for match in re.finditer(r"\]\(([^)\s]+)[^)]*\)|^\[[^\]]+\]:\s*(\S+)|(?:href|src)=\"([^\"]+)", prose(page), re.M):
        yield match[1] or match[2] or match[3]


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors for the headings of a page; repeated headings get a numeric suffix."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.*?)\s*$", text, re.MULTILINE):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return {f"{slug}-{found[:i].count(slug)}" if slug in found[:i] else slug for i, slug in enumerate(found)}


def is_local(target: str) -> bool:
    return re.match(r"[a-z]+:", target) is None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in filter(is_local, links(page)):
        path, _, anchor = target.partition("#")
        assert not path.startswith("/"), f"{target}: a path from the root of a disk; write it from the page's folder"
        found = (page.parent / path).resolve() if path else page
        assert found.is_relative_to(ROOT) and found.exists(), f"{target}: is not there"
        assert not anchor or anchor in anchors(found), f"{target}: has no such heading, but {sorted(anchors(found))}"


def test_every_picture_is_shown() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in filter(is_local, links(page))}
    assert [str(path) for path in sorted((ROOT / "docs" / "images").iterdir()) if path not in shown] == []


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    named = {(index.parent / target).resolve() for target in filter(is_local, links(index))}
    assert [name(page) for page in DOCS if page not in (*named, index)] == []


def test_pages_and_tests_that_are_named_are_there() -> None:
    """Check that pages named in comments and messages exist, and that tests cited by pages exist."""
    sources = [path for folder in ("sasa_train", "scripts", "configs", "tests") for path in (ROOT / folder).rglob("*")]
    for path in [*PAGES, *(path for path in sources if path.suffix in (".py", ".yaml", ".sh", ".sbatch"))]:
        text = path.read_text(encoding="utf-8")
        for page in re.findall(r"\bdocs/\w+\.md\b", text):
            assert (ROOT / page).exists(), f"{path} names {page}"
        for file, test in re.findall(r"`(test_\w+\.py)::(test_\w+)", text):
            assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{path} names {file}::{test}"


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in ("", "sh", "python", "output", "console", "yaml"), "write sh or python where it can be run"
    if block.language == "" and COMMAND.search(block.text):
        reasons = [why for pattern, why in NOT_RUN.items() if re.search(pattern, block.text, re.MULTILINE)]
        assert reasons, f"mark it as sh, so that it is run, or give NOT_RUN the reason:\n{block.text}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "" and COMMAND.search(b.text)], ids=str)
def test_commands_that_are_only_shown_are_ones_that_would_be_taken(block: Block) -> None:
    """Commands that no test can run must not contain misspelt keys or unknown choices, nor what a shell would change.

    A sweep's `seed=range(3)` without quotes was a syntax error in bash, and zsh takes brackets for patterns of files.
    """
    for line in block.text.replace("\\\n", " ").splitlines():
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", line)
        assert not COMMAND.search(line) or not re.search(r"[\[(]", bare), f"needs quotes: {line}"
        words = shlex.split(re.sub(r"\s#.*|\.\.\.", "", line)) if COMMAND.search(line) else []
        overrides = [word for word in words if "=" in word.strip("=-") and not word.startswith("-")]
        try:
            if re.search(r"sasa-train\s+-m|train\b.*-m$", line):
                read_plan(overrides)
            elif re.search(r"\bsasa-train\b|sasa_train\.train\b|train\.sbatch\b", line):
                compose_config(overrides)
            elif "sasa-sweep" in line and "TABLE" not in line:
                plan = read_plan(overrides)
                assert [job.reason for job in plan.jobs if job.reason] == []
        except ConfigError as error:
            pytest.fail(f"{line}\n{error}")


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run of the README's first command, copied from the checkout if possible."""
    folder = tmp_path_factory.mktemp("quickstart")
    if (ROOT / RUN / "checkpoints" / "best.pt").exists():
        shutil.copytree(ROOT / RUN, folder / RUN)
    else:
        run_shell("sasa-train experiment=quickstart", folder)
    make_ten_classes(folder / "data", num_train=7)
    assert (folder / RUN).is_dir(), f"README and docs call the quickstart's run {RUN}; here: {os.listdir(folder)}"
    return folder


@pytest.mark.parametrize("page", slow_but_for(FAST, RUN_PAGES), ids=name)
def test_what_a_page_shows_runs(
    page: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(quickstart, tmp_path, dirs_exist_ok=True)
    for shown in ("docs", "scripts"):  # pages refer to photographs and scripts by their paths in the checkout
        (tmp_path / shown).symlink_to(ROOT / shown)
    monkeypatch.chdir(tmp_path)
    snippets = ModuleType("snippets")  # which torch.compile looks up by its name
    monkeypatch.setitem(sys.modules, "snippets", snippets)
    printed = ""
    for block in blocks_of(page):
        if block.language == "sh":
            print(f"\n== {block}")
            run_shell(block.text, tmp_path)
        elif block.language == "console":
            check_message(block, tmp_path, monkeypatch, capsys)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")  # for the right line in errors
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(code, vars(snippets))
            printed = stdout.getvalue()
        elif block.language == "output":
            assert printed == block.text, f"{block}: is not what the block before it prints"
    for picture in [target for target in links(page) if page.stem == "attention" and target.endswith(".png")]:
        assert (tmp_path / Path(picture).name).exists(), f"{name(page)} shows {picture}, which its snippets do not make"


def check_message(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = block.text.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    message = "\n".join(line for line in lines if not line.startswith("$ "))
    if not commands:
        words = re.sub(r"^sasa-\w+: ", "", message)
        for part in filter(None, (part.strip() for part in re.split(r"\.\.\.|\n", words))):
            assert part in SOURCE, f"{block}: {part!r} stands nowhere in the source"
        return
    for command in commands[:-1]:
        run_shell(command, folder)
    name, *arguments = shlex.split(commands[-1])
    monkeypatch.setattr(sys, "argv", [name])
    capsys.readouterr()
    run_command = importlib.import_module(COMMANDS[name].partition(":")[0]).run_command  # in-process: no second import
    run_command(arguments)
    said = "".join(capsys.readouterr())
    assert re.search(re.escape(message).replace(r"\.\.\.", ".*"), said, re.DOTALL), f"{block}: it said\n{said}"


def run_shell(commands: str, folder: Path) -> None:
    """Run commands as if typed into a shell with the environment active; pytest captures their output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    bash = ["bash", "-euxo", "pipefail", "-c", commands]
    process = subprocess.run(bash, cwd=folder, env=environment, capture_output=True, text=True)
    print(process.stdout, process.stderr)
    assert process.returncode == 0, f"exit {process.returncode} of\n{commands}\n{process.stdout}\n{process.stderr}"


def test_the_config_reference_is_what_its_script_prints() -> None:
    command = [sys.executable, ROOT / "scripts" / "config_reference.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == printed, "run python scripts/config_reference.py > docs/config.md"
    assert not re.search(r"\[[^]`]*\[", page), "a list in brackets would be taken for what to type"
