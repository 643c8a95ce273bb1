"""A client of a server that means harm: one clear error in time, the right exit code, no trace.

Each misbehaviour is tried on every operation it can be done to, through
``Client`` and through the command line. What must not change is looked at as a
whole: every file in and around the client's folder, with its content, mode and
time.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple, Type

import pytest

from backup import commands
from backup.cli import main
from backup.client import Client
from backup.errors import BackupError, ConnectionFailed, CutShort, DeadlineMissed, ProtocolError
from backup.settings import Settings
from tests import hostile
from tests.helpers import ROOT, WAIT_SECONDS
from tests.hostile import HostileServer, Script, Talk
from tests.test_client import afterwards

USER = 11
MIB = 1 << 20
MOST = 2**32 - 1
ALL = ("BACKUP", "RETRIEVE", "RETRIEVE over", "DELETE", "LIST")
FILES = ("RETRIEVE", "RETRIEVE over")
NAMED = (*FILES, "BACKUP", "DELETE")

# Long enough for a busy machine; but nothing here may wait for the 60 s of the default.
PATIENT = Settings(idle_seconds=5.0)
HASTY = Settings(idle_seconds=0.05, header_seconds=0.05)


class Case(NamedTuple):
    """What a server does to these operations, and what its client says."""

    title: str
    script: Script
    error: Type[BackupError]
    text: str
    ops: Sequence[str] = ALL
    settings: Settings = PATIENT


def another_name(name: bytes, shown: str, ops: Sequence[str] = ALL) -> Case:
    text = f"the answer is for {re.escape(shown)}, another name"
    return Case(f"for {name[:20]!r}", hostile.for_another_name(name), ProtocolError, text, ops)


def another_status(status: int, *ops: str) -> Case:
    text = f"status {status} with 0 bytes answers no [A-Z]+"
    return Case(f"status {status}", hostile.with_status(status), ProtocolError, text, ops)


def lying_list(title: str, payload: bytes, text: str, size: int = -1) -> Case:
    script = hostile.listed(payload, size)
    return Case(f"a list with {title}", script, ProtocolError, text, ("LIST",))


def listed_name(name: bytes, shown: str) -> Case:
    text = f"the server lists {re.escape(shown)}, which is no name"
    return lying_list(f"{name[:20]!r}", hostile.listing(b"a", name, b"b" * 200), text)


CASES = [
    Case("silence", hostile.silent, DeadlineMissed, "was silent for 0.05 s; try again", ALL, HASTY),
    Case(
        "silence in the header",
        hostile.silent_in_the_header,
        DeadlineMissed,
        "(was silent for|sent no whole header in) 0.05 s",
        ALL,
        HASTY,
    ),
    Case(
        "silence at the end",
        hostile.silent_at_the_end,
        DeadlineMissed,
        "(was silent for|sent no whole header in) 0.05 s",
        ALL,
        HASTY,
    ),
    Case("closes at once", hostile.closing, CutShort, "it closed without a whole answer"),
    Case("resets at once", hostile.resetting, ConnectionFailed, "the connection broke: "),
    Case("fewer bytes", hostile.fewer, CutShort, "ended inside the answer's (payload|filename)"),
    Case(
        "a reset in the middle",
        hostile.resetting_in_the_middle,
        ConnectionFailed,
        "the connection broke: .*; try again",
    ),
    Case("more bytes", hostile.more, ProtocolError, "1 bytes follow the server's answer"),
    Case("endlessly more", hostile.endlessly_more, ProtocolError, "[0-9]+ bytes follow the ser"),
    Case("a greeting", hostile.greeting, ProtocolError, "the answer has version 83, not 1"),
    Case(
        "endless 255",
        hostile.endless_bytes(b"\xff"),
        ProtocolError,
        "answer has version 255, not 1",
    ),
    Case("endless 0", hostile.endless_bytes(b"\0"), ProtocolError, "answer has version 0, not 1"),
    Case("endless 1", hostile.endless_bytes(b"\1"), ProtocolError, r"for '(\\\\x01){255}\.\.\.'"),
    another_name(b"../../x", "'../../x'"),
    another_name(b"/etc/passwd", "'/etc/passwd'"),
    another_name(b"b", "'b'"),
    another_name(b"a\0", "'a\\\\x00'"),
    another_name(b"\x1b[31m\r\n", "'\\\\x1b[31m\\\\x0d\\\\x0a'"),
    another_name(b"n" * 65535, f"'{'n' * 255}...'"),
    another_name(b"", "''", NAMED),
    another_status(210, "RETRIEVE", "RETRIEVE over", "DELETE", "LIST"),
    another_status(211, "RETRIEVE", "RETRIEVE over", "BACKUP", "LIST"),
    another_status(212, "BACKUP", "DELETE"),
    another_status(1001, "DELETE"),
    another_status(1002, "RETRIEVE", "RETRIEVE over", "BACKUP", "LIST"),
    another_status(1003, "BACKUP", "DELETE", "LIST"),
    another_status(0, *ALL),
    another_status(100, *ALL),
    another_status(65535, *ALL),
    Case(
        "4 GiB of nothing",
        hostile.announcing(MOST),
        ProtocolError,
        f"{MOST} bytes of payload answer a (BACKUP|DELETE), which has none",
        ("BACKUP", "DELETE"),
    ),
    Case(
        "4 GiB of list",
        hostile.announcing(MOST),
        ProtocolError,
        f"a listing of {MOST} bytes, not 4 to 67108864",
        ("LIST",),
    ),
    Case(
        "4 GiB of refusal",
        hostile.announcing(MOST, 1001),
        ProtocolError,
        f"status 1001 with {MOST} bytes answers no ",
    ),
    Case(
        "a file larger than its payload",
        hostile.large_file(MOST, MOST, MIB, hostile.silent),
        ProtocolError,
        f"a file of {MOST} bytes in a payload for {MOST - 4}",
        FILES,
    ),
    Case(
        "a file smaller than its payload",
        hostile.large_file(MOST, 1, MIB, hostile.silent),
        ProtocolError,
        f"a file of 1 bytes in a payload for {MOST - 4}",
        FILES,
    ),
    Case(
        "no room for a size",
        hostile.announcing(3),
        ProtocolError,
        "a payload of 3 bytes cannot hold a file's size",
        FILES,
    ),
    Case(
        "a reset in the middle of 4 GiB",
        hostile.large_file(MOST, MOST - 4, MIB, hostile.resetting),
        ConnectionFailed,
        "the connection broke: ",
        FILES,
    ),
    Case(
        "an end in the middle of 4 GiB",
        hostile.large_file(MOST, MOST - 4, MIB, hostile.closing),
        CutShort,
        "the server ended inside the answer's payload; try again",
        FILES,
    ),
    lying_list("too large a count", hostile.listing(b"a", count=2), "ends before the names it"),
    lying_list("the largest count", hostile.listing(b"a", count=MOST), "ends before the names it"),
    lying_list("a count that fits", hostile.listing(b"abcd", count=2), "ends before the names it"),
    lying_list(
        "too small a count", hostile.listing(b"a", b"b", count=1), "3 bytes follow the last"
    ),
    lying_list("no count", hostile.listing(b"a", count=0), "3 bytes follow the last name"),
    lying_list("bytes behind", hostile.listing(b"a") + b"xyz", "3 bytes follow the last name"),
    lying_list(
        "a length beyond the end",
        b"\2\0\0\0" + b"\1\0a" + b"\xff\xffa",
        "a listed name of 65535 bytes passes the payload's end",
    ),
    lying_list("a count for 64 MiB", b"\1\0\0\0", "bytes follow the last name", 64 * MIB),
    lying_list(
        "more names than memory",
        (2**24 - 1).to_bytes(4, "little"),
        "a listing of 16777215 names, more than 1048576",
        64 * MIB,
    ),
    listed_name(b"../../x", "'../../x'"),
    listed_name(b"/etc/passwd", "'/etc/passwd'"),
    listed_name(b"..", "'..'"),
    listed_name(b"", "''"),
    listed_name(b"\x1b[2J", "'\\\\x1b[2J'"),
    listed_name(b"\xff", "'\\\\xff'"),
    listed_name(b"n" * 500, f"'{'n' * 255}...'"),
]
EVERY = [pytest.param(case, op, id=f"{case.title}, {op}") for case in CASES for op in case.ops]
State = Dict[str, Tuple[int, int, bytes]]


class Folder:
    """A client's folder, deep enough for ``../../x`` to end up where it is seen."""

    def __init__(self, top: Path) -> None:
        self.top = top
        self.path = top / "deep" / "here"
        self.path.mkdir(parents=True)
        for name, content in (("a", b"to be sent"), ("old", b"old"), ("b", b"another")):
            (self.path / name).write_bytes(content)
            (self.path / name).chmod(0o640)
            os.utime(self.path / name, (1, 1))

    def state(self) -> State:
        """Everything there is, folders too (their times tell of a file that came and went)."""
        found = {}
        for path in [self.top, *self.top.rglob("*")]:
            status = path.lstat()
            regular = stat.S_ISREG(status.st_mode)
            time, content = (status.st_mtime_ns, path.read_bytes()) if regular else (0, b"")
            found[str(path)] = (status.st_mode, time, content)
        return found

    def ask(self, client: Client, op: str) -> None:
        """Does it with the library."""
        asks: Dict[str, Callable[[], object]] = {
            "BACKUP": lambda: client.backup(self.path / "a"),
            "RETRIEVE": lambda: client.retrieve("a", self.path / "new"),
            "RETRIEVE over": lambda: client.retrieve("a", self.path / "old", overwrite=True),
            "DELETE": lambda: client.delete("a"),
            "LIST": client.list,
        }
        asks[op]()


ARGUMENTS: Dict[str, List[str]] = {
    "BACKUP": ["put", "a"],
    "RETRIEVE": ["get", "a", "-o", "new"],
    "RETRIEVE over": ["get", "a", "-o", "old", "--force"],
    "DELETE": ["delete", "a"],
    "LIST": ["list"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    folder = Folder(tmp_path / "top")
    monkeypatch.chdir(folder.path)
    return folder


def options(server: HostileServer) -> List[str]:
    return ["--server", f"127.0.0.1:{server.address[1]}", "--user-id", str(USER)]


@pytest.mark.parametrize(("case", "op"), EVERY)
def test_a_client_says_what_it_is_and_leaves_no_trace(folder: Folder, case: Case, op: str) -> None:
    before = folder.state()
    with (
        HostileServer(case.script) as server,
        Client(server.address, USER, case.settings) as client,
    ):
        with pytest.raises(BackupError, match=case.text) as caught:
            folder.ask(client, op)
        assert not client.busy
    assert type(caught.value) is case.error
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith("" if op == "LIST" else "a: ")
    assert len(str(caught.value)) < 1500
    assert folder.state() == before


@pytest.mark.parametrize(("case", "op"), EVERY)
def test_a_command_says_so_in_one_line_and_fails(
    folder: Folder,
    case: Case,
    op: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = folder.state()
    monkeypatch.setattr(commands, "Client", functools.partial(Client, settings=case.settings))
    with HostileServer(case.script) as server:
        code = main([*ARGUMENTS[op], *options(server)])
    out, err = capsys.readouterr()
    assert (out, code) == ("", 1)
    assert re.fullmatch(f"backup: {'' if op == 'LIST' else 'a: '}.*{case.text}.*\n", err)
    assert folder.state() == before


# -- memory -------------------------------------------------------------------

VAST = [
    pytest.param(case, op, id=f"{case.title}, {op}")
    for case, op in [
        (Case("endlessly more", hostile.endlessly_more, ProtocolError, "follow"), "LIST"),
        (Case("endlessly more", hostile.endlessly_more, ProtocolError, "follow"), "RETRIEVE"),
        (Case("endless 255", hostile.endless_bytes(b"\xff"), ProtocolError, "255"), "LIST"),
        (Case("4 GiB of list", hostile.announcing(MOST), ProtocolError, "listing"), "LIST"),
        (Case("4 GiB", hostile.announcing(MOST), ProtocolError, "payload"), "DELETE"),
        (
            Case(
                "64 MiB of names",
                hostile.large_file(64 * MIB, 2**24 - 1, 64 * MIB, hostile.silent),
                ProtocolError,
                "16777215 names",
            ),
            "LIST",
        ),
        (
            Case(
                "64 MiB of 4 GiB",
                hostile.large_file(MOST, MOST - 4, 64 * MIB, hostile.resetting),
                ConnectionFailed,
                "broke",
            ),
            "RETRIEVE",
        ),
    ]
]


@pytest.mark.parametrize(("case", "op"), VAST)
def test_what_is_announced_or_comes_without_end_is_not_held(
    folder: Folder, case: Case, op: str
) -> None:
    tracemalloc.start()
    try:
        with HostileServer(case.script) as server, Client(server.address, USER, PATIENT) as client:
            tracemalloc.reset_peak()
            with pytest.raises(case.error, match=case.text):
                folder.ask(client, op)
            _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB


@pytest.mark.parametrize(("case", "op"), VAST)
def test_a_process_with_little_memory_has_enough(folder: Folder, case: Case, op: str) -> None:
    before = folder.state()
    # The interpreter itself takes some 30 MiB; its C library maps more than it uses.
    limited = ["sh", "-c", 'ulimit -v 131072; exec "$@"', "sh", sys.executable, "-m", "backup"]
    with HostileServer(case.script) as server:
        done = subprocess.run(
            [*limited, *ARGUMENTS[op], *options(server)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert (done.stdout, done.returncode) == ("", 1)
    assert re.fullmatch(f"backup: .*{case.text}.*\n", done.stderr)
    assert folder.state() == before


# -- a byte now and then ------------------------------------------------------

SLOW = Settings(idle_seconds=5.0, header_seconds=0.05, min_rate_bytes=1000, rate_seconds=0.1)
NO_HEADER = "sent no whole header in 0.05 s"
TOO_SLOW = "was slower than 1000 bytes a second for 0.1 s; try again"
LONG_NAME = struct.pack("<BHHI", 1, 212, 65535, 0)
LONG_LISTING = struct.pack("<BHHII", 1, 212, 0, 64 * MIB, MIB)


def begins_a_file(talk: Talk) -> bytes:
    return hostile.header(talk, 212, MOST) + struct.pack("<I", MOST - 4)


DRIBBLED = [
    *[
        Case("a name", hostile.dribbling(lambda talk: LONG_NAME), DeadlineMissed, NO_HEADER, [op])
        for op in ALL
    ],
    Case("a file", hostile.dribbling(begins_a_file), DeadlineMissed, TOO_SLOW, FILES),
    Case(
        "a listing",
        hostile.dribbling(lambda talk: LONG_LISTING),
        DeadlineMissed,
        TOO_SLOW,
        ["LIST"],
    ),
]
EVERY_DRIBBLE = [
    pytest.param(case, op, id=f"{case.title}, {op}") for case in DRIBBLED for op in case.ops
]


@pytest.mark.parametrize(("case", "op"), EVERY_DRIBBLE)
def test_a_byte_now_and_then_wins_nothing(
    folder: Folder,
    case: Case,
    op: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = folder.state()
    monkeypatch.setattr(commands, "Client", functools.partial(Client, settings=SLOW))
    with HostileServer(case.script) as server, Client(server.address, USER, SLOW) as client:
        with pytest.raises(case.error, match=f"{case.text}$"):
            folder.ask(client, op)
        assert main([*ARGUMENTS[op], *options(server)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(f"backup: .*{case.text}\n", err)
    assert folder.state() == before


def test_taking_a_byte_now_and_then_wins_nothing(folder: Folder) -> None:
    with (folder.path / "a").open("wb") as file:
        file.truncate(64 * MIB)  # more than the sockets of both ends hold
    before = folder.state()
    left = threading.Event()
    with (
        HostileServer(hostile.sipping(left), takes_all=False) as server,
        Client(server.address, USER, SLOW) as client,
        afterwards(left),
        pytest.raises(DeadlineMissed, match=f"{TOO_SLOW}$"),
    ):
        client.backup(folder.path / "a")
    assert folder.state() == before
