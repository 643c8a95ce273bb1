"""Logs that are full, closed, renamed or read by nobody: nobody waits, whole lines get through."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import select
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, List, Optional, Tuple

import pytest

from backup.errors import SetupFailed
from backup.log import BACKLOG, Line, Log, as_json, as_text
from backup.output import LogFile, Output
from tests.helpers import ROOT, WAIT_SECONDS

F_SETPIPE_SZ = 1031  # <linux/fcntl.h>; Python has it from 3.10 on
PAGE = 4096


def line(text: str) -> Line:
    return Line(logging.INFO, text)


def numbered(count: int, width: int = 40) -> List[Line]:
    return [line(f"{number:0{width}}") for number in range(count)]


@contextmanager
def pipe() -> Iterator[Tuple[int, int]]:
    """Both ends of the smallest pipe there is."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, PAGE)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        yield reader, writer


@contextmanager
def watchdog() -> Iterator[None]:
    """Whatever waits for a pipe ends the test instead of hanging it."""

    def ring(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, WAIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process's can grow beyond so many bytes meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def drain(reader: int) -> bytes:
    """What is in a pipe now."""
    pieces = []
    while select.select([reader], [], [], 0)[0]:
        pieces.append(os.read(reader, 1 << 16))
    return b"".join(pieces)


def test_lines_go_to_a_file_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: List[int] = []
    write = os.write

    def writing(fd: int, data: bytes) -> int:
        writes.append(len(data))
        return write(fd, data)

    with open(tmp_path / "log", "wb") as file:
        sink = Output(file.fileno(), as_text)
        monkeypatch.setattr(os, "write", writing)
        assert sink(numbered(100)) == 100
        monkeypatch.undo()
        sink.close()
    text = (tmp_path / "log").read_text(encoding="ascii")
    assert text == "".join(map(as_text, numbered(100)))
    assert writes == [len(text)]


def test_what_the_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        Output(file.fileno(), as_text, "ascii")([line("file=é"), line("file=\udcff")])
    assert (tmp_path / "log").read_bytes() == (b"[SERVER] file=\\xe9\n[SERVER] file=\\udcff\n")


@pytest.mark.parametrize("reopens", [True, False])
def test_a_pipe_nobody_reads_takes_what_it_holds_and_then_nothing(
    monkeypatch: pytest.MonkeyPatch, reopens: bool
) -> None:
    if not reopens:  # as where there is no /proc

        def missing(*_: object) -> None:
            raise FileNotFoundError(errno.ENOENT, "no /proc")

        monkeypatch.setattr(os, "open", missing)
    with pipe() as (reader, writer), watchdog():
        sink = Output(writer, as_text)
        lines = numbered(500)
        taken = sink(lines)
        assert 0 < taken < 500
        assert sink(lines[taken:]) == 0
        written = drain(reader)
        assert written == "".join(map(as_text, lines[:taken])).encode()
        assert sink(lines[taken : taken + 1]) == 1
        assert drain(reader) == as_text(lines[taken]).encode()
        assert not fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_NONBLOCK
        sink.close()


def test_another_writer_that_fills_the_pipe_meanwhile_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pipe() as (_, writer), watchdog():
        sink = Output(writer, as_text)
        write = os.write

        def late(fd: int, data: bytes) -> int:
            monkeypatch.undo()
            assert write(writer, b"x" * PAGE) == PAGE  # after poll has said that there is room
            return write(fd, data)

        monkeypatch.setattr(os, "write", late)
        assert sink([line("one")]) == 0
        sink.close()


def test_a_terminal_that_is_stopped_holds_nobody_up() -> None:
    master, slave = os.openpty()
    with ExitStack() as stack, watchdog():
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        sink = Output(slave, as_text)
        stack.callback(sink.close)
        lines = numbered(5000)
        taken = sink(lines)
        assert 0 < taken < 5000
        assert sink(lines[taken:]) == 0


def test_a_line_longer_than_a_pipe_holds_is_completed_before_the_next() -> None:
    with pipe() as (reader, writer), watchdog():
        sink = Output(writer, as_text)
        long = line("x" * 3 * PAGE)
        assert sink([long, line("next")]) == 1
        written = drain(reader)
        assert sink([line("next")]) == 0  # there is room only for more of the first
        written += drain(reader)
        rest = [line("next")]
        while rest:
            rest = rest[sink(rest) :]
            written += drain(reader)
        sink.close()
    assert written.decode() == as_text(long) + as_text(line("next"))


def test_a_socket_is_not_waited_for_either() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, watchdog():
        sink = Output(ours.fileno(), as_text)
        lines = numbered(20_000)
        taken = sink(lines)
        assert 0 < taken < len(lines)
        assert sink(lines[taken:]) == 0


def test_a_reader_that_is_gone_is_an_error_of_the_first_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        sink = Output(writer, as_text)
        with pytest.raises(BrokenPipeError):
            sink([line("one")])
        sink.close()
    finally:
        os.close(writer)


def test_a_full_device_is_an_error_of_the_first_line() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        sink = Output(full.fileno(), as_text)
        with pytest.raises(OSError, match="No space left"):
            sink([line("one")])
        sink.close()


def test_a_line_that_a_full_disk_cuts_is_completed_when_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = numbered(10)
    size = len(as_text(lines[0]))
    with ExitStack() as stack:
        sink = LogFile(str(path), as_text)
        stack.callback(sink.close)
        with file_limit(3 * size + 5):
            assert sink(lines) == 4  # the fourth in part
            with pytest.raises(OSError, match="File too large"):
                sink(lines[4:6])
        assert path.stat().st_size == 3 * size + 5
        assert sink(lines[6:]) == 4
    expected = [*lines[:4], *lines[6:]]
    assert path.read_text(encoding="ascii") == "".join(map(as_text, expected))


def test_a_line_that_was_cut_is_whole_in_the_file_that_is_opened_next(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = numbered(3)
    with file_limit(len(as_text(lines[0])) + 5):
        sink = LogFile(str(path), as_text)
        assert sink(lines[:2]) == 2
        path.rename(tmp_path / "old")
        sink.reopen()
    assert sink(lines[2:]) == 1
    sink.close()
    sink.close()
    assert path.read_text(encoding="ascii") == "".join(map(as_text, lines[1:]))


def test_a_log_file_is_its_owners_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    before = os.umask(0)
    try:
        for text in ("one", "two"):
            sink = LogFile(str(path), as_json)
            sink([line(text)])
            sink.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = [json.loads(text)["message"] for text in path.read_text().splitlines()]
    assert found == ["one", "two"]


def test_a_file_that_cannot_be_opened_again_leaves_the_old_one_in_use(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    sink = LogFile(str(tmp_path / "folder" / "log"), as_text)
    (tmp_path / "folder").rename(tmp_path / "moved")
    with pytest.raises(SetupFailed, match="no such file or directory; take another: --log-file"):
        sink.reopen()
    assert sink([line("one")]) == 1
    sink.close()
    assert (tmp_path / "moved" / "log").read_text(encoding="ascii") == "[SERVER] one\n"


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "nul"])
def test_a_log_that_cannot_be_written_is_told_at_once(tmp_path: Path, kind: str) -> None:
    path = str(tmp_path / {"missing": "none/log", "nul": "a\0b"}.get(kind, kind))
    if kind == "folder":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)  # that nobody reads: opening it must not wait
    with watchdog(), pytest.raises(SetupFailed) as caught:
        LogFile(path, as_text)
    assert str(caught.value).startswith(f"cannot write the log {tmp_path}/")
    assert str(caught.value).endswith("; take another: --log-file FILE")
    assert str(caught.value).isprintable()


def test_where_there_is_no_poll_lines_are_just_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(select, "poll")
    with pipe() as (reader, writer):
        sink = Output(writer, as_text)
        assert sink([line("one")]) == 1
        assert drain(reader) == b"[SERVER] one\n"
        sink.close()


def test_what_a_log_does_not_get_through_is_counted_to_the_line() -> None:
    total = BACKLOG + 500
    with pipe() as (reader, writer), watchdog():
        sink = Output(writer, as_text)
        log = Log(sink)
        for each in numbered(total):
            log.add(each.level, each.message)
            log.flush()
        assert log.dropped > 0
        written = b""
        log.add(logging.INFO, "last")
        while not written.endswith(b"last\n"):
            log.flush()
            written += drain(reader)
        sink.close()
    lines = written.decode().splitlines()
    lost = [text.rpartition(" ")[2] for text in lines if "lost" in text]
    kept = [int(text.partition(" ")[2]) for text in lines[:-1] if "lost" not in text]
    assert len(lost) == 1
    assert len(kept) + int(lost[0]) == total
    gap = lines.index(next(text for text in lines if "lost" in text))
    assert kept == [*range(gap), *range(gap + int(lost[0]), total)]


# -- a server's log -----------------------------------------------------------

LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Child:
    """``serve`` as a process, on a Unix socket, so that it can be found without its log."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        prefix: Tuple[str, ...] = (),
        stderr: Optional[int] = None,
    ) -> None:
        self.address = str(folder / "socket")
        serve = ["-m", "backup", "serve", "--listen", f"unix:{self.address}"]
        root = ["--root", str(folder / "store"), "--no-fsync"]
        command = [sys.executable, *prefix, *serve, *root, *options]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**kept, "PYTHONDONTWRITEBYTECODE": "1"}, stderr=stderr
        )
        self.asked = 0
        self._watchdog = watchdog()

    def __enter__(self) -> Child:
        self._watchdog.__enter__()
        while not self._ask():
            assert self.process.poll() is None, "it did not start"
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.process.terminate()
            assert self.process.wait(WAIT_SECONDS) == 0
        finally:
            self._watchdog.__exit__(None, None, None)

    def ask(self, count: int = 1) -> None:
        """Makes so many requests, each with its answer."""
        for _ in range(count):
            assert self._ask()

    def _ask(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT_SECONDS)
            try:
                sock.connect(self.address)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            sock.sendall(bytes.fromhex("0b000000 01 c8 0100 61"))
            assert sock.recv(100)[1:3] == b"\xeb\x03"  # 1003
        self.asked += 1
        return True


def counted(text: str) -> int:
    """The requests that a log tells of, whether by their lines or as lost."""
    found = 0
    for each in text.splitlines():
        assert each.startswith("[SERVER] ")
        if "lines of this log that were lost: " in each:
            found += int(each.rpartition(" ")[2])
        else:
            assert each.endswith(" reason=not-found") or " op=" not in each, f"cut: {each}"
            found += " op=" in each
    return found


def test_a_server_whose_log_nobody_reads_serves_on_and_counts_what_is_lost(
    tmp_path: Path,
) -> None:
    with pipe() as (reader, writer), Child(tmp_path, stderr=writer) as child:
        child.ask(BACKLOG + 200)
        text = drain(reader).decode()
        child.process.send_signal(signal.SIGUSR1)
        while "Counters" not in text or not text.endswith("\n"):
            child.ask()
            text += drain(reader).decode()
    before, counters = text.split("[SERVER] Counters ")
    assert "lines of this log that were lost: " in before
    assert f" requests_200_1003={counted(before)} " in counters


def test_a_server_whose_log_file_is_full_serves_on_and_goes_on_in_a_new_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    prefix = ("-c", LIMITED, "2000")
    with Child(tmp_path, "--log-file", str(path), prefix=prefix) as child:
        child.ask(100)
        assert path.stat().st_size == 2000
        path.rename(tmp_path / "old")
        child.process.send_signal(signal.SIGHUP)
        while not path.exists():
            child.ask()
    old = (tmp_path / "old").read_text(encoding="ascii")
    whole = old[: old.rindex("\n") + 1]
    new = path.read_text(encoding="ascii")
    assert "lines of this log that were lost: " in new
    assert counted(whole) + counted(new) == child.asked


@pytest.mark.parametrize("kind", ["closed pipe", "full device"])
def test_a_server_whose_log_takes_nothing_serves_on(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        if kind == "closed pipe":
            reader, writer = os.pipe()
            os.close(reader)
            stack.callback(os.close, writer)
        else:
            writer = stack.enter_context(open("/dev/full", "wb", buffering=0)).fileno()
        with Child(tmp_path, stderr=writer) as child:
            child.ask(20)


def test_a_real_rename_and_sighup_move_the_log_to_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Child(tmp_path, "--log-file", str(path), "--log-format", "json") as child:
        child.ask(3)
        path.rename(tmp_path / "old")
        child.ask(3)
        child.process.send_signal(signal.SIGHUP)
        while not path.exists():
            child.ask()
        before = child.asked
        child.ask(2)
    old, new = (
        [json.loads(text) for text in each.read_text(encoding="ascii").splitlines()]
        for each in (tmp_path / "old", path)
    )
    assert old[0]["message"] == f"Listening on unix:{tmp_path}/socket"
    requests = [each for each in old + new if "op" in each]
    assert len(requests) == child.asked
    assert sum("op" in each for each in new) >= child.asked - before
    assert {each["peer"] for each in requests} == {f"unix:{tmp_path}/socket"}
    assert new[-1]["message"] == "Stopped"


def test_a_log_without_its_folder_goes_on_in_the_old_file_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with Child(tmp_path, "--log-file", str(tmp_path / "logs" / "log")) as child:
        (tmp_path / "logs").rename(tmp_path / "moved")
        child.process.send_signal(signal.SIGHUP)
        said = tmp_path / "moved" / "log"
        while "goes on in the old one" not in said.read_text(encoding="ascii"):
            child.ask()
    assert "[SERVER] cannot write the log " in said.read_text(encoding="ascii")
    assert counted(said.read_text(encoding="ascii")) == child.asked
