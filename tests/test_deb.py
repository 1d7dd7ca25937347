"""The Debian packages, without building one: what they are locked to, their control data, pages and completions.

And what is said of them: the guide for a Raspberry Pi, and the container's recipe. tests/test_deb_install.py builds and
installs them.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from hearth.__main__ import main as client_main
from hearthd.__main__ import main as daemon_main
from hearthd.configuration.config import load_config, settings

ROOT = Path(__file__).resolve().parent.parent
DEBIAN = ROOT / "deploy/debian"
sys.path.insert(0, str(DEBIAN))  # scripts of a directory, not a package

import build  # noqa: E402
import documents  # noqa: E402
import lock  # noqa: E402
from configuration_page import configuration_page  # noqa: E402
from deb import SCRIPTS, Package, write_deb  # noqa: E402
from interpreter import find_interpreter  # noqa: E402
from targets import ROOT as TARGETS_ROOT  # noqa: E402
from targets import SUITES, TARGETS, Target  # noqa: E402

ANY_TIME = 1_700_000_000
ARM64 = Target("arm64", "3.11")


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# --- the lock file ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each distribution."""
    text = lock.LOCK.read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *options = line.split()
            name, version = requirement.split("==")
            found[name] = (version, [option.removeprefix("--hash=sha256:") for option in options])
    return found


def test_every_wheel_is_locked_by_a_hash_and_no_address_stands_there(locked: dict[str, tuple[str, list[str]]]) -> None:
    assert all(hashes for _, hashes in locked.values())
    assert [each for _, hashes in locked.values() for each in hashes if not re.fullmatch(r"[0-9a-f]{64}", each)] == []
    assert re.search(r"https?:|index-url|find-links", lock.LOCK.read_text(encoding="utf-8")) is None


def test_all_that_the_daemon_needs_is_locked_at_the_pinned_version(locked: dict[str, tuple[str, list[str]]]) -> None:
    remedy = "run `make deb-lock` and commit what it changes"
    required = {normalise(re.split(r"[\s<>=!~;\[]", line)[0]) for line in lock.requirements()}
    assert required - locked.keys() == set(), remedy
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: version for name, (version, _) in locked.items()} == {name: pins.get(name) for name in locked}, remedy


def test_extension_modules_are_locked_for_every_target(locked: dict[str, tuple[str, list[str]]]) -> None:
    # One wheel for each processor and Python; those with the stable interface have one for each processor.
    assert {name: len(locked[name][1]) for name in ("onnxruntime", "numpy", "grpcio")} == dict.fromkeys(
        ("onnxruntime", "numpy", "grpcio"), len(TARGETS)
    )
    assert len(locked["tokenizers"][1]) == 2


def test_one_version_for_all_targets_or_none() -> None:
    same = lock.merge([{"a": ("1", "00"), "b": ("2", "11")}, {"a": ("1", "22")}])
    assert same == "a==1 \\\n    --hash=sha256:00 \\\n    --hash=sha256:22\nb==2 \\\n    --hash=sha256:11\n"
    with pytest.raises(ValueError, match="a has versions 1, 2"):
        lock.merge([{"a": ("1", "00")}, {"a": ("2", "22")}])


# --- control data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.architecture}-{target.python}")
def test_a_package_takes_no_other_python_than_the_one_it_was_built_for(target: Target) -> None:
    depends = build.hearth_package(target, "1.2").relations["Depends"]
    major, minor = map(int, target.python.split("."))
    assert f"python3 (>= {major}.{minor}), python3 (<< {major}.{minor + 1})" in depends
    assert build.hearth_package(target, "1.2").version == f"1.2+{SUITES[target.python].version}"


def test_packages_for_two_releases_have_two_names_of_which_the_later_is_newer() -> None:
    first, second = (build.hearth_package(Target("arm64", python), "1.2") for python in SUITES)
    assert first.file_name == "hearth_1.2+deb12_arm64.deb"
    done = subprocess.run(["dpkg", "--compare-versions", first.version, "lt", second.version], check=False)
    assert done.returncode == 0


def test_the_wheels_fit_the_c_library_of_the_release() -> None:
    options = ARM64.pip_options()
    platforms = [options[index + 1] for index, option in enumerate(options) if option == "--platform"]
    assert platforms[0] == "manylinux_2_36_aarch64"  # bookworm's glibc
    assert platforms[-2:] == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_maintainer_scripts_are_plain_shell_and_stop_at_the_first_error(script: str) -> None:
    path = DEBIAN / "hearth" / script
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert re.search(r"^set -e$", path.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["sh", "-n", str(path)], check=True)


def run_postrm(root: Path, action: str) -> None:
    """Run the script as dpkg does, with root in place of /."""
    script = (DEBIAN / "hearth/postrm").read_text(encoding="utf-8")
    moved, count = re.subn(r'(?<=[\s"])/(?=(?:etc|var|opt|run)/)', f"{root}/", script)
    assert count > 10
    command = ["/bin/sh", "-c", moved, "postrm", action]
    # Nothing of the machine that the tests run on: no systemctl, no deb-systemd-helper.
    programs = root / "bin"
    programs.mkdir()
    for name in ("rm", "find", "sed", "sort", "basename"):
        (programs / name).symlink_to(str(shutil.which(name)))
    subprocess.run(command, check=True, env={"PATH": str(programs)})
    shutil.rmtree(programs)


def write_files(root: Path, names: Iterable[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name, encoding="utf-8")


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or path.is_file()}


def test_removing_keeps_what_is_the_users(tmp_path: Path) -> None:
    kept = {"etc/hearth/hearthd.toml", "var/lib/private/hearth/tokens", "var/cache/private/hearth/prefixes/1"}
    write_files(tmp_path, {*kept, "opt/hearth.previous/running", "opt/hearth/lib/made-later"})
    run_postrm(tmp_path, "remove")
    assert files_below(tmp_path) == kept


def test_purging_takes_the_instances_and_nothing_of_anybody_else(tmp_path: Path) -> None:
    ours = [f"etc/hearth/{name}.toml" for name in ("hearthd", "kitchen", "policy")]
    ours += [f"var/lib/private/{name}/tokens" for name in ("hearth", "hearth-kitchen", "hearth-hall")]
    ours += [f"var/cache/private/{name}/prefixes/1" for name in ("hearth", "hearth-hall")]
    ours += ["etc/credstore/hearth.tokens", "etc/credstore/hearth-kitchen.server.key", "opt/hearth.refused/bin/hearthd"]
    ours += [f"etc/systemd/system/hearthd{name}.service.d/override.conf" for name in ("", "@", "-local", "@hall")]
    theirs = [f"{place}/hearth-stone/a" for place in ("var/lib", "var/lib/private", "var/cache", "opt")]
    theirs += ["var/lib/hearth-policy/a", "etc/credstore/hearth-stone.tokens"]
    theirs += ["etc/systemd/system/hearthdx.service.d/a"]
    write_files(tmp_path, [*ours, *theirs])
    for name in ("hearth", "hearth-kitchen", "hearth-hall"):
        (tmp_path / "var/lib" / name).symlink_to(f"private/{name}")
    wants = tmp_path / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "hearthd@hall.service").symlink_to("/usr/lib/systemd/system/hearthd@.service")  # with no file of its own
    run_postrm(tmp_path, "purge")
    assert files_below(tmp_path) == set(theirs)


def test_purging_before_the_first_start_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "var/lib/hearth/models").mkdir(parents=True)
    run_postrm(tmp_path, "purge")
    assert list(tmp_path.rglob("*hearth*")) == []


def test_every_override_of_lintian_has_a_reason() -> None:
    for name in ("hearth", "hearth-model"):
        lines = (DEBIAN / name / "lintian-overrides").read_text(encoding="utf-8").splitlines()
        assert lines[0].startswith("# ")
        assert all(re.fullmatch(r"# .+\.|[a-z-]+ \*", line) for line in lines)


@contextmanager
def modes_of_new_files(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_the_same_files_make_the_same_package(tmp_path: Path) -> None:
    package = Package("small", "1", "all", "net", "a small one", "One line.\n\nAnother.", {"Depends": "nothing"})
    made = []
    for number in range(2):
        root, control = tmp_path / f"root{number}", tmp_path / f"control{number}"
        (root / "etc").mkdir(parents=True)
        (root / "usr/bin").mkdir(parents=True)
        control.mkdir()
        for name in ("b", "a") if number else ("a", "b"):
            (root / "etc" / name).write_text(name, encoding="utf-8")
        (root / "usr/bin/run").symlink_to("/etc/a")
        (control / "postinst").write_text("#!/bin/sh\n", encoding="utf-8")
        with modes_of_new_files(0o077 if number else 0o022):
            made.append(write_deb(package, root, control, tmp_path / f"out{number}", ANY_TIME, ("-Zgzip",)))
    assert made[0].read_bytes() == made[1].read_bytes()
    said = subprocess.run(["dpkg-deb", "--info", made[0]], capture_output=True, text=True, check=True).stdout
    assert " One line.\n  .\n  Another." in said
    conffiles = subprocess.run(["dpkg-deb", "--info", made[0], "conffiles"], capture_output=True, check=True).stdout
    assert conffiles == b"/etc/a\n/etc/b\n"


@pytest.mark.parametrize("working", [True, False])
def test_bytecode_is_written_by_a_python_of_the_target_that_runs(
    working: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a version manager has them: there, but not for this user.
    other = tmp_path / "bin/python3.13"
    other.parent.mkdir()
    other.write_text(f"#!/bin/sh\n{'echo 3.13' if working else 'exit 127'}\n", encoding="utf-8")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # it may be the right one itself
    kept = tmp_path / f"cache/python-trixie-{ARM64.architecture}"  # what would be fetched, for an arm64 machine
    loader = kept / "usr/lib/aarch64-linux-gnu/ld-linux-aarch64.so.1"
    loader.parent.mkdir(parents=True)
    loader.write_text("#!/bin/sh\necho 3.13\n", encoding="utf-8")
    loader.chmod(0o755)
    dpkg = tmp_path / "bin/dpkg"
    dpkg.write_text("#!/bin/sh\necho arm64\n", encoding="utf-8")
    dpkg.chmod(0o755)
    found = find_interpreter(Target("arm64", "3.13"), tmp_path / "cache")
    assert found[0] == str(other if working else loader)
    assert working or found[-1] == str(kept / "usr/bin/python3.13")


# --- pages and completions -------------------------------------------------------------------------------------------


MAIN = {"hearth": client_main, "hearthd": daemon_main}


def ask_for_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the program itself prints, whatever the parser says that the pages are made from."""
    with pytest.raises(SystemExit):
        MAIN[command[0]]([*command[1:], "--help"])
    return capsys.readouterr().out


@pytest.fixture
def helps(program: str, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a program and each of its commands say of themselves."""
    found: dict[str, str] = {}

    def visit(command: list[str]) -> None:
        found[" ".join(command)] = text = ask_for_help(command, capsys)
        listed = re.search(r"^  (?:COMMAND|ACTION)\n((?:    .*\n)+)", text, re.MULTILINE)
        for word in re.findall(r"^    (\S+)", listed[1], re.MULTILINE) if listed else []:
            visit([*command, word])

    visit([program])
    assert len(found) > 6
    return found


def options(text: str) -> set[str]:
    """The long options that a help text explains."""
    return set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)) - {"--help"}


@pytest.fixture(scope="module", params=documents.PARSERS)
def program(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_a_page_has_every_command_and_option_that_the_program_has(program: str, helps: dict[str, str]) -> None:
    page = documents.manual_page(program, "1", ANY_TIME).replace("\\-", "-")
    shown: dict[str, set[str]] = {program: set()}
    for section in re.split(r"^\.SH\s", page, flags=re.MULTILINE)[1:]:
        about = re.match(r".*\\fI\\,'(.*)'\\/\\fR\n", section)
        shown.setdefault(about[1] if about else program, set()).update(
            re.findall(r"^\\fB(--[a-z-]+)", section, re.MULTILINE)
        )
    assert shown == {command: options(text) for command, text in helps.items()}


def test_a_page_is_the_same_whatever_terminal_it_is_made_in(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = set()
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        pages.add(documents.manual_page(program, "1", ANY_TIME))
        pages.add(os.environ["COLUMNS"])
    assert len(pages) == 3


def test_a_page_has_what_stands_below_the_options(program: str, helps: dict[str, str]) -> None:
    page = documents.manual_page(program, "1", ANY_TIME).replace("\\-", "-").replace("\\(dq", '"').replace("\\e", "\\")
    assert ".SH EXIT STATUS\n" in page
    for command, text in helps.items():
        for heading, below in re.findall(r"^([a-z ]+):\n((?:(?:  .*)?\n)+)", text, re.MULTILINE):
            if heading not in ("options", "positional arguments", "answer", "connection"):
                about = "" if command == program else rf" \fI\,'{command}'\/\fR"
                (shown,) = re.findall(
                    rf"^{re.escape(f'.SH {heading.upper()}{about}')}\n((?:(?!\.SH).*\n)+)", page, re.MULTILINE
                )
                said = [line for line in shown.splitlines() if line not in (".TP", ".PP", ".EX", ".EE")]
                assert " ".join(" ".join(said).replace(".B ", "").split()).startswith(" ".join(below.split())), heading


def test_bash_completes_every_command_and_option(program: str, helps: dict[str, str], tmp_path: Path) -> None:
    """Not only read: asked as an interactive bash asks."""
    path = tmp_path / "completion"
    path.write_text(documents.completion(program, "bash"), encoding="utf-8")
    lines = [f". {path}", f"function=$(complete -p {program} | sed -E 's/.*-F ([^ ]+).*/\\1/')"]
    for command in helps:
        for typed in ("--", "''"):
            lines += [f"COMP_WORDS=({command} {typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()"]
            lines += [f"$function {program} {typed} {command.split()[-1]}", 'echo "${COMPREPLY[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    answers = iter(done.stdout.splitlines())
    for command, text in helps.items():
        assert set(next(answers).split()) - {"--help"} == options(text), command
        below = {other.split()[-1] for other in helps if other.rpartition(" ")[0] == command}
        assert below <= set(next(answers).split()), command


@pytest.mark.parametrize("shell", documents.COMPLETIONS)
def test_completions_name_every_command_and_option(program: str, shell: str, helps: dict[str, str]) -> None:
    text = documents.completion(program, shell)
    # fish names options without their dashes.
    shown = {
        option.removeprefix("--") if shell == "fish" else option for each in helps.values() for option in options(each)
    }
    assert {option for option in shown if option not in text} == set()
    assert {command for command in helps if command.split()[-1] not in text} == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_read_their_completions(program: str, shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "completion"
    path.write_text(documents.completion(program, shell), encoding="utf-8")
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_configuration_page_has_every_key(tmp_path: Path) -> None:
    empty = tmp_path / "hearthd.toml"
    empty.touch()
    text = (ROOT / "deploy/hearthd.toml").read_text(encoding="utf-8")
    page = configuration_page(text, "1", ANY_TIME).replace("\\-", "-")
    for key in settings(load_config(empty, {"HOME": "/nonexistent"})):
        section, _, name = key.rpartition(".")
        assert re.search(rf"^\.B {name} = ", page, re.MULTILINE), key
        assert f".SH [{section}]" in page
    # What is said of a key, and of the file.
    assert "Connections at once" in page
    assert "Unknown keys and variables are refused." in page


@pytest.mark.skipif(shutil.which("groff") is None, reason="needs groff")
@pytest.mark.parametrize("name", ["hearth", "hearthd", "hearthd.toml"])
def test_groff_has_nothing_to_say_of_a_page(name: str) -> None:
    if name == "hearthd.toml":
        page = configuration_page((ROOT / "deploy/hearthd.toml").read_text(encoding="utf-8"), "1", ANY_TIME)
    else:
        page = documents.manual_page(name, "1", ANY_TIME)
    command = ["groff", "-man", "-Tutf8", "-ww", "-rCHECKSTYLE=3"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "adjust line" not in line] == []
    assert "NAME" in done.stdout


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert build.project_version() == project["version"]
    assert TARGETS_ROOT == ROOT


# --- the guide -------------------------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs/install-raspberry-pi.md").read_text(encoding="utf-8")


def guide_commands() -> list[list[str]]:
    """The words of each command in the guide's boxes."""
    lines = [line for box in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) for line in box.splitlines()]
    return [shlex.split(line) for line in lines]


def test_the_guide_says_only_commands_that_the_programs_have() -> None:
    typed = [words[1:] if words[0] == "sudo" else words for words in guide_commands()]
    ours = [words for words in typed if words[0] in documents.PARSERS]
    assert {" ".join(words[:2]) for words in ours} >= {"hearth ask", "hearth pair", "hearthd pair", "hearthd token"}
    for words in ours:
        documents.parser(words[0]).parse_args(words[1:])  # exits, and says why, at a word that it does not know


def test_the_guide_names_the_packages_as_they_are_called() -> None:
    version = build.project_version()
    names = {build.hearth_package(ARM64, version).file_name, build.model_package("smollm2-135m", version).file_name}
    assert {name for name in names if name not in GUIDE} == set()
    patterns = {word for words in guide_commands() for word in words if word.endswith(".deb")}
    assert {pattern for pattern in patterns if not fnmatch.filter(names, pattern.removeprefix("./"))} == set()


# --- the container ---------------------------------------------------------------------------------------------------

CONTAINER = ROOT / "deploy/container"


def test_the_container_is_not_root_and_takes_only_locked_wheels() -> None:
    text = (CONTAINER / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    last = lines[len(lines) - 1 - [line.startswith("FROM ") for line in reversed(lines)].index(True) :]
    (user,) = [line for line in last if line.startswith("USER ")]
    assert int(user.split()[1].partition(":")[0]) > 0
    # Nothing that runs as root stands below it.
    assert [line for line in last[last.index(user) :] if line.startswith(("RUN ", "COPY "))] == []
    assert "--require-hashes" in text
    assert "deploy/debian/requirements.lock" in text
    # Every apt-get cleans up after itself, and takes nothing unasked.
    installs = [line for line in lines if "apt-get install" in line]
    assert installs
    assert all("--no-install-recommends" in line and "rm -rf /var/lib/apt/lists" in line for line in installs)


def test_what_the_container_copies_is_there() -> None:
    for line in (CONTAINER / "Containerfile").read_text(encoding="utf-8").splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            *sources, _ = line.split()[1:]
            assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_health_probe_sees_whether_the_daemon_serves(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(CONTAINER / "health_probe.py")]
    dead = subprocess.run([*command, f"unix://{tmp_path}/nobody"], capture_output=True, text=True, check=False)
    assert (dead.returncode, dead.stderr) == (1, "health: UNAVAILABLE\n")
    for status, code in (("SERVING", 0), ("NOT_SERVING", 1)):
        servicer = HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
        server = grpc.server(ThreadPoolExecutor(1))
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_insecure_port(f"unix://{tmp_path}/socket")
        server.start()
        asked = subprocess.run([*command, f"unix://{tmp_path}/socket"], capture_output=True, text=True, check=False)
        server.stop(None).wait()
        assert (asked.returncode, asked.stderr) == (code, f"health: {status}\n")
