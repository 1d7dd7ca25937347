"""The model that a request names. Called by the other modules of this room."""

from hearthd.access.caller import current_caller
from hearthd.errors import ModelNotFoundError
from hearthd.models.entry import Entry
from hearthd.models.pool import ModelPool

__all__ = ["find_model"]


def find_model(models: ModelPool, name: str) -> Entry:
    """Return the model of that name; the default one for an empty name. `ModelPool.using` waits until it is loaded.

    Raises NotServingError while the daemon loads; ModelNotFoundError; and NotPermittedError if the caller's role may
    not use it, whether it is there or not.
    """
    models.require_loaded()
    name, caller = name or models.default.name, current_caller()
    caller.require_model(name)
    entry = models.find(name)
    if entry is None:
        allowed = [each.name for each in models.entries if caller.rights.may_use(each.name)]
        # The name that was asked for is the caller's text, so it is not repeated.
        raise ModelNotFoundError(f"there is no model of that name; this daemon serves {', '.join(allowed) or 'others'}")
    return entry
