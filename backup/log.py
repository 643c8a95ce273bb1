"""The server's log: one line per request at its end, and what else an operator should know.

Rules: lines are kept and written together, once a turn of the loop. A line
never holds a byte that a client chose unless ``names.escape`` has made it
harmless. A log that cannot be written does not stop the service; the lines
lost are counted in ``dropped``, and the next line that gets through says so.
"""

from __future__ import annotations

import logging
from typing import Callable, List, NamedTuple, Sequence, TextIO

PREFIX = "[SERVER] "


class Line(NamedTuple):
    """One line, with its level as in the module ``logging``."""

    level: int
    text: str


Sink = Callable[[Sequence[Line]], None]


class Log:
    """Lines of at least ``level``, kept until ``flush`` hands them to ``sink``."""

    def __init__(self, sink: Sink, level: int = logging.INFO) -> None:
        self._sink = sink
        self._level = level
        self._lines: List[Line] = []
        self.dropped = 0

    def add(self, level: int, text: str) -> None:
        """Keeps one line."""
        if level >= self._level:
            self._lines.append(Line(level, text))

    def flush(self) -> None:
        """Writes what was kept."""
        if not self._lines:
            return
        lines, self._lines = self._lines, []
        if self.dropped:
            lines.insert(
                0, Line(logging.WARNING, f"lines of this log that were lost: {self.dropped}")
            )
        try:
            self._sink(lines)
        except (OSError, ValueError):  # ValueError: a stream that is closed, or lacks a character
            self.dropped += len(lines) - (1 if self.dropped else 0)
        else:
            self.dropped = 0


def to_logging(lines: Sequence[Line]) -> None:
    """A sink for a server that is embedded: the logger ``backup``, configured or not."""
    logger = logging.getLogger("backup")
    for line in lines:
        logger.log(line.level, "%s", line.text)


def to_stream(stream: TextIO) -> Sink:
    """A sink that writes to a text stream, one write a turn."""

    def write(lines: Sequence[Line]) -> None:
        stream.write("".join(f"{PREFIX}{line.text}\n" for line in lines))
        stream.flush()

    return write
