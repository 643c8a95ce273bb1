"""The server's end of one exchange: what each operation does and answers.

Rules: a request becomes an answer, as values: ``take`` returns what to send.
Nothing is changed here: an upload is written to its temporary file, and what
would take effect, a whole upload or a removal, is left in ``change`` for the
server to commit with all others of the turn. What would keep the loop too long,
a piece of an upload that has to get to the disk or the names of a large folder,
is put off to ``step``. Any ``Refused`` becomes the failure status of the
operation. Every request that is answered, or whose fields were whole, leaves
exactly one line in the log, when it ends.
"""

from __future__ import annotations

import logging
import time
from itertools import islice
from typing import Callable, Dict, Optional, Union

from .connection import Body, Endpoint, Later, Outgoing
from .counters import Counters
from .errors import (
    AppendOnly,
    BackupError,
    CutShort,
    EmptyFile,
    QuotaExceeded,
    Refused,
    StoreFailed,
    TooLarge,
    UnknownOperation,
)
from .listing import Listing
from .log import Log
from .names import MAX_NAME_BYTES, escape
from .protocol import Cut, Data, End, Excess, Head, Part, State
from .settings import Settings
from .storage import Change, Store, Stored
from .stream import Stream
from .upload import Upload
from .wire import (
    MAX_FILE_BYTES,
    MAX_SIZE,
    SIZE,
    VERSION,
    Op,
    Request,
    Response,
    Status,
    encode_names,
    encode_response,
    failure_status,
    listing_size,
)


class StoredBody(Body):
    """A stored file on its way out."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._open = True
        self._offset = 0
        self.remaining = stored.size

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        try:
            count = stream.send_file(self._stored.fd, self._offset, min(limit, self.remaining))
        except OSError as error:
            raise StoreFailed(f"cannot read a stored file: {error}; check its disk") from error
        if count is None:
            return None
        if count == 0:  # stored files never change, unless by somebody else's hand
            raise StoreFailed("a stored file became shorter while it was sent; look at it")
        self._offset += count
        self.remaining -= count
        return count

    def close(self) -> None:
        if self._open:
            self._open = False
            self._stored.close()


class ListedBody(Body):
    """The names of a large folder: merged and encoded slice by slice, then sent."""

    def __init__(self, listing: Listing, slice_names: int) -> None:
        self.count = SIZE.pack(listing.count)
        self._names = iter(listing)
        self._slice = slice_names
        self._size = listing_size(listing.count, listing.bytes) - SIZE.size
        self._encoded = bytearray()
        self.remaining = self._size

    @property
    def whole(self) -> bool:
        """Whether all names are encoded."""
        return len(self._encoded) == self._size

    def encode(self) -> None:
        """Merges and encodes the next slice."""
        self._encoded += encode_names(islice(self._names, self._slice))
        if self.whole:
            self._names = iter(())

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        with memoryview(self._encoded) as view:
            sent = self._size - self.remaining
            count = stream.send(view[sent : sent + limit], more=True)
        if count is not None:
            self.remaining -= count
        return count


class Session(Endpoint):
    """One request: its parts in, its answer out. ``change`` is what is to be committed."""

    __slots__ = (
        "_began",
        "_body",
        "_bytes",
        "_counters",
        "_error",
        "_listing",
        "_log",
        "_logged",
        "_now",
        "_peer",
        "_request",
        "_settings",
        "_status",
        "_store",
        "change",
    )

    def __init__(
        self,
        store: Store,
        log: Log,
        peer: str,
        now: Callable[[], float] = time.monotonic,
        settings: Settings = Settings(),
        counters: Optional[Counters] = None,
    ) -> None:
        self._store = store
        self._counters = Counters() if counters is None else counters
        self._log = log
        self._settings = settings
        self._peer = peer
        self._now = now
        self._began = now()
        self._request: Optional[Request] = None
        self._status: Optional[int] = None  # once there is an answer
        self._error: Optional[BackupError] = None
        self._bytes = 0  # of the file or listing: received, or to be sent
        self._body: Optional[Body] = None
        self._listing: Optional[Listing] = None  # while it is read
        self._logged = False
        self.change: Optional[Change] = None

    def take(self, part: Part) -> Union[Outgoing, Later, None]:
        if self._status is not None or isinstance(part, Excess):
            return None  # answered already: what comes now is read and thrown away
        try:
            if isinstance(part, Data):
                return self._write(part.view)
            if isinstance(part, Head):
                assert isinstance(part.message, Request)
                return self._begin(part.message)
            if isinstance(part, End):
                return self._whole() if self.change is not None else None
            return self._cut(part)
        except Refused as error:
            return self._fail(error)

    def step(self) -> Union[Outgoing, Later, None]:
        """Does the piece of work that was put off; an answer, more of it, or the next bytes."""
        if self._status is not None:
            return None  # it was refused meanwhile
        try:
            if isinstance(self.change, Upload):
                assert self._request is not None
                if not self._store.reserve(self.change):
                    return Later.STEP
                if self._bytes == self._request.size:
                    return Later.COMMIT
                if self.change.behind:  # and not only waiting to be counted
                    self.change.catch_up()
                return None
            if isinstance(self._body, ListedBody):
                return self._encode(self._body)
            assert self._listing is not None
            self._listing.step()
            return self._listed(self._listing)
        except Refused as error:
            return self._fail(error)

    def refuse(self, error: BackupError) -> Optional[Outgoing]:
        """The failure of the operation, if it is known, whatever was to be the answer."""
        if self._request is None:
            return None
        if self._body is not None:
            self._body.close()
            self._body = None
        if self._request.op != Op.BACKUP:  # of which these have arrived
            self._bytes = 0
        return self._fail(error)

    def sent(self) -> None:
        self._write_line()

    def committed(self, error: Optional[BackupError]) -> Outgoing:
        """The answer, now that the store has said how ``change`` ended."""
        change, self.change = self.change, None
        if error is not None:
            return self._fail(error)
        stored = isinstance(change, Upload)
        return self._answer(Status.STORED if stored else Status.DELETED)

    def closed(self, error: Optional[BackupError]) -> None:
        """The connection is closed, with ``error`` if the answer has not passed."""
        if isinstance(self.change, Upload):
            self.change.abort()
        if self._listing is not None:
            self._listing.close()
        if isinstance(error, StoreFailed):  # which broke the answer off
            self._log.add(logging.WARNING, str(error))
        self._error = self._error or error
        if self._request is not None:
            self._write_line()
        elif error is not None:
            fields = {"reason": error.reason, "peer": self._peer}
            self._log.add(logging.DEBUG, "closed without a request", fields)
        # Its traceback has the frames that have this session: a cycle, and all that hangs on it.
        self._error = None

    def _begin(self, request: Request) -> Union[Outgoing, Later, None]:
        self._request = request
        if request.version != VERSION:
            text = f"unexpected protocol version {request.version}, expected {VERSION}"
            self._log.add(logging.WARNING, text, {"peer": self._peer})
        operation = _OPERATIONS.get(request.op)
        if operation is None:
            raise UnknownOperation(
                f"op {request.op} is not one of {', '.join(str(int(op)) for op in _OPERATIONS)}"
            )
        return operation(self, request)

    def _backup(self, request: Request) -> None:
        if request.size == 0:
            raise EmptyFile("the server refuses an empty file")
        if request.size > MAX_FILE_BYTES:
            raise TooLarge(f"{request.size} bytes are more than an answer can carry")
        self.change = self._store.begin(request.user_id, request.name, request.size)

    def _retrieve(self, request: Request) -> Outgoing:
        stored = self._store.open(request.user_id, request.name)
        if stored.size > MAX_FILE_BYTES:
            stored.close()
            raise TooLarge(f"{stored.size} bytes are more than an answer can carry")
        self._bytes = stored.size
        size = SIZE.pack(stored.size)
        if stored.size <= self._settings.small_bytes:  # then it leaves with the fields
            return self._answer(Status.FOUND, size + stored.read())
        self._body = StoredBody(stored)
        return self._answer(Status.FOUND, size, self._body)

    def _delete(self, request: Request) -> None:
        self.change = self._store.remove(request.user_id, request.name)

    def _list(self, request: Request) -> Union[Outgoing, Later]:
        return self._listed(self._store.list(request.user_id))

    def _listed(self, listing: Listing) -> Union[Outgoing, Later]:
        """The answer, if all names have been read."""
        if not listing.done:
            self._listing = listing
            return Later.STEP
        size = listing_size(listing.count, listing.bytes)
        if size > MAX_SIZE:
            raise TooLarge(f"a listing of {size} bytes is more than an answer can carry")
        self._bytes = size
        if listing is not self._listing:  # it was one slice
            return self._answer(Status.FOUND, SIZE.pack(listing.count) + encode_names(listing))
        self._body = ListedBody(listing, self._settings.listing_names)
        return Later.STEP

    def _encode(self, body: ListedBody) -> Union[Outgoing, Later]:
        """The answer, if all names have been encoded."""
        body.encode()
        if not body.whole:
            return Later.STEP
        if self._listing is not None:
            self._listing.close()
            self._listing = None
        return self._answer(Status.FOUND, body.count, body)

    def _write(self, view: memoryview) -> Optional[Later]:
        assert isinstance(self.change, Upload)
        assert self._request is not None
        self.change.write(view)
        self._bytes += len(view)
        if self._bytes == self._request.size:
            return None  # its commit makes it durable
        return Later.STEP if self.change.behind or not self.change.granted else None

    def _whole(self) -> Later:
        """What a change waits for that has come as a whole."""
        granted = not isinstance(self.change, Upload) or self.change.granted
        return Later.COMMIT if granted else Later.STEP

    def _cut(self, cut: Cut) -> Optional[Outgoing]:
        if cut.state not in (State.SIZE, State.PAYLOAD):
            return None  # without a filename there is nothing to answer
        assert isinstance(cut.message, Request)
        self._request = cut.message
        return self._fail(CutShort(f"{self._peer}: it ended inside the {cut.state.value}"))

    def _fail(self, error: BackupError) -> Outgoing:
        assert self._request is not None
        if isinstance(self.change, Upload):
            self.change.abort()
        self.change = None
        self._error = error
        if isinstance(error, StoreFailed):
            self._log.add(logging.WARNING, str(error))
        return self._answer(failure_status(self._request.op, error))

    def _answer(self, status: int, payload: bytes = b"", body: Optional[Body] = None) -> Outgoing:
        assert self._request is not None
        name = b"" if self._request.op == Op.LIST else self._request.name
        size = len(payload) + (body.remaining if body else 0)
        self._status = status
        return Outgoing(encode_response(Response(VERSION, status, name, size)) + payload, body)

    def _write_line(self) -> None:
        request = self._request
        if self._logged or request is None:
            return
        self._logged = True
        status = None if self._status is None else int(self._status)
        done = self._bytes - (self._body.remaining if self._body else 0)
        milliseconds = (self._now() - self._began) * 1000
        shown = escape(request.name[:MAX_NAME_BYTES])
        if len(request.name) > MAX_NAME_BYTES:  # longer than any lawful name
            shown += "…"
        fields: Dict[str, object] = {
            "user": request.user_id,
            "op": request.op,
            "file": shown,
            "status": status,
            "bytes": done,
            "ms": round(milliseconds, 1),
            "peer": self._peer,
        }
        level = logging.INFO
        if self._error is not None:
            fields["reason"] = self._error.reason
            if isinstance(self._error, QuotaExceeded):
                fields["cap"] = self._error.cap
            if isinstance(self._error, (QuotaExceeded, AppendOnly)):
                level = logging.WARNING  # the operator has forbidden it, and may want to know
        self._log.add(level, "", fields)
        self._counters.request(request.op, status, done)


_OPERATIONS: Dict[int, Callable[[Session, Request], Union[Outgoing, Later, None]]] = {
    Op.BACKUP: Session._backup,
    Op.RETRIEVE: Session._retrieve,
    Op.DELETE: Session._delete,
    Op.LIST: Session._list,
}
