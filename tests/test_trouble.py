"""Trouble with the disk or with descriptors: one request fails, in one line, and all else goes on.

What a store asks of its disk is made to fail call by call: a first run counts the calls of a
request, the others let each of them fail in turn, with each error. Then the real thing: a root
that goes away, a user's folder that becomes something else, a limit on the size of files, a small
file system, and a server that has no descriptor left.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from backup.server import Server
from backup.settings import Settings
from backup.storage import Store
from tests.helpers import (
    ROOT,
    WAIT_SECONDS,
    RunningServer,
    ask,
    connect,
    file_payload,
    read_all,
    request,
    response,
)

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
EMPTY_LIST = response(212, b"", b"\0\0\0\0")
OLDER, NEWER = b"older" * 1000, b"newer and longer" * 1000
LARGE = 300_000
CODES = [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS]

CALLS = ["open", "write", "read", "fsync", "replace", "unlink", "stat", "fstat", "scandir"]
CALLS += ["mkdir", "close", "dup", "sendfile", "ftruncate"]

REQUESTS: Dict[str, Tuple[bytes, bytes, bytes]] = {
    "a new user's file": (
        request(21, BACKUP, b"a", NEWER),
        response(210, b"a"),
        response(1001, b"a"),
    ),
    "a newer file": (request(11, BACKUP, b"a", NEWER), response(210, b"a"), response(1001, b"a")),
    "a newer large file": (
        request(11, BACKUP, b"large", NEWER),
        response(210, b"large"),
        response(1001, b"large"),
    ),
    "a refused file": (
        request(11, BACKUP, b"folder", NEWER),
        response(1001, b"folder"),
        response(1001, b"folder"),
    ),
    "a small file back": (
        request(11, RETRIEVE, b"a"),
        response(212, b"a", file_payload(OLDER)),
        response(1001, b"a"),
    ),
    "a large file back": (
        request(11, RETRIEVE, b"large"),
        response(212, b"large", file_payload(bytes(LARGE))),
        response(1001, b"large"),
    ),
    "no file back": (request(11, RETRIEVE, b"b"), response(1003, b"b"), response(1001, b"b")),
    "no user's file back": (
        request(21, RETRIEVE, b"a"),
        response(1003, b"a"),
        response(1001, b"a"),
    ),
    "a removal": (request(11, DELETE, b"a"), response(211, b"a"), response(1002, b"a")),
    "a large removal": (
        request(11, DELETE, b"large"),
        response(211, b"large"),
        response(1002, b"large"),
    ),
    "a list": (request(11, LIST), response(212, b"", b"\2\0\0\0\1\0a\5\0large"), response(1001)),
}


class Disk:
    """Counts one kind of call in the store, and lets one of them fail."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.count = self.failing = self.code = 0
        self.watching = False
        self._root = str(root)
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args, **named: self._do(real, call, args, named))

    def _do(self, real: Any, call: str, arguments: Any, named: Any) -> Any:
        if not self.watching or not self._concerns(arguments):
            return real(*arguments, **named)
        self.count += 1
        if self.count == self.failing:
            if call == "close":  # the descriptor is gone all the same
                real(*arguments, **named)
            raise OSError(self.code, os.strerror(self.code))
        return real(*arguments, **named)

    def _concerns(self, arguments: Any) -> bool:
        for argument in arguments[:2]:
            if isinstance(argument, int):
                with suppress(OSError):
                    path = os.readlink(f"/proc/self/fd/{argument}")
                    if path.startswith(self._root):
                        return True
            elif os.fsdecode(argument).startswith(self._root) or argument in (b"a", b"large"):
                return True
        return False


def until_idle(server: RunningServer) -> None:
    """Returns when no connection is open and nothing waits for another turn."""
    idle = threading.Event()

    def look() -> None:
        busy = server.server._sessions or server.server._settling
        server.server._reactor.call(look) if busy else idle.set()

    server.server._reactor.call(look)
    assert idle.wait(WAIT_SECONDS)


def prepare(root: Path) -> None:
    for user_id in (b"11", b"21"):
        shutil.rmtree(root / user_id.decode(), ignore_errors=True)
    (root / "11").mkdir()
    (root / "11" / "a").write_bytes(OLDER)
    (root / "11" / "large").write_bytes(bytes(LARGE))
    (root / "11" / "folder").mkdir()


@pytest.mark.parametrize("fsync", [True, False], ids=["durable", "not durable"])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_of_the_disk_may_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, fsync: bool
) -> None:
    settings = Settings(fsync=fsync, reclaim_bytes=100_000, write_back_bytes=4096)
    with RunningServer(tmp_path / "store", settings) as server:
        broken = Disk(server.root, monkeypatch, call)
        for data, success, failure in REQUESTS.values():
            place, calls = 0, 0  # the first run only counts
            while place <= calls:
                prepare(server.root)
                before = len(server.lines)
                broken.count, broken.failing = 0, place
                # sendfile(2) says only this of a file; what else it says is about the client.
                broken.code = errno.EIO if call == "sendfile" else CODES[(place + fsync) % 5]
                broken.watching = True
                answer = ask(server.address, data)
                until_idle(server)
                broken.watching = False
                calls = max(calls, broken.count) if place else broken.count
                hit = 0 < place <= broken.count
                lines = server.lines[before:]
                about = [line for line in lines if line.startswith("user=")]
                assert len(about) == 1, lines
                assert not any("Traceback" in line for line in lines), lines
                assert len(lines) <= 2, lines
                if answer != success:  # or was broken off in the middle of the file
                    assert hit
                    assert answer == failure or success.startswith(answer)
                    assert about[0].endswith("reason=store")
                if hit and call == "unlink" and server.temporary():
                    assert server.server._store.sweep() == 1  # as the next start does
                check_whole(server, data, answer, success)
                place += 1
        assert ask(server.address, request(31, LIST)) == EMPTY_LIST


def check_whole(server: RunningServer, data: bytes, answer: bytes, success: bytes) -> None:
    """Every name is one whole file; what was acknowledged is there; nothing is left behind."""
    assert server.temporary() == []
    a, large = server.root / "11" / "a", server.root / "11" / "large"
    for path, older in ((a, OLDER), (large, bytes(LARGE))):
        if path.exists():
            assert path.read_bytes() in (older, NEWER)
    if answer == success and data[5] == BACKUP and success[1:3] != b"\xe9\x03":
        user_id = int.from_bytes(data[:4], "little")
        name = data[8 : 8 + data[6]].decode()
        assert (server.root / str(user_id) / name).read_bytes() == NEWER
    if data[5] in (RETRIEVE, LIST):
        assert a.read_bytes() == OLDER


# What becomes something else


def lines_of(server: RunningServer, user_id: int, before: int) -> List[str]:
    """The lines about this user's requests since; what else was said is one warning a request."""
    assert ask(server.address, request(31, LIST)) == EMPTY_LIST  # then the others' are written
    lines = [line for line in server.lines[before:] if not line.startswith("user=31 ")]
    about = [line for line in lines if line.startswith("user=")]
    assert len(lines) - len(about) <= len(about)
    return [line for line in about if line.startswith(f"user={user_id} ")]


def asked_in_trouble(address: Tuple[str, int]) -> List[bytes]:
    """The answers to one request of each operation for user 11."""
    requests = [
        request(11, BACKUP, b"b", NEWER),
        request(11, RETRIEVE, b"a"),
        request(11, DELETE, b"a"),
        request(11, LIST),
    ]
    return [ask(address, data) for data in requests]


REFUSED = [response(1001, b"b"), response(1001, b"a"), response(1002, b"a"), response(1001)]


def test_a_root_that_goes_and_comes_back_is_served_again(server: RunningServer) -> None:
    assert ask(server.address, request(11, BACKUP, b"a", OLDER)) == response(210, b"a")
    away = server.root.with_name("away")
    with connect(server.address) as sock, connect(server.address) as whole:
        data = request(11, BACKUP, b"a", NEWER)
        for under_way in (sock, whole):
            under_way.sendall(data[:-1])
        assert ask(server.address, request(31, LIST)) == EMPTY_LIST
        before = len(server.lines)
        server.root.rename(away)
        assert asked_in_trouble(server.address) == REFUSED
        sock.sendall(data[-1:])  # an upload that was under way
        assert read_all(sock) == response(1001, b"a")
        away.rename(server.root)
        assert len(lines_of(server, 11, before)) == len(REFUSED) + 1
        whole.sendall(data[-1:])  # for this one it was never away
        assert read_all(whole) == response(210, b"a")
    # What could not be reached could not be removed; the next start sweeps it.
    with closing(Store(server.root)):
        pass
    assert ask(server.address, request(11, RETRIEVE, b"a")) == response(
        212, b"a", file_payload(NEWER)
    )
    assert server.temporary() == []


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_users_folder_that_becomes_something_else_leads_nowhere(
    server: RunningServer, tmp_path: Path, kind: str
) -> None:
    outside, folder = tmp_path / "outside", server.root / "11"
    outside.mkdir()
    (outside / "a").write_bytes(b"theirs")
    assert ask(server.address, request(11, BACKUP, b"a", OLDER)) == response(210, b"a")
    with connect(server.address) as sock, connect(server.address) as whole:
        data = request(11, BACKUP, b"a", NEWER)
        for under_way in (sock, whole):
            under_way.sendall(data[:-1])
        assert ask(server.address, request(31, LIST)) == EMPTY_LIST
        before = len(server.lines)
        folder.rename(server.root / "kept")
        folder.symlink_to(outside) if kind == "link" else folder.write_bytes(b"theirs")
        assert asked_in_trouble(server.address) == REFUSED
        sock.sendall(data[-1:])
        assert read_all(sock) == response(1001, b"a")
        assert server.temporary() != []  # the other upload's
        assert len(lines_of(server, 11, before)) == len(REFUSED) + 1
        assert ask(server.address, request(12, BACKUP, b"a", OLDER)) == response(210, b"a")
        folder.unlink()
        (server.root / "kept").rename(folder)
        assert (folder / "a").read_bytes() == OLDER
        whole.sendall(data[-1:])
        assert read_all(whole) == response(210, b"a")
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"a": b"theirs"}
    assert (folder / "a").read_bytes() == NEWER
    assert server.temporary() == []


# A disk that is really full


@contextmanager
def child(root: Path) -> Iterator[Tuple[subprocess.Popen[str], Tuple[str, int], List[str]]]:
    """A server in a process of its own, its address, and its log once it has ended."""
    command = [sys.executable, "-m", "backup", "serve", "--listen", "127.0.0.1:0"]
    log: List[str] = []
    with subprocess.Popen(
        [*command, "--root", str(root)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            address = ("127.0.0.1", int(process.stderr.readline().rsplit(":", 1)[1]))
            yield process, address, log
            process.terminate()
            log += process.communicate(timeout=WAIT_SECONDS)[1].splitlines()
            assert process.returncode == 0
        finally:
            process.kill()


def fill(root: Path, process: subprocess.Popen[str], address: Tuple[str, int]) -> None:
    """A file that fits, one that does not, and others afterwards."""
    too_much = bytes(2 << 20)
    assert ask(address, request(11, BACKUP, b"a", OLDER)) == response(210, b"a")
    descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
    for _ in range(3):
        assert ask(address, request(11, BACKUP, b"a", too_much)) == response(1001, b"a")
        found = response(212, b"a", file_payload(OLDER))
        assert ask(address, request(11, RETRIEVE, b"a")) == found
        assert list((root / ".tmp").iterdir()) == []
    assert ask(address, request(12, BACKUP, b"a", NEWER)) == response(210, b"a")
    with connect(address) as sock:  # all others are closed when this one is served
        sock.sendall(request(31, LIST))
        assert read_all(sock) == EMPTY_LIST
    assert len(os.listdir(f"/proc/{process.pid}/fd")) <= descriptors + 1


def check_log(log: List[str], reason: str) -> None:
    refused = [line for line in log if "status=1001" in line]
    assert len(refused) == 3
    assert all(line.endswith(" reason=store") for line in refused)
    assert sum(f"cannot write an upload: {reason};" in line for line in log) == 3
    assert not any("Traceback" in line for line in log)


def test_a_file_beyond_the_limit_of_the_system_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with child(root) as (process, address, log):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        fill(root, process, address)
    check_log(log, "file too large")


def test_a_file_beyond_the_space_of_a_small_file_system_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "small"
    root.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", str(root)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        with child(root) as (process, address, log):
            fill(root, process, address)
        check_log(log, "no space left on device")
    finally:
        subprocess.run(["umount", str(root)], check=True)


# Out of descriptors


def test_out_of_descriptors_files_are_refused_and_clients_wait_and_all_goes_on(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    with child(root) as (process, address, log), ExitStack() as stack:
        assert ask(address, request(11, BACKUP, b"a", OLDER)) == response(210, b"a")
        socks = [stack.enter_context(connect(address)) for _ in range(8)]
        held = stack.enter_context(connect(address))  # a request that is under way meanwhile
        data = request(12, BACKUP, b"a", NEWER)
        held.sendall(data[:-1])
        newest = stack.enter_context(connect(address))  # it stays, so that no descriptor is freed
        newest.sendall(request(31, LIST))
        assert read_all(newest) == EMPTY_LIST  # all have been accepted
        numbers = sorted(int(name) for name in os.listdir(f"/proc/{process.pid}/fd"))
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        free = next(number for number in range(1 << 10) if number not in numbers)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (free, hard))
        # A file that cannot be opened, to be written or to be read.
        for number, sock in enumerate(socks):
            if number % 2:
                sock.sendall(request(11, RETRIEVE, b"a"))
                assert read_all(sock) == response(1001, b"a")
            else:
                sock.sendall(request(11, BACKUP, b"b", NEWER))
                assert read_all(sock) == response(1001, b"b")
        # Sockets that cannot be accepted. Those that were are still open here, and so over there.
        waiting = [stack.enter_context(connect(address)) for _ in range(20)]
        for sock in waiting:
            sock.sendall(request(11, RETRIEVE, b"a"))
        assert process.stderr is not None
        said: List[str] = []
        while not any("cannot accept: Too many open files" in line for line in said):
            said.append(process.stderr.readline())
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        found = response(212, b"a", file_payload(OLDER))
        assert [read_all(sock) for sock in waiting] == [found] * len(waiting)
        held.sendall(data[-1:])
        assert read_all(held) == response(210, b"a")
        assert ask(address, request(11, BACKUP, b"b", NEWER)) == response(210, b"b")
    lines = [*said, *log]
    refused = [line for line in lines if "status=1001" in line]
    assert len(refused) == 8
    assert all("reason=store" in line for line in refused)
    assert not any("Traceback" in line for line in lines)
    assert list((root / ".tmp").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_listener_that_rests_neither_spins_nor_drops_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    failures = rests = 0
    accept, listen_again = socket.socket.accept, Server._listen_again

    def failing(sock: socket.socket) -> Any:
        nonlocal failures
        if rests < 5:
            failures += 1
            raise OSError(code, os.strerror(code))
        return accept(sock)

    def counted(server: Server) -> None:
        nonlocal rests
        rests += 1
        listen_again(server)

    with RunningServer(tmp_path / "store", Settings(accept_pause_seconds=0.02)) as server:
        assert ask(server.address, request(31, LIST)) == EMPTY_LIST
        monkeypatch.setattr(Server, "_listen_again", counted)
        monkeypatch.setattr(socket.socket, "accept", failing)
        with ExitStack() as stack:
            socks = [stack.enter_context(connect(server.address)) for _ in range(10)]
            for sock in socks:
                sock.sendall(request(31, LIST))
            assert [read_all(sock) for sock in socks] == [EMPTY_LIST] * len(socks)
    assert failures == 5, "one for each pause: more would be a loop that spins"
    # Nor is the log filled while that lasts.
    assert sum(line.startswith("cannot accept") for line in server.lines) == 1
