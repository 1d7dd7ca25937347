"""Decoding an answer token by token: exactly the text that decoding it at once gives, as early as it is certain."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import tiny_tokenizers as tiny
from hearthd.errors import BundleError
from hearthd.text.decoding import IncrementalDecoder, decoder_steps
from tiny_tokenizers import id_of, library

kinds = pytest.mark.parametrize("kind", tiny.EVERY)
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def deltas(kind: str, ids: list[int]) -> list[str]:
    decoder = tiny.chat_tokenizer(kind).decoder()
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


@kinds
@settings(max_examples=300)
@given(data=st.data())
def test_any_tokens_give_the_text_of_a_full_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = library(kind)
    bytes_of_characters = st.sampled_from([tokenizer.encode(text).ids for text in tiny.TEXT]).flatmap(st.sampled_from)
    token = bytes_of_characters | st.integers(0, tokenizer.get_vocab_size() + 5)
    ids = data.draw(st.lists(token, max_size=30))
    pieces = deltas(kind, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    for piece in pieces:
        piece.encode()


@kinds
@given(data=st.data())
def test_real_text_cut_anywhere_gives_the_text_of_a_full_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = library(kind)
    ids = tokenizer.encode("".join(data.draw(st.permutations(tiny.TEXT)))).ids
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    pieces = deltas(kind, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    if kind != "unigram":
        assert not any(REPLACEMENT in piece for piece in pieces[:-1])


def test_character_comes_with_its_last_byte_and_no_earlier() -> None:
    decoder = tiny.chat_tokenizer("byte_per_token").decoder()
    assert [decoder.push(byte) for byte in "aé😀".encode()] == ["a", "", "é", "", "", "", "😀"]
    assert not decoder.is_holding
    assert decoder.flush() == ""


@given(st.lists(st.integers(0, 255), max_size=40))
def test_at_most_three_bytes_are_held_back(tokens: list[int]) -> None:
    decoder = tiny.chat_tokenizer("byte_per_token").decoder()
    text = ""
    for count, token_id in enumerate(tokens, 1):
        text += decoder.push(token_id)
        if not decoder.is_holding:
            assert text == bytes(tokens[:count]).decode(errors="replace")
        assert any(text == bytes(tokens[: count - held]).decode(errors="replace") for held in range(4) if held <= count)


def test_cut_character_is_flushed_as_a_full_decode_gives_it() -> None:
    decoder = tiny.chat_tokenizer("byte_per_token").decoder()
    assert "".join(decoder.push(byte) for byte in "ok 😀".encode()[:-1]) == "ok "
    assert decoder.is_holding
    assert decoder.flush() == REPLACEMENT
    assert decoder.flush() == ""


def test_byte_tokens_are_certain_only_at_the_end_of_their_run() -> None:
    tokenizer = library("byte_fallback")
    smile = [id_of(f"<0x{byte:02X}>", "byte_fallback") for byte in "😀".encode()]
    letter = id_of("e", "byte_fallback")
    assert deltas("byte_fallback", [*smile, letter]) == ["", "", "", "", "😀e", ""]
    # One broken byte breaks its whole run: so does the library's decode.
    broken = [*smile, smile[0], letter]
    assert deltas("byte_fallback", broken)[-2] == REPLACEMENT * 5 + "e" == tokenizer.decode(broken)


def test_control_tokens_give_no_text_but_added_text_does() -> None:
    ids = [id_of(content) for content in ("a", "<|im_start|>", "<think>", "<|im_end|>")]
    assert deltas("byte_level", ids) == ["a", "", "<think>", "", ""]


def test_control_token_within_a_character_does_not_break_it() -> None:
    first, last = "é".encode()
    assert "".join(deltas("byte_per_token", [first, 256, last])) == "é"


def test_only_the_first_space_of_the_answer_is_dropped() -> None:
    space = id_of("▁", "byte_fallback")
    assert "".join(deltas("byte_fallback", [space, space, space])) == "  "
    assert "".join(deltas("metaspace", [space, space, space])) == "  "


@kinds
def test_long_answer_costs_the_same_for_each_token(kind: str) -> None:
    decoder = tiny.chat_tokenizer(kind).decoder()
    ids = library(kind).encode("The quick brown fox. ").ids
    text = "".join(decoder.push(token_id) for _ in range(3000) for token_id in ids)
    # What it keeps does not grow: there is no list of the tokens, only a window.
    assert text.count("fox") == 3000
    assert not decoder.is_holding


class TestTokenBytes:
    @pytest.mark.parametrize("kind", ["byte_level", "byte_per_token", "byte_fallback", "metaspace"])
    def test_of_all_tokens_are_the_bytes_of_the_text(self, kind: str) -> None:
        tokenizer = tiny.chat_tokenizer(kind)
        for text in tiny.TEXT:
            joined = b"".join(map(tokenizer.token_bytes, tokenizer.encode_text(text)))
            assert joined.decode().removeprefix(" " if kind in ("byte_fallback", "metaspace") else "") == text

    def test_of_control_and_unknown_tokens_are_none(self) -> None:
        tokenizer = tiny.chat_tokenizer("byte_per_token")
        assert tokenizer.token_bytes(257) == b""
        assert tokenizer.token_bytes(10**6) == b""
        assert tokenizer.token_bytes(0xE2) == b"\xe2"

    def test_of_a_byte_token_is_the_byte(self) -> None:
        token_id = id_of("<0xF0>", "byte_fallback")
        assert tiny.chat_tokenizer("byte_fallback").token_bytes(token_id) == b"\xf0"


class TestSteps:
    @pytest.mark.parametrize(
        "decoder",
        [
            decoders.WordPiece(),
            decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
            decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
            decoders.Sequence([decoders.ByteFallback(), decoders.Replace("ab", "c")]),
        ],
    )
    def test_decoder_that_cannot_be_streamed_is_refused(self, decoder: decoders.Decoder) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.decoder = decoder
        with pytest.raises(BundleError, match="cannot be streamed"):
            decoder_steps(config_of(tokenizer))

    @settings(max_examples=500)
    @given(
        st.sampled_from(
            [
                None,
                decoders.ByteLevel(),
                decoders.Metaspace(prepend_scheme="never"),
                decoders.Metaspace(prepend_scheme="always"),
                decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
                decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
                decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()]),
            ]
        ),
        st.lists(st.sampled_from(["▁", "▁▁", "a", "▁a", " ", "é", "<0xC3>", "<0xA9>", "<0x4", "<0x+5>", "Ġb", ""])),
    )
    def test_every_decoder_equals_the_librarys(self, decoder: decoders.Decoder | None, tokens: list[str]) -> None:
        vocab = {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        if decoder is not None:
            tokenizer.decoder = decoder
        ids = [vocab[token] for token in tokens]
        streamed = IncrementalDecoder(decoder_steps(config_of(tokenizer))(), tokenizer.id_to_token)
        assert "".join(map(streamed.push, ids)) + streamed.flush() == tokenizer.decode(ids)


def config_of(tokenizer: Tokenizer) -> dict[str, object] | None:
    config: dict[str, object] | None = json.loads(tokenizer.to_str())["decoder"]
    return config
