"""Raw protobuf against every method of a real daemon: `python tests/fuzz_rpc.py [--cases 100000] [--seed 1]`.

A case is a method, which every descriptor that the daemon serves names, and bytes: a message made of boundary values,
or such a message broken at random. What must come back is a documented status, whose text tells nothing of the
inside; afterwards the daemon answers as before, its log has no incident and none of the strings that were sent, and its
resident set has not grown. `test_fuzz_rpc.py` runs a slice of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from hearth.v1 import chat_pb2, model_pb2, pairing_pb2, status_pb2
from hearthd.__main__ import run_server
from hearthd.access.tokens import create_token
from hearthd.logs import configure_logging
from serving import answer, chat_request, make_config, make_model, make_runner, unix_target

FILES = (chat_pb2, model_pb2, pairing_pb2, status_pb2, health_pb2, reflection_pb2)
# Of characters that no request_id may have: that one is logged, as the protos say.
CANARY = "zq~canary~93"
Code = grpc.StatusCode
# Of every method; the protos say when. UNIMPLEMENTED: of methods that are not there, and reflection's older fields.
DOCUMENTED = frozenset(
    {
        Code.OK,
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.RESOURCE_EXHAUSTED,
        Code.UNIMPLEMENTED,
        Code.UNAUTHENTICATED,
        Code.PERMISSION_DENIED,
    }
)
INSIDE = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/work/|/usr/|/home/|object at|0x[0-9a-f]{6}|hearthd\.[a-z]"
)
POLICY = """
[[system]]
prompt = "Be kind."
[[blocked]]
name = "input"
on = "input"
phrases = ["forbidden", "a?b*c"]
[[blocked]]
name = "output"
on = "output"
phrases = ["the"]
action = "replace"
text = "..."
"""
STRINGS = (
    "",
    "a",
    "hello",
    CANARY,
    "test-model",
    "<|im_start|>system\n",
    "<|im_end|>",
    "\0",
    "\u202e\u200b\ufeff",
    "e" + "\u0301" * 40,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "{{ messages }}{% for x in y %}",
    "../../etc/passwd",
    "%s%n%x",
    "' OR 1=1 --",
    "forbidden",
    "hearth.v1.ChatService",
    "hearth/v1/chat.proto",
    "grpc.health.v1.Health",
)
LONG_STRINGS = ("a" * 5000, "ab " * 20000, "\u0301" * 3000)
INTEGERS = (0, 1, 2, 3, 5, 20, 63, 64, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, -1, -2, -(2**31))
NUMBERS = (0.0, -0.0, 0.5, 1.0, 2.0, 1e-45, 1e38, -1.0, math.inf, -math.inf, math.nan, 3.5)


def methods() -> dict[str, MethodDescriptor]:
    return {
        f"/{service.full_name}/{method.name}": method
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


class Generator:
    """Makes cases from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def message(self, descriptor: Descriptor, depth: int = 0) -> Message:
        message = message_factory.GetMessageClass(descriptor)()
        for each in descriptor.fields:
            if self.random.random() < 0.35:
                continue
            if each.is_repeated:
                many = self.random.choice((0, 1, 1, 2, 3, 17, 300)) if depth < 2 else 1
                for _ in range(many):
                    self._add(getattr(message, each.name), each, depth)
            elif each.message_type is not None:
                if depth < 5:
                    getattr(message, each.name).CopyFrom(self.message(each.message_type, depth + 1))
            else:
                setattr(message, each.name, self._value(each))
        return message

    def _add(self, values: Any, each: FieldDescriptor, depth: int) -> None:
        if each.message_type is not None:
            values.append(self.message(each.message_type, depth + 1))
        else:
            values.append(self._value(each))

    def _value(self, each: FieldDescriptor) -> Any:
        choose = self.random.choice
        match each.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING:
                strings = LONG_STRINGS if self.random.random() < 0.01 else STRINGS
                text = choose(strings) + choose(("", "", choose(STRINGS)))
                return text.encode() if each.type == FieldDescriptor.TYPE_BYTES else text
            case FieldDescriptor.CPPTYPE_BOOL:
                return choose((True, False))
            case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
                return choose(NUMBERS) if self.random.random() < 0.7 else self.random.uniform(-3, 3)
            case FieldDescriptor.CPPTYPE_ENUM:
                return choose((0, 1, 2, 2, 2, 3, 4, 99, -1, 2**31 - 1))
            case FieldDescriptor.CPPTYPE_INT32:
                return self._fitting(-(2**31), 2**31 - 1)
            case FieldDescriptor.CPPTYPE_UINT32:
                return self._fitting(0, 2**32 - 1)
            case FieldDescriptor.CPPTYPE_INT64:
                return self._fitting(-(2**63), 2**63 - 1)
            case _:
                return self._fitting(0, 2**64 - 1)

    def _fitting(self, low: int, high: int) -> int:
        return self.random.choice([number for number in INTEGERS if low <= number <= high])

    def valid_chat(self) -> Message:
        """Return a chat that gets as far as the model."""
        options: dict[str, Any] = {"max_tokens": self.random.choice((1, 2, 8, 30))}
        if self.random.random() < 0.5:
            options["temperature"] = self.random.choice((0.0, 0.7, 2.0))
        if self.random.random() < 0.3:
            options["stop"] = [self.random.choice(("a", "\u00e9", "<|im_end|>", CANARY))]
        return chat_request(self.random.choice([each for each in STRINGS if 0 < len(each) < 100]), **options)

    def data(self, path: str, method: MethodDescriptor) -> bytes:
        if path.endswith("/Chat") and self.random.random() < 0.15:
            data = self.valid_chat().SerializeToString()
        else:
            data = self.message(method.input_type).SerializeToString()
        return data if self.random.random() < 0.5 else self.broken(data)

    def broken(self, data: bytes) -> bytes:
        bytes_, random_ = bytearray(data), self.random
        for _ in range(random_.choice((1, 1, 2, 8))):
            place = random_.randrange(len(bytes_) + 1)
            match random_.randrange(8):
                case 0 if bytes_:
                    bytes_[place % len(bytes_)] ^= 1 << random_.randrange(8)
                case 1:
                    del bytes_[place:]
                case 2:
                    bytes_[place:place] = random_.randbytes(random_.choice((1, 3, 40)))
                case 3:  # a length that is not there
                    bytes_[place:place] = bytes([random_.choice((0x0A, 0x12, 0x1A, 0x52))]) + b"\xff\xff\xff\xff\x0f"
                case 4:  # deep nesting
                    bytes_[place:place] = b"\x0b" * random_.choice((5, 200))
                case 5:  # the same once more
                    bytes_ += bytes_[: min(place, 20_000)]
                case 6:  # another wire type
                    bytes_[place:place] = struct.pack("<Bd", random_.randrange(256), random_.choice(NUMBERS))
                case _:  # not UTF-8
                    bytes_[place:place] = b"\x0a\x02\xc3\x28"
        return bytes(bytes_)

    def path(self) -> str:
        """Return the name of a method that is not there, or of one that is, spelled otherwise."""
        known = self.random.choice(list(methods()))
        return self.random.choice(
            (
                known.lower(),
                known + "x",
                "/x/y",
                "/" + CANARY + "/M",
                known.replace("/", "//"),
                "/hearth.v1.ChatService/",
            )
        )


@dataclass(slots=True)
class Outcome:
    """What a campaign has found."""

    num_cases: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "cases": self.num_cases,
            "seconds": round(self.seconds, 1),
            "statuses": {path: dict(codes) for path, codes in self.by_method().items()},
            "resident_mb": [round(each, 1) for each in self.resident_mb],
            "faults": len(self.faults),
            "first_faults": self.faults[:10],
        }

    def by_method(self) -> dict[str, Counter[str]]:
        found: dict[str, Counter[str]] = {}
        for key, count in sorted(self.codes.items()):
            path, _, code = key.partition(" ")
            found.setdefault(path, Counter())[code] = count
        return found


async def call(channel: grpc.aio.Channel, path: str, data: list[bytes], metadata: Any, take: int) -> grpc.StatusCode:
    """Make one call with raw bytes, read so many answers at most, then cancel. Raises AioRpcError."""
    # One message travels with the call's beginning. Of several, a later one may come when the call has been refused;
    # grpc.aio then forgets what the refusal was.
    if len(data) == 1:
        stream = channel.unary_stream(path)(data[0], metadata=metadata, timeout=60)
    else:
        stream = channel.stream_stream(path)(iter(data), metadata=metadata, timeout=60)
    for _ in range(take):
        if await stream.read() is grpc.aio.EOF:
            return Code(await stream.code()) if await stream.code() else Code.OK
    stream.cancel()
    return Code.OK


async def one_case(generator: Generator, channel: grpc.aio.Channel, outcome: Outcome) -> None:
    known = methods()
    chosen = generator.random.random()
    if chosen < 0.03:
        path, data = generator.path(), [generator.random.randbytes(20)]
    else:
        # Most of what can go wrong is in Chat.
        path = generator.random.choice([*known, *["/hearth.v1.ChatService/Chat"] * 4])
        data = [generator.data(path, known[path])]
        if known[path].client_streaming:
            data += [generator.data(path, known[path]) for _ in range(generator.random.choice((0, 1, 3)))]
        elif chosen > 0.98:
            data = data * generator.random.choice((0, 2))
    metadata = []
    if generator.random.random() < 0.05:
        key = generator.random.choice(("authorization", "x-a", "grpc-timeout-x", "x-bin", "user-agent-x"))
        pairing = f"Bearer pair_{generator.random.choice(('', 'AAAA', CANARY, 'A' * 20, 'A' * 2000))}"
        value: Any = generator.random.choice(("Bearer " + CANARY, pairing, pairing, "", "x" * 3000))
        metadata = [(key, value.encode() if key.endswith("-bin") else value)]
    shown = path if path in known else "unknown"
    take = 1 if path.endswith("/Watch") else generator.random.choice((1, 1000, 1000))
    try:
        code, details = await call(channel, path, data, metadata, take), ""
    except grpc.aio.AioRpcError as error:
        code, details = error.code(), error.details() or ""
        if details == "Internal error from Core" and len(data) > 1:
            outcome.num_cases += 1
            outcome.codes[f"{shown} (refused before its end)"] += 1
            return
        trailers = repr(error.trailing_metadata())
        if INSIDE.search(details + trailers) or CANARY in details + trailers:
            outcome.faults.append(f"{shown} {code.name} tells {details[:200]!r} {trailers[:200]}")
    outcome.num_cases += 1
    outcome.codes[f"{shown} {code.name}"] += 1
    if code not in DOCUMENTED:
        outcome.faults.append(f"{shown} answers {code.name}: {details[:200]!r} to {[each[:80] for each in data[:2]]}")


class Daemon:
    """A daemon of its own process, whose log is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve", str(directory)], stderr=log, stdin=subprocess.DEVNULL
            )

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE") / 1e6

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


async def campaign(
    directory: Path,
    *,
    num_cases: int,
    seed: int,
    max_seconds: float,
    concurrency: int = 16,
    samples: int = 20,
    show: bool = False,
) -> Outcome:
    """Run the cases, as many as there is time for; what is wrong stands in the outcome's faults."""
    outcome, daemon, started = Outcome(), Daemon(directory), time.monotonic()
    target = unix_target(daemon_config(directory))
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            await asyncio.wait_for(channel.channel_ready(), 60)
            await sane(channel)
            left = iter(range(num_cases))

            async def work(number: int) -> None:
                generator = Generator(seed * 1000 + number)
                for place in left:
                    if time.monotonic() - started > max_seconds:
                        return
                    await one_case(generator, channel, outcome)
                    if place % max(num_cases // samples, 1) == 0:
                        outcome.resident_mb.append(daemon.resident_mb())
                        if show:
                            print(f"{place} cases, {outcome.resident_mb[-1]:.1f} MB", file=sys.stderr, flush=True)

            await asyncio.gather(*(work(number) for number in range(concurrency)))
            outcome.resident_mb.append(daemon.resident_mb())
            await sane(channel)
    finally:
        outcome.seconds = time.monotonic() - started
        if (code := daemon.stop()) != 0:
            outcome.faults.append(f"the daemon ended with {code}")
    for file in (daemon.log, directory / "audit.jsonl"):
        text = file.read_text(encoding="utf-8", errors="replace")
        outcome.faults += [f"{file.name} has {word}" for word in (CANARY, "incident", "Traceback") if word in text]
    return outcome


async def sane(channel: grpc.aio.Channel) -> None:
    """Ask as a good caller does, while all that was left behind ends."""
    async with asyncio.timeout(60):
        while True:
            try:
                _, final = await answer(channel, chat_request("hello", max_tokens=4))
            except grpc.aio.AioRpcError as error:
                if error.code() is not Code.RESOURCE_EXHAUSTED and error.code() is not Code.UNAVAILABLE:
                    raise
                continue
            assert final.usage.completion_tokens > 0
            return


def daemon_config(directory: Path) -> Any:
    return make_config(
        directory,
        engine={"slots": 4},
        limits={"max_queued": 16},
        auth={"token_file": directory / "tokens", "open_role": "admin", "usage_file": None},
        policy={"file": directory / "policy.toml"},
        audit={"file": directory / "audit.jsonl"},
    )


def serve(directory: Path) -> int:
    configure_logging("debug")
    (directory / "policy.toml").write_text(POLICY)
    create_token(directory / "tokens", "a")
    runner = make_runner(num_slots=4)
    # The real one keeps no list of what it ran, which would pass for a leak.
    runner.calls = deque(maxlen=8)  # type: ignore[assignment]
    return run_server(daemon_config(directory), lambda _: make_model(runner))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="at most")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve:
        code = serve(parsed.serve)
        sys.stderr.flush()
        os._exit(code)
    with tempfile.TemporaryDirectory() as directory:
        outcome = asyncio.run(
            campaign(Path(directory), num_cases=parsed.cases, seed=parsed.seed, max_seconds=parsed.seconds, show=True)
        )
    print(json.dumps(outcome.summary(), indent=1))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
