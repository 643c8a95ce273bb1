"""The socket that a server listens on: bound, and kept from exposing what it should not.

Rules: it is bound and listening, and does not block, when ``listen`` or
``adopt`` returns. Version 1 of the protocol has no passwords: an address that
other machines can reach is refused before it is bound, unless that was asked
for; a Unix socket is its owner's alone (mode 0600). Its file replaces one that
nobody listens on any more, and nothing else; it is removed at the end, unless
another has taken its place.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import contextmanager, suppress
from typing import Iterator

from .address import Address, Place, UnixSocket, bound, format_address, is_loopback, resolve
from .errors import ConfigError, ListenFailed
from .stream import no_delay

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def listen(address: Address, backlog: int, allow_anonymous: bool) -> socket.socket:
    """A socket that listens on ``address``, the first that a host name stands for.

    Raises ``ListenFailed``, ``Unreachable`` for a host name nobody knows, or
    ``ConfigError`` for an address that is not loopback, unless ``allow_anonymous``.
    """
    family, place = resolve(address)[0]
    if not allow_anonymous:
        _refuse_exposed(address, family, place)
    unix = isinstance(address, UnixSocket)
    try:
        return _listen_unix(address[0], backlog) if unix else _listen_tcp(family, place, backlog)
    except OSError as error:
        option = "unix:PATH" if unix else "HOST:PORT"
        other = "socket" if unix else "port"
        taken = f"stop what listens there or take another {other}: --listen {option}"
        hint = (
            taken if error.errno == errno.EADDRINUSE else f"take another address: --listen {option}"
        )
        raise cannot_listen(address, error, hint) from error


def adopt(listener: socket.socket, allow_anonymous: bool) -> socket.socket:
    """A socket that another process has made listen, made ready.

    Raises ``ConfigError`` as ``listen`` does, and then closes it.
    """
    try:
        if not allow_anonymous:
            _refuse_exposed(bound(listener), listener.family, listener.getsockname())
    except BaseException:
        listener.close()
        raise
    no_delay(listener)
    listener.setblocking(False)
    return listener


def cannot_listen(address: Address, error: OSError, hint: str) -> ListenFailed:
    """The error that says that the system refuses to listen there, and why."""
    reason = (error.strerror or str(error)).lower()
    return ListenFailed(f"cannot listen on {format_address(address)}: {reason}; {hint}")


def _refuse_exposed(address: Address, family: int, place: Place) -> None:
    """Raises ``ConfigError`` when others than this machine can reach ``place``."""
    if not is_loopback(family, place):
        raise ConfigError(
            f"will not listen on {format_address(address)}: there are no passwords, so whoever"
            " reaches it from another machine can read, replace and delete every file;"
            " listen on 127.0.0.1, or allow it: --allow-anonymous"
        )


def _listen_tcp(family: int, place: Place, backlog: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where REUSEADDR would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        no_delay(listener)
        listener.bind(place)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class _UnixListener(socket.socket):
    """A listening Unix socket that takes its file with it when it is closed."""

    _path = ""
    _file: os.stat_result

    def bind_alone(self, path: str) -> None:
        """Binds it to ``path``, for this account alone: before ``listen`` nobody can connect."""
        self.bind(path)
        self._file = os.lstat(path)
        self._path = os.path.abspath(path)
        os.chmod(path, 0o600)

    def close(self) -> None:
        path, self._path = self._path, ""
        if path:
            with suppress(OSError):  # it is gone, or not to be had any more
                if os.path.samestat(self._file, os.lstat(path)):
                    os.unlink(path)
        super().close()


def _listen_unix(path: str, backlog: int) -> socket.socket:
    listener = _UnixListener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone_in(os.path.dirname(path) or "."):
            _remove_stale(path)
            listener.bind_alone(path)
            listener.listen(backlog)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


@contextmanager
def _alone_in(folder: str) -> Iterator[None]:
    """Keeps other servers that start meanwhile from taking each other's sockets for stale ones."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Removes a socket that nobody listens on. Raises ``OSError`` for anything else there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, "what is there is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        with suppress(BlockingIOError):  # somebody listens, and many wait
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
