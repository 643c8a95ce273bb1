"""Counters count each thing once, by what it came to, and a signal or the end shows them."""

from __future__ import annotations

import re
from typing import List

import pytest

from backup.counters import Counters
from backup.settings import Settings
from tests.conftest import ServerFactory
from tests.helpers import RunningServer, ask, connect, read_all, request, response


def test_a_server_that_has_done_nothing_says_so() -> None:
    assert Counters().fields(0, 0.0) == {
        "open": 0,
        "total": 0,
        "refused": 0,
        "bytes_in": 0,
        "bytes_out": 0,
        "commits": 0,
        "files_per_commit": 0.0,
        "slowest_turn_ms": 0.0,
    }


def test_requests_are_counted_by_op_and_status_and_bytes_by_their_way() -> None:
    counters = Counters()
    for op, status, count in (
        (200, 212, 7),
        (100, 210, 10),
        (100, 210, 1),
        (100, None, 5),
        (202, 212, 4),
        (99, 1001, 0),
    ):
        counters.request(op, status, count)
    fields = counters.fields(0, 0.0)
    requests = {name: value for name, value in fields.items() if name.startswith("requests")}
    assert requests == {
        "requests_99_1001": 1,
        "requests_100_broken": 1,
        "requests_100_210": 2,
        "requests_200_212": 1,
        "requests_202_212": 1,
    }
    assert list(requests) == sorted(requests, key=lambda name: int(name.split("_")[1]))
    assert (fields["bytes_in"], fields["bytes_out"]) == (16, 11)


@pytest.mark.parametrize(
    ("commits", "average"), [([1], 1.0), ([1, 2], 1.5), ([64, 1, 1], 22.0), ([1, 1, 2], 1.3)]
)
def test_files_per_commit_are_an_average(commits: List[int], average: float) -> None:
    counters = Counters()
    for files in commits:
        counters.commit(files)
    fields = counters.fields(0, 0.0)
    assert (fields["commits"], fields["files_per_commit"]) == (len(commits), average)


def test_connections_and_the_slowest_turn_are_told() -> None:
    counters = Counters()
    counters.opened, counters.refused = 12, 3
    fields = counters.fields(2, 0.012345)
    assert [fields[name] for name in ("open", "total", "refused")] == [2, 12, 3]
    assert fields["slowest_turn_ms"] == 12.3


def counted(server: RunningServer) -> str:
    """A report, asked for from another thread than the server's."""
    server.server.report()
    return server.wait_for_line(lambda line: line.startswith("Counters "))


def test_a_server_reports_while_it_serves(server: RunningServer) -> None:
    for name in (b"a", b"b"):
        assert ask(server.address, request(11, 100, name, b"0123456789")) == response(210, name)
    ask(server.address, request(11, 200, b"a"))
    ask(server.address, request(11, 201, b"none"))
    with connect(server.address) as sock:
        sock.sendall(request(11, 202) + b"excess")
        read_all(sock)
        sock.sendall(b"more")
        line = counted(server)
    expected = (
        r"Counters open=[01] total=5 refused=0 requests_100_210=2 requests_200_212=1"
        r" requests_201_1002=1 requests_202_212=1 bytes_in=20 bytes_out=20 commits=3"
        r" files_per_commit=1\.0 slowest_turn_ms=[0-9]+\.[0-9] log_lines_lost=0"
    )
    assert re.fullmatch(expected, line), line


def test_connections_that_are_open_are_told_apart_from_all(serve: ServerFactory) -> None:
    server = serve(Settings())
    with connect(server.address) as one, connect(server.address) as two:
        for sock in (one, two):
            sock.sendall(request(11, 100, b"a", b"x", size=2))
        ask(server.address, request(12, 202))
        line = counted(server)
        assert re.match(r"Counters open=[23] total=3 ", line), line


def test_what_breaks_is_counted_as_broken_and_the_end_reports_too(serve: ServerFactory) -> None:
    server = serve()
    with connect(server.address) as sock:
        sock.sendall(request(11, 100, b"a", b"x", size=2))
        ask(server.address, request(12, 202))
        server.stop()
    (line,) = [line for line in server.lines if line.startswith("Counters ")]
    assert " open=0 total=2 " in line
    assert " requests_100_broken=1 requests_202_212=1 bytes_in=1 bytes_out=4 commits=0 " in line
    assert server.lines[-1] == "Stopped"
