"""Limits of a role: rates by a monotonic clock, chats at once, a daily quota that a restart does not forget."""

import asyncio
import datetime
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hearthd.access import daily_usage
from hearthd.access.caller import Caller
from hearthd.access.daily_usage import DailyUsage
from hearthd.access.forward_clock import ForwardClock
from hearthd.access.metering import Meters
from hearthd.access.token_bucket import TokenBucket
from hearthd.configuration.roles import Role
from hearthd.durable_file import replace_file
from hearthd.errors import QuotaExceededError

NOON = datetime.datetime(2026, 11, 22, 12).timestamp()


class Times:
    """Two clocks that go by hand."""

    def __init__(self, wall: float = NOON) -> None:
        self.wall = wall
        self.monotonic = 0.0

    def __call__(self) -> float:
        return self.monotonic

    def read_wall(self) -> float:
        return self.wall


def caller(name: str = "phone", **limits: Any) -> Caller:
    return Caller(name, "guest", f"token:{name}", f"token:{name}/1", Role(**limits))


def make_meters(times: Times, path: Path | None = None) -> tuple[Meters, DailyUsage]:
    daily = DailyUsage(path, times.read_wall)
    return Meters(daily, times), daily


# The bucket.


def test_a_bucket_gives_its_whole_minute_at_once_and_then_one_at_a_time() -> None:
    bucket = TokenBucket(6, now=100.0)
    for _ in range(6):
        assert bucket.seconds_until(1, 100.0) == 0
        bucket.take(1, 100.0)
    assert bucket.seconds_until(1, 100.0) == pytest.approx(10)
    assert bucket.seconds_until(1, 104.0) == pytest.approx(6)
    assert bucket.seconds_until(1, 110.001) == 0
    bucket.take(1, 110.001)
    assert bucket.seconds_until(6, 110.001) == pytest.approx(60, abs=0.01)


def test_a_debt_is_waited_for() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(160, 0.0)
    assert bucket.seconds_until(1, 0.0) == pytest.approx(101)
    assert bucket.seconds_until(1, 101.0) == 0


@given(st.integers(1, 1000), st.lists(st.floats(0, 100), max_size=60))
def test_no_schedule_of_calls_gets_more_than_the_rate_and_one_burst(per_minute: int, gaps: list[float]) -> None:
    bucket, now, num_taken = TokenBucket(per_minute, now=0.0), 0.0, 0
    for gap in gaps:
        now += gap
        while bucket.seconds_until(1, now) == 0:
            bucket.take(1, now)
            num_taken += 1
        assert num_taken <= per_minute * (1 + now / 60) + 1e-6
        # Whoever waits as long as it was told is let in.
        later = now + bucket.seconds_until(1, now) + 1e-6
        assert replace_clock(bucket, later) == 0


def replace_clock(bucket: TokenBucket, now: float) -> float:
    """Ask a copy, so that the asking changes nothing."""
    copy = TokenBucket(bucket.per_minute, now)
    copy._level, copy._at = bucket._level, bucket._at
    return copy.seconds_until(1, now)


# Rates and chats at once.


def test_calls_over_the_rate_are_refused_with_the_time_to_wait() -> None:
    times = Times()
    meters, _ = make_meters(times)
    phone, tablet = caller(requests_per_minute=30), caller("tablet", requests_per_minute=30)
    for _ in range(30):
        meters.count_request(phone)
    with pytest.raises(QuotaExceededError) as caught:
        meters.count_request(phone)
    assert caught.value.retry_after_seconds == pytest.approx(2)
    assert (caught.value.caller, caught.value.limit) == ("phone", "requests_per_minute = 30 of role guest")
    assert str(caught.value) == (
        "phone has made its 30 calls of a minute (requests_per_minute of role guest); try again in 2 seconds"
    )
    meters.count_request(tablet)
    times.monotonic += 2.001
    meters.count_request(phone)


def test_tokens_of_a_minute_are_paid_afterwards() -> None:
    times = Times()
    meters, _ = make_meters(times)
    phone = caller(tokens_per_minute=100)
    with meters.admit_chat(phone) as meter:
        meter.charge_up_to(40)
        meter.charge_up_to(40)
        meter.charge_up_to(250)
    with pytest.raises(QuotaExceededError, match="has used its 100 tokens of a minute") as caught:
        meters.admit_chat(phone)
    assert caught.value.retry_after_seconds == pytest.approx(151 * 0.6)
    assert str(caught.value).endswith("try again in 2 minutes")
    times.monotonic += 151 * 0.6
    with meters.admit_chat(phone):
        pass


def test_chats_at_once_are_counted_until_they_end_however_they_end() -> None:
    meters, _ = make_meters(Times())
    phone = caller(max_concurrent_chats=2)
    with meters.admit_chat(phone):
        second = meters.admit_chat(phone)
        with pytest.raises(QuotaExceededError, match="has 2 chats at once, the most that it may") as caught:
            meters.admit_chat(phone)
        assert caught.value.retry_after_seconds == 1
        with meters.admit_chat(caller("tablet", max_concurrent_chats=2)):
            pass
        with pytest.raises(RuntimeError), second:
            raise RuntimeError
        with meters.admit_chat(phone):
            pass


def test_a_rate_that_the_configuration_changes_holds_at_once() -> None:
    meters, _ = make_meters(Times())
    phone = caller(requests_per_minute=1)
    meters.count_request(phone)
    meters.count_request(replace(phone, rights=Role(requests_per_minute=2)))
    with pytest.raises(QuotaExceededError):
        meters.count_request(phone), meters.count_request(phone)
    meters.count_request(replace(phone, rights=Role()))


def test_without_limits_nothing_is_counted_or_written(tmp_path: Path) -> None:
    meters, daily = make_meters(Times(), tmp_path / "usage.json")
    for _ in range(1000):
        meters.count_request(caller())
        with meters.admit_chat(caller()) as meter:
            meter.charge_up_to(10**6)
    asyncio.run(daily.save())
    assert list(tmp_path.iterdir()) == []


# The daily quota.


def use(meters: Meters, who: Caller, num_tokens: int) -> None:
    with meters.admit_chat(who) as meter:
        meter.charge_up_to(num_tokens)


def test_a_daily_quota_ends_at_midnight() -> None:
    times = Times()
    meters, _ = make_meters(times)
    phone = caller(tokens_per_day=1000)
    use(meters, phone, 999)
    use(meters, phone, 5)
    with pytest.raises(QuotaExceededError, match="has used its 1000 tokens of today") as caught:
        meters.admit_chat(phone)
    assert caught.value.retry_after_seconds == 12 * 3600
    assert str(caught.value).endswith("try again in 12 hours")
    use(meters, caller("tablet", tokens_per_day=1000), 1)
    times.wall += 12 * 3600
    use(meters, phone, 1)


def test_a_restart_forgets_no_quota(tmp_path: Path) -> None:
    path, times = tmp_path / "state/usage.json", Times()
    meters, daily = make_meters(times, path)
    phone = caller(tokens_per_day=1000)
    use(meters, phone, 1000)
    asyncio.run(daily.save())
    again, _ = make_meters(times, path)
    with pytest.raises(QuotaExceededError):
        again.admit_chat(phone)
    times.wall += 86400
    tomorrow, _ = make_meters(times, path)
    use(tomorrow, phone, 1)


def test_a_running_chat_is_charged_before_it_ends(tmp_path: Path) -> None:
    """A crash loses what came since the last save, and not whole answers."""
    path, times = tmp_path / "usage.json", Times()
    meters, daily = make_meters(times, path)
    with meters.admit_chat(caller(tokens_per_day=1000)) as meter:
        meter.charge_up_to(321)
        asyncio.run(daily.save())
        assert make_meters(times, path)[1].used("token:phone") == 321


def test_what_has_changed_is_saved_within_the_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert daily_usage.SAVE_SECONDS <= 30
    monkeypatch.setattr(daily_usage, "SAVE_SECONDS", 0.001)

    async def run() -> None:
        path, loop, written = tmp_path / "usage.json", asyncio.get_running_loop(), asyncio.Event()

        def replace_and_tell(path: Path, data: bytes) -> None:
            replace_file(path, data)
            loop.call_soon_threadsafe(written.set)

        monkeypatch.setattr(daily_usage, "replace_file", replace_and_tell)
        daily = DailyUsage(path)
        saving = asyncio.create_task(daily.keep_saving())
        async with asyncio.timeout(10):
            for total in (7, 14):
                daily.add("token:phone", 7)
                await written.wait()
                written.clear()
                assert DailyUsage(path).used("token:phone") == total
        saving.cancel()
        await asyncio.gather(saving, return_exceptions=True)

    asyncio.run(run())


def test_a_clock_that_is_set_back_gives_no_day_twice_and_one_that_was_ahead_takes_no_day(tmp_path: Path) -> None:
    path, times = tmp_path / "usage.json", Times()
    clock = ForwardClock(times.read_wall, times)
    daily = DailyUsage(path, clock.now)
    daily.add("token:phone", 10)
    times.wall -= 365 * 86400
    assert daily.used("token:phone") == 10
    times.wall += 2 * 365 * 86400
    assert daily.used("token:phone") == 0
    daily.add("token:phone", 3)
    asyncio.run(daily.save())
    # Set right again and restarted: the day of the file lies in the future.
    times.wall = NOON
    again = DailyUsage(path, times.read_wall)
    assert again.used("token:phone") == 3
    times.wall += 86400
    assert again.used("token:phone") == 0


@pytest.mark.parametrize(("day", "hours"), [("2026-03-29", 23), ("2026-10-25", 25), ("2026-06-01", 24)])
def test_a_day_with_a_change_of_summer_time_ends_at_its_midnight(
    monkeypatch: pytest.MonkeyPatch, day: str, hours: int
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        midnight = datetime.datetime.fromisoformat(day).timestamp()
        daily = DailyUsage(None, lambda: midnight)
        assert daily.seconds_left() == hours * 3600
    finally:
        monkeypatch.undo()
        time.tzset()


WRITTEN = {"version": 1, "day": "2026-11-22", "tokens": {"token:phone": 5}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b" " * (2**20 + 1),
        json.dumps(WRITTEN | {"version": 2}).encode(),
        json.dumps(WRITTEN | {"day": "today"}).encode(),
        json.dumps(WRITTEN | {"day": 1}).encode(),
        json.dumps(WRITTEN | {"tokens": {"token:phone": -1}}).encode(),
        json.dumps(WRITTEN | {"tokens": {"token:phone": 0.5}}).encode(),
        json.dumps(WRITTEN | {"tokens": []}).encode(),
    ],
    ids=range(12),
)
def test_a_damaged_file_is_told_and_counts_as_empty(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path, times = tmp_path / "usage.json", Times()
    path.write_bytes(data)
    daily = DailyUsage(path, times.read_wall)
    assert daily.used("token:phone") == 0
    assert "cannot be read, today's counts begin at 0" in caplog.text
    daily.add("token:phone", 6)
    asyncio.run(daily.save())
    assert DailyUsage(path, times.read_wall).used("token:phone") == 6


@given(
    st.recursive(
        st.none() | st.integers() | st.text() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_json_is_usage_or_refused(content: Any) -> None:
    for each in (content, WRITTEN | {"tokens": content}, WRITTEN | {"day": content}):
        try:
            day, tokens = daily_usage._parse(json.dumps(each).encode())
        except ValueError:
            continue
        assert isinstance(day, datetime.date)
        assert all(type(count) is int and count >= 0 for count in tokens.values())


def test_a_disk_that_cannot_be_written_is_told_once_and_counting_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    daily = DailyUsage(tmp_path / "elsewhere/usage.json", Times().read_wall)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "file")
    for _ in range(3):
        daily.add("token:phone", 2)
        asyncio.run(daily.save())
    assert caplog.text.count("cannot be written") == 1
    assert daily.used("token:phone") == 6
    (tmp_path / "elsewhere").unlink()
    asyncio.run(daily.save())
    assert DailyUsage(tmp_path / "elsewhere/usage.json", Times().read_wall).used("token:phone") == 6
