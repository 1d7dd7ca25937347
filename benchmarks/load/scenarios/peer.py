"""The same arrivals as `house`, offered to llama-cpp-python's server on the same machine, with the same weights."""

from __future__ import annotations

from typing import Any

from load.arrivals import Arrival
from load.bench import Bench
from load.llama_server import LlamaServer
from load.open_loop import offer
from load.openai_http import ask as ask_over_http
from load.outcome import Outcome
from load.scenarios.house import PATIENCE_SECONDS, arrivals, curves, name_of, texts
from load.server_process import ServerError
from load.summary import summarise
from load.targets import Result


async def run(bench: Bench) -> Result:
    """Offer both rates to it; and the lower one to it as it is by default, where each request ends the one before."""
    if bench.peer is None:
        raise ServerError("llama-cpp-python's server was left out")
    python, model = bench.peer()
    figures: dict[str, Any] = {}
    settings = [(rate, False) for rate in bench.rates] + [(bench.rates[0], True)]
    for rate, interrupts in settings:
        server = LlamaServer(
            python,
            model,
            bench.output / "llama-server.log",
            threads=bench.threads,
            context_length=bench.context_length,
            interrupts=interrupts,
        )
        with server:
            # The first request builds what the others use.
            await ask_over_http(server.port, _body("", "Hello", 2), Outcome("warm-up", 0.0), seconds=60)

            async def ask(arrival: Arrival, due: float, port: int = server.port) -> Outcome:
                body = _body(*texts(arrival), arrival.kind.answer_tokens)
                outcome = Outcome(arrival.caller, due, arrival.kind.priority)
                return await ask_over_http(port, body, outcome, seconds=PATIENCE_SECONDS)

            offered = arrivals(bench, rate)
            how = "with its default, interrupt_requests" if interrupts else "one after the other"
            bench.say(f"peer: {len(offered)} requests at {name_of(rate)}, {how}")
            outcomes = await offer(offered, ask)
            server.check_alive()
            figures[name_of(rate) + (", interrupting" if interrupts else "")] = summarise(outcomes) | {
                "resident_mb": server.resident_bytes / 1e6,
                "curves": curves(outcomes),
            }
    return Result([], figures)


def _body(system: str, question: str, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return {"messages": messages, "max_tokens": max_tokens, "temperature": 0.0}
