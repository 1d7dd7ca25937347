"""GGUF files are input: read exactly, or refused in one line that says what is wrong."""

import contextlib
import itertools
import json
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from checkpoints import make_tokenizer, tiny_models, write_gguf
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.checkpoints.gguf_file import GgufFile
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.errors import BuildError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_models()["smollm2"], encoding="Q4_1")
    return path.read_bytes()


def refusal(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(BuildError) as raised:
        open_checkpoint(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def header(*, version: int = 3, num_tensors: int = 0, num_metadata: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def tensor_info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "empty": (b"", "cannot be read"),
    "other file": (b"PK\x03\x04" + bytes(100), "does not start with 'GGUF'"),
    "version 1": (header(version=1), "GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only the magic": (b"GGUF", "cut off"),
    "many tensors": (header(num_tensors=2**63), "9223372036854775808 tensors; at most"),
    "more tensors than bytes": (header(num_tensors=60_000), "cut off"),
    "many entries": (header(num_metadata=2**64 - 1), "metadata entries; at most"),
    "more entries than bytes": (header(num_metadata=60_000), "cut off"),
    "long key": (header(num_metadata=1) + struct.pack("<Q", 2**62) + bytes(64), "cut off"),
    "key over the limit": (header(num_metadata=1) + text("k" * 300) + bytes(64), "at most 256"),
    "key not UTF-8": (header(num_metadata=1) + text(b"\xff\xfe") + bytes(64), "not UTF-8"),
    "key twice": (header(num_metadata=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2, "'k' twice"),
    "unknown type": (header(num_metadata=1) + text("k") + struct.pack("<I", 99) + bytes(64), "unknown type 99"),
    "nested array": (
        header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64),
        "an array of type 9",
    ),
    "long array": (header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 0, 2**60), "items in 'k'; at most"),
    "array over the end": (header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 10, 2**20), "cut off"),
    "strings over the end": (header(num_metadata=1) + text("k") + struct.pack("<IIQ", 9, 8, 2**21), "cut off"),
    "no dimensions": (header(num_tensors=1) + tensor_info("t", ()) + bytes(64), "0 dimensions"),
    "many dimensions": (
        header(num_tensors=1) + text("t") + struct.pack("<I", 2**31) + bytes(64),
        "2147483648 dimensions",
    ),
    "empty dimension": (header(num_tensors=1) + tensor_info("t", (0, 4)) + bytes(64), "shape (4, 0)"),
    "huge tensor": (header(num_tensors=1) + tensor_info("t", (2**62, 2**62)) + bytes(64), "cut off: tensor 't'"),
    "far offset": (header(num_tensors=1) + tensor_info("t", (4,), offset=2**64 - 1) + bytes(64), "cut off: tensor 't'"),
    "half a block": (header(num_tensors=1) + tensor_info("t", (16,), kind=8) + bytes(64), "not whole Q8_0 blocks"),
    "i-quant": (header(num_tensors=1) + tensor_info("t", (256,), kind=16) + bytes(640), "IQ2_XXS"),
    "unknown encoding": (header(num_tensors=1) + tensor_info("t", (4,), kind=77) + bytes(64), "type 77"),
    "tensor twice": (header(num_tensors=2) + tensor_info("t", (1,)) * 2 + bytes(64), "'t' twice"),
    "alignment 0": (header(num_metadata=1) + text("general.alignment") + struct.pack("<II", 4, 0), "alignment 0"),
    "alignment 3": (header(num_metadata=1) + text("general.alignment") + struct.pack("<II", 4, 3), "power of two"),
    "no architecture": (header(), "architecture '' is not supported; these are: Gemma3ForCausalLM"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header_is_refused_at_once(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    tracemalloc.start()
    started = time.monotonic()
    assert message in refusal(tmp_path / "hostile.gguf", data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - started < 2
    assert peak < 8 * 2**20


def test_file_cut_off_anywhere_is_refused(tiny: bytes, tmp_path: Path) -> None:
    steps = itertools.chain(range(400), range(400, len(tiny), 997), [len(tiny) - 1])
    for length in steps:
        message = refusal(tmp_path / "cut.gguf", tiny[:length])
        assert length < 4 or "cut off" in message


@given(data=st.binary(max_size=300).map(lambda tail: header(num_tensors=1, num_metadata=2) + tail))
@example(data=header(num_tensors=1, num_metadata=2))
def test_any_bytes_are_read_or_refused_but_nothing_else(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    path.write_bytes(data)
    with contextlib.suppress(BuildError), GgufFile(path) as file:
        assert len(file.tensors) == 1


@given(changes=st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, 255)), min_size=1, max_size=8))
def test_changed_bytes_are_read_or_refused_but_nothing_else(
    changes: list[tuple[int, int]], tiny: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(tiny)
    # The header is the first part of the file; the rest is weights, in which every byte means something.
    for position, value in changes:
        data[position % (len(tiny) // 6)] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    with contextlib.suppress(BuildError), open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensor_names:
            assert checkpoint.tensor(name).shape == checkpoint.shape(name)


@pytest.mark.parametrize("encoding", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1"])
def test_every_encoding_is_dequantised_as_gguf_does(encoding: str, tmp_path: Path) -> None:
    """The `gguf` package cannot write K-quants; any bytes are some blocks of them."""
    kind = gguf.GGMLQuantizationType[encoding]
    block_items, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(3)
    row_bytes = 512 // block_items * block_bytes
    blocks = random.integers(0, 64, (6, row_bytes), dtype=np.uint8)  # below 0x40: scales are finite
    data = header(num_tensors=1) + tensor_info("t", (512, 6), kind=int(kind))
    (tmp_path / "k.gguf").write_bytes(data + bytes(-len(data) % 32) + blocks.tobytes())
    with GgufFile(tmp_path / "k.gguf") as file:
        values = file.rows("t", 0, 6)
        part = file.rows("t", 2, 5)
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values, gguf.quants.dequantize(blocks, kind))
    np.testing.assert_array_equal(part, values[2:5])


def test_rows_outside_of_a_tensor_are_an_error(tiny: bytes, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(tiny)
    with GgufFile(tmp_path / "tiny.gguf") as file:
        num_rows = file.tensors["token_embd.weight"].shape[0]
        for start, stop in [(-1, 1), (0, num_rows + 1), (3, 2)]:
            with pytest.raises(IndexError):
                file.rows("token_embd.weight", start, stop)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama__embedding_length": None}, "'llama.embedding_length' is not there"),
        ({"llama__block_count": 0}, "'llama.block_count' is 0"),
        ({"llama__attention__head_count": "4"}, "'llama.attention.head_count' is '4'"),
        ({"llama__attention__head_count": [4, 4, 4]}, "'llama.attention.head_count' is [4, 4, 4]"),
        ({"llama__attention__value_length": 32}, "key and value heads of different size"),
        ({"llama__rope__dimension_count": 8}, "rope over a part of each head"),
        ({"llama__expert_count": 8}, "mixtures of experts"),
        ({"llama__rope__freq_base": float("nan")}, "'llama.rope.freq_base' is nan"),
        ({"general__architecture": "gemma2"}, "architecture 'gemma2' is not supported; these are: Gemma3ForCausalLM, "),
        ({"tokenizer__chat_template": None}, "no chat template"),
        ({"tokenizer__ggml__pre": "tekken"}, "the pre-tokenizer 'tekken'; these are known: deepseek-r1-qwen, default"),
        ({"tokenizer__ggml__pre": None}, "names no pre-tokenizer (an old conversion)"),
        ({"tokenizer__ggml__model": "t5"}, "a 't5' tokenizer; gpt2 (byte-level BPE) and llama (SentencePiece) work"),
        ({"tokenizer__ggml__eos_token_id": None}, "no tokenizer.ggml.eos_token_id"),
        ({"tokenizer__ggml__eos_token_id": 100_000}, "eos_token_id 100000"),
        ({"tokenizer__ggml__merges": ["a b c"]}, "a merge that is not two tokens"),
        ({"tokenizer__ggml__merges": ["nowhere tobefound"]}, "a tokenizer that does not load"),
        ({"tokenizer__ggml__token_type": [1, 2, 3]}, "not one tokenizer.ggml.token_type for each token"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "two tokens of the same text"),
        ({"tokenizer__ggml__tokens": None}, "no tokenizer.ggml.tokens"),
    ],
)
def test_unusable_metadata_is_named(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_models()["smollm2"], **metadata)
    with pytest.raises(BuildError) as raised:
        open_checkpoint(path)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_sinks.weight", "mm.0.weight", "cls.output"])
def test_tensor_without_a_place_is_refused(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"], more={name: np.ones(4, np.float32)})
    with pytest.raises(BuildError, match=f"tensor '{name}' has no place in llama"):
        open_checkpoint(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(("kind", "expected"), [("linear", {"rope_type": "linear", "factor": 4.0}), ("none", None)])
def test_rope_scaling_reaches_the_configuration(kind: str, expected: object, tmp_path: Path) -> None:
    scaling: dict[str, Any] = {"llama__rope__scaling__type": kind, "llama__rope__scaling__factor": 4.0}
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"], **scaling)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.config["rope_scaling"] == expected


def test_control_tokens_that_end_a_text_end_a_turn_too(tmp_path: Path) -> None:
    model = tiny_models()["llama3"]
    write_gguf(tmp_path / "tiny.gguf", model)
    tokenizer = make_tokenizer(model.style)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.eos_ids == (tokenizer.token_to_id("<|eot_id|>"), tokenizer.token_to_id("<|end_of_text|>"))


def test_license_and_source_are_told_without_a_path(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["smollm2"])
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        assert checkpoint.license == "apache-2.0"
        assert checkpoint.source == "GGUF file tiny.gguf"


def test_license_and_name_become_one_line_that_a_manifest_takes(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.gguf"
    write_gguf(path, tiny_models()["smollm2"], general__license="free\n" + "x" * 5000)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.license == "free?" + "x" * 195
        assert checkpoint.source == "GGUF file a?b.gguf"


def join_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as its paper has it: join the neighbours whose piece scores best, leftmost first."""
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[a + b], -place) for place, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not joined:
            return pieces
        place = -max(joined)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, dict[str, float]]:
    path = tmp_path_factory.mktemp("gguf") / "sentencepiece.gguf"
    write_gguf(path, tiny_models()["tinyllama"])
    with GgufFile(path) as file, open_checkpoint(path) as checkpoint:
        tokens: Any = file.metadata["tokenizer.ggml.tokens"]
        scores: Any = file.metadata["tokenizer.ggml.scores"]
        kinds: Any = file.metadata["tokenizer.ggml.token_type"]
        normal = {token: score for token, score, kind in zip(tokens, scores, kinds, strict=True) if kind == 1}
        return Tokenizer.from_str(checkpoint.tokenizer_json), normal


@given(text=st.text(alphabet="the ktlisonadrcw.,?'T", min_size=1, max_size=80))
def test_merges_from_scores_join_as_sentencepiece_does(
    text: str, sentencepiece: tuple[Tokenizer, dict[str, float]]
) -> None:
    tokenizer, scores = sentencepiece
    assert tokenizer.encode(text, add_special_tokens=False).tokens == join_by_score(text, scores)


def test_unknown_characters_fall_back_to_bytes(sentencepiece: tuple[Tokenizer, dict[str, float]]) -> None:
    tokenizer, _ = sentencepiece
    encoding = tokenizer.encode("🦔", add_special_tokens=False)
    assert encoding.tokens == ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x94>"]
    assert tokenizer.decode(encoding.ids) == "🦔"


def test_unused_tokens_are_left_out_and_added_ones_keep_their_ids(tmp_path: Path) -> None:
    model = tiny_models()["qwen2"]
    write_gguf(tmp_path / "tiny.gguf", model)
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        content = json.loads(checkpoint.tokenizer_json)
    assert not [token for token in content["model"]["vocab"] if token.startswith("[PAD")]
    expected = {token["content"]: (token["id"], token["special"]) for token in content["added_tokens"]}
    original = json.loads(make_tokenizer(model.style).to_str())
    assert expected == {token["content"]: (token["id"], token["special"]) for token in original["added_tokens"]}
    assert expected["<think>"][1] is False


def test_what_no_file_says_of_gemma_is_what_llama_cpp_takes(tmp_path: Path) -> None:
    """Scores by head size, but for the one size with 62 layers; and a larger one's scaled rope, in full layers only."""
    path = tmp_path / "tiny.gguf"
    scaling: dict[str, Any] = {"gemma3__rope__scaling__type": "linear", "gemma3__rope__scaling__factor": 8.0}
    write_gguf(path, tiny_models()["gemma3"], **scaling)
    with open_checkpoint(path) as checkpoint:
        config = dict(checkpoint.config)
    assert config["query_pre_attn_scalar"] == 32
    spec = DecoderSpec.from_config(config)
    full, sliding = spec.layers[5], spec.layers[0]
    assert full.window is None
    assert sliding.window == 7
    assert full.rope is not None
    assert sliding.rope is not None
    assert (full.rope.inverse_frequencies[0], sliding.rope.inverse_frequencies[0]) == (1 / 8, 1.0)
    assert sliding.rope.inverse_frequencies[1] == pytest.approx(10_000 ** (-2 / 32))
    write_gguf(path, tiny_models()["gemma3"], gemma3__block_count=62)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["query_pre_attn_scalar"] == 64 // 4
    write_gguf(path, tiny_models()["gemma3"], gemma3__attention__sliding_window=None)
    with open_checkpoint(path) as checkpoint:
        assert {layer.window for layer in DecoderSpec.from_config(checkpoint.config).layers} == {None}
    write_gguf(path, tiny_models()["gemma3"], gemma3__final_logit_softcapping=30.0)
    with open_checkpoint(path) as checkpoint, pytest.raises(BuildError, match=r"final_logit_softcapping 30\.0"):
        DecoderSpec.from_config(checkpoint.config)
    write_gguf(path, tiny_models()["gemma3"], tokenizer__ggml__model="gpt2")
    with pytest.raises(BuildError, match="a Gemma vocabulary without scores"):
        open_checkpoint(path)


def test_line_ends_belong_to_the_turns_of_phi3(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_models()["phi3"])
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer_json)
    turns = [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|user|>")]
    assert tokenizer.encode("<|end|>\n<|user|>\n", add_special_tokens=False).ids == turns
    assert len(tokenizer.encode("<|endoftext|>\n", add_special_tokens=False).tokens) > 1
