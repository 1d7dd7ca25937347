"""Progress is a bar on a terminal and a line for each step elsewhere."""

import io

import pytest

from hearthd.build.progress import Progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_each_step_is_two_lines_where_there_is_no_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, clock=clock)
    for share in (0.0, 0.5, 1.0):
        progress("calibration", share)
        clock.now += 30.0
    progress("int8 graph", 0.0)
    clock.now += 2.0
    progress.close()
    progress.close()
    lines = ["calibration ...", "calibration: done in 1 min 30 s", "int8 graph ...", "int8 graph: done in 2 s"]
    assert stream.getvalue().splitlines() == lines


def test_terminal_shows_a_bar_and_then_the_time() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, is_terminal=True, clock=clock)
    progress("calibration", 0.5)
    clock.now += 3.0
    progress("calibration", 1.0)
    progress.close()
    drawn = stream.getvalue().split("\r\x1b[K")
    assert drawn[1] == f"calibration  [{'#' * 12}{'.' * 12}]  50%  0 s"
    assert drawn[2] == f"calibration  [{'#' * 24}] 100%  3 s"
    assert drawn[3] == "calibration: 3 s\n"


def test_terminal_is_not_drawn_more_often_than_it_can_be_seen() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream, is_terminal=True, clock=clock)
    for step in range(1000):
        progress("calibration", step / 1000)
        clock.now += 0.001
    assert 8 <= stream.getvalue().count("\r") <= 11


def test_line_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    Progress(stream, is_terminal=True)("x" * 500, 0.1)
    assert stream.getvalue() == "\r\x1b[K" + "x" * 39
