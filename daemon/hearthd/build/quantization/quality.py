"""How faithful a bundle is: its own int8 graph against the float32 graph of the same checkpoint, on held text.

Knows graphs and sessions, no recipes: it judges whatever the bundle has. Called by `builder`, as the gate of a build,
and by `cli` for `hearthd model verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import MODEL_FILE, GraphOptions, write_graph
from hearthd.build.decoder.recipe import Recipe
from hearthd.build.decoder.weights import DecoderWeights, TensorSource
from hearthd.build.quantization.divergence import kl_divergence, log_softmax
from hearthd.build.quantization.documents import TokenDocument, num_shared
from hearthd.build.quantization.older_graph import read_graph
from hearthd.build.quantization.session import GraphSession
from hearthd.errors import BuildError

__all__ = ["EVALUATION_TOKENS", "MAX_KL", "QualityFigures", "Reference", "ReferenceGraph", "compare"]

# The gate of a build. What 8-bit blocks of 32 weights reach is 0.004, what people call lossless; 4 bit is at 0.35.
MAX_KL = 0.02
# What a model is judged on, where nobody says otherwise: the standard error of a mean KL near 0.01 is then some 3 %.
EVALUATION_TOKENS = 6_000


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over `tokens` predicted positions.

    kl_mean: nats of Kullback-Leibler divergence from the float32 graph's next-token distribution to the int8 one's.
    top1_agreement: share of positions where both have the same likeliest token, 0 to 1.
    """

    perplexity_fp32: float
    perplexity_int8: float
    kl_mean: float
    top1_agreement: float
    tokens: int


@dataclass(frozen=True, slots=True)
class QualityFigures(Figures):
    """The figures of all the text, and of each kind of it."""

    kinds: dict[str, Figures]


class ReferenceSession(Protocol):
    """A float32 graph that runs one document after another, as `GraphSession` does."""

    def continue_from(
        self, token_ids: Sequence[int], start: int
    ) -> Iterator[tuple[NDArray[np.float32], Mapping[str, NDArray[np.float32]]]]:
        """Run a document from `start` on; yields the logits of each chunk, and what was captured."""


class ReferenceGraph(Protocol):
    """What a bundle is held against: `Reference`, or `oracle.Oracle`."""

    @property
    def session(self) -> ReferenceSession:
        """The graph, loaded."""

    def keys_and_values(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Run a document's first tokens, so that `session` can go on after them; returns their KV."""


class Reference:
    """The float32 graph of a checkpoint, exactly as the checkpoint has it, in a temporary directory."""

    def __init__(
        self, source: TensorSource, spec: DecoderSpec, directory: Path, *, context_length: int, num_threads: int
    ) -> None:
        """Write the graph (4 bytes a weight on disk, mapped) and load it."""
        self.context_length = context_length
        weights = DecoderWeights(source, spec, rotated=False)
        options = GraphOptions(context_length=context_length)
        path = write_graph(directory, spec, weights, Recipe.reference(), options)
        self.session = GraphSession(
            path.read_bytes(), spec, data_directory=directory, context_length=context_length, num_threads=num_threads
        )

    def keys_and_values(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the KV of a conversation's first tokens, float32 (layers, 2, kv_heads, tokens, head_dim)."""
        for _ in self.session.run(token_ids):
            pass
        return self.session.keys_and_values(len(token_ids))


@dataclass(slots=True)
class _Sums:
    """Sums over positions."""

    kl: float = 0.0
    loss_fp32: float = 0.0
    loss_int8: float = 0.0
    agreed: int = 0
    tokens: int = 0

    def add(self, reference: NDArray[np.float32], tested: NDArray[np.float32], targets: Sequence[int]) -> None:
        """reference, tested: logits (positions, vocab_size). targets: the token that followed each."""
        expected, found = log_softmax(reference), log_softmax(tested)
        rows = np.arange(len(targets))
        self.kl += float(kl_divergence(expected, found).sum())
        self.loss_fp32 -= float(np.sum(expected[rows, targets], dtype=np.float64))
        self.loss_int8 -= float(np.sum(found[rows, targets], dtype=np.float64))
        self.agreed += int(np.sum(reference.argmax(axis=1) == tested.argmax(axis=1)))
        self.tokens += len(targets)

    def include(self, other: _Sums) -> None:
        self.kl += other.kl
        self.loss_fp32 += other.loss_fp32
        self.loss_int8 += other.loss_int8
        self.agreed += other.agreed
        self.tokens += other.tokens

    def figures(self) -> Figures:
        return Figures(
            perplexity_fp32=float(np.exp(self.loss_fp32 / self.tokens)),
            perplexity_int8=float(np.exp(self.loss_int8 / self.tokens)),
            kl_mean=self.kl / self.tokens,
            top1_agreement=self.agreed / self.tokens,
            tokens=self.tokens,
        )


def compare(
    reference: ReferenceGraph,
    directory: Path,
    spec: DecoderSpec,
    documents: Sequence[TokenDocument],
    *,
    preset: NDArray[np.int8] | None,
    num_threads: int,
    report: Callable[[float], None],
) -> QualityFigures:
    """Run both graphs over the documents, chunk by chunk.

    directory: a bundle's, or one with the same graph files; the bytes that are judged are those that are served.
    preset: as in the bundle; the float32 graph computes those positions itself. Raises BuildError if there is no text.
    """
    if not documents:
        raise BuildError("the text is too short to judge the quality on: at least a sentence is needed")
    longest = max(len(document.token_ids) for document in documents)
    start = 0 if preset is None else preset.shape[3]
    by_kind: dict[str, _Sums] = {}
    model = read_graph(directory / MODEL_FILE)
    tested = GraphSession(
        model, spec, data_directory=directory, context_length=longest, num_threads=num_threads, preset=preset
    )
    for index, document in enumerate(documents):
        ids = document.token_ids
        # The system prompt that a template puts before every chat counts once, not as often as there are chats.
        judged_before = max((num_shared(ids, other.token_ids) for other in documents[:index]), default=0)
        # Nor does what the template puts before a text; but the text's own first token, from the position before.
        judged_before = max(judged_before, document.num_given - 1)
        sums = by_kind.setdefault(document.kind, _Sums())
        if start:
            # The reference computes what the bundle has as its preset.
            reference.keys_and_values(ids[:start])
        position = start
        for (expected, _), (found, _) in zip(
            reference.session.continue_from(ids, start), tested.run(ids, start=start), strict=True
        ):
            # Position p predicts token p + 1; the same tokens before it have the same prediction.
            begin = min(max(judged_before - position, 0), len(expected))
            targets = ids[position + 1 + begin : position + 1 + len(expected)]
            rows = slice(begin, begin + len(targets))
            sums.add(expected[rows], found[rows], targets)
            position += len(expected)
        report((index + 1) / len(documents))
    return _figures(by_kind)


def _figures(by_kind: Mapping[str, _Sums]) -> QualityFigures:
    total = _Sums()
    for sums in by_kind.values():
        total.include(sums)
    return QualityFigures(
        **asdict(total.figures()), kinds={kind: sums.figures() for kind, sums in by_kind.items() if sums.tokens}
    )
