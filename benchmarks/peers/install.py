"""Give each peer an environment of its own, and a model made from our checkpoint.

Everything goes below one directory (`.cache/bench`), with a stamp that names what it was made from, so that the second
run installs nothing. Knows each peer's way from checkpoint to model; measures nothing. Called by `../compare.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_directory import write_huggingface_directory
from machine import cpu_flags

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements"
PEERS = ("llama-cpp", "onnxruntime-genai", "optimum")

# GCC 12's tile intrinsics tell the optimiser of 8 of the 64 bytes that they read, and it drops the stores of the
# others: llama.cpp's AMX kernels then end with a protection fault. Clang's are right.
_CLANGS = ("clang", *(f"clang-{version}" for version in range(21, 13, -1)))
_CLANG_PACKAGES = ("clang", "libomp-dev")
_BUILD_TOOLS = {"cmake": "cmake", "ninja": "ninja-build"}


class InstallError(Exception):
    """A peer cannot be had: one line with the reason."""


class Installer:
    """Environments and models below one directory."""

    def __init__(self, directory: Path, checkpoint: Path, report: Callable[[str], None]) -> None:
        """checkpoint: what all models are made from. report: is told of each step that takes long."""
        self._directory = directory
        self._checkpoint = checkpoint
        self._report = report
        self._log = directory / "install.log"

    def python(self, peer: str) -> Path:
        """Return the interpreter of a peer's environment; make it if need be. Raises InstallError."""
        directory = self._directory / "environments" / peer
        requirements = REQUIREMENTS / f"{peer}.txt"
        made_from = {
            "requirements": hashlib.sha256(requirements.read_bytes()).hexdigest(),
            "python": platform.python_version(),
            "path": str(directory),
            # What is built here is built for this processor.
            "machine": sorted(cpu_flags()) if peer == "llama-cpp" else [],
        }
        interpreter = directory / "bin/python"
        stamp = directory / "ready.json"
        if _reads(stamp) == made_from:
            return interpreter
        self._report(f"installing {peer}" + (", which compiles for some minutes" if peer == "llama-cpp" else ""))
        shutil.rmtree(directory, ignore_errors=True)
        self._run([sys.executable, "-m", "venv", directory])
        pip: list[str | Path] = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-input", "--requirement", requirements]
        environment = {}
        if peer == "llama-cpp":
            # Never a wheel from anywhere else, a cache included: it would be for another processor.
            pip += ["--no-binary", "llama-cpp-python", "--no-cache-dir"]
            environment = self._compiler() | {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
        self._run(pip, environment)
        stamp.write_text(json.dumps(made_from))
        return interpreter

    def add(self, peer: str, extra: str) -> Path:
        """Bring further packages to a peer's environment, those of requirements/EXTRA.txt. Raises InstallError."""
        interpreter = self.python(peer)
        requirements = REQUIREMENTS / f"{extra}.txt"
        # Beside the environment's own stamp: it is gone when the environment is made anew.
        stamp = interpreter.parent.parent / f"{extra}.json"
        made_from = hashlib.sha256(requirements.read_bytes()).hexdigest()
        if _reads(stamp) != made_from:
            self._report(f"installing {extra}")
            pip: list[str | Path] = [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            self._run([*pip, "--no-input", "--requirement", requirements])
            stamp.write_text(json.dumps(made_from))
        return interpreter

    def model(self, peer: str, python: Path) -> Path:
        """Return a peer's model; make it if need be. Raises InstallError."""
        target = self._directory / "models" / peer
        steps = _steps(peer, python, self._checkpoint, self._directory / "models/huggingface", target)
        made_from = {
            "checkpoint": _identity(self._checkpoint),
            "steps": [[str(part) for part in step] for step in steps],
            "requirements": hashlib.sha256((REQUIREMENTS / f"{peer}.txt").read_bytes()).hexdigest(),
        }
        stamp = target / "ready.json"
        if _reads(stamp) != made_from:
            self._report(f"making the model of {peer}")
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            if peer != "llama-cpp":
                self._huggingface_directory()
            for step in steps:
                self._run(step, {"HF_HUB_OFFLINE": "1"})
            for path in target.glob("exported*"):
                shutil.rmtree(path)
            stamp.write_text(json.dumps(made_from))
        return {"llama-cpp": target / "q8_0.gguf", "optimum": target / "model.onnx"}.get(peer, target)

    def _huggingface_directory(self) -> None:
        directory = self._directory / "models/huggingface"
        stamp = directory / "ready.json"
        made_from = _identity(self._checkpoint)
        if _reads(stamp) != made_from:
            shutil.rmtree(directory, ignore_errors=True)
            write_huggingface_directory(self._checkpoint, directory)
            stamp.write_text(json.dumps(made_from))

    def _compiler(self) -> dict[str, str]:
        """Return CC and CXX for llama.cpp, after installing what is missing to build it where that is possible."""
        missing = [package for program, package in _BUILD_TOOLS.items() if not shutil.which(program)]
        if "CC" in os.environ or "amx_int8" not in cpu_flags():
            if not shutil.which(os.environ.get("CXX", "c++")):
                missing.append("g++")
            self._install_packages(missing)
            return {}
        if not _clang():
            missing += _CLANG_PACKAGES
        self._install_packages(missing)
        clang = _clang()
        if not clang:
            self._report("no clang: GCC builds llama.cpp, whose AMX kernels may then fail")
            return {}
        return {"CC": clang, "CXX": clang.replace("clang", "clang++")}

    def _install_packages(self, packages: list[str]) -> None:
        if not packages or not shutil.which("apt-get"):
            return
        prefix: list[str | Path] = [] if os.geteuid() == 0 else ["sudo", "-n"]
        apt = [*prefix, "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
        self._report(f"installing system packages: {' '.join(packages)}")
        try:
            self._run([*apt, "update"])
            environment = {"DEBIAN_FRONTEND": "noninteractive"}
            self._run([*apt, "install", "-y", "--no-install-recommends", *packages], environment)
        except InstallError as error:
            # What is missing in the end fails where it is needed, with its name.
            self._report(str(error))

    def _run(self, command: list[str | Path], environment: Mapping[str, str] | None = None) -> None:
        """Run a program, its output in install.log. Raises InstallError with its last line."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        with self._log.open("ab") as log:
            try:
                done = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=inherited | dict(environment or {}),
                    check=False,
                )
            except OSError as error:
                raise InstallError(f"{command[0]} cannot be run: {error.strerror}") from error
        if done.returncode:
            lines = self._log.read_text(errors="replace").strip().splitlines() or [""]
            name = Path(command[0]).name
            raise InstallError(f"{name} ended with {done.returncode}: {lines[-1].strip()[:200]} (see {self._log})")


def _clang() -> str | None:
    """Return the name of a Clang that has its C++ half beside it."""
    return next(
        (name for name in _CLANGS if shutil.which(name.replace("clang", "clang++")) and shutil.which(name)), None
    )


def _steps(peer: str, python: Path, checkpoint: Path, huggingface: Path, target: Path) -> list[list[str | Path]]:
    """Return the programs that make a peer's model."""
    if peer == "llama-cpp":
        return [[python, HERE / "requantize_gguf.py", checkpoint, target / "q8_0.gguf"]]
    if peer == "onnxruntime-genai":
        command: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder", "-i", huggingface, "-o", target]
        options = ["--extra_options", "block_size=64", "accuracy_level=4"]
        return [[*command, "-p", "int8", "-e", "cpu", "-c", target / "exported-cache", *options]]
    exported = target / "exported"
    export: list[str | Path] = [python.parent / "optimum-cli", "export", "onnx", "--model", huggingface]
    return [
        [*export, "--task", "text-generation-with-past", exported],
        [python, HERE / "quantize_dynamic.py", exported / "model.onnx", target / "model.onnx"],
    ]


def _identity(path: Path) -> dict[str, object]:
    """Return what changes when the checkpoint does; its content is checked by who fetched it."""
    status = path.stat()
    return {"path": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _reads(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_text())
    except (OSError, ValueError):
        return None
