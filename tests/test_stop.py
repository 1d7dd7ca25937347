"""Stop strings: the text before the first one comes out, whole, however it was cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearthd.sequences.stop import StopMatcher


def run(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stop)
    text = "".join(matcher.push(piece) for piece in pieces) + matcher.flush()
    return text, matcher.is_matched


def test_text_before_the_stop_string_comes_out() -> None:
    assert run(("END",), ["one E", "N two EN", "D three"]) == ("one EN two ", True)


def test_without_stop_strings_all_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push("anything") == "anything"
    assert matcher.flush() == ""
    assert not matcher.is_matched


def test_holds_back_only_the_longest_possible_beginning() -> None:
    matcher = StopMatcher(("abab!",))
    assert matcher.push("xxaba") == "xx"
    assert matcher.push("b") == ""
    assert matcher.push("ab") == "ab"  # "abab" of the six held characters can still become the stop string
    assert matcher.push("?") == "abab?"


def test_partial_match_comes_out_at_the_end() -> None:
    assert run(("END",), ["the EN"]) == ("the EN", False)


def test_nothing_comes_out_after_the_match() -> None:
    matcher = StopMatcher(("x",))
    assert matcher.push("ax") == "a"
    assert matcher.is_matched
    assert matcher.push("b") == ""
    assert matcher.flush() == ""


def test_earlier_beginning_wins_over_earlier_end() -> None:
    assert run(("abcd", "c"), ["ab", "c", "d"]) == ("", True)
    assert run(("abcd", "c"), ["ab", "c", "e"]) == ("ab", True)
    assert run(("abcd", "c"), ["ab", "c"]) == ("ab", True)


def test_whole_characters_beyond_ascii() -> None:
    assert run(("終わり",), ["はい終", "わ", "り。"]) == ("はい", True)


@pytest.mark.parametrize("stop", ["a", "ab", "a" * 64])
def test_never_holds_more_than_a_stop_string(stop: str) -> None:
    matcher = StopMatcher((stop,))
    text = "b" + "a" * 10 + "c" + "ab"[: len(stop)] * 40
    out = 0
    for taken, character in enumerate(text, 1):
        out += len(matcher.push(character))
        if matcher.is_matched:
            break
        assert taken - out < len(stop)


@given(
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple),
    st.lists(st.text("abc", max_size=6), max_size=12),
)
def test_equals_find_on_the_whole_text_at_any_cut(stop: tuple[str, ...], pieces: list[str]) -> None:
    text = "".join(pieces)
    first = min((text.find(string) for string in stop if string in text), default=None)
    assert run(stop, pieces) == (text[:first], first is not None)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64), max_size=4).map(tuple),
    st.text(max_size=200),
    st.data(),
)
def test_equals_find_with_stop_strings_planted(stop: tuple[str, ...], text: str, data: st.DataObject) -> None:
    if stop:
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.sampled_from(stop)) + text[place:]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    first = min((text.find(string) for string in stop if string in text), default=None)
    assert run(stop, pieces) == (text[:first], first is not None)
