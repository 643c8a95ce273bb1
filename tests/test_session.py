"""The session alone: parts of a request in, one answer and one line of the log out.

The store is real; there is no server, and time stands still unless a test
moves it. Where a body is sent, it goes through a real pair of sockets.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import socket
import struct
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest

from backup.connection import Body, Later, Outgoing
from backup.errors import BackupError, ConnectionFailed, DeadlineMissed, StoreFailed
from backup.log import Line, Log
from backup.protocol import Cut, Data, End, Excess, Head, Part, RequestReceiver, State
from backup.session import Session
from backup.settings import Settings
from backup.storage import Store
from backup.stream import Stream
from backup.upload import Upload
from backup.wire import MAX_FILE_BYTES, Request
from tests.conftest import open_descriptors
from tests.helpers import RunningServer, ask, file_payload, request, response

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
PEER = "127.0.0.1:50000"

REFUSED_NAMES = [
    b"",
    b".",
    b"..",
    b"a/b",
    b"../a",
    b"/etc/passwd",
    b"a\\b",
    b"a\0b",
    b"a\nb",
    b"\x1b[31m",
    b"\x7f",
    "\x85".encode(),
    b"\xff",
    b"\xed\xa0\x80",
    b"n" * 256,
    b"n" * 65535,
]
ODD_NAMES = [
    b".hidden",
    b".tmp",
    b"...",
    b"-rf",
    b" ",
    b"two words",
    b"a=b",
    b"~",
    b"*",
    "ünï © 備份 🗄".encode(),
    b"n" * 255,
]


class Bench:
    """What sessions of one store need, and what a server would do around them."""

    def __init__(self, root: Path, **settings: float) -> None:
        """Unless told otherwise, only a file of up to four bytes is small."""
        self.root = root
        settings = {"small_bytes": 4, **settings}
        self.settings = replace(Settings(), **settings)  # type: ignore[arg-type]
        self.store = Store(root, self.settings)
        self.seconds = 100.0
        self._lines: List[Line] = []
        self._log = Log(self._take, logging.DEBUG)

    def _take(self, lines: Sequence[Line]) -> None:
        self._lines.extend(Line(line.level, line.text) for line in lines)

    @property
    def lines(self) -> List[Line]:
        """The log so far, with all of a line in its message."""
        self._log.flush()
        return self._lines

    @property
    def texts(self) -> List[str]:
        return [line.text for line in self.lines]

    def session(self) -> Session:
        return Session(self.store, self._log, PEER, lambda: self.seconds, self.settings)

    def give(self, session: Session, parts: List[Part]) -> Optional[Outgoing]:
        """Gives the parts one by one, does what is put off; the answer, if there is one."""
        answer: Optional[Outgoing] = None
        for part in parts:
            returned = session.take(part)
            while returned is Later.STEP:
                returned = session.step()
            if returned is Later.COMMIT:
                returned = self.commit(session)
            if isinstance(returned, Outgoing):
                assert answer is None, "answered twice"
                answer = returned
        return answer

    def commit(self, session: Session) -> Outgoing:
        """What the server does at the end of the turn."""
        assert session.change is not None
        return session.committed(self.store.commit([session.change])[0])

    def ask(self, data: bytes, end: bool = False) -> bytes:
        """One whole exchange: the answer's bytes, empty if there is none."""
        session = self.session()
        receiver = RequestReceiver()
        parts = receiver.feed(memoryview(data))
        if end:
            parts += receiver.close()
        answer = self.give(session, parts)
        if answer is None:
            session.closed(None)
            return b""
        sent = answer.head + self._send(answer)
        session.sent()
        session.closed(None)
        return sent

    def put(self, name: bytes, content: bytes, user_id: int = 11) -> None:
        assert self.ask(request(user_id, BACKUP, name, content)) == response(210, name)
        self.lines.clear()

    def content(self, name: bytes, user_id: int = 11) -> Optional[bytes]:
        """What the disk has under a name."""
        path = self.root / str(user_id) / os.fsdecode(name)
        return path.read_bytes() if path.exists() else None

    def temporary(self) -> List[Path]:
        return list((self.root / ".tmp").iterdir())

    @staticmethod
    def _send(answer: Outgoing) -> bytes:
        if answer.body is None:
            return b""
        near, far = socket.socketpair()
        with closing(near), closing(far):
            stream = Stream(near, PEER)
            while answer.body.remaining:
                answer.body.send(stream, answer.body.remaining)
            answer.body.close()
            stream.end()
            return b"".join(iter(lambda: far.recv(1 << 16), b""))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "store")


@pytest.fixture
def pair() -> Iterator[Tuple[Stream, socket.socket]]:
    near, far = socket.socketpair()
    with closing(near), closing(far):
        yield Stream(near, PEER), far


def refuse(code: int) -> Callable[..., int]:
    """Stands in for a function of ``os`` that the system refuses."""

    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


# The four operations


def test_backup_stores_the_payload_and_answers_210_without_one(bench: Bench) -> None:
    assert bench.ask(request(11, BACKUP, b"a", b"xyz")) == response(210, b"a")
    assert bench.content(b"a") == b"xyz"


def test_backup_replaces_an_older_file_as_a_whole(bench: Bench) -> None:
    bench.put(b"a", b"a longer file")
    bench.put(b"a", b"short")
    assert bench.content(b"a") == b"short"


def test_a_backup_takes_effect_when_it_is_committed_and_not_before(bench: Bench) -> None:
    bench.put(b"a", b"older")
    session = bench.session()
    assert session.take(Head(Request(11, 1, BACKUP, b"a", 3))) is None
    assert session.take(Data(memoryview(b"xyz"))) is None
    assert session.take(End()) is Later.COMMIT
    assert bench.content(b"a") == b"older"
    assert bench.commit(session).head == response(210, b"a")
    assert bench.content(b"a") == b"xyz"
    assert session.change is None


def test_a_payload_in_pieces_is_put_together_in_order(bench: Bench) -> None:
    buffer = bytearray(2)
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 6)))
    for piece in (b"ab", b"cd", b"ef"):
        buffer[:] = piece  # the one receive buffer, which the next piece overwrites
        session.take(Data(memoryview(buffer)))
    assert bench.give(session, [End()]) == Outgoing(response(210, b"a"))
    assert bench.content(b"a") == b"abcdef"


@pytest.mark.parametrize("content", [b"x", b"xyz" * 30_000], ids=["small", "large"])
def test_retrieve_answers_212_with_size_and_file(bench: Bench, content: bytes) -> None:
    bench.put(b"a", content)
    assert bench.ask(request(11, RETRIEVE, b"a")) == response(212, b"a", file_payload(content))


def test_retrieve_of_a_file_that_is_not_there_answers_1003(bench: Bench) -> None:
    bench.put(b"b", b"xyz")
    assert bench.ask(request(11, RETRIEVE, b"a")) == response(1003, b"a")
    assert bench.ask(request(12, RETRIEVE, b"b")) == response(1003, b"b")


def test_an_empty_file_that_lies_in_the_folder_is_sent(bench: Bench) -> None:
    bench.put(b"a", b"xyz")
    (bench.root / "11" / "a").write_bytes(b"")
    assert bench.ask(request(11, RETRIEVE, b"a")) == response(212, b"a", file_payload(b""))


def test_delete_removes_the_file_and_answers_211(bench: Bench) -> None:
    bench.put(b"a", b"xyz")
    assert bench.ask(request(11, DELETE, b"a")) == response(211, b"a")
    assert bench.content(b"a") is None


def test_delete_of_a_file_that_is_not_there_answers_1002(bench: Bench) -> None:
    bench.put(b"b", b"xyz")
    assert bench.ask(request(11, DELETE, b"a")) == response(1002, b"a")
    assert bench.ask(request(12, DELETE, b"b")) == response(1002, b"b")
    assert bench.content(b"b") == b"xyz"


def test_a_delete_takes_effect_when_it_is_committed_and_not_before(bench: Bench) -> None:
    bench.put(b"a", b"xyz")
    session = bench.session()
    assert session.take(Head(Request(11, 1, DELETE, b"a"))) is None
    assert session.take(End()) is Later.COMMIT
    assert bench.content(b"a") == b"xyz"
    assert bench.commit(session).head == response(211, b"a")
    assert bench.content(b"a") is None


def listing(*names: bytes) -> bytes:
    """The payload of LIST by the wire's layout."""
    fields = [struct.pack("<H", len(name)) + name for name in names]
    return struct.pack("<I", len(names)) + b"".join(fields)


def test_a_user_who_stored_nothing_has_an_empty_list(bench: Bench) -> None:
    assert bench.ask(request(11, LIST)) == response(212, b"", listing())


def test_list_answers_212_with_the_names_sorted_by_their_bytes(bench: Bench) -> None:
    names = ["b", "a", "Z", "é", "z", "aa", ".a", "🗄", "\uffff"]
    for name in names:
        bench.put(name.encode(), b"x")
    bench.put(b"other", b"x", user_id=12)
    expected = listing(*sorted(name.encode() for name in names))
    assert bench.ask(request(11, LIST)) == response(212, b"", expected)


def test_a_filename_in_list_is_ignored_and_not_echoed(bench: Bench) -> None:
    bench.put(b"a", b"xyz")
    for name in (b"a", b"nobody", b"../..", b"\xff\0"):
        assert bench.ask(request(11, LIST, name)) == response(212, b"", listing(b"a"))


def test_only_regular_files_with_lawful_names_are_listed_served_and_removed(bench: Bench) -> None:
    bench.put(b"a", b"xyz")
    folder = bench.root / "11"
    (folder / "folder").mkdir()
    (folder / "link").symlink_to("a")
    os.mkfifo(folder / "pipe")
    (folder / "new\nline").write_bytes(b"x")
    assert bench.ask(request(11, LIST)) == response(212, b"", listing(b"a"))
    for name in (b"folder", b"link", b"pipe", b"new\nline"):
        assert bench.ask(request(11, RETRIEVE, name)) == response(1003, name)
        assert bench.ask(request(11, DELETE, name)) == response(1002, name)
        assert bench.ask(request(11, BACKUP, name, b"new")) == response(1001, name)
    assert sorted(os.listdir(folder)) == ["a", "folder", "link", "new\nline", "pipe"]
    assert bench.content(b"a") == b"xyz"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_but_lawful_name_is_served(bench: Bench, name: bytes) -> None:
    assert bench.ask(request(11, BACKUP, name, b"xyz")) == response(210, name)
    assert bench.ask(request(11, LIST)) == response(212, b"", listing(name))
    found = response(212, name, file_payload(b"xyz"))
    assert bench.ask(request(11, RETRIEVE, name)) == found
    assert bench.ask(request(11, DELETE, name)) == response(211, name)
    assert bench.ask(request(11, LIST)) == response(212, b"", listing())


@pytest.mark.parametrize("user_id", [0, 1, 2**32 - 1])
def test_a_user_has_a_folder_named_by_the_decimal_id(bench: Bench, user_id: int) -> None:
    bench.put(b"a", b"xyz", user_id)
    assert (bench.root / str(user_id) / "a").read_bytes() == b"xyz"


# What is refused


@pytest.mark.parametrize("name", REFUSED_NAMES, ids=lambda name: repr(name[:12]))
def test_a_refused_name_answers_like_a_file_that_is_not_there(bench: Bench, name: bytes) -> None:
    assert bench.ask(request(11, BACKUP, name, b"xyz")) == response(1001, name)
    assert bench.ask(request(11, RETRIEVE, name)) == response(1003, name)
    assert bench.ask(request(11, DELETE, name)) == response(1002, name)
    assert os.listdir(bench.root) == [".tmp"]
    assert [text.split()[-1] for text in bench.texts] == ["reason=name"] * 3


def test_an_empty_file_is_refused_and_the_older_one_stays(bench: Bench) -> None:
    assert bench.ask(request(11, BACKUP, b"a", b"")) == response(1001, b"a")
    assert bench.content(b"a") is None
    bench.put(b"a", b"older")
    assert bench.ask(request(11, BACKUP, b"a", b"")) == response(1001, b"a")
    assert bench.content(b"a") == b"older"
    assert bench.texts[-1].endswith("status=1001 bytes=0 ms=0.0 peer=" + PEER + " reason=empty")


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 2**32 - 1])
def test_a_backup_too_large_to_be_retrieved_is_refused_at_once(bench: Bench, size: int) -> None:
    session = bench.session()
    answer = session.take(Head(Request(11, 1, BACKUP, b"a", size)))
    assert answer == Outgoing(response(1001, b"a"))
    assert session.take(Data(memoryview(b"xyz"))) is None
    assert bench.temporary() == []
    session.sent()
    assert bench.texts[-1].endswith(" reason=too-large")


def test_a_backup_of_the_largest_size_is_begun(bench: Bench) -> None:
    assert MAX_FILE_BYTES == 2**32 - 5
    session = bench.session()
    assert session.take(Head(Request(11, 1, BACKUP, b"a", MAX_FILE_BYTES))) is None
    assert isinstance(session.change, Upload)
    session.closed(None)


def stretch(bench: Bench, name: str, size: int) -> None:
    """Makes a stored file as large as this; it takes no room on the disk."""
    bench.put(name.encode(), b"x")
    os.truncate(bench.root / "11" / name, size)


def test_a_stored_file_too_large_to_be_sent_is_refused_with_1001(bench: Bench) -> None:
    stretch(bench, "a", MAX_FILE_BYTES + 1)
    assert bench.ask(request(11, RETRIEVE, b"a")) == response(1001, b"a")
    assert bench.texts[-1].endswith("status=1001 bytes=0 ms=0.0 peer=" + PEER + " reason=too-large")


def test_the_largest_file_that_fits_is_announced(bench: Bench) -> None:
    stretch(bench, "a", MAX_FILE_BYTES)
    session = bench.session()
    answer = bench.give(session, [Head(Request(11, 1, RETRIEVE, b"a")), End()])
    assert answer is not None
    assert answer.head == struct.pack("<BHHI", 1, 212, 1, 2**32 - 1) + b"a" + b"\xfb\xff\xff\xff"
    assert answer.body is not None
    assert answer.body.remaining == MAX_FILE_BYTES
    answer.body.close()
    session.closed(None)


def test_a_listing_too_large_to_be_sent_is_refused_with_1001(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(b"a", b"x")
    monkeypatch.setattr("backup.session.MAX_SIZE", len(listing(b"a")) - 1)
    assert bench.ask(request(11, LIST)) == response(1001)
    assert bench.texts[-1].endswith("status=1001 bytes=0 ms=0.0 peer=" + PEER + " reason=too-large")


@pytest.mark.parametrize("op", [0, 1, 99, 101, 199, 203, 210, 255])
def test_an_unknown_op_is_answered_with_1001(bench: Bench, op: int) -> None:
    assert bench.ask(request(11, op, b"a")) == response(1001, b"a")
    assert bench.ask(request(11, op)) == response(1001)
    # What would be size and payload is thrown away.
    assert bench.ask(request(11, op, b"a", b"xyz")) == response(1001, b"a")
    assert os.listdir(bench.root) == [".tmp"]
    assert bench.texts[-1].endswith("reason=unknown-op")


def test_what_comes_after_a_refusal_is_read_and_thrown_away(bench: Bench) -> None:
    session = bench.session()
    assert session.take(Head(Request(11, 1, BACKUP, b"..", 6))) == Outgoing(response(1001, b".."))
    parts: List[Part] = [
        Data(memoryview(b"xyz")),
        End(),
        Excess(9),
        Cut(State.PAYLOAD, Request(11, 1, BACKUP, b"..")),
    ]
    assert bench.give(session, parts) is None
    assert session.change is None


def test_bytes_behind_a_request_are_thrown_away(bench: Bench) -> None:
    assert bench.ask(request(11, BACKUP, b"a", b"xyz") + b"more") == response(210, b"a")
    assert bench.content(b"a") == b"xyz"
    found = response(212, b"a", file_payload(b"xyz"))
    assert bench.ask(request(11, RETRIEVE, b"a") + b"more", end=True) == found


def test_bytes_that_come_before_the_commit_are_thrown_away(bench: Bench) -> None:
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 3)))
    session.take(Data(memoryview(b"xyz")))
    assert session.take(End()) is Later.COMMIT
    assert session.take(Excess(4)) is None
    assert bench.commit(session) == Outgoing(response(210, b"a"))


# Faults of the disk


@pytest.mark.parametrize(
    ("op", "payload", "status"),
    [(BACKUP, b"xyz", 1001), (RETRIEVE, None, 1001), (DELETE, None, 1002), (LIST, None, 1001)],
)
def test_a_user_whose_folder_is_a_file_gets_the_operations_failure(
    bench: Bench, op: int, payload: Optional[bytes], status: int
) -> None:
    (bench.root / "11").write_bytes(b"not a folder")
    name = b"" if op == LIST else b"a"
    assert bench.ask(request(11, op, name, payload)) == response(status, name)
    assert bench.temporary() == []
    warning, line = bench.lines
    assert warning.level == logging.WARNING
    assert str(bench.root / "11") in warning.text
    assert "not a directory" in warning.text
    assert line.text.endswith(" reason=store")


def test_an_upload_that_cannot_begin_is_answered_with_1001(bench: Bench) -> None:
    (bench.root / ".tmp").rmdir()
    assert bench.ask(request(11, BACKUP, b"a", b"xyz")) == response(1001, b"a")
    warning, line = bench.lines
    assert warning.level == logging.WARNING
    assert "cannot begin an upload: no such file or directory" in warning.text
    assert line.text.endswith(" reason=store")


def test_a_full_disk_is_answered_at_once_and_leaves_the_older_file(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(b"a", b"older")
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 9)))
    session.take(Data(memoryview(b"xyz")))
    monkeypatch.setattr(os, "write", refuse(errno.ENOSPC))
    assert session.take(Data(memoryview(b"xyz"))) == Outgoing(response(1001, b"a"))
    monkeypatch.undo()
    assert bench.temporary() == []
    assert bench.give(session, [Data(memoryview(b"xyz")), End()]) is None
    session.sent()
    session.closed(None)
    assert bench.content(b"a") == b"older"
    warning, line = bench.lines
    assert warning.level == logging.WARNING
    assert "cannot write an upload: no space left on device" in warning.text
    assert line.text.endswith("status=1001 bytes=3 ms=0.0 peer=" + PEER + " reason=store")


def test_a_disk_that_can_neither_write_nor_remove_is_answered_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 9)))
    (left,) = bench.temporary()
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", refuse(errno.EIO))
        broken.setattr(os, "unlink", refuse(errno.EROFS))
        answer = session.take(Data(memoryview(b"xyz")))
        session.closed(None)
    left.unlink()
    assert answer == Outgoing(response(1001, b"a"))


def test_an_upload_whose_connection_breaks_on_a_disk_that_cannot_remove_ends_quietly(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 9)))
    (left,) = bench.temporary()
    with monkeypatch.context() as broken:
        broken.setattr(os, "unlink", refuse(errno.EROFS))
        session.closed(ConnectionFailed("it broke"))
    left.unlink()
    assert bench.texts[-1].endswith(" reason=connection")


def test_a_commit_that_fails_is_answered_with_what_the_store_says(bench: Bench) -> None:
    bench.put(b"a", b"older")
    session = bench.session()
    parts: List[Part] = [Head(Request(11, 1, BACKUP, b"a", 3)), Data(memoryview(b"xyz"))]
    assert bench.give(session, parts) is None
    assert isinstance(session.change, Upload)
    session.change.abort()
    assert session.committed(StoreFailed("the disk is gone")) == Outgoing(response(1001, b"a"))
    session.sent()
    assert bench.content(b"a") == b"older"
    assert bench.lines[0] == Line(logging.WARNING, "the disk is gone")
    assert bench.texts[1].endswith(" reason=store")


# The body of a RETRIEVE


def open_body(bench: Bench, session: Session, name: bytes = b"a") -> Outgoing:
    answer = bench.give(session, [Head(Request(11, 1, RETRIEVE, name)), End()])
    assert answer is not None
    assert answer.body is not None
    return answer


def test_a_body_sends_no_more_than_it_is_allowed(
    bench: Bench, pair: Tuple[Stream, socket.socket]
) -> None:
    bench.put(b"a", b"0123456789")
    stream, far = pair
    session = bench.session()
    body = open_body(bench, session).body
    assert body is not None
    counts = [body.send(stream, 4), body.send(stream, 4), body.send(stream, 4)]
    assert counts == [4, 4, 2]
    assert body.remaining == 0
    assert far.recv(100) == b"0123456789"
    body.close()


def test_a_body_waits_while_the_peer_reads_nothing(
    bench: Bench, pair: Tuple[Stream, socket.socket]
) -> None:
    bench.put(b"a", b"x")
    os.truncate(bench.root / "11" / "a", 8 << 20)
    stream, _ = pair
    body = open_body(bench, bench.session()).body
    assert body is not None
    sent = 0
    while True:
        count = body.send(stream, 1 << 20)
        if count is None:
            break
        sent += count
    assert 0 < sent < 8 << 20
    assert body.remaining == (8 << 20) - sent
    body.close()


def test_a_file_that_somebody_shortens_breaks_the_connection(
    bench: Bench, pair: Tuple[Stream, socket.socket]
) -> None:
    bench.put(b"a", b"0123456789")
    stream, _ = pair
    body = open_body(bench, bench.session()).body
    assert body is not None
    assert body.send(stream, 4) == 4
    os.truncate(bench.root / "11" / "a", 2)
    with pytest.raises(StoreFailed, match="became shorter"):
        body.send(stream, 4)
    body.close()


def test_a_file_that_is_replaced_while_it_is_sent_goes_out_as_it_was(
    bench: Bench, pair: Tuple[Stream, socket.socket]
) -> None:
    bench.put(b"a", b"0123456789")
    stream, far = pair
    body = open_body(bench, bench.session()).body
    assert body is not None
    body.send(stream, 4)
    bench.put(b"a", b"another")
    body.send(stream, 100)
    assert far.recv(100) == b"0123456789"
    body.close()


# A file that leaves with the answer's fields, and one that does not


@pytest.mark.parametrize("size", [1, 4, 5, 6])
def test_a_small_file_leaves_with_the_fields_and_a_larger_one_behind_them(
    bench: Bench, size: int
) -> None:
    bench.put(b"a", b"x" * size)
    before = open_descriptors()
    session = bench.session()
    answer = bench.give(session, [Head(Request(11, 1, RETRIEVE, b"a")), End()])
    assert answer is not None
    whole = response(212, b"a", file_payload(b"x" * size))
    if size <= 4:
        assert answer == Outgoing(whole)
        assert open_descriptors() == before
    else:
        assert answer.head == whole[:-size]
        assert answer.body is not None
        assert answer.body.remaining == size
        answer.body.close()
        assert open_descriptors() == before
    session.closed(None)


def test_a_small_file_that_cannot_be_read_is_answered_with_1001(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(b"a", b"xyz")
    with monkeypatch.context() as broken:
        broken.setattr(os, "read", refuse(errno.EIO))
        answer = bench.give(bench.session(), [Head(Request(11, 1, RETRIEVE, b"a")), End()])
    assert answer == Outgoing(response(1001, b"a"))


def test_a_small_file_that_cannot_be_read_is_warned_about(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(b"a", b"xyz")
    session = bench.session()
    with monkeypatch.context() as broken:
        broken.setattr(os, "read", refuse(errno.EIO))
        session.take(Head(Request(11, 1, RETRIEVE, b"a")))
    session.sent()
    session.closed(None)
    warning, line = bench.lines
    text = "cannot read a stored file: [Errno 5] Input/output error; check its disk"
    assert warning == Line(logging.WARNING, text)
    assert line.text.startswith("user=11 op=200 file=a status=1001 ")
    assert line.text.endswith(" reason=store")


def test_a_body_that_cannot_be_read_breaks_the_answer_off_and_is_warned_about(
    bench: Bench, pair: Tuple[Stream, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(b"a", b"0123456789")
    session = bench.session()
    body = open_body(bench, session).body
    assert body is not None
    assert body.send(pair[0], 4) == 4
    with monkeypatch.context() as broken:
        broken.setattr(os, "sendfile", refuse(errno.EIO))
        with pytest.raises(
            StoreFailed, match=r"cannot read a stored file: .*output error"
        ) as caught:
            body.send(pair[0], 4)
    body.close()
    session.closed(caught.value)
    assert bench.lines == [
        Line(logging.WARNING, str(caught.value)),
        Line(
            logging.INFO,
            f"user=11 op=200 file=a status=212 bytes=4 ms=0.0 peer={PEER} reason=store",
        ),
    ]


# What is put off to a step: a listing of several slices


NAMES = [b"%d" % number + "é".encode() * (number % 3) for number in range(10)]


def full(root: Path, names: List[bytes], **settings: float) -> Bench:
    """A bench whose user 11 has these files, and for which three names are a slice."""
    bench = Bench(root, **{"listing_names": 3, **settings})
    (root / "11").mkdir()
    for name in names:
        (root / "11" / os.fsdecode(name)).touch()
    return bench


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 9, 10])
def test_a_listing_of_any_number_of_slices_has_all_names(tmp_path: Path, count: int) -> None:
    bench = full(tmp_path, NAMES[:count])
    expected = response(212, b"", listing(*sorted(NAMES[:count])))
    assert bench.ask(request(11, LIST)) == expected
    assert bench.texts == [
        f"user=11 op=202 file= status=212 bytes={len(expected) - 9} ms=0.0 peer={PEER}"
    ]


def step_to_the_answer(session: Session) -> Tuple[int, Outgoing]:
    """Steps until there is an answer; how many times, and what it is."""
    for steps in range(1, 1000):
        returned = session.step()
        if isinstance(returned, Outgoing):
            return steps, returned
        assert returned is Later.STEP
    raise AssertionError("no end of steps")


def list_much(bench: Bench) -> Tuple[Session, Outgoing, Body]:
    """The answer to a LIST of several slices, with its body."""
    session = bench.session()
    assert session.take(Head(Request(11, 1, LIST, b""))) is Later.STEP
    _, answer = step_to_the_answer(session)
    assert answer.body is not None
    return session, answer, answer.body


@pytest.mark.parametrize(("count", "steps"), [(0, 0), (2, 0), (3, 4), (10, 11)])
def test_only_a_listing_of_more_than_a_slice_takes_steps(
    tmp_path: Path, count: int, steps: int
) -> None:
    bench = full(tmp_path, NAMES[:count])
    session = bench.session()
    returned = session.take(Head(Request(11, 1, LIST, b"")))
    assert session.take(End()) is None
    if not steps:
        assert isinstance(returned, Outgoing)
        assert returned.body is None
    else:
        assert returned is Later.STEP
        taken, answer = step_to_the_answer(session)
        assert taken == steps
        assert answer.body is not None


def test_the_names_of_a_large_listing_leave_as_far_as_they_may(
    tmp_path: Path, pair: Tuple[Stream, socket.socket]
) -> None:
    bench = full(tmp_path, NAMES)
    _, answer, body = list_much(bench)
    payload = listing(*sorted(NAMES))
    assert answer.head == response(212, b"", payload)[: -len(payload) + 4]
    stream, far = pair
    assert body.remaining == len(payload) - 4
    assert body.send(stream, 2) == 2
    assert body.remaining == len(payload) - 6
    assert body.send(stream, 1000) == len(payload) - 6
    assert far.recv(1000) == payload[4:]
    assert body.remaining == 0
    body.close()


def test_a_listing_waits_while_the_peer_reads_nothing(
    tmp_path: Path, pair: Tuple[Stream, socket.socket]
) -> None:
    bench = full(tmp_path, NAMES)
    _, _, body = list_much(bench)
    stream, far = pair
    filled = 0
    while True:
        count = stream.send(bytes(1 << 16))
        if count is None:
            break
        filled += count
    before = body.remaining
    assert [body.send(stream, 1000) for _ in range(3)] == [None] * 3
    assert body.remaining == before
    while filled:
        filled -= len(far.recv(filled))
    while body.remaining:
        body.send(stream, 1000)
    assert far.recv(1000) == listing(*sorted(NAMES))[4:]


def test_a_listing_waits_for_the_end_that_follows_it(
    tmp_path: Path, pair: Tuple[Stream, socket.socket]
) -> None:
    told: List[bool] = []

    class Telling(Stream):
        def send(self, data: Union[bytes, memoryview], more: bool = False) -> Optional[int]:
            told.append(more)
            return len(data)

    bench = full(tmp_path, NAMES[:4])
    _, _, body = list_much(bench)
    stream = Telling(pair[0].socket, PEER)
    while body.remaining:
        body.send(stream, 7)
    assert set(told) == {True}


def test_the_line_of_a_listing_that_did_not_leave_says_how_far_it_came(
    tmp_path: Path, pair: Tuple[Stream, socket.socket]
) -> None:
    bench = full(tmp_path, NAMES)
    session, _, body = list_much(bench)
    assert body.send(pair[0], 7) == 7
    session.closed(DeadlineMissed("silent"))
    assert bench.texts == [
        f"user=11 op=202 file= status=212 bytes=11 ms=0.0 peer={PEER} reason=deadline"
    ]


def test_a_large_listing_has_what_is_committed_while_it_is_read(tmp_path: Path) -> None:
    bench = full(tmp_path, NAMES)
    session = bench.session()
    assert session.take(Head(Request(11, 1, LIST, b""))) is Later.STEP
    bench.put(b"new", b"x")
    assert bench.ask(request(11, DELETE, NAMES[0])) == response(211, NAMES[0])
    _, answer = step_to_the_answer(session)
    sent = answer.head + bench._send(answer)
    assert sent == response(212, b"", listing(*sorted([*NAMES[1:], b"new"])))


def test_a_large_listing_that_is_too_large_is_refused_when_that_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = full(tmp_path, NAMES)
    size = len(listing(*NAMES))
    monkeypatch.setattr("backup.session.MAX_SIZE", size)
    assert len(bench.ask(request(11, LIST))) == size + 9
    monkeypatch.setattr("backup.session.MAX_SIZE", size - 1)
    assert bench.ask(request(11, LIST)) == response(1001)
    assert bench.texts[-1].endswith("status=1001 bytes=0 ms=0.0 peer=" + PEER + " reason=too-large")


def test_a_folder_that_fails_in_a_later_slice_is_answered_with_1001(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = full(tmp_path, NAMES)
    before = open_descriptors()
    session = bench.session()
    assert session.take(Head(Request(11, 1, LIST, b""))) is Later.STEP
    with monkeypatch.context() as broken:
        broken.setattr("backup.disk.regular", refuse(errno.EIO))
        assert session.step() == Outgoing(response(1001))
    session.sent()
    session.closed(None)
    assert open_descriptors() == before
    warning, line = bench.lines
    assert warning.level == logging.WARNING
    assert "cannot list: input/output error" in warning.text
    assert line.text.endswith("status=1001 bytes=0 ms=0.0 peer=" + PEER + " reason=store")


def test_a_connection_that_ends_while_its_listing_is_read_leaves_nothing_open(
    tmp_path: Path,
) -> None:
    bench = full(tmp_path, NAMES)
    before = open_descriptors()
    session = bench.session()
    assert session.take(Head(Request(11, 1, LIST, b""))) is Later.STEP
    assert open_descriptors() != before
    session.closed(ConnectionFailed("it broke"))
    assert open_descriptors() == before
    assert bench.texts == [
        f"user=11 op=202 file= status=- bytes=0 ms=0.0 peer={PEER} reason=connection"
    ]


# What is put off to a step: a long upload that is behind


@pytest.fixture
def long_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose store makes an upload durable every eight bytes."""
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 8)
    return Bench(tmp_path / "store", write_back_bytes=8, sync_bytes=8)


def data(count: int) -> Data:
    return Data(memoryview(b"x" * count))


def test_a_long_upload_asks_to_catch_up_whenever_it_is_behind_but_not_when_it_is_whole(
    long_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    syncs: List[int] = []
    fsync = os.fsync

    def count(fd: int) -> None:
        syncs.append(os.fstat(fd).st_size)
        fsync(fd)

    session = long_bench.session()
    assert session.take(Head(Request(11, 1, BACKUP, b"a", 28))) is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        assert session.take(data(7)) is None
        assert session.take(data(1)) is Later.STEP
        assert session.step() is None
        assert session.take(data(5)) is None
        assert session.take(data(5)) is Later.STEP
        assert session.step() is None
        assert syncs == [8, 18]
        assert session.take(data(10)) is None
        assert syncs == [8, 18]
    assert session.take(End()) is Later.COMMIT
    assert long_bench.commit(session) == Outgoing(response(210, b"a"))
    assert long_bench.content(b"a") == b"x" * 28


def test_an_upload_that_needs_nothing_on_the_disk_never_has_to_catch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backup.upload._FIRST_PIECE", 8)
    bench = Bench(tmp_path, fsync=False)
    session = bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 1000)))
    assert session.take(data(999)) is None
    session.closed(None)


def test_a_piece_that_does_not_get_to_the_disk_is_answered_at_once_and_the_older_file_stays(
    long_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_bench.put(b"a", b"old")
    session = long_bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 20)))
    assert session.take(data(8)) is Later.STEP
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse(errno.EIO))
        assert session.step() == Outgoing(response(1001, b"a"))
    assert long_bench.temporary() == []
    assert session.change is None
    assert long_bench.give(session, [data(12), End()]) is None
    session.sent()
    session.closed(None)
    assert long_bench.content(b"a") == b"old"
    warning, line = long_bench.lines
    assert warning.level == logging.WARNING
    assert "cannot write an upload: input/output error" in warning.text
    assert line.text.endswith("status=1001 bytes=8 ms=0.0 peer=" + PEER + " reason=store")


def test_a_connection_that_ends_while_its_upload_has_to_catch_up_leaves_nothing(
    long_bench: Bench,
) -> None:
    session = long_bench.session()
    session.take(Head(Request(11, 1, BACKUP, b"a", 20)))
    assert session.take(data(8)) is Later.STEP
    session.closed(ConnectionFailed("it broke"))
    assert long_bench.temporary() == []


# A peer that ends too early

UPLOAD = request(11, BACKUP, b"name", b"payload")
UNNAMED = 8 + len(b"name")  # bytes before the filename is whole
FIELDS = UNNAMED + 4  # the size behind the name


def test_a_request_cut_in_header_or_filename_is_not_answered(bench: Bench) -> None:
    for length in range(UNNAMED):
        assert bench.ask(UPLOAD[:length], end=True) == b"", length
    assert bench.lines == []
    assert os.listdir(bench.root) == [".tmp"]


def test_a_request_cut_in_size_or_payload_is_answered_with_1001(bench: Bench) -> None:
    bench.put(b"name", b"older")
    for length in range(UNNAMED, len(UPLOAD)):
        assert bench.ask(UPLOAD[:length], end=True) == response(1001, b"name"), length
        assert bench.content(b"name") == b"older"
        assert bench.temporary() == []
        received = max(0, length - UNNAMED - 4)
        assert bench.texts[-1] == (
            f"user=11 op=100 file=name status=1001 bytes={received} ms=0.0 peer={PEER} reason=cut"
        )


def test_an_upload_without_a_name_that_is_cut_is_answered_with_1001(bench: Bench) -> None:
    assert bench.ask(request(11, BACKUP, b"", b"xyz")[:10], end=True) == response(1001)


def test_a_request_that_ends_behind_its_last_byte_is_whole(bench: Bench) -> None:
    assert bench.ask(UPLOAD, end=True) == response(210, b"name")
    assert bench.content(b"name") == b"payload"


def receive(session: Session, data: bytes) -> None:
    """Gives a session what these bytes make, without an end."""
    for part in RequestReceiver().feed(memoryview(data)):
        session.take(part)


def test_an_upload_whose_connection_breaks_leaves_nothing(bench: Bench) -> None:
    bench.put(b"name", b"older")
    for length in range(len(UPLOAD) + 1):
        session = bench.session()
        receive(session, UPLOAD[:length])
        session.closed(ConnectionFailed("it broke"))
        assert bench.content(b"name") == b"older"
        assert bench.temporary() == [], length


# The log


TOO_MUCH = request(11, BACKUP, b"b", b"123456")


@pytest.mark.parametrize(
    ("settings", "data", "expected"),
    [
        ({"user_files": 1}, request(11, BACKUP, b"b", b"x"), "reason=quota cap=user-files"),
        (
            {"max_file_bytes": 5},
            request(11, BACKUP, b"b", b"123456"),
            "reason=quota cap=max-file-size",
        ),
        ({"append_only": True}, request(11, BACKUP, b"a", b"x"), "reason=append-only"),
        ({"append_only": True}, request(11, DELETE, b"a"), "reason=append-only"),
    ],
)
def test_what_the_operator_has_forbidden_is_a_warning(
    tmp_path: Path, settings: Dict[str, int], data: bytes, expected: str
) -> None:
    bench = Bench(tmp_path / "store", **settings)
    bench.put(b"a", b"12345")
    bench.ask(data)
    (line,) = bench.lines
    assert line.level == logging.WARNING
    assert line.text.endswith(f" peer={PEER} {expected}")


def test_a_line_says_everything_about_a_request(bench: Bench) -> None:
    session = bench.session()
    bench.seconds += 0.0015
    bench.give(session, [Head(Request(11, 1, BACKUP, b"a", 3)), Data(memoryview(b"xyz")), End()])
    session.sent()
    expected = f"user=11 op=100 file=a status=210 bytes=3 ms=1.5 peer={PEER}"
    assert bench.lines == [Line(logging.INFO, expected)]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request(11, RETRIEVE, b"a"), "user=11 op=200 file=a status=212 bytes=5"),
        (request(11, DELETE, b"a"), "user=11 op=201 file=a status=211 bytes=0"),
        (request(11, LIST), "user=11 op=202 file= status=212 bytes=7"),
        (request(11, LIST, b"x"), "user=11 op=202 file=x status=212 bytes=7"),
    ],
)
def test_each_operation_has_its_line(bench: Bench, data: bytes, expected: str) -> None:
    bench.put(b"a", b"12345")
    bench.ask(data)
    assert bench.texts == [f"{expected} ms=0.0 peer={PEER}"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request(2, RETRIEVE, b"a"), "user=2 op=200 file=a status=1003 bytes=0|not-found"),
        (request(2, DELETE, b"a"), "user=2 op=201 file=a status=1002 bytes=0|not-found"),
        (request(2, BACKUP, b"a", b""), "user=2 op=100 file=a status=1001 bytes=0|empty"),
        (request(2, BACKUP, b"..", b"x"), "user=2 op=100 file=.. status=1001 bytes=0|name"),
        (request(2, 9, b"a"), "user=2 op=9 file=a status=1001 bytes=0|unknown-op"),
    ],
)
def test_the_line_of_a_failure_ends_in_its_reason(bench: Bench, data: bytes, expected: str) -> None:
    bench.ask(data)
    fields, reason = expected.split("|")
    assert bench.texts == [f"{fields} ms=0.0 peer={PEER} reason={reason}"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"two words", r"two\x20words"),
        (b"a\nuser=1", r"a\x0auser=1"),
        (b"a\r\n", r"a\x0d\x0a"),
        (b"\x1b[31mred", r"\x1b[31mred"),
        (b"a status=210", r"a\x20status=210"),
        (b"a=b", "a=b"),
        (b"a\\x20b", r"a\\x20b"),
        (b"\xff", r"\xff"),
        (b"\0", r"\x00"),
        ("\u202egnp.exe".encode(), r"\u202egnp.exe"),
        ("\u2028".encode(), r"\u2028"),
        ("備份".encode(), "備份"),
    ],
)
def test_a_name_can_neither_forge_nor_colour_a_line(bench: Bench, name: bytes, shown: str) -> None:
    bench.ask(request(11, RETRIEVE, name))
    (text,) = bench.texts
    assert text.startswith(f"user=11 op=200 file={shown} status=1003 bytes=0 ms=0.0 peer=")
    keys = [field.split("=")[0] for field in re.split(r"\s", text)]
    assert keys == ["user", "op", "file", "status", "bytes", "ms", "peer", "reason"]


def test_there_is_one_line_a_request_whatever_comes_later(bench: Bench) -> None:
    session = bench.session()
    bench.give(session, [Head(Request(11, 1, LIST, b"")), End()])
    assert bench.lines == []
    session.sent()
    session.take(Excess(5))
    session.closed(ConnectionFailed("it broke"))
    assert bench.texts == [f"user=11 op=202 file= status=212 bytes=4 ms=0.0 peer={PEER}"]


def test_the_line_of_an_answer_that_did_not_leave_says_how_far_it_came(
    bench: Bench, pair: Tuple[Stream, socket.socket]
) -> None:
    bench.put(b"a", b"0123456789")
    session = bench.session()
    body = open_body(bench, session).body
    assert body is not None
    body.send(pair[0], 4)
    body.close()
    session.closed(DeadlineMissed("silent"))
    assert bench.texts == [
        f"user=11 op=200 file=a status=212 bytes=4 ms=0.0 peer={PEER} reason=deadline"
    ]


@pytest.mark.parametrize(
    ("error", "reason"), [(ConnectionFailed("x"), "connection"), (DeadlineMissed("x"), "deadline")]
)
def test_the_line_of_a_broken_upload_has_no_status(
    bench: Bench, error: BackupError, reason: str
) -> None:
    session = bench.session()
    receive(session, UPLOAD[:-1])
    session.closed(error)
    assert bench.texts == [
        f"user=11 op=100 file=name status=- bytes=6 ms=0.0 peer={PEER} reason={reason}"
    ]


def test_a_refusal_that_could_not_be_sent_keeps_its_reason(bench: Bench) -> None:
    session = bench.session()
    receive(session, request(11, RETRIEVE, b".."))
    session.closed(ConnectionFailed("it broke"))
    assert bench.texts == [
        f"user=11 op=200 file=.. status=1003 bytes=0 ms=0.0 peer={PEER} reason=name"
    ]


def test_an_upload_that_a_stopping_server_cuts_off_has_a_line_too(bench: Bench) -> None:
    session = bench.session()
    receive(session, UPLOAD[:-1])
    session.closed(None)
    assert bench.texts == [f"user=11 op=100 file=name status=- bytes=6 ms=0.0 peer={PEER}"]


def test_a_connection_that_breaks_before_its_fields_are_whole_is_only_for_the_curious(
    bench: Bench,
) -> None:
    for length in range(FIELDS):
        session = bench.session()
        receive(session, UPLOAD[:length])
        session.closed(ConnectionFailed("it broke"))
    expected = f"closed without a request reason=connection peer={PEER}"
    assert bench.lines == [Line(logging.DEBUG, expected)] * FIELDS


def test_a_connection_that_breaks_behind_its_fields_has_a_line(bench: Bench) -> None:
    session = bench.session()
    receive(session, UPLOAD[:FIELDS])
    session.closed(ConnectionFailed("it broke"))
    expected = f"user=11 op=100 file=name status=- bytes=0 ms=0.0 peer={PEER} reason=connection"
    assert bench.lines == [Line(logging.INFO, expected)]


def test_a_connection_that_is_closed_without_a_fault_or_request_leaves_no_line(
    bench: Bench,
) -> None:
    bench.session().closed(None)
    assert bench.lines == []


@pytest.mark.parametrize("version", [0, 2, 7, 255])
def test_another_version_is_warned_about_and_served(bench: Bench, version: int) -> None:
    data = request(11, BACKUP, b"a", b"xyz", version=version)
    assert bench.ask(data) == response(210, b"a", version=1)
    text = f"unexpected protocol version {version}, expected 1 peer={PEER}"
    assert bench.lines[0] == Line(logging.WARNING, text)
    assert bench.texts[1:] == [f"user=11 op=100 file=a status=210 bytes=3 ms=0.0 peer={PEER}"]
    assert bench.content(b"a") == b"xyz"


def test_a_name_longer_than_any_lawful_one_is_cut_in_the_log(bench: Bench) -> None:
    session = bench.session()
    receive(session, request(11, 200, b"n" * 65535))
    session.sent()
    (line,) = bench.lines
    assert f" file={'n' * 255}… status=1003 " in line.text


def test_a_refused_request_leaves_nothing_for_the_garbage_collector(server: RunningServer) -> None:
    gc.collect()
    gc.disable()  # what only a collection would free would pile up between two of them
    try:
        ask(server.address, request(7, 100, b"../a", b"xyz"))
        server.wait_for_line(lambda line: "reason=name" in line)
        server.stop()
        assert not [thing for thing in gc.get_objects() if isinstance(thing, Session)]
    finally:
        gc.enable()
