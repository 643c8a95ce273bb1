"""Listening sockets: on every kind of address, refused with a reason, never exposed by mistake."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, Callable, List, Tuple

import pytest

from backup.errors import ConfigError, ListenFailed
from backup.listener import listen

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
