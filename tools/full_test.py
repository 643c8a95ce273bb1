#!/usr/bin/env python3
"""Tries everything a server must do, as a user drawn for it, and removes what it stored.

    python3 tools/full_test.py [--server-info FILE] [--root DIR]

With ``--root``, the server's store, it also looks at the files on disk.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, Dict, Optional, Type

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import BackupError, Client, ConfigError, NotDeleted, NotFound, Refused
from backup.config import draw_user_id, read_server_info
from backup.names import show
from tools.common import options, run

SIZES = {
    "one.bin": 1,
    "page.bin": 4096,
    "mmn14.pdf": 238_917,
    "large.bin": 5_000_003,
    " -.ünïcödé ✓": 77,
}


class Report:
    """One line a check, and whether all were good."""

    def __init__(self) -> None:
        self.good = True

    def check(self, what: str, good: bool) -> None:
        print(f"{'ok  ' if good else 'FAIL'}  {what}")
        self.good = self.good and good

    def fails(self, what: str, kind: Type[BackupError], do: Callable[[], object]) -> None:
        """Checks that doing it raises this error."""
        try:
            do()
        except kind:
            self.check(what, True)
        else:
            self.check(what, False)


def main() -> int:
    parser = options("Try everything a server must do.")
    parser.add_argument("--root", metavar="DIR", help="the server's store, to look at the disk too")
    chosen = parser.parse_args()
    address = read_server_info(chosen.server_info)
    if chosen.root is not None and not os.path.isdir(chosen.root):
        raise ConfigError(f"--root: {show(chosen.root)} is not a folder; name the server's store")
    user_id = draw_user_id()
    folder = None if chosen.root is None else Path(chosen.root) / str(user_id)
    report = Report()
    print(f"User ID: {user_id}")
    with tempfile.TemporaryDirectory() as work, Client(address, user_id) as client:
        contents = {name: os.urandom(size) for name, size in SIZES.items()}
        try:
            whole_flow(client, Path(work), contents, report, folder)
        finally:
            for name in client.list():
                client.delete(name)
        report.check("everything is removed again", client.list() == [])
        if folder is not None:
            empty = folder.is_dir() and not list(folder.iterdir())
            report.check("on disk: the user's folder is empty", empty)
    print("all good" if report.good else "something FAILED")
    return 0 if report.good else 1


def whole_flow(
    client: Client, work: Path, contents: Dict[str, bytes], report: Report, folder: Optional[Path]
) -> None:
    """Every operation, its success and its failure."""

    def put(name: str, content: bytes) -> None:
        (work / name).write_bytes(content)
        client.backup(work / name)

    def stored_is(name: str, content: bytes) -> bool:
        client.retrieve(name, work / "copy", overwrite=True)
        return (work / "copy").read_bytes() == content

    report.check("a new user has no files", client.list() == [])
    for name, content in contents.items():
        put(name, content)
        report.check(
            f"{name!r}, {len(content)} bytes: comes back as sent", stored_is(name, content)
        )
        if folder is not None:
            file = folder / name
            on_disk = file.is_file() and file.read_bytes() == content
            report.check(f"{name!r}: on disk as sent", on_disk)
    in_order = sorted(contents, key=lambda name: name.encode())
    report.check("LIST has all names, in order", client.list() == in_order)

    put("one.bin", b"newer")
    report.check("a second BACKUP replaces the file", stored_is("one.bin", b"newer"))
    (work / "empty").touch()
    report.fails(
        "an empty file is refused", Refused, lambda: client.backup(work / "empty", "one.bin")
    )
    report.check("and the older file stays", stored_is("one.bin", b"newer"))

    client.delete("page.bin")
    report.check("DELETE removes the name", "page.bin" not in client.list())
    report.fails("DELETE of a missing file fails", NotDeleted, lambda: client.delete("page.bin"))
    missing = work / "missing"
    report.fails("RETRIEVE of it too", NotFound, lambda: client.retrieve("page.bin", missing))
    report.check("and writes nothing", not missing.exists())
    with Client(client.address, client.user_id ^ 1) as other:
        report.fails(
            "another user does not see the files",
            NotFound,
            lambda: other.retrieve("one.bin", missing),
        )


if __name__ == "__main__":
    run(main)
