"""What a person or a program reads: results, errors, the progress line, JSON.

Rules: results go to stdout, everything else to stderr. The progress line is
there only while stderr is a terminal, and colour only if that terminal's user
has not set NO_COLOR (https://no-color.org). With ``--json``, stdout carries one
object a line and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from typing import Callable, Dict, Mapping, TextIO

from .errors import OutputFailed
from .exchange import Job, subject
from .names import show
from .sequence import UNITS, format_size

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
_REDRAW_SECONDS = 0.1


class Console:
    """Both streams; ``choose`` says how much is said, and whether results are JSON.

    Results that cannot be written raise ``OutputFailed``. What is said on stderr
    is lost when that cannot be written, and nothing else changes.
    """

    def __init__(self, out: TextIO, err: TextIO, environ: Mapping[str, str]) -> None:
        self._out = out
        self._err = err
        self._terminal = err.isatty()
        plain = environ.get("NO_COLOR") or environ.get("TERM") == "dumb"
        self._colour = self._terminal and not plain
        self._progress_width = 0  # of the progress line that is on the screen
        self.choose()

    def choose(self, quiet: bool = False, as_json: bool = False) -> None:
        """``quiet`` leaves out progress and notices, ``as_json`` makes results JSON."""
        self._quiet = quiet
        self._as_json = as_json
        self.shows_progress = self._terminal and not quiet

    def result(self, text: str) -> None:
        """A line for people on stdout; nothing with ``--json``."""
        if not self._as_json:
            self._print(text)

    def name(self, name: str) -> None:
        """A listed name on a line of its own: raw for a program, escaped on a terminal."""
        self.result(show(name) if self._out.isatty() else name)

    def record(self, fields: Dict[str, object]) -> None:
        """An object for programs on stdout; nothing without ``--json``."""
        if self._as_json:
            self._print(json.dumps(fields))

    def error(self, text: str) -> None:
        """A failure, in one line on stderr."""
        word = f"{_RED}backup:{_PLAIN}" if self._colour else "backup:"
        self.end()
        self._say(f"{word} {text}\n")

    def notice(self, text: str) -> None:
        """Something worth knowing that is no failure, on stderr."""
        if not self._quiet:
            self.end()
            self._say(f"backup: {text}\n")

    def progress(self, text: str) -> None:
        """Draws the progress line over the last one."""
        text = text[: self._columns() - 1]
        # The wider of both stands there until the next one, should an interrupt come in between.
        before, self._progress_width = self._progress_width, max(len(text), self._progress_width)
        self._say(f"\r{text.ljust(before)}")
        self._progress_width = len(text)

    def end(self) -> None:
        """Takes the progress line off the screen."""
        if self._progress_width:
            self._say("\r" + " " * self._progress_width + "\r")
            self._progress_width = 0

    def flush(self, text: str = "") -> None:
        """Writes ``text`` and what is still held back to stdout. Raises ``OutputFailed``."""
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputFailed(f"cannot write the output: {reason}") from error

    def _print(self, line: str) -> None:
        self.end()
        self.flush(f"{line}\n")

    def _say(self, text: str) -> None:
        with suppress(OSError):
            self._err.write(text)
            self._err.flush()

    def _columns(self) -> int:
        """The width of the terminal that stderr is."""
        try:
            return os.get_terminal_size(self._err.fileno()).columns or 80
        except OSError:
            return 80


class Meter:
    """Adds up the progress of ``count`` files and draws it.

    The line has the bytes, their share, the rate, the time left and file k of n.

    ``total`` is the bytes of all files if they are known before; 0 leaves out
    share and time left until every file has said its size.
    """

    def __init__(
        self,
        console: Console,
        count: int,
        total: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._count = count
        self._total = total
        self._now = now
        self._began = now()
        self._drawn = float("-inf")
        self._done: Dict[Job, int] = {}
        self._sizes: Dict[Job, int] = {}

    def __call__(self, job: Job, done: int, size: int) -> None:
        """Takes note of a job's progress, in bytes; the callback for the client."""
        self._done[job] = done
        self._sizes[job] = size
        now = self._now()
        if self._console.shows_progress and now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            self._console.progress(self.line(job, now - self._began))

    def line(self, job: Job, seconds: float) -> str:
        """The progress line, ``seconds`` after the beginning."""
        done = sum(self._done.values())
        rate = done / seconds if seconds > 0 else 0.0
        total = self._total or (sum(self._sizes.values()) if len(self._sizes) == self._count else 0)
        parts = [_amount(done)]
        if total:
            parts[0] += f" of {_amount(total)}"
            parts.append(f"{min(done, total) * 100 // total}%")
        parts.append(f"{_amount(int(rate))}/s")
        if total and rate:
            parts.append(f"{_clock((total - done) / rate)} left")
        parts.append(f"file {len(self._sizes)} of {self._count}")
        parts.append(subject(job))
        return "  ".join(parts)


def _amount(size: int) -> str:
    """Bytes as ``format_size`` has them, from a thousand on with one decimal, so that they move."""
    power = min((len(str(size)) - 1) // 3, len(UNITS) - 1)
    if not power:
        return format_size(size)
    whole, tenth = divmod(size * 10 // 1000**power, 10)
    return f"{whole}.{tenth} {UNITS[power]}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
