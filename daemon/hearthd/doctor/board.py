"""The board: memory and its accounting, power, heat, the clock. Called by `cli`."""

from collections.abc import Iterable
from typing import Final

from hearthd.doctor.finding import Finding, Level, good, note, problem, warning
from hearthd.doctor.needed_memory import NeededMemory
from hearthd.doctor.system import System

__all__ = ["check_clock", "check_memory", "check_memory_cgroup", "check_power", "check_temperature"]

# Raspberry Pi firmware, get_throttled: what is so now, and 16 bits higher what was so since the start.
_THROTTLED: Final = (
    (0, "the supply voltage is too low"),
    (1, "the processor's frequency is capped"),
    (2, "the processor is throttled"),
    (3, "the soft temperature limit is active"),
)
_SINCE_START: Final = 16
_UNDER_VOLTAGE_BITS: Final = 0b1 | 0b1 << _SINCE_START
_WARM_CELSIUS, _HOT_CELSIUS = 75.0, 85.0
_FIT: Final = "lower engine.slots or engine.context_length, or use a smaller model (`hearthd model add`)"


def check_memory(system: System, needed: NeededMemory | None, limit: int | None = None) -> Iterable[Finding]:
    """Compare the memory with what the daemon needs. needed: None if it is not known. limit: the unit's MemoryMax."""
    sizes = {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in (system.read("/proc/meminfo") or "").splitlines())
        if value.split() and value.split()[0].isdigit()
    }
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    if total is None or available is None:
        yield note("memory", "/proc/meminfo cannot be read, so the size of the memory is not known")
        return
    said = f"{total / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB of them available"
    if needed is None:
        yield note("memory", said)
        return
    most = min(total, limit or total)
    if most < total:
        said += f", of which the unit may take {most / 1e9:.1f} GB (MemoryMax)"
    said += f"; the daemon needs {needed}"
    if most < needed.start:
        yield problem("memory", said, "use a smaller model (`hearthd model add`), or a board with more memory")
    elif most < needed.total:
        yield warning("memory", f"{said}: it starts, and is ended when its slots are full", _FIT)
    elif available < needed.total:
        yield warning("memory", f"{said}, which is not there if it does not run already", f"end other programs; {_FIT}")
    else:
        yield good("memory", said)


def check_memory_cgroup(system: System) -> Iterable[Finding]:
    """Ask whether the kernel counts memory by service, without which MemoryMax of the unit does nothing."""
    controllers = system.read("/sys/fs/cgroup/cgroup.controllers")
    if controllers is None:
        lines = [line.split() for line in (system.read("/proc/cgroups") or "").splitlines()]
        is_on = any(words[0] == "memory" and words[-1] == "1" for words in lines if words)
    else:
        is_on = "memory" in controllers.split()
    if is_on:
        yield good("memory cgroup", "the kernel counts memory by service: the unit's MemoryMax holds")
    else:
        yield warning(
            "memory cgroup",
            "the kernel does not count memory by service, so the unit's MemoryMax does nothing",
            "on a Raspberry Pi add cgroup_enable=memory to the one line of /boot/firmware/cmdline.txt and reboot",
        )


def check_power(system: System) -> Iterable[Finding]:
    """Ask the firmware of a Raspberry Pi, then hardware monitors, whether power was or is short."""
    bits = _throttled_bits(system)
    alarms = [path for path in system.find("/sys/class/hwmon/hwmon*/in*_lcrit_alarm") if system.read(path) == "1"]
    if bits is None and not alarms:
        if system.find("/sys/class/hwmon/hwmon*/in*_lcrit_alarm"):
            yield good("power", "the voltage monitor has no alarm")
        else:
            yield note("power", "this machine does not say whether its voltage is too low or it is throttled")
        return
    bits = bits or 0
    now = [text for bit, text in _THROTTLED if bits & 1 << bit]
    before = [text for bit, text in _THROTTLED if bits & 1 << bit + _SINCE_START and not bits & 1 << bit]
    now += ["a voltage monitor has an alarm"] if alarms and not bits & 1 else []
    remedy = (
        "use the power supply and the cable that the board's maker sells; low voltage also destroys SD cards"
        if alarms or bits & _UNDER_VOLTAGE_BITS
        else "cool the board: a heat sink or a fan"
    )
    if now:
        yield problem("power", f"now: {'; '.join(now)}", remedy)
    if before:
        yield warning("power", f"since the board was started: {'; '.join(before)}; not now", remedy)
    if not now and not before:
        yield good("power", "neither low voltage nor throttling since the board was started")


def _throttled_bits(system: System) -> int | None:
    for text in (
        system.read("/sys/devices/platform/soc/soc:firmware/get_throttled"),
        (system.run(["vcgencmd", "get_throttled"]) or "").strip().removeprefix("throttled="),
    ):
        try:
            return int(text or "", 16)
        except ValueError:
            continue
    return None


def check_temperature(system: System) -> Iterable[Finding]:
    """Take the hottest thermal zone."""
    readings = []
    for path in system.find("/sys/class/thermal/thermal_zone*/temp"):
        text = system.read(path)
        if text and text.lstrip("-").isdigit():
            readings.append(int(text) / 1000)
    if not readings:
        yield note("temperature", "this machine does not say how warm it is")
        return
    hottest = max(readings)
    level = Level.PROBLEM if hottest >= _HOT_CELSIUS else Level.WARNING if hottest >= _WARM_CELSIUS else Level.GOOD
    remedy = "" if level is Level.GOOD else "cool the board: a heat sink or a fan; a hot processor is a slow one"
    yield Finding("temperature", level, f"{hottest:.0f} degrees Celsius", remedy)


def check_clock(system: System) -> Iterable[Finding]:
    """Ask whether the clock is right: certificates and tokens are judged by it."""
    synchronised = system.is_clock_synchronised()
    has_battery = bool(system.find("/sys/class/rtc/rtc*"))
    if synchronised:
        yield good("clock", "synchronised with a time server")
    elif synchronised is None:
        yield note("clock", "the kernel does not say whether the clock is synchronised")
    else:
        beside = "" if has_battery else ", and the board has no clock of its own"
        yield warning(
            "clock",
            f"not synchronised with a time server{beside}: certificates and tokens may seem expired, or not yet valid",
            "systemctl enable --now systemd-timesyncd, and see timedatectl",
        )
