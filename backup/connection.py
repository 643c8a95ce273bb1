"""One exchange over one stream, for either end: a request one way, an answer the other.

Rules:

- A connection pumps: bytes from the stream through the protocol's machine, the
  parts to its ``Endpoint``; what the endpoint returns, out through the stream.
  The endpoint decides and returns values; it never reaches in here.
- It does what can be done at once and is watched only for the rest: a request
  that is there when the connection is accepted is answered in the same turn.
- ``Phase`` is its life, ``PHASES`` the only moves. It is CONNECTING (the asking
  end only), then EXCHANGING until the answer has passed as a whole: sent by one
  end, received by the other. Then it is LINGERING until the peer closes: the
  server, because closing a socket with unread bytes in it would reset the
  connection and could destroy the answer; the client, to see that nothing
  follows the answer. Once the answer has passed, a peer that vanishes or stays
  is no failure.
- No connection receives or sends more than ``turn_bytes`` in a turn.
- One deadline: until the header is there it stands still, then it moves with
  every byte, and while LINGERING it stands still again.
"""

from __future__ import annotations

from enum import Enum
from typing import Dict, FrozenSet, NamedTuple, Optional, Union

from .deadline import Deadline
from .errors import BackupError, ConnectionFailed, CutShort, DeadlineMissed, Unreachable
from .protocol import Cut, End, Head, Part, Receiver
from .reactor import READ, WRITE, Reactor
from .settings import Settings
from .stream import Stream, settle


class Phase(Enum):
    """Where in its life a connection is."""

    CONNECTING = "connecting"
    EXCHANGING = "exchanging"
    LINGERING = "lingering"
    CLOSED = "closed"


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
        """Sends up to ``limit`` bytes; how many, None for not now. Raises ``BackupError``."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of what it holds."""


class Outgoing(NamedTuple):
    """A message to send: its fields, and the payload behind them."""

    head: bytes
    body: Optional[Body] = None


class Later(Enum):
    """What an endpoint returns when its answer is made at the end of the turn."""

    AT_TURN_END = "at turn end"


class Endpoint:
    """What one end makes of the other's message."""

    def take(self, part: Part) -> Union[Outgoing, Later, None]:
        """Takes one part; the message to send, if this part calls for one.

        A ``BackupError`` raised here closes the connection with it.
        """
        raise NotImplementedError

    def sent(self) -> None:
        """The whole outgoing message is with the operating system."""


class Owner:
    """Who made a connection, and hears of it what does not concern its endpoint."""

    def answer_later(self, connection: Connection) -> None:
        """The endpoint returned ``Later``: ``send`` is awaited in this turn."""
        raise NotImplementedError

    def closed(self, connection: Connection, error: Optional[BackupError]) -> None:
        """The connection is closed; ``error`` is what kept the answer from passing."""
        raise NotImplementedError


class Connection:
    """The pump between one stream and one endpoint.

    ``asks`` tells the client's end from the server's. ``scratch`` is the
    reactor's one receive buffer.
    """

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
        self.phase = Phase.CONNECTING if asks else Phase.EXCHANGING
        self.connected = not asks
        self.begun = False  # whether a byte of the peer's has come
        self._hears = True  # until the peer ends its side
        self._outgoing: Optional[Outgoing] = None
        self._head = memoryview(b"")  # what is left of its fields
        self._later = False  # whether the answer is made at the end of this turn
        self._send_error: Optional[ConnectionFailed] = None
        self._interest = 0
        self._may_receive = self._may_send = 0  # bytes, in what is left of this turn
        self._headed = asks  # whether the deadline moves with every byte
        self._patience = settings.connect_seconds if asks else settings.header_seconds
        self._deadline: Optional[Deadline] = None  # made when there is something to wait for

    def start(self) -> None:
        """The server's end: serves what has arrived already."""
        self._ready(READ)

    def connect(self, request: Outgoing) -> None:
        """The client's end: sends ``request`` as soon as the stream is connected."""
        self._load(request)
        self._watch()

    def send(self, answer: Outgoing) -> None:
        """The server's end: sends the answer that ``take`` put off."""
        self._later = False
        self._load(answer)
        self._pump(0)

    def hurry(self, seconds: float) -> None:
        """Makes a connection that is LINGERING close after so long at the latest."""
        if self.phase is Phase.LINGERING and self._patience > seconds:
            self._expect(seconds)

    def close(self, error: Optional[BackupError] = None) -> None:
        """Closes at once; ``error`` says why the answer has not passed."""
        if self.phase is Phase.CLOSED:
            return
        if self.phase is Phase.LINGERING and isinstance(error, ConnectionFailed):
            error = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._enter(Phase.CLOSED)
        self._reactor.unwatch(self._stream.socket)
        self._unload()
        self._stream.close()
        self._owner.closed(self, error)

    def _ready(self, events: int) -> None:
        """The reactor's callback, once a turn."""
        self._may_receive = self._may_send = self._settings.turn_bytes
        self._pump(events)

    def _pump(self, events: int) -> None:
        """Does what the socket is ready for."""
        try:
            if self.phase is Phase.CONNECTING:
                settle(self._stream)
                self.connected = True
                self._enter(Phase.EXCHANGING, self._settings.idle_seconds)
            if events & READ:
                self._receive_some()
            if self._outgoing is not None and self._send_some():
                self._receive_some()
            if self.phase is Phase.LINGERING and not self._hears:
                self.close()
        except BackupError as error:
            self.close(error)
        if self.phase is not Phase.CLOSED:
            self._watch()

    def _receive_some(self) -> None:
        while self._may_receive > 0 and self._hears:
            count = self._stream.receive(self._scratch[: self._may_receive])
            if count is None:
                return
            if count:
                self.begun = True
                self._may_receive -= count
                parts = self._receiver.feed(self._scratch[:count])
            else:
                self._hears = False
                parts = self._receiver.close()
            for part in parts:
                self._take(part)
                if self.phase is Phase.CLOSED:  # whoever hears of progress may cancel
                    return
            self._progress()
            if not self._asks and (self._outgoing is not None or self._later):
                return  # first the answer

    def _take(self, part: Part) -> None:
        if isinstance(part, Cut) and self._send_error is not None:
            raise self._send_error
        answer = self._endpoint.take(part)
        if self.phase is Phase.CLOSED:
            return
        if isinstance(answer, Outgoing):
            self._load(answer)
        elif answer is not None:
            self._later = True
            self._owner.answer_later(self)
        if isinstance(part, Head):
            self._headed = True
        elif isinstance(part, End) and self._asks:
            self._enter(Phase.LINGERING, self._settings.farewell_seconds)
        elif isinstance(part, Cut) and self._outgoing is None:
            raise CutShort(f"{self._stream.peer}: it ended inside the {part.state.value}")

    def _send_some(self) -> bool:
        """Sends what fits into the budget; True when an answer has left as a whole."""
        body = self._outgoing.body if self._outgoing else None
        try:
            while self._head or (body is not None and body.remaining):
                if self._may_send <= 0:
                    return False
                if self._head:
                    count = self._stream.send(self._head[: self._may_send])
                    self._head = self._head[count or 0 :]
                elif body is not None:
                    count = body.send(self._stream, self._may_send)
                if count is None or self.phase is Phase.CLOSED:
                    return False
                self._may_send -= count
                self._progress()
        except ConnectionFailed as error:
            if not self._asks:
                raise
            # A server that refuses may answer and go while we still send: its answer decides.
            self._send_error = error
            self._unload()
            return False
        self._unload()
        self._endpoint.sent()
        if not self._asks:
            self._stream.end()
            self._enter(Phase.LINGERING, self._settings.linger_seconds)
        return not self._asks

    def _load(self, outgoing: Outgoing) -> None:
        self._outgoing = outgoing
        self._head = memoryview(outgoing.head)

    def _unload(self) -> None:
        if self._outgoing is not None and self._outgoing.body is not None:
            self._outgoing.body.close()
        self._outgoing = None

    def _enter(self, phase: Phase, patience: float = 0.0) -> None:
        if phase not in PHASES[self.phase]:
            raise AssertionError(f"no way from {self.phase} to {phase}")
        self.phase = phase
        self._expect(patience)

    def _progress(self) -> None:
        if self._headed and self.phase is Phase.EXCHANGING:
            self._expect(self._settings.idle_seconds)

    def _expect(self, seconds: float) -> None:
        """The peer now has this long for what comes next."""
        self._patience = seconds
        if self._deadline is not None:
            self._deadline.move(seconds)

    def _missed(self) -> None:
        peer, seconds = self._stream.peer, f"{self._patience:g} s"
        if self.phase is Phase.CONNECTING:
            self.close(Unreachable(f"cannot connect to {peer}: no answer in {seconds}; try again"))
        elif self._headed:
            self.close(DeadlineMissed(f"{peer} was silent for {seconds}; try again"))
        else:
            self.close(DeadlineMissed(f"{peer} sent no whole header in {seconds}"))

    def _watch(self) -> None:
        """Asks the reactor for what this connection waits for."""
        if self.phase is Phase.CONNECTING:
            interest = WRITE
        elif self._outgoing is not None:
            interest = WRITE | READ if self._hears else WRITE
        elif self._later:
            return  # before this turn ends, there is nothing to wait for
        else:
            interest = READ
        if interest != self._interest:
            self._interest = interest
            self._reactor.watch(self._stream.socket, interest, self._ready)
        if self._deadline is None:
            self._deadline = self._reactor.deadline(self._patience, self._missed)
