"""The shipped texts are well formed and disjoint, and a user's own file is read whole or refused clearly."""

from __future__ import annotations

import re
from importlib import resources
from typing import TYPE_CHECKING, Final, Literal, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearthd.build.quantization import corpus
from hearthd.errors import BuildError

if TYPE_CHECKING:
    from pathlib import Path

SETS: Final = get_args(corpus.CorpusName)
MIN_BYTES_PER_KIND: Final = {"calibration": 12_000, "evaluation": 9_000}

SENTENCE_END: Final = re.compile("(?<=[.!?\u0964])\\s+|\n|(?<=[\u3002\uff01\uff1f])")
"""After a full stop, danda or line; the ideographic stop, exclamation and question mark need no space after them."""

both_sets = pytest.mark.parametrize("which", SETS)


def contents(document: corpus.Document) -> list[str]:
    if document.text is not None:
        return [document.text]
    assert document.messages is not None
    return [content for _, content in document.messages]


def sentences(which: Literal["calibration", "evaluation"]) -> set[str]:
    """Sentences and lines of more than 40 characters, with case and white space evened out."""
    found: set[str] = set()
    for document in corpus.load(which):
        for content in contents(document):
            for part in SENTENCE_END.split(content):
                sentence = " ".join(part.lower().split())
                if len(sentence) > 40:
                    found.add(sentence)
    return found


@both_sets
def test_every_kind_is_present_and_large_enough(which: Literal["calibration", "evaluation"]) -> None:
    size = dict.fromkeys(corpus.KINDS, 0)
    for document in corpus.load(which):
        size[document.kind] += sum(len(content.encode()) for content in contents(document))
    assert {kind for kind, n in size.items() if n < MIN_BYTES_PER_KIND[which] * 3 // 4} == set()


@both_sets
def test_conversations_take_turns_and_end_with_the_assistant(which: Literal["calibration", "evaluation"]) -> None:
    conversations = [d.messages for d in corpus.load(which) if d.messages is not None]
    assert conversations
    for messages in conversations:
        roles = [role for role, _ in messages]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)
        assert 1 <= len(turns) // 2 <= 5
        assert all(content.strip() for _, content in messages)


@both_sets
def test_no_document_is_empty_or_holds_a_divider(which: Literal["calibration", "evaluation"]) -> None:
    for document in corpus.load(which):
        assert all(content.strip() for content in contents(document))
        assert all("---" not in content.split("\n") for content in contents(document))


@both_sets
def test_files_are_clean_utf8(which: str) -> None:
    directory = resources.files("hearthd").joinpath("build", "quantization", "texts", which)
    names = sorted(entry.name for entry in directory.iterdir())
    assert names == ["chat.jsonl", "code.txt", "home.jsonl", "multilingual.txt", "numbers.txt", "prose.txt"]
    for name in names:
        text = directory.joinpath(name).read_bytes().decode("utf-8")
        assert MIN_BYTES_PER_KIND[which] <= len(text.encode()) <= 20_000, name
        assert text.endswith("\n"), name
        assert not {"\r", "\ufeff"} & set(text), name
        assert re.search(r"[ \t]+$", text, re.MULTILINE) is None, name
        assert name == "code.txt" or "\t" not in text, name


def test_sets_share_no_sentence() -> None:
    calibration, evaluation = sentences("calibration"), sentences("evaluation")
    assert len(calibration) > 300
    assert len(evaluation) > 300
    assert calibration & evaluation == set()


@both_sets
def test_documents_are_distinct_and_their_order_is_fixed(which: Literal["calibration", "evaluation"]) -> None:
    documents = corpus.load(which)
    assert documents == corpus.load(which)
    assert len(set(documents)) == len(documents)


def test_document_needs_exactly_one_of_text_and_messages() -> None:
    with pytest.raises(ValueError, match="either text or messages"):
        corpus.Document(kind="text")
    with pytest.raises(ValueError, match="either text or messages"):
        corpus.Document(kind="text", text="a", messages=(("user", "b"),))


def test_own_file_keeps_paragraphs_together(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("\ufefffirst line\r\nsecond line\r\n \r\n\r\nnext paragraph ü\r\n".encode())
    assert corpus.from_file(path) == (corpus.Document("text", text="first line\nsecond line\n\nnext paragraph ü"),)


def test_own_file_starts_a_new_document_before_a_paragraph_that_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    first, second = "a" * 3000, "b" * 3000
    path.write_text(f"{first}\n\n{second}\n", encoding="utf-8")
    assert [document.text for document in corpus.from_file(path)] == [first, second]


def test_own_file_cuts_only_a_paragraph_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    words = " ".join(f"word{n}" for n in range(2000))
    path.write_text(f"short\n\n{words}\n\nlast", encoding="utf-8")
    texts = [document.text or "" for document in corpus.from_file(path)]
    assert all(0 < len(text) <= corpus.MAX_DOCUMENT_CHARACTERS for text in texts)
    assert texts[0] == "short"
    assert " ".join(texts).split() == ["short", *words.split(), "last"]


@given(st.text(alphabet=st.sampled_from("ab \n\r\u3042"), max_size=200), st.integers(1, 12))
def test_joining_loses_no_character_but_white_space(text: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "MAX_DOCUMENT_CHARACTERS", limit)
        runs = list(corpus._join_paragraphs(text))
    assert "".join("".join(runs).split()) == "".join(text.split())
    assert all(0 < len(run) <= limit and run.strip() for run in runs)


def test_own_file_of_the_largest_size_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(b"hello hearth \n\n ".ljust(corpus.MAX_FILE_BYTES, b" "))
    assert corpus.from_file(path) == (corpus.Document("text", text="hello hearth"),)
    with path.open("ab") as file:
        file.write(b"!")
    with pytest.raises(BuildError, match="limit of 8388608 bytes"):
        corpus.from_file(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3"),
        (b"ELF\0\0", "zero byte at offset 3"),
        (b" \n\n\t\n", "holds no text"),
        (b"", "holds no text"),
    ],
)
def test_unusable_own_file_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes(data)
    with pytest.raises(BuildError, match=message) as caught:
        corpus.from_file(path)
    assert "\n" not in str(caught.value)


def test_missing_own_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No such file"):
        corpus.from_file(tmp_path / "absent.txt")
    with pytest.raises(BuildError, match="Is a directory"):
        corpus.from_file(tmp_path)
