"""Each architecture of the table as its users meet it: built to int8, loaded, and asked over gRPC.

The models are tiny and random, so that what they say means nothing; that it is the same everywhere does.
"""

from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from checkpoints import tiny_models
from decoders import tiny_checkpoint
from hearthd.build.builder import build_bundle, measure_quality
from hearthd.build.checkpoints.checkpoint import Checkpoint
from hearthd.build.quantization import corpus
from hearthd.bundles.bundle import Bundle
from hearthd.generation.engine import Delta, Engine, Failed, Finished, Sequence
from hearthd.inference.model import load_model
from hearthd.runtime.runner import OnnxRunner
from hearthd.sequences.sampling import SamplingParams
from hearthd.text.tokenizer import ChatTokenizer, Message
from serving import answer, asynchronous, chat_request, make_config, serving, unix_target

# Longer and shorter than the windows of those that have one.
QUESTIONS = ("What shall we cook tonight?", "x", "def answer(question):\n    return 'yes'  # 今日は 12 März")
MAX_TOKENS, CONTEXT = 24, 256


@dataclass(frozen=True, slots=True)
class Built:
    name: str
    checkpoint: Checkpoint
    bundle: Bundle


def silent(stage: str, share: float) -> None:
    """Report nothing."""


@pytest.fixture(scope="module", params=sorted(tiny_models()))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    directory = tmp_path_factory.mktemp(request.param)
    checkpoint = tiny_checkpoint(directory, request.param)
    (directory / "bundle").mkdir()
    # Random layers exaggerate errors, so the gate may close on them; the figures are tested here.
    manifest = build_bundle(checkpoint, directory / "bundle", name=request.param, force=True, report=silent)
    bundle = Bundle.open(directory / "bundle")
    assert bundle.manifest == manifest
    assert sorted(path.name for path in directory.iterdir()) == sorted(["bundle", request.param]), "scratch files"
    return Built(request.param, checkpoint, bundle)


def test_it_builds_to_a_bundle_that_is_faithful(built: Built, tmp_path: Path) -> None:
    quality = built.bundle.manifest.quality
    assert 0 < float(quality["kl_mean"]) < 0.2
    assert float(quality["tokens"]) > 1_000
    weights = tiny_models()[built.name].weights()
    assert built.bundle.manifest.parameter_count == sum(each.size for each in weights.values())
    again = measure_quality(
        built.bundle, built.checkpoint, corpus.load("evaluation"), max_tokens=600, scratch=tmp_path, report=silent
    )
    assert again.kl_mean == pytest.approx(float(quality["kl_mean"]), rel=0.5)
    assert list(tmp_path.iterdir()) == []


def answers(bundle: Bundle, questions: tuple[str, ...], *, prefill_chunk: int) -> list[str]:
    """Ask all at once, greedily."""
    tokenizer = ChatTokenizer.from_bundle(bundle)
    runner = OnnxRunner.from_bundle(bundle, num_slots=len(questions), context_length=CONTEXT, num_threads=1)
    engine = Engine(runner, tokenizer, prefill_chunk=prefill_chunk)
    for place, question in enumerate(questions):
        prompt = tuple(tokenizer.encode_chat([Message("user", question)]))
        params = SamplingParams(temperature=0.0, max_tokens=min(MAX_TOKENS, runner.context_length - len(prompt)))
        name = str(place)
        engine.add(Sequence(request_id=name, prompt_ids=prompt, params=params, cache_identity=name, arrived=0.0))
    texts = [""] * len(questions)
    while engine.has_work:
        for sequence, event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Delta):
                texts[int(sequence.request_id)] += event.text
            assert isinstance(event, Delta | Finished)
    return texts


def test_an_answer_is_the_same_alone_in_a_batch_and_however_its_prompt_is_cut(built: Built) -> None:
    together = answers(built.bundle, QUESTIONS, prefill_chunk=64)
    assert together == answers(built.bundle, QUESTIONS, prefill_chunk=5)
    assert together == [answers(built.bundle, (question,), prefill_chunk=16)[0] for question in QUESTIONS]
    assert len(set(together)) > 1


@asynchronous
async def test_it_is_served(built: Built, tmp_path: Path) -> None:
    config = make_config(tmp_path, engine={"context_length": CONTEXT, "threads": 1})
    (expected,) = answers(built.bundle, QUESTIONS[:1], prefill_chunk=5)
    async with (
        serving(config, lambda own: load_model(built.bundle, own)),
        grpc.aio.insecure_channel(unix_target(config)) as channel,
    ):
        # Of the checkpoint's own defaults, a penalty for repetition would change what is likeliest.
        request = chat_request(QUESTIONS[0], max_tokens=MAX_TOKENS, temperature=0.0, repetition_penalty=1.0)
        text, final = await answer(channel, request)
    assert text == expected
    assert 0 < final.usage.completion_tokens <= MAX_TOKENS
