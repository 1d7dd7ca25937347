"""The configuration read again while the daemon serves: all of it that can change live, or nothing.

A part of the daemon that can change is a `Reloadable`. It names its keys, and `prepare(config)` works out what their
new values mean: it may read files, it raises ConfigError for what cannot be used, and it changes nothing. What it
returns is called once every part has prepared, on the event loop and without a pause between the parts; it makes the
change and must not fail. So no call ever sees half of a new configuration, and a broken one leaves the old in force.
Should a part fail all the same, the others change, the journal gets an incident, and the next reload tries again.
`live_parts` has the parts; to make another key changeable is to write one more, and no line here.

Keys of no part need a restart. They keep their values, and what the parts prepare for is the mixture that will be in
force: new values of live keys beside old values of the others, which must be right together.

Knows no gRPC and no model. Called by `server`, on SIGHUP.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from hearthd.configuration.config import Config, ModelOptions, settings
from hearthd.errors import ConfigError
from hearthd.logs import log_incident

__all__ = ["Apply", "Outcome", "Reload", "Reloadable"]

_logger = logging.getLogger(__name__)

Apply = Callable[[], object]
"""Makes a change that was prepared. Must not fail."""
# Sections of sections: all roles are one key here, and so are all models, but for the default one.
_ROLES: Final = "roles"
_MODELS: Final = "models"


class Reloadable(Protocol):
    """A part of the daemon that can take new values while it serves."""

    keys: frozenset[str]
    """`section.key`, `roles` or `models`; no other part's."""

    def prepare(self, config: Config) -> Apply:
        """Check what a configuration means for this part, and change nothing. In a thread of its own.

        Raises ConfigError.
        """


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a reload. error: what went wrong, one line; None if the configuration was taken over."""

    error: str | None = None
    is_partial: bool = False
    """Whether the new configuration is in force in spite of an error, but for a part that failed: a fault of ours."""
    changed: tuple[str, ...] = ()
    """Keys with another value than before."""
    need_restart: tuple[str, ...] = ()
    """Keys whose value in the file is not the one in force, and will not be before the next start."""


class Reload:
    """Holds the configuration in force. Of the event loop."""

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        parts: Sequence[Reloadable],
        check: Callable[[Config], object] = lambda _config: None,
    ) -> None:
        """load: reads what stands in the file now. check: what no single part can judge. Both raise ConfigError."""
        self.config = config
        self._load = load
        self._parts = parts
        self._check = check
        self._outcome = Outcome()
        self._live = frozenset().union(*(part.keys for part in parts))
        unknown = self._live - {*settings(config), _ROLES, _MODELS}
        assert not unknown, f"no such keys: {unknown}"

    def find_problem(self) -> str | None:
        """Return that the configuration in force is not the file's, and what helps; None if it is. Names no path."""
        if self._outcome.error is None:
            return None
        if self._outcome.is_partial:
            return "a part of the new configuration is not in force; the journal says why, another reload tries again"
        return "the new configuration is not used, the old one stays in force; `hearthd check-config` says why"

    async def run(self) -> Outcome:
        """Read, prepare, apply; tell the journal what came of it. One call at a time."""
        self._outcome = await self._run()
        return self._outcome

    async def _run(self) -> Outcome:
        try:
            # A disk that hangs must not hold up those who chat.
            config, file, applies = await asyncio.to_thread(self._prepare)
        except ConfigError as error:
            _logger.error("the configuration is not taken over, the old one stays in force: %s", error)
            return Outcome(error=str(error))
        except Exception as error:  # noqa: BLE001 - a fault of ours; what serves goes on serving
            incident = log_incident("the configuration could not be read again, the old one stays in force", error)
            return Outcome(error=f"incident {incident}, see the journal")
        changed = tuple(_differing(self.config, config))
        failed = _apply_all(applies)
        self.config = config
        need_restart = tuple(_differing(config, file))
        _logger.info("configuration read again; changed: %s", ", ".join(changed) or "nothing")
        if need_restart:
            _logger.warning("the file has other values of %s, which need a restart", ", ".join(need_restart))
        return Outcome(error=failed, is_partial=failed is not None, changed=changed, need_restart=need_restart)

    def _prepare(self) -> tuple[Config, Config, list[Apply]]:
        file = self._load()
        mixed = _mix(self.config, file, self._live)
        self._check(mixed)
        return mixed, file, [part.prepare(mixed) for part in self._parts]


def _apply_all(applies: Iterable[Apply]) -> str | None:
    """Make all changes; return what is told of those that failed, which keep none of the others from being made."""
    incidents = []
    for apply in applies:
        try:
            apply()
        except Exception as error:  # noqa: BLE001 - a fault of ours; the others' changes belong together
            incidents.append(log_incident("a part of the daemon could not take the new configuration", error))
    return f"incident {', '.join(incidents)}, see the journal" if incidents else None


def _mix(old: Config, new: Config, live: Iterable[str]) -> Config:
    """Return the old configuration with the new one's values of the live keys."""
    sections: dict[str, Any] = {}
    for name in live:
        section, _, key = name.partition(".")
        if section == _ROLES:
            sections[_ROLES] = new.roles
        elif name == _MODELS:
            sections["model_options"] = _with_default_of(old, new)
        else:
            section_now = sections.get(section, getattr(old, section))
            sections[section] = replace(section_now, **{key: getattr(getattr(new, section), key)})
    return replace(old, **sections)


def _with_default_of(old: Config, new: Config) -> dict[str, ModelOptions]:
    """Return the new models' options, but the default one's as they were: it is loaded at the start."""
    default = old.model.name
    options = {name: each for name, each in new.model_options.items() if name != default}
    return options | {name: each for name, each in old.model_options.items() if name == default}


def _differing(old: Config, new: Config) -> Iterable[str]:
    before, after = settings(old), settings(new)
    yield from (key for key in before if before[key] != after[key])
    if old.roles != new.roles:
        yield _ROLES
    names = dict.fromkeys((*old.model_options, *new.model_options))
    yield from (f"{_MODELS}.{name}" for name in names if old.model_options.get(name) != new.model_options.get(name))
