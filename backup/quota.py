"""What users may hold, and what they do hold.

Rules: space is reserved when an upload's size is announced, and given back when
it ends, in whatever way. What is known by then is looked at then: the free space
of the disk, and what all users hold. What one user holds is counted once, a slice
at a time, before more of his first upload is taken than one receive brings. When
the file takes its name, the caps are looked at once more, with what is true then.
So uploads side by side never pass a cap together. A file that is replaced makes
room for the one that replaces it.

What changes while it is counted is told to the count, since readdir(3) may or may
not have seen it. From then on it is kept up to date. Nothing is kept of a user
who holds nothing and sends nothing, and few countings that nobody waits for:
strangers can name four billion users. What is changed by another's hand, or by
another server of the same root, is seen at the next start.
"""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from typing import Callable, Dict, Optional

from . import disk
from .errors import QuotaExceeded
from .settings import Settings

_MOST_COUNTINGS = 16  # that are kept open although nobody waits for them at the moment


class Held:
    """Files, and the bytes in them."""

    __slots__ = ("bytes", "files")

    def __init__(self) -> None:
        self.bytes = 0
        self.files = 0

    def add(self, files: int, size: int) -> None:
        """So many more, or fewer."""
        self.files += files
        self.bytes += size


class Count:
    """The counting of what lies in one folder, a slice at a time."""

    def __init__(self, entries: disk.Entries, slice_names: int) -> None:
        self._entries = entries
        self._slice = slice_names
        self._sizes: Dict[bytes, int] = {}
        self._changed: Dict[bytes, Optional[int]] = {}  # the last size that the store told of

    def step(self) -> bool:
        """Counts the next slice; whether that was the last. Raises ``OSError``."""
        seen = 0
        for entry in islice(self._entries, self._slice):
            seen += 1
            if entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # another server has removed it meanwhile
                    size = entry.stat(follow_symlinks=False).st_size
                    self._sizes[os.fsencode(entry.name)] = size
        return seen < self._slice

    def changed(self, name: bytes, size: Optional[int]) -> None:
        """Takes note that a file has got its name, or, without a size, has lost it."""
        self._changed[name] = size

    @property
    def held(self) -> Held:
        """What was counted."""
        sizes = {**self._sizes, **self._changed}
        held = Held()
        for size in sizes.values():
            if size is not None:
                held.add(1, size)
        return held

    def close(self) -> None:
        """Lets go of the folder."""
        self._entries.close()


class Reservation:
    """The room of one upload; ``granted`` once it is known that the user may hold it."""

    __slots__ = ("_ledger", "_written", "ended", "files", "granted", "more", "size", "user_id")

    def __init__(self, ledger: Ledger, user_id: int, size: int, older: Optional[int]) -> None:
        self._ledger = ledger
        self._written = 0
        self.user_id = user_id
        self.size = size
        self.granted = self.ended = False
        self.files = int(older is None)  # that the user will hold more than before,
        self.more = size - (older or 0)  # and bytes, or fewer

    @property
    def unwritten(self) -> int:
        """Bytes that the disk does not have yet."""
        return self.size - self._written

    def wrote(self, count: int) -> None:
        """The disk has so many more of its bytes."""
        self._written += count
        self._ledger.promised -= count

    def release(self) -> None:
        """Gives the room back; what was stored meanwhile is in the ledger as that."""
        self._ledger.end(self)


class Running:
    """What the uploads of one user will make him hold more than now, as far as it is granted."""

    __slots__ = ("count", "more")

    def __init__(self) -> None:
        self.count = 0  # of uploads, granted or not
        self.more = Held()


class Ledger:
    """What every user holds and was promised, beside the caps of ``Settings``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        caps = (settings.user_bytes, settings.user_files, settings.total_bytes)
        self.counts = any(cap is not None for cap in caps)
        self.promised = 0  # bytes that uploads have announced and not written
        self._more = 0  # bytes that all users will hold more than now
        self._running: Dict[int, Running] = {}
        self._users: Dict[int, Held] = {}
        self._counting: Dict[int, Count] = {}
        self._total = Held()

    def check_file(self, size: int) -> None:
        """Raises ``QuotaExceeded`` for a file larger than any may be."""
        cap = self._settings.max_file_bytes
        if cap is not None and size > cap:
            raise QuotaExceeded(f"a file of {size} bytes; at most {cap} are taken", "max-file-size")

    def begin(
        self, user_id: int, size: int, older: Optional[int], free: Optional[int]
    ) -> Reservation:
        """Room for an upload; ``older`` are the bytes of the file that it replaces.

        ``free`` are the bytes free on the disk, where that matters. What the
        user may hold is for ``grant`` to look at. Raises ``QuotaExceeded``.
        """
        if free is not None:
            floor = self._settings.min_free_bytes or 0
            if free - self.promised - size < floor:
                raise QuotaExceeded(
                    f"{size} bytes, and {free - self.promised} are free of which {floor} must stay",
                    "min-free",
                )
        wanted = Reservation(self, user_id, size, older)
        self._check_total(self._more + wanted.more, wanted.more)
        self._running.setdefault(user_id, Running()).count += 1
        self.promised += size
        self._more += max(0, wanted.more)
        return wanted

    def grant(self, wanted: Reservation) -> None:
        """Promises the room to a user who was ``counted``. Raises ``QuotaExceeded``."""
        own = self._running[wanted.user_id].more
        if self.counts:
            self._check_user(
                wanted.user_id,
                wanted.files and own.files + wanted.files,
                wanted.more if wanted.more <= 0 else own.bytes + wanted.more,
            )
        own.add(wanted.files, max(0, wanted.more))
        wanted.granted = True

    def end(self, reservation: Reservation) -> None:
        """Takes it back; the second time, that is nothing."""
        if reservation.ended:
            return
        reservation.ended = True
        user_id, more = reservation.user_id, max(0, reservation.more)
        self.promised -= reservation.unwritten
        self._more -= more
        own = self._running[user_id]
        own.count -= 1
        if reservation.granted:
            own.more.add(-reservation.files, -more)
        if not own.count:
            del self._running[user_id]
            self._let_go(user_id)

    def knows(self, user_id: int) -> bool:
        """Whether what the user holds is known, or need not be."""
        return not self.counts or user_id in self._users

    def knows_nothing_is_there(self, user_id: int) -> None:
        """Takes note that the user has no folder: that needs no counting."""
        if self.counts and user_id not in self._users:
            self._users[user_id] = Held()

    def counted(self, user_id: int, entries: Callable[[], disk.Entries]) -> bool:
        """Whether it is known what the user holds; counts a slice if it is not.

        ``entries`` are what lies in the user's folder. Raises ``OSError``.
        """
        if self.knows(user_id):
            return True
        count = self._counting.get(user_id)
        if count is None:
            try:
                count = Count(entries(), self._settings.listing_names)
            except FileNotFoundError:  # he has stored nothing yet
                self._users[user_id] = Held()
                return True
            self._make_room()
            self._counting[user_id] = count
        try:
            if not count.step():
                return False
        except OSError:
            self._forget(user_id)
            raise
        held = self._users[user_id] = count.held
        self._total.add(held.files, held.bytes)
        self._forget(user_id)
        return True

    def check(self, user_id: int, size: int, older: Optional[int]) -> None:
        """Raises ``QuotaExceeded`` if the file does not fit now that it is to have its name."""
        if self.counts:
            more = size - (older or 0)
            self._check_total(more, more)
            self._check_user(user_id, int(older is None), more)

    def stored(self, user_id: int, name: bytes, size: int, older: Optional[int]) -> None:
        """A file has its name."""
        self._changed(user_id, name, size, int(older is None), size - (older or 0))

    def removed(self, user_id: int, name: bytes, size: int) -> None:
        """A file has lost it."""
        self._changed(user_id, name, None, -1, -size)

    def close(self) -> None:
        """Lets go of the folders that are being counted."""
        for user_id in list(self._counting):
            self._forget(user_id)

    def _changed(
        self, user_id: int, name: bytes, size: Optional[int], files: int, more: int
    ) -> None:
        if user_id in self._counting:
            self._counting[user_id].changed(name, size)
        held = self._users.get(user_id)
        if held is not None:
            held.add(files, more)
            self._total.add(files, more)
            self._let_go(user_id)

    def _check_user(self, user_id: int, files: int, more: int) -> None:
        """What the user would hold with so many files and bytes more."""
        held, caps = self._users[user_id], self._settings
        if caps.user_files is not None and files > 0 and held.files + files > caps.user_files:
            raise QuotaExceeded(f"user {user_id} may hold {caps.user_files} files", "user-files")
        if caps.user_bytes is not None and more > 0 and held.bytes + more > caps.user_bytes:
            raise QuotaExceeded(
                f"user {user_id} may hold {caps.user_bytes} bytes and holds {held.bytes}",
                "user-quota",
            )

    def _check_total(self, more: int, of_this: int) -> None:
        """What all users would hold with so many bytes more; one that brings none is let in."""
        cap, total = self._settings.total_bytes, self._total.bytes
        if cap is not None and of_this > 0 and total + more > cap:
            raise QuotaExceeded(f"all users may hold {cap} bytes and hold {total}", "total-quota")

    def _make_room(self) -> None:
        """Ends countings that nobody waits for, the oldest first, when there are many."""
        if len(self._counting) < _MOST_COUNTINGS:
            return
        for user_id in [user_id for user_id in self._counting if user_id not in self._running]:
            self._forget(user_id)

    def _let_go(self, user_id: int) -> None:
        """Keeps nothing of a user who holds nothing and sends nothing; that is counted quickly."""
        held = self._users.get(user_id)
        if held is not None and not held.files and user_id not in self._running:
            del self._users[user_id]

    def _forget(self, user_id: int) -> None:
        """Ends the counting of what the user holds, if it has not ended."""
        count = self._counting.pop(user_id, None)
        if count is not None:
            count.close()
