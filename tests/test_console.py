"""What is printed where: on a terminal, a real one, and where there is none."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import termios
from contextlib import contextmanager, suppress
from typing import Callable, Dict, Iterator, List, Optional, TextIO

import pytest

from backup.console import Console, Meter
from backup.errors import OutputFailed
from backup.exchange import Backup, Retrieve
from tests.helpers import WAIT_SECONDS

END = "\0"


class Terminal:
    """A pseudo-terminal: ``stream`` writes to it, ``shown`` is what it was sent."""

    def __init__(self, columns: int = 80) -> None:
        self._screen, keys = pty.openpty()
        fcntl.ioctl(keys, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(keys, "w", encoding="utf-8")
        self._written = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        os.close(self._screen)

    def wait_for(self, text: str) -> None:
        """Returns when the text has been written."""
        while text.encode() not in self._written:
            assert select.select([self._screen], [], [], WAIT_SECONDS)[0], self._written
            self._written += os.read(self._screen, 1 << 16)

    def shown(self) -> str:
        """What has been written since the last time."""
        self.stream.write(END)  # what is written takes a moment, but keeps its order
        self.stream.flush()
        self.wait_for(END)
        written, self._written = self._written, b""
        return written.decode("utf-8").replace("\r\n", "\n").replace(END, "")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal() as terminal:
        yield terminal


def on_screen(written: str) -> List[str]:
    """The lines that a person sees: a return goes back to the line's begin and writes over it."""
    lines = []
    for line in written.split("\n"):
        cells: List[str] = []
        for piece in line.split("\r"):
            cells[: len(piece)] = piece
        lines.append("".join(cells).rstrip())
    return lines


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


# -- results, errors, notices -------------------------------------------------


def test_results_go_to_stdout_and_all_else_to_stderr() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, {})
    console.result("a result")
    console.record({"for": "programs"})
    console.notice("worth knowing")
    console.error("it failed")
    console.end()
    assert out.getvalue() == "a result\n"
    assert err.getvalue() == "backup: worth knowing\nbackup: it failed\n"
    assert not console.shows_progress


def test_what_is_said_arrives_at_once() -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(reading, "rb", buffering=0) as pipe, os.fdopen(writing, "w") as stream:
        people, programs = Console(stream, stream, {}), Console(stream, stream, {})
        programs.choose(as_json=True)
        said: List[Optional[bytes]] = []
        says: List[Callable[[], None]] = [
            lambda: people.result("a result"),
            lambda: people.notice("worth knowing"),
            lambda: people.error("it failed"),
            lambda: people.progress("half way"),
            lambda: people.end(),
            lambda: programs.record({}),
        ]
        for say in says:
            say()
            said.append(pipe.read(100))
    assert said == [
        b"a result\n",
        b"backup: worth knowing\n",
        b"backup: it failed\n",
        b"\rhalf way",
        b"\r        \r",
        b"{}\n",
    ]


def test_with_json_stdout_carries_objects_alone() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(out, err, {})
    console.choose(as_json=True)
    console.result("a result")
    console.record({"name": "ä\n\udcff", "ok": True})
    console.record({"summary": True})
    lines = out.getvalue().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "ä\n\udcff", "ok": True},
        {"summary": True},
    ]
    assert out.getvalue().isascii()
    assert err.getvalue() == ""


def test_quiet_leaves_out_notices_and_progress_but_no_error(terminal: Terminal) -> None:
    console = Console(io.StringIO(), terminal.stream, {"NO_COLOR": "1"})
    console.choose(quiet=True)
    console.notice("worth knowing")
    console.error("it failed")
    assert not console.shows_progress
    assert terminal.shown() == "backup: it failed\n"


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({}, "\x1b[31mbackup:\x1b[0m"),
        ({"NO_COLOR": ""}, "\x1b[31mbackup:\x1b[0m"),
        ({"NO_COLOR": "1"}, "backup:"),
        ({"NO_COLOR": "0"}, "backup:"),
    ],
)
def test_an_error_is_red_unless_the_user_wants_no_colour(
    terminal: Terminal, environ: Dict[str, str], word: str
) -> None:
    console = Console(io.StringIO(), terminal.stream, environ)
    console.error("it failed")
    console.notice("worth knowing")
    assert terminal.shown() == f"{word} it failed\nbackup: worth knowing\n"


def test_a_listed_name_is_raw_for_a_program_and_escaped_on_a_terminal(terminal: Terminal) -> None:
    name = "a b\u202etxt"
    out = io.StringIO()
    Console(out, io.StringIO(), {}).name(name)
    Console(terminal.stream, io.StringIO(), {}).name(name)
    assert out.getvalue() == f"{name}\n"
    assert terminal.shown() == "a b\\u202etxt\n"


@contextmanager
def full_disk() -> Iterator[TextIO]:
    """A stream on a disk without room."""
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as stream:
        yield stream


def test_a_result_that_cannot_be_written_is_an_error() -> None:
    with full_disk() as stream:
        people, programs = Console(stream, io.StringIO(), {}), Console(stream, io.StringIO(), {})
        programs.choose(as_json=True)
        says: List[Callable[[], None]] = [
            lambda: people.result("a result"),
            lambda: people.name("a.txt"),
            lambda: programs.record({}),
            lambda: people.flush(),
        ]
        for say in says:
            with pytest.raises(OutputFailed, match=r"^cannot write the output: no space left"):
                say()


def test_what_stderr_does_not_take_is_lost_and_nothing_else_changes() -> None:
    out = io.StringIO()
    with full_disk() as stream:
        console = Console(out, stream, {})
        console.notice("worth knowing")
        console.error("it failed")
        console.progress("half way")
        console.result("a result")
        console.end()
    assert out.getvalue() == "a result\n"


# -- the progress line --------------------------------------------------------


def test_the_progress_line_is_drawn_over_and_taken_away(terminal: Terminal) -> None:
    console = Console(terminal.stream, terminal.stream, {"NO_COLOR": "1"})
    assert console.shows_progress
    console.progress("the first is a long one")
    console.progress("the second")
    assert on_screen(terminal.shown()) == ["the second"]
    console.progress("half way")
    console.result("one file done")
    console.progress("and on")
    console.error("it failed")
    console.progress("and on")
    console.notice("worth knowing")
    console.progress("at the end")
    console.end()
    console.end()
    assert on_screen(terminal.shown()) == [
        "one file done",
        "backup: it failed",
        "backup: worth knowing",
        "",
    ]


def test_a_record_takes_the_progress_line_away_too(terminal: Terminal) -> None:
    console = Console(terminal.stream, terminal.stream, {})
    console.choose(as_json=True)
    console.progress("half way through a file")
    console.record({})
    assert on_screen(terminal.shown()) == ["{}", ""]


def test_a_terminal_that_does_not_say_its_width_has_80_columns() -> None:
    with Terminal(0) as terminal:
        Console(io.StringIO(), terminal.stream, {}).progress("x" * 200)
        assert terminal.shown() == "\r" + "x" * 79
    err = io.StringIO()
    Console(io.StringIO(), err, {}).progress("x" * 200)
    assert err.getvalue() == "\r" + "x" * 79


@pytest.mark.parametrize("columns", [20, 132])
def test_the_progress_line_fits_into_the_terminal_that_shows_it(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stdout is: it may be redirected, and stderr be a terminal of another width."""
    monkeypatch.delenv("COLUMNS", raising=False)
    with Terminal(columns) as terminal:
        Console(io.StringIO(), terminal.stream, {}).progress("x" * 200)
        assert terminal.shown() == "\r" + "x" * (columns - 1)


# -- the meter ----------------------------------------------------------------


def meter(terminal: Terminal, clock: Clock, count: int, total: int = 0) -> Meter:
    return Meter(Console(io.StringIO(), terminal.stream, {}), count, total, clock)


def test_the_meter_adds_up_all_files(terminal: Terminal) -> None:
    clock = Clock()
    draw = meter(terminal, clock, 3, 40_000_000)
    one, two = Backup("x/one", "one"), Backup("x/two", "two")
    draw(one, 1_000_000, 10_000_000)
    clock.seconds += 2
    draw(two, 3_000_000, 25_000_000)
    assert on_screen(terminal.shown()) == [
        "4.0 MB of 40.0 MB  10%  2.0 MB/s  0:18 left  file 2 of 3  two"
    ]
    assert draw.line(one, 4.0) == "4.0 MB of 40.0 MB  10%  1.0 MB/s  0:36 left  file 2 of 3  one"
    assert (
        draw.line(one, 400.0) == "4.0 MB of 40.0 MB  10%  10.0 KB/s  1:00:00 left  file 2 of 3  one"
    )


def test_without_a_total_the_share_is_known_when_every_file_has_begun(terminal: Terminal) -> None:
    clock = Clock()
    draw = meter(terminal, clock, 2)
    one, two = Retrieve("one", "x"), Retrieve("two", "y")
    draw(one, 500, 1000)
    assert draw.line(one, 1.0) == "500 bytes  500 bytes/s  file 1 of 2  one"
    draw(two, 250, 2000)
    assert (
        draw.line(two, 1.0) == "750 bytes of 3.0 KB  25%  750 bytes/s  0:03 left  file 2 of 2  two"
    )


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (1_999_999, "1.9 MB"),
        (1_549_999_999, "1.5 GB"),
        (4_294_967_291, "4.2 GB"),
        (12_345_678_901_234, "12345.6 GB"),
    ],
)
def test_sizes_have_a_decimal_and_are_rounded_down(
    terminal: Terminal, size: int, shown: str
) -> None:
    draw = meter(terminal, Clock(), 1, size)
    draw(Backup("x", "x"), size, size)
    assert on_screen(terminal.shown())[0].startswith(f"{shown} of {shown}  100%")


def test_a_file_that_grew_past_the_total_is_at_most_all_of_it(terminal: Terminal) -> None:
    draw = meter(terminal, Clock(), 1, 100)
    job = Backup("one", "one")
    draw(job, 150, 150)
    assert "  100%  150 bytes/s  0:00 left  " in draw.line(job, 1.0)


def test_before_any_time_has_passed_there_is_no_rate(terminal: Terminal) -> None:
    draw = meter(terminal, Clock(), 1, 100)
    job = Backup("one", "one")
    draw(job, 50, 100)
    assert draw.line(job, 0.0) == "50 bytes of 100 bytes  50%  0 bytes/s  file 1 of 1  one"


def test_a_name_is_shown_so_that_it_cannot_forge_the_line(terminal: Terminal) -> None:
    draw = meter(terminal, Clock(), 1)
    job = Backup("x", "\x1b[2J\r\u202e name")
    draw(job, 1, 2)
    assert draw.line(job, 1.0).endswith("  \\x1b[2J\\x0d\\u202e name")


def test_the_line_is_redrawn_ten_times_a_second_at_most(terminal: Terminal) -> None:
    clock = Clock()
    draw = meter(terminal, clock, 1, 1000)
    job = Backup("x", "x")
    for done in range(1, 1000):
        draw(job, done, 1000)
        clock.seconds += 1 / 128
    drawn = terminal.shown().split("\r")[1:]
    assert len(drawn) == 999 // 13 + 1
    assert drawn[0].startswith("1 bytes of 1.0 KB")


def test_where_there_is_no_terminal_nothing_is_drawn() -> None:
    err = io.StringIO()
    draw = Meter(Console(io.StringIO(), err, {}), 1)
    draw(Backup("x", "x"), 1, 2)
    assert err.getvalue() == ""
