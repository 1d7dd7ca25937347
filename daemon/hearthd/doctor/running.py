"""The daemon that runs, if one does: its unit, its socket, its descriptors. Called by `cli`."""

import resource
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from hearthd.configuration.config import Config
from hearthd.doctor.finding import Finding, good, note, problem, warning
from hearthd.doctor.system import System

__all__ = ["check_descriptors", "check_socket", "check_unit", "find_memory_limit"]

_PROPERTIES: Final = ("LoadState", "ActiveState", "Result", "NRestarts", "StatusText", "MainPID", "MemoryMax")
_ANSWER_SECONDS: Final = 5.0
# Beside connections: the model's files, the journal, gRPC's own.
_OTHER_DESCRIPTORS: Final = 100


def unit_properties(system: System, unit: str) -> Mapping[str, str]:
    """Return what systemd says of a unit; nothing where there is no systemd or no such unit."""
    said = system.run(["systemctl", "show", unit, *(f"--property={name}" for name in _PROPERTIES)])
    found = dict(line.partition("=")[::2] for line in (said or "").splitlines())
    return found if found.get("LoadState") == "loaded" else {}


def find_memory_limit(system: System, unit: str) -> int | None:
    """Return the bytes that systemd lets the unit take; None if there is no limit or no unit."""
    said = unit_properties(system, unit).get("MemoryMax", "")
    return int(said) if said.isdigit() else None


def check_unit(system: System, unit: str) -> Iterable[Finding]:
    """Ask systemd how the unit fares."""
    found = unit_properties(system, unit)
    if not found:
        yield note("service", f"systemd knows no unit {unit} here")
        return
    state, restarts = found.get("ActiveState", ""), found.get("NRestarts", "0")
    said = f"{unit} is {state}: {found.get('StatusText') or 'it has said nothing'}"
    look = f"journalctl -u {unit} -n 50"
    if state == "failed":
        yield problem("service", f"{unit} has failed ({found.get('Result', '?')})", look)
    elif state != "active":
        yield warning("service", said, f"systemctl enable --now {unit}")
    elif restarts not in ("", "0"):
        yield warning("service", f"{said}; it was started again {restarts} times, by itself", look)
    elif "cannot be used" in said or "needs a restart" in said:
        yield warning("service", said, f"hearthd check-config, then systemctl restart {unit}")
    else:
        yield good("service", said)


def check_socket(config: Config) -> Iterable[Finding]:
    """Ask the daemon on the Unix socket whether it serves."""
    path = config.server.unix_socket
    if path is None:
        yield note("socket", "no Unix socket is configured")
        return
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    try:
        is_socket = path.is_socket()
    except OSError as error:
        yield warning("socket", f"{path} cannot be looked at: {error.strerror}", "run this with sudo")
        return
    if not is_socket:
        yield problem(
            "socket", f"there is no socket {path}: no daemon runs with this configuration", "systemctl status hearthd"
        )
        return
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                yield good("socket", f"a daemon answers on {path}; it asks for a token")
            else:
                yield problem("socket", f"nobody answers on {path} ({error.code().name})", "systemctl restart hearthd")
            return
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        yield good("socket", f"a daemon serves on {path}")
    else:
        yield warning("socket", f"the daemon on {path} loads or shuts down", "wait, then see: systemctl status hearthd")


def check_descriptors(system: System, config: Config, unit: str) -> Iterable[Finding]:
    """Compare the limit on file descriptors, the daemon's where one runs, with the connections that are allowed."""
    needed = 2 * config.server.max_connections + _OTHER_DESCRIPTORS
    limit = _limit_of(system, unit_properties(system, unit).get("MainPID", "0"))
    whose = "the daemon's"
    if limit is None:
        limit, whose = resource.getrlimit(resource.RLIMIT_NOFILE)[0], "this shell's"
    said = f"{whose} limit is {limit} file descriptors; server.max_connections needs {needed}"
    if limit < needed:
        yield warning("descriptors", said, "raise LimitNOFILE (systemctl edit hearthd), or lower max_connections")
    else:
        yield good("descriptors", said)


def _limit_of(system: System, pid: str) -> int | None:
    if pid in ("", "0"):
        return None
    for line in (system.read(str(Path("/proc") / pid / "limits")) or "").splitlines():
        if line.startswith("Max open files"):
            words = line.removeprefix("Max open files").split()
            return int(words[0]) if words and words[0].isdigit() else None
    return None
