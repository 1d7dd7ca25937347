"""What the daemon takes at most: model, full slots, a prompt that is read, what a run works in, the program.

Pure arithmetic of a manifest and a configuration; `board` compares the sum with what there is. Called by `cli`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hearthd.configuration.config import EngineConfig

if TYPE_CHECKING:
    from hearthd.bundles.manifest import Manifest

__all__ = ["NeededMemory", "find_needed_memory"]

# Resident at most after the first short answer, less the bundle's own bytes: Python, gRPC, ONNX Runtime, its arena, the
# prefix cache [M: VmHWM 294 MB with a bundle of 172 MB, on 2 threads], and a few more.
_PROGRAM_BYTES: Final = 130 * 10**6
# What reading a prompt adds beside its keys and values, for each number of a row's hidden state: activations, and what
# ONNX Runtime's arena keeps of them between prompts of different lengths. A longer context adds nothing. [M: VmHWM with
# SmolLM2-135M 414 MB with kv_bytes = 64M, 4 prompts of 1000 to 1100 tokens at once; 520 MB with the defaults, 4 of 1760
# to 1880; 329 MB with a slot of 512 and chunks of 64; 454 MB with 8 slots of 1024, 8 prompts of 981, and chunks of 512,
# which take as many rows as the machine runs in a second. Reckoned: 426, 548, 346 and 557.]
_RUN_FACTOR: Final = 96
_FLOAT32_BYTES: Final = 4
# A further model's tokenizer, activations and thread: the rest of the program is there. As in `models.facts`.
_BESIDE_BYTES: Final = 48 * 2**20


@dataclass(frozen=True, slots=True)
class NeededMemory:
    """In bytes."""

    model: int
    slots: int
    """Keys and values of every slot, full."""
    prompt: int
    """Keys and values of the longest prompt while it is read: in float32, one at a time."""
    run: int = 0
    """Activations, while a prompt is read."""
    program: int = _PROGRAM_BYTES
    further: int = 0
    """What the other models take."""

    @property
    def own(self) -> int:
        """What one more model takes in a program that runs already."""
        return self.model + self.slots + self.prompt + _BESIDE_BYTES

    def beside(self, other: "NeededMemory", max_bytes: int = 0) -> "NeededMemory":
        """Return what it takes with another model loaded as well. max_bytes: of all models together, 0 for no limit."""
        further = self.further + other.own
        return replace(self, further=min(further, max(max_bytes - self.own, 0)) if max_bytes else further)

    @property
    def start(self) -> int:
        """What it takes to load the model."""
        return self.model + self.program

    @property
    def total(self) -> int:
        """What it takes with every slot full, and a full prompt being read."""
        return self.start + self.slots + self.prompt + self.run + self.further

    def __str__(self) -> str:
        """Return the sum and its parts, as people read them."""
        parts = ", ".join(
            f"{size / 1e6:.0f} MB {what}"
            for size, what in (
                (self.model, "of model"),
                (self.slots, "of full slots"),
                (self.prompt, "while a full prompt is read"),
                (self.run, "of activations"),
                (self.further, "of further models"),
                (self.program, "of program"),
            )
            if size or what != "of further models"
        )
        return f"{self.total / 1e6:.0f} MB at most ({parts})"


def find_needed_memory(manifest: "Manifest", engine: EngineConfig) -> NeededMemory:
    """Add up what a model needs as it is configured."""
    context_length = min(engine.context_length, manifest.context_length)
    # A byte each in the slots: a manifest of anything but int8 is refused.
    numbers = 2 * manifest.num_layers * manifest.num_kv_heads * manifest.head_dim * context_length
    slots, prompt = engine.slots * numbers, numbers * _FLOAT32_BYTES
    if engine.kv_bytes:
        prompt = min(prompt, engine.kv_bytes * _FLOAT32_BYTES // (1 + _FLOAT32_BYTES))
        slots = engine.kv_bytes - prompt
    num_rows = min(max(engine.prefill_chunk, engine.solo_prefill_chunk), context_length)
    run = num_rows * manifest.num_heads * manifest.head_dim * _FLOAT32_BYTES * _RUN_FACTOR
    return NeededMemory(manifest.size_bytes, slots, prompt, run)
