"""The users' folders, on real file systems: what is made, what stays open, what is synced."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Callable, List

import pytest

from backup import disk
from backup.folders import TEMPORARY, Folders
from tests.conftest import open_descriptors


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / TEMPORARY.decode()).mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def folders(root: Path) -> Folders:
    return Folders(bytes(root), True, None)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """What is synced, by its name, from now on; it is synced indeed."""
    names: List[str] = []
    sync = disk.sync_open_folder

    def note(fd: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        sync(fd)

    monkeypatch.setattr(disk, "sync_open_folder", note)
    return names


def test_a_folder_is_made_for_its_owner_alone_and_only_when_it_is_to_be(
    folders: Folders, root: Path
) -> None:
    with pytest.raises(FileNotFoundError):
        folders.open(7)
    assert folders.users() == []
    folders.open(7, create=True).close()
    assert folders.path(7) == bytes(root / "7")
    assert (root / "7").stat().st_mode & 0o777 == 0o700
    folders.open(7).close()


def test_users_are_the_folders_that_an_id_names(folders: Folders, root: Path) -> None:
    for name in ("0", "12", "4294967295", "007", "-1", "x1", "1x"):
        (root / name).mkdir()
    (root / "3").write_bytes(b"a file")
    (root / "5").symlink_to(root / "12")
    assert sorted(folders.users()) == [0, 12, 4294967295]


@pytest.mark.parametrize("create", [False, True])
def test_where_the_root_is_gone_nothing_is_made_and_nobody_is_called_missing(
    folders: Folders, root: Path, create: bool
) -> None:
    away = root.rename(root.with_name("away"))
    with pytest.raises(NotADirectoryError, match="the store is not there"):
        folders.open(7, create)
    assert not root.exists()
    away.rename(root)
    assert os.listdir(root) == [TEMPORARY.decode()]


@pytest.mark.parametrize("create", [False, True])
def test_a_link_in_the_place_of_a_folder_is_not_followed(
    folders: Folders, root: Path, tmp_path: Path, create: bool
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "7").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        folders.open(7, create)


def open_below(root: Path) -> List[str]:
    """The names of the folders below the root that this process has open."""
    paths = [Path(path) for path in open_descriptors().values()]
    return [path.name for path in paths if path.parent == root]


def test_what_is_read_is_open_until_the_turn_ends_and_for_one_user_at_a_time(root: Path) -> None:
    at_turn_end: List[Callable[[], None]] = []
    folders = Folders(bytes(root), True, at_turn_end.append)
    (root / "7").mkdir()
    (root / "8").mkdir()
    seven = folders.to_read(7)
    folders.read_no_longer()
    assert folders.to_read(7) is seven
    assert open_below(root) == ["7"]
    folders.to_read(8)
    assert open_below(root) == ["8"]
    for close in at_turn_end:
        close()
    assert open_below(root) == []


def test_without_a_turn_it_is_closed_when_it_was_read(folders: Folders, root: Path) -> None:
    (root / "7").mkdir()
    folders.to_read(7)
    assert open_below(root) == ["7"]
    folders.read_no_longer()
    assert open_below(root) == []


def test_a_commit_syncs_each_folder_once_and_the_root_for_new_ones(
    folders: Folders, root: Path, synced: List[str]
) -> None:
    (root / "6").mkdir()
    with folders.for_commit() as open_folders:
        for user_id in (6, 7, 7, 8):
            open_folders.get(user_id, create=True)
        for user_id in (6, 7, 7, 8, 6):
            open_folders.sync(user_id)
    assert synced == ["6", "7", root.name, "8"]
    with folders.for_commit() as open_folders:
        open_folders.get(7)
        open_folders.sync(7)
    assert synced[4:] == ["7"]  # it is not new any more


def test_a_folder_that_no_power_cut_matters_to_is_never_new(root: Path, synced: List[str]) -> None:
    folders = Folders(bytes(root), False, None)
    with folders.for_commit() as open_folders:
        open_folders.get(7, create=True)
        open_folders.sync(7)
    assert synced == ["7"]


@pytest.mark.parametrize("failing", ["7", "root"])
def test_what_could_not_be_synced_is_not_tried_again_in_a_commit_but_in_the_next(
    folders: Folders,
    root: Path,
    synced: List[str],
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    sync = disk.sync_open_folder

    def broken(fd: int) -> None:
        sync(fd)
        if synced[-1] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, folders.for_commit() as open_folders:
        patch.setattr(disk, "sync_open_folder", broken)
        open_folders.get(7, create=True)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                open_folders.sync(7)
        assert synced.count(failing) == 1
    assert folders.is_new(7)
    with folders.for_commit() as open_folders:
        open_folders.get(7)
        open_folders.sync(7)
    assert synced[-2:] == ["7", root.name]
    assert not folders.is_new(7)


def test_another_server_of_the_root_may_be_faster(
    folders: Folders, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = disk.make_private

    def slower(path: bytes) -> None:
        (root / "7").mkdir()
        make(path)

    monkeypatch.setattr(disk, "make_private", slower)
    folders.open(7, create=True).close()
    assert folders.is_new(7)  # who knows whether the other has synced it
