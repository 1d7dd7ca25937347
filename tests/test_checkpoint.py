"""A checkpoint reads the same, whether it comes as GGUF or as a Hugging Face directory, down to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from checkpoints import TinyModel, llama3_rope_factors, make_tokenizer, tiny_models, write_gguf, write_huggingface
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.errors import BuildError

CONFIG_KEYS = (
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "bos_token_id",
)


@pytest.fixture(params=tiny_models())
def model(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_models()[request.param]


@pytest.fixture(params=["gguf", "huggingface"])
def checkpoint(request: pytest.FixtureRequest, model: TinyModel, tmp_path: Path) -> Iterator[Checkpoint]:
    if request.param == "gguf":
        write_gguf(tmp_path / "tiny.gguf", model)
    else:
        write_huggingface(tmp_path / "tiny", model)
    with open_checkpoint(tmp_path / ("tiny.gguf" if request.param == "gguf" else "tiny")) as opened:
        yield opened


def assert_same_weights(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    assert checkpoint.tensor_names == set(expected)
    for name, values in expected.items():
        read = checkpoint.tensor(name)
        assert read.dtype == np.float32
        assert read.flags.writeable
        assert checkpoint.shape(name) == values.shape
        np.testing.assert_array_equal(read, values, err_msg=name)


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_gives_the_weights_back_in_hugging_face_order(model: TinyModel, encoding: str, tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf", model, encoding=encoding)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert_same_weights(checkpoint, expected)


@pytest.mark.parametrize(("dtype", "num_shards"), [("F32", 1), ("F16", 3), ("BF16", 2)])
def test_huggingface_gives_the_weights_back(model: TinyModel, dtype: Any, num_shards: int, tmp_path: Path) -> None:
    expected = write_huggingface(tmp_path / "tiny", model, dtype=dtype, num_shards=num_shards)
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        assert_same_weights(checkpoint, expected)


def test_rows_are_the_rows_of_the_tensor(checkpoint: Checkpoint) -> None:
    for name in checkpoint.tensor_names:
        whole = checkpoint.tensor(name)
        if whole.ndim == 2:
            np.testing.assert_array_equal(checkpoint.rows(name, 5, 13), whole[5:13], err_msg=name)
            assert checkpoint.rows(name, 7, 7).shape == (0, whole.shape[1])


def test_configuration_has_one_spelling(checkpoint: Checkpoint, model: TinyModel) -> None:
    defaults = {"attention_bias": False, "mlp_bias": False}
    for key in CONFIG_KEYS:
        assert checkpoint.config[key] == (defaults | model.config)[key], key


@pytest.mark.parametrize("transformers_5", [False, True])
def test_both_transformers_spellings_give_one_decoder(model: TinyModel, transformers_5: bool, tmp_path: Path) -> None:
    write_huggingface(tmp_path / "tiny", model, transformers_5=transformers_5)
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        assert checkpoint.config["rope_theta"] == model.config["rope_theta"]
        assert checkpoint.config["rope_scaling"] == model.config["rope_scaling"]
        assert DecoderSpec.from_config(checkpoint.config) == DecoderSpec.from_config(model.config)


def test_gguf_rope_factors_are_what_the_scaling_computes(tmp_path: Path) -> None:
    model = tiny_models()["llama3"]
    write_gguf(tmp_path / "tiny.gguf", model)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        factors = checkpoint.config["rope_freq_factors"]
        np.testing.assert_array_equal(factors, llama3_rope_factors(model.config))
        (from_factors,) = DecoderSpec.from_config(checkpoint.config).ropes
    (computed,) = DecoderSpec.from_config(model.config).ropes
    np.testing.assert_allclose(from_factors.inverse_frequencies, computed.inverse_frequencies, rtol=1e-6)


def test_every_added_token_comes_along(checkpoint: Checkpoint, model: TinyModel) -> None:
    original = make_tokenizer(model.style).get_added_tokens_decoder()
    found = Tokenizer.from_str(checkpoint.tokenizer_json).get_added_tokens_decoder()
    assert {token_id: repr(token) for token_id, token in found.items()} == {
        token_id: repr(token) for token_id, token in original.items()
    }
    assert set(checkpoint.eos_ids) <= set(original)
    assert checkpoint.eos_ids[0] == model.config["eos_token_id"]


def test_template_and_its_tokens_come_along(checkpoint: Checkpoint, model: TinyModel) -> None:
    assert checkpoint.chat_template == model.template
    tokenizer = make_tokenizer(model.style)
    assert tokenizer.token_to_id(checkpoint.bos_token) == model.config["bos_token_id"]
    assert tokenizer.token_to_id(checkpoint.eos_token) == model.config["eos_token_id"]


TEXTS = st.text(max_size=60) | st.text(alphabet="abc deTH 0123456789\n\r\t'.,ü今🙂\u0301▁<>|_", max_size=60)
TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.mark.parametrize(
    "name", ["smollm2", "llama3", "qwen2", "tinyllama", "smollm3", "granite", "phi3", "phi4", "gemma3"]
)
@given(text=TEXTS)
def test_gguf_tokenizer_gives_the_ids_of_the_original(
    name: str, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if name not in TOKENIZERS:
        path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        write_gguf(path, tiny_models()[name])
        with open_checkpoint(path) as checkpoint:
            TOKENIZERS[name] = Tokenizer.from_str(checkpoint.tokenizer_json)
    original, made = make_tokenizer(tiny_models()[name].style), TOKENIZERS[name]
    ids = original.encode(text, add_special_tokens=False).ids
    assert made.encode(text, add_special_tokens=False).ids == ids
    assert made.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_unknown_tensor_is_named(checkpoint: Checkpoint) -> None:
    assert not checkpoint.has_tensor("model.layers.0.self_attn.sinks")
    for read in (checkpoint.shape, checkpoint.tensor):
        with pytest.raises(BuildError, match=r"model\.layers\.0\.self_attn\.sinks"):
            read("model.layers.0.self_attn.sinks")


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="nothing: no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
