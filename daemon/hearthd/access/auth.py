"""Who calls, and whether they may: every method of every listener, those that do not exist included.

A caller is whoever its token names, else whoever its client certificate names, which the TLS handshake has verified;
on a listener that asks for neither, everybody is the same caller, with the role `auth.open_role`. All of this is
decided before anything of the request is read, anew at each call: what was revoked or has expired ends then, on
connections that stay open too. What goes on for as long as the caller likes is asked again every few seconds; an answer
that was begun is finished. Whoever has no right to call gets the same answer from every method, and learns nothing.

There is one `Authenticator`; `grpc_servers` puts an `AccessInterceptor` in front of each gRPC server, behind the
boundary of `statuses`, which tells callers of refusals. `caller` holds the outcome; `metering` counts the call.
"""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

import grpc

from hearthd.access.caller import Caller, set_caller
from hearthd.access.forward_clock import ForwardClock
from hearthd.access.metering import Meters
from hearthd.access.peer_certificate import find_names, has_expired
from hearthd.access.tokens import TokenFile
from hearthd.configuration.config import AuthConfig
from hearthd.configuration.roles import ENDLESS_METHODS, HEALTH, METHODS, NO_RIGHTS, Role
from hearthd.errors import InvalidRequestError, NotPermittedError, UnauthenticatedError, UnknownMethodError
from hearthd.listening.connection_guard import ConnectionGuard

__all__ = ["AccessInterceptor", "Authenticator"]

_logger = logging.getLogger(__name__)

_NOBODY: Final = "-"
_OPEN: Final = "open"
_SECONDS_BETWEEN_LINES: Final = 1.0
# After a revocation, a Watch goes on for so long at most.
_SECONDS_BETWEEN_LOOKS: Final = 5.0


class Authenticator:
    """Finds out who calls. One for all listeners; `update` gives it another configuration between two calls."""

    def __init__(self, auth: AuthConfig, roles: Mapping[str, Role]) -> None:
        """Raises ConfigError if the token file cannot be used."""
        self._clock = ForwardClock()
        self._num_untold = 0
        self._tell_from = -math.inf
        # For good: whoever takes the last credential out of a running daemon's configuration shuts TCP, and does not
        # open it to everybody. What may be open is decided at the start (`listeners`).
        self._may_tcp_be_open = auth.token_file is None and not auth.certificates
        self.update(auth, roles)

    def update(self, auth: AuthConfig, roles: Mapping[str, Role]) -> None:
        """Go by another configuration from the next call on. Raises ConfigError and goes by the old one."""
        self.prepare(auth, roles)()

    def prepare(self, auth: AuthConfig, roles: Mapping[str, Role]) -> Callable[[], None]:
        """Return what makes it go by another configuration, which cannot fail any more. Raises ConfigError."""
        tokens = TokenFile(auth.token_file, self._clock.now) if auth.token_file else None

        def apply() -> None:
            self._auth, self._roles, self._tokens = auth, roles, tokens
            self._told_roles: set[str] = set()
            self._certificates = dict(auth.certificates)

        return apply

    @property
    def _is_tcp_open(self) -> bool:
        return self._may_tcp_be_open and self._tokens is None and not self._certificates

    @property
    def num_credentials(self) -> int | None:
        """How many tokens and certificates there are; None if callers need none."""
        if self._is_tcp_open:
            return None
        return len(self._certificates) + (0 if self._tokens is None else len(self._tokens))

    def find_problem(self) -> str | None:
        """Return what is wrong with the token file now and what helps; None if nothing is."""
        return None if self._tokens is None else self._tokens.find_problem()

    def identify(self, method: str, context: grpc.aio.ServicerContext, *, is_unix: bool) -> Caller:
        """Return who makes a call. Raises UnauthenticatedError, always with the same text."""
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        caller = None
        if given and self._tokens is not None:
            # A wrong token is refused where none would be needed, too: whoever shows one means to be somebody.
            caller = self._by_token(self._tokens, given)
        elif self._certificates and (name := self._verified_name(context)):
            role = self._certificates[name]
            caller = self._caller(name, role, f"certificate:{name}", f"certificate:{name}")
        elif self._is_open(is_unix=is_unix):
            caller = self._caller(_NOBODY, self._auth.open_role, _OPEN, _connection(context))
        elif self._is_open_health(method):
            # By no limit of the role: whoever is at the door must not use up what those inside share.
            caller = Caller(_NOBODY, self._auth.open_role, _OPEN, _connection(context), Role())
        if caller is None:
            self._tell_refusal(context.peer())
            raise UnauthenticatedError(
                "no valid credential: send the metadata `authorization: Bearer TOKEN`; `hearthd token create NAME` "
                "makes a token"
            )
        return caller

    def authorise(self, caller: Caller, method: str) -> None:
        """Raise NotPermittedError if a caller has no right to a method, whether or not it exists."""
        if caller.rights.may_call(method) or self._is_open_health(method):
            return
        _logger.info("a call of %s was refused: not for role %s", caller.name, caller.role)
        raise NotPermittedError(f"role {caller.role} may not call this method; hearthd.toml says what each role may")

    def _tell_refusal(self, peer: str) -> None:
        """Log it, now and then: a scan must not fill the journal. The method's name is the caller's text: not told."""
        now = time.monotonic()
        self._num_untold += 1
        if now < self._tell_from:
            return
        more = f" ({self._num_untold - 1} others before it)" if self._num_untold > 1 else ""
        _logger.info("a call without a valid credential from %s was refused%s", peer, more)
        self._num_untold, self._tell_from = 0, now + _SECONDS_BETWEEN_LINES

    def _is_open(self, *, is_unix: bool) -> bool:
        return not self._auth.unix_needs_token if is_unix else self._is_tcp_open

    def _is_open_health(self, method: str) -> bool:
        return self._auth.health_open and method in METHODS[HEALTH]

    def _by_token(self, tokens: TokenFile, given: list[str | bytes]) -> Caller | None:
        if len(given) > 1 or not isinstance(given[0], str):
            return None
        scheme, _, secret = given[0].partition(" ")
        token = tokens.find(secret.strip()) if scheme.lower() == "bearer" else None
        if token is None:
            return None
        return self._caller(token.name, token.role, f"token:{token.name}", f"token:{token.identity}")

    def _verified_name(self, context: grpc.aio.ServicerContext) -> str | None:
        """Return the name of the peer's certificate that the configuration knows."""
        peer = context.auth_context()
        name = next((name for name in find_names(peer) if name in self._certificates), None)
        if name is not None and has_expired(peer, self._clock.now()):
            _logger.info("the certificate of %s has expired", name)
            return None
        return name

    def _caller(self, name: str, role: str, account: str, identity: str) -> Caller:
        rights = self._roles.get(role)
        if rights is None:
            if role not in self._told_roles:
                _logger.warning("%s has the role %s, which is not configured (any more) and has no rights", name, role)
                self._told_roles.add(role)
            rights = NO_RIGHTS
        return Caller(name, role, account, identity, rights)


def _connection(context: grpc.aio.ServicerContext) -> str:
    """Name what can be told of a caller without a credential.

    `ipv4:192.0.2.1:36014`, with the port: each connection is another one, for two users of one machine must not see
    each other's cache. gRPC says nothing of who is at the other end of a Unix socket: `unix:`, one for all.
    """
    peer: str = context.peer()
    return f"{_OPEN}:{peer}"


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Asks at each call who it is, whether they may, and whether not too often."""

    def __init__(
        self, authenticator: Authenticator, meters: Meters, guard: ConnectionGuard | None = None, *, is_unix: bool
    ) -> None:
        """guard: is told who of the network has the right to be connected."""
        self._authenticator = authenticator
        self._meters = meters
        self._guard = guard
        self._is_unix = is_unix

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Return a handler that decides, and then does what the method's own would do.

        A stream both ways, whatever the method is: such a handler runs before the request is read. So a caller who is
        not let in can neither send anything that is kept nor learn which methods there are.
        """
        handler = await continuation(handler_call_details)
        method = handler_call_details.method.removeprefix("/")

        async def decide(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
            caller = self._identify(method, context)
            set_caller(caller)
            self._authenticator.authorise(caller, method)
            self._meters.count_request(caller)
            if handler is None:
                raise UnknownMethodError("there is no method of that name")
            running = _run(handler, requests, context)
            if method in ENDLESS_METHODS:
                running = _run_while(lambda: self._check_again(method, context), running)
            await running

        return grpc.stream_stream_rpc_method_handler(
            decide,
            request_deserializer=handler and handler.request_deserializer,
            response_serializer=handler and handler.response_serializer,
        )

    def _identify(self, method: str, context: grpc.aio.ServicerContext) -> Caller:
        try:
            caller = self._authenticator.identify(method, context, is_unix=self._is_unix)
        except UnauthenticatedError:
            if self._guard:
                self._guard.note_refused(context.peer())
            raise
        # Not whoever only asks for a health that is open to everybody.
        if self._guard and caller.rights.may_call(method):
            self._guard.note_admitted(context.peer())
        return caller

    def _check_again(self, method: str, context: grpc.aio.ServicerContext) -> None:
        caller = self._identify(method, context)
        self._authenticator.authorise(caller, method)


async def _run_while(check: Callable[[], object], running: Coroutine[Any, Any, None]) -> None:
    """Run until it ends, or until `check` raises what the caller is to hear."""
    task = asyncio.create_task(running)
    try:
        while not (await asyncio.wait((task,), timeout=_SECONDS_BETWEEN_LOOKS))[0]:
            check()
        task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _run(handler: grpc.RpcMethodHandler, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
    """Do what gRPC does with a method's handler, in terms of one that streams both ways."""
    behavior = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    request = requests if handler.request_streaming else await _only(requests)
    if not handler.response_streaming:
        await context.write(await behavior(request, context))
    elif inspect.isasyncgenfunction(behavior):
        async for response in behavior(request, context):
            await context.write(response)
    else:
        await behavior(request, context)


async def _only(requests: AsyncIterator[Any]) -> Any:
    async for request in requests:
        return request
    raise InvalidRequestError("request", "is missing; send one message")
