#!/usr/bin/env python3
"""Clients that misbehave, many at once, until stdin ends; then one line of JSON says what they did.

    python3 tools/mischief.py --server HOST:PORT [--seed N] [--clients N]

Rules: one selectors loop; each client is a generator that yields what it waits
for next. Every request is for a user from ``FIRST_USER`` on, so that no file of
anybody else's is touched, and for a handful of names, so that the disk does not
fill. No client holds a connection for more than some seconds. A server that is
not there, or ends the connection, is no failure: the next client comes.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import selectors
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Callable, Dict, Generator, List, Tuple, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup.address import parse
from backup.wire import VERSION, Op, Request, encode_request
from tools.common import at_least_one, run

FIRST_USER = 2**31
"""Users from here on are nobody's but ours."""

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
KIB = 1024

Wait = Union[int, float]
"""What a client yields: READ or WRITE for its socket, or seconds as a float."""

Script = Generator[Wait, None, None]

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST
_BLOCK = random.Random(1).randbytes(64 * KIB)
_PAUSE_SECONDS = 0.05  # between two clients of a slot, and so between two tries to connect


def _user(rng: random.Random) -> int:
    return FIRST_USER + rng.randrange(4)


def _upload(rng: random.Random, size: int) -> bytes:
    """A BACKUP up to its payload."""
    name = b"mischief-%d" % rng.randrange(4)
    return encode_request(Request(_user(rng), VERSION, Op.BACKUP, name, size))


def _question(rng: random.Random) -> bytes:
    name = b"mischief-%d" % rng.randrange(4)
    op = rng.choice([Op.RETRIEVE, Op.RETRIEVE, Op.DELETE, Op.LIST])
    return encode_request(Request(_user(rng), VERSION, op, b"" if op is Op.LIST else name))


def stall(sock: socket.socket, rng: random.Random) -> Script:
    """Stops in the middle of a request and holds the connection."""
    size = rng.randrange(1, 64 * KIB)
    whole = _upload(rng, size) + _BLOCK[:size]
    yield WRITE
    sock.send(whole[: rng.choice([0, 3, 8, 12, rng.randrange(len(whole))])])
    yield rng.uniform(1, 8)


def deaf(sock: socket.socket, rng: random.Random) -> Script:
    """Asks for a file and never reads it."""
    yield WRITE
    sock.send(encode_request(Request(FIRST_USER, VERSION, Op.RETRIEVE, b"large")))
    yield rng.uniform(1, 8)


def dribble(sock: socket.socket, rng: random.Random) -> Script:
    """A byte at a time."""
    whole = _upload(rng, 40) + _BLOCK[:40]
    for place in range(len(whole)):
        yield WRITE
        sock.send(whole[place : place + 1])
        yield rng.uniform(0.01, 0.2)
    yield READ


def reset(sock: socket.socket, rng: random.Random) -> Script:
    """Breaks off with RST, at any byte, or when the answer has begun."""
    size = rng.randrange(1, 64 * KIB)
    upload = _upload(rng, size) + _BLOCK[:size]
    whole = rng.choice([_question(rng), upload, upload])
    yield WRITE
    sock.send(whole[: rng.randrange(1, len(whole) + 1)])
    if rng.random() < 0.8:
        yield rng.uniform(0.0, 0.05)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


def half_close(sock: socket.socket, rng: random.Random) -> Script:
    """Ends its side, after all of a request or a part, and reads what comes."""
    size = rng.randrange(1, 64 * KIB)
    whole = rng.choice([_question(rng), _upload(rng, size) + _BLOCK[:size]])
    yield WRITE
    sock.send(whole if rng.random() < 0.5 else whole[: rng.randrange(len(whole))])
    sock.shutdown(socket.SHUT_WR)
    while True:
        yield READ
        if not sock.recv(64 * KIB):
            return


def garbage(sock: socket.socket, rng: random.Random) -> Script:
    """Bytes that mean nothing, or nearly nothing."""
    user = struct.pack("<I", _user(rng))
    data = rng.choice(
        [
            rng.randbytes(rng.randrange(1, 4 * KIB)),
            struct.pack("<BBH", 1, rng.randrange(256), rng.randrange(99)) + rng.randbytes(99),
            struct.pack("<BBH", 1, Op.BACKUP, 12) + b"../../../etc" + rng.randbytes(40),
        ]
    )
    yield WRITE
    sock.send(user + data)  # a user of ours, whatever the rest says
    if rng.random() < 0.5:
        sock.shutdown(socket.SHUT_WR)
    yield READ


def flood(sock: socket.socket, rng: random.Random) -> Script:
    """As much as the server takes, behind a promise of 4 GiB, a whole file or a question."""
    size = rng.randrange(KIB, 12 * KIB * KIB)
    large = encode_request(Request(FIRST_USER, VERSION, Op.BACKUP, b"large", size))
    yield WRITE
    sock.send(rng.choice([_upload(rng, 2**32 - 5), _question(rng), large, large]))
    rest = size
    while rest > 0:
        yield WRITE
        rest -= sock.send(_BLOCK[: min(rest, len(_BLOCK))])
    yield rng.uniform(0.0, 0.5)


def swarm(sock: socket.socket, rng: random.Random) -> Script:
    """Connects and is gone; here, many come one right after the other."""
    place = sock.getpeername()
    for _ in range(rng.randrange(4, 40)):
        with socket.socket() as other:
            other.setblocking(False)
            other.connect_ex(place)
        if rng.random() < 0.2:
            yield 0.0


KINDS: Dict[str, Callable[[socket.socket, random.Random], Script]] = {
    "stall": stall,
    "deaf": deaf,
    "dribble": dribble,
    "reset": reset,
    "half-close": half_close,
    "garbage": garbage,
    "flood": flood,
    "swarm": swarm,
}


class Mischief:
    """The loop, with a client in each of its slots."""

    def __init__(self, address: Tuple[str, int], seed: int, clients: int) -> None:
        self.done: Counter[str] = Counter()
        self._address = address
        self._rng = random.Random(f"mischief {seed}")
        self._selector = selectors.DefaultSelector()
        self._due: List[Tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._ended = False
        for _ in range(clients):
            self._later(self._rng.uniform(0, 0.3), self._begin)

    def run(self) -> None:
        """Goes on until stdin ends."""
        self._selector.register(sys.stdin, READ, self._end)
        while not self._ended:
            wait = self._due[0][0] - time.monotonic() if self._due else None
            for key, _ in self._selector.select(wait):
                key.data()
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                heapq.heappop(self._due)[2]()

    def _end(self) -> None:
        self._ended = True

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        self._count += 1  # so that two of one moment have an order
        heapq.heappush(self._due, (time.monotonic() + seconds, self._count, do))

    def _begin(self) -> None:
        """The next client of a slot."""
        kind = self._rng.choice(list(KINDS))
        sock = socket.socket()
        sock.setblocking(False)
        if kind == "deaf":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        sock.connect_ex(self._address)  # how that ends shows in the first step
        self._selector.register(sock, WRITE, lambda: self._connected(sock, kind))

    def _connected(self, sock: socket.socket, kind: str) -> None:
        self._selector.unregister(sock)
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self.done["no connection" if error else kind] += 1
        if error:
            self._close(sock)
        else:
            self._step(sock, KINDS[kind](sock, self._rng))

    def _step(self, sock: socket.socket, script: Script) -> None:
        """Lets a client do what it waited for."""
        try:
            wait = next(script)
        except (StopIteration, OSError):  # it is done, or the server is with it
            self._close(sock)
            return
        if isinstance(wait, float):
            self._later(wait, lambda: self._step(sock, script))
        else:
            self._selector.register(sock, wait, lambda: self._ready(sock, script))

    def _ready(self, sock: socket.socket, script: Script) -> None:
        self._selector.unregister(sock)
        self._step(sock, script)

    def _close(self, sock: socket.socket) -> None:
        sock.close()
        self._later(_PAUSE_SECONDS, self._begin)


def main() -> int:
    parser = argparse.ArgumentParser(description="Clients that misbehave, until stdin ends.")
    parser.add_argument("--server", required=True, metavar="HOST:PORT")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--clients", type=at_least_one, default=50, metavar="N")
    chosen = parser.parse_args()
    mischief = Mischief(parse(chosen.server), chosen.seed, chosen.clients)
    mischief.run()
    print(json.dumps(mischief.done))
    return 0


if __name__ == "__main__":
    run(main)
