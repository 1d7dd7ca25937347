"""What callers of a role may do: methods, models, rates, a daily quota. Three are built in; hearthd.toml adds others.

`METHODS` names every method that the daemon serves; a test compares it with the services themselves. A method that
stands nowhere here, whether it exists or not, is for roles with `all` only.

Knows no gRPC and no caller. Called by `config`, which reads `[roles.NAME]` into `Role`, and by `auth`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final

from hearthd.configuration.setting import Strings, Whole, Word, Words
from hearthd.priority import Priority

__all__ = [
    "BUILT_IN",
    "ENDLESS_METHODS",
    "HEALTH",
    "METHODS",
    "NO_RIGHTS",
    "OPEN_METHODS",
    "ROLE_FORM",
    "ROLE_NAME",
    "Role",
]

# As in the token file, where the role's name is a word of a line.
ROLE_NAME: Final = r"[a-z][a-z0-9_-]{0,31}"
ROLE_FORM: Final = "up to 32 of a-z, 0-9, '_', '-', a letter first"
_ALL: Final = "all"
HEALTH: Final = "health"
METHODS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "chat": ("hearth.v1.ChatService/Chat",),
        "models": (
            "hearth.v1.ModelService/ListModels",
            "hearth.v1.ModelService/GetModel",
            "hearth.v1.ModelService/CountTokens",
        ),
        "status": ("hearth.v1.StatusService/GetStatus",),
        HEALTH: ("grpc.health.v1.Health/Check", "grpc.health.v1.Health/List", "grpc.health.v1.Health/Watch"),
        "reflection": ("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",),
    }
)
"""A word of hearthd.toml to the methods that it stands for."""
OPEN_METHODS: Final = frozenset({"hearth.v1.PairingService/Pair"})
"""Open to whoever shows what they ask for, who is no caller yet: `pairing.gate` takes such calls before `auth` sees
them. Without that, they are like methods that are not there."""
ENDLESS_METHODS: Final = frozenset({METHODS[HEALTH][-1], *METHODS["reflection"]})
"""They go on until the caller leaves, so whether it still has the right is asked again meanwhile."""
_EACH: Final = tuple(method for methods in METHODS.values() for method in methods)
PRIORITIES: Final = tuple(priority.word for priority in Priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What each caller of a role may do. Numbers are for each caller by itself; 0 is no limit."""

    methods: Annotated[tuple[str, ...], Words((_ALL, *METHODS, *_EACH))] = tuple(METHODS)
    """Words of METHODS, single methods, or `all`."""
    models: Annotated[tuple[str, ...], Strings(64)] = ()
    """Names; none: every model."""
    requests_per_minute: Annotated[int, Whole(0, 10**6)] = 0
    tokens_per_minute: Annotated[int, Whole(0, 10**9)] = 0
    tokens_per_day: Annotated[int, Whole(0, 10**12)] = 0
    max_concurrent_chats: Annotated[int, Whole(0, 1024)] = 0
    max_prompt_tokens: Annotated[int, Whole(0, 131072)] = 0
    """Of one request, as `usage.prompt_tokens` counts them."""
    max_tokens: Annotated[int, Whole(0, 131072)] = 0
    """The longest answer that a request may ask for."""
    max_priority: Annotated[str, Word(PRIORITIES)] = Priority.INTERACTIVE.word
    """The most urgent one that a caller may ask for."""
    default_priority: Annotated[str, Word(PRIORITIES)] = Priority.NORMAL.word
    """Of requests that ask for none; never more urgent than `max_priority`."""

    def may_call(self, method: str) -> bool:
        """Whether the role has the right to a method. method: `package.Service/Method`."""
        if _ALL in self.methods or method in self.methods:
            return True
        return any(method in METHODS.get(word, ()) for word in self.methods)

    def may_use(self, model: str) -> bool:
        """Whether the role may use a model."""
        return not self.models or model in self.models

    def priority(self, asked: Priority | None) -> Priority | None:
        """Return the priority of a request that asks for one, or for none; None if the role may not."""
        most = Priority.of(self.max_priority)
        if asked is None:
            return max(Priority.of(self.default_priority), most)
        return asked if asked >= most else None


BUILT_IN: Final[Mapping[str, Role]] = MappingProxyType(
    {"admin": Role(methods=(_ALL,)), "user": Role(), "monitor": Role(methods=("status", HEALTH))}
)
NO_RIGHTS: Final = Role(methods=())
"""Of callers whose role is not configured (any more)."""
