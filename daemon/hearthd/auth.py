"""Who calls: every method of a listener behind a token, those that do not exist included.

`TokenInterceptor` decides before anything of the request is read. Knows tokens and no certificates. `server` puts one
in front of each gRPC server, behind the boundary of `statuses`, which tells the caller of a refusal. `service` asks
`caller_identity` and `caller_name`.
"""

import contextvars
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, NoReturn

import grpc

from hearthd.errors import UnauthenticatedError
from hearthd.tokens import Token, TokenFile

__all__ = ["TokenInterceptor", "caller_identity", "caller_name"]

_logger = logging.getLogger(__name__)

_HEALTH_PREFIX: Final = "/grpc.health.v1.Health/"
# Set for one call: gRPC runs interceptors and handler of a call in one task, and each call in a task of its own.
_caller: contextvars.ContextVar[Token | None] = contextvars.ContextVar("caller", default=None)


def caller_identity(context: grpc.aio.ServicerContext) -> str:
    """Name who calls, as far as the server itself has verified it: KV is shared only inside of one identity.

    The token; without one, the address of the other machine, or the Unix socket.
    """
    token = _caller.get()
    if token is not None:
        return f"token:{token.identity}"
    peer: str = context.peer()
    # `ipv4:192.0.2.1:36014`, `ipv6:%5B::1%5D:36014`, `unix:`. The port is another for each connection.
    return peer.rpartition(":")[0] if peer.startswith("ip") else peer


def caller_name() -> str:
    """Name who calls, for the journal."""
    token = _caller.get()
    return token.name if token is not None else "-"


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Asks each call for a token.

    tokens: None lets everybody in. is_required: whether a call without a token is refused; one with a wrong token
    always is. is_health_open: whether the health service is left out of this.
    """

    def __init__(self, tokens: TokenFile | None, *, is_required: bool, is_health_open: bool) -> None:
        self._tokens = tokens
        self._is_required = is_required
        self._is_health_open = is_health_open

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return the method's handler, or one that refuses the call."""
        if self._tokens is not None and not self._may_call(self._tokens, handler_call_details):
            # A stream, whatever the method is: its handler runs before the request is read, and a caller who is not
            # let in can neither send anything that is kept nor learn which methods there are.
            return grpc.stream_stream_rpc_method_handler(_refuse)
        return await continuation(handler_call_details)

    def _may_call(self, tokens: TokenFile, details: grpc.HandlerCallDetails) -> bool:
        given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
        if not given:
            is_open = self._is_health_open and details.method.startswith(_HEALTH_PREFIX)
            return is_open or not self._is_required
        if len(given) > 1 or not isinstance(given[0], str):
            return False
        scheme, _, secret = given[0].partition(" ")
        token = tokens.find(secret.strip()) if scheme.lower() == "bearer" else None
        _caller.set(token)
        return token is not None


async def _refuse(_requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> NoReturn:
    # The method's name is the caller's text, so it is not told.
    _logger.info("a call without a valid token from %s was refused", context.peer())
    raise UnauthenticatedError(
        "no valid token: send the metadata `authorization: Bearer TOKEN`; `hearthd token create NAME` makes a token"
    )
