"""A bundle opens exactly when its files are the ones that were built."""

import contextlib
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bundles import TINY_MANIFEST, seal, tiny_model, write_bundle
from hearthd.bundles.bundle import Bundle, Manifest, file_entry
from hearthd.bundles.external_locations import external_locations
from hearthd.bundles.manifest import _canonical, _seal
from hearthd.errors import BundleError

FILES = [
    "manifest.json",
    "model.onnx",
    "model.data",
    "tokenizer.json",
    "chat_template.jinja",
    "generation.json",
    "preset.npy",
]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture
def bundle_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    write_bundle(path)
    return path


def sealed(content: dict[str, Any]) -> str:
    """A manifest's text whose own hash is right, so that what is said in it is what is judged."""
    return _canonical(content | {"sha256": _seal(content)})


def valid_content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(TINY_MANIFEST.to_json())
    del content["sha256"]
    return content


def parse(text: str) -> Manifest | None:
    """The promise of the parser: a valid manifest or BundleError, whatever the text."""
    try:
        manifest = Manifest.from_json(text)
    except BundleError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 400
        return None
    assert Manifest.from_json(manifest.to_json()) == manifest
    return manifest


def test_written_bundle_opens_with_what_was_written(bundle_path: Path) -> None:
    bundle = Bundle.open(bundle_path)
    assert bundle.manifest == seal(bundle_path)
    assert bundle.model_path.read_bytes() == tiny_model()
    assert bundle.tokenizer_json() == '{"version": "1.0"}'
    assert bundle.chat_template() == "{{ messages }}"
    assert bundle.generation() == {"temperature": 0.2, "top_p": 0.9}
    assert bundle.size_bytes == sum((bundle_path / name).stat().st_size for name in FILES[1:])


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_refuses(bundle_path: Path, name: str) -> None:
    file = bundle_path / name
    data = file.read_bytes()
    random_source = random.Random(name)
    positions = {0, len(data) - 1} | {random_source.randrange(len(data)) for _ in range(60)}
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << random_source.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(BundleError):
            Bundle.open(bundle_path)
    file.write_bytes(data)
    Bundle.open(bundle_path)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_refuses(bundle_path: Path, name: str) -> None:
    (bundle_path / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_path, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_linked_files_refuse(bundle_path: Path, tmp_path: Path, name: str) -> None:
    file, outside = bundle_path / name, tmp_path / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_path, verify=False)
    file.unlink()
    os.link(outside, file)
    with pytest.raises(BundleError, match="hard-linked"):
        Bundle.open(bundle_path, verify=False)


@pytest.mark.parametrize("name", FILES)
def test_named_pipe_or_directory_in_the_place_of_a_file_refuses(bundle_path: Path, name: str) -> None:
    file = bundle_path / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_path, verify=False)
    file.unlink()
    file.mkdir()
    with pytest.raises(BundleError, match=name):
        Bundle.open(bundle_path, verify=False)


def test_extra_file_or_directory_refuses(bundle_path: Path) -> None:
    (bundle_path / "more.data").write_bytes(b"")
    with pytest.raises(BundleError, match=r"more\.data"):
        Bundle.open(bundle_path, verify=False)
    (bundle_path / "more.data").unlink()
    (bundle_path / "sub").mkdir()
    with pytest.raises(BundleError, match="sub"):
        Bundle.open(bundle_path, verify=False)


@pytest.mark.parametrize("grow", [-1, 1])
def test_other_size_refuses_without_hashing(bundle_path: Path, grow: int) -> None:
    os.truncate(bundle_path / "model.data", 64 + grow)
    with pytest.raises(BundleError, match=f"{64 + grow} bytes"):
        Bundle.open(bundle_path, verify=False)


def test_huge_manifest_refuses_without_being_read(bundle_path: Path) -> None:
    os.truncate(bundle_path / "manifest.json", 2**40)
    started = time.monotonic()
    with pytest.raises(BundleError, match="larger"):
        Bundle.open(bundle_path)
    assert time.monotonic() - started < 5


def test_what_is_no_directory_refuses(bundle_path: Path, tmp_path: Path) -> None:
    for path in (bundle_path / "model.onnx", tmp_path / "nothing"):
        with pytest.raises(BundleError, match="hearthd model add"):
            Bundle.open(path)


@pytest.mark.parametrize("location", ["../outside.data", "/etc/passwd", "sub/model.data", "other.data", ""])
def test_graph_reads_weights_only_from_listed_files(tmp_path: Path, location: str) -> None:
    write_bundle(tmp_path / "tiny", external=location)
    with pytest.raises(BundleError, match="reads weights from"):
        Bundle.open(tmp_path / "tiny")


def test_external_data_is_found_in_subgraphs_and_functions() -> None:
    inner = onnx.ModelProto.FromString(tiny_model("in_subgraph")).graph
    outer = onnx.ModelProto.FromString(tiny_model("in_graph"))
    outer.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))
    constant = onnx.ModelProto.FromString(tiny_model("in_function")).graph.initializer[0]
    function = onnx.helper.make_function(
        "hearth", "f", [], ["y"], [onnx.helper.make_node("Constant", [], ["y"], value=constant)], []
    )
    outer.functions.append(function)
    found = external_locations(outer.SerializeToString())
    assert found == {"in_graph", "in_subgraph", "in_function"}


@given(data=st.binary(max_size=200))
def test_damaged_graph_is_refused_or_read_but_nothing_else(data: bytes) -> None:
    with contextlib.suppress(BundleError):
        external_locations(data)


@given(position=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_graph_with_a_changed_byte_is_refused_or_read_but_nothing_else(position: int, byte: int) -> None:
    data = bytearray(tiny_model())
    data[position % len(data)] = byte
    with contextlib.suppress(BundleError):
        external_locations(bytes(data))


def test_progress_counts_every_byte_once(bundle_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    bundle = Bundle.open(bundle_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (bundle.size_bytes, bundle.size_bytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_verifying_a_hundred_megabytes_takes_seconds_at_most(bundle_path: Path) -> None:
    """The aim is 135 MB in a second; a shared machine gets five."""
    with (bundle_path / "model.data").open("wb") as file:
        for _ in range(135):
            file.write(os.urandom(2**10) * 2**10)
    seal(bundle_path)
    started = time.monotonic()
    Bundle.open(bundle_path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", '{"temperature": "hot"}', '{"temperature": true}', '{"temperature": 1e999}', '{"stop": 1}', "{"],
)
def test_generation_defaults_are_finite_numbers_of_known_names(bundle_path: Path, text: str) -> None:
    (bundle_path / "generation.json").write_text(text)
    seal(bundle_path)
    if text == "{}":
        assert Bundle.open(bundle_path).generation() == {}
        return
    with pytest.raises(BundleError, match=r"generation\.json"):
        Bundle.open(bundle_path).generation()


@given(text=st.text(max_size=200) | JSON.map(lambda value: json.dumps(value)))
def test_any_text_is_refused(text: str) -> None:
    assert parse(text) is None


@given(value=JSON, key=st.sampled_from([*sorted(valid_content()), "unknown"]))
def test_manifest_with_any_value_is_valid_or_refused(value: Any, key: str) -> None:
    content = valid_content() | {key: value}
    try:
        text = sealed(content)
    except ValueError:  # nan, infinity, a lone surrogate: cannot even be written
        text = json.dumps(content)
    if key == "unknown":
        assert parse(text) is None
    else:
        parse(text)


@given(data=st.data())
def test_manifest_with_any_file_entry_is_valid_or_refused(data: st.DataObject) -> None:
    content = valid_content()
    name = data.draw(
        st.text(max_size=12) | st.sampled_from(["model.onnx", "..", "a/b", "/etc/passwd", "manifest.json"])
    )
    content["files"][name] = data.draw(
        JSON | st.fixed_dictionaries({"size": JSON | st.integers(0, 9), "sha256": JSON | st.just("0" * 64)})
    )
    try:
        text = sealed(content)
    except ValueError:
        text = json.dumps(content)
    manifest = parse(text)
    if manifest is not None:
        assert all("/" not in each and each not in (".", "..", "manifest.json") for each in manifest.files)


@given(position=st.integers(0, 10**6), replacement=st.text(min_size=1, max_size=3))
def test_manifest_with_changed_characters_is_refused(position: int, replacement: str) -> None:
    text = TINY_MANIFEST.to_json()
    position %= len(text)
    changed = text[:position] + replacement + text[position + len(replacement) :]
    if changed != text:
        assert parse(changed) is None


@pytest.mark.parametrize("version", [0, 1, 4, "2", None, True, 2.0])
def test_other_schema_version_names_the_remedy(version: object) -> None:
    with pytest.raises(BundleError, match="build the model again with this hearthd"):
        Manifest.from_json(sealed(valid_content() | {"schema_version": version}))


@pytest.mark.parametrize("version", [2, 3])
def test_manifests_of_both_kinds_of_graph_are_read(version: int) -> None:
    assert Manifest.from_json(sealed(valid_content() | {"schema_version": version})).schema_version == version


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, '{"schema_version": 1e999}', "\ufeff{}", '{"a": NaN}'])
def test_json_that_hurts_parsers_is_refused(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../up"}, "name is"),
        ({"name": "Tiny"}, "name is"),
        ({"context_length": 0}, "context_length is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_kv_heads": 3}, "no multiple"),
        ({"eos_ids": ()}, "eos_ids has 0"),
        ({"eos_ids": (32,)}, "vocabulary of 32"),
        ({"preset_tokens": (1,) * 64}, "fill the context"),
        ({"kv_dtype": "float32"}, "kv_dtype"),
        ({"quality": {"kl_mean": float("nan")}}, "finite"),
        ({"license": "a\nb"}, "one line"),
        ({"files": {}, "preset_tokens": ()}, r"no model\.onnx"),
    ],
)
def test_manifest_names_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        replace(TINY_MANIFEST, **change)


def test_file_entry_is_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    entry = file_entry(tmp_path / "abc")
    assert entry.size == 3
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_preset_has_the_shape_that_the_manifest_says(bundle_path: Path) -> None:
    preset = Bundle.open(bundle_path).preset()
    assert preset is not None
    assert preset.shape == (2, 2, 2, 1, 16)
    np.save(bundle_path / "preset.npy", preset[:1])
    seal(bundle_path)
    with pytest.raises(BundleError, match=r"preset\.npy is int8 \(1, 2, 2, 1, 16\)"):
        Bundle.open(bundle_path).preset()


def test_preset_with_a_header_that_lies_is_refused(bundle_path: Path) -> None:
    file = bundle_path / "preset.npy"
    data = file.read_bytes()
    # As long as before, or it would be another kind of damage.
    lie = data.replace(b"16), }" + b" " * 14, b"1" + b"0" * 15 + b"), }")
    assert len(lie) == len(data)
    assert lie != data
    file.write_bytes(lie)
    seal(bundle_path)
    with pytest.raises(BundleError, match=r"preset\.npy cannot be read"):
        Bundle.open(bundle_path).preset()
