"""Whatever bytes come in whatever pieces, a machine makes of them what they are as a whole.

That is the invariant of these four targets, which need no socket: the receiving machine of either
end, the payload of LIST, and what the client believes of an answer. What bytes are as a whole is
told by ``messages`` and by the few lines here, which share nothing with the package.
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Type, Union

from backup.errors import BackupError, CutShort, NotDeleted, NotFound, ProtocolError, Refused
from backup.exchange import Backup, Delete, Job, Listing, Retrieve, exchange_for
from backup.protocol import (
    Cut,
    Data,
    End,
    Excess,
    Head,
    Part,
    Receiver,
    RequestReceiver,
    ResponseReceiver,
)
from backup.wire import decode_listing

from . import messages
from .choices import Broken, Choices, Tally
from .messages import BACKUP, DELETE, FAILURES, LIST, OPS, RETRIEVE, SUCCESS

Kinds = Tuple[Type[BackupError], ...]

_WRONG: Kinds = (ProtocolError, CutShort)
_REFUSED: Dict[object, Kinds] = {1001: (Refused,), 1002: (NotDeleted,), 1003: (NotFound,)}

USER = 11
MAX_LISTING = 64
MAX_NAMES = 1000
"""Bytes of the largest listing that the client of these examples takes."""


class Pieces(NamedTuple):
    """Bytes and how they come; then the peer ends."""

    data: bytes
    cuts: Tuple[int, ...]


class Whole(NamedTuple):
    """What a machine has made of all its bytes."""

    fields: Tuple[object, ...]  # of the message, as far as they had come
    headed: bool
    payload: bytes
    ended: bool
    excess: int
    cut: str  # the state in which the peer ended; empty if it was not inside a message


def arrive(pieces: Pieces, receiver: Receiver, take: Callable[[Part], None]) -> None:
    """Feeds a machine as a connection does: through one buffer, which the next piece overwrites."""
    scratch = bytearray(max((0, *pieces.cuts)))
    start = 0
    for length in pieces.cuts:
        scratch[:] = b"\xee" * len(scratch)
        scratch[:length] = pieces.data[start : start + length]
        for part in receiver.feed(memoryview(scratch)[:length]):
            take(part)
        start += length
    for part in receiver.close():
        take(part)


def _heard(pieces: Pieces, receiver: Receiver) -> Whole:
    """What the machine says, joined; its parts have to come in their order."""
    order: List[str] = []
    payload: List[bytes] = []
    fields: Tuple[object, ...] = ()
    excess, cut = 0, ""

    def take(part: Part) -> None:
        nonlocal fields, excess, cut
        order.append({Head: "h", Data: "d", End: "e", Excess: "x", Cut: "c"}[type(part)])
        if isinstance(part, Data):
            payload.append(bytes(part.view))
        elif isinstance(part, Excess):
            excess += part.length
        elif isinstance(part, Head):
            fields = tuple(part.message)
        elif isinstance(part, Cut):
            cut, fields = part.state.value, tuple(part.message)

    arrive(pieces, receiver, take)
    word = "".join(order)
    grammar = word.replace("d", "").rstrip("x")
    if grammar not in ("he", "hc", "c") or "dh" in word or "ed" in word or b"" in payload:
        raise Broken(f"the parts come as {word!r}")
    return Whole(fields, "h" in word, b"".join(payload), "e" in word, excess, cut)


def _agree(heard: Whole, meant: Whole) -> None:
    if heard != meant:
        raise Broken(f"heard {heard}, meant {meant}")


def request_in_pieces(choices: Choices) -> Pieces:
    data = messages.mutated(choices, messages.a_request(choices))
    return Pieces(data, messages.cuts(choices, len(data)))


def check_request(pieces: Pieces, tally: Tally) -> None:
    tally.requests += 1
    _agree(_heard(pieces, RequestReceiver()), _request(pieces.data))


def _request(data: bytes) -> Whole:
    if len(data) < 8:
        return Whole((0, 0, 0, b"", 0), False, b"", False, 0, "header")
    user, version, op, length = struct.unpack_from("<IBBH", data)
    name, rest = data[8 : 8 + length], data[8 + length :]
    if len(name) < length:
        return Whole((user, version, op, b"", 0), False, b"", False, 0, "filename")
    if op != BACKUP:
        return _payload((user, version, op, name, 0), rest, 0)
    if len(rest) < 4:
        return Whole((user, version, op, name, 0), False, b"", False, 0, "size")
    (size,) = struct.unpack_from("<I", rest)
    return _payload((user, version, op, name, size), rest[4:], size)


def _payload(fields: Tuple[object, ...], rest: bytes, size: int) -> Whole:
    if len(rest) < size:
        return Whole(fields, True, rest, False, 0, "payload")
    return Whole(fields, True, rest[:size], True, len(rest) - size, "")


def a_response(choices: Choices, op: int, name: bytes) -> bytes:
    """An answer to a request of this op and name, mostly a lawful one."""
    payload = b""
    status = SUCCESS[op]
    if op == RETRIEVE:
        content = choices.data(40)
        payload = struct.pack("<I", messages.a_size(choices, len(content))) + content
    elif op == LIST:
        payload = a_listing(choices)
    if choices.once_in(4):
        status, payload = choices.pick((1001, 1002, 1003)), b""
    elif choices.once_in(8):
        status = choices.pick((0, 210, 211, 212, 1001, 1002, 1003, 65535))
    if choices.once_in(8):
        name = messages.a_name(choices)
    version = choices.integer(0, 255) if choices.once_in(12) else 1
    size = messages.a_size(choices, len(payload))
    return messages.response(status, name, payload, size, version)


def a_listing(choices: Choices) -> bytes:
    names = [messages.a_name(choices) for _ in range(choices.integer(0, 4))]
    return messages.listing(names, messages.a_size(choices, len(names)))


def response_in_pieces(choices: Choices) -> Pieces:
    response = a_response(choices, choices.pick(OPS), choices.pick(messages.NAMES))
    data = messages.mutated(choices, response)
    return Pieces(data, messages.cuts(choices, len(data)))


def check_response(pieces: Pieces, tally: Tally) -> None:  # noqa: ARG001
    _agree(_heard(pieces, ResponseReceiver()), _response(pieces.data))


def _response(data: bytes) -> Whole:
    if len(data) < 9:
        return Whole((0, 0, b"", 0), False, b"", False, 0, "header")
    version, status, length, size = struct.unpack_from("<BHHI", data)
    name, rest = data[9 : 9 + length], data[9 + length :]
    if version != 1:  # another protocol's bytes: nobody knows what follows
        return _payload((version, status, b"", size), data[9:], 0)
    if len(name) < length:
        return Whole((version, status, b"", size), False, b"", False, 0, "filename")
    return _payload((version, status, name, size), rest, size)


def listing(choices: Choices) -> bytes:
    return messages.mutated(choices, a_listing(choices))


def check_listing(payload: bytes, tally: Tally) -> None:  # noqa: ARG001
    meant = messages.listed(payload)
    try:
        heard: Optional[List[bytes]] = [name.encode() for name in decode_listing(payload)]
    except ProtocolError:
        heard = None
    if heard != meant:
        raise Broken(f"heard {heard}, meant {meant}")


class Believed(NamedTuple):
    """A request of the client's and the bytes that answer it; ``sent``: after it has left."""

    op: int
    name: bytes
    sent: bool
    answer: Pieces


def believed(choices: Choices) -> Believed:
    op = choices.pick(OPS)
    name = b"" if op == LIST else choices.pick(messages.NAMES)
    data = messages.mutated(choices, a_response(choices, op, name))
    sent = not choices.once_in(6)
    return Believed(op, name, sent, Pieces(data, messages.cuts(choices, len(data))))


CONTENT = b"what is backed up"


def check_answer(example: Believed, tally: Tally) -> None:
    """The client takes what is an answer and nothing else, and leaves the target of a success."""
    tally.requests += 1
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_bytes(CONTENT)
        text = os.fsdecode(example.name)
        jobs: List[Job] = [
            Backup(source, text),
            Retrieve(text, target),
            Delete(text),
            Listing(),
        ]
        job = jobs[OPS.index(example.op)]
        exchange = exchange_for(job, USER, lambda *_: None, MAX_LISTING, MAX_NAMES)
        outgoing = exchange.request()
        error: Optional[BackupError] = None
        try:
            if outgoing.body is not None and example.sent:
                outgoing.body.remaining = 0
            arrive(example.answer, ResponseReceiver(), exchange.take)
            exchange.finish()
        except BackupError as caught:
            error = caught
            exchange.abort()
        finally:
            if outgoing.body is not None:
                outgoing.body.close()
        tally.answers["believed" if error is None else type(error).__name__] += 1
        heard = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        meant = _verdict(example)
        files = {"source": CONTENT}
        if isinstance(meant, bytes) and example.op == RETRIEVE:
            files["target"] = meant
        if heard != files:
            raise Broken(f"the client leaves {heard}, not {files}")
        if isinstance(meant, bytes):
            if error is not None:
                raise Broken(f"a right answer is not believed: {error}")
            names = messages.listed(meant) if example.op == LIST else []
            if [os.fsencode(name) for name in exchange.names] != names:
                raise Broken(f"the client lists {exchange.names}, not {names}")
        elif type(error) not in meant:
            raise Broken(f"the answer ends in {error!r}, not in one of {meant}")


def _verdict(example: Believed) -> Union[bytes, Kinds]:
    """What a right answer brings, as bytes; or the kinds of error a wrong one may end in."""
    whole = _response(example.answer.data)
    if not whole.headed:
        return _WRONG
    version, status, name, size = whole.fields
    if version != 1 or name != example.name:
        return _WRONG
    if status in FAILURES[example.op] and size == 0:
        return _REFUSED[status]
    if status != SUCCESS[example.op] or not whole.ended or whole.excess:
        return _WRONG
    payload = whole.payload
    if example.op in (BACKUP, DELETE):
        return _WRONG if payload or not (example.sent or example.op == DELETE) else b""
    if example.op == LIST:
        fits = len(payload) <= MAX_LISTING and messages.listed(payload) is not None
        return payload if fits else _WRONG
    if len(payload) < 4 or payload[:4] != struct.pack("<I", len(payload) - 4):
        return _WRONG
    return payload[4:]
