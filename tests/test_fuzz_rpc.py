"""A slice of the campaign of `fuzz_rpc.py`: the same cases each time."""

from __future__ import annotations

from pathlib import Path

from fuzz_rpc import FILES, campaign, methods
from hearthd.configuration.roles import METHODS
from serving import asynchronous


def test_every_method_that_the_daemon_serves_is_fuzzed() -> None:
    served = {f"/{method}" for group in METHODS.values() for method in group}
    assert served <= methods().keys()
    assert len(FILES) == 6


def test_daemon_withstands_what_is_no_request(tmp_path: Path) -> None:
    @asynchronous
    async def run() -> None:
        outcome = await campaign(tmp_path, num_cases=1500, seed=7, max_seconds=12)
        assert outcome.faults == []
        assert outcome.num_cases >= 300
        answered = outcome.by_method()
        assert answered.keys() >= methods().keys()
        assert answered["/hearth.v1.ChatService/Chat"]["OK"] > 0
        assert outcome.resident_mb[-1] < outcome.resident_mb[0] + 40

    run()
