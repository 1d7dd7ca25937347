"""A Hugging Face directory is read as transformers would read it, or refused with the remedy."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import tiny_models, write_huggingface
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.checkpoints.huggingface_config import one_spelling
from hearthd.build.checkpoints.safetensors_file import SafetensorsFile
from hearthd.errors import BuildError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    write_huggingface(path, tiny_models()["qwen2"])
    return path


def change(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(directory: Path) -> str:
    with pytest.raises(BuildError) as raised:
        open_checkpoint(directory)
    message = str(raised.value)
    assert message.startswith(f"{directory}")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "no config.json; give a Hugging Face checkpoint directory or a GGUF file"),
        ("model.safetensors", "convert older *.bin weights with transformers' save_pretrained"),
        ("tokenizer.json", "AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_missing_file_names_the_remedy(directory: Path, file: str, message: str) -> None:
    (directory / file).unlink()
    assert message in refusal(directory)


@pytest.mark.parametrize("file", ["generation_config.json", "special_tokens_map.json"])
def test_file_that_may_be_missing_may_be_missing(directory: Path, file: str) -> None:
    (directory / file).unlink(missing_ok=True)
    open_checkpoint(directory).close()


@pytest.mark.parametrize("style", ["jinja", "string", "list"])
def test_template_is_found_in_each_of_its_places(style: Any, tmp_path: Path) -> None:
    model = tiny_models()["qwen3"]
    write_huggingface(tmp_path / "tiny", model, template=style)
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        assert checkpoint.chat_template == model.template


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (5, 5, (5, 402)),
        (5, [6, 5], (5, 6, 402)),
        ([7, 5], 6, (7, 5, 6, 402)),
        (None, [6], (6, 402)),
        (5, None, (5, 402)),
        (None, None, (402,)),
    ],
)
def test_eos_ids_are_united(directory: Path, in_config: Any, in_generation: Any, expected: tuple[int, ...]) -> None:
    """402 is the tokenizer's own eos_token, <|im_end|>."""
    change(directory / "config.json", eos_token_id=in_config)
    change(directory / "generation_config.json", eos_token_id=in_generation)
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.eos_ids == expected


def test_checkpoint_without_any_eos_is_refused(directory: Path) -> None:
    change(directory / "config.json", eos_token_id=None)
    change(directory / "generation_config.json", eos_token_id=None)
    change(directory / "tokenizer_config.json", eos_token=None)
    assert "an answer would never end" in refusal(directory)


def test_generation_defaults_are_taken_over(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.generation == {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}


@pytest.mark.parametrize(("key", "value"), [("temperature", -1), ("top_p", "high"), ("top_k", 2**40), ("min_p", True)])
def test_generation_default_that_makes_no_sense_is_named(directory: Path, key: str, value: Any) -> None:
    change(directory / "generation_config.json", **{key: value})
    assert f"has {key} " in refusal(directory)


def test_license_comes_from_the_model_card(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.license == ""
    (directory / "README.md").write_text("---\nlibrary_name: transformers\nlicense: apache-2.0\n---\nlicense: other\n")
    with open_checkpoint(directory) as checkpoint:
        assert checkpoint.license == "apache-2.0"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM' is not supported; these are: "),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "reads images too; of its family take 270M or 1B"),
        ({"architectures": None}, "architecture 'qwen2' is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised already"),
        ({"rope_scaling": "linear"}, "no object"),
    ],
)
def test_unusable_configuration_is_named(directory: Path, values: dict[str, Any], message: str) -> None:
    change(directory / "config.json", **values)
    assert message in refusal(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '"text"'])
def test_configuration_that_is_no_object_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    assert "config.json that is not" in refusal(directory)


def test_damaged_tokenizer_is_refused(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer.json that does not load" in refusal(directory)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "model.bin", "sub/a.safetensors", 3]
)
def test_index_names_only_files_in_the_directory(directory: Path, shard: Any) -> None:
    (directory / "model.safetensors").rename(directory.parent / "model.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index" in refusal(directory)


def test_shard_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "tiny"
    write_huggingface(directory, tiny_models()["qwen2"], num_shards=2)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": where | {"model.norm.bias": "model-00001-of-00002.safetensors"}}))
    assert "no tensor 'model.norm.bias' in model-00001-of-00002.safetensors" in refusal(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: cannot be read" in refusal(directory)


@pytest.mark.reference
@pytest.mark.parametrize("name", sorted(tiny_models()))
def test_a_key_that_is_left_out_is_what_transformers_takes(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="`make test` installs the reference group")
    model = tiny_models()[name].config
    default = transformers.AutoConfig.for_model(model["model_type"])
    given = {"hidden_size": default.hidden_size, "num_attention_heads": default.num_attention_heads}
    ours = one_spelling(given, model["architectures"][0])
    expected = default.to_dict()
    if not expected.get("use_sliding_window", True):
        expected["sliding_window"] = None
    same = ("max_position_embeddings", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "attention_bias")
    for key in (*same, "mlp_bias", "sliding_window", "original_max_position_embeddings", "head_dim"):
        if expected.get(key) is not None:
            assert ours[key] == expected[key], key
    assert ours["hidden_act"] == expected.get("hidden_activation", expected.get("hidden_act"))
    ropes = expected["rope_parameters"]
    assert ours["rope_theta"] == ropes.get("full_attention", ropes)["rope_theta"]


def test_bfloat16_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    data = bytes.fromhex("803f 00c0 0000 4940".replace(" ", ""))
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = SafetensorsFile(tmp_path / "t.safetensors")
    np.testing.assert_array_equal(file.rows("t", 0, 2), np.array([[1.0, -2.0], [0.0, 3.140625]], np.float32))
    file.close()


def test_quantised_tensor_is_refused_by_its_type(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "t.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    file = SafetensorsFile(tmp_path / "t.safetensors")
    with pytest.raises(BuildError, match="tensor 't' is F8_E4M3; F64, F32, F16, BF16 are read"):
        file.rows("t", 0, 1)
    file.close()


def entry(**values: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"t": 3},
        {"t": {"dtype": "F32"}},
        entry(shape="ab"),
        entry(shape=[2**62, 2**62]),
        entry(shape=[-1]),
        entry(shape=[0]),
        entry(shape=[1] * 9),
        entry(shape=[True, 2]),
        entry(data_offsets=[0]),
        entry(data_offsets=[0, 9]),
        entry(data_offsets=[8, 0]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[0, 2**70]),
        entry(dtype=[]),
        entry(shape=[3]),
    ],
)
def test_hostile_safetensors_header_is_refused(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "t.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BuildError):
        SafetensorsFile(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    "cut", [lambda data: data[:4], lambda data: data[:40], lambda data: data[:-1], lambda data: b""]
)
def test_safetensors_file_that_is_cut_off_is_refused(directory: Path, cut: Callable[[bytes], bytes]) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(cut(file.read_bytes()))
    assert "model.safetensors" in refusal(directory)


@given(data=st.binary(max_size=120), length=st.integers(0, 200))
def test_any_bytes_are_read_or_refused_but_nothing_else(
    data: bytes, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with contextlib.suppress(BuildError):
        SafetensorsFile(path).close()


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "I8"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_entry_is_read_or_refused_but_nothing_else(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = json.dumps({"t": value}).encode()
    path = tmp_path_factory.getbasetemp() / "entry.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with contextlib.suppress(BuildError):
        SafetensorsFile(path).close()


@pytest.mark.parametrize(
    "key", ["num_attention_heads", "hidden_size", "head_dim", "rope_theta", "eos_token_id", "vocab_size"]
)
@pytest.mark.parametrize("value", [0, -1, "x", [], {}, 1.5, True])
def test_hostile_value_is_read_or_refused_but_nothing_else(directory: Path, key: str, value: Any) -> None:
    change(directory / "config.json", **{key: value})
    with contextlib.suppress(BuildError):
        open_checkpoint(directory).close()


def test_embedding_that_is_no_matrix_is_refused(directory: Path) -> None:
    text = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert "model.embed_tokens.weight of shape ()" in refusal(directory)
