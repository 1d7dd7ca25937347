"""The daemon's command line: serve, check-config, token, model, pair, bench, doctor.

Exit codes:
    0   done; for `serve`, told to stop and stopped
    1   failed: a token that is not there, a model that cannot be built or measured; a hard exit, where shutting down
        took too long
    2   wrong usage of the command line
    69  another program serves the address (EX_UNAVAILABLE)
    70  a fault of the daemon itself (EX_SOFTWARE); systemd starts it again
    78  the configuration, the installation (a Python package is missing) or the model's bundle cannot be used
        (EX_CONFIG); starting it again does not help

Errors are one line on standard error. Imports of gRPC and of the model's parts wait until a command needs them.
"""

import argparse
import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hearthd.access.token_command import add_parser as add_token
from hearthd.bench.cli import add_parser as add_bench
from hearthd.configuration import paths
from hearthd.configuration.config import Config, choose_file, load_config, model_settings, role_settings, settings
from hearthd.configuration.roles import Role
from hearthd.doctor.cli import add_parser as add_doctor
from hearthd.errors import (
    AddressInUseError,
    BenchError,
    BuildError,
    BundleError,
    ConfigError,
    HearthdError,
    MissingPackageError,
    ModelNotFoundError,
)
from hearthd.pairing.cli import add_parser as add_pair
from hearthd.version import daemon_version

if TYPE_CHECKING:
    from hearthd.inference.model import Model
    from hearthd.kv.disk_writes import DiskWrites
    from hearthd.models.facts import ModelFacts

__all__ = ["main"]

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_IN_USE: Final = 69
EXIT_FAULT: Final = 70
EXIT_CONFIG: Final = 78
_EXIT_STATUS: Final = """\
exit status:
  0   done; for `serve`, told to stop and stopped
  1   failed
  2   wrong usage
  69  the address is in use
  70  fault of the daemon
  78  configuration, installation or model cannot be used
"""

_logger = logging.getLogger("hearthd")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # gRPC's core writes to standard error by itself; what matters of it comes back as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        try:
            parsed = _parser(words).parse_args(words)
            command: Callable[[argparse.Namespace], int | None] = parsed.run
            return command(parsed) or EXIT_OK
        finally:
            # Here, where somebody can say that it cannot be written; --help ends by SystemExit.
            if sys.stdout:
                sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()  # whoever read it has seen enough
        return EXIT_FAILED
    except OSError as error:
        # What a write to an open file raises names none; anything else is a fault.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
            raise
        _drop_output()
        print(f"hearthd: the output cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED
    except HearthdError as error:
        return _fail(error)
    except ModuleNotFoundError as error:
        missing = _find_missing_package(error)
        if missing is None:
            raise
        return _fail(missing)


def _drop_output() -> None:
    """Let go of what could not be written: Python would try, and complain, once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: HearthdError) -> int:
    print(f"hearthd: {error}", file=sys.stderr)
    return exit_code(error)


def _find_missing_package(error: ModuleNotFoundError) -> MissingPackageError | None:
    """Return what to tell: the client alone installs this program too, and few of the packages that it needs."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "hearth", "hearthd"):
        return None  # a file of our own is gone
    return MissingPackageError(
        f"the Python package {package} is not installed; pip install 'hearth-chat[daemon]' brings it"
    )


def exit_code(error: BaseException) -> int:
    """Return the exit code that an error ends a command with."""
    match error:
        case ConfigError() | BundleError() | ModelNotFoundError() | MissingPackageError():
            return EXIT_CONFIG
        case AddressInUseError():
            return EXIT_IN_USE
        case BuildError() | BenchError():
            return EXIT_FAILED
        case _:
            return EXIT_FAULT


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hearthd",
        description="Serves a small chat model over gRPC.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hearthd {daemon_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve the model until told to stop")
    _add_config(serve)
    serve.set_defaults(run=_serve)

    check = commands.add_parser("check-config", help="check the configuration and print what it comes to")
    _add_config(check)
    check.add_argument("--quiet", action="store_true", help="print nothing but what is wrong")
    check.set_defaults(run=_check_config)

    add_token(commands)
    if next((word for word in words if not word.startswith("-")), None) in ("model", None):
        # Brings what builds models, which takes longer to import than serving may take to begin.
        from hearthd.build.cli import add_parser

        add_parser(commands)
    else:
        commands.add_parser("model", help="build, list and remove models")
    add_pair(commands)
    add_bench(commands)
    add_doctor(commands)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file; without it HEARTHD_CONFIG, else /etc/hearth/hearthd.toml or ~/.config/hearth/hearthd.toml",
    )


def _load_model(writes: "DiskWrites", config: Config) -> "Model":
    """Verify and load a model, to stay. Runs in its inference thread, where its imports cost nobody any time.

    writes: of all models. config: as the model has it (`Config.for_model`).
    """
    from hearthd.bundles.store import Store
    from hearthd.inference.model import load_model
    from hearthd.models import heap

    store = Store(config.model.directory)
    # An installation that was killed between two renames left the model under another name.
    store.sweep()
    model = load_model(store.open(config.model.name), config, writes)
    heap.keep()
    return model


def _survey_model(config: Config) -> "ModelFacts":
    """Read what an installed model says of itself; its weights are not read."""
    from hearthd.bundles.store import Store
    from hearthd.models.facts import facts_of_bundle

    store = Store(config.model.directory)
    store.sweep()
    return facts_of_bundle(store.open(config.model.name, verify=False), config)


def _serve(parsed: argparse.Namespace) -> int:
    from hearthd.kv.disk_writes import DiskWrites
    from hearthd.logs import configure_logging

    config = load_config(parsed.config)
    configure_logging(config.log.level)
    load = partial(_load_model, DiskWrites(config.cache.max_bytes_per_day))
    code = run_server(config, load, partial(load_config, parsed.config), _survey_model)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of the interpreter's end: a thread that is still inside of ONNX Runtime would crash there.
    os._exit(code)


def run_server(
    config: Config,
    load: "Callable[[Config], Model]",
    load_again: Callable[[], Config] | None = None,
    survey: "Callable[[Config], ModelFacts] | None" = None,
) -> int:
    """Serve until a signal comes; return the exit code. Errors are logged in one line.

    load: called in a model's inference thread, with the configuration as that model has it.
    load_again: reads what stands in the configuration file when SIGHUP comes.
    survey: says what is known of a model before it is loaded, from the same configuration as `load`.
    """
    from hearthd.life.notify import Notifier
    from hearthd.life.signals import listen_for_signals
    from hearthd.logs import log_incident
    from hearthd.server import CLOSE_SECONDS, Server

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = Server(config, load, Notifier(), load_again, survey)
        listen_for_signals(
            partial(loop.call_soon_threadsafe, server.stop),
            partial(loop.call_soon_threadsafe, server.reload),
            hard_exit_seconds=config.server.drain_grace_seconds + 2 * CLOSE_SECONDS,
        )
        await server.run()

    try:
        asyncio.run(run())
    except HearthdError as error:
        _logger.critical("%s", error)
        return exit_code(error)
    except Exception as error:  # noqa: BLE001 - one line with an id, no traceback: it could quote a prompt
        if isinstance(error, ModuleNotFoundError) and (missing := _find_missing_package(error)):
            _logger.critical("%s", missing)
            return exit_code(missing)
        log_incident("the daemon failed", error)
        return EXIT_FAULT
    return EXIT_OK


def _check_config(parsed: argparse.Namespace) -> None:
    from hearthd.access.tokens import list_tokens
    from hearthd.audit.audit_log import check_audit_file
    from hearthd.bundles.store import Store
    from hearthd.inference.shared_prompts import read_shared_prompts
    from hearthd.listening.listeners import find_listeners, find_metrics_listeners
    from hearthd.listening.tls import find_exposure, find_files, read_certificate
    from hearthd.policy.policy_file import PolicyFile

    file = choose_file(parsed.config)
    config = load_config(file, paths.service_environment())
    # Before anything that may be wrong: it may be another file than the one that somebody has in mind.
    if not parsed.quiet:
        print(f"configuration: {file or 'no file, the defaults'}", flush=True)
    listeners = find_listeners(config.server, config.tls, config.auth)
    find_metrics_listeners(config.metrics, listeners)
    if files := find_files(config.tls):
        read_certificate(files)
        if exposure := find_exposure(files.key):
            print(f"hearthd: warning: {exposure}", file=sys.stderr)
    if config.auth.token_file:
        for token in list_tokens(config.auth.token_file):
            if token.role not in config.roles:
                print(f"hearthd: warning: token {token.name} has no rights: no role {token.role}", file=sys.stderr)
    PolicyFile(config.policy.file, config.roles)
    if config.audit.file:
        check_audit_file(config.audit.file)
    read_shared_prompts(config)
    store = Store(config.model.directory)
    # Without the hashes, which take as long as reading the whole model.
    store.open(config.model.name, verify=False)
    for name in config.model_names[1:]:
        try:
            store.open(name, verify=False)
        except (ModelNotFoundError, BundleError) as error:
            # The daemon starts without it, and looks again when somebody asks for it.
            print(f"hearthd: warning: {name} cannot be served: {error}", file=sys.stderr)
    for line in _doubts_of_roles(config):
        print(f"hearthd: warning: {line}", file=sys.stderr)
    if parsed.quiet:
        return
    for key, value in settings(config).items():
        shown = f"0{value:o}" if key == "server.unix_socket_mode" else "" if value is None else value
        print(f"{key} = {list(shown) if isinstance(shown, tuple) else shown}")
    for key, value in (role_settings(config) | model_settings(config)).items():
        print(f"{key} = {list(value) if isinstance(value, tuple) else value}")
    print(f"good: would listen on {', '.join(listener.text for listener in listeners)}")


def _doubts_of_roles(config: Config) -> Iterable[str]:
    """Tell what of a role has no effect; it may be meant for later."""
    for name, role in config.roles.items():
        unknown = [model for model in role.models if model not in config.model_names]
        if unknown:
            yield (
                f"roles.{name}.models has {', '.join(unknown)}, which the daemon does not serve; it serves "
                f"{', '.join(config.model_names)}"
            )
        used = role.priority(None)
        # What nobody has written, but got with a lower max_priority, is as it should be.
        if used and used.word != role.default_priority != Role().default_priority:
            yield (
                f"roles.{name}.default_priority is {role.default_priority}, more urgent than max_priority, "
                f"{role.max_priority}; requests that ask for none get {used.word}"
            )


if __name__ == "__main__":
    sys.exit(main())
