"""The space of large files that nobody has any more, given back a bit at a time.

Rules: to free a file of a gigabyte takes the system the better part of a second,
in which nobody could be served. So a large file that has lost its name is kept
open and made shorter by ``reclaim_bytes`` a step. Only a file that nobody else
has open is touched; any other is freed, all at once, when the last who reads it
closes it. After a crash, the system frees what is left.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from typing import Deque

from . import disk

_MOST_FILES = 32  # that are kept open for this; descriptors are for clients

# Files are made shorter to a multiple of this: pages that sendfile(2) has left in a socket stay
# whole then, since no page, and no folio of pages (2 MiB at most), lies across the border.
_BORDER_BYTES = 4 * 1024 * 1024


class Reclaim:
    """Files without a name, by their descriptors."""

    def __init__(self, piece_bytes: int) -> None:
        """``piece_bytes`` a step, or a little more."""
        self.piece_bytes = -(-piece_bytes // _BORDER_BYTES) * _BORDER_BYTES
        self._files: Deque[int] = deque()

    @property
    def waiting(self) -> bool:
        """Whether there is something to do."""
        return bool(self._files)

    def add(self, fd: int) -> None:
        """Takes over a file open for writing; its space is given back now or step by step."""
        with suppress(OSError):  # what cannot be looked at is closed, and freed at once
            large = len(self._files) < _MOST_FILES and os.fstat(fd).st_size > self.piece_bytes
            if large and disk.nobody_has(fd):
                self._files.append(fd)
                return
        disk.close(fd)

    def step(self) -> None:
        """Gives back a piece of one file."""
        fd = self._files[0]
        with suppress(OSError):  # then it is freed at once
            size = os.fstat(fd).st_size
            if size > self.piece_bytes:
                os.ftruncate(fd, (size - 1) // self.piece_bytes * self.piece_bytes)
                return
        disk.close(self._files.popleft())

    def close(self) -> None:
        """Gives back all that is left, at once."""
        while self._files:
            disk.close(self._files.popleft())
