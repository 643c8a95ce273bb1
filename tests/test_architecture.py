"""The arrows between the rooms: read from the source with ``ast``, compared with docs/DESIGN.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from tests.helpers import ROOT

PACKAGE = ROOT / "backup"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
ANY = {"cli", "__main__", "__init__"}
PURE = {"errors", "names", "wire", "protocol", "settings"}
PURE |= {"disk", "upload", "listing", "quota", "reclaim", "storage"}
FORBIDDEN = {"threading", "_thread", "asyncio", "concurrent", "multiprocessing", "queue"}


def imports(path: Path) -> Iterator[ast.stmt]:
    """Every import statement in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node


def inside(module: str) -> Set[str]:
    """The rooms that a module imports."""
    found: Set[str] = set()
    for node in imports(PACKAGE / f"{module}.py"):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module:
                found.add(node.module)
            else:
                found.update(alias.name for alias in node.names)
    return found & set(MODULES)


def outside(path: Path) -> Set[str]:
    """The top-level modules that a file imports by absolute name."""
    found: Set[str] = set()
    for node in imports(path):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def documented() -> Dict[str, Set[str]]:
    """What docs/DESIGN.md says each room may import."""
    text = (ROOT / "docs" / "DESIGN.md").read_text(encoding="utf-8")
    table = text.split("## Rooms")[1].split("\n## ")[0]
    rows: Dict[str, Set[str]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            for module in re.findall(r"`(\w+)`", cells[0]):
                rows[module] = set(re.findall(r"\w+", cells[2]))
    return rows


def test_every_room_is_in_the_table_and_has_a_test_file() -> None:
    assert set(documented()) == set(MODULES)
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    assert {f"test_{module.strip('_')}" for module in MODULES} <= tests


@pytest.mark.parametrize("module", sorted(set(MODULES) - ANY))
def test_a_room_imports_what_the_table_says(module: str) -> None:
    assert inside(module) == documented()[module]


def test_there_are_no_cycles() -> None:
    arrows = {module: inside(module) - {module} for module in MODULES if module != "__init__"}
    order: List[str] = []
    while arrows:
        free = [module for module, needed in arrows.items() if needed <= {*order, "__init__"}]
        assert free, f"a cycle among {sorted(arrows)}"
        order += free
        for module in free:
            del arrows[module]


@pytest.mark.parametrize("module", MODULES)
def test_only_the_standard_library_is_imported_and_nothing_that_makes_threads(module: str) -> None:
    names = outside(PACKAGE / f"{module}.py")
    assert not names & FORBIDDEN
    assert "backup" not in names, "an absolute import would break a vendored copy"
    if hasattr(sys, "stdlib_module_names"):  # Python 3.10 and later can say
        assert names <= {*sys.stdlib_module_names}


@pytest.mark.parametrize("module", sorted(PURE))
def test_the_inner_rooms_know_no_socket_and_no_logging(module: str) -> None:
    assert not outside(PACKAGE / f"{module}.py") & {"socket", "ssl", "selectors", "logging"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints_or_exits(module: str) -> None:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    mine = {"cli": {"sys.exit"}, "signals": {"os._exit"}}  # the latter for a second signal alone
    assert calls & {"print", "sys.exit", "exit", "os._exit"} == mine.get(module, set())


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_every_module_has_future_annotations_and_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    futures = [node for node in tree.body if isinstance(node, ast.ImportFrom)][:1]
    assert [alias.name for node in futures for alias in node.names] == ["annotations"]
