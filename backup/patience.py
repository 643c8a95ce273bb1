"""How long a connection waits for its peer.

Rules: there is one deadline at a time, and it is of one of two kinds. One that
stands, whatever comes: for a connection, a header, a close. Or bytes must keep
moving: never ``idle_seconds`` without one, and, as long as it is the peer who
has to send or to take them, never fewer than ``min_rate_bytes`` a second over
``rate_seconds``, so that one byte a second wins nothing.

While this end itself is busy, the deadline rests. That bytes move costs two
assignments; the times are looked at only when the deadline comes up.
"""

from __future__ import annotations

from typing import Callable, Optional

from .deadline import Deadline
from .reactor import Reactor
from .settings import Settings


class Patience:
    """One connection's deadline; ``missed`` is called with what the peer did, once it is due."""

    __slots__ = (
        "_count",
        "_deadline",
        "_last",
        "_missed",
        "_moving",
        "_paced",
        "_reactor",
        "_resting",
        "_settings",
        "_since",
        "seconds",
    )

    def __init__(
        self,
        reactor: Reactor,
        settings: Settings,
        seconds: float,
        missed: Callable[[str], None],
    ) -> None:
        """It stands, ``seconds`` from when ``watch`` is called first."""
        self._reactor = reactor
        self._settings = settings
        self._missed = missed
        self.seconds = seconds  # what a deadline that stands was set to
        self._moving = False  # whether bytes must move
        self._paced = False  # and at what rate
        self._resting = False
        self._last = 0.0  # when a byte moved
        self._since = 0.0  # when the counting began
        self._count = 0  # bytes since then
        self._deadline: Optional[Deadline] = None  # made when there is something to wait for

    def stand(self, seconds: float) -> None:
        """What is awaited now must have come in so many seconds, all of it."""
        self._moving = self._resting = False
        self.seconds = seconds
        if self._deadline is not None:
            self._deadline.move(seconds)

    def keep_moving(self, paced: bool) -> None:
        """Bytes must move from now on; ``paced``: not only now and then."""
        self._moving, self._paced, self._resting = True, paced, False
        self._last = self._since = self._reactor.now()
        self._count = 0
        if self._deadline is not None:
            self._deadline.move_to(self._next())

    def moved(self, count: int) -> None:
        """Takes note that ``count`` bytes have just moved."""
        self._count += count
        self._last = self._reactor.time

    def rest(self) -> None:
        """Nothing is awaited of the peer until the next call of ``stand`` or ``keep_moving``."""
        self._resting = True

    def watch(self) -> None:
        """From here on the deadline can be missed."""
        if self._deadline is None:
            when = self._next() if self._moving else self._reactor.now() + self.seconds
            self._deadline = self._reactor.deadline_at(when, self._due)

    def close(self) -> None:
        """Nothing is awaited any more."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._missed = _nobody_misses  # whoever is called has this, and would be freed late

    def _next(self) -> float:
        """When to look again, while bytes move."""
        silent = self._last + self._settings.idle_seconds
        return min(silent, self._since + self._settings.rate_seconds) if self._paced else silent

    def _due(self) -> None:
        self._deadline = None
        if self._resting:
            return
        now, settings = self._reactor.time, self._settings
        if not self._moving:
            self._missed(f"took more than {self.seconds:g} s")
        elif now >= self._last + settings.idle_seconds:
            self._missed(f"was silent for {settings.idle_seconds:g} s")
        elif self._paced and now >= self._since + settings.rate_seconds:
            if self._count < settings.min_rate_bytes * settings.rate_seconds:
                rate = f"{settings.min_rate_bytes} bytes a second"
                self._missed(f"was slower than {rate} for {settings.rate_seconds:g} s")
            else:
                self._since, self._count = now, 0
                self.watch()
        else:
            self.watch()


def _nobody_misses(_: str) -> None:
    """What a closed connection's peer does is nothing to anyone."""
