"""What a loaded model leaves to the garbage collector, and what is taken when the model goes."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from hearthd.models import heap


class Part:
    """Refers to itself, as an engine and its parts do to each other."""

    def __init__(self) -> None:
        self.whole = self


@pytest.fixture(autouse=True)
def thaw() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_kept_takes_no_part_in_collections_until_it_is_let_go() -> None:
    part = Part()
    gone = weakref.ref(part)
    heap.keep()
    assert gc.get_freeze_count()
    del part
    gc.collect()
    assert gone() is not None
    heap.let_go()
    assert gone() is None
    # The program itself, and other models, stay left out.
    assert gc.get_freeze_count()


def test_garbage_is_not_kept() -> None:
    gone = weakref.ref(Part())
    heap.keep()
    assert gone() is None


def test_a_process_that_keeps_nothing_is_left_as_it_is() -> None:
    heap.let_go()
    assert not gc.get_freeze_count()
