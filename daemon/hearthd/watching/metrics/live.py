"""What is looked up when somebody asks for the metrics: the daemon's status, as gauges and counters.

One source for both: what `hearth status` shows and what Prometheus stores cannot disagree. Made by `observation`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hearth.v1 import status_pb2

__all__ = ["LiveFigures"]

_PRIORITIES: Final = ("interactive", "normal", "background")
_STATES: Final = {
    "loading": status_pb2.DAEMON_STATE_LOADING,
    "serving": status_pb2.DAEMON_STATE_SERVING,
    "draining": status_pb2.DAEMON_STATE_DRAINING,
}
_FLAGS: Final = {
    "under_voltage": status_pb2.BOARD_FLAG_UNDER_VOLTAGE,
    "frequency_capped": status_pb2.BOARD_FLAG_FREQUENCY_CAPPED,
    "throttled": status_pb2.BOARD_FLAG_THROTTLED,
    "soft_temperature_limit": status_pb2.BOARD_FLAG_SOFT_TEMPERATURE_LIMIT,
}


class LiveFigures(Collector):
    """Turns a status into metrics, anew at each question. Of the event loop, as the status is."""

    def __init__(
        self, describe: Callable[[], status_pb2.GetStatusResponse], num_audit_lines_lost: Callable[[], int]
    ) -> None:
        self._describe = describe
        self._num_audit_lines_lost = num_audit_lines_lost

    def collect(self) -> Iterator[Metric]:
        """Yield every metric."""
        status = self._describe()
        yield _gauge("hearth_info", "1, with the daemon's version.", ("version",), [((status.version,), 1)])
        states = [((name,), status.state == state) for name, state in _STATES.items()]
        yield _gauge("hearth_state", "1 for what the daemon does now, 0 for the others.", ("state",), states)
        yield _gauge("hearth_warnings", "Lines of warning in the status.", (), [((), len(status.warnings))])
        yield from _chats(status)
        yield from _tokens(status)
        yield from _models(status)
        yield _gauge("hearth_kv_bytes", "Memory of key-value caches in use.", (), [((), status.kv_bytes)])
        if status.max_kv_bytes:
            yield _gauge("hearth_max_kv_bytes", "The most that it may be.", (), [((), status.max_kv_bytes)])
        yield _counter(
            "hearth_audit_lines_lost",
            "Lines of the audit log that could not be written.",
            (),
            [((), self._num_audit_lines_lost())],
        )
        yield from _board(status.board)


def _chats(status: status_pb2.GetStatusResponse) -> Iterator[Metric]:
    by_priority = {name: getattr(status, name) for name in _PRIORITIES}
    for what, text in (
        ("running", "Chats that run now."),
        ("queued", "Chats that wait now."),
        ("paused", "Chats that have begun and stand aside now."),
    ):
        samples = [((name,), getattr(counts, f"{what}_count")) for name, counts in by_priority.items()]
        yield _gauge(f"hearth_{what}_chats", text, ("priority",), samples)
    yield _gauge("hearth_max_running_chats", "Chats that can run at once.", (), [((), status.max_running)])
    yield _gauge("hearth_max_queued_chats", "Chats that may wait.", (), [((), status.max_queued)])


def _tokens(status: status_pb2.GetStatusResponse) -> Iterator[Metric]:
    from_disk = status.cached_prompt_tokens_from_disk_count
    yield _counter(
        "hearth_prompt_tokens",
        "Tokens of prompts, cached ones included, of all chats that got a place.",
        (),
        [((), status.prompt_tokens_count)],
    )
    yield _counter(
        "hearth_cached_prompt_tokens",
        "Those of them that were not computed again, by where they were kept.",
        ("source",),
        [(("memory",), status.cached_prompt_tokens_count - from_disk), (("disk",), from_disk)],
    )
    yield _counter(
        "hearth_completion_tokens",
        "Tokens of answers, as they are written.",
        (),
        [((), status.completion_tokens_count)],
    )
    yield _counter("hearth_drafted_tokens", "Tokens that were guessed ahead.", (), [((), status.drafted_tokens_count)])
    yield _counter(
        "hearth_accepted_tokens",
        "Those of them that the model would have chosen itself.",
        (),
        [((), status.accepted_tokens_count)],
    )


def _models(status: status_pb2.GetStatusResponse) -> Iterator[Metric]:
    loaded = [((model.name,), model.is_loaded) for model in status.models]
    loads = [((model.name,), model.load_count) for model in status.models]
    yield _gauge("hearth_model_loaded", "Whether a model is in memory.", ("model",), loaded)
    yield _counter("hearth_model_loads", "Times that a model was loaded.", ("model",), loads)


def _board(board: status_pb2.BoardStatus) -> Iterator[Metric]:
    if board.HasField("temperature_celsius"):
        temperature = [((), board.temperature_celsius)]
        yield _gauge("hearth_temperature_celsius", "Of the processor's hottest sensor.", (), temperature)
    if board.has_flags:
        for name, flags, when in (
            ("hearth_throttled", board.flags, "now"),
            ("hearth_throttled_since_start", board.flags_since_start, "at some time since the board was started"),
        ):
            samples = [((flag,), number in flags) for flag, number in _FLAGS.items()]
            yield _gauge(name, f"What the board's firmware reports, {when}.", ("flag",), samples)
    yield _gauge(
        "hearth_thermal_level",
        "What the daemon holds back because of heat: 0 nothing, 1 chats, 2 threads, 3 pauses.",
        (),
        [((), board.thermal_level)],
    )


_Samples = Iterable[tuple[tuple[str, ...], float]]


def _gauge(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], samples: _Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family
