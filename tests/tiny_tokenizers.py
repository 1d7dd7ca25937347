"""Small real tokenizers, of each kind that the supported models use, trained or written down here.

All have the control tokens <|im_start|>, <|im_end|>, <|endoftext|>, <s> (special) and <think>, </think> (not special).
"""

import functools
import json
import string
from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hearthd.text.tokenizer import ChatTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. Stop! Who goes there? 12345 + 67890 = 80235.",
    "Ein Ofen wärmt das Haus; größer, schöner, süßer. Où est l'été? ¿Dónde está el fuego?",
    "人工智能在家里运行。今日はいい天気ですね。안녕하세요 세계.",
    "مرحبا بالعالم، كيف حالك اليوم؟ שלום עולם",
    "Smile 😀😃😄 family 👨‍👩‍👧 flag 🇩🇪 e\u0301",
    "def f(x):\n\treturn {'a': [x, 1.5e-3]}\n<html>&amp;</html>",
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>")
ORDINARY = ("<think>", "</think>")
CONTROL = SPECIAL + ORDINARY

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|im_end|>\n{% endfor %}"
)
# As Qwen3 and DeepSeek do: the thinking of earlier answers is dropped.
SPLITTING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "<think>\n\n</think>\n{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ message.content }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
)
TEMPLATES = (CHATML, TRIMMING, SPLITTING)


def _added(**flags: bool) -> list[AddedToken]:
    # The library prints that special tokens are never normalised, and reads it otherwise: state it for all.
    return [AddedToken(content, special=content in SPECIAL, **({"normalized": False} | flags)) for content in CONTROL]


@functools.cache
def byte_level() -> str:
    """Byte-level BPE, as SmolLM2, Qwen and Llama 3 have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_tokens(_added())
    return str(tokenizer.to_str())


@functools.cache
def byte_level_with_reachable_control_tokens() -> str:
    """As Llama 3 with `ignore_merges`, and with control tokens in the vocabulary, one of them at the end of a merge."""
    config = json.loads(byte_level())
    model = config["model"]
    for name in [*CONTROL, "<s", "<|"]:
        model["vocab"].setdefault(name, len(model["vocab"]))
    model["ignore_merges"] = True
    model["merges"] += [["<", "s"], ["<s", ">"], ["<", "|"]]
    for token in config["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    # Without a pre-tokenizer that cuts, the whole text is looked up as one word.
    config["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return json.dumps(config)


@functools.cache
def byte_fallback() -> str:
    """SentencePiece BPE with byte fallback in the way that TinyLlama's is converted: spaces by normalisation."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=tokens, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator(TEXT[:2], trainer)
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] in ("<unk>", "<s>")]
    tokenizer = Tokenizer.from_str(json.dumps(config))
    tokenizer.add_tokens(_added())
    return str(tokenizer.to_str())


@functools.cache
def metaspace() -> str:
    """SentencePiece BPE with byte fallback as later conversions have it: only the very first word gets a space."""
    config = json.loads(byte_fallback())
    config["normalizer"] = None
    config["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return json.dumps(config)


@functools.cache
def unigram() -> str:
    """A Unigram model, whose vocabulary could match a control token's text, and no byte fallback."""
    letters = sorted({character for text in TEXT for character in text} | set(string.printable) | {"▁"})
    pieces: list[tuple[str, float]] = [("<unk>", 0.0), *((content, -0.5) for content in CONTROL)]
    pieces += [(letter, -8.0) for letter in letters] + [("▁the", -4.0), ("▁fox", -5.0), ("ing", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    tokenizer.add_tokens(_added())
    return str(tokenizer.to_str())


@functools.cache
def with_flags(**flags: bool) -> str:
    """The byte-level one, its added tokens with other flags: lstrip, rstrip, single_word, normalized."""
    config = json.loads(byte_level())
    for token in config["added_tokens"]:
        token.update(flags)
    return json.dumps(config)


@functools.cache
def normalizing() -> str:
    """The byte-level one with a normaliser that makes other characters into those of control tokens."""
    config = json.loads(with_flags(normalized=True))
    config["normalizer"] = {"type": "NFKC"}
    return json.dumps(config)


@functools.cache
def byte_per_token() -> str:
    """No merges: every byte is a token. Ids 0 to 255 are the bytes, CONTROL follows in its order."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda character: _byte_of(character))
    tokenizer = Tokenizer(models.BPE(vocab={character: _byte_of(character) for character in characters}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(_added())
    return str(tokenizer.to_str())


def _byte_of(character: str) -> int:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(character) < 256:
        return ord(character)
    return [byte for byte in range(256) if byte not in printable][ord(character) - 256]


EVERY: dict[str, Callable[[], str]] = {
    "byte_level": byte_level,
    "reachable": byte_level_with_reachable_control_tokens,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "unigram": unigram,
    "normalizing": normalizing,
    "byte_per_token": byte_per_token,
}


@functools.cache
def library(kind: str) -> Tokenizer:
    """Return one of EVERY as the library itself reads it."""
    return Tokenizer.from_str(EVERY[kind]())


def id_of(content: str, kind: str = "byte_level") -> int:
    """Return a token's id."""
    token_id = library(kind).token_to_id(content)
    assert token_id is not None
    return token_id


@functools.cache
def chat_tokenizer(kind: str = "byte_level", template: str = CHATML) -> ChatTokenizer:
    """Make a ChatTokenizer of one of EVERY."""
    text = EVERY[kind]()
    return ChatTokenizer(text, template, eos_ids=[id_of("<|im_end|>", kind)], bos_token="<s>", eos_token="<|im_end|>")
