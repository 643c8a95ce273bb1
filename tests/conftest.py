"""Fixtures of all tests, and the check that a test leaves nothing behind.

After every test no descriptor, thread, child process or temporary file may be
left; a test that leaks fails.
"""

from __future__ import annotations

import gc
import os
import tempfile
import threading
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest

from backup.settings import Settings
from tests.helpers import RunningServer
from tests.user import User

ServerFactory = Callable[..., RunningServer]


def pytest_collection_finish() -> None:
    """Takes what is there out of the collector's sight, so that each collection is quick."""
    gc.collect()
    gc.freeze()


def open_descriptors() -> Dict[int, str]:
    """Every descriptor of this process, and what it is open on."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that listed the folder
    return found


def new_descriptors(before: Dict[int, str]) -> Dict[int, str]:
    """Those that were not open before, or on something else."""
    return {fd: what for fd, what in open_descriptors().items() if before.get(fd) != what}


def temporary_files(folder: Path) -> List[str]:
    """What the package's own temporary files would look like, below a test's folder."""
    left = list(folder.rglob(".backup-*.part")) + list(folder.rglob(".tmp/*"))
    return sorted(str(path.relative_to(folder)) for path in left)


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test that leaves a descriptor, a thread, a child or a temporary file."""
    scratch = tmp_path / "TMPDIR"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    # A user's own surroundings must not reach the tests.
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("BACKUP_SERVER", "BACKUP_USER_ID", "BACKUP_BASE_DIR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    descriptors, threads = open_descriptors(), set(threading.enumerate())
    yield
    left = new_descriptors(descriptors)
    if left:  # those that only a cycle of dead objects holds are closed now, with a warning
        gc.collect()
        left = new_descriptors(descriptors)
    assert not left, f"descriptors left open: {left}"
    assert set(threading.enumerate()) <= threads, f"threads left: {threading.enumerate()}"
    assert not temporary_files(tmp_path), f"temporary files left: {temporary_files(tmp_path)}"
    assert not list(scratch.iterdir()), f"left in TMPDIR: {list(scratch.iterdir())}"
    with pytest.raises(ChildProcessError):  # ECHILD: not even a zombie is left
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServerFactory]:
    """Starts servers below the test's folder; stops those that still run at its end."""
    running: List[RunningServer] = []

    def start(settings: Settings = Settings(), root: str = "store") -> RunningServer:
        running.append(RunningServer(tmp_path / root, settings))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def server(serve: ServerFactory) -> RunningServer:
    """One server with the default settings."""
    return serve()


@pytest.fixture
def user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> User:
    folder = tmp_path / "user"
    folder.mkdir()
    return User(folder, monkeypatch, capsys)


@pytest.fixture
def served(server: RunningServer, user: User) -> RunningServer:
    """A server that the user's commands find by themselves."""
    user.set_variable("BACKUP_SERVER", f"127.0.0.1:{server.address[1]}")
    return server
