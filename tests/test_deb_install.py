"""The Debian packages in the hands of dpkg, apt and systemd, without a network: install, upgrade, rollback, removal.

Boots a root of the Debian release that they are for (booted_root) and does there what the owner of a board does. Each
test begins and ends with the first version installed and answering. `make deb-test` builds the packages first, which
takes minutes. The same on Arm, in a whole emulated board, is `make board`.
"""

import filecmp
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import booted_root
from booted_root import Machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "deploy/debian"))  # scripts of a directory, not a package

from targets import SUITES, Suite  # noqa: E402

MODEL = "hearth-model-smollm2-135m"
NEW, NEWER = "2.0", "3.0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("HEARTH_PACKAGES" not in os.environ, reason="needs built packages: run `make deb-test`"),
    pytest.mark.skipif(not booted_root.can_boot(), reason="needs root, mmdebstrap and systemd-nspawn"),
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the root is of amd64"),
]


def change(package: Path, work: Path, version: str, script: str = "true") -> Path:
    """Return the package with another version, and with what a shell script changes in its files."""
    files = work / f"files-{version}"
    subprocess.run(["dpkg-deb", "--raw-extract", str(package), str(files)], check=True)
    control = files / "DEBIAN/control"
    lines = control.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = [f"Version: {version}\n" if line.startswith("Version: ") else line for line in lines]
    control.write_text("".join(changed), encoding="utf-8")
    subprocess.run(["sh", "-ec", script], check=True, cwd=files)
    made = work / f"{package.name.partition('_')[0]}_{version}.deb"
    subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "--build", str(files), str(made)], check=True)
    shutil.rmtree(files)
    return made


@pytest.fixture(scope="module")
def packages() -> dict[str, Path]:
    """Those that HEARTH_PACKAGES names."""
    return find_packages(Path(os.environ["HEARTH_PACKAGES"]))


def find_packages(directory: Path) -> dict[str, Path]:
    (hearth,) = directory.glob("hearth_*_amd64.deb")
    (model,) = directory.glob(f"{MODEL}_*.deb")
    return {"hearth": hearth, "model": model}


def version_of(package: Path) -> str:
    command = ["dpkg-deb", "--field", str(package), "Version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def release_of(package: Path) -> Suite:
    """The release that a package says it is for."""
    return next(suite for suite in SUITES.values() if version_of(package).endswith(f"+{suite.version}"))


@pytest.fixture(scope="module")
def machine(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """With the packages installed, both in one command."""
    archive = booted_root.prepare(ROOT, release_of(packages["hearth"]).name)
    with booted_root.booted(archive, tmp_path_factory.mktemp("machine")) as booted:
        # Power cuts are not for these tests, and thousands of fsyncs take longer than all the rest.
        (booted.root / "etc/dpkg/dpkg.cfg.d/unsafe-io").write_text("force-unsafe-io\n", encoding="ascii")
        give(booted, *packages.values())
        names = [f"/debs/{path.name}" for path in packages.values()]
        booted.run("apt-get", "install", "--yes", *names)
        yield booted


@pytest.fixture(autouse=True)
def answering(machine: Machine, packages: dict[str, Path]) -> Iterator[None]:
    assert_answers(machine)
    yield
    assert_answers(machine)
    assert version(machine) == version_of(packages["hearth"])
    assert [path.name for path in (machine.root / "opt").iterdir()] == ["hearth"], "something was left behind"


def give(machine: Machine, *files: Path) -> None:
    """Copy files to /debs; a hard link where that can be."""
    (machine.root / "debs").mkdir(exist_ok=True)
    for path in files:
        shutil.copy(path, machine.root / "debs")


def install(machine: Machine, package: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    give(machine, package)
    done = machine.run("apt-get", "install", "--yes", "--allow-downgrades", f"/debs/{package.name}", check=check)
    (machine.root / "debs" / package.name).unlink()
    return done


def reset(machine: Machine, packages: dict[str, Path]) -> None:
    install(machine, packages["hearth"])


def version(machine: Machine) -> str:
    return machine.run("dpkg-query", "--show", "--showformat=${Version}", "hearth").stdout


def assert_answers(machine: Machine) -> None:
    assert machine.property("hearthd.service", "ActiveState") == "active"
    # What it says is for other tests; that the packaged parts produce an answer is for these.
    asked = machine.run("hearth", "ask", "--temperature", "0", "--max-tokens", "16", "What is the capital of France?")
    assert len(asked.stdout.split()) > 1


def main_pid(machine: Machine) -> str:
    return machine.property("hearthd.service", "MainPID")


def test_lintian_finds_no_error(packages: dict[str, Path]) -> None:
    command = ["lintian", "--allow-root", "--fail-on", "error", *map(str, packages.values())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert (done.returncode, [line for line in done.stdout.splitlines() if line.startswith("E:")]) == (0, [])


def test_a_second_build_gives_the_same_bytes(packages: dict[str, Path], tmp_path: Path) -> None:
    """Of another user, in another time zone, at another terminal."""
    (python,) = (python for python, suite in SUITES.items() if suite == release_of(packages["hearth"]))
    command = [sys.executable, str(ROOT / "deploy/debian/build.py"), "--quick", "--arch", "amd64", "--python", python]
    elsewhere = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C", "COLUMNS": "40", "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=elsewhere,
        umask=0o077,
    )
    assert done.returncode == 0, done.stderr
    for name, package in find_packages(tmp_path).items():
        assert package.name == packages[name].name
        assert filecmp.cmp(package, packages[name], shallow=False), name


def test_installing_is_all_that_it_takes_without_a_network(machine: Machine) -> None:
    # That it answers is what the fixture saw. No interface but loopback:
    assert [line.split(":")[0].strip() for line in machine.run("cat", "/proc/net/dev").stdout.splitlines()[2:]] == [
        "lo"
    ]
    assert machine.run("dpkg", "--verify", "hearth", MODEL).stdout == ""
    assert machine.property("hearthd.service", "UnitFileState") == "enabled"
    # One copy of the model, which dpkg owns.
    link = machine.root / "var/lib/private/hearth/models/smollm2-135m"
    assert link.readlink() == Path("/usr/share/hearth/models/smollm2-135m")
    for program in ("hearth", "hearthd"):
        assert machine.run(program, "--help").stdout.startswith("usage:")


def test_an_upgrade_and_a_downgrade_keep_what_is_the_users(
    machine: Machine, packages: dict[str, Path], tmp_path: Path
) -> None:
    configuration = machine.root / "etc/hearth/hearthd.toml"
    shipped = configuration.read_text(encoding="utf-8")
    configuration.write_text(shipped + "\n# mine\n", encoding="utf-8")
    state = machine.root / "var/lib/private/hearth"
    (state / "tokens").write_text("mine\n", encoding="utf-8")
    before = main_pid(machine)

    install(machine, change(packages["hearth"], tmp_path, NEW))
    assert version(machine) == NEW
    assert_answers(machine)
    assert main_pid(machine) != before, "the daemon still runs the old version"
    upgraded = main_pid(machine)

    install(machine, packages["hearth"])
    assert main_pid(machine) != upgraded
    assert configuration.read_text(encoding="utf-8") == shipped + "\n# mine\n"
    assert (state / "tokens").read_text(encoding="utf-8") == "mine\n"
    configuration.write_text(shipped, encoding="utf-8")
    (state / "tokens").unlink()


def test_people_of_the_group_may_ask_where_the_network_wants_a_token(machine: Machine) -> None:
    machine.run("useradd", "--create-home", "somebody")
    machine.run("usermod", "--append", "--groups", "hearth", "somebody")
    asked = machine.run(
        "setpriv", "--reuid=somebody", "--regid=somebody", "--init-groups",
        "hearth", "ask", "--address", "unix:///run/hearth/hearthd.sock", "--max-tokens", "4", "Hello",
    )  # fmt: skip
    assert asked.stdout.split()
    machine.run("userdel", "--remove", "somebody")


def test_an_upgrade_from_a_version_without_a_user_of_its_own_gives_it_what_was_the_old_ones(
    machine: Machine, packages: dict[str, Path], tmp_path: Path
) -> None:
    def uid(path: str) -> str:
        return machine.run("stat", "--format=%u", path).stdout.strip()

    state = "/var/lib/private/hearth"
    machine.run("systemctl", "stop", "hearthd")
    machine.run("userdel", "hearth")
    machine.run("systemctl", "start", "hearthd")
    machine.run("install", "--mode=600", f"--owner={uid(state)}", "/dev/null", f"{state}/tokens")
    assert int(uid(state)) >= 61184, "the user is not one of the moment"
    install(machine, change(packages["hearth"], tmp_path, NEW))
    user = machine.run("id", "--user", "hearth").stdout.strip()
    assert int(user) < 1000
    assert {uid(state), uid(f"{state}/tokens"), uid("/run/hearth/hearthd.sock")} == {user}
    (machine.root / state.lstrip("/") / "tokens").unlink()
    reset(machine, packages)


def test_a_version_that_does_not_get_ready_gives_way_to_the_one_before(
    machine: Machine, packages: dict[str, Path], tmp_path: Path
) -> None:
    # As with a configuration that a new version no longer takes; and its unit is another one too.
    broken = (
        "printf '#!/bin/sh\\nexit 78\\n' >opt/hearth/bin/hearthd; echo '# new' >>usr/lib/systemd/system/hearthd.service"
    )
    failed = install(machine, change(packages["hearth"], tmp_path, NEW, broken), check=False)
    assert failed.returncode != 0
    assert "going back to the one before" in failed.stdout
    assert_answers(machine)
    unit = machine.root / "usr/lib/systemd/system/hearthd.service"
    assert "# new" not in unit.read_text(encoding="utf-8")

    # The same once more, and the old one still answers; apt does this by itself whenever it runs.
    again = machine.run("dpkg", "--configure", "hearth", check=False)
    assert again.returncode != 0
    assert_answers(machine)

    # What was wrong with the refused one can be seen to.
    shutil.copy(machine.root / "opt/hearth/bin/hearthd", machine.root / "opt/hearth.refused/bin/hearthd")
    machine.run("dpkg", "--configure", "hearth")
    assert version(machine) == NEW
    assert_answers(machine)
    assert "# new" in unit.read_text(encoding="utf-8")
    reset(machine, packages)


def test_a_newer_version_takes_the_place_of_a_refused_one(
    machine: Machine, packages: dict[str, Path], tmp_path: Path
) -> None:
    broken = "printf '#!/bin/sh\\nexit 78\\n' >opt/hearth/bin/hearthd; touch opt/hearth/only-in-this-one"
    assert install(machine, change(packages["hearth"], tmp_path, NEW, broken), check=False).returncode != 0
    install(machine, change(packages["hearth"], tmp_path, NEWER))
    assert version(machine) == NEWER
    assert not (machine.root / "opt/hearth/only-in-this-one").exists()
    reset(machine, packages)


def test_an_upgrade_that_cannot_be_unpacked_changes_nothing(
    machine: Machine, packages: dict[str, Path], tmp_path: Path
) -> None:
    before = main_pid(machine)
    # It breaks off in the middle of its files, as with a full disk or a bad stick.
    cut = change(packages["hearth"], tmp_path, NEW)
    os.truncate(cut, cut.stat().st_size * 6 // 10)
    give(machine, cut)
    failed = machine.run("dpkg", "--install", f"/debs/{cut.name}", check=False)
    assert failed.returncode != 0
    assert "unexpected end of file" in failed.stdout
    assert main_pid(machine) == before
    assert machine.run("dpkg", "--verify", "hearth").stdout == ""


def test_maintainer_scripts_may_run_twice(machine: Machine) -> None:
    info, old = "/var/lib/dpkg/info/hearth", version(machine)
    for _ in range(2):
        machine.run(f"{info}.postinst", "configure", old)
        machine.run(f"{info}.postinst", "triggered", "/usr/share/hearth/models")
        machine.run(f"{info}.prerm", "upgrade", NEW)
        machine.run(f"{info}.preinst", "upgrade", old)
        machine.run(f"{info}.postinst", "abort-upgrade", NEW)


def test_a_model_can_come_later_be_replaced_and_go(machine: Machine, packages: dict[str, Path], tmp_path: Path) -> None:
    before = main_pid(machine)
    install(machine, change(packages["model"], tmp_path, NEW))
    assert_answers(machine)
    assert main_pid(machine) != before, "the daemon still holds the old model"
    machine.run("apt-get", "remove", "--yes", MODEL)
    link = machine.root / "var/lib/private/hearth/models/smollm2-135m"
    assert not link.is_symlink()
    machine.run("systemctl", "stop", "hearthd")
    install(machine, packages["model"])
    assert machine.property("hearthd.service", "ActiveState") == "active"


def test_removing_keeps_what_is_the_users_and_installing_finds_it_again(
    machine: Machine, packages: dict[str, Path]
) -> None:
    state = machine.root / "var/lib/private/hearth"
    (state / "tokens").write_text("mine\n", encoding="utf-8")
    machine.run("apt-get", "remove", "--yes", "hearth")
    assert not (machine.root / "opt/hearth").exists()
    assert (machine.root / "etc/hearth/hearthd.toml").is_file()
    assert (state / "tokens").read_text(encoding="utf-8") == "mine\n"
    install(machine, packages["hearth"])
    assert (state / "tokens").read_text(encoding="utf-8") == "mine\n"
    (state / "tokens").unlink()


def test_purging_leaves_nothing(machine: Machine, packages: dict[str, Path]) -> None:
    (machine.root / "etc/hearth/kitchen.toml").write_text('[server]\ntcp = ["127.0.0.1:50061"]\n', encoding="utf-8")
    machine.run("systemctl", "enable", "--now", "hearthd@kitchen")
    assert (machine.root / "var/lib/private/hearth-kitchen").is_dir()
    neighbour = machine.root / "var/lib/hearth-stone"
    neighbour.mkdir()
    machine.run("apt-get", "purge", "--yes", "hearth", MODEL)
    neighbour.rmdir()
    search = ["find", "/", "-xdev", "-iname", "*hearth*", "-not", "-path", "/debs/*"]
    assert machine.run(*search).stdout.split() == []
    give(machine, *packages.values())
    names = [f"/debs/{path.name}" for path in packages.values()]
    machine.run("apt-get", "install", "--yes", *names)
