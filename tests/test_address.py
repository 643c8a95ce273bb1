"""``HOST:PORT`` is read, shown and resolved, IPv6 in brackets; what is not one is explained."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Tuple

import pytest

from backup.address import (
    EXPECTED,
    UnixSocket,
    bound,
    format_address,
    is_loopback,
    parse,
    resolve,
)
from backup.errors import ConfigError, Unreachable


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1234", ("127.0.0.1", 1234)),
        ("localhost:0", ("localhost", 0)),
        ("backup.example.org:65535", ("backup.example.org", 65535)),
        ("[::1]:1234", ("::1", 1234)),
        ("[fe80::1%lo]:1", ("fe80::1%lo", 1)),
        ("  127.0.0.1:1234 \n", ("127.0.0.1", 1234)),
        ("0.0.0.0:0080", ("0.0.0.0", 80)),
    ],
)
def test_an_address_is_host_and_port(text: str, address: Tuple[str, int]) -> None:
    assert parse(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:",
        ":1234",
        "[]:1234",
        "*:1234",  # which a resolver may take for this machine alone
        "1234",
        "::1:1234",  # whose colon is it?
        "[::1]",
        "[::1:1234",
        "localhost:http",
        "localhost:-1",
        "localhost:+1",
        "localhost: 1",
        "localhost:1_0",
        "localhost:1.5",
        "localhost:١٢",
        "localhost:²",
        "localhost:65536",
        "localhost:99999999999999999999",
        "127.0.0.1\0.example.org:1",  # the system would look up what stands before the NUL
        pytest.param("localhost:" + "1" * 5000, id="5000 digits"),
    ],
)
def test_anything_else_is_refused_and_an_example_given(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).endswith(f" is not an address; {EXPECTED}")


def test_what_is_refused_is_shown_harmless() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("\x1b[31mlocalhost\nbackup: done")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 1234), "127.0.0.1:1234"),
        (("localhost", 0), "localhost:0"),
        (("::1", 1234), "[::1]:1234"),
        (("::1", 1234, 0, 0), "[::1]:1234"),
    ],
)
def test_an_address_is_shown_as_it_is_read(address: Tuple[object, ...], text: str) -> None:
    assert format_address(address) == text
    assert parse(text) == address[:2]


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.255.255.254", True),
        ("::1", True),
        ("::1%lo", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("128.0.0.1", False),
        ("10.127.0.1", False),
        ("::", False),
        ("::11", False),
        ("2001:db8::1", False),
        ("fe80::1", False),
        ("::ffff:0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, expected: bool) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    assert is_loopback(family, (host, 1234)) is expected


def test_an_address_of_a_family_that_is_not_known_is_not_taken_for_loopback() -> None:
    assert not is_loopback(socket.AF_NETLINK, ("127.0.0.1", 1))


@pytest.mark.parametrize(
    ("text", "path", "shown"),
    [
        ("unix:/run/backup.sock", "/run/backup.sock", "unix:/run/backup.sock"),
        (" unix:socket\n", "socket", "unix:socket"),
        ("unix:1234", "1234", "unix:1234"),
        ("unix:/two words", "/two words", "unix:/two\\x20words"),
        ("unix:/a:1", "/a:1", "unix:/a:1"),
        ("unix:/\x1b[31m", "/\x1b[31m", "unix:/\\x1b[31m"),
    ],
)
def test_a_unix_socket_is_a_path(text: str, path: str, shown: str) -> None:
    address = parse(text)
    assert address == UnixSocket(path)
    assert isinstance(address, UnixSocket)
    assert format_address(address) == shown
    assert resolve(address) == [(socket.AF_UNIX, path)]
    assert is_loopback(*resolve(address)[0])


@pytest.mark.parametrize("text", ["unix:", "unix: ", "unix:/a\0b"])
def test_a_path_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not an address; expected HOST:PORT"):
        parse(text)


def test_a_system_without_unix_sockets_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backup.address._AF_UNIX", None)
    with pytest.raises(Unreachable, match="this system has no Unix sockets; take HOST:PORT"):
        resolve(UnixSocket("/run/backup.sock"))


def test_the_address_of_a_bound_socket_is_read_from_it(tmp_path: Path) -> None:
    for family, place in (
        (socket.AF_INET, ("127.0.0.1", 0)),
        (socket.AF_INET6, ("::1", 0)),
    ):
        with socket.socket(family) as sock:
            sock.bind(place)
            assert bound(sock) == sock.getsockname()[:2]
    for path, shown in (
        (f"{tmp_path}/s", f"unix:{tmp_path}/s"),
        (f"\0{tmp_path}", f"unix:@{tmp_path}"),
    ):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)
            assert format_address(bound(sock)) == shown


def test_an_address_resolves_to_what_a_socket_takes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ((family, place),) = resolve(listener.getsockname())
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.connect(place)
            assert sock.getpeername() == listener.getsockname()


def test_an_ipv6_address_resolves_to_its_family() -> None:
    assert resolve(("::1", 1234)) == [(socket.AF_INET6, ("::1", 1234, 0, 0))]


def test_a_host_may_stand_for_several_addresses_in_the_resolvers_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, tcp = socket.SOCK_STREAM, socket.IPPROTO_TCP
    answer = [
        (socket.AF_INET6, stream, tcp, "", ("::1", 7, 0, 0)),
        (socket.AF_INET, stream, tcp, "", ("127.0.0.1", 7)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert resolve(("twice", 7)) == [
        (socket.AF_INET6, ("::1", 7, 0, 0)),
        (socket.AF_INET, ("127.0.0.1", 7)),
    ]


def test_a_host_nobody_knows_is_unreachable_and_the_reason_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(Unreachable) as caught:
        resolve(("no\x1bwhere", 7))
    assert str(caught.value) == (
        "cannot find no\\x1bwhere: Name or service not known; check the host name"
    )


@pytest.mark.parametrize("host", ["a" * 64, "..", "\ud800"])
def test_a_host_that_no_resolver_could_be_asked_for_is_unreachable(host: str) -> None:
    with pytest.raises(Unreachable, match="check the host name") as caught:
        resolve((host, 7))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none_does_not_become_another(port: int) -> None:
    with pytest.raises(Unreachable):
        resolve(("127.0.0.1", port))
