"""The board: memory and its accounting, power, heat, the clock. Called by `cli`."""

from collections.abc import Iterable
from typing import Final

from hearthd.board.thermal import BoardFlag, Sensors, read_throttled
from hearthd.doctor.finding import Finding, Level, good, note, problem, warning
from hearthd.doctor.needed_memory import NeededMemory
from hearthd.doctor.system import System

__all__ = ["check_clock", "check_memory", "check_memory_cgroup", "check_power", "check_temperature"]

_SAID = {
    BoardFlag.UNDER_VOLTAGE: "the supply voltage is too low",
    BoardFlag.FREQUENCY_CAPPED: "the processor's frequency is capped",
    BoardFlag.THROTTLED: "the processor is throttled",
    BoardFlag.SOFT_TEMPERATURE_LIMIT: "the soft temperature limit is active",
}
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
    reading = Sensors(system.root).read()
    if reading.flags is None:
        reading = read_throttled((system.run(["vcgencmd", "get_throttled"]) or "").strip().removeprefix("throttled="))
    if reading.flags is None:
        yield note("power", "this machine does not say whether its voltage is too low or it is throttled")
        return
    now = [said for flag, said in _SAID.items() if flag in reading.flags]
    before = [said for flag, said in _SAID.items() if flag in reading.flags_since_start - reading.flags]
    remedy = (
        "use the power supply and the cable that the board's maker sells; low voltage also destroys SD cards"
        if BoardFlag.UNDER_VOLTAGE in reading.flags_since_start
        else "cool the board: a heat sink or a fan"
    )
    if now:
        yield problem("power", f"now: {'; '.join(now)}", remedy)
    if before:
        yield warning("power", f"since the board was started: {'; '.join(before)}; not now", remedy)
    if not now and not before:
        yield good("power", "neither low voltage nor throttling since the board was started")


def check_temperature(system: System) -> Iterable[Finding]:
    """Take the processor's hottest sensor."""
    hottest = Sensors(system.root).read().celsius
    if hottest is None:
        yield note("temperature", "this machine does not say how warm it is")
        return
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
