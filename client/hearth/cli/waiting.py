"""What is told of a chat that waits for its turn. Called by `ask` and `chat`."""

from hearth._values import Queued


def in_words(place: Queued) -> str:
    """Return a line for the person at the terminal."""
    line = f"waiting; {place.position} before this one"
    seconds = place.expected_wait_seconds
    if seconds is None:
        return line
    return f"{line}, about {seconds:.0f} s" if seconds >= 1 else f"{line}, less than a second"
