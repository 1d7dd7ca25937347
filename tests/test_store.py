"""The store has a model whole or not at all, whatever is killed, full or wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bundles import write_bundle
from hearthd.bundles import store as store_module
from hearthd.bundles.store import Store
from hearthd.errors import BuildError, BundleError, ModelNotFoundError

# Per kind of work; `HEARTH_STORE_KILLS=500` for the figure that docs/faults.md publishes.
NUM_KILLS = int(os.environ.get("HEARTH_STORE_KILLS", "60"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "state" / "models")


def install(store: Store, *, seed: int = 0, name: str = "tiny") -> None:
    with store.installing(name) as directory:
        write_bundle(directory, seed=seed, name=name)


def install_by(store: Store, write: Callable[[Path], object], *, name: str = "tiny") -> None:
    with store.installing(name) as directory:
        write(directory)


def content(store: Store) -> set[str]:
    return {path.name for path in store.directory.iterdir()} - {".hearthd.lock"}


def test_a_directory_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    """Another user's is one; the test's own user may be root, so this is another that the system refuses."""
    with pytest.raises(BundleError, match="cannot be read: File name too long; run this as the user"):
        Store(tmp_path / ("x" * 300)).open("tiny")


@pytest.fixture(params=["exchange", "two-renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two-renames":
        monkeypatch.setattr(store_module, "_exchange", lambda one, other: False)
    return str(request.param)


def test_installed_model_opens_under_its_name(store: Store) -> None:
    assert store.names() == []
    install(store)
    install(store, name="other-1.5b")
    assert store.names() == ["other-1.5b", "tiny"]
    assert store.open("tiny").manifest.name == "tiny"
    assert store.path("tiny") == store.directory / "tiny"


def test_replaced_model_is_the_new_one_and_nothing_is_left(store: Store, way: str) -> None:
    install(store, seed=1)
    before = store.open("tiny").manifest
    install(store, seed=2)
    assert store.open("tiny").manifest != before
    assert content(store) == {"tiny"}


def test_open_file_of_the_old_model_stays_readable(store: Store, way: str) -> None:
    """A running daemon has the old weights mapped while a new build is installed."""
    install(store, seed=1)
    with (store.path("tiny") / "model.data").open("rb") as file:
        before = file.read()
        install(store, seed=2)
        file.seek(0)
        assert file.read() == before


def test_error_in_the_build_leaves_the_old_model(store: Store, way: str) -> None:
    install(store, seed=1)
    before = store.open("tiny").manifest

    def full_disk(directory: Path) -> None:
        write_bundle(directory, seed=2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space"):
        install_by(store, full_disk)
    assert store.open("tiny").manifest == before
    assert content(store) == {"tiny"}


def test_what_is_no_whole_bundle_is_not_installed(store: Store) -> None:
    def damaged(directory: Path) -> None:
        write_bundle(directory)
        (directory / "model.data").write_bytes(b"short")

    with pytest.raises(BundleError, match=r"model\.data"):
        install_by(store, damaged)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        install_by(store, lambda directory: None)
    with pytest.raises(BuildError, match="'tiny', not 'other'"):
        install_by(store, write_bundle, name="other")
    assert content(store) == set()


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", ".hidden", "UPPER", "a b", "x" * 65, "ü"])
def test_name_that_is_no_plain_directory_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(BuildError, match="is not allowed"), store.installing(name):
        pytest.fail("the block must not run")
    with pytest.raises(ModelNotFoundError):
        store.open(name)
    with pytest.raises(ModelNotFoundError):
        store.remove(name)


def test_removed_model_is_gone(store: Store) -> None:
    install(store)
    install(store, name="other")
    store.remove("tiny")
    assert content(store) == {"other"}
    with pytest.raises(ModelNotFoundError, match=r"'tiny' is not installed in .*; these are: other"):
        store.open("tiny")


def test_second_writer_is_told_to_wait(store: Store) -> None:
    with store.installing("tiny") as directory:
        write_bundle(directory)
        second = Store(store.directory)
        with pytest.raises(BuildError, match="another process is at work"):
            second.remove("tiny")
        second.sweep()  # must not take the first one's work away
        assert directory.is_dir()
    assert store.names() == ["tiny"]


def test_sweep_puts_the_old_model_back_between_two_renames(store: Store) -> None:
    install(store, seed=1)
    before = store.open("tiny").manifest
    (store.directory / "tiny").rename(store.directory / ".replaced-tiny")
    (store.directory / ".incoming-0123").mkdir()
    (store.directory / ".removed-0123" / "tiny").mkdir(parents=True)
    assert store.names() == []
    store.sweep()
    assert store.open("tiny").manifest == before
    assert content(store) == {"tiny"}


def test_temporary_files_beside_the_result_are_removed_with_it(store: Store) -> None:
    with store.installing("tiny") as directory:
        write_bundle(directory)
        (directory.parent / "scratch").mkdir()
        (directory.parent / "scratch" / "reference.data").write_bytes(b"1234")
    assert content(store) == {"tiny"}
    assert {path.name for path in store.path("tiny").iterdir()} == {*store.open("tiny").manifest.files, "manifest.json"}


def test_sweep_of_a_store_that_is_not_there_makes_none(store: Store) -> None:
    store.sweep()
    assert not store.directory.exists()


def test_every_file_is_written_through_before_the_rename(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durable install: files, their directory, the rename, the parent directory, in this order."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_fsync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    install(store)
    place = events.index("rename")
    files = {path.name for path in store.path("tiny").iterdir()}
    assert set(events[: place - 1]) == files
    assert events[place - 1] == "tiny"
    assert events[place + 1 :] == ["models"]


@pytest.mark.parametrize(
    ("kind", "expected"), [("install", {"none", "new"}), ("replace", {"old", "new"}), ("remove", {"old", "none"})]
)
@pytest.mark.parametrize("way", ["exchange", "two-renames"])
def test_killed_at_any_step_the_old_or_the_new_model_opens(
    kind: str, expected: set[str], way: str, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "old", seed=1)
    write_bundle(tmp_path / "new", seed=2)
    command = [sys.executable, str(Path(__file__).with_name("kill_store.py"))]
    finished = subprocess.run(
        [*command, str(tmp_path), kind, way, str(NUM_KILLS), "17"],
        capture_output=True,
        text=True,
        timeout=60 + NUM_KILLS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["kills"] == NUM_KILLS
    assert set(report["outcomes"]) <= expected
    assert sum(report["outcomes"].values()) == NUM_KILLS
    shutil.rmtree(tmp_path / "models")
