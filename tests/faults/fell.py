"""End a durable change at a random step of its own, over and over, and look what is left. Run as a program.

    fell.py WORK {kill,power,power-unsynced-files,power-unsynced-directories} COUNT SEED DIRECTORY

kill: the process is gone (SIGKILL). power: so is whatever had not been written through to the disk. The other two are
controls, where fsync does nothing for files or for directories, so that a test of this test can see it fail.

A step is a bytecode of the modules that do the work, so that every moment between two of their calls is reached and
none is waited for; one turn in ten is felled after the change has returned, when it must be there for good.
Writes one JSON line: how often it was felled, the steps there are, how often each outcome was found, and `wrong`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import stat
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from durable_work import WORKS, Work
from ext4_disk import Disk

AFTER_EVERY = 10


def run_steps(work: Work, root: Path, fall: Callable[[], None], fall_at: int | None) -> int:
    """Make the change; at step `fall_at` call `fall`, which does not return. Returns the number of steps."""
    files = {getattr(module, "__file__", "") for module in work.steps_in} | {
        sys.modules[type(work).__module__].__file__
    }
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            steps += 1
            if steps == fall_at:
                fall()
        return trace

    sys.settrace(trace)
    try:
        work.change(root)
    finally:
        sys.settrace(None)
    return steps


class Ground:
    """Where the change is made: a directory, on a disk of its own if the power is to be cut."""

    def __init__(self, directory: Path, disk: Disk | None) -> None:
        self._disk = disk
        self.root = (disk.path if disk else directory) / "root"

    def prepare(self, work: Work) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        work.prepare(self.root)
        if self._disk:
            self._disk.sync()

    def fall(self) -> None:
        if self._disk:
            self._disk.cut_power()
        os.kill(os.getpid(), signal.SIGKILL)

    def recover(self) -> None:
        if self._disk:
            self._disk.unmount()
            self._disk.mount()


def fell_once(work: Work, ground: Ground, fall_at: int | None) -> str:
    """Fell the change at a step, or after it has returned; return what is found afterwards."""
    ground.prepare(work)
    # This process has no threads of gRPC or ONNX Runtime: forking is safe here.
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run_steps(work, ground.root, ground.fall, fall_at)
            if fall_at is None:
                ground.fall()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        return "not felled"
    ground.recover()
    try:
        found = work.look(ground.root)
    except Exception as error:  # noqa: BLE001 - the kind of damage is the outcome
        return f"damaged: {type(error).__name__}: {error}"
    if found == work.before:
        try:
            # Whatever was left behind does not stand in the way of the next attempt.
            work.change(ground.root)
        except Exception as error:  # noqa: BLE001 - likewise
            return f"stuck: {type(error).__name__}: {error}"
        if (then := work.look(ground.root)) != "new":
            return f"{found}, and then {then}"
    return found


def sync_unless(fsync: Callable[[int], None], is_left_out: Callable[[int], bool], descriptor: int) -> None:
    if not is_left_out(os.fstat(descriptor).st_mode):
        fsync(descriptor)


def main() -> None:
    kind, way, count, seed, directory = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    if "unsynced" in way:
        os.fsync = partial(sync_unless, os.fsync, stat.S_ISREG if way.endswith("files") else stat.S_ISDIR)
    work = WORKS[kind]()
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with contextlib.ExitStack() as held:
        disk = held.enter_context(Disk(directory)) if way.startswith("power") else None
        ground = Ground(directory, disk)
        ground.prepare(work)
        total = run_steps(work, ground.root, ground.fall, None)
        for turn in range(count):
            fall_at = None if turn % AFTER_EVERY == 0 else chance.randint(1, total)
            found = fell_once(work, ground, fall_at)
            outcomes[found if len(found) < 20 else found[:40]] += 1
            if found not in ((work.before, "new") if fall_at else ("new",)):
                wrong.append(f"step {fall_at or 'after the last'} of {total}: {found}")
    print(json.dumps({"felled": count, "steps": total, "outcomes": outcomes, "wrong": wrong}))


if __name__ == "__main__":
    main()
