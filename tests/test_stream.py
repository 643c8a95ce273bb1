"""A stream does at once what can be done at once, says None for the rest, and names its errors."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from backup import stream as stream_module
from backup.errors import ConnectionFailed, Unreachable
from backup.stream import Stream, connect, no_delay, settle
from tests.helpers import WAIT_SECONDS, read_all, reset

Ends = Tuple[Stream, socket.socket]
FileOf = Callable[[bytes], int]

PEER = "127.0.0.1:1234"
NO_SENDFILE = [errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP, errno.EOVERFLOW]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(WAIT_SECONDS)
        yield sock


@pytest.fixture
def ends(listener: socket.socket) -> Iterator[Ends]:
    """A stream and its peer, a plain blocking socket, connected over TCP."""
    with socket.create_connection(listener.getsockname(), timeout=WAIT_SECONDS) as ours:
        peer, _ = listener.accept()
        with peer:
            peer.settimeout(WAIT_SECONDS)
            yield Stream(ours, PEER), peer


@pytest.fixture
def local_ends() -> Iterator[Ends]:
    """The same over a Unix socket, where nothing is under way: full is full."""
    ours, peer = socket.socketpair()
    with ours, peer:
        peer.settimeout(WAIT_SECONDS)
        yield Stream(ours, PEER), peer


@pytest.fixture
def file_of(tmp_path: Path) -> Iterator[FileOf]:
    """Makes a file and opens it; closed when the test is over."""
    with ExitStack() as stack:

        def make(content: bytes) -> int:
            (tmp_path / "file").write_bytes(content)
            fd = os.open(tmp_path / "file", os.O_RDONLY)
            stack.callback(os.close, fd)
            return fd

        yield make


def wait_readable(stream: Stream) -> None:
    """Until something, be it the end or an error, is there to be received."""
    assert select.select([stream.socket], [], [], WAIT_SECONDS)[0]


def fill(stream: Stream) -> int:
    """Sends until nothing more fits; how many bytes that was."""
    sent = 0
    while True:
        count = stream.send(bytes(1 << 16))
        if count is None:
            return sent
        sent += count


def raising(number: int) -> Callable[..., int]:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return fail


def not_to_be_called(*_: object) -> int:
    raise AssertionError("called")


# Receiving and sending.


def test_it_is_non_blocking(ends: Ends) -> None:
    assert ends[0].socket.getblocking() is False


def test_small_messages_are_not_held_back_on_either_end() -> None:
    with socket.socket() as listener:
        no_delay(listener)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client = connect(socket.AF_INET, listener.getsockname(), "server")
        accepted, _ = listener.accept()
        for sock in (client.socket, accepted):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            sock.close()


def test_what_more_follows_waits_for_leaves_with_it(ends: Ends) -> None:
    stream, peer = ends
    assert stream.send(b"abc", more=True) == 3
    stream.end()
    assert read_all(peer) == b"abc"


def test_a_socket_that_is_not_tcp_will_do(local_ends: Ends) -> None:
    stream, peer = local_ends
    assert stream.socket.getblocking() is False
    assert stream.send(b"abc") == 3
    assert peer.recv(100) == b"abc"


def test_it_receives_what_is_there_into_the_buffer(ends: Ends) -> None:
    stream, peer = ends
    buffer = bytearray(b"........")
    peer.sendall(b"hello")
    wait_readable(stream)
    assert stream.receive(memoryview(buffer)) == 5
    assert buffer == b"hello..."


def test_it_receives_no_more_than_the_buffer_holds(ends: Ends) -> None:
    stream, peer = ends
    buffer = bytearray(4)
    peer.sendall(b"hello")
    wait_readable(stream)
    assert stream.receive(memoryview(buffer)) == 4
    assert stream.receive(memoryview(buffer)) == 1
    assert buffer == b"oell"


def test_none_means_that_nothing_is_there_yet(ends: Ends) -> None:
    stream, _ = ends
    assert stream.receive(memoryview(bytearray(4))) is None


def test_zero_means_that_the_peer_has_ended(ends: Ends) -> None:
    stream, peer = ends
    peer.shutdown(socket.SHUT_WR)
    wait_readable(stream)
    assert stream.receive(memoryview(bytearray(4))) == 0
    assert stream.send(b"it still hears") == 14


def test_it_sends_what_fits_and_then_none_until_the_peer_reads(local_ends: Ends) -> None:
    stream, peer = local_ends
    sent = fill(stream)
    assert stream.send(b"more") is None
    received = 0
    while received < sent:
        received += len(peer.recv(1 << 20))
    assert stream.send(b"more") == 4


def test_it_sends_a_part_of_what_does_not_fit_as_a_whole(ends: Ends) -> None:
    stream, peer = ends
    data = bytes(range(256)) * (1 << 17)
    sent = stream.send(memoryview(data))
    assert sent is not None
    assert 0 < sent < len(data)
    stream.end()
    assert read_all(peer) == data[:sent]


def test_receiving_from_a_peer_that_reset_the_connection_names_the_peer(ends: Ends) -> None:
    stream, peer = ends
    reset(peer)
    wait_readable(stream)
    with pytest.raises(ConnectionFailed, match=f"^{PEER}: .*reset by peer") as caught:
        stream.receive(memoryview(bytearray(4)))
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    assert not isinstance(caught.value, Unreachable)


def test_sending_to_a_peer_that_reset_the_connection_names_the_peer(ends: Ends) -> None:
    stream, peer = ends
    reset(peer)
    wait_readable(stream)
    with pytest.raises(ConnectionFailed, match=f"^{PEER}: "):
        stream.send(b"more")


# Sending a file: by sendfile(2), without it, and where it refuses.


@pytest.fixture(
    params=["sendfile", "no sendfile", *NO_SENDFILE],
    ids=lambda way: errno.errorcode.get(way, way),
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves only this way to send a file."""
    if request.param == "sendfile":
        monkeypatch.setattr(os, "read", not_to_be_called)
    elif request.param == "no sendfile":
        monkeypatch.setattr(stream_module, "HAS_SENDFILE", False)
        monkeypatch.setattr(os, "sendfile", not_to_be_called)
    else:
        monkeypatch.setattr(os, "sendfile", raising(request.param))


@pytest.mark.usefixtures("way")
class TestEveryWay:
    def test_a_file_is_sent_from_the_offset_and_no_more_than_asked(
        self, ends: Ends, file_of: FileOf
    ) -> None:
        stream, peer = ends
        fd = file_of(b"0123456789")
        assert stream.send_file(fd, 7, 100) == 3
        assert stream.send_file(fd, 0, 2) == 2
        assert stream.send_file(fd, 3, 1) == 1
        stream.end()
        assert read_all(peer) == b"789" + b"01" + b"3"

    @pytest.mark.parametrize("offset", [10, 11, 1 << 40])
    def test_zero_means_that_the_file_ends_before_the_offset(
        self, offset: int, ends: Ends, file_of: FileOf
    ) -> None:
        stream, _ = ends
        assert stream.send_file(file_of(b"0123456789"), offset, 100) == 0

    def test_a_large_file_is_sent_piece_by_piece_as_the_peer_reads(
        self, ends: Ends, file_of: FileOf
    ) -> None:
        stream, peer = ends
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        content = os.urandom(1 << 20) * 4
        fd = file_of(content)
        received: List[bytes] = []
        reader = threading.Thread(target=lambda: received.append(read_all(peer)))
        offset = waits = 0
        while offset < len(content):
            count = stream.send_file(fd, offset, len(content) - offset)
            if count is not None:
                offset += count
                continue
            waits += 1
            if waits == 1:  # nobody has read before, so that the socket had to become full
                reader.start()
            assert select.select([], [stream.socket], [], WAIT_SECONDS)[1]
        stream.end()
        reader.join()
        assert waits
        assert received == [content]

    def test_none_means_that_nothing_fits(self, local_ends: Ends, file_of: FileOf) -> None:
        stream, _ = local_ends
        fd = file_of(b"0123456789")
        fill(stream)
        assert stream.send_file(fd, 0, 10) is None

    def test_a_connection_that_broke_names_the_peer(self, ends: Ends, file_of: FileOf) -> None:
        stream, peer = ends
        fd = file_of(b"0123456789")
        reset(peer)
        wait_readable(stream)
        with pytest.raises(ConnectionFailed, match=f"^{PEER}: "):
            stream.send_file(fd, 0, 10)


def test_without_sendfile_it_holds_only_a_little_of_the_file_in_memory(
    ends: Ends, file_of: FileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = ends
    fd = file_of(bytes(1 << 20))
    asked: List[int] = []
    read = os.read

    def count_and_read(fd: int, count: int) -> bytes:
        asked.append(count)
        return read(fd, count)

    monkeypatch.setattr(stream_module, "HAS_SENDFILE", False)
    monkeypatch.setattr(os, "read", count_and_read)
    stream.send_file(fd, 0, 1 << 20)
    assert asked == [128 * 1024]


def test_a_file_that_cannot_be_read_is_not_the_peers_fault(
    ends: Ends, file_of: FileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = ends
    fd = file_of(b"0123456789")
    monkeypatch.setattr(os, "read", not_to_be_called)
    monkeypatch.setattr(os, "sendfile", raising(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        stream.send_file(fd, 0, 10)


def test_a_file_that_cannot_be_read_without_sendfile_is_not_either(
    ends: Ends, file_of: FileOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, _ = ends
    fd = file_of(b"0123456789")
    monkeypatch.setattr(stream_module, "HAS_SENDFILE", False)
    monkeypatch.setattr(os, "read", raising(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        stream.send_file(fd, 0, 10)


# The end.


def test_ending_tells_the_peer_and_receiving_goes_on(ends: Ends) -> None:
    stream, peer = ends
    stream.send(b"bye")
    stream.end()
    assert read_all(peer) == b"bye"
    peer.sendall(b"and you")
    wait_readable(stream)
    assert stream.receive(memoryview(bytearray(100))) == 7


def test_ending_a_connection_that_is_gone_does_nothing(ends: Ends) -> None:
    stream, peer = ends
    reset(peer)
    wait_readable(stream)
    with pytest.raises(ConnectionFailed):
        stream.receive(memoryview(bytearray(4)))
    stream.end()
    stream.end()


def test_closing_delivers_what_was_sent(ends: Ends) -> None:
    stream, peer = ends
    sent = fill(stream)
    stream.close()
    assert len(read_all(peer)) == sent


# Connecting.


def wait_settled(stream: Stream) -> None:
    assert select.select([], [stream.socket], [], WAIT_SECONDS)[1]
    settle(stream)


def test_a_connection_that_was_made_can_be_used(listener: socket.socket) -> None:
    stream = connect(socket.AF_INET, listener.getsockname(), PEER)
    peer, _ = listener.accept()
    with stream.socket, peer:
        wait_settled(stream)
        assert stream.send(b"hello") == 5
        assert peer.recv(100) == b"hello"


def test_where_nobody_listens_the_message_says_how_to_start_the_server() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # nobody else takes the port, and nobody listens there
        stream = connect(socket.AF_INET, bound.getsockname(), PEER)
        with stream.socket, pytest.raises(Unreachable) as caught:
            wait_settled(stream)
    assert str(caught.value) == (
        f"cannot connect to {PEER}: connection refused; is it running? start it with: serve"
    )


def test_another_failure_to_connect_points_at_address_and_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket.socket, "connect", raising(errno.ENETUNREACH))
    with pytest.raises(Unreachable) as caught:  # and no socket is left, says the fixture
        connect(socket.AF_INET, ("127.0.0.1", 9), PEER)
    assert str(caught.value) == (
        f"cannot connect to {PEER}: network is unreachable; check the address and the network"
    )


def test_a_connection_that_is_made_at_once_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")  # to such an address, connect(2) does not have to wait
        listener.listen()
        stream = connect(socket.AF_UNIX, "socket", PEER)
        with stream.socket:
            settle(stream)
            assert stream.send(b"hello") == 5


def test_a_unix_socket_on_which_too_many_wait_is_unreachable(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, ExitStack() as stack:
        listener.bind(path)
        listener.listen(0)
        stack.enter_context(connect(socket.AF_UNIX, path, PEER).socket)
        with pytest.raises(Unreachable, match="too many wait there; try again"):
            connect(socket.AF_UNIX, path, PEER)


def test_a_unix_socket_that_is_not_there_asks_whether_the_server_runs(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="no such file or directory; is it running"):
        connect(socket.AF_UNIX, str(tmp_path / "none"), PEER)


def test_a_process_that_is_out_of_descriptors_does_not_blame_the_network(
    listener: socket.socket,
) -> None:
    address = listener.getsockname()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(ConnectionFailed, match="too many open files") as caught:
            connect(socket.AF_INET, address, PEER)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not isinstance(caught.value, Unreachable)


def test_an_address_family_that_the_system_lacks_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="address family not supported"):
        connect(12345, ("127.0.0.1", 9), PEER)
