"""A TCP relay between a client and a daemon, for what a network does: it goes silent, or it breaks.

Runs in one thread from construction to `close`.
"""

from __future__ import annotations

import selectors
import socket
import threading


class Relay:
    """Forwards bytes both ways between those who connect to `address` and the daemon's port."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._peer: dict[socket.socket, socket.socket] = {}
        self._from_clients: set[socket.socket] = set()
        self._condition = threading.Condition()
        self._num_client_reads = 0
        self._is_frozen = self._is_over = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def freeze(self) -> None:
        """Forward nothing any more, as if the other machine had stopped; connections stay open."""
        self._is_frozen = True
        self._wake()

    def break_connections(self) -> None:
        """Close every connection, and take no more."""
        self._is_over = True
        if self._thread.is_alive():
            self._wake()
            self._thread.join()
        # Here and not in the thread, which may end before it is woken.
        self._waker.close()
        self._woken.close()

    close = break_connections

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_for_client_reads(self, count: int) -> None:
        """Block until clients have sent something so many times more."""
        with self._condition:
            target = self._num_client_reads + count
            assert self._condition.wait_for(lambda: self._num_client_reads >= target, 20)

    def _wake(self) -> None:
        self._waker.send(b"!")

    def _run(self) -> None:
        while not self._is_over:
            for key, _ in self._selector.select():
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._woken:
                    source.recv(16)
                elif self._is_frozen:
                    self._selector.unregister(source)
                elif source is self._listener:
                    self._connect()
                else:
                    self._forward(source)
        for connection in (self._listener, *self._peer):
            connection.close()
        self._selector.close()

    def _connect(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(self._target)
        self._peer[client], self._peer[server] = server, client
        self._from_clients.add(client)
        for connection in (client, server):
            self._selector.register(connection, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        try:
            data = source.recv(65536)
            if data:
                self._peer[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            for connection in (source, self._peer[source]):
                if connection in self._peer:
                    self._selector.unregister(connection)
                    connection.close()
            other = self._peer.pop(source)
            self._peer.pop(other, None)
            return
        if source in self._from_clients:
            with self._condition:
                self._num_client_reads += 1
                self._condition.notify_all()
