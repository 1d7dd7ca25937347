"""The directory of stored prefixes: who may look into it, which files go first, and how little that writes."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.file_uses import FileUses
from hearthd.kv.prefix_file import DamagedPrefixError, file_size
from hearthd.kv.prefix_store import PrefixStore, StoredPrefix
from hearthd.kv.shared import SharedPrompts
from prefix_daemon import SYSTEM, Daemon, asked, chunks_of, open_store

HOUR = 3600.0
SIZE = file_size(150, 8)


class Clock:
    """The one on the wall, which the files' times are by."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def writes(self) -> DiskWrites:
        return DiskWrites(wall_clock=lambda: self.now)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def stored(store: PrefixStore, first: int, changed: float) -> StoredPrefix:
    """Store a prefix that was last changed then."""
    token_ids = [first, *SYSTEM[1:]]
    prefix = StoredPrefix(150, store.key("a", token_ids))
    store.write(prefix, chunks_of(150))
    os.utime(store._path(prefix), (changed, changed))
    return prefix


def kept(directory: Path, *prefixes: StoredPrefix) -> list[bool]:
    """Tell which are there when there is room for two, and a further one has come."""
    store = open_store(directory, max_bytes=2 * SIZE)
    stored(store, 99, 0)
    return [store._path(prefix).exists() for prefix in prefixes]


class TestUses:
    def test_what_memory_served_lately_outlives_what_was_stored_later(self, tmp_path: Path, clock: Clock) -> None:
        """In this process, and in the next one."""
        store = open_store(tmp_path, max_bytes=3 * SIZE, writes=clock.writes())
        first, second, third = (stored(store, number, clock.now - 9 * HOUR + number) for number in range(3))
        store.note_use(first)
        clock.now += 60
        store.note_use(second)
        fourth = stored(store, 3, clock.now)
        assert [store.has(each) for each in (first, second, third, fourth)] == [True, True, False, True]
        clock.now += 2 * HOUR
        store.note_use(first)
        store.write_down_uses()
        assert kept(tmp_path, first, second, fourth) == [True, False, False]

    def test_within_an_hour_this_process_knows_which_came_last(self, tmp_path: Path, clock: Clock) -> None:
        store = open_store(tmp_path, max_bytes=2 * SIZE, writes=clock.writes())
        first, second = (stored(store, number, clock.now) for number in range(2))
        for prefix in (second, first):
            clock.now += 60
            store.note_use(prefix)
        stored(store, 2, clock.now)
        assert (store.has(first), store.has(second)) == (True, False)

    def test_another_models_store_knows_of_them_too(self, tmp_path: Path, clock: Clock) -> None:
        writes = clock.writes()
        store = open_store(tmp_path, max_bytes=2 * SIZE, writes=writes)
        other = open_store(tmp_path, max_bytes=2 * SIZE, writes=writes, fingerprint=b"other")
        first, second = stored(store, 0, clock.now), stored(other, 1, clock.now + 1)
        clock.now += 60
        store.note_use(first)
        stored(other, 2, clock.now)
        assert (store._path(first).exists(), other._path(second).exists()) == (True, False)

    @pytest.mark.parametrize("is_shared", [False, True])
    def test_a_daemon_that_ends_tells_the_next_one(self, tmp_path: Path, clock: Clock, is_shared: bool) -> None:
        daemon = Daemon(tmp_path, writes=clock.writes())
        if is_shared:
            daemon.engine.share_prompts(SharedPrompts.for_everybody([SYSTEM]))
        daemon.store_system()
        (path,) = tmp_path.iterdir()
        os.utime(path, (0, 0))
        daemon.run(asked([*SYSTEM, 9, 9, 9]))
        assert daemon.store.num_hits == 0
        assert path.stat().st_mtime == 0
        daemon.engine.close(30)
        assert path.stat().st_mtime == clock.now

    def test_reading_counts_as_use_and_writes_no_time_of_reading(self, tmp_path: Path, clock: Clock) -> None:
        store = open_store(tmp_path, writes=clock.writes())
        prefix = stored(store, 0, 1000.0)
        for _ in range(2):
            list(store.read(prefix))
            # A time of reading before that of change is what a card would be told at each reading.
            assert store._path(prefix).stat().st_mtime == clock.now
            assert store._path(prefix).stat().st_atime == clock.now

    @settings(max_examples=60)
    @given(st.lists(st.tuples(st.floats(0, HOUR), st.integers(0, 1), st.booleans()), max_size=60))
    def test_a_file_is_touched_once_an_hour_at_most(
        self, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, int, bool]]
    ) -> None:
        directory, clock = tmp_path_factory.mktemp("uses"), Clock()
        uses = FileUses(lambda: clock.now)
        paths = [directory / "a", directory / "b"]
        for path in paths:
            path.touch()
            os.utime(path, (clock.now, clock.now))
        touched = [clock.now, clock.now]
        used = [clock.now, clock.now]
        for seconds, number, is_written in steps:
            clock.now += seconds
            uses.note(paths[number])
            used[number] = clock.now
            if is_written:
                uses.write_down()
            for each, path in enumerate(paths):
                changed = path.stat().st_mtime
                if changed != touched[each]:
                    assert changed - touched[each] >= HOUR - 1e-3
                    touched[each] = changed
        uses.write_down()
        for path, last in zip(paths, used, strict=True):
            assert 0 <= last - path.stat().st_mtime < HOUR + 1e-3
            assert uses.last(path, path.stat().st_mtime) == pytest.approx(last, abs=1e-3)

    def test_a_clock_that_was_wrong_makes_no_file_immortal(self, tmp_path: Path, clock: Clock) -> None:
        store = open_store(tmp_path, writes=clock.writes())
        prefix = stored(store, 0, clock.now + 1000 * HOUR)
        store.note_use(prefix)
        store.write_down_uses()
        assert store._path(prefix).stat().st_mtime == clock.now

    def test_files_that_are_gone_are_forgotten(self, tmp_path: Path, clock: Clock) -> None:
        writes = clock.writes()
        store = open_store(tmp_path, max_bytes=2 * SIZE, writes=writes)
        gone = [stored(store, number, clock.now - number) for number in range(4)]
        for prefix in gone:
            store.note_use(prefix)
        for path in tmp_path.iterdir():
            path.unlink()
        store.write_down_uses()
        assert writes.uses._used == {}


class TestRights:
    def test_a_new_directory_is_for_the_daemon_alone_whatever_the_umask(self, tmp_path: Path) -> None:
        umask = os.umask(0)
        try:
            store = open_store(tmp_path / "cache" / "prefixes")
            prefix = stored(store, 0, 0)
        finally:
            os.umask(umask)
        assert (tmp_path / "cache" / "prefixes").stat().st_mode & 0o7777 == 0o700
        assert store._path(prefix).stat().st_mode & 0o7777 == 0o600

    @pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o1777])
    def test_one_of_ours_that_is_open_to_others_is_closed(
        self, tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        prefix = stored(open_store(tmp_path), 0, 0)
        tmp_path.chmod(mode)
        store = open_store(tmp_path)
        assert tmp_path.stat().st_mode & 0o7777 == 0o700
        assert store.has(prefix)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert f"was open to others (mode {mode:04o})" in caplog.text

    def test_one_with_other_files_is_left_and_told_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "holiday.jpg").write_bytes(b"not ours")
        tmp_path.chmod(0o755)
        store = open_store(tmp_path)
        assert tmp_path.stat().st_mode & 0o777 == 0o755
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "stays so since there are other files in it" in caplog.text
        assert store.problem is None
        assert store.has(stored(store, 0, 0))

    def test_one_of_another_user_is_left_and_told_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tmp_path.chmod(0o755)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        open_store(tmp_path)
        assert tmp_path.stat().st_mode & 0o777 == 0o755
        assert "stays so since it is another user's" in caplog.text

    def test_a_file_that_became_another_users_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel does not let it be opened without a time of reading, if we are not root."""
        store = open_store(tmp_path)
        prefix = stored(store, 0, 0)
        is_allowed = os.open

        def refuse(path: Path, flags: int, *mode: int) -> int:
            if flags & os.O_NOATIME:
                raise PermissionError(1, "Operation not permitted")
            return is_allowed(path, flags, *mode)

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(DamagedPrefixError, match="owner or mode"):
            list(store.read(prefix))
        assert not store.has(prefix)
        assert not store._path(prefix).exists()
