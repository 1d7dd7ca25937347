"""What each layer of a decoder attends to, and by which rotary positions: one rule for each family.

A rule reads a configuration, in the spelling that `checkpoint.Checkpoint` promises, and gives one `Layer` for each
layer. Knows no weights and no ONNX. `architecture` has the table that names the rules; `attention` reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hearthd.build.decoder.config_values import MAX_POSITIONS, whole_number
from hearthd.build.decoder.rope import Rope, read_rope
from hearthd.errors import BuildError

__all__ = ["Layer", "LayerRule", "all_alike", "all_windowed", "some_sliding", "some_without_rope"]

# Layers after which a pattern of layers comes again.
_MAX_PATTERN = 512


@dataclass(frozen=True, slots=True)
class Layer:
    """rope: None for a layer that does not know positions. window: how many tokens a token sees, itself included; None
    for all before it."""

    rope: Rope | None
    window: int | None = None


# (configuration, number of layers, features of each head that turn) -> one for each layer
LayerRule = Callable[[Mapping[str, Any], int, int], tuple[Layer, ...]]


def all_alike(config: Mapping[str, Any], num_layers: int, rotary_dim: int) -> tuple[Layer, ...]:
    """Full attention and the same rope everywhere."""
    _refuse_windows(config)
    return (Layer(read_rope(config, rotary_dim)),) * num_layers


def some_without_rope(config: Mapping[str, Any], num_layers: int, rotary_dim: int) -> tuple[Layer, ...]:
    """SmolLM3: `no_rope_layers` has 0 for a layer without rope, 1 for one with it; by default each fourth has none."""
    _refuse_windows(config)
    turns = config.get("no_rope_layers")
    if turns is None:
        interval = whole_number(config, "no_rope_layer_interval", default=4, largest=_MAX_PATTERN)
        turns = [int((index + 1) % interval != 0) for index in range(num_layers)]
    if not isinstance(turns, list) or len(turns) < num_layers or any(turn not in (0, 1) for turn in turns):
        raise BuildError(
            f"no_rope_layers is no list of 0 and 1 for each of {num_layers} layers: config.json is damaged"
        )
    rope = read_rope(config, rotary_dim)
    return tuple(Layer(rope if turn else None) for turn in turns[:num_layers])


def all_windowed(config: Mapping[str, Any], num_layers: int, rotary_dim: int) -> tuple[Layer, ...]:
    """Phi-3: `sliding_window`, where it is given, in every layer."""
    window = (
        None if config.get("sliding_window") is None else whole_number(config, "sliding_window", largest=MAX_POSITIONS)
    )
    return (Layer(read_rope(config, rotary_dim), window),) * num_layers


def some_sliding(config: Mapping[str, Any], num_layers: int, rotary_dim: int) -> tuple[Layer, ...]:
    """Gemma 3: `layer_types`, by default five layers with a window and a rope of their own before each one without."""
    kinds = config.get("layer_types")
    if kinds is None:
        pattern = whole_number(config, "sliding_window_pattern", default=6, largest=_MAX_PATTERN)
        kinds = ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise BuildError(
            f"layer_types is no list with one kind for each of {num_layers} layers: config.json is damaged"
        )
    found = {str(kind) for kind in kinds}
    unknown = found - {"full_attention", "sliding_attention"}
    if unknown:
        raise BuildError(f"layer types {sorted(unknown)} are not supported; full_attention and sliding_attention are")
    by_kind = {"full_attention": Layer(read_rope(config, rotary_dim))}
    if "sliding_attention" in found:
        rope = read_rope({"rope_theta": config.get("rope_local_base_freq")}, rotary_dim, name="rope.sliding")
        window = whole_number(config, "sliding_window", largest=MAX_POSITIONS)
        by_kind["sliding_attention"] = Layer(rope, window)
    return tuple(by_kind[kind] for kind in kinds)


def _refuse_windows(config: Mapping[str, Any]) -> None:
    if config.get("use_sliding_window"):
        raise BuildError("use_sliding_window is not supported with this architecture; full attention is")
    kinds = config.get("layer_types") or []
    kinds = {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])}
    if kinds - {"full_attention"}:
        raise BuildError(f"layer types {sorted(kinds)} are not supported with this architecture; full_attention is")
