"""Kill a store's work at a given step, over and over: run as a program by test_store, never imported.

A step is a bytecode of store.py, so that every moment between two of its calls is reached, and none is waited for. The
process loads neither gRPC nor ONNX Runtime and computes nothing: forking is safe here.

usage: kill_store.py WORK {install,replace,remove} {exchange,two-renames} COUNT SEED
WORK has `old` and `new`, two bundles named "tiny". Writes one JSON line: kills, and how often each outcome was found.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from hearthd.bundles import store as store_module
from hearthd.bundles.bundle import Bundle
from hearthd.bundles.store import Store
from hearthd.errors import ModelNotFoundError


def copy_into(directory: Path, source: Path) -> None:
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, directory / path.name)


def work(store: Store, kind: str, new: Path) -> None:
    if kind == "remove":
        store.remove("tiny")
        return
    with store.installing("tiny") as directory:
        copy_into(directory, new)


def count_or_kill(store: Store, kind: str, new: Path, kill_at: int | None) -> int:
    """Run the work; at step `kill_at` of store.py the process is gone. Returns the number of steps."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        # The copying is the caller's, but a kill while files are half written counts too.
        if frame.f_code.co_filename not in (store_module.__file__, __file__):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work(store, kind, new)
    finally:
        sys.settrace(None)
    return steps


def what_opens(store: Store, old: Bundle, new: Bundle) -> str:
    try:
        found = store.open("tiny").manifest
    except ModelNotFoundError:
        return "none"
    return {old.manifest.to_json(): "old", new.manifest.to_json(): "new"}[found.to_json()]


def main() -> None:
    root, kind, way, count, seed = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    if way == "two-renames":
        store_module._exchange = lambda one, other: False
    old, new = Bundle.open(root / "old"), Bundle.open(root / "new")
    store = Store(root / "models")
    randomness = random.Random(seed)
    outcomes: Counter[str] = Counter()
    kills = total = 0
    for turn in range(count + 1):
        shutil.rmtree(store.directory, ignore_errors=True)
        if kind != "install":
            with store.installing("tiny") as directory:
                copy_into(directory, old.path)
        if turn == 0:
            total = count_or_kill(store, kind, new.path, None)
            continue
        kill_at = randomness.randint(1, total)
        child = os.fork()
        if child == 0:
            count_or_kill(store, kind, new.path, kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        at_once = what_opens(store, old, new)
        store.sweep()
        swept = what_opens(store, old, new)
        if way == "exchange" and at_once != swept:
            raise SystemExit(f"step {kill_at}: {at_once} before the sweep, {swept} after it")
        left = sorted(path.name for path in store.directory.glob("*") if path.name not in (".hearthd.lock", "tiny"))
        if left:
            raise SystemExit(f"step {kill_at}: {left} left after the sweep")
        outcomes[swept] += 1
    print(json.dumps({"kills": kills, "steps": total, "outcomes": outcomes}))


if __name__ == "__main__":
    main()
