"""The server's log: one line per request at its end, and what else an operator should know.

Rules: a line is values, its message and its fields; how it is written is its
format's. Lines are kept and written together, once a turn of the loop. A line
never holds a byte that a client chose unless ``names.escape`` has made it
harmless. A log that cannot be written does not stop the service, and does not
hold it up: what its sink does not take is kept, as far as there is room, and
the oldest goes first. The lines lost are counted in ``dropped``, and the next
line that gets through says so; ``lost`` counts them all. Only at the end does
``drain`` wait for a slow reader, and not for long.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from typing import Callable, Deque, Dict, List, Mapping, NamedTuple, Optional, Sequence, TextIO

PREFIX = "[SERVER] "

_RETRY_SECONDS = 0.01

BACKLOG = 1000
"""Lines that are kept from turn to turn while the log takes none."""

Fields = Mapping[str, object]
_NO_FIELDS: Fields = {}


class Line(NamedTuple):
    """One line, with its level as in the module ``logging``.

    A field is a string without a space in it, a number, or None for what is not known.
    """

    level: int
    message: str
    fields: Fields = _NO_FIELDS

    @property
    def text(self) -> str:
        """The message, and behind it each field as ``name=value``."""
        words = [f"{name}={'-' if value is None else value}" for name, value in self.fields.items()]
        return " ".join([self.message, *words] if self.message else words)


Format = Callable[[Line], str]
"""What stands in the log for a line, with the newline at its end."""

Sink = Callable[[Sequence[Line]], Optional[int]]
"""Writes lines; how many it has taken, from the first on, or None for all.

``OSError`` or ``ValueError`` says that these are lost.
"""


class Log:
    """Lines of at least ``level``, kept until ``flush`` hands them to ``sink``."""

    def __init__(self, sink: Sink, level: int = logging.INFO) -> None:
        self._sink = sink
        self._level = level
        self._lines: Deque[Line] = deque()
        self.dropped = 0  # lines, of which nobody was told yet
        self.lost = 0  # lines in all

    def add(self, level: int, message: str, fields: Fields = _NO_FIELDS) -> None:
        """Keeps one line."""
        if level >= self._level:
            self._lines.append(Line(level, message, fields))

    def answer(self, message: str, fields: Fields = _NO_FIELDS) -> None:
        """Keeps one line whatever the level, since the operator has asked for it."""
        self._lines.append(Line(logging.INFO, message, fields))

    def flush(self) -> None:
        """Writes what was kept."""
        if not self._lines:
            return
        lines: List[Line] = [*self._lines]
        if self.dropped:
            text = f"lines of this log that were lost: {self.dropped}"
            lines.insert(0, Line(logging.WARNING, text))
        try:
            count = self._sink(lines)
        except (OSError, ValueError):  # ValueError: a stream that is closed, or lacks a character
            self._drop(len(self._lines))
            return
        taken = len(lines) if count is None else count
        if self.dropped and taken:
            self.dropped = 0
            taken -= 1
        if taken == len(self._lines):  # as nearly always
            self._lines.clear()
            return
        for _ in range(taken):
            self._lines.popleft()
        self._drop(len(self._lines) - BACKLOG)

    def drain(self, seconds: float) -> None:
        """Writes what was kept, for so long at most; what is left then is lost."""
        until = time.monotonic() + seconds
        self.flush()
        while self._lines and time.monotonic() < until:
            time.sleep(_RETRY_SECONDS)  # a sink may be anything: there is no event to wait for
            self.flush()
        self._drop(len(self._lines))

    def _drop(self, count: int) -> None:
        for _ in range(count):
            self._lines.popleft()
            self.dropped += 1
            self.lost += 1


def as_text(line: Line) -> str:
    """The format for people and for ``grep``."""
    return f"{PREFIX}{line.text}\n"


def as_json(line: Line) -> str:
    """The format for programs: one object, in ASCII, with level, message and the fields."""
    shown: Dict[str, object] = {"level": logging.getLevelName(line.level).lower()}
    if line.message:
        shown["message"] = line.message
    return json.dumps({**shown, **line.fields}) + "\n"


FORMATS: Dict[str, Format] = {"text": as_text, "json": as_json}


def to_logging(lines: Sequence[Line]) -> None:
    """A sink for a server that is embedded: the logger ``backup``, configured or not."""
    logger = logging.getLogger("backup")
    for line in lines:
        logger.log(line.level, "%s", line.text)


def to_stream(stream: TextIO, form: Format = as_text) -> Sink:
    """A sink that writes to a text stream, one write a turn, and waits until that is done."""

    def write(lines: Sequence[Line]) -> None:
        stream.write("".join(map(form, lines)))
        stream.flush()

    return write
