"""`hearthd token`: make, list and revoke callers' tokens.

Reads arguments and prints; `tokens` does the rest. Errors are raised: `__main__`, which calls `add_parser`, turns them
into a line and an exit code. The running daemon needs to be told nothing.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Final

from hearthd.access.tokens import DEFAULT_ROLE, Token, create_token, list_tokens, revoke_token
from hearthd.configuration import paths
from hearthd.configuration.config import Config, choose_file, load_config
from hearthd.configuration.roles import BUILT_IN
from hearthd.errors import ConfigError

__all__ = ["add_parser"]

_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_MAX_SECONDS: Final = 100 * _SECONDS["y"]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `token` to a program's commands; the parsed arguments have `run`."""
    token = commands.add_parser("token", help="make, list and revoke callers' tokens")
    actions = token.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a token and print it, once")
    create.add_argument("name", metavar="NAME", help="who will use it")
    create.add_argument(
        "--role",
        default=DEFAULT_ROLE,
        help=f"{', '.join(BUILT_IN)}, or a [roles.ROLE] of the configuration (default: {DEFAULT_ROLE})",
    )
    create.add_argument(
        "--expires",
        type=_lifetime,
        metavar="TIME",
        help="how long it is valid: a number with m, h, d, w or y, for example 30d (default: until it is revoked)",
    )
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="list names, roles, and when each was made and expires")
    listing.add_argument("--json", action="store_true", help="write one JSON object to standard output")
    listing.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="make a token invalid, from the next call on")
    revoke.add_argument("name", metavar="NAME")
    revoke.set_defaults(run=_revoke)
    for action in (create, listing, revoke):
        action.add_argument("--config", type=Path, metavar="FILE", help="TOML file, as for `serve`")
        action.add_argument(
            "--token-file", type=Path, metavar="FILE", help="instead of the configuration's auth.token_file"
        )


def _lifetime(text: str) -> int:
    """Return seconds. Raises what argparse shows as wrong usage."""
    match = re.fullmatch(r"([0-9]{1,9})([mhdwy])", text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 0 < seconds <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no time; give for example 12h, 30d or 1y, at most 100y")
    return seconds


def _file(parsed: argparse.Namespace, config: Config) -> Path:
    return parsed.token_file.absolute() if parsed.token_file else config.auth.token_file or paths.token_file()


def _changed_file(parsed: argparse.Namespace, config: Config) -> Path:
    path = _file(parsed, config)
    if paths.is_credential(path):
        raise ConfigError(
            f"{path} is a copy that systemd made when the service started; change the file that it is made of, with "
            "--token-file (the unit names /etc/credstore/hearth.tokens), and restart the service"
        )
    return path


def _create(parsed: argparse.Namespace) -> None:
    config = load_config(parsed.config, paths.service_environment())
    if parsed.role not in config.roles:
        raise ConfigError(
            f"there is no role {parsed.role[:80]!r}; give one of {', '.join(config.roles)}, or add a section "
            "[roles.NAME] to the configuration first"
        )
    path = _changed_file(parsed, config)
    print(create_token(path, parsed.name, role=parsed.role, seconds_valid=parsed.expires))
    print(f"hearthd: this is the only time that the token is shown; its hash stands in {path}", file=sys.stderr)
    if config.auth.token_file is None:
        # Else it seems to protect something: the daemon reads no file that the configuration does not name.
        value = "auto" if path == paths.token_file() else path
        print(
            f"hearthd: callers need no token until {choose_file(parsed.config) or paths.configuration_file()} has "
            f'[auth] token_file = "{value}" and the daemon is restarted',
            file=sys.stderr,
        )


def _list(parsed: argparse.Namespace) -> None:
    config = load_config(parsed.config, paths.service_environment())
    tokens = list_tokens(_file(parsed, config))
    if parsed.json:
        print(json.dumps({"tokens": [_described(token) for token in tokens]}))
        return
    for token in tokens:
        expires = "never" if token.expires is None else token.expires
        notes = " (expired)" if token.has_expired(time.time()) else ""
        notes += "" if token.role in config.roles else f" (role {token.role} is not configured: no rights)"
        print(f"{token.name}\t{token.role}\t{token.created}\t{expires}{notes}")


def _described(token: Token) -> dict[str, object]:
    return {
        "name": token.name,
        "role": token.role,
        "created": token.created,
        "expires": token.expires,
        "is_expired": token.has_expired(time.time()),
    }


def _revoke(parsed: argparse.Namespace) -> None:
    path = _changed_file(parsed, load_config(parsed.config, paths.service_environment()))
    revoke_token(path, parsed.name)
    print(f"hearthd: {parsed.name} is revoked in {path}", file=sys.stderr)
