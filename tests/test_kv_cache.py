"""The books of the slots: what is reused, what is thrown away, and that KV always is where they say."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fakes import FakeRunner
from hearthd.kv.kv_cache import KVCache, Place


def fill(cache: KVCache, runner: FakeRunner, slot: int, token_ids: list[int]) -> None:
    """Do what the engine does after a forward."""
    runner.slots[slot] = [*runner.slots[slot][: cache.num_tokens(slot)], *token_ids]
    cache.extend(slot, token_ids)


def acquire(cache: KVCache, tokens: list[int], identity: str, num_answer: int = 8) -> Place:
    place = cache.acquire(tokens, identity, len(tokens) + num_answer)
    assert place is not None
    return place


def run(cache: KVCache, runner: FakeRunner, tokens: list[int], identity: str = "a") -> Place:
    place = acquire(cache, tokens, identity)
    fill(cache, runner, place.slot, tokens[place.num_past :])
    return place


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(num_slots=3)


@pytest.fixture
def cache(runner: FakeRunner) -> KVCache:
    return KVCache(runner)


def test_empty_slot_has_nothing_to_reuse(cache: KVCache) -> None:
    assert acquire(cache, [1, 2, 3], "a") == Place(slot=0, num_past=0, num_cached=0)


def test_next_turn_goes_on_in_its_slot(cache: KVCache, runner: FakeRunner) -> None:
    place = run(cache, runner, [1, 2, 3])
    fill(cache, runner, place.slot, [4, 5])
    cache.release(place.slot)
    assert acquire(cache, [1, 2, 3, 4, 5, 6, 7], "a") == Place(slot=place.slot, num_past=5, num_cached=5)
    assert runner.num_copied == 0


def test_longest_common_prefix_is_kept_and_the_rest_is_not(cache: KVCache, runner: FakeRunner) -> None:
    for _ in range(3):
        run(cache, runner, [1, 2, 3, 4])
    for slot in range(3):
        cache.release(slot)
    place = acquire(cache, [1, 2, 9, 4], "a")
    assert (place.num_past, place.num_cached) == (2, 2)
    assert cache.num_tokens(place.slot) == 2


def test_one_token_of_the_prompt_is_left_to_run(cache: KVCache, runner: FakeRunner) -> None:
    cache.release(run(cache, runner, [1, 2, 3]).slot)
    assert acquire(cache, [1, 2, 3], "a").num_past == 2


def test_other_identity_gets_nothing(cache: KVCache, runner: FakeRunner) -> None:
    cache.release(run(cache, runner, [1, 2, 3], "alice").slot)
    assert acquire(cache, [1, 2, 3, 4], "bob") == Place(slot=1, num_past=0, num_cached=0)
    assert acquire(cache, [1, 2, 3, 4], "alice") == Place(slot=0, num_past=3, num_cached=3)


def test_beginning_shared_with_a_running_sequence_is_copied(cache: KVCache, runner: FakeRunner) -> None:
    run(cache, runner, [1, 2, 3, 4])
    assert acquire(cache, [1, 2, 3, 9], "a") == Place(slot=1, num_past=3, num_cached=3)
    assert runner.slots[1] == [1, 2, 3]
    assert runner.slots[0] == [1, 2, 3, 4]


def test_other_conversation_keeps_its_slot_while_another_is_worth_less(cache: KVCache, runner: FakeRunner) -> None:
    cache.release(run(cache, runner, [1, 2, 3, 4, 5]).slot)
    place = run(cache, runner, [1, 2, 8])
    assert place == Place(slot=1, num_past=2, num_cached=2)
    cache.release(place.slot)
    assert acquire(cache, [1, 2, 3, 4, 5, 6], "a") == Place(slot=0, num_past=5, num_cached=5)


def test_least_recently_used_slot_is_taken(cache: KVCache, runner: FakeRunner) -> None:
    slots = [run(cache, runner, [10 * number, 1]).slot for number in (1, 2, 3)]
    assert not cache.has_idle_slot
    for slot in (slots[1], slots[2], slots[0]):
        cache.release(slot)
    assert [acquire(cache, [99], "a").slot for _ in range(3)] == [slots[1], slots[2], slots[0]]


def test_failed_run_leaves_nothing_to_reuse(cache: KVCache, runner: FakeRunner) -> None:
    place = run(cache, runner, [1, 2, 3])
    cache.forget(place.slot)
    cache.release(place.slot)
    assert acquire(cache, [1, 2, 3, 4], "a").num_past == 0


class TestDecodedTokensOfOtherBits:
    """With a runner whose decoding writes other bits than its prefill, only prefilled tokens are there for others."""

    @pytest.fixture
    def runner(self) -> FakeRunner:
        return FakeRunner(num_slots=3, min_run=2)

    def test_are_not_kept_for_the_next_turn(self, cache: KVCache, runner: FakeRunner) -> None:
        place = run(cache, runner, [1, 2, 3])
        for token in (4, 5):
            fill(cache, runner, place.slot, [token])
        assert cache.num_tokens(place.slot) == 5
        cache.release(place.slot)
        assert acquire(cache, [1, 2, 3, 4, 5, 6, 7], "a") == Place(slot=place.slot, num_past=3, num_cached=3)

    def test_are_not_copied_from_a_running_sequence(self, cache: KVCache, runner: FakeRunner) -> None:
        place = run(cache, runner, [1, 2, 3])
        fill(cache, runner, place.slot, [4])
        assert acquire(cache, [1, 2, 3, 4, 5, 6], "a") == Place(slot=1, num_past=3, num_cached=3)
        assert runner.slots[1] == [1, 2, 3]

    def test_hide_what_was_prefilled_behind_them(self, cache: KVCache, runner: FakeRunner) -> None:
        place = run(cache, runner, [1, 2, 3])
        fill(cache, runner, place.slot, [4])
        fill(cache, runner, place.slot, [5, 6])
        cache.release(place.slot)
        assert acquire(cache, [1, 2, 3, 4, 5, 6, 7, 8], "a").num_past == 3


class TestPreset:
    @pytest.fixture
    def runner(self) -> FakeRunner:
        return FakeRunner(num_slots=2, preset_tokens=(1, 2))

    def test_is_loaded_and_not_counted_as_cached(self, cache: KVCache, runner: FakeRunner) -> None:
        assert acquire(cache, [1, 2, 3], "a") == Place(slot=0, num_past=2, num_cached=0)
        assert runner.slots[0] == [1, 2]

    def test_is_not_for_a_prompt_that_begins_otherwise(self, cache: KVCache) -> None:
        assert acquire(cache, [1, 3, 2], "a").num_past == 0

    def test_leaves_one_token_to_run(self, cache: KVCache) -> None:
        assert acquire(cache, [1, 2], "a") == Place(slot=0, num_past=1, num_cached=0)

    def test_longer_cached_beginning_wins(self, cache: KVCache, runner: FakeRunner) -> None:
        cache.release(run(cache, runner, [1, 2, 3]).slot)
        assert acquire(cache, [1, 2, 3, 4], "a") == Place(slot=0, num_past=3, num_cached=3)

    def test_is_preferred_to_an_equally_long_cached_one(self, cache: KVCache, runner: FakeRunner) -> None:
        cache.release(run(cache, runner, [1, 2, 3]).slot)
        assert acquire(cache, [1, 2, 4], "a") == Place(slot=1, num_past=2, num_cached=0)


class TestSwap:
    def test_moves_kv_and_books(self, cache: KVCache, runner: FakeRunner) -> None:
        run(cache, runner, [1, 2, 3], "a")
        run(cache, runner, [7, 8], "b")
        cache.swap(0, 1)
        assert (runner.slots[0], runner.slots[1]) == ([7, 8], [1, 2, 3])
        assert (cache.num_tokens(0), cache.num_tokens(1)) == (2, 3)
        cache.release(1)
        assert acquire(cache, [1, 2, 3, 4], "a") == Place(slot=1, num_past=3, num_cached=3)

    def test_with_an_empty_slot_copies_once(self, cache: KVCache, runner: FakeRunner) -> None:
        run(cache, runner, [1, 2, 3])
        cache.swap(0, 2)
        assert runner.slots[2] == [1, 2, 3]
        assert runner.num_copied == 3
        cache.swap(1, 0)
        assert runner.num_copied == 3


short_prompts = st.lists(st.integers(1, 3), min_size=1, max_size=8)


class Books(RuleBasedStateMachine):
    """Any sequence of calls: what the cache says of a slot is what stands in it, and identities stay apart."""

    @initialize(num_slots=st.integers(1, 4), preset=st.lists(st.integers(1, 3), max_size=3), min_run=st.integers(1, 2))
    def begin(self, num_slots: int, preset: list[int], min_run: int) -> None:
        self.runner = FakeRunner(num_slots=num_slots, preset_tokens=tuple(preset), min_run=min_run)
        self.cache = KVCache(self.runner)
        self.tokens: dict[int, list[int]] = {}
        # Every sequence of tokens that an identity has run, to prove that what is reused came from there.
        self.known: dict[str, list[list[int]]] = {"a": [], "b": []}
        self.identities: dict[int, str] = {}

    @rule(prompt=short_prompts, identity=st.sampled_from("ab"))
    def acquire(self, prompt: list[int], identity: str) -> None:
        if not self.cache.has_idle_slot:
            return
        place = acquire(self.cache, prompt, identity)
        assert place.slot not in self.tokens
        assert 0 <= place.num_past < len(prompt)
        assert place.num_cached in (0, place.num_past)
        if place.num_cached:
            assert any(known[: place.num_cached] == prompt[: place.num_cached] for known in self.known[identity])
        elif place.num_past:
            assert tuple(prompt[: place.num_past]) == self.runner.preset_tokens[: place.num_past]
        fill(self.cache, self.runner, place.slot, prompt[place.num_past :])
        self.tokens[place.slot] = list(prompt)
        self.identities[place.slot] = identity
        self.known[identity].append(list(prompt))

    @rule(data=st.data(), token_id=st.integers(1, 3))
    def decode(self, data: st.DataObject, token_id: int) -> None:
        if self.tokens:
            slot = data.draw(st.sampled_from(sorted(self.tokens)))
            fill(self.cache, self.runner, slot, [token_id])
            self.tokens[slot].append(token_id)
            self.known[self.identities[slot]].append(list(self.tokens[slot]))

    @rule(data=st.data(), is_failed=st.booleans())
    def release(self, data: st.DataObject, is_failed: bool) -> None:
        if self.tokens:
            slot = data.draw(st.sampled_from(sorted(self.tokens)))
            if is_failed:
                self.cache.forget(slot)
                self.runner.slots[slot] = []
            self.cache.release(slot)
            del self.tokens[slot]

    @rule(most=st.integers(1, 5))
    def read_an_answer(self, most: int) -> None:
        unread = self.cache.next_unread(most)
        if unread is None:
            return
        slot, token_ids = unread
        assert slot not in self.tokens
        assert self.runner.min_run <= len(token_ids) <= max(most, self.runner.min_run) + 1
        start = self.cache.num_tokens(slot)
        self.runner.forward(np.asarray([token_ids]), slot, np.asarray([start], np.int32))
        self.cache.note_read(slot, len(token_ids))

    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        numbers = st.integers(0, self.runner.num_slots - 1)
        a, b = data.draw(numbers), data.draw(numbers)
        if a != b:
            self.cache.swap(a, b)
            for books in (self.tokens, self.identities):
                _exchange(books, a, b)

    @invariant()
    def held_slots_hold_their_tokens(self) -> None:
        for slot, tokens in getattr(self, "tokens", {}).items():
            assert self.runner.slots[slot][: self.cache.num_tokens(slot)] == tokens


def _exchange(books: dict[int, Any], a: int, b: int) -> None:
    kept = {slot: books.pop(slot) for slot in (a, b) if slot in books}
    books.update({b if slot == a else a: value for slot, value in kept.items()})


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=150, stateful_step_count=30)
