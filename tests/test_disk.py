"""Folders, locks and writes do the same on a system that has all that is asked of it and without.

Every test runs twice: with what this system can do, and as if it could open nothing relative to a
descriptor, refuse no symbolic link by itself, lock no file and take no advice.
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
from typing import Callable, Iterator, List, Optional, Tuple, Type, Union

import pytest

from backup import disk
from backup.disk import DescriptorFolder, Folder, open_folder
from backup.errors import StoreFailed
from tests.conftest import open_descriptors

DAY = 24 * 3600.0


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
def place(tmp_path: Path) -> Path:
    """A folder to work in."""
    path = tmp_path / "place"
    path.mkdir()
    return path


def mode(folder: Folder, name: bytes) -> int:
    """The mode of what has the name, 0 for nothing."""
    found = folder.status(name)
    return 0 if found is None else found.st_mode


def content(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> List[Path]:
    """What fsync(2) was called for, in order."""
    paths: List[Path] = []
    fsync = os.fsync

    def note(fd: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    return paths


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, number: int) -> None:
    """Makes this function of ``os`` fail with this number."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)


def test_the_kind_of_folder_is_the_best_that_the_system_can_do(place: Path, bare: bool) -> None:
    with open_folder(bytes(place)) as folder:
        assert type(folder) is (Folder if bare else DescriptorFolder)


def test_a_system_without_any_of_it_is_noticed_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "posix_fadvise"):
        monkeypatch.delattr(os, name)
    spec = importlib.util.spec_from_file_location("backup.disk_elsewhere", disk.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere.fcntl is None
    assert elsewhere.HAS_DIR_FD is False
    assert elsewhere.HAS_FADVISE is False
    assert elsewhere._FULL_SYNC is None
    assert elsewhere._SAFELY == 0
    assert elsewhere._SET_LEASE is None
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


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Acts just before the next file is opened."""
    open_ = os.open

    def opening(path: bytes, flags: int, *rest: int, **named: int) -> int:
        monkeypatch.setattr(os, "open", open_)
        act()
        return open_(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", opening)


def test_a_file_that_takes_the_name_while_it_is_opened_is_as_good(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "a").write_bytes(b"old")
    (place / "b").write_bytes(b"new")
    with open_folder(bytes(place)) as folder:
        meanwhile(monkeypatch, lambda: (place / "b").replace(place / "a"))
        assert content(folder.open(b"a")) == b"new"


def test_a_link_that_takes_the_name_while_it_is_opened_is_not_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "a").write_bytes(b"old")
    (place / "b").symlink_to("/etc/passwd")
    with open_folder(bytes(place)) as folder:
        meanwhile(monkeypatch, lambda: (place / "b").replace(place / "a"))
        with pytest.raises(OSError, match="symbolic link"):
            folder.open(b"a")


def test_opening_a_pipe_waits_for_nobody(place: Path) -> None:
    os.mkfifo(place / "pipe")
    with open_folder(bytes(place)) as folder:
        fd = folder.open(b"pipe")
    assert stat.S_ISFIFO(os.fstat(fd).st_mode)
    os.close(fd)


def test_the_status_is_that_of_what_has_the_name(place: Path) -> None:
    (place / "file").touch()
    (place / "link").symlink_to("file")
    (place / "folder").mkdir()
    with open_folder(bytes(place)) as folder:
        assert stat.S_ISREG(mode(folder, b"file"))
        assert stat.S_ISLNK(mode(folder, b"link"))
        assert stat.S_ISDIR(mode(folder, b"folder"))
        assert folder.status(b"missing") is None


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


def test_who_read_one_folder_side_by_side_each_see_all_of_it(place: Path) -> None:
    names = {f"file-{number}" for number in range(500)}
    for name in names:
        (place / name).write_bytes(b"")
    with open_folder(bytes(place)) as folder:
        first, second = folder.entries(), folder.entries()
        seen = {next(first).name}
        also_seen = {next(second).name}
        third = folder.entries()
        assert {entry.name for entry in third} >= names
        seen |= {entry.name for entry in first}
        also_seen |= {entry.name for entry in second}
        assert seen == also_seen >= names
        assert {entry.name for entry in folder.entries()} == seen
        half = folder.entries()
        next(half)
        half.close()
        assert {entry.name for entry in folder.entries()} == seen


def test_a_folder_that_is_closed_while_it_is_read_is_read_to_its_end(place: Path) -> None:
    for number in range(500):
        (place / f"file-{number}").write_bytes(b"")
    before = len(open_descriptors())
    folder = open_folder(bytes(place))
    entries, others = folder.entries(), folder.entries()
    seen = [next(entries), next(others)]
    folder.close()
    with open(os.devnull, "rb") as other:  # whose descriptor must not be taken for the folder's
        seen += entries
        assert os.fstat(other.fileno())
    assert sum(entry.is_file(follow_symlinks=False) for entry in seen) >= 501
    others.close()
    assert len(open_descriptors()) == before


def test_entries_are_read_as_they_are_asked_for_and_closing_lets_go(place: Path) -> None:
    for number in range(10):
        (place / f"{number}").touch()
    before = open_descriptors()
    with open_folder(bytes(place)) as folder:
        entries = folder.entries()
        first = next(entries)
    assert first.is_file()
    assert open_descriptors() != before  # the folder is closed, and they go on
    rest = [next(entries) for _ in range(3)]
    assert len({first.name, *(entry.name for entry in rest)}) == 4
    entries.close()
    assert open_descriptors() == before


def test_what_is_regular_is_a_file_and_no_link_to_one(place: Path) -> None:
    (place / "file").touch()
    (place / "folder").mkdir()
    (place / "link").symlink_to("file")
    os.mkfifo(place / "pipe")
    with os.scandir(place) as entries:
        assert disk.regular(entries) == ["file"]


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
        lambda folder: stat.S_ISREG(mode(folder, b"theirs")),
        lambda folder: folder.unlink(b"theirs"),
        lambda folder: b"theirs" in folder.files(),
    ],
    ids=["open", "status", "unlink", "files"],
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


def test_a_folder_that_was_swapped_in_is_not_synced_in_its_place(
    swapped: Folder, tmp_path: Path, synced: List[Path], bare: bool
) -> None:
    if bare:
        with pytest.raises(NotADirectoryError, match="another has taken its place"):
            swapped.sync()
    else:
        swapped.sync()
    assert synced == ([] if bare else [tmp_path / "moved"])


def test_a_folder_is_synced_as_what_it_is(place: Path, synced: List[Path]) -> None:
    before = open_descriptors()
    with open_folder(bytes(place)) as folder:
        folder.sync()
    assert synced == [place]
    assert open_descriptors() == before


def test_a_folder_that_cannot_be_synced_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "fsync", errno.EIO)
    before = open_descriptors()
    with open_folder(bytes(place)) as folder, pytest.raises(OSError, match="Input/output error"):
        folder.sync()
    assert open_descriptors() == before


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL])
def test_a_file_system_that_cannot_sync_a_folder_is_left_to_itself(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    fd = disk.create(bytes(place / "a"))
    refuse(monkeypatch, "fsync", number)
    before = open_descriptors()
    disk.sync_folder(bytes(place))
    with open_folder(bytes(place)) as folder:
        folder.sync()
    assert open_descriptors() == before
    with pytest.raises(OSError, match=os.strerror(number)):  # but not so for a file
        disk.sync(fd)
    os.close(fd)


def test_closing_a_folder_raises_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(bytes(place))
    close = os.close

    def fail(fd: int) -> None:
        close(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "close", fail)
        folder.close()


# Making durable.


def test_a_file_is_synced(place: Path, synced: List[Path]) -> None:
    fd = disk.create(bytes(place / "a"))
    disk.sync(fd)
    os.close(fd)
    assert synced == [place / "a"]


class MacOS:
    """Has fcntl(2) with F_FULLFSYNC, which fails with this number if there is one."""

    FULL_SYNC = 51

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: Optional[int] = None) -> None:
        self.asked: List[Tuple[int, int]] = []
        self._number = number
        monkeypatch.setattr(disk, "fcntl", self)
        monkeypatch.setattr(disk, "_FULL_SYNC", self.FULL_SYNC)

    def fcntl(self, fd: int, command: int) -> int:
        self.asked.append((fd, command))
        if self._number is not None:
            raise OSError(self._number, os.strerror(self._number))
        return 0


def test_where_fsync_stops_at_the_disks_own_cache_another_call_passes_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, synced: List[Path]
) -> None:
    system = MacOS(monkeypatch)
    fd = disk.create(bytes(place / "a"))
    disk.sync(fd)
    os.close(fd)
    assert system.asked == [(fd, MacOS.FULL_SYNC)]
    assert synced == []


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOTTY, errno.EINVAL])
def test_where_a_file_system_has_no_such_call_fsync_has_to_do(
    place: Path, monkeypatch: pytest.MonkeyPatch, synced: List[Path], number: int
) -> None:
    system = MacOS(monkeypatch, number)
    disk.sync_folder(bytes(place))
    assert len(system.asked) == 1
    assert synced == [place]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_what_that_call_says_of_the_disk_is_not_covered_up_by_fsync(
    place: Path, monkeypatch: pytest.MonkeyPatch, synced: List[Path], number: int
) -> None:
    MacOS(monkeypatch, number)
    before = open_descriptors()
    with pytest.raises(OSError, match=os.strerror(number)):
        disk.sync_folder(bytes(place))
    assert synced == []
    assert open_descriptors() == before


def test_the_system_is_asked_for_that_call_on_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", MacOS.FULL_SYNC, raising=False)
    spec = importlib.util.spec_from_file_location("backup.disk_elsewhere", disk.__file__)
    assert spec is not None
    assert spec.loader is not None
    elsewhere = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(elsewhere)
    assert elsewhere._FULL_SYNC == MacOS.FULL_SYNC


def test_a_folder_is_synced_by_its_path_links_or_not(
    place: Path, tmp_path: Path, synced: List[Path]
) -> None:
    (tmp_path / "link").symlink_to("place")
    before = open_descriptors()
    disk.sync_folder(bytes(place))
    disk.sync_folder(bytes(tmp_path / "link"))
    assert synced == [place, place]
    assert open_descriptors() == before
    with pytest.raises(FileNotFoundError):
        disk.sync_folder(bytes(tmp_path / "missing"))


class Windows:
    """The module ``os`` as it is there, as far as its name goes; no folder can be opened."""

    name = "nt"

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: bytes, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_on_windows_no_folder_is_opened_to_be_synced(
    place: Path, monkeypatch: pytest.MonkeyPatch, synced: List[Path]
) -> None:
    monkeypatch.setattr(disk, "os", Windows())
    disk.sync_folder(bytes(place))
    assert synced == []


def test_folders_are_made_as_far_as_they_are_missing_for_their_owner_alone(place: Path) -> None:
    before = os.umask(0)
    try:
        disk.make_folder(bytes(place / "a" / "b" / "c"), durably=True)
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert stat.S_IMODE((place / folder).stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o755, 0o720, 0o702, 0o1777])
def test_others_may_write_what_its_mode_says(place: Path, mode: int) -> None:
    place.chmod(mode)
    assert disk.others_may_write(bytes(place)) is bool(mode & 0o022)


def test_where_modes_say_nothing_nobody_is_suspected(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.chmod(0o777)
    monkeypatch.setattr(disk, "os", Windows())
    assert not disk.others_may_write(bytes(place))


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_private_folder_is_its_owners_whatever_the_umask(place: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        disk.make_private(bytes(place / "a"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((place / "a").stat().st_mode) == 0o700


def test_each_folder_that_is_made_durably_is_synced_in_the_one_above_before_the_next_is_made(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: List[str] = []
    mkdir = os.mkdir

    def make(path: bytes, mode: int) -> None:
        done.append(f"make {Path(os.fsdecode(path)).relative_to(place)}")
        mkdir(path, mode)

    def sync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        done.append(f"sync {path.relative_to(place)}")

    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "fsync", sync)
    disk.make_folder(bytes(place / "a" / "b" / "c"), durably=True)
    expected = ["make a", "sync .", "make a/b", "sync a", "make a/b/c", "sync a/b"]
    assert done == expected
    disk.make_folder(bytes(place / "a" / "b" / "c"), durably=True)
    assert done == expected  # what is there is not made, nor looked after
    disk.make_folder(bytes(place / "d" / "e"), durably=False)
    assert done == [*expected, "make d", "make d/e"]


def test_a_folder_is_made_behind_a_link(place: Path, tmp_path: Path, synced: List[Path]) -> None:
    (tmp_path / "link").symlink_to("place")
    disk.make_folder(bytes(tmp_path / "link" / "a" / "b"), durably=True)
    assert (place / "a" / "b").is_dir()
    assert synced == [place, place / "a"]


def test_a_folder_that_another_makes_meanwhile_will_do_and_is_synced_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, synced: List[Path]
) -> None:
    mkdir = os.mkdir

    def mkdir_second(path: bytes, mode: int) -> None:
        mkdir(path, mode)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", mkdir_second)
    disk.make_folder(bytes(place / "a" / "b"), durably=True)
    assert (place / "a" / "b").is_dir()
    assert synced == [place, place / "a"]


def test_a_folder_that_cannot_be_made_is_an_error(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").touch()
    with pytest.raises(NotADirectoryError):
        disk.make_folder(bytes(place / "file" / "below"), durably=True)
    refuse(monkeypatch, "mkdir", errno.EROFS)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        disk.make_folder(bytes(place / "a"), durably=True)


def test_the_system_is_advised_to_begin_writing_where_it_takes_advice(
    place: Path, monkeypatch: pytest.MonkeyPatch, bare: bool
) -> None:
    advice: List[Tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advice.append(arguments))
    disk.start_write_back(7, 100, 50)
    assert advice == ([] if bare else [(7, 100, 50, os.POSIX_FADV_DONTNEED)])


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL, errno.ESPIPE])
def test_a_system_that_takes_no_advice_does_not_fail_for_it(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, "posix_fadvise", number)
    disk.start_write_back(7, 100, 50)


def test_what_is_being_written_back_can_still_be_read(place: Path) -> None:
    fd = disk.create(bytes(place / "a"))
    disk.write_all(fd, memoryview(b"0123456789"))
    disk.start_write_back(fd, 0, 10)
    os.close(fd)
    assert (place / "a").read_bytes() == b"0123456789"


# Errors.


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left on device"),
        (OSError("No number"), "no number"),
        (ValueError("embedded null byte"), "embedded null byte"),
    ],
)
def test_what_failed_is_said_with_its_place_and_reason(
    error: Union[OSError, ValueError], reason: str
) -> None:
    failure = disk.failed("cannot do this", b"/folder/a b\n\xff", error)
    assert isinstance(failure, StoreFailed)
    assert str(failure) == (
        f"/folder/a b\\x0a\\xff: cannot do this: {reason}; check this folder and its disk"
    )


def test_a_file_whose_status_cannot_be_had_is_closed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fd = disk.create(bytes(place / "a"))
    assert stat.S_ISREG(disk.status(fd).st_mode)
    before = open_descriptors()
    with monkeypatch.context() as broken:
        refuse(broken, "fstat", errno.ESTALE)
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            disk.status(fd)
    assert {*before} - {*open_descriptors()} == {fd}


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
