"""One non-blocking socket: connect, receive, send, send a file.

Rules: this is the only place that knows EAGAIN. Every method does at once what
can be done at once. ``None`` means that nothing could be done and the caller
has to wait until the socket is ready. A connection that broke raises
``ConnectionFailed``. TLS, should it come, comes in here and nowhere else: its
wants-read and wants-write are one more reason for ``None``.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from typing import Optional, Tuple, Union

from .errors import ConnectionFailed, Unreachable

HAS_SENDFILE = hasattr(os, "sendfile")

# Linux: what is sent so waits for what follows, and then leaves in one segment with it; and so
# it waits for nothing at all when the next thing is the end (tcp(7), TCP_CORK).
_MORE = getattr(socket, "MSG_MORE", 0)

# What sendfile(2) says where it does not work for this kind of file or socket.
_NO_SENDFILE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EOVERFLOW}

# What it says when the disk is at fault, not the peer.
_FILE_FAILED = {errno.EIO, errno.ESTALE, errno.EBADF, errno.EISDIR}

_COPY_BYTES = 128 * 1024  # how much the stand-in for sendfile reads at once


class Stream:
    """One socket, which it makes non-blocking and owns from then on."""

    __slots__ = ("peer", "socket")

    def __init__(self, sock: socket.socket, peer: str) -> None:
        """``peer`` is the other end's name in messages."""
        sock.setblocking(False)
        self.socket = sock
        self.peer = peer

    def receive(self, buffer: memoryview) -> Optional[int]:
        """Receives into ``buffer``; how many bytes, 0 at the peer's end, None for not now."""
        try:
            return self.socket.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    def send(self, data: Union[bytes, memoryview], more: bool = False) -> Optional[int]:
        """Sends what fits; how many bytes, None for not now.

        ``more``: something follows at once, be it only the end.
        """
        try:
            return self.socket.send(data, _MORE if more else 0)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error

    def send_file(self, fd: int, offset: int, count: int) -> Optional[int]:
        """Sends up to ``count`` bytes of an open file from ``offset`` on.

        How many bytes, 0 when the file ends before ``offset``, None for not now.
        ``sendfile(2)`` where it is to be had; otherwise by reading and sending.
        Raises ``OSError`` when it is the file that cannot be read.
        """
        try:
            if HAS_SENDFILE:
                try:
                    return os.sendfile(self.socket.fileno(), fd, offset, count)
                except OSError as error:
                    if error.errno not in _NO_SENDFILE:
                        raise
            os.lseek(fd, offset, os.SEEK_SET)
            data = os.read(fd, min(count, _COPY_BYTES))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _FILE_FAILED:
                raise
            raise self._broken(error) from error
        return self.send(data) if data else 0

    def end(self) -> None:
        """Tells the peer that nothing more will be sent; receiving goes on."""
        try:  # suppress() would cost each small request half a microsecond
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the peer is gone: then it needs no telling

    def close(self) -> None:
        """Closes the socket. What was sent is still delivered, unless unread bytes are left."""
        self.socket.close()

    def _broken(self, error: OSError) -> ConnectionFailed:
        reason = error.strerror or str(error)
        return ConnectionFailed(f"{self.peer}: the connection broke: {reason}; try again")


def no_delay(sock: socket.socket) -> None:
    """Lets small messages leave at once, for this socket and those that it accepts.

    Without it, one can wait for 40 ms for the acknowledgement of the one before (tcp(7)).
    """
    with suppress(OSError):  # not a TCP socket
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def connect(family: int, address: Union[Tuple[object, ...], str], peer: str) -> Stream:
    """A stream that is being connected; writable when that is settled, see ``settle``.

    Raises ``Unreachable``, or ``ConnectionFailed`` when this process is out of
    descriptors.
    """
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            reason = (error.strerror or str(error)).lower()
            raise ConnectionFailed(f"{reason}; do less at once: --parallel N") from error
        raise refused(peer, error) from error
    stream = Stream(sock, peer)
    no_delay(sock)
    try:
        sock.connect(address)
    except BlockingIOError as error:
        if isinstance(address, str):  # a Unix socket is connected at once or not at all (unix(7))
            stream.close()
            raise Unreachable(
                f"cannot connect to {peer}: too many wait there; try again"
            ) from error
        return stream
    except OSError as error:
        stream.close()
        raise refused(peer, error) from error
    return stream


def settle(stream: Stream) -> None:
    """Raises ``Unreachable`` when the connection that was begun has come to nothing."""
    code = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise refused(stream.peer, OSError(code, os.strerror(code)))


def refused(peer: str, error: OSError) -> Unreachable:
    """The error of a connection that could not be made."""
    missing = error.errno in (errno.ECONNREFUSED, errno.ENOENT)  # ENOENT: of a Unix socket
    hint = "is it running? start it with: serve" if missing else "check the address and the network"
    reason = (error.strerror or str(error)).lower()
    return Unreachable(f"cannot connect to {peer}: {reason}; {hint}")
