"""Where a server's log goes: a descriptor it was given, or a file it opens by name.

Rules: nothing here waits, whoever reads the log, and no flag is changed on a
descriptor that other processes may share. What is not a regular file gets at
most ``PIPE_BUF`` bytes at a time, and only when poll(2) says that it takes them
(pipe(7): these are written as a whole). A line that could be written only in
part is completed before the next begins. What could not be written stays the
caller's, who keeps it or counts it as lost.
"""

from __future__ import annotations

import os
import select
import stat
from contextlib import suppress
from typing import List, Optional, Sequence

from .errors import SetupFailed
from .log import Format, Line
from .names import show

_PIPE_BYTES = getattr(select, "PIPE_BUF", 512)  # that POSIX lets every pipe take as a whole
_FILE_BYTES = 64 * 1024

# O_NONBLOCK is for a pipe that nobody reads; O_NOCTTY, for a terminal that would become ours.
_CALMLY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)


class Output:
    """A sink that writes to ``fd``, which remains its owner's. Close it when it is done with."""

    def __init__(self, fd: int, form: Format, encoding: str = "utf-8") -> None:
        self._form = form
        self._encoding = encoding
        self._half = b""  # a line that is written in part,
        self._sent = 0  # and how much of it
        self._own = -1
        self._use(fd)

    def __call__(self, lines: Sequence[Line]) -> int:
        """Writes what can be written at once; how many lines, the last perhaps in part.

        Raises ``OSError`` when the very first cannot be written at all.
        """
        taken = 0
        try:
            while taken < len(lines) and self._finish():
                batch = self._batch(lines, taken)
                data = self._encode("".join(batch))
                count = self._write(data)
                if not count:
                    break
                taken += len(batch) if count == len(data) else self._part(batch, count)
        except OSError:
            if not taken:
                raise
        return taken

    def close(self) -> None:
        """Lets go of what it has opened itself."""
        if self._own >= 0:
            own, self._own = self._own, -1
            with suppress(OSError):  # what could not be written was counted
                os.close(own)

    def _use(self, fd: int) -> None:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode) or os.isatty(fd):
            # The same pipe or terminal, opened anew with a flag that nobody shares: then no other
            # writer can fill it up between poll and write. Linux; elsewhere poll has to do.
            with suppress(OSError):
                fd = self._own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | _CALMLY)
        self._fd = fd
        self._poll: Optional[select.poll] = None
        self._at_once = _FILE_BYTES
        if not stat.S_ISREG(mode) and hasattr(select, "poll"):
            self._at_once = _PIPE_BYTES
            self._poll = select.poll()
            self._poll.register(fd, select.POLLOUT)

    def _batch(self, lines: Sequence[Line], begin: int) -> List[str]:
        """Whole lines of about as much as may be written at once; at least one."""
        batch: List[str] = []
        size = 0
        for place in range(begin, len(lines)):
            line = self._form(lines[place])
            size += len(line)
            if batch and size > self._at_once:
                break
            batch.append(line)
        return batch

    def _part(self, batch: List[str], count: int) -> int:
        """Takes note that ``count`` bytes of these are written; how many, the last in part."""
        for place, text in enumerate(batch, 1):
            line = self._encode(text)
            if count <= len(line):
                self._half, self._sent = line, count
                return place
            count -= len(line)
        raise AssertionError("more was written than there was")

    def _encode(self, text: str) -> bytes:
        return text.encode(self._encoding, "backslashreplace")

    def _finish(self) -> bool:
        """Completes the line that is written in part, if there is one; whether it is whole."""
        while self._sent < len(self._half):
            count = self._write(self._half[self._sent :])
            if not count:
                return False
            self._sent += count
        self._half, self._sent = b"", 0
        return True

    def _write(self, data: bytes) -> int:
        """Writes as much as can be written without waiting; how many bytes."""
        if self._poll is None:
            return os.write(self._fd, data)
        try:
            return os.write(self._fd, data[: self._at_once]) if self._poll.poll(0) else 0
        except BlockingIOError:
            return 0


class LogFile(Output):
    """A sink that appends to the file at ``path``, which is its own and is made if missing."""

    def __init__(self, path: str, form: Format) -> None:
        """Raises ``SetupFailed``."""
        self._path = path
        fd = self._open()
        super().__init__(fd, form)
        self._file = fd

    def reopen(self) -> None:
        """Goes on in what is at the path now, after the file was renamed, say.

        Raises ``SetupFailed``, and then goes on in the file it had.
        """
        fd = self._open()
        with suppress(OSError):
            self._finish()
        self._sent = 0  # what is still in part there is written anew, as a whole
        self.close()
        self._use(fd)
        self._file = fd

    def close(self) -> None:
        super().close()
        if self._file >= 0:
            file, self._file = self._file, -1
            with suppress(OSError):
                os.close(file)

    def _open(self) -> int:
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CALMLY
            return os.open(self._path, flags, 0o600)
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise SetupFailed(
                f"cannot write the log {show(self._path)}: {reason}; take another: --log-file FILE"
            ) from error
