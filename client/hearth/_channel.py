"""Channels to a daemon, and what they are told about time, names and proxies.

The only place that knows gRPC's channel options. They are tested by their effect (tests/test_client_connection.py):
gRPC ignores a misspelt one without a word. Called by `Client` and `AsyncClient`.
"""

from typing import Any

from hearth._grpc import aio, grpc
from hearth._settings import Settings


def channel_options(settings: Settings) -> list[tuple[str, int | str]]:
    """gRPC's options for these settings."""
    # A paired daemon's certificate is the only one that is accepted, so what matters is that it is this one, and not
    # which address the router has given the board today: look for a name that stands in it.
    pinned = [("grpc.ssl_target_name_override", settings.server_name)] if settings.server_name else []
    keepalive_ms = max(1, round(settings.keepalive * 1000))
    return [
        *pinned,
        ("grpc.primary_user_agent", "hearth-python"),
        # A running call asks for a sign of life. In gRPC 1.85 the third bounds the wait for it, and the second, which
        # is the documented one, does nothing. Without the fourth, gRPC stops asking after two pings in a silence: a
        # daemon that dies in a long prefill would be noticed only at the deadline.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", max(1, keepalive_ms // 2)),
        ("grpc.http2.ping_timeout_ms", max(1, keepalive_ms // 2)),
        ("grpc.http2.max_pings_without_data", 0),
        # A daemon that is being started is reached soon after it listens. The second is also the longest that one
        # attempt to connect may take: less than a small call has, so that a silent peer is told from a slow answer.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", max(1, keepalive_ms * 3 // 4)),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # http_proxy would carry even calls to 127.0.0.1, and their token, through the proxy.
        ("grpc.enable_http_proxy", 0),
        # Clients share no connection, so neither its state nor its failures.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def call_metadata(settings: Settings) -> tuple[tuple[str, str], ...]:
    """What goes with each call."""
    return (("authorization", f"Bearer {settings.token}"),) if settings.token else ()


def _credentials(settings: Settings) -> Any:
    own = settings.own
    return grpc.ssl_channel_credentials(settings.ca, own and own.key, own and own.chain)


def open_channel(settings: Settings) -> Any:
    """A grpc.Channel. Nothing is sent yet."""
    options = channel_options(settings)
    if settings.ca is None:
        return grpc.insecure_channel(settings.address.target, options)
    return grpc.secure_channel(settings.address.target, _credentials(settings), options)


def open_async_channel(settings: Settings) -> Any:
    """A grpc.aio.Channel of the running event loop. Nothing is sent yet."""
    options = channel_options(settings)
    if settings.ca is None:
        return aio.insecure_channel(settings.address.target, options)
    return aio.secure_channel(settings.address.target, _credentials(settings), options)
