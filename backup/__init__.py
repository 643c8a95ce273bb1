"""A client–server file backup in one package without a dependency.

::

    >>> from backup import Client, Server

    >>> server = Server(root="backupsvr", address=("127.0.0.1", 0))
    >>> server.serve_forever()  # until server.stop(), from any thread or signal handler

    >>> with Client(server.address, user_id=7) as client:
    ...     client.backup("report.pdf")

Importing it sets nothing up: no signal handler, no logging, no global state.
"""

from __future__ import annotations

from .address import UnixSocket
from .client import Client
from .errors import (
    AppendOnly,
    BackupError,
    ConfigError,
    ConnectionFailed,
    CutShort,
    DeadlineMissed,
    EmptyFile,
    FileChanged,
    InternalError,
    InvalidName,
    ListenFailed,
    LocalFileError,
    NotDeleted,
    NotFound,
    OutputFailed,
    ProtocolError,
    QuotaExceeded,
    Refused,
    SetupFailed,
    StoreFailed,
    TargetExists,
    TooLarge,
    UnknownOperation,
    Unreachable,
)
from .exchange import Backup, Delete, Job, Listing, Outcome, Retrieve
from .server import Server
from .settings import Settings
from .storage import Store

__version__ = "1.0.0"

__all__ = [
    "AppendOnly",
    "Backup",
    "BackupError",
    "Client",
    "ConfigError",
    "ConnectionFailed",
    "CutShort",
    "DeadlineMissed",
    "Delete",
    "EmptyFile",
    "FileChanged",
    "InternalError",
    "InvalidName",
    "Job",
    "ListenFailed",
    "Listing",
    "LocalFileError",
    "NotDeleted",
    "NotFound",
    "Outcome",
    "OutputFailed",
    "ProtocolError",
    "QuotaExceeded",
    "Refused",
    "Retrieve",
    "Server",
    "Settings",
    "SetupFailed",
    "Store",
    "StoreFailed",
    "TargetExists",
    "TooLarge",
    "UnixSocket",
    "UnknownOperation",
    "Unreachable",
    "__version__",
]
