"""The socket that a server listens on: bound, and kept from exposing what it should not.

Rules: it is bound and listening, and does not block, when ``listen`` returns.
Version 1 of the protocol has no passwords: an address that other machines can
reach is refused before it is bound, unless that was asked for.
"""

from __future__ import annotations

import errno
import socket
from typing import Tuple

from .address import format_address, is_loopback, resolve
from .errors import ConfigError, ListenFailed
from .stream import no_delay


def listen(address: Tuple[str, int], backlog: int, allow_anonymous: bool) -> socket.socket:
    """A socket that listens on ``address``, the first that a host name stands for.

    Raises ``ListenFailed``, ``Unreachable`` for a host name nobody knows, or
    ``ConfigError`` for an address that is not loopback, unless ``allow_anonymous``.
    """
    family, place = resolve(address)[0]
    if not allow_anonymous:
        _refuse_exposed(address, family, place)
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise cannot_listen(address, error, "take another address") from error
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where REUSEADDR would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        no_delay(listener)
        listener.bind(place)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        taken = "stop what listens there or take another port: --listen HOST:PORT"
        other = "take another address: --listen HOST:PORT"
        hint = taken if error.errno == errno.EADDRINUSE else other
        raise cannot_listen(address, error, hint) from error
    return listener


def cannot_listen(address: Tuple[str, int], error: OSError, hint: str) -> ListenFailed:
    """The error that says that the system refuses to listen there, and why."""
    reason = (error.strerror or str(error)).lower()
    return ListenFailed(f"cannot listen on {format_address(address)}: {reason}; {hint}")


def _refuse_exposed(address: Tuple[str, int], family: int, place: Tuple[object, ...]) -> None:
    """Raises ``ConfigError`` when others than this machine can reach ``place``."""
    if not is_loopback(family, place):
        raise ConfigError(
            f"will not listen on {format_address(address)}: there are no passwords, so whoever"
            " reaches it from another machine can read, replace and delete every file;"
            " listen on 127.0.0.1, or allow it: --allow-anonymous"
        )
