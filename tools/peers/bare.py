"""The limit: bare sockets that do what moves the bytes, and nothing that makes a server of it.

python3 -m tools.peers.bare --root DIR [--fsync]

One connection at a time, no checks, no log, no temporary file. RETRIEVE is
``sendfile`` in a loop, BACKUP ``recv_into`` and ``write``, and LIST an empty list:
what a client on this machine could get from a server that costs nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys

from tools.peers.reference import (
    BACKUP,
    FOUND,
    LIST,
    REQUEST,
    RETRIEVE,
    SIZE,
    STORED,
    answer,
    greet,
)

BUFFER_BYTES = 1024 * 1024


def serve(sock: socket.socket, root: str, buffer: memoryview, fsync: bool) -> None:
    """One request, whose fields are there as soon as it is connected."""
    user, _, op, length = REQUEST.unpack(sock.recv(REQUEST.size, socket.MSG_WAITALL))
    name = sock.recv(length, socket.MSG_WAITALL) if length else b""
    path = f"{root}/{user}/{name.decode()}"
    if op == LIST:
        sock.sendall(answer(FOUND, b"", SIZE.size) + SIZE.pack(0))
    elif op == RETRIEVE:
        down(sock, path, name)
    elif op == BACKUP:
        (size,) = SIZE.unpack(sock.recv(SIZE.size, socket.MSG_WAITALL))
        up(sock, path, size, buffer, fsync)
        sock.sendall(answer(STORED, name))


def down(sock: socket.socket, path: str, name: bytes) -> None:
    """Sends a file."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        sock.sendall(answer(FOUND, name, SIZE.size + size) + SIZE.pack(size))
        sent = 0
        while sent < size:
            sent += os.sendfile(sock.fileno(), file.fileno(), sent, size - sent)


def up(sock: socket.socket, path: str, size: int, buffer: memoryview, fsync: bool) -> None:
    """Receives into a file, straight under its name."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb", buffering=0) as file:
        while size:
            count = sock.recv_into(buffer[: min(size, len(buffer))])
            if not count:
                return
            file.write(buffer[:count])
            size -= count
        if fsync:
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description="Move bytes, bare.")
    parser.add_argument("--root", required=True, metavar="DIR", help="keep the files in DIR")
    parser.add_argument("--fsync", action="store_true", help="flush each file to the disk")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        greet(listener.getsockname()[1])
        while True:
            sock, _ = listener.accept()
            with sock:
                serve(sock, chosen.root, buffer, chosen.fsync)


if __name__ == "__main__":
    main()
