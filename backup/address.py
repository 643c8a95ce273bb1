"""``HOST:PORT`` and ``unix:PATH``: read, shown and resolved.

Rules: IPv6 addresses stand in brackets (``[::1]:1234``). A host name may stand
for several addresses; they are tried in the resolver's order. A path is not
looked at before a socket is bound or connected.
"""

from __future__ import annotations

import os
import re
import socket
from typing import List, NamedTuple, Tuple, Union

from .errors import ConfigError, Unreachable
from .names import escape, show

Address = Tuple[str, int]
"""Host and port, or a ``UnixSocket``."""

Place = Union[Tuple[object, ...], str]
"""What a socket binds and connects to."""

MAX_PORT = 65535
_AF_UNIX = getattr(socket, "AF_UNIX", None)
_PORT = re.compile("[0-9]{1,5}")
EXPECTED = "expected HOST:PORT, for example 127.0.0.1:1234 or [::1]:1234, or unix:PATH"
_UNIX = "unix:"


class UnixSocket(NamedTuple):
    """A socket in the file system, for this machine alone; goes wherever a host and port go."""

    path: str
    port: int = 0
    """There is none."""


def parse(text: str) -> Address:
    """The address. Raises ``ConfigError``."""
    path = text.strip()[len(_UNIX) :]
    if text.strip().startswith(_UNIX) and path and "\0" not in path:
        return UnixSocket(path)
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    # The resolver makes of * what it likes; every address is 0.0.0.0 or [::].
    named = host and host != "*" and colon and escape(host.encode("utf-8", "replace")) == host
    if not named or not _PORT.fullmatch(port) or int(port) > MAX_PORT:
        raise ConfigError(f"'{show(text)}' is not an address; {EXPECTED}")
    return host, int(port)


def format_address(address: Tuple[object, ...]) -> str:
    """The address as ``parse`` reads it; also for the longer tuples of IPv6 sockets.

    A path's spaces and unprintable characters are escaped, so that it is one word.
    """
    if isinstance(address, UnixSocket):
        return _UNIX + escape(os.fsencode(address.path))
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(family: int, place: Place) -> bool:
    """Whether only this machine can reach a socket address, as ``resolve`` or a socket gives it.

    That is 127.0.0.0/8 (RFC 1122, 3.2.1.3), ::1 (RFC 4291, 2.5.3), and the former written as the
    latter, and every Unix socket.
    """
    if family == _AF_UNIX:
        return True
    host = str(place[0])
    if family == socket.AF_INET6:
        return host.partition("%")[0] == "::1" or host.startswith("::ffff:127.")
    return family == socket.AF_INET and host.startswith("127.")


def bound(sock: socket.socket) -> Address:
    """The address that a socket is bound to."""
    place = sock.getsockname()
    if sock.family == _AF_UNIX:  # bytes, with a NUL in front, if it is abstract (unix(7))
        return UnixSocket(place if isinstance(place, str) else "@" + os.fsdecode(place[1:]))
    host, port = place[:2]
    return host, port


def resolve(address: Address) -> List[Tuple[int, Place]]:
    """Family and socket address of each thing the address stands for, at least one.

    Asks the system's resolver, and waits for it. Raises ``Unreachable``.
    """
    if isinstance(address, UnixSocket):
        if _AF_UNIX is None:
            raise Unreachable("this system has no Unix sockets; take HOST:PORT")
        return [(_AF_UNIX, address.path)]
    if not 0 <= address[1] <= MAX_PORT:  # the resolver would take the rest of a division
        raise Unreachable(f"there is no port {address[1]}; expected 0 to {MAX_PORT}")
    try:
        found = socket.getaddrinfo(address[0], address[1], type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Unreachable(
            f"cannot find {show(address[0])}: {reason}; check the host name"
        ) from error
    return [(family, sockaddr) for family, _, _, _, sockaddr in found]
