"""A server that means harm: one script for each thing that a client must survive.

A script takes a connection whose request has been read, and does its worst. All
of it is on real loopback sockets, in one thread of the test's, and ends when
the client is gone, in whatever way it goes.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress
from typing import Callable, List, NamedTuple, Optional, Tuple

from tests.helpers import WAIT_SECONDS, file_payload, reset, response

CONTENT = b"what the server holds"
PACE, BYTES = 0.005, 400
MUCH = b"\0" * (1 << 16)

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202


class Talk(NamedTuple):
    """One connection, and what was asked on it."""

    sock: socket.socket
    op: int
    name: bytes

    @property
    def status(self) -> int:
        """That of success."""
        return {BACKUP: 210, DELETE: 211}.get(self.op, 212)

    @property
    def answer(self) -> bytes:
        """The whole answer that a good server would give."""
        payloads = {RETRIEVE: file_payload(CONTENT), LIST: listing(b"a", b"b")}
        return response(self.status, self.name, payloads.get(self.op, b""))


Script = Callable[[Talk], None]


class HostileServer:
    """Does ``script`` on each connection, one after the other, until the block ends.

    ``takes_all``: it reads a BACKUP's payload before.
    """

    def __init__(self, script: Script, takes_all: bool = True) -> None:
        self._script = script
        self._takes_all = takes_all
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Tuple[str, int] = self._listener.getsockname()
        self._failures: List[BaseException] = []
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> HostileServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends an accept that still waits
        self._thread.join(WAIT_SECONDS)
        self._listener.close()
        assert not self._thread.is_alive(), "the client has not left"
        assert not self._failures

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # the test is over
            with sock:
                sock.settimeout(WAIT_SECONDS)
                try:
                    with suppress(ConnectionError):  # the client leaves when it has seen enough
                        self._script(self._asked(sock))
                        _until_closed(sock)
                except Exception as failure:  # handed to the test by __exit__
                    self._failures.append(failure)

    def _asked(self, sock: socket.socket) -> Talk:
        """Reads a request."""
        _, _, op, length = struct.unpack("<IBBH", _take(sock, 8))
        name = _take(sock, length)
        size = int.from_bytes(_take(sock, 4), "little") if op == BACKUP else 0
        _take(sock, size if self._takes_all else 0)
        return Talk(sock, op, name)


# -- what a script does -------------------------------------------------------


def listing(*names: bytes, count: int = -1) -> bytes:
    """The payload of LIST; ``count`` lets it lie."""
    head = struct.pack("<I", len(names) if count < 0 else count)
    return head + b"".join(struct.pack("<H", len(name)) + name for name in names)


def header(talk: Talk, status: int, size: int) -> bytes:
    """An answer's fields, announcing ``size`` bytes of payload, whether they come or not."""
    return struct.pack("<BHHI", 1, status, len(talk.name), size) + talk.name


def silent(_talk: Talk) -> None:
    """Nothing ever comes."""


def silent_in_the_header(talk: Talk) -> None:
    talk.sock.sendall(talk.answer[:5])


def silent_at_the_end(talk: Talk) -> None:
    """All but the last byte has come."""
    talk.sock.sendall(talk.answer[:-1])


def closing(talk: Talk) -> None:
    """Ends without a byte."""
    talk.sock.shutdown(socket.SHUT_WR)


def resetting(talk: Talk) -> None:
    """Breaks the connection without a byte."""
    reset(talk.sock)


def fewer(talk: Talk) -> None:
    """Ends one byte before what it has announced."""
    talk.sock.sendall(talk.answer[:-1])
    talk.sock.shutdown(socket.SHUT_WR)


def resetting_in_the_middle(talk: Talk) -> None:
    talk.sock.sendall(talk.answer[:-1])
    reset(talk.sock)


def more(talk: Talk) -> None:
    """One byte behind the answer."""
    talk.sock.sendall(talk.answer + b"x")


def endlessly_more(talk: Talk) -> None:
    talk.sock.sendall(talk.answer)
    _flood(talk.sock)


def greeting(talk: Talk) -> None:
    """A server of another kind, which now waits for the client's greeting."""
    talk.sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


def endless_bytes(byte: bytes) -> Script:
    """The same byte, for ever."""

    def script(talk: Talk) -> None:
        _flood(talk.sock, byte * (1 << 16))

    return script


def for_another_name(name: bytes) -> Script:
    """A good answer, but for ``name``."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(talk._replace(name=name).answer)

    return script


def with_status(status: int) -> Script:
    """An answer without payload."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(header(talk, status, 0))

    return script


def announcing(size: int, status: Optional[int] = None) -> Script:
    """So many bytes are to come; zeros come, for ever. The status is success by default."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(header(talk, talk.status if status is None else status, size))
        _flood(talk.sock)

    return script


def large_file(announced: int, inside: int, sent: int, end: Script) -> Script:
    """Announces a payload, and a file inside it; sends so much of that, and then does ``end``."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(header(talk, talk.status, announced) + struct.pack("<I", inside))
        for _ in range(sent // len(MUCH)):
            talk.sock.sendall(MUCH)
        end(talk)

    return script


def listed(payload: bytes, size: int = -1) -> Script:
    """This payload, announced as it is or as ``size``; then the end."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(header(talk, talk.status, len(payload) if size < 0 else size) + payload)
        talk.sock.shutdown(socket.SHUT_WR)

    return script


def dribbling(at_once: Callable[[Talk], bytes]) -> Script:
    """This at once; then a byte each ``PACE`` seconds, for longer than a client may bear it."""

    def script(talk: Talk) -> None:
        talk.sock.sendall(at_once(talk))
        for _ in range(BYTES):
            if select.select([talk.sock], [], [], PACE)[0]:
                return  # the client has left
            talk.sock.sendall(b"\0")
        talk.sock.shutdown(socket.SHUT_WR)

    return script


def sipping(left: threading.Event) -> Script:
    """Takes a byte of the payload each ``PACE`` seconds until ``left``.

    The client's end is no sign: it stands behind all that is still unread.
    """

    def script(talk: Talk) -> None:
        while not left.wait(PACE):
            talk.sock.recv(1)

    return script


def _flood(sock: socket.socket, piece: bytes = MUCH) -> None:
    while True:  # until the client leaves
        sock.sendall(piece)


def _take(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectionError("the client ended inside its request")
        data += piece
    return data


def _until_closed(sock: socket.socket) -> None:
    if sock.fileno() >= 0:  # the script may have closed it
        while sock.recv(1 << 16):
            continue
