"""What a person or a program reads: results, errors, the progress line, JSON.

Rules: results go to stdout, everything else to stderr. The progress line is
there only while stderr is a terminal, and colour only if that terminal's user
has not set NO_COLOR (https://no-color.org). With ``--json``, stdout carries one
object a line and nothing else.
"""

from __future__ import annotations

import json
import shutil
import time
from typing import Callable, Dict, Mapping, TextIO

from .exchange import Job, subject
from .names import show
from .sequence import format_size

_RED, _PLAIN = "\x1b[31m", "\x1b[0m"
_REDRAW_SECONDS = 0.1


class Console:
    """Both streams; ``quiet`` leaves out progress and notices, ``as_json`` makes results JSON."""

    def __init__(
        self,
        out: TextIO,
        err: TextIO,
        environ: Mapping[str, str],
        quiet: bool = False,
        as_json: bool = False,
    ) -> None:
        self._out = out
        self._err = err
        self.as_json = as_json
        self._quiet = quiet
        terminal = err.isatty()
        self._colour = terminal and not environ.get("NO_COLOR")
        self._progress_width = 0  # of the progress line that is on the screen
        self.shows_progress = terminal and not quiet

    def result(self, text: str) -> None:
        """A line for people on stdout; nothing with ``--json``."""
        if not self.as_json:
            self._clear()
            self._out.write(f"{text}\n")
            self._out.flush()

    def name(self, name: str) -> None:
        """A listed name on a line of its own: raw for a program, escaped on a terminal."""
        self.result(show(name) if self._out.isatty() else name)

    def record(self, fields: Dict[str, object]) -> None:
        """An object for programs on stdout; nothing without ``--json``."""
        if self.as_json:
            self._clear()
            self._out.write(json.dumps(fields) + "\n")
            self._out.flush()

    def error(self, text: str) -> None:
        """A failure, in one line on stderr."""
        self._clear()
        word = f"{_RED}backup:{_PLAIN}" if self._colour else "backup:"
        self._err.write(f"{word} {text}\n")
        self._err.flush()

    def notice(self, text: str) -> None:
        """Something worth knowing that is no failure, on stderr."""
        if not self._quiet:
            self._clear()
            self._err.write(f"backup: {text}\n")
            self._err.flush()

    def progress(self, text: str) -> None:
        """Draws the progress line over the last one."""
        columns = shutil.get_terminal_size().columns
        text = text[: columns - 1]
        self._err.write(f"\r{text.ljust(self._progress_width)}")
        self._err.flush()
        self._progress_width = len(text)

    def _clear(self) -> None:
        if self._progress_width:
            self._err.write("\r" + " " * self._progress_width + "\r")
            self._err.flush()
            self._progress_width = 0

    def end(self) -> None:
        """Takes the progress line off the screen."""
        self._clear()


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
        parts = [format_size(done)]
        if total:
            parts[0] += f" of {format_size(total)}"
            parts.append(f"{min(done, total) * 100 // total}%")
        parts.append(f"{format_size(int(rate))}/s")
        if total and rate:
            parts.append(f"{_clock((total - done) / rate)} left")
        parts.append(f"file {len(self._sizes)} of {self._count}")
        parts.append(subject(job))
        return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
