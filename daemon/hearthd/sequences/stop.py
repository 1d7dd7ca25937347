"""Finds a request's stop strings in an answer that comes in pieces, and keeps them out of it.

Literal strings only: a pattern from a caller could be made to take forever. Knows text alone, no tokens. Called by
`answer`.
"""

__all__ = ["StopMatcher"]


class StopMatcher:
    """Passes an answer's text on up to the first stop string, however the text is cut into pieces.

    What comes out, in total, is `text[:first]`, where `first` is the lowest place at which any stop string stands in
    the whole text. Text that could still turn out to be the beginning of one is held back, and nothing else is.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        """`stop`: at most a few short strings, none empty; no string means that all text passes."""
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self._is_matched = False

    @property
    def is_matched(self) -> bool:
        """Whether a stop string came. Nothing comes out any more."""
        return self._is_matched

    def push(self, text: str) -> str:
        """Take more of the answer; return what of it, and of what was held back, is certain to be outside."""
        if self._is_matched or not self._stop:
            return "" if self._is_matched else text
        text = self._held + text
        first = self._find(text)
        partial = self._find_partial(text)
        if first is not None and first <= partial:
            return self._match(text, first)
        # A stop string that is complete, but begins after one that may still become complete, has to wait for it.
        self._held = text[partial:]
        return text[:partial]

    def flush(self) -> str:
        """Take the end of the answer; return what was held back, up to a stop string if one waited."""
        text, self._held = self._held, ""
        first = self._find(text)
        return text if first is None else self._match(text, first)

    def _match(self, text: str, first: int) -> str:
        self._is_matched = True
        self._held = ""
        return text[:first]

    def _find(self, text: str) -> int | None:
        return min((place for place in map(text.find, self._stop) if place >= 0), default=None)

    def _find_partial(self, text: str) -> int:
        """Find the first place from which the text, to its end, is the beginning of a longer stop string."""
        for place in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[place:]
            if any(len(tail) < len(stop) and stop.startswith(tail) for stop in self._stop):
                return place
        return len(text)
