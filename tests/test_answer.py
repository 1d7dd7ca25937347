"""An answer's deltas: each log probability travels with the text that its token completes."""

from hearthd.sequences.answer import Answer
from hearthd.sequences.events import Delta, FinishReason, TokenLogprob
from hearthd.text.decoding import IncrementalDecoder, decoder_steps

# Tokens of several bytes, which end within characters: "é" is C3 A9, "ü" is C3 BC.
TOKENS = ("a\u00c3", "\u00a9\u00c3", "\u00bcb", "END", "xE", "NDy")


def answer(*stop: str) -> Answer:
    steps = decoder_steps({"type": "ByteLevel"})()
    return Answer(
        IncrementalDecoder(steps, lambda token_id: TOKENS[token_id] if token_id < len(TOKENS) else None), stop
    )


def push(to: Answer, token_id: int) -> tuple[str, list[int]]:
    return shown(to.push(token_id, TokenLogprob(token_id, b"", -1.0, ())))


def shown(delta: Delta | None) -> tuple[str, list[int]]:
    return ("", []) if delta is None else (delta.text, [each.token_id for each in delta.token_logprobs])


def test_token_that_ends_one_character_and_begins_another() -> None:
    ongoing = answer()
    assert push(ongoing, 0) == ("a", [])
    assert push(ongoing, 1) == ("é", [0])
    assert push(ongoing, 2) == ("üb", [1, 2])
    assert ongoing.end() is None


def test_cut_character_comes_at_the_end_with_its_token() -> None:
    ongoing = answer()
    assert push(ongoing, 0) == ("a", [])
    assert shown(ongoing.end()) == ("\N{REPLACEMENT CHARACTER}", [0])


def test_token_without_text_comes_at_once() -> None:
    ongoing = answer()
    assert push(ongoing, 99) == ("", [99])


def test_token_without_text_waits_behind_one_whose_text_is_held_back() -> None:
    ongoing = answer("NDx")
    assert push(ongoing, 3) == ("E", [])
    assert push(ongoing, 99) == ("", [])
    assert shown(ongoing.end()) == ("ND", [3, 99])


def test_token_that_the_stop_string_cuts_in_two_is_part_of_the_answer() -> None:
    ongoing = answer("END")
    assert push(ongoing, 4) == ("x", [])
    assert push(ongoing, 5) == ("", [4])
    assert ongoing.stopped_by is FinishReason.STOP_STRING
    assert ongoing.end() is None


def test_token_within_the_stop_string_is_not() -> None:
    ongoing = answer("END")
    assert push(ongoing, 3) == ("", [])
    assert ongoing.stopped_by is FinishReason.STOP_STRING
    assert ongoing.end() is None


def test_nothing_is_sent_for_nothing() -> None:
    ongoing = answer()
    assert ongoing.push(99, None) is None
    assert ongoing.push(3, None) == Delta("END")
