"""Faults leave figures: each is shown at the end of a run, and stands in docs/faults.md."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import ext4_disk
import pytest

_FIGURES = pytest.StashKey[list[str]]()
# How often a process is felled; `make faults` asks for 200.
_ROUNDS_VARIABLE = "HEARTH_FAULT_ROUNDS"


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash[_FIGURES]:
        terminalreporter.section("figures of faults")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Give a function that keeps a line for the end of the run."""
    return lambda text: request.config.stash[_FIGURES].append(f"{request.node.name}: {text}")


@pytest.fixture(scope="session")
def rounds() -> int:
    """Return how often to fell a process."""
    return int(os.environ.get(_ROUNDS_VARIABLE, "10"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ext4_disk.Disk]:
    """Give a disk whose power can be cut."""
    if reason := ext4_disk.missing():
        pytest.skip(reason)
    with ext4_disk.Disk(tmp_path) as disk:
        yield disk
