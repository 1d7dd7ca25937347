"""What is known of a model before it is loaded: what its bundle says of itself, and the memory that it will take.

Reads the manifest, and no file of weights. Called by `__main__` and `residents`.
"""

from dataclasses import dataclass
from typing import Final

from hearthd.bundles.bundle import Bundle
from hearthd.bundles.manifest import Manifest
from hearthd.configuration.config import Config, EngineConfig
from hearthd.inference.model import Model, default_sampling
from hearthd.kv.budget import KVBudget
from hearthd.sequences.sampling import SamplingParams

__all__ = ["ModelFacts", "estimate_bytes", "facts_of", "facts_of_bundle"]

# What a model takes beside its files and its KV: tokenizer, activations, the runtime's own books, the thread.
_BASE_BYTES: Final = 48 * 2**20
_FLOAT_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model as it is, or would be, served."""

    architecture: str
    context_length: int
    """Of prompt and answer together, as configured; at most what the model can."""
    num_slots: int
    parameter_count: int
    quantization: str
    size_bytes: int
    """Of the bundle's files."""
    memory_bytes: int
    """What it is reckoned to take when it is loaded and all its slots are full."""
    license: str
    source: str
    default_sampling: SamplingParams


def facts_of_bundle(bundle: Bundle, config: Config) -> ModelFacts:
    """Return what a bundle says of itself. config: as the model has it (`Config.for_model`). Raises BundleError."""
    manifest = bundle.manifest
    return ModelFacts(
        architecture=manifest.architecture,
        context_length=min(
            config.engine.context_length, manifest.context_length, _kv_budget(manifest, config.engine).context_length
        ),
        num_slots=config.engine.slots,
        parameter_count=manifest.parameter_count,
        quantization=manifest.quantization,
        size_bytes=bundle.size_bytes,
        memory_bytes=estimate_bytes(manifest, config.engine),
        license=manifest.license,
        source=manifest.source,
        default_sampling=default_sampling(bundle.generation(), config.limits.default_max_tokens),
    )


def facts_of(model: Model, memory_bytes: int) -> ModelFacts:
    """Return what a loaded model says of itself. memory_bytes: as reckoned before it was loaded, 0 if it was not."""
    return ModelFacts(
        architecture=model.architecture,
        context_length=model.engine.context_length,
        num_slots=model.engine.num_slots,
        parameter_count=model.parameter_count,
        quantization=model.quantization,
        size_bytes=model.size_bytes,
        memory_bytes=memory_bytes,
        license=model.license,
        source=model.source,
        default_sampling=model.default_sampling,
    )


def estimate_bytes(manifest: Manifest, engine: EngineConfig) -> int:
    """Return what a model takes in memory at most: its files, its KV, and a share for the rest."""
    budget = _kv_budget(manifest, engine)
    return manifest.size_bytes + budget.num_blocks * budget.block_bytes + _BASE_BYTES


def _kv_budget(manifest: Manifest, engine: EngineConfig) -> KVBudget:
    """Return what the runner will have: int8 in each slot, and float32 once, for the prompt that is being read."""
    return KVBudget.of(
        row_bytes=manifest.head_dim,
        num_rows=2 * manifest.num_layers * manifest.num_kv_heads,
        context_length=min(engine.context_length, manifest.context_length),
        num_full=engine.slots,
        prompt_factor=_FLOAT_BYTES,
        kv_bytes=engine.kv_bytes,
    )
