"""Build the Debian packages of this clone, for any processor on any.

    python deploy/debian/build.py                        hearth for arm64 and amd64, and the default model, into dist/
    python deploy/debian/build.py --arch arm64           one processor
    python deploy/debian/build.py --python 3.13          for Debian 13 (trixie) and its Raspberry Pi OS
    python deploy/debian/build.py --without-model

None of the target's programs has to run: wheels are unpacked, and bytecode does not depend on the processor. `make deb`
is the same with what it needs installed first. README.md beside this file has the layout and the reasons.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import systemd_python
from deb import Package, add_changelog, write_deb
from documents import write_documents
from interpreter import find_interpreter
from targets import ARCHITECTURES, ROOT, SUITES, Target
from tree import PREFIX, PROGRAMS, make_tree

HERE = Path(__file__).resolve().parent
DEFAULT_BUNDLE = ROOT / ".cache/state/models/smollm2-135m"
DEFAULT_PYTHON = "3.11"
# Two threads always: xz writes other bytes with one than with several.
COMPRESSION = ("-Zxz", "-z6", "--threads-max=2")
# The weights are noise to xz: it takes 40 times as long as gzip for 1 % less.
QUICK = ("-Zgzip", "-z1")


def project_version() -> str:
    """Return the version in pyproject.toml."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    return version


def source_date_epoch() -> int:
    """Return the time that everything in a package bears: the variable's, or the last commit's."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return int(given)
    command = ["git", "log", "-1", "--format=%ct"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def hearth_package(target: Target, version: str) -> Package:
    """Return the control data of the daemon and client."""
    return Package(
        name="hearth",
        version=f"{version}+{target.suite.version}",
        architecture=target.architecture,
        section="net",
        summary="chat model that lives in the house",
        description=(HERE / "hearth/description").read_text(encoding="utf-8"),
        relations={
            "Depends": f"python3 (>= {target.python}), python3 (<< {target.next_python}), libc6 (>= 2.28), "
            "libgcc-s1 (>= 4.2), libstdc++6 (>= 9), libsystemd0 (>= 246), init-system-helpers (>= 1.54~), "
            "systemd | systemd-standalone-sysusers | systemd-sysusers",
            "Recommends": "hearth-model-smollm2-135m | hearth-model",
        },
    )


def model_package(name: str, version: str) -> Package:
    """Return the control data of a model."""
    return Package(
        name=f"hearth-model-{name}",
        version=version,
        architecture="all",
        section="science",
        summary=f"int8 language model {name} for Hearth",
        description=(HERE / "hearth-model/description").read_text(encoding="utf-8").format(name=name),
        relations={"Provides": "hearth-model", "Enhances": "hearth"},
    )


def build_hearth(target: Target, version: str, output: Path, cache: Path, compression: tuple[str, ...]) -> Path:
    """Write the package of daemon and client; return its path."""
    package = hearth_package(target, version)
    epoch = source_date_epoch()
    with tempfile.TemporaryDirectory(prefix="hearth-deb-") as directory:
        root = Path(directory) / "root"
        root.mkdir()
        make_tree(target, root, find_interpreter(target, cache), systemd_python.fetch(target, cache))
        programs = root / "usr/bin"
        programs.mkdir(parents=True)
        for name in PROGRAMS:
            (programs / name).symlink_to(PREFIX / "bin" / name)
        shutil.copytree(ROOT / "deploy/systemd", root / "usr/lib/systemd/system", ignore=_is_no_system_unit)
        user_units = ROOT / "deploy/systemd/user"
        if user_units.is_dir():
            shutil.copytree(user_units, root / "usr/lib/systemd/user")
        shutil.copytree(ROOT / "deploy/systemd/sysusers.d", root / "usr/lib/sysusers.d")
        configuration = root / "etc/hearth/hearthd.toml"
        configuration.parent.mkdir(parents=True)
        shutil.copy(ROOT / "deploy/hearthd.toml", configuration)
        documentation = root / "usr/share/doc/hearth"
        documentation.mkdir(parents=True)
        shutil.copy(HERE / "hearth/copyright", documentation / "copyright")
        shutil.copy(ROOT / "README.md", documentation)
        copy_overrides(HERE / "hearth", root, package)
        write_documents(root, version, epoch)
        add_changelog(package, root, epoch)
        return write_deb(package, root, HERE / "hearth", output, epoch, compression)


def _is_no_system_unit(directory: str, names: list[str]) -> list[str]:
    suffixes = (".service", ".socket", ".timer", ".target", ".path")
    return [name for name in names if not name.endswith(suffixes) or (Path(directory) / name).is_dir()]


def build_model(bundle: Path, version: str, output: Path) -> Path:
    """Write the package of an installed model; return its path."""
    package = model_package(bundle.name, version)
    epoch = source_date_epoch()
    with tempfile.TemporaryDirectory(prefix="hearth-deb-") as directory:
        root = Path(directory) / "root"
        shutil.copytree(bundle, root / "usr/share/hearth/models" / bundle.name)
        documentation = root / "usr/share/doc" / package.name
        documentation.mkdir(parents=True)
        shutil.copy(HERE / "hearth-model/copyright", documentation / "copyright")
        copy_overrides(HERE / "hearth-model", root, package)
        add_changelog(package, root, epoch)
        return write_deb(package, root, HERE / "hearth-model", output, epoch, QUICK)


def copy_overrides(control: Path, root: Path, package: Package) -> None:
    """Put what lintian is told beside its reasons where lintian looks."""
    overrides = root / "usr/share/lintian/overrides"
    overrides.mkdir(parents=True)
    shutil.copy(control / "lintian-overrides", overrides / package.name)


def lint(packages: list[Path]) -> None:
    """Let lintian look at packages; exits if it finds an error."""
    command = ["lintian", "--allow-root", "--fail-on", "error", *map(str, packages)]
    if subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode:
        sys.exit("deb: lintian finds errors, see above; mend them, or say why not in deploy/debian/*/lintian-overrides")
    print("lintian finds no error")


def main() -> None:
    """Build what is asked for; print hash, path and size of each package."""
    parser = argparse.ArgumentParser(description="Build the Debian packages of this clone.")
    parser.add_argument(
        "--arch", choices=[*ARCHITECTURES, "all"], default="all", help="processor; all of them if not given"
    )
    parser.add_argument("--python", choices=list(SUITES), default=DEFAULT_PYTHON, help="of the release to build for")
    parser.add_argument(
        "--version", default=project_version(), help="for tests of upgrades; the project's if not given"
    )
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="installed model to package")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache/deb", help="what is fetched once")
    parser.add_argument("--without-model", action="store_true")
    parser.add_argument("--only-model", action="store_true")
    parser.add_argument("--quick", action="store_true", help="compress little: for tests")
    parser.add_argument("--lint", action="store_true", help="fail if lintian finds an error")
    arguments = parser.parse_args()
    compression = QUICK if arguments.quick else COMPRESSION
    built: list[Path] = []
    if not arguments.only_model:
        for architecture in ARCHITECTURES if arguments.arch == "all" else [arguments.arch]:
            target = Target(architecture, arguments.python)
            built.append(build_hearth(target, arguments.version, arguments.output, arguments.cache, compression))
    if not arguments.without_model:
        built.append(build_model(arguments.bundle, arguments.version, arguments.output))
    for path in built:
        # Who builds the same commit elsewhere can compare.
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{sha256}  {path}  {path.stat().st_size / 1e6:.1f} MB")
    if arguments.lint:
        lint(built)


if __name__ == "__main__":
    main()
