"""The model that a daemon serves: engine, tokenizer, and what is said about it.

`load_model` makes it from a bundle, in the inference thread, which owns the engine from then on: `__main__` hands it to
`server`, which hands it to `worker`.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hearthd.bundles.bundle import Bundle
from hearthd.configuration.config import Config
from hearthd.errors import BundleError
from hearthd.generation.drafting import drafting_for
from hearthd.generation.engine import Engine
from hearthd.inference.shared_prompts import encode_shared_prompts
from hearthd.kv.disk_writes import DiskWrites
from hearthd.kv.kv_cache import Runner
from hearthd.kv.prefix_store import PrefixStore
from hearthd.kv.stored_prefixes import StoredPrefixes
from hearthd.runtime.free_memory import return_free_memory
from hearthd.runtime.processor_kind import processor_kind
from hearthd.sequences.events import Failed, Finished
from hearthd.sequences.sampling import SamplingParams
from hearthd.sequences.sequence import Sequence
from hearthd.text.chat_template import Message
from hearthd.text.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from hearthd.runtime.runner import OnnxRunner

__all__ = ["Model", "default_sampling", "load_model", "prove"]

# KV places: those that run at once, as many that are paused for them or were just left, and some for shared prompts.
# They take no memory of their own: that is the budget's.
_PLACES_FOR_A_SLOT: Final = 2
_MORE_PLACES: Final = 4
_PROOF: Final = (Message("user", "Hello"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model, ready to be asked."""

    name: str
    engine: Engine
    """Of the inference thread alone."""
    runner: Runner
    """The engine's; only `terminate` may be called from elsewhere."""
    tokenizer: ChatTokenizer
    default_sampling: SamplingParams
    """What a request gets that sets nothing; its max_tokens is the configured default."""
    architecture: str
    parameter_count: int
    quantization: str
    size_bytes: int
    license: str
    source: str


def load_model(bundle: Bundle, config: Config, writes: DiskWrites | None = None) -> Model:
    """Load a bundle that has been verified. Raises BundleError if it cannot be run.

    writes: the books of what all models of the process write to the disk; None: this is the only one.
    """
    # In the inference thread, at its time: a second instance must be told within moments that it is one, and this
    # import alone takes longer.
    from hearthd.runtime.runner import OnnxRunner

    manifest = bundle.manifest
    # First: the weights go where its reading has left memory free, 4 MB.
    tokenizer = ChatTokenizer.from_bundle(bundle)
    runner = OnnxRunner.from_bundle(
        bundle,
        num_slots=_PLACES_FOR_A_SLOT * config.engine.slots + _MORE_PLACES,
        context_length=min(config.engine.context_length, manifest.context_length),
        num_threads=config.engine.num_threads,
        kv_bytes=config.engine.kv_bytes,
        num_full=config.engine.slots,
        has_neighbours=bool(config.model_options),
    )
    engine = Engine(
        runner,
        tokenizer,
        num_slots=config.engine.slots,
        prefill_chunk=config.engine.prefill_chunk,
        solo_prefill_chunk=min(config.engine.solo_prefill_chunk, config.engine.context_length),
        max_stall_seconds=config.engine.max_stall_ms / 1000,
        max_answer_seconds=config.engine.max_answer_seconds,
        drafting=drafting_for(runner, tokenizer.encode_chat(_PROOF)) if config.engine.drafts else None,
        stored=_open_prefixes(bundle, config, runner, writes),
    )
    engine.share_prompts(encode_shared_prompts(config, tokenizer))
    return Model(
        name=config.model.name,
        engine=engine,
        runner=runner,
        tokenizer=tokenizer,
        default_sampling=default_sampling(bundle.generation(), config.limits.default_max_tokens),
        architecture=manifest.architecture,
        parameter_count=manifest.parameter_count,
        quantization=manifest.quantization,
        size_bytes=bundle.size_bytes,
        license=manifest.license,
        source=manifest.source,
    )


def _open_prefixes(
    bundle: Bundle, config: Config, runner: "OnnxRunner", writes: DiskWrites | None
) -> StoredPrefixes | None:
    """Return the prefixes on disk that are this model's on this processor; None without a directory for them."""
    if config.cache.directory is None:
        return None
    fingerprint = "\n".join((bundle.manifest.to_json(), runner.kv_version, processor_kind()))
    store = PrefixStore(
        config.cache.directory,
        fingerprint.encode(),
        runner.kv_token_bytes,
        max_bytes=config.cache.max_bytes,
        writes=writes or DiskWrites(config.cache.max_bytes_per_day),
    )
    return StoredPrefixes(store, runner, min_tokens=config.cache.min_tokens)


def prove(model: Model, turn: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Let the engine generate two real tokens. Whatever it raises means that it cannot serve.

    Two, because the first comes from reading a prompt, which is another kernel than writing.
    turn: entered for each step, where other models run beside this one.
    """
    sequence = Sequence(
        request_id="start-up",
        prompt_ids=tuple(model.tokenizer.encode_chat(_PROOF)),
        params=SamplingParams(max_tokens=2, temperature=0.0),
        cache_identity="start-up",
        arrived=time.monotonic(),
    )
    model.engine.add(sequence)
    while model.engine.has_work:
        with turn():
            events = model.engine.step()
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished) and event.completion_tokens:
                return_free_memory()
                return
    raise BundleError(f"model {model.name} loads, and generates no token; build it again")


def default_sampling(generation: dict[str, float], default_max_tokens: int) -> SamplingParams:
    """Return what a request gets that sets nothing. generation: the bundle's."""
    base = SamplingParams(max_tokens=default_max_tokens)
    return SamplingParams(
        max_tokens=default_max_tokens,
        temperature=generation.get("temperature", base.temperature),
        top_k=int(generation.get("top_k", base.top_k)),
        top_p=generation.get("top_p", base.top_p),
        min_p=generation.get("min_p", base.min_p),
        repetition_penalty=generation.get("repetition_penalty", base.repetition_penalty),
    )
