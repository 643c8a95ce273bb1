"""The pump between a stream and an endpoint keeps the rules of its docstring, at both ends.

Real sockets on one reactor, whose clock is the test's: time passes when a test
says so. The endpoints here are small ones that note what they are given.
"""

from __future__ import annotations

import gc
import select
import signal
import socket
import threading
import weakref
from contextlib import ExitStack
from dataclasses import replace
from types import FrameType
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple, Union

import pytest

from backup.connection import PHASES, Body, Connection, Endpoint, Later, Outgoing, Owner, Phase
from backup.errors import (
    BackupError,
    ConnectionFailed,
    CutShort,
    DeadlineMissed,
    FileChanged,
    InternalError,
    ProtocolError,
    Refused,
    Unreachable,
)
from backup.protocol import Data, End, Part, RequestReceiver, ResponseReceiver
from backup.reactor import READ, WRITE, Reactor, ReadyCallback
from backup.settings import Settings
from backup.stream import Stream, connect
from tests.helpers import WAIT_SECONDS, read_all, request, reset, response

Pair = Tuple[socket.socket, socket.socket]

ALARM_SECONDS = 10.0
NAME = b"a"
REQUEST = request(11, 100, NAME, b"xyz")
STORED = response(210, NAME)

CONNECTING, EXCHANGING, LINGERING, CLOSED = Phase


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Ends a test that waits for ever."""

    def ring(_signal: int, _frame: Optional[FrameType]) -> None:
        raise AssertionError("the loop waits for what never comes")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, ALARM_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Notes(Endpoint):
    """Notes the parts and what is sent; answers a kind of part, the first time, as told."""

    def __init__(self, **replies: Union[Outgoing, Later, BackupError]) -> None:
        """``Head=...``, ``End=...`` and so on: what to return, or to raise, for that part.

        ``refuse=...``: the answer to an exchange that cannot go on.
        """
        self.kinds: List[str] = []
        self.payload = b""
        self.messages_sent = 0
        self.heard_end: List[Optional[BackupError]] = []
        self.act: Callable[[], None] = lambda: None  # with each part
        self.refused: Optional[BackupError] = None
        self._replies = replies

    def take(self, part: Part) -> Union[Outgoing, Later, None]:
        kind = type(part).__name__
        if self.kinds[-1:] != [kind]:
            self.kinds.append(kind)
        if isinstance(part, Data):
            self.payload += part.view
        self.act()
        reply = self._replies.pop(kind, None)
        if isinstance(reply, BackupError):
            raise reply
        return reply

    def refuse(self, error: BackupError) -> Optional[Outgoing]:
        self.refused = error
        reply = self._replies.pop("refuse", None)
        assert reply is None or isinstance(reply, Outgoing)
        return reply

    def sent(self) -> None:
        self.messages_sent += 1

    def closed(self, error: Optional[BackupError]) -> None:
        self.heard_end.append(error)


class Spool(Body):
    """A payload in memory, which counts how often it is closed."""

    def __init__(self, content: bytes, error: Optional[BackupError] = None) -> None:
        """``error`` is raised in the place of the last byte."""
        self._content = memoryview(content)
        self._error = error
        self.remaining = len(content)
        self.closed = 0
        self.act: Callable[[], None] = lambda: None  # with each piece

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        begin = len(self._content) - self.remaining
        piece = self._content[begin : begin + limit]
        if self._error is not None:
            piece = piece[: self.remaining - 1]
            if not piece:
                raise self._error
        count = stream.send(piece)
        self.remaining -= count or 0
        self.act()
        return count

    def close(self) -> None:
        self.closed += 1


class CountingReactor(Reactor):
    """Notes each interest it is asked to watch for, and what it watches no longer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.interests: List[int] = []
        self.dropped: List[socket.socket] = []
        super().__init__(clock)
        self.interests.clear()  # its own

    def watch(self, sock: socket.socket, interest: int, callback: ReadyCallback) -> None:
        self.interests.append(interest)
        super().watch(sock, interest, callback)

    def unwatch(self, sock: socket.socket) -> None:
        self.dropped.append(sock)
        super().unwatch(sock)


class CountingStream(Stream):
    """Counts the bytes that pass, and notes what it is told of those that follow."""

    received = 0
    sent = 0
    received_before_sending = 0
    looks = 0  # how often it was asked for bytes

    def __init__(self, sock: socket.socket, peer: str) -> None:
        super().__init__(sock, peer)
        self.told_of_more: List[bool] = []

    def receive(self, buffer: memoryview) -> Optional[int]:
        self.looks += 1
        count = super().receive(buffer)
        self.received += count or 0
        return count

    def send(self, data: Union[bytes, memoryview], more: bool = False) -> Optional[int]:
        if not self.sent:
            self.received_before_sending = self.received
        self.told_of_more.append(more)
        count = super().send(data, more)
        self.sent += count or 0
        return count


class Traced(Connection):
    """Keeps all phases that it was in, the present one last."""

    trail: Tuple[Phase, ...] = ()

    @property
    def phase(self) -> Phase:
        return self.trail[-1]

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.trail += (phase,)

    @property
    def moves(self) -> Set[Tuple[Phase, Phase]]:
        return set(zip(self.trail, self.trail[1:]))


class House(Owner):
    """A reactor, its clock, and the connections it serves; their owner."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.reactor = CountingReactor(lambda: self.time)
        self.stack = ExitStack()
        self.use()
        self.connections: List[Traced] = []
        self.waiting: List[Connection] = []
        self.waits_for: List[Later] = []
        self.ended: Dict[Connection, Optional[BackupError]] = {}
        self.faults: List[Exception] = []

    def use(self, **settings: float) -> None:
        """Other settings than the default ones, for the connections that are made next."""
        self.settings = replace(Settings(), **settings)  # type: ignore[arg-type]
        self.scratch = memoryview(bytearray(self.settings.scratch_bytes))

    def pair(self) -> Pair:
        """Connected sockets; what one sends is with the other at once."""
        ours, theirs = map(self.stack.enter_context, socket.socketpair())
        theirs.settimeout(WAIT_SECONDS)
        return ours, theirs

    def tcp_pair(self) -> Pair:
        """The same over TCP."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            theirs = socket.create_connection(address, timeout=WAIT_SECONDS)
            ours, _ = listener.accept()
        return self.stack.enter_context(ours), self.stack.enter_context(theirs)

    def answering(self, sock: socket.socket, endpoint: Endpoint) -> Traced:
        """The server's end on ``sock``, not started yet."""
        return self._made(CountingStream(sock, "client"), endpoint, asks=False)

    def serve(self, sock: socket.socket, endpoint: Endpoint) -> Traced:
        """The same, started in a turn, as the server does."""
        connection = self.answering(sock, endpoint)
        self.reactor.call(connection.start)
        self.reactor.turn()
        return connection

    def ask(
        self, place: Union[socket.socket, Stream], endpoint: Endpoint, outgoing: Outgoing
    ) -> Traced:
        """The client's end on ``place``, which has begun to connect."""
        stream = CountingStream(place, "server") if isinstance(place, socket.socket) else place
        connection = self._made(stream, endpoint, asks=True)
        connection.connect(outgoing)
        return connection

    def turn(self) -> None:
        """One turn, which does what is there and does not wait for more."""
        self.reactor.call(lambda: None)
        self.reactor.turn()

    def after(self, seconds: float) -> None:
        """One turn, so much later."""
        self.time += seconds
        self.turn()

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.reactor.turn()

    def run_to_the_end(self) -> None:
        """Until every connection is closed."""
        self.run(lambda: len(self.ended) == len(self.connections))

    def error(self) -> Optional[BackupError]:
        """The error of the one connection that was made, which is closed now."""
        (error,) = self.ended.values()
        return error

    def put_off(self, connection: Connection, later: Later) -> None:
        self.waiting.append(connection)
        self.waits_for.append(later)

    def failed(self, connection: Connection, error: InternalError) -> None:
        assert connection not in self.ended
        self.faults.append(error.fault)

    def closed(self, connection: Connection, error: Optional[BackupError]) -> None:
        assert connection not in self.ended, "closed twice"
        self.ended[connection] = error

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.reactor.close()
        self.stack.close()

    def _made(self, stream: Stream, endpoint: Endpoint, asks: bool) -> Traced:
        connection = Traced(
            self.reactor,
            stream,
            endpoint,
            ResponseReceiver() if asks else RequestReceiver(),
            asks=asks,
            scratch=self.scratch,
            settings=self.settings,
            owner=self,
        )
        self.connections.append(connection)
        return connection


@pytest.fixture
def house() -> Iterator[House]:
    """A house, which is closed when the test is over; every connection has kept to the table."""
    made = House()
    yield made
    made.close()
    for connection in made.connections:
        for before, after in connection.moves:
            assert after in PHASES[before]


def stored() -> Outgoing:
    return Outgoing(STORED)


def retrieved(body: Body) -> Outgoing:
    return Outgoing(response(212, NAME)[:5] + body.remaining.to_bytes(4, "little") + NAME, body)


def backup(body: Body) -> Outgoing:
    return Outgoing(request(11, 100, NAME, b"", size=body.remaining), body)


def arrived(sock: socket.socket) -> bytes:
    """All that is there to be received now."""
    pieces = []
    sock.setblocking(False)
    try:
        while True:
            pieces.append(sock.recv(1 << 20))
            if not pieces[-1]:
                break
    except BlockingIOError:
        pass
    finally:
        sock.settimeout(WAIT_SECONDS)
    return b"".join(pieces)


# An exchange, and the phases it goes through.


@pytest.mark.parametrize("size", [1, 1 << 10, 3 << 20])
@pytest.mark.parametrize("kind", [House.pair, House.tcp_pair])
def test_two_ends_exchange_a_request_for_an_answer(
    kind: Callable[[House], Pair], size: int, house: House
) -> None:
    there, back = bytes(range(256)) * (size // 256) + b"t", b"b" * size
    asking, answering = Notes(), Notes(End=retrieved(Spool(back)))
    ours, theirs = kind(house)
    client = house.ask(theirs, asking, backup(Spool(there)))
    server = house.serve(ours, answering)
    house.run_to_the_end()
    assert (answering.payload == there, asking.payload == back) == (True, True)
    assert answering.kinds == asking.kinds == ["Head", "Data", "End"]
    assert (answering.messages_sent, asking.messages_sent) == (1, 1)
    assert list(house.ended.values()) == [None, None]
    assert client.trail == (CONNECTING, EXCHANGING, LINGERING, CLOSED)
    assert server.trail == (EXCHANGING, LINGERING, CLOSED)


def test_every_move_of_the_table_is_made_and_no_other(house: House) -> None:
    ours, theirs = house.pair()
    house.ask(ours, Notes(), Outgoing(REQUEST))
    house.serve(theirs, Notes(End=stored()))
    house.run_to_the_end()
    house.ask(house.pair()[0], Notes(), Outgoing(REQUEST)).close()
    house.serve(house.pair()[0], Notes()).close()
    made = set().union(*(connection.moves for connection in house.connections))
    assert made == {(before, after) for before, afters in PHASES.items() for after in afters}


@pytest.mark.parametrize(
    ("before", "after"), [(a, b) for a in Phase for b in Phase if b not in PHASES[a]]
)
def test_any_other_move_is_a_fault_of_the_program(
    before: Phase, after: Phase, house: House
) -> None:
    ours, _ = house.pair()
    connection = house.answering(ours, Notes())
    connection.trail = (before,)
    with pytest.raises(AssertionError, match="no way"):
        connection._enter(after)
    connection.trail = (EXCHANGING,)


def test_the_asking_end_is_connected_when_the_connection_is_made(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    assert (connection.phase, connection.connected) == (CONNECTING, False)
    assert arrived(theirs) == b""
    house.turn()
    assert (connection.phase, connection.connected) == (EXCHANGING, True)
    assert arrived(theirs) == REQUEST


def test_a_connection_that_is_refused_was_never_connected(house: House) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        body = Spool(b"xyz")
        stream = connect(socket.AF_INET, bound.getsockname(), "server")
        connection = house.ask(stream, Notes(), backup(body))
        house.run_to_the_end()
    assert isinstance(house.error(), Unreachable)
    assert connection.connected is False
    assert connection.trail == (CONNECTING, CLOSED)
    assert body.closed == 1


def test_a_connection_knows_whether_the_peer_has_begun(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    assert connection.begun is False
    theirs.send(REQUEST[:1])
    house.turn()
    assert connection.begun is True


# The short way: what can be done at once is done at once.


def test_a_request_that_is_there_is_answered_without_watching_for_anything(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    endpoint = Notes(End=stored())
    connection = house.serve(ours, endpoint)
    assert connection.phase is LINGERING
    house.turn()
    assert connection.trail == (EXCHANGING, LINGERING, CLOSED)
    assert house.error() is None
    assert endpoint.payload == b"xyz"
    assert read_all(theirs) == STORED
    assert house.reactor.interests == []


def test_a_client_that_has_not_closed_yet_is_watched_for_that_alone(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    assert connection.phase is LINGERING
    assert house.reactor.interests == []
    house.turn()
    assert house.reactor.interests == [READ]
    assert read_all(theirs) == STORED
    theirs.close()
    house.turn()
    assert connection.phase is CLOSED


def gone(theirs: socket.socket) -> None:
    theirs.close()


def reset_by_peer(theirs: socket.socket) -> None:
    reset(theirs)


def gone_with_more_behind(theirs: socket.socket) -> None:
    theirs.sendall(b"more")
    theirs.close()


@pytest.mark.parametrize("leave", [gone, reset_by_peer, gone_with_more_behind])
def test_a_client_that_is_gone_one_turn_later_was_never_watched(
    leave: Callable[[socket.socket], None], house: House
) -> None:
    ours, theirs = house.tcp_pair()
    theirs.sendall(REQUEST)
    select.select([ours], [], [], WAIT_SECONDS)
    connection = house.serve(ours, Notes(End=stored()))
    assert connection.phase is LINGERING
    leave(theirs)
    select.select([ours], [], [], WAIT_SECONDS)
    house.turn()
    assert connection.phase is CLOSED
    assert house.error() is None
    assert house.reactor.interests == []


def test_a_connection_that_is_closed_before_the_look_one_turn_later_is_not_looked_at(
    house: House,
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    looks = stream_of(connection).looks
    connection.close()
    house.turn()
    assert stream_of(connection).looks == looks
    assert house.error() is None


def test_the_turn_after_the_answer_does_not_wait(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=stored()))
    house.reactor.turn()  # nothing is ready; an alarm ends a test that waits
    assert house.reactor.interests == [READ]


def test_a_request_that_comes_bit_by_bit_is_watched_for_once(house: House) -> None:
    ours, theirs = house.pair()
    house.serve(ours, Notes(End=stored()))
    for byte in REQUEST:
        theirs.send(bytes([byte]))
        house.turn()
    assert arrived(theirs) == STORED
    theirs.close()
    house.turn()
    assert house.error() is None
    assert house.reactor.interests == [READ]


def test_an_answer_that_does_not_fit_is_watched_for_until_it_has_left(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=retrieved(Spool(bytes(1 << 20)))))
    assert house.reactor.interests == [READ | WRITE]
    received = 0
    while connection.phase is EXCHANGING:
        received += len(arrived(theirs))
        house.turn()
    received += len(arrived(theirs))
    assert received == len(STORED) + (1 << 20)
    assert house.reactor.interests == [READ | WRITE, READ]


def test_a_peer_that_has_ended_its_side_is_not_listened_to(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    body = Spool(bytes(1 << 20))
    house.serve(ours, Notes(End=retrieved(body)))
    house.turn()  # sees that the peer has ended
    assert house.reactor.interests[-1] == WRITE
    while not house.ended:
        arrived(theirs)
        house.turn()
    assert (house.error(), body.remaining) == (None, 0)


def test_the_client_listens_while_it_sends(house: House) -> None:
    ours, _theirs = house.pair()
    house.ask(ours, Notes(), backup(Spool(bytes(1 << 20))))
    house.turn()
    assert house.reactor.interests == [WRITE, READ | WRITE]


# One kind of work after the other.


def test_what_is_less_than_was_asked_for_is_all_there_is_for_now(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST[:-1])
    stream = stream_of(house.serve(ours, Notes(End=stored())))
    assert stream.looks == 1
    theirs.sendall(REQUEST[-1:])
    house.turn()
    assert stream.looks == 2
    assert arrived(theirs) == STORED


@pytest.mark.parametrize(("size", "looks"), [(1023, 1), (1024, 2), (1025, 2), (3000, 3)])
def test_what_fills_the_buffer_may_have_more_behind_it(size: int, looks: int, house: House) -> None:
    house.use(scratch_bytes=1024)
    ours, theirs = house.pair()
    theirs.sendall(request(11, 100, NAME, b"", size=10_000).ljust(size, b"x"))
    stream = stream_of(house.serve(ours, Notes()))
    assert (stream.looks, stream.received) == (looks, size)


def test_the_client_looks_once_for_an_answer_and_its_end_comes_in_another_turn(
    house: House,
) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    house.turn()
    theirs.sendall(STORED)
    theirs.close()
    house.turn()
    assert connection.phase is LINGERING
    assert stream_of(connection).looks == 1
    house.turn()
    assert connection.phase is CLOSED
    assert house.error() is None


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """What streams do, in order, each time they do something."""
    done: List[str] = []
    receive, send = CountingStream.receive, CountingStream.send

    def receiving(stream: CountingStream, buffer: memoryview) -> Optional[int]:
        count = receive(stream, buffer)
        done.extend(["receive"] * (count is not None))
        return count

    def sending(
        stream: CountingStream, data: Union[bytes, memoryview], more: bool = False
    ) -> Optional[int]:
        done.append("send")
        return send(stream, data, more)

    monkeypatch.setattr(CountingStream, "receive", receiving)
    monkeypatch.setattr(CountingStream, "send", sending)
    return done


def test_all_requests_of_a_turn_are_received_before_any_answer_leaves(
    work: List[str], house: House
) -> None:
    for _ in range(3):
        ours, theirs = house.pair()
        theirs.sendall(REQUEST)
        connection = house.answering(ours, Notes(End=stored()))
        house.reactor.call(connection.start)
    house.reactor.turn()
    assert work == ["receive"] * 3 + ["send"] * 3


def test_an_answer_leaves_in_the_turn_of_its_request_when_others_have_been_served(
    house: House,
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.answering(ours, Notes(End=stored()))
    served: List[bytes] = []
    house.reactor.call(connection.start)
    house.reactor.call(lambda: served.append(arrived(theirs)))
    house.reactor.turn()
    assert served == [b""]
    assert arrived(theirs) == STORED


def test_an_answer_whose_connection_is_closed_before_the_turn_ends_does_not_leave(
    house: House,
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    body = Spool(b"xyz")
    endpoint = Notes(End=retrieved(body))
    connection = house.answering(ours, endpoint)
    house.reactor.call(connection.start)
    house.reactor.call(connection.close)
    house.reactor.turn()
    assert read_all(theirs) == b""
    assert (body.closed, endpoint.messages_sent) == (1, 0)
    assert house.error() is None


@pytest.mark.parametrize(("size", "told"), [(None, [True]), (3, [True, False])])
def test_the_system_is_told_that_the_end_or_the_body_follows_the_answers_fields(
    size: Optional[int], told: List[bool], house: House
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    answer = stored() if size is None else in_the_body(size)
    stream = stream_of(house.serve(ours, Notes(End=answer)))
    assert stream.told_of_more == told


@pytest.mark.parametrize(("size", "told"), [(None, [False]), (3, [True, False])])
def test_the_system_is_told_that_a_body_follows_the_requests_fields_and_nothing_else(
    size: Optional[int], told: List[bool], house: House
) -> None:
    ours, _theirs = house.pair()
    outgoing = Outgoing(REQUEST) if size is None else backup(Spool(bytes(size)))
    connection = house.ask(ours, Notes(), outgoing)
    house.turn()
    assert stream_of(connection).told_of_more == told


# No more than turn_bytes in a turn.


def stream_of(connection: Connection) -> CountingStream:
    stream = connection._stream
    assert isinstance(stream, CountingStream)
    return stream


@pytest.mark.parametrize("scratch_bytes", [1 << 10, 3000, 1 << 16])
def test_two_uploads_come_in_equal_shares_of_each_turn(scratch_bytes: int, house: House) -> None:
    house.use(turn_bytes=4096, scratch_bytes=scratch_bytes)
    upload = request(11, 100, NAME, bytes(50_000))
    pairs = [house.pair() for _ in range(2)]
    streams = [stream_of(house.serve(ours, Notes(End=stored()))) for ours, _ in pairs]
    for _, theirs in pairs:
        theirs.sendall(upload)
    for turn in range(1, len(upload) // 4096 + 2):
        house.turn()
        assert [stream.received for stream in streams] == [min(turn * 4096, len(upload))] * 2


def in_the_body(size: int) -> Outgoing:
    return retrieved(Spool(bytes(size)))


def in_the_fields(size: int) -> Outgoing:
    return Outgoing(response(212, b"", bytes(size)))


@pytest.mark.parametrize("answer", [in_the_body, in_the_fields])
def test_two_answers_leave_in_equal_shares_of_each_turn(
    answer: Callable[[int], Outgoing], house: House
) -> None:
    house.use(turn_bytes=4096)
    pairs = [house.pair() for _ in range(2)]
    streams = [stream_of(house.serve(ours, Notes(End=answer(50_000)))) for ours, _ in pairs]
    peers = [theirs for _, theirs in pairs]
    for theirs in peers:
        theirs.sendall(REQUEST)
    for turn in range(1, 50_000 // 4096 + 1):
        house.turn()
        assert [stream.sent for stream in streams] == [turn * 4096] * 2
        assert all(map(arrived, peers))


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_what_is_thrown_away_after_the_answer_counts_too(later: bool, house: House) -> None:
    house.use(turn_bytes=4096, scratch_bytes=1024)
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes(Head=Later.COMMIT if later else stored()))
    theirs.sendall(request(11, 100, NAME, bytes(50_000)))
    stream = stream_of(connection)
    while stream.received < 50_000:
        before = stream.received
        if later and not before:
            house.reactor.at_turn_end(lambda: connection.send(stored()))
        house.turn()
        assert stream.received - before <= 4096


# Deadlines.


def test_before_the_header_is_there_no_byte_moves_the_deadline(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    for byte in REQUEST[:9]:
        theirs.send(bytes([byte]))
        house.after(1)
    assert connection.phase is EXCHANGING
    theirs.send(REQUEST[9:10])
    house.after(1)
    assert connection.phase is CLOSED
    assert isinstance(house.error(), DeadlineMissed)
    assert "10 s" in str(house.error())
    assert "silent" not in str(house.error())  # it was not: it was slow
    assert read_all(theirs) == b""


def test_after_the_header_every_byte_received_moves_the_deadline(house: House) -> None:
    house.use(min_rate_bytes=0)
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    theirs.sendall(request(11, 100, NAME, b"", size=100))
    house.turn()
    for _ in range(5):
        house.after(59)
        theirs.send(b"x")
        house.turn()
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert isinstance(house.error(), DeadlineMissed)
    assert str(house.error()) == "client was silent for 60 s; try again"


def test_every_byte_that_the_peer_takes_moves_the_deadline(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=retrieved(Spool(bytes(10 << 20)))))
    for _ in range(5):
        house.after(59)
        assert arrived(theirs)
        house.turn()
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert isinstance(house.error(), DeadlineMissed)


def test_a_byte_that_comes_in_the_turn_of_the_deadline_is_in_time(house: House) -> None:
    house.use(min_rate_bytes=0)
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    theirs.sendall(request(11, 100, NAME, b"", size=100))
    house.turn()
    theirs.send(b"x")
    house.after(60)
    assert connection.phase is EXCHANGING


def test_an_answer_that_was_put_off_begins_with_the_idle_deadline(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=Later.COMMIT))
    connection.send(retrieved(Spool(bytes(10 << 20))))
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert isinstance(house.error(), DeadlineMissed)


def test_while_lingering_no_byte_moves_the_deadline_and_missing_it_is_no_error(
    house: House,
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    house.turn()
    for _ in range(29):
        theirs.send(b"more")
        house.after(1)
    assert connection.phase is LINGERING
    theirs.send(b"more")
    house.after(1)
    assert connection.phase is CLOSED
    assert house.error() is None


def test_a_connection_that_lingers_can_be_hurried(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    house.after(10)
    connection.hurry(2)
    house.after(1.9)
    assert connection.phase is LINGERING
    house.after(0.1)
    assert connection.phase is CLOSED


def test_one_that_does_not_linger_is_not_hurried(house: House) -> None:
    ours, _theirs = house.pair()
    connection = house.serve(ours, Notes())
    connection.hurry(2)
    house.after(9.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert connection.phase is CLOSED
    connection.hurry(2)


def test_a_connection_that_is_not_made_in_time_is_unreachable(house: House) -> None:
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        stack.enter_context(socket.create_connection(full.getsockname()))
        # Nobody accepts this connection, so that the kernel takes no second one.
        select.select([full], [], [])
        stream = connect(socket.AF_INET, full.getsockname(), "server")
        connection = house.ask(stream, Notes(), Outgoing(REQUEST))
        house.after(9.9)
        assert connection.phase is CONNECTING
        house.after(0.1)
        assert connection.phase is CLOSED
    error = house.error()
    assert isinstance(error, Unreachable)
    assert str(error) == "cannot connect to server: no answer in 10 s; try again"


def test_a_server_that_does_not_answer_misses_the_idle_deadline(house: House) -> None:
    ours, _ = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    house.turn()
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert str(house.error()) == "server was silent for 60 s; try again"


def test_the_answers_header_is_there_soon_after_its_first_byte(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    house.turn()
    house.after(59)
    for byte in response(212, NAME, b"")[:-1]:
        theirs.send(bytes([byte]))
        house.after(1.3)
        if connection.phase is CLOSED:
            break
    assert str(house.error()) == "server sent no whole header in 10 s"


@pytest.mark.parametrize("a_second", [1, 1023])
def test_a_payload_that_dribbles_is_given_up(a_second: int, house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(refuse=Outgoing(response(1001, NAME)))
    house.serve(ours, endpoint)
    theirs.sendall(request(11, 100, NAME, b"", size=1 << 20))
    house.turn()
    for _ in range(30):
        theirs.sendall(b"x" * a_second)
        house.after(1)
    assert read_all(theirs) == response(1001, NAME)
    theirs.close()
    house.turn()
    assert isinstance(endpoint.refused, DeadlineMissed)
    text = "client was slower than 1024 bytes a second for 30 s; try again"
    assert str(endpoint.refused) == text


def test_a_payload_that_comes_slowly_is_not(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    theirs.sendall(request(11, 100, NAME, b"", size=1 << 20))
    house.turn()
    for _ in range(100):
        theirs.sendall(b"x" * 1024)
        house.after(1)
    assert connection.phase is EXCHANGING


def test_an_answer_that_is_taken_byte_by_byte_is_given_up(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(Spool(bytes(30 << 20)))))
    for _ in range(60):  # the sockets' buffers fill in the first half
        assert theirs.recv(1)
        house.after(1)
    assert isinstance(house.error(), DeadlineMissed)


def test_what_follows_a_request_buys_no_time_for_its_answer(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(Spool(bytes(30 << 20)))))
    for _ in range(60):
        theirs.sendall(bytes(5000))
        house.after(1)
        if house.ended:
            break
    assert isinstance(house.error(), DeadlineMissed)


def test_a_fault_on_the_way_of_a_missed_deadline_is_this_connections_alone(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes()
    connection = house.serve(ours, endpoint)
    theirs.sendall(request(11, 100, NAME, b"", size=100))
    house.turn()

    def slip(error: BackupError) -> Optional[Outgoing]:
        raise TypeError("a slip of the pen")

    endpoint.refuse = slip  # type: ignore[method-assign]
    house.after(60)
    assert connection.phase is CLOSED
    assert isinstance(house.error(), InternalError)


def test_a_server_that_takes_a_request_byte_by_byte_is_given_up(house: House) -> None:
    ours, theirs = house.pair()
    house.ask(ours, Notes(), backup(Spool(bytes(30 << 20))))
    house.turn()
    for _ in range(60):  # the sockets' buffers fill in the first half
        assert theirs.recv(1)
        house.after(1)
    assert isinstance(house.error(), DeadlineMissed)


def test_who_was_refused_for_dribbling_has_a_moment_to_close(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes(refuse=Outgoing(response(1001, NAME))))
    theirs.sendall(request(11, 100, NAME, b"", size=1 << 20))
    house.turn()
    house.after(30)
    assert connection.phase is LINGERING
    house.after(house.settings.farewell_seconds)
    assert connection.phase is CLOSED


def test_a_refusal_that_the_peer_does_not_take_at_once_is_not_waited_for(house: House) -> None:
    ours, theirs = house.pair()
    house.serve(ours, Notes(refuse=Outgoing(bytes(30 << 20))))
    theirs.sendall(request(11, 100, NAME, b"", size=1 << 20))
    house.turn()
    house.after(30)
    assert isinstance(house.error(), DeadlineMissed)


def test_a_server_that_answers_and_does_not_close_is_no_failure(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    theirs.sendall(STORED)
    house.turn()
    house.turn()
    assert connection.phase is LINGERING
    house.after(0.9)
    assert connection.phase is LINGERING
    house.after(0.1)
    assert connection.phase is CLOSED
    assert house.error() is None


# The answer arrives.


def test_a_client_that_pushes_everything_before_it_reads_gets_the_refusal(house: House) -> None:
    refusal = response(1001, NAME)
    ours, theirs = house.tcp_pair()
    received: List[bytes] = []

    def push_then_read() -> None:
        theirs.sendall(request(11, 100, NAME, bytes(8 << 20)))
        received.append(read_all(theirs))
        theirs.close()

    client = threading.Thread(target=push_then_read)
    client.start()
    connection = house.serve(ours, Notes(Head=Outgoing(refusal)))
    house.run_to_the_end()
    client.join()
    assert received == [refusal]
    assert house.error() is None
    assert connection.trail == (EXCHANGING, LINGERING, CLOSED)


def test_the_answer_leaves_before_the_rest_of_what_is_there_is_read(house: House) -> None:
    house.use(scratch_bytes=1024)
    ours, theirs = house.pair()
    theirs.sendall(request(11, 100, NAME, bytes(50_000)))
    stream = stream_of(house.serve(ours, Notes(Head=stored())))
    assert stream.received_before_sending == 1024
    house.turn()
    assert stream.received == 50_000 + len(request(11, 100, NAME, b""))


def test_the_peer_sees_the_end_of_the_answer_before_it_closes(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    assert read_all(theirs) == STORED
    assert connection.phase is LINGERING


def test_bytes_after_the_request_are_taken_and_thrown_away(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(End=stored())
    stream = stream_of(house.serve(ours, endpoint))
    theirs.sendall(REQUEST + bytes(100_000))
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()
    assert read_all(theirs) == STORED
    assert endpoint.kinds == ["Head", "Data", "End"]
    assert endpoint.payload == b"xyz"
    assert stream.received == len(REQUEST) + 100_000
    assert house.error() is None


def test_what_comes_while_the_answer_leaves_is_taken(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(request(11, 100, NAME, b"", size=1 << 20))
    endpoint = Notes(Head=retrieved(Spool(bytes(1 << 20))))
    house.serve(ours, endpoint)
    theirs.sendall(b"payload")
    house.turn()
    assert endpoint.payload == b"payload"


def test_a_client_that_ends_its_side_after_the_request_gets_the_answer(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes(End=stored()))
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()
    assert read_all(theirs) == STORED
    assert connection.phase is CLOSED


def test_a_client_that_ends_its_side_too_early_gets_the_answer_to_that(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(Cut=stored())
    connection = house.serve(ours, endpoint)
    theirs.sendall(REQUEST[:-1])
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()
    assert read_all(theirs) == STORED
    assert endpoint.kinds == ["Head", "Data", "Cut"]
    assert connection.trail == (EXCHANGING, LINGERING, CLOSED)
    assert house.error() is None


@pytest.mark.parametrize(
    ("length", "field"), [(0, "header"), (7, "header"), (8, "filename"), (9, "size")]
)
def test_a_client_that_ends_without_an_answer_to_it_is_cut_short(
    length: int, field: str, house: House
) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    theirs.sendall(REQUEST[:length])
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()
    assert connection.trail == (EXCHANGING, CLOSED)
    assert isinstance(house.error(), CutShort)
    assert f"inside the {field}" in str(house.error())
    assert read_all(theirs) == b""


@pytest.mark.parametrize(("length", "field"), [(0, "header"), (9, "filename"), (12, "payload")])
def test_a_server_that_ends_before_its_answer_is_whole_is_cut_short(
    length: int, field: str, house: House
) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    house.turn()
    theirs.sendall(response(212, NAME, b"payload")[:length])
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()
    assert connection.trail == (CONNECTING, EXCHANGING, CLOSED)
    assert isinstance(house.error(), CutShort)
    assert f"inside the {field}" in str(house.error())


@pytest.mark.parametrize("at_once", [True, False])
def test_bytes_after_the_answer_are_the_endpoints_to_judge_even_then(
    at_once: bool, house: House
) -> None:
    ours, theirs = house.pair()
    connection = house.ask(ours, Notes(Excess=ProtocolError("too much")), Outgoing(REQUEST))
    house.turn()
    theirs.sendall(STORED + b"x" * at_once)
    house.turn()
    if not at_once:
        theirs.sendall(b"x")
        house.turn()
    assert connection.trail == (CONNECTING, EXCHANGING, LINGERING, CLOSED)
    assert str(house.error()) == "too much"


# A server that answers and goes while the client still sends.


def test_the_answer_decides_though_sending_fails(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(STORED)
    theirs.close()
    endpoint, body = Notes(), Spool(bytes(1 << 20))
    connection = house.ask(ours, endpoint, backup(body))
    house.run_to_the_end()
    assert endpoint.kinds == ["Head", "End"]
    assert house.error() is None
    assert connection.trail == (CONNECTING, EXCHANGING, LINGERING, CLOSED)
    assert (body.remaining, body.closed) == (1 << 20, 1)
    assert endpoint.messages_sent == 0


def test_a_server_that_takes_no_more_may_still_answer(house: House) -> None:
    ours, theirs = house.pair()
    theirs.shutdown(socket.SHUT_RD)
    body = Spool(bytes(1 << 20))
    connection = house.ask(ours, Notes(), backup(body))
    house.turn()
    house.turn()
    assert connection.phase is EXCHANGING
    assert body.closed == 1
    assert house.reactor.interests == [WRITE, READ]
    theirs.sendall(STORED)
    theirs.close()
    house.run_to_the_end()
    assert house.error() is None
    assert connection.trail == (CONNECTING, EXCHANGING, LINGERING, CLOSED)


@pytest.mark.parametrize("answer", [b"", STORED[:3]])
def test_without_a_whole_answer_the_error_is_why_sending_failed(
    answer: bytes, house: House
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(answer)
    theirs.close()
    house.ask(ours, Notes(), Outgoing(REQUEST))
    house.run_to_the_end()
    assert isinstance(house.error(), ConnectionFailed)
    assert not isinstance(house.error(), CutShort)
    assert "broken pipe" in str(house.error()).lower()


def test_the_answer_decides_though_the_server_resets_the_connection_behind_it(
    house: House,
) -> None:
    ours, theirs = house.tcp_pair()
    endpoint = Notes()
    connection = house.ask(ours, endpoint, backup(Spool(bytes(8 << 20))))
    house.run(lambda: connection.phase is EXCHANGING)
    theirs.recv(10)
    theirs.sendall(STORED)
    theirs.close()  # with unread bytes, so that it is a reset
    house.run_to_the_end()
    assert endpoint.kinds == ["Head", "End"]
    assert house.error() is None


def test_a_refusal_ends_the_request_that_is_still_being_sent(house: House) -> None:
    ours, theirs = house.pair()
    body = Spool(bytes(1 << 20))
    house.ask(ours, Notes(Head=Refused("no")), backup(body))
    house.turn()
    theirs.sendall(response(1001, NAME))
    house.turn()
    assert str(house.error()) == "no"
    assert body.closed == 1
    assert body.remaining


# Answers that are made at the end of the turn.


@pytest.mark.parametrize("at", ["Head", "End"])
def test_an_answer_that_is_put_off_is_awaited_without_watching(at: str, house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    endpoint = Notes(**{at: Later.COMMIT})
    connection = house.serve(ours, endpoint)
    assert house.waiting == [connection]
    assert connection.phase is EXCHANGING
    assert arrived(theirs) == b""
    connection.send(stored())
    assert read_all(theirs) == STORED
    house.turn()
    assert connection.trail == (EXCHANGING, LINGERING, CLOSED)
    assert (endpoint.messages_sent, house.error()) == (1, None)
    assert house.reactor.interests == []


def test_an_answer_that_was_put_off_and_does_not_fit_is_watched_for(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=Later.COMMIT))
    connection.send(retrieved(Spool(bytes(1 << 20))))
    assert house.reactor.interests == [READ | WRITE]
    while connection.phase is EXCHANGING:
        assert arrived(theirs)
        house.turn()


def test_several_answers_can_be_put_off_in_one_turn(house: House) -> None:
    peers = []
    for _ in range(3):
        ours, theirs = house.pair()
        theirs.sendall(REQUEST)
        theirs.shutdown(socket.SHUT_WR)
        house.serve(ours, Notes(End=Later.COMMIT))
        peers.append(theirs)
    assert house.waiting == house.connections
    for connection in house.waiting:
        connection.send(stored())
    assert [read_all(peer) for peer in peers] == [STORED] * 3
    house.turn()
    assert set(house.ended.values()) == {None}


# Work that is put off to another turn.

FIELDS = request(11, 100, NAME, b"", size=100)


@pytest.mark.parametrize("watched", [False, True], ids=["at once", "watched"])
def test_while_it_waits_nothing_is_received_and_then_it_goes_on(
    watched: bool, house: House
) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(Data=Later.STEP, End=stored())
    if watched:
        connection = house.serve(ours, endpoint)
        theirs.sendall(FIELDS + b"x" * 40)
        house.turn()
    else:
        theirs.sendall(FIELDS + b"x" * 40)
        connection = house.serve(ours, endpoint)
    stream = stream_of(connection)
    assert house.waiting == [connection]
    assert house.waits_for == [Later.STEP]
    assert endpoint.payload == b"x" * 40
    assert house.reactor.dropped == [ours] * watched
    looks, interests = stream.looks, [*house.reactor.interests]
    theirs.sendall(b"x" * 60)
    for _ in range(3):
        house.turn()
    assert stream.looks == looks
    connection.start()  # as a server that is told to stop does
    assert stream.looks == looks
    connection.resume()
    assert stream.looks == looks  # not before its turn
    assert house.reactor.interests == [*interests, READ]
    house.turn()
    assert endpoint.payload == b"x" * 100
    assert arrived(theirs) == STORED


def test_what_came_with_the_part_that_put_off_is_taken_with_it(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST + b"more")
    endpoint = Notes(Head=Later.STEP)
    connection = house.serve(ours, endpoint)
    assert endpoint.kinds == ["Head", "Data", "End", "Excess"]
    assert house.waiting == [connection]
    connection.send(stored())
    assert arrived(theirs) == STORED


def test_a_connection_that_waits_reads_no_more_of_what_is_there(house: House) -> None:
    house.use(scratch_bytes=1024)
    ours, theirs = house.pair()
    theirs.sendall(request(11, 100, NAME, bytes(50_000)))
    stream = stream_of(house.serve(ours, Notes(Data=Later.STEP)))
    assert stream.received == 1024


def test_it_may_put_off_again_and_again(house: House) -> None:
    house.use(scratch_bytes=1024)
    ours, theirs = house.pair()
    theirs.sendall(request(11, 100, NAME, bytes(10_000)))

    class Slow(Notes):
        def take(self, part: Part) -> Union[Outgoing, Later, None]:
            super().take(part)
            if isinstance(part, Data):
                return Later.STEP
            return stored() if isinstance(part, End) else None

    endpoint = Slow()
    connection = house.serve(ours, endpoint)
    for turn in range(1, 10):
        assert len(house.waiting) == turn
        connection.resume()
        house.turn()
    assert endpoint.payload == bytes(10_000)
    assert arrived(theirs) == STORED


@pytest.mark.parametrize("seconds", [5, 10, 59, 1000])
def test_while_it_waits_it_misses_no_deadline_and_then_the_peer_has_its_time(
    seconds: float, house: House
) -> None:
    house.use(min_rate_bytes=0)
    ours, theirs = house.pair()
    theirs.sendall(FIELDS + b"x")
    connection = house.serve(ours, Notes(Data=Later.STEP))
    house.after(seconds)
    house.turn()
    assert connection.phase is EXCHANGING
    connection.resume()
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert str(house.error()) == "client was silent for 60 s; try again"


def test_a_deadline_that_began_before_it_waits_is_not_missed_then(house: House) -> None:
    house.use(min_rate_bytes=0)
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes(Data=Later.STEP))
    theirs.sendall(FIELDS)
    house.turn()
    theirs.sendall(b"x")
    house.turn()
    house.after(1000)
    house.after(1000)
    assert connection.phase is EXCHANGING
    connection.resume()
    theirs.sendall(b"x")
    house.after(60)
    assert connection.phase is EXCHANGING  # a byte came in time
    house.after(60)
    assert isinstance(house.error(), DeadlineMissed)


@pytest.mark.parametrize("later", [*Later])
def test_an_answer_that_comes_late_is_in_time(later: Later, house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(Head=later))
    house.after(1000)
    connection.send(retrieved(Spool(bytes(10 << 20))))
    house.after(59.9)
    assert connection.phase is EXCHANGING
    house.after(0.1)
    assert isinstance(house.error(), DeadlineMissed)


def test_a_peer_that_ends_while_it_waits_is_heard_of_afterwards(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(FIELDS + b"x")
    endpoint = Notes(Data=Later.STEP, Cut=stored())
    connection = house.serve(ours, endpoint)
    theirs.shutdown(socket.SHUT_WR)
    house.turn()
    assert endpoint.kinds == ["Head", "Data"]
    connection.resume()
    house.turn()
    assert endpoint.kinds == ["Head", "Data", "Cut"]
    assert read_all(theirs) == STORED


def test_a_connection_that_waits_may_be_closed(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(FIELDS + b"x")
    connection = house.serve(ours, Notes(Data=Later.STEP))
    connection.close()
    house.turn()
    assert read_all(theirs) == b""
    assert house.error() is None


# Closing, and what is an error.


def test_the_endpoint_hears_of_the_end_before_the_owner(house: House) -> None:
    class Asking(Notes):
        def closed(self, error: Optional[BackupError]) -> None:
            super().closed(error)
            assert not house.ended

    ours, _theirs = house.pair()
    endpoint = Asking()
    error = ConnectionFailed("cancelled")
    house.serve(ours, endpoint).close(error)
    assert endpoint.heard_end == [error]
    assert house.error() is error


def test_an_interrupt_while_it_closes_leaves_nothing_open_and_all_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = house.pair()
    endpoint = Notes()
    connection = house.serve(ours, endpoint)

    def interrupted(_: socket.socket) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(house.reactor, "unwatch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connection.close()
    assert theirs.recv(1) == b""
    assert endpoint.heard_end == [None]
    assert house.error() is None


def test_closing_says_why_once(house: House) -> None:
    ours, theirs = house.pair()
    connection = house.serve(ours, Notes())
    error = ConnectionFailed("cancelled")
    connection.close(error)
    connection.close()  # the house would object to hear of it again
    connection.close(ConnectionFailed("another"))
    assert house.error() is error
    assert theirs.recv(1) == b""


def test_an_endpoint_may_close_the_connection_whose_part_it_takes(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(End=stored())
    connection = house.answering(ours, endpoint)
    endpoint.act = connection.close
    theirs.sendall(REQUEST)
    connection.start()
    assert connection.trail == (EXCHANGING, CLOSED)
    assert endpoint.kinds == ["Head"]
    assert theirs.recv(1) == b""


def test_a_body_may_close_the_connection_that_sends_it(house: House) -> None:
    ours, theirs = house.pair()
    body = Spool(b"xyz")
    connection = house.ask(ours, Notes(), backup(body))
    body.act = connection.close
    house.turn()
    assert connection.trail == (CONNECTING, EXCHANGING, CLOSED)
    assert body.closed == 1
    assert read_all(theirs) == REQUEST


def test_a_closed_connection_is_not_held_until_its_deadline(house: House) -> None:
    endpoint = Notes()
    gone = weakref.ref(endpoint)
    house.serve(house.pair()[0], endpoint).close()
    del endpoint
    house.connections.clear()
    house.ended.clear()
    gc.collect()
    assert gone() is None


def test_an_error_of_the_endpoint_closes_with_it(house: House) -> None:
    ours, theirs = house.pair()
    error = Refused("no")
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(Data=error))
    assert connection.trail == (EXCHANGING, CLOSED)
    assert house.error() is error


def test_a_client_that_resets_the_connection_before_its_answer_is_an_error(house: House) -> None:
    ours, theirs = house.tcp_pair()
    connection = house.serve(ours, Notes())
    reset(theirs)
    house.run_to_the_end()
    assert connection.trail == (EXCHANGING, CLOSED)
    assert isinstance(house.error(), ConnectionFailed)


def test_a_client_that_goes_before_it_has_taken_the_answer_is_an_error(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(Spool(bytes(1 << 20)))))
    theirs.close()
    house.turn()
    assert isinstance(house.error(), ConnectionFailed)


def test_a_client_that_ends_its_side_and_goes_before_it_has_taken_the_answer_is_an_error(
    house: House,
) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    house.serve(ours, Notes(End=retrieved(Spool(bytes(1 << 20)))))
    house.turn()  # sees the end
    theirs.close()
    house.turn()
    assert isinstance(house.error(), ConnectionFailed)


def test_a_client_that_resets_the_connection_after_its_answer_is_none(house: House) -> None:
    ours, theirs = house.tcp_pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    house.run(lambda: connection.phase is LINGERING)
    reset(theirs)
    house.run_to_the_end()
    assert house.error() is None


def test_a_server_that_resets_the_connection_after_its_answer_is_none(house: House) -> None:
    ours, theirs = house.tcp_pair()
    connection = house.ask(ours, Notes(), Outgoing(REQUEST))
    house.run(lambda: connection.phase is EXCHANGING)
    theirs.sendall(STORED)
    house.run(lambda: connection.phase is LINGERING)
    reset(theirs)
    house.run_to_the_end()
    assert house.error() is None


def test_giving_up_a_connection_that_lingers_is_none(house: House) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    connection = house.serve(ours, Notes(End=stored()))
    assert connection.phase is LINGERING
    connection.close(ConnectionFailed("cancelled"))
    assert house.error() is None


# Whatever happens, the body is closed, once.


def until_sent(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    theirs.shutdown(socket.SHUT_WR)
    house.serve(ours, Notes(End=retrieved(body)))
    while not house.ended:
        arrived(theirs)
        house.turn()
    assert body.remaining == 0


def until_the_client_is_gone(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(body)))
    theirs.close()
    house.turn()


def until_the_deadline(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(body)))
    house.after(60)


def until_it_is_closed(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    theirs.sendall(REQUEST)
    house.serve(ours, Notes(End=retrieved(body))).close()


def until_the_server_is_gone(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    house.ask(ours, Notes(), backup(body))
    house.turn()
    theirs.close()
    house.turn()


def until_the_server_has_answered(house: House, body: Spool) -> None:
    ours, theirs = house.pair()
    house.ask(ours, Notes(), backup(body))
    house.turn()
    theirs.sendall(STORED)
    theirs.shutdown(socket.SHUT_WR)
    house.run_to_the_end()


def until_it_is_closed_before_it_is_connected(house: House, body: Spool) -> None:
    ours, _ = house.pair()
    house.ask(ours, Notes(), backup(body)).close()


@pytest.mark.parametrize(
    "send",
    [
        until_sent,
        until_the_client_is_gone,
        until_the_deadline,
        until_it_is_closed,
        until_the_server_is_gone,
        until_the_server_has_answered,
        until_it_is_closed_before_it_is_connected,
    ],
)
def test_a_body_is_closed_once(send: Callable[[House, Spool], None], house: House) -> None:
    body = Spool(bytes(1 << 20))
    send(house, body)
    assert len(house.ended) == 1
    assert body.closed == 1


# What nobody foresaw.


class Slip(Exception):
    """A fault of this program."""


def slip() -> None:
    raise Slip


def test_a_fault_is_told_and_answered_if_nothing_was_sent(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(refuse=Outgoing(response(1001, NAME)))
    endpoint.act = slip
    theirs.sendall(REQUEST)
    house.serve(ours, endpoint)
    assert read_all(theirs) == response(1001, NAME)
    theirs.close()
    house.run_to_the_end()
    assert [type(fault) for fault in house.faults] == [Slip]
    assert isinstance(endpoint.refused, InternalError)


def test_a_fault_without_an_answer_closes(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes()
    endpoint.act = slip
    theirs.sendall(REQUEST)
    house.serve(ours, endpoint)
    assert isinstance(house.error(), InternalError)
    assert read_all(theirs) == b""
    assert len(house.faults) == 1


def test_a_fault_in_the_answer_to_a_fault_closes(house: House) -> None:
    class Worse(Notes):
        def refuse(self, error: BackupError) -> Optional[Outgoing]:
            raise KeyError

    ours, theirs = house.pair()
    endpoint = Worse()
    endpoint.act = slip
    theirs.sendall(REQUEST)
    house.serve(ours, endpoint)
    assert isinstance(house.error(), InternalError)
    assert [type(fault) for fault in house.faults] == [Slip, KeyError]


def test_a_fault_when_a_part_of_the_answer_has_left_sends_nothing_more(house: House) -> None:
    ours, theirs = house.pair()
    body = Spool(b"xyz")
    body.act = slip
    endpoint = Notes(End=retrieved(body), refuse=Outgoing(response(1001, NAME)))
    theirs.sendall(REQUEST)
    house.serve(ours, endpoint)
    assert isinstance(house.error(), InternalError)
    assert endpoint.refused is None
    assert body.closed == 1
    assert read_all(theirs).endswith(NAME + b"xyz")


def test_a_fault_of_the_client_is_not_answered(house: House) -> None:
    ours, theirs = house.pair()
    endpoint = Notes(refuse=Outgoing(response(1001, NAME)))
    endpoint.act = slip
    house.ask(ours, endpoint, Outgoing(REQUEST))
    theirs.sendall(STORED)
    house.turn()
    house.turn()
    assert isinstance(house.error(), InternalError)
    assert read_all(theirs) == REQUEST


def test_a_fault_of_who_hears_of_the_end_is_told_and_the_owner_hears_of_it_too(
    house: House,
) -> None:
    class Deaf(Notes):
        def closed(self, error: Optional[BackupError]) -> None:
            slip()

    ours, theirs = house.pair()
    connection = house.serve(ours, Deaf())
    connection.close()
    assert house.error() is None
    assert [type(fault) for fault in house.faults] == [Slip]
    assert read_all(theirs) == b""


def test_a_body_that_fails_is_closed_and_its_error_is_the_connections(house: House) -> None:
    ours, theirs = house.pair()
    error = FileChanged("it changed")
    body = Spool(b"xyz", error)
    house.ask(ours, Notes(), backup(body))
    house.turn()
    assert house.error() is error
    assert body.closed == 1
    assert read_all(theirs) == REQUEST[:-1]


def test_what_bodies_endpoints_and_owners_must_do_is_theirs_to_write(house: House) -> None:
    ours, _ = house.pair()
    connection = house.answering(ours, Notes())
    duties: List[Callable[[], object]] = [
        lambda: Body().send(stream_of(connection), 1),
        lambda: Endpoint().take(End()),
        lambda: Endpoint().refuse(CutShort("it ended")),
        lambda: Owner().failed(connection, InternalError(Slip())),
        lambda: Owner().put_off(connection, Later.STEP),
        lambda: Owner().closed(connection, None),
    ]
    for duty in duties:
        with pytest.raises(NotImplementedError):
            duty()
