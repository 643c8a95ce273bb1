#!/usr/bin/env python3
"""The load of the benchmark: a process of its own that does what it is told, and measures it.

    python3 tools/load.py

A line of stdin is one command: ``{"do": NAME, ...}``, with the arguments of the
function of that name in ``COMMANDS``. It is answered by one line of stdout: what
the function returned, or ``{"error": TEXT}``. ``Load`` is the other end of that.

It must be faster than every server. For a small request it makes the system
calls that one takes, and one comparison, since every answer is known in advance
to the letter. ``cpu`` in a result is the share of one processor that it used; near
1, it was the load that could do no more, and not the server.
"""

from __future__ import annotations

import ftplib
import gc
import itertools
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import wire
from backup.server import raise_descriptor_limit
from backup.wire import Op, Request, Response, Status

Address = Sequence[Any]  # (host, port); a list, where it came as JSON
Exchange = Tuple[bytes, bytes]  # a request, and its answer to the letter
Result = Dict[str, Any]

CONTENT = b"x" * 1024
"""What every small file holds."""

BUFFER_BYTES = 1024 * 1024
"""What is received of a large file at once."""

PATIENCE_SECONDS = 180
"""A command that takes longer has met a server that hangs; it ends this process."""


class Wrong(Exception):
    """A server did not answer as it should."""


def file_name(number: int) -> bytes:
    """The name of a small file."""
    return b"f%08d" % number


# The small requests.


def exchanges(op: str, user: int, files: int) -> Iterator[Exchange]:
    """Requests without end, with their answers: of a user who has the first ``files`` files."""
    if op == "list":
        payload = wire.encode_listing(map(file_name, range(files)))
        return itertools.repeat((_request(user, Op.LIST), _answer(Status.FOUND, b"", payload)))
    if op == "retrieve":
        payload = wire.SIZE.pack(len(CONTENT)) + CONTENT
        names = [file_name(number) for number in range(files)]
        return itertools.cycle(
            [
                (_request(user, Op.RETRIEVE, name), _answer(Status.FOUND, name, payload))
                for name in names
            ]
        )
    return (
        (_request(user, Op.BACKUP, name), _answer(Status.STORED, name))
        for name in map(file_name, itertools.count())
    )


def _request(user: int, op: Op, name: bytes = b"") -> bytes:
    if op is Op.BACKUP:
        request = Request(user, wire.VERSION, op, name, len(CONTENT))
        return wire.encode_request(request) + CONTENT
    return wire.encode_request(Request(user, wire.VERSION, op, name))


def _answer(status: Status, name: bytes, payload: bytes = b"") -> bytes:
    response = Response(wire.VERSION, status, name, len(payload))
    return wire.encode_response(response) + payload


def ask(address: Tuple[str, int], exchange: Exchange) -> None:
    """One request on a connection of its own. Raises ``Wrong``."""
    request, expected = exchange
    # The C class that ``socket.socket`` adds Python to: one request in ten more a second.
    sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.connect(address)
        sock.send(request)
        answer = sock.recv(len(expected), socket.MSG_WAITALL)
    finally:
        sock.close()
    if answer != expected:
        raise _wrong(answer, expected)


def one_by_one(address: Tuple[str, int], pending: Iterator[Exchange], seconds: float) -> int:
    """Asks for so long, one request after the other; how many were answered."""
    count = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        ask(address, next(pending))
        count += 1
    return count


def side_by_side(
    address: Tuple[str, int], pending: Iterator[Exchange], connections: int, seconds: float
) -> int:
    """Asks for so long, with so many requests under way; how many were answered."""
    # Not epoll: there, each of these short connections costs one more system call.
    poller = select.poll()
    under_way: Dict[int, Tuple[socket.SocketType, bytes]] = {}  # what each still has to hear

    def begin() -> None:
        request, expected = next(pending)
        sock = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)
        sock.connect(address)  # on loopback, the kernel accepts at once
        sock.send(request)
        number = sock.fileno()
        poller.register(number, select.POLLIN)
        under_way[number] = sock, expected

    count = 0
    end = time.perf_counter() + seconds
    try:
        for _ in range(connections):
            begin()
        while under_way:
            for number, _ in poller.poll():
                sock, expected = under_way[number]
                expected = _still_expected(sock, expected)
                if expected:
                    under_way[number] = sock, expected
                    continue
                poller.unregister(number)
                sock.close()
                del under_way[number]
                count += 1
                if time.perf_counter() < end:
                    begin()
    finally:
        for sock, _ in under_way.values():
            sock.close()
    return count


def _wrong(answer: bytes, expected: bytes) -> Wrong:
    return Wrong(f"the server answered {answer[:40].hex(' ')}, not {expected[:40].hex(' ')}")


class Stopwatch:
    """How long it has run, and how much of one processor this process used meanwhile."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._used = time.process_time()

    def result(self, **more: Any) -> Result:
        """What a command returns."""
        seconds = time.perf_counter() - self._began
        return {"cpu": (time.process_time() - self._used) / seconds, "seconds": seconds, **more}


def rate(
    address: Address,
    op: str,
    user: int,
    files: int,
    connections: int,
    seconds: float,
    warm_up: float,
) -> Result:
    """How many requests are answered in ``seconds``, after ``warm_up`` seconds of the same."""
    place = (address[0], address[1])
    pending = exchanges(op, user, files)

    def load(how_long: float) -> int:
        if connections == 1:
            return one_by_one(place, pending, how_long)
        return side_by_side(place, pending, connections, how_long)

    if warm_up:
        load(warm_up)
    watch = Stopwatch()
    return watch.result(count=load(seconds))


def latency(address: Address, user: int, files: int, seconds: float) -> Result:
    """How long a LIST takes, one after the other."""
    place = (address[0], address[1])
    pending = exchanges("list", user, files)
    taken = []
    watch = Stopwatch()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        ask(place, next(pending))
        taken.append(time.perf_counter() - began)
    return watch.result(**summary(taken))


def pace(address: Address, user: int, files: int, a_second: float, seconds: float) -> Result:
    """How long a LIST takes when one is due so often, on a connection of its own each.

    It counts from when it was due, and nobody waits for the one before. So a
    server that stalls is charged with all who came meanwhile.
    """
    place = (address[0], address[1])
    request, expected = next(exchanges("list", user, files))
    count = max(1, int(a_second * seconds))
    under_way: Dict[int, _Due] = {}
    taken: List[float] = []
    begun = 0
    watch = Stopwatch()
    first = time.perf_counter()
    try:
        while len(taken) < count:
            wait = first + begun / a_second - time.perf_counter() if begun < count else None
            if wait is not None and wait <= 0:
                sock = socket.create_connection(place)
                under_way[sock.fileno()] = _Due(sock, expected, first + begun / a_second)
                sock.sendall(request)
                begun += 1
                continue
            # select, since it alone can wait for less than a millisecond.
            for number in select.select(list(under_way), [], [], wait)[0]:
                if under_way[number].receive():
                    taken.append(time.perf_counter() - under_way[number].moment)
                    under_way.pop(number).sock.close()
    finally:
        for due in under_way.values():
            due.sock.close()
    return watch.result(**summary(taken))


class _Due:
    """A request that was due at a ``moment``."""

    def __init__(self, sock: socket.socket, expected: bytes, moment: float) -> None:
        self.sock = sock
        self.moment = moment
        self._expected = expected

    def receive(self) -> bool:
        """Takes what has come; whether it is the whole answer."""
        self._expected = _still_expected(self.sock, self._expected)
        return not self._expected


def _still_expected(sock: socket.SocketType, expected: bytes) -> bytes:
    """What of an answer is still to come, when some of it is there."""
    answer = sock.recv(len(expected) + 1)
    if answer == expected:
        return b""
    if not answer or not expected.startswith(answer):
        raise _wrong(answer, expected)
    return expected[len(answer) :]


def summary(taken: Sequence[float]) -> Result:
    """What is told of many latencies, in seconds."""
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: percentile(taken, share) for name, share in shares.items()}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# The large files, over three protocols: each from connecting to the end of the answer.


def upload(
    address: Address, how: str, user: int, source: str, size: int, seconds: float = 0.0
) -> Result:
    """Sends the first ``size`` bytes of ``source``, again under another name until ``seconds``."""
    place = (address[0], address[1])
    with open(source, "rb") as file:
        fd = file.fileno()
        return _repeat(
            lambda number: _UPLOADS[how](place, user, large_name(number), fd, size), seconds
        )


def download(
    address: Address, how: str, user: int, name: str, size: int, seconds: float = 0.0
) -> Result:
    """Receives a file, which must have ``size`` bytes, again until ``seconds``."""
    place = (address[0], address[1])
    buffer = memoryview(bytearray(BUFFER_BYTES))
    return _repeat(lambda _: _DOWNLOADS[how](place, user, name, size, buffer), seconds)


def _repeat(transfer: Callable[[int], None], seconds: float) -> Result:
    """``each`` is how long one transfer took."""
    each: List[float] = []
    watch = Stopwatch()
    while not each or sum(each) < seconds:
        began = time.perf_counter()
        transfer(len(each))
        each.append(time.perf_counter() - began)
    return watch.result(each=each)


def large_name(number: int) -> str:
    """The name of a large file that was sent."""
    return f"large-{number}"


def _backup(address: Tuple[str, int], user: int, name: str, source: int, size: int) -> None:
    raw = name.encode()
    with socket.create_connection(address) as sock:
        sock.sendall(wire.encode_request(Request(user, wire.VERSION, Op.BACKUP, raw, size)))
        _send(sock, source, size)
        expected = _answer(Status.STORED, raw)
        answer = sock.recv(len(expected), socket.MSG_WAITALL)
    if answer != expected:
        raise _wrong(answer, expected)


def _ftp_stor(address: Tuple[str, int], _: int, name: str, source: int, size: int) -> None:
    with ftplib.FTP() as ftp:
        _log_in(ftp, address)
        with ftp.transfercmd(f"STOR {name}") as sock:
            _send(sock, source, size)
        ftp.voidresp()


def _http_put(address: Tuple[str, int], _: int, name: str, source: int, size: int) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(_http_request("PUT", name, f"Content-Length: {size}\r\n"))
        _send(sock, source, size)
        _http_head(sock, b"201")


def _retrieve(
    address: Tuple[str, int], user: int, name: str, size: int, buffer: memoryview
) -> None:
    raw = name.encode()
    with socket.create_connection(address) as sock:
        sock.sendall(wire.encode_request(Request(user, wire.VERSION, Op.RETRIEVE, raw)))
        response = Response(wire.VERSION, Status.FOUND, raw, wire.SIZE.size + size)
        expected = wire.encode_response(response) + wire.SIZE.pack(size)
        answer = sock.recv(len(expected), socket.MSG_WAITALL)
        if answer != expected:
            raise _wrong(answer, expected)
        _receive(sock, size, buffer)


def _ftp_retr(address: Tuple[str, int], _: int, name: str, size: int, buffer: memoryview) -> None:
    with ftplib.FTP() as ftp:
        _log_in(ftp, address)
        with ftp.transfercmd(f"RETR {name}") as sock:
            _receive(sock, size, buffer)
        ftp.voidresp()


def _http_get(address: Tuple[str, int], _: int, name: str, size: int, buffer: memoryview) -> None:
    with socket.create_connection(address) as sock:
        sock.sendall(_http_request("GET", name))
        _receive(sock, size - len(_http_head(sock, b"200")), buffer)


def _log_in(ftp: ftplib.FTP, address: Tuple[str, int]) -> None:
    ftp.connect(*address)
    ftp.login()
    ftp.voidcmd("TYPE I")


def _http_request(method: str, name: str, more: str = "") -> bytes:
    lines = f"{method} /{name} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n{more}\r\n"
    return lines.encode()


def _http_head(sock: socket.socket, status: bytes) -> bytes:
    """Receives the head of an answer, which must have this status; what came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(4096)
        if not piece:
            raise Wrong("the server closed before the end of its answer's head")
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1] != status:
        raise Wrong(f"the server answered {head[:40]!r}, not {status!r}")
    return rest


def _send(sock: socket.socket, source: int, size: int) -> None:
    sent = 0
    while sent < size:
        count = os.sendfile(sock.fileno(), source, sent, size - sent)
        if not count:
            raise Wrong(f"the source has only {sent} bytes")
        sent += count


def _receive(sock: socket.socket, size: int, buffer: memoryview) -> None:
    while size:
        count = sock.recv_into(buffer, min(size, len(buffer)))
        if not count:
            raise Wrong(f"the server closed {size} bytes too early")
        size -= count


_UPLOADS = {"backup": _backup, "ftp": _ftp_stor, "http": _http_put}
_DOWNLOADS = {"backup": _retrieve, "ftp": _ftp_retr, "http": _http_get}


# Idle connections.


_held: List[socket.socket] = []


def hold(address: Address, count: int) -> Result:
    """Opens connections and says nothing on them, until ``release``."""
    place = (address[0], address[1])
    watch = Stopwatch()
    for number in range(count):
        _held.append(socket.create_connection(place))
        if number % 256 == 255:
            time.sleep(0.01)  # so that the listener's queue never fills: a full one costs a second
    return watch.result(count=len(_held))


def release(keep: int = 0) -> Result:
    """Closes the last that ``hold`` opened, until only ``keep`` are left."""
    watch = Stopwatch()
    while len(_held) > keep:
        _held.pop().close()
    return watch.result()


# The two ends of the pipe.


COMMANDS: Dict[str, Callable[..., Result]] = {
    "rate": rate,
    "latency": latency,
    "pace": pace,
    "upload": upload,
    "download": download,
    "hold": hold,
    "release": release,
}


def main() -> None:
    """Does what stdin says until it ends."""
    raise_descriptor_limit()
    gc.disable()  # nothing here makes cycles, and a collection would be measured as the server's
    for line in sys.stdin:
        arguments = json.loads(line)
        signal.alarm(PATIENCE_SECONDS)
        try:
            result = COMMANDS[arguments.pop("do")](**arguments)
        except (Wrong, OSError, EOFError, ftplib.Error) as error:
            release()
            result = {"error": f"{type(error).__name__}: {error}"}
        signal.alarm(0)
        print(json.dumps(result), flush=True)


class Failed(Exception):
    """The load could not do what it was told; says why."""


class Load:
    """A load process, from outside."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C is for the benchmark, which then ends its processes.
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def begin(self, do: str, **arguments: Any) -> None:
        """Has it begin with a command."""
        assert self._process.stdin is not None
        print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)

    def result(self) -> Result:
        """Waits for what comes of it. Raises ``Failed``."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failed("the load process has ended; is a server hanging?")
        result: Result = json.loads(line)
        if "error" in result:
            raise Failed(result["error"])
        return result

    def ask(self, do: str, **arguments: Any) -> Result:
        """Has it carry out a command. Raises ``Failed``."""
        self.begin(do, **arguments)
        return self.result()


if __name__ == "__main__":
    main()
