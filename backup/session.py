"""The server's end of one exchange: what each operation does and answers.

Rules: a request becomes an answer, as values: ``take`` returns what to send.
Nothing is changed here: an upload is written to its temporary file, and what
would take effect, a whole upload or a removal, is left in ``change`` for the
server to commit with all others of the turn. Any ``Refused`` becomes the
failure status of the operation. Every request that is answered, or whose fields
were whole, leaves exactly one line in the log, when it ends.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Callable, Dict, Optional, Union

from .connection import Body, Endpoint, Later, Outgoing
from .errors import (
    BackupError,
    ConnectionFailed,
    CutShort,
    EmptyFile,
    Refused,
    StoreFailed,
    TooLarge,
    UnknownOperation,
)
from .log import Log
from .names import MAX_NAME_BYTES, escape
from .protocol import Cut, Data, End, Excess, Head, Part, State
from .storage import Change, Store, Stored, Upload
from .stream import Stream
from .wire import (
    MAX_FILE_BYTES,
    MAX_SIZE,
    SIZE,
    VERSION,
    Op,
    Request,
    Response,
    Status,
    encode_listing,
    encode_response,
    failure_status,
)


class StoredBody(Body):
    """A stored file on its way out."""

    def __init__(self, stored: Stored) -> None:
        self._fd = stored.fd
        self._offset = 0
        self.remaining = stored.size

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        count = stream.send_file(self._fd, self._offset, min(limit, self.remaining))
        if count is None:
            return None
        if count == 0:  # stored files never change, unless somebody else's hand does it
            raise ConnectionFailed("a stored file became shorter while it was sent")
        self._offset += count
        self.remaining -= count
        return count

    def close(self) -> None:
        os.close(self._fd)


class Session(Endpoint):
    """One request: its parts in, its answer out. ``change`` is what is to be committed."""

    def __init__(
        self, store: Store, log: Log, peer: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._log = log
        self._peer = peer
        self._now = now
        self._began = now()
        self._request: Optional[Request] = None
        self._status: Optional[int] = None  # once there is an answer
        self._error: Optional[BackupError] = None
        self._bytes = 0  # of the file or listing: received, or to be sent
        self._body: Optional[Body] = None
        self._logged = False
        self.change: Optional[Change] = None

    def take(self, part: Part) -> Union[Outgoing, Later, None]:
        if self._status is not None or isinstance(part, Excess):
            return None  # answered already: what comes now is read and thrown away
        try:
            if isinstance(part, Data):
                self._write(part.view)
                return None
            if isinstance(part, Head):
                assert isinstance(part.message, Request)
                return self._begin(part.message)
            if isinstance(part, End):
                return Later.AT_TURN_END if self.change is not None else None
            return self._cut(part)
        except Refused as error:
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
        self._error = self._error or error
        if self._request is not None:
            self._write_line()
        elif error is not None:
            self._log.add(
                logging.DEBUG, f"closed without a request reason={error.reason} peer={self._peer}"
            )

    def _begin(self, request: Request) -> Optional[Outgoing]:
        self._request = request
        if request.version != VERSION:
            text = f"unexpected protocol version {request.version}, expected {VERSION}"
            self._log.add(logging.WARNING, f"{text} peer={self._peer}")
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
        self.change = self._store.begin(request.user_id, request.name)

    def _retrieve(self, request: Request) -> Outgoing:
        stored = self._store.open(request.user_id, request.name)
        body = StoredBody(stored)
        if stored.size > MAX_FILE_BYTES:
            body.close()
            raise TooLarge(f"{stored.size} bytes are more than an answer can carry")
        self._body = body
        self._bytes = stored.size
        return self._answer(Status.FOUND, SIZE.pack(stored.size), body)

    def _delete(self, request: Request) -> None:
        self.change = self._store.remove(request.user_id, request.name)

    def _list(self, request: Request) -> Outgoing:
        payload = encode_listing(self._store.names(request.user_id))
        if len(payload) > MAX_SIZE:
            raise TooLarge(f"a listing of {len(payload)} bytes is more than an answer can carry")
        self._bytes = len(payload)
        return self._answer(Status.FOUND, payload)

    def _write(self, view: memoryview) -> None:
        assert isinstance(self.change, Upload)
        self.change.write(view)
        self._bytes += len(view)

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
        if self._logged or self._request is None:
            return
        self._logged = True
        request = self._request
        done = self._bytes - (self._body.remaining if self._body else 0)
        milliseconds = (self._now() - self._began) * 1000
        status = "-" if self._status is None else int(self._status)
        reason = f" reason={self._error.reason}" if self._error else ""
        self._log.add(
            logging.INFO,
            f"user={request.user_id} op={request.op} file={_shown(request.name)} "
            f"status={status} bytes={done} ms={milliseconds:.1f} peer={self._peer}{reason}",
        )


def _shown(name: bytes) -> str:
    """A name in the log; one that is longer than any lawful name is cut."""
    rest = "…" if len(name) > MAX_NAME_BYTES else ""
    return escape(name[:MAX_NAME_BYTES]) + rest


_OPERATIONS: Dict[int, Callable[[Session, Request], Optional[Outgoing]]] = {
    Op.BACKUP: Session._backup,
    Op.RETRIEVE: Session._retrieve,
    Op.DELETE: Session._delete,
    Op.LIST: Session._list,
}
