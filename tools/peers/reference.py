"""What the two reference servers share: the store, the answers and the log.

They speak docs/PROTOCOL.md as ``backup`` does, written the way one would without
it: a file is written beside the others and renamed; there is no fsync.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import struct
import sys
from typing import List, TextIO, Tuple

REQUEST = struct.Struct("<IBBH")
RESPONSE = struct.Struct("<BHHI")
SIZE = struct.Struct("<I")
NAME_LENGTH = struct.Struct("<H")

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
STORED, DELETED, FOUND = 210, 211, 212
FAILED, NOT_DELETED, NOT_FOUND = 1001, 1002, 1003
LARGE = 64 * 1024
"""From this size on a file is sent by sendfile, and not read and written."""

_FORBIDDEN = re.compile("[/\\\\\x00-\x1f\x7f-\x9f]")


class Store:
    """The files of all users below one folder."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._numbers = itertools.count()
        os.makedirs(os.path.join(root, ".tmp"), exist_ok=True)

    def path(self, user: int, name: bytes) -> str:
        """Where a file is. Raises ``ValueError`` when no file may be called so."""
        text = name.decode()
        if not 1 <= len(name) <= 255 or text in (".", "..") or _FORBIDDEN.search(text):
            raise ValueError("not a name for a file")
        return f"{self.root}/{user}/{text}"

    def temporary(self) -> str:
        """Where an upload is written until it is whole."""
        return f"{self.root}/.tmp/{next(self._numbers)}"

    def put(self, temporary: str, path: str) -> None:
        """Gives an upload its name."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.replace(temporary, path)

    def listing(self, user: int) -> bytes:
        """The payload of LIST."""
        try:
            with os.scandir(f"{self.root}/{user}") as entries:
                files = (entry for entry in entries if entry.is_file(follow_symlinks=False))
                names = sorted(os.fsencode(entry.name) for entry in files)
        except FileNotFoundError:
            names = []
        parts = [SIZE.pack(len(names))]
        for name in names:
            parts += [NAME_LENGTH.pack(len(name)), name]
        return b"".join(parts)

    def delete(self, user: int, name: bytes) -> int:
        """Removes a file; the status to answer."""
        try:
            os.unlink(self.path(user, name))
        except (OSError, ValueError):
            return NOT_DELETED
        return DELETED


def answer(status: int, name: bytes = b"", size: int = 0) -> bytes:
    """An answer without its payload of ``size`` bytes."""
    return RESPONSE.pack(1, status, len(name), size) + name


def log_line(
    request: Tuple[int, int, bytes], status: int, size: int, seconds: float, peer: Tuple[str, int]
) -> str:
    """The same line that ``backup`` writes for a request: user, op, name and so on."""
    user, op, name = request
    return (
        f"[SERVER] user={user} op={op} file={name.decode(errors='backslashreplace')} "
        f"status={status} bytes={size} ms={seconds * 1000:.1f} peer={peer[0]}:{peer[1]}\n"
    )


def open_log() -> TextIO:
    """The log on stderr, where lines are kept until a block is full."""
    return open(sys.stderr.fileno(), "w", encoding="utf-8", closefd=False)


def greet(port: int) -> None:
    """Says on stderr, where the log goes, which port it took."""
    sys.stderr.write(f"[SERVER] Listening on 127.0.0.1:{port}\n")
    sys.stderr.flush()


def options(description: str, arguments: List[str]) -> argparse.Namespace:
    """The command line of a peer; from here on SIGTERM ends it as ``sys.exit`` does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--root", required=True, metavar="DIR", help="keep the files in DIR")
    return parser.parse_args(arguments)
