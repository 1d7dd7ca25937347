"""Python's garbage collector around models that come and go.

A full collection looks at every object, and meanwhile nothing else runs: neither the event loop nor the inference
thread. Most of what there is, a model's vocabulary and the program itself, stays until the model goes, so it is left
out as soon as it is there [M: a collection of all 61,000 objects took 28 ms in a daemon under load; a board takes
longer].

Both take as long as such a collection, so neither is called on the event loop: `__main__` keeps what it has loaded,
`residents` lets it go.
"""

import gc
import threading

from hearthd.runtime.free_memory import return_free_memory

__all__ = ["keep", "let_go"]

# One model may come while another one goes.
_turn = threading.Lock()


def keep() -> None:
    """Let collections leave out all that there is now. After a model has been loaded."""
    with _turn:
        gc.unfreeze()
        gc.collect()
        gc.freeze()


def let_go() -> None:
    """Give a model's memory back, to which nothing refers any more but its own parts: they refer to each other.

    Nothing is left out of collections then until the next `keep`: a reference that ends a moment later would make the
    whole model stay, and so it costs that moment.
    """
    with _turn:
        gc.unfreeze()
        gc.collect()
    return_free_memory()
