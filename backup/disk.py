"""What is asked of the file system, and what stands in where it lacks it.

Rules: a ``Folder`` is one directory held open for one piece of work. Names go
to it as bytes and reach only what lies directly inside; a symbolic link is
never followed, neither as the folder nor as a file in it. Where the system
opens files relative to a descriptor (``openat(2)``, ``O_NOFOLLOW``), nobody can
swap the folder under our feet; elsewhere every step checks again.

What ``sync`` and ``Folder.sync`` have returned from survives a power cut, as
far as the disk keeps its word; nothing else here promises that.

Errors are the system's own, as ``OSError``; ``failed`` makes of one what the
rooms above raise.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from contextlib import suppress
from typing import Generator, Iterable, List, Optional, Type, Union

from .errors import StoreFailed
from .names import show

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HAS_DIR_FD = (
    {os.open, os.rename, os.stat, os.unlink} <= os.supports_dir_fd
    and os.scandir in os.supports_fd
    and hasattr(os, "O_NOFOLLOW")
    and hasattr(os, "O_DIRECTORY")
)

HAS_FADVISE = hasattr(os, "posix_fadvise")

# macOS only; what it says where a file system has no such thing (fcntl(2)).
_FULL_SYNC: Optional[int] = getattr(fcntl, "F_FULLFSYNC", None)
_NO_FULL_SYNC = {errno.ENOTSUP, errno.ENOTTY, errno.EINVAL}

# Linux only.
_SET_LEASE: Optional[int] = getattr(fcntl, "F_SETLEASE", None)

# What fsync(2) says on file systems, over a network mostly, that cannot do it to a folder: what
# they do about names is theirs alone.
_NO_FOLDER_SYNC = {errno.EBADF, errno.EINVAL}

# Without O_NONBLOCK, opening a pipe that lies in the folder would wait for its other end.
_SAFELY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_BINARY = getattr(os, "O_BINARY", 0)

Entries = Generator["os.DirEntry[str]", None, None]


class Folder:
    """One open directory, by its path; ``open_folder`` picks the kind the system can do.

    This kind has only the path to hold on to. Use it as a context manager.
    """

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._opened = os.lstat(path)
        if not stat.S_ISDIR(self._opened.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", path)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the directory."""

    def open(self, name: bytes, access: int = os.O_RDONLY) -> int:
        """A descriptor of the file ``name``. Raises ``OSError``, for a symbolic link too."""
        while True:
            path = self._at(name)
            before = os.lstat(path)
            if stat.S_ISLNK(before.st_mode):
                raise FileNotFoundError(errno.ENOENT, "a symbolic link", path)
            fd = os.open(path, access | _SAFELY | _BINARY)
            if os.path.samestat(before, status(fd)):
                return fd
            close(fd)  # another has taken its place meanwhile: a newer file, or a link

    def status(self, name: bytes) -> Optional[os.stat_result]:
        """``lstat(2)`` of what has this name; None for nothing."""
        try:
            return os.lstat(self._at(name))
        except FileNotFoundError:
            return None

    def take(self, path: bytes, name: bytes) -> None:
        """Moves the file at ``path`` in here as ``name``, in one step, over an older one."""
        os.replace(path, self._at(name))

    def unlink(self, name: bytes) -> None:
        """Removes ``name``."""
        os.unlink(self._at(name))

    def sync(self) -> None:
        """Makes durable which names are in here, and what they stand for."""
        sync_folder(self._checked())

    def entries(self) -> Entries:
        """What is inside, read from the disk as it is asked for; close it."""
        with os.scandir(os.fsdecode(self._checked())) as entries:
            yield from entries

    def files(self) -> List[bytes]:
        """The names of the regular files inside, in no order."""
        return [os.fsencode(name) for name in regular(self.entries())]

    def _at(self, name: bytes) -> bytes:
        return os.path.join(self._checked(), name)

    def _checked(self) -> bytes:
        """The folder's path, once it has been seen to be still what was opened."""
        if not os.path.samestat(self._opened, os.lstat(self._path)):
            raise NotADirectoryError(errno.ENOTDIR, "another has taken its place", self._path)
        return self._path


class DescriptorFolder(Folder):
    """The same by a descriptor, which stays on the directory whatever its path becomes."""

    def __init__(self, path: bytes, dir_fd: Optional[int] = None) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
        self._being_read = self._closed = False

    def close(self) -> None:
        """Lets go of the directory; while its entries are being read, when that has ended."""
        self._closed = True
        if not self._being_read:
            close(self._fd)

    def open(self, name: bytes, access: int = os.O_RDONLY) -> int:
        return os.open(name, access | _SAFELY | _BINARY, dir_fd=self._fd)

    def status(self, name: bytes) -> Optional[os.stat_result]:
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def take(self, path: bytes, name: bytes) -> None:
        os.replace(path, name, dst_dir_fd=self._fd)

    def unlink(self, name: bytes) -> None:
        os.unlink(name, dir_fd=self._fd)

    def sync(self) -> None:
        sync_open_folder(self._fd)

    def entries(self) -> Entries:
        # scandir reads a duplicate, and duplicates are all read at one place (dup(2)): two who
        # read one folder side by side would each see a part of it. So the second opens it anew;
        # to open it for each would cost a LIST of a few names a twentieth.
        if self._being_read:
            with DescriptorFolder(b".", self._fd) as another:
                yield from another.entries()
            return
        self._being_read = True
        try:
            with os.scandir(self._fd) as entries:
                for entry in entries:
                    # Kept in the entry, where it takes a look into the folder, now still open.
                    entry.is_file(follow_symlinks=False)
                    yield entry
        finally:
            self._being_read = False
            if self._closed:
                close(self._fd)


def open_folder(path: bytes) -> Folder:
    """The directory at ``path``, which must not be a symbolic link. Raises ``OSError``."""
    kind: Type[Folder] = DescriptorFolder if HAS_DIR_FD else Folder
    return kind(path)


def regular(entries: Iterable[os.DirEntry[str]]) -> List[str]:
    """The names of the regular files among the entries of a folder."""
    return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]


def make_folder(path: bytes, durably: bool) -> None:
    """Makes the folder at ``path`` and those above it, as far as they are missing.

    ``durably``: so that they survive a power cut.
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for path in reversed(missing):
        with suppress(FileExistsError):  # another has made it meanwhile
            make_private(path)
        if durably:
            sync_folder(os.path.dirname(path))


def make_private(path: bytes) -> None:
    """Makes one folder that only its owner may enter, whatever the umask takes away."""
    os.mkdir(path, 0o700)
    os.chmod(path, 0o700)


def others_may_write(path: bytes) -> bool:
    """Whether more accounts than its owner's may write to ``path``; False where modes say nothing.

    Follows links: it is what lies there that counts.
    """
    return os.name != "nt" and bool(os.stat(path).st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def status(fd: int) -> os.stat_result:
    """``fstat(2)``; closes the descriptor when that fails."""
    try:
        return os.fstat(fd)
    except BaseException:
        close(fd)
        raise


def close(fd: int) -> None:
    """Closes what nothing was written by that a failure could still tell to be lost."""
    try:  # suppress() would cost each small request half a microsecond
        os.close(fd)
    except OSError:
        return  # the descriptor is gone all the same (close(2))


def sync(fd: int) -> None:
    """Returns when the open file, with all that is needed to find it again, is on the disk.

    fsync(2); on macOS that stops at the disk's own cache, and fcntl(2) has F_FULLFSYNC to pass it.
    """
    if _FULL_SYNC is not None:
        try:
            fcntl.fcntl(fd, _FULL_SYNC)
            return
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
    os.fsync(fd)


def sync_folder(path: bytes) -> None:
    """The same for a folder: the names in it and what they stand for. Follows links."""
    if os.name == "nt":
        return  # Windows opens no folder for this; NTFS keeps a journal of its own
    fd = os.open(path, os.O_RDONLY)
    try:
        sync_open_folder(fd)
    finally:
        os.close(fd)


def sync_open_folder(fd: int) -> None:
    """The same for a folder that is open."""
    try:
        sync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def start_write_back(fd: int, offset: int, length: int) -> None:
    """Has the system begin to write this part of an open file to the disk, and does not wait.

    ``length`` 0 is up to its end. On Linux ``POSIX_FADV_DONTNEED`` does that to pages that are
    not written yet (mm/fadvise.c). It is advice: ``sync`` alone tells whether they were written.
    """
    if HAS_FADVISE:
        with suppress(OSError):  # a kernel may have been built without it
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)


def create(path: bytes) -> int:
    """A descriptor to write a new file by, readable by its owner alone."""
    return os.open(path, _CREATE | _BINARY, 0o600)


def write_all(fd: int, data: memoryview) -> None:
    """Writes all of ``data``; ``write(2)`` may take less than it was given."""
    while data:
        data = data[os.write(fd, data) :]


def claim(fd: int) -> bool:
    """Marks an open file as ours until it is closed or this process dies (``flock(2)``).

    False when another process has it, or when it has lost its name meanwhile.
    """
    return _lock(fd) is not False and os.fstat(fd).st_nlink > 0


def nobody_has(fd: int) -> bool:
    """Whether an open file has lost its last name, and is open nowhere else; False if unknown.

    A write lease is granted to the only one who has a file open (fcntl(2), Linux). It is given
    back at once: without a name, nobody else can come to have it.
    """
    if _SET_LEASE is None or os.fstat(fd).st_nlink > 0:
        return False
    try:
        fcntl.fcntl(fd, _SET_LEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, _SET_LEASE, fcntl.F_UNLCK)
    except OSError:  # open elsewhere; not our file; a file system that has no leases
        return False
    return True


def remove_abandoned(path: bytes, stale_seconds: float) -> bool:
    """Removes the file at ``path`` if no running process has claimed it; whether it did.

    It stays locked until it is gone, so that nobody claims it in between. Where
    files cannot be locked, one untouched for ``stale_seconds`` counts.
    """
    # NFS makes a byte-range lock of flock(2), and an exclusive one needs a writer.
    fd = os.open(path, os.O_RDWR | _SAFELY | _BINARY)
    try:
        locked = _lock(fd)
        if locked:
            os.unlink(path)
        stale = time.time() - os.fstat(fd).st_mtime > stale_seconds
    finally:
        os.close(fd)
    if locked is None and stale:
        os.unlink(path)  # only now: Windows removes no file that is open, and so protects others'
        return True
    return bool(locked)


def _lock(fd: int) -> Optional[bool]:
    """Whether the lock was to be had; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            return None  # a network file system without locks
        raise
    return True


def failed(what: str, path: bytes, error: Union[OSError, ValueError]) -> StoreFailed:
    """The error that says that the disk did not do this at ``path``, and why."""
    reason = (getattr(error, "strerror", None) or str(error)).lower()
    return StoreFailed(f"{what}: {reason}; check this folder and its disk", show(os.fsdecode(path)))
