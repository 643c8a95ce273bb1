"""The same protocol on ``asyncio`` streams: a coroutine per connection, one thread.

python3 -m tools.peers.streams --root DIR
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from asyncio import IncompleteReadError, StreamReader, StreamWriter
from typing import TextIO, Tuple

from tools.peers import reference
from tools.peers.reference import BACKUP, DELETE, LIST, RETRIEVE, SIZE, Store, answer


class Server:
    """What all connections share, and the coroutines that serve one."""

    def __init__(self, store: Store, log: TextIO) -> None:
        self.store = store
        self.log = log

    async def connected(self, reader: StreamReader, writer: StreamWriter) -> None:
        """Serves one connection."""
        try:
            await self._request(reader, writer)
        except ConnectionError:
            pass  # the client has gone
        finally:
            writer.close()

    async def _request(self, reader: StreamReader, writer: StreamWriter) -> None:
        began = time.monotonic()
        try:
            head = await reader.readexactly(reference.REQUEST.size)
            user, _, op, length = reference.REQUEST.unpack(head)
            name = await reader.readexactly(length)
        except IncompleteReadError:
            return
        if op == RETRIEVE:
            status, size = await self._retrieve(user, name, writer)
        elif op == LIST:
            listing = self.store.listing(user)
            status, size = reference.FOUND, len(listing)
            writer.write(answer(status, b"", size) + listing)
        else:
            status, size = reference.FAILED, 0
            if op == BACKUP:
                status, size = await self._backup(user, name, reader)
            elif op == DELETE:
                status = self.store.delete(user, name)
            writer.write(answer(status, name))
        await writer.drain()
        seconds = time.monotonic() - began
        peer = writer.get_extra_info("peername")
        self.log.write(reference.log_line((user, op, name), status, size, seconds, peer))

    async def _retrieve(self, user: int, name: bytes, writer: StreamWriter) -> Tuple[int, int]:
        try:
            with open(self.store.path(user, name), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = answer(reference.FOUND, name, SIZE.size + size) + SIZE.pack(size)
                if size < reference.LARGE:
                    writer.write(head + file.read())
                else:
                    writer.write(head)
                    await asyncio.get_running_loop().sendfile(writer.transport, file)
        except (FileNotFoundError, IsADirectoryError, ValueError):
            writer.write(answer(reference.NOT_FOUND, name))
            return reference.NOT_FOUND, 0
        return reference.FOUND, size

    async def _backup(self, user: int, name: bytes, reader: StreamReader) -> Tuple[int, int]:
        temporary = self.store.temporary()
        try:
            (size,) = SIZE.unpack(await reader.readexactly(SIZE.size))
            with open(temporary, "wb") as file:
                left = size
                while left:
                    piece = await reader.readexactly(min(left, reference.LARGE))
                    file.write(piece)
                    left -= len(piece)
            if size == 0:
                raise ValueError("empty")
            self.store.put(temporary, self.store.path(user, name))
        except (IncompleteReadError, OSError, ValueError):
            if os.path.exists(temporary):
                os.unlink(temporary)
            return reference.FAILED, 0
        return reference.STORED, size


async def serve(root: str, log: TextIO) -> None:
    """Listens on a free loopback port until it is cancelled."""
    ours = Server(Store(root), log)
    server = await asyncio.start_server(ours.connected, "127.0.0.1", 0, backlog=1024)
    reference.greet(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


def main() -> None:
    chosen = reference.options("Serve on asyncio streams.", sys.argv[1:])
    with reference.open_log() as log:
        asyncio.run(serve(chosen.root, log))


if __name__ == "__main__":
    main()
