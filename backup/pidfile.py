"""A file that says which process a server is, for whoever has to send it signals.

Rules: it is there as a whole or not at all, and only while the server runs, who
holds it locked (flock(2)) so that no second one takes it over. At the end it is
removed, if it is still the one that was written. A file that holds anything else
than a process id is not ours to replace.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress

from . import disk
from .errors import SetupFailed
from .names import show

_CONTENT = re.compile(rb"\s*[0-9]{0,20}\s*")


class PidFile:
    """The file at ``path``, there while this is used as a context manager."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._content = b"%d\n" % os.getpid()  # no other process can be this one meanwhile
        self._lock = -1

    def __enter__(self) -> PidFile:
        """Writes it, over one that a process has left that is no more. Raises ``SetupFailed``."""
        part = f"{self._path}.{os.urandom(8).hex()}"
        try:
            self._look_at_what_is_there()
            self._lock = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                disk.write_all(self._lock, memoryview(self._content))
                disk.claim(self._lock)
                os.chmod(part, 0o644)  # nothing in it is secret, and others may have to read it
                os.replace(part, self._path)
            except BaseException:
                disk.close(self._lock)
                os.unlink(part)
                raise
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise SetupFailed(
                f"cannot write the pid file {show(self._path)}: {reason};"
                " take another: --pid-file FILE"
            ) from error
        return self

    def _look_at_what_is_there(self) -> None:
        """Raises ``SetupFailed`` if a process that runs holds the file, or it is another file."""
        try:
            fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except FileNotFoundError:
            return
        try:
            free, content = disk.claim(fd), os.read(fd, 32)
        finally:
            os.close(fd)
        if not free and content != self._content:
            raise SetupFailed(
                f"{show(self._path)} is held by process {show(os.fsdecode(content.strip()))},"
                " which runs; stop it, or take another: --pid-file FILE"
            )
        if not _CONTENT.fullmatch(content):
            raise SetupFailed(
                f"{show(self._path)} is no pid file: what is in it is not a process id;"
                " take another: --pid-file FILE"
            )

    def __exit__(self, *_: object) -> None:
        """Removes it, if it is still the one that was written."""
        with suppress(OSError):  # gone already, or not to be had: it says nothing any more
            with open(self._path, "rb") as file:
                ours = file.read(len(self._content) + 1) == self._content
            if ours:
                os.unlink(self._path)
        disk.close(self._lock)
