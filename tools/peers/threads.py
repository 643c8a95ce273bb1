"""The same protocol on ``socketserver.ThreadingTCPServer``: a thread per connection.

python3 -m tools.peers.threads --root DIR
"""

from __future__ import annotations

import os
import socketserver
import sys
import time
from typing import TextIO, Tuple

from tools.peers import reference
from tools.peers.reference import BACKUP, DELETE, LIST, RETRIEVE, SIZE, Store, answer


class Cut(Exception):
    """The connection ended inside a request."""


class Server(socketserver.ThreadingTCPServer):
    """Listens on a free loopback port."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, store: Store, log: TextIO) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store = store
        self.log = log


class Handler(socketserver.StreamRequestHandler):
    """One request; a thread of its own runs it."""

    server: Server

    def handle(self) -> None:
        began = time.monotonic()
        try:
            user, _, op, length = reference.REQUEST.unpack(self._exactly(reference.REQUEST.size))
            name = self._exactly(length)
        except Cut:
            return
        status, size = self._serve(user, op, name)
        seconds = time.monotonic() - began
        request = (user, op, name)
        self.server.log.write(
            reference.log_line(request, status, size, seconds, self.client_address)
        )

    def _serve(self, user: int, op: int, name: bytes) -> Tuple[int, int]:
        """Answers; the status and how many bytes the file or listing had."""
        store = self.server.store
        if op == RETRIEVE:
            return self._retrieve(user, name)
        if op == LIST:
            listing = store.listing(user)
            self.wfile.write(answer(reference.FOUND, b"", len(listing)) + listing)
            return reference.FOUND, len(listing)
        status, size = reference.FAILED, 0
        if op == BACKUP:
            status, size = self._backup(user, name)
        elif op == DELETE:
            status = store.delete(user, name)
        self.wfile.write(answer(status, name))
        return status, size

    def _retrieve(self, user: int, name: bytes) -> Tuple[int, int]:
        try:
            with open(self.server.store.path(user, name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = answer(reference.FOUND, name, SIZE.size + size) + SIZE.pack(size)
                if size < reference.LARGE:
                    self.wfile.write(head + file.read())
                else:
                    self.wfile.write(head)
                    self.connection.sendfile(file)
        except (FileNotFoundError, IsADirectoryError, ValueError):
            self.wfile.write(answer(reference.NOT_FOUND, name))
            return reference.NOT_FOUND, 0
        return reference.FOUND, size

    def _backup(self, user: int, name: bytes) -> Tuple[int, int]:
        temporary = self.server.store.temporary()
        try:
            (size,) = SIZE.unpack(self._exactly(SIZE.size))
            with open(temporary, "wb") as file:
                left = size
                while left:
                    piece = self._exactly(min(left, reference.LARGE))
                    file.write(piece)
                    left -= len(piece)
            if size == 0:
                raise ValueError("empty")
            self.server.store.put(temporary, self.server.store.path(user, name))
        except (Cut, OSError, ValueError):
            if os.path.exists(temporary):
                os.unlink(temporary)
            return reference.FAILED, 0
        return reference.STORED, size

    def _exactly(self, count: int) -> bytes:
        data = self.rfile.read(count)
        if len(data) < count:
            raise Cut
        return data


def main() -> None:
    chosen = reference.options("Serve with a thread per connection.", sys.argv[1:])
    with reference.open_log() as log, Server(Store(chosen.root), log) as server:
        reference.greet(server.server_address[1])
        server.serve_forever()


if __name__ == "__main__":
    main()
