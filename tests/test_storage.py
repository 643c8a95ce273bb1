"""A name holds one whole file or nothing, whatever fails, and whatever lies in the store already.

Every test runs twice: with what this system can do, and as if it could open nothing relative to a
descriptor, refuse no symbolic link by itself, lock no file and take no advice. In what order the
system is asked for what makes a change durable is recorded, and tested near the end.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import pytest

from backup import disk
from backup.errors import (
    AppendOnly,
    BackupError,
    InternalError,
    InvalidName,
    NotFound,
    QuotaExceeded,
    StoreFailed,
)
from backup.listing import Listing
from backup.settings import Settings
from backup.storage import Change, Removal, Store, Stored
from backup.upload import Upload
from tests.conftest import open_descriptors
from tests.helpers import ROOT, WAIT_SECONDS

USER = 11
EARLIER = Settings(stale_seconds=-1.0)
"""Settings by which a file that was touched just now has been left for long enough."""


@pytest.fixture(autouse=True, params=["as it is", "bare"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this test is run without the system's features."""
    if request.param == "bare":
        monkeypatch.setattr(disk, "HAS_DIR_FD", False)
        monkeypatch.setattr(disk, "HAS_FADVISE", False)
        monkeypatch.setattr(disk, "fcntl", None)
        monkeypatch.setattr(disk, "_SAFELY", disk._SAFELY & ~os.O_NOFOLLOW)
        monkeypatch.setattr(disk, "_CREATE", disk._CREATE & ~os.O_NOFOLLOW)
        return True
    return False


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the store of a test is."""
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Store:
    """A new store."""
    return Store(root)


def upload(store: Store, name: bytes, content: bytes, user_id: int = USER) -> Upload:
    """An upload with all of its content written, not yet committed."""
    begun = store.begin(user_id, name)
    begun.write(memoryview(content))
    return begun


def put(store: Store, name: bytes, content: bytes, user_id: int = USER) -> None:
    assert store.commit([upload(store, name, content, user_id)]) == [None]


def get(store: Store, name: bytes, user_id: int = USER) -> bytes:
    stored = store.open(user_id, name)
    with open(stored.fd, "rb") as file:
        content = file.read()
    assert stored.size == len(content)
    return content


def only(results: List[Optional[BackupError]]) -> BackupError:
    """The error of a commit of one change."""
    (error,) = results
    assert error is not None
    return error


def temporary(root: Path) -> List[str]:
    return os.listdir(root / ".tmp")


@contextmanager
def failing(
    *functions: str, number: int, when: Callable[..., bool] = lambda *_, **__: True
) -> Iterator[None]:
    """Makes these functions of ``os`` fail with this number ``when`` their arguments say so."""

    def breaking(real: Callable[..., object]) -> Callable[..., object]:
        def fail(*arguments: object, **named: object) -> object:
            if when(*arguments, **named):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        return fail

    with pytest.MonkeyPatch.context() as patch:
        for function in functions:
            patch.setattr(os, function, breaking(getattr(os, function)))
        yield


def at(end: bytes) -> Callable[..., bool]:
    """Whether a path among a function's arguments ends so."""
    return lambda *arguments, **_: any(
        isinstance(path, bytes) and path.endswith(end) for path in arguments
    )


# What a store is made of.


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o177, 0o377])
def test_a_store_makes_its_root_for_its_owner_alone(tmp_path: Path, umask: int) -> None:
    root = tmp_path / "above" / "store"
    before = os.umask(umask)
    try:
        put(Store(root), b"a", b"xyz")
    finally:
        os.umask(before)
    for folder in (root, root / ".tmp", root / "11"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "11" / "a").stat().st_mode) == 0o600 & ~umask


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777, 0o1777, 0o2770])
def test_a_root_that_others_may_write_is_refused_and_left_alone(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "two words"
    root.mkdir()
    root.chmod(mode)
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        with pytest.raises(StoreFailed) as caught:
            Store(path)
        assert str(caught.value) == (
            f"{path}: others than its owner may write here, and so replace what is stored;"
            " take that from them: chmod go-w"
        )
    assert list(root.iterdir()) == []
    root.chmod(mode & ~0o022)
    Store(root)


def test_a_store_takes_up_what_an_earlier_one_kept(store: Store, root: Path) -> None:
    put(store, b"a", b"xyz")
    assert get(Store(str(root)), b"a") == b"xyz"


def test_a_relative_root_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("store")
    monkeypatch.chdir("/")
    put(store, b"a", b"xyz")
    assert (tmp_path / "store" / "11" / "a").read_bytes() == b"xyz"


def test_a_root_may_be_reached_by_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to("disk")
    put(Store(tmp_path / "store"), b"a", b"xyz")
    assert (tmp_path / "disk" / "11" / "a").read_bytes() == b"xyz"


@pytest.mark.parametrize("path", ["file", "file/below", "dangling", "locked", "linked"])
def test_a_root_that_cannot_be_made_or_used_is_a_store_failure(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("file/below")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / ".tmp").touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "theirs").touch()
    (tmp_path / "linked" / ".tmp").symlink_to(tmp_path / "other")
    with pytest.raises(StoreFailed, match="cannot keep files: ") as caught:
        Store(tmp_path / path, EARLIER)
    assert caught.value.subject == str(tmp_path / path)
    assert (tmp_path / "other" / "theirs").exists()
    shutil.rmtree(tmp_path / "linked")
    (tmp_path / "locked" / ".tmp").unlink()


def test_a_root_that_cannot_be_written_is_found_out_at_the_start(store: Store, root: Path) -> None:
    def creating(_: bytes, flags: int, *rest: int, **named: int) -> bool:
        return bool(flags & os.O_CREAT)

    with failing("open", number=errno.EROFS, when=creating), pytest.raises(StoreFailed) as caught:
        Store(root)
    assert str(caught.value) == (
        f"{root}: cannot keep files: read-only file system; check this folder and its disk"
    )


# What it does when nothing fails.


@pytest.mark.parametrize("user_id", [0, 1, USER, 2**31, 2**32 - 1])
def test_a_file_comes_back_as_it_was_sent(store: Store, root: Path, user_id: int) -> None:
    content = bytes(range(256)) * 1000
    begun = store.begin(user_id, "שלום.txt".encode())
    for start in range(0, len(content), 7001):
        begun.write(memoryview(content)[start : start + 7001])
    assert store.commit([begun]) == [None]
    assert get(store, "שלום.txt".encode(), user_id) == content
    assert (root / str(user_id) / "שלום.txt").read_bytes() == content
    assert temporary(root) == []


def test_a_file_may_have_any_lawful_name(store: Store) -> None:
    names = [b"a", b".hidden", b".tmp", b"...", b" ", b"-rf", b"~", b"n" * 255, "é".encode() * 127]
    for name in names:
        put(store, name, name)
    assert store.names(USER) == sorted(names)
    assert [get(store, name) for name in names] == names


@pytest.mark.parametrize("name", [b"", b".", b"..", b"../12/a", b"a/b", b"\xff", b"n" * 256])
def test_an_unlawful_name_gets_nowhere(store: Store, root: Path, name: bytes) -> None:
    put(store, b"a", b"xyz", 12)
    for act in (store.begin, store.open, store.remove):
        with pytest.raises(InvalidName):
            act(USER, name)
    assert temporary(root) == []


def test_names_are_sorted_by_their_bytes(store: Store) -> None:
    for name in ("é", "b", "a", "B", "ab"):
        put(store, name.encode(), b"x")
    assert store.names(USER) == [b"B", b"a", b"ab", b"b", "é".encode()]


def test_who_has_stored_nothing_has_no_names(store: Store) -> None:
    assert store.names(USER) == []
    with pytest.raises(NotFound, match="user 11 has no such file"):
        store.open(USER, b"a")
    assert isinstance(only(store.commit([store.remove(USER, b"a")])), NotFound)


def test_users_are_apart(store: Store) -> None:
    put(store, b"a", b"one", 1)
    put(store, b"a", b"eleven", 11)
    assert store.commit([store.remove(1, b"a")]) == [None]
    assert store.names(1) == []
    assert get(store, b"a", 11) == b"eleven"


def test_a_file_is_not_there_before_it_is_committed(store: Store, root: Path) -> None:
    begun = upload(store, b"a", b"xyz")
    assert len(temporary(root)) == 1
    assert store.names(USER) == []
    with pytest.raises(NotFound):
        store.open(USER, b"a")
    assert store.commit([begun]) == [None]
    assert store.names(USER) == [b"a"]
    assert temporary(root) == []


def test_an_upload_that_is_aborted_leaves_nothing(store: Store, root: Path) -> None:
    begun = upload(store, b"a", b"xyz")
    begun.abort()
    begun.abort()
    assert temporary(root) == []
    assert sorted(os.listdir(root)) == [".tmp"]


def test_an_abort_after_the_commit_does_nothing(store: Store) -> None:
    begun = upload(store, b"a", b"xyz")
    store.commit([begun])
    begun.abort()
    begun.close()
    assert get(store, b"a") == b"xyz"


def test_a_removed_file_is_gone_and_cannot_be_removed_again(store: Store) -> None:
    put(store, b"a", b"xyz")
    removal = store.remove(USER, b"a")
    assert removal == Removal(USER, b"a")
    assert store.names(USER) == [b"a"]
    assert store.commit([removal]) == [None]
    assert store.names(USER) == []
    error = only(store.commit([removal]))
    assert isinstance(error, NotFound)
    assert str(error) == "a: user 11 has no such file"


def test_who_has_a_file_open_reads_what_he_opened(store: Store) -> None:
    put(store, b"a", b"old")
    replaced, removed = store.open(USER, b"a"), store.open(USER, b"a")
    put(store, b"a", b"newer")
    assert get(store, b"a") == b"newer"
    store.commit([store.remove(USER, b"a")])
    for stored in (replaced, removed):
        with open(stored.fd, "rb") as file:
            assert file.read() == b"old"
        assert stored.size == 3


def test_a_name_is_never_half_a_file(store: Store) -> None:
    size = 200_000
    put(store, b"a", b"0" * size)
    done = threading.Event()
    seen: List[bytes] = []

    def read() -> None:
        while not done.is_set():
            content = get(store, b"a")
            seen.append(b"" if content == content[:1] * size else content)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(200):
            put(store, b"a", b"%d" % (number % 10) * size)
    finally:
        done.set()
        reader.join(WAIT_SECONDS)
    assert seen
    assert not any(seen)


def test_the_changes_of_a_commit_take_effect_in_their_order(store: Store) -> None:
    put(store, b"a", b"old")
    put(store, b"b", b"old")
    results = store.commit(
        [
            upload(store, b"a", b"new"),
            store.remove(USER, b"a"),
            store.remove(USER, b"a"),
            store.remove(USER, b"b"),
            upload(store, b"b", b"first"),
            upload(store, b"b", b"second"),
        ]
    )
    assert [type(result) for result in results] == [type(None)] * 2 + [NotFound] + [type(None)] * 3
    assert store.names(USER) == [b"b"]
    assert get(store, b"b") == b"second"
    assert store.commit([]) == []


# What lies in a user's folder and is no file of the store.


def make_link(path: Path) -> None:
    (path.parent / "target").write_bytes(b"theirs")
    path.symlink_to("target")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket may not be as long as a test's path
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


THINGS = {
    "link": make_link,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to a folder": lambda path: path.symlink_to("."),
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", sorted(THINGS))
def test_what_is_no_file_is_neither_listed_nor_served_nor_removed_nor_replaced(
    store: Store, root: Path, kind: str
) -> None:
    put(store, b"file", b"xyz")
    path = root / "11" / "thing"
    THINGS[kind](path)
    before = path.lstat()
    assert store.names(USER) == ([b"file", b"target"] if kind == "link" else [b"file"])
    with pytest.raises(NotFound):
        store.open(USER, b"thing")
    removed, replaced = store.commit([store.remove(USER, b"thing"), upload(store, b"thing", b"x")])
    assert isinstance(removed, NotFound)
    assert isinstance(replaced, StoreFailed)
    assert str(replaced).startswith("thing: what has this name in the user's folder is not a ")
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    if kind == "link":
        assert path.read_bytes() == b"theirs"
    assert temporary(root) == []


def test_a_file_whose_name_is_unlawful_is_neither_listed_nor_served(
    store: Store, root: Path
) -> None:
    put(store, b"a", b"xyz")
    for name in (b"a\\b", b"new\nline", b"\xff", "\x9b".encode()):
        path = os.path.join(bytes(root), b"11", name)
        with open(path, "wb"):
            pass
        with pytest.raises(InvalidName):
            store.open(USER, name)
    assert store.names(USER) == [b"a"]


@pytest.mark.parametrize("kind", ["link", "file", "pipe", "dangling link"])
def test_a_users_folder_that_is_none_is_left_alone(
    store: Store, root: Path, tmp_path: Path, kind: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").write_bytes(b"theirs")
    path = root / "11"
    if kind == "file":
        path.write_bytes(b"theirs")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "nowhere")
    with pytest.raises(StoreFailed, match="cannot list: "):
        store.names(USER)
    with pytest.raises(StoreFailed, match="cannot read: ") as caught:
        store.open(USER, b"a")
    assert caught.value.subject == str(path)
    results = store.commit([upload(store, b"a", b"mine"), store.remove(USER, b"a")])
    assert [type(result) for result in results] == [StoreFailed, StoreFailed]
    assert (other / "a").read_bytes() == b"theirs"
    assert not (tmp_path / "nowhere").exists()
    assert temporary(root) == []


# What fails.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE])
def test_an_upload_that_cannot_begin_is_a_store_failure(
    store: Store, root: Path, number: int
) -> None:
    with failing("open", number=number), pytest.raises(StoreFailed) as caught:
        store.begin(USER, b"a")
    assert str(caught.value) == (
        f"{root / '.tmp'}: cannot begin an upload: {os.strerror(number).lower()}; "
        "check this folder and its disk"
    )


def test_an_upload_that_cannot_be_claimed_leaves_nothing(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "fcntl", fcntl)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StoreFailed, match="cannot begin an upload: "):
        store.begin(USER, b"a")
    assert temporary(root) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_upload_that_cannot_be_written_leaves_the_older_file(
    store: Store, root: Path, number: int
) -> None:
    put(store, b"a", b"old")
    begun = upload(store, b"a", b"new and")
    with failing("write", number=number), pytest.raises(StoreFailed) as caught:
        begun.write(memoryview(b" longer"))
    assert f": cannot write an upload: {os.strerror(number).lower()}; " in str(caught.value)
    begun.abort()
    assert get(store, b"a") == b"old"
    assert temporary(root) == []


def test_a_disk_that_fills_in_the_middle_of_a_write_leaves_nothing(root: Path) -> None:
    # A limit on the size of files is met as a full disk is: first a short write, then an error.
    code = """if True:
        import resource, sys
        from backup.errors import StoreFailed
        from backup.storage import Store
        store = Store(sys.argv[1])
        upload = store.begin(11, b"a")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            upload.write(memoryview(bytes(1500)))
        except StoreFailed as error:
            print(error.reason, upload.path.decode())
        upload.abort()
        assert store.commit([store.remove(11, b"a")]) != [None]
    """
    done = subprocess.run([sys.executable, "-c", code, str(root)], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert done.stdout.decode().startswith(f"store {root / '.tmp'}")
    assert temporary(root) == []


@pytest.mark.parametrize(
    ("functions", "number", "end", "user_id"),
    [
        (["replace"], errno.ENOSPC, b"bad", USER),
        (["replace"], errno.EIO, b"bad", USER),
        (["stat", "lstat"], errno.EIO, b"bad", USER),
        (["mkdir"], errno.ENOSPC, b"/99", 99),
    ],
)
def test_an_upload_that_fails_changes_nothing_and_hinders_no_other_change(
    store: Store, root: Path, functions: List[str], number: int, end: bytes, user_id: int
) -> None:
    for name in (b"a", b"b", b"bad"):
        put(store, name, b"old")
    changes: List[Change] = [
        upload(store, b"a", b"new"),
        upload(store, b"bad", b"new", user_id),
        upload(store, b"c", b"new"),
        store.remove(USER, b"b"),
    ]
    with failing(*functions, number=number, when=at(end)):
        good, bad, *others = store.commit(changes)
    assert [good, *others] == [None, None, None]
    assert isinstance(bad, StoreFailed)
    assert str(bad) == (
        f"{root / str(user_id)}: cannot change: {os.strerror(number).lower()}; "
        "check this folder and its disk"
    )
    assert store.names(USER) == [b"a", b"bad", b"c"]
    assert [get(store, name) for name in (b"a", b"bad", b"c")] == [b"new", b"old", b"new"]
    assert store.names(99) == []
    assert temporary(root) == []


def test_a_removal_that_fails_removes_nothing_and_hinders_no_other_change(store: Store) -> None:
    put(store, b"a", b"old")
    put(store, b"bad", b"old")
    changes: List[Change] = [store.remove(USER, b"bad"), store.remove(USER, b"a")]
    changes.append(upload(store, b"b", b"new"))
    with failing("unlink", number=errno.EIO, when=at(b"bad")):
        bad, *others = store.commit(changes)
    assert isinstance(bad, StoreFailed)
    assert others == [None, None]
    assert store.names(USER) == [b"b", b"bad"]


def test_a_disk_that_lets_nothing_be_removed_hinders_no_other_change(
    store: Store, root: Path
) -> None:
    # As on a file system that the kernel has made read-only after an error.
    changes = [upload(store, b"bad", b"new"), upload(store, b"a", b"new")]
    no_rename = failing("replace", number=errno.EROFS, when=at(b"bad"))
    with no_rename, failing("unlink", number=errno.EROFS):
        bad, good = store.commit(changes)
    assert isinstance(bad, StoreFailed)
    assert good is None
    assert Store(root, EARLIER).names(USER) == [b"a"]
    assert temporary(root) == []  # what could not be removed then is swept now


def test_an_abort_on_a_disk_that_lets_nothing_be_removed_raises_nothing(
    store: Store, root: Path
) -> None:
    begun = upload(store, b"a", b"xyz")
    with failing("unlink", number=errno.EROFS):
        begun.abort()
    assert Store(root, EARLIER).names(USER) == []
    assert temporary(root) == []


@contextmanager
def late_errors() -> Iterator[None]:
    """A file system that tells only on close(2) that what was written is lost, as NFS may."""
    close = os.close

    def fail(fd: int) -> None:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        close(fd)
        if regular:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "close", fail)
        yield


def test_a_commit_that_fails_on_close_has_changed_nothing(store: Store, root: Path) -> None:
    put(store, b"a", b"old")
    begun = upload(store, b"a", b"new")
    with late_errors():
        (error,) = store.commit([begun])
    assert get(store, b"a") == (b"new" if error is None else b"old")
    assert temporary(root) == []


def test_an_abort_that_fails_on_close_removes_the_file_and_raises_nothing(
    store: Store, root: Path
) -> None:
    begun = upload(store, b"a", b"new")
    with late_errors():
        begun.abort()
    assert temporary(root) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_file_that_cannot_be_read_is_not_called_missing(
    store: Store, root: Path, number: int
) -> None:
    put(store, b"a", b"xyz")
    with failing("open", number=number, when=at(b"a")), pytest.raises(StoreFailed) as caught:
        store.open(USER, b"a")
    assert str(caught.value) == (
        f"{root / '11'}: cannot read: {os.strerror(number).lower()}; check this folder and its disk"
    )


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.EILSEQ])
def test_a_name_that_no_file_can_have_here_is_missing(store: Store, number: int) -> None:
    put(store, b"b", b"xyz")
    with failing("open", "lstat", number=number, when=at(b"a")), pytest.raises(NotFound):
        store.open(USER, b"a")


def test_a_file_that_fails_once_it_is_open_is_closed_again(store: Store) -> None:
    put(store, b"a", b"xyz")
    with failing("fstat", number=errno.ESTALE), pytest.raises(StoreFailed, match="cannot read: "):
        store.open(USER, b"a")


def test_a_folder_that_cannot_be_listed_is_not_called_empty(store: Store) -> None:
    put(store, b"a", b"xyz")
    with failing("scandir", number=errno.EIO), pytest.raises(StoreFailed, match="cannot list: "):
        store.names(USER)


def test_another_server_may_make_the_users_folder_first(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = os.mkdir

    def mkdir_second(path: bytes, mode: int) -> None:
        mkdir(path, mode)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir_second)
    put(store, b"a", b"xyz")
    assert get(store, b"a") == b"xyz"


def test_where_no_open_file_can_be_renamed_it_is_closed_before(
    store: Store, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    replace = os.replace

    def like_windows(source: bytes, target: bytes) -> None:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        if any(os.path.realpath(link) == os.path.realpath(os.fsdecode(source)) for link in links):
            raise PermissionError(errno.EACCES, "it is used by another process")
        replace(source, target)

    if bare:
        monkeypatch.setattr(os, "replace", like_windows)
    put(store, b"a", b"xyz")
    assert get(store, b"a") == b"xyz"


def test_a_root_that_vanishes_is_not_made_anew(store: Store, root: Path) -> None:
    put(store, b"a", b"xyz")
    begun = upload(store, b"a", b"new")
    shutil.rmtree(root)
    assert isinstance(only(store.commit([begun])), StoreFailed)
    with pytest.raises(StoreFailed, match="cannot begin an upload: "):
        store.begin(USER, b"a")
    assert not root.exists()


@pytest.mark.parametrize("left", ["nothing", "mount point"])
def test_while_the_root_is_gone_nothing_is_called_missing(
    store: Store, root: Path, left: str
) -> None:
    # Whoever is told "not found" or "no files" may believe that his files are lost.
    put(store, b"a", b"xyz")
    root.rename(root.with_name("unmounted"))
    if left == "mount point":
        root.mkdir()
    with pytest.raises(StoreFailed):
        store.open(USER, b"a")
    with pytest.raises(StoreFailed):
        store.names(USER)
    assert isinstance(only(store.commit([store.remove(USER, b"a")])), StoreFailed)
    if left == "mount point":
        assert list(root.iterdir()) == []
        root.rmdir()
    root.with_name("unmounted").rename(root)
    assert get(store, b"a") == b"xyz"


# What a crash leaves, and what it does not take.

UPLOADING = """if True:
    import sys
    from backup import disk
    from backup.storage import Store
    if sys.argv[2] == "bare":
        disk.HAS_DIR_FD, disk.fcntl = False, None
    store = Store(sys.argv[1])
    upload = store.begin(11, b"a")
    upload.write(memoryview(b"half"))
    print("ready", flush=True)
    sys.stdin.read(1)
    upload.write(memoryview(b" and half"))
    print(store.commit([upload]), flush=True)
"""


@contextmanager
def uploading(root: Path, bare: bool) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of an upload, which goes on when it is sent a character."""
    command = [sys.executable, "-c", UPLOADING, str(root), "bare" if bare else ""]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "ready\n"
            yield other
        finally:
            other.kill()


def test_what_a_killed_process_left_is_swept_at_the_next_start(root: Path, bare: bool) -> None:
    put(Store(root), b"a", b"old")
    with uploading(root, bare) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(WAIT_SECONDS)
    assert len(temporary(root)) == 1
    store = Store(root)
    if bare:  # without locks, only the file's age can tell
        assert len(temporary(root)) == 1
        store = Store(root, EARLIER)
    assert temporary(root) == []
    assert store.names(USER) == [b"a"]
    assert get(store, b"a") == b"old"


def test_what_another_process_writes_is_not_swept(root: Path, bare: bool) -> None:
    with uploading(root, bare) as other:
        store = Store(root)
        assert store.sweep() == 0
        assert len(temporary(root)) == 1
        answer, _ = other.communicate("x", WAIT_SECONDS)
    assert answer == "[None]\n"
    assert get(store, b"a") == b"half and half"
    assert temporary(root) == []


def test_a_sweep_takes_no_upload_of_its_own_store(store: Store, root: Path) -> None:
    begun = upload(store, b"a", b"xyz")
    assert store.sweep() == 0
    assert Store(root).sweep() == 0
    assert store.commit([begun]) == [None]


def test_a_sweep_takes_nothing_but_files_and_says_how_many(root: Path) -> None:
    store = Store(root, EARLIER)
    (root / ".tmp" / "folder").mkdir()
    (root / ".tmp" / "link").symlink_to("one")
    for name in ("one", "two"):
        (root / ".tmp" / name).write_bytes(b"left")
    assert store.sweep() == 2
    assert sorted(temporary(root)) == ["folder", "link"]
    (root / ".tmp" / "folder").rmdir()
    (root / ".tmp" / "link").unlink()


@contextmanager
def after_creation(act: Callable[[bytes], None]) -> Iterator[List[bytes]]:
    """Acts once, as soon as a file has been made; the paths of all that are made."""
    made: List[bytes] = []
    open_ = os.open

    def opening(path: bytes, flags: int, *rest: int, **named: int) -> int:
        fd = open_(path, flags, *rest, **named)
        if flags & os.O_CREAT:
            made.append(path)
            if len(made) == 1:
                act(path)
        return fd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opening)
        yield made


def test_an_upload_whose_file_a_sweep_took_before_it_was_claimed_gets_another(
    store: Store, root: Path
) -> None:
    with after_creation(os.unlink) as made:
        begun = upload(store, b"a", b"xyz")
    assert len(set(made)) == 2
    assert begun.path == made[1]
    assert store.commit([begun]) == [None]
    assert get(store, b"a") == b"xyz"
    assert temporary(root) == []


def test_an_upload_whose_file_a_sweep_is_looking_at_gets_another(
    store: Store, root: Path, bare: bool
) -> None:
    looking: List[int] = []

    def look(path: bytes) -> None:
        looking.append(os.open(path, os.O_RDWR))
        fcntl.flock(looking[0], fcntl.LOCK_EX)

    with after_creation(look) as made:
        begun = upload(store, b"a", b"xyz")
    os.close(looking[0])
    assert begun.path == made[-1]
    assert len(made) == (1 if bare else 2)
    assert store.commit([begun]) == [None]
    assert temporary(root) == []


def test_a_sweep_leaves_no_moment_to_claim_a_file_that_it_removes(
    store: Store, root: Path, bare: bool
) -> None:
    path = os.path.join(bytes(root), b".tmp", b"new")
    fd = disk.create(path)
    unlink = os.unlink
    claims: List[bool] = []

    def unlink_late(path: bytes, **named: int) -> None:
        claims.append(disk.claim(fd))  # what the store that has just made this file does next
        unlink(path, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", unlink_late)
        swept = store.sweep()
    assert swept == (0 if bare else 1)  # without locks, it is too young
    assert claims == [False] * swept
    os.close(fd)
    if bare:
        os.unlink(path)


def test_a_file_that_is_gone_before_the_sweep_looks_at_it_was_finished(root: Path) -> None:
    store = Store(root, EARLIER)
    (root / ".tmp" / "one").touch()
    open_ = os.open

    def open_late(path: bytes, *rest: int, **named: int) -> int:
        if path.endswith(b"one"):
            os.unlink(path)
        return open_(path, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", open_late)
        assert store.sweep() == 0


# What is open, and for how long.


class Turn:
    """A turn of a reactor's: keeps what is put off to its end, and ends it."""

    def __init__(self) -> None:
        self._put_off: List[Callable[[], None]] = []

    def __call__(self, callback: Callable[[], None]) -> None:
        self._put_off.append(callback)

    def end(self) -> None:
        while self._put_off:
            self._put_off.pop(0)()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The folders that are opened from now on, by their last name."""
    names: List[str] = []
    open_folder = disk.open_folder

    def note(path: bytes) -> disk.Folder:
        names.append(os.fsdecode(os.path.basename(path)))
        return open_folder(path)

    monkeypatch.setattr(disk, "open_folder", note)
    return names


def read_much(store: Store, user_id: int = USER) -> None:
    """Reads in a user's folder in all the ways there are."""
    assert get(store, b"a", user_id) == b"xyz"
    with pytest.raises(NotFound):
        store.open(user_id, b"b")
    assert store.names(user_id) == [b"a"]
    assert get(store, b"a", user_id) == b"xyz"


def test_a_folder_that_is_read_is_opened_once_a_turn_and_closed_at_its_end(
    store: Store, root: Path, opened: List[str]
) -> None:
    put(store, b"a", b"xyz")
    turn = Turn()
    served = Store(root, at_turn_end=turn)
    before = open_descriptors()
    for _ in range(2):
        opened.clear()
        read_much(served)
        read_much(served)
        assert opened == ["11"]
        turn.end()
        assert open_descriptors() == before


def test_only_the_folder_of_one_user_is_open_at_a_time(
    store: Store, root: Path, opened: List[str], bare: bool
) -> None:
    for user_id in (1, 2):
        put(store, b"a", b"xyz", user_id)
    turn = Turn()
    served = Store(root, at_turn_end=turn)
    before = len(open_descriptors())
    opened.clear()
    for user_id in (1, 2, 2, 1):
        read_much(served, user_id)
        assert len(open_descriptors()) == before + (not bare)
    assert opened == ["1", "2", "1"]
    turn.end()
    assert len(open_descriptors()) == before


def test_a_store_that_belongs_to_no_reactor_keeps_no_folder_open(
    store: Store, opened: List[str]
) -> None:
    put(store, b"a", b"xyz")
    opened.clear()
    before = open_descriptors()
    for act in (lambda: get(store, b"a"), lambda: store.names(USER)):
        act()
        assert open_descriptors() == before
    with pytest.raises(NotFound):
        store.open(USER, b"b")
    assert open_descriptors() == before
    assert opened == ["11"] * 3


def test_a_folder_that_was_not_there_is_looked_for_again_in_the_same_turn(root: Path) -> None:
    turn = Turn()
    store = Store(root, at_turn_end=turn)
    assert store.names(USER) == []
    with pytest.raises(NotFound):
        store.open(USER, b"a")
    put(store, b"a", b"xyz")
    read_much(store)
    turn.end()


def test_what_is_changed_in_a_turn_is_seen_in_it(root: Path) -> None:
    turn = Turn()
    store = Store(root, at_turn_end=turn)
    put(store, b"a", b"old")
    assert get(store, b"a") == b"old"
    put(store, b"a", b"xyz")
    read_much(store)
    assert store.commit([store.remove(USER, b"a")]) == [None]
    with pytest.raises(NotFound):
        store.open(USER, b"a")
    turn.end()


def test_listings_of_one_user_that_begin_in_one_turn_are_each_whole(root: Path) -> None:
    turn = Turn()
    store = Store(root, Settings(listing_names=2), at_turn_end=turn)
    names = [b"%d" % number for number in range(7)]
    for name in names:
        put(store, name, b"xyz")
    before = open_descriptors()
    listings = [store.list(USER) for _ in range(3)]
    turn.end()
    while not all(listing.done for listing in listings):
        for listing in listings:
            if not listing.done:
                listing.step()
    assert [[*listing] for listing in listings] == [names] * 3
    assert open_descriptors() == before


def test_a_store_that_is_closed_in_the_middle_of_a_turn_leaves_nothing_open(root: Path) -> None:
    turn = Turn()
    store = Store(root, at_turn_end=turn)
    put(store, b"a", b"xyz")
    before = open_descriptors()
    read_much(store)
    store.close()
    assert open_descriptors() == before
    store.close()
    turn.end()
    assert open_descriptors() == before


def stored(store: Store, content: bytes) -> Stored:
    put(store, b"a", content)
    return store.open(USER, b"a")


def test_a_small_file_can_be_read_as_a_whole_and_is_closed_then(store: Store) -> None:
    before = open_descriptors()
    for content in (b"x", bytes(range(256)) * 300):
        assert stored(store, content).read() == content
        assert open_descriptors() == before


def test_a_file_that_cannot_be_read_is_closed_and_a_store_failure(store: Store) -> None:
    before = open_descriptors()
    found = stored(store, b"xyz")
    with failing("read", number=errno.EIO), pytest.raises(StoreFailed) as caught:
        found.read()
    assert open_descriptors() == before
    assert str(caught.value) == (
        "cannot read a stored file: [Errno 5] Input/output error; check its disk"
    )


def test_a_file_that_somebody_shortens_is_closed_and_a_store_failure(
    store: Store, root: Path
) -> None:
    before = open_descriptors()
    found = stored(store, b"xyz")
    os.truncate(root / "11" / "a", 2)
    with pytest.raises(StoreFailed, match="became shorter while it was read; look at it"):
        found.read()
    assert open_descriptors() == before


# A listing of several slices, and what is committed meanwhile.


def store_of_slices(root: Path, slice_names: int = 2) -> Store:
    return Store(root, replace(Settings(), listing_names=slice_names))


def listed(listing: Listing) -> List[bytes]:
    while not listing.done:
        listing.step()
    return [*listing]


def test_a_listing_has_what_is_committed_until_its_last_slice_is_read(root: Path) -> None:
    store = store_of_slices(root)
    for name in (b"a", b"b", b"c", b"d", b"e"):
        put(store, name, b"xyz")
    put(store, b"theirs", b"xyz", 12)
    listings = [store.list(USER), store.list(USER)]
    assert not any(listing.done for listing in listings)
    changes: List[Change] = [store.remove(USER, name) for name in (b"a", b"b", b"c")]
    changes += [upload(store, b"a", b"again"), upload(store, b"new", b"xyz")]
    changes += [store.remove(USER, b"missing"), store.remove(12, b"theirs")]
    changes += [upload(store, b"others", b"xyz", 12)]
    results = store.commit(changes)
    assert [type(result) for result in results if result] == [NotFound]
    expected = [b"a", b"d", b"e", b"new"]
    assert [listed(listing) for listing in listings] == [expected, expected]
    assert store.names(USER) == expected


def test_a_change_that_fails_is_in_no_listing(root: Path) -> None:
    store = store_of_slices(root)
    for name in (b"a", b"bad", b"c"):
        put(store, name, b"xyz")
    listing = store.list(USER)
    changes: List[Change] = [upload(store, b"too bad", b"xyz"), store.remove(USER, b"bad")]
    with failing("replace", "unlink", number=errno.EIO, when=at(b"bad")):
        results = store.commit(changes)
    results += store.commit([upload(store, b"good", b"xyz")])
    assert [result is None for result in results] == [False, False, True]
    assert listed(listing) == [b"a", b"bad", b"c", b"good"]


def test_what_is_committed_after_the_last_slice_was_read_is_not_in_the_listing(
    root: Path,
) -> None:
    store = store_of_slices(root)
    for name in (b"a", b"b", b"c"):
        put(store, name, b"xyz")
    listing, later = store.list(USER), store.list(USER)
    while listing.reading:
        listing.step()
    assert store.commit([store.remove(USER, b"a"), upload(store, b"d", b"xyz")]) == [None, None]
    assert listed(listing) == [b"a", b"b", b"c"]
    assert listed(later) == [b"b", b"c", b"d"]


def test_a_listing_goes_on_when_the_turn_in_which_it_began_is_over(root: Path) -> None:
    turn = Turn()
    store = Store(root, replace(Settings(), listing_names=2), turn)
    names = [b"%d" % number for number in range(9)]
    assert store.commit([upload(store, name, b"x") for name in names]) == [None] * 9
    before = open_descriptors()
    listing = store.list(USER)
    turn.end()
    assert listed(listing) == names
    assert open_descriptors() == before


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_names_are_all_names_however_many_slices_that_takes(root: Path, count: int) -> None:
    store = store_of_slices(root)
    names = [b"%d" % number for number in range(count)]
    assert store.commit([upload(store, name, b"x") for name in names]) == [None] * count
    assert store.names(USER) == names


# What is on the disk when a commit returns, and in which order it gets there.

Asked = Tuple[str, ...]


class Diary:
    """What the system is asked for, in order, with paths below the root."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: List[Asked] = []
        self.fail: Callable[[Asked], bool] = lambda _: False  # with EIO
        self._root = root
        asks: Dict[str, Callable[..., Asked]] = {
            "posix_fadvise": lambda fd, *_: ("write back", self._open_at(fd)),
            "fsync": lambda fd: ("sync", self._open_at(fd)),
            "mkdir": lambda path, _: ("make", self._shown(path)),
            "unlink": lambda path, dir_fd=None: ("remove", self._shown(path, dir_fd)),
            "replace": self._replacing,
        }
        for function, ask in asks.items():
            monkeypatch.setattr(os, function, self._noting(ask, getattr(os, function)))

    def take(self) -> List[Asked]:
        """What has been asked for since the last time."""
        asked, self.asked = self.asked, []
        return asked

    def _noting(
        self, ask: Callable[..., Asked], real: Callable[..., object]
    ) -> Callable[..., object]:
        def note(*arguments: object, **named: object) -> object:
            asked = ask(*arguments, **named)
            self.asked.append(asked)
            if self.fail(asked):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **named)

        return note

    def _replacing(self, path: bytes, name: bytes, dst_dir_fd: Optional[int] = None) -> Asked:
        return "rename", self._shown(path), self._shown(name, dst_dir_fd)

    def _open_at(self, fd: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), self._root)

    def _shown(self, path: bytes, dir_fd: Optional[int] = None) -> str:
        if dir_fd is not None:
            return os.path.join(self._open_at(dir_fd), os.fsdecode(path))
        return os.path.relpath(os.fsdecode(path), self._root)


@pytest.fixture
def diary(root: Path, monkeypatch: pytest.MonkeyPatch) -> Diary:
    return Diary(root, monkeypatch)


def of(upload: Upload) -> str:
    """The path of an upload's temporary file, below the root."""
    return os.path.join(".tmp", os.path.basename(os.fsdecode(upload.path)))


def advised(bare: bool, *uploads: Upload) -> List[Asked]:
    return [] if bare else [("write back", of(upload)) for upload in uploads]


def test_a_commit_takes_each_step_for_all_changes_and_the_file_comes_before_its_name(
    store: Store, diary: Diary, bare: bool
) -> None:
    for name in (b"a", b"b", b"c"):
        put(store, name, b"old")
    new, other, another = (
        upload(store, b"a", b"new"),
        upload(store, b"a", b"xyz", 12),
        upload(store, b"d", b"xyz"),
    )
    diary.take()
    removals = store.remove(USER, b"b"), store.remove(USER, b"c")
    assert store.commit([new, removals[0], other, removals[1], another]) == [None] * 5
    assert diary.take() == [
        *advised(bare, new, other, another),
        ("sync", of(new)),
        ("sync", of(other)),
        ("sync", of(another)),
        ("rename", of(new), "11/a"),
        ("remove", "11/b"),
        ("make", "12"),
        ("rename", of(other), "12/a"),
        ("remove", "11/c"),
        ("rename", of(another), "11/d"),
        ("sync", "11"),
        ("sync", "12"),
        ("sync", "."),
    ]


def test_the_root_is_synced_for_a_user_who_is_new_in_it_and_only_then(
    store: Store, diary: Diary
) -> None:
    diary.take()
    for number in range(2):
        changes = [upload(store, b"%d" % number, b"x", user) for user in (USER, 12, 13)]
        assert store.commit(changes) == [None] * 3
        folders = [path for what, path, *_ in diary.take() if what == "sync"][3:]
        assert sorted(folders) == [*["."][number:], "11", "12", "13"]
        assert folders[0] == "11"  # a folder before its name is


def test_a_removal_is_on_the_disk_too_and_one_that_fails_needs_nothing_there(
    store: Store, diary: Diary
) -> None:
    put(store, b"a", b"xyz")
    diary.take()
    assert store.commit([store.remove(USER, b"a")]) == [None]
    assert diary.take() == [("remove", "11/a"), ("sync", "11")]
    assert isinstance(only(store.commit([store.remove(USER, b"a")])), NotFound)
    assert isinstance(only(store.commit([store.remove(12, b"a")])), NotFound)
    assert diary.take() == []


def test_a_name_that_changes_often_in_one_commit_is_synced_once(store: Store, diary: Diary) -> None:
    put(store, b"a", b"older")
    old, new = upload(store, b"a", b"old"), upload(store, b"a", b"new")
    diary.take()
    assert store.commit([old, store.remove(USER, b"a"), new]) == [None] * 3
    assert diary.take()[-4:] == [
        ("rename", of(old), "11/a"),
        ("remove", "11/a"),
        ("rename", of(new), "11/a"),
        ("sync", "11"),
    ]
    assert get(store, b"a") == b"new"


def test_an_upload_is_told_to_be_written_while_it_grows_and_its_rest_at_the_commit(
    root: Path, diary: Diary, bare: bool
) -> None:
    store = Store(root, replace(Settings(), write_back_bytes=10))
    begun = store.begin(USER, b"a")
    diary.take()
    for count in (10, 5):
        begun.write(memoryview(bytes(count)))
    assert diary.take() == advised(bare, begun)
    assert store.commit([begun]) == [None]
    assert diary.take()[: 2 - bare] == [*advised(bare, begun), ("sync", of(begun))]


def test_a_commit_can_be_told_by_what_it_has_to_wait_for(root: Path) -> None:
    store = Store(root, replace(Settings(), write_back_bytes=10, sync_bytes=1000))
    begun = upload(store, b"a", b"x" * 700)
    changes: List[Change] = [begun, store.remove(USER, b"a")]
    assert [change.waiting for change in changes] == [700, 0]
    assert store.piece > 1000  # which is before anything has been learned
    begun.catch_up()
    assert 10 <= store.piece <= 1000
    assert [change.waiting for change in changes] == [0, 0]
    begun.abort()


def test_who_needs_nothing_on_the_disk_waits_for_nothing(root: Path, diary: Diary) -> None:
    store = Store(root, replace(Settings(), fsync=False, write_back_bytes=1))
    put(store, b"b", b"xyz")
    begun = upload(store, b"a", b"x" * 1000)
    assert store.commit([begun, store.remove(USER, b"b")]) == [None, None]
    assert get(store, b"a") == b"x" * 1000
    assert store.names(USER) == [b"a"]
    assert not [asked for asked in diary.take() if asked[0] in ("sync", "write back")]


def test_at_the_start_the_root_is_on_the_disk_with_all_that_is_in_it(
    root: Path, diary: Diary
) -> None:
    Store(root)
    made = [("make", "."), ("sync", ".."), ("make", ".tmp"), ("sync", ".")]
    both = [("sync", "."), ("sync", "..")]
    assert diary.take()[:6] == [*made, *both]
    Store(root)  # a crash may have left the root, or a user's folder, not synced
    assert [asked for asked in diary.take() if asked[0] == "sync"] == both


@pytest.mark.parametrize("folder", [".", ".."])
def test_a_root_that_cannot_be_made_durable_is_found_out_at_the_start(
    store: Store, root: Path, diary: Diary, folder: str
) -> None:
    diary.fail = lambda asked: asked == ("sync", folder)
    with pytest.raises(StoreFailed, match="cannot keep files: input/output error"):
        Store(root)


def test_a_root_in_a_folder_that_another_account_keeps_to_itself_will_do(
    store: Store, root: Path, diary: Diary
) -> None:
    def above(path: Union[bytes, str], *_: object, **__: object) -> bool:
        return path == bytes(root.parent)

    diary.take()
    with failing("open", number=errno.EACCES, when=above):
        put(Store(root), b"a", b"xyz")
    assert ("sync", "..") not in diary.take()


# A disk that fails to make something durable.


def errors(results: Sequence[Optional[BackupError]]) -> List[bool]:
    """Which of a commit's changes have failed; all others are done."""
    assert all(result is None or isinstance(result, StoreFailed) for result in results)
    return [result is not None for result in results]


def test_a_file_that_does_not_get_to_the_disk_fails_alone_and_the_older_one_stays(
    store: Store, root: Path, diary: Diary
) -> None:
    put(store, b"bad", b"old")
    put(store, b"b", b"old")
    bad = upload(store, b"bad", b"new")
    changes: List[Change] = [upload(store, b"a", b"new"), bad]
    changes += [store.remove(USER, b"b"), upload(store, b"c", b"new")]
    diary.take()
    diary.fail = lambda asked: asked == ("sync", of(bad))
    results = store.commit(changes)
    assert errors(results) == [False, True, False, False]
    assert str(results[1]) == (
        f"{root / '11'}: cannot change: input/output error; check this folder and its disk"
    )
    assert (
        diary.take().count(("sync", of(bad))) == 1
    )  # a second one might succeed, and mean nothing
    assert store.names(USER) == [b"a", b"bad", b"c"]
    assert get(store, b"bad") == b"old"
    assert temporary(root) == []


def test_a_folder_that_does_not_get_to_the_disk_fails_its_users_changes_and_no_others(
    store: Store, root: Path, diary: Diary
) -> None:
    for user_id in (USER, 12):
        put(store, b"a", b"old", user_id)
        put(store, b"b", b"old", user_id)
    changes: List[Change] = []
    for user_id in (USER, 12):
        changes += [upload(store, b"a", b"new", user_id), store.remove(user_id, b"b")]
    diary.take()
    diary.fail = lambda asked: asked == ("sync", "11")
    assert errors(store.commit(changes)) == [True, True, False, False]
    # Each is tried once: a second time might succeed without having written anything.
    assert [asked for asked in diary.take() if asked[0] == "sync"][2:] == [
        ("sync", "11"),
        ("sync", "12"),
    ]
    assert get(store, b"a") in (b"old", b"new")
    assert get(store, b"a", 12) == b"new"
    assert temporary(root) == []
    diary.fail = lambda _: False
    put(store, b"a", b"newer")
    assert ("sync", "11") in diary.take()


def test_a_root_that_does_not_get_to_the_disk_fails_the_new_users_changes_and_no_others(
    store: Store, root: Path, diary: Diary
) -> None:
    put(store, b"a", b"old")
    new_users = (12, 13)
    changes = [upload(store, b"a", b"new", user_id) for user_id in (12, USER, 13, 12)]
    diary.take()
    diary.fail = lambda asked: asked == ("sync", ".")
    assert errors(store.commit(changes)) == [True, False, True, True]
    assert diary.take().count(("sync", ".")) == 1
    assert get(store, b"a") == b"new"
    assert temporary(root) == []
    diary.fail = lambda _: False
    for user_id in new_users:  # whose folders are there by now, and could still be lost
        for expected in (1, 0):
            put(store, b"b", b"xyz", user_id)
            assert diary.take().count(("sync", ".")) == expected
    put(store, b"b", b"xyz")
    assert ("sync", ".") not in diary.take()


def test_a_new_users_folder_that_got_no_file_is_still_new_at_the_next_commit(
    store: Store, diary: Diary
) -> None:
    diary.fail = lambda asked: asked[0] == "rename"
    assert errors(store.commit([upload(store, b"a", b"x")])) == [True]
    diary.fail = lambda _: False
    diary.take()
    put(store, b"a", b"x")
    assert diary.take()[-2:] == [("sync", "11"), ("sync", ".")]


def test_a_commit_leaves_nothing_open_whatever_fails(store: Store, diary: Diary) -> None:
    before = open_descriptors()
    for kind in ("none", "sync", "rename", "make"):
        diary.fail = lambda asked, kind=kind: asked[0] == kind  # type: ignore[misc]
        changes = [upload(store, b"a", b"x", user_id) for user_id in range(10)]
        assert errors(store.commit(changes)) == [kind not in ("none", "make")] * 10
        assert open_descriptors() == before
    diary.fail = lambda _: False


@pytest.mark.parametrize("turns", [True, False], ids=["of a turn", "apart"])
def test_listings_side_by_side_are_each_whole(root: Path, turns: bool) -> None:
    names = [b"%03d" % number for number in range(50)]
    at_turn_end: List[Callable[[], None]] = []
    store = Store(root, Settings(listing_names=4), at_turn_end.append if turns else None)
    (root / str(USER)).mkdir()
    for name in names:
        (root / str(USER) / os.fsdecode(name)).touch()
    listings = [store.list(USER) for _ in range(3)]
    for called in at_turn_end:
        called()
    while not all(listing.done for listing in listings):
        for listing in listings:
            if not listing.done:
                listing.step()
    assert [[*listing] for listing in listings] == [names] * 3
    store.close()


def test_changes_that_fail_leave_nothing_for_the_garbage_collector(root: Path) -> None:
    store = Store(root)
    (root / str(USER) / "taken").mkdir(parents=True)
    gc.collect()
    gc.disable()  # what only a collection would free would pile up between two of them
    try:
        refused = store.commit([store.begin(USER, b"taken"), store.remove(USER, b"missing")])
        assert [type(failure) for failure in refused] == [StoreFailed, NotFound]
        del refused
        assert not [thing for thing in gc.get_objects() if isinstance(thing, (Upload, NotFound))]
    finally:
        gc.enable()


def test_a_root_that_comes_back_while_it_is_looked_for_is_there(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(root)
    upload = store.begin(USER, b"a")
    upload.write(memoryview(b"xyz"))
    assert store.commit([upload]) == [None]
    away = root.with_name("away")
    root.rename(away)
    isdir = os.path.isdir

    def back(path: bytes) -> bool:
        if not root.exists():
            away.rename(root)
        return isdir(path)

    monkeypatch.setattr(os.path, "isdir", back)
    assert store.open(USER, b"a").read() == b"xyz"


# Caps, and what nobody foresaw


def sized(store: Store, name: bytes, size: int, user_id: int = USER) -> Upload:
    """An upload whose size was announced, with all of it written."""
    begun = store.begin(user_id, name, size)
    begun.write(memoryview(bytes(size)))
    return begun


def reserve_all(store: Store, name: bytes, size: int) -> None:
    """Counts until it is known whether such an upload fits; nothing is left of it."""
    upload = store.begin(USER, name, size)
    try:
        while not store.reserve(upload):
            continue
    finally:
        upload.abort()


@pytest.mark.parametrize("cap", ["user_bytes", "total_bytes"])
def test_what_is_there_already_counts(root: Path, cap: str) -> None:
    put(Store(root), b"a", bytes(60))
    before = open_descriptors()
    store = Store(root, Settings(**{cap: 100}))  # type: ignore[arg-type]
    with pytest.raises(QuotaExceeded):
        reserve_all(store, b"b", 41)
    changes: List[Change] = [sized(store, b"b", 40), store.remove(USER, b"a")]
    assert store.commit(changes) == [None, None]
    assert store.commit([sized(store, b"a", 60)]) == [None]
    with pytest.raises(QuotaExceeded):
        store.begin(USER, b"c", 1)
    assert os.listdir(root / ".tmp") == []
    store.close()
    assert open_descriptors() == before


def test_a_folder_that_cannot_be_counted_is_a_store_failure(root: Path) -> None:
    store = Store(root, Settings(user_bytes=100))
    (root / str(USER)).write_bytes(b"not a folder")
    with pytest.raises(StoreFailed, match="cannot begin an upload"):
        store.begin(USER, b"a", 1)
    assert os.listdir(root / ".tmp") == []


def test_a_disk_that_has_less_free_than_must_stay_takes_nothing(root: Path) -> None:
    store = Store(root, Settings(min_free_bytes=1 << 60))
    with pytest.raises(QuotaExceeded, match="of which 1152921504606846976 must stay"):
        store.begin(USER, b"a", 1)
    assert os.listdir(root / ".tmp") == []


def test_what_is_stored_stays_where_nothing_may_be_lost(root: Path) -> None:
    store = Store(root, Settings(append_only=True))
    late = upload(store, b"a", b"late")
    put(store, b"a", b"first")
    (failure,) = store.commit([late])
    assert isinstance(failure, AppendOnly)
    with pytest.raises(AppendOnly):
        store.begin(USER, b"a", 5)
    with pytest.raises(AppendOnly):
        store.remove(USER, b"a")
    assert get(store, b"a") == b"first"
    assert os.listdir(root / ".tmp") == []


def test_a_fault_fails_one_change_of_a_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [upload(store, name, b"xyz") for name in (b"a", b"b", b"c")]
    settle = Upload.settle

    def slip(change: Upload) -> None:
        if change is changes[1]:
            raise LookupError
        settle(change)

    monkeypatch.setattr(Upload, "settle", slip)
    failures = store.commit(changes)
    assert [type(failure) for failure in failures] == [type(None), InternalError, type(None)]
    assert store.names(USER) == [b"a", b"c"]
