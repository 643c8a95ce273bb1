"""One exchange over one stream, for either end: a request one way, an answer the other.

Rules:

- A connection pumps: bytes from the stream through the protocol's machine, the
  parts to its ``Endpoint``; what the endpoint returns, out through the stream.
  The endpoint decides and returns values; it never reaches in here.
- It does what can be done at once and is watched only for the rest: a request
  that is there when the connection is accepted is answered in the same turn, and
  if the peer has closed by the next, the connection was never watched at all.
- An answer leaves at the end of the turn, with all others: see ``reactor``.
- What the endpoint puts off (``Later``) is the owner's to bring about, in this
  turn or another; until then nothing is received, and no deadline is missed.
- ``Phase`` is its life, ``PHASES`` the only moves. It is CONNECTING (the asking
  end only), then EXCHANGING until the answer has passed as a whole: sent by one
  end, received by the other. Then it is LINGERING until the peer closes: the
  server, because closing a socket with unread bytes in it would reset the
  connection and could destroy the answer; the client, to see that nothing
  follows the answer. Once the answer has passed, a peer that vanishes or stays
  is no failure.
- No connection receives or sends more than ``turn_bytes`` in a turn.
- An exception that nobody foresaw is this connection's alone: see ``fail``.
- One deadline, see ``patience``: for the connection, the header and the close it
  stands still; payloads must keep moving. Missed by a peer that still has to
  send, it is answered, if the endpoint has an answer.
"""

from __future__ import annotations

from enum import Enum
from typing import Dict, FrozenSet, NamedTuple, Optional, Union

from .errors import (
    BackupError,
    ConnectionFailed,
    CutShort,
    DeadlineMissed,
    InternalError,
    Unreachable,
)
from .patience import Patience
from .protocol import Cut, End, Head, Part, Receiver
from .reactor import READ, WRITE, Reactor
from .settings import Settings
from .stream import Stream, settle


class Phase(Enum):
    """Where in its life a connection is."""

    __hash__ = object.__hash__  # Enum's own is written in Python

    CONNECTING = "connecting"
    EXCHANGING = "exchanging"
    LINGERING = "lingering"
    CLOSED = "closed"


_CONNECTING, _EXCHANGING, _LINGERING, _CLOSED = Phase  # a member costs 64 ns on 3.9, a global 9

PHASES: Dict[Phase, FrozenSet[Phase]] = {
    Phase.CONNECTING: frozenset({Phase.EXCHANGING, Phase.CLOSED}),
    Phase.EXCHANGING: frozenset({Phase.LINGERING, Phase.CLOSED}),
    Phase.LINGERING: frozenset({Phase.CLOSED}),
    Phase.CLOSED: frozenset(),
}


class Body:
    """A payload on its way out, which knows how to send itself."""

    remaining: int
    """Bytes still to be sent."""

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        """Sends up to ``limit`` bytes; how many, None for not in this turn.

        Raises ``BackupError``.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""


class Outgoing(NamedTuple):
    """A message to send: its fields, and the payload behind them."""

    head: bytes
    body: Optional[Body] = None


class Later(Enum):
    """What an endpoint waits for before it goes on."""

    COMMIT = "a change is to be committed, with all others; then there is an answer"
    STEP = "a piece of work is to be done, which may end in an answer or not"


class Endpoint:
    """What one end makes of the other's message."""

    def take(self, part: Part) -> Union[Outgoing, Later, None]:
        """Takes one part; the message to send, if this part calls for one.

        A ``BackupError`` raised here closes the connection with it.
        """
        raise NotImplementedError

    def sent(self) -> None:
        """The whole outgoing message is with the operating system."""

    def refuse(self, error: BackupError) -> Optional[Outgoing]:
        """The message to send because of ``error``, before any other was; None for none."""
        raise NotImplementedError

    def closed(self, error: Optional[BackupError]) -> None:
        """The connection is closed; ``error`` is what kept the answer from passing."""


class Owner:
    """Who made a connection, and hears of it what does not concern its endpoint."""

    def put_off(self, connection: Connection, later: Later) -> None:
        """The endpoint returned this: ``send`` or ``resume`` is awaited, now or in a later turn."""
        raise NotImplementedError

    def failed(self, connection: Connection, error: InternalError) -> None:
        """The connection ends by a fault of this program, unless this raises what goes on."""
        raise NotImplementedError

    def closed(self, connection: Connection, error: Optional[BackupError]) -> None:
        """The connection is closed, and its endpoint has heard of it."""
        raise NotImplementedError


class Connection:
    """The pump between one stream and one endpoint.

    ``asks`` tells the client's end from the server's. ``scratch`` is the
    reactor's one receive buffer.
    """

    __slots__ = (
        "_asks",
        "_endpoint",
        "_faulty",
        "_head",
        "_headed",
        "_hears",
        "_interest",
        "_later",
        "_may_receive",
        "_may_send",
        "_outgoing",
        "_owner",
        "_patience",
        "_reactor",
        "_receiver",
        "_scratch",
        "_send_error",
        "_settings",
        "_stream",
        "_waits_a_turn",
        "begun",
        "connected",
        "phase",
    )

    def __init__(
        self,
        reactor: Reactor,
        stream: Stream,
        endpoint: Endpoint,
        receiver: Receiver,
        *,
        asks: bool,
        scratch: memoryview,
        settings: Settings,
        owner: Owner,
    ) -> None:
        self._reactor = reactor
        self._stream = stream
        self._endpoint = endpoint
        self._receiver = receiver
        self._asks = asks
        self._scratch = scratch
        self._settings = settings
        self._owner = owner
        self.phase = _CONNECTING if asks else _EXCHANGING
        self.connected = not asks
        self.begun = False  # whether a byte of the peer's has come
        self._hears = True  # until the peer ends its side
        self._outgoing: Optional[Outgoing] = None
        self._head: Union[bytes, memoryview] = b""  # what is left of its fields
        self._later = False  # whether the turn's end, or the owner, is to go on
        self._send_error: Optional[ConnectionFailed] = None
        self._faulty = False
        self._interest = 0
        self._waits_a_turn = not asks  # whether the first look for the peer's end is still to come
        self._may_receive = self._may_send = 0  # bytes, in what is left of this turn
        self._headed = False  # whether the peer's header is there
        seconds = settings.connect_seconds if asks else settings.header_seconds
        self._patience = Patience(reactor, settings, seconds, self._missed)

    @property
    def peer(self) -> str:
        """The other end's name in messages."""
        return self._stream.peer

    def start(self) -> None:
        """The server's end: serves what has arrived already."""
        self._ready(READ)

    def connect(self, request: Outgoing) -> None:
        """The client's end: sends ``request`` as soon as the stream is connected."""
        self._load(request)
        self._watch()

    def send(self, answer: Outgoing) -> None:
        """The server's end: sends the answer that was put off."""
        self._load(answer)
        self._answer()

    def resume(self) -> None:
        """The server's end: what was put off is done, and the next bytes may come."""
        self._later = False
        self._patience.keep_moving(paced=True)
        self._pump(0)

    def fail(self, fault: Exception) -> None:
        """Ends a connection in which something was raised that nobody foresaw.

        The owner hears of it first. If nothing of an answer was sent yet, the
        endpoint may still send one; a second fault closes at once.
        """
        error = InternalError(fault)
        self._owner.failed(self, error)
        answer = None
        if not self._faulty and self._has_sent_nothing():
            self._faulty = True
            try:
                self._unload()
                answer = self._endpoint.refuse(error)
            except Exception as another:
                self.fail(another)
                return
        if answer is None:
            self.close(error)
        else:
            self.send(answer)

    def hurry(self, seconds: float) -> None:
        """Makes a connection that is LINGERING close after so long at the latest."""
        if self.phase is _LINGERING and self._patience.seconds > seconds:
            self._patience.stand(seconds)

    def close(self, error: Optional[BackupError] = None) -> None:
        """Closes at once; ``error`` says why the answer has not passed."""
        if self.phase is _CLOSED:
            return
        if self.phase is _LINGERING and isinstance(error, ConnectionFailed):
            error = None
        self._enter(_CLOSED)
        try:
            self._let_go(error)
        except Exception as fault:
            self._owner.failed(self, InternalError(fault))
        finally:
            self._owner.closed(self, error)

    def _let_go(self, error: Optional[BackupError]) -> None:
        try:
            self._patience.close()
            self._unwatch()
            self._unload()
        finally:  # even if the user interrupts
            self._stream.close()
            self._endpoint.closed(error)

    def _ready(self, events: int) -> None:
        """The reactor's callback, once a turn."""
        if self._later:
            return
        self._may_receive = self._may_send = self._settings.turn_bytes
        self._pump(events)

    def _answer(self) -> None:
        """Begins to send the answer, unless the connection was closed since that was put off."""
        self._later = False
        if self.phase is not _CLOSED:
            self._patience.keep_moving(paced=True)
            self._pump(WRITE)

    def _look_again(self) -> None:
        """One turn after the answer has left: most peers have closed by now."""
        if self.phase is not _CLOSED:
            self._ready(READ)

    def _pump(self, events: int) -> None:
        """Does what the socket is ready for."""
        try:
            if self.phase is _CONNECTING:
                settle(self._stream)
                self.connected = True
                self._enter(_EXCHANGING)
                self._patience.keep_moving(paced=True)
            if self.phase is _LINGERING and not self._asks:
                self._discard()
            elif events & READ:
                self._receive_some()
            if events & WRITE and self._outgoing is not None:
                self._send_some()
            over = not self._hears and self.phase is _LINGERING
            if not over and self.phase is not _CLOSED:
                self._watch()
        except BackupError as error:
            self.close(error)
        except Exception as fault:
            self.fail(fault)
        else:
            if over:
                self.close()

    def _receive_some(self) -> None:
        while self._may_receive > 0 and self._hears:
            room = self._scratch[: self._may_receive]
            count = self._stream.receive(room)
            if count is None:
                return
            if count:
                if self._asks and not self.begun:
                    settings = self._settings
                    self._patience.stand(min(settings.header_seconds, settings.idle_seconds))
                self.begun = True
                self._may_receive -= count
                if self._asks or self._outgoing is None:  # what follows a request buys no time
                    self._patience.moved(count)
                parts = self._receiver.feed(room[:count])
            else:
                self._hears = False
                parts = self._receiver.close()
            for part in parts:
                self._take(part)
                if self.phase is _CLOSED:  # whoever hears of progress may cancel
                    return
                if self._outgoing is not None and not self._asks:
                    return  # first the answer; what else there is, is thrown away after it
            if count < len(room) or self._later:
                return  # that was all there is for now, or is wanted

    def _discard(self) -> None:
        """The server's end, after its answer: reads and throws away until the peer closes."""
        try:
            while self._hears and self._may_receive > 0:
                count = self._stream.receive(self._scratch)
                if count is None:
                    break
                self._hears = count > 0
                self._may_receive -= count
        except ConnectionFailed:
            self._hears = False

    def _take(self, part: Part) -> None:
        if self._send_error is not None and isinstance(part, Cut):
            raise self._send_error
        answer = self._endpoint.take(part)
        if self.phase is _CLOSED:
            return
        if answer is not None:
            self._later = True
            self._patience.rest()
            if isinstance(answer, Outgoing):
                self._load(answer)
                self._reactor.at_turn_end(self._answer)
            else:
                self._unwatch()
                self._owner.put_off(self, answer)
        elif isinstance(part, Head):
            self._headed = True
            self._patience.keep_moving(paced=True)
        if self._asks and isinstance(part, End):
            self._enter(_LINGERING)
            self._patience.stand(self._settings.farewell_seconds)
        elif isinstance(part, Cut) and self._outgoing is None:
            raise CutShort(f"{self._stream.peer}: it ended inside the {part.state.value}")

    def _send_some(self) -> None:
        """Sends what fits into the budget; and if that was all, ends the answer."""
        body = self._outgoing.body if self._outgoing else None
        try:
            while self._head or (body is not None and body.remaining):
                if self._may_send <= 0:
                    return
                if self._head:
                    more = body is not None or not self._asks
                    count = self._stream.send(self._head[: self._may_send], more)
                    if count is not None:
                        self._head = memoryview(self._head)[count:]
                elif body is not None:
                    count = body.send(self._stream, self._may_send)
                if count is None or self.phase is _CLOSED:
                    return
                self._may_send -= count
                self._patience.moved(count)
        except ConnectionFailed as error:
            if not self._asks:
                raise
            # A server that refuses may answer and go while we still send: its answer decides.
            self._send_error = error
            self._unload()
            return
        if not self._asks:
            self._stream.end()
            self._enter(_LINGERING)
            self._patience.stand(self._settings.linger_seconds)
        elif not self.begun:
            self._patience.keep_moving(paced=False)  # the server may take its time to answer
        self._unload()
        self._endpoint.sent()

    def _has_sent_nothing(self) -> bool:
        """Whether this is the answering end, and not a byte of an answer has left."""
        if self._asks or self.phase is not _EXCHANGING:
            return False
        return self._outgoing is None or len(self._head) == len(self._outgoing.head)

    def _load(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._head = outgoing.head

    def _unload(self) -> None:
        outgoing, self._outgoing = self._outgoing, None
        if outgoing is not None and outgoing.body is not None:
            outgoing.body.close()

    def _enter(self, phase: Phase) -> None:
        if phase not in PHASES[self.phase]:
            raise AssertionError(f"no way from {self.phase} to {phase}")
        self.phase = phase

    def _missed(self, what: str) -> None:
        try:
            self._give_up(what)
        except Exception as fault:
            self.fail(fault)

    def _give_up(self, what: str) -> None:
        """Ends an exchange whose peer has missed its deadline."""
        peer = self._stream.peer
        if self.phase is _CONNECTING:
            seconds = f"{self._patience.seconds:g} s"
            self.close(Unreachable(f"cannot connect to {peer}: no answer in {seconds}; try again"))
        elif (self.begun and not self._headed) or not (self._headed or self._asks):
            self.close(
                DeadlineMissed(f"{peer} sent no whole header in {self._patience.seconds:g} s")
            )
        else:
            self._refuse(DeadlineMissed(f"{peer} {what}; try again"))

    def _refuse(self, error: BackupError) -> None:
        """Ends an exchange that cannot go on: with an answer, if there is still one to give."""
        answer = None
        if self._outgoing is None and self._has_sent_nothing():
            answer = self._endpoint.refuse(error)
        if answer is None:
            self.close(error)
            return
        self.send(answer)
        if self.phase is _LINGERING:
            self.hurry(self._settings.farewell_seconds)
        else:
            self.close(error)

    def _watch(self) -> None:
        """Asks the reactor for what this connection waits for."""
        if self._later:
            return
        if self.phase is _CONNECTING:
            interest = WRITE
        elif self._outgoing is not None:
            interest = WRITE | READ if self._hears else WRITE
        elif self.phase is _LINGERING and self._waits_a_turn and not self._interest:
            self._waits_a_turn = False
            self._reactor.next_turn(self._look_again)
            return
        else:
            interest = READ
        if interest != self._interest:
            self._interest = interest
            self._reactor.watch(self._stream.socket, interest, self._ready)
        self._patience.watch()

    def _unwatch(self) -> None:
        if self._interest:
            self._interest = 0
            self._reactor.unwatch(self._stream.socket)
