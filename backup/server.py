"""The server: listens, gives each connection a session, commits what a turn has brought, drains.

Rules: one thread and one reactor do everything; nothing here blocks but the
disk, and that is bounded: the changes that are whole at the end of a turn are
committed together and answered then, ``commit_files`` of them; what else was put
off is done piece by piece until ``turn_seconds`` have passed; and what is left
waits for the next turn. No more connections are accepted than descriptors can serve; the
others wait. When the system is out of them all the same, the listener rests, and
nothing that was accepted is dropped. ``stop`` ends the listening and lets running requests
finish; a second one does not wait. A fault of this program ends the one connection that it came
out of; one that came out of none ends the server, with everything closed.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections import Counter, deque
from contextlib import ExitStack, suppress
from typing import Callable, Deque, Dict, List, Optional, Tuple, Union

from .address import Address, UnixSocket, bound, format_address
from .connection import Connection, Later, Outgoing, Owner, Phase
from .counters import Counters
from .errors import BackupError, InternalError
from .fault import describe
from .listener import adopt, cannot_listen, listen
from .log import Fields, Log, to_logging
from .protocol import RequestReceiver
from .reactor import READ, Reactor
from .session import Session
from .settings import Settings
from .storage import Change, Store
from .stream import Stream

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_SPARE = 16  # descriptors that the loop, the log, a folder and whoever embeds the server may need

_QUIET_SECONDS = 60.0  # between two warnings of the same trouble

_OPEN_MAX = 10240  # macOS, sys/syslimits.h

_FOLDERS = 64  # descriptors that a commit may need for its users' folders

# What accept(2) says of a connection that was gone before it was accepted. Anything else, running
# out of descriptors first of all, is the system's, and is not over at once.
_GONE = {
    getattr(errno, name)
    for name in (
        *("ECONNABORTED", "ECONNRESET", "EPROTO", "EINTR", "ENETDOWN", "ENOPROTOOPT"),
        *("EHOSTDOWN", "ENONET", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
}


class Server(Owner):
    """Serves the store below ``root`` on ``address``.

    That is host and port (port 0 takes a free one), a ``UnixSocket``, or a
    socket that listens already, which is then the server's. It is bound and
    listening when the constructor returns; ``address`` then has the real port.
    Raises ``ListenFailed``, ``StoreFailed``, for a host name nobody knows
    ``Unreachable``, and for an address that other machines can reach
    ``ConfigError``, unless ``allow_anonymous``: there are no passwords. ``log``
    says where lines go; by default to the logger ``backup`` of the module
    ``logging``. ``clock`` gives seconds that never go back.
    """

    def __init__(
        self,
        root: Union[str, os.PathLike[str]],
        address: Union[Address, socket.socket] = ("127.0.0.1", 1234),
        settings: Settings = Settings(),
        log: Optional[Log] = None,
        *,
        allow_anonymous: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._log = Log(to_logging) if log is None else log
        if isinstance(address, tuple):
            self._listener = listen(address, settings.backlog, allow_anonymous)
        else:
            self._listener = adopt(address, allow_anonymous)
        self.address: Address = bound(self._listener)
        try:
            self._reactor = Reactor(clock)
        except OSError as error:
            self._listener.close()
            raise cannot_listen(self.address, error, "close what it has open") from error
        try:
            self._store = Store(root, settings, self._reactor.at_turn_end)
        except BaseException:
            self._reactor.close()
            self._listener.close()
            raise
        self._counters = Counters()
        self._scratch = memoryview(bytearray(settings.scratch_bytes))
        self._sessions: Dict[Connection, Session] = {}
        self._to_commit: Deque[Connection] = deque()
        self._to_step: Deque[Connection] = deque()
        self._settling = False  # whether the end of a turn is awaited, to go on with these
        room = min(_room_for_connections(self._listener.fileno()), self._reactor.room)
        self._room = min(room, settings.max_connections or room)
        self._of_host: Counter[str] = Counter()  # connections
        self._full = self._was_full = False
        self._next_warning = self._reactor.now()  # that accept has failed, by the reactor's clock
        self._serving = False
        self._stopping = False
        self._closed = False
        self._listen_again()

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
        """Serves until ``stop``, then closes everything; so does whatever is raised in here."""
        self._serving = True
        try:
            self._log.add(logging.INFO, self.greeting)
            while self._serving:
                self.turn()
            self._close_connections()
            self._log.answer("Counters", self._numbers())
            self._log.add(logging.INFO, "Stopped")
        finally:
            self.close()

    def turn(self) -> None:
        """Waits, for a second at most, until something can be done, and does it.

        For a loop of one's own, in the place of ``serve_forever``; a byte
        written to ``wake_fd`` ends the waiting. Then ``close`` ends the service.
        """
        self._log.flush()
        self._reactor.turn()
        if self._stopping:
            self._hurry()

    def stop(self) -> None:
        """Stops accepting, waits ``drain_seconds`` for running requests, ends ``serve_forever``.

        A second call does not wait for them. Any thread and any signal handler
        may call it; it returns at once.
        """
        self._reactor.call(self._stop)

    def call(self, callback: Callable[[], None]) -> None:
        """Calls ``callback`` in the loop, between two turns' work; may be called like ``stop``."""
        self._reactor.call(callback)

    def report(self) -> None:
        """Writes one line of counters to the log; may be called like ``stop``."""
        self._reactor.call(lambda: self._log.answer("Counters", self._numbers()))

    def _numbers(self) -> Fields:
        numbers = self._counters.fields(len(self._sessions), self._reactor.slowest_turn)
        return {**numbers, "log_lines_lost": self._log.lost}

    def close(self) -> None:
        """Closes every connection and the listener, for a server that is not serving."""
        if self._closed:
            return
        self._closed = True
        with ExitStack() as last_first:  # each, whatever comes out of the others
            last_first.callback(self._log.drain, self._settings.farewell_seconds)
            last_first.callback(self._reactor.close)
            last_first.callback(self._store.close)
            last_first.callback(self._listener.close)
            last_first.callback(self._close_connections)

    def put_off(self, connection: Connection, later: Later) -> None:
        (self._to_commit if later is Later.COMMIT else self._to_step).append(connection)
        self._settle_soon()

    def failed(self, connection: Connection, error: InternalError) -> None:
        what = f"a fault of this program ends a connection peer={connection.peer}"
        for line in describe(what, error.fault):
            self._log.add(logging.ERROR, line)

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            # In the round after the next, so that the answers that are ready leave before.
            self._reactor.at_turn_end(lambda: self._reactor.at_turn_end(self._settle))

    def closed(self, connection: Connection, _: Optional[BackupError]) -> None:
        del self._sessions[connection]
        if self._of_host:
            host = _host(connection.peer)
            self._of_host[host] -= 1
            if not self._of_host[host]:
                del self._of_host[host]
        if self._store.to_reclaim:  # an upload that came to nothing
            self._settle_soon()
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
        # One kind of work after the other, each for all: see ``reactor``.
        accepted: List[Connection] = []
        for _ in range(self._settings.accepts_per_turn):
            if not self._accept_one(accepted):
                break
        for connection in accepted:
            connection.start()

    def _accept_one(self, accepted: List[Connection]) -> bool:
        """Accepts a connection, if there is one and room for it; whether to go on."""
        if len(self._sessions) >= self._room:
            self._wait_for_room()
            return False
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _GONE:
                return True
            self._rest(error)
            return False
        try:
            peer = self._peer(address)
            if self._may_connect(peer):
                accepted.append(self._connection(sock, peer))
            else:
                sock.close()
        except BaseException:
            sock.close()
            raise
        return True

    def _may_connect(self, peer: str) -> bool:
        """Whether the address may have one more connection."""
        cap = self._settings.max_connections_per_address
        if cap is None or self._of_host[_host(peer)] < cap:
            return True
        self._counters.refused += 1
        fields = {"peer": peer, "reason": "quota", "cap": "max-connections-per-address"}
        self._log.add(logging.WARNING, "connection refused", fields)
        return False

    def _peer(self, address: Tuple[object, ...]) -> str:
        """How a client is called; on a Unix socket it has no address of its own."""
        unix = isinstance(self.address, UnixSocket)
        return format_address(self.address if unix else address)

    def _wait_for_room(self) -> None:
        """Accepts nobody until a connection is closed."""
        if not self._was_full:
            text = f"{self._room} connections are all that are served at once; others wait"
            self._log.add(logging.WARNING, text)
        self._full = self._was_full = True
        self._reactor.unwatch(self._listener)

    def _rest(self, error: OSError) -> None:
        seconds = self._settings.accept_pause_seconds
        if self._reactor.now() >= self._next_warning:
            self._next_warning = self._reactor.now() + _QUIET_SECONDS
            text = f"cannot accept: {error.strerror}; trying again every {seconds:g} s"
            self._log.add(logging.WARNING, text)
        self._reactor.unwatch(self._listener)
        self._reactor.deadline(seconds, self._listen_again)

    def _connection(self, sock: socket.socket, peer: str) -> Connection:
        self._counters.opened += 1
        session = Session(
            self._store, self._log, peer, self._reactor.now, self._settings, self._counters
        )
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
        if self._settings.max_connections_per_address is not None:
            self._of_host[_host(peer)] += 1
        return connection

    def _settle(self) -> None:
        """At the end of a turn: goes on with what was put off."""
        began = self._reactor.now()
        self._commit()
        now = self._reactor.now()
        until = now + max(self._settings.turn_seconds, now - began)
        while self._to_step and now < until:
            self._step(self._to_step.popleft())
            now = self._reactor.now()
        if self._store.to_reclaim:
            self._store.reclaim()
        self._settling = bool(self._to_commit or self._to_step or self._store.to_reclaim)
        if self._settling:
            self._reactor.next_turn(self._settle)

    def _commit(self) -> None:
        """Makes changes take effect, with all others that are whole, and answers them."""
        batch: List[Tuple[Connection, Session]] = []
        changes: List[Change] = []
        waiting = 0
        while self._to_commit and len(changes) < self._settings.commit_files:
            connection = self._to_commit[0]
            session = self._sessions.get(connection)
            if session is not None and session.change is not None:  # not closed meanwhile
                waiting += session.change.waiting
                if changes and waiting > self._store.piece:
                    break
                batch.append((connection, session))
                changes.append(session.change)
            self._to_commit.popleft()
        if changes:
            self._counters.commit(len(changes))
        for (connection, session), error in zip(batch, self._store.commit(changes)):
            if isinstance(error, InternalError):
                connection.fail(error.fault)
                continue
            try:
                answer = session.committed(error)
            except Exception as fault:
                connection.fail(fault)
            else:
                connection.send(answer)

    def _step(self, connection: Connection) -> None:
        """Does one piece of a connection's work."""
        session = self._sessions.get(connection)
        if session is None:
            return  # closed meanwhile
        try:
            then = session.step()
        except Exception as fault:
            connection.fail(fault)
            return
        if isinstance(then, Outgoing):
            connection.send(then)
        elif then is None:
            connection.resume()
        else:
            self.put_off(connection, then)

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


def _host(peer: str) -> str:
    """The address without the port; all who come by a Unix socket are one."""
    return peer.rpartition(":")[0]


def _room_for_connections(in_use: int) -> int:
    """How many connections the descriptor limit allows, with some left for files and folders.

    ``in_use`` is about how many are open, as the number of the newest tells.
    Most of many connections are silent or wait; a quarter of the descriptors, and some for a
    commit's folders, are left for the files of those that are served. Of few, each may have one.
    """
    if resource is None:
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    room = limit - in_use - _SPARE
    return max(1, room - min(room // 2, room // 4 + _FOLDERS))


def raise_descriptor_limit() -> None:
    """Raises this process's soft limit of descriptors to the hard one, where there are limits."""
    if resource is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # macOS calls its hard limit infinite, and grants no more than OPEN_MAX (setrlimit(2)).
    for limit in (hard, _OPEN_MAX):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return
