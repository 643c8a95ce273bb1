"""Somebody at a prompt: what is typed, what is printed, and a server run from the command line."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from backup.cli import main
from tests.helpers import ROOT, WAIT_SECONDS, stdin, watchdog

USER = 11


class Said(NamedTuple):
    """What a command printed, and its exit code."""

    out: str
    err: str
    code: int

    @property
    def objects(self) -> List[Dict[str, object]]:
        """What ``--json`` printed."""
        return [json.loads(line) for line in self.out.splitlines()]


class User:
    """Somebody at a prompt, in a folder that has the files a.txt and b.txt."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.folder = folder
        self.set_variable = monkeypatch.setenv
        self._capsys = capsys
        (folder / "a.txt").write_bytes(b"content of a")
        (folder / "b.txt").write_bytes(b"content of b too")
        monkeypatch.chdir(folder)
        monkeypatch.setenv("BACKUP_USER_ID", str(USER))

    def types(self, *arguments: str) -> Said:
        code = main(arguments)
        return Said(*self._capsys.readouterr(), code)

    def pipes(self, data: Optional[bytes], *arguments: str) -> Said:
        """Types it with these bytes on stdin, or with stdin closed."""
        with stdin(data):
            return self.types(*arguments)

    def content(self) -> Dict[str, bytes]:
        """Every file in the folder."""
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}


def errors(*texts: str) -> str:
    """These failures on stderr."""
    return "".join(f"backup: {text}\n" for text in texts)


def address_of(line: str) -> Tuple[str, int]:
    """The address in the server's first line."""
    host, port = re.findall(r"\A\[SERVER\] Listening on (127\.0\.0\.1):(\d+)\n\Z", line)[0]
    return host, int(port)


def as_a_process(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "backup", *arguments]


def environment() -> Dict[str, str]:
    """This process's, without what changes how Python buffers or encodes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


Reaction = Tuple[str, Callable[[str], None]]


@contextmanager
def reacting(monkeypatch: pytest.MonkeyPatch, *reactions: Reaction) -> Iterator[List[str]]:
    """Puts a pipe in the place of stderr, and does something for each awaited line.

    Yields all lines, which are complete at the end.
    """
    reading, writing = os.pipe()
    lines: List[str] = []
    waiting = list(reactions)

    def read() -> None:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            for line in pipe:
                lines.append(line)
                if waiting and waiting[0][0] in line:
                    waiting.pop(0)[1](line)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as stderr, watchdog():
            monkeypatch.setattr(sys, "stderr", stderr)
            yield lines
    finally:
        thread.join(WAIT_SECONDS)
    assert not waiting, f"not logged: {waiting[0][0]}"


def sending(number: int) -> Callable[[str], None]:
    """Sends this process a signal."""

    def send(_line: str) -> None:
        os.kill(os.getpid(), number)

    return send


SERVE = ["serve", "--listen", "127.0.0.1:0", "--root", "store"]
