"""The names of one user's files, read, sorted and given out a slice at a time.

Rules: no step takes longer than a slice of names does, however many there are,
so that a folder of 100,000 files delays nobody. What comes out is the folder as
it was when its last slice was read: whatever the store changes in between, it
tells ``changed``, since readdir(3) may or may not have seen it.

Slices are sorted one by one and merged while they are given out.
"""

from __future__ import annotations

import heapq
import os
from itertools import islice
from typing import Dict, Iterable, Iterator, List, Set

from . import disk
from .names import lawful


class Listing:
    """One user's names. ``step`` until ``done``, then iterate, once; or ``close`` it before."""

    __slots__ = (
        "_changed",
        "_entries",
        "_names",
        "_path",
        "_runs",
        "_slice",
        "_unsorted",
        "bytes",
        "count",
        "done",
        "reading",
        "user_id",
    )

    def __init__(self, user_id: int, path: bytes, entries: disk.Entries, slice_names: int) -> None:
        """``entries`` are what lies in the folder at ``path``."""
        self.user_id = user_id
        self.done = False
        self.count = 0
        self.bytes = 0  # of all names together
        self.reading = True  # until the last slice was read
        self._path = path
        self._entries = entries
        self._slice = slice_names
        self._names: Set[bytes] = set()
        self._changed: Dict[bytes, bool] = {}  # the last thing the store said: there, or gone
        self._unsorted: Iterator[bytes] = iter(self._names)
        self._runs: List[List[bytes]] = []

    @classmethod
    def of_nothing(cls, user_id: int, path: bytes) -> Listing:
        """The listing of a user who has stored nothing."""
        nobody: Iterable[os.DirEntry[str]] = ()
        listing = cls(user_id, path, (entry for entry in nobody), 1)
        listing.step()
        return listing

    def step(self) -> None:
        """Does the next piece of work, until ``done``. Raises ``StoreFailed``."""
        if self.reading:
            self._read()
        else:
            self._sort(list(islice(self._unsorted, self._slice)))

    def changed(self, name: bytes, there: bool) -> None:
        """Takes note that a file has got its name, or that it is gone."""
        self._changed[name] = there

    def close(self) -> None:
        """Lets go of the folder and of the names."""
        self._stop_reading()
        self._runs = []

    def _stop_reading(self) -> None:
        self.reading = False
        self._entries.close()

    def __iter__(self) -> Iterator[bytes]:
        return heapq.merge(*self._runs) if len(self._runs) > 1 else iter(self._runs[0])

    def _read(self) -> None:
        try:
            entries = list(islice(self._entries, self._slice))
            found = lawful(disk.regular(entries))
        except OSError as error:
            self._stop_reading()
            raise disk.failed("cannot list", self._path, error) from error
        if len(entries) == self._slice:
            self._names.update(found)
            return
        self._stop_reading()
        if not self._names and not self._changed:
            self._sort(found)
            return
        self._names.update(found)
        for name, there in self._changed.items():
            (self._names.add if there else self._names.discard)(name)
        self._unsorted = iter(self._names)

    def _sort(self, names: List[bytes]) -> None:
        """Takes the next slice of all names; one that is not full is the last."""
        names.sort()
        self._runs.append(names)
        self.count += len(names)
        self.bytes += sum(map(len, names))
        if len(names) < self._slice:
            self.done = True
            self._names.clear()
