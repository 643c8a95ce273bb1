"""Folders, locks and writes do the same on a system that has all that is asked of it and without.

Every test runs twice: with what this system can do, and as if it could open nothing relative to a
descriptor, refuse no symbolic link by itself and lock no file.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Callable, Iterator, Optional, Type

import pytest

from backup import disk
from backup.disk import DescriptorFolder, Folder, open_folder

DAY = 24 * 3600.0


@pytest.fixture(autouse=True, params=["as it is", "bare"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this test is run without the system's features."""
    if request.param == "bare":
        monkeypatch.setattr(disk, "HAS_DIR_FD", False)
        monkeypatch.setattr(disk, "fcntl", None)
        monkeypatch.setattr(disk, "_READ", disk._READ & ~os.O_NOFOLLOW)
        monkeypatch.setattr(disk, "_CREATE", disk._CREATE & ~os.O_NOFOLLOW)
        return True
    return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to work in."""
    path = tmp_path / "place"
    path.mkdir()
    return path


def content(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def test_the_kind_of_folder_is_the_best_that_the_system_can_do(place: Path, bare: bool) -> None:
    with open_folder(bytes(place)) as folder:
        assert type(folder) is (Folder if bare else DescriptorFolder)


def test_a_system_without_any_of_it_is_noticed_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK"):
        monkeypatch.delattr(os, name)
    spec = importlib.util.spec_from_file_location("backup.disk_elsewhere", disk.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.fcntl is None
    assert elsewhere.HAS_DIR_FD is False
    assert elsewhere._READ == os.O_RDONLY
    assert elsewhere._CREATE == os.O_WRONLY | os.O_CREAT | os.O_EXCL


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing", FileNotFoundError),
        ("file", NotADirectoryError),
        ("file/below", NotADirectoryError),
        ("link", NotADirectoryError),
        ("dangling", NotADirectoryError),
        ("pipe", NotADirectoryError),
    ],
)
def test_only_a_directory_is_a_folder(place: Path, path: str, expected: Type[OSError]) -> None:
    (place / "real").mkdir()
    (place / "file").touch()
    (place / "link").symlink_to("real")
    (place / "dangling").symlink_to("nowhere")
    os.mkfifo(place / "pipe")
    with pytest.raises(expected):
        open_folder(bytes(place / path))


def test_a_file_is_opened_to_be_read(place: Path) -> None:
    (place / "a").write_bytes(b"xyz")
    with open_folder(bytes(place)) as folder:
        assert content(folder.open(b"a")) == b"xyz"
        with pytest.raises(FileNotFoundError):
            folder.open(b"b")


@pytest.mark.parametrize("target", ["a", "/etc/passwd", "nowhere", "."])
def test_a_symbolic_link_is_not_opened(place: Path, target: str) -> None:
    (place / "a").write_bytes(b"xyz")
    (place / "link").symlink_to(target)
    with open_folder(bytes(place)) as folder, pytest.raises(OSError, match="symbolic link"):
        folder.open(b"link")


def test_opening_a_pipe_waits_for_nobody(place: Path) -> None:
    os.mkfifo(place / "pipe")
    with open_folder(bytes(place)) as folder:
        fd = folder.open(b"pipe")
    assert stat.S_ISFIFO(os.fstat(fd).st_mode)
    os.close(fd)


def test_the_mode_is_that_of_what_has_the_name(place: Path) -> None:
    (place / "file").touch()
    (place / "link").symlink_to("file")
    (place / "folder").mkdir()
    with open_folder(bytes(place)) as folder:
        assert stat.S_ISREG(folder.mode(b"file") or 0)
        assert stat.S_ISLNK(folder.mode(b"link") or 0)
        assert stat.S_ISDIR(folder.mode(b"folder") or 0)
        assert folder.mode(b"missing") is None


def test_a_file_that_is_taken_in_has_its_new_name_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    with open_folder(bytes(place)) as folder:
        folder.take(bytes(tmp_path / "new"), b"a")
        with pytest.raises(FileNotFoundError):
            folder.take(bytes(tmp_path / "new"), b"a")
    assert (place / "a").read_bytes() == b"new"
    assert not (tmp_path / "new").exists()


def test_who_has_a_file_open_keeps_it_when_another_takes_its_name(
    place: Path, tmp_path: Path
) -> None:
    (place / "a").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    with open_folder(bytes(place)) as folder:
        old = folder.open(b"a")
        folder.take(bytes(tmp_path / "new"), b"a")
        assert content(folder.open(b"a")) == b"new"
        assert content(old) == b"old"


def test_unlink_removes_the_name_and_not_what_a_link_points_to(place: Path) -> None:
    (place / "file").write_bytes(b"xyz")
    (place / "link").symlink_to("file")
    with open_folder(bytes(place)) as folder:
        folder.unlink(b"link")
        assert folder.files() == [b"file"]
        folder.unlink(b"file")
        with pytest.raises(FileNotFoundError):
            folder.unlink(b"file")
    assert list(place.iterdir()) == []


def test_only_regular_files_are_listed_whatever_their_names(place: Path) -> None:
    for name in (b"a", b".hidden", b"a\\b", b"new\nline", b"\xff", "é".encode()):
        with open(os.path.join(bytes(place), name), "wb"):
            pass
    (place / "folder").mkdir()
    (place / "link").symlink_to("a")
    os.mkfifo(place / "pipe")
    with open_folder(bytes(place)) as folder:
        for _ in range(2):
            assert sorted(folder.files()) == sorted(
                [b"a", b".hidden", b"a\\b", b"new\nline", b"\xff", "é".encode()]
            )


@pytest.fixture
def swapped(place: Path, tmp_path: Path) -> Iterator[Folder]:
    """An open folder whose path has meanwhile become a link to one that is somebody else's."""
    (place / "mine").write_bytes(b"mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "theirs").write_bytes(b"theirs")
    with open_folder(bytes(place)) as folder:
        place.rename(tmp_path / "moved")
        place.symlink_to(other)
        yield folder
    assert [path.name for path in other.iterdir()] == ["theirs"]
    assert (other / "theirs").read_bytes() == b"theirs"


@pytest.mark.parametrize(
    "reach",
    [
        lambda folder: os.close(folder.open(b"theirs")),
        lambda folder: stat.S_ISREG(folder.mode(b"theirs") or 0),
        lambda folder: folder.unlink(b"theirs"),
        lambda folder: b"theirs" in folder.files(),
    ],
    ids=["open", "mode", "unlink", "files"],
)
def test_a_folder_that_is_swapped_for_a_link_leads_nobody_astray(
    swapped: Folder, reach: Callable[[Folder], object]
) -> None:
    try:
        reached = reach(swapped)
    except OSError:
        return
    assert reached is False


def test_nothing_is_taken_into_a_folder_that_was_swapped_in(
    swapped: Folder, tmp_path: Path
) -> None:
    (tmp_path / "new").write_bytes(b"new")
    try:
        swapped.take(bytes(tmp_path / "new"), b"theirs")
    except OSError:
        assert (tmp_path / "new").read_bytes() == b"new"
    else:
        assert (tmp_path / "moved" / "theirs").read_bytes() == b"new"


def test_a_new_file_is_its_owners_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        os.close(disk.create(bytes(place / "a")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o600


def test_a_new_file_never_takes_an_old_name(place: Path) -> None:
    (place / "file").write_bytes(b"xyz")
    (place / "link").symlink_to("elsewhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            disk.create(bytes(place / name))
    assert (place / "file").read_bytes() == b"xyz"
    assert not (place / "elsewhere").exists()


def test_all_is_written_even_if_the_system_takes_it_in_pieces(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    fd = disk.create(bytes(place / "a"))
    disk.write_all(fd, memoryview(b"0123456789"))
    disk.write_all(fd, memoryview(b""))
    os.close(fd)
    assert (place / "a").read_bytes() == b"0123456789"


def test_a_claim_ends_with_the_descriptor(place: Path, bare: bool) -> None:
    path = bytes(place / "a")
    fd = disk.create(path)
    assert disk.claim(fd)
    assert not disk.remove_abandoned(path, DAY)
    os.close(fd)
    assert disk.remove_abandoned(path, DAY) is not bare  # without locks, it is too young to tell


def test_what_another_process_has_claimed_is_neither_ours_nor_abandoned(
    place: Path, bare: bool
) -> None:
    path = bytes(place / "a")
    os.close(disk.create(path))
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print(flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, path], stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        assert not disk.remove_abandoned(path, DAY)
        with open(path, "r+b") as file:
            assert disk.claim(file.fileno()) is bare
        other.kill()
    assert disk.remove_abandoned(path, DAY) is not bare


def test_a_file_that_has_lost_its_name_cannot_be_claimed(place: Path) -> None:
    fd = disk.create(bytes(place / "a"))
    os.unlink(place / "a")
    assert not disk.claim(fd)
    os.close(fd)


def test_a_file_that_is_gone_is_not_abandoned_but_missing(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        disk.remove_abandoned(bytes(place / "a"), DAY)


def test_who_comes_after_a_sweep_cannot_claim_what_it_removed(place: Path, bare: bool) -> None:
    fd = disk.create(bytes(place / "a"))
    assert disk.remove_abandoned(bytes(place / "a"), DAY) is not bare
    assert disk.claim(fd) is bare
    os.close(fd)


def refuse_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Gives the system ``flock(2)``, which fails with this number."""

    def flock(fd: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk, "fcntl", fcntl)
    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize(
    "number", [None, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL]
)
def test_without_locks_the_age_of_a_file_tells(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: Optional[int]
) -> None:
    if number is None:
        monkeypatch.setattr(disk, "fcntl", None)
    else:
        refuse_locks(monkeypatch, number)
    path = bytes(place / "a")
    fd = disk.create(path)
    assert disk.claim(fd)
    assert not disk.remove_abandoned(path, DAY)
    yesterday = os.fstat(fd).st_mtime - DAY - 60
    os.utime(path, (yesterday, yesterday))
    disk.write_all(fd, memoryview(b"still at it"))
    assert not disk.remove_abandoned(path, DAY)
    os.utime(path, (yesterday, yesterday))
    assert disk.remove_abandoned(path, DAY)
    os.close(fd)
    assert list(place.iterdir()) == []


def test_any_other_failure_to_lock_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.EIO)
    fd = disk.create(bytes(place / "a"))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.claim(fd)
    os.close(fd)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        disk.remove_abandoned(bytes(place / "a"), DAY)


def test_a_file_that_is_locked_is_open_for_writing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On NFS, flock(2) is a byte-range lock, and an exclusive one asks for a writer: EBADF.
    flock = fcntl.flock

    def like_nfs(fd: int, operation: int) -> None:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, operation)

    monkeypatch.setattr(disk, "fcntl", fcntl)
    monkeypatch.setattr(fcntl, "flock", like_nfs)
    fd = disk.create(bytes(place / "a"))
    assert disk.claim(fd)
    assert not disk.remove_abandoned(bytes(place / "a"), DAY)
    os.close(fd)
    assert disk.remove_abandoned(bytes(place / "a"), DAY)
