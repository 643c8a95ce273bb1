"""The client's seven steps, to the letter of docs/PROTOCOL.md.

LIST, BACKUP file 1, BACKUP file 2, LIST, RETRIEVE file 1, DELETE file 1, and
RETRIEVE file 1 again, which must fail. Rules: each step is a title and what to
do; it returns its line of the transcript and whether it ended as it should. A
step that fails does not keep the next from being tried.
"""

from __future__ import annotations

import os
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from .client import Client
from .errors import BackupError, NotFound
from .names import of_path, show

UNITS = ("bytes", "KB", "MB", "GB")


class Result(NamedTuple):
    """How a step ended: its line, and whether that is how it should end."""

    line: str
    ok: bool
    error: Optional[BackupError] = None


class Step(NamedTuple):
    """One step: its title, and what it does."""

    title: str
    do: Callable[[], Result]


def format_size(size: int) -> str:
    """Bytes as people read them: decimal, rounded down (``15 bytes``, ``238 KB``)."""
    power = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    return f"{size // 1000**power} {UNITS[power]}"


def steps(client: Client, files: Sequence[str], output_dir: str) -> List[Step]:
    """The seven steps for the first two of ``files``.

    What is retrieved is saved in ``output_dir`` as ``retrieved_<name>``.
    """
    first, second = (of_path(path) for path in files[:2])
    sent: Dict[str, int] = {}  # bytes, by name

    def list_names(expected: Sequence[str]) -> Result:
        try:
            names = client.list()
        except BackupError as error:
            return Result(f"List failed: {error.text}", False, error)
        return Result(f"Files on server: {names}", set(expected) <= set(names))

    def backup(path: str, name: str) -> Result:
        try:
            sent[name] = client.backup(path)
        except BackupError as error:
            return Result(f"Backup failed ({show(name)}): {error.text}", False, error)
        return Result(f"Backup OK ({show(name)})", True)

    def retrieve(gone: bool) -> Result:
        target = os.path.join(output_dir, f"retrieved_{first}")
        try:
            size = client.retrieve(first, target, overwrite=True)
        except NotFound:
            return Result(f"{show(first)} not found on server", gone)
        except BackupError as error:
            return Result(f"Retrieve failed ({show(first)}): {error.text}", False, error)
        as_sent = not gone and size == sent.get(first)
        return Result(f"Retrieved: {show(first)} ({format_size(size)})", as_sent)

    def delete() -> Result:
        try:
            client.delete(first)
        except BackupError as error:
            return Result(f"Delete failed ({show(first)}): {error.text}", False, error)
        return Result(f"Delete OK ({show(first)})", True)

    return [
        Step("LIST (initial)", lambda: list_names([])),
        Step("BACKUP file 1", lambda: backup(files[0], first)),
        Step("BACKUP file 2", lambda: backup(files[1], second)),
        Step("LIST (after backups)", lambda: list_names([first, second])),
        Step("RETRIEVE file 1", lambda: retrieve(gone=False)),
        Step("DELETE file 1", delete),
        Step("RETRIEVE file 1 again", lambda: retrieve(gone=True)),
    ]
