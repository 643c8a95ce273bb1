"""What signals do to a program of ours, and what was there before is put back.

Rules: a handler sets a flag or calls what may be called from one; the loop, or
the command, does the rest. Signals that a system lacks are left out. One that
comes while another's handler runs, or while Python itself ends, must do no harm.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from typing import Callable, Iterator, List

INTERRUPTED = 130
"""The exit code of a program that a signal has ended: 128 and SIGINT's number."""

_ENDING = ("SIGINT", "SIGTERM")  # the signals that end a program


@contextmanager
def on_signals(handler: Callable[..., None], *names: str) -> Iterator[None]:
    """These signals call ``handler`` meanwhile; by default those that end a program."""
    before = [(number, signal.signal(number, handler)) for number in present(*names)]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)


@contextmanager
def waking(fd: int) -> Iterator[None]:
    """A signal writes to ``fd`` meanwhile: on some systems it would not end the waiting alone."""
    before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def wake_no_more() -> None:
    """Before a server closes the descriptor: Python complains of each signal that comes later."""
    signal.set_wakeup_fd(-1)


def present(*names: str) -> List[int]:
    """The signals of these names, as far as this system has them; by default the ending ones."""
    return [getattr(signal, name) for name in names or _ENDING if hasattr(signal, name)]


class Interrupt:
    """The handler of the signals that end a command: the first one that counts interrupts it.

    Later ones change nothing, so that an impatient second one does not cut the tidying up short.
    They are told by a flag: a handler that is replaced while its signal is pending makes Python
    print a traceback.
    """

    def __init__(self) -> None:
        self._waited_for = False
        self._came = False

    def __call__(self, *_: object) -> None:
        self._came = True
        self._look()

    def wait(self) -> None:
        """From now on a signal, or one that has come before, raises ``KeyboardInterrupt``."""
        self._waited_for = True
        if self._came:
            self._look()

    def ignore(self) -> None:
        """From now on no signal does anything."""
        self._waited_for = False

    def _look(self) -> None:
        if self._waited_for:
            self._waited_for = False
            raise KeyboardInterrupt


def exit_at_the_latest(in_seconds: int) -> None:
    """Ends this process then, even if a disk or a pipe that nobody reads holds it up; 0: never."""
    if hasattr(signal, "alarm"):
        exit_now = (lambda *_: os._exit(INTERRUPTED)) if in_seconds else signal.SIG_DFL
        signal.alarm(0)
        signal.signal(signal.SIGALRM, exit_now)
        signal.alarm(in_seconds)
