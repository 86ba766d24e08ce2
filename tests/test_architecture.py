"""Check that the package layout matches docs/architecture.md and follows the rules that keep it easy to navigate."""

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sasa_train"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def stem(name: str) -> str:
    """Return the part that related names share, as in evaluate and evaluation, predict and prediction, run and runs."""
    return re.sub(r"(ions?|ings?|ed|es|e|s)$", "", name)


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))


def test_the_root_holds_14_modules_at_most():
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def test_no_two_neighbours_share_a_stem():
    """Only `train` (the command), `training` (what it runs) and `trained` (the public interface) may share a stem."""
    root = Counter(stem(name) for name in [*names(PACKAGE), *ROOMS])
    assert {shared: count for shared, count in root.items() if count > 1} == {"train": 3}
    for room in ROOMS:
        counts = Counter([stem(room), *map(stem, names(PACKAGE / room))])
        assert max(counts.values()) == 1, f"{room}: {counts.most_common(1)}"
    everywhere = Counter(path.stem for path in MODULES if not path.stem.startswith("__"))
    assert [name for name, count in everywhere.items() if count > 1] == []


@pytest.mark.parametrize("folder", ["sasa_train", "scripts", "tests"])
def test_no_function_is_longer_than_60_lines_but_kernels(folder):
    long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60 and node.name[-7:] != "_kernel"
    ]
    assert long == []


def test_no_imports_run_in_a_circle():
    """Check for circular imports, even inside functions (import-linter checks only the order of subpackages)."""
    graph = {dotted(path): imported(path) for path in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Return the project's modules that a file imports anywhere, excluding imports used only for type checking."""
    known = {dotted(module) for module in MODULES}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in for_types for inner in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if whole <= known else whole | {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known - {dotted(path)}


def test_no_test_module_imports_another():
    """Code that tests or their subprocesses share belongs in helper modules that are named after their purpose."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"^[\s'\"]*(from|import) test_", path.read_text(encoding="utf-8"), re.MULTILINE), path.name


def test_the_page_lists_the_rooms_and_modules_that_there_are():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", PAGE, re.MULTILINE)
    assert {room: sorted(re.findall(r"`(\w+)`", cell)) for room, cell in rows} == {
        room: names(PACKAGE / room) for room in ROOMS
    }
    root = re.findall(r"^\| `(\w+)\.py` \|", PAGE, re.MULTILINE)
    assert sorted(root) == sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_the_files_that_the_page_names_are_there():
    named = re.findall(r"`([\w./]+\.(?:py|md|yaml|toml|cpp))`", PAGE)
    missing = [name for name in named if not ((ROOT / name).exists() or (PACKAGE / name).exists())]
    assert len(named) > 20 and missing == []
