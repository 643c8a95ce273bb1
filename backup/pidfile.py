"""A file that says which process a server is, for whoever has to send it signals.

Rules: it is there as a whole or not at all, and only while the server runs. At
the end it is removed, unless another process has put its own there meanwhile.
"""

from __future__ import annotations

import os
from contextlib import suppress

from .errors import SetupFailed
from .names import show


class PidFile:
    """The file at ``path``, there while this is used as a context manager."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._content = b"%d\n" % os.getpid()  # no other process can be this one meanwhile

    def __enter__(self) -> PidFile:
        """Writes it, over one that another process has left. Raises ``SetupFailed``."""
        part = f"{self._path}.{os.getpid()}"
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(self._content)
                os.chmod(part, 0o644)  # nothing in it is secret, and others may have to read it
                os.replace(part, self._path)
            except BaseException:
                os.unlink(part)
                raise
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise SetupFailed(
                f"cannot write the pid file {show(self._path)}: {reason};"
                " take another: --pid-file FILE"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        """Removes it, if it is still the one that was written."""
        with suppress(OSError):  # gone already, or not to be had: it says nothing any more
            with open(self._path, "rb") as file:
                ours = file.read(len(self._content) + 1) == self._content
            if ours:
                os.unlink(self._path)
