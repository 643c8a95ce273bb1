"""The store: a folder per user, and the promise that a name is one whole file or nothing.

Rules:

- ``<root>/<user_id>/<name>`` is a file some BACKUP sent, whole. An upload is
  written to ``<root>/.tmp/``, on the same file system and outside every user's
  folder, and takes its name by a rename, so nobody ever sees half of one.
- What is a file: a regular file directly in the user's folder whose name obeys
  ``names``. Anything else there is neither listed, served, replaced nor removed.
- A file is never changed in place. Who has it open reads the file he opened.
- Every temporary file is locked by the store that writes it. A file in
  ``.tmp`` that nobody has locked was left by a crash; the next start sweeps it.
- ``commit`` is the one place where changes take effect, many at a time. When it
  returns, what it says has taken effect is on the disk: the file before its
  name, the name and the removal before the answer.
- Errors of the disk become ``StoreFailed``. No socket is known here.

Names are bytes, as on the wire and on disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from functools import partial
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Union

from . import disk
from .errors import AppendOnly, BackupError, InternalError, NotFound, StoreFailed
from .folders import CommitFolders, Folders
from .listing import Listing
from .names import decode, escape
from .quota import Ledger, Reservation
from .reclaim import Reclaim
from .settings import Settings
from .upload import Pace, Upload

# What open(2) says of a name that no file can have here, or that is a link, a socket or a device.
_NO_FILE = {errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.EILSEQ}


class Stored(NamedTuple):
    """A stored file, open for reading; whoever got it closes it. ``size`` in bytes."""

    fd: int
    size: int

    def close(self) -> None:
        """Lets go of the file."""
        disk.close(self.fd)

    def read(self) -> bytes:
        """The whole file, which is then closed. Raises ``StoreFailed``."""
        try:
            data = os.read(self.fd, self.size)
        except OSError as error:
            raise StoreFailed(f"cannot read a stored file: {error}; check its disk") from error
        finally:
            self.close()
        if len(data) < self.size:  # stored files never change, unless by somebody else's hand
            raise StoreFailed("a stored file became shorter while it was read; look at it")
        return data


class Removal(NamedTuple):
    """A file that is to be removed by ``Store.commit``."""

    user_id: int
    name: bytes

    @property
    def waiting(self) -> int:
        """Bytes that a commit has to wait for the disk to take."""
        return 0


Change = Union[Upload, Removal]


class Store:
    """The files of all users below one root folder."""

    def __init__(
        self,
        root: Union[str, os.PathLike[str]],
        settings: Settings = Settings(),
        at_turn_end: Optional[Callable[[Callable[[], None]], None]] = None,
    ) -> None:
        """Makes the root if it is missing and sweeps what a crash left in it.

        ``at_turn_end`` is the reactor's, for a store that belongs to one: a
        folder that is read stays open for the other requests of a turn, and
        ``reclaim`` is called while there is something ``to_reclaim``.
        Raises ``StoreFailed`` when the root cannot be made, read or written, or when
        others than its owner may write to it.
        """
        self._root = os.fsencode(os.path.abspath(root))
        self._folders = Folders(self._root, settings.fsync, at_turn_end)
        self._temporary = self._folders.temporary
        self._settings = settings
        # Names of this store's temporary files: random once, then counted.
        self._prefix = os.urandom(8).hex().encode()
        self._count = 0
        self._pace = Pace(settings)
        self._ledger = Ledger(settings)
        self._capped = self._ledger.counts or settings.min_free_bytes is not None
        self._reclaim = Reclaim(settings.reclaim_bytes)
        self._let_go = None if at_turn_end is None else self._reclaim.add
        self._listings: List[Listing] = []  # that are being read
        try:
            # Only here: see ``folders``.
            disk.make_folder(self._root, settings.fsync)
            self._refuse_shared_root()
            disk.make_folder(self._temporary, settings.fsync)
            if settings.fsync:  # for what a crash left unsynced
                disk.sync_folder(self._root)
                with suppress(PermissionError):  # then it was not made by this account
                    disk.sync_folder(os.path.dirname(self._root))
            self.sweep()
            # Finds out now, not at the first upload, that nothing can be written.
            self._new_upload(0, b"").abort()
            if settings.total_bytes is not None:
                self._count_all()
        except (OSError, ValueError) as error:
            raise disk.failed("cannot keep files", self._root, error) from error

    def begin(self, user_id: int, name: bytes, size: int = 0) -> Upload:
        """A new upload of ``name``, of ``size`` bytes for which caps are looked at.

        Raises ``InvalidName``, ``QuotaExceeded``, ``AppendOnly`` or ``StoreFailed``.
        """
        decode(name)
        self._ledger.check_file(size)
        reservation = None
        try:
            if self._settings.append_only and self._size(user_id, name) is not None:
                raise _append_only(name)
            reservation = self._announced(user_id, name, size)
            upload = self._new_upload(user_id, name, size)
        except BaseException as error:
            if reservation is not None:
                reservation.release()
            if isinstance(error, OSError):
                raise disk.failed("cannot begin an upload", self._temporary, error) from error
            raise
        upload.reservation = reservation
        return upload

    def reserve(self, upload: Upload) -> bool:
        """Whether it is known that the user may hold the upload, which then has its room.

        Each call that returns False has counted a slice of what he holds.
        Raises ``QuotaExceeded`` or ``StoreFailed``.
        """
        if upload.reservation is None or upload.granted:
            return True
        user_id = upload.user_id
        try:
            if not self._ledger.counted(user_id, lambda: self._folders.to_read(user_id).entries()):
                return False
        except OSError as error:
            raise disk.failed("cannot count", self._folders.path(user_id), error) from error
        finally:
            self._folders.read_no_longer()
        self._ledger.grant(upload.reservation)
        return True

    def _announced(self, user_id: int, name: bytes, size: int) -> Optional[Reservation]:
        """The room of an upload of so many bytes, where there are caps. Raises ``OSError``."""
        if not self._capped:
            return None
        minimum = self._settings.min_free_bytes
        free = None if minimum is None else shutil.disk_usage(self._root).free
        older = self._size(user_id, name)
        wanted = self._ledger.begin(user_id, size, older, free)
        try:
            if self._ledger.knows(user_id):
                self._ledger.grant(wanted)
        except BaseException:
            wanted.release()
            raise
        return wanted

    def remove(self, user_id: int, name: bytes) -> Removal:
        """The removal of ``name``, to be handed to ``commit``.

        Raises ``InvalidName`` or ``AppendOnly``.
        """
        decode(name)
        if self._settings.append_only:
            raise _append_only(name)
        return Removal(user_id, name)

    def commit(self, changes: Sequence[Change]) -> List[Optional[BackupError]]:
        """Makes changes take effect, in order, and says of each how it ended.

        One result a change, None for success: ``StoreFailed``, ``NotFound`` for
        a removal, or ``InternalError``. A change that failed has changed nothing, unless it was
        the folder that could not be made durable: then the name stands for the
        older file or for the new one. Every upload is finished: its temporary
        file is in place or gone.
        """
        failures: List[Optional[BackupError]] = [None] * len(changes)

        def each(step: Callable[[Change], None]) -> None:
            for place, change in enumerate(changes):
                if failures[place] is None:
                    failures[place] = self._attempt(step, change)

        # A step waits for the disk about as long for all files as for one.
        each(_start_write_back)
        each(_settle)
        with self._folders.for_commit() as folders:
            each(partial(self._apply, folders))
            if self._settings.fsync:
                each(lambda change: folders.sync(change.user_id))
        for place, failure in enumerate(failures):
            finish = _close if failure is None else _abort
            failures[place] = self._attempt(finish, changes[place]) or failure
        return failures

    @property
    def piece(self) -> int:
        """How many bytes a commit should have to wait for, at most, so that nobody waits long."""
        return self._pace.bytes

    @property
    def to_reclaim(self) -> bool:
        """Whether space is to be given back by ``reclaim``."""
        return self._reclaim.waiting

    def reclaim(self) -> None:
        """Gives back a piece of the space of large files that were replaced or removed."""
        self._reclaim.step()

    def open(self, user_id: int, name: bytes) -> Stored:
        """The stored file, open. Raises ``InvalidName``, ``NotFound`` or ``StoreFailed``."""
        decode(name)
        try:
            fd = _open_file(self._folders.to_read(user_id), name)
            found = disk.status(fd)
        except FileNotFoundError:
            raise _not_found(user_id, name) from None
        except OSError as error:
            raise disk.failed("cannot read", self._folders.path(user_id), error) from error
        finally:
            self._folders.read_no_longer()
        if not stat.S_ISREG(found.st_mode):
            disk.close(fd)
            raise _not_found(user_id, name)
        return Stored(fd, found.st_size)

    def list(self, user_id: int) -> Listing:
        """The user's names, of which a first slice is read. Raises ``StoreFailed``."""
        path = self._folders.path(user_id)
        try:
            entries = self._folders.to_read(user_id).entries()
            listing = Listing(user_id, path, entries, self._settings.listing_names)
            listing.step()
        except FileNotFoundError:
            return Listing.of_nothing(user_id, path)
        except OSError as error:
            raise disk.failed("cannot list", path, error) from error
        finally:
            self._folders.read_no_longer()
        if listing.reading:
            self._listings.append(listing)
        return listing

    def names(self, user_id: int) -> List[bytes]:
        """The names of a user's files, sorted by their bytes. Raises ``StoreFailed``."""
        listing = self.list(user_id)
        while not listing.done:
            listing.step()
        return [*listing]

    def sweep(self) -> int:
        """Removes temporary files that no running store writes; how many. Raises ``OSError``."""
        swept = 0
        with disk.open_folder(self._temporary) as folder:
            for name in folder.files():
                path = os.path.join(self._temporary, name)
                try:
                    swept += disk.remove_abandoned(path, self._settings.stale_seconds)
                except (FileNotFoundError, PermissionError):
                    continue  # finished, or swept by another start, or another account's
        return swept

    def _refuse_shared_root(self) -> None:
        if disk.others_may_write(self._root):
            raise StoreFailed(
                "others than its owner may write here, and so replace what is stored;"
                " take that from them: chmod go-w",
                escape(self._root, keep=" "),
            )

    def _count_all(self) -> None:
        """Counts what every user holds, as far as it can be read. Raises ``OSError``."""
        for user_id in self._folders.users():
            # What cannot be read is counted, or refused, when this user sends something.
            with suppress(OSError), self._folders.open(user_id) as folder:
                while not self._ledger.counted(user_id, folder.entries):
                    continue

    def _attempt(self, step: Callable[[Change], None], change: Change) -> Optional[BackupError]:
        """Takes one step for one change; what kept it from succeeding."""
        try:
            step(change)
        except BackupError as error:
            # Its traceback has frames that hold what will hold it: a cycle, and all that hangs on
            # it, until the collector runs.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return error
        except OSError as error:
            return disk.failed("cannot change", self._folders.path(change.user_id), error)
        except Exception as fault:  # the others of the batch are to be answered all the same
            return InternalError(fault)
        return None

    def _apply(self, folders: CommitFolders, change: Change) -> None:
        """Gives the file its name, or takes it away."""
        there = isinstance(change, Upload)
        if isinstance(change, Upload):
            self._put_in_place(folders.get(change.user_id, create=True), change)
        else:
            self._remove(folders, change)
        if self._listings:
            self._listings = [listing for listing in self._listings if listing.reading]
            for listing in self._listings:
                if listing.user_id == change.user_id:
                    listing.changed(change.name, there)

    def _put_in_place(self, folder: disk.Folder, upload: Upload) -> None:
        older = folder.status(upload.name)
        if older is not None and not stat.S_ISREG(older.st_mode):
            raise StoreFailed(
                "what has this name in the user's folder is not a regular file; look at it",
                escape(upload.name, keep=" "),
            )
        size = None if older is None else older.st_size
        if size is not None and self._settings.append_only:
            raise _append_only(upload.name)  # stored since the upload began
        while not self.reserve(upload):  # for who did not ask before
            continue
        self._ledger.check(upload.user_id, upload.written, size)
        with self._held(folder, upload.name, older):
            folder.take(upload.path, upload.name)
        self._ledger.stored(upload.user_id, upload.name, upload.written, size)

    def _remove(self, folders: CommitFolders, removal: Removal) -> None:
        try:
            folder = folders.get(removal.user_id)
            found = folder.status(removal.name)
            if found is None or not stat.S_ISREG(found.st_mode):
                raise _not_found(removal.user_id, removal.name)
            with self._held(folder, removal.name, found):
                folder.unlink(removal.name)
            self._ledger.removed(removal.user_id, removal.name, found.st_size)
        except FileNotFoundError:
            raise _not_found(removal.user_id, removal.name) from None

    @contextmanager
    def _held(
        self, folder: disk.Folder, name: bytes, found: Optional[os.stat_result]
    ) -> Iterator[None]:
        """A large file outlives the loss of its name in here, and is reclaimed step by step."""
        fd = -1
        large = found is not None and found.st_size > self._reclaim.piece_bytes
        if large and self._let_go is not None:
            with suppress(OSError):  # out of descriptors, or not ours to write: freed at once
                fd = folder.open(name, os.O_RDWR)
        try:
            yield
        finally:
            if fd >= 0:
                self._reclaim.add(fd)

    def _size(self, user_id: int, name: bytes) -> Optional[int]:
        """Bytes of the file that has this name now; None if there is none. Raises ``OSError``."""
        try:
            found = self._folders.to_read(user_id).status(name)
        except FileNotFoundError:
            self._ledger.knows_nothing_is_there(user_id)
            return None
        finally:
            self._folders.read_no_longer()
        return None if found is None else found.st_size

    def close(self) -> None:
        """Lets go of what is still open for other turns."""
        self._ledger.close()
        self._folders.close()
        self._reclaim.close()

    def _new_upload(self, user_id: int, name: bytes, size: int = 0) -> Upload:
        """An upload with a new file in the temporary folder, claimed."""
        while True:
            self._count += 1
            path = os.path.join(self._temporary, b"%s-%d" % (self._prefix, self._count))
            upload = Upload(user_id, name, path, disk.create(path), self._pace, self._let_go, size)
            try:
                if upload.claim():
                    return upload
            except BaseException:
                upload.abort()
                raise
            upload.abort()  # another start swept it between the two calls: a new one


def _start_write_back(change: Change) -> None:
    if isinstance(change, Upload):
        change.start_write_back()


def _settle(change: Change) -> None:
    if isinstance(change, Upload):
        change.settle()


def _close(change: Change) -> None:
    if isinstance(change, Upload):
        change.close()


def _abort(change: Change) -> None:
    if isinstance(change, Upload):
        change.abort()


def _open_file(folder: disk.Folder, name: bytes) -> int:
    try:
        return folder.open(name)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise FileNotFoundError(error.errno, error.strerror) from None
        raise


def _append_only(name: bytes) -> AppendOnly:
    text = "nothing that is stored here may be replaced or removed"
    return AppendOnly(text, escape(name, keep=" "))


def _not_found(user_id: int, name: bytes) -> NotFound:
    return NotFound(f"user {user_id} has no such file", escape(name, keep=" "))
