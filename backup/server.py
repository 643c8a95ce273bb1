"""The server: listens, gives each connection a session, commits what a turn has brought, drains.

Rules: one thread and one reactor do everything; nothing here blocks but the
disk. Changes that are whole at the end of a turn are committed together and
answered then. No more connections are accepted than descriptors can serve; the
others wait. When the system is out of them all the same, the listener rests, and
nothing that was accepted is dropped. ``stop`` ends the listening and lets running requests
finish; a second one does not wait.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from contextlib import suppress
from typing import Dict, List, Optional, Tuple, Union

from .address import format_address, resolve
from .connection import Connection, Owner, Phase
from .errors import BackupError, ListenFailed
from .log import Log, to_logging
from .protocol import RequestReceiver
from .reactor import READ, Reactor
from .session import Session
from .settings import Settings
from .storage import Store
from .stream import Stream

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SPARE = 16  # descriptors that the loop, the log, a folder and whoever embeds the server may need

# What accept(2) says when the system, not the connection, lacks something.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server(Owner):
    """Serves the store below ``root`` on ``address`` (host and port; port 0 takes a free one).

    It is bound and listening when the constructor returns; ``address`` then has
    the real port. Raises ``ListenFailed``, ``StoreFailed`` or, for a host name
    nobody knows, ``Unreachable``. ``log`` says where lines go; by default
    to the logger ``backup`` of the module ``logging``.
    """

    def __init__(
        self,
        root: Union[str, os.PathLike[str]],
        address: Tuple[str, int] = ("127.0.0.1", 1234),
        settings: Settings = Settings(),
        log: Optional[Log] = None,
    ) -> None:
        self._settings = settings
        self._log = Log(to_logging) if log is None else log
        self._listener = _listen(address, settings.backlog)
        try:
            self._store = Store(root, settings)
            self._reactor = Reactor()
        except BaseException as error:
            self._listener.close()
            if isinstance(error, OSError):
                raise _cannot_listen(address, error, "close what it has open") from error
            raise
        host, port = self._listener.getsockname()[:2]
        self.address: Tuple[str, int] = (host, port)
        self._scratch = memoryview(bytearray(settings.scratch_bytes))
        self._sessions: Dict[Connection, Session] = {}
        self._to_commit: List[Connection] = []
        room = _room_for_connections(self._listener.fileno())
        self._room = min(room, self._reactor.room)
        self._full = self._was_full = False
        self._serving = False
        self._stopping = False
        self._closed = False

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def greeting(self) -> str:
        """The log's first line."""
        return f"Listening on {format_address(self.address)}"

    @property
    def wake_fd(self) -> int:
        """For ``signal.set_wakeup_fd``, where a signal alone would not end the waiting."""
        return self._reactor.wake_fd

    def serve_forever(self) -> None:
        """Serves until ``stop``, then closes everything."""
        self._log.add(logging.INFO, self.greeting)
        self._serving = True
        try:
            self._listen_again()
            while self._serving:
                self._log.flush()
                self._reactor.turn()
                if self._stopping:
                    self._hurry()
            self._close_connections()
            self._log.add(logging.INFO, "Stopped")
        finally:
            self.close()

    def stop(self) -> None:
        """Stops accepting, waits ``drain_seconds`` for running requests, ends ``serve_forever``.

        A second call does not wait for them. Any thread and any signal handler
        may call it; it returns at once.
        """
        self._reactor.call(self._stop)

    def close(self) -> None:
        """Closes every connection and the listener, for a server that is not serving."""
        if self._closed:
            return
        self._closed = True
        self._close_connections()
        self._listener.close()
        self._reactor.close()
        self._log.flush()

    def answer_later(self, connection: Connection) -> None:
        if not self._to_commit:
            self._reactor.at_turn_end(self._commit)
        self._to_commit.append(connection)

    def closed(self, connection: Connection, error: Optional[BackupError]) -> None:
        self._sessions.pop(connection).closed(error)
        if self._full:
            self._full = False
            self._listen_again()
        if self._stopping and not self._sessions:
            self._serving = False

    def _close_connections(self) -> None:
        for connection in list(self._sessions):
            connection.close()

    def _listen_again(self) -> None:
        if not self._stopping:
            self._reactor.watch(self._listener, READ, self._accept)

    def _accept(self, _: int) -> None:
        for _ in range(self._settings.accepts_per_turn):
            if len(self._sessions) >= self._room:
                self._wait_for_room()
                return
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # a connection that was gone before it was accepted
                self._rest(error)
                return
            self._serve(sock, format_address(address))

    def _wait_for_room(self) -> None:
        """Accepts nobody until a connection is closed."""
        if not self._was_full:
            text = f"{self._room} connections are all that the system allows; others wait"
            self._log.add(logging.WARNING, text)
        self._full = self._was_full = True
        self._reactor.unwatch(self._listener)

    def _rest(self, error: OSError) -> None:
        seconds = self._settings.accept_pause_seconds
        self._log.add(logging.WARNING, f"cannot accept: {error.strerror}; again in {seconds:g} s")
        self._reactor.unwatch(self._listener)
        self._reactor.deadline(seconds, self._listen_again)

    def _serve(self, sock: socket.socket, peer: str) -> None:
        session = Session(self._store, self._log, peer)
        connection = Connection(
            self._reactor,
            Stream(sock, peer),
            session,
            RequestReceiver(),
            asks=False,
            scratch=self._scratch,
            settings=self._settings,
            owner=self,
        )
        self._sessions[connection] = session
        connection.start()

    def _commit(self) -> None:
        """Makes the changes of this turn take effect and answers them."""
        waiting, self._to_commit = self._to_commit, []
        batch = []
        for connection in waiting:
            session = self._sessions.get(connection)
            if session is not None and session.change is not None:  # not closed meanwhile
                batch.append((connection, session, session.change))
        errors = self._store.commit([change for _, _, change in batch])
        for (connection, session, _), error in zip(batch, errors):
            connection.send(session.committed(error))

    def _stop(self) -> None:
        if self._stopping or not self._sessions:
            self._serving = False
            return
        self._stopping = True
        self._reactor.unwatch(self._listener)
        self._listener.close()
        for connection in list(self._sessions):
            connection.start()  # a request that is there already is still served
            if not connection.begun:
                connection.close()
        self._hurry()
        seconds = self._settings.drain_seconds
        running = self._running()
        if running:
            text = f"Stopping; running requests: {running}, which have up to {seconds:g} s"
            self._log.add(logging.INFO, text)
        self._reactor.deadline(seconds, self._cut_off)

    def _hurry(self) -> None:
        """Lets those who have their answers go soon."""
        for connection in self._sessions:
            connection.hurry(self._settings.farewell_seconds)

    def _running(self) -> int:
        """How many requests are not answered yet."""
        return sum(connection.phase is Phase.EXCHANGING for connection in self._sessions)

    def _cut_off(self) -> None:
        running = self._running()
        if running:
            self._log.add(logging.WARNING, f"requests that were cut off: {running}")
        self._serving = False


def _room_for_connections(in_use: int) -> int:
    """How many connections the descriptor limit allows: each may need a second one for its file.

    ``in_use`` is about how many are open, as the number of the newest tells.
    """
    if resource is None:
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, (limit - in_use - _SPARE) // 2)


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit of descriptors to the hard one, where there are limits."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with suppress(OSError, ValueError):  # macOS calls its hard limit infinite, and refuses it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _listen(address: Tuple[str, int], backlog: int) -> socket.socket:
    family, place = resolve(address)[0]
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _cannot_listen(address, error, "take another address") from error
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where REUSEADDR would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        taken = "stop what listens there or take another port: --listen HOST:PORT"
        other = "take another address: --listen HOST:PORT"
        hint = taken if error.errno == errno.EADDRINUSE else other
        raise _cannot_listen(address, error, hint) from error
    return listener


def _cannot_listen(address: Tuple[str, int], error: OSError, hint: str) -> ListenFailed:
    reason = (error.strerror or str(error)).lower()
    return ListenFailed(f"cannot listen on {format_address(address)}: {reason}; {hint}")
