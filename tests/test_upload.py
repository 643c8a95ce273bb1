"""An upload gets to the disk while it grows, so that its commit waits for one piece and no more.

Every test runs twice: with what this system can do, and as if it could neither be told to begin
writing nor lock a file. What the disk is asked for is recorded, and time passes when a test says
so.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from backup import disk
from backup import upload as upload_module
from backup.errors import StoreFailed
from backup.settings import Settings
from backup.upload import Pace, Upload
from tests.conftest import open_descriptors

USER, NAME = 11, b"a"
DAY = 24 * 3600.0
MIB = 1 << 20


@pytest.fixture(autouse=True, params=["as it is", "bare"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this test is run without the system's features."""
    if request.param == "bare":
        monkeypatch.setattr(disk, "fcntl", None)
        monkeypatch.setattr(disk, "HAS_FADVISE", False)
        return True
    return False


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pace(clock: Callable[[], float] = time.monotonic, **settings: float) -> Pace:
    return Pace(replace(Settings(), **settings), clock)  # type: ignore[arg-type]


Begin = Callable[[Pace], Upload]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Begins uploads, each with a file of its own; what is left of them is aborted at the end."""
    begun: List[Upload] = []

    def make(pace: Pace) -> Upload:
        path = bytes(tmp_path / f"upload {len(begun)}")
        begun.append(Upload(USER, NAME, path, disk.create(path), pace))
        return begun[-1]

    yield make
    for one in begun:
        one.abort()


class Asked:
    """What the disk was asked for, in order; an act of the test's comes with each fsync(2)."""

    def __init__(self) -> None:
        self.all: List[Tuple[object, ...]] = []
        self.at_sync: Callable[[], None] = lambda: None

    def advise(self, fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert os.fstat(fd).st_size >= offset + length, "it cannot write what it does not have"
        self.all.append(("write back", offset, length))

    def sync(self, fd: int) -> None:
        self.all.append(("sync", os.fstat(fd).st_size))
        self.at_sync()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()
    monkeypatch.setattr(os, "posix_fadvise", made.advise)
    monkeypatch.setattr(os, "fsync", made.sync)
    return made


def write(upload: Upload, count: int) -> None:
    upload.write(memoryview(bytes(count)))


@contextmanager
def failing(function: str, number: int) -> Iterator[None]:
    """Makes this function of ``os`` fail with this number."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        yield


def content(upload: Upload) -> bytes:
    return Path(os.fsdecode(upload.path)).read_bytes()


# Writing, and having the system begin to write.


def test_what_was_written_is_in_the_file_in_its_order(begin: Begin) -> None:
    upload = begin(pace(write_back_bytes=4))
    assert (upload.user_id, upload.name) == (USER, NAME)
    for piece in (b"one ", b"two ", b"", b"three"):
        upload.write(memoryview(piece))
    assert content(upload) == b"one two three"


def test_the_system_is_told_to_write_every_so_many_bytes_and_only_what_is_new(
    begin: Begin, asked: Asked, bare: bool
) -> None:
    upload = begin(pace(write_back_bytes=10))
    told: List[Tuple[object, ...]] = []
    for count, expected in [
        (4, None),
        (5, None),
        (1, (0, 10)),  # as soon as there are ten
        (9, None),
        (4, (10, 13)),
        (25, (23, 25)),  # and everything at once, however much it is
        (9, None),
        (1, (48, 10)),
    ]:
        write(upload, count)
        if expected and not bare:
            told.append(("write back", *expected))
        assert asked.all == told


def test_the_rest_is_told_on_request_and_once(begin: Begin, asked: Asked, bare: bool) -> None:
    upload = begin(pace(write_back_bytes=10))
    upload.start_write_back()
    assert asked.all == []  # there is nothing yet, and a length of 0 would mean all
    write(upload, 12)
    write(upload, 3)
    upload.start_write_back()
    upload.start_write_back()
    assert asked.all == ([] if bare else [("write back", 0, 12), ("write back", 12, 3)])


def test_who_needs_nothing_on_the_disk_tells_the_system_nothing(begin: Begin, asked: Asked) -> None:
    upload = begin(pace(fsync=False, write_back_bytes=10))
    write(upload, 100)
    upload.start_write_back()
    upload.settle()
    assert asked.all == []
    assert content(upload) == bytes(100)


def test_a_system_that_takes_no_advice_gets_the_bytes_all_the_same(
    begin: Begin, asked: Asked
) -> None:
    upload = begin(pace(write_back_bytes=10))
    with failing("posix_fadvise", errno.EINVAL):
        write(upload, 10)
        upload.catch_up()
    upload.settle()
    assert asked.all == [("sync", 10), ("sync", 10)]
    assert content(upload) == bytes(10)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_what_cannot_be_written_is_a_store_failure_at_its_path(begin: Begin, number: int) -> None:
    upload = begin(pace())
    with failing("write", number), pytest.raises(StoreFailed) as caught:
        write(upload, 1)
    assert str(caught.value) == (
        f"{os.fsdecode(upload.path)}: cannot write an upload: {os.strerror(number).lower()}; "
        "check this folder and its disk"
    )


def test_what_could_not_be_written_is_not_counted(begin: Begin, asked: Asked) -> None:
    upload = begin(pace(write_back_bytes=10))
    with failing("write", errno.EIO), pytest.raises(StoreFailed):
        write(upload, 10)
    write(upload, 9)
    assert asked.all == []


# Making it durable piece by piece.


def test_an_upload_is_behind_when_a_piece_of_it_waits_to_be_made_durable(
    begin: Begin, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "_FIRST_PIECE", 20)
    upload = begin(pace(write_back_bytes=20, sync_bytes=20))  # so that all pieces have this size
    for _ in range(3):
        assert not upload.behind
        write(upload, 19)
        assert not upload.behind
        write(upload, 1)
        assert upload.behind
        upload.catch_up()
    assert [size for what, size, *_ in asked.all if what == "sync"] == [20, 40, 60]


def test_an_upload_that_needs_nothing_on_the_disk_is_never_behind(
    begin: Begin, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "_FIRST_PIECE", 20)
    upload = begin(pace(fsync=False))
    write(upload, 1000)
    assert not upload.behind


def test_an_upload_knows_what_its_commit_has_to_wait_for(begin: Begin, asked: Asked) -> None:
    upload, careless = begin(pace()), begin(pace(fsync=False))
    waiting = [upload.waiting]
    for count in (10, 5):
        write(upload, count)
        write(careless, count)
        waiting.append(upload.waiting)
    upload.catch_up()
    waiting.append(upload.waiting)
    write(upload, 3)
    assert [*waiting, upload.waiting] == [0, 10, 15, 0, 3]
    assert careless.waiting == 0


def test_catching_up_has_the_rest_written_and_then_waits_for_it(
    begin: Begin, asked: Asked, bare: bool
) -> None:
    upload = begin(pace(write_back_bytes=10))
    write(upload, 10)
    write(upload, 5)
    upload.catch_up()
    told = [] if bare else [("write back", 0, 10), ("write back", 10, 5)]
    assert asked.all == [*told, ("sync", 15)]


def test_a_piece_that_cannot_be_made_durable_is_a_store_failure(begin: Begin) -> None:
    shared = pace()
    upload = begin(shared)
    write(upload, shared.bytes)
    with failing("fsync", errno.EIO), pytest.raises(StoreFailed) as caught:
        upload.catch_up()
    assert str(caught.value) == (
        f"{os.fsdecode(upload.path)}: cannot write an upload: input/output error; "
        "check this folder and its disk"
    )
    assert upload.behind
    assert shared.bytes == pace().bytes  # nothing is learned from that


# How much a piece is.


def test_before_anything_is_learned_a_piece_is_of_a_moderate_size() -> None:
    default = pace()
    assert default.bytes == 4 * MIB
    assert default.now is time.monotonic
    assert default.durable
    assert default.write_back_bytes == Settings().write_back_bytes


@pytest.mark.parametrize(
    ("count", "seconds", "expected"),
    [
        (4 * MIB, 0.01, 4 * MIB),  # just as long as it should take
        (4 * MIB, 0.02, 2 * MIB),
        (4 * MIB, 0.0125, 4 * MIB * 4 // 5),
        (4 * MIB, 0.005, 8 * MIB),
        (4 * MIB, 0.008, 5 * MIB),
        (1 * MIB, 0.0025, 4 * MIB),  # what counts is the rate
        (4 * MIB, 5.0, 2 * MIB),  # one odd case halves at the most
        (0, 0.0, 2 * MIB),
        (400 * MIB, 0.01, 8 * MIB),  # or doubles
        (4 * MIB, 0.0, 8 * MIB),  # faster than the clock can tell
    ],
)
def test_a_piece_becomes_what_the_disk_takes_in_its_time(
    count: int, seconds: float, expected: int
) -> None:
    learning = pace()
    learning.learn(count, seconds)
    assert learning.bytes == expected


def test_a_piece_follows_a_disk_that_becomes_slow_and_fast_again_within_its_bounds() -> None:
    learning = pace(write_back_bytes=MIB // 2, sync_bytes=24 * MIB)
    sizes: List[int] = []
    for seconds in [10.0] * 5 + [0.0] * 7:
        learning.learn(learning.bytes, seconds)
        sizes.append(learning.bytes * 2 // MIB)  # in halves
    assert sizes == [4, 2, 1, 1, 1, 2, 4, 8, 16, 32, 48, 48]


@pytest.mark.parametrize(("time_bound", "expected"), [(0.01, 4 * MIB), (0.02, 8 * MIB)])
def test_how_long_a_piece_may_take_is_a_setting(time_bound: float, expected: int) -> None:
    learning = pace(sync_seconds=time_bound)
    learning.learn(4 * MIB, 0.01)
    assert learning.bytes == expected


def test_catching_up_learns_from_what_waited_and_how_long_it_took(
    begin: Begin, asked: Asked, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "_FIRST_PIECE", 1000)
    learning = pace(clock, write_back_bytes=10)

    def disk_works() -> None:
        clock.time += 0.01

    asked.at_sync = disk_works
    upload = begin(learning)
    write(upload, 1200)
    upload.catch_up()
    assert learning.bytes == 1200
    write(upload, 900)  # of 2100 by now
    upload.catch_up()
    assert learning.bytes == 900


def test_what_one_upload_learns_is_for_all(begin: Begin, asked: Asked, clock: Clock) -> None:
    learning = pace(clock)
    one, other = begin(learning), begin(learning)
    write(one, 2 * MIB)
    write(other, 2 * MIB)
    assert not one.behind
    asked.at_sync = lambda: setattr(clock, "time", clock.time + 1)
    one.catch_up()
    assert learning.bytes == 2 * MIB
    assert (one.behind, other.behind) == (False, True)


# Settling, before the commit gives it its name.


def test_a_settled_upload_is_on_the_disk_as_a_whole(begin: Begin, asked: Asked) -> None:
    upload = begin(pace())
    write(upload, 100)
    upload.settle()
    assert asked.all == [("sync", 100)]


def test_what_was_lost_on_the_way_to_the_disk_is_said_when_it_settles(begin: Begin) -> None:
    upload = begin(pace())
    with failing("fsync", errno.EIO), pytest.raises(OSError, match=os.strerror(errno.EIO)):
        upload.settle()


def is_open(upload: Upload) -> bool:
    path = os.path.realpath(os.fsdecode(upload.path))
    return path in open_descriptors().values()


@pytest.mark.parametrize("fsync", [True, False])
def test_a_settled_upload_stays_open_where_it_is_locked_and_is_closed_where_it_would_hinder(
    begin: Begin, asked: Asked, bare: bool, fsync: bool
) -> None:
    upload = begin(pace(fsync=fsync))
    assert upload.claim()
    upload.settle()
    assert is_open(upload) is not bare  # Windows renames no open file
    assert disk.remove_abandoned(upload.path, DAY) is False
    upload.settle() if not bare else upload.close()
    assert Path(os.fsdecode(upload.path)).exists()


@contextmanager
def late_errors() -> Iterator[List[int]]:
    """A file system that tells only on close(2) that what was written is lost, as NFS may.

    The descriptors that were closed so.
    """
    close = os.close
    closed: List[int] = []

    def fail_late(fd: int) -> None:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        close(fd)
        if regular:
            closed.append(fd)
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "close", fail_late)
        yield closed


def test_where_nothing_is_synced_a_close_says_what_was_lost(begin: Begin, bare: bool) -> None:
    upload = begin(pace(fsync=False))
    write(upload, 10)
    with late_errors() as closed, pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
        upload.settle()
    assert len(closed) == 1
    assert is_open(upload) is not bare  # only a second descriptor was closed, and the lock stays


def test_where_all_is_synced_and_locked_nothing_is_closed_before_it_has_its_name(
    begin: Begin, asked: Asked, bare: bool
) -> None:
    upload = begin(pace())
    with late_errors() as closed:
        if bare:
            with pytest.raises(OSError, match=os.strerror(errno.EDQUOT)):
                upload.settle()
        else:
            upload.settle()
    assert len(closed) == bare


# Its end.


@pytest.mark.parametrize("end", [Upload.close, Upload.abort])
def test_ending_it_again_closes_nothing_that_another_has_opened_since(
    begin: Begin, tmp_path: Path, end: Callable[[Upload], None]
) -> None:
    upload = begin(pace())
    end(upload)
    fd = os.open(tmp_path, os.O_RDONLY)  # most likely of the same number
    end(upload)
    upload.abort()
    upload.close()
    os.close(fd)


def test_closing_keeps_the_file_and_aborting_removes_it(begin: Begin) -> None:
    closed, aborted = begin(pace()), begin(pace())
    for upload in (closed, aborted):
        write(upload, 3)
    closed.close()
    aborted.abort()
    assert (is_open(closed), is_open(aborted)) == (False, False)
    assert content(closed) == bytes(3)
    assert not os.path.lexists(aborted.path)


@pytest.mark.parametrize("end", [Upload.close, Upload.abort])
def test_a_close_that_fails_at_the_end_raises_nothing(
    begin: Begin, end: Callable[[Upload], None]
) -> None:
    upload = begin(pace())
    with late_errors() as closed:
        end(upload)
    assert len(closed) == 1
    assert os.path.lexists(upload.path) is (end is Upload.close)


def test_an_abort_that_cannot_remove_the_file_raises_nothing(begin: Begin) -> None:
    upload = begin(pace())
    with failing("unlink", errno.EROFS):
        upload.abort()
    assert not is_open(upload)


def test_a_file_that_another_has_locked_is_not_claimed(begin: Begin, bare: bool) -> None:
    upload = begin(pace())
    other = os.open(upload.path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert upload.claim() is bare
    os.close(other)
    assert upload.claim()
