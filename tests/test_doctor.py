"""`hearthd doctor`: each finding both ways, on a machine made of files; and the program on this one."""

import asyncio
import datetime
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bundles import write_bundle
from decoders import tiny_bundle, tiny_checkpoint
from hearthd.access.tokens import create_token
from hearthd.bundles.bundle import Bundle
from hearthd.configuration.config import Config, EngineConfig
from hearthd.doctor import board, disk, running
from hearthd.doctor.cli import diagnose
from hearthd.doctor.credentials import check_certificate, check_tokens
from hearthd.doctor.finding import Finding, Level
from hearthd.doctor.model_files import check_model, check_speed
from hearthd.doctor.needed_memory import NeededMemory, find_needed_memory
from hearthd.doctor.processor import check_processor
from hearthd.doctor.system import System
from hearthd.errors import ConfigError
from hearthd.pairing.certificate import make_certificate
from serving import asynchronous, make_config, serving
from tls_files import make_tls_files, renew_certificate

GOOD, NOTE, WARNING, PROBLEM = Level.GOOD, Level.NOTE, Level.WARNING, Level.PROBLEM


class Machine:
    """A root directory, filled by the test; programs answer what the test has written down for them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.programs: dict[str, str] = {}
        self.synchronised: bool | None = True
        self.free = 10**10

    def write(self, path: str, text: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    @property
    def system(self) -> System:
        def run(command: Sequence[str]) -> str | None:
            return self.programs.get(command[0])

        return System(self.root, run, lambda: self.synchronised, lambda _path: self.free)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def levels(findings: Iterable[Finding]) -> list[Level]:
    found = list(findings)
    # Plain words always; a remedy wherever somebody has to do something.
    assert all(finding.text for finding in found)
    assert all(finding.remedy for finding in found if finding.level in (WARNING, PROBLEM)), found
    return [finding.level for finding in found]


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


# Processor.

CORE = "processor\t: 0\n{key}\t: {flags}\n\n"


@pytest.mark.parametrize(
    ("key", "flags", "level", "said"),
    [
        ("flags", "fpu avx2 avx512_vnni avx_vnni amx_int8", GOOD, "AMX"),
        ("flags", "fpu avx2 avx512_vnni", GOOD, "VNNI with 512 bits"),
        ("flags", "fpu avx2 avx_vnni", GOOD, "VNNI with 256 bits"),
        ("flags", "fpu avx2", WARNING, "plain AVX2 kernels"),
        ("flags", "fpu sse2", PROBLEM, "none of AVX2"),
        ("Features", "fp asimd asimddp i8mm", GOOD, "i8mm"),
        ("Features", "fp asimd evtstrm asimddp", GOOD, "asimddp"),  # Cortex-A76
        ("Features", "fp asimd evtstrm crc32", WARNING, "plain ASIMD kernels"),  # Cortex-A72
    ],
)
def test_the_processor_says_which_kernels_run(machine: Machine, key: str, flags: str, level: Level, said: str) -> None:
    machine.write("/proc/cpuinfo", CORE.format(key=key, flags=flags) * 2)
    found = only(check_processor(machine.system))
    assert (levels([found]), said in found.text) == ([level], True), found


def test_what_only_some_cores_have_does_not_count(machine: Machine) -> None:
    little, big = (CORE.format(key="Features", flags=flags) for flags in ("asimd", "asimd asimddp"))
    machine.write("/proc/cpuinfo", little + big)
    assert levels(check_processor(machine.system)) == [WARNING]


def test_a_hidden_processor_is_told(machine: Machine) -> None:
    assert "ProcSubset" in only(check_processor(machine.system)).remedy


# The board.


def meminfo(total: int, available: int, free: int) -> str:
    return f"MemTotal: {total} kB\nMemFree: {free} kB\nMemAvailable: {available} kB\n"


NEEDED = NeededMemory(model=172_000_000, slots=94_000_000, prompt=94_000_000, run=50_000_000)


@pytest.mark.parametrize(
    ("total", "available", "limit", "level", "said"),
    [
        (4_000_000, 3_000_000, None, GOOD, "540 MB at most (172 MB of model, 94 MB of full slots, 94 MB while"),
        (1_000_000, 200_000, None, WARNING, "if it does not run already"),
        (400_000, 390_000, None, WARNING, "ended when its slots are full"),
        (200_000, 190_000, None, PROBLEM, "0.2 GB of memory"),
        (4_000_000, 3_000_000, 10**9, GOOD, "the unit may take 1.0 GB (MemoryMax)"),
        (4_000_000, 3_000_000, 4 * 10**8, WARNING, "ended when its slots are full"),
        (4_000_000, 3_000_000, 2 * 10**8, PROBLEM, "the unit may take 0.2 GB"),
    ],
)
def test_memory_is_compared_with_what_the_daemon_needs(
    machine: Machine, total: int, available: int, limit: int | None, level: Level, said: str
) -> None:
    machine.write("/proc/meminfo", meminfo(total, available, available))
    found = only(board.check_memory(machine.system, NEEDED, limit))
    assert (found.level, said in found.text) == (level, True), found


@pytest.mark.model
def test_needed_memory_is_added_up_from_model_and_configuration(default_bundle: Bundle) -> None:
    manifest = default_bundle.manifest
    needed = find_needed_memory(manifest, EngineConfig(slots=3, context_length=1000))
    # 30 layers of keys and values, 3 heads of 64 numbers each, one byte a number; four while a prompt is read.
    assert needed.slots == 3 * 1000 * 2 * 30 * 3 * 64
    assert needed.prompt == 4 * 1000 * 2 * 30 * 3 * 64
    assert needed.model == default_bundle.size_bytes
    # 256 rows of 9 heads of 64 numbers in float32, and what ONNX Runtime makes of them.
    assert needed.run == 96 * 256 * 9 * 64 * 4
    assert needed.total == needed.start + needed.slots + needed.prompt + needed.run
    capped = find_needed_memory(manifest, EngineConfig(kv_bytes=64 * 2**20))
    assert capped.slots + capped.prompt == 64 * 2**20
    longest = find_needed_memory(manifest, EngineConfig(slots=1, context_length=2 * manifest.context_length))
    assert longest.slots == manifest.context_length * 2 * 30 * 3 * 64


@pytest.mark.model
@pytest.mark.parametrize(
    ("engine", "measured"),
    [
        ({"kv_bytes": 64 * 2**20}, 414_085_120),
        ({}, 520_130_560),
        ({"slots": 1, "context_length": 512, "solo_prefill_chunk": 64}, 328_982_528),
    ],
)
def test_needed_memory_is_above_what_was_measured_and_not_far(
    default_bundle: Bundle, engine: dict[str, Any], measured: int
) -> None:
    """Against VmHWM of a daemon whose slots were all filled with long prompts."""
    needed = find_needed_memory(default_bundle.manifest, EngineConfig(**engine))
    assert measured < needed.total < 1.15 * measured


@pytest.mark.parametrize(("said", "limit"), [("850000000", 850_000_000), ("infinity", None), ("", None)])
def test_the_units_memory_limit(machine: Machine, said: str, limit: int | None) -> None:
    machine.programs["systemctl"] = f"LoadState=loaded\nMemoryMax={said}\n"
    assert running.find_memory_limit(machine.system, "hearthd.service") == limit


def test_memory_without_a_model_is_only_told(machine: Machine) -> None:
    assert levels(board.check_memory(machine.system, NEEDED)) == [NOTE]
    machine.write("/proc/meminfo", meminfo(1_000_000, 1, 1))
    assert levels(board.check_memory(machine.system, None)) == [NOTE]


@pytest.mark.parametrize(
    ("path", "text", "level"),
    [
        ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io memory pids\n", GOOD),
        ("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n", WARNING),  # a Raspberry Pi as it comes
        ("/proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t4\t27\t1\n", GOOD),
        ("/proc/cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\n", WARNING),
        ("/proc/nothing", "", WARNING),
    ],
)
def test_the_memory_cgroup(machine: Machine, path: str, text: str, level: Level) -> None:
    machine.write(path, text)
    found = only(board.check_memory_cgroup(machine.system))
    assert levels([found]) == [level]
    assert ("cgroup_enable=memory" in found.remedy) == (level is WARNING)


THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"


@pytest.mark.parametrize(
    ("bits", "expected", "said"),
    [
        ("0", [GOOD], "neither"),
        ("50005", [PROBLEM], "voltage is too low; the processor is throttled"),
        ("50000", [WARNING], "since the board was started: the supply voltage is too low; the processor is throttled"),
        ("80008", [PROBLEM], "soft temperature limit"),
        ("d0008", [PROBLEM, WARNING], "soft temperature limit"),
    ],
)
def test_power_from_the_firmware(machine: Machine, bits: str, expected: list[Level], said: str) -> None:
    machine.write(THROTTLED, f"{bits}\n")
    from_file = list(board.check_power(machine.system))
    assert levels(from_file) == expected
    assert said in from_file[0].text
    (machine.root / THROTTLED.lstrip("/")).unlink()
    machine.programs["vcgencmd"] = f"throttled=0x{bits}\n"
    assert list(board.check_power(machine.system)) == from_file


def test_the_remedy_fits_what_is_short(machine: Machine) -> None:
    machine.write(THROTTLED, "80008")
    assert "cool the board" in only(board.check_power(machine.system)).remedy
    machine.write(THROTTLED, "1")
    assert "power supply" in only(board.check_power(machine.system)).remedy


@pytest.mark.parametrize(("alarm", "level"), [("0", GOOD), ("1", PROBLEM)])
def test_power_from_a_voltage_monitor(machine: Machine, alarm: str, level: Level) -> None:
    machine.write("/sys/class/hwmon/hwmon1/in0_lcrit_alarm", f"{alarm}\n")
    assert levels(board.check_power(machine.system)) == [level]


def test_a_machine_that_says_nothing_of_its_power(machine: Machine) -> None:
    assert levels(board.check_power(machine.system)) == [NOTE]


@pytest.mark.parametrize(
    ("zones", "level"), [([], NOTE), ([45000], GOOD), ([45000, 76000], WARNING), ([91000, 45000], PROBLEM)]
)
def test_the_hottest_zone_counts(machine: Machine, zones: list[int], level: Level) -> None:
    for number, millidegrees in enumerate(zones):
        machine.write(f"/sys/class/thermal/thermal_zone{number}/temp", f"{millidegrees}\n")
    assert levels(board.check_temperature(machine.system)) == [level]


@pytest.mark.parametrize(("synchronised", "level"), [(True, GOOD), (False, WARNING), (None, NOTE)])
def test_the_clock(machine: Machine, synchronised: bool | None, level: Level) -> None:
    machine.synchronised = synchronised
    found = only(board.check_clock(machine.system))
    assert levels([found]) == [level]
    assert ("no clock of its own" in found.text) == (synchronised is False)


# The disk.


@pytest.mark.parametrize(("free", "level"), [(10**10, GOOD), (4 * 10**8, WARNING), (10**7, PROBLEM)])
def test_free_space(machine: Machine, free: int, level: Level) -> None:
    machine.free = free
    assert levels(disk.check_free_space(machine.system, Path("/var/lib/hearth/models"))) == [level]


MOUNTS = "/dev/mmcblk0p2 / ext4 {root},noatime 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/sda1 /var/lib\\040x ext4 {data} 0 0\n"


@pytest.mark.parametrize(
    ("root", "data", "directory", "level"),
    [
        ("rw", "rw", "/var/lib/hearth", GOOD),
        ("ro", "rw", "/var/lib/hearth", PROBLEM),
        ("ro", "rw", "/var/lib x/hearth", GOOD),
        ("rw", "ro", "/var/lib x/hearth", PROBLEM),
    ],
)
def test_a_read_only_remount_is_found_where_it_matters(
    machine: Machine, root: str, data: str, directory: str, level: Level
) -> None:
    machine.write("/proc/self/mounts", MOUNTS.format(root=root, data=data))
    assert levels(disk.check_writable(machine.system, Path(directory))) == [level]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, [NOTE]),
        ({"/sys/fs/ext4/mmcblk0p2/errors_count": "0"}, [GOOD]),
        ({"/sys/fs/ext4/mmcblk0p2/errors_count": "3"}, [PROBLEM]),
        ({"/sys/block/mmcblk0/device/life_time": "0x01 0x02"}, [GOOD]),
        ({"/sys/block/mmcblk0/device/life_time": "0x01 0x09"}, [WARNING]),
        ({"/sys/block/mmcblk0/device/life_time": "0x0b 0x01"}, [PROBLEM]),
        (
            {
                "/sys/block/mmcblk0/device/life_time": "0x01 0x01",
                "/sys/block/mmcblk0/device/pre_eol_info": "0x03",
            },
            [WARNING],
        ),
    ],
)
def test_what_the_disk_says_of_itself(machine: Machine, files: dict[str, str], expected: list[Level]) -> None:
    for path, text in files.items():
        machine.write(path, f"{text}\n")
    assert levels(disk.check_disk_health(machine.system)) == expected


# Certificate, key, tokens.


@pytest.fixture
def with_tls(tmp_path: Path) -> Config:
    files = make_tls_files(tmp_path)  # for two days
    files.key.chmod(0o600)
    renew_certificate(files, days=400)
    files.key.chmod(0o600)
    return make_config(tmp_path, tls={"certificate": files.certificate, "key": files.key})


@pytest.mark.parametrize(
    ("days", "level", "said"),
    [
        (0, GOOD, "valid until"),
        (390, WARNING, "in 9 days"),
        (401, PROBLEM, "expired on"),
        (-1, PROBLEM, "not valid before"),
    ],
)
def test_certificate_dates(with_tls: Config, days: int, level: Level, said: str) -> None:
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1 if days >= 0 else 0)
    certificate, key = check_certificate(with_tls, now)
    assert (levels([certificate, key]), said in certificate.text) == ([level, GOOD], True), certificate


def test_a_key_that_others_may_read(with_tls: Config) -> None:
    assert with_tls.tls.key
    with_tls.tls.key.chmod(0o640)
    *_, key = check_certificate(with_tls)
    assert (levels([key]), key.remedy) == ([WARNING], f"chmod 600 {with_tls.tls.key}")


def test_a_certificate_that_is_none(with_tls: Config, tmp_path: Path) -> None:
    assert with_tls.tls.certificate
    with_tls.tls.certificate.write_text("none")
    assert levels(check_certificate(with_tls)) == [PROBLEM]
    assert levels(check_certificate(make_config(tmp_path))) == [NOTE]


@pytest.mark.parametrize("broken", ["server.crt", "server.key"])
def test_the_remedy_for_a_broken_pair_works(tmp_path: Path, broken: str) -> None:
    config = make_config(
        tmp_path,
        server={"tcp": ("0.0.0.0:0",)},
        tls={"directory": tmp_path / "tls"},
        auth={"token_file": tmp_path / "tokens"},
    )
    make_certificate(tmp_path / "tls")
    assert levels(check_certificate(config)) == [GOOD, GOOD]
    good_pair = {path: path.read_bytes() for path in (tmp_path / "tls").iterdir()}
    (tmp_path / "tls" / broken).write_text("torn")
    (found,) = check_certificate(config)
    # OpenSSL's own words say nothing to a person.
    assert "_ssl" not in found.text
    assert "[" not in found.text
    for path, content in good_pair.items():
        path.write_bytes(content)
    assert levels(check_certificate(config)) == [GOOD, GOOD], "put the pair back"
    (tmp_path / "tls" / broken).write_text("torn")
    command = found.remedy.partition("or: sudo ")[2].partition("; ")[0]
    assert not make_certificate(tmp_path / "tls"), "`hearthd pair` keeps what is there"
    subprocess.run(command.split(), check=True)
    assert "sudo hearthd pair NAME --open-lan, which makes new ones" in found.remedy
    assert make_certificate(tmp_path / "tls")
    assert levels(check_certificate(config)) == [GOOD, GOOD]


def test_remedies_of_other_certificates(with_tls: Config, tmp_path: Path) -> None:
    assert with_tls.tls.certificate
    content = with_tls.tls.certificate.read_bytes()
    with_tls.tls.certificate.write_text("torn")
    (found,) = check_certificate(with_tls)
    # `hearthd pair` makes none where the configuration names files.
    assert found.remedy.startswith(f"put the pair back: {with_tls.tls.certificate} and its key")
    with_tls.tls.certificate.write_bytes(content)
    (tmp_path / "clients").write_text("torn")
    tls = {"certificate": with_tls.tls.certificate, "key": with_tls.tls.key, "clients": tmp_path / "clients"}
    (found,) = check_certificate(make_config(tmp_path, tls=tls))
    assert found.remedy.startswith("put the authority's certificate back")


@pytest.mark.parametrize(
    ("tcp", "has_tokens", "file", "command"),
    [
        (("0.0.0.0:0",), True, None, "--open-lan"),
        ((), True, None, "--open-lan"),
        (("127.0.0.1:0",), True, None, "--address HOST:PORT"),
        (("127.0.0.1:0",), False, None, "--address HOST:PORT --open-lan"),
        (("127.0.0.1:0",), True, Path("my own.toml"), "--address HOST:PORT --config 'my own.toml'"),
        (("127.0.0.1:0", "0.0.0.0:0"), True, Path("own.toml"), "--open-lan --config own.toml"),
    ],
)
def test_the_remedy_for_a_missing_pair_opens_no_more_than_is_open(
    tmp_path: Path, tcp: tuple[str, ...], has_tokens: bool, file: Path | None, command: str
) -> None:
    tokens = tmp_path / "tokens"
    tokens.touch(mode=0o600)
    config = make_config(
        tmp_path,
        server={"tcp": tcp},
        tls={"directory": tmp_path / "none"},
        auth={"token_file": tokens if has_tokens else None},
    )
    (found,) = check_certificate(config, file=file)
    assert (found.level, "No such file or directory" in found.text) == (PROBLEM, True)
    assert found.remedy.startswith(f"put the pair back, or: sudo hearthd pair NAME {command}, which makes new ones")
    if has_tokens:
        assert only(check_tokens(config, file=file)).remedy == f"hearthd pair NAME {command}"


def test_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    config = make_config(tmp_path, auth={"token_file": path})
    assert levels(check_tokens(make_config(tmp_path))) == [NOTE]
    assert "hearthd token create" in only(check_tokens(config)).remedy
    create_token(path, "kitchen")
    assert levels(check_tokens(config)) == [GOOD]
    create_token(path, "cellar", role="guest")
    assert levels(check_tokens(config)) == [WARNING, GOOD]
    path.chmod(0o644)
    found = only(check_tokens(config))
    assert (levels([found]), found.remedy) == ([PROBLEM], f"run: chmod 600 {path}")
    path.write_text("# none\n")
    path.chmod(0o600)
    assert levels(check_tokens(config)) == [WARNING]


# The model.


def test_a_flipped_byte_of_the_model_is_found(tmp_path: Path) -> None:
    config = make_config(tmp_path, model={"name": "small"})
    bundle, findings = check_model(config)
    assert (bundle, levels(findings)) == (None, [PROBLEM])
    write_bundle(tmp_path / "small", name="small")
    bundle, findings = check_model(config)
    assert bundle is not None
    assert levels(findings) == [GOOD]
    damaged = tmp_path / "small/tokenizer.json"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert levels(check_model(config)[1]) == [PROBLEM]
    assert levels(check_model(config, verify=False)[1]) == [GOOD]


def test_the_expected_speed_is_the_memorys_by_what_a_token_reads(tmp_path: Path) -> None:
    bundle: Bundle = tiny_bundle(tmp_path / "bundle", tiny_checkpoint(tmp_path))
    slow, fast = (only(check_speed(bundle, 2, bandwidth)).text for bandwidth in (1e6, 1e9))
    rates = [float(text.split("more than ")[1].split(" ")[0]) for text in (slow, fast)]
    assert rates[1] / max(rates[0], 1) > 100
    assert "GB/s to 1 threads" in only(check_speed(bundle, 1)).text


# The running daemon.

SHOWN = (
    "LoadState=loaded\nActiveState={state}\nResult=exit-code\nNRestarts={restarts}\nStatusText={status}\nMainPID=7\n"
)


@pytest.mark.parametrize(
    ("said", "level"),
    [
        ("", NOTE),
        ("LoadState=not-found\n", NOTE),
        (SHOWN.format(state="active", restarts=0, status="serving x"), GOOD),
        (SHOWN.format(state="active", restarts=3, status="serving x"), WARNING),
        (SHOWN.format(state="active", restarts=0, status="serving x; needs a restart: engine.slots"), WARNING),
        (SHOWN.format(state="inactive", restarts=0, status=""), WARNING),
        (SHOWN.format(state="failed", restarts=0, status=""), PROBLEM),
    ],
)
def test_the_unit(machine: Machine, said: str, level: Level) -> None:
    machine.programs["systemctl"] = said
    assert levels(running.check_unit(machine.system, "hearthd.service")) == [level]


@pytest.mark.parametrize(("limit", "level"), [(1024, GOOD), (128, WARNING)])
def test_file_descriptors_are_the_daemons_own(machine: Machine, tmp_path: Path, limit: int, level: Level) -> None:
    machine.programs["systemctl"] = SHOWN.format(state="active", restarts=0, status="")
    machine.write("/proc/7/limits", f"Limit  Soft Limit  Hard Limit  Units\nMax open files  {limit}  {limit}  files\n")
    found = only(running.check_descriptors(machine.system, make_config(tmp_path), "hearthd.service"))
    assert levels([found]) == [level]
    assert f"the daemon's limit is {limit}" in found.text


@asynchronous
async def test_the_socket_of_a_daemon_that_serves(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with serving(config):
        assert levels(await asyncio.to_thread(lambda: list(running.check_socket(config)))) == [GOOD]
    assert levels(running.check_socket(config)) == [PROBLEM]


@asynchronous
async def test_a_daemon_that_asks_for_a_token_answers_too(tmp_path: Path) -> None:
    create_token(tmp_path / "tokens", "x")
    config = make_config(tmp_path, auth={"token_file": tmp_path / "tokens", "unix_needs_token": True})
    async with serving(config):
        assert levels(await asyncio.to_thread(lambda: list(running.check_socket(config)))) == [GOOD]


def test_a_socket_that_nobody_answers(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(config.server.unix_socket))
    assert levels(running.check_socket(config)) == [PROBLEM]
    assert levels(running.check_socket(make_config(tmp_path, server={"unix_socket": None}))) == [NOTE]


# All together.


def test_a_broken_configuration_is_told_and_the_machine_is_looked_at_all_the_same(machine: Machine) -> None:
    def load() -> Config:
        raise ConfigError("x.toml: engine.slots is 99; give a whole number from 1 to 64")

    *others, last = diagnose(machine.system, load)
    assert (last.check, last.level, last.remedy) == ("configuration", PROBLEM, "give a whole number from 1 to 64")
    assert {finding.check for finding in others} >= {"processor", "memory cgroup", "power", "clock", "service"}


def test_what_may_not_be_looked_at_is_a_note_and_ends_nothing(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterable[Finding]:
        raise PermissionError(13, "Permission denied", "/var/lib/hearth")

    monkeypatch.setattr(disk, "check_writable", refuse)
    found = {
        finding.check: finding for finding in diagnose(machine.system, lambda: make_config(tmp_path), is_quick=True)
    }
    assert (found["disk"].level, found["disk"].remedy) == (NOTE, "run this with sudo")
    assert "model" in found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    for name in ("STATE", "RUNTIME", "CONFIGURATION"):
        monkeypatch.setenv(f"{name}_DIRECTORY", str(tmp_path / name.lower()))

    def run_doctor(*words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "hearthd", "doctor", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    return run_doctor


def test_the_program_tells_a_person_what_helps(run: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    done = run("--quick")
    assert (done.returncode, done.stderr) == (1, "")
    assert "PROBLEM  model" in done.stdout
    assert "-> " in done.stdout


def test_the_program_gives_scripts_one_object(
    run: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    found = json.loads(run("--json", "--quick").stdout)
    assert found["has_problem"] is True
    assert {key for finding in found["findings"] for key in finding} == {"check", "level", "text", "remedy"}


@asynchronous
async def test_a_machine_without_problems_is_exit_code_0(
    run: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    write_bundle(tmp_path / "state/models/smollm2-135m", name="smollm2-135m")
    async with serving(make_config(tmp_path, server={"unix_socket": tmp_path / "runtime/hearthd.sock"})):
        done = await asyncio.to_thread(run, "--json", "--quick")
    problems = [each for each in json.loads(done.stdout)["findings"] if each["level"] == "problem"]
    # What this machine itself may lack is its own affair.
    assert [each for each in problems if each["check"] in ("socket", "model", "configuration", "tokens")] == []
    assert done.returncode == int(bool(problems))
