"""Everything that can go wrong, as one tree.

Rules: every error the package raises on purpose descends from ``BackupError``.
Its message says what failed, where, and what to do next, in one line that is
safe to print. Its class says the rest: ``status``, what a RETRIEVE that fails
this way is answered (the other operations have one failure status each, see
``wire.failure_status``); ``reason``, the word for the log; ``exit_code``, what
the command line returns.

::

    BackupError
    ├── ConfigError            an info file, option or variable is missing or malformed
    ├── OutputFailed           what was to be printed cannot be written
    ├── ListenFailed           the server cannot bind its address
    ├── SetupFailed            what else the server was given to work with cannot be had
    ├── ConnectionFailed       no connection, or it broke before the answer was whole
    │   ├── Unreachable        no connection could be made
    │   ├── CutShort           the peer ended in the middle of a message
    │   └── DeadlineMissed     the peer was silent for too long
    ├── ProtocolError          the peer's bytes are not the protocol
    ├── InternalError          a fault of this program, which nobody foresaw
    ├── LocalFileError         a file on the client's side cannot be read or written
    │   ├── FileChanged        it grew, shrank or was rewritten while it was read
    │   └── TargetExists       it is there already and may not be overwritten
    └── Refused                the request was understood and not done
        ├── InvalidName        the name breaks the rule of ``names``
        ├── EmptyFile          BACKUP of zero bytes
        ├── TooLarge           more bytes than an answer could carry back
        ├── QuotaExceeded      it does not fit into what may be held
        ├── AppendOnly         it would replace or remove what is stored
        ├── UnknownOperation   an op that is not 100, 200, 201 or 202
        ├── NotDeleted         the server could not remove it, or it is not there
        ├── NotFound           no such file on the server
        └── StoreFailed        the store's disk or folder does not do its part
"""

from __future__ import annotations

from typing import ClassVar

FAILED = 1
"""The exit code of whatever has no other."""


class BackupError(Exception):
    """The root of the tree; catch it to catch everything the package raises.

    ``text`` says what failed and what to do; ``subject``, if it is known, which
    file this was about. ``str`` gives both.
    """

    status: ClassVar[int] = 1001
    reason: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = FAILED

    def __init__(self, text: str, subject: str = "") -> None:
        super().__init__(text)
        self.text = text
        self.subject = subject

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" if self.subject else self.text


class ConfigError(BackupError):
    """An info file, option or environment variable is missing or malformed."""

    reason = "config"
    exit_code = 2


class OutputFailed(BackupError):
    """The results cannot be written to stdout."""

    reason = "output"


class ListenFailed(BackupError):
    """The server cannot listen on the address it was given."""

    reason = "listen"


class SetupFailed(BackupError):
    """A log, pid file or inherited socket that the server was told to use cannot be had."""

    reason = "setup"


class ConnectionFailed(BackupError):
    """There is no connection, or it broke before the answer was whole."""

    reason = "connection"


class Unreachable(ConnectionFailed):
    """No connection could be made, so that nothing was sent."""

    reason = "unreachable"


class CutShort(ConnectionFailed):
    """The peer ended its side in the middle of a message."""

    reason = "cut"


class DeadlineMissed(ConnectionFailed):
    """The peer was silent, or slow with its header, until its deadline."""

    reason = "deadline"


class ProtocolError(BackupError):
    """The peer's bytes are not the protocol, or not the answer to this request."""

    reason = "protocol"


class InternalError(BackupError):
    """Something was raised that nobody foresaw, ``fault``: a bug of this program."""

    reason = "bug"

    def __init__(self, fault: Exception) -> None:
        super().__init__(f"a fault of this program ({type(fault).__name__}); please report it")
        self.fault = fault


class LocalFileError(BackupError):
    """A file on the client's side cannot be read or written."""

    reason = "local-file"


class FileChanged(LocalFileError):
    """The file grew, shrank or was rewritten while it was being read."""

    reason = "changed"


class TargetExists(LocalFileError):
    """The file to write is there already and overwriting was not asked for."""

    reason = "exists"


class Refused(BackupError):
    """The request was understood and not carried out."""

    reason = "refused"


class InvalidName(Refused):
    """The name breaks the rule: it can neither be stored nor be there."""

    status = 1003
    reason = "name"


class EmptyFile(Refused):
    """BACKUP of zero bytes, which the protocol refuses."""

    reason = "empty"


class TooLarge(Refused):
    """The file has more bytes than an answer could carry back."""

    reason = "too-large"


class QuotaExceeded(Refused):
    """One of the caps on what may be held does not allow it; ``cap`` is that option's word."""

    reason = "quota"

    def __init__(self, text: str, cap: str = "") -> None:
        super().__init__(text)
        self.cap = cap


class AppendOnly(Refused):
    """The store takes new files and lets nobody replace or remove any."""

    reason = "append-only"


class UnknownOperation(Refused):
    """The request's op is none of the four."""

    reason = "unknown-op"


class NotDeleted(Refused):
    """The server answered 1002: the file is not there, or it could not be removed."""

    reason = "not-deleted"


class NotFound(Refused):
    """The user has no file of that name on the server."""

    status = 1003
    reason = "not-found"
    exit_code = 10


class StoreFailed(Refused):
    """The store's disk or folder refused: full, read-only, gone, not a folder."""

    reason = "store"
