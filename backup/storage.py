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
- ``commit`` is the one place where changes take effect, many at a time: what
  makes them durable belongs there and nowhere else.
- Errors of the disk become ``StoreFailed``. No socket is known here.

Names are bytes, as on the wire and on disk.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import List, NamedTuple, Optional, Sequence, Union

from . import disk
from .errors import BackupError, InvalidName, NotFound, StoreFailed
from .names import decode, escape, show
from .settings import Settings

TEMPORARY = b".tmp"

# What open(2) says of a name that no file can have here, or that is a link, a socket or a device.
_NO_FILE = {errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG, errno.EILSEQ}


class Stored(NamedTuple):
    """A stored file, open for reading; whoever got it closes ``fd``. ``size`` in bytes."""

    fd: int
    size: int


class Removal(NamedTuple):
    """A file that is to be removed by ``Store.commit``."""

    user_id: int
    name: bytes


class Upload:
    """A file on its way in. ``write`` it, then hand it to ``Store.commit`` or ``abort`` it."""

    def __init__(self, user_id: int, name: bytes, path: bytes, fd: int) -> None:
        self.user_id = user_id
        self.name = name
        self.path = path
        self._fd = fd

    def write(self, data: memoryview) -> None:
        """Appends ``data``. Raises ``StoreFailed``; the upload can then only be aborted."""
        try:
            disk.write_all(self._fd, data)
        except OSError as error:
            raise _failed("cannot write an upload", self.path, error) from error

    def claim(self) -> bool:
        """Locks the temporary file against sweeps; False if one was faster."""
        return disk.claim(self._fd)

    def settle(self) -> None:
        """Raises ``OSError`` if the system has lost what was written, as NFS says on close(2)."""
        if disk.fcntl is None:
            self._close()  # Windows renames no open file
        else:
            os.close(os.dup(self._fd))  # so that the lock stays until the file has its name

    def close(self) -> None:
        """Lets go of the file, which has its name now."""
        with suppress(OSError):  # settle has heard the last of what there was to hear
            self._close()

    def abort(self) -> None:
        """Gives the upload up: its temporary file goes, or is left to the next start's sweep."""
        self.close()
        with suppress(OSError):
            os.unlink(self.path)

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


Change = Union[Upload, Removal]


class Store:
    """The files of all users below one root folder."""

    def __init__(self, root: Union[str, os.PathLike[str]], settings: Settings = Settings()) -> None:
        """Makes the root if it is missing and sweeps what a crash left in it.

        Raises ``StoreFailed`` when the root cannot be made, read or written.
        """
        self._root = os.fsencode(os.path.abspath(root))
        self._temporary = os.path.join(self._root, TEMPORARY)
        self._settings = settings
        # Names of this store's temporary files: random once, then counted.
        self._prefix = os.urandom(8).hex().encode()
        self._count = 0
        try:
            # Only here: a root that vanishes later may be a disk that is not mounted, and what
            # is written beneath its mount point would be lost to sight when it comes back.
            os.makedirs(self._root, 0o700, exist_ok=True)
            os.makedirs(self._temporary, 0o700, exist_ok=True)
            self.sweep()
            # Finds out now, not at the first upload, that nothing can be written.
            self._new_upload(0, b"").abort()
        except (OSError, ValueError) as error:
            raise _failed("cannot keep files", self._root, error) from error

    def begin(self, user_id: int, name: bytes) -> Upload:
        """A new upload of ``name``, with nothing written yet.

        Raises ``InvalidName`` or ``StoreFailed``.
        """
        decode(name)
        try:
            return self._new_upload(user_id, name)
        except OSError as error:
            raise _failed("cannot begin an upload", self._temporary, error) from error

    def remove(self, user_id: int, name: bytes) -> Removal:
        """The removal of ``name``, to be handed to ``commit``. Raises ``InvalidName``."""
        decode(name)
        return Removal(user_id, name)

    def commit(self, changes: Sequence[Change]) -> List[Optional[BackupError]]:
        """Makes changes take effect, in order, and says of each how it ended.

        One result a change, None for success: ``StoreFailed``, or ``NotFound``
        for a removal. A change that failed has changed nothing, and every
        upload is finished: its temporary file is in place or gone.
        """
        return [self._apply(change) for change in changes]

    def open(self, user_id: int, name: bytes) -> Stored:
        """The stored file, open. Raises ``InvalidName``, ``NotFound`` or ``StoreFailed``."""
        decode(name)
        try:
            with self._folder(user_id) as folder:
                fd = _open_file(folder, name)
                found = disk.status(fd)
        except FileNotFoundError:
            raise _not_found(user_id, name) from None
        except OSError as error:
            raise _failed("cannot read", self._user_path(user_id), error) from error
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise _not_found(user_id, name)
        return Stored(fd, found.st_size)

    def names(self, user_id: int) -> List[bytes]:
        """The names of a user's files, sorted by their bytes. Raises ``StoreFailed``."""
        try:
            with self._folder(user_id) as folder:
                found = folder.files()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed("cannot list", self._user_path(user_id), error) from error
        return sorted(name for name in found if _lawful(name))

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

    def _apply(self, change: Change) -> Optional[BackupError]:
        failure: BackupError
        try:
            if isinstance(change, Upload):
                self._put_in_place(change)
            else:
                self._remove(change)
            return None
        except BackupError as error:
            failure = error
        except OSError as error:
            failure = _failed("cannot change", self._user_path(change.user_id), error)
        if isinstance(change, Upload):
            change.abort()
        return failure

    def _put_in_place(self, upload: Upload) -> None:
        with self._folder(upload.user_id, create=True) as folder:
            mode = folder.mode(upload.name)
            if mode is not None and not stat.S_ISREG(mode):
                raise StoreFailed(
                    "what has this name in the user's folder is not a regular file; look at it",
                    escape(upload.name, keep=" "),
                )
            upload.settle()
            folder.take(upload.path, upload.name)
        upload.close()

    def _remove(self, removal: Removal) -> None:
        try:
            with self._folder(removal.user_id) as folder:
                if not stat.S_ISREG(folder.mode(removal.name) or 0):
                    raise _not_found(removal.user_id, removal.name)
                folder.unlink(removal.name)
        except FileNotFoundError:
            raise _not_found(removal.user_id, removal.name) from None

    def _user_path(self, user_id: int) -> bytes:
        return os.path.join(self._root, b"%d" % user_id)

    def _folder(self, user_id: int, create: bool = False) -> disk.Folder:
        path = self._user_path(user_id)
        try:
            return disk.open_folder(path)
        except FileNotFoundError:
            if not os.path.isdir(self._temporary):  # not this user is missing, but the whole root
                raise NotADirectoryError(errno.ENOTDIR, "the store is not there") from None
            if not create:
                raise
        with suppress(FileExistsError):  # another server of this root may have made it first
            os.mkdir(path, 0o700)
        return disk.open_folder(path)

    def _new_upload(self, user_id: int, name: bytes) -> Upload:
        """An upload with a new file in the temporary folder, claimed."""
        while True:
            self._count += 1
            path = os.path.join(self._temporary, b"%s-%d" % (self._prefix, self._count))
            upload = Upload(user_id, name, path, disk.create(path))
            try:
                if upload.claim():
                    return upload
            except OSError:
                upload.abort()
                raise
            upload.abort()  # another start swept it between the two calls: a new one


def _open_file(folder: disk.Folder, name: bytes) -> int:
    try:
        return folder.open(name)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise FileNotFoundError(error.errno, error.strerror) from None
        raise


def _lawful(name: bytes) -> bool:
    try:
        decode(name)
    except InvalidName:
        return False
    return True


def _not_found(user_id: int, name: bytes) -> NotFound:
    return NotFound(f"user {user_id} has no such file", escape(name, keep=" "))


def _failed(what: str, path: bytes, error: Union[OSError, ValueError]) -> StoreFailed:
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return StoreFailed(f"{what}: {reason}; check this folder and its disk", show(os.fsdecode(path)))
