"""What many tests need: a server in a thread, raw exchanges, the protocol's examples."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Callable, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Type

from backup.log import Line, Log
from backup.server import Server
from backup.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
WAIT_SECONDS = 30.0
"""How long a test waits for an event that should come at once; then it fails."""


class Example(NamedTuple):
    """One row of "Examples (hex)" in docs/PROTOCOL.md, as bytes."""

    title: str
    request: bytes
    response: bytes


def examples() -> List[Example]:
    """The rows of docs/PROTOCOL.md, in their order, which matters."""
    text = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
    table = text.split("## Examples (hex)")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("|")][2:]
    return [
        Example(
            title.strip(), bytes.fromhex(request.strip(" `")), bytes.fromhex(answer.strip(" `"))
        )
        for title, request, answer in rows
    ]


def request(
    user_id: int,
    op: int,
    name: bytes = b"",
    payload: Optional[bytes] = None,
    version: int = 1,
    size: Optional[int] = None,
) -> bytes:
    """A request by the wire's layout, spelled out apart from the package's own code.

    ``size`` announces another number of bytes than the payload has.
    """
    head = struct.pack("<IBBH", user_id, version, op, len(name)) + name
    if payload is None:
        return head
    return head + struct.pack("<I", len(payload) if size is None else size) + payload


def response(status: int, name: bytes = b"", payload: bytes = b"", version: int = 1) -> bytes:
    """A response, spelled out likewise."""
    return struct.pack("<BHHI", version, status, len(name), len(payload)) + name + payload


def file_payload(content: bytes) -> bytes:
    """The payload that answers a RETRIEVE of a file with this content."""
    return struct.pack("<I", len(content)) + content


def read_all(sock: socket.socket) -> bytes:
    """Everything until the peer ends."""
    pieces: List[bytes] = []
    while True:
        piece = sock.recv(1 << 16)
        if not piece:
            return b"".join(pieces)
        pieces.append(piece)


def connect(address: Tuple[str, int]) -> socket.socket:
    """A blocking connection that fails a test rather than hang it."""
    return socket.create_connection(address, timeout=WAIT_SECONDS)


def ask(address: Tuple[str, int], *pieces: bytes, end: bool = False) -> bytes:
    """Sends the pieces one by one, each in a segment of its own, and reads the whole answer.

    ``end`` half-closes after them.
    """
    with connect(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        if end:
            sock.shutdown(socket.SHUT_WR)
        return read_all(sock)


def reset(sock: socket.socket) -> None:
    """Closes with RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@contextmanager
def stdin(data: Optional[bytes]) -> Iterator[None]:
    """Makes these bytes, no more than a pipe holds, standard input; None closes it."""
    before = os.dup(0)
    try:
        if data is None:
            os.close(0)
        else:
            reader, writer = os.pipe()
            os.write(writer, data)
            os.close(writer)
            os.dup2(reader, 0)
            os.close(reader)
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


@contextmanager
def signals_put_back() -> Iterator[None]:
    """What a command line that takes itself for the whole process does to signals is undone."""
    ending = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in ending]
    try:
        yield
    finally:
        for number, handler in zip(ending, before):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)


class RunningServer:
    """A ``Server`` on a free loopback port, served by a thread of the test's until ``stop``."""

    def __init__(self, root: Path, settings: Settings = Settings(), level: int = 0) -> None:
        self.root = root
        self._lines: List[str] = []
        self._changed = threading.Condition()
        self.server = Server(root, ("127.0.0.1", 0), settings, Log(self._take, level))
        self.address = self.server.address
        self.failure: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops it without waiting for running requests, and waits for its thread."""
        self.server.stop()
        self.server.stop()
        self.join()

    def join(self) -> None:
        """Waits until ``serve_forever`` has returned; raises what it raised."""
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "the server did not stop"
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    @property
    def lines(self) -> List[str]:
        """The log so far, without the prefix."""
        with self._changed:
            return list(self._lines)

    def wait_for_line(self, wanted: Callable[[str], bool]) -> str:
        """The first line of the log that is ``wanted``, as soon as it is there."""
        found: List[str] = []

        def look() -> bool:
            found.extend(line for line in self._lines if wanted(line))
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(look, WAIT_SECONDS), f"not logged; log: {self._lines}"
        return found[0]

    def stored(self, user_id: int) -> List[str]:
        """The names of what is on disk for a user, read past the server."""
        folder = self.root / str(user_id)
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def temporary(self) -> List[str]:
        """The names of the store's temporary files."""
        return sorted(path.name for path in (self.root / ".tmp").iterdir())

    def _serve(self) -> None:
        try:
            self.server.serve_forever()
        except BaseException as failure:  # handed to the test by join
            self.failure = failure

    def _take(self, lines: Iterable[Line]) -> None:
        with self._changed:
            self._lines.extend(line.text for line in lines)
            self._changed.notify_all()


@contextmanager
def watchdog() -> Iterator[None]:
    """Fails a test that hangs in a loop of its own."""

    def bark(_number: int, _frame: Optional[FrameType]) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(int(WAIT_SECONDS))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
