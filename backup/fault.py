"""What is said of a fault of this program: its traceback, in lines that are safe to print.

Rules: a traceback may quote what a peer chose, as the text of an exception
does. So each line is escaped, and marked so that it cannot pass for another
line of a log; and neither is it endless.
"""

from __future__ import annotations

import traceback
from typing import List

from .names import show

_MARK = "| "
_MOST_LINES = 200  # of a traceback, of which the last say most
_MOST_CHARACTERS = 500  # of a line


def describe(what: str, fault: BaseException) -> List[str]:
    """``what`` has gone wrong, and the traceback of ``fault``, line by line."""
    # A fault whose own __str__ fails is shown without it.
    text = "".join(traceback.format_exception(type(fault), fault, fault.__traceback__))
    lines = text.rstrip("\n").split("\n")
    if len(lines) > _MOST_LINES:
        lines[:-_MOST_LINES] = ["…"]
    return [what, *(_MARK + _shown(line) for line in lines)]


def _shown(line: str) -> str:
    if len(line) > _MOST_CHARACTERS:
        line = line[:_MOST_CHARACTERS] + "…"
    return show(line)
