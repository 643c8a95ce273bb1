"""The log's lines: kept, written together once a turn, and counted when they are lost."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from pathlib import Path
from typing import ClassVar, Dict, List, Optional, Sequence

import pytest

from backup.log import (
    BACKLOG,
    PREFIX,
    Line,
    Log,
    as_json,
    as_text,
    to_logging,
    to_stream,
)


class Collector:
    """A sink that keeps each write; while ``broken``, it raises that."""

    def __init__(self) -> None:
        self.writes: List[List[str]] = []
        self.broken: List[Exception] = []

    def __call__(self, lines: Sequence[Line]) -> None:
        if self.broken:
            raise self.broken[-1]
        self.writes.append([line.text for line in lines])


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_lines_are_kept_until_flush_and_written_together() -> None:
    sink = Collector()
    log = Log(sink)
    log.add(logging.INFO, "one")
    log.add(logging.WARNING, "two")
    assert sink.writes == []
    log.flush()
    assert sink.writes == [["one", "two"]]


def test_without_a_line_nothing_is_written() -> None:
    sink = Collector()
    log = Log(sink)
    log.flush()
    log.add(logging.INFO, "one")
    log.flush()
    log.flush()
    assert sink.writes == [["one"]]


@pytest.mark.parametrize(
    ("level", "written"),
    [
        (logging.DEBUG, ["debug", "info", "warning"]),
        (logging.INFO, ["info", "warning"]),
        (logging.WARNING, ["warning"]),
    ],
)
def test_lines_below_the_level_are_not_kept(level: int, written: List[str]) -> None:
    sink = Collector()
    log = Log(sink, level)
    log.add(logging.DEBUG, "debug")
    log.add(logging.INFO, "info")
    log.add(logging.WARNING, "warning")
    log.flush()
    assert sink.writes == [written]


def test_unless_told_otherwise_the_level_is_info() -> None:
    sink = Collector()
    log = Log(sink)
    log.add(logging.DEBUG, "debug")
    log.flush()
    assert sink.writes == []


def test_lost_lines_are_counted_and_the_next_write_says_so() -> None:
    sink = Collector()
    log = Log(sink)
    sink.broken.append(disk_full())
    for turn in (["one", "two"], ["three"]):
        for text in turn:
            log.add(logging.INFO, text)
        log.flush()
    assert log.dropped == 3
    sink.broken.clear()
    log.add(logging.INFO, "four")
    log.flush()
    assert sink.writes == [["lines of this log that were lost: 3", "four"]]
    assert log.dropped == 0
    log.add(logging.INFO, "five")
    log.flush()
    assert sink.writes[1:] == [["five"]]


def test_the_loss_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(to_logging)
    log.dropped = 7
    log.add(logging.INFO, "one")
    with caplog.at_level(logging.WARNING, "backup"):
        log.flush()
    assert caplog.record_tuples == [
        ("backup", logging.WARNING, "lines of this log that were lost: 7")
    ]


def test_a_full_device_stops_nobody_and_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with open("/dev/full", "w", encoding="utf-8") as stream, open(path, "w") as roomy:
        log = Log(to_stream(stream))
        log.add(logging.INFO, "one")
        log.flush()
        assert log.dropped == 1
        os.dup2(roomy.fileno(), stream.fileno())
        log.add(logging.INFO, "two")
        log.flush()
        assert log.dropped == 0
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[-2:] == ["[SERVER] lines of this log that were lost: 1", "[SERVER] two"]


def test_a_log_whose_reader_has_gone_stops_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as pipe:
        log = Log(to_stream(io.TextIOWrapper(pipe, write_through=True)))
        log.add(logging.INFO, "one")
        log.flush()
    assert log.dropped == 1


def test_a_log_whose_stream_is_closed_stops_nobody() -> None:
    stream = io.StringIO()
    log = Log(to_stream(stream))
    stream.close()
    log.add(logging.INFO, "one")
    log.flush()
    assert log.dropped == 1


def test_a_line_that_the_streams_encoding_lacks_stops_nobody() -> None:
    written = io.BytesIO()
    log = Log(to_stream(io.TextIOWrapper(written, encoding="ascii")))
    for text in ("file=é", "file=e"):
        log.add(logging.INFO, text)
        log.flush()
    assert written.getvalue().endswith(b"[SERVER] file=e\n")


def test_a_stream_gets_prefixed_lines_in_one_write() -> None:
    class Stream(io.StringIO):
        writes: ClassVar[List[str]] = []
        flushed = 0

        def write(self, text: str) -> int:
            self.writes.append(text)
            return len(text)

        def flush(self) -> None:
            self.flushed += 1

    stream = Stream()
    to_stream(stream)([Line(logging.INFO, "one"), Line(logging.WARNING, "two")])
    assert stream.writes == [f"{PREFIX}one\n{PREFIX}two\n"]
    assert stream.flushed == 1
    assert PREFIX == "[SERVER] "


def test_a_server_in_a_library_logs_to_the_logger_backup(caplog: pytest.LogCaptureFixture) -> None:
    log = Log(to_logging)
    with caplog.at_level(logging.INFO, "backup"):
        log.add(logging.INFO, "file=100%s")  # a name is no format
        log.add(logging.WARNING, "two")
        log.flush()
    assert caplog.record_tuples == [
        ("backup", logging.INFO, "file=100%s"),
        ("backup", logging.WARNING, "two"),
    ]


# -- lines as values ----------------------------------------------------------

REQUEST = {
    "user": 7,
    "op": 100,
    "file": "two\\x20words",
    "status": None,
    "bytes": 3,
    "ms": 2.0,
    "peer": "127.0.0.1:1",
    "reason": "cut",
}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (Line(logging.INFO, "Stopped"), "Stopped"),
        (
            Line(logging.INFO, "", REQUEST),
            "user=7 op=100 file=two\\x20words status=- bytes=3 ms=2.0 peer=127.0.0.1:1 reason=cut",
        ),
        (Line(logging.DEBUG, "closed", {"peer": "h:1"}), "closed peer=h:1"),
        (Line(logging.INFO, "", {"file": ""}), "file="),
    ],
)
def test_a_line_as_text_is_its_message_and_its_fields(line: Line, text: str) -> None:
    assert line.text == text
    assert as_text(line) == f"[SERVER] {text}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (Line(logging.INFO, "Stopped"), {"level": "info", "message": "Stopped"}),
        (Line(logging.INFO, "", REQUEST), {"level": "info", **REQUEST}),
        (
            Line(logging.WARNING, 'a "quoted"\nline of ünï', {"peer": "h:1"}),
            {"level": "warning", "message": 'a "quoted"\nline of ünï', "peer": "h:1"},
        ),
    ],
)
def test_a_line_as_json_is_one_object_with_the_same_fields(
    line: Line, expected: Dict[str, object]
) -> None:
    written = as_json(line)
    assert written.count("\n") == 1
    assert written.endswith("}\n")
    assert written.isascii()
    found = json.loads(written)
    assert found == expected
    assert list(found) == list(expected)


def test_what_was_asked_for_is_written_whatever_the_level() -> None:
    sink = Collector()
    log = Log(sink, logging.WARNING)
    log.add(logging.INFO, "not asked for")
    log.answer("Counters", {"open": 3})
    log.flush()
    assert sink.writes == [["Counters open=3"]]


# -- a sink that takes only some ----------------------------------------------


class Narrow:
    """A sink that takes as many lines as there is ``room`` for."""

    def __init__(self) -> None:
        self.room = 0
        self.taken: List[str] = []

    def __call__(self, lines: Sequence[Line]) -> Optional[int]:
        count = min(self.room, len(lines))
        self.taken += [line.text for line in lines[:count]]
        self.room -= count
        return count


def test_lines_that_are_not_taken_are_kept_in_order() -> None:
    sink = Narrow()
    log = Log(sink)
    for number in range(5):
        log.add(logging.INFO, str(number))
    for room in (0, 2, 0, 1, 5):
        sink.room = room
        log.flush()
    assert sink.taken == ["0", "1", "2", "3", "4"]
    assert log.dropped == 0


def test_beyond_the_backlog_the_oldest_are_lost_and_told_in_their_place() -> None:
    sink = Narrow()
    log = Log(sink)
    total = BACKLOG + 10
    for number in range(total):
        log.add(logging.INFO, str(number))
    log.flush()
    assert log.dropped == 10
    log.flush()
    assert log.dropped == 10
    sink.room = 2
    log.flush()
    assert sink.taken == ["lines of this log that were lost: 10", "10"]
    assert log.dropped == 0
    sink.room = total
    log.flush()
    assert sink.taken[2:] == [str(number) for number in range(11, total)]


def test_many_lines_of_one_turn_are_no_backlog() -> None:
    sink = Collector()
    log = Log(sink)
    for number in range(3 * BACKLOG):
        log.add(logging.INFO, str(number))
    log.flush()
    assert len(sink.writes[0]) == 3 * BACKLOG
    assert log.dropped == 0


def test_the_backlog_is_bounded_however_long_nothing_gets_through() -> None:
    sink = Narrow()
    log = Log(sink)
    for number in range(5 * BACKLOG):
        log.add(logging.INFO, str(number))
        log.flush()
        assert len(log._lines) <= BACKLOG
    assert log.dropped == 4 * BACKLOG


def test_at_the_end_a_slow_reader_is_waited_for_and_the_rest_is_counted() -> None:
    taken: List[str] = []
    turns = [0, 0, 1, 0, 1]

    def slow(lines: Sequence[Line]) -> int:
        count = turns.pop(0) if turns else 0
        taken.extend(line.message for line in lines[:count])
        return count

    log = Log(slow)
    for message in ("one", "two", "three"):
        log.add(logging.INFO, message)
    log.drain(0.2)
    assert taken == ["one", "two"]
    assert log.lost == 1
    log.drain(0.2)
    assert log.lost == 1
