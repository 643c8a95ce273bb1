"""The users' folders below a root: found, made when they are missing, open as long as that helps.

Rules: a user's folder is ``<root>/<user_id>``, and never what a symbolic link
points to. One is made only in a root that is there: a root that has vanished may
be a disk that is not mounted, and what is written beneath its mount point would
be lost to sight when it comes back. A folder that is read stays open for the
other requests of a turn; those that a commit works in, until it ends. Of a new
one, a commit makes its name in the root durable too.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import Callable, Dict, List, Optional, Set

from . import disk

TEMPORARY = b".tmp"

_ROOT = -1  # where a user id stands for a folder: the root itself, which is nobody's


class Folders:
    """The folders of all users below one root, which is there already."""

    def __init__(
        self,
        root: bytes,
        durable: bool,
        at_turn_end: Optional[Callable[[Callable[[], None]], None]],
    ) -> None:
        """``durable``: to survive a power cut. ``at_turn_end``: the reactor's, if there is one."""
        self.root = root
        self.temporary = os.path.join(root, TEMPORARY)
        """Where the root keeps what has no name yet; as long as the root is there, so is this."""
        self._durable = durable
        self._at_turn_end = at_turn_end
        self._users = os.path.join(root, b"")
        self._new: Set[int] = set()  # whose folders a power cut could still take
        self._read_user = -1  # whose folder is open to be read, and that
        self._read: Optional[disk.Folder] = None

    def path(self, user_id: int) -> bytes:
        """Where the user's folder is, or would be."""
        return b"%s%d" % (self._users, user_id)

    def users(self) -> List[int]:
        """Whose folders there are. Raises ``OSError``."""
        with os.scandir(self.root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return [int(name) for name in names if _is_user(name)]

    def open(self, user_id: int, create: bool = False) -> disk.Folder:
        """The user's folder, for the caller to close.

        Raises ``FileNotFoundError`` when there is none, unless it is to ``create`` one, and
        another ``OSError`` when the root is not there or the folder cannot be opened.
        """
        path = self.path(user_id)
        try:
            return disk.open_folder(path)
        except FileNotFoundError:
            if not os.path.isdir(self.temporary):  # not this user is missing, but the whole root
                raise NotADirectoryError(errno.ENOTDIR, "the store is not there") from None
            if not create:  # or the root was away, and has just come back
                return disk.open_folder(path)
        with suppress(FileExistsError):  # another server of this root may have made it first
            disk.make_private(path)
        if self._durable:
            self._new.add(user_id)
        return disk.open_folder(path)

    def to_read(self, user_id: int) -> disk.Folder:
        """The user's folder; for many requests of a user in one turn, opened once.

        Call ``read_no_longer`` when it was read. Raises ``OSError``, like ``open``.
        """
        if self._read is None or self._read_user != user_id:
            self.close()
            self._read, self._read_user = self.open(user_id), user_id
            if self._at_turn_end is not None:
                self._at_turn_end(self.close)
        return self._read

    def read_no_longer(self) -> None:
        """Without a turn whose other requests might want it, the folder is closed at once."""
        if self._at_turn_end is None:
            self.close()

    def close(self) -> None:
        """Lets go of the folder that is open to be read."""
        if self._read is not None:
            self._read.close()
            self._read = None

    def for_commit(self) -> CommitFolders:
        """Those that one commit works in; use it in a ``with``."""
        return CommitFolders(self)

    def is_new(self, user_id: int) -> bool:
        """Whether a power cut could still take the user's folder out of the root."""
        return user_id in self._new

    def mark_durable(self, user_id: int) -> None:
        """Takes note that the root was synced since the user's folder was made."""
        self._new.discard(user_id)


class CommitFolders:
    """The folders that one commit works in, each opened once and made durable once."""

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._open: Dict[int, disk.Folder] = {}
        self._synced: Dict[int, Optional[Exception]] = {}  # and how it ended

    def __enter__(self) -> CommitFolders:
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._open.values():
            folder.close()

    def get(self, user_id: int, create: bool = False) -> disk.Folder:
        """The user's folder. Raises ``OSError``, like ``Folders.open``."""
        if user_id not in self._open:
            self._open[user_id] = self._folders.open(user_id, create)
        return self._open[user_id]

    def sync(self, user_id: int) -> None:
        """Makes durable what was done in the user's folder, and that it is in the root.

        Raises ``OSError``.
        """
        self._sync_once(user_id, self._open[user_id].sync)
        if self._folders.is_new(user_id):
            self._sync_once(_ROOT, lambda: disk.sync_folder(self._folders.root))
            self._folders.mark_durable(user_id)

    def _sync_once(self, key: int, sync: Callable[[], None]) -> None:
        """Syncs at the first call for this key, and ends all further ones as that has ended.

        A second fsync(2) after one that failed may succeed without having written anything.
        """
        if key not in self._synced:
            self._synced[key] = None
            try:
                sync()
            except Exception as error:
                self._synced[key] = error
        failure = self._synced[key]
        if failure is not None:
            raise failure


def _is_user(name: bytes) -> bool:
    return name.isdigit() and (name == b"0" or not name.startswith(b"0"))
