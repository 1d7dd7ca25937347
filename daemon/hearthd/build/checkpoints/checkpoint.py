"""A checkpoint as the build reads it: Hugging Face names and keys, float32 weights one tensor at a time.

Both kinds of checkpoint (a GGUF file, a Hugging Face directory) look the same from here on. Knows nothing of graphs,
quantisation or bundles. Called by `builder`, `quality` and `cli`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import ARCHITECTURES
from hearthd.errors import BuildError

# Architectures of a supported family whose directories hold more than a decoder of text -> what to take instead.
_WITH_IMAGES = {
    "Gemma3ForConditionalGeneration": "take 270M or 1B, which are for text, or a GGUF file of this one",
    "Phi4MultimodalForCausalLM": "take Phi-4-mini-instruct",
}


def unsupported_architecture(where: Path, name: str) -> BuildError:
    """Return the refusal of an architecture that the graph cannot express, with what works."""
    known = ", ".join(sorted(ARCHITECTURES))
    if name in _WITH_IMAGES:
        known += f". This one reads images too; of its family {_WITH_IMAGES[name]}"
    return BuildError(f"{where}: architecture {name!r} is not supported; these are: {known}")


def one_line(text: object, longest: int) -> str:
    """Return what a file or its name says of itself as a manifest may repeat it; "" for what is no text."""
    if not isinstance(text, str):
        return ""
    return "".join(character if character.isprintable() else "?" for character in text[:longest])


class Checkpoint(ABC):
    """Weights, configuration, tokenizer and chat template of one model.

    config: config.json's keys in one spelling, whatever the source. Always there: architectures (one name), model_type,
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        vocab_size, max_position_embeddings, rms_norm_eps, rope_theta, rope_scaling (None or a dict with "rope_type"),
        tie_word_embeddings, attention_bias, mlp_bias, hidden_act, bos_token_id (int or None), eos_token_id (list of
        int). Keys that one family alone has (`sliding_window`, `embedding_multiplier`) are there, by the names in its
        config.json, if it has them. `rope_freq_factors` (float32 (head_dim / 2,), divides the inverse frequencies) is
        there when a GGUF file carries them; it already is what rope_scaling would compute.
    tokenizer_json: the text of a `tokenizers` file.
    chat_template: Jinja source. bos_token, eos_token: what the template calls by these names ("" when absent).
    generation: the checkpoint's own defaults for temperature, top_k, top_p, min_p, repetition_penalty (those it has).
    source: where it was read from, without a machine's path. license: an SPDX-like name, "" when unknown.
    """

    config: Mapping[str, Any]
    tokenizer_json: str
    chat_template: str
    bos_token: str
    eos_token: str
    generation: Mapping[str, float]
    source: str
    license: str

    @property
    @abstractmethod
    def tensor_names(self) -> frozenset[str]:
        """Hugging Face names, for example "model.layers.0.self_attn.q_proj.weight"."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, (out, in) for a linear layer. Raises BuildError when the checkpoint has no such tensor."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor as a new, writable float32 array. Raises BuildError when the checkpoint has no such tensor."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows [start, stop) of a matrix as a new float32 array, so that an embedding need not be whole in memory."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def has_tensor(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of that name."""
        return name in self.tensor_names

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a turn; at least one."""
        return tuple(self.config["eos_token_id"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a Hugging Face checkpoint directory. Raises BuildError when it is neither, or unusable."""
    # Imported here: each kind needs a package that the other one does not.
    if path.is_dir():
        from hearthd.build.checkpoints.huggingface_checkpoint import HuggingFaceCheckpoint

        return HuggingFaceCheckpoint(path)
    if path.is_file():
        from hearthd.build.checkpoints.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise BuildError(f"{path}: no such file or directory; give a GGUF file or a Hugging Face checkpoint directory")
