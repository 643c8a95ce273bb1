"""The receiving machine of both ends: bytes in, parts of one message out.

Rules:

- A message is a row of fields: header, filename, size (only in a request for
  BACKUP), payload. ``State`` says which field the next byte belongs to.
- ``TRANSITIONS`` is the whole of it. Each completed field raises one ``Event``,
  which names what its values say comes next, and the table says where that
  leads. A pair that is not in the table is a fault of this program: KeyError.
- The machine touches no socket and no file. Fields are held until they are
  whole; payload never is: it leaves as it came, as a view of the caller's
  buffer, valid until the caller receives again.
- However the bytes are cut, the parts are the same but for how ``Data`` and
  ``Excess`` are divided: ``Head``, any number of ``Data``, ``End``, and
  ``Excess`` for whatever follows. A peer that ends in between makes one ``Cut``.
"""

from __future__ import annotations

from enum import Enum
from typing import Dict, List, NamedTuple, Tuple, Union

from .wire import REQUEST_HEADER, RESPONSE_HEADER, SIZE, Op, Request, Response


class State(Enum):
    """What the next byte is."""

    HEADER = "header"
    FILENAME = "filename"
    SIZE = "size"
    PAYLOAD = "payload"
    DONE = "done"
    CUT = "cut"


class Event(Enum):
    """What the field that just ended says comes next."""

    NAMED = "a filename follows"
    SIZED = "a size follows"
    FILLED = "a payload follows"
    ENDED = "nothing follows"
    CLOSED = "the peer ended"


TRANSITIONS: Dict[State, Dict[Event, State]] = {
    State.HEADER: {
        Event.NAMED: State.FILENAME,
        Event.SIZED: State.SIZE,
        Event.FILLED: State.PAYLOAD,
        Event.ENDED: State.DONE,
        Event.CLOSED: State.CUT,
    },
    State.FILENAME: {
        Event.SIZED: State.SIZE,
        Event.FILLED: State.PAYLOAD,
        Event.ENDED: State.DONE,
        Event.CLOSED: State.CUT,
    },
    State.SIZE: {
        Event.FILLED: State.PAYLOAD,
        Event.ENDED: State.DONE,
        Event.CLOSED: State.CUT,
    },
    State.PAYLOAD: {
        Event.ENDED: State.DONE,
        Event.CLOSED: State.CUT,
    },
    State.DONE: {
        Event.CLOSED: State.DONE,
    },
    State.CUT: {},
}

# Looking a member up on its class costs 64 ns on Python 3.9, a global 9.
_PAYLOAD, _DONE = State.PAYLOAD, State.DONE


class Head(NamedTuple):
    """Every field before the payload has been read."""

    message: Union[Request, Response]


class Data(NamedTuple):
    """A piece of the payload; ``view`` is valid until the caller receives again."""

    view: memoryview


class End(NamedTuple):
    """The message is whole."""


class Excess(NamedTuple):
    """``length`` bytes came after the message's end."""

    length: int


class Cut(NamedTuple):
    """The peer ended while the machine was in ``state``; ``message`` holds the fields so far."""

    state: State
    message: Union[Request, Response]


Part = Union[Head, Data, End, Excess, Cut]


class Receiver:
    """The machine, for one message; ``RequestReceiver`` and ``ResponseReceiver`` know the fields.

    ``state`` may be read at any time.
    """

    _header_bytes: int

    def __init__(self) -> None:
        self.state = State.HEADER
        self._need = self._header_bytes  # bytes missing from the current field or payload
        self._held = bytearray()  # the current field's bytes, until it is whole

    def feed(self, data: memoryview) -> List[Part]:
        """Takes all of ``data`` and returns the parts it completes, in order."""
        parts: List[Part] = []
        while data:
            if self.state is _PAYLOAD:
                piece = data[: self._need]
                parts.append(Data(piece))
                self._need -= len(piece)
                if not self._need:
                    self._advance(Event.ENDED)
                    parts.append(End())
            elif self.state is _DONE:
                piece = data
                parts.append(Excess(len(piece)))
            elif self.state is State.CUT:
                self._advance(Event.NAMED)  # there is no way on: KeyError
            else:
                piece = data[: self._need]
                self._held += piece
                self._need -= len(piece)
                if not self._need:
                    field, self._held = bytes(self._held), bytearray()
                    parts += self._field(field)
            data = data[len(piece) :]
        return parts

    def close(self) -> List[Part]:
        """Takes note that the peer ended; one ``Cut`` if it ended inside a message."""
        before = self.state
        self._advance(Event.CLOSED)
        return [] if self.state is _DONE else [Cut(before, self._message())]

    def _advance(self, event: Event) -> None:
        self.state = TRANSITIONS[self.state][event]

    def _field(self, field: bytes) -> List[Part]:
        """Stores a whole field's values, moves on, and returns the parts this completes."""
        event, need = self._read(field)
        self._advance(event)
        self._need = need
        if event in (Event.FILLED, Event.ENDED):
            head: Part = Head(self._message())
            return [head, End()] if event is Event.ENDED else [head]
        return []

    def _read(self, field: bytes) -> Tuple[Event, int]:
        """What follows this field, and how many bytes that has."""
        raise NotImplementedError

    def _message(self) -> Union[Request, Response]:
        raise NotImplementedError


class RequestReceiver(Receiver):
    """The server's end: header, filename, size if it is a BACKUP, payload."""

    _header_bytes = REQUEST_HEADER.size

    def __init__(self) -> None:
        super().__init__()
        self._request = Request(0, 0, 0, b"")

    def _read(self, field: bytes) -> Tuple[Event, int]:
        if self.state is State.HEADER:
            user_id, version, op, name_length = REQUEST_HEADER.unpack(field)
            self._request = Request(user_id, version, op, b"")
            if name_length:
                return Event.NAMED, name_length
        elif self.state is State.FILENAME:
            self._request = self._request._replace(name=field)
        else:
            (size,) = SIZE.unpack(field)
            self._request = self._request._replace(size=size)
            return (Event.FILLED if size else Event.ENDED), size
        if self._request.op == Op.BACKUP:
            return Event.SIZED, SIZE.size
        return Event.ENDED, 0

    def _message(self) -> Request:
        return self._request


class ResponseReceiver(Receiver):
    """The client's end: header, which holds the size, filename, payload."""

    _header_bytes = RESPONSE_HEADER.size

    def __init__(self) -> None:
        super().__init__()
        self._response = Response(0, 0, b"")

    def _read(self, field: bytes) -> Tuple[Event, int]:
        if self.state is State.HEADER:
            version, status, name_length, size = RESPONSE_HEADER.unpack(field)
            self._response = Response(version, status, b"", size)
            if name_length:
                return Event.NAMED, name_length
        else:
            self._response = self._response._replace(name=field)
        size = self._response.size
        return (Event.FILLED if size else Event.ENDED), size

    def _message(self) -> Response:
        return self._response
