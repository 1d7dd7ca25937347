"""Texts to ask with: of a wanted length, another one for each number, the same on every machine.

Called by the scenarios.
"""

from __future__ import annotations

import random

# Each a token of its own, with its space, in vocabularies like that of GPT-2; elsewhere lengths are about right only,
# and those of the report are what the daemon counted.
_WORDS = (
    "lamp", "kitchen", "while", "rain", "falls", "over", "green", "hills", "and", "cat", "sleeps", "near", "books",
    "house", "door", "water", "light", "night", "morning", "garden", "tree", "river", "road", "city", "music",
    "paper", "table", "window", "chair", "bread", "milk", "coffee", "sugar", "winter", "summer", "spring", "train",
    "bridge", "island", "ocean", "mountain", "forest", "bird", "fish", "horse", "dog", "stone", "fire", "snow",
    "wind", "cloud", "star", "moon", "sun", "earth",
)  # fmt: skip
SUBJECTS = (
    "the history of bread", "how a bridge is built", "the life of a river", "why birds travel", "how glass is made",
    "a winter in the mountains", "the sounds of a city", "how a garden grows", "the work of a baker", "old maps",
    "the colours of the sea", "how trains changed the world", "a day on a farm", "the stars at night",
    "how paper is made", "the first clocks",
)  # fmt: skip


def words(number: int, seed: object) -> str:
    """Return so many words."""
    chance = random.Random(f"words/{seed}")
    return " ".join(chance.choices(_WORDS, k=number))


def question(num_words: int, seed: object) -> str:
    """Return a request for a long text, with so many words in it for the model to read."""
    return f"Tell a long story with these words: {words(num_words, seed)}."


def subject(number: int) -> str:
    """Return one of a few requests that a small model answers at length."""
    return f"Explain in detail and at length {SUBJECTS[number % len(SUBJECTS)]}."
