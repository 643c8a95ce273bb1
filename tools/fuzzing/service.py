"""Whatever bytes come in whatever pieces over whatever connections, every connection gets at most
one well-formed answer that its request calls for and is closed, the store holds for each name
exactly what the last acknowledged BACKUP sent, and the server goes on.

That is the invariant. A script says what a few peers send, and in which order they, the server's
loop and the clock go on; the server is the real one, with real sockets and a real folder, turned
by hand in this thread on a clock of the script's. "Exactly" leaves room for what nobody can know:
requests that overlapped may have come in either order, and one whose answer was not awaited, or
was late for a deadline, may have taken effect or not. See ``history``.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import tempfile
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from backup import upload
from backup.log import Line, Log
from backup.server import Server
from backup.settings import Settings

from . import messages
from .choices import Broken, Choices, Tally
from .history import ANY, FILE, NEVER, SAME, Event, explained
from .messages import BACKUP, DELETE, FAILURES, LIST, RETRIEVE, SUCCESS, Call

USUAL = Settings()
SMALL = Settings(
    scratch_bytes=64,
    turn_bytes=96,
    accepts_per_turn=2,
    commit_files=2,
    write_back_bytes=16,
    sync_bytes=64,
    reclaim_bytes=48,
    small_bytes=32,
    listing_names=1,
    turn_seconds=0.0002,
)
"""So small that messages of some bytes take every way that long ones take."""

LARGE = 300_000
"""Bytes of a large content: more than a turn receives, and than sockets hold at first."""

PATIENCE = USUAL.header_seconds
"""Seconds from a connection's beginning in which it cannot have missed any deadline."""

_TICK = 0.0001  # seconds that pass whenever somebody looks at the clock
_TURNS = 300  # that the server may take before it is waited for
_WAITS = 3  # seconds, about, that it is waited for
_SHM = Path("/dev/shm")  # where fsync(2) costs nothing


class Act(IntEnum):
    """What one step does."""

    SEND = 0  # the next ``amount`` bytes of a peer's
    TURN = 1  # ``amount`` turns of the loop
    WAIT = 2  # ``amount`` seconds pass
    END = 3  # the peer ends its side
    CLOSE = 4  # the peer closes
    RESET = 5  # the peer breaks the connection

    def __repr__(self) -> str:
        return f"Act.{self.name}"


class Step(NamedTuple):
    act: int
    peer: int
    amount: int


class Peer(NamedTuple):
    """What a peer has to send; ``deaf``: it reads only in the end."""

    data: bytes
    deaf: bool


class Script(NamedTuple):
    """An example. ``small``: with the settings ``SMALL``."""

    small: bool
    peers: Tuple[Peer, ...]
    steps: Tuple[Step, ...]


def script(choices: Choices) -> Script:
    small = not choices.once_in(4)
    peers: List[Peer] = []
    waiting: List[List[Step]] = []
    for number in range(choices.integer(1, 6)):
        data = messages.mutated(choices, messages.a_request(choices, 0 if small else LARGE))
        peers.append(Peer(data, choices.once_in(6)))
        row = [Step(Act.SEND, number, length) for length in messages.cuts(choices, len(data))]
        ending = choices.integer(0, 9)
        if ending > 4:
            act = (Act.END, Act.END, Act.CLOSE, Act.RESET, Act.RESET)[ending - 5]
            row.append(Step(act, number, 0))
        waiting.append(row)
    in_a_row = choices.once_in(2)
    steps: List[Step] = []
    while any(waiting):
        rows = [row for row in waiting if row]
        steps.append((rows[0] if in_a_row else choices.pick(rows)).pop(0))
        turns = choices.integer(0, 3)
        if turns:
            steps.append(Step(Act.TURN, 0, turns))
        if choices.once_in(25):
            steps.append(Step(Act.WAIT, 0, choices.pick((1, 5, 40, 100))))
    return Script(small, tuple(peers), tuple(steps))


class _Client:
    """A peer at work."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.socket: Optional[socket.socket] = None
        self.since = 0.0  # when it connected
        self.sent = b""
        self.ended = False  # its own side
        self.gone = False  # closed or reset, whatever is still to come
        self.late = False  # a deadline may have been missed
        self.broken = False  # by the server
        self.over = False  # the server has ended its side
        self.received = b""
        self.begin = NEVER  # the step in which its request was whole
        self.end = NEVER  # the step in which the last of its answer came

    @property
    def call(self) -> Optional[Call]:
        return messages.call(self.sent, self.ended)

    @property
    def served(self) -> bool:
        """Whether nothing is to be awaited from the server, as things are."""
        if self.socket is None or self._done:
            return True
        return not self.ended and self.call is None

    @property
    def _done(self) -> bool:
        return self.gone or self.over or self.broken

    def read(self, step: int) -> None:
        """Takes what has come."""
        while self.socket is not None and not self._done:
            try:
                piece = self.socket.recv(1 << 18)
            except BlockingIOError:
                return
            except ConnectionError as error:
                self._break(error)
                return
            self.over = not piece
            if piece:
                self.received += piece
                self.end = step

    def send(self, piece: bytes, step: int) -> int:
        """Sends what fits; how many bytes."""
        assert self.socket is not None
        try:
            count = self.socket.send(piece)
        except BlockingIOError:
            return 0
        except ConnectionError as error:
            self._break(error)
            return 0
        self.sent += piece[:count]
        if self.begin == NEVER and self.call is not None:
            self.begin = step
        return count

    def _break(self, error: ConnectionError) -> None:
        self.broken = True
        if not self.late:
            raise Broken(f"the server breaks a connection: {error}, after {self.received!r}")

    def leave(self, reset: bool) -> None:
        """Closes, if it has not yet."""
        if self.socket is not None and self.socket.fileno() >= 0:
            if reset:
                hard = struct.pack("ii", 1, 0)
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
            self.socket.close()


class _Trial:
    """One server and the clients of one script."""

    def __init__(self, root: Path, small: bool, clients: List[_Client]) -> None:
        self.root = root
        self.clients = clients
        self.step = 0
        self._now = 0.0
        self._lines: List[Line] = []
        settings = SMALL if small else USUAL
        self.server = Server(
            root, ("127.0.0.1", 0), settings, Log(self._lines.extend, 0), clock=self._clock
        )
        self._descriptors = _open_descriptors()

    def _clock(self) -> float:
        self._now += _TICK
        return self._now

    def turn(self, wait: bool = False) -> None:
        """One turn of the loop, and everybody reads; ``wait``: until something happens."""
        self.step += 1
        if not wait:
            os.write(self.server.wake_fd, b"\0")
        self.server.turn()
        for client in self.clients:
            client.late = client.late or self._now - client.since >= PATIENCE
            if not client.peer.deaf:
                client.read(self.step)

    def do(self, step: Step) -> None:
        self.step += 1
        client = self.clients[step.peer]
        if step.act == Act.TURN:
            for _ in range(step.amount):
                self.turn()
        elif step.act == Act.WAIT:
            self._now += step.amount
            self.turn()
        else:
            if client.socket is None:
                client.socket = socket.create_connection(self.server.address)
                client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.socket.setblocking(False)
                client.since = self._now
            if step.act == Act.SEND:
                self._send(client, step.amount)
            elif step.act == Act.END:
                self._end(client)
            else:
                client.gone = True
                client.leave(reset=step.act == Act.RESET)

    def _send(self, client: _Client, amount: int) -> None:
        start = len(client.sent)
        piece = client.peer.data[start : start + amount]
        for _ in range(_TURNS):
            piece = piece[client.send(piece, self.step) :]
            if not piece or client.broken:
                return
            self.turn()

    def _end(self, client: _Client) -> None:
        if client.ended or client.gone or client.socket is None:
            return
        client.ended = True
        if not client.broken:
            try:
                client.socket.shutdown(socket.SHUT_WR)
            except OSError:
                client.broken = client.late
                if not client.late:
                    raise Broken("the server has broken a connection") from None

    def await_answers(self) -> None:
        """Turns until everybody has what is due."""
        quiet = 0
        while not all(client.served for client in self.clients):
            before = sum(len(client.received) for client in self.clients)
            self.turn(wait=quiet >= _TURNS)
            for client in self.clients:
                client.read(self.step)
            same = before == sum(len(client.received) for client in self.clients)
            quiet = quiet + 1 if same else 0
            if quiet > _TURNS + _WAITS:
                waiting = [client.sent[:300] for client in self.clients if not client.served]
                raise Broken(f"no answer, or no end of it, comes to {waiting}")

    def finish(self, tally: Tally) -> None:
        """Lets all peers come to their end, and looks at what is left."""
        self.await_answers()
        for client in self.clients:
            self._end(client)
        self.await_answers()
        users = {call.user for call in (client.call for client in self.clients) if call is not None}
        users |= {user for user, _ in self._stored()}
        for user in sorted(users):  # the server goes on, for each of them
            self.clients.append(_Client(Peer(messages.request(user, LIST, b""), False)))
            self.do(Step(Act.SEND, len(self.clients) - 1, LARGE))
        self.await_answers()
        self._close()
        self._check_histories(tally)
        for line in self._lines:
            if line.level >= logging.ERROR:
                raise Broken(f"the log says {line.text!r}")

    def _close(self) -> None:
        """All peers go; every descriptor and temporary file of the server has to go with them."""
        for client in self.clients:
            client.leave(reset=True)
        for count in range(_TURNS + _WAITS):
            if _open_descriptors() <= self._descriptors:
                break
            self.turn(wait=count >= _TURNS)
        else:
            raise Broken("a descriptor is left open")
        left = [path.name for path in (self.root / ".tmp").iterdir()]
        if left:
            raise Broken(f"temporary files are left: {left}")

    def _stored(self) -> Dict[Tuple[int, bytes], bytes]:
        """What is on the disk: the content by user and name."""
        folders = [path for path in self.root.iterdir() if path.name != ".tmp"]
        return {
            (int(folder.name), os.fsencode(path.name)): path.read_bytes()
            for folder in folders
            for path in folder.iterdir()
        }

    def _check_histories(self, tally: Tally) -> None:
        stored = self._stored()
        asked: List[Tuple[_Client, Call, Tuple[int, bytes]]] = []
        for client in self.clients:
            tally.requests += bool(client.sent)
            answer = _judge(client)
            tally.answers[str(answer[0]) if answer else "none"] += 1
            call = client.call
            if call is not None and not call.refused:
                asked.append((client, call, answer or (0, b"")))
        names: Set[Tuple[int, bytes]] = set(stored)
        names |= {(call.user, call.name) for _, call, _ in asked if call.op != LIST}
        for _, call, (status, payload) in asked:
            if call.op == LIST and status == 212:
                listed = messages.listed(payload)
                if listed is None or listed != sorted(set(listed)):
                    raise Broken(f"not a listing: {payload!r}")
                names |= {(call.user, name) for name in listed}
        for user, name in sorted(names):
            events = tuple(
                event
                for client, call, answer in asked
                for event in _events(client, call, answer, (user, name))
            )
            final = stored.get((user, name))
            if not explained(events, None, final):
                raise Broken(
                    f"user {user}, name {name!r}: {_brief(final)} is stored, after {events}"
                )


def _brief(content: Optional[bytes]) -> str:
    return repr(content if content is None or len(content) < 300 else content[:300] + b"...")


def _judge(client: _Client) -> Optional[Tuple[int, bytes]]:
    """Status and payload of the one answer; None for none, or for the beginning of one.

    Raises ``Broken`` for one that is not called for, and where one is lacking.
    """
    received, excused = client.received, client.late or client.gone
    call = client.call
    if call is None and client.late:  # what was late may be refused, or not be answered
        call = messages.call(client.sent, ended=True)
    if call is None:
        if received:
            raise Broken(f"{received!r} answers {client.sent!r}, which calls for nothing")
        return None
    if len(received) < 9:
        if not excused:
            raise Broken(f"{received!r} is all that answers {client.sent[:300]!r}")
        return None
    version, status, length, size = struct.unpack_from("<BHHI", received)
    lawful = {call.refused} if call.refused else {SUCCESS[call.op]}
    if not call.refused and call.op in (RETRIEVE, DELETE):
        lawful |= {1003 if call.op == RETRIEVE else 1002}
    if client.late and not call.refused:
        lawful |= FAILURES[call.op]
    head = received[:9]
    if version != 1 or status not in lawful or length != len(call.name):
        raise Broken(f"{head!r} answers {client.sent[:300]!r}, not one of {lawful}")
    if size and status != 212:
        raise Broken(f"{head!r} has a payload")
    name, payload = received[9 : 9 + length], received[9 + length :]
    if not call.name.startswith(name) or len(payload) > size:
        raise Broken(f"{received[:300]!r} answers {client.sent[:300]!r}")
    if len(name) < length or len(payload) < size:
        if not excused:
            raise Broken(f"{received[:300]!r} is all that answers {client.sent[:300]!r}")
        return None
    return status, payload


def _events(
    client: _Client, call: Call, answer: Tuple[int, bytes], of: Tuple[int, bytes]
) -> Iterator[Event]:
    """What a request that is whole and lawful was to one name, as far as its answer tells."""
    status, payload = answer
    begin, end = client.begin, client.end if status else NEVER
    user, name = of
    if call.user != user or (call.op != LIST and call.name != name):
        return
    if call.op == BACKUP and status in (0, 210):
        yield Event(begin, end, ANY, call.content)
    elif call.op == DELETE and status in (0, 211):
        yield Event(begin, end, FILE, None)
    elif call.op == RETRIEVE and status == 212:
        if payload[:4] != struct.pack("<I", len(payload) - 4):
            raise Broken(f"a payload of {len(payload)} bytes begins {payload[:4]!r}")
        yield Event(begin, end, payload[4:], SAME)
    elif call.op == LIST and status == 212:
        yield Event(begin, end, FILE if name in (messages.listed(payload) or ()) else None, SAME)
    elif status in (1002, 1003) and not client.late:
        yield Event(begin, end, None, SAME)


def _open_descriptors() -> int:
    """How many this process has, where that can be told."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:
        return 0


@contextmanager
def _small_pieces(small: bool) -> Iterator[None]:
    """Uploads are made durable in pieces from the first one on."""
    before = upload._FIRST_PIECE
    upload._FIRST_PIECE = SMALL.sync_bytes if small else before
    try:
        yield
    finally:
        upload._FIRST_PIECE = before


def check(example: Script, tally: Tally) -> None:
    """Runs the script. Raises ``Broken``, or what came out of the server."""
    clients = [_Client(peer) for peer in example.peers]
    with ExitStack() as last_first:
        shm = _SHM if os.access(_SHM, os.W_OK) else None
        folder = last_first.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-", dir=shm))
        last_first.enter_context(_small_pieces(example.small))
        trial = _Trial(Path(folder, "store"), example.small, clients)
        last_first.callback(trial.server.close)
        try:
            for step in example.steps:
                trial.do(step)
            trial.finish(tally)
        finally:
            for client in clients:
                client.leave(reset=True)
