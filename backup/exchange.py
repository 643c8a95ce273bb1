"""The client's end of one exchange: what each job sends, and what it believes of the answer.

Rules: nothing the server says is believed. An answer must have version 1, the
name that was asked for, a status of this operation and a size that this status
can have; and nothing may follow it. Anything else is a ``ProtocolError``. What
is received takes effect in ``finish``, when the whole answer was seen to be
right, and only where the caller said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, ClassVar, Dict, List, NamedTuple, Optional, Type, Union

from .connection import Endpoint, Outgoing
from .errors import BackupError, CutShort, NotDeleted, NotFound, ProtocolError, Refused
from .files import Path, Report, Source, Target
from .names import brief, encode, show
from .protocol import Cut, Data, Excess, Head, Part, State
from .wire import (
    SIZE,
    VERSION,
    Op,
    Request,
    Response,
    Status,
    check_count,
    decode_listing,
    encode_request,
)


@dataclass(frozen=True)
class Backup:
    """Back up the file at ``path`` as ``name``, by default its base name."""

    path: Path
    name: str
    user_id: Optional[int] = None


@dataclass(frozen=True)
class Retrieve:
    """Retrieve ``name`` and save it at ``path``."""

    name: str
    path: Path
    overwrite: bool = False
    user_id: Optional[int] = None


@dataclass(frozen=True)
class Delete:
    """Remove ``name``."""

    name: str
    user_id: Optional[int] = None


@dataclass(frozen=True)
class Listing:
    """List the names of the user's files."""

    name: ClassVar[str] = ""
    user_id: Optional[int] = None


Job = Union[Backup, Retrieve, Delete, Listing]


class Outcome(NamedTuple):
    """How a job ended: ``error`` or, without one, what it brought."""

    job: Job
    error: Optional[BackupError]
    bytes: int
    """Of the file sent or received, or of the listing."""
    names: List[str]
    """What a ``Listing`` found."""
    seconds: float


Failures = Dict[int, Type[Refused]]
"""What each failure status of an operation is raised as."""

Progress = Callable[[Job, int, int], None]
"""Called with a job, its bytes done and its bytes in all."""


class Exchange(Endpoint):
    """One job's request and what is made of the answer.

    ``request`` may be called again when an address could not be reached. After
    the connection is closed, ``finish`` or ``abort`` is called, once.
    """

    op: ClassVar[Op]
    success: ClassVar[Status]
    failures: ClassVar[Failures]

    def __init__(self, user_id: int, name: bytes) -> None:
        self.bytes = 0
        self.names: List[str] = []
        self._user_id = user_id
        self._name = name

    def request(self) -> Outgoing:
        """The message to send. Raises ``LocalFileError`` or ``TooLarge``."""
        return Outgoing(encode_request(Request(self._user_id, VERSION, self.op, self._name)))

    def take(self, part: Part) -> None:
        if isinstance(part, Data):
            self._take_payload(part.view)
        elif isinstance(part, Head):
            assert isinstance(part.message, Response)
            self._check(part.message)
            self._begin_payload(part.message.size)
        elif isinstance(part, Excess):
            raise ProtocolError(
                f"{part.length} bytes follow the server's answer; is it our server?"
            )
        elif isinstance(part, Cut):
            if part.state is State.HEADER:
                raise CutShort("it closed without a whole answer; is it a backup server?")
            raise CutShort(f"the server ended inside the answer's {part.state.value}; try again")

    def finish(self) -> None:
        """The answer is whole and right: lets it take effect. Raises ``BackupError``."""

    def abort(self) -> None:
        """The answer is not: leaves nothing behind."""

    def refusal(self) -> str:
        """Why a server that gives no reason may have refused."""
        return "the server could not do it; its log says why"

    def _check(self, response: Response) -> None:
        _check_version(response)
        if response.name != self._name:
            raise ProtocolError(f"the answer is for {brief(response.name)!r}, another name")
        failure = self.failures.get(response.status)
        if failure is not None and response.size == 0:
            raise failure(self.refusal() if failure is Refused else _FAILED[failure])
        if response.status != self.success:
            raise ProtocolError(
                f"status {response.status} with {response.size} bytes answers no {self.op.name}"
            )

    def _begin_payload(self, size: int) -> None:
        """``size`` bytes of payload follow. Raises ``ProtocolError``."""
        if size:
            raise ProtocolError(f"{size} bytes of payload answer a {self.op.name}, which has none")

    def _take_payload(self, view: memoryview) -> None:
        raise AssertionError(f"{len(view)} bytes where _begin_payload allows none")


def _check_version(message: Union[Request, Response]) -> None:
    if message.version != VERSION:
        raise ProtocolError(f"the answer has version {message.version}, not {VERSION}")


_FAILED: Dict[Type[Refused], str] = {
    NotDeleted: "not on the server, or it could not be removed there",
    NotFound: "not on the server",
}


class BackupExchange(Exchange):
    """Sends a file."""

    op = Op.BACKUP
    success = Status.STORED
    failures: ClassVar[Failures] = {Status.FAILED: Refused}

    def __init__(self, user_id: int, job: Backup, report: Report) -> None:
        super().__init__(user_id, encode(job.name))
        self._path = job.path
        self._report = report
        self._source: Optional[Source] = None

    def request(self) -> Outgoing:
        self._source = source = Source(self._path, self._report)
        self.bytes = source.size
        request = Request(self._user_id, VERSION, self.op, self._name, source.size)
        return Outgoing(encode_request(request), source)

    def refusal(self) -> str:
        if not self.bytes:
            return "the server refuses an empty file"
        return "the server did not store it (a cap, append-only, or its disk); its log says why"

    def _check(self, response: Response) -> None:
        super()._check(response)
        if self._source is not None and self._source.remaining:
            raise ProtocolError("the server says it has stored what was not sent yet")


class RetrieveExchange(Exchange):
    """Receives a file."""

    op = Op.RETRIEVE
    success = Status.FOUND
    failures: ClassVar[Failures] = {Status.NOT_FOUND: NotFound, Status.FAILED: Refused}

    def __init__(self, user_id: int, job: Retrieve, report: Report) -> None:
        super().__init__(user_id, encode(job.name))
        self._target = Target(job.path, job.overwrite)
        self._report = report
        self._size_field = b""
        self._size = 0

    def finish(self) -> None:
        self._target.finish()

    def abort(self) -> None:
        self._target.abort()

    def _begin_payload(self, size: int) -> None:
        self._size = size - SIZE.size
        if self._size < 0:
            raise ProtocolError(f"a payload of {size} bytes cannot hold a file's size")
        self._target.begin()

    def _take_payload(self, view: memoryview) -> None:
        missing = SIZE.size - len(self._size_field)
        if missing:
            self._size_field += view[:missing]
            view = view[missing:]
            if len(self._size_field) == SIZE.size:
                (size,) = SIZE.unpack(self._size_field)
                if size != self._size:
                    raise ProtocolError(f"a file of {size} bytes in a payload for {self._size}")
        if view:
            self._target.write(view)
            self.bytes += len(view)
        self._report(self.bytes, self._size)


class DeleteExchange(Exchange):
    """Removes a file."""

    op = Op.DELETE
    success = Status.DELETED
    failures: ClassVar[Failures] = {Status.NOT_DELETED: NotDeleted}

    def __init__(self, user_id: int, job: Delete) -> None:
        super().__init__(user_id, encode(job.name))


class ListExchange(Exchange):
    """Receives the names of the user's files."""

    op = Op.LIST
    success = Status.FOUND
    failures: ClassVar[Failures] = {Status.FAILED: Refused}

    def __init__(self, user_id: int, max_bytes: int, max_names: int) -> None:
        super().__init__(user_id, b"")
        self._max_bytes = max_bytes
        self._max_names = max_names
        self._size = 0
        self._payload = bytearray()

    def finish(self) -> None:
        self.bytes = len(self._payload)
        self.names = decode_listing(bytes(self._payload))

    def _begin_payload(self, size: int) -> None:
        if not SIZE.size <= size <= self._max_bytes:
            raise ProtocolError(f"a listing of {size} bytes, not {SIZE.size} to {self._max_bytes}")
        self._size = size

    def _take_payload(self, view: memoryview) -> None:
        counted = len(self._payload) >= SIZE.size
        self._payload += view
        if not counted and len(self._payload) >= SIZE.size:
            (count,) = SIZE.unpack_from(self._payload)
            check_count(count, self._size)
            if count > self._max_names:  # as text, a short name takes 20 times its bytes
                raise ProtocolError(f"a listing of {count} names, more than {self._max_names}")


def exchange_for(
    job: Job, user_id: int, report: Report, max_listing_bytes: int, max_listing_names: int
) -> Exchange:
    """The exchange that does this job. Raises ``InvalidName`` or ``LocalFileError``."""
    if isinstance(job, Backup):
        return BackupExchange(user_id, job, report)
    if isinstance(job, Retrieve):
        return RetrieveExchange(user_id, job, report)
    if isinstance(job, Delete):
        return DeleteExchange(user_id, job)
    return ListExchange(user_id, max_listing_bytes, max_listing_names)


def subject(job: Job) -> str:
    """What a job is about, for messages; empty for a ``Listing``."""
    return show(job.name)
