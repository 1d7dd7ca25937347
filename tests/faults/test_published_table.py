"""docs/faults.md: every test that it names is there, every requirement has a row, and no fault test is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

NUM_REQUIREMENTS = 43
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@pytest.fixture(scope="module")
def rows(repository: Path) -> list[list[str]]:
    """The cells of every row that has something in its first one."""
    lines = (repository / "docs/faults.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| [\w.]", line)]


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name for node in functions if node.name.startswith("test_")}


def test_every_test_of_the_table_is_there(rows: list[list[str]], repository: Path) -> None:
    named = {match for row in rows for cell in row for match in NAMED.findall(cell)}
    assert len(named) > 80
    missing = {
        f"{file}::{test}"
        for file, test in named
        if not (repository / "tests" / file).is_file() or test not in names_in(repository / "tests" / file)
    }
    assert not missing


def test_every_requirement_has_a_row_and_every_row_a_figure(rows: list[list[str]]) -> None:
    numbers = [int(row[0]) for row in rows if row[0].isdigit()]
    assert numbers == list(range(1, NUM_REQUIREMENTS + 1))
    for row in rows:
        assert all(row), row
        assert "@" not in "".join(row), row


def test_no_test_of_a_fault_is_left_out(rows: list[list[str]]) -> None:
    named = {match for row in rows for cell in row for match in NAMED.findall(cell)}
    here = Path(__file__).parent
    written = {
        (f"faults/{path.name}", test)
        for path in here.glob("test_*.py")
        if path.name != Path(__file__).name
        for test in names_in(path)
    }
    assert written <= named
