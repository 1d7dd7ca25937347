"""A board's /sys in a directory of a test."""

from pathlib import Path


class FakeSysfs:
    """`root` takes the place of `/`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, text: str) -> None:
        """Write a file whole: a reader never sees half of it."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{file.name}.new")
        new.write_text(text)
        new.replace(file)

    def zone(self, number: int, kind: str, celsius: float) -> None:
        """A thermal zone."""
        self.write(f"sys/class/thermal/thermal_zone{number}/type", f"{kind}\n")
        self.write(f"sys/class/thermal/thermal_zone{number}/temp", f"{celsius * 1000:.0f}\n")

    def throttled(self, bits: int) -> None:
        """A Raspberry Pi's flags."""
        self.write("sys/devices/platform/soc/soc:firmware/get_throttled", f"{bits:x}\n")

    def monitor(self, number: int, name: str, **files: str) -> None:
        """A hardware monitor."""
        self.write(f"sys/class/hwmon/hwmon{number}/name", f"{name}\n")
        for file, text in files.items():
            self.write(f"sys/class/hwmon/hwmon{number}/{file}", f"{text}\n")
