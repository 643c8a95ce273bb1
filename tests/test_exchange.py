"""Nothing a server says is believed: each exchange is fed lawful, lying and broken answers.

The answers are bytes that the protocol's own machine takes apart, as a
connection would, whole and byte by byte; no socket is needed for that.
"""

from __future__ import annotations

import re
import socket
import struct
from contextlib import closing
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple, Type

import pytest

from backup.connection import Outgoing
from backup.errors import (
    BackupError,
    CutShort,
    InvalidName,
    LocalFileError,
    NotDeleted,
    NotFound,
    ProtocolError,
    Refused,
    TargetExists,
)
from backup.exchange import (
    Backup,
    Delete,
    DeleteExchange,
    Exchange,
    Job,
    Listing,
    Retrieve,
    exchange_for,
    subject,
)
from backup.protocol import Data, ResponseReceiver
from backup.stream import Stream
from tests.helpers import file_payload, request, response

USER = 11
OLD, NEW = b"what was there before", b"what the server holds now"
MAX_LISTING, MAX_NAMES = 64, 8

Snapshot = Dict[str, bytes]


def snapshot(folder: Path) -> Snapshot:
    """Every file below a folder, with its content."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listing(*names: bytes, count: int = -1) -> bytes:
    """The payload of LIST; ``count`` lets it lie."""
    head = struct.pack("<I", len(names) if count < 0 else count)
    return head + b"".join(struct.pack("<H", len(name)) + name for name in names)


class Case(NamedTuple):
    """One operation: its job, the answer that is success, and the statuses it may be given."""

    op: int
    name: bytes
    success: bytes
    statuses: Tuple[int, ...]


CASES = {
    "BACKUP": Case(100, b"a", response(210, b"a"), (210, 1001)),
    "RETRIEVE": Case(200, b"a", response(212, b"a", file_payload(NEW)), (212, 1001, 1003)),
    "DELETE": Case(201, b"a", response(211, b"a"), (211, 1002)),
    "LIST": Case(202, b"", response(212, b"", listing(b"a", b"b")), (212, 1001)),
}
EVERY_STATUS = (0, 210, 211, 212, 1001, 1002, 1003, 65535)


class Place:
    """A folder with a file to back up and one to overwrite, and the exchanges made there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        self.source.write_bytes(OLD)
        self.target = folder / "target"
        self.target.write_bytes(OLD)
        self.reports: List[Tuple[int, int]] = []

    def job(self, op: str) -> Job:
        jobs: Dict[str, Job] = {
            "BACKUP": Backup(self.source, "a"),
            "RETRIEVE": Retrieve("a", self.target, overwrite=True),
            "DELETE": Delete("a"),
            "LIST": Listing(),
        }
        return jobs[op]

    def make(self, job: Job) -> Exchange:
        """The job's exchange, its request sent."""

        def report(done: int, size: int) -> None:
            self.reports.append((done, size))

        exchange = exchange_for(job, USER, report, MAX_LISTING, MAX_NAMES)
        send(exchange.request())
        exchange.sent()
        return exchange


def send(outgoing: Outgoing) -> None:
    """Sends a request's payload to somebody who takes it."""
    if outgoing.body is None:
        return
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(ours, "nobody")
        while outgoing.body.remaining:
            outgoing.body.send(stream, outgoing.body.remaining)
    outgoing.body.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def feed(exchange: Exchange, answer: bytes, step: int = 0) -> None:
    """Feeds an answer, ``step`` bytes at a time, and the server's end; finishes or aborts."""
    receiver = ResponseReceiver()
    step = step or len(answer) or 1
    try:
        for offset in range(0, len(answer), step):
            for part in receiver.feed(memoryview(answer[offset : offset + step])):
                exchange.take(part)
        for part in receiver.close():
            exchange.take(part)
    except BackupError:
        exchange.abort()
        raise
    exchange.finish()


def expect(place: Place, op: str, answer: bytes, kind: Type[BackupError], text: str) -> None:
    """The answer ends in exactly this error however it is cut, and touches no file."""
    before = snapshot(place.folder)
    for step in (0, 1):
        with pytest.raises(kind, match=text) as caught:
            feed(place.make(place.job(op)), answer, step)
        assert type(caught.value) is kind
        assert snapshot(place.folder) == before


@pytest.mark.parametrize(
    ("op", "head"),
    [
        ("BACKUP", request(USER, 100, b"a", b"", size=len(OLD))),
        ("RETRIEVE", request(USER, 200, b"a")),
        ("DELETE", request(USER, 201, b"a")),
        ("LIST", request(USER, 202)),
    ],
)
def test_each_job_asks_what_the_protocol_says(place: Place, op: str, head: bytes) -> None:
    exchange = exchange_for(place.job(op), USER, lambda done, size: None, MAX_LISTING, MAX_NAMES)
    for _ in range(2):  # again, when an address could not be reached
        outgoing = exchange.request()
        assert outgoing.head == head
        assert (outgoing.body is not None) == (op == "BACKUP")
        if outgoing.body is not None:
            assert outgoing.body.remaining == len(OLD)
            outgoing.body.close()


@pytest.mark.parametrize("op", CASES)
def test_a_lawful_answer_takes_effect_and_nothing_else_does(place: Place, op: str) -> None:
    for step in (0, 1, 3):
        place.target.write_bytes(OLD)
        before = snapshot(place.folder)
        exchange = place.make(place.job(op))
        feed(exchange, CASES[op].success, step)
        if op == "RETRIEVE":
            before[str(place.target)] = NEW
        assert snapshot(place.folder) == before
        assert exchange.names == (["a", "b"] if op == "LIST" else [])
        sizes = {"BACKUP": len(OLD), "RETRIEVE": len(NEW), "DELETE": 0, "LIST": 4 + 3 + 3}
        assert exchange.bytes == sizes[op]


@pytest.mark.parametrize("step", [0, 1, 3])
def test_what_is_received_is_reported_up_to_its_size(place: Place, step: int) -> None:
    feed(place.make(place.job("RETRIEVE")), CASES["RETRIEVE"].success, step)
    done = [done for done, _ in place.reports]
    assert done == sorted(done)
    assert place.reports[-1] == (len(NEW), len(NEW))
    assert {size for _, size in place.reports} == {len(NEW)}


def test_a_file_without_a_byte_is_retrieved(place: Place) -> None:
    feed(place.make(place.job("RETRIEVE")), response(212, b"a", file_payload(b"")))
    assert place.target.read_bytes() == b""


def test_a_user_without_files_has_an_empty_listing(place: Place) -> None:
    exchange = place.make(Listing())
    feed(exchange, response(212, b"", listing()))
    assert exchange.names == []


@pytest.mark.parametrize(
    ("op", "status", "kind", "text"),
    [
        (
            "BACKUP",
            1001,
            Refused,
            "the server did not store it (a cap, append-only, or its disk); its log says why",
        ),
        ("RETRIEVE", 1001, Refused, "the server could not do it; its log says why"),
        ("RETRIEVE", 1003, NotFound, "not on the server"),
        ("DELETE", 1002, NotDeleted, "not on the server, or it could not be removed there"),
        ("LIST", 1001, Refused, "the server could not do it; its log says why"),
    ],
)
def test_a_failure_status_is_the_error_of_its_operation(
    place: Place, op: str, status: int, kind: Type[BackupError], text: str
) -> None:
    expect(place, op, response(status, CASES[op].name), kind, f"^{re.escape(text)}$")


def test_a_refused_empty_file_is_called_empty(place: Place) -> None:
    place.source.write_bytes(b"")
    answer = response(1001, b"a")
    expect(place, "BACKUP", answer, Refused, "^the server refuses an empty file$")


@pytest.mark.parametrize("op", CASES)
def test_a_status_of_another_operation_is_no_answer(place: Place, op: str) -> None:
    for status in {*EVERY_STATUS} - {*CASES[op].statuses}:
        text = f"status {status} with 0 bytes answers no {op}"
        expect(place, op, response(status, CASES[op].name), ProtocolError, text)


@pytest.mark.parametrize("op", CASES)
def test_an_answer_of_another_version_is_not_believed(place: Place, op: str) -> None:
    for version in (0, 2, 255):
        answer = bytes([version]) + CASES[op].success[1:]
        expect(place, op, answer, ProtocolError, f"version {version}, not 1")


@pytest.mark.parametrize("op", CASES)
def test_an_answer_for_another_name_is_not_believed(place: Place, op: str) -> None:
    case = CASES[op]
    status, size = struct.unpack_from("<HxxI", case.success, 1)
    payload = case.success[len(case.success) - size :]
    for name in {b"b", b"", b"aa", b"A", b"n" * 65535} - {case.name}:
        answer = response(status, name, payload)
        expect(place, op, answer, ProtocolError, "another name")


def test_what_a_server_says_instead_of_the_name_is_shown_escaped(place: Place) -> None:
    with pytest.raises(ProtocolError) as caught:
        feed(place.make(place.job("DELETE")), response(211, b"\x1b[31m\n"))
    assert str(caught.value).isprintable()


def test_what_a_server_says_instead_of_the_name_is_shown_only_so_long(place: Place) -> None:
    with pytest.raises(ProtocolError, match=r"is for 'n{255}\.\.\.', another name$"):
        feed(place.make(place.job("DELETE")), response(211, b"n" * 65535))


@pytest.mark.parametrize(
    ("op", "answer", "text"),
    [
        ("BACKUP", response(210, b"a", b"xyz"), "3 bytes of payload answer a BACKUP"),
        ("DELETE", response(211, b"a", b"xyz"), "3 bytes of payload answer a DELETE"),
        ("BACKUP", response(1001, b"a", b"xyz"), "status 1001 with 3 bytes"),
        ("RETRIEVE", response(1001, b"a", b"xyz"), "status 1001 with 3 bytes"),
        ("RETRIEVE", response(1003, b"a", b"xyz"), "status 1003 with 3 bytes"),
        ("DELETE", response(1002, b"a", b"xyz"), "status 1002 with 3 bytes"),
        ("LIST", response(1001, b"", b"xyz"), "status 1001 with 3 bytes"),
        ("RETRIEVE", response(212, b"a"), "0 bytes cannot hold a file's size"),
        ("RETRIEVE", response(212, b"a", b"\x00\x00\x00"), "3 bytes cannot hold a file's size"),
        ("RETRIEVE", response(212, b"a", b"\x04\x00\x00\x00xyz"), "4 bytes in a payload for 3"),
        ("RETRIEVE", response(212, b"a", b"\x02\x00\x00\x00xyz"), "2 bytes in a payload for 3"),
        ("RETRIEVE", response(212, b"a", b"\x00\x00\x00\x00xyz"), "0 bytes in a payload for 3"),
        ("RETRIEVE", response(212, b"a", b"\xff\xff\xff\xff"), "4294967295 bytes in a payload for"),
        ("LIST", response(212), "a listing of 0 bytes, not 4 to 64"),
        ("LIST", response(212, b"", b"\x00\x00\x00"), "a listing of 3 bytes, not 4 to 64"),
        ("LIST", response(212, b"", b"\x00" * 65), "a listing of 65 bytes, not 4 to 64"),
        ("LIST", response(212, b"", listing(count=1)), "ends before the names it counts"),
        ("LIST", response(212, b"", listing(b"a", count=2)), "ends before the names it counts"),
        ("LIST", response(212, b"", listing(b"a", count=2**32 - 1)), "ends before the names"),
        ("LIST", response(212, b"", listing(b"a", b"b", count=1)), "3 bytes follow the last name"),
        ("LIST", response(212, b"", listing(b"a", count=0)), "3 bytes follow the last name"),
        ("LIST", response(212, b"", listing(b"a", count=0))[:13], "least 3 bytes follow the last"),
        ("LIST", response(212, b"", listing(b"a", count=2))[:13], "ends before the names"),
        ("LIST", response(212, b"", listing(*[b"a"] * 9)), "a listing of 9 names, more than 8"),
        ("LIST", response(212, b"", listing(*[b"a"] * 9))[:13], "of 9 names, more than 8"),
        ("LIST", response(212, b"", listing(b"abc")[:-1]), "3 bytes passes the payload's end"),
    ],
)
def test_a_size_that_lies_is_not_believed(place: Place, op: str, answer: bytes, text: str) -> None:
    expect(place, op, answer, ProtocolError, text)


@pytest.mark.parametrize(
    "name",
    [b"", b".", b"..", b"../a", b"a/b", b"a\\b", b"a\x00", b"a\x1b[2J", b"\xff", b"\xc2\x85"],
)
def test_a_listed_name_that_breaks_the_rule_is_a_protocol_error(place: Place, name: bytes) -> None:
    answer = response(212, b"", listing(b"a", name, b"bb"))
    with pytest.raises(ProtocolError, match="the server lists") as caught:
        feed(place.make(Listing()), answer)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("op", CASES)
def test_nothing_may_follow_the_answer(place: Place, op: str) -> None:
    for more in (b"x", b"x" * 1000):
        expect(place, op, CASES[op].success + more, ProtocolError, "follow the server's answer")


@pytest.mark.parametrize("op", CASES)
def test_an_answer_that_is_cut_short_takes_no_effect(place: Place, op: str) -> None:
    case = CASES[op]
    for length in range(len(case.success)):
        if length < 9:
            state = "header"
        elif length < 9 + len(case.name):
            state = "filename"
        else:
            state = "payload"
        text = f"the server ended inside the answer's {state}; try again"
        if state == "header":
            text = "it closed without a whole answer; is it a backup server?"
        expect(place, op, case.success[:length], CutShort, text)


@pytest.mark.parametrize("op", CASES)
def test_a_server_of_another_kind_is_not_tried_again(place: Place, op: str) -> None:
    """Its first bytes read as a header whose name never ends; the advice must not be a retry."""
    answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
    expect(place, op, answer, ProtocolError, "version 72, not 1")


def test_a_file_that_was_not_sent_whole_cannot_have_been_stored(place: Place) -> None:
    exchange = exchange_for(
        place.job("BACKUP"), USER, lambda done, size: None, MAX_LISTING, MAX_NAMES
    )
    outgoing = exchange.request()
    assert outgoing.body is not None
    with closing(outgoing.body), pytest.raises(ProtocolError):
        feed(exchange, CASES["BACKUP"].success)


def test_a_new_file_is_only_there_when_the_whole_answer_was_right(place: Place) -> None:
    path = place.folder / "new"
    exchange = place.make(Retrieve("a", path))
    receiver = ResponseReceiver()
    parts = receiver.feed(memoryview(CASES["RETRIEVE"].success)) + receiver.close()
    for part in parts:
        exchange.take(part)
        assert not path.exists()
    exchange.finish()
    assert path.read_bytes() == NEW


def test_a_file_that_came_meanwhile_is_not_overwritten(place: Place) -> None:
    path = place.folder / "new"
    exchange = place.make(Retrieve("a", path))
    path.write_bytes(OLD)
    with pytest.raises(TargetExists):
        feed(exchange, CASES["RETRIEVE"].success)
    assert path.read_bytes() == OLD


def test_a_file_that_is_there_is_noticed_before_anything_is_asked(place: Place) -> None:
    with pytest.raises(TargetExists):
        place.make(Retrieve("a", place.target))


def test_a_file_that_is_missing_is_noticed_when_it_is_asked_for(place: Place) -> None:
    exchange = exchange_for(
        Backup(place.folder / "none", "a"), USER, lambda done, size: None, MAX_LISTING, MAX_NAMES
    )
    with pytest.raises(LocalFileError, match="no such file"):
        exchange.request()


@pytest.mark.parametrize(
    "make",
    [
        lambda name: Backup("source", name),
        lambda name: Retrieve(name, "target"),
        lambda name: Delete(name),
    ],
)
@pytest.mark.parametrize("name", ["", "..", "a/b", "\udcff", "n" * 256])
def test_an_unlawful_name_is_not_even_asked_for(
    place: Place, make: Callable[[str], Job], name: str
) -> None:
    with pytest.raises(InvalidName):
        place.make(make(name))


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (Backup("/tmp/b", "a b"), "a b"),
        (Retrieve("a\x1b", "b"), "a\\x1b"),
        (Delete("a"), "a"),
        (Listing(), ""),
    ],
)
def test_a_job_is_about_a_name_that_is_safe_to_print(job: Job, expected: str) -> None:
    assert subject(job) == expected


def test_payload_that_no_field_allows_is_a_fault_of_this_program() -> None:
    with pytest.raises(AssertionError):
        DeleteExchange(USER, Delete("a")).take(Data(memoryview(b"x")))
