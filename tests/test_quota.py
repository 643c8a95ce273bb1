"""Caps hold, however uploads go side by side, and what is refused is not stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import pytest

from backup import cli, disk
from backup.errors import AppendOnly, BackupError, QuotaExceeded, StoreFailed
from backup.quota import Ledger
from backup.settings import Settings
from backup.storage import Store
from backup.upload import Upload
from tests.conftest import open_descriptors
from tests.helpers import (
    RunningServer,
    ask,
    connect,
    read_all,
    request,
    response,
)

USER, OTHER = 11, 12
BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202


def begun(store: Store, name: bytes, size: int, user_id: int = USER) -> Upload:
    """An upload of which everything is written."""
    upload = store.begin(user_id, name, size)
    upload.write(memoryview(bytes(size)))
    return upload


def put(store: Store, name: bytes, size: int, user_id: int = USER) -> None:
    (failure,) = store.commit([begun(store, name, size, user_id)])
    if failure is not None:
        raise failure


def reserved(store: Store, name: bytes, size: int, user_id: int = USER) -> Upload:
    """An upload of which it is known that it fits."""
    upload = store.begin(user_id, name, size)
    try:
        while not store.reserve(upload):
            continue
    except QuotaExceeded:
        upload.abort()
        raise
    return upload


def refused(store: Store, name: bytes, size: int, user_id: int = USER) -> bool:
    """Whether a file is refused; none is left begun."""
    try:
        reserved(store, name, size, user_id).abort()
    except QuotaExceeded:
        return True
    return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def fill(root: Path, sizes: List[int], user_id: int = USER) -> None:
    """Files that were there before the store was."""
    (root / str(user_id)).mkdir(parents=True)
    root.chmod(0o700)
    for number, size in enumerate(sizes):
        (root / str(user_id) / f"old {number}").write_bytes(bytes(size))


def test_without_caps_nothing_is_counted(root: Path) -> None:
    store = Store(root)
    upload = begun(store, b"a", 1000)
    assert upload.reservation is None
    assert store.commit([upload]) == [None]
    assert not Ledger(Settings()).counts


@pytest.mark.parametrize(
    ("caps", "cap"),
    [
        (Settings(max_file_bytes=9), "max-file-size"),
        (Settings(user_bytes=9), "user-quota"),
        (Settings(user_files=1), "user-files"),
        (Settings(total_bytes=9), "total-quota"),
        (Settings(min_free_bytes=1 << 60), "min-free"),
    ],
)
def test_a_refusal_names_the_option_that_caps(root: Path, caps: Settings, cap: str) -> None:
    fill(root, [1])
    with pytest.raises(QuotaExceeded) as caught:
        put(Store(root, caps), b"a", 10)
    assert caught.value.cap == cap
    option = f"--{cap}"
    assert option in [flag for flag, _, _ in cli._CAPS]


def test_a_file_has_at_most_so_many_bytes(root: Path) -> None:
    store = Store(root, Settings(max_file_bytes=100))
    put(store, b"a", 100)
    with pytest.raises(QuotaExceeded, match="a file of 101 bytes; at most 100 are taken"):
        store.begin(USER, b"b", 101)


def test_a_user_holds_at_most_so_many_bytes(root: Path) -> None:
    store = Store(root, Settings(user_bytes=100))
    put(store, b"a", 60)
    put(store, b"b", 40)
    with pytest.raises(QuotaExceeded, match="user 11 may hold 100 bytes and holds 100"):
        store.begin(USER, b"c", 1)
    put(store, b"c", 100, OTHER)
    assert store.commit([store.remove(USER, b"a")]) == [None]
    assert refused(store, b"c", 61)
    put(store, b"c", 60)


def test_a_user_holds_at_most_so_many_files(root: Path) -> None:
    store = Store(root, Settings(user_files=2))
    put(store, b"a", 60)
    put(store, b"b", 40)
    with pytest.raises(QuotaExceeded, match="user 11 may hold 2 files"):
        store.begin(USER, b"c", 1)
    put(store, b"b", 99)  # which is one in the place of another
    put(store, b"c", 1, OTHER)
    assert store.commit([store.remove(USER, b"a")]) == [None]
    put(store, b"c", 1)


def test_all_users_hold_at_most_so_many_bytes(root: Path) -> None:
    fill(root, [30, 20], OTHER)
    (root / "no user").mkdir()
    (root / "no user" / "file").write_bytes(bytes(1000))
    store = Store(root, Settings(total_bytes=100))
    put(store, b"a", 50)
    with pytest.raises(QuotaExceeded, match="all users may hold 100 bytes and hold 100"):
        store.begin(13, b"a", 1)
    assert store.commit([store.remove(OTHER, b"old 0")]) == [None]
    put(store, b"a", 30, 13)
    assert refused(store, b"b", 1)


def test_a_folder_that_cannot_be_counted_keeps_nobody_else_from_being_served(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, [30], OTHER)
    (root / "13").mkdir()
    open_folder = disk.open_folder

    def failing(path: bytes) -> disk.Folder:
        if path.endswith(b"/13"):
            raise OSError(5, "Input/output error")
        return open_folder(path)

    monkeypatch.setattr(disk, "open_folder", failing)
    store = Store(root, Settings(total_bytes=100))
    put(store, b"a", 70)
    assert refused(store, b"b", 1)
    with pytest.raises(StoreFailed, match="input/output error"):
        store.begin(13, b"a", 1)


def test_so_many_bytes_stay_free(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(root, Settings(min_free_bytes=100))
    free = 150

    class Usage:
        @property
        def free(self) -> int:
            return free

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage())
    assert refused(store, b"a", 51)
    one = store.begin(USER, b"a", 30)
    assert refused(store, b"b", 21)
    one.write(memoryview(bytes(30)))
    free = 120
    assert not refused(store, b"b", 20)  # what is written has left what is free already
    one.abort()


def test_uploads_side_by_side_pass_no_cap_together(root: Path) -> None:
    store = Store(root, Settings(user_bytes=100, user_files=3, total_bytes=150))
    uploads = [begun(store, b"a", 60)]
    assert refused(store, b"b", 41)
    uploads.append(begun(store, b"b", 40))
    assert refused(store, b"c", 1)
    assert refused(store, b"c", 51, OTHER)
    uploads.append(begun(store, b"c", 50, OTHER))
    assert store.commit(uploads) == [None] * 3
    assert refused(store, b"d", 1)


def test_files_side_by_side_pass_no_cap_together(root: Path) -> None:
    store = Store(root, Settings(user_files=2))
    uploads = [begun(store, b"a", 1), begun(store, b"b", 1)]
    assert refused(store, b"c", 1)
    assert store.commit(uploads) == [None, None]


def test_what_a_smaller_file_will_leave_is_room_only_when_it_has_its_name(root: Path) -> None:
    store = Store(root, Settings(user_bytes=100))
    put(store, b"a", 80)
    smaller = begun(store, b"a", 10)
    assert refused(store, b"b", 21)
    assert store.commit([smaller]) == [None]
    put(store, b"b", 90)


@pytest.mark.parametrize(
    "caps",
    [{"user_bytes": 50}, {"user_files": 1}, {"total_bytes": 50}],
    ids=lambda caps: next(iter(caps)),
)
def test_who_holds_more_than_he_may_by_now_can_still_hold_less(
    root: Path, caps: Dict[str, int]
) -> None:
    fill(root, [40, 40])
    store = Store(root, Settings(**caps))  # type: ignore[arg-type]
    assert refused(store, b"a", 1)
    put(store, b"old 0", 39)
    assert refused(store, b"old 1", 41) == ("user_files" not in caps)
    assert store.commit([store.remove(USER, b"old 0")]) == [None]


@pytest.mark.parametrize("end", ["abort", "fails"])
def test_an_upload_that_comes_to_nothing_gives_its_room_back(root: Path, end: str) -> None:
    store = Store(root, Settings(user_bytes=100, user_files=1))
    upload = begun(store, b"a", 100)
    assert refused(store, b"b", 1)
    if end == "abort":
        upload.abort()
        upload.abort()
    else:
        (root / str(USER) / "a").mkdir(parents=True)
        (failure,) = store.commit([upload])
        assert failure is not None
        (root / str(USER) / "a").rmdir()
    put(store, b"b", 100)


def test_a_file_makes_room_for_what_replaces_it(root: Path) -> None:
    store = Store(root, Settings(user_bytes=100, user_files=2))
    put(store, b"a", 50)
    put(store, b"b", 50)
    both = [begun(store, b"a", 50), begun(store, b"b", 50)]
    assert store.commit(both) == [None, None]
    put(store, b"a", 20)
    assert refused(store, b"b", 81)
    put(store, b"b", 80)


def test_what_has_become_of_the_replaced_file_counts_when_the_new_one_gets_its_name(
    root: Path,
) -> None:
    store = Store(root, Settings(user_bytes=100))
    put(store, b"a", 80)
    upload = begun(store, b"a", 90)
    assert store.commit([store.remove(USER, b"a")]) == [None]
    put(store, b"b", 80)
    (failure,) = store.commit([upload])
    assert isinstance(failure, QuotaExceeded)
    assert sorted(os.listdir(root / str(USER))) == ["b"]
    assert not os.listdir(root / ".tmp")


@pytest.mark.parametrize("files", [0, 1, 3, 4, 5, 50])
def test_what_was_there_is_counted_a_slice_at_a_time(root: Path, files: int) -> None:
    fill(root, [10] * files)
    (root / str(USER) / "folder").mkdir()
    store = Store(root, Settings(user_bytes=10 * files + 5, listing_names=4))
    upload = store.begin(USER, b"a", 5)
    upload.write(memoryview(bytes(5)))
    calls = 1
    while not store.reserve(upload):
        calls += 1
    assert calls == (files + 1) // 4 + 1
    assert store.commit([upload]) == [None]
    assert refused(store, b"b", 1)


@pytest.mark.parametrize("slices", [0, 1, 2, 3])
def test_what_changes_while_it_is_counted_counts(root: Path, slices: int) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=80, listing_names=4))
    upload = begun(store, b"a", 10)
    known = [store.reserve(upload) for _ in range(min(slices, 2))]
    assert not any(known)
    assert store.commit([store.remove(USER, b"old 0")]) == [None]
    while not store.reserve(upload):
        slices += 1
    assert store.commit([upload]) == [None]
    assert slices <= 3  # and goes on where it was
    assert refused(store, b"b", 1)


def test_of_a_user_who_is_not_counted_yet_a_server_takes_no_more_than_has_come(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "store", [10] * 50)
    settings = Settings(user_bytes=510, listing_names=1, scratch_bytes=64)
    with RunningServer(tmp_path / "store", settings) as server:
        whole = request(USER, BACKUP, b"a", bytes(100_000))
        assert ask(server.address, whole) == response(1001, b"a")
        line = reason(server, "quota")
        assert int(line.split("bytes=")[1].split()[0]) <= 64


def test_who_does_not_ask_first_is_counted_all_the_same(root: Path) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=89, listing_names=4))
    (failure,) = store.commit([begun(store, b"a", 10)])
    assert isinstance(failure, QuotaExceeded)


def test_a_count_that_fails_is_begun_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=90, listing_names=4))
    upload = store.begin(USER, b"a", 10)
    step = disk.Folder.status

    class Failing:
        def __iter__(self) -> Iterator[object]:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("backup.quota.islice", lambda *_: Failing())
        with pytest.raises(Exception, match="cannot count"):
            store.reserve(upload)
    assert step is disk.Folder.status
    while not store.reserve(upload):
        continue
    upload.abort()
    store.close()


def test_a_counting_goes_on_as_long_as_somebody_waits_for_it(root: Path) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=90, listing_names=2))
    before = open_descriptors()
    first, second = store.begin(USER, b"a", 10), store.begin(USER, b"b", 10)
    first.abort()
    assert [store.reserve(second) for _ in range(5)] == [False] * 4 + [True]
    second.abort()
    third = store.begin(USER, b"c", 10)
    assert store.reserve(third)  # what is known stays known
    third.abort()
    assert open_descriptors() == before


def test_a_counting_that_nobody_waits_for_any_more_leaves_nothing_open(root: Path) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=90, listing_names=2))
    before = open_descriptors()
    upload = store.begin(USER, b"a", 10)
    upload.abort()
    upload.abort()
    assert open_descriptors() == before
    put(store, b"a", 10)
    assert refused(store, b"b", 1)


@pytest.mark.parametrize("cap", ["user_bytes", "total_bytes"])
def test_nothing_is_kept_of_users_who_hold_nothing(root: Path, cap: str) -> None:
    store = Store(root, Settings(**{cap: 100}))  # type: ignore[arg-type]
    ledger = store._ledger

    def known() -> int:
        return len(ledger._users) + len(ledger._counting) + len(ledger._running)

    put(store, b"a", 40)
    for user_id in range(100, 120):
        store.begin(1000 + user_id, b"a", 10).abort()
        assert refused(store, b"a", 101, user_id)
        put(store, b"a", 60, user_id)
        assert store.commit([store.remove(user_id, b"a")]) == [None]
    assert known() == 1
    assert refused(store, b"b", 61)
    put(store, b"b", 60)
    assert refused(store, b"c", 1)


def test_a_file_that_another_server_removes_while_it_is_counted_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(root, [10] * 4)
    store = Store(root, Settings(user_bytes=40))
    entries = disk.DescriptorFolder.entries

    def racing(folder: disk.DescriptorFolder) -> disk.Entries:
        for entry in entries(folder):
            if entry.name == "old 2":
                (root / str(USER) / "old 2").unlink()
            yield entry

    monkeypatch.setattr(disk.DescriptorFolder, "entries", racing)
    put(store, b"a", 10)
    assert refused(store, b"b", 1)


def test_closing_lets_go_of_what_is_being_counted(root: Path) -> None:
    fill(root, [10] * 8)
    store = Store(root, Settings(user_bytes=90, listing_names=4))
    store.begin(USER, b"a", 10).abort()
    store.close()


def test_where_nothing_may_be_lost_nothing_is_replaced_or_removed(root: Path) -> None:
    store = Store(root, Settings(append_only=True))
    late = begun(store, b"a", 5)
    put(store, b"a", 10)
    with pytest.raises(AppendOnly, match="may be replaced or removed"):
        store.begin(USER, b"a", 10)
    with pytest.raises(AppendOnly):
        store.remove(USER, b"a")
    (failure,) = store.commit([late])
    assert isinstance(failure, AppendOnly)
    assert (root / str(USER) / "a").stat().st_size == 10
    assert not os.listdir(root / ".tmp")


# Through a server


def reason(server: RunningServer, reason: str) -> str:
    return server.wait_for_line(lambda line: f"reason={reason}" in line)


@pytest.mark.parametrize(
    "caps",
    [
        {"max_file_bytes": 9},
        {"user_bytes": 9},
        {"total_bytes": 9},
        {"min_free_bytes": 1 << 60},
    ],
    ids=lambda caps: next(iter(caps)),
)
def test_a_refusal_is_1001_and_one_line_and_nothing_is_stored(
    tmp_path: Path, caps: dict[str, int]
) -> None:
    with RunningServer(tmp_path / "store", Settings(**caps)) as server:  # type: ignore[arg-type]
        whole = request(USER, BACKUP, b"a", b"0123456789")
        assert ask(server.address, whole) == response(1001, b"a")
        assert "op=100 file=a status=1001" in reason(server, "quota")
        assert server.stored(USER) == []
        assert server.temporary() == []
        if "min_free_bytes" not in caps:
            assert ask(server.address, request(USER, BACKUP, b"a", b"x")) == response(210, b"a")
    assert len([line for line in server.lines if "quota" in line]) == 1


@pytest.mark.parametrize("cap", [50 * 10 + 3, 50 * 10 + 2])
def test_a_server_counts_before_it_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: int
) -> None:
    fill(tmp_path / "store", [10] * 50)
    settings = Settings(user_bytes=cap, listing_names=2)
    commit = Store.commit
    known: List[bool] = []

    def note(store: Store, changes: List[Upload]) -> List[Optional[BackupError]]:
        known.extend(one.reservation is not None and one.reservation.granted for one in changes)
        return commit(store, changes)

    monkeypatch.setattr(Store, "commit", note)
    with RunningServer(tmp_path / "store", settings) as server:
        answer = ask(server.address, request(USER, BACKUP, b"a", b"xyz"))
        assert answer == response(210 if cap == 503 else 1001, b"a")
    assert known == [True] * (cap == 503)  # a commit stops everybody, and counts nothing
    assert ("a" in server.stored(USER)) == (cap == 503)


def test_an_upload_that_waits_to_be_counted_is_synced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "store", [10] * 50)
    synced: List[int] = []
    catch_up = Upload.catch_up

    def counted(upload: Upload) -> None:
        synced.append(upload.written)
        catch_up(upload)

    monkeypatch.setattr(Upload, "catch_up", counted)
    settings = Settings(user_bytes=1 << 30, listing_names=2, scratch_bytes=64)
    with RunningServer(tmp_path / "store", settings) as server:
        whole = request(USER, BACKUP, b"a", bytes(100_000))
        assert ask(server.address, whole) == response(210, b"a")
    assert not synced  # its commit does that


def test_parallel_uploads_pass_no_quota_together(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "store", Settings(user_bytes=100)) as server:
        names = [b"%d" % number for number in range(8)]
        socks = [connect(server.address) for _ in names]
        for sock, name in zip(socks, names):
            sock.sendall(request(USER, BACKUP, name, bytes(29), size=30))
        for sock in socks:
            sock.sendall(b"x")
        answers = [read_all(sock)[1:3] for sock in socks]
        for sock in socks:
            sock.close()
        assert answers.count((210).to_bytes(2, "little")) == 3
        assert len(server.stored(USER)) == 3
        assert ask(server.address, request(USER, BACKUP, b"9", bytes(10))) == response(210, b"9")


def test_append_only_answers_as_a_refusal(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "store", Settings(append_only=True)) as server:
        assert ask(server.address, request(USER, BACKUP, b"a", b"x")) == response(210, b"a")
        assert ask(server.address, request(USER, BACKUP, b"a", b"y")) == response(1001, b"a")
        assert ask(server.address, request(USER, DELETE, b"a")) == response(1002, b"a")
        assert "op=201" in server.wait_for_line(
            lambda line: "op=201" in line and "reason=append-only" in line
        )
    assert (tmp_path / "store" / str(USER) / "a").read_bytes() == b"x"


def test_an_address_has_at_most_so_many_connections(tmp_path: Path) -> None:
    settings = Settings(max_connections_per_address=2)
    with RunningServer(tmp_path / "store", settings) as server:
        with connect(server.address) as one, connect(server.address) as two:
            with connect(server.address) as three:
                assert three.recv(1) == b""
            assert "connection refused" in reason(server, "quota")
            for sock in (one, two):
                sock.sendall(request(USER, LIST))
                assert read_all(sock) == response(212, b"", bytes(4))
        server.wait_for_line(lambda line: "op=202" in line)
        assert ask(server.address, request(USER, LIST)) == response(212, b"", bytes(4))


def test_more_connections_than_are_served_at_once_wait(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "store", Settings(max_connections=1)) as server:
        with connect(server.address), connect(server.address) as two:
            two.sendall(request(USER, LIST))
            server.wait_for_line(lambda line: "1 connections are all that are served" in line)
        assert ask(server.address, request(USER, LIST)) == response(212, b"", bytes(4))
