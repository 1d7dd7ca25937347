"""What each layer of a decoder attends to, and by which rotary positions: one rule for each family.

A rule reads a configuration, in the spelling that `checkpoint.Checkpoint` promises, and gives one `Layer` for each
layer. Knows no weights and no ONNX. `architecture` has the table that names the rules; `attention` reads the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hearthd.build.rope import Rope, read_rope
from hearthd.errors import BuildError

__all__ = ["Layer", "LayerRule", "all_alike", "some_without_rope"]


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
        interval = config.get("no_rope_layer_interval", 4)
        if not isinstance(interval, int) or interval < 1:
            raise BuildError(f"no_rope_layer_interval is {interval!r}; a whole number of 1 or more is needed")
        turns = [int((index + 1) % interval != 0) for index in range(num_layers)]
    if not isinstance(turns, list) or len(turns) < num_layers or any(turn not in (0, 1) for turn in turns):
        raise BuildError(
            f"no_rope_layers is no list of 0 and 1 for each of {num_layers} layers: config.json is damaged"
        )
    rope = read_rope(config, rotary_dim)
    return tuple(Layer(rope if turn else None) for turn in turns[:num_layers])


def _refuse_windows(config: Mapping[str, Any]) -> None:
    if config.get("use_sliding_window"):
        raise BuildError("use_sliding_window is not supported with this architecture; full attention is")
    kinds = set(config.get("layer_types") or ())
    if kinds - {"full_attention"}:
        raise BuildError(f"layer types {sorted(kinds)} are not supported with this architecture; full_attention is")
