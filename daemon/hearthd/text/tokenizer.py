"""Text to token ids and back: texts, whole conversations, and answers as they grow.

A caller's text never becomes a control token, whatever it contains; only the model's own chat template writes those.
Knows no sequences and no model. Safe to use from any thread. Called by `services` (encoding) and `engine` (decoding).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, Final, Self

from tokenizers import Tokenizer

from hearthd.bundles.bundle import Bundle
from hearthd.errors import BundleError
from hearthd.text.chat_template import ChatTemplate, Message, Role, check_encodable, validate_messages
from hearthd.text.control_tokens import ControlToken, ControlTokens
from hearthd.text.decoding import IncrementalDecoder, decoder_steps, token_bytes
from hearthd.text.plain_text import PlainTextEncoder

__all__ = ["ChatTokenizer", "IncrementalDecoder", "Message", "Role", "validate_messages"]


# Characters of a system message, of which there are at least as many as tokens.
_MIN_BEGINNING: Final = 64
_MAX_BEGINNINGS: Final = 16


class ChatTokenizer:
    """A model's tokenizer and chat template."""

    def __init__(
        self,
        tokenizer_json: str,
        chat_template: str,
        *,
        eos_ids: Iterable[int],
        bos_token: str = "",
        eos_token: str = "",
        control_ids: Iterable[int] = (),
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Read a `tokenizers` file and a Jinja template.

        eos_ids: the tokens that end a turn. bos_token, eos_token: what the template knows by these names. control_ids:
        what text must never become, besides the file's added tokens. now: local time, which some templates state.
        Raises BundleError if the one or the other cannot be used.
        """
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            config: dict[str, Any] = json.loads(self._tokenizer.to_str())
        except Exception as error:  # the only type that tokenizers raises
            raise BundleError(f"tokenizer.json cannot be read: {str(error)[:200]}") from error
        self.eos_ids = frozenset(eos_ids)
        self._template = ChatTemplate(chat_template, bos_token=bos_token, eos_token=eos_token, now=now)
        added = [ControlToken.from_json(entry) for entry in config["added_tokens"]]
        tokens = {token.token_id: token for token in added if not token.is_text}
        for token_id in {*control_ids, *self.eos_ids} - tokens.keys():
            content = self._tokenizer.id_to_token(token_id)
            if content is None:
                raise BundleError(
                    f"tokenizer.json has no token {token_id}, which the manifest names as a control token"
                )
            tokens[token_id] = ControlToken(token_id, content, is_added=False)
        self._control_token_of = tokens
        self._control_tokens = ControlTokens(tokens.values())
        self._plain_text = PlainTextEncoder(self._tokenizer, config, tokens.keys())
        self.control_ids = frozenset(tokens)
        # By hash of the first message.
        self._beginnings: dict[bytes, tuple[int, ...]] = {}
        self._decoder_config = config["decoder"]
        self._new_steps = decoder_steps(self._decoder_config)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Self:
        """Take the tokenizer of a bundle that has been verified."""
        manifest = bundle.manifest
        return cls(
            bundle.tokenizer_json(),
            bundle.chat_template(),
            eos_ids=manifest.eos_ids,
            bos_token=manifest.bos_token,
            eos_token=manifest.eos_token,
            control_ids=manifest.control_ids,
        )

    @property
    def vocab_size(self) -> int:
        """Token ids that have a text; a model's logits may be wider."""
        return self._tokenizer.get_vocab_size()

    def encode_text(self, text: str) -> list[int]:
        """Encode a text alone, without template. Raises InvalidRequestError if it cannot be encoded."""
        check_encodable("text", text)
        return self._plain_text.encode("text", text)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Render a conversation and encode it; where no text resembles a control token, as `tokenizers` itself does.

        add_generation_prompt: whether the model is to answer now. Raises InvalidRequestError if the model's template
        refuses the messages, or a text cannot be encoded. `validate_messages` checks what every model demands.
        """
        for place, message in enumerate(messages):
            check_encodable(f"messages[{place}].content", message.content)
        mark, contents = self._control_tokens.mark([message.content for message in messages], self._template.source)
        rendered = self._template.render(
            [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)],
            add_generation_prompt=add_generation_prompt,
        )
        if not mark:
            ids = self._encode_as_it_is(rendered)
            if ids is not None:
                return ids
        return self._encode_apart(rendered, mark)

    def encode_beginning(self, first: Message) -> list[int]:
        """Return the tokens that every conversation with this first message begins with.

        Raises InvalidRequestError as `encode_chat` does.
        """
        one, other = (self.encode_chat([first, Message("user", text)]) for text in ("A", "0"))
        num_equal = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        return one[:num_equal]

    def count_beginning(self, messages: Sequence[Message], prompt_ids: Sequence[int]) -> int:
        """Return how many of a conversation's tokens other ones with the same system message begin with, too.

        0 without a system message, or with one that is not worth the counting.
        """
        if messages[0].role != "system" or len(messages[0].content) < _MIN_BEGINNING:
            return 0
        name = hashlib.sha256(messages[0].content.encode()).digest()
        known = self._beginnings.get(name)
        # A template may state the time: what was true yesterday need not be today.
        if known is None or tuple(prompt_ids[: len(known)]) != known:
            known = tuple(self.encode_beginning(messages[0]))
            while len(self._beginnings) >= _MAX_BEGINNINGS:
                self._beginnings.pop(next(iter(self._beginnings)), None)
            self._beginnings[name] = known
        return len(known) if tuple(prompt_ids[: len(known)]) == known else 0

    def _encode_as_it_is(self, rendered: str) -> list[int] | None:
        """Encode a text that holds no control token but the template's, if that is what comes out.

        None if some control token does not stand there literally: text may be normalised into one.
        """
        encoding = self._tokenizer.encode(rendered, add_special_tokens=False)
        ids: list[int] = encoding.ids
        for place, token_id in enumerate(ids):
            token = self._control_token_of.get(token_id)
            if token is not None:
                start, stop = encoding.offsets[place]
                if rendered[start:stop].strip() != token.content.strip():
                    return None
        return ids

    def _encode_apart(self, rendered: str, mark: str) -> list[int]:
        """Encode the template's control tokens and everything else apart from each other."""
        ids: list[int] = []
        for start, piece in self._control_tokens.split(rendered, mark):
            if isinstance(piece, ControlToken):
                ids.append(piece.token_id)
            else:
                ids += self._plain_text.encode("messages", piece, is_beginning=start == 0)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Give a token's own bytes, which need not be whole characters; none for a control token."""
        token = self._text_of(token_id)
        return b"" if token is None else token_bytes(self._decoder_config, token)

    def decoder(self) -> IncrementalDecoder:
        """Make a decoder for one answer."""
        return IncrementalDecoder(self._new_steps(), self._text_of)

    def _text_of(self, token_id: int) -> str | None:
        # As decode(skip_special_tokens=True): added tokens that are not special, such as Qwen3's <think>, are text.
        token = self._control_token_of.get(token_id)
        if token is not None and token.is_special:
            return None
        text: str | None = self._tokenizer.id_to_token(token_id)
        return text
