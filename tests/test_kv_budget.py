"""KV stays within its budget: in the books of a fake, and in the kernel's own accounts of a real runner's memory."""

from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

import tiny_tokenizers as tiny
from decoders import scales_of, tiny_checkpoint, tiny_runner
from fakes import FakeRunner, expected_tokens
from hearthd.build.decoder.recipe import Recipe
from hearthd.errors import ConfigError
from hearthd.generation.drafting import Drafting
from hearthd.generation.engine import Engine, Failed, RunTerminated, Sequence
from hearthd.kv import choosing, copies, eviction
from hearthd.kv.budget import KVBudget, block_tokens
from hearthd.kv.copies import Copies
from hearthd.kv.eviction import loss_of, num_usable
from hearthd.kv.kv_cache import KVCache
from hearthd.kv.slot import Slot, num_shared
from hearthd.runtime.kv_buffers import DecoderShape, KVSlots, PromptBuffers
from hearthd.sequences.sampling import SamplingParams

TOKENIZER = tiny.chat_tokenizer("byte_per_token")
PAGE = 4096


def asked(prompt: list[int], max_tokens: int, identity: str = "a") -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Sequence(request_id="r", prompt_ids=tuple(prompt), params=params, cache_identity=identity, arrived=0.0)


def test_a_block_is_whole_pages_and_64_positions_at_least() -> None:
    assert block_tokens(64, PAGE) == 64
    assert block_tokens(128, PAGE) == 64
    assert block_tokens(96, PAGE) == 128
    assert block_tokens(64, 16384) == 256


def test_the_context_is_what_a_prompt_can_be_read_in() -> None:
    budget = KVBudget(64, 10, 4)
    assert budget.context_length == 128
    assert (budget.blocks(128), budget.prompt_blocks(128)) == (2, 8)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40))
def test_num_shared_counts_as_one_by_one(a: list[int], b: list[int]) -> None:
    by_hand = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert num_shared(a, b) == by_hand


similar = st.builds(
    lambda num, end, num_reusable, identity, num_public: Slot(
        tokens=[*[1, 2, 1, 1, 2, 2, 1, 2][:num], *end], num_reusable=num_reusable, identity=identity,
        num_public=num_public,
    ),
    st.integers(0, 8), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 14), st.sampled_from("ab"),
    st.integers(0, 5),
)  # fmt: skip


class TestCopies:
    @given(st.lists(similar, max_size=9))
    @settings(max_examples=300)
    def test_are_what_comparing_each_slot_with_each_other_one_finds(self, slots: list[Slot]) -> None:
        found = Copies(slots)
        by_hand = [
            [
                num_usable(other, slot.tokens, slot.identity, slot.num_public) if other is not slot else 0
                for other in slots
            ]
            for slot in slots
        ]
        assert found.usable.tolist() == by_hand
        assert found.longest == [max(row) for row in by_hand]

    @pytest.mark.parametrize("num_slots", [4, 40])
    def test_a_prompt_is_taken_with_two_comparisons_for_each_slot(
        self, monkeypatch: pytest.MonkeyPatch, num_slots: int
    ) -> None:
        """And one more; with the memory full, so that for every one something goes. Running answers wait for it."""
        num_compared = 0

        def counted(a: Tokens[int], b: Tokens[int]) -> int:
            nonlocal num_compared
            num_compared += 1
            return num_shared(a, b)

        for module in (choosing, copies, eviction):
            monkeypatch.setattr(module, "num_shared", counted)
        runner = FakeRunner(num_slots=num_slots, kv_budget=KVBudget(4, 8 * num_slots - 8, 0))
        cache = KVCache(runner)
        system = list(range(100, 116))
        for number in range(3 * num_slots):
            prompt = [*system, *[number] * 16]
            num_compared = 0
            place = cache.acquire(prompt, "a", len(prompt))
            assert place is not None
            assert num_compared <= 2 * num_slots + 1
            runner.slots[place.slot] = prompt
            cache.extend(place.slot, prompt[place.num_past :])
            cache.release(place.slot)


class TestWaiting:
    """Slots there are enough; it is memory that they wait for."""

    @pytest.fixture
    def cache(self) -> KVCache:
        return KVCache(FakeRunner(num_slots=6, kv_budget=KVBudget(4, 20, 4)))

    def test_a_reservation_that_does_not_fit_beside_others_waits(self, cache: KVCache) -> None:
        assert cache.acquire([1] * 8, "a", 16) is not None  # 4 blocks, and 8 to read it
        assert cache.acquire([2] * 8, "a", 40) is None  # 10 blocks more
        assert cache.acquire([2] * 8, "a", 32) is not None  # 8 blocks more; the prompt buffers are shared
        assert cache.num_blocks == 20

    def test_what_is_released_makes_room(self, cache: KVCache) -> None:
        first = cache.acquire([1] * 8, "a", 48)
        assert first is not None
        assert cache.acquire([2] * 8, "a", 16) is None
        cache.release(first.slot)
        assert cache.acquire([2] * 8, "a", 16) is not None

    def test_the_longest_that_the_context_allows_fits_an_empty_cache(self, cache: KVCache) -> None:
        place = cache.acquire([1] * 15, "a", 16)
        assert place is not None
        cache.extend(place.slot, [1] * 15)
        cache.release(place.slot)
        # Nothing is left of the other one: it is all needed.
        assert cache.acquire([2] * 15, "a", 16) is not None

    @settings(max_examples=200, deadline=None)
    @given(
        calls=st.lists(
            st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(0, 40), st.booleans()), min_size=5, max_size=30
        )
    )
    def test_whether_there_is_room_is_known_before(self, calls: list[tuple[int, int, int, bool]]) -> None:
        """Whatever is cached, shared, half read and reserved."""
        runner = FakeRunner(num_slots=4, context_length=64, kv_budget=KVBudget(4, 80, 4))
        cache = KVCache(runner)
        held: list[int] = []
        for number, length, num_answer, is_read in calls:
            if number < len(held):
                slot = held.pop(number)
                without = cache.has_room_for(64, 60, without={slot})
                cache.release(slot)
                assert cache.has_room_for(64, 60) == without
                continue
            prompt = [*[1] * (length // 2), *[number + length] * (length - length // 2)]
            has_room = cache.has_room_for(length + num_answer, length)
            place = cache.acquire(prompt, "a", length + num_answer)
            assert has_room == (place is not None)
            if place is not None:
                held.append(place.slot)
                new = prompt[place.num_past :] if is_read else []
                runner.slots[place.slot] = [*runner.slots[place.slot][: place.num_past], *new]
                cache.extend(place.slot, new)


class TestEviction:
    """Conversations that share a system prompt; blocks of 4 tokens."""

    def end(self, cache: KVCache, runner: FakeRunner, prompt: list[int], identity: str = "a") -> int:
        place = cache.acquire(prompt, identity, len(prompt) + 1)
        assert place is not None
        new = prompt[place.num_past :]
        runner.slots[place.slot] = [*runner.slots[place.slot][: place.num_past], *new]
        cache.extend(place.slot, new)
        cache.release(place.slot)
        return place.num_cached

    def test_ends_go_before_what_conversations_share(self) -> None:
        runner = FakeRunner(num_slots=8, kv_budget=KVBudget(4, 16, 0))
        cache = KVCache(runner)
        system = list(range(100, 116))
        for number in range(3):
            self.end(cache, runner, [*system, number, number, number, number])
        # Something else needs 11 of 16 blocks: one copy of the system prompt is all that can stay, and it does.
        self.end(cache, runner, [1] * 43, identity="b")
        assert self.end(cache, runner, [*system, 9, 9, 9, 9]) == 16

    def test_one_place_serves_conversations_that_share_a_system_prompt(self) -> None:
        runner = FakeRunner(num_slots=1, kv_budget=KVBudget(4, 16, 0))
        cache = KVCache(runner)
        system = list(range(100, 116))
        self.end(cache, runner, [*system, 0, 0, 0, 0])
        assert [self.end(cache, runner, [*system, number, 0, 0, 0]) for number in (1, 2, 3)] == [16, 16, 16]

    def test_what_is_used_often_outlives_what_came_last(self) -> None:
        runner = FakeRunner(num_slots=8, kv_budget=KVBudget(4, 16, 0))
        cache = KVCache(runner)
        system = list(range(100, 116))
        for number in range(6):
            self.end(cache, runner, [*system, number])
        self.end(cache, runner, [1] * 15, identity="b")
        self.end(cache, runner, [2] * 39, identity="c")
        assert self.end(cache, runner, [*system, 50]) == 16
        assert self.end(cache, runner, [1] * 15, identity="b") <= 4

    def test_a_copy_is_thrown_away_before_what_stands_only_once(self) -> None:
        slots = [Slot(tokens=[1] * 8, num_reusable=8, identity="a") for _ in range(2)]
        slots.append(Slot(tokens=[2] * 8, num_reusable=8, identity="a"))
        for slot in slots:
            slot.settle(1)
        assert [loss_of(slots, Copies(slots), number, 0, 2) > 0 for number in range(3)] == [False, False, True]


loads = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), min_size=1, max_size=24),
        st.integers(1, 12),
        st.sampled_from("ab"),
        st.integers(0, 6),
        st.sampled_from(["", "", "stop", "leave", "stop and leave"]),
    ),
    min_size=1,
    max_size=12,
)


def repetitive(history: Tokens[int]) -> NDArray[np.float32]:
    """Logits of an answer whose drafts are right for a while, and then wrong."""
    logits = np.zeros(262, np.float32)
    logits[1 + (history[-1] + (len(history) % 7 == 0)) % 3] = 1
    return logits


@given(loads, st.integers(1, 5), st.integers(10, 40), st.integers(0, 4), st.integers(1, 2), st.booleans())
@settings(max_examples=300)
def test_any_load_stays_within_any_budget_and_every_answer_is_right(
    load: list[tuple[list[int], int, str, int, str]],
    num_slots: int,
    num_blocks: int,
    factor: int,
    min_run: int,
    has_drafts: bool,
) -> None:
    """The runner counts what is touched at each run, and refuses more than the books have; nobody waits for ever."""
    runner = FakeRunner(
        num_slots=num_slots,
        min_run=min_run,
        kv_budget=KVBudget(4, num_blocks, factor, block_bytes=1),
        logits_after=repetitive if has_drafts else None,
    )
    drafting = Drafting(context_length=runner.context_length) if has_drafts else None
    engine = Engine(runner, TOKENIZER, prefill_chunk=5, drafting=drafting)
    sequences: list[Sequence] = []

    def step() -> None:
        assert not any(isinstance(event, Failed) for _, event in engine.step())
        assert engine.kv_bytes[0] <= engine._cache.num_blocks, "more memory than the books have"

    for prompt, max_tokens, identity, num_steps, fault in load:
        if len(prompt) < engine.context_length:
            sequences.append(asked(prompt, max_tokens, identity))
            engine.add(sequences[-1])
        for _ in range(num_steps):
            step()
        if "stop" in fault:
            runner.fail_next = RunTerminated()
            step()
            runner.fail_next = None
        if "leave" in fault and sequences:
            engine.remove(sequences.pop())
            assert engine.kv_bytes[0] <= engine._cache.num_blocks, "more memory than the books have"
    for _ in range(2000):
        if not engine.has_work:
            break
        step()
    assert not engine.has_work
    for sequence in sequences:
        assert sequence.output_ids == expected_tokens(
            runner.logits_after,
            sequence.prompt_ids,
            sequence.params,
            eos_ids=TOKENIZER.eos_ids,
            context_length=engine.context_length,
        )


def resident_bytes(*arrays: NDArray[Any]) -> int:
    """Count the pages of arrays that are in memory, by the kernel's page map."""
    total = 0
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for array in arrays:
            start = array.__array_interface__["data"][0]
            pagemap.seek(start // PAGE * 8)
            entries = np.frombuffer(pagemap.read(array.nbytes // PAGE * 8), np.uint64)
            # Present, or swapped out.
            total += int(((entries >> np.uint64(62)) != 0).sum()) * PAGE
    return total


BLOCK = 12 * PAGE


class TestMemory:
    SHAPE = DecoderShape(num_layers=2, num_kv_heads=3, head_dim=64, vocab_size=8)

    def filled(self, num_slots: int = 3) -> KVSlots:
        slots = KVSlots(self.SHAPE, num_slots=num_slots, context_length=1000, dtype=np.int8)
        for slot, num_tokens in enumerate((1000, 300, 65)[:num_slots]):
            slots.write(slot, 0, [np.full((3, num_tokens, 64), 1 + slot, np.int8)] * 4)
        return slots

    def test_blocks_are_what_the_kernel_counts(self) -> None:
        slots = self.filled()
        blocks = 16 + 5 + 2
        assert slots.budget(0, 3, 4) == KVBudget(64, (3 + 4) * 16, 4, BLOCK)
        assert resident_bytes(*slots.arrays) == blocks * BLOCK == slots.num_blocks * BLOCK

    def test_what_is_given_back_is_gone(self) -> None:
        slots = self.filled()
        slots.give_back(0, 130)
        assert resident_bytes(*slots.arrays) == (3 + 5 + 2) * BLOCK
        assert (slots.read(0, 130) == 1).all()
        slots.give_back(0, 0)
        assert resident_bytes(*slots.arrays) == (5 + 2) * BLOCK == slots.num_blocks * BLOCK
        assert (slots.read(1, 300) == 2).all()

    @pytest.mark.parametrize(("num_a", "num_b"), [(1000, 65), (65, 1000), (1000, 0), (0, 65)])
    def test_a_swap_needs_no_more_than_there_was(self, num_a: int, num_b: int) -> None:
        slots = KVSlots(self.SHAPE, num_slots=2, context_length=1000, dtype=np.int8)
        for slot, num in ((0, num_a), (1, num_b)):
            if num:
                slots.write(slot, 0, [np.full((3, num, 64), 1 + slot, np.int8)] * 4)
        before = resident_bytes(*slots.arrays)
        slots.swap(0, 1, num_a, num_b)
        assert not num_a or (slots.read(1, num_a) == 1).all()
        assert not num_b or (slots.read(0, num_b) == 2).all()
        assert resident_bytes(*slots.arrays) == before

    def test_prompt_buffers_shrink_to_what_is_asked(self) -> None:
        slots = self.filled()
        prompt = PromptBuffers(slots)
        assert prompt.factor == 4
        prompt.hold(0, 960, 0)
        assert resident_bytes(*prompt.arrays) == 4 * 15 * BLOCK
        prompt.give_back(100)
        assert resident_bytes(*prompt.arrays) == 4 * 2 * BLOCK == prompt.num_blocks * BLOCK
        prompt.hold(0, 1000, 0)
        assert all((array[:, :, :1000] == 1).all() for array in prompt.arrays)


def test_a_real_runner_stays_within_its_bytes_at_every_step(tmp_path: Path) -> None:
    """Random conversations on more slots than fit; after each step the kernel is asked."""
    checkpoint = tiny_checkpoint(tmp_path)
    plain = tiny_runner(tmp_path / "float32", checkpoint, Recipe.reference())
    long = [(17 * place * place + 5 * place + 3) % 250 for place in range(60)]
    scales = scales_of(plain, long)
    free = tiny_runner(tmp_path / "free", checkpoint, Recipe.reference(), kv_scales=scales, num_slots=6)
    one = free.kv_budget.num_blocks // (6 + 4)
    block_bytes = free.kv_budget.block_bytes
    runner = tiny_runner(
        tmp_path / "int8",
        checkpoint,
        Recipe.reference(),
        kv_scales=scales,
        num_slots=6,
        kv_bytes=(one * 4 + 3) * block_bytes,
    )
    cap = runner.kv_budget.num_blocks * block_bytes
    alone = Engine(free, TOKENIZER)
    engine = Engine(runner, TOKENIZER, prefill_chunk=16)
    chance = np.random.default_rng(3)
    sequences = []
    most = 0

    def resident() -> int:
        size = resident_bytes(*runner._slots.arrays, *runner._prompt.arrays)
        assert size <= engine.kv_bytes[0] <= cap, "more memory than the status says"
        return size

    for turn in range(24):
        prompt = [*long[: int(chance.integers(2, 50))], *map(int, chance.integers(0, 250, int(chance.integers(1, 20))))]
        sequences.append(asked(prompt, int(chance.integers(1, 20)), str(turn % 2)))
        engine.add(sequences[-1])
        for _ in range(int(chance.integers(0, 12))):
            engine.step()
            most = max(most, resident())
    while engine.has_work:
        engine.step()
        most = max(most, resident())
    assert cap // 2 < most <= cap
    for sequence in sequences:
        again = asked(list(sequence.prompt_ids), sequence.params.max_tokens, "other")
        alone.add(again)
        while alone.has_work:
            alone.step()
        assert sequence.output_ids == again.output_ids


def test_a_budget_too_small_for_one_block_is_one_clear_line(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r'engine\.kv_bytes is 100; give at least "\d+M", which holds') as caught:
        tiny_runner(tmp_path / "graph", checkpoint, Recipe.reference(), kv_bytes=100)
    least = int(str(caught.value).partition('"')[2].partition("M")[0]) << 20
    # What it says is enough for what it says.
    num_tokens = int(str(caught.value).partition("conversation of ")[2].partition(" ")[0])
    runner = tiny_runner(tmp_path / "enough", checkpoint, Recipe.reference(), kv_bytes=least)
    assert runner.context_length >= num_tokens


class TestKeptPrompt:
    """What a prompt's buffers still hold is used again, and only what is still true."""

    def test_rest_gives_the_memory_back_without_anybody_asking(self) -> None:
        slots = KVSlots(TestMemory.SHAPE, num_slots=2, context_length=1000, dtype=np.int8)
        slots.write(0, 0, [np.ones((3, 960, 64), np.int8)] * 4)
        prompt = PromptBuffers(slots, rest_seconds=0.0)
        prompt.hold(0, 960, 0)
        prompt.rest()
        timer = prompt._timer
        assert timer is not None
        timer.join(30)
        assert resident_bytes(*prompt.arrays) == 0 == prompt.num_blocks
        prompt.hold(0, 960, 0)
        assert all((array[0, :, :960] == 1).all() for array in prompt.arrays)

    @given(st.data())
    @settings(max_examples=150)
    def test_after_anything_that_happens_to_slots_it_holds_what_the_slot_has(self, data: st.DataObject) -> None:
        shape = DecoderShape(num_layers=1, num_kv_heads=1, head_dim=64, vocab_size=8)
        slots = KVSlots(shape, num_slots=3, context_length=128, dtype=np.int8)
        prompt = PromptBuffers(slots)
        lengths = [0, 0, 0]
        chance = np.random.default_rng(data.draw(st.integers(0, 999)))
        for _ in range(data.draw(st.integers(1, 12))):
            slot, other = data.draw(st.permutations([0, 1, 2]))[:2]
            match data.draw(st.sampled_from(["read", "step", "copy", "swap", "cut", "less", "rest"])):
                case "read":
                    past = data.draw(st.integers(0, lengths[slot]))
                    new = data.draw(st.integers(1, 128 - past)) if past < 128 else 0
                    prompt.hold(slot, past, new)
                    values = chance.integers(-9, 9, (1, new, 64)).astype(np.int8)
                    for array in prompt.arrays:
                        np.testing.assert_array_equal(array[0, :, :past], slots.arrays[0][slot, :, :past])
                        array[0, :, past : past + new] = values
                    slots.write(slot, past, [values] * 2)
                    prompt.extend(past + new)
                    lengths[slot] = past + new
                case "step" if 0 < lengths[slot] < 128:
                    past = data.draw(st.integers(0, lengths[slot]))
                    slots.write(slot, past, [np.full((1, 1, 64), 77, np.int8)] * 2)
                    prompt.keep(slot, past)
                    lengths[slot] = past + 1
                case "copy":
                    slots.copy(slot, other, lengths[slot])
                    prompt.copied(slot, other, lengths[slot])
                    lengths[other] = lengths[slot]
                case "swap":
                    slots.swap(slot, other, lengths[slot], lengths[other])
                    prompt.swapped(slot, other)
                    lengths[slot], lengths[other] = lengths[other], lengths[slot]
                case "cut":
                    lengths[slot] = data.draw(st.integers(0, lengths[slot]))
                    prompt.keep(slot, lengths[slot])
                    slots.give_back(slot, lengths[slot])
                case "less":
                    prompt.give_back(data.draw(st.integers(0, 128)))
                case "rest":
                    prompt.end_rest(prompt._num_holds)
