"""A file on its way into the store: its temporary file, and how it gets to the disk.

Rules: nobody sees an upload before ``storage`` gives it its name. A long one is
made durable while it grows, piece by piece, so that what its commit has to wait
for is one piece and not a gigabyte: every ``write_back_bytes`` the system is
told to begin writing, and when an upload is ``behind``, it wants ``catch_up``
before it takes more. How much a piece is, ``Pace`` finds out: what the disk
takes in ``sync_seconds``, since nobody can be served meanwhile.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Callable, Optional

from . import disk
from .quota import Reservation
from .settings import Settings

_FIRST_PIECE = 4 * 1024 * 1024  # bytes, until the disk has shown what it can do


class Pace:
    """How many bytes of an upload may wait to be made durable; one for all of a store's."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self.durable = settings.fsync
        self.write_back_bytes = settings.write_back_bytes
        self.bytes = _FIRST_PIECE
        self.now = now
        self._settings = settings

    def learn(self, count: int, seconds: float) -> None:
        """Takes note that ``count`` bytes took so long; one odd case changes little."""
        wanted = count * self._settings.sync_seconds / max(seconds, 1e-6)
        wanted = min(max(wanted, self.bytes / 2), self.bytes * 2)
        self.bytes = int(
            min(max(wanted, self._settings.write_back_bytes), self._settings.sync_bytes)
        )


class Upload:
    """A file on its way in. ``write`` it, then hand it to ``Store.commit`` or ``abort`` it."""

    __slots__ = (
        "_fd",
        "_let_go",
        "_pace",
        "_started",
        "_synced",
        "_written",
        "name",
        "path",
        "reservation",
        "size",
        "user_id",
    )

    def __init__(
        self,
        user_id: int,
        name: bytes,
        path: bytes,
        fd: int,
        pace: Pace,
        let_go: Optional[Callable[[int], None]] = None,
        size: int = 0,
    ) -> None:
        """``fd`` is the new file at ``path``; ``let_go`` takes it over when it has no name."""
        self.user_id = user_id
        self.name = name
        self.path = path
        self.size = size  # bytes, as announced
        self.reservation: Optional[Reservation] = None  # for them, where there are caps
        self._fd = fd
        self._pace = pace
        self._let_go = let_go
        self._written = 0  # bytes, and of these:
        self._started = 0  # the system was told to write
        self._synced = 0  # are on the disk

    def write(self, data: memoryview) -> None:
        """Appends ``data``. Raises ``StoreFailed``; the upload can then only be aborted."""
        try:
            disk.write_all(self._fd, data)
            self._written += len(data)
            if self.reservation is not None:
                self.reservation.wrote(len(data))
            if self._written - self._started >= self._pace.write_back_bytes:
                self.start_write_back()
        except OSError as error:
            raise disk.failed("cannot write an upload", self.path, error) from error

    @property
    def granted(self) -> bool:
        """Whether it is known that the user may hold it."""
        return self.reservation is None or self.reservation.granted

    @property
    def written(self) -> int:
        """Bytes so far."""
        return self._written

    @property
    def behind(self) -> bool:
        """Whether so much waits to be made durable that ``catch_up`` should come first."""
        return self.waiting >= self._pace.bytes

    @property
    def waiting(self) -> int:
        """Bytes that a commit has to wait for the disk to take."""
        return self._written - self._synced if self._pace.durable else 0

    def catch_up(self) -> None:
        """Makes durable what was written so far. Raises ``StoreFailed``, like ``write``."""
        began = self._pace.now()
        try:
            self.start_write_back()
            disk.sync(self._fd)
        except OSError as error:
            raise disk.failed("cannot write an upload", self.path, error) from error
        self._pace.learn(self._written - self._synced, self._pace.now() - began)
        self._synced = self._written

    def start_write_back(self) -> None:
        """Has the system begin to write what it was not told to write before."""
        if self._pace.durable and self._written > self._started:
            disk.start_write_back(self._fd, self._started, self._written - self._started)
            self._started = self._written

    def claim(self) -> bool:
        """Locks the temporary file against sweeps; False if one was faster."""
        return disk.claim(self._fd)

    def settle(self) -> None:
        """Returns when every byte is as safe as it is to be. Raises ``OSError``.

        That is on the disk; or, when nobody asked for that, accepted by the
        system: NFS says only on close(2) that it has lost what was written.
        """
        if self._pace.durable:
            disk.sync(self._fd)
        if disk.fcntl is None:
            self._close()  # Windows renames no open file
        elif not self._pace.durable:
            os.close(os.dup(self._fd))  # so that the lock stays until the file has its name

    def close(self) -> None:
        """Lets go of the file, which has its name now."""
        self._release()
        with suppress(OSError):  # settle has heard the last of what there was to hear
            self._close()

    def abort(self) -> None:
        """Gives the upload up: its temporary file goes, or is left to the next start's sweep."""
        self._release()
        if disk.fcntl is None:
            self.close()  # Windows removes no open file
        with suppress(OSError):
            os.unlink(self.path)
        with suppress(OSError):
            self._close(self._let_go)

    def _release(self) -> None:
        if self.reservation is not None:
            self.reservation.release()

    def _close(self, let_go: Optional[Callable[[int], None]] = None) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            (let_go or os.close)(fd)
