"""What docs/install-raspberry-pi.md tells a person to type: the boxes, by chapter and by where they belong.

The board is set up with the words of the manual and no others, so that a step that is missing there is missing here.
Called by `life`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MANUAL: Final = Path(__file__).resolve().parents[2] / "docs/install-raspberry-pi.md"
# In bold, before the boxes that they are about; a chapter begins on the board.
_PLACES: Final = {"on the board": "board", "on your computer": "computer", "on the device": "device"}


@dataclass(frozen=True, slots=True)
class Box:
    """Something to type."""

    chapter: int
    place: str
    command: str


def read_boxes(text: str) -> list[Box]:
    """Return the boxes of a manual, in their order."""
    boxes = []
    chapter, place = 0, "board"
    inside: list[str] | None = None
    for line in text.splitlines():
        if inside is not None:
            if line == "```":
                boxes.append(Box(chapter, place, "\n".join(inside)))
                inside = None
            else:
                inside.append(line)
        elif line == "```sh":
            inside = []
        elif found := re.match(r"## (\d+)\. ", line):
            chapter, place = int(found[1]), "board"
        else:
            for words in re.findall(r"\*\*([^*]+?):?\*\*", line):
                place = _PLACES.get(words.lower(), place)
    return boxes


def boxes(chapter: int, place: str = "board") -> list[str]:
    """Return what the manual says in a chapter to type in a place. Raises LookupError if it is nothing."""
    found = [
        box.command
        for box in read_boxes(MANUAL.read_text(encoding="utf-8"))
        if (box.chapter, box.place) == (chapter, place)
    ]
    if not found:
        raise LookupError(f"{MANUAL}: chapter {chapter} has nothing to type on the {place}")
    return found
