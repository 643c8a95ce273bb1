"""``serve``: what a server process does from its first line to its exit code."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import sys
import threading
from contextlib import suppress
from typing import Callable, List

import pytest

from backup import Server, systemd
from backup.cli import main
from tests.helpers import WAIT_SECONDS, connect, read_all, request, response, watchdog
from tests.test_client import unused_address
from tests.user import SERVE, USER, User, address_of, errors, reacting, sending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_says_where_it_listens_and_ends_at_a_signal(
    user: User, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    answers: List[bytes] = []

    def react(line: str) -> None:
        with connect(address_of(line)) as sock:
            sock.sendall(request(USER, 202))
            answers.append(read_all(sock))
        sending(number)(line)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(each) for each in numbers]
    with reacting(monkeypatch, ("", react)) as lines:
        assert main(SERVE) == 0
    assert answers == [response(212, b"", b"\0\0\0\0")]
    assert lines[1].startswith(f"[SERVER] user={USER} op=202 file= status=212 ")
    assert [signal.getsignal(each) for each in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert (user.folder / "store").is_dir()


def test_serve_works_where_there_is_no_sigterm(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGTERM")
    with reacting(monkeypatch, ("Listening", sending(signal.SIGINT))):
        assert main(SERVE) == 0


class Upload:
    """A BACKUP of which the server has the first half for sure."""

    def __init__(self) -> None:
        self.answer = b""

    def begin(self, line: str) -> None:
        address = address_of(line)
        self._sock = connect(address)
        self._sock.sendall(request(USER, 100, b"a", b"first", size=len(b"first half")))
        with connect(address) as sock:  # connections are taken in order
            sock.sendall(request(USER, 202))
            read_all(sock)

    def end(self, _line: str = "") -> None:
        self._sock.sendall(b" half")
        self.answer = read_all(self._sock)
        self._sock.close()

    def give_up(self) -> None:
        with suppress(ConnectionError):
            self.answer = read_all(self._sock)
        self._sock.close()


def test_serve_lets_running_requests_finish(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Upload()

    def begin(line: str) -> None:
        upload.begin(line)
        sending(signal.SIGTERM)(line)

    with reacting(monkeypatch, ("Listening", begin), ("Stopping", upload.end)):
        assert main(SERVE) == 0
    assert upload.answer == response(210, b"a")
    assert (user.folder / "store" / str(USER) / "a").read_bytes() == b"first half"


def test_a_second_signal_does_not_wait(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = Upload()

    def begin(line: str) -> None:
        upload.begin(line)
        sending(signal.SIGTERM)(line)

    reactions = (("Listening", begin), ("Stopping", sending(signal.SIGINT)))
    with reacting(monkeypatch, *reactions):
        assert main(SERVE) == 130
    upload.give_up()
    assert upload.answer == b""
    assert not (user.folder / "store" / str(USER)).exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--quiet", ["Listening"]),
        ("--root=store", ["Listening", "user="]),
        ("--verbose", ["Listening", "closed without a request", "user="]),
    ],
)
def test_serve_logs_as_much_as_it_is_told(
    user: User, monkeypatch: pytest.MonkeyPatch, option: str, expected: List[str]
) -> None:
    sock, (host, port) = unused_address()
    sock.close()

    def use() -> None:
        """Waits for the server, breaks one connection, completes another, and ends it."""
        while True:
            with suppress(ConnectionRefusedError):
                broken = connect((host, port))
                break
        with broken:
            broken.sendall(b"half")
            broken.shutdown(socket.SHUT_WR)
            read_all(broken)
        with connect((host, port)) as sock:
            sock.sendall(request(USER, 202))
            read_all(sock)
        sending(signal.SIGTERM)("")

    thread = threading.Thread(target=use)
    with reacting(monkeypatch) as lines:
        thread.start()
        assert main(["serve", "--listen", f"{host}:{port}", "--root", "store", option]) == 0
        thread.join(WAIT_SECONDS)
    logged = [line.partition("] ")[2] for line in lines]
    assert [line for line in expected if not any(text.startswith(line) for text in logged)] == []
    assert ("closed" in "".join(logged)) == ("closed" in "".join(expected))
    assert bool(logged) == bool(expected)


def test_serve_finds_its_address_and_root_by_itself(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    (user.folder / "server.info").write_text("127.0.0.1:0\n", encoding="ascii")
    monkeypatch.setenv("BACKUP_BASE_DIR", "elsewhere")
    with reacting(monkeypatch, ("Listening", sending(signal.SIGTERM))):
        assert main(["serve"]) == 0
    assert (user.folder / "elsewhere").is_dir()


def test_serve_on_a_port_that_is_taken_says_so(user: User) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = user.types("serve", "--listen", address)
    message = (
        f"cannot listen on {address}: address already in use;"
        " stop what listens there or take another port: --listen HOST:PORT"
    )
    assert said == ("", errors(message), 1)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_serve_where_other_machines_reach_it_has_to_be_allowed(
    user: User, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    arguments = ["serve", "--listen", f"{host}:0", "--root", "store"]
    out, err, code = user.types(*arguments)
    assert (out, code) == ("", 2)
    assert err.startswith(f"backup: will not listen on {host}:0: there are no passwords, ")
    assert err.endswith("; listen on 127.0.0.1, or allow it: --allow-anonymous\n")
    assert err.count("\n") == 1
    assert not (user.folder / "store").exists()
    with reacting(monkeypatch, (f"Listening on {host}:", sending(signal.SIGTERM))):
        assert main([*arguments, "--allow-anonymous"]) == 0


def test_serve_in_a_root_that_others_may_write_says_what_to_do(user: User) -> None:
    (user.folder / "store").mkdir(mode=0o777)
    (user.folder / "store").chmod(0o777)
    out, err, code = user.types(*SERVE)
    assert (out, code) == ("", 1)
    assert err.endswith("take that from them: chmod go-w\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_what_serve_makes_is_its_accounts_alone_whatever_the_umask(
    user: User, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    def use(line: str) -> None:
        with connect(address_of(line)) as sock:
            sock.sendall(request(USER, 100, b"a", b"xyz"))
            read_all(sock)
        sending(signal.SIGTERM)(line)

    before = os.umask(umask)
    try:
        with reacting(monkeypatch, ("Listening", use)):
            assert main(SERVE) == 0
    finally:
        assert os.umask(before) == umask
    store = user.folder / "store"
    modes = {path.name: path.stat().st_mode & 0o777 for path in (store, *store.rglob("*"))}
    assert modes == {"store": 0o700, ".tmp": 0o700, str(USER): 0o700, "a": 0o600}


def test_serve_on_a_unix_socket_is_its_accounts_alone(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = user.folder / "socket"
    seen: List[str] = []

    def use(line: str) -> None:
        seen.append(line)
        seen.append(oct(path.stat().st_mode & 0o777))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(request(USER, 202))
            seen.append(read_all(sock).hex())
        sending(signal.SIGTERM)(line)

    with reacting(monkeypatch, ("Listening", use)) as lines:
        assert main(["serve", "--listen", f"unix:{path}", "--root", "store"]) == 0
    expected = response(212, b"", b"\0\0\0\0").hex()
    assert seen == [f"[SERVER] Listening on unix:{path}\n", "0o600", expected]
    assert any(line.endswith(f" peer=unix:{path}\n") for line in lines)
    assert not path.exists()


def test_serve_answers_sigusr1_with_its_counters_even_when_it_is_quiet(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    reactions = (
        ("Listening", sending(signal.SIGUSR1)),
        ("Counters open=0 total=0 refused=0 bytes_in=0", sending(signal.SIGTERM)),
    )
    before = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)]
    with reacting(monkeypatch, *reactions) as lines:
        assert main([*SERVE, "--quiet"]) == 0
    assert len(lines) == 3
    assert "Counters" in lines[-1]  # and at the end
    after = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGHUP)]
    assert after == before


def test_serve_logs_json_when_it_is_told(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def use(line: str) -> None:
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        assert found is not None
        with connect(("127.0.0.1", int(found[1]))) as sock:
            sock.sendall(request(USER, 200, "ü x\n".encode()))
            read_all(sock)
        sending(signal.SIGTERM)(line)

    with reacting(monkeypatch, ("Listening", use)) as lines:
        assert main([*SERVE, "--log-format", "json"]) == 0
    objects = [json.loads(line) for line in lines]
    assert all(line.isascii() for line in lines)
    assert [each["message"] for each in objects[-2:]] == ["Counters", "Stopped"]
    (line,) = [each for each in objects if "op" in each]
    shown = {name: line[name] for name in ("level", "user", "op", "file", "status", "reason")}
    assert shown == {
        "level": "info",
        "user": USER,
        "op": 200,
        "file": "ü\\x20x\\x0a",
        "status": 1003,
        "reason": "name",
    }
    assert isinstance(line["ms"], float)
    assert objects[-2]["requests_200_1003"] == 1


def test_serve_with_a_log_file_says_nothing_on_stderr(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    sock, (host, port) = unused_address()
    sock.close()

    def end() -> None:
        while True:
            with suppress(ConnectionRefusedError), connect((host, port)) as client:
                client.sendall(request(USER, 202))
                read_all(client)  # the answer tells that it serves
                break
        sending(signal.SIGTERM)("")

    arguments = ["--listen", f"{host}:{port}", "--root", "store", "--log-file", "log"]
    thread = threading.Thread(target=end)
    with reacting(monkeypatch) as lines:
        thread.start()
        assert main(["serve", *arguments, "--pid-file", "pid"]) == 0
        thread.join(WAIT_SECONDS)
    assert lines == []
    log = user.folder / "log"
    assert log.stat().st_mode & 0o777 == 0o600
    text = log.read_text(encoding="ascii").splitlines()
    assert text[0] == f"[SERVER] Listening on {host}:{port}"
    assert text[-1] == "[SERVER] Stopped"


def test_serve_keeps_its_process_id_in_a_file_while_it_listens(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = user.folder / "pid"
    seen: List[str] = []

    def look(line: str) -> None:
        seen.append(path.read_text(encoding="ascii"))
        sending(signal.SIGTERM)(line)

    with reacting(monkeypatch, ("Listening", look)):
        assert main([*SERVE, "--pid-file", str(path)]) == 0
    assert seen == [f"{os.getpid()}\n"]
    assert not path.exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--pid-file", "cannot write the pid file "), ("--log-file", "cannot write the log ")],
)
def test_serve_that_cannot_write_a_file_it_was_given_says_so(
    user: User, option: str, message: str
) -> None:
    out, err, code = user.types(*SERVE, option, "none/file")
    assert (out, code) == ("", 1)
    assert err.startswith(f"backup: {message}")
    assert f"none/file: no such file or directory; take another: {option} FILE\n" in err
    assert err.count("\n") == 1


def test_serve_logs_to_a_stderr_that_is_no_file_of_the_system_s(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ending(io.StringIO):
        """Ends the server as soon as it says that it listens."""

        def write(self, text: str) -> int:
            if "Listening" in text:
                signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    stderr = Ending()
    monkeypatch.setattr(sys, "stderr", stderr)
    with watchdog():
        assert main(SERVE) == 0
    assert stderr.getvalue().endswith("[SERVER] Stopped\n")


def test_serve_opens_its_log_file_anew_at_sighup_or_says_why_not(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = user.folder / "logs"
    folder.mkdir()

    def drive() -> None:
        """Renames the file, then takes its folder away, and ends the server."""
        wait_for(lambda: (folder / "log").exists() and "Listening" in (folder / "log").read_text())
        (folder / "log").rename(folder / "old")
        sending(signal.SIGHUP)("")
        wait_for((folder / "log").exists)
        folder.rename(user.folder / "moved")
        sending(signal.SIGHUP)("")
        wait_for(lambda: "old one" in (user.folder / "moved" / "log").read_text())
        sending(signal.SIGTERM)("")

    def wait_for(happened: Callable[[], bool]) -> None:
        while not happened():
            assert main_thread.is_alive()

    main_thread = threading.main_thread()
    thread = threading.Thread(target=drive)
    with watchdog():
        thread.start()
        assert main([*SERVE, "--log-file", str(folder / "log")]) == 0
        thread.join(WAIT_SECONDS)
    lines = (user.folder / "moved" / "log").read_text(encoding="ascii").splitlines()
    assert lines[0] == (
        f"[SERVER] cannot write the log {folder}/log: no such file or directory;"
        " take another: --log-file FILE; this goes on in the old one"
    )
    assert lines[-1] == "[SERVER] Stopped"


def test_serve_says_when_its_manager_cannot_be_told(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    user.set_variable("NOTIFY_SOCKET", str(user.folder / "none"))
    with reacting(monkeypatch, ("Listening", sending(signal.SIGTERM))) as lines:
        assert main(SERVE) == 0
    told = [line for line in lines if "to NOTIFY_SOCKET: No such file or directory" in line]
    states = [line.split()[3] for line in told]
    assert states == ["READY=1", "STOPPING=1"]


def test_serve_takes_a_socket_that_was_handed_over_and_no_address_beside_it(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inherited(_: object) -> socket.socket:
        return socket.create_server(("127.0.0.1", 0))

    monkeypatch.setattr(systemd, "inherited_socket", inherited)
    out, err, code = user.types(*SERVE)
    assert (out, code) == ("", 2)
    assert err == errors("LISTEN_FDS hands over a socket to listen on; leave out --listen")
    with reacting(monkeypatch, ("Listening", sending(signal.SIGTERM))):
        assert main(["serve", "--root", "store"]) == 0


def test_serve_logs_a_fault_of_its_own_and_fails(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(_: Server) -> None:
        raise TypeError("a slip")

    monkeypatch.setattr(Server, "turn", slip)
    with reacting(monkeypatch) as lines:
        assert main([*SERVE, "--pid-file", "pid"]) == 1
    assert "[SERVER] a fault of this program ends the server\n" in lines
    assert "[SERVER] | TypeError: a slip\n" in lines
    assert not (user.folder / "pid").exists()


def test_serve_in_a_store_that_cannot_be_written_says_so(user: User) -> None:
    out, err, code = user.types("serve", "--listen", "127.0.0.1:0", "--root", "a.txt/store")
    assert (out, code) == ("", 1)
    assert err.startswith(f"backup: {user.folder}/a.txt/store: cannot keep files: ")
    assert err.endswith("; check this folder and its disk\n")
    assert err.count("\n") == 1


def test_serve_refuses_one_file_for_log_and_process_id(user: User) -> None:
    (user.folder / "link").symlink_to("log")
    out, err, code = user.types(*SERVE, "--log-file", "log", "--pid-file", "link")
    assert (out, code) == ("", 2)
    assert err == errors("--log-file and --pid-file are one file; take another for one of them")
    assert not (user.folder / "log").exists()


def test_a_refusal_by_a_cap_is_logged_even_when_it_is_quiet(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(line: str) -> None:
        for name in (b"a", b"b"):
            with connect(address_of(line)) as sock:
                sock.sendall(request(USER, 100, name, b"xyz"))
                read_all(sock)
        with connect(address_of(line)) as sock:
            sock.sendall(request(USER, 201, b"a"))
            read_all(sock)
        sending(signal.SIGTERM)(line)

    with reacting(monkeypatch, ("Listening", use)) as lines:
        assert main([*SERVE, "--quiet", "--user-files", "1", "--append-only"]) == 0
    (quota, append_only) = lines[1:3]
    assert f"user={USER} op=100 file=b status=1001 bytes=0 " in quota
    assert quota.endswith(" reason=quota cap=user-files\n")
    assert f"user={USER} op=201 file=a status=1002 bytes=0 " in append_only
    assert append_only.endswith(" reason=append-only\n")
    assert "Counters" in lines[3]
