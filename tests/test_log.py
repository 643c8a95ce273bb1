"""The log's lines: kept, written together once a turn, and counted when they are lost."""

from __future__ import annotations

import errno
import io
import logging
import os
from pathlib import Path
from typing import List, Sequence

import pytest

from backup.log import PREFIX, Line, Log, to_logging, to_stream


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
    assert sink.writes == [["3 lines of this log were lost", "four"]]
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
    assert caplog.record_tuples == [("backup", logging.WARNING, "7 lines of this log were lost")]


def test_a_full_device_loses_lines_and_stops_nobody() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        log = Log(to_stream(full))
        log.add(logging.INFO, "one")
        log.flush()
        assert log.dropped == 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
