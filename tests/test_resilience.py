"""The whole server against what clients and machines do to it, over real sockets.

However a request is cut, stalled, broken or followed by more, whoever else is
served meanwhile and whatever dies in between: an answer arrives, a name holds
one whole file that some BACKUP sent, and nothing is left behind.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Set, Tuple

import pytest

from backup.client import Client
from backup.exchange import Backup, Retrieve
from backup.settings import Settings
from tests.conftest import ServerFactory
from tests.helpers import (
    ROOT,
    WAIT_SECONDS,
    RunningServer,
    ask,
    connect,
    examples,
    file_payload,
    read_all,
    request,
    reset,
    response,
)

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
KIB, MIB = 1 << 10, 1 << 20
EMPTY_LIST = response(212, b"", b"\0\0\0\0")
NOBODY = 2**32 - 1  # a user who stores nothing


def settle(server: RunningServer) -> None:
    """Returns when the server has taken all that was sent to it before.

    It accepts in order, and what was there when it accepted is read in the same turn.
    """
    assert ask(server.address, request(NOBODY, LIST)) == EMPTY_LIST


def put(address: Tuple[str, int], user_id: int, name: bytes, content: bytes) -> None:
    assert ask(address, request(user_id, BACKUP, name, content)) == response(210, name)


def get(address: Tuple[str, int], user_id: int, name: bytes) -> Optional[bytes]:
    """The stored file, None if there is none."""
    answer = ask(address, request(user_id, RETRIEVE, name))
    if answer == response(1003, name):
        return None
    content = answer[9 + len(name) + 4 :]
    assert answer == response(212, name, file_payload(content))
    return content


def about(sock: socket.socket) -> Callable[[str], bool]:
    """Tells which lines of the log are about this client."""
    host, port = sock.getsockname()
    field = f" peer={host}:{port} "
    return lambda line: field in f"{line} "


@contextmanager
def child_server(root: Path) -> Iterator[Tuple[subprocess.Popen[bytes], Tuple[str, int]]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "backup", "serve", "--listen", "127.0.0.1:0"]
    child = subprocess.Popen([*command, "--root", str(root)], cwd=ROOT, stderr=subprocess.PIPE)
    with child:
        assert child.stderr is not None
        try:
            yield child, ("127.0.0.1", int(child.stderr.readline().rsplit(b":", 1)[1]))
        finally:
            child.terminate()  # its clients are gone by then: it ends at once


# However the bytes are cut

Cutter = Callable[[bytes], List[bytes]]


def whole(data: bytes) -> List[bytes]:
    return [data]


def byte_by_byte(data: bytes) -> List[bytes]:
    return [data[i : i + 1] for i in range(len(data))]


def at_random(seed: int) -> Cutter:
    def cut(data: bytes) -> List[bytes]:
        chance = random.Random(seed)
        places = sorted(chance.sample(range(len(data) + 1), 3))
        return [data[i:j] for i, j in zip([0, *places], [*places, len(data)])]

    return cut


CUTTERS = {
    "whole": whole,
    "byte by byte": byte_by_byte,
    **{f"at random {seed}": at_random(seed) for seed in range(1, 9)},
}


@pytest.mark.parametrize("trailing", [b"", b"\0", b"more, and more"], ids=["", "0", "more"])
@pytest.mark.parametrize("cut", CUTTERS.values(), ids=CUTTERS)
def test_the_examples_of_the_protocol_are_answered_to_the_letter(
    server: RunningServer, cut: Cutter, trailing: bytes
) -> None:
    for end in (False, True):
        for example in examples():
            answer = ask(server.address, *cut(example.request + trailing), end=end)
            assert answer == example.response, example.title


def test_clients_that_end_their_side_first_are_served(server: RunningServer) -> None:
    content = random.Random(1).randbytes(3 * MIB)
    upload = request(11, BACKUP, b"a", content)
    assert ask(server.address, upload, end=True) == response(210, b"a")
    listing = response(212, b"", b"\1\0\0\0\1\0a")
    assert ask(server.address, request(11, LIST), end=True) == listing
    found = response(212, b"a", file_payload(content))
    assert ask(server.address, request(11, RETRIEVE, b"a"), end=True) == found
    assert ask(server.address, request(11, DELETE, b"a"), end=True) == response(211, b"a")


@pytest.mark.parametrize("version", [0, 2, 7, 255])
def test_another_version_is_served_and_warned_about(server: RunningServer, version: int) -> None:
    requests = [
        (request(11, BACKUP, b"a", b"xyz", version), response(210, b"a")),
        (request(11, LIST, version=version), response(212, b"", b"\1\0\0\0\1\0a")),
        (request(11, RETRIEVE, b"a", version=version), response(212, b"a", file_payload(b"xyz"))),
        (request(11, DELETE, b"a", version=version), response(211, b"a")),
    ]
    for data, answer in requests:
        assert ask(server.address, data) == answer
    server.stop()
    warning = f"unexpected protocol version {version}, expected 1 peer="
    assert sum(line.startswith(warning) for line in server.lines) == len(requests)


# Uploads that end too early

OLDER = b"what was stored before"
NAME = b"name"
UPLOAD = request(11, BACKUP, NAME, random.Random(2).randbytes(40_000))
NAMED = 8 + len(NAME)  # where the filename is whole


def cuts() -> List[int]:
    """Every byte of the fields, some of the payload, and its last."""
    payload = range(NAMED + 4, len(UPLOAD))
    return [*range(NAMED + 4), *sorted(random.Random(3).sample(payload, 20)), len(UPLOAD) - 1]


def check_untouched(server: RunningServer) -> None:
    assert server.stored(11) == [NAME.decode()]
    assert (server.root / "11" / NAME.decode()).read_bytes() == OLDER
    assert server.temporary() == []


def test_an_upload_that_ends_early_is_answered_where_the_protocol_says_so(
    server: RunningServer,
) -> None:
    put(server.address, 11, NAME, OLDER)
    for length in cuts():
        answer = ask(server.address, UPLOAD[:length], end=True)
        assert answer == (response(1001, NAME) if length >= NAMED else b""), length
        check_untouched(server)
    assert get(server.address, 11, NAME) == OLDER


@pytest.mark.parametrize("leave", [reset, socket.socket.close], ids=["RST", "FIN"])
def test_an_upload_whose_client_goes_changes_nothing(
    server: RunningServer, leave: Callable[[socket.socket], None]
) -> None:
    put(server.address, 11, NAME, OLDER)
    for length in cuts():
        with connect(server.address) as sock:
            wanted = about(sock)
            sock.sendall(UPLOAD[:length])
            settle(server)
            leave(sock)
        server.wait_for_line(wanted)
        check_untouched(server)
    assert get(server.address, 11, NAME) == OLDER


def test_a_client_that_goes_in_the_middle_of_its_answer_harms_nobody(
    server: RunningServer,
) -> None:
    content = random.Random(4).randbytes(16 * MIB)  # more than the buffers of both sockets hold
    put(server.address, 11, NAME, content)
    for leave in (reset, socket.socket.close):
        with connect(server.address) as sock:
            wanted = about(sock)
            sock.sendall(request(11, RETRIEVE, NAME))
            assert sock.recv(100)
            leave(sock)
        assert server.wait_for_line(wanted).endswith(" reason=connection")
    assert get(server.address, 11, NAME) == content


def test_a_server_that_is_killed_leaves_the_older_file_and_the_next_one_sweeps(
    tmp_path: Path, serve: ServerFactory
) -> None:
    root = tmp_path / "store"
    with child_server(root) as (child, address):
        put(address, 11, NAME, OLDER)
        with connect(address) as sock:
            sock.sendall(UPLOAD[:-1])
            assert ask(address, request(NOBODY, LIST)) == EMPTY_LIST
            child.kill()
            child.wait()
    assert len(list((root / ".tmp").iterdir())) == 1
    server = serve()
    assert server.root == root
    check_untouched(server)
    assert get(server.address, 11, NAME) == OLDER


# Clients that stall


def test_stalled_clients_keep_nobody_waiting_and_are_served_when_they_go_on(
    serve: ServerFactory,
) -> None:
    server = serve(Settings(header_seconds=10 * WAIT_SECONDS))
    large = random.Random(5).randbytes(24 * MIB)
    put(server.address, 1, b"large", large)  # the second line of the log
    upload = request(2, BACKUP, b"0123456789", random.Random(6).randbytes(10_000))
    stalls = [0, 3, 12, 20, 5_000]  # nothing, in the header, the filename, the size, the payload
    with ExitStack() as stack:
        reader = stack.enter_context(closing(socket.socket()))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
        reader.settimeout(WAIT_SECONDS)
        reader.connect(server.address)
        reader.sendall(request(1, RETRIEVE, b"large"))
        stalled: List[Tuple[socket.socket, bytes]] = []
        for user_id in range(1000, 1300):
            data = struct.pack("<I", user_id) + upload[4:]
            sock = stack.enter_context(connect(server.address))
            stall = stalls[user_id % len(stalls)]
            sock.sendall(data[:stall])
            stalled.append((sock, data[stall:]))
        began = time.monotonic()
        for _ in range(100):
            settle(server)
        print(f"100 LISTs beside 301 stalled clients: {time.monotonic() - began:.3f} s")
        assert {line.split()[0] for line in server.lines[2:]} == {f"user={NOBODY}"}

        for sock, rest in stalled:
            sock.sendall(rest)
        for sock, _ in stalled:
            assert read_all(sock) == response(210, b"0123456789")
        assert read_all(reader) == response(212, b"large", file_payload(large))
    for user_id in range(1000, 1300):
        stored = (server.root / str(user_id) / "0123456789").read_bytes()
        assert stored == upload[-10_000:]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_stalled_clients_cost_no_processor_time(tmp_path: Path) -> None:
    requests = {
        "nothing": b"",
        "in the header": request(1, LIST)[:3],
        "in the payload": request(1, BACKUP, b"a", b"xyz")[:-1],
        "refused, in the payload": request(1, BACKUP, b"..", b"xyz")[:-1],
        "reads no answer": request(1, RETRIEVE, b"large"),
        "reads no answer, sends no more": request(1, RETRIEVE, b"large"),
        "answered": request(1, LIST),
    }
    with ExitStack() as stack:
        child, address = stack.enter_context(child_server(tmp_path / "store"))
        put(address, 1, b"large", bytes(16 * MIB))
        socks = {what: stack.enter_context(connect(address)) for what in requests}
        for what, data in requests.items():
            socks[what].sendall(data)
        socks["reads no answer, sends no more"].shutdown(socket.SHUT_WR)
        assert read_all(socks["answered"]).startswith(response(212)[:3])
        before = cpu_seconds(child.pid)
        socks["in the payload"].settimeout(0.5)
        with pytest.raises(socket.timeout):
            socks["in the payload"].recv(1)
        assert cpu_seconds(child.pid) - before < 0.1


# Clients that say too much


@pytest.mark.parametrize("name", [b"", b"..", b"a/b", b"\xff"])
def test_a_client_that_pushes_a_refused_upload_before_it_reads_gets_its_answer(
    server: RunningServer, name: bytes
) -> None:
    payload = bytes(8 * MIB)
    assert ask(server.address, request(11, BACKUP, name, payload)) == response(1001, name)
    assert ask(server.address, request(11, BACKUP, b"a", b"xyz")) == response(210, b"a")


def test_a_client_that_pushes_a_part_of_an_upload_too_large_gets_its_answer(
    server: RunningServer,
) -> None:
    data = request(11, BACKUP, b"a", bytes(8 * MIB), size=2**32 - 1)
    assert ask(server.address, data, end=True) == response(1001, b"a")
    assert server.stored(11) == []


def test_bytes_behind_a_request_are_discarded_and_the_answer_arrives_whole(
    server: RunningServer,
) -> None:
    content = random.Random(7).randbytes(16 * MIB)
    more = bytes(6 * MIB)
    upload = request(11, BACKUP, b"a", content)
    found = response(212, b"a", file_payload(content))
    assert ask(server.address, upload + more) == response(210, b"a")
    assert ask(server.address, request(11, LIST) + more) == response(212, b"", b"\1\0\0\0\1\0a")
    assert ask(server.address, request(11, RETRIEVE, b"a") + more) == found
    assert ask(server.address, request(11, RETRIEVE, b"b") + more) == response(1003, b"b")
    assert ask(server.address, request(11, 99, b"a") + more) == response(1001, b"a")
    assert ask(server.address, request(11, DELETE, b"a") + more) == response(211, b"a")


# Many at once


def test_the_files_of_200_clients_at_once_come_back_as_sent(
    server: RunningServer, tmp_path: Path
) -> None:
    chance = random.Random(8)
    there, back = tmp_path / "there", tmp_path / "back"
    there.mkdir()
    back.mkdir()
    contents: Dict[str, bytes] = {}
    for number in range(200):
        contents[f"file {number}"] = chance.randbytes(chance.randint(1, 64 * KIB))
    for name, content in contents.items():
        (there / name).write_bytes(content)
    with Client(server.address, user_id=0) as client:
        users = {name: user_id % 20 for user_id, name in enumerate(contents)}
        up = [Backup(there / name, name, user_id) for name, user_id in users.items()]
        assert [o.error for o in client.run(up, parallel=200)] == [None] * 200
        down = [Retrieve(name, back / name, user_id=user_id) for name, user_id in users.items()]
        assert [o.error for o in client.run(down, parallel=200)] == [None] * 200
    assert {name: (back / name).read_bytes() for name in contents} == contents
    assert server.temporary() == []


def test_every_read_beside_many_writers_is_one_whole_file(server: RunningServer) -> None:
    writers, versions = 8, 12
    sizes = {value: MIB + 1_001 * value for value in range(writers * versions)}
    done = threading.Event()
    seen: Set[int] = set()
    faults: List[str] = []

    def write(writer: int) -> None:
        for value in range(writer * versions, (writer + 1) * versions):
            data = request(11, BACKUP, b"shared", bytes([value]) * sizes[value])
            answer = ask(server.address, data)
            if answer != response(210, b"shared"):
                faults.append(f"write of {value} was answered {answer!r}")

    def read() -> None:
        while not done.is_set():
            content = get(server.address, 11, b"shared")
            if content is None:
                faults.append("it was missing")
            elif content != content[:1] * sizes.get(content[0], 0):
                faults.append(f"{len(content)} bytes of {set(content)}")
            else:
                seen.add(content[0])

    write(0)
    writing = [threading.Thread(target=write, args=(writer,)) for writer in range(1, writers)]
    reading = [threading.Thread(target=read) for _ in range(4)]
    for thread in [*reading, *writing]:
        thread.start()
    for thread in writing:
        thread.join()
    done.set()
    for thread in reading:
        thread.join()
    assert faults == []
    assert seen
    last = get(server.address, 11, b"shared")
    assert last is not None
    assert last[0] in {(writer + 1) * versions - 1 for writer in range(writers)}
    assert server.temporary() == []


# Where nobody may reach


def test_users_are_apart(server: RunningServer) -> None:
    put(server.address, 1, b"a", b"one")
    put(server.address, 2, b"a", b"two")
    put(server.address, 2, b"b", b"two")
    assert ask(server.address, request(3, RETRIEVE, b"a")) == response(1003, b"a")
    assert ask(server.address, request(1, RETRIEVE, b"b")) == response(1003, b"b")
    assert ask(server.address, request(1, DELETE, b"b")) == response(1002, b"b")
    assert ask(server.address, request(1, DELETE, b"a")) == response(211, b"a")
    assert get(server.address, 2, b"a") == b"two"
    assert ask(server.address, request(1, LIST)) == EMPTY_LIST
    listing = response(212, b"", b"\2\0\0\0\1\0a\1\0b")
    assert ask(server.address, request(2, LIST)) == listing


def tree(folder: Path) -> Dict[str, bytes]:
    """Every file below a folder, with its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_no_name_leaves_the_users_folder(server: RunningServer, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (server.root / "secret").write_bytes(b"secret")
    put(server.address, 1, b"a", b"one")
    put(server.address, 2, b"a", b"two")
    before = tree(tmp_path)
    for place in (".", "..", "../secret", "../2/a", "../../outside/secret", f"{outside}/secret"):
        for name in (place.encode(), place.replace("/", "\\").encode(), place.encode() + b"\0"):
            assert ask(server.address, request(1, RETRIEVE, name)) == response(1003, name)
            assert ask(server.address, request(1, DELETE, name)) == response(1002, name)
            assert ask(server.address, request(1, BACKUP, name, b"new")) == response(1001, name)
    assert tree(tmp_path) == before


def test_a_symbolic_link_in_a_users_folder_leads_nowhere(
    server: RunningServer, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    put(server.address, 1, b"a", b"one")
    folder = server.root / "1"
    (folder / "link").symlink_to(outside / "secret")
    (folder / "new").symlink_to(outside / "new")
    (folder / "folder").symlink_to(outside)
    for name in (b"link", b"new", b"folder"):
        assert ask(server.address, request(1, RETRIEVE, name)) == response(1003, name)
        assert ask(server.address, request(1, DELETE, name)) == response(1002, name)
        assert ask(server.address, request(1, BACKUP, name, b"new")) == response(1001, name)
    assert ask(server.address, request(1, LIST)) == response(212, b"", b"\1\0\0\0\1\0a")
    assert tree(outside) == {"secret": b"secret"}
    assert server.stored(1) == ["a", "folder", "link", "new"]


def test_a_users_folder_that_is_a_symbolic_link_is_not_followed(
    server: RunningServer, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (server.root / "1").symlink_to(outside)
    assert ask(server.address, request(1, LIST)) == response(1001)
    for name in (b"secret", b"other"):
        assert ask(server.address, request(1, RETRIEVE, name)) == response(1001, name)
        assert ask(server.address, request(1, DELETE, name)) == response(1002, name)
        assert ask(server.address, request(1, BACKUP, name, b"new")) == response(1001, name)
    assert tree(outside) == {"secret": b"secret"}
    assert server.temporary() == []


# A large file


def memory(pid: int) -> Tuple[int, int]:
    """The resident memory of a process, now and at most so far, in bytes."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    now, most = (int(fields[key].split()[0]) * KIB for key in ("VmRSS", "VmHWM"))
    return now, most


def pieces(count: int) -> Iterator[bytes]:
    """A large content in pieces of 1 MiB, each of which is another."""
    base = random.Random(9).randbytes(MIB - 4)
    for number in range(count):
        yield struct.pack("<I", number) + base


def test_a_large_file_passes_through_without_growing_the_server(tmp_path: Path) -> None:
    count = 256
    with child_server(tmp_path / "store") as (child, address):
        put(address, 11, b"warm", bytes(2 * MIB))
        assert get(address, 11, b"warm") == bytes(2 * MIB)
        before = memory(child.pid)

        sent, received = sha256(), sha256()
        with connect(address) as sock:
            sock.sendall(request(11, BACKUP, b"large", b"", size=count * MIB))
            for piece in pieces(count):
                sock.sendall(piece)
                sent.update(piece)
            assert read_all(sock) == response(210, b"large")
        after_upload = memory(child.pid)

        head = struct.pack("<BHHI", 1, 212, 5, count * MIB + 4) + b"large"
        head += struct.pack("<I", count * MIB)
        with connect(address) as sock, sock.makefile("rb") as answer:
            sock.sendall(request(11, RETRIEVE, b"large"))
            assert answer.read(len(head)) == head
            for piece in iter(lambda: answer.read(MIB), b""):
                received.update(piece)
        after = memory(child.pid)
    (tmp_path / "store" / "11" / "large").unlink()
    assert received.digest() == sent.digest()
    growth = [later - first for later, first in zip(after_upload + after, before * 2)]
    assert max(growth) < 16 * MIB, growth
