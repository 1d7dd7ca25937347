"""`hearthd doctor`: runs every check, prints what it found and what helps; with --json exactly one object.

Exit code 1 if there is a problem, 0 if there are warnings at most. A check that cannot look says so and is no problem.
`__main__` calls `add_parser`. The checks are in the modules beside this one, and each takes what it looks at as an
argument.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Final

from hearthd.configuration import paths
from hearthd.configuration.config import Config, load_config
from hearthd.doctor import board, disk, running
from hearthd.doctor.finding import Finding, Level, good, note, problem
from hearthd.doctor.needed_memory import find_needed_memory
from hearthd.doctor.processor import check_processor
from hearthd.doctor.system import System
from hearthd.errors import ConfigError, HearthdError
from hearthd.logs import describe_exception

__all__ = ["add_parser", "diagnose"]

_MARKS: Final = {Level.GOOD: "good   ", Level.NOTE: "note   ", Level.WARNING: "warning", Level.PROBLEM: "PROBLEM"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor` to a program's commands; the parsed arguments have `run`, which returns the exit code."""
    parser = commands.add_parser(
        "doctor",
        help="look for what is wrong with machine, installation and running daemon, and say what helps",
        description="Looks at the machine, the configuration, the files and the running daemon. Changes nothing. As "
        "root it sees most. Exit code 1 if there is a problem, 0 if there are warnings at most.",
    )
    parser.add_argument("--quick", action="store_true", help="neither hash the model nor measure the memory")
    parser.add_argument("--json", action="store_true", help="write one JSON object to standard output")
    parser.add_argument(
        "--unit", default=paths.UNIT, metavar="UNIT", help=f"which unit to ask systemd for ({paths.UNIT})"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for `serve`")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    environment = paths.service_environment(unit=parsed.unit)
    findings = []
    for finding in diagnose(
        System(),
        lambda: load_config(parsed.config, environment),
        unit=parsed.unit,
        is_quick=parsed.quick,
        file=parsed.config,
    ):
        findings.append(finding)
        if not parsed.json:
            # Each as it is found: hashing takes a while on a board.
            print(_line(finding), flush=True)
    has_problem = any(finding.level is Level.PROBLEM for finding in findings)
    if parsed.json:
        listed = [asdict(finding) | {"level": finding.level.value} for finding in findings]
        json.dump({"has_problem": has_problem, "findings": listed}, sys.stdout, indent=2)
        print()
    return int(has_problem)


def diagnose(
    system: System,
    load: Callable[[], Config],
    *,
    unit: str = paths.UNIT,
    is_quick: bool = False,
    file: Path | None = None,
) -> Iterable[Finding]:
    """Run every check. load: reads the configuration, raises ConfigError. file: for remedies, which name it again."""
    from hearthd.listening.listeners import find_listeners

    yield from _checked("processor", lambda: check_processor(system))
    yield from _checked("memory cgroup", lambda: board.check_memory_cgroup(system))
    yield from _checked("power", lambda: board.check_power(system))
    yield from _checked("temperature", lambda: board.check_temperature(system))
    yield from _checked("clock", lambda: board.check_clock(system))
    yield from _checked("disk health", lambda: disk.check_disk_health(system))
    yield from _checked("service", lambda: running.check_unit(system, unit))
    option = f" --config {shlex.quote(os.fspath(file))}" if file else ""
    try:
        config = load()
        find_listeners(config.server, config.tls, config.auth)
    except ConfigError as error:
        text, _, remedy = str(error).partition("; ")
        yield problem("configuration", text, remedy or f"hearthd check-config{option}")
        return
    yield good("configuration", "can be used")
    yield from _configured(system, config, unit, file, is_quick=is_quick)


def _configured(system: System, config: Config, unit: str, file: Path | None, *, is_quick: bool) -> Iterable[Finding]:
    """Run the checks of what the configuration names."""
    from hearthd.doctor import credentials, model_files

    yield from _checked("certificate", lambda: credentials.check_certificate(config, file=file))
    yield from _checked("tokens", lambda: credentials.check_tokens(config, file=file))
    directory = config.model.directory
    yield from _checked("disk space", lambda: disk.check_free_space(system, directory))
    yield from _checked("disk", lambda: disk.check_writable(system, directory))
    yield from _checked("socket", lambda: running.check_socket(config))
    yield from _checked("descriptors", lambda: running.check_descriptors(system, config, unit))
    bundle, findings = model_files.check_model(config, verify=not is_quick)
    yield from findings
    needed = find_needed_memory(bundle.manifest, config.for_model(config.model.name).engine) if bundle else None
    for name in config.model_names[1:]:
        own = config.for_model(name)
        further, findings = model_files.check_model(own, verify=not is_quick)
        yield from findings
        if needed and further:
            needed = needed.beside(find_needed_memory(further.manifest, own.engine), config.models.max_bytes)
    yield from _checked("memory", lambda: board.check_memory(system, needed, running.find_memory_limit(system, unit)))
    if bundle is not None and not is_quick:
        yield from _checked("speed", lambda: model_files.check_speed(bundle, config.engine.num_threads))


def _checked(name: str, check: Callable[[], Iterable[Finding]]) -> Iterable[Finding]:
    """Run a check; one that cannot look, as an ordinary user or on an odd machine, ends no other."""
    try:
        yield from list(check())
    except PermissionError as error:
        yield note(name, f"{error.filename} may not be looked at", "run this with sudo")
    except (HearthdError, OSError, ValueError) as error:
        told = str(error) if isinstance(error, HearthdError) else describe_exception(error)
        yield note(name, f"could not be looked at: {told}")


def _line(finding: Finding) -> str:
    remedy = f"\n{'':25}-> {finding.remedy}" if finding.remedy else ""
    return f"{_MARKS[finding.level]}  {finding.check:<16}{finding.text}{remedy}"
