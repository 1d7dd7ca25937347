"""Prefixes on disk: what comes back is what was written, or nothing; whatever files suffer, answers are right."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearthd.kv import loading, prefix_store, stored_prefixes
from hearthd.kv.budget import KVBudget
from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.loading import Loading
from hearthd.kv.prefix_file import DamagedPrefixError, file_size, written
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.saving import Saving
from hearthd.kv.shared import SharedPrompts
from hearthd.kv.slot import Slot
from hearthd.kv.stored_prefixes import PUBLIC
from hearthd.priority import Priority
from hearthd.sequences.sequence import Sequence, SequenceState
from prefix_daemon import MB, SYSTEM, Daemon, asked, chunks_of, open_store


def stored(store: PrefixStore, token_ids: list[int], identity: str = "a", seed: int = 0) -> StoredPrefix:
    prefix = StoredPrefix(len(token_ids), store.key(identity, token_ids))
    store.write(prefix, chunks_of(len(token_ids), seed))
    return prefix


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


class TestStore:
    def test_what_was_written_is_found_after_a_restart_and_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        stored(open_store(tmp_path), SYSTEM)
        store = open_store(tmp_path)
        found = store.find([*SYSTEM, 1, 2], [("a", 152)], 1)
        assert found == StoredPrefix(150, store.key("a", SYSTEM))
        assert list(store.read(found)) == chunks_of(150)

    def test_the_longest_prefix_is_found(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        for num in (70, 150, 90):
            stored(store, SYSTEM[:num])
        assert [getattr(store.find(SYSTEM, [("a", most)], 1), "num_tokens", 0) for most in (200, 149, 80, 60)] == [
            150,
            90,
            70,
            0,
        ]
        assert store.find(SYSTEM, [("a", 200)], 151) is None

    @given(
        stored_lengths=st.dictionaries(st.sampled_from("ab"), st.sets(st.integers(1, 40), max_size=8)),
        limits=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 45)), max_size=3),
        least=st.integers(1, 40),
        num_right=st.integers(0, 45),
    )
    @settings(max_examples=200)
    def test_it_finds_what_looking_at_every_length_finds(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        stored_lengths: dict[str, set[int]],
        limits: list[tuple[str, int]],
        least: int,
        num_right: int,
    ) -> None:
        store = open_store(tmp_path_factory.mktemp("empty"))
        for identity, lengths in stored_lengths.items():
            for num in lengths:
                store._remember(StoredPrefix(num, store.key(identity, SYSTEM[:num])))
        prompt = [*SYSTEM[:num_right], *[251] * (45 - num_right)]
        expected = max(
            (
                num
                for identity, limit in limits
                for num in stored_lengths.get(identity, ())
                if least <= num <= min(limit, num_right)
            ),
            default=0,
        )
        found = store.find(prompt, limits, least)
        assert (found.num_tokens if found else 0) == expected
        assert found is None or found.key in {store.key(identity, prompt[:expected]) for identity, _ in limits}

    def test_files_of_versions_before_keep_their_names(self, tmp_path: Path) -> None:
        hashed = hashlib.sha256(hashlib.sha256(b"model").digest() + (1).to_bytes(4, "little") + b"a")
        hashed.update(b"".join(token_id.to_bytes(4, "little") for token_id in SYSTEM))
        stored(open_store(tmp_path), SYSTEM)
        model = hashlib.sha256(b"model").hexdigest()[:16]
        assert only_file(tmp_path).name == f"{model}-150-{hashed.hexdigest()}.kv"

    def test_neither_another_identity_nor_another_model_nor_other_tokens_find_it(self, tmp_path: Path) -> None:
        stored(open_store(tmp_path), SYSTEM)
        assert open_store(tmp_path).find(SYSTEM, [("b", 200)], 1) is None
        assert open_store(tmp_path, fingerprint=b"other").find(SYSTEM, [("a", 200)], 1) is None
        assert open_store(tmp_path).find([1, *SYSTEM[1:]], [("a", 200)], 1) is None

    def test_files_are_for_their_owner_alone_and_hold_no_token_ids(self, tmp_path: Path) -> None:
        stored(open_store(tmp_path / "deep" / "prefixes"), SYSTEM)
        path = only_file(tmp_path / "deep" / "prefixes")
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        data = path.read_bytes()
        assert len(data) == file_size(150, 8)
        for dtype in ("<i4", "<i8", "u1"):
            assert np.asarray(SYSTEM[:16]).astype(dtype).tobytes() not in data

    def test_the_least_recently_used_go_when_all_take_too_much(self, tmp_path: Path) -> None:
        store = open_store(tmp_path, max_bytes=2 * file_size(150, 8))
        prefixes = []
        for age, first in enumerate((1, 2, 3)):
            prefixes.append(stored(store, [first, *SYSTEM[1:]]))
            for path in tmp_path.glob(f"*{prefixes[-1].key.hex()}*"):
                os.utime(path, (1000 + age, 1000 + age))
        assert [store.has(prefix) for prefix in prefixes] == [False, True, True]
        list(store.read(prefixes[1]))
        prefixes.append(stored(store, [4, *SYSTEM[1:]]))
        assert [store.has(prefix) for prefix in prefixes] == [False, True, False, True]
        assert len(list(tmp_path.iterdir())) == 2
        assert store.stored_bytes == 2 * file_size(150, 8)

    def test_what_is_larger_than_all_may_be_is_not_taken(self, tmp_path: Path) -> None:
        assert not open_store(tmp_path, max_bytes=1000).takes(150)

    def test_what_a_killed_writer_left_is_removed_and_other_files_stay(self, tmp_path: Path) -> None:
        stored(open_store(tmp_path), SYSTEM)
        path = only_file(tmp_path)
        Path(f"{path}.new").write_bytes(b"half")
        (tmp_path / "holiday.jpg").write_bytes(b"not ours")
        (tmp_path / "notes.kv").write_bytes(b"not ours either")
        store = open_store(tmp_path)
        assert {each.name for each in tmp_path.iterdir()} == {path.name, "holiday.jpg", "notes.kv"}
        assert store.num_removed == 1

    @pytest.mark.parametrize("fingerprint", [b"model", b"other"])
    def test_what_a_killed_writer_left_is_removed_if_all_of_it_is_there_and_whosever_it_is(
        self, tmp_path: Path, fingerprint: bytes
    ) -> None:
        prefix = stored(open_store(tmp_path, fingerprint=fingerprint), SYSTEM)
        path = only_file(tmp_path)
        path.rename(f"{path}.new")
        store = open_store(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert not store.has(prefix)
        assert (store.stored_bytes, store.num_removed) == (0, 1)

    def test_an_aborted_write_leaves_nothing(self, tmp_path: Path) -> None:
        def broken() -> Iterator[bytes]:
            yield chunks_of(64)[0]
            raise RuntimeError

        store = open_store(tmp_path)
        with pytest.raises(RuntimeError):
            store.write(StoredPrefix(150, store.key("a", SYSTEM)), broken())
        assert list(tmp_path.iterdir()) == []
        assert store.problem is None

    def test_a_directory_that_cannot_be_used_is_one_line_and_no_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        store = open_store(tmp_path / "file" / "prefixes")
        assert store.find(SYSTEM, [("a", 200)], 1) is None
        assert not store.takes(150)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "cannot be stored" in caplog.text
        assert "cannot be stored" in str(store.problem)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 7),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "readable by others": lambda path: path.chmod(0o640),
    "a link": lambda path: (path.rename(path.parent / "real"), path.symlink_to(path.parent / "real")),
    "a hard link": lambda path: os.link(path, path.parent / "real"),
    "a named pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    @pytest.mark.parametrize("when", ["before the start", "while it runs"])
    def test_what_is_not_ours_any_more_is_removed_and_not_used(self, tmp_path: Path, damage: str, when: str) -> None:
        store = open_store(tmp_path)
        prefix = stored(store, SYSTEM)
        path = only_file(tmp_path)
        DAMAGE[damage](path)
        if when == "before the start":
            store = open_store(tmp_path)
            assert not store.has(prefix)
        else:
            with pytest.raises((DamagedPrefixError, OSError)):
                list(store.read(prefix))
        assert store.find(SYSTEM, [("a", 200)], 1) is None
        assert damage == "a link" or not os.path.lexists(path)

    @given(st.integers(0, file_size(150, 8) - 1), st.integers(0, 7))
    @settings(max_examples=60)
    def test_any_flipped_bit_is_noticed(self, tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
        directory = tmp_path_factory.mktemp("flipped")
        prefix = stored(open_store(directory), SYSTEM)
        path = only_file(directory)
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << bit
        path.write_bytes(data)
        store = open_store(directory)
        with pytest.raises(DamagedPrefixError):
            list(store.read(prefix))
        assert not store.has(prefix)
        assert not path.exists()

    def test_a_whole_file_of_another_prefix_under_this_name_is_noticed(self, tmp_path: Path) -> None:
        store = open_store(tmp_path)
        prefix, other = stored(store, SYSTEM), stored(store, SYSTEM[::-1])
        names = {path.name.split("-")[2]: path for path in tmp_path.iterdir()}
        names[f"{prefix.key.hex()}.kv"].write_bytes(names[f"{other.key.hex()}.kv"].read_bytes())
        with pytest.raises(DamagedPrefixError, match="header"):
            list(store.read(prefix))


class TestDiskWrites:
    @given(st.lists(st.tuples(st.floats(0, 5 * 3600), st.integers(1, 60)), max_size=60))
    def test_within_no_24_hours_more_is_written_than_may_be(self, steps: list[tuple[float, int]]) -> None:
        now, written_at = 0.0, []
        writes = DiskWrites(100, lambda: now)
        for seconds, size in steps:
            now += seconds
            if writes.begin(Path("a"), size):
                list(writes.count(Path("a"), [b"x" * size]))
                writes.end(Path("a"))
                written_at.append((now, size))
            assert sum(each for at, each in written_at if at > now - 86400) <= 100
            assert len(writes._written) <= 25

    def test_what_is_not_written_in_the_end_does_not_count(self) -> None:
        writes = DiskWrites(100)
        assert writes.begin(Path("a"), 90)
        assert not writes.begin(Path("b"), 20)
        next(writes.count(Path("a"), [b"x" * 10, b"x" * 80]))
        writes.end(Path("a"))
        assert writes.begin(Path("b"), 90)

    def test_a_disk_that_hangs_in_a_removal_holds_up_nobody_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        size = file_size(150, 8)
        store = open_store(tmp_path, max_bytes=size)
        old = stored(store, SYSTEM)
        path = only_file(tmp_path)
        hangs, gate, unlink = threading.Event(), threading.Event(), Path.unlink

        def hang(path: Path, **options: Any) -> None:
            hangs.set()
            assert gate.wait(30)
            unlink(path, **options)

        monkeypatch.setattr(Path, "unlink", hang)
        writer = threading.Thread(target=stored, args=(store, SYSTEM[::-1]), daemon=True)
        writer.start()
        try:
            assert hangs.wait(30)
            # As the inference thread asks, in a thread, as it would wait for ever.
            answers: list[bool] = []
            inference = threading.Thread(target=lambda: answers.append(store.takes(150)), daemon=True)
            inference.start()
            inference.join(10)
            assert answers == [True]
            # What is being removed is not written meanwhile: it would be removed as well.
            assert not store._writes.begin(path, size)
            assert not store._writes.remove(path)
        finally:
            gate.set()
            writer.join(30)
        monkeypatch.undo()
        assert not store.has(old)
        assert not path.exists()
        assert store._writes.begin(path, size)

    def test_without_a_limit_anything_may_be_written(self) -> None:
        assert DiskWrites(0).allows(2**60)


class TestTwoModels:
    def test_the_second_ones_start_leaves_the_firsts_half_written_file(self, tmp_path: Path) -> None:
        writes = DiskWrites()
        first = open_store(tmp_path, writes=writes)
        seconds: list[PrefixStore] = []

        def interrupted() -> Iterator[bytes]:
            for chunk in chunks_of(150):
                yield chunk
                # Both make room: of all that is there nothing may stay, but for what is being written.
                seconds.append(open_store(tmp_path, fingerprint=b"other", max_bytes=1, writes=writes))

        prefix = StoredPrefix(150, first.key("a", SYSTEM))
        first.write(prefix, interrupted())
        assert first.problem is None
        assert list(open_store(tmp_path).read(prefix)) == chunks_of(150)
        assert [second.num_removed for second in seconds] == [0, 0, 0]

    def test_what_both_write_at_once_is_within_the_limit(self, tmp_path: Path) -> None:
        writes, size = DiskWrites(), file_size(150, 8)
        first = open_store(tmp_path, max_bytes=2 * size, writes=writes)
        second = open_store(tmp_path, max_bytes=2 * size, fingerprint=b"other", writes=writes)
        old = stored(first, SYSTEM, seed=1)

        def interrupted() -> Iterator[bytes]:
            stored(second, SYSTEM)
            yield from chunks_of(150)

        prefix = StoredPrefix(150, first.key("b", SYSTEM))
        first.write(prefix, interrupted())
        assert len(list(tmp_path.iterdir())) == 2
        assert first.has(prefix)
        with pytest.raises(FileNotFoundError):
            list(first.read(old))


class TestFullDisk:
    def test_is_told_once_and_tried_again_later(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        store = PrefixStore(tmp_path, b"model", 8, max_bytes=MB, margin_bytes=0, clock=lambda: now[0])

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(prefix_store, "replace_file", full)
            for _ in range(3):
                stored(store, SYSTEM)
        assert len(caplog.records) == 1
        assert "No space left on device" in str(store.problem)
        assert not store.takes(150)
        now[0] += 601
        assert store.takes(150)
        assert store.has(stored(store, SYSTEM))
        assert store.problem is None

    def test_a_disk_is_never_filled_to_the_brim(self, tmp_path: Path) -> None:
        store = open_store(tmp_path, margin=2**60)
        assert not store.has(stored(store, SYSTEM))
        assert "nearly full" in str(store.problem)


class TestHangingDisk:
    @pytest.fixture
    def gate(self) -> Iterator[threading.Event]:
        gate = threading.Event()
        yield gate
        gate.set()

    def hang(self, store: PrefixStore, gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
        read = store.read

        def hang(prefix: StoredPrefix) -> Iterator[bytes]:
            assert gate.wait(30)
            yield from read(prefix)

        monkeypatch.setattr(store, "read", hang)

    def test_is_not_waited_for_and_asked_for_nothing_for_a_while(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
    ) -> None:
        monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 0.0)
        now = [0.0]
        store = PrefixStore(tmp_path, b"model", 8, max_bytes=MB, margin_bytes=0, clock=lambda: now[0])
        prefix = stored(store, SYSTEM)
        self.hang(store, gate, monkeypatch)
        incoming = Loading(store, prefix)
        while incoming.result is None:
            assert list(incoming.take(0.01)) == []
        assert incoming.result is False
        assert "cannot be read (the disk hangs)" in str(store.problem)
        asked_for = (SYSTEM, [("a", 150)], 64)
        assert store.find(*asked_for) is None
        assert not store.takes(150)
        now[0] += 601
        assert store.find(*asked_for) is None, "a second thread would hang"
        gate.set()
        incoming._thread.join(30)
        assert store.find(*asked_for) == prefix
        monkeypatch.undo()
        again = Loading(store, prefix)
        while again.result is None:
            list(again.take(1.0))
        assert again.result is True
        assert store.problem is None

    @pytest.mark.parametrize(("seconds", "is_loaded"), [(0.5, True), (0.8, False)])
    def test_one_that_trickles_is_given_up_when_the_whole_takes_too_long(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, *, is_loaded: bool
    ) -> None:
        """Of 150 tokens: 2.3 seconds, in three chunks, each of which is there in less than 2."""
        now = [0.0]
        store = PrefixStore(tmp_path, b"model", 8, max_bytes=MB, margin_bytes=0, clock=lambda: now[0])
        prefix, read, goes_on = stored(store, SYSTEM), store.read, threading.Semaphore(0)

        def trickle(prefix: StoredPrefix) -> Iterator[bytes]:
            for chunk in read(prefix):
                assert goes_on.acquire(timeout=30)
                now[0] += seconds
                yield chunk
            # What is checked at the end.
            assert goes_on.acquire(timeout=30)

        monkeypatch.setattr(store, "read", trickle)
        incoming = Loading(store, prefix, lambda: now[0])
        num_chunks = 0
        for _ in range(3):
            goes_on.release()
            num_chunks += len(list(incoming.take(30.0)))
        assert num_chunks == 3
        list(incoming.take(0.0))
        assert (incoming.result is None) == is_loaded
        goes_on.release()
        while incoming.result is None:
            list(incoming.take(1.0))
        assert incoming.result is is_loaded
        assert (store.problem is None) == is_loaded
        assert is_loaded or "cannot be read (the disk is slower than the model)" in str(store.problem)
        incoming._thread.join(30)
        assert store.find(SYSTEM, [("a", 150)], 64) == (prefix if is_loaded else None)
        now[0] += 601
        assert store.find(SYSTEM, [("a", 150)], 64) == prefix

    def test_the_time_of_steps_is_not_the_disks(self, tmp_path: Path) -> None:
        now = [0.0]
        store = PrefixStore(tmp_path, b"model", 8, max_bytes=MB, margin_bytes=0)
        incoming = Loading(store, stored(store, SYSTEM), lambda: now[0])
        incoming._thread.join(30)
        now[0] += 100
        assert len(list(incoming.take(0.0))) == 3
        assert incoming.result is True

    def test_keeps_no_other_prompt_waiting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
    ) -> None:
        monkeypatch.setattr(loading, "_PATIENCE_SECONDS", 60.0)
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path)
        self.hang(daemon.store, gate, monkeypatch)
        first, other = asked([*SYSTEM, 9, 8, 7]), asked([3] * 30, num_first=0, identity="b")
        daemon.engine.add(first)
        daemon.engine.add(other)
        for _ in range(10):
            daemon.engine.step()
        assert other.state is SequenceState.ENDED
        assert first.state is SequenceState.PREFILLING
        gate.set()
        daemon.run()
        assert first.num_cached == 150


class TestHangingWrites:
    @pytest.fixture
    def gate(self) -> Iterator[threading.Event]:
        gate = threading.Event()
        yield gate
        gate.set()

    def hang(self, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, *, takes_pieces: bool) -> None:
        """Hang in what makes a file lasting, or before."""
        replace_file = prefix_store.replace_file

        def hang(path: Path, pieces: Iterable[bytes]) -> None:
            taken = list(pieces) if takes_pieces else pieces
            assert gate.wait(30)
            replace_file(path, taken)

        monkeypatch.setattr(prefix_store, "replace_file", hang)

    def ask_twice(self, daemon: Daemon, first: int) -> None:
        """Ask, and do all that there is to do but wait for the disk."""
        for last in (1, 2):
            daemon.engine.add(asked([first, *SYSTEM[1:], 251, last, 3]))
            while daemon.engine.has_work:
                daemon.engine.step()

    def test_get_no_second_thread_until_the_first_ends_and_then_the_next_is_stored(
        self, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        savings: list[Saving] = []

        class CountedSaving(Saving):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                savings.append(self)

        self.hang(gate, monkeypatch, takes_pieces=False)
        monkeypatch.setattr(stored_prefixes, "Saving", CountedSaving)
        daemon = Daemon(tmp_path)
        # Each takes places of those before, so that what is being written is cut.
        for first in range(6):
            self.ask_twice(daemon, first)
        assert len(savings) == 1
        assert savings[0].has_given_up
        gate.set()
        savings[0].wait(30)
        daemon.run()
        assert len(savings) > 1
        assert daemon.store.has(savings[-1].prefix)

    def test_are_told_after_a_while_and_no_more_when_the_disk_goes_on(
        self, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.hang(gate, monkeypatch, takes_pieces=True)
        now = [0.0]
        store = PrefixStore(tmp_path, b"model", 8, max_bytes=MB, margin_bytes=0, clock=lambda: now[0])
        has_all = threading.Event()

        def chunks() -> Iterator[bytes]:
            for chunk in chunks_of(150):
                # Whoever gives them may take its time.
                now[0] += 100
                assert store.problem is None
                yield chunk
            has_all.set()

        prefix = StoredPrefix(150, store.key("a", SYSTEM))
        writer = threading.Thread(target=store.write, args=(prefix, chunks()), daemon=True)
        writer.start()
        assert has_all.wait(30)
        while not store._writing.lasting:
            now[0] += 1
        assert store.takes(150)
        assert store.problem is None
        now[0] += 31
        for _ in range(3):
            assert not store.takes(150)
        assert "cannot be stored (the disk hangs)" in str(store.problem)
        assert len(caplog.records) == 1
        gate.set()
        writer.join(30)
        assert store.problem is None
        assert store.takes(150)
        assert store.has(prefix)


class TestNoThreads:
    """Where the system gives no further thread, all goes on without the disk."""

    @pytest.fixture
    def forbid(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        start = threading.Thread.start

        def forbid(name: str) -> None:
            def refuse(thread: threading.Thread) -> None:
                if thread.name == name:
                    raise RuntimeError("can't start new thread")
                start(thread)

            monkeypatch.setattr(threading.Thread, "start", refuse)

        return forbid

    def test_for_reading(
        self, tmp_path: Path, forbid: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path, num_slots=2)
        forbid("prefix-read")
        for last in range(4):
            daemon.run(asked([*SYSTEM, last, 8, 7]), asked([last] * 30, num_first=0, identity="b"))
        assert not any(slot.is_held for slot in daemon.engine._cache._slots)
        told = [record.getMessage() for record in caplog.records]
        assert told == [
            "prompts' beginnings are neither stored nor loaded for want of a thread: can't start new thread"
        ]
        monkeypatch.undo()
        daemon.run(*(asked([7 - last] * 200, num_first=0, identity="b") for last in range(2)))
        sequence = asked([*SYSTEM, 5, 8, 7])
        daemon.run(sequence)
        assert (sequence.num_cached, daemon.store.num_hits) == (150, 1)

    def test_for_reading_what_the_owner_shares(self, tmp_path: Path, forbid: Callable[[str], None]) -> None:
        stored(open_store(tmp_path), SYSTEM, identity=PUBLIC)
        daemon = Daemon(tmp_path)
        forbid("prefix-read")
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
        sequence = asked([*SYSTEM, 1, 2, 3])
        daemon.run(sequence)
        assert sequence.num_cached == 150

    def test_for_writing(
        self, tmp_path: Path, forbid: Callable[[str], None], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        daemon = Daemon(tmp_path)
        forbid("prefix-write")
        daemon.store_system()
        daemon.store_system("b")
        assert (daemon.store.num_saved, len(caplog.records)) == (0, 1)
        monkeypatch.undo()
        daemon.run(asked([*SYSTEM, 5, 8, 7]))
        assert daemon.store.num_saved == 1

    def test_whatever_goes_wrong_in_the_books_of_the_disk_the_slot_is_free_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon = Daemon(tmp_path, num_slots=2)

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(daemon.store, "find", fail)
        cache = daemon.engine._cache
        for _ in range(3):
            with pytest.raises(MemoryError):
                cache.acquire([1, 2, 3], "a", 10)
        assert not any(slot.is_held for slot in cache._slots)


class TestEngine:
    def test_a_system_prompt_is_not_read_again_after_a_restart(self, tmp_path: Path) -> None:
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path)
        sequence = asked([*SYSTEM, 9, 8, 7])
        daemon.run(sequence)
        assert sequence.num_cached == 150
        assert daemon.store.num_hits == 1
        prompt_runs = [size for _, _, size in daemon.runner.calls if size > 1]
        # The question, and the answer while nobody asks.
        assert prompt_runs[0] == 3

    def test_only_what_is_longer_than_in_memory_is_taken_from_the_disk(self, tmp_path: Path) -> None:
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path)
        for last in (1, 2, 3):
            daemon.run(asked([*SYSTEM, last, 8, 7]))
        assert daemon.store.num_hits == 1

    def test_what_was_just_answered_is_stored_before_the_process_ends(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.run(asked([*SYSTEM, 1, 2, 3]))
        sequence = asked([*SYSTEM, 5, 6, 7])
        daemon.engine.add(sequence)
        while sequence.state is not SequenceState.ENDED:
            daemon.engine.step()
        assert daemon.store.num_saved == 0
        daemon.engine.close(30)
        assert daemon.store.num_saved == 1

    def test_one_is_stored_when_it_comes_again_whatever_memory_has_of_it(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, num_slots=1)
        daemon.run(asked([*SYSTEM, 1, 2, 3]), asked([9, 9, 9], num_first=0))
        assert list(tmp_path.iterdir()) == []
        daemon.run(asked([*SYSTEM, 4, 5, 6]))
        assert len(list(tmp_path.iterdir())) == 1

    def test_what_another_caller_asked_is_not_the_first_time(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.run(asked([*SYSTEM, 1, 2, 3], identity="a"), asked([*SYSTEM, 1, 2, 3], identity="b"))
        assert list(tmp_path.iterdir()) == []

    def test_a_short_one_is_not_stored(self, tmp_path: Path) -> None:
        Daemon(tmp_path, min_tokens=151).store_system()
        assert list(tmp_path.iterdir()) == []

    def test_a_thousand_that_never_come_again_are_not_stored_and_are_forgotten(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        slot = Slot(num_first=150, identity="a")
        for number in range(1100):
            daemon.prefixes.look_for(slot, [number, *SYSTEM[1:]], 150)
        assert len(daemon.prefixes._seen) == 1024
        assert not any(daemon.prefixes._seen.values())
        daemon.run(asked([0, *SYSTEM[1:], 1]))
        assert list(tmp_path.iterdir()) == []
        daemon.run(asked([99, *SYSTEM[1:], 1]))
        assert len(list(tmp_path.iterdir())) == 1

    def test_no_more_is_written_in_a_day_than_there_may_be(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        now = [0.0]
        daemon = Daemon(tmp_path, writes=DiskWrites(2 * file_size(150, 8), lambda: now[0]))
        for first in range(5):
            daemon.store_system(system=[first, *SYSTEM[1:]])
        assert daemon.store.num_saved == 2
        assert daemon.store.problem is None
        assert [record.message.split(",")[0] for record in caplog.records] == [
            f"cache.max_bytes_per_day is {2 * file_size(150, 8)}"
        ]
        now[0] = 24 * 3600
        daemon.run(asked([4, *SYSTEM[1:], 1]))
        assert daemon.store.num_saved == 2
        now[0] = 25 * 3600
        daemon.run(asked([4, *SYSTEM[1:], 1]))
        assert daemon.store.num_saved == 3

    def test_a_prompt_without_a_system_message_is_not_stored(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        for _ in range(3):
            daemon.run(asked([*SYSTEM, 1, 2, 3], num_first=0))
        assert list(tmp_path.iterdir()) == []

    def test_other_callers_neither_find_nor_are_found(self, tmp_path: Path) -> None:
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path)
        sequence = asked([*SYSTEM, 9, 8, 7], identity="b")
        daemon.run(sequence)
        assert sequence.num_cached == 0

    @pytest.mark.parametrize("damage", ["truncated", "flipped early", "flipped late"])
    def test_a_damaged_file_costs_time_and_no_answer(self, tmp_path: Path, damage: str) -> None:
        Daemon(tmp_path).store_system()
        path = only_file(tmp_path)
        daemon = Daemon(tmp_path)
        data = bytearray(path.read_bytes())
        match damage:
            case "truncated":
                del data[500:]
            case "flipped early":
                data[60] ^= 1
            case "flipped late":
                data[-40] ^= 1
        path.write_bytes(data)
        # Memory has a part of it, which must survive what the damaged file has brought.
        daemon.run(asked([*SYSTEM[:70], 9, 9, 9], num_first=0))
        sequence = asked([*SYSTEM, 9, 8, 7])
        daemon.run(sequence)
        assert sequence.num_cached == 70
        assert daemon.store.num_removed == 1
        assert daemon.store.num_saved == 1

    def test_who_leaves_while_it_is_loaded_leaves_nothing(self, tmp_path: Path) -> None:
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path, num_slots=1)
        leaving = asked([*SYSTEM, 9, 8, 7])
        daemon.engine.add(leaving)
        daemon.engine._placing.schedule()
        daemon.engine.remove(leaving)
        daemon.run(asked([*SYSTEM[:140], 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], num_first=0))

    def test_what_is_thrown_away_while_it_is_stored_is_not_stored(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, num_slots=1)
        daemon.run(asked([*SYSTEM, 1, 2, 3]))
        daemon.engine.add(asked([*SYSTEM, 5, 6, 7]))
        while daemon.prefixes._outgoing is None:
            daemon.engine.step()
        daemon.run(asked([9, 9, 9], num_first=0))
        assert daemon.store.num_saved == 0
        assert not [path for path in tmp_path.iterdir() if path.suffix == ".kv"]


class TestSharedPrompts:
    def test_are_read_while_nobody_asks_and_serve_everybody(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
        first, second = asked([*SYSTEM, 5, 6], identity="a"), asked([*SYSTEM, 7, 8], identity="b")
        daemon.run(first, second)
        assert (first.num_cached, second.num_cached) == (150, 150)
        again = Daemon(tmp_path)
        third = asked([*SYSTEM, 5, 6], identity="c")
        again.run(third)
        # Only what is configured is shared, now.
        assert third.num_cached == 0
        again = Daemon(tmp_path)
        again.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        again.run()
        assert again.store.num_hits == 1
        assert again.runner.calls == []
        fourth = asked([*SYSTEM, 5, 6], identity="d")
        again.run(fourth)
        assert fourth.num_cached == 150

    def test_what_stands_behind_them_is_not_shared(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run(asked([*SYSTEM, 1, 2, 3, 4, 5, 6], identity="a"))
        other = asked([*SYSTEM, 1, 2, 3, 4, 5, 6], identity="b")
        daemon.run(other)
        assert other.num_cached == 150

    def test_who_knows_only_a_part_of_one_learns_nothing_of_the_rest(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
        guesses = [asked([*SYSTEM[:149], 999, 1, 2]), asked([*SYSTEM[:149], 998, 1, 2], identity="b")]
        daemon.run(*guesses, asked([*SYSTEM, 1, 2], identity="c"))
        assert [guess.num_cached for guess in guesses] == [0, 0]

    def test_those_that_are_not_read_yet_keep_nobody_waiting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon = Daemon(tmp_path, num_slots=2)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([[first, *SYSTEM[1:]] for first in range(4)]))
        # One of them has begun, and the disk has not answered.
        with monkeypatch.context() as patched:
            patched.setattr(daemon.prefixes, "fetch", lambda *_: None)
            daemon.engine.step()
        sequences = [asked([3, 4, number], num_first=0) for number in range(2)]
        for sequence in sequences:
            daemon.engine.add(sequence)
        for _ in range(20):
            daemon.engine.step()
        assert all(sequence.state is SequenceState.ENDED for sequence in sequences)
        daemon.run()
        num_read = sum(batch * size for _, batch, size in daemon.runner.calls)
        assert num_read > 4 * 150

    def test_others_take_their_place_and_those_of_before_are_shared_no_more(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM[::-1]]))
        daemon.run()
        of_before, new = asked([*SYSTEM, 1, 2]), asked([*SYSTEM[::-1], 1, 2])
        daemon.run(of_before, new)
        assert (of_before.num_cached, new.num_cached) == (0, 150)

    def test_the_same_ones_again_are_not_read_again(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.run()
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        assert not daemon.engine.has_work

    def test_whoever_asks_goes_first(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path)
        daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        sequence = asked([3, 4, 5], num_first=0)
        daemon.engine.add(sequence)
        daemon.engine.step()
        assert sequence.output_ids


class TestWhoIsPutBack:
    """Its KV went to a more urgent request, and it begins again."""

    def put_back(self, daemon: Daemon) -> Sequence:
        """Return a sequence that was, while its answer was written; nothing of what it had is left in memory."""
        slow = asked([*SYSTEM, 251, 7, 3])
        daemon.engine.add(slow)
        while len(slow.output_ids) < 2:
            daemon.engine.step()
        urgent = asked([8] * 240, num_first=0, identity="b")
        urgent.priority = Priority.INTERACTIVE
        # Nothing of it is read again afterwards, which would take memory, too.
        urgent.params = replace(urgent.params, max_tokens=1)
        daemon.engine.add(urgent)
        while urgent.state is not SequenceState.ENDED:
            daemon.engine.step()
        assert slow.state is SequenceState.WAITING
        return slow

    # Of 4 tokens; reading takes 4 times as many: the urgent one needs all but a few.
    BUDGET = KVBudget(4, 62 * 5, 4)

    def test_what_came_from_the_disk_at_first_stays_its_usage_whatever_is_there_now(self, tmp_path: Path) -> None:
        Daemon(tmp_path).store_system()
        daemon = Daemon(tmp_path, kv_budget=self.BUDGET)
        slow = self.put_back(daemon)
        assert (slow.num_cached, slow.num_from_disk) == (150, 150)
        only_file(tmp_path).unlink()
        while slow.state is not SequenceState.ENDED:
            daemon.engine.step()
            assert (slow.num_cached, slow.num_from_disk) == (150, 150)

    def test_what_comes_from_the_disk_the_second_time_is_no_usage(self, tmp_path: Path) -> None:
        daemon = Daemon(tmp_path, kv_budget=self.BUDGET)
        slow = self.put_back(daemon)
        stored(daemon.store, SYSTEM)
        daemon.run()
        assert slow.state is SequenceState.ENDED
        assert daemon.store.num_hits == 1
        assert (slow.num_cached, slow.num_from_disk) == (0, 0)

    @pytest.mark.parametrize("came_before", [False, True])
    def test_its_system_prompt_is_stored_if_it_had_come_before_and_only_then(
        self, tmp_path: Path, *, came_before: bool
    ) -> None:
        daemon = Daemon(tmp_path, kv_budget=self.BUDGET)
        if came_before:
            daemon.run(asked([*SYSTEM, 251, 1, 3]))
        self.put_back(daemon)
        daemon.run()
        assert daemon.store.num_saved == came_before


def test_a_file_is_written_piece_by_piece() -> None:
    pieces = list(written(b"k" * 32, 150, 8, chunks_of(150)))
    assert [len(piece) for piece in pieces] == [48, 512, 512, 176, 32]
    assert sum(map(len, pieces)) == file_size(150, 8)
