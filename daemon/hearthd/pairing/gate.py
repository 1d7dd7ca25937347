"""The daemon's half of pairing: PairingService.Pair, open to whoever shows the secret of a pairing record.

Stands before `auth` and takes from it the calls of this one method that show such a secret; all others go on, so that
whoever shows none hears what every other method answers. A secret is looked for at the call: the daemon need not be
told of new ones.

Order of things: the record is removed, durably; then the token is made, durably; then it is sent. Killed at any moment,
the daemon has given at most one token for one secret. Knows nothing of codes and certificates. Made by `life.parts`.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import grpc

from hearth.v1 import pairing_pb2
from hearthd.access.token_bucket import TokenBucket
from hearthd.access.tokens import create_token
from hearthd.errors import ConfigError, NotPermittedError, QuotaExceededError, UnauthenticatedError
from hearthd.listening.peer_address import find_end, find_source
from hearthd.pairing.records import SECRET_BYTES, PairingRecords

__all__ = ["BEARER_PREFIX", "PAIR_METHOD", "PairingGate"]

_logger = logging.getLogger(__name__)

PAIR_METHOD: Final = f"/{pairing_pb2.DESCRIPTOR.services_by_name['PairingService'].full_name}/Pair"
BEARER_PREFIX: Final = "pair_"
# Nobody finds 96 bits by trying; this keeps who tries from filling the journal and the disk's queue.
_WRONG_PER_MINUTE: Final = 5
_MAX_ADDRESSES: Final = 1024
# For all addresses together: one machine may have many.
_LINES_PER_MINUTE: Final = 10


class PairingGate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Answers Pair. One for all listeners, so that wrong secrets are counted together."""

    def __init__(self, token_file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        """token_file: None if callers need no token; then there is nothing to pair for."""
        self._token_file = token_file
        self._records = PairingRecords(token_file) if token_file else None
        self._clock = clock
        self._wrong: dict[str, TokenBucket] = {}
        self._lines = TokenBucket(_LINES_PER_MINUTE, clock())
        self._num_untold = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Return Pair's handler for a call that shows a pairing secret; leave all others to `auth`."""
        if handler_call_details.method != PAIR_METHOD or self._records is None:
            return await continuation(handler_call_details)
        secret = _shown_secret(handler_call_details)
        if secret is None:
            return await continuation(handler_call_details)

        async def pair(
            _request: pairing_pb2.PairRequest, context: grpc.aio.ServicerContext
        ) -> pairing_pb2.PairResponse:
            return await self._pair(secret, context)

        return grpc.unary_unary_rpc_method_handler(
            pair,
            request_deserializer=pairing_pb2.PairRequest.FromString,
            response_serializer=pairing_pb2.PairResponse.SerializeToString,
        )

    async def _pair(self, secret: bytes, context: grpc.aio.ServicerContext) -> pairing_pb2.PairResponse:
        records, token_file = self._records, self._token_file
        assert records is not None
        assert token_file is not None
        end = find_end(context.peer())
        # Behind a proxy, all have the one address of its Unix socket.
        wrong = self._bucket(find_source(end.ip) if end else "unix")
        if seconds := wrong.seconds_until(1, self._clock()):
            raise QuotaExceededError(
                "-",
                f"{_WRONG_PER_MINUTE} wrong pairing codes a minute",
                f"too many wrong pairing codes came from here; try again in {seconds:.0f} s",
                seconds,
            )
        # Disks may be slow, and the event loop is everybody's.
        record = await asyncio.to_thread(records.claim, secret)
        if record is None:
            wrong.take(1, self._clock())
            self._tell_wrong(context.peer())
            raise UnauthenticatedError(
                "the pairing code is not valid: it was used, or has expired, or never was one; `hearthd pair NAME`, on "
                "the daemon's machine, makes a new one"
            )
        try:
            token = await asyncio.to_thread(create_token, token_file, record.name, role=record.role)
        except ConfigError as error:
            _logger.error("%s could not be paired: %s", record.name, error)
            raise NotPermittedError(
                f"no token could be made for {record.name}; the daemon's journal says why. On its machine: hearthd "
                f"token revoke {record.name}; hearthd pair {record.name}"
            ) from None
        _logger.info("%s was paired, with the role %s, from %s", record.name, record.role, context.peer())
        return pairing_pb2.PairResponse(
            token=token, name=record.name, role=record.role, daemon_name=socket.gethostname().partition(".")[0]
        )

    def _tell_wrong(self, peer: str) -> None:
        self._num_untold += 1
        if self._lines.seconds_until(1, self._clock()):
            return
        self._lines.take(1, self._clock())
        more = f" ({self._num_untold - 1} others before it)" if self._num_untold > 1 else ""
        _logger.warning("a wrong pairing code came from %s%s", peer, more)
        self._num_untold = 0

    def _bucket(self, address: str) -> TokenBucket:
        """Return the count of an address; when there are too many, the one that was new the longest ago is dropped."""
        if address not in self._wrong:
            if len(self._wrong) >= _MAX_ADDRESSES:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[address] = TokenBucket(_WRONG_PER_MINUTE, self._clock())
        return self._wrong[address]


def _shown_secret(details: grpc.HandlerCallDetails) -> bytes | None:
    given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    if len(given) != 1 or not isinstance(given[0], str):
        return None
    scheme, _, shown = given[0].partition(" ")
    if scheme.lower() != "bearer" or not shown.startswith(BEARER_PREFIX):
        return None
    try:
        secret = bytes.fromhex(shown.removeprefix(BEARER_PREFIX))
    except ValueError:
        return None
    return secret if len(secret) == SECRET_BYTES else None
