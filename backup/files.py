"""The client's files: one that is sent, one that is received.

Rules: what is sent is one state of the file or nothing. The last bytes leave
only after size and times were seen unchanged, so a file that grows, shrinks or
is rewritten meanwhile never becomes a whole upload. sendfile(2) sends what the
pages hold when the peer reads them, which may be after that look: so the last
``_COPIED_BYTES`` are copied. They are more than the sockets of both ends hold
between them, and so all that was sent by sendfile has been read by the peer
before the look that counts.
What is received is written beside its target under a name of its own and takes
the target's by a rename; nothing else is touched.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from typing import Callable, Optional, Union

from .connection import Body
from .errors import FileChanged, LocalFileError, TargetExists, TooLarge
from .names import show
from .stream import Stream
from .wire import MAX_FILE_BYTES

Path = Union[str, "os.PathLike[str]"]
Report = Callable[[int, int], None]  # bytes done, bytes in all

_CHUNK_BYTES = 128 * 1024

# Linux lets a send buffer grow to 4 MiB and a receive buffer to 6 MiB (tcp(7), tcp_wmem and
# tcp_rmem), and machines that are tuned for long distances to 16 MiB each.
_COPIED_BYTES = 32 * 1024 * 1024

_BINARY = getattr(os, "O_BINARY", 0)
# Without O_NONBLOCK, opening a pipe would wait for its other end.
_READ = os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY


class Source(Body):
    """A local file on its way out. ``size`` in bytes."""

    def __init__(self, path: Path, report: Report) -> None:
        """Opens it. Raises ``LocalFileError`` or ``TooLarge``."""
        self._path = os.fspath(path)
        self._report = report
        try:
            self._fd = os.open(self._path, _READ)
        except (OSError, ValueError) as error:
            raise _unreadable(self._path, error) from error
        self._held = memoryview(b"")  # read, not yet sent
        self._before = os.fstat(self._fd)
        self.size = self.remaining = self._before.st_size
        try:
            if not stat.S_ISREG(self._before.st_mode):
                kind = "a folder" if stat.S_ISDIR(self._before.st_mode) else "not a regular file"
                raise LocalFileError(f"cannot read {show(self._path)}: it is {kind}; name a file")
            if self.size > MAX_FILE_BYTES:
                raise TooLarge(
                    f"{self.size} bytes; the protocol carries {MAX_FILE_BYTES}; split it"
                )
            if self.size == 0 and self._has_bytes():  # as in /proc, where the size is unknown
                raise LocalFileError(
                    f"cannot read {show(self._path)}: its size is 0, and yet there are bytes"
                    " in it; send a copy of it"
                )
        except (LocalFileError, TooLarge):
            self.close()
            raise

    def send(self, stream: Stream, limit: int) -> Optional[int]:
        uncopied = self.remaining - _COPIED_BYTES
        if uncopied > 0:
            offset = self.size - self.remaining
            try:
                count = stream.send_file(self._fd, offset, min(limit, uncopied))
            except OSError as error:
                raise _unreadable(self._path, error) from error
            if count == 0:
                raise self._changed()
        else:
            if not self._held:
                self._held = self._read(min(limit, self.remaining, _CHUNK_BYTES))
            count = stream.send(self._held[:limit])
            self._held = self._held[count or 0 :]
        if count is not None:
            self.remaining -= count
            self._report(self.size - self.remaining, self.size)
        return count

    def close(self) -> None:
        os.close(self._fd)

    def _has_bytes(self) -> bool:
        try:
            return bool(os.read(self._fd, 1))
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def _read(self, count: int) -> memoryview:
        try:
            os.lseek(self._fd, self.size - self.remaining, os.SEEK_SET)
            data = os.read(self._fd, count)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if not data or _is_another(self._before, os.fstat(self._fd)):
            raise self._changed()
        return memoryview(data)

    def _changed(self) -> FileChanged:
        return FileChanged(
            f"{show(self._path)} changed while it was read; nothing is stored; retry"
        )


class Target:
    """A local file on its way in: ``begin``, ``write``, then ``finish`` or ``abort``."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        """Raises ``TargetExists`` when it is there and may not be overwritten, ``LocalFileError``
        when it is a folder, a device or a pipe. A symbolic link is replaced, not followed."""
        self._path = os.fspath(path)
        self._overwrite = overwrite
        self._part = ""
        self._fd = -1
        if os.path.isdir(self._path):
            raise LocalFileError(f"{show(self._path)} is a folder; name a file in it")
        if not overwrite and os.path.lexists(self._path):
            raise self._exists()
        self._older_mode()

    def begin(self) -> None:
        """Makes the file that is written until the answer is whole. Raises ``LocalFileError``."""
        folder = os.path.dirname(self._path)
        part = os.path.join(folder, f".backup-{os.urandom(8).hex()}.part")
        try:
            # Who could not read the older file must not read this one while it grows.
            self._fd = os.open(part, _CREATE, 0o666 if self._older_mode() is None else 0o600)
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        self._part = part

    def write(self, data: memoryview) -> None:
        """Appends ``data``. Raises ``LocalFileError``."""
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            raise self._unwritable(error) from error

    def finish(self) -> None:
        """Gives the file its name. Raises ``TargetExists`` or ``LocalFileError``."""
        try:
            mode = self._older_mode()
            if mode is not None and self._overwrite:
                os.chmod(self._part, mode)
            self._close()
            if self._overwrite:
                os.replace(self._part, self._path)
            else:
                name_new(self._part, self._path)
        except FileExistsError:
            raise self._exists() from None
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Removes what was written, if it can be removed; after ``finish``, does nothing."""
        with suppress(OSError):
            self._close()
        if self._part:
            with suppress(OSError):
                os.unlink(self._part)
            self._part = ""

    def _older_mode(self) -> Optional[int]:
        """The permissions of the file that is there, if one is. Raises ``LocalFileError``."""
        try:
            mode = os.lstat(self._path).st_mode
        except (OSError, ValueError):
            return None  # nothing is there, or what is wrong with the path shows when it is used
        if stat.S_ISREG(mode):
            return mode & 0o777  # nothing a server sends becomes a setuid program
        if stat.S_ISLNK(mode):
            return None
        raise LocalFileError(f"{show(self._path)} is not a regular file; choose another place")

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _exists(self) -> TargetExists:
        return TargetExists(
            f"{show(self._path)} is there already; overwriting is to be asked for (--force)"
        )

    def _unwritable(self, error: Union[OSError, ValueError]) -> LocalFileError:
        return LocalFileError(
            f"cannot write {show(self._path)}: {_why(error)}; choose another place"
        )


def _is_another(before: os.stat_result, now: os.stat_result) -> bool:
    if (before.st_size, before.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
        return True
    # The time of the last status change gives away who set the other one back. It also moves
    # when another file takes the name, which changes nothing in this one.
    return before.st_nlink == now.st_nlink and before.st_ctime_ns != now.st_ctime_ns


def name_new(part: str, path: str) -> None:
    """Gives a file its name without ever taking it from another: link(2) refuses to.

    Raises ``FileExistsError``. ``part`` may be left, for the caller to remove.
    """
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except (OSError, AttributeError):  # a file system or a system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.replace(part, path)


def _unreadable(path: str, error: Union[OSError, ValueError]) -> LocalFileError:
    return LocalFileError(f"cannot read {show(path)}: {_why(error)}; check the path")


def _why(error: Union[OSError, ValueError]) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
