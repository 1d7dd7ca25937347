"""/opt/hearth: what `python3 -m venv` and pip would make on the board, made on another machine without running it.

A virtual environment is a file, a link to the interpreter and a directory of packages, so none of the target's programs
has to run. Its bytecode is in the package, as unchecked: the service may not write it, boards compile slowly, and with
the modification times of a reproducible build, Python could take an old version's bytecode for a new one's.

Knows wheels, and nothing of Debian's packages. Called by `build`.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lock import LOCK
from targets import ROOT, Target

__all__ = ["PREFIX", "make_tree"]

PREFIX = Path("/opt/hearth")
# Not needed to serve, pair or build a model: tests, what extensions are compiled with, and what pip keeps for itself.
# ONNX Runtime's and onnx's own tools have models and test data of some 20 MB.
UNNEEDED = (
    "bin",
    "**/tests",
    "**/testing/tests",
    "**/*.pyi",
    "**/*.pyx",
    "**/*.pxd",
    "**/*.a",
    "**/*.h",
    "**/*.cc",
    "**/*.cpp",
    "**/*.proto",
    "**/CMakeLists.txt",
    "numpy/_core/include",
    "numpy/f2py",
    "onnx/backend/test",
    "onnx/test",
    # 25 MB for programs in C; the Python module has all of it itself.
    "onnxruntime/capi/libonnxruntime.so*",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "*.dist-info/RECORD",
    "*.dist-info/direct_url.json",
    "*.dist-info/REQUESTED",
)
LAUNCHER = """\
#!{prefix}/bin/python3 -I
import sys

from {package}.__main__ import main

sys.exit(main())
"""
PROGRAMS = {"hearth": "hearth", "hearthd": "hearthd"}


def make_tree(target: Target, root: Path, interpreter: list[str], systemd: Path) -> None:
    """Make the environment below root, a directory that becomes `/`.

    `interpreter` runs the target's version of Python on this machine; `systemd` holds the package of that name.
    """
    prefix = root / PREFIX.relative_to("/")
    packages = prefix / f"lib/python{target.python}/site-packages"
    packages.mkdir(parents=True)
    _install_wheels(target, packages)
    shutil.copytree(systemd, packages, dirs_exist_ok=True)
    for pattern in UNNEEDED:
        for path in list(packages.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    programs = prefix / "bin"
    programs.mkdir()
    for name, package in PROGRAMS.items():
        (programs / name).write_text(LAUNCHER.format(prefix=PREFIX, package=package), encoding="utf-8")
        (programs / name).chmod(0o755)
    (programs / "python3").symlink_to(f"/usr/bin/python{target.python}")
    (prefix / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n", encoding="utf-8"
    )
    _compile(packages, PREFIX / packages.relative_to(prefix), interpreter)


def _install_wheels(target: Target, packages: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    pip += ["--no-compile", "--no-deps", "--target", str(packages), "--root-user-action=ignore"]
    locked = [*pip, "--require-hashes", "--requirement", str(LOCK), *target.pip_options()]
    subprocess.run(locked, check=True, stdin=subprocess.DEVNULL)
    # Programs of the packages, which start this machine's interpreter.
    shutil.rmtree(packages / "bin", ignore_errors=True)
    with tempfile.TemporaryDirectory() as wheels:
        # The project itself: pure Python, built from this clone.
        build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", wheels]
        done = subprocess.run(build, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, cwd=ROOT)
        if done.returncode:
            sys.exit(f"deb: the project's wheel cannot be built: {done.stderr}")
        (wheel,) = Path(wheels).glob("*.whl")
        subprocess.run([*pip, "--no-index", str(wheel)], check=True, stdin=subprocess.DEVNULL)


def _compile(packages: Path, installed: Path, interpreter: list[str]) -> None:
    """Write bytecode that names the files where they will be."""
    command = [*interpreter, "-I", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(packages), "-p", str(installed), str(packages)]
    # Sets of constants are written in the order of their hashes.
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}
    )
    if done.returncode not in (0, 1):  # 1: some file is for another Python; it fails here as it would there
        raise subprocess.CalledProcessError(done.returncode, command)
