"""Listening sockets: on every kind of address, refused with a reason, never exposed by mistake."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import os
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, List, Tuple

import pytest

from backup.address import UnixSocket
from backup.errors import ConfigError, ListenFailed
from backup.listener import adopt, listen
from tests.helpers import ROOT

BACKLOG = 8


def refuse(code: int) -> Callable[..., Any]:
    """Stands in for a call that the system refuses."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_it_listens_on_loopback_and_does_not_block(host: str) -> None:
    with listen((host, 0), BACKLOG, allow_anonymous=False) as listener:
        with socket.create_connection(listener.getsockname()[:2]):
            listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def exposed() -> List[str]:
    """What stands for an address that other machines can reach."""
    return ["0.0.0.0", "::", "::ffff:0.0.0.0", "192.0.2.1", "2001:db8::1", ""]


@pytest.mark.parametrize("host", exposed())
def test_an_address_that_others_reach_is_refused_before_it_is_bound(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(socket, "socket", refuse(errno.EPERM))
    if host == "":  # which the resolver is asked for as any name
        answer = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("198.51.100.7", 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
        host = "backup.example.org"
    with pytest.raises(ConfigError) as caught:
        listen((host, 0), BACKLOG, allow_anonymous=False)
    shown = f"[{host}]" if ":" in host else host
    assert str(caught.value) == (
        f"will not listen on {shown}:0: there are no passwords, so whoever reaches it from another"
        " machine can read, replace and delete every file; listen on 127.0.0.1, or allow it:"
        " --allow-anonymous"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_it_is_bound_when_that_is_allowed(host: str) -> None:
    with listen((host, 0), BACKLOG, allow_anonymous=True) as listener:
        assert listener.getsockname()[0] == host


@pytest.mark.parametrize(
    ("call", "code", "hint"),
    [
        ("bind", errno.EADDRINUSE, "stop what listens there or take another port: --listen"),
        ("bind", errno.EACCES, "take another address: --listen HOST:PORT"),
        ("listen", errno.EADDRINUSE, "stop what listens there or take another port: --listen"),
        ("__init__", errno.EAFNOSUPPORT, "take another address"),
    ],
)
def test_what_the_system_refuses_is_explained_and_nothing_left_open(
    monkeypatch: pytest.MonkeyPatch, call: str, code: int, hint: str
) -> None:
    monkeypatch.setattr(socket.socket, call, refuse(code))
    with pytest.raises(ListenFailed) as caught:
        listen(("127.0.0.1", 1), BACKLOG, allow_anonymous=False)
    reason = os.strerror(code).lower()
    assert str(caught.value).startswith(f"cannot listen on 127.0.0.1:1: {reason}; {hint}")


def test_where_reusing_an_address_would_share_it_the_port_is_taken_exclusively(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # An option that is there and harmless, in place of one that only Windows has.
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with listen(("127.0.0.1", 0), BACKLOG, allow_anonymous=False) as listener:
        options: Tuple[int, ...] = (socket.SO_KEEPALIVE, socket.SO_REUSEADDR)
        assert [listener.getsockopt(socket.SOL_SOCKET, option) for option in options] == [1, 0]


# -- Unix sockets -------------------------------------------------------------


def listen_at(path: Path) -> socket.socket:
    return listen(UnixSocket(str(path)), BACKLOG, allow_anonymous=False)


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_a_unix_socket_is_its_owners_and_goes_when_it_is_closed(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "socket"
    before = os.umask(umask)
    try:
        listener = listen_at(path)
    finally:
        os.umask(before)
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    listener.close()
    assert not path.exists()


def test_nobody_can_connect_before_its_mode_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    chmod = os.chmod
    tried = []

    def changing(place: str, mode: int) -> None:
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(place)
        tried.append(place)
        chmod(place, mode)

    monkeypatch.setattr(os, "chmod", changing)
    listen_at(path).close()
    assert tried == [str(path)]


KILLED = """
import os, signal, sys
from backup.address import UnixSocket
from backup.listener import listen
listener = listen(UnixSocket(sys.argv[1]), 8, False)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_socket_that_a_killed_server_has_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert path.exists()
    with listen_at(path) as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        listener.accept()[0].close()
    assert not path.exists()


@pytest.mark.parametrize("waiting", [0, 2])
def test_a_socket_that_somebody_listens_on_stays_his(tmp_path: Path, waiting: int) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as other, ExitStack() as stack:
        other.bind(str(path))
        other.listen(1)
        for _ in range(waiting):  # as many as it lets wait
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(path))
        with pytest.raises(ListenFailed) as caught:
            listen_at(path)
        assert path.exists()
    assert str(caught.value) == (
        f"cannot listen on unix:{path}: address already in use; stop what listens there or take"
        " another socket: --listen unix:PATH"
    )


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_a_socket_is_never_removed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "socket"
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ListenFailed, match="what is there is not a socket; take another address"):
        listen_at(path)
    assert os.path.lexists(path)


def test_anothers_socket_in_its_place_is_not_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = listen_at(path)
    path.unlink()
    with listen_at(path):
        listener.close()
        assert path.exists()
    assert not path.exists()


def test_servers_that_start_at_once_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    bind = socket.socket.bind
    locked = []

    def binding(sock: socket.socket, place: str) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked.append(place)
        finally:
            os.close(fd)
        bind(sock, place)

    monkeypatch.setattr(socket.socket, "bind", binding)
    listen_at(path).close()
    assert locked == [str(path)]


def test_a_unix_socket_by_a_relative_path_is_removed_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with listen_at(Path("socket")):
        monkeypatch.chdir("/")
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("none/socket", "no such file or directory"), ("x" * 108, "af_unix path too long")],
)
def test_a_path_that_cannot_be_had_is_explained(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(ListenFailed) as caught:
        listen_at(tmp_path / path)
    assert f": {reason}; take another address: --listen unix:PATH" in str(caught.value)


def test_a_chmod_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", refuse(errno.EPERM))
    with pytest.raises(ListenFailed, match="operation not permitted"):
        listen_at(tmp_path / "socket")
    assert not (tmp_path / "socket").exists()


# -- sockets that listen already ----------------------------------------------


def test_a_socket_that_listens_is_made_ready() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert adopt(listener, allow_anonymous=False) is listener
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_socket_that_others_reach_is_closed_unless_that_is_allowed() -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        assert adopt(listener, allow_anonymous=True) is listener
        with pytest.raises(ConfigError, match="there are no passwords"):
            adopt(listener, allow_anonymous=False)
        assert listener.fileno() == -1


def test_where_there_are_no_unix_sockets_tcp_still_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows: the module is loaded anew, and finds no ``fcntl``."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    path = ROOT / "backup" / "listener.py"
    spec = importlib.util.spec_from_file_location("backup.listener_without_fcntl", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fcntl is None
    module.listen(("127.0.0.1", 0), BACKLOG, False).close()
