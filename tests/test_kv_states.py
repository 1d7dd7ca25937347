"""The whole KV cache over real files, in any order of calls: KV is that of its tokens, within budget, no one else's.

The machine does what the engine does, with a runner whose KV tells which token it is of, and whether a prompt's run or
a step wrote it. Processes come and go over one directory, whose files suffer what files can suffer.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from fakes import FakeRunner
from hearthd.durable_file import replace_file
from hearthd.kv import prefix_store, stored_prefixes
from hearthd.kv.budget import KVBudget
from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.kv_cache import KVCache, RunTerminated
from hearthd.kv.loading import Loading
from hearthd.kv.prefix_file import file_size
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.shared import SharedPrompts
from hearthd.kv.stored_prefixes import StoredPrefixes

# What a step writes instead of a prompt's run.
STEP = 1000
# Beginnings of prompts; those of a kind begin alike.
SYSTEMS = [[(7 * at + at * at + kind) % 250 for at in range(130)] for kind in range(2)]
LENGTHS = (70, 130)
# By audience, as the owner may change them; one of them begins with another.
SHARED: tuple[dict[str, list[list[int]]], ...] = (
    {},
    {"": [SYSTEMS[0][:70]]},
    {"": [SYSTEMS[0][:70]], "guest": [SYSTEMS[0], SYSTEMS[1][:70]]},
    {"guest": [SYSTEMS[0][:70]], "": []},
)
# Room for three of the longest files, or some more of the shorter ones.
MAX_BYTES = 3 * file_size(130, 8)


class Runner(FakeRunner):
    """Whose KV is other bits where a step wrote it."""

    def __init__(self, num_slots: int, min_run: int, num_blocks: int, preset_tokens: tuple[int, ...]) -> None:
        super().__init__(
            num_slots=num_slots,
            min_run=min_run,
            preset_tokens=preset_tokens,
            kv_budget=KVBudget(4, num_blocks, 4, block_bytes=1),
            logits_after=lambda history: np.zeros(1, np.float32),
        )

    def forward(
        self, token_ids: NDArray[np.int64], first_slot: int, past_lengths: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        logits = super().forward(token_ids, first_slot, past_lengths)
        if token_ids.shape[1] < self.min_run:
            self.slots[first_slot][int(past_lengths[0])] += STEP
        return logits


@dataclass
class Held:
    """Whoever has a slot."""

    prompt: list[int]
    identity: str
    audience: str
    num_tokens: int
    shared: SharedPrompts
    """When it came."""
    is_fetched: bool = False
    tokens: list[int] = field(default_factory=list)


class Disk:
    """How much it gives, and whether it takes anything."""

    def __init__(self) -> None:
        self.num_chunks = 0
        self.is_full = False

    def replace(self, path: Path, pieces: Iterable[bytes]) -> None:
        def until_full() -> Iterator[bytes]:
            for piece in pieces:
                yield piece
                if self.is_full:
                    raise OSError(28, "No space left on device")

        replace_file(path, until_full())


def paced(disk: Disk) -> type[Loading]:
    class PacedLoading(Loading):
        def __init__(self, store: PrefixStore, prefix: StoredPrefix) -> None:
            super().__init__(store, prefix)
            # All of it fits between the threads: what is found out of a file is found out now, in every run.
            self._thread.join(30)

        def take(self, wait_seconds: float) -> Iterator[bytes]:
            while disk.num_chunks > 0 and self.result is None:
                disk.num_chunks -= 1
                yield from [chunk for chunk in [next(super().take(30.0), None)] if chunk is not None]

    return PacedLoading


stages = st.sampled_from([0, 1, 2, 3, 4, 5, 5, 5, 5, 5])
sizes = st.integers(1, 90)
faults = st.sampled_from(["", "", "", "", "", "stop", "fail"])
events = st.sampled_from(["swap", "swap", "share", "end", "end", "kill", "tamper", "disk", "wait"])
prompts = st.builds(
    lambda kind, length, tail: (SYSTEMS[kind][:length], tail),
    st.integers(0, 1),
    st.sampled_from(LENGTHS),
    st.lists(st.integers(250, 252), min_size=1, max_size=3),
)


class Cache(RuleBasedStateMachine):
    """KVCache, PrefixStore, shared prompts and budget."""

    @initialize(
        num_slots=st.sampled_from([1, 2, 3, 3, 4, 5]),
        min_run=st.integers(1, 2),
        num_blocks=st.integers(205, 420),
        num_preset=st.sampled_from([0, 3]),
        shared=st.sampled_from(SHARED),
    )
    def begin(
        self, num_slots: int, min_run: int, num_blocks: int, num_preset: int, shared: dict[str, list[list[int]]]
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kv-states-"))
        self.options = (num_slots, min_run, num_blocks, tuple(SYSTEMS[0][:num_preset]))
        self.disk = Disk()
        self.patches = [
            patch.object(stored_prefixes, "Loading", paced(self.disk)),
            patch.object(prefix_store, "replace_file", self.disk.replace),
        ]
        for each in self.patches:
            each.start()
        self.now = 0.0
        self.model = b"model"
        self.shared = SharedPrompts(shared)
        # What may be found: by model and identity, all that was ever in one of their slots.
        self.known: dict[tuple[bytes, str], list[list[int]]] = {}
        self.tampered: set[str] = set()
        self.start()

    def start(self) -> None:
        """Begin a process."""
        self.runner = Runner(*self.options)
        writes = DiskWrites(0, lambda: self.now, lambda: self.now)
        store = PrefixStore(
            self.directory / "prefixes", self.model, 8,
            max_bytes=MAX_BYTES, margin_bytes=0, writes=writes, clock=lambda: self.now,
        )  # fmt: skip
        self.stored = StoredPrefixes(store, self.runner, min_tokens=64)
        self.moved = threading.Event()
        self.stored.on_room = self.moved.set
        self.cache = KVCache(self.runner, self.stored)
        self.cache.share(self.shared)
        self.held: dict[int, Held] = {}
        self.tampered.clear()

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.end_writing()
            for each in self.patches:
                each.stop()
            shutil.rmtree(self.directory)

    def end_writing(self) -> None:
        outgoing = self.stored._outgoing
        if outgoing is not None:
            outgoing.saving.give_up()
            outgoing.saving.wait(30)

    # Whoever asks.

    @rule(
        prompt=prompts,
        identity=st.sampled_from("ab"),
        audience=st.sampled_from(["guest", "user"]),
        num_answer=st.integers(3, 8),
        has_first=st.sampled_from([True, True, False]),
        stage=stages,
        most=sizes,
        fault=faults,
    )
    def ask(
        self,
        prompt: tuple[list[int], list[int]],
        identity: str,
        audience: str,
        num_answer: int,
        has_first: bool,
        stage: int,
        most: int,
        fault: str,
    ) -> None:
        """Come, and get as far as a stage."""
        system, tail = prompt
        whole = [*system, *tail]
        num_tokens = len(whole) + num_answer
        if num_tokens > self.runner.context_length:
            return
        num_found = self.cache.num_found(whole, identity, audience)
        self.check_may_find(num_found, whole, identity, audience, self.shared)
        has_room = self.cache.has_room_for(num_tokens, len(whole))
        place = self.cache.acquire(whole, identity, num_tokens, len(system) if has_first else 0, audience)
        assert has_room == (place is not None)
        if place is None:
            assert self.held, "nobody is there, and it waits"
            return
        assert place.slot not in self.held
        assert place.num_cached in (0, place.num_past)
        assert place.num_past <= max(len(whole) - self.runner.min_run, 0)
        self.check_may_find(place.num_past, whole, identity, audience, self.shared)
        held = Held(whole, identity, audience, num_tokens, self.shared, tokens=whole[: place.num_past])
        self.held[place.slot] = held
        self.note_known(held)
        self.get_to(place.slot, stage, most, fault)

    @precondition(lambda self: getattr(self, "held", None))
    @rule(data=st.data(), stage=stages, most=sizes, fault=faults)
    def go_on(self, data: st.DataObject, stage: int, most: int, fault: str) -> None:
        """Get further, or leave."""
        self.get_to(data.draw(st.sampled_from(sorted(self.held))), stage, most, fault)

    def get_to(self, number: int, stage: int, most: int, fault: str) -> None:
        """0: the disk gives a chunk. 1: all of them. 2: a part of the prompt is read. 3: all, and the answer is begun.
        4: it goes, as far as it has come. 5: after its answer. fault: of the first run.
        """
        held = self.held[number]
        if stage == 4:
            self.release(number)
            return
        self.fetch(number, 1 if stage == 0 else 9)
        while stage >= 2 and len(held.tokens) < len(held.prompt):
            left, size = len(held.prompt) - len(held.tokens), max(most, self.runner.min_run)
            chunk = held.prompt[len(held.tokens) :][: left if left - size < self.runner.min_run else size]
            if not self.run(number, chunk, fault) or stage == 2:
                return
            fault = ""
        if stage >= 3:
            if len(held.tokens) < held.num_tokens and not self.run(number, [most % 4], fault):
                return
            if len(held.tokens) + 3 <= held.num_tokens:
                self.draft(number, most % 3)
            if stage == 5:
                self.release(number)

    def release(self, number: int) -> None:
        self.cache.release(number)
        del self.held[number]

    def check_may_find(
        self, num_tokens: int, prompt: list[int], identity: str, audience: str, shared: SharedPrompts
    ) -> None:
        """Prove that what is found was this identity's, or is shared with it as a whole, or comes with the model."""
        found = prompt[:num_tokens]
        if any(known[:num_tokens] == found for known in self.known.get((self.model, identity), ())):
            return
        if num_tokens <= len(self.runner.preset_tokens):
            return
        mine = shared.by_audience.get(audience, shared.by_audience.get("", []))
        assert any(prompt[: len(each)] == each and num_tokens <= len(each) for each in mine)

    def note_known(self, held: Held) -> None:
        self.known.setdefault((self.model, held.identity), []).append(list(held.tokens))

    def fetch(self, number: int, num_chunks: int) -> None:
        held = self.held[number]
        if held.is_fetched:
            return
        self.disk.num_chunks = num_chunks
        fetched = self.cache.fetch(number, 0.0)
        held.is_fetched = fetched is not None
        if fetched:
            self.check_may_find(fetched, held.prompt, held.identity, held.audience, held.shared)
            assert len(held.tokens) < fetched <= max(len(held.prompt) - self.runner.min_run, 0)
            held.tokens = held.prompt[:fetched]
            self.note_known(held)

    def run(self, number: int, chunk: list[int], fault: str) -> bool:
        """Return whether it went well."""
        held = self.held[number]
        if fault:
            self.runner.fail_next = RunTerminated() if fault == "stop" else RuntimeError()
        try:
            self.forward(number, chunk)
        except RunTerminated:
            return False
        except RuntimeError:
            self.cache.forget(number)
            self.release(number)
            return False
        self.cache.extend(number, chunk)
        held.tokens += chunk
        self.note_known(held)
        return True

    def forward(self, number: int, chunk: list[int]) -> None:
        past = np.asarray([self.cache.num_tokens(number)], np.int32)
        self.runner.forward(np.asarray([chunk], np.int64), number, past)

    def draft(self, number: int, num_right: int) -> None:
        """Run three tokens as steps, of which not all are right."""
        held = self.held[number]
        self.runner.verify(np.asarray([1, 2, 3], np.int64), number, len(held.tokens))
        for token_id in [1, 2, 3][: num_right + 1]:
            self.cache.extend(number, [token_id])
            held.tokens.append(token_id)
        self.note_known(held)

    # While nobody asks.

    @precondition(lambda self: not getattr(self, "held", True))
    @rule(num_steps=st.sampled_from([1, 2, 5, 60]), most=sizes, num_chunks=st.integers(1, 4), fault=faults)
    def use_idle_time(self, num_steps: int, most: int, num_chunks: int, fault: str) -> None:
        """In the order in which the engine does it."""
        for _ in range(num_steps):
            if (unread := self.cache.next_unread(most)) is not None:
                self.read_an_answer(*unread, most, fault)
                fault = ""
            elif self.cache.has_saving:
                self.save()
            elif self.cache.has_warming:
                self.disk.num_chunks = num_chunks
                self.cache.warm_some(0.0)

    def read_an_answer(self, number: int, chunk: list[int], most: int, fault: str) -> None:
        assert self.runner.min_run <= len(chunk) <= max(most, self.runner.min_run) + 1
        if not self.cache.make_room_to_read(number, len(chunk)):
            return
        if fault:
            self.runner.fail_next = RunTerminated() if fault == "stop" else RuntimeError()
        try:
            self.forward(number, chunk)
        except RunTerminated:
            return
        except RuntimeError:
            self.cache.forget(number)
            return
        self.cache.note_read(number, len(chunk))

    def save(self) -> None:
        """Wait until the writing thread has done all that it can: the same calls give the same files."""
        before = self.stored._outgoing
        num_given = 0 if before is None else before.saving.num_given
        self.moved.clear()
        self.cache.save_some()
        out = self.stored._outgoing
        if before is not None and before is not out:
            before.saving.wait(30)
        if out is None:
            return
        if self.disk.is_full or out.saving.has_given_up or out.saving.num_given == out.saving.prefix.num_tokens:
            out.saving.wait(30)
        elif out is not before or out.saving.num_given > num_given:
            assert self.moved.wait(30)

    # What happens around.

    @rule(
        data=st.data(), what=st.sampled_from(["swap", "swap", "share", "end", "end", "kill", "tamper", "disk", "wait"])
    )
    def something_happens(self, data: st.DataObject, what: str) -> None:
        """Under one name, so that most of what is done is to ask."""
        match what:
            case "swap":
                numbers = st.integers(0, self.runner.num_slots - 1)
                self.swap(data.draw(numbers), data.draw(numbers))
            case "share":
                self.shared = SharedPrompts(data.draw(st.sampled_from(SHARED)))
                self.cache.share(self.shared)
            case "end" | "kill":
                self.restart(
                    is_killed=what == "kill", is_of_other_model=data.draw(st.sampled_from([False] * 5 + [True]))
                )
            case "tamper":
                self.tamper(data)
            case "disk":
                self.disk.is_full = not self.disk.is_full
            case "wait":
                self.now += 3600 * data.draw(st.sampled_from([0.1, 0.2, 1.0, 5.0]))

    def swap(self, a: int, b: int) -> None:
        if a != b:
            self.cache.swap(a, b)
            kept = {slot: self.held.pop(slot) for slot in (a, b) if slot in self.held}
            self.held.update({b if slot == a else a: held for slot, held in kept.items()})

    def restart(self, *, is_killed: bool, is_of_other_model: bool) -> None:
        if is_killed:
            self.end_writing()
            for path in list(self.files()):
                shutil.copyfile(path, f"{path}.new")
        else:
            for number in list(self.held):
                self.cache.release(number)
            self.cache.close(30)
        if is_of_other_model:
            self.model = b"other" if self.model == b"model" else b"model"
        self.start()
        assert not list((self.directory / "prefixes").glob("*.new"))

    def tamper(self, data: st.DataObject) -> None:
        files = list(self.files())
        if not files:
            return
        path, other = data.draw(st.sampled_from(files)), data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        match data.draw(st.sampled_from(["cut", "flip", "flip", "open", "other", "gone"])):
            case "gone":
                path.unlink()
            case "open":
                path.chmod(0o644)
                self.tampered.add(path.name)
            case "other":
                path.write_bytes(other.read_bytes()[: len(content)])
            case "cut":
                path.write_bytes(content[: len(content) // 2])
            case _ if content:
                content[data.draw(st.integers(0, len(content) - 1))] ^= 1
                path.write_bytes(content)

    def files(self) -> Iterator[Path]:
        yield from sorted((self.directory / "prefixes").glob("*.kv"))

    # What holds at any time.

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def kv_is_that_of_its_tokens(self) -> None:
        for number, slot in enumerate(self.cache._slots):
            written = self.runner.slots[number]
            assert written[: slot.num_reusable] == slot.tokens[: slot.num_reusable]
            assert [each % STEP for each in written[: len(slot.tokens)]] == slot.tokens
            if number in self.held:
                assert slot.tokens == self.held[number].tokens

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def memory_stays_within_the_budget_and_is_in_the_books(self) -> None:
        budget = self.runner.kv_budget
        assert self.runner.num_blocks <= self.cache.num_blocks <= budget.num_blocks
        assert self.cache.num_bytes == (self.runner.num_blocks, budget.num_blocks)

    @precondition(lambda self: hasattr(self, "cache"))
    @invariant()
    def files_stay_within_the_limit_and_are_ours_alone(self) -> None:
        with os.scandir(self.directory / "prefixes") as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        assert sum(status.st_size for _, status in found) <= MAX_BYTES
        assert all(status.st_mode & 0o777 == 0o600 for name, status in found if name not in self.tampered)
        assert (self.directory / "prefixes").stat().st_mode & 0o777 == 0o700


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=200, stateful_step_count=60)
