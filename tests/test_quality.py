"""The quality figures: nothing between a graph and itself, the right numbers by hand, and a gate that closes."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from checkpoints import tiny_models, write_huggingface
from decoders import tiny_checkpoint
from hearthd.build import builder
from hearthd.build.builder import build_bundle, measure_quality
from hearthd.build.checkpoints.checkpoint import open_checkpoint
from hearthd.build.decoder.architecture import DecoderSpec
from hearthd.build.decoder.graph import GraphOptions, write_graph
from hearthd.build.decoder.recipe import Recipe
from hearthd.build.decoder.weights import DecoderWeights
from hearthd.build.quantization import corpus
from hearthd.build.quantization.corpus import Document
from hearthd.build.quantization.documents import TokenDocument, first_tokens, tokenize
from hearthd.build.quantization.quality import Figures, Reference, compare
from hearthd.bundles.bundle import Bundle
from hearthd.errors import BuildError
from hearthd.text.tokenizer import ChatTokenizer, Message

DOCUMENTS = (TokenDocument("prose", tuple(range(20, 90))), TokenDocument("code", (5, 4, 3, 2, 9)))


def silent(stage: str, share: float) -> None:
    """Report nothing."""


def test_a_graph_does_not_differ_from_itself(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    spec = DecoderSpec.from_config(checkpoint.config)
    (tmp_path / "reference").mkdir()
    (tmp_path / "bundle").mkdir()
    reference = Reference(checkpoint, spec, tmp_path / "reference", context_length=128, num_threads=1)
    weights = DecoderWeights(checkpoint, spec, rotated=False)
    write_graph(tmp_path / "bundle", spec, weights, Recipe.reference(), GraphOptions(128))
    figures = compare(
        reference, tmp_path / "bundle", spec, DOCUMENTS, preset=None, num_threads=1, report=lambda share: None
    )
    assert figures.kl_mean == pytest.approx(0, abs=1e-6)
    assert figures.top1_agreement == 1
    assert figures.perplexity_int8 == pytest.approx(figures.perplexity_fp32, rel=1e-5)
    # The last token of a document predicts nothing.
    assert figures.tokens == 69 + 4
    assert {kind: each.tokens for kind, each in figures.kinds.items()} == {"prose": 69, "code": 4}


def test_figures_are_those_of_the_definition(tmp_path: Path) -> None:
    """Against float64 sums over the logits of two different checkpoints."""
    checkpoint = tiny_checkpoint(tmp_path / "a")
    model = tiny_models()["smollm2"]
    write_huggingface(tmp_path / "b", model, weights=model.weights(seed=1))
    other = open_checkpoint(tmp_path / "b")
    spec = DecoderSpec.from_config(checkpoint.config)
    sessions = []
    for name, source in (("expected", checkpoint), ("found", other)):
        (tmp_path / name).mkdir()
        sessions.append(Reference(source, spec, tmp_path / name, context_length=128, num_threads=1))
    ids = DOCUMENTS[1].token_ids
    expected, found = (
        np.concatenate([logits for logits, _ in each.session.run(ids)]).astype(np.float64)[:-1] for each in sessions
    )
    p = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    q = np.exp(found) / np.exp(found).sum(axis=1, keepdims=True)
    (tmp_path / "bundle").mkdir()
    write_graph(
        tmp_path / "bundle", spec, DecoderWeights(other, spec, rotated=False), Recipe.reference(), GraphOptions(128)
    )
    figures = compare(
        sessions[0], tmp_path / "bundle", spec, DOCUMENTS[1:], preset=None, num_threads=1, report=lambda share: None
    )
    assert figures.kinds["code"] == Figures(**{key: value for key, value in asdict(figures).items() if key != "kinds"})
    rows, targets = np.arange(4), list(ids[1:])
    assert figures.kl_mean == pytest.approx(float((p * np.log(p / q)).sum(axis=1).mean()), rel=1e-3)
    assert figures.perplexity_fp32 == pytest.approx(float(np.exp(-np.log(p[rows, targets]).mean())), rel=1e-3)
    assert figures.perplexity_int8 == pytest.approx(float(np.exp(-np.log(q[rows, targets]).mean())), rel=1e-3)
    assert figures.top1_agreement == pytest.approx(float((p.argmax(axis=1) == q.argmax(axis=1)).mean()))


def test_an_unfaithful_build_fails_and_writes_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    directory = tmp_path / "bundle"
    directory.mkdir()
    monkeypatch.setattr(builder, "MAX_KL", 1e-9)
    with pytest.raises(BuildError, match=r"mean KL \d\.\d{4} to the float32 graph, at most 1e-09 .* --force"):
        build_bundle(checkpoint, directory, name="tiny", report=silent)
    assert not (directory / "manifest.json").exists()


def test_every_document_begins_as_a_chat_begins(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    tokenizer = ChatTokenizer(
        checkpoint.tokenizer_json, checkpoint.chat_template, eos_ids=checkpoint.config["eos_token_id"]
    )
    begin = first_tokens(tokenizer)
    assert begin == (tokenizer.encode_chat([Message("user", "x")])[0],)
    documents = tokenize(corpus.load("evaluation"), tokenizer, max_tokens=1_200, context_length=100)
    assert all(document.token_ids[:1] == begin for document in documents)
    assert max(len(document.token_ids) for document in documents) == 100
    by_kind = {kind: sum(len(d.token_ids) - d.num_given for d in documents if d.kind == kind) for kind in corpus.KINDS}
    assert all(0 < tokens <= 200 for tokens in by_kind.values()), json.dumps(by_kind)


def test_a_text_too_short_to_judge_on_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    directory = tmp_path / "bundle"
    directory.mkdir()
    build_bundle(checkpoint, directory, name="tiny", force=True, report=silent)
    with pytest.raises(BuildError, match="too short"):
        measure_quality(
            Bundle.open(directory),
            checkpoint,
            (Document("text", text=""),),
            max_tokens=10,
            scratch=tmp_path,
            report=silent,
        )


def test_a_text_is_judged_as_a_message_without_what_the_template_adds(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    tokenizer = ChatTokenizer(
        checkpoint.tokenizer_json, checkpoint.chat_template, eos_ids=checkpoint.config["eos_token_id"]
    )
    for text in ("Die Küche riecht nach Kaffee.", "x", "The lamp is low.\nTwo lines, and no full stop"):
        (document,) = tokenize((Document("text", text=text),), tokenizer, max_tokens=500, context_length=500)
        chat = tokenizer.encode_chat([Message("user", text)], add_generation_prompt=False)
        assert list(document.token_ids) == chat[: len(document.token_ids)]
        assert list(document.token_ids[document.num_given :]) == tokenizer.encode_text(text)
