"""docs/scheduling.md names a place in the code and a test for each rule: all of them are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/scheduling.md").read_text(encoding="utf-8")
# `scheduling/waits.py: until_start, until_end` and `test_engine.py::TestRemove`; names may be left out.
CODE = re.compile(r"`((?!test_)[a-z_/]+\.py)(?:: ([A-Za-z_, ]+))?`")
TESTS = re.compile(r"`(test_[a-z_]+\.py)(?:::(\w+))?`")


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the names of all functions, classes, and attributes that are assigned to."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return frozenset(names | {node.attr for node in nodes if isinstance(node, ast.Attribute)})


@pytest.mark.parametrize(("file", "names"), sorted(set(CODE.findall(PAGE))))
def test_each_place_in_the_code_is_there(file: str, names: str) -> None:
    path = ROOT / "daemon/hearthd" / file
    assert path.is_file()
    assert {name.strip() for name in names.split(",") if name} - names_in(path) == set()


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS.findall(PAGE))))
def test_each_test_is_there(file: str, name: str) -> None:
    path = ROOT / "tests" / file
    assert path.is_file()
    assert not name or name in names_in(path)


def test_each_rule_names_both_in_a_way_that_these_tests_read() -> None:
    rules = re.split(r"\n(?=\*\*[A-Z])", PAGE.partition("## The rules")[2].partition("\n## ")[0])[1:]
    assert len(rules) > 15
    assert [rule.splitlines()[0] for rule in rules if not CODE.search(rule) or not TESTS.search(rule)] == []
    read = {f"`{file}::{name}`" if name else f"`{file}`" for file, name in TESTS.findall(PAGE)}
    assert set(re.findall(r"`[^`\n]*test_[^`\n]*`", PAGE)) - read == set()
