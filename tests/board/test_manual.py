"""The manual as the emulated board reads it: a box more or less than the steps take is told here, and at once."""

import manual

TEXT = """
## 1. First

**On your computer**, where it is:

```sh
one
```

Now **on the board:**

```sh
two
three
```

## 2. Second

```sh
four
```

```
not typed
```
"""
# Typed by nobody in the emulated board: what only a Raspberry Pi has, and what is done in another way there (without a
# network to copy over).
LEFT_OUT = ("vcgencmd ", "sudo sed -i", "sudo reboot", "scp ", "ssh ")
JOURNAL = 5


def test_boxes_have_a_chapter_and_a_place() -> None:
    assert manual.read_boxes(TEXT) == [
        manual.Box(1, "computer", "one"),
        manual.Box(1, "board", "two\nthree"),
        manual.Box(2, "board", "four"),
    ]


def test_the_steps_take_as_many_boxes_as_the_manual_has() -> None:
    found: dict[tuple[int, str], int] = {}
    for box in manual.read_boxes(manual.MANUAL.read_text(encoding="utf-8")):
        if not box.command.startswith(LEFT_OUT) and box.chapter != JOURNAL:
            found[box.chapter, box.place] = found.get((box.chapter, box.place), 0) + 1
    # install, two looks; pair, join, revoke; install, pair, ask; doctor; update and back, each after the file before is
    # gone; back up and restore; remove and purge
    assert found == {
        (3, "board"): 3,
        (4, "board"): 3,
        (4, "device"): 3,
        (6, "board"): 1,
        (7, "board"): 4,
        (8, "board"): 5,
        (9, "board"): 2,
    }
