"""One loop for everything: readiness, deadlines, work at the end of a turn, wake-up.

Rules:

- One thread runs a reactor: the one that calls ``turn``, again and again.
  ``call`` alone may be used from other threads and from signal handlers.
- A turn waits until something is ready or due, then runs, in this order: the
  callbacks of ready sockets, what was put off to this turn, the deadlines that
  are due, and the work put off to the turn's end. Callbacks never block; whoever
  has more to do than its budget returns and is called again in the next turn.
- A socket that is no longer watched and a deadline that was cancelled are not
  called any more: not even in the same turn, when the event is already here.
- To pause a socket, unwatch it. An interest of zero would not do: epoll still
  reports a hang-up then, and the loop would spin.

What is put off to a turn's end runs in rounds: all that was put off, then all
that this has put off, until there is nothing more. So a turn can do one kind of
work for all connections before the next kind: accept all, receive all, send all.
That keeps the code of each kind, the kernel's as well, in the processor's
caches, and took a third off the cost of a small request.

The reactor knows sockets and time, and nothing of what they are used for.
"""

from __future__ import annotations

import selectors
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Callable, Deque, Dict, List

from .deadline import Deadline, Deadlines

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

# Seconds. A signal that comes in the moment before the waiting begins does not end it, and Python
# runs its handler only then: what that asks for by ``call`` is late by this much at the most.
_LONGEST_WAIT = 1.0

# select(2) takes descriptors below 1024, of which a connection may need two; on Windows, Python's
# takes 512 sockets.
_SELECT_ROOM = 480

Callback = Callable[[], None]
ReadyCallback = Callable[[int], None]


class _Watch:
    """One registration: what is called. It is known by itself, not by what it holds."""

    __slots__ = ("callback",)

    def __init__(self, callback: ReadyCallback) -> None:
        self.callback = callback


class Reactor:
    """The loop. ``clock`` gives seconds that never go back. Close it, or use it in a ``with``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.time = clock()  # when this turn began to work: read without asking the clock again
        self.slowest_turn = 0.0  # seconds that a turn has worked, without its waiting
        self._watched: Dict[int, _Watch] = {}
        self._deadlines = Deadlines(clock)
        self._calls: Deque[Callback] = deque()
        self._at_turn_end: List[Callback] = []
        self._selector = selectors.DefaultSelector()
        try:
            self._wake_receiver, self._wake_sender = socket.socketpair()
        except OSError:
            self._selector.close()
            raise
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self.watch(self._wake_receiver, READ, self._woken)

    def __enter__(self) -> Reactor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def room(self) -> int:
        """About how many sockets it can watch: where there is only select(2), a few hundred."""
        return _SELECT_ROOM if isinstance(self._selector, selectors.SelectSelector) else sys.maxsize

    @property
    def wake_fd(self) -> int:
        """A byte written to this descriptor wakes the loop (``signal.set_wakeup_fd``)."""
        return self._wake_sender.fileno()

    def watch(self, sock: socket.socket, interest: int, callback: ReadyCallback) -> None:
        """Calls ``callback(events)`` in each turn in which ``sock`` is ready for its interest.

        ``interest`` and ``events`` are ``READ``, ``WRITE`` or both. Watching a
        socket again replaces interest and callback.
        """
        fd = sock.fileno()
        watch = _Watch(callback)
        if fd in self._watched:
            self._selector.modify(sock, interest, watch)
        else:
            self._selector.register(sock, interest, watch)
        self._watched[fd] = watch

    def unwatch(self, sock: socket.socket) -> None:
        """Stops calling; does nothing for a socket that is not watched. Before it is closed."""
        if self._watched.pop(sock.fileno(), None) is not None:
            with suppress(KeyError):  # modify() takes it out when an interrupt comes in between
                self._selector.unregister(sock)

    def deadline(self, seconds: float, callback: Callback) -> Deadline:
        """Calls ``callback`` once, ``seconds`` from now, unless it is moved or cancelled."""
        return self._deadlines.add(seconds, callback)

    def deadline_at(self, when: float, callback: Callback) -> Deadline:
        """The same at ``when``, in seconds of its clock."""
        return self._deadlines.at(when, callback)

    def at_turn_end(self, callback: Callback) -> None:
        """Calls ``callback`` once when all that is ready in this turn has been served."""
        self._at_turn_end.append(callback)

    def next_turn(self, callback: Callback) -> None:
        """Calls ``callback`` once in the next turn, which will not wait for it."""
        self._calls.append(callback)

    def call(self, callback: Callback) -> None:
        """The same, waking the loop: the one method for other threads and signal handlers."""
        self.next_turn(callback)
        try:
            self._wake_sender.send(b"\0")
        except OSError:
            return  # full: it wakes anyway; closed: there is no turn to wake it for

    def turn(self) -> None:
        """Waits, for a second at most, until something is ready or due, and does it."""
        ready = self._selector.select(self._patience())
        # What falls due while this turn works has to wait for the next: its bytes may have come
        # meanwhile, and a slow disk is no peer's fault.
        self.time = self.now()
        calls = len(self._calls)  # what is put off from here on is for the next turn
        for key, events in ready:
            # A callback before this one may have closed the socket, opened another of the same
            # number, or watched it for something else: then the event is no longer meant.
            watch: _Watch = key.data
            if self._watched.get(key.fd) is watch:
                watch.callback(events)
        for _ in range(calls):
            self._calls.popleft()()
        self._deadlines.fire(self.time)
        while self._at_turn_end:
            work, self._at_turn_end = self._at_turn_end, []
            for put_off in work:
                put_off()
        self.slowest_turn = max(self.slowest_turn, self.now() - self.time)

    def _patience(self) -> float:
        """How long this turn may wait, in seconds."""
        # A call's wake-up may have been taken in by the turn in which it was made.
        if self._calls or self._at_turn_end:
            return 0.0
        wait = self._deadlines.wait()
        return _LONGEST_WAIT if wait is None else min(wait, _LONGEST_WAIT)

    def close(self) -> None:
        """Lets go of its own descriptors; sockets that are still watched stay open."""
        self._watched.clear()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _woken(self, _: int) -> None:
        with suppress(BlockingIOError):
            while len(self._wake_receiver.recv(4096)) == 4096:
                continue
