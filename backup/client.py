"""The client: one request after the other, or many side by side on one thread.

Rules: a client has a reactor of its own and no thread. Whoever calls it drives
it: ``backup``, ``retrieve``, ``delete`` and ``list`` until their one answer is
there, ``run`` as far as its caller asks for outcomes, ``turn`` once. Each
request has a connection of its own, as the protocol wants it. A request that
failed is not tried again; only the addresses that a host name stands for are
tried one after the other until one takes the connection.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Callable, Deque, Dict, Iterable, Iterator, List, Optional, Tuple

from .address import Place, format_address, resolve
from .connection import Connection, Owner
from .errors import (
    BackupError,
    ConfigError,
    ConnectionFailed,
    InternalError,
    LocalFileError,
    Unreachable,
)
from .exchange import (
    Backup,
    Delete,
    Exchange,
    Job,
    Listing,
    Outcome,
    Progress,
    Retrieve,
    exchange_for,
    subject,
)
from .files import Path
from .names import of_path
from .protocol import ResponseReceiver
from .reactor import Reactor
from .settings import Settings
from .stream import Stream, connect
from .wire import MAX_USER_ID


class Running:
    """A job that was submitted; ``cancel`` it if its outcome is not wanted any more."""

    def __init__(self, job: Job, done: Callable[[Outcome], None], began: float) -> None:
        self.job = job
        self.done = done
        self.began = began
        self.ended = False
        self.exchange: Optional[Exchange] = None
        self.connection: Optional[Connection] = None
        self.addresses: List[Tuple[int, Place]] = []  # not tried yet

    def cancel(self) -> None:
        """Closes the connection, if there still is one; ``done`` hears of it."""
        self.addresses.clear()
        if self.connection is not None:
            self.connection.close(ConnectionFailed("cancelled"))
        if self.exchange is not None and not self.ended:  # it was interrupted while it closed
            self.exchange.abort()


class Client(Owner):
    """Talks to the server at ``address`` (host and port, or a ``UnixSocket``) for a user.

    Close it, or use it as a context manager: that ends whatever is running.
    """

    def __init__(
        self, address: Tuple[str, int], user_id: int, settings: Settings = Settings()
    ) -> None:
        """Opens no connection yet. Raises ``ConfigError`` for a user id beyond 32 bits."""
        self.address = address
        self.user_id = _check_user(user_id)
        self._settings = settings
        self._peer = format_address(address)
        self._resolved: List[Tuple[int, Place]] = []
        self._reactor = Reactor()
        self._scratch = memoryview(bytearray(settings.scratch_bytes))
        self._running: Dict[Connection, Running] = {}
        self._unfinished = 0
        self._closed = False

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is running and lets go of every descriptor."""
        if self._closed:
            return
        self._closed = True
        for running in list(self._running.values()):
            running.cancel()
        self._reactor.close()

    def backup(
        self, path: Path, name: Optional[str] = None, progress: Optional[Progress] = None
    ) -> int:
        """Backs up the file at ``path`` as ``name``, by default its base name; its size in bytes.

        Raises ``LocalFileError``, ``FileChanged``, ``InvalidName``, ``Refused``,
        ``ConnectionFailed`` or ``ProtocolError``; the server then holds what it
        held before, or, if the answer was lost, the whole new file.
        """
        job = Backup(path, of_path(path) if name is None else name)
        return self._one(job, progress).bytes

    def retrieve(
        self,
        name: str,
        path: Path,
        overwrite: bool = False,
        progress: Optional[Progress] = None,
    ) -> int:
        """Retrieves ``name`` into the file ``path``; its size in bytes.

        Raises ``NotFound``, ``TargetExists``, ``LocalFileError``, ``InvalidName``,
        ``Refused``, ``ConnectionFailed`` or ``ProtocolError``; what was at
        ``path`` is then untouched.
        """
        return self._one(Retrieve(name, path, overwrite), progress).bytes

    def delete(self, name: str) -> None:
        """Removes ``name``.

        Raises ``NotDeleted``, ``InvalidName``, ``ConnectionFailed`` or ``ProtocolError``.
        """
        self._one(Delete(name), None)

    def list(self) -> List[str]:
        """The names of the user's files, in the server's order.

        Raises ``Refused``, ``ConnectionFailed`` or ``ProtocolError``.
        """
        return self._one(Listing(), None).names

    def run(
        self,
        jobs: Iterable[Job],
        parallel: Optional[int] = None,
        progress: Optional[Progress] = None,
    ) -> Iterator[Outcome]:
        """Does many jobs side by side; yields each ``Outcome`` when it is there.

        At most ``parallel`` are in flight. ``jobs`` is read as far as there is
        room, so it may be endless. Ending the iteration cancels what is running.
        They end in any order: two that save at one path are to be kept apart by
        the caller, or the one may take the place of the other unseen.
        """
        waiting = iter(jobs)
        finished: Deque[Outcome] = deque()
        in_flight: List[Running] = []
        room = self._settings.parallel if parallel is None else parallel
        if room < 1:
            raise ConfigError(f"parallel is {room}; expected at least 1")
        try:
            while True:
                in_flight = [running for running in in_flight if not running.ended]
                while len(in_flight) + len(finished) < room:
                    job = next(waiting, None)
                    if job is None:
                        break
                    in_flight.append(self.submit(job, finished.append, progress))
                if finished:
                    yield finished.popleft()
                elif in_flight:
                    self.turn()
                else:
                    return
        finally:
            for running in in_flight:
                running.cancel()

    def submit(
        self, job: Job, done: Callable[[Outcome], None], progress: Optional[Progress] = None
    ) -> Running:
        """Begins a job and returns; ``done`` hears its outcome in one of the next turns.

        Raises ``ConnectionFailed`` when this client is closed.
        """
        if self._closed:
            raise ConnectionFailed("this client is closed; make another")
        self._unfinished += 1
        running = Running(job, done, self._reactor.now())
        try:
            user_id = self.user_id if job.user_id is None else _check_user(job.user_id)
            report = _silent if progress is None else partial(progress, job)
            limits = self._settings.max_listing_bytes, self._settings.max_listing_names
            running.exchange = exchange_for(job, user_id, report, *limits)
            running.addresses = self._addresses()
            self._attempt(running, running.exchange)
        except BackupError as error:
            self._reactor.at_turn_end(partial(self._end, running, error))
        return running

    @property
    def busy(self) -> bool:
        """Whether a job that was submitted has not ended."""
        return self._unfinished > 0

    def turn(self) -> None:
        """Waits until something can be done for a job, and does it; nothing when not ``busy``."""
        if self.busy:
            self._reactor.turn()

    def closed(self, connection: Connection, error: Optional[BackupError]) -> None:
        """Takes a closed connection's outcome (as its ``Owner``)."""
        running = self._running.pop(connection)
        running.connection = None
        if error is not None and not connection.connected and running.addresses:
            try:
                assert running.exchange is not None
                self._attempt(running, running.exchange)
                return
            except BackupError as failure:
                error = failure
        self._end(running, error)

    def failed(self, connection: Connection, error: InternalError) -> None:
        """Ends the job, and raises for whoever drives this client what was raised in it."""
        connection.close(error)
        raise error.fault

    def _one(self, job: Job, progress: Optional[Progress]) -> Outcome:
        outcomes: List[Outcome] = []
        running = self.submit(job, outcomes.append, progress)
        try:
            while not outcomes:
                self.turn()
        finally:
            running.cancel()  # if an interrupt comes in between
        if outcomes[0].error is not None:
            raise outcomes[0].error
        return outcomes[0]

    def _addresses(self) -> List[Tuple[int, Place]]:
        if not self._resolved:
            self._resolved = resolve(self.address)
        return list(self._resolved)

    def _attempt(self, running: Running, exchange: Exchange) -> None:
        """Begins the request with the next address that takes a connection."""
        request = exchange.request()
        try:
            stream = self._connect(running)
        except ConnectionFailed:
            if request.body is not None:
                request.body.close()
            raise
        connection = Connection(
            self._reactor,
            stream,
            exchange,
            ResponseReceiver(),
            asks=True,
            scratch=self._scratch,
            settings=self._settings,
            owner=self,
        )
        self._running[connection] = running
        running.connection = connection
        connection.connect(request)

    def _connect(self, running: Running) -> Stream:
        while True:
            family, place = running.addresses.pop(0)
            try:
                return connect(family, place, self._peer)
            except Unreachable:
                if not running.addresses:
                    raise

    def _end(self, running: Running, error: Optional[BackupError]) -> None:
        exchange = running.exchange
        try:
            if exchange is not None:
                exchange.finish() if error is None else exchange.abort()
        except BackupError as failure:
            error = failure
        # The text of the other two says already what they are about.
        if error is not None and not isinstance(error, (Unreachable, LocalFileError)):
            error.subject = subject(running.job)
        running.ended = True
        self._unfinished -= 1
        seconds = self._reactor.now() - running.began
        if exchange is None or error is not None:
            running.done(Outcome(running.job, error, 0, [], seconds))
        else:
            running.done(Outcome(running.job, None, exchange.bytes, exchange.names, seconds))


def _check_user(user_id: int) -> int:
    if not 0 <= user_id <= MAX_USER_ID:
        raise ConfigError(f"{user_id} is not a user id; expected 0 to {MAX_USER_ID}")
    return user_id


def _silent(_done: int, _size: int) -> None:
    """No one wants to hear of progress."""
