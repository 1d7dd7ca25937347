"""Tokenizers and chat templates against transformers: the same ids for ordinary texts and conversations.

Ordinary: without control tokens in what people say. transformers would let those through; Hearth never does, which
test_tokenizer shows.
"""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from checkpoints import tiny_models, write_gguf, write_huggingface
from hearthd.build.checkpoints.checkpoint import Checkpoint, open_checkpoint
from hearthd.build.progress import no_progress
from hearthd.build.sources.catalogue import Catalogue, PackageSource
from hearthd.build.sources.fetch import fetch
from hearthd.text.tokenizer import ChatTokenizer, Message
from places import ROOT

pytestmark = pytest.mark.reference

SENTENCES = (
    "What is the capital of France?",
    "  Two spaces before, one after ",
    "Line one\nline two\n\n\tindented, then a blank line\n",
    "It's 7:30; they've 12345 things left, I'd say. DON'T!",
    "Größe, naïve café, “quoted” — 3½ € … 🙂👩‍👩‍👧",
    "今日はいい天気です。 Привет! مرحبا",
    'def f(x: int) -> str:\n    return f"{x:>10}"  # 100 %',
    "<b>not a token</b> & [INST] </think >",
    "e\u0301 is e with an accent",
    "",
)

Load = Callable[[str], Any]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="`make test` installs the reference group")


def conversations() -> list[list[Message]]:
    """Every sentence in every role, with and without a system message, of one to five turns."""
    found: list[list[Message]] = []
    for place, sentence in enumerate(SENTENCES):
        following = SENTENCES[(place + 1) % len(SENTENCES)]
        question, answer = Message("user", sentence), Message("assistant", following)
        system = Message("system", SENTENCES[(place + 2) % len(SENTENCES)])
        found += [[question], [system, question], [question, answer, question], [system, question, answer, question]]
        found.append([system, question, answer, Message("user", following), Message("assistant", sentence), question])
    return found


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", sorted(tiny_models()))
def test_chat_template_gives_the_ids_of_transformers(
    name: str, add_generation_prompt: bool, tmp_path: Path, transformers: Any
) -> None:
    write_huggingface(tmp_path, tiny_models()[name])
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        ours = chat_tokenizer(checkpoint)
    for messages in conversations():
        expected = reference.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
        assert ours.encode_chat(messages, add_generation_prompt=add_generation_prompt) == list(expected), messages


def chat_tokenizer(checkpoint: Checkpoint) -> ChatTokenizer:
    return ChatTokenizer(
        checkpoint.tokenizer_json,
        checkpoint.chat_template,
        eos_ids=checkpoint.eos_ids,
        bos_token=checkpoint.bos_token,
        eos_token=checkpoint.eos_token,
    )


@pytest.fixture(scope="module")
def pair(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Tokenizer]]:
    """Read a tiny GGUF file with transformers and with Hearth, once for each name."""
    directory = tmp_path_factory.mktemp("gguf")
    read: dict[str, tuple[Any, Tokenizer]] = {}

    def load(name: str) -> tuple[Any, Tokenizer]:
        if name not in read:
            write_gguf(directory / f"{name}.gguf", tiny_models()[name])
            read[name] = both(transformers, directory / f"{name}.gguf")
        return read[name]

    return load


def both(transformers: Any, path: Path) -> tuple[Any, Tokenizer]:
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with open_checkpoint(path) as checkpoint:
        return reference, Tokenizer.from_str(checkpoint.tokenizer_json)


# transformers takes a llama file's pre-tokenizer for plain ByteLevel, whatever the file says: smollm's digits are told
# from spaces before them only by Hearth, llama.cpp and the original (test_checkpoint compares with that). And it gives
# a text that begins with a space no second one, unlike the original SentencePiece; nor does it normalise to NFC for
# Qwen, unlike Qwen's own tokenizer.json.
LETTERS = st.text(alphabet=st.characters(exclude_categories=["Cs", "N"]), max_size=60)
TEXTS = {
    "smollm2": LETTERS,
    "llama3": st.text(max_size=60),
    "qwen2": st.text(max_size=60).map(lambda text: unicodedata.normalize("NFC", text)),
    "qwen3": st.text(max_size=60).map(lambda text: unicodedata.normalize("NFC", text)),
    "tinyllama": st.text(max_size=60).filter(lambda text: not text.startswith((" ", "▁"))),
}


@pytest.mark.parametrize("name", TEXTS)
@settings(deadline=None)
@given(data=st.data())
def test_gguf_tokenizer_gives_the_ids_of_transformers(
    name: str, data: st.DataObject, pair: Callable[[str], tuple[Any, Tokenizer]]
) -> None:
    reference, ours = pair(name)
    text = data.draw(TEXTS[name])
    assert ours.encode(text, add_special_tokens=False).ids == reference.encode(text, add_special_tokens=False)


@pytest.mark.model
@pytest.mark.usefixtures("default_bundle")
def test_default_models_tokenizer_gives_the_ids_of_transformers(transformers: Any) -> None:
    source = Catalogue.shipped().entry("smollm2-135m").package
    assert isinstance(source, PackageSource)
    # Where `make bundle` left it: nothing is fetched.
    path = fetch(source, ROOT / ".cache/state/cache", no_progress)
    reference, ours = both(transformers, path)
    assert ours.get_vocab_size() == 49_152
    prose = (ROOT / "daemon/hearthd/build/quantization/texts/evaluation/prose.txt").read_text(encoding="utf-8")
    for text in (*SENTENCES, *prose.split("\n\n")[:60]):
        letters = "".join(character for character in text if not character.isnumeric())
        expected = reference.encode(letters, add_special_tokens=False)
        assert ours.encode(letters, add_special_tokens=False).ids == expected
    # Digits stand alone, and take no space with them: as SmolLM2's own tokenizer.json has it.
    assert ours.encode("\n\n   12", add_special_tokens=False).tokens == ["ĊĊĠĠĠ", "1", "2"]
