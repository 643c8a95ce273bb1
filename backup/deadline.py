"""Moments at which something is due, cheap to move and cheap to give up.

Rules: the queue is a heap of ``(when, sequence, deadline)``. A deadline that
moves later keeps its entry; when that comes up, it is entered again for the
new time, so one that moves with every byte costs an assignment. One that moves
earlier or is cancelled leaves a stale entry behind, known by its time; when
most entries are stale, the heap is built anew.
"""

from __future__ import annotations

import heapq
from typing import Callable, List, Optional, Tuple

NEVER = float("inf")

_FEW = 64  # stale entries that are not worth a new heap


class Deadline:
    """One moment and what is to be called then, once; ``Deadlines.add`` makes it."""

    __slots__ = ("_queue", "callback", "entered", "when")

    def __init__(self, queue: Deadlines, callback: Callable[[], None]) -> None:
        self._queue = queue
        self.callback: Optional[Callable[[], None]] = callback
        self.when = NEVER  # when it is due
        self.entered = NEVER  # the time under which the queue has it

    def move(self, seconds: float) -> None:
        """Makes it due ``seconds`` from now."""
        self.move_to(self._queue.now() + seconds)

    def move_to(self, when: float) -> None:
        """Makes it due at ``when``, in seconds of the queue's clock."""
        self.when = when
        if self.when < self.entered:
            self._queue.enter(self)

    def cancel(self) -> None:
        """Makes it never due, and lets go of the callback and all it refers to."""
        self.callback = None
        self.when = NEVER
        self._queue.leave(self)


class Deadlines:
    """The queue; ``now`` gives seconds that never go back."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self._heap: List[Tuple[float, int, Deadline]] = []
        self._sequence = 0  # keeps two deadlines of one moment in the order they were entered
        self._stale = 0

    def __len__(self) -> int:
        """Entries in the heap, stale ones too."""
        return len(self._heap)

    def add(self, seconds: float, callback: Callable[[], None]) -> Deadline:
        """A deadline that is due ``seconds`` from now."""
        return self.at(self.now() + seconds, callback)

    def at(self, when: float, callback: Callable[[], None]) -> Deadline:
        """A deadline that is due at ``when``, in seconds of this queue's clock."""
        deadline = Deadline(self, callback)
        deadline.move_to(when)
        return deadline

    def enter(self, deadline: Deadline) -> None:
        """Queues the deadline under its time, in place of a later entry it may have."""
        self.leave(deadline)
        deadline.entered = deadline.when
        self._sequence += 1
        heapq.heappush(self._heap, (deadline.when, self._sequence, deadline))

    def leave(self, deadline: Deadline) -> None:
        """Makes the deadline's entry stale, if it has one."""
        if deadline.entered == NEVER:
            return
        deadline.entered = NEVER
        self._stale += 1
        if self._stale > _FEW and self._stale * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[0] == entry[2].entered]
            heapq.heapify(self._heap)
            self._stale = 0

    def wait(self) -> Optional[float]:
        """Seconds until the first deadline has to be looked at; None when there is none."""
        while self._heap and self._heap[0][0] != self._heap[0][2].entered:
            heapq.heappop(self._heap)
            self._stale -= 1
        return max(0.0, self._heap[0][0] - self.now()) if self._heap else None

    def fire(self, now: float) -> None:
        """Calls what was due at ``now``, in order of time."""
        while self._heap and self._heap[0][0] <= now:
            when, _, deadline = heapq.heappop(self._heap)
            if when != deadline.entered:
                self._stale -= 1
                continue
            deadline.entered = NEVER
            if deadline.when > when:  # it has moved: back into the row, at its place
                if deadline.when < NEVER:
                    self.enter(deadline)
                continue
            deadline.when = NEVER
            if deadline.callback is not None:
                deadline.callback()
