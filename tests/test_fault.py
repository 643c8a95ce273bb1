"""A fault of this program ends one connection, said with its traceback; all others go on.

The faults are planted in the rooms themselves, as a slip of the pen would be, and meet a real
server. One that comes out of no connection ends the server, with everything closed.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import pytest

from backup import cli, disk
from backup.client import Client
from backup.connection import Connection
from backup.errors import BackupError, InternalError
from backup.exchange import Delete, Exchange
from backup.exchange import Listing as ListJob
from backup.fault import describe
from backup.listing import Listing
from backup.log import Line, Log
from backup.protocol import RequestReceiver
from backup.reactor import Reactor
from backup.server import Server
from backup.session import Session, StoredBody
from backup.settings import Settings
from backup.storage import Store
from backup.stream import Stream
from backup.upload import Upload
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
LARGE = 3_000_000  # bytes, more than is read at once or held by both sockets
SMALL = Settings(listing_names=2)  # a listing in several steps


class Bug(Exception):
    """What no room of the program knows."""


class Plant(NamedTuple):
    """A fault planted in ``holder``, and the request that meets it."""

    holder: Any
    name: str
    data: bytes
    answer: bytes
    status: str
    """In the line of the log; nothing if there is none."""
    after: bool = False
    """Whether the fault comes when the method has done its work."""


def plant(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, after: bool = False) -> None:
    """Makes a method raise, once."""
    real = getattr(holder, name)
    faults = [Bug("a slip of the pen")]

    def failing(*arguments: Any, **named: Any) -> Any:
        if faults and not after:
            raise faults.pop()
        result = real(*arguments, **named)
        if faults:
            raise faults.pop()
        return result

    monkeypatch.setattr(holder, name, failing)


def until_alone(server: RunningServer) -> None:
    """Returns when only one connection is open."""
    alone = threading.Event()

    def look() -> None:
        if len(server.server._sessions) == 1:
            alone.set()
        else:
            server.server._reactor.call(look)

    server.server._reactor.call(look)
    assert alone.wait(WAIT_SECONDS)


def tracebacks(lines: Sequence[str]) -> int:
    return sum(line == "| Traceback (most recent call last):" for line in lines)


UP = request(11, BACKUP, b"a", b"xyz")
UP_LARGE = request(11, BACKUP, b"a", bytes(LARGE))
FAILED = response(1001, b"a")
STORED = response(210, b"a")

PLANTS: Dict[str, Plant] = {
    "the receiver": Plant(RequestReceiver, "feed", UP, b"", ""),
    "a part": Plant(Session, "_begin", UP, b"", ""),
    "the beginning": Plant(Store, "begin", UP, FAILED, "1001"),
    "a file that was made": Plant(Upload, "claim", UP, FAILED, "1001"),
    "a write": Plant(Upload, "write", UP_LARGE, FAILED, "1001"),
    "a write that was done": Plant(Upload, "write", UP_LARGE, FAILED, "1001", after=True),
    "a piece of an upload": Plant(Session, "step", UP_LARGE, FAILED, "1001"),
    "write-back": Plant(disk, "start_write_back", UP, FAILED, "1001"),
    "fsync": Plant(disk, "sync", UP, FAILED, "1001"),
    "the rename": Plant(disk.DescriptorFolder, "take", UP, FAILED, "1001"),
    "fsync of the folder": Plant(disk, "sync_open_folder", UP, FAILED, "1001"),
    "the end of a commit": Plant(Upload, "close", UP, FAILED, "1001"),
    "what the commit has led to": Plant(Session, "committed", UP, FAILED, "1001"),
    "the sending": Plant(Stream, "send", UP, FAILED, "1001"),
    "the end of the sending": Plant(Stream, "end", UP, STORED, "210"),
    "what was sent": Plant(Session, "sent", UP, STORED, "210"),
    "the close": Plant(Session, "closed", UP, STORED, "210"),
    "the discarding": Plant(Connection, "_discard", UP, STORED, "210"),
    "a removal": Plant(
        disk.DescriptorFolder, "unlink", request(12, DELETE, b"b"), response(1002, b"b"), "1002"
    ),
    "a file to be read": Plant(
        Store, "open", request(12, RETRIEVE, b"b"), response(1001, b"b"), "1001"
    ),
    "a file that is open": Plant(
        Session, "_answer", request(12, RETRIEVE, b"c"), response(1001, b"c"), "1001"
    ),
    "the fields of a file": Plant(
        Stream, "send", request(12, RETRIEVE, b"c"), response(1001, b"c"), "1001"
    ),
    "a listing": Plant(Store, "list", request(12, LIST), response(1001), "1001"),
    "a listing's step": Plant(Session, "step", request(12, LIST), response(1001), "1001"),
    "a listing's sort": Plant(Listing, "_sort", request(12, LIST), response(1001), "1001"),
}


@pytest.mark.parametrize("what", PLANTS)
def test_a_fault_ends_its_connection_with_1001_and_all_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    fault = PLANTS[what]
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 64 * 1024)
    with ExitStack() as stack:
        server = stack.enter_context(RunningServer(tmp_path / "store", SMALL))
        older = request(11, BACKUP, b"a", b"older")
        assert ask(server.address, older) == STORED
        for name in (b"b", b"c", b"d", b"e"):
            content = bytes(LARGE) if name == b"c" else b"xyz"
            assert ask(server.address, request(12, BACKUP, name, content)) == response(210, name)
        other = stack.enter_context(connect(server.address))
        other.sendall(request(13, BACKUP, b"other", b"xyz")[:-1])
        assert ask(server.address, request(14, LIST)) == EMPTY_LIST  # the other has been accepted
        until_alone(server)
        before = len(server.lines)
        plant(monkeypatch, fault.holder, fault.name, fault.after)
        assert ask(server.address, fault.data) == fault.answer
        other.sendall(b"z")
        assert read_all(other) == response(210, b"other")
        assert ask(server.address, UP) == STORED
        assert ask(server.address, request(12, RETRIEVE, b"b")) in (
            response(212, b"b", file_payload(b"xyz")),
            response(1003, b"b"),
        )
    lines = server.lines[before:]
    assert tracebacks(lines) == 1
    assert sum(line == "| tests.test_fault.Bug: a slip of the pen" for line in lines) == 1
    told = [line for line in lines if line.startswith("a fault of this program ends a connection")]
    assert len(told) == 1
    peer = told[0].split()[-1]
    (line,) = [line for line in lines if line != told[0] and f" {peer} " in f"{line} "]
    assert " reason=bug" in line or fault.answer == STORED
    assert (f" status={fault.status} " in line) == bool(fault.status)


def test_one_change_of_a_batch_that_meets_a_fault_fails_alone(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = disk.DescriptorFolder.take

    def failing(folder: disk.Folder, path: bytes, name: bytes) -> None:
        if name == b"1":
            raise Bug("a slip of the pen")
        take(folder, path, name)  # type: ignore[arg-type]

    monkeypatch.setattr(disk.DescriptorFolder, "take", failing)
    with ExitStack() as stack:
        socks = [stack.enter_context(connect(server.address)) for _ in range(3)]
        assert ask(server.address, request(11, LIST)) == EMPTY_LIST  # all have been accepted

        def send() -> None:  # in one call of the loop's, so that they are served in one turn
            for number, sock in enumerate(socks):
                sock.sendall(request(11, BACKUP, b"%d" % number, b"xyz"))

        server.server._reactor.call(send)
        answers = [read_all(sock) for sock in socks]
    assert answers == [response(210, b"0"), response(1001, b"1"), response(210, b"2")]
    assert server.stored(11) == ["0", "2"]
    assert server.temporary() == []


def test_a_folder_whose_fsync_meets_a_fault_has_made_none_of_its_changes_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    uploads = [store.begin(11, name) for name in (b"a", b"b")]
    plant(monkeypatch, disk, "sync_open_folder")
    results = store.commit(uploads)
    assert [type(result) for result in results] == [InternalError, InternalError]
    store.close()


def test_a_fault_when_part_of_the_answer_has_left_closes_at_once(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = response(212, b"a", file_payload(bytes(LARGE)))
    assert ask(server.address, UP_LARGE) == STORED
    plant(monkeypatch, StoredBody, "send", after=True)
    answer = ask(server.address, request(11, RETRIEVE, b"a"))
    assert len(answer) < len(found)
    assert found.startswith(answer)
    assert server.wait_for_line(lambda line: line.endswith("reason=bug")).startswith(
        "user=11 op=200 file=a status=212 "
    )
    assert ask(server.address, request(11, RETRIEVE, b"a")) == found
    assert tracebacks(server.lines) == 1


def test_a_fault_in_the_refusal_of_a_fault_closes(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, Store, "begin")
    plant(monkeypatch, Session, "refuse")
    assert ask(server.address, UP) == b""
    plant(monkeypatch, Session, "_write")
    send = Stream.send

    def failing(stream: Stream, *arguments: Any) -> Any:
        if not server.server._closed and stream.peer in bad:
            raise Bug("never sends")
        return send(stream, *arguments)

    monkeypatch.setattr(Stream, "send", failing)
    with connect(server.address) as sock:
        host, port = sock.getsockname()
        bad = {f"{host}:{port}"}
        sock.sendall(UP)
        assert read_all(sock) == b""
    server.stop()
    assert sum(line.startswith("a fault of this program") for line in server.lines) == 4
    assert server.temporary() == []


def test_what_ends_a_program_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "begin", interrupted)
    lines: List[Line] = []
    server = Server(tmp_path / "store", ("127.0.0.1", 0), log=Log(lines.extend))
    with connect(server.address) as sock:
        sock.sendall(UP)
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()
        assert read_all(sock) == b""
    assert tracebacks([line.text for line in lines]) == 0


ELSEWHERE = [
    (Server, "_accept"),
    (Server, "_connection"),
    (Server, "_settle"),
    (Server, "closed"),
    (Server, "failed"),
    (Store, "commit"),
    (Reactor, "turn"),
    (Log, "add"),
    (Log, "flush"),
]


@pytest.mark.parametrize(("holder", "name"), ELSEWHERE)
def test_a_fault_of_the_server_itself_ends_it_with_everything_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str
) -> None:
    early = name == "_accept"  # which is handed to the reactor at once
    if early:
        plant(monkeypatch, holder, name)
    server = Server(tmp_path / "store", ("127.0.0.1", 0), log=Log(lambda _: None))
    with connect(server.address) as other, connect(server.address) as sock:
        other.sendall(UP[:-1])
        sock.sendall(UP)
        sock.shutdown(socket.SHUT_WR)  # so that its connection is closed after the answer
        if name == "failed":
            plant(monkeypatch, Store, "begin")
        if not early:
            plant(monkeypatch, holder, name)
        with pytest.raises(Bug):
            server.serve_forever()
        with suppress(ConnectionResetError):  # it may not have been accepted
            assert read_all(other) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(server.address)
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


PROGRAM = r"""
import sys
from backup import cli, session, server, storage

def slip(*arguments):
    raise TypeError("a slip \x1b[31m of the\n[SERVER] pen")

{}
sys.exit(cli.main(sys.argv[1:]))
"""


def run_program(
    tmp_path: Path, planted: str, use: Callable[[Any], None], ends: bool = True
) -> subprocess.CompletedProcess[str]:
    """A server in a process of its own, with a fault, which ``ends`` by itself or is ended."""
    command = [sys.executable, "-c", PROGRAM.format(planted), "serve", "--listen", "127.0.0.1:0"]
    child = subprocess.Popen(
        [*command, "--root", str(tmp_path / "store")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    )
    with child:
        try:
            assert child.stderr is not None
            first = child.stderr.readline()
            use(("127.0.0.1", int(first.rsplit(":", 1)[1])))
            if not ends:
                child.terminate()
            _, errors = child.communicate(timeout=WAIT_SECONDS)
        finally:
            child.kill()
    return subprocess.CompletedProcess(command, child.returncode, "", errors)


def test_a_servers_process_survives_a_fault_in_a_connection(tmp_path: Path) -> None:
    def use(address: Any) -> None:
        assert ask(address, UP) == FAILED
        assert ask(address, request(11, LIST)) == EMPTY_LIST

    done = run_program(tmp_path, "storage.Store.begin = slip", use, ends=False)
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert "[SERVER] | TypeError: a slip \\x1b[31m of the" in lines
    assert "[SERVER] | [SERVER] pen" in lines  # which forges no line
    assert "status=1001" in done.stderr
    assert lines[-1] == "[SERVER] Stopped"


def test_a_servers_process_exits_with_1_after_a_fault_of_its_own(tmp_path: Path) -> None:
    def use(address: Any) -> None:
        assert ask(address, UP) == b""

    done = run_program(tmp_path, "storage.Store.commit = slip", use)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "[SERVER] a fault of this program ends the server" in lines
    assert "[SERVER] | Traceback (most recent call last):" in lines
    assert "[SERVER] | TypeError: a slip \\x1b[31m of the" in lines
    assert all(line.startswith("[SERVER] ") for line in lines)
    assert list((tmp_path / "store" / ".tmp").iterdir()) == []


def test_a_servers_process_exits_with_1_when_its_log_is_at_fault(tmp_path: Path) -> None:
    def use(address: Any) -> None:
        ask(address, UP)

    planted = (
        "from backup.log import Log\n"
        "flush = Log.flush\n"
        "Log.flush = lambda log: slip() if any('user' in line.fields for line in log._lines)"
        " else flush(log)"
    )
    done = run_program(tmp_path, planted, use)
    assert done.returncode == 1
    assert "backup: | TypeError: a slip \\x1b[31m of the" in done.stderr.splitlines()


# The client


def test_a_fault_in_a_client_surfaces_to_its_caller_and_leaves_nothing_open(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(server.address, UP)
    with Client(server.address, 11) as client:
        plant(monkeypatch, Exchange, "take")
        with pytest.raises(Bug, match="a slip of the pen"):
            client.retrieve("a", tmp_path / "a")
        assert not client.busy
        assert list(tmp_path.glob("a*")) == []
        client.retrieve("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"xyz"


def test_a_fault_in_one_of_many_jobs_ends_the_run(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(server.address, 11) as client:
        plant(monkeypatch, Exchange, "take")
        with pytest.raises(Bug):
            list(client.run([ListJob(), Delete("a"), ListJob()]))
        assert not client.busy


def test_a_fault_of_the_command_line_is_a_traceback_that_is_safe_to_print(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def slip(*_: object) -> None:
        raise TypeError("a \x1b[31m slip")

    monkeypatch.setattr(Client, "list", slip)
    monkeypatch.setattr(Client, "run", slip)
    host, port = server.address
    code = cli.main(["list", "--server", f"{host}:{port}", "--user-id", "1"])
    assert code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "backup: a fault of this program; please report it"
    assert lines[-1] == "backup: | TypeError: a \\x1b[31m slip"


# What is said of it


def caught(raise_it: Callable[[], None]) -> Exception:
    try:
        raise_it()
    except Exception as fault:
        return fault
    raise AssertionError("it raises nothing")


def fail(fault: BaseException) -> None:
    raise fault


def test_a_traceback_is_told_line_by_line_and_marked() -> None:
    lines = describe("what", caught(lambda: fail(Bug("one\ntwo \u202e \x1b[2J \r\\"))))
    assert lines[:2] == ["what", "| Traceback (most recent call last):"]
    assert lines[-2:] == ["| tests.test_fault.Bug: one", "| two \\u202e \\x1b[2J \\x0d\\\\"]
    assert any("in fail" in line for line in lines)


def test_a_traceback_has_an_end() -> None:
    lines = describe("what", caught(lambda: fail(Bug("x" * 100_000 + "\n" * 5000 + "end"))))
    assert len(lines) == 202
    assert lines[1] == "| …"
    assert lines[-1] == "| end"
    long = describe("what", caught(lambda: fail(Bug("x" * 100_000))))
    assert max(map(len, long)) < 600


def test_a_fault_that_cannot_say_what_it_is_is_told_by_its_name() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemError

    lines = describe("what", caught(lambda: fail(Mute())))
    assert "Mute" in lines[-1]


def test_an_internal_error_says_nothing_that_a_peer_chose() -> None:
    error: BackupError = InternalError(TypeError("\x1b[31m"))
    assert str(error) == "a fault of this program (TypeError); please report it"
