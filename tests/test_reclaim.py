"""A large file is freed bit by bit, and only when nobody has it any more."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import List

import pytest

from backup import disk, reclaim
from backup.reclaim import Reclaim
from backup.settings import Settings
from backup.storage import Store
from backup.upload import Upload
from tests.helpers import RunningServer, ask, request, response

PIECE = 4 << 20
BACKUP, DELETE = 100, 201


def nameless(path: Path, size: int) -> int:
    """A descriptor of a file that has lost its name."""
    path.touch()
    os.truncate(path, size)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    return fd


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> List[int]:
    """What ftruncate(2) was asked for, in order."""
    asked: List[int] = []
    ftruncate = os.ftruncate

    def record(fd: int, size: int) -> None:
        asked.append(size)
        ftruncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", record)
    return asked


def steps(some: Reclaim) -> int:
    """Does all that is waiting; how many steps it took."""
    count = 0
    while some.waiting:
        some.step()
        count += 1
    return count


def test_a_large_file_is_freed_a_piece_a_step_and_then_closed(
    tmp_path: Path, sizes: List[int]
) -> None:
    some = Reclaim(PIECE)
    fd = nameless(tmp_path / "file", 3 * PIECE + 1)
    some.add(fd)
    assert steps(some) == 4
    assert sizes == [3 * PIECE, 2 * PIECE, PIECE]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_small_file_is_closed_at_once(tmp_path: Path, sizes: List[int]) -> None:
    some = Reclaim(PIECE)
    some.add(nameless(tmp_path / "file", PIECE))
    assert not some.waiting
    assert not sizes


def test_what_another_has_open_stays_whole(tmp_path: Path, sizes: List[int]) -> None:
    path = tmp_path / "file"
    content = os.urandom(3 * PIECE)
    path.write_bytes(content)
    with open(path, "rb") as reader:
        fd = os.open(path, os.O_RDWR)
        path.unlink()
        some = Reclaim(PIECE)
        some.add(fd)
        assert not some.waiting
        assert reader.read() == content
    assert not sizes


def test_what_has_another_name_stays_whole(tmp_path: Path, sizes: List[int]) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(bytes(3 * PIECE))
    other.hardlink_to(path) if hasattr(other, "hardlink_to") else os.link(path, other)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    some = Reclaim(PIECE)
    some.add(fd)
    assert not some.waiting
    assert not sizes
    assert other.stat().st_size == 3 * PIECE


def test_nobody_is_signalled_for_it_later(tmp_path: Path) -> None:
    fd = nameless(tmp_path / "file", 3 * PIECE)
    assert disk.nobody_has(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    os.close(fd)


def test_where_nobody_can_tell_it_is_closed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: List[int]
) -> None:
    monkeypatch.setattr(disk, "_SET_LEASE", None)
    some = Reclaim(PIECE)
    some.add(nameless(tmp_path / "file", 3 * PIECE))
    assert not some.waiting
    assert not sizes


def test_a_file_that_cannot_be_made_shorter_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_fd: int, _size: int) -> None:
        raise OSError(5, "Input/output error")

    some = Reclaim(PIECE)
    some.add(nameless(tmp_path / "file", 3 * PIECE))
    monkeypatch.setattr(os, "ftruncate", refuse)
    assert steps(some) == 1


def test_what_cannot_be_looked_at_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Reclaim(PIECE)
    fd = nameless(tmp_path / "file", 3 * PIECE)

    def refuse(_: int) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", refuse)
        some.add(fd)
    assert not some.waiting
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_piece_ends_where_no_page_lies_across(tmp_path: Path, sizes: List[int]) -> None:
    some = Reclaim(PIECE + 1)
    some.add(nameless(tmp_path / "file", 5 * PIECE))
    assert steps(some) == 3
    assert sizes == [4 * PIECE, 2 * PIECE]


def test_only_so_many_are_kept_open(tmp_path: Path) -> None:
    some = Reclaim(PIECE)
    for number in range(reclaim._MOST_FILES + 2):
        some.add(nameless(tmp_path / f"{number}", 2 * PIECE))
    assert steps(some) == 2 * reclaim._MOST_FILES


def test_closing_closes_all(tmp_path: Path) -> None:
    some = Reclaim(PIECE)
    some.add(nameless(tmp_path / "file", 3 * PIECE))
    some.close()
    assert not some.waiting


def put(store: Store, name: bytes, size: int) -> Upload:
    upload = store.begin(11, name)
    upload.write(memoryview(os.urandom(size)))
    return upload


def test_a_store_without_a_reactor_holds_nothing_back(tmp_path: Path) -> None:
    store = Store(tmp_path, Settings(reclaim_bytes=PIECE))
    for _ in range(2):
        assert store.commit([put(store, b"a", 3 * PIECE)]) == [None]
    assert store.commit([store.remove(11, b"a")]) == [None]
    put(store, b"a", 3 * PIECE).abort()
    assert not store.to_reclaim


@pytest.mark.parametrize("end", ["replaced", "removed", "aborted"])
def test_a_store_gives_the_space_back_step_by_step(
    tmp_path: Path, sizes: List[int], end: str
) -> None:
    store = Store(tmp_path, Settings(reclaim_bytes=PIECE), at_turn_end=lambda _: None)
    upload = put(store, b"a", 3 * PIECE)
    if end == "aborted":
        upload.abort()
    else:
        assert store.commit([upload]) == [None]
        then = store.remove(11, b"a") if end == "removed" else put(store, b"a", 1)
        assert store.commit([then]) == [None]
    assert store.to_reclaim
    assert not sizes
    while store.to_reclaim:
        store.reclaim()
    assert sizes == [2 * PIECE, PIECE]


@pytest.mark.parametrize("end", ["replaced", "removed", "cut short"])
def test_a_server_gives_the_space_back_while_it_serves(
    tmp_path: Path, sizes: List[int], end: str
) -> None:
    large = os.urandom(3 * PIECE)
    with RunningServer(tmp_path / "store", Settings(reclaim_bytes=PIECE)) as server:
        whole = request(11, BACKUP, b"a", large)
        if end == "cut short":
            assert ask(server.address, whole[:-1], end=True) == response(1001, b"a")
        else:
            assert ask(server.address, whole) == response(210, b"a")
            if end == "replaced":
                assert ask(server.address, request(11, BACKUP, b"a", b"x")) == response(210, b"a")
            else:
                assert ask(server.address, request(11, DELETE, b"a")) == response(211, b"a")
        while len(sizes) < 2:  # each turn takes one, and each LIST a turn
            assert ask(server.address, request(12, 202)) == response(212, b"", bytes(4))
    assert sizes == [PIECE * left for left in (2, 1)]
