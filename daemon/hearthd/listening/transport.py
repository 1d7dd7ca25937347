"""gRPC's own limits and clocks, each with its reason. gRPC ignores a misspelt option silently: tests look at effects.

[M]: measured with grpcio 1.85.1. Called by `grpc_servers`.
"""

from typing import Final

from hearthd.configuration.config import LimitsConfig, ServerConfig

__all__ = ["transport_options"]

# Tokens and trace headers need some hundred bytes; every caller could otherwise make the daemon hold 16 KiB a call.
_MAX_METADATA_BYTES: Final = 8 * 1024
# More than one caller ever needs at once, and with max_connections and max_request_bytes a bound on memory.
_MAX_STREAMS_PER_CONNECTION: Final = 32
_HANDSHAKE_SECONDS: Final = 5
_KEEPALIVE_SECONDS: Final = 10
_PING_TIMEOUT_SECONDS: Final = 5
_IDLE_SECONDS: Final = 15 * 60


def transport_options(server: ServerConfig, limits: LimitsConfig) -> list[tuple[str, int]]:
    """Return the options of one gRPC server."""
    return [
        # Otherwise a second daemon binds the same port without an error, and takes half of the calls [M].
        ("grpc.so_reuseport", 0),
        # A larger request is refused before it is held whole.
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        # Without it, gRPC refuses some of what has 8 to 16 KiB, at random [M]; `max_metadata_size` alone keeps it so.
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.max_concurrent_streams", _MAX_STREAMS_PER_CONNECTION),
        # Callers that connect and say nothing would use up the file descriptors [M].
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_SECONDS * 1000),
        ("grpc.max_allowed_incoming_connections", server.max_connections),
        # A caller who has had nothing to say for so long gives its place to another, and connects again. Not sooner:
        # gRPC tells a Python caller's standard error, and where places run short `connection_guard` makes some.
        ("grpc.max_connection_idle_ms", _IDLE_SECONDS * 1000),
        # A frozen or unplugged caller is found within 15 seconds, and its chat ends. keepalive_timeout alone leaves it
        # for another minute: HTTP/2's own ping timeout comes on top unless it is set too [M].
        ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_SECONDS * 1000),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_SECONDS * 1000),
        ("grpc.http2.max_pings_without_data", 0),
        # A caller that pings each 10 seconds while a long prompt is read, and nothing is sent, must not be cut off for
        # "too many pings"; the option named min_recv_ping_interval_without_data_ms does not help [M].
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]
