"""Who leaves when a model needs memory that others have: pure choice, no clock and no model.

A model that is used now is never taken away from who uses it. It may be asked to leave all the same, if there is no
idle one: its chats end as they would, those that come after them wait, and so two models that do not fit together take
turns, and none of them starves. Called by `residents`.
"""

from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Tenant", "choose_leaving"]


class Tenant(Protocol):
    """A model in memory."""

    @property
    def num_users(self) -> int:
        """Who use it now."""

    @property
    def last_used(self) -> float:
        """When somebody began or ceased to, by any clock."""


_T = TypeVar("_T", bound=Tenant)


def choose_leaving(tenants: Iterable[_T]) -> _T | None:
    """Return the idle one that was used least recently; if none is idle, of all; None if there are none."""
    return min(tenants, key=lambda tenant: (tenant.num_users > 0, tenant.last_used), default=None)
