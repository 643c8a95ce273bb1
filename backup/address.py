"""``HOST:PORT``: read, shown and resolved.

Rules: IPv6 addresses stand in brackets (``[::1]:1234``). A host name may stand
for several addresses; they are tried in the resolver's order.
"""

from __future__ import annotations

import re
import socket
from typing import List, Tuple

from .errors import ConfigError, Unreachable
from .names import escape, show

Address = Tuple[str, int]
MAX_PORT = 65535
_PORT = re.compile("[0-9]{1,5}")
EXPECTED = "expected HOST:PORT, for example 127.0.0.1:1234 or [::1]:1234"


def parse(text: str) -> Address:
    """Host and port. Raises ``ConfigError``."""
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    named = host and colon and escape(host.encode("utf-8", "replace")) == host
    if not named or not _PORT.fullmatch(port) or int(port) > MAX_PORT:
        raise ConfigError(f"'{show(text)}' is not an address; {EXPECTED}")
    return host, int(port)


def format_address(address: Tuple[object, ...]) -> str:
    """The address as ``parse`` reads it; also for the longer tuples of IPv6 sockets."""
    host, port = str(address[0]), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(family: int, place: Tuple[object, ...]) -> bool:
    """Whether only this machine can reach a socket address, as ``resolve`` or a socket gives it.

    That is 127.0.0.0/8 (RFC 1122, 3.2.1.3), ::1 (RFC 4291, 2.5.3), and the former written as the
    latter.
    """
    host = str(place[0])
    if family == socket.AF_INET6:
        return host.partition("%")[0] == "::1" or host.startswith("::ffff:127.")
    return family == socket.AF_INET and host.startswith("127.")


def resolve(address: Address) -> List[Tuple[int, Tuple[object, ...]]]:
    """Family and socket address of each thing the address stands for, at least one.

    Asks the system's resolver, and waits for it. Raises ``Unreachable``.
    """
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
