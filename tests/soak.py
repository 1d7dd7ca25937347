"""A mixed soak: a real daemon over TLS on loopback, callers of every kind, its resident set and what went wrong.

    .venv/bin/python tests/soak.py [--minutes 10] [--threads 1] [--callers 4] [--pause 0.5] [--model DIRECTORY]

Prints a line each interval and a summary. Ends with 1 if anything went wrong: an error that was not asked for, a daemon
that did not come to rest, descriptors or threads that stayed, a silence after which systemd's watchdog would have ended
it, or a resident set that grew more than 1 % over the last half (of a run of 10 minutes or more: the first minutes fill
buffers for the first time). It is measured while nobody calls, after an answer and a rest, and without the KV that the
status tells of: what a prompt takes goes back with the first word of an answer and when the daemon has rested, until
when the resident set moves by a tenth and more, which would hide the growth that is looked for.
Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc

from hearth import Client
from hearth.v1 import status_pb2, status_pb2_grpc
from hearthd.access.tokens import create_token
from soak_chats import VISITS, Place, fill_the_context
from tls_files import make_tls_files

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_MODEL = ROOT / ".cache/state/models/smollm2-135m"
CONTEXT = 1024
SLOTS = 3
MAX_GROWTH_PERCENT = 1.0
LONG_ENOUGH_MINUTES = 10.0
REST_SECONDS = 30.0
# The buffers of the last prompt are given back ten seconds after it. What was said is read again for the cache first,
# which is a prompt too.
SETTLE_SECONDS = 11.0
MAX_SETTLE_SECONDS = 60.0
# Of a processor: what a daemon takes that does nothing, and far less than one that reads.
QUIET_SHARE = 0.1
# As in the unit (deploy/systemd/hearthd.service).
WATCHDOG_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    resident_mb: float
    kv_mb: float
    """Of it, by the daemon's status: whatever is worth keeping, up to a limit."""
    peak_mb: float
    """The most that was ever resident."""
    num_descriptors: int
    num_threads: int


class LifeSigns:
    """systemd's end of NOTIFY_SOCKET: the longest silence between two signs of life. A context manager."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(round(WATCHDOG_SECONDS * 1e6))}
        self.longest_seconds = 0.0
        self.number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> LifeSigns:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(b"END", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        last = None
        while (said := self._socket.recv(4096)) != b"END":
            # The watchdog runs from READY on.
            if said.startswith((b"READY=1", b"WATCHDOG=1")):
                now = time.monotonic()
                if last is not None:
                    self.longest_seconds = max(self.longest_seconds, now - last)
                    self.number += 1
                last = now


class Door:
    """Callers come in while it is open. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_inside = 0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """Nobody is inside, nobody comes in."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._num_inside)
        try:
            yield
        finally:
            with self._changed:
                self._is_open = True
                self._changed.notify_all()


class Tally:
    """What the callers did and what went wrong. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.visits: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    def add(self, visit: str, error: BaseException | None = None) -> None:
        with self._lock:
            self.visits[visit] += 1
            if error is not None:
                self.errors[f"{visit}: {type(error).__name__}: {str(error)[:160]}"] += 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime")
    parser.add_argument("--callers", type=int, default=4, help="who visit at once")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two visits of a caller")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between two lines, and rests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="an installed model's directory")
    return parser.parse_args(arguments)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_daemon(directory: Path, place: Place, model: Path, threads: int, signs: LifeSigns) -> subprocess.Popen[bytes]:
    config = directory / "hearthd.toml"
    config.write_text(
        f'[server]\nunix_socket = "{directory}/s"\ntcp = ["127.0.0.1:{place.port}"]\ndrain_grace_seconds = 5\n'
        f'[tls]\ncertificate = "{place.tls.certificate}"\nkey = "{place.tls.key}"\n'
        f'[auth]\ntoken_file = "{place.token_file}"\n'
        f'[model]\ndirectory = "{model.parent}"\nname = "{model.name}"\n'
        f"[engine]\nslots = {SLOTS}\ncontext_length = {CONTEXT}\nthreads = {threads}\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEARTH", "NOTIFY", "WATCHDOG"))}
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "hearthd", "serve", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=kept | signs.environment | {"STATE_DIRECTORY": str(directory)},
        )


def rest(socket_path: Path) -> int:
    """Wait until no chat is left; the bytes of KV that are in use then."""
    with grpc.insecure_channel(f"unix://{socket_path}") as channel:
        service = status_pb2_grpc.StatusServiceStub(channel)
        deadline = time.monotonic() + REST_SECONDS
        while True:
            status = service.GetStatus(status_pb2.GetStatusRequest(), wait_for_ready=True, timeout=REST_SECONDS)
            if not status.running_count + status.queued_count or time.monotonic() > deadline:
                return int(status.kv_bytes)


def measure(pid: int, socket_path: Path, begin: float) -> Sample:
    proc = Path(f"/proc/{pid}")
    kv_bytes = rest(socket_path)
    lines = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    peak_kb = int(lines["VmHWM"].removesuffix("kB"))
    resident = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return Sample(
        time.monotonic() - begin,
        resident / 1e6,
        kv_bytes / 1e6,
        peak_kb * 1024 / 1e6,
        len(os.listdir(proc / "fd")),
        len(os.listdir(proc / "task")),
    )


def visit(place: Place, door: Door, tally: Tally, seed: str, pause: float) -> None:
    """One caller, until the end."""
    chance = random.Random(seed)
    kinds, weights = zip(*VISITS, strict=True)
    while not place.stop.is_set():
        [kind] = chance.choices(kinds, weights)
        try:
            with door.inside():
                kind(place, chance)
        except Exception as error:  # noqa: BLE001 - whatever it is, the summary tells it
            tally.add(kind.__name__, error)
        else:
            tally.add(kind.__name__)
        place.stop.wait(chance.uniform(0, 2 * pause))


def growth_percent(samples: list[Sample]) -> float:
    """Growth from the third quarter of the time to the last one, without KV: of the lowest samples of each.

    glibc keeps what is free at the end of a thread's heap, 30 MB that are there at one time and not at another: the
    lowest samples are those without.
    """
    end = samples[-1].seconds
    earlier = [sample for sample in samples if end / 2 <= sample.seconds < 3 / 4 * end]
    later = [sample for sample in samples if sample.seconds >= 3 / 4 * end]
    if not earlier:
        return 0.0
    return 100 * (_lowest_mb(later) - _lowest_mb(earlier)) / samples[-1].resident_mb


def _lowest_mb(samples: list[Sample]) -> float:
    """Return the mean of the lowest quarter, without KV."""
    sizes = sorted(sample.resident_mb - sample.kv_mb for sample in samples)
    lowest = sizes[: max(len(sizes) // 4, 1)]
    return sum(lowest) / len(lowest)


def settle(place: Place, pid: int) -> None:
    """Let the daemon give back what it does not need while nobody asks, and has nothing to do of its own."""
    with place.connect() as client:
        client.chat("Say yes.", max_tokens=4, temperature=0)
    now = time.monotonic()
    give_up, quiet_since, used = now + MAX_SETTLE_SECONDS, now, processor_seconds(pid)
    while now < min(quiet_since + SETTLE_SECONDS, give_up) and not place.stop.wait(0.5):
        before, now = now, time.monotonic()
        used_before, used = used, processor_seconds(pid)
        if used - used_before > QUIET_SHARE * (now - before):
            quiet_since = now


def processor_seconds(pid: int) -> float:
    """Return what a process has used; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def come_to_rest(place: Place, pid: int, socket_path: Path, before: Sample, begin: float) -> list[str]:
    """Wait until nothing of the callers is left in the daemon; what is left all the same."""
    deadline = time.monotonic() + REST_SECONDS
    while True:
        with place.connect() as client:
            status = client.status()
        now = measure(pid, socket_path, begin)
        left = {
            "chats": status.num_running + status.num_queued,
            # The one connection that asks is there in both counts.
            "descriptors": max(now.num_descriptors - before.num_descriptors - 2, 0),
            "threads": max(now.num_threads - before.num_threads - 16, 0),
        }
        if not any(left.values()):
            return []
        if time.monotonic() > deadline:
            return [f"{count} {name} were left" for name, count in left.items() if count]
        threading.Event().wait(0.5)


def soak(options: argparse.Namespace, directory: Path, signs: LifeSigns) -> int:
    tls_directory = directory / "tls"
    tls_directory.mkdir()
    token_file = directory / "tokens"
    place = Place(
        port=free_port(),
        tls=make_tls_files(tls_directory),
        token_file=token_file,
        token=create_token(token_file, "soak"),
        context_length=CONTEXT,
        stop=threading.Event(),
    )
    daemon = start_daemon(directory, place, options.model, options.threads, signs)
    socket_path = directory / "s"
    door, tally = Door(), Tally()
    callers: list[threading.Thread] = []
    try:
        with place.connect() as client:
            client.count_tokens("Waits until the daemon serves.")
        fill_slots(place)
        settle(place, daemon.pid)
        begin = time.monotonic()
        samples = [measure(daemon.pid, socket_path, begin)]
        callers = [
            threading.Thread(target=visit, args=(place, door, tally, f"{options.seed}/{number}", options.pause))
            for number in range(options.callers)
        ]
        for caller in callers:
            caller.start()
        watch(options, daemon, socket_path, place, samples, door, tally, begin)
        place.stop.set()
        for caller in callers:
            caller.join(60)
        problems = []
        if daemon.poll() is None:
            problems += come_to_rest(place, daemon.pid, socket_path, samples[0], begin)
        with Client(f"unix://{socket_path}") as client:
            status = client.status()
        daemon.terminate()
        if (code := daemon.wait(30)) != 0:
            problems.append(f"the daemon ended with {code}")
        if socket_path.exists():
            problems.append("the socket was left behind")
        problems += [f"{count} x {what}" for what, count in tally.errors.items()]
        print(f"\n{signs.number} signs of life, {signs.longest_seconds:.1f} s apart at most")
        if signs.longest_seconds >= WATCHDOG_SECONDS or not signs.number:
            problems.append(f"the watchdog would have ended it: it allows {WATCHDOG_SECONDS:g} s of silence")
        return report(options, samples, tally, problems, status.num_prompt_tokens, status.num_completion_tokens)
    except Exception:
        print((directory / "log").read_text(errors="replace")[-2000:], file=sys.stderr)
        raise
    finally:
        place.stop.set()
        for caller in callers:
            caller.join(60)
        if daemon.poll() is None:
            daemon.kill()
        daemon.wait()


def fill_slots(place: Place) -> None:
    """Touch all KV once: what is resident from then on has no reason to grow."""
    chance = random.Random(0)
    with ThreadPoolExecutor(SLOTS) as pool:
        for filled in [pool.submit(fill_the_context, place, chance) for _ in range(SLOTS)]:
            filled.result()


def watch(
    options: argparse.Namespace,
    daemon: subprocess.Popen[bytes],
    socket_path: Path,
    place: Place,
    samples: list[Sample],
    door: Door,
    tally: Tally,
    begin: float,
) -> None:
    print("minutes  resident MB  of it KV  descriptors  threads  visits  errors", flush=True)
    end = begin + 60 * options.minutes
    while True:
        sample = samples[-1]
        print(
            f"{sample.seconds / 60:7.1f}  {sample.resident_mb:11.1f}  {sample.kv_mb:8.1f}  {sample.num_descriptors:11}"
            f"  {sample.num_threads:7}  {tally.visits.total():6}  {tally.errors.total():6}",
            flush=True,
        )
        left = end - time.monotonic()
        if left <= 0:
            return
        try:
            code = daemon.wait(min(options.interval, left))
        except subprocess.TimeoutExpired:
            with door.shut():
                settle(place, daemon.pid)
                samples.append(measure(daemon.pid, socket_path, begin))
        else:
            tally.add("daemon", AssertionError(f"it ended with {code}"))
            return


def report(
    options: argparse.Namespace,
    samples: list[Sample],
    tally: Tally,
    problems: list[str],
    num_prompt_tokens: int,
    num_completion_tokens: int,
) -> int:
    growth = growth_percent(samples)
    if options.minutes >= LONG_ENOUGH_MINUTES and growth > MAX_GROWTH_PERCENT:
        problems = [
            *problems,
            f"the resident set grew {growth:.2f} % over the last half; {MAX_GROWTH_PERCENT} is meant",
        ]
    print(f"{tally.visits.total()} visits: " + ", ".join(f"{name} {n}" for name, n in tally.visits.most_common()))
    print(f"{num_prompt_tokens} tokens read, {num_completion_tokens} written in {options.minutes:g} minutes")
    print(
        f"resident {samples[0].resident_mb:.1f} MB at first, {samples[-1].resident_mb:.1f} MB at last, at most "
        f"{samples[-1].peak_mb:.1f} in mid-work; growth over the last half, without KV: {growth:+.2f} %"
    )
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("soak: " + ("failed" if problems else "nothing went wrong, nothing was left behind"))
    return 1 if problems else 0


def main() -> int:
    options = parse(sys.argv[1:])
    # A short path: that of a Unix socket has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="soak.") as directory, LifeSigns(Path(directory) / "notify") as signs:
        return soak(options, Path(directory), signs)


if __name__ == "__main__":
    sys.exit(main())
