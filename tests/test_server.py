"""The server around its sessions: listening, accepting, committing, draining, the log.

What the operations do and answer is in ``test_session``; how the whole stands
up to hostile clients and to many at once is in ``test_resilience``.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest

from backup.connection import Connection, Later, Outgoing
from backup.errors import BackupError, ListenFailed, StoreFailed, Unreachable
from backup.log import Line, Log
from backup.protocol import Part
from backup.reactor import Reactor
from backup.server import Server, _room_for_connections, raise_descriptor_limit
from backup.session import Session
from backup.settings import Settings
from backup.storage import Change, Store
from backup.stream import Stream
from backup.upload import Upload
from tests.conftest import ServerFactory
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
UPLOAD = request(11, BACKUP, b"a", b"0123456789")
LONG = 10 * WAIT_SECONDS
"""Longer than a test would wait: what takes effect within a test was not this deadline."""


def loopbacks() -> List[str]:
    """The loopback addresses of this machine."""
    found = ["127.0.0.1"]
    with suppress(OSError), socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::1", 0))
        found.append("::1")
    return found


def settle(server: RunningServer) -> None:
    """Returns when the server has taken all that was sent to it before.

    It accepts in order, and what was there when it accepted is read in the same turn.
    """
    assert ask(server.address, request(2**32 - 1, LIST)) == EMPTY_LIST


@contextmanager
def serving(server: Server) -> Iterator[None]:
    """Serves in a thread of its own meanwhile."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        server.stop()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the server did not stop"


def begin_upload(server: RunningServer, data: bytes = UPLOAD[:-5]) -> socket.socket:
    """A connection with an upload that is under way; the default lacks its last five bytes."""
    sock = connect(server.address)
    sock.sendall(data)
    settle(server)
    return sock


def peer(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def refuse(code: int) -> Callable[..., Any]:
    """Stands in for a call that the system refuses."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# Made and unmade


@pytest.mark.parametrize("host", loopbacks())
def test_it_listens_when_the_constructor_returns(tmp_path: Path, host: str) -> None:
    with Server(tmp_path, (host, 0)) as server:
        assert server.address[0] == host
        assert server.address[1] > 0
        connect(server.address).close()
    with pytest.raises(ConnectionRefusedError):
        connect(server.address)


def test_closing_it_twice_is_closing_it_once(tmp_path: Path) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0))
    server.close()
    server.close()


@pytest.mark.parametrize("host", loopbacks())
def test_it_serves_and_logs_both_kinds_of_addresses(tmp_path: Path, host: str) -> None:
    lines: List[str] = []
    log = Log(lambda new: lines.extend(line.text for line in new))
    server = Server(tmp_path, (host, 0), log=log)
    with serving(server):
        assert ask(server.address, UPLOAD) == response(210, b"a")
    shown = f"[{host}]" if ":" in host else host
    assert lines[0] == f"Listening on {shown}:{server.address[1]}"
    assert f" peer={shown}:" in lines[1]
    assert lines[-1] == "Stopped"


def test_it_can_be_turned_by_hand_on_a_clock_of_ones_own(tmp_path: Path) -> None:
    seconds = 0.0
    settings = Settings(header_seconds=5.0)
    server = Server(tmp_path, ("127.0.0.1", 0), settings, clock=lambda: seconds)
    with server, connect(server.address) as served, connect(server.address) as silent:
        served.sendall(UPLOAD)
        served.setblocking(False)
        silent.setblocking(False)
        answer: Optional[bytes] = None
        while answer is None:  # a turn waits until there is something to do
            server.turn()
            with suppress(BlockingIOError):
                answer = served.recv(100)
        assert answer == response(210, b"a")
        os.write(server.wake_fd, b"\0")
        server.turn()
        with pytest.raises(BlockingIOError):
            silent.recv(100)
        seconds = settings.header_seconds
        server.turn()
        silent.settimeout(WAIT_SECONDS)
        assert silent.recv(100) == b""


def test_a_port_that_is_taken_is_refused_with_a_hint(tmp_path: Path) -> None:
    with Server(tmp_path / "one", ("127.0.0.1", 0)) as server:
        with pytest.raises(ListenFailed) as caught:
            Server(tmp_path / "two", server.address)
        port = server.address[1]
    assert str(caught.value) == (
        f"cannot listen on 127.0.0.1:{port}: address already in use;"
        " stop what listens there or take another port: --listen HOST:PORT"
    )
    assert not (tmp_path / "two").exists()


def test_a_port_is_free_again_as_soon_as_its_server_has_stopped(server: RunningServer) -> None:
    # The server ends first, so that the system remembers the connection for a while.
    assert ask(server.address, request(11, LIST)) == EMPTY_LIST
    server.stop()
    with Server(server.root, server.address) as again:
        assert again.address == server.address


@pytest.mark.parametrize("code", [errno.EADDRNOTAVAIL, errno.EACCES])
def test_an_address_that_cannot_be_had_is_not_blamed_on_another_listener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(socket.socket, "bind", refuse(code))
    with pytest.raises(ListenFailed) as caught:
        Server(tmp_path, ("127.0.0.1", 1))
    text = str(caught.value)
    assert text.startswith(f"cannot listen on 127.0.0.1:1: {os.strerror(code).lower()}; ")
    assert "stop what listens there" not in text


def test_an_address_family_the_system_lacks_is_a_listen_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", refuse(errno.EAFNOSUPPORT))
    with pytest.raises(ListenFailed, match="address family not supported"):
        Server(tmp_path, ("127.0.0.1", 0))


def test_a_host_nobody_knows_is_unreachable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable, match="Name or service not known; check the host name"):
        Server(tmp_path, ("nowhere.example", 0))


@pytest.mark.parametrize("below", ["", "below"])
def test_a_root_that_is_or_lies_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(StoreFailed, match="cannot keep files"):
        Server(tmp_path / "file" / below, ("127.0.0.1", 0))
    assert (tmp_path / "file").read_bytes() == b"not a folder"


def test_a_root_no_path_can_spell_leaves_nothing_open(tmp_path: Path) -> None:
    with pytest.raises((BackupError, ValueError)):
        Server(f"{tmp_path}/\0", ("127.0.0.1", 0))


def test_a_server_that_finds_no_descriptors_for_its_loop_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socketpair", refuse(errno.EMFILE))
    with pytest.raises(BackupError, match=r"[Tt]oo many open files"):
        Server(tmp_path, ("127.0.0.1", 0))


def test_where_reusing_an_address_would_share_it_the_port_is_taken_exclusively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_options: List[Tuple[int, int]] = []

    class Recording(socket.socket):
        def setsockopt(self, level: int, option: int, value: int) -> None:  # type: ignore[override]
            set_options.append((option, value))
            super().setsockopt(level, option, value)

    monkeypatch.setattr(socket, "socket", Recording)
    # An option that is there and harmless, in place of one that only Windows has.
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    Server(tmp_path, ("127.0.0.1", 0)).close()
    assert (socket.SO_KEEPALIVE, 1) in set_options
    assert socket.SO_REUSEADDR not in dict(set_options)


def test_closing_a_server_that_is_not_serving_ends_its_connections(tmp_path: Path) -> None:
    with ExitStack() as clients:
        with Server(tmp_path, ("127.0.0.1", 0)) as server:
            client = clients.enter_context(connect(server.address))
        with pytest.raises(ConnectionResetError):
            client.recv(1)


# Serving


def test_a_file_goes_up_and_comes_back(server: RunningServer) -> None:
    assert ask(server.address, UPLOAD) == response(210, b"a")
    found = response(212, b"a", file_payload(b"0123456789"))
    assert ask(server.address, request(11, RETRIEVE, b"a")) == found
    assert ask(server.address, request(11, DELETE, b"a")) == response(211, b"a")
    assert ask(server.address, request(11, LIST)) == EMPTY_LIST
    assert server.stored(11) == []


def ask_in_one_turn(server: Server, requests: List[bytes]) -> List[bytes]:
    """The answers to requests that are all there before the server begins to serve."""
    with ExitStack() as clients:
        socks = [clients.enter_context(connect(server.address)) for _ in requests]
        for sock, data in zip(socks, requests):
            sock.sendall(data)
        with serving(server):
            return [read_all(sock) for sock in socks]


def test_changes_that_are_whole_in_one_turn_are_answered_in_it(tmp_path: Path) -> None:
    turns: List[List[str]] = []
    log = Log(lambda lines: turns.append([line.text for line in lines]))
    server = Server(tmp_path, ("127.0.0.1", 0), log=log)
    names = [b"a", b"b", b"c"]
    answers = ask_in_one_turn(server, [request(11, BACKUP, name, b"xyz") for name in names])
    assert answers == [response(210, name) for name in names]
    expected = [f"user=11 op=100 file={name.decode()}" for name in names]
    assert [text.split(" status=")[0] for text in turns[1]] == expected
    assert sorted(os.listdir(tmp_path / "11")) == ["a", "b", "c"]


def test_one_turns_changes_take_effect_in_order_and_the_failed_one_fails_alone(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0))
    (tmp_path / "12").write_bytes(b"not a folder")
    requests = [
        request(11, DELETE, b"a"),
        request(11, BACKUP, b"a", b"older"),
        request(12, BACKUP, b"a", b"xyz"),
        request(11, BACKUP, b"a", b"newer"),
        request(13, BACKUP, b"b", b"xyz"),
        request(13, DELETE, b"b"),
    ]
    assert ask_in_one_turn(server, requests) == [
        response(1002, b"a"),
        response(210, b"a"),
        response(1001, b"a"),
        response(210, b"a"),
        response(210, b"b"),
        response(211, b"b"),
    ]
    assert (tmp_path / "11" / "a").read_bytes() == b"newer"
    assert os.listdir(tmp_path / "13") == []
    assert os.listdir(tmp_path / ".tmp") == []


def test_an_upload_whose_deadline_passes_in_the_turn_that_completes_it_is_all_or_nothing(
    serve: ServerFactory,
) -> None:
    server = serve(Settings(header_seconds=LONG, idle_seconds=0.0))
    with connect(server.address) as sock:
        settle(server)
        sock.sendall(UPLOAD)
        answer = read_all(sock)
    assert answer == (response(210, b"a") if server.stored(11) else b"")
    assert ask(server.address, request(12, LIST)) == EMPTY_LIST


def test_two_servers_share_one_root(serve: ServerFactory) -> None:
    one = serve()
    with begin_upload(one) as sock:
        two = serve()  # sweeps what crashes left, but not what the first one is writing
        assert len(one.temporary()) == 1
        assert ask(two.address, request(11, BACKUP, b"b", b"xyz")) == response(210, b"b")
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
    for server in (one, two):
        listing = ask(server.address, request(11, LIST))
        assert listing == response(212, b"", b"\2\0\0\0\1\0a\1\0b")
    found = response(212, b"a", file_payload(b"0123456789"))
    assert ask(two.address, request(11, RETRIEVE, b"a")) == found
    assert ask(two.address, request(11, DELETE, b"a")) == response(211, b"a")
    assert ask(one.address, request(11, RETRIEVE, b"a")) == response(1003, b"a")


# What is put off to a turn's end, and what is left for the next.


class Diary:
    """What the server does, in order, each turn in a list of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.turns: List[List[str]] = [[]]
        self.before_commit: Callable[[Sequence[Change]], None] = lambda _: None
        self.before_step: Callable[[Session], None] = lambda _: None
        self._patch = monkeypatch
        turn, commit, step, send = Reactor.turn, Store.commit, Session.step, Stream.send

        def turning(reactor: Reactor) -> None:
            self.turns.append([])
            turn(reactor)

        def committing(store: Store, changes: Sequence[Change]) -> List[Optional[BackupError]]:
            if changes:
                self.note(f"commit {len(changes)}")
                self.before_commit(changes)
            return commit(store, changes)

        def stepping(session: Session) -> Union[Outgoing, Later, None]:
            self.note("step")
            self.before_step(session)
            return step(session)

        def sending(
            stream: Stream, data: Union[bytes, memoryview], more: bool = False
        ) -> Optional[int]:
            self.note("send")
            return send(stream, data, more)

        monkeypatch.setattr(Reactor, "turn", turning)
        monkeypatch.setattr(Store, "commit", committing)
        monkeypatch.setattr(Session, "step", stepping)
        monkeypatch.setattr(Stream, "send", sending)

    def note(self, what: str) -> None:
        self.turns[-1].append(what)

    def of(self, *kinds: str) -> List[List[str]]:
        """What was done of these kinds, turn by turn; turns without any are left out."""
        turns = [[what for what in turn if what.startswith(kinds)] for turn in self.turns]
        return [turn for turn in turns if turn]


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    return Diary(monkeypatch)


def uploads(count: int) -> List[bytes]:
    return [request(11, BACKUP, b"%d" % number, b"xyz") for number in range(count)]


def fill(root: Path, count: int, user_id: int = 11) -> bytes:
    """Makes so many files of a user; the answer to a LIST of them."""
    folder = root / str(user_id)
    folder.mkdir(parents=True)
    names = [b"%02d" % number for number in range(count)]
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(b"xyz")
    payload = bytes([count, 0, 0, 0]) + b"".join(b"\2\0" + name for name in names)
    return response(212, b"", payload)


def test_more_changes_than_are_committed_at_once_wait_for_the_next_turns(
    tmp_path: Path, diary: Diary
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(commit_files=2))
    answers = ask_in_one_turn(server, uploads(5))
    assert answers == [response(210, b"%d" % number) for number in range(5)]
    assert diary.of("commit") == [["commit 2"], ["commit 2"], ["commit 1"]]
    assert sorted(os.listdir(tmp_path / "11")) == ["0", "1", "2", "3", "4"]


def test_changes_that_fit_into_one_commit_are_committed_in_one(
    tmp_path: Path, diary: Diary
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(commit_files=5))
    ask_in_one_turn(server, uploads(5))
    assert diary.of("commit") == [["commit 5"]]


@pytest.mark.parametrize(
    ("sizes", "commits"),
    [
        ([50, 50], ["commit 2"]),
        ([50, 51], ["commit 1", "commit 1"]),
        ([40, 40, 40, 40, 40], ["commit 2", "commit 2", "commit 1"]),
        ([500, 1, 500], ["commit 1", "commit 1", "commit 1"]),  # at least one
        ([0, 90, 0, 0, 11, 0], ["commit 4", "commit 2"]),  # a removal has no bytes
    ],
)
def test_changes_that_are_many_bytes_together_are_committed_in_several_turns(
    tmp_path: Path,
    diary: Diary,
    monkeypatch: pytest.MonkeyPatch,
    sizes: List[int],
    commits: List[str],
) -> None:
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 100)
    server = Server(tmp_path, ("127.0.0.1", 0))
    requests = [
        request(11, BACKUP, b"a", bytes(size)) if size else request(11, DELETE, b"b")
        for size in sizes
    ]
    answers = ask_in_one_turn(server, requests)
    assert answers == [response(210, b"a") if size else response(1002, b"b") for size in sizes]
    assert diary.of("commit") == [[commit] for commit in commits]


def test_where_nothing_waits_for_the_disk_bytes_do_not_bound_a_commit(
    tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 1)
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(fsync=False))
    ask_in_one_turn(server, uploads(5))
    assert diary.of("commit") == [["commit 5"]]


@pytest.mark.parametrize("first", ["BACKUP", "RETRIEVE"])
def test_answers_that_are_ready_leave_before_the_turns_commit(
    tmp_path: Path, diary: Diary, first: str
) -> None:
    fill(tmp_path, 1)
    server = Server(tmp_path, ("127.0.0.1", 0))
    requests = [request(11, RETRIEVE, b"00"), *uploads(1), request(11, RETRIEVE, b"00")]
    ask_in_one_turn(server, requests[first == "BACKUP" :])
    ready = 1 if first == "BACKUP" else 2
    assert diary.of("send", "commit") == [["send"] * ready + ["commit 1", "send"]]


def test_answers_that_are_ready_leave_before_the_turns_steps(tmp_path: Path, diary: Diary) -> None:
    fill(tmp_path, 3)
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(listing_names=3))
    ask_in_one_turn(server, [request(11, LIST), request(11, RETRIEVE, b"00")])
    assert diary.of("send", "step")[0][:2] == ["send", "step"]


def slow_steps(server: Server, diary: Diary, seconds: float) -> None:
    """Makes each step take so long, by the server's clock."""
    taken = [0.0]

    def work(_: Session) -> None:
        taken[0] += seconds

    diary.before_step = work
    began = time.monotonic()
    server._reactor.now = lambda: began + taken[0]


@pytest.mark.parametrize(
    ("seconds", "steps"),
    [
        (0.0, [32]),  # two listings: each five steps more to read, six to sort, five to encode
        (0.1875, [2] * 16),
        (0.25, [1] * 32),
        (1.0, [1] * 32),
    ],
)
def test_pieces_of_work_fill_a_turn_only_so_far(
    tmp_path: Path, diary: Diary, seconds: float, steps: List[int]
) -> None:
    expected = [fill(tmp_path, 10, user_id) for user_id in (11, 12)]
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(listing_names=2, turn_seconds=0.25))
    slow_steps(server, diary, seconds)
    requests = [request(user_id, LIST) for user_id in (11, 12)]
    assert ask_in_one_turn(server, requests) == expected
    assert [len(turn) for turn in diary.of("step")] == steps


def test_commits_that_take_long_leave_as_much_time_for_other_work(
    tmp_path: Path, diary: Diary
) -> None:
    expected = fill(tmp_path, 10, 12)
    settings = Settings(commit_files=1, listing_names=2, turn_seconds=0.25)
    server = Server(tmp_path, ("127.0.0.1", 0), settings)
    slow_steps(server, diary, 0.25)
    work = diary.before_step
    diary.before_commit = lambda _: [work(session) for session in [None] * 3]  # type: ignore
    answers = ask_in_one_turn(server, [*uploads(4), request(12, LIST)])
    assert answers == [*(response(210, b"%d" % number) for number in range(4)), expected]
    both = [turn for turn in diary.of("commit", "step") if "commit 1" in turn]
    assert both == [["commit 1", "step", "step", "step"]] * 4


def test_those_whose_work_was_put_off_take_turns(tmp_path: Path, diary: Diary) -> None:
    users = (11, 12, 13)
    expected = [fill(tmp_path, 10, user_id) for user_id in users]
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(listing_names=2))
    seen: List[Session] = []
    diary.before_step = seen.append
    assert ask_in_one_turn(server, [request(user_id, LIST) for user_id in users]) == expected
    one, two, three = seen[:3]
    assert len({id(one), id(two), id(three)}) == 3
    assert seen == [one, two, three] * (len(seen) // 3)


def test_while_a_listing_is_read_others_are_served(tmp_path: Path, diary: Diary) -> None:
    expected = fill(tmp_path, 30)
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(listing_names=2))
    slow_steps(server, diary, 0.1)
    work = diary.before_step
    with connect(server.address) as sock, connect(server.address) as other:
        waiting = [request(12, BACKUP, b"a", b"xyz"), b""]

        def ask_meanwhile(session: Session) -> None:
            work(session)
            if waiting:
                other.sendall(waiting.pop())  # not at the first step, when it may not be accepted

        diary.before_step = ask_meanwhile
        sock.sendall(request(11, LIST))
        with serving(server):
            assert read_all(other) == response(210, b"a")
            assert read_all(sock) == expected
    done = [what for turn in diary.turns for what in turn]
    answered = done.index("send")
    assert 2 <= done[:answered].count("step") <= 4
    assert done[answered:].count("step") > 20


def close_of(server: Server, session: Session) -> None:
    """Closes the connection of a session, as if it had broken."""
    (connection,) = [one for one, of in server._sessions.items() if of is session]
    connection.close()


def test_an_upload_whose_connection_is_closed_while_it_waits_is_forgotten(
    tmp_path: Path, diary: Diary
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(commit_files=1))

    def close_the_others(changes: Sequence[Change]) -> None:
        for session in list(server._sessions.values()):
            if session.change is not None and session.change is not changes[0]:
                close_of(server, session)

    diary.before_commit = close_the_others
    assert ask_in_one_turn(server, uploads(3)) == [response(210, b"0"), b"", b""]
    assert diary.of("commit") == [["commit 1"]]
    assert os.listdir(tmp_path / "11") == ["0"]
    assert os.listdir(tmp_path / ".tmp") == []


def test_a_listing_whose_connection_is_closed_while_it_waits_is_forgotten(
    tmp_path: Path, diary: Diary
) -> None:
    users = (11, 12, 13)
    expected = [fill(tmp_path, 2, user_id) for user_id in users]
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(listing_names=2))
    stepped: List[Session] = []

    def close_the_others(session: Session) -> None:
        stepped.append(session)
        for other in list(server._sessions.values()):
            if other is not session:
                close_of(server, other)

    diary.before_step = close_the_others
    requests = [request(user_id, LIST) for user_id in users]
    assert ask_in_one_turn(server, requests) == [expected[0], b"", b""]
    assert len({id(session) for session in stepped}) == 1


def test_a_long_upload_gets_to_the_disk_piece_by_piece(
    tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 64 << 10)
    settings = Settings(write_back_bytes=64 << 10, sync_bytes=64 << 10, scratch_bytes=64 << 10)
    sizes: List[int] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        if "/.tmp/" in os.readlink(f"/proc/self/fd/{fd}"):
            sizes.append(os.fstat(fd).st_size)
        fsync(fd)

    server = Server(tmp_path, ("127.0.0.1", 0), settings)
    content = os.urandom(1 << 20)
    monkeypatch.setattr(os, "fsync", note)
    with serving(server):
        assert ask(server.address, request(11, BACKUP, b"a", content)) == response(210, b"a")
    assert (tmp_path / "11" / "a").read_bytes() == content
    assert sum(turn.count("step") for turn in diary.turns) == len(sizes) - 1
    assert sizes[-1] == 1 << 20  # the rest is for its commit to wait for
    pieces = [after - before for before, after in zip([0, *sizes], sizes)]
    assert all(64 << 10 <= piece < 128 << 10 for piece in pieces[:-1])
    assert pieces[-1] < 128 << 10


def test_an_upload_whose_piece_does_not_get_to_the_disk_is_answered_with_1001(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 64 << 10)
    server = Server(tmp_path, ("127.0.0.1", 0))
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with serving(server):
        data = request(11, BACKUP, b"a", bytes(1 << 20))
        assert ask(server.address, data) == response(1001, b"a")
    assert not (tmp_path / "11").exists()
    assert os.listdir(tmp_path / ".tmp") == []


def test_an_interrupt_in_the_middle_of_a_turn_leaves_no_users_folder_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, 1)
    server = Server(tmp_path, ("127.0.0.1", 0))
    take = Session.take
    taken: List[Session] = []

    def interrupted(session: Session, part: Part) -> Union[Outgoing, Later, None]:
        taken.append(session)
        if session is not taken[0]:
            raise KeyboardInterrupt
        return take(session, part)

    monkeypatch.setattr(Session, "take", interrupted)
    with connect(server.address) as one, connect(server.address) as two:
        one.sendall(request(11, LIST))
        two.sendall(request(11, LIST))
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()


# Accepting


def test_no_more_are_accepted_in_a_turn_than_may_be_and_all_before_the_first_is_served(
    tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(accepts_per_turn=2))
    accept, start = socket.socket.accept, Connection.start

    def accepting(sock: socket.socket) -> Tuple[socket.socket, Any]:
        accepted = accept(sock)
        diary.note("accept")
        return accepted

    def starting(connection: Connection) -> None:
        diary.note("start")
        start(connection)

    monkeypatch.setattr(socket.socket, "accept", accepting)
    monkeypatch.setattr(Connection, "start", starting)
    assert ask_in_one_turn(server, [request(11, LIST)] * 5) == [EMPTY_LIST] * 5
    two = ["accept"] * 2 + ["start"] * 2
    # A server that is told to stop starts again whatever has not ended.
    assert diary.of("accept", "start")[:3] == [two, two, ["accept", "start"]]


@pytest.mark.parametrize(
    ("limit", "in_use", "expected"),
    [
        (20_000, 10, 14_917),
        (1_048_576, 10, 786_349),
        (1_024, 10, 685),
        (282, 10, 128),  # below 256 for connections and files, each connection may have a file
        (280, 10, 127),
        (100, 10, 37),
        (28, 10, 1),
        (20, 10, 1),  # there is always one
        (1, 10, 1),
        (256, 100, 70),
    ],
)
def test_some_descriptors_are_left_for_files_and_folders(
    monkeypatch: pytest.MonkeyPatch, limit: int, in_use: int, expected: int
) -> None:
    limit_descriptors(monkeypatch, limit)
    assert _room_for_connections(in_use) == expected


def test_without_a_limit_of_descriptors_there_is_room_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_descriptors(monkeypatch, resource.RLIM_INFINITY)
    assert _room_for_connections(10) == sys.maxsize
    monkeypatch.setattr("backup.server.resource", None)
    assert _room_for_connections(10) == sys.maxsize


def fail_accept(monkeypatch: pytest.MonkeyPatch, codes: List[int]) -> None:
    """Makes as many calls of ``accept`` fail, with these errors."""
    accept = socket.socket.accept

    def failing(sock: socket.socket) -> Tuple[socket.socket, Any]:
        if codes:
            code = codes.pop(0)
            raise OSError(code, os.strerror(code))
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", failing)


@pytest.mark.parametrize(
    "code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EINVAL]
)
def test_a_system_that_lacks_something_lets_the_listener_rest(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    server = serve(Settings(accept_pause_seconds=0.01))
    fail_accept(monkeypatch, [code, code])
    assert ask(server.address, UPLOAD) == response(210, b"a")
    expected = f"cannot accept: {os.strerror(code)}; trying again every 0.01 s"
    assert expected in server.lines


def test_while_the_listener_rests_nobody_is_accepted_and_others_are_served(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(Settings(accept_pause_seconds=LONG))
    with begin_upload(server) as sock:
        fail_accept(monkeypatch, [errno.EMFILE])
        with connect(server.address) as waiting:
            waiting.sendall(request(11, LIST))
            server.wait_for_line(lambda line: line.startswith("cannot accept"))
            sock.sendall(UPLOAD[-5:])
            assert read_all(sock) == response(210, b"a")
            waiting.setblocking(False)
            with pytest.raises(BlockingIOError):
                waiting.recv(1)
    assert sum(line.startswith("cannot accept") for line in server.lines) == 1


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPROTO])
def test_a_connection_that_was_gone_before_it_was_accepted_delays_nobody(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    server = serve(Settings(accept_pause_seconds=LONG))
    fail_accept(monkeypatch, [code, code])
    assert ask(server.address, UPLOAD) == response(210, b"a")
    assert not any(line.startswith("cannot accept") for line in server.lines)


def test_a_listener_that_rests_stays_closed_when_the_server_is_stopped(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(Settings(accept_pause_seconds=0.01, drain_seconds=0.1))
    with begin_upload(server):
        fail_accept(monkeypatch, [errno.EMFILE] * 1_000_000)
        with connect(server.address):
            server.wait_for_line(lambda line: line.startswith("cannot accept"))
            server.server.stop()
            server.join()  # the pause has passed meanwhile
    assert "Stopped" in server.lines


def limit_descriptors(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, resource.RLIM_INFINITY))


def leave_room(monkeypatch: pytest.MonkeyPatch, connections: int) -> None:
    """Lets the next server have so many connections: two descriptors each, and some to spare."""
    with socket.socket() as newest:
        limit_descriptors(monkeypatch, newest.fileno() + 16 + 2 * connections)


def test_connections_beyond_what_descriptors_can_serve_wait_until_others_are_closed(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_room(monkeypatch, 2)
    server = serve()
    with connect(server.address) as one, connect(server.address) as two:
        one.sendall(UPLOAD)
        two.sendall(UPLOAD[:-5])
        assert read_all(one) == response(210, b"a")
        with connect(server.address) as waiting:
            waiting.sendall(request(11, LIST))
            two.sendall(UPLOAD[-5:])
            assert read_all(two) == response(210, b"a")
            waiting.setblocking(False)
            with pytest.raises(BlockingIOError):  # both have their answers, but stay
                waiting.recv(1)
            waiting.settimeout(WAIT_SECONDS)
            one.close()
            assert read_all(waiting) == response(212, b"", b"\1\0\0\0\1\0a")


def test_a_full_server_that_is_stopped_takes_nobody_new(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_room(monkeypatch, 2)
    server = serve(Settings(drain_seconds=LONG, farewell_seconds=LONG))
    with begin_upload(server) as sock, connect(server.address) as stays:
        with connect(server.address) as waiting:
            stays.sendall(request(11, LIST))
            assert read_all(stays) == EMPTY_LIST
            server.server.stop()
            with pytest.raises(ConnectionResetError):
                waiting.recv(1)
        stays.close()
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
    server.join()


@pytest.mark.parametrize("limit", [1, 16, 20])
def test_a_server_with_hardly_a_descriptor_serves_one_connection_at_a_time(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    limit_descriptors(monkeypatch, limit)
    server = serve()
    for _ in range(3):
        assert ask(server.address, UPLOAD) == response(210, b"a")


def test_where_descriptors_have_no_limit_connections_have_none(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_descriptors(monkeypatch, resource.RLIM_INFINITY)
    server = serve()
    with ExitStack() as clients:
        socks = [clients.enter_context(begin_upload(server)) for _ in range(40)]
        for sock in socks:
            sock.sendall(UPLOAD[-5:])
            assert read_all(sock) == response(210, b"a")


def test_it_serves_where_the_limit_cannot_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: the module is loaded anew, and finds no ``resource``."""
    monkeypatch.setitem(sys.modules, "resource", None)
    path = ROOT / "backup" / "server.py"
    spec = importlib.util.spec_from_file_location("backup.server_without_resource", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.resource is None
    server: Server = module.Server(tmp_path, ("127.0.0.1", 0))
    with serving(server):
        assert ask(server.address, UPLOAD) == response(210, b"a")


def test_the_limit_of_descriptors_is_raised_as_far_as_it_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: List[Tuple[int, Tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    raise_descriptor_limit()
    assert limits == [(resource.RLIMIT_NOFILE, (4096, 4096))]


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "no"), ValueError("not infinite")])
def test_a_limit_of_descriptors_that_cannot_be_raised_stays(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr(resource, "setrlimit", refused)
    raise_descriptor_limit()
    monkeypatch.setattr("backup.server.resource", None)
    raise_descriptor_limit()


LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has used, in ticks of the system's clock."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def test_out_of_descriptors_connections_wait_and_are_then_served(tmp_path: Path) -> None:
    serve = ["-m", "backup", "serve", "--listen", "127.0.0.1:0", "--root", str(tmp_path / "store")]
    command = [sys.executable, "-c", LIMITED, "40", *serve]
    with ExitStack() as stack:
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        stack.enter_context(child)
        stack.callback(child.terminate)
        assert child.stderr is not None
        port = int(child.stderr.readline().rsplit(b":", 1)[1])
        names = [b"%d" % number for number in range(100)]
        socks = [stack.enter_context(connect(("127.0.0.1", port))) for _ in names]
        last = stack.enter_context(connect(("127.0.0.1", port)))
        last.sendall(request(11, LIST))
        before = cpu_ticks(child.pid)
        last.settimeout(0.5)
        with pytest.raises(socket.timeout):
            last.recv(1)  # it is neither answered nor dropped
        last.settimeout(WAIT_SECONDS)
        assert cpu_ticks(child.pid) - before < 0.1 * os.sysconf("SC_CLK_TCK"), "it spins"
        answers: Dict[bytes, bytes] = {}
        for sock, name in zip(socks, names):
            sock.sendall(request(11, BACKUP, name, b"xyz"))
            answers[name] = read_all(sock)
            sock.close()
        assert read_all(last).startswith(response(212)[:3])
    assert answers == {name: response(210, name) for name in names}


# Stopping


def test_a_server_without_connections_stops_at_once(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG))
    server.server.stop()
    server.join()
    assert server.lines[0] == f"Listening on 127.0.0.1:{server.address[1]}"
    assert server.lines[1].startswith("Counters open=0 total=0 refused=0 bytes_in=0 bytes_out=0 ")
    assert server.lines[2:] == ["Stopped"]


@pytest.mark.parametrize("times", [1, 2])
def test_a_server_that_was_stopped_before_it_serves_does_not_serve(
    tmp_path: Path, times: int
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0))
    for _ in range(times):
        server.stop()
    server.serve_forever()
    with pytest.raises(ConnectionRefusedError):
        connect(server.address)


def test_stopping_a_server_that_has_stopped_does_nothing(serve: ServerFactory) -> None:
    server = serve()
    server.stop()
    before = server.lines
    server.server.stop()
    server.server.close()
    assert server.lines == before


def test_a_signal_handler_may_stop_it(tmp_path: Path) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0))
    before = signal.signal(signal.SIGALRM, lambda *_: server.stop())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        server.serve_forever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ConnectionRefusedError):
        connect(server.address)


def test_a_byte_on_its_wake_descriptor_ends_the_waiting(tmp_path: Path) -> None:
    written: Queue[str] = Queue()

    def sink(lines: Sequence[Line]) -> None:
        for line in lines:
            written.put(line.text)

    log = Log(sink)
    server = Server(tmp_path, ("127.0.0.1", 0), log=log)
    with serving(server):
        assert written.get(timeout=WAIT_SECONDS).startswith("Listening")
        log.add(logging.INFO, "kept")  # it is written at the beginning of the next turn
        os.write(server.wake_fd, b"\0")
        assert written.get(timeout=WAIT_SECONDS) == "kept"


def test_a_stop_that_comes_while_the_loop_wakes_up_is_not_lost(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive = socket.socket.recv
    stops = [server.server.stop]

    def stopped_meanwhile(sock: socket.socket, size: int) -> bytes:
        while stops:
            stops.pop()()
        return receive(sock, size)

    server.wait_for_line(lambda line: line.startswith("Listening"))
    monkeypatch.setattr(socket.socket, "recv", stopped_meanwhile)
    os.write(server.server.wake_fd, b"\0")  # the loop takes this byte, and that of stop with it
    server.join()


def test_an_upload_under_way_is_finished_and_acknowledged_after_stop(
    serve: ServerFactory,
) -> None:
    server = serve(Settings(drain_seconds=LONG))
    with begin_upload(server) as sock:
        server.server.stop()
        server.wait_for_line(lambda line: line.startswith("Stopping"))
        with pytest.raises(ConnectionRefusedError):
            connect(server.address)
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
    server.join()
    assert (server.root / "11" / "a").read_bytes() == b"0123456789"
    assert server.lines[-1] == "Stopped"
    assert not any("cut off" in line for line in server.lines)


def test_a_retrieve_under_way_is_finished_after_stop(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG))
    content = os.urandom(1 << 20) * 16  # more than the buffers of both sockets hold
    assert ask(server.address, request(11, BACKUP, b"a", content)) == response(210, b"a")
    with connect(server.address) as sock:
        sock.sendall(request(11, RETRIEVE, b"a"))
        settle(server)
        server.server.stop()
        server.wait_for_line(lambda line: line.startswith("Stopping"))
        assert read_all(sock) == response(212, b"a", file_payload(content))
    server.join()


def test_a_connection_that_has_asked_nothing_yet_is_closed_by_stop(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG))
    with connect(server.address) as idle, begin_upload(server) as sock:
        server.server.stop()
        assert idle.recv(1) == b""
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
    server.join()


def test_a_server_with_nothing_but_idle_connections_stops_at_once(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG))
    with connect(server.address) as idle:
        settle(server)
        server.server.stop()
        assert idle.recv(1) == b""
        server.join()
    assert not any(line.startswith("Stopping") for line in server.lines)


def test_clients_that_have_gone_do_not_hold_up_stop(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG, linger_seconds=LONG, farewell_seconds=LONG))
    assert ask(server.address, UPLOAD) == response(210, b"a")
    assert ask(server.address, UPLOAD + b"more") == response(210, b"a")
    assert ask(server.address, UPLOAD, end=True) == response(210, b"a")
    assert ask(server.address, UPLOAD[:-1], end=True) == response(1001, b"a")
    server.server.stop()
    server.join()


def test_a_client_that_stays_after_its_answer_does_not_hold_up_stop(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG, linger_seconds=LONG, farewell_seconds=0.05))
    with connect(server.address) as sock:
        sock.sendall(UPLOAD)
        assert read_all(sock) == response(210, b"a")
        server.server.stop()
        server.join()
    assert not any("cut off" in line for line in server.lines)


def test_a_client_that_stays_after_an_answer_during_the_drain_was_not_cut_off(
    serve: ServerFactory,
) -> None:
    server = serve(Settings(drain_seconds=1.0, linger_seconds=LONG, farewell_seconds=0.05))
    with begin_upload(server) as sock:
        server.server.stop()
        server.wait_for_line(lambda line: line.startswith("Stopping"))
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
        server.join()
    assert not any("cut off" in line for line in server.lines)


def test_a_second_stop_does_not_wait(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG))
    assert ask(server.address, request(11, BACKUP, b"a", b"older")) == response(210, b"a")
    with begin_upload(server) as sock:
        assert len(server.temporary()) == 1
        server.server.stop()
        server.wait_for_line(lambda line: line.startswith("Stopping"))
        server.server.stop()
        server.join()
        assert read_all(sock) == b""
        line = f"user=11 op=100 file=a status=- bytes=5 ms=[0-9.]+ peer={peer(sock)}"
    assert server.temporary() == []
    assert (server.root / "11" / "a").read_bytes() == b"older"
    assert any(re.fullmatch(line, text) for text in server.lines)


def test_a_stalled_upload_is_cut_off_when_the_drain_is_over(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=0.05))
    assert ask(server.address, request(11, BACKUP, b"a", b"older")) == response(210, b"a")
    with begin_upload(server) as sock:
        server.server.stop()
        server.join()
        assert read_all(sock) == b""
    assert server.temporary() == []
    assert (server.root / "11" / "a").read_bytes() == b"older"
    assert "Stopping; running requests: 1, which have up to 0.05 s" in server.lines
    assert "requests that were cut off: 1" in server.lines
    assert server.lines[-1] == "Stopped"


# The log


def test_without_a_log_lines_go_to_the_module_logging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="backup")
    server = Server(tmp_path, ("127.0.0.1", 0))
    server.stop()
    server.serve_forever()
    listening = ("backup", logging.INFO, f"Listening on 127.0.0.1:{server.address[1]}")
    assert caplog.record_tuples[0] == listening


def test_each_request_has_one_line_with_its_client(server: RunningServer) -> None:
    with connect(server.address) as sock:
        sock.sendall(UPLOAD)
        assert read_all(sock) == response(210, b"a")
        server.wait_for_line(lambda text: text.startswith("user="))
        pattern = rf"user=11 op=100 file=a status=210 bytes=10 ms=[0-9]+\.[0-9] peer={peer(sock)}"
    assert re.fullmatch(pattern, server.lines[1])
    assert len(server.lines) == 2


def test_a_log_that_fails_hard_ends_the_server_and_leaves_nothing_open(tmp_path: Path) -> None:
    def sink(lines: Sequence[Line]) -> None:
        if any(line.text.startswith("user=") for line in lines):
            raise RuntimeError("a fault of the sink")

    server = Server(tmp_path, ("127.0.0.1", 0), log=Log(sink))
    with connect(server.address) as stalled, connect(server.address) as sock:
        stalled.sendall(UPLOAD[:-1])
        sock.sendall(request(11, LIST))
        with pytest.raises(RuntimeError, match="a fault of the sink"):
            server.serve_forever()
        assert read_all(sock) == EMPTY_LIST
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_a_request_that_has_arrived_when_the_server_stops_is_served(server: RunningServer) -> None:
    with connect(server.address) as sock:
        settle(server)  # it is accepted, and has asked nothing

        def ask_and_stop() -> None:
            sock.sendall(UPLOAD)
            server.server._stop()

        # In one call of the loop's, so that the request is there and not read yet.
        server.server._reactor.call(ask_and_stop)
        assert read_all(sock) == response(210, b"a")
    server.join()


def test_a_full_server_says_once_why_others_wait(
    serve: ServerFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_room(monkeypatch, 1)
    server = serve()
    for _ in range(3):
        with connect(server.address) as one, connect(server.address) as other:
            one.sendall(UPLOAD)
            assert read_all(one) == response(210, b"a")
            one.close()
            other.sendall(UPLOAD)
            assert read_all(other) == response(210, b"a")
    told = [line for line in server.lines if "others wait" in line]
    assert told == ["1 connections are all that are served at once; others wait"]


def test_a_client_that_stays_holds_up_no_drain_once_it_has_its_answer(serve: ServerFactory) -> None:
    server = serve(Settings(drain_seconds=LONG, linger_seconds=LONG, farewell_seconds=0.05))
    with begin_upload(server) as sock:
        server.server.stop()
        server.wait_for_line(lambda line: line.startswith("Stopping"))
        sock.sendall(UPLOAD[-5:])
        assert read_all(sock) == response(210, b"a")
        server.join()


# What nobody foresaw, and who is one too many


@pytest.mark.parametrize(
    ("holder", "name", "data", "answer"),
    [
        (Store, "begin", UPLOAD, response(1001, b"a")),
        (Upload, "settle", UPLOAD, response(1001, b"a")),
        (Session, "committed", UPLOAD, response(1001, b"a")),
        (Session, "step", request(12, LIST), response(1001, b"")),
    ],
    ids=["while it is received", "in the commit", "after the commit", "in a step"],
)
def test_a_fault_ends_one_connection_with_a_traceback_and_an_answer(
    serve: ServerFactory,
    monkeypatch: pytest.MonkeyPatch,
    holder: type,
    name: str,
    data: bytes,
    answer: bytes,
) -> None:
    server = serve(Settings(listing_names=2))
    (server.root / "12").mkdir()
    for number in range(5):
        (server.root / "12" / str(number)).touch()

    def fault(*_: object) -> None:
        raise LookupError("a slip of the pen")

    with begin_upload(server, request(13, BACKUP, b"b", b"", size=3)) as other:
        with monkeypatch.context() as patch:
            patch.setattr(holder, name, fault)
            assert ask(server.address, data) == answer
        other.sendall(b"xyz")
        assert read_all(other) == response(210, b"b")
    server.wait_for_line(lambda line: "reason=bug" in line and "status=1001" in line)
    assert any("ends a connection peer=127.0.0.1:" in line for line in server.lines)
    assert any("LookupError: a slip of the pen" in line for line in server.lines)


def test_an_address_has_as_many_connections_as_it_may_and_another_after_one_has_gone(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path, ("127.0.0.1", 0), Settings(max_connections_per_address=2), Log(print))
    with serving(server), ExitStack() as stack:
        socks = [stack.enter_context(connect(server.address)) for _ in range(2)]
        for _ in range(3):
            with connect(server.address) as refused:
                assert refused.recv(1) == b""
        for sock in socks:
            sock.sendall(request(11, LIST))
            assert read_all(sock) == EMPTY_LIST
            sock.close()
        counted: Queue[object] = Queue()
        while True:  # until it has seen that they are closed
            server.call(lambda: counted.put(server._numbers()["open"]))
            if counted.get(timeout=WAIT_SECONDS) == 0:
                break
        server.call(lambda: counted.put(dict(server._of_host)))
        assert counted.get(timeout=WAIT_SECONDS) == {}  # strangers have many addresses
        assert ask(server.address, request(11, LIST)) == EMPTY_LIST
        server.call(lambda: counted.put(server._numbers()["refused"]))
        assert counted.get(timeout=WAIT_SECONDS) == 3


def test_fewer_connections_than_descriptors_allow_can_be_had_and_not_more(tmp_path: Path) -> None:
    for cap, room in ((3, 3), (1 << 40, _room_for_connections(0))):
        with Server(tmp_path, ("127.0.0.1", 0), Settings(max_connections=cap)) as server:
            assert server._room <= room
            assert (server._room == 3) == (cap == 3)


def test_a_server_reports_when_it_is_asked_to(server: RunningServer) -> None:
    server.server.report()
    assert "open=0 total=0 refused=0" in server.wait_for_line(lambda line: "Counters" in line)
