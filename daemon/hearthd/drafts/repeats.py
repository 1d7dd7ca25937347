"""Where the last tokens of a text stood before, and what followed them there.

Knows token ids, no model and no engine. Called by `drafter`.
"""

from collections.abc import Iterable
from typing import Final

__all__ = ["SHORTEST", "Repeats"]

# Tokens that must agree. One alone says next to nothing.
SHORTEST: Final = 2
# Places that are looked at, the latest first, and how far each is followed back: bounds of what a token costs.
_MOST_PLACES: Final = 8
_LONGEST: Final = 16


class Repeats:
    """The longest end of a text that stood in it before; grows by a token in O(1), amortised.

    As long as the text goes on as it did at that place, the place is the best one still. Only then is another looked
    for, among the latest with the same last two tokens.
    """

    def __init__(self, token_ids: Iterable[int]) -> None:
        self._token_ids: list[int] = []
        # Of each pair, the position of its second token; and for each position the pair's position before.
        self._last: dict[int, int] = {}
        self._previous: list[int] = []
        self._place = -1
        self.length = 0
        """Tokens at the text's end that stood there before; 0 if fewer than SHORTEST did."""
        for token_id in token_ids:
            self._add(token_id)
        self._find()

    def __len__(self) -> int:
        return len(self._token_ids)

    @property
    def next_id(self) -> int | None:
        """The token that followed then."""
        return self._token_ids[self._place + 1] if self.length else None

    def following(self, num_tokens: int) -> list[int]:
        """Return the tokens that followed then, and once more from there where they come to the text's end."""
        period = len(self._token_ids) - 1 - self._place
        return [self._token_ids[self._place + 1 + at % period] for at in range(num_tokens if self.length else 0)]

    def append(self, token_id: int) -> None:
        """Let the text go on."""
        goes_on = token_id == self.next_id
        self._add(token_id)
        if goes_on:
            self._place += 1
            self.length += 1
        else:
            self._find()

    def _add(self, token_id: int) -> None:
        position = len(self._token_ids)
        before = self._token_ids[-1] if position else -1
        self._token_ids.append(token_id)
        pair = before << 32 | token_id
        self._previous.append(self._last.get(pair, -1))
        self._last[pair] = position

    def _find(self) -> None:
        self.length = 0
        ids, end = self._token_ids, len(self._token_ids) - 1
        place = self._previous[end] if ids else -1
        for _ in range(_MOST_PLACES):
            # The first token has no pair of its own.
            if place < SHORTEST - 1:
                return
            length = SHORTEST
            while length < min(_LONGEST, place + 1) and ids[place - length] == ids[end - length]:
                length += 1
            if length > self.length:
                self._place, self.length = place, length
            place = self._previous[place]
