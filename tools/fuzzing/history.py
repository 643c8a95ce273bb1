"""Whether what several peers saw of one name can have happened at all.

Rules: every event of a name takes effect at one moment between its ``begin`` and its ``end``, as
steps of a script are counted. Whatever order of such moments explains all that was seen, and what
the store holds in the end, will do; if there is none, an answer was untrue or a file is lost. An
event that nobody heard the end of may have come to nothing.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

NEVER = float("inf")


class Event(NamedTuple):
    """Something that was asked of one name: what it found there and what it left, None for no file.

    ``found`` is what it found, where the answer tells: ``ANY`` for nothing told, ``FILE`` for some
    file. ``leaves`` is what it left, ``SAME`` for no change.
    """

    begin: float
    end: float
    found: object
    leaves: object


class _Mark:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ANY, FILE, SAME = _Mark("ANY"), _Mark("FILE"), _Mark("SAME")


def explained(events: Tuple[Event, ...], held: Optional[bytes], final: Optional[bytes]) -> bool:
    """Whether ``events`` can have led from ``held`` to ``final``."""
    if not events:
        return held == final
    first_end = min(event.end for event in events)
    for place, event in enumerate(events):
        if event.begin > first_end:
            continue  # another has ended before this one began
        rest = events[:place] + events[place + 1 :]
        if _finds(event, held):
            left = held if event.leaves is SAME else event.leaves
            assert left is None or isinstance(left, bytes)
            if explained(rest, left, final):
                return True
        if event.end == NEVER and explained(rest, held, final):
            return True
    return False


def _finds(event: Event, held: Optional[bytes]) -> bool:
    if event.found is ANY:
        return True
    return held is not None if event.found is FILE else held == event.found
