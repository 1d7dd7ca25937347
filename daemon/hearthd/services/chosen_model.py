"""The model that a request names. Called by the other modules of this room."""

from hearthd.caller import current_caller
from hearthd.errors import ModelNotFoundError
from hearthd.model import Model
from hearthd.worker import Worker

__all__ = ["find_model"]


def find_model(worker: Worker, name: str) -> Model:
    """Return the model of that name; the default one for an empty name.

    Raises ModelNotFoundError; and NotPermittedError if the caller's role may not use it, whether it is there or not.
    """
    model = worker.model
    current_caller().require_model(name or model.name)
    if name not in ("", model.name):
        # The name that was asked for is the caller's text, so it is not repeated.
        raise ModelNotFoundError(f"there is no model of that name; this daemon serves {model.name}")
    return model
