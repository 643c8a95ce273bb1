"""What a server must have, from what it has acknowledged: a set of possible states a name.

Rules:

- A ``State`` is one content, or None for no file. After an acknowledged change a
  name has exactly one possible state. While a change is on its way, and after one
  that was never answered, both the older states and the new one are possible; a
  refusal leaves the older ones.
- One change a name at a time; reads may overlap it, and each other. A ``Reading``
  takes every state that was possible between its begin and its end.
- What was seen is so from then on: a read that no change overlapped narrows what
  is possible, unless a change that was never answered may still be under way in a
  server that lives. ``server_died`` says that none is any more.
- Whatever else is found is a ``Finding``, once; the name is then left alone until
  the next acknowledged change. It tells what had happened to the name before.

Nothing here knows a server or a disk: the soak tells it what it hears and finds.
"""

from __future__ import annotations

import random
import time
from collections import deque
from enum import Enum
from functools import lru_cache
from typing import (
    Callable,
    Collection,
    Deque,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

Key = Tuple[int, str]
"""A user and a name."""

_HISTORY = 24
"""How many of the last events of a name a finding tells."""

_POOL_BYTES = 1_000_003  # a prime, so that no two serial numbers begin at one place


@lru_cache(maxsize=1)
def _pool() -> bytes:
    return random.Random(0).randbytes(_POOL_BYTES)


class Content(NamedTuple):
    """What a file holds: ``size`` bytes that follow from the serial number."""

    serial: int
    size: int

    def data(self) -> bytes:
        """The bytes. Two contents of more than a few bytes differ in nearly all of them."""
        start = self.serial * 7919 % _POOL_BYTES
        pool = _pool()
        head = self.serial.to_bytes(8, "little")
        data = head + pool[start : start + self.size]
        while len(data) < self.size:
            data += pool[: self.size - len(data)]
        return data[: self.size]

    def __str__(self) -> str:
        return f"{self.serial >> 32}.{self.serial & 0xFFFFFFFF} ({self.size} bytes)"


State = Optional[Content]

Event = Tuple[float, str]
"""When, in seconds, and what."""


class Fate(Enum):
    """How a change ended, as far as its client knows."""

    ACKNOWLEDGED = "the server said that it is done"
    NOT_DONE = "the server said that it is not done, or was never asked"
    REFUSED_IN_TROUBLE = "the server said that it failed, and the disk may hold either"
    NOTHING_THERE = "a removal: the server said that there is no such file"
    UNANSWERED = "the connection broke before there was an answer"


class Kind(Enum):
    """What can be wrong with a name."""

    LOST = "an acknowledged file is not there"
    CHANGED = "a file is not what was acknowledged"
    UNDEAD = "a file is there whose removal was acknowledged"
    STRAY = "a file is there that nobody sent"


class Finding(NamedTuple):
    """Something that must not be; ``where`` it was seen, and what had happened before."""

    kind: Kind
    key: Key
    where: str
    history: Tuple[Event, ...] = ()

    def __str__(self) -> str:
        user_id, name = self.key
        return f"user {user_id}, {name!r}: {self.kind.value} ({self.where})"


class Change:
    """A BACKUP or, with ``new`` None, a DELETE that is on its way."""

    def __init__(self, key: Key, new: State, before: Set[State], life: int) -> None:
        self.key = key
        self.new = new
        self.before = before
        self.life = life


class Reading:
    """A look at some names: what was possible since it began."""

    def __init__(self, possible: Dict[Key, Set[State]], life: int, began: float) -> None:
        self.possible = possible
        self.life = life
        self.began = began  # seconds
        self.overlapped: Set[Key] = set()  # by a change


class _Entry:
    """What is known of one name."""

    def __init__(self) -> None:
        self.possible: Set[State] = {None}
        self.changing = False
        self.adrift = -1  # the life of the server that may still do what it never answered
        self.spoiled = False  # there is a finding about it
        self.history: Deque[Event] = deque(maxlen=_HISTORY)


class Ledger:
    """What is possible for each name, and what was found that is not."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.findings: List[Finding] = []
        self._now = now
        self._events: List[Event] = []  # that concern all names
        self._entries: Dict[int, Dict[str, _Entry]] = {}
        self._readings: Set[Reading] = set()
        self._life = 0

    def __iter__(self) -> Iterator[Key]:
        """Every name that was ever to be changed."""
        for user_id, entries in self._entries.items():
            for name in entries:
                yield user_id, name

    @property
    def users(self) -> Collection[int]:
        """Every user who has a name here."""
        return self._entries.keys()

    def names(self, user_id: int) -> Collection[str]:
        """Every name of a user's that was ever to be changed."""
        return self._entries.get(user_id, {}).keys()

    def possible(self, key: Key) -> Set[State]:
        """The states that the name may be in now."""
        entry = self._entry(key)
        return {None} if entry is None else set(entry.possible)

    def server_died(self) -> None:
        """Nothing that was asked for until now can still take effect."""
        self._life += 1

    def happened(self, text: str) -> None:
        """Something that may concern every name, for the history that findings tell."""
        self._events.append((self._now(), text))

    def begin(self, key: Key, new: State) -> Change:
        """A change is about to be asked for."""
        entry = self._entries.setdefault(key[0], {}).setdefault(key[1], _Entry())
        if entry.changing:
            raise AssertionError(f"a second change of {key} at a time")
        change = Change(key, new, set(entry.possible), self._life)
        entry.changing = True
        entry.possible.add(new)
        entry.history.append((self._now(), f"asked to be {_show({new})}"))
        for reading in self._readings:
            if key in reading.possible:
                reading.possible[key].add(new)
                reading.overlapped.add(key)
        return change

    def end(self, change: Change, fate: Fate, where: str = "answer") -> None:
        """The change has ended like this."""
        entry = self._entries[change.key[0]][change.key[1]]
        entry.changing = False
        if fate is Fate.ACKNOWLEDGED:
            entry.possible = {change.new}
            entry.spoiled = False
        elif fate is Fate.NOT_DONE:
            entry.possible = change.before
        elif fate is Fate.NOTHING_THERE:
            if None not in change.before:
                self._found(Kind.LOST, change.key, where)
            entry.possible = {None}
        elif fate is Fate.UNANSWERED:
            entry.adrift = change.life
        text = f"{fate.value}; may be {_show(entry.possible)}"
        entry.history.append((self._now(), text))

    def read(self, keys: Iterable[Key]) -> Reading:
        """These names are about to be looked at; hand it to ``end_reading``."""
        reading = Reading({key: self.possible(key) for key in keys}, self._life, self._now())
        for user_id, name in reading.possible:
            entry = self._entry((user_id, name))
            if entry is not None and entry.changing:
                reading.overlapped.add((user_id, name))
        self._readings.add(reading)
        return reading

    def end_reading(self, reading: Reading) -> None:
        """No more is going to be seen by it."""
        self._readings.discard(reading)

    def saw(self, reading: Reading, key: Key, found: Optional[bytes], where: str) -> None:
        """The name had this content, or was not there; compares every byte."""
        states = reading.possible[key]
        if found is None:
            matches: Set[State] = states & {None}
        else:
            matches = {
                state
                for state in states
                if state is not None and state.size == len(found) and state.data() == found
            }
        if matches:
            self._narrow(reading, key, matches, where)
        elif found is None:
            self._found(Kind.LOST, key, where, reading)
        else:
            kind = Kind.UNDEAD if states == {None} else Kind.CHANGED
            self._found(kind, key, where, reading, _describe(found, states))

    def saw_name(self, reading: Reading, key: Key, there: bool, where: str) -> None:
        """The name was listed, or was not; nothing is known of its content."""
        states = reading.possible[key]
        matches = {state for state in states if (state is not None) is there}
        if matches:
            self._narrow(reading, key, matches, where)
        else:
            self._found(Kind.UNDEAD if there else Kind.LOST, key, where, reading)

    def saw_stray(self, key: Key, where: str) -> None:
        """There is a name that was never to be changed."""
        if self._entry(key) is not None:
            raise AssertionError(f"{key} is known")
        finding = Finding(Kind.STRAY, key, where)
        if finding not in self.findings:
            self.findings.append(finding)

    def _entry(self, key: Key) -> Optional[_Entry]:
        return self._entries.get(key[0], {}).get(key[1])

    def _narrow(self, reading: Reading, key: Key, matches: Set[State], where: str) -> None:
        entry = self._entry(key)
        if entry is None or entry.changing or key in reading.overlapped:
            return
        if entry.adrift < reading.life:
            if entry.possible & matches:
                entry.possible &= matches
            else:  # two looks saw two states, and nothing was asked for in between
                kind = Kind.LOST if matches == {None} else Kind.CHANGED
                self._found(kind, key, where, reading, _show(matches))

    def _found(
        self,
        kind: Kind,
        key: Key,
        where: str,
        reading: Optional[Reading] = None,
        seen: str = "nothing",
    ) -> None:
        entry = self._entry(key)
        if entry is None:
            entry = self._entries.setdefault(key[0], {})[key[1]] = _Entry()
        if not entry.spoiled:
            entry.spoiled = True
            last = f"seen: {seen}; may be {_show(entry.possible)}"
            events = [*entry.history, (self._now(), last)]
            if reading is not None:
                possible = _show(reading.possible.get(key, {None}))
                events.append((reading.began, f"the look began; may be, until its end, {possible}"))
            events += (event for event in self._events if event[0] >= events[0][0])
            self.findings.append(Finding(kind, key, where, tuple(sorted(events))))


def _show(states: Set[State]) -> str:
    return " or ".join(sorted("nothing" if state is None else str(state) for state in states))


def _describe(found: bytes, states: Set[State]) -> str:
    """What was found, held against what could have been."""
    told = Content(int.from_bytes(found[:8], "little"), len(found))
    if found == told.data():
        return str(told)  # another file, or a version of this one, or its beginning
    parts = [f"{len(found)} bytes that begin like {told}"]
    for state in states - {None}:
        assert state is not None
        wanted = state.data()
        same = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), None)
        if same is None:
            same = min(len(found), len(wanted))
        parts.append(f"like {state} up to byte {same}")
    return ", ".join(parts)
