"""What users may hold, and what they do hold.

Rules: space is reserved when an upload's size is announced, and given back when
it ends, in whatever way; what would not fit is refused before a byte is kept.
When the file takes its name, the caps are looked at once more, with what is true
then. So uploads side by side never pass a cap together. A file that is replaced
makes room for the one that replaces it.

What a user holds is counted once, a slice at a time, before his first upload
ends; a change in between begins it anew. From then on it is kept up to date.
Nothing is kept of a user who holds nothing and sends nothing, nor of a counting
that nobody waits for any more: strangers can name four billion users.
What is changed by another's hand, or by another server of the same root, is
seen at the next start.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import Callable, Dict, Optional, Set

from . import disk
from .errors import QuotaExceeded
from .settings import Settings


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
        self.held = Held()

    def step(self) -> bool:
        """Counts the next slice; whether that was the last. Raises ``OSError``."""
        seen = 0
        for entry in islice(self._entries, self._slice):
            seen += 1
            if entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # another server has removed it meanwhile
                    self.held.add(1, entry.stat(follow_symlinks=False).st_size)
        return seen < self._slice

    def close(self) -> None:
        """Lets go of the folder."""
        self._entries.close()


class Reservation:
    """The room of one upload, once it is ``granted``; ``release`` it when the upload has ended."""

    __slots__ = ("_ledger", "files", "granted", "more", "size", "user_id", "written")

    def __init__(self, ledger: Ledger, user_id: int, size: int) -> None:
        self._ledger = ledger
        self.user_id = user_id
        self.size = size
        self.written = 0  # of it
        self.granted = False
        self.files = self.more = 0  # files and bytes that the user will hold more than before

    def release(self) -> None:
        """Gives the room back; what was stored meanwhile is in the ledger as that."""
        self._ledger.end(self)


class Ledger:
    """What every user holds and was promised, beside the caps of ``Settings``."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        caps = (settings.user_bytes, settings.user_files, settings.total_bytes)
        self.counts = any(cap is not None for cap in caps)
        self._running: Dict[int, Set[Reservation]] = {}  # of each user
        self._users: Dict[int, Held] = {}
        self._counting: Dict[int, Count] = {}
        self._total = Held()

    def check_file(self, size: int) -> None:
        """Raises ``QuotaExceeded`` for a file larger than any may be."""
        cap = self._settings.max_file_bytes
        if cap is not None and size > cap:
            raise QuotaExceeded(f"a file of {size} bytes; at most {cap} are taken")

    def begin(self, user_id: int, size: int) -> Reservation:
        """What an upload of ``size`` bytes wants; nothing is promised yet."""
        wanted = Reservation(self, user_id, size)
        self._running.setdefault(user_id, set()).add(wanted)
        return wanted

    def end(self, reservation: Reservation) -> None:
        """Takes it back; the second time, that is nothing."""
        user_id = reservation.user_id
        own = self._running.get(user_id)
        if own is None or reservation not in own:
            return
        own.remove(reservation)
        if not own:
            del self._running[user_id]
            self._forget(user_id)
            self._let_go(user_id)

    def counted(self, user_id: int, entries: Callable[[], disk.Entries]) -> bool:
        """Whether it is known what the user holds; counts a slice if it is not.

        ``entries`` are what lies in the user's folder. Raises ``OSError``.
        """
        if not self.counts or user_id in self._users:
            return True
        count = self._counting.get(user_id)
        if count is None:
            try:
                count = Count(entries(), self._settings.listing_names)
            except FileNotFoundError:  # he has stored nothing yet
                self._users[user_id] = Held()
                return True
            self._counting[user_id] = count
        try:
            if not count.step():
                return False
        except OSError:
            self._forget(user_id)
            raise
        self._users[user_id] = count.held
        self._total.add(count.held.files, count.held.bytes)
        self._forget(user_id)
        return True

    def grant(self, wanted: Reservation, older: Optional[int], free: Optional[int]) -> None:
        """Promises the room; ``older`` are the bytes of the file that is replaced.

        ``free`` are the bytes free on the disk, where that matters. The user
        must have been ``counted``. Raises ``QuotaExceeded``.
        """
        size, user_id = wanted.size, wanted.user_id
        own = [one for one in self._running[user_id] if one.granted]
        of_all = [one for each in self._running.values() for one in each if one.granted]
        new, more = int(older is None), size - (older or 0)
        if free is not None:
            promised = sum(one.size - one.written for one in of_all)
            floor = self._settings.min_free_bytes or 0
            if free - promised - size < floor:
                raise QuotaExceeded(
                    f"{size} bytes, and {free - promised} are free of which {floor} must stay"
                )
        if self.counts:
            self._check(
                user_id,
                new + sum(one.files for one in own),
                more + sum(one.more for one in own),
                more + sum(one.more for one in of_all),
            )
        wanted.granted, wanted.files, wanted.more = True, new, max(0, more)

    def check(self, user_id: int, size: int, older: Optional[int]) -> None:
        """Raises ``QuotaExceeded`` if the file does not fit now that it is to have its name."""
        if self.counts:
            more = size - (older or 0)
            self._check(user_id, 1 if older is None else 0, more, more)

    def stored(self, user_id: int, size: int, older: Optional[int]) -> None:
        """A file has its name."""
        self._changed(user_id, 1 if older is None else 0, size - (older or 0))

    def removed(self, user_id: int, size: int) -> None:
        """A file has lost it."""
        self._changed(user_id, -1, -size)

    def close(self) -> None:
        """Lets go of the folders that are being counted."""
        for user_id in list(self._counting):
            self._forget(user_id)

    def _changed(self, user_id: int, files: int, size: int) -> None:
        self._forget(user_id)
        held = self._users.get(user_id)
        if held is not None:
            held.add(files, size)
            self._total.add(files, size)
            self._let_go(user_id)

    def _check(self, user_id: int, files: int, size: int, size_of_all: int) -> None:
        """What the user, and all together, would hold then."""
        held, caps = self._users[user_id], self._settings
        if caps.user_files is not None and files > 0 and held.files + files > caps.user_files:
            raise QuotaExceeded(f"user {user_id} may hold {caps.user_files} files")
        if caps.user_bytes is not None and size > 0 and held.bytes + size > caps.user_bytes:
            raise QuotaExceeded(
                f"user {user_id} may hold {caps.user_bytes} bytes and holds {held.bytes}"
            )
        total = self._total.bytes
        if (
            caps.total_bytes is not None
            and size_of_all > 0
            and total + size_of_all > caps.total_bytes
        ):
            raise QuotaExceeded(f"all users may hold {caps.total_bytes} bytes and hold {total}")

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
