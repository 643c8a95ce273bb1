"""What a service manager hands over and wants to hear: a listening socket, and readiness.

Rules: the plain protocols of sd_listen_fds(3) and sd_notify(3), which other
managers speak too, and no library. What was handed over is taken once and its
variables are removed, so that no child takes it for its own.
"""

from __future__ import annotations

import os
import socket
from typing import Mapping, MutableMapping, Optional

from .errors import SetupFailed

FIRST_FD = 3  # SD_LISTEN_FDS_START
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def inherited_socket(
    environ: MutableMapping[str, str], first_fd: int = FIRST_FD
) -> Optional[socket.socket]:
    """The listening socket that this process was started with; None when it was not.

    Raises ``SetupFailed`` when what was handed over is not one such socket.
    """
    pid, count, _ = (environ.pop(name, "") for name in _LISTEN)
    if not count or pid != str(os.getpid()):  # nothing, or meant for another process
        return None
    if count != "1":
        raise SetupFailed(
            f"LISTEN_FDS hands over {count!a} sockets; expected 1: one ListenStream= a server"
        )
    try:
        os.set_inheritable(first_fd, False)
        sock = socket.socket(fileno=first_fd)
    except OSError as error:
        raise SetupFailed(
            f"descriptor {first_fd}, which LISTEN_FDS hands over, is not a socket:"
            f" {error.strerror or error}"
        ) from error
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        sock.close()
        raise SetupFailed(
            f"descriptor {first_fd}, which LISTEN_FDS hands over, does not listen for connections;"
            " use ListenStream= with Accept=no"
        )
    return sock


def notify(environ: Mapping[str, str], state: str) -> None:
    """Tells the service manager a state, such as ``READY=1``, if there is one who wants to hear.

    Does not wait. Raises ``SetupFailed`` when it cannot be told.
    """
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    place = f"\0{path[1:]}" if path.startswith("@") else path  # unix(7), abstract
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(state.encode("ascii"), place)
    except (OSError, AttributeError) as error:  # AttributeError: a system without Unix sockets
        reason = getattr(error, "strerror", None) or str(error)
        raise SetupFailed(f"cannot tell {state} to NOTIFY_SOCKET: {reason}") from error
