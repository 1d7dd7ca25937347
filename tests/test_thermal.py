"""Heat and power as sysfs tells of them, and when the daemon holds back: a fake tree, a fake clock."""

from pathlib import Path

import pytest

from fake_sysfs import FakeSysfs
from hearthd.board.governor import MAX_LEVEL, Governor, Throttle
from hearthd.board.thermal import BoardFlag, BoardReading, Sensors


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    return FakeSysfs(tmp_path)


def test_a_machine_that_says_nothing_is_no_error(tmp_path: Path) -> None:
    assert Sensors(tmp_path).read() == BoardReading()


def test_the_processors_hottest_zone_counts_and_a_disks_does_not(sysfs: FakeSysfs) -> None:
    sysfs.zone(0, "cpu-thermal", 61.2)
    sysfs.zone(1, "bigcore0-thermal", 63.5)
    sysfs.zone(2, "nvme", 80.0)
    assert Sensors(sysfs.root).read() == BoardReading(63.5)


def test_a_zone_of_unknown_kind_is_better_than_none(sysfs: FakeSysfs) -> None:
    sysfs.zone(0, "acpitz", 47.0)
    assert Sensors(sysfs.root).read().celsius == 47.0
    sysfs.monitor(0, "k10temp", temp1_input="52000")
    assert Sensors(sysfs.root).read().celsius == 52.0
    sysfs.monitor(1, "nvme", temp1_input="90000")
    assert Sensors(sysfs.root).read().celsius == 52.0


@pytest.mark.parametrize("text", ["", "no number", "-274000", "0", "9999000", "1" * 5000])
def test_a_broken_sensor_says_nothing(sysfs: FakeSysfs, text: str) -> None:
    sysfs.write("sys/class/thermal/thermal_zone0/type", "cpu-thermal")
    sysfs.write("sys/class/thermal/thermal_zone0/temp", text)
    assert Sensors(sysfs.root).read().celsius is None
    sysfs.zone(1, "cpu-thermal", 50.0)
    assert Sensors(sysfs.root).read().celsius == 50.0


@pytest.mark.parametrize("place", ["soc/soc:firmware", "soc@107c000000/soc@107c000000:firmware", "soc:firmware"])
def test_flags_of_the_firmware(sysfs: FakeSysfs, place: str) -> None:
    sysfs.write(f"sys/devices/platform/{place}/get_throttled", "50005\n")
    now = frozenset({BoardFlag.UNDER_VOLTAGE, BoardFlag.THROTTLED})
    assert Sensors(sysfs.root).read() == BoardReading(None, now, now)
    sysfs.write(f"sys/devices/platform/{place}/get_throttled", "80000\n")
    soft = frozenset({BoardFlag.SOFT_TEMPERATURE_LIMIT})
    assert Sensors(sysfs.root).read() == BoardReading(None, frozenset(), soft)
    sysfs.write(f"sys/devices/platform/{place}/get_throttled", "what")
    assert Sensors(sysfs.root).read() == BoardReading()


def test_a_voltage_monitor_stands_in_for_the_firmware(sysfs: FakeSysfs) -> None:
    sysfs.monitor(0, "rpi_volt", in0_lcrit_alarm="0")
    assert Sensors(sysfs.root).read().flags == frozenset()
    sysfs.monitor(0, "rpi_volt", in0_lcrit_alarm="1")
    assert Sensors(sysfs.root).read().flags == {BoardFlag.UNDER_VOLTAGE}


# The governor.


class Board:
    """A governor with its clock, and the levels that it has applied."""

    def __init__(self, max_celsius: float = 78.0) -> None:
        self.now = 100.0
        self.applied: list[int] = []
        self.governor = Governor(
            Sensors(Path("/nonexistent")),
            max_celsius,
            clock=lambda: self.now,
        )

    def stays(self, celsius: float | None, seconds: int, flags: frozenset[BoardFlag] | None = None) -> int:
        """Be so warm for so long, looked at each second; return the level after it."""
        for _ in range(seconds):
            self.now += 1
            before = self.governor.throttle.level
            self.governor.judge(BoardReading(celsius, flags))
            if self.governor.throttle.level != before:
                self.applied.append(self.governor.throttle.level)
        return self.governor.throttle.level


def test_below_the_limit_nothing_is_held_back() -> None:
    board = Board()
    assert board.stays(77.9, 1000) == 0
    assert board.applied == []


def test_at_the_limit_it_steps_down_one_level_at_a_time() -> None:
    board = Board()
    assert board.stays(78.0, 1) == 1
    assert board.stays(78.5, 9) == 1
    assert board.stays(78.5, 1) == 2
    assert board.stays(79.9, 100) == MAX_LEVEL
    assert board.applied == [1, 2, 3]


def test_far_beyond_the_limit_it_does_not_wait() -> None:
    board = Board()
    assert board.stays(80.0, 3) == 3


def test_it_comes_back_slowly_and_only_when_it_is_cool() -> None:
    board = Board()
    board.stays(85.0, 3)
    # Not hot any more, and not cool yet: stay.
    assert board.stays(75.0, 1000) == 3
    assert board.stays(73.0, 30) == 3
    assert board.stays(73.0, 1) == 2
    # A warm moment begins the wait anew.
    assert board.stays(73.0, 29) == 2
    assert board.stays(74.0, 1) == 2
    assert board.stays(72.0, 30) == 2
    assert board.stays(72.0, 1) == 1
    assert board.stays(60.0, 100) == 0
    assert board.applied == [1, 2, 3, 2, 1, 0]


def test_what_the_firmware_reports_counts_like_heat() -> None:
    board = Board()
    assert board.stays(50.0, 1, frozenset({BoardFlag.UNDER_VOLTAGE})) == 1
    assert board.stays(50.0, 100, frozenset({BoardFlag.THROTTLED})) == 3
    assert board.stays(None, 100, frozenset()) == 0


def test_a_sensor_that_falls_silent_does_not_hold_back_for_ever() -> None:
    board = Board()
    board.stays(85.0, 3)
    assert board.stays(None, 100) == 0


def test_a_limit_of_0_watches_and_does_nothing() -> None:
    board = Board(max_celsius=0.0)
    assert board.stays(120.0, 100, frozenset(BoardFlag)) == 0
    assert board.governor.reading.celsius == 120.0


def test_what_each_level_leaves() -> None:
    left = [(each.max_running(4), each.num_threads(4), each.pause_share) for each in map(Throttle, range(4))]
    assert left == [(4, 4, 0.0), (2, 4, 0.0), (2, 2, 0.0), (2, 2, 1.0)]
    assert [(each.max_running(1), each.num_threads(1)) for each in map(Throttle, range(4))] == [(1, 1)] * 4
