"""How hot the processor is, and whether the board's firmware complains: read from sysfs, nothing else.

Temperatures come from thermal zones and hardware monitors (Documentation/driver-api/thermal and Documentation/hwmon of
the kernel), flags from a Raspberry Pi's firmware (`get_throttled`) or, for low voltage alone, its driver rpi_volt.

A file that is not there, or cannot be read just now, says nothing and harms nothing. Some sensors take milliseconds to
answer: `read` belongs into a thread. Called by `governor` and by the doctor.
"""

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["BoardFlag", "BoardReading", "Sensors", "read_throttled"]

# What a working sensor of a board can say. A broken one says -274, 0 or thousands.
_SANE_CELSIUS: Final = (1.0, 150.0)
# Of a zone's `type` and a monitor's `name`: the processor, and not a disk, a battery or a radio beside it.
_PROCESSOR: Final = ("cpu", "soc", "pkg", "package", "core", "cluster", "k10temp", "zenpower")
_SINCE_START_SHIFT: Final = 16
_MAX_FILE_BYTES: Final = 64


class BoardFlag(enum.Enum):
    """What the firmware complains of; the value is the bit of `get_throttled`."""

    UNDER_VOLTAGE = 0
    FREQUENCY_CAPPED = 1
    THROTTLED = 2
    SOFT_TEMPERATURE_LIMIT = 3


@dataclass(frozen=True, slots=True)
class BoardReading:
    """A board at one moment."""

    celsius: float | None = None
    """Of the processor's hottest sensor; None if there is none."""
    flags: frozenset[BoardFlag] | None = None
    """What is so now; None if the board does not say."""
    flags_since_start: frozenset[BoardFlag] = frozenset()
    """What is or was so at some time since the board was started."""


def read_throttled(text: str) -> BoardReading:
    """Return the flags that a Raspberry Pi's firmware tells by a hexadecimal number; none if it is no number."""
    try:
        bits = int(text, 16)
    except ValueError:
        return BoardReading()
    return BoardReading(None, _flags(bits), _flags(bits) | _flags(bits >> _SINCE_START_SHIFT))


class Sensors:
    """A machine's sensors. Any thread."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: where `sys` is."""
        self._root = root
        self._throttled: list[Path] | None = None

    def read(self) -> BoardReading:
        """Ask all of them. Looks for zones and monitors anew each time: drivers come late, and go."""
        celsius, alarms = self._read_temperature(), self._read_voltage_alarms()
        said = self._read_throttled()
        if said.flags is None and alarms is None:
            return BoardReading(celsius)
        flags = (said.flags or frozenset()) | ({BoardFlag.UNDER_VOLTAGE} if alarms else set())
        return BoardReading(celsius, flags, flags | said.flags_since_start)

    def _read_temperature(self) -> float | None:
        of_processor: list[float] = []
        of_others: list[float] = []
        for zone in self._find("sys/class/thermal/thermal_zone*"):
            _sort(self._text(zone / "type"), self._celsius(zone / "temp"), of_processor, of_others)
        # A board's zones are its processor's; where they are somebody else's, the processor has a monitor.
        for monitor in [] if of_processor else self._find("sys/class/hwmon/hwmon*"):
            for file in sorted(monitor.glob("temp*_input")):
                _sort(self._text(monitor / "name"), self._celsius(file), of_processor, [])
        return max(of_processor or of_others, default=None)

    def _read_throttled(self) -> BoardReading:
        if self._throttled is None:
            # What stands before it has an address in its name on some boards. Built into their kernels, so it is there
            # from the start or never: to look among all devices each time would take longer than all else.
            found = [*self._find("sys/devices/platform/*firmware/get_throttled")]
            found += self._find("sys/devices/platform/*/*firmware/get_throttled")
            self._throttled = found[:1]
        return read_throttled(self._text(self._throttled[0]) or "") if self._throttled else BoardReading()

    def _read_voltage_alarms(self) -> bool | None:
        """Whether a monitor says that the voltage is too low; None if there is none."""
        said = [self._text(file) for file in self._find("sys/class/hwmon/hwmon*/in*_lcrit_alarm")]
        known = [text == "1" for text in said if text in ("0", "1")]
        return any(known) if known else None

    def _celsius(self, file: Path) -> float | None:
        text = self._text(file)
        if text is None or not re.fullmatch(r"-?[0-9]+", text):
            return None
        celsius = int(text) / 1000
        return celsius if _SANE_CELSIUS[0] <= celsius <= _SANE_CELSIUS[1] else None

    def _find(self, pattern: str) -> list[Path]:
        return sorted(self._root.glob(pattern))

    @staticmethod
    def _text(file: Path) -> str | None:
        try:
            with file.open("rb") as opened:
                return opened.read(_MAX_FILE_BYTES).decode(errors="replace").strip()
        except OSError:  # EAGAIN and EIO too, of a sensor that is asleep
            return None


def _flags(bits: int) -> frozenset[BoardFlag]:
    return frozenset(flag for flag in BoardFlag if bits >> flag.value & 1)


def _sort(name: str | None, celsius: float | None, of_processor: list[float], of_others: list[float]) -> None:
    if celsius is not None:
        is_processor = any(word in (name or "").lower() for word in _PROCESSOR)
        (of_processor if is_processor else of_others).append(celsius)
