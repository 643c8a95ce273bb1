"""One state of a local file is sent, or nothing; what is received takes its name as a whole.

A ``Source`` that changes while it is read never gets its last bytes out. A
``Target`` never takes a name from a file it may not overwrite, and leaves
nothing behind however it ends.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import stat
from pathlib import Path
from types import FrameType
from typing import Callable, Iterator, List, Optional, Tuple

import pytest

from backup import files as files_module
from backup import stream as stream_module
from backup.errors import ConnectionFailed, FileChanged, LocalFileError, TargetExists, TooLarge
from backup.files import Source, Target
from backup.stream import Stream
from backup.wire import MAX_FILE_BYTES
from tests.conftest import open_descriptors
from tests.helpers import WAIT_SECONDS, read_all

ODD_NAMES = ["ünïcödé ☃", "-rf", " spaces ", "new\nline", os.fsdecode(b"\xff\xfe"), "\x1b[31m"]


class Line:
    """A stream, and what comes out at its other end."""

    def __init__(self, stream: Stream, far_end: socket.socket) -> None:
        self.stream = stream
        self._far_end = far_end
        self._taken = b""

    def take(self) -> None:
        """Makes room: takes a little of what is there."""
        self._taken += self._far_end.recv(1 << 16)

    def received(self) -> bytes:
        """Ends the stream; all that came out."""
        self.stream.end()
        return self._taken + read_all(self._far_end)

    def fill(self) -> int:
        """Sends until nothing more fits; how many bytes that was."""
        sent = 0
        while True:
            count = self.stream.send(bytes(1 << 16))
            if count is None:
                return sent
            sent += count

    def hang_up(self) -> None:
        self._far_end.close()

    def drain(self, count: int) -> None:
        """Throws away so many bytes of what is there."""
        while count:
            count -= len(self._far_end.recv(count))


@pytest.fixture
def line() -> Iterator[Line]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(WAIT_SECONDS)
        yield Line(Stream(ours, "peer"), theirs)


Sources = Callable[..., Source]


@pytest.fixture
def source() -> Iterator[Sources]:
    """Opens sources, which are closed when the test is over."""
    opened: List[Source] = []

    def make(
        path: object, report: Callable[[int, int], None] = lambda _done, _size: None
    ) -> Source:
        opened.append(Source(path, report))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def old_file(path: Path, content: bytes) -> Path:
    """A file that was last written long ago, so that the next write is sure to show."""
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))
    return path


def send_all(source: Source, line: Line, limit: int = 1 << 20) -> None:
    while source.remaining:
        if source.send(line.stream, limit) is None:
            line.take()


def raising(number: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


# Source: what is sent.


@pytest.mark.parametrize("size", [1, 1000, 128 * 1024, 128 * 1024 + 1, 1 << 20])
@pytest.mark.parametrize("limit", [999, 1 << 20])
def test_a_file_is_sent_as_it_is(
    size: int, limit: int, tmp_path: Path, line: Line, source: Sources
) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    sent = source(tmp_path / "file")
    assert sent.size == sent.remaining == size
    send_all(sent, line, limit)
    assert (sent.size, sent.remaining) == (size, 0)
    assert line.received() == content


def test_it_sends_no_more_than_the_limit_whatever_the_limit_was_before(
    tmp_path: Path, line: Line, source: Sources
) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    sent = source(tmp_path / "file")
    assert sent.send(line.stream, 1000) == 1000
    line.drain(1000)
    filled = line.fill()
    assert sent.send(line.stream, 1000) is None
    line.drain(filled)
    assert sent.send(line.stream, 10) == 10


def test_nothing_is_lost_or_doubled_when_the_peer_is_slow(
    tmp_path: Path, line: Line, source: Sources
) -> None:
    content = os.urandom(10_000)
    (tmp_path / "file").write_bytes(content)
    sent = source(tmp_path / "file")
    filled = line.fill()
    assert sent.send(line.stream, 1 << 20) is None
    assert sent.remaining == 10_000
    assert sent.send(line.stream, 1 << 20) is None
    line.drain(filled)
    send_all(sent, line)
    assert line.received() == content


def test_progress_is_reported_with_every_send(tmp_path: Path, line: Line, source: Sources) -> None:
    (tmp_path / "file").write_bytes(bytes(2500))
    reports: List[Tuple[int, int]] = []
    send_all(source(tmp_path / "file", lambda *report: reports.append(report)), line, 1000)
    assert reports == [(1000, 2500), (2000, 2500), (2500, 2500)]


def test_an_empty_file_has_nothing_to_send(tmp_path: Path, source: Sources) -> None:
    (tmp_path / "file").touch()
    assert (source(tmp_path / "file").size, source(tmp_path / "file").remaining) == (0, 0)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_of_any_name_is_sent(name: str, tmp_path: Path, line: Line, source: Sources) -> None:
    (tmp_path / name).write_bytes(b"content")
    send_all(source(str(tmp_path / name)), line)
    assert line.received() == b"content"


def test_a_symbolic_link_stands_for_its_file(tmp_path: Path, line: Line, source: Sources) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    send_all(source(tmp_path / "link"), line)
    assert line.received() == b"content"


# Source: a file that changes meanwhile.


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, 2000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def grow_and_date_back(path: Path) -> None:
    grow(path)
    os.utime(path, ns=(0, 0))


def rewrite_and_date_back(path: Path) -> None:
    rewrite(path)
    os.utime(path, ns=(0, 0))


CHANGES = [grow, shrink, empty, rewrite, grow_and_date_back, rewrite_and_date_back]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [0, 1000, 2000], ids="after {} bytes".format)
def test_the_last_bytes_of_a_file_that_changed_are_never_sent(
    after: int, change: Callable[[Path], None], tmp_path: Path, line: Line, source: Sources
) -> None:
    content = os.urandom(3000)
    path = old_file(tmp_path / "file", content)
    sent = source(path)
    while sent.size - sent.remaining < after:
        sent.send(line.stream, 1000)
    change(path)
    with pytest.raises(FileChanged) as caught:
        send_all(sent, line, 1000)
    assert str(caught.value) == (f"{path} changed while it was read; nothing is stored; retry")
    assert line.received() == content[:after]


def test_a_change_after_the_last_bytes_were_read_does_not_reach_them(
    tmp_path: Path, line: Line, source: Sources
) -> None:
    content = os.urandom(3000)
    path = old_file(tmp_path / "file", content)
    sent = source(path)
    filled = line.fill()
    assert sent.send(line.stream, 3000) is None
    rewrite(path)
    line.drain(filled)
    send_all(sent, line)
    assert line.received() == content


# Source: a file of which all but the last bytes is sent by sendfile(2).


@pytest.fixture
def sent_by_system(monkeypatch: pytest.MonkeyPatch) -> List[Tuple[int, int]]:
    """Makes the last 1000 bytes those that are copied; where sendfile(2) was asked for, and what.

    Of each call, the offset, and how many bytes it may send.
    """
    calls: List[Tuple[int, int]] = []
    sendfile = os.sendfile

    def note(out: int, fd: int, offset: int, count: int) -> int:
        calls.append((offset, count))
        return sendfile(out, fd, offset, count)

    monkeypatch.setattr(files_module, "_COPIED_BYTES", 1000)
    monkeypatch.setattr(os, "sendfile", note)
    return calls


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 1999, 2000, 2001, 10_000])
@pytest.mark.parametrize("limit", [300, 1 << 20])
def test_all_but_the_last_bytes_are_sent_by_the_system_and_these_are_copied(
    size: int,
    limit: int,
    tmp_path: Path,
    line: Line,
    source: Sources,
    sent_by_system: List[Tuple[int, int]],
) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    sent = source(tmp_path / "file")
    send_all(sent, line, limit)
    assert line.received() == content
    uncopied = max(0, size - 1000)
    expected = [(at, min(limit, uncopied - at)) for at in range(0, uncopied, limit)]
    assert sent_by_system == expected


@pytest.mark.parametrize("size", [1000, 1001, 5000])
def test_without_sendfile_it_is_read_and_sent(
    size: int,
    tmp_path: Path,
    line: Line,
    source: Sources,
    sent_by_system: List[Tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "HAS_SENDFILE", False)
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    send_all(source(tmp_path / "file"), line)
    assert line.received() == content
    assert sent_by_system == []


def test_progress_is_reported_of_both_parts(
    tmp_path: Path, line: Line, source: Sources, sent_by_system: List[Tuple[int, int]]
) -> None:
    (tmp_path / "file").write_bytes(bytes(2500))
    reports: List[Tuple[int, int]] = []
    send_all(source(tmp_path / "file", lambda *report: reports.append(report)), line, 1000)
    assert reports == [(1000, 2500), (1500, 2500), (2500, 2500)]


def test_a_peer_that_is_slow_while_the_system_sends_loses_nothing(
    tmp_path: Path, line: Line, source: Sources, sent_by_system: List[Tuple[int, int]]
) -> None:
    content = os.urandom(3000)
    (tmp_path / "file").write_bytes(content)
    reports: List[Tuple[int, int]] = []
    sent = source(tmp_path / "file", lambda *report: reports.append(report))
    filled = line.fill()
    assert sent.send(line.stream, 1 << 20) is None
    assert (sent.remaining, reports) == (3000, [])
    line.drain(filled)
    send_all(sent, line)
    assert line.received() == content


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", [0, 1000, 2000, 2500], ids="after {} bytes".format)
def test_the_copied_bytes_of_a_file_that_changed_in_either_part_are_never_sent(
    after: int,
    change: Callable[[Path], None],
    tmp_path: Path,
    line: Line,
    source: Sources,
    sent_by_system: List[Tuple[int, int]],
) -> None:
    path = old_file(tmp_path / "file", os.urandom(3000))
    sent = source(path)
    while sent.size - sent.remaining < after:
        sent.send(line.stream, 500)
    change(path)
    with pytest.raises(FileChanged) as caught:
        send_all(sent, line, 500)
    assert str(caught.value) == (f"{path} changed while it was read; nothing is stored; retry")
    assert len(line.received()) == max(after, min(2000, path.stat().st_size))


@pytest.mark.parametrize("size", [0, 1200])
def test_a_file_that_shrinks_while_the_system_sends_it_has_changed(
    size: int, tmp_path: Path, line: Line, source: Sources, sent_by_system: List[Tuple[int, int]]
) -> None:
    path = old_file(tmp_path / "file", bytes(3000))
    sent = source(path)
    assert sent.send(line.stream, 1500) == 1500
    os.truncate(path, size)
    with pytest.raises(FileChanged):
        sent.send(line.stream, 1500)
    assert sent.remaining == 1500


def test_a_disk_that_fails_while_the_system_sends_is_the_files_fault_not_the_peers(
    tmp_path: Path,
    line: Line,
    source: Sources,
    sent_by_system: List[Tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(bytes(3000))
    sent = source(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "sendfile", raising(errno.EIO))
        with pytest.raises(LocalFileError) as caught:
            sent.send(line.stream, 100)
    assert str(caught.value) == (f"cannot read {tmp_path}/file: input/output error; check the path")
    assert not isinstance(caught.value, FileChanged)
    assert line.received() == b""


def test_a_peer_that_is_gone_while_the_system_sends_is_the_peers_fault(
    tmp_path: Path, line: Line, source: Sources, sent_by_system: List[Tuple[int, int]]
) -> None:
    (tmp_path / "file").write_bytes(bytes(3000))
    sent = source(tmp_path / "file")
    line.hang_up()
    with pytest.raises(ConnectionFailed, match="peer: the connection broke"):
        sent.send(line.stream, 100)


def test_more_is_copied_than_both_ends_sockets_hold() -> None:
    assert files_module._COPIED_BYTES >= 2 * (16 << 20)


# Source: what cannot be read.


def unreadable(path: object) -> LocalFileError:
    """The error of a file that cannot be opened; nothing stays open."""
    before = open_descriptors()
    with pytest.raises(LocalFileError) as caught:
        Source(path, lambda _done, _size: None)  # type: ignore[arg-type]
    assert open_descriptors() == before
    return caught.value


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    error = str(unreadable(tmp_path / "missing"))
    assert error.startswith(f"cannot read {tmp_path}/missing: no such file or directory; check")


def test_a_path_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a directory" in str(unreadable(tmp_path / "file" / "below"))


def test_a_file_that_may_not_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", raising(errno.EACCES))
    assert str(unreadable("file")).startswith("cannot read file: permission denied; check")


@pytest.mark.parametrize("path", ["nu\0l", "lone \ud800 surrogate"])
def test_a_path_that_no_system_has_is_named(path: str) -> None:
    assert str(unreadable(path)).startswith("cannot read ")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_can_neither_forge_nor_colour_a_line(name: str, tmp_path: Path) -> None:
    assert str(unreadable(str(tmp_path / name))).isprintable()


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    assert str(unreadable(tmp_path)) == f"cannot read {tmp_path}: it is a folder; name a file"


def test_a_device_is_not_a_file() -> None:
    assert "it is not a regular file" in str(unreadable(os.devnull))


def test_a_file_whose_size_is_not_known_is_not_taken_for_an_empty_one() -> None:
    message = "cannot read /proc/cpuinfo: its size is 0, and yet there are bytes in it; send a copy"
    assert message in str(unreadable("/proc/cpuinfo"))
    assert "/proc/self/mem: input/output error" in str(unreadable("/proc/self/mem"))


def test_a_pipe_is_not_a_file_and_nobody_waits_for_its_other_end(tmp_path: Path) -> None:
    def ring(_signal: int, _frame: Optional[FrameType]) -> None:
        raise AssertionError("it waits for the pipe's other end")

    os.mkfifo(tmp_path / "pipe")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        assert "it is not a regular file" in str(unreadable(tmp_path / "pipe"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_socket_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
        assert str(unreadable("socket")).startswith("cannot read socket: ")


def test_a_file_as_large_as_the_protocol_carries_can_be_sent(
    tmp_path: Path, source: Sources
) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", MAX_FILE_BYTES)
    assert source(tmp_path / "file").size == 2**32 - 5


@pytest.mark.parametrize("size", [MAX_FILE_BYTES + 1, 2**32, 2**40])
def test_a_file_that_is_too_large_is_refused_as_soon_as_it_is_opened(
    size: int, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", size)
    before = open_descriptors()
    with pytest.raises(TooLarge, match=f"^{size} bytes; .*4294967291"):
        Source(tmp_path / "file", lambda _done, _size: None)
    assert open_descriptors() == before


def test_a_disk_that_fails_while_it_is_read_is_not_taken_for_the_end(
    tmp_path: Path, line: Line, source: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    sent = source(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", raising(errno.EIO))
        with pytest.raises(LocalFileError, match="input/output error"):
            sent.send(line.stream, 100)
    assert line.received() == b""


# Target: what is received.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for targets."""
    made = tmp_path / "folder"
    made.mkdir()
    return made


def names(folder: Path) -> List[str]:
    return sorted(os.listdir(folder))


def save(path: object, content: bytes, overwrite: bool = False) -> None:
    """Receives a file as the client does: what begins and fails is aborted."""
    target = Target(path, overwrite)  # type: ignore[arg-type]
    try:
        target.begin()
        target.write(memoryview(content))
        target.finish()
    except LocalFileError:
        target.abort()
        raise


def no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "link")


def refused_link(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(os, "link", raising(number))


def link(_monkeypatch: pytest.MonkeyPatch) -> None:
    pass


@pytest.fixture(params=[link, no_link, *map(refused_link, [errno.EPERM, errno.EOPNOTSUPP])])
def linking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with and without link(2)."""
    request.param(monkeypatch)


@pytest.mark.usefixtures("linking")
def test_what_was_received_gets_its_name_and_nothing_else_is_left(folder: Path) -> None:
    save(folder / "file", b"content")
    assert names(folder) == ["file"]
    assert (folder / "file").read_bytes() == b"content"


@pytest.mark.parametrize("overwrite", [False, True])
def test_it_has_another_name_until_it_is_whole(overwrite: bool, folder: Path) -> None:
    target = Target(folder / "file", overwrite)
    assert names(folder) == []
    target.begin()
    target.write(memoryview(b"con"))
    target.write(memoryview(b"tent"))
    (part,) = names(folder)
    assert part.startswith(".backup-")
    assert part.endswith(".part")
    assert (folder / part).read_bytes() == b"content"
    target.finish()
    assert names(folder) == ["file"]
    assert (folder / "file").read_bytes() == b"content"


def test_an_empty_file_is_a_file(folder: Path) -> None:
    save(folder / "file", b"")
    assert (folder / "file").read_bytes() == b""


def test_a_system_that_writes_a_little_at_a_time_gets_it_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:7]))
    save(folder / "file", b"more than seven bytes")
    assert (folder / "file").read_bytes() == b"more than seven bytes"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_it_can_have_any_name(name: str, folder: Path) -> None:
    save(str(folder / name), b"content")
    assert names(folder) == [name]


def test_a_bare_name_is_a_file_in_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    save("file", b"content")
    assert names(folder) == ["file"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_its_mode_follows_the_umask(umask: int, overwrite: bool, folder: Path) -> None:
    before = os.umask(umask)
    try:
        save(folder / "file", b"content", overwrite)
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("steps", ["", "begin", "begin write", "begin write finish"])
def test_after_abort_nothing_is_left_of_what_was_not_finished(steps: str, folder: Path) -> None:
    target = Target(folder / "file", False)
    for step in steps.split():
        target.write(memoryview(b"content")) if step == "write" else getattr(target, step)()
    target.abort()
    target.abort()
    assert names(folder) == (["file"] if "finish" in steps else [])


# Target: what is there already.


def test_a_file_that_is_there_is_seen_before_anything_is_sent(folder: Path) -> None:
    (folder / "file").write_bytes(b"old")
    with pytest.raises(TargetExists) as caught:
        Target(folder / "file", False)
    assert str(caught.value).startswith(f"{folder}/file is there already; ")
    assert "--force" in str(caught.value)


def test_a_symbolic_link_to_nothing_is_there_too(folder: Path) -> None:
    (folder / "file").symlink_to("nothing")
    with pytest.raises(TargetExists):
        Target(folder / "file", False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_target(overwrite: bool, folder: Path) -> None:
    with pytest.raises(LocalFileError) as caught:
        Target(folder, overwrite)
    assert str(caught.value) == f"{folder} is a folder; name a file in it"
    assert not isinstance(caught.value, TargetExists)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_pipe_or_a_device_is_no_target(overwrite: bool, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(LocalFileError):
        Target(folder / "pipe", overwrite)
    with pytest.raises(LocalFileError):
        Target(os.devnull, overwrite)


def test_a_pipe_that_appears_meanwhile_is_not_overwritten(folder: Path) -> None:
    target = Target(folder / "file", True)
    target.begin()
    os.mkfifo(folder / "file")
    with pytest.raises(LocalFileError, match="; choose another place"):
        target.finish()
    assert names(folder) == ["file"]
    assert stat.S_ISFIFO((folder / "file").stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_overwriting_opens_the_content_to_nobody_new_at_any_time(mode: int, folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file").chmod(mode)
    target = Target(folder / "file", True)
    target.begin()
    (part,) = set(names(folder)) - {"file"}
    meanwhile = stat.S_IMODE((folder / part).stat().st_mode)
    target.write(memoryview(b"content"))
    target.finish()
    assert meanwhile & ~mode == 0
    assert stat.S_IMODE((folder / "file").stat().st_mode) == mode


def test_overwriting_makes_no_program_that_runs_as_its_owner(folder: Path) -> None:
    (folder / "file").touch()
    (folder / "file").chmod(0o6755)
    save(folder / "file", b"content", overwrite=True)
    assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o755


@pytest.mark.usefixtures("linking")
def test_a_file_that_appears_meanwhile_is_not_overwritten(folder: Path) -> None:
    target = Target(folder / "file", False)
    target.begin()
    target.write(memoryview(b"ours"))
    (folder / "file").write_bytes(b"theirs")
    with pytest.raises(TargetExists):
        target.finish()
    assert names(folder) == ["file"]
    assert (folder / "file").read_bytes() == b"theirs"


@pytest.mark.parametrize("appears", ["before", "meanwhile"])
def test_overwriting_replaces_the_file_as_a_whole_at_the_end(appears: str, folder: Path) -> None:
    if appears == "before":
        (folder / "file").write_bytes(b"old and longer")
    target = Target(folder / "file", True)
    target.begin()
    target.write(memoryview(b"new"))
    if appears == "meanwhile":
        (folder / "file").write_bytes(b"old and longer")
    assert (folder / "file").read_bytes() == b"old and longer"
    target.finish()
    assert names(folder) == ["file"]
    assert (folder / "file").read_bytes() == b"new"


def test_overwriting_a_symbolic_link_leaves_alone_what_it_points_to(folder: Path) -> None:
    (folder / "other").write_bytes(b"other")
    (folder / "file").symlink_to("other")
    save(folder / "file", b"new", overwrite=True)
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_bytes() == b"new"
    assert (folder / "other").read_bytes() == b"other"


def test_a_folder_that_appears_meanwhile_is_not_overwritten(folder: Path) -> None:
    target = Target(folder / "file", True)
    target.begin()
    (folder / "file").mkdir()
    with pytest.raises(LocalFileError, match="; choose another place"):
        target.finish()
    assert names(folder) == ["file"]


# Target: what cannot be written.


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("missing/file", "no such file or directory"),
        ("regular/file", "not a directory"),
        ("x" * 256 + "/file", "file name too long"),
        ("lone \ud800 surrogate/file", ""),
        ("nu\0l/file", ""),
        ("lone \ud800 surrogate", ""),
        ("nu\0l", ""),
        ("x" * 256, "file name too long"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_where_nothing_can_be_written_is_named_and_nothing_is_left(
    overwrite: bool, place: str, why: str, folder: Path
) -> None:
    (folder / "regular").touch()
    with pytest.raises(LocalFileError) as caught:
        save(f"{folder}/{place}", b"content", overwrite)
    assert str(caught.value).startswith(f"cannot write {folder}/")
    assert str(caught.value).endswith(f"{why}; choose another place")
    assert names(folder) == ["regular"]


def test_a_read_only_file_system_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target(folder / "file", False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raising(errno.EROFS))
        patch.setattr(os, "unlink", raising(errno.EROFS))  # asked before the name is looked up
        with pytest.raises(LocalFileError, match="read-only file system"):
            target.begin()
        target.abort()


def test_a_full_disk_is_named_and_nothing_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    written: List[int] = []

    def until_full(fd: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(fd, data[: len(data) // 2]))
        return written[0]

    target = Target(folder / "file", False)
    target.begin()
    monkeypatch.setattr(os, "write", until_full)
    with pytest.raises(LocalFileError) as caught:
        target.write(memoryview(b"content"))
    assert str(caught.value) == (
        f"cannot write {folder}/file: no space left on device; choose another place"
    )
    assert len(names(folder)) == 1
    target.abort()
    assert names(folder) == []


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("call", ["close", "replace"])
def test_an_error_at_the_very_end_is_named_and_leaves_the_old_file(
    call: str, overwrite: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close

    def close_and_fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    if overwrite:
        (folder / "file").write_bytes(b"old")
    target = Target(folder / "file", overwrite)
    target.begin()
    target.write(memoryview(b"new"))
    with monkeypatch.context() as patch:
        patch.delattr(os, "link")
        patch.setattr(os, call, close_and_fail if call == "close" else raising(errno.EDQUOT))
        with pytest.raises(LocalFileError, match="quota exceeded"):
            target.finish()
    target.abort()
    assert names(folder) == (["file"] if overwrite else [])
    assert not overwrite or (folder / "file").read_bytes() == b"old"


@pytest.mark.parametrize("instead", ["nothing", "a file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_vanishes_is_named_and_giving_up_does_no_more(
    overwrite: bool, instead: str, folder: Path
) -> None:
    target = Target(folder / "file", overwrite)
    target.begin()
    target.write(memoryview(b"content"))
    shutil.rmtree(folder)
    if instead == "a file":
        folder.touch()
    with pytest.raises(LocalFileError, match=f"^cannot write {folder}/file: "):
        target.finish()
    target.abort()


def test_a_part_that_cannot_be_removed_does_not_undo_a_file_that_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(folder / "file", False)
    target.begin()
    target.write(memoryview(b"content"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", raising(errno.EACCES))
        target.finish()
    assert (folder / "file").read_bytes() == b"content"
    for part in folder.glob(".backup-*.part"):
        part.unlink()
