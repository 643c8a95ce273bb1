"""The client against a real server, and against hostile ones that send what they like.

Every way in which an answer fails ends in one typed error, and then no file has
been written, changed or left behind. Many requests run side by side, no more
than they may, and whoever stops asking for outcomes stops the requests.
"""

from __future__ import annotations

import itertools
import os
import selectors
import shutil
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import pytest

from backup.client import Client, Running
from backup.errors import (
    BackupError,
    ConfigError,
    ConnectionFailed,
    CutShort,
    DeadlineMissed,
    FileChanged,
    InvalidName,
    LocalFileError,
    NotDeleted,
    NotFound,
    ProtocolError,
    Refused,
    TargetExists,
    Unreachable,
)
from backup.exchange import Backup, Delete, Job, Listing, Outcome, Retrieve, RetrieveExchange
from backup.settings import Settings
from tests.conftest import ServerFactory
from tests.helpers import WAIT_SECONDS, RunningServer, file_payload, reset, response, watchdog

USER = 11
MIB = 1 << 20
MUCH = 32 * MIB  # more than the buffers between two sockets hold

Script = Callable[[socket.socket], None]
Place = Tuple[int, int, int, str, object]  # one row of getaddrinfo

ENDED = r"the server ended inside the answer's|it closed without"


class Scripted:
    """A server that does what its scripts say: one connection a script, in their order.

    Once it has the last one, it listens no more.
    """

    def __init__(self, *scripts: Script) -> None:
        self._scripts = scripts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Tuple[str, int] = self._listener.getsockname()
        self._failures: List[BaseException] = []
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends an accept that still waits
        self._thread.join(WAIT_SECONDS)
        self._listener.close()
        assert not self._thread.is_alive(), "a connection was not closed"
        assert not self._failures

    def _serve(self) -> None:
        for number, script in enumerate(self._scripts, 1):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # the test is over
            if number == len(self._scripts):
                self._listener.close()
            with sock:
                sock.settimeout(WAIT_SECONDS)
                try:
                    script(sock)
                except Exception as failure:  # handed to the test by __exit__
                    self._failures.append(failure)


@contextmanager
def client_of(*scripts: Script, settings: Settings = Settings()) -> Iterator[Client]:
    """A client of a server that does these."""
    with Scripted(*scripts) as server, Client(server.address, USER, settings) as client:
        yield client


def take(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes."""
    data = b""
    while len(data) < count:
        piece = sock.recv(min(count - len(data), MIB))
        assert piece, "the client ended too soon"
        data += piece
    return data


def take_head(sock: socket.socket) -> int:
    """A request up to its payload; how many bytes that has."""
    _, _, op, name_length = struct.unpack("<IBBH", take(sock, 8))
    take(sock, name_length)
    return int.from_bytes(take(sock, 4), "little") if op == 100 else 0


def until_closed(sock: socket.socket) -> None:
    """Reads until the client is gone, in whatever way it goes."""
    with suppress(ConnectionError):
        while sock.recv(MIB):
            continue


def answering(data: bytes) -> Script:
    """Takes the request, sends ``data``, and ends."""

    def script(sock: socket.socket) -> None:
        take(sock, take_head(sock))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        until_closed(sock)

    return script


def resetting(data: bytes) -> Script:
    """Takes the request, sends ``data``, and breaks the connection."""

    def script(sock: socket.socket) -> None:
        take(sock, take_head(sock))
        sock.sendall(data)
        reset(sock)

    return script


def staying(data: bytes) -> Script:
    """Takes the request, sends ``data``, and waits for the client to end."""

    def script(sock: socket.socket) -> None:
        take(sock, take_head(sock))
        sock.sendall(data)
        until_closed(sock)

    return script


def deaf(data: bytes, left: threading.Event) -> Script:
    """Takes the request up to its payload, sends ``data``, and reads nothing until ``left``."""

    def script(sock: socket.socket) -> None:
        take_head(sock)
        sock.sendall(data)
        assert left.wait(WAIT_SECONDS)

    return script


class Answers:
    """A lawful answer to each of the four methods, for the name ``a``."""

    LIST = response(212, b"", b"\0\0\0\0")
    BACKUP = response(210, b"a")
    RETRIEVE = response(212, b"a", file_payload(b"new" * 1000))
    DELETE = response(211, b"a")


class Folder:
    """A client's folder: a file to send, one to overwrite, one that is not there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self.source = path / "a"
        self.source.write_bytes(b"to be sent")
        self.old = path / "old"
        self.old.write_bytes(b"old")
        self.new = path / "new"

    def content(self) -> Dict[str, bytes]:
        return {file.name: file.read_bytes() for file in self.path.iterdir()}

    def asks(self) -> Dict[str, Callable[[Client], object]]:
        """Each method of the client, as this folder uses it."""
        return {
            "LIST": lambda client: client.list(),
            "BACKUP": lambda client: client.backup(self.source),
            "RETRIEVE": lambda client: client.retrieve("a", self.new),
            "RETRIEVE over": lambda client: client.retrieve("a", self.old, overwrite=True),
            "DELETE": lambda client: client.delete("a"),
        }


METHODS = ["LIST", "BACKUP", "RETRIEVE", "RETRIEVE over", "DELETE"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "here")


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    """A client of the real server."""
    with Client(server.address, USER) as client:
        yield client


@contextmanager
def afterwards(event: threading.Event) -> Iterator[None]:
    """Sets the event at the end, however that comes."""
    try:
        yield
    finally:
        event.set()


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(size)
    os.utime(path, (1, 1))  # so that a change is seen however coarse the system's clock is
    return path


def unused_address() -> Tuple[socket.socket, Tuple[str, int]]:
    """An address where connections are refused for as long as the socket is open."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock, sock.getsockname()


def full_listener() -> Tuple[socket.socket, socket.socket]:
    """A listener that takes no further connection, and the one that fills its backlog."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    return listener, socket.create_connection(listener.getsockname())


def resolving(monkeypatch: pytest.MonkeyPatch, *places: Tuple[int, object]) -> None:
    """Makes every host name stand for these places (family and address)."""

    def getaddrinfo(*_: object, **__: object) -> List[Place]:
        return [(family, socket.SOCK_STREAM, 0, "", place) for family, place in places]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


# -- one request --------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4095, 4096, 8191, 8192, 8193, 3 * MIB + 1])
def test_what_was_backed_up_comes_back(serve: ServerFactory, folder: Folder, size: int) -> None:
    """Also where a turn's budget ends just with the file's last byte."""
    settings = Settings(turn_bytes=4096, scratch_bytes=1024) if size < MIB else Settings()
    content = os.urandom(size)
    folder.source.write_bytes(content)
    with Client(serve().address, USER, settings) as client:
        assert client.backup(folder.source) == size
        assert client.list() == ["a"]
        assert client.retrieve("a", folder.new) == size
        client.delete("a")
        assert client.list() == []
    assert folder.new.read_bytes() == content


def test_a_file_may_be_backed_up_under_another_name(
    client: Client, server: RunningServer, folder: Folder
) -> None:
    client.backup(str(folder.source), "-b c")
    assert server.stored(USER) == ["-b c"]


def test_an_empty_file_is_refused_and_the_older_one_stays(client: Client, folder: Folder) -> None:
    client.backup(folder.source)
    folder.source.write_bytes(b"")
    with pytest.raises(Refused, match=r"^a: the server refuses an empty file$"):
        client.backup(folder.source)
    client.retrieve("a", folder.new)
    assert folder.new.read_bytes() == b"to be sent"


def test_a_name_that_is_not_there_is_not_found(client: Client, folder: Folder) -> None:
    before = folder.content()
    with pytest.raises(NotFound, match=r"^a: not on the server$"):
        client.retrieve("a", folder.new)
    with pytest.raises(NotDeleted, match=r"^a: not on the server"):
        client.delete("a")
    assert folder.content() == before


def test_a_file_is_only_overwritten_on_request(client: Client, folder: Folder) -> None:
    client.backup(folder.source)
    with pytest.raises(TargetExists, match="old is there already"):
        client.retrieve("a", folder.old)
    assert folder.old.read_bytes() == b"old"
    client.retrieve("a", folder.old, overwrite=True)
    assert folder.old.read_bytes() == b"to be sent"


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb", "n" * 256])
def test_an_unlawful_name_fails_without_a_connection(folder: Folder, name: str) -> None:
    sock, address = unused_address()
    with sock, Client(address, USER) as client:
        for ask in (
            lambda: client.backup(folder.source, name),
            lambda: client.retrieve(name, folder.new),
            lambda: client.delete(name),
        ):
            with pytest.raises(InvalidName):
                ask()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("none", "cannot read .*none: no such file or directory"),
        (".", "it is a folder"),
        ("old/below", "cannot read .*below: not a directory"),
        ("a\0b", "cannot read .*: embedded null"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    client: Client, server: RunningServer, folder: Folder, path: str, text: str
) -> None:
    with pytest.raises(LocalFileError, match=text):
        client.backup(os.path.join(folder.path, path), "a")
    assert server.stored(USER) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("none/new", "cannot write .*new: no such file or directory"),
        (".", "is a folder"),
        ("old/below", "cannot write .*below: not a directory"),
        ("a\0b", "cannot write .*: embedded null"),
        ("n" * 300, "cannot write .*: file name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_named(
    client: Client, folder: Folder, path: str, text: str
) -> None:
    client.backup(folder.source)
    before = folder.content()
    with pytest.raises(LocalFileError, match=text):
        client.retrieve("a", os.path.join(folder.path, path), overwrite=True)
    assert folder.content() == before


@pytest.mark.parametrize("user_id", [-1, 2**32])
def test_a_user_id_has_32_bits(user_id: int) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 4294967295"):
        Client(("127.0.0.1", 1), user_id)


@pytest.mark.parametrize("size", [1, 3 * MIB + 1])
def test_progress_grows_up_to_the_size(client: Client, folder: Folder, size: int) -> None:
    seen: List[Tuple[Job, int, int]] = []

    def progress(job: Job, done: int, total: int) -> None:
        seen.append((job, done, total))

    sparse(folder.source, size)
    client.backup(folder.source, progress=progress)
    sent, seen = seen, []
    client.retrieve("a", folder.new, progress=progress)
    jobs: List[Job] = [Backup(folder.source, "a"), Retrieve("a", folder.new)]
    for job, reports in zip(jobs, (sent, seen)):
        done = [done for _, done, _ in reports]
        assert done == sorted(done)
        assert reports[-1] == (job, size, size)
        assert {(job, total) for job, _, total in reports} == {(job, size)}


# -- a file that changes while it is sent -------------------------------------


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, 2 * MIB)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")


@pytest.mark.parametrize("change", [grow, shrink, empty, rewrite])
def test_a_file_that_changes_meanwhile_is_not_stored(
    client: Client, server: RunningServer, folder: Folder, change: Callable[[Path], None]
) -> None:
    client.backup(folder.source)
    sparse(folder.source, 4 * MIB)
    changes = [change]

    def progress(_job: Job, _done: int, _size: int) -> None:
        while changes:
            changes.pop()(folder.source)

    with pytest.raises(FileChanged, match="changed while it was read; nothing is stored; retry"):
        client.backup(folder.source, progress=progress)
    client.retrieve("a", folder.new)
    assert folder.new.read_bytes() == b"to be sent"


@pytest.fixture
def little_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves all but the last MiB of a file that is sent to sendfile(2)."""
    monkeypatch.setattr("backup.files._COPIED_BYTES", MIB)


@pytest.mark.usefixtures("little_is_copied")
def test_a_file_of_which_most_is_sent_by_the_system_comes_back(
    client: Client, folder: Folder
) -> None:
    content = os.urandom(MIB) * 5 + b"end"
    folder.source.write_bytes(content)
    assert client.backup(folder.source) == len(content)
    assert client.retrieve("a", folder.new) == len(content)
    assert folder.new.read_bytes() == content


@pytest.mark.usefixtures("little_is_copied")
@pytest.mark.parametrize("change", [grow, shrink, empty, rewrite])
def test_a_file_that_changes_while_the_system_sends_it_is_not_stored(
    client: Client, server: RunningServer, folder: Folder, change: Callable[[Path], None]
) -> None:
    client.backup(folder.source)
    sparse(folder.source, 8 * MIB)
    changes = [change]
    sent: List[int] = []

    def progress(_job: Job, done: int, _size: int) -> None:
        sent.append(done)
        while changes:
            changes.pop()(folder.source)

    with pytest.raises(FileChanged, match="changed while it was read; nothing is stored; retry"):
        client.backup(folder.source, progress=progress)
    assert sent[0] < 7 * MIB
    client.retrieve("a", folder.new)
    assert folder.new.read_bytes() == b"to be sent"


def test_a_file_that_another_replaces_meanwhile_is_sent_as_it_was(
    client: Client, folder: Folder
) -> None:
    sparse(folder.source, 4 * MIB)

    def progress(_job: Job, _done: int, _size: int) -> None:
        if folder.old.exists():
            folder.old.replace(folder.source)

    client.backup(folder.source, progress=progress)
    client.retrieve("a", folder.new)
    assert folder.source.read_bytes() == b"old"
    assert folder.new.read_bytes() == bytes(4 * MIB)


# -- servers that do not do as they should ------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_not_whole_is_an_error_and_no_file(folder: Folder, method: str) -> None:
    answer: bytes = getattr(Answers, method.partition(" ")[0])
    lengths = sorted({0, 5, 9, len(answer) - 1} - {len(answer)})
    before = folder.content()
    scripts = [answering(answer[:length]) for length in lengths]
    with client_of(*scripts) as client:
        for _ in lengths:
            with pytest.raises(CutShort, match=ENDED):
                folder.asks()[method](client)
    assert folder.content() == before


@pytest.mark.parametrize("method", METHODS)
def test_a_connection_that_breaks_is_an_error_and_no_file(folder: Folder, method: str) -> None:
    answer: bytes = getattr(Answers, method.partition(" ")[0])
    lengths = sorted({0, 5, 9, len(answer) - 1} - {len(answer)})
    before = folder.content()
    scripts = [resetting(answer[:length]) for length in lengths]
    with client_of(*scripts) as client:
        for _ in lengths:
            with pytest.raises(ConnectionFailed, match="the connection broke"):
                folder.asks()[method](client)
    assert folder.content() == before


@pytest.mark.parametrize("method", METHODS)
def test_a_server_that_falls_silent_is_left(folder: Folder, method: str) -> None:
    answer: bytes = getattr(Answers, method.partition(" ")[0])
    before = folder.content()
    settings = Settings(idle_seconds=0.05)
    scripts = [staying(b""), staying(answer[:3]), staying(answer[:-1])]
    header_only = method in ("BACKUP", "DELETE")  # then that is its last byte
    said = ["was silent for 0.05 s; try again", "sent no whole header in 0.05 s"]
    said.append(said[1] if header_only else said[0])
    with client_of(*scripts, settings=settings) as client:
        for what in said:
            with pytest.raises(DeadlineMissed, match=what):
                folder.asks()[method](client)
    assert folder.content() == before


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_not_the_protocol_is_an_error_and_no_file(
    folder: Folder, method: str
) -> None:
    answer: bytes = getattr(Answers, method.partition(" ")[0])
    hostile = [
        b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x02" + answer[1:],
        answer + b"x",
        answer + answer,
        response(999, b"" if method == "LIST" else b"a"),
        response(212, b"b", b"\0\0\0\0"),
    ]
    before = folder.content()
    scripts = [answering(data) for data in hostile]
    with client_of(*scripts) as client:
        for _ in hostile:
            with pytest.raises(ProtocolError):
                folder.asks()[method](client)
    assert folder.content() == before


def test_a_listing_may_be_only_so_large(folder: Folder) -> None:
    settings = Settings(max_listing_bytes=10)
    answer = response(212, b"", b"\0" * 11)
    with (
        client_of(answering(answer), settings=settings) as client,
        pytest.raises(ProtocolError, match="a listing of 11 bytes, not 4 to 10"),
    ):
        client.list()


@pytest.mark.parametrize("after", [resetting, staying])
def test_a_whole_answer_counts_however_the_server_goes(
    folder: Folder, after: Callable[[bytes], Script]
) -> None:
    settings = Settings(farewell_seconds=0.05)
    script = after(Answers.RETRIEVE)
    with client_of(script, settings=settings) as client:
        assert client.retrieve("a", folder.new) == 3000
    assert folder.new.read_bytes() == b"new" * 1000


@pytest.mark.parametrize("after", [until_closed, reset])
def test_a_server_that_refuses_much_is_heard(
    folder: Folder, after: Callable[[socket.socket], None]
) -> None:
    """It answers after the header; whether it takes the rest or goes, its answer decides."""

    def script(sock: socket.socket) -> None:
        take_head(sock)
        sock.sendall(response(1001, b"a"))
        after(sock)

    sparse(folder.source, MUCH)
    with (
        client_of(script) as client,
        pytest.raises(Refused, match=r"^a: the server did not store it \(a cap, "),
    ):
        client.backup(folder.source)


def test_our_server_that_refuses_much_is_heard(
    client: Client, server: RunningServer, folder: Folder
) -> None:
    shutil.rmtree(server.root / ".tmp")
    with pytest.raises(Refused, match=r"^a: the server did not store it \(a cap, "):
        client.backup(sparse(folder.source, MUCH))


def test_a_server_that_goes_while_much_is_sent_broke_the_connection(folder: Folder) -> None:
    def script(sock: socket.socket) -> None:
        take_head(sock)
        reset(sock)

    sparse(folder.source, MUCH)
    with client_of(script) as client, pytest.raises(ConnectionFailed, match="the connection broke"):
        client.backup(folder.source)


def test_a_server_that_does_not_take_what_is_sent_is_left(folder: Folder) -> None:
    sparse(folder.source, MUCH)
    settings, left = Settings(idle_seconds=0.05), threading.Event()
    silent = pytest.raises(DeadlineMissed, match="was silent")
    with client_of(deaf(b"", left), settings=settings) as client, afterwards(left), silent:
        client.backup(folder.source)


def test_what_was_not_sent_as_a_whole_cannot_have_been_stored(folder: Folder) -> None:
    """A server that says so after the header is not believed."""
    sparse(folder.source, MUCH)
    left = threading.Event()
    script = deaf(Answers.BACKUP, left)
    with client_of(script) as client, afterwards(left), pytest.raises(ProtocolError):
        client.backup(folder.source)


# -- finding the server -------------------------------------------------------


def test_where_nothing_listens_the_message_says_what_to_do(folder: Folder) -> None:
    sock, address = unused_address()
    with sock, Client(address, USER) as client:
        for ask in folder.asks().values():
            with pytest.raises(Unreachable) as caught:
                ask(client)
            assert str(caught.value) == (
                f"cannot connect to 127.0.0.1:{address[1]}: connection refused; "
                "is it running? start it with: serve"
            )


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: object, **__: object) -> List[Place]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with (
        Client(("nosuch.example", 1), USER) as client,
        pytest.raises(Unreachable, match=r"cannot find nosuch\.example: .*check the host"),
    ):
        client.list()


def test_the_addresses_of_a_host_are_tried_in_order(
    server: RunningServer, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One family the system lacks, one that fails at once, one that refuses, then the server."""
    sock, refusing = unused_address()
    resolving(
        monkeypatch,
        (9999, ("127.0.0.1", 1)),
        (socket.AF_UNIX, str(folder.path / "none")),
        (socket.AF_INET, refusing),
        (socket.AF_INET, server.address),
    )
    with sock, Client(("several.example", 1), USER) as client:
        assert client.backup(folder.source) == len(b"to be sent")
        assert client.list() == ["a"]


def test_a_host_whose_addresses_all_fail_is_unreachable(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, refusing = unused_address()
    none = (socket.AF_UNIX, str(folder.path / "none"))
    with sock, Client(("several.example", 1), USER) as client:
        resolving(monkeypatch, (socket.AF_INET, refusing), none)
        with pytest.raises(Unreachable, match=r"cannot connect to several\.example:1: no such"):
            client.backup(folder.source)
    with Client(("several.example", 1), USER) as client:
        resolving(monkeypatch, none)
        with pytest.raises(Unreachable):
            client.backup(folder.source)


def test_a_server_that_has_answered_is_not_replaced_by_another_address(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Scripted(answering(b"")) as hostile, Client(("several.example", 1), USER) as client:
        resolving(monkeypatch, (socket.AF_INET, hostile.address), (socket.AF_INET, server.address))
        with pytest.raises(CutShort):
            client.list()


def test_an_address_that_does_not_answer_is_given_up(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, filling = full_listener()
    settings = Settings(connect_seconds=0.05)
    with listener, filling:
        deaf = listener.getsockname()
        with (
            Client(deaf, USER, settings) as client,
            pytest.raises(Unreachable, match=r"cannot connect to .*: no answer in 0\.05 s"),
        ):
            client.list()
        resolving(monkeypatch, (socket.AF_INET, deaf), (socket.AF_INET, server.address))
        with Client(("several.example", 1), USER, settings) as client:
            assert client.list() == []


# -- many requests ------------------------------------------------------------


def by_name(outcomes: Iterable[Outcome]) -> Dict[str, Outcome]:
    return {outcome.job.name: outcome for outcome in outcomes}


def test_one_failing_job_does_not_keep_the_others_from_being_done(
    client: Client, folder: Folder
) -> None:
    names = [f"file {number}" for number in range(20)]
    for number, name in enumerate(names):
        (folder.path / name).write_bytes(b"x" * (number + 1))
    (folder.path / names[7]).unlink()
    outcomes = by_name(client.run(Backup(folder.path / name, name) for name in names))
    assert sorted(outcomes) == sorted(names)
    failed = outcomes.pop(names[7])
    assert isinstance(failed.error, LocalFileError)
    assert (failed.bytes, failed.names) == (0, [])
    assert [outcome.error for outcome in outcomes.values()] == [None] * 19
    assert sum(outcome.bytes for outcome in outcomes.values()) == sum(range(1, 21)) - 8
    assert all(outcome.seconds >= 0 for outcome in outcomes.values())
    assert client.list() == sorted(outcomes)


def test_each_kind_of_job_brings_its_own(client: Client, folder: Folder) -> None:
    client.backup(folder.source)
    jobs: List[Job] = [Listing(), Retrieve("a", folder.new), Retrieve("b", folder.path / "b")]
    listed, got, missing = sorted(client.run(jobs), key=lambda outcome: jobs.index(outcome.job))
    assert (listed.error, listed.names) == (None, ["a"])
    assert (got.error, got.bytes, got.names) == (None, len(b"to be sent"), [])
    assert isinstance(missing.error, NotFound)
    (deleted,) = client.run([Delete("a")])
    assert (deleted.error, deleted.bytes) == (None, 0)


def test_jobs_may_be_for_other_users(client: Client, server: RunningServer, folder: Folder) -> None:
    jobs = [Backup(folder.source, "a", user_id) for user_id in (0, None, 2**32 - 1, 2**32)]
    outcomes = {outcome.job.user_id: outcome for outcome in client.run(jobs)}
    assert isinstance(outcomes.pop(2**32).error, ConfigError)
    assert {outcome.error for outcome in outcomes.values()} == {None}
    for user_id in (0, USER, 2**32 - 1):
        assert server.stored(user_id) == ["a"]


@pytest.mark.parametrize("parallel", [1, 3])
def test_jobs_are_read_only_as_far_as_there_is_room(client: Client, parallel: int) -> None:
    taken = 0

    def jobs() -> Iterator[Job]:
        nonlocal taken
        while taken < 20:
            taken += 1
            yield Listing()

    for ended, outcome in enumerate(client.run(jobs(), parallel)):
        assert outcome.error is None
        assert taken - ended <= parallel
    assert taken == 20


def test_jobs_may_be_endless(client: Client) -> None:
    outcomes = client.run(itertools.repeat(Listing()))
    assert [outcome.error for outcome in itertools.islice(outcomes, 20)] == [None] * 20


@pytest.mark.parametrize(("parallel", "expected"), [(3, 3), (None, 5)])
def test_as_many_are_in_flight_as_may_be(parallel: Optional[int], expected: int) -> None:
    """The server answers nobody until it has so many requests, and nobody else comes till then."""
    others: List[socket.socket] = []

    def serve_in_waves() -> None:
        for _ in range(2):
            listener.settimeout(WAIT_SECONDS)
            socks = [listener.accept()[0] for _ in range(expected)]
            listener.settimeout(0)
            with suppress(BlockingIOError):
                others.append(listener.accept()[0])
            for sock in socks:
                with sock:
                    take_head(sock)
                    sock.sendall(Answers.LIST)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve_in_waves)
        thread.start()
        with Client(listener.getsockname(), USER, Settings(parallel=5)) as client:
            outcomes = list(client.run([Listing()] * (2 * expected), parallel))
        thread.join(WAIT_SECONDS)
    assert [outcome.error for outcome in outcomes] == [None] * (2 * expected)
    assert not others


@pytest.mark.parametrize("parallel", [0, -1])
def test_no_request_in_flight_would_do_no_job(client: Client, parallel: int) -> None:
    with pytest.raises(ConfigError):
        list(client.run([Listing()], parallel))


@pytest.fixture
def slow(server: RunningServer, folder: Folder) -> Iterator[Client]:
    """A client that receives in many small turns; the server has a large file ``a`` for it."""
    with Client(server.address, USER) as client:
        client.backup(sparse(folder.path / "large", MUCH), "a")
    (folder.path / "large").unlink()
    with Client(server.address, USER, Settings(turn_bytes=4096, scratch_bytes=4096)) as client:
        yield client


def broke_off(line: str) -> bool:
    """Whether a line of the server's log is about a RETRIEVE that did not reach its end."""
    return "op=200" in line and "reason=connection" in line


def test_whoever_asks_for_no_more_outcomes_ends_the_requests(
    slow: Client, server: RunningServer, folder: Folder
) -> None:
    before = folder.content()
    outcomes = slow.run([Retrieve("a", folder.new), Listing()])
    for outcome in outcomes:
        assert outcome.names == ["a"]
        break
    assert slow.busy
    del outcomes
    assert not slow.busy
    server.wait_for_line(broke_off)
    assert folder.content() == before
    assert slow.list() == ["a"]


def test_two_runs_of_one_client_may_take_turns(client: Client) -> None:
    with watchdog():
        pairs = list(zip(client.run([Listing()] * 9, 3), client.run([Listing()] * 9, 2)))
    assert [(one.error, other.error) for one, other in pairs] == [(None, None)] * 9


def test_between_two_outcomes_the_other_jobs_may_be_driven_to_their_end(
    slow: Client, folder: Folder
) -> None:
    """As another run does, or a single request of a client that has much to do."""
    outcomes = slow.run([Retrieve("a", folder.new), Listing()])
    with watchdog():
        assert next(outcomes).names == ["a"]
        while slow.busy:
            slow.turn()
        assert [outcome.bytes for outcome in outcomes] == [MUCH]


def test_jobs_that_were_submitted_are_done_turn_by_turn(client: Client, folder: Folder) -> None:
    outcomes: List[Outcome] = []
    jobs: List[Job] = [Backup(folder.source, "a"), Delete("b"), Delete("../c"), Listing()]
    assert not client.busy
    client.turn()  # nothing to wait for, so it returns
    for job in jobs:
        client.submit(job, outcomes.append)
    assert not outcomes
    while client.busy:
        client.turn()
    errors = {outcome.job: type(outcome.error) for outcome in outcomes}
    assert errors == dict(zip(jobs, (type(None), NotDeleted, InvalidName, type(None))))


def test_a_job_that_is_cancelled_ends_with_an_error(slow: Client, folder: Folder) -> None:
    before = folder.content()
    outcomes: List[Outcome] = []
    running = slow.submit(Retrieve("a", folder.new), outcomes.append)
    running.cancel()
    running.cancel()
    assert not slow.busy
    assert [str(outcome.error) for outcome in outcomes] == ["a: cancelled"]
    assert folder.content() == before


def test_a_job_that_is_cancelled_tries_no_further_address(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, refusing = unused_address()
    resolving(monkeypatch, (socket.AF_INET, refusing), (socket.AF_INET, server.address))
    outcomes: List[Outcome] = []
    with sock, Client(("several.example", 1), USER) as client:
        client.submit(Listing(), outcomes.append).cancel()
        assert not client.busy
    assert [str(outcome.error) for outcome in outcomes] == ["cancelled"]


@pytest.mark.parametrize("size", [1, 2 * MIB])
def test_a_job_may_be_cancelled_from_its_progress(
    client: Client, folder: Folder, size: int
) -> None:
    client.backup(sparse(folder.source, size))
    before = folder.content()
    jobs: List[Job] = [Backup(folder.source, "a"), Retrieve("a", folder.new)]
    for job in jobs:
        outcomes: List[Outcome] = []
        running: List[Running] = []

        def cancel(_job: Job, _done: int, _size: int, running: List[Running] = running) -> None:
            running[0].cancel()

        running.append(client.submit(job, outcomes.append, cancel))
        while client.busy:
            client.turn()
        assert [str(outcome.error) for outcome in outcomes] == ["a: cancelled"]
    assert folder.content() == before


def test_closing_ends_what_is_running(slow: Client, folder: Folder) -> None:
    before = folder.content()
    outcomes: List[Outcome] = []
    seen: List[int] = []

    def progress(_job: Job, done: int, _size: int) -> None:
        seen.append(done)

    slow.submit(Retrieve("a", folder.new), outcomes.append, progress)
    while not seen:
        slow.turn()
    assert folder.content() != before
    slow.close()
    assert [str(outcome.error) for outcome in outcomes] == ["a: cancelled"]
    assert folder.content() == before


def test_a_closed_client_says_so(client: Client, folder: Folder) -> None:
    client.close()
    client.close()
    for ask in folder.asks().values():
        with pytest.raises(BackupError, match="closed"):
            ask(client)
    with pytest.raises(BackupError, match="closed"):
        list(client.run([Listing()]))


# -- an interrupt in the middle ------------------------------------------------


def interrupt(_job: Job, done: int, size: int) -> None:
    """The first progress is far from the end; then the user has enough."""
    assert done < size
    raise KeyboardInterrupt


def test_an_interrupted_retrieve_leaves_nothing(
    slow: Client, server: RunningServer, folder: Folder
) -> None:
    before = folder.content()
    with pytest.raises(KeyboardInterrupt):
        slow.retrieve("a", folder.old, overwrite=True, progress=interrupt)
    assert folder.content() == before
    server.wait_for_line(broke_off)
    assert slow.list() == ["a"]


def test_an_interrupted_backup_leaves_the_older_file(
    client: Client, server: RunningServer, folder: Folder
) -> None:
    client.backup(folder.source)
    sparse(folder.source, MUCH)
    with pytest.raises(KeyboardInterrupt):
        client.backup(folder.source, progress=interrupt)
    server.wait_for_line(lambda line: "op=100" in line and "reason=cut" in line)
    assert not server.temporary()
    client.retrieve("a", folder.new)
    assert folder.new.read_bytes() == b"to be sent"


def test_an_interrupt_while_a_connection_is_closed_leaves_nothing_open(
    client: Client, server: RunningServer, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was received is in its place or gone, but not beside it."""
    client.backup(folder.source)
    unregister = selectors.DefaultSelector.unregister

    def interrupted(selector: selectors.DefaultSelector, sock: socket.socket) -> None:
        unregister(selector, sock)
        if threading.current_thread() is threading.main_thread():  # not the server's
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(selectors.DefaultSelector, "unregister", interrupted)
    with Client(server.address, USER) as another, pytest.raises(KeyboardInterrupt):
        another.retrieve("a", folder.new)
    assert set(folder.content()) <= {"a", "old", "new"}


def test_an_interrupt_while_what_was_received_takes_its_name_leaves_nothing_beside_it(
    client: Client, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.backup(folder.source)
    before = folder.content()

    def interrupted(_: RetrieveExchange) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RetrieveExchange, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.retrieve("a", folder.new)
    assert folder.content() == before


def test_an_interrupted_run_leaves_nothing(
    slow: Client, server: RunningServer, folder: Folder
) -> None:
    before = folder.content()
    jobs = [Retrieve("a", folder.path / f"new {number}") for number in range(20)]
    with pytest.raises(KeyboardInterrupt):
        list(slow.run(jobs, progress=interrupt))
    assert not slow.busy
    assert folder.content() == before
