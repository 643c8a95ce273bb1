"""The command line around the commands: options, exit codes, signals, and streams that break."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NoReturn, Tuple

import pytest

from backup import Server, UnixSocket, __version__, cli, systemd
from backup.cli import main
from backup.errors import ListenFailed
from backup.log import Log
from backup.settings import Settings
from backup.wire import MAX_FILE_BYTES
from tests.helpers import (
    ROOT,
    WAIT_SECONDS,
    RunningServer,
    connect,
    file_payload,
    read_all,
    request,
    response,
    signals_put_back,
)
from tests.test_client import (
    Scripted,
    afterwards,
    deaf,
    sparse,
    staying,
    take,
    take_head,
    until_closed,
    unused_address,
    watchdog,
)
from tests.test_commands import USER, User, errors
from tests.test_console import Terminal, on_screen

COMMANDS = ["serve", "client", "put", "get", "list", "delete"]
MIB = 1 << 20


@pytest.fixture
def user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> User:
    folder = tmp_path / "user"
    folder.mkdir()
    return User(folder, monkeypatch, capsys)


@pytest.fixture
def served(server: RunningServer, user: User) -> RunningServer:
    """A server that the user's commands find by themselves."""
    user.set_variable("BACKUP_SERVER", f"127.0.0.1:{server.address[1]}")
    return server


def address_of(line: str) -> Tuple[str, int]:
    """The address in the server's first line."""
    host, port = re.findall(r"\A\[SERVER\] Listening on (127\.0\.0\.1):(\d+)\n\Z", line)[0]
    return host, int(port)


def as_a_process(*arguments: str) -> List[str]:
    return [sys.executable, "-m", "backup", *arguments]


def environment() -> Dict[str, str]:
    """This process's, without what changes how Python buffers or encodes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


# -- what can be typed --------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "backup: the following arguments are required: COMMAND; see backup --help"),
        (
            ["put", "--parallel", "0"],
            "'0' is not a number from 1 to 999999999; see backup put --help",
        ),
        (["put", "--parallel", "many"], "'many' is not a number from 1 to 999999999"),
        (["put", "--parallel", "-1"], "see backup put --help"),
        (["client", "--server", "h:1"], "unrecognized arguments: --server h:1; see backup"),
        (["get"], "the following arguments are required: NAME; see backup get --help"),
        (["delete"], "the following arguments are required: NAME; see backup delete --help"),
        (["get", "a", "-o", "b", "--output-dir", "c"], "not allowed with argument"),
        (["serve", "-v", "-q"], "not allowed with argument"),
        (["serve", "--server-info", "a", "--listen", "b"], "not allowed with argument"),
        (["list", "extra"], "unrecognized arguments: extra; see backup --help"),
        (["list", "--nonsense"], "unrecognized arguments: --nonsense; see backup --help"),
        (["upload", "a.txt"], "invalid choice: 'upload'"),
        (["list", "--x\ny\x1b[31m"], "unrecognized arguments: --x\\x0ay\\x1b[31m; see backup"),
    ],
)
def test_a_wrong_word_is_one_line_and_2(user: User, arguments: List[str], message: str) -> None:
    out, err, code = user.types(*arguments)
    assert (out, code) == ("", 2)
    assert err.startswith("backup")
    assert message in err
    assert err.count("\n") == 1


# Each cap's option, the field of Settings it is for, its unit, and what --help says of its default.
CAPS = [
    ("--max-connections", "max_connections", "N", "what the descriptor limit allows"),
    ("--max-connections-per-address", "max_connections_per_address", "N", "no limit"),
    ("--max-file-size", "max_file_bytes", "SIZE", f"{MAX_FILE_BYTES}, what the protocol allows"),
    ("--user-quota", "user_bytes", "SIZE", "no limit"),
    ("--user-files", "user_files", "N", "no limit"),
    ("--total-quota", "total_bytes", "SIZE", "no limit"),
    ("--min-free", "min_free_bytes", "SIZE", "nothing is kept free"),
]


def settings_of(user: User, monkeypatch: pytest.MonkeyPatch, *options: str) -> Settings:
    """The settings with which ``serve`` would make its server."""
    made: List[Settings] = []

    def make(root: Path, address: Tuple[str, int], settings: Settings, *_: Log, **__: bool) -> None:
        made.append(settings)
        raise ListenFailed("this is as far as it goes")

    with monkeypatch.context() as patch:
        patch.setattr(cli, "Server", make)
        said = user.types("serve", "--listen", "127.0.0.1:0", *options)
    assert (said.err, said.code) == (errors("this is as far as it goes"), ListenFailed.exit_code)
    (settings,) = made
    return settings


@pytest.mark.parametrize(("option", "field", "unit"), [row[:3] for row in CAPS])
def test_each_cap_reaches_the_setting_it_is_for(
    user: User, monkeypatch: pytest.MonkeyPatch, option: str, field: str, unit: str
) -> None:
    values = {"1": 1, "500": 500, "007": 7, "999999999": 999999999}
    if unit == "SIZE":
        values.update({"3K": 3 << 10, "2M": 2 * 1024 * 1024, "2G": 2 << 30, "1T": 1 << 40})
    for text, value in values.items():
        found = settings_of(user, monkeypatch, option, text)
        assert found == replace(Settings(), **{field: value})  # type: ignore[arg-type]


def test_append_only_reaches_its_setting_and_without_options_there_is_no_cap(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings_of(user, monkeypatch) == Settings()
    assert settings_of(user, monkeypatch, "--append-only") == Settings(append_only=True)


@pytest.mark.parametrize(("option", "unit"), [(row[0], row[2]) for row in CAPS])
def test_a_cap_that_is_no_size_or_number_is_refused(user: User, option: str, unit: str) -> None:
    words = [
        "0",
        "00",
        "-1",
        "+1",
        "1.5G",
        "much",
        "",
        " 1",
        "1 ",
        "1_000",
        "1m",
        "1MB",
        "M",
        "\u0661",
    ]
    if unit == "SIZE":
        words += ["0M", "9" * 16]
        expected = "is not a size from 1 on; bytes, or a unit behind it: 500M, 2G (K, M, G, T)"
    else:
        words += ["1K", "1" * 10]
        expected = "is not a number from 1 to 999999999"
    for word in words:
        out, err, code = user.types("serve", f"{option}={word}")
        assert (out, code) == ("", 2)
        line = f"argument {option}: {word!r} {expected}; see backup serve --help"
        assert err == f"backup serve: {line}\n"
    assert not (user.folder / "backupsvr").exists()


def test_help_shows_what_holds_without_a_cap(user: User) -> None:
    text = " ".join(user.types("serve", "--help").out.split())
    for option, _, unit, default in CAPS:
        (found,) = re.findall(rf" {option} {unit} ([^()]*) \(default: ([^()]*)\)", text)
        assert found[1] == default
    assert "2M is 2 x 1024 x 1024 bytes" in text


def test_a_number_of_files_at_once_is_taken(user: User, served: RunningServer) -> None:
    assert user.types("put", "a.txt", "b.txt", "--parallel", "2").code == 0
    assert served.stored(USER) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_shows_the_exit_codes(user: User, command: List[str]) -> None:
    out, err, code = user.types(*command, "--help")
    assert (err, code) == ("", 0)
    codes = re.findall(r"^  (\d+) +\w", out.split("exit codes:\n")[1], re.MULTILINE)
    assert codes == ["0", "1", "2", "3", "10", "130"]


def test_help_names_every_command(user: User) -> None:
    out = user.types("--help").out
    assert re.findall(r"^    (\w+)", out, re.MULTILINE) == COMMANDS


def test_the_version_is_the_package_s(user: User) -> None:
    assert user.types("--version") == (f"backup {__version__}\n", "", 0)


def test_without_arguments_main_takes_the_process_s(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["backup", "--version"])
    assert main() == 0


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["get"], 2)])
def test_the_console_script_exits_with_the_code(
    user: User, monkeypatch: pytest.MonkeyPatch, arguments: List[str], code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["backup", *arguments])
    with signals_put_back(), pytest.raises(SystemExit) as caught:
        cli.run()
    assert caught.value.code == code


# -- serve --------------------------------------------------------------------

Reaction = Tuple[str, Callable[[str], None]]


@contextmanager
def reacting(monkeypatch: pytest.MonkeyPatch, *reactions: Reaction) -> Iterator[List[str]]:
    """Puts a pipe in the place of stderr, and does something for each awaited line.

    Yields all lines, which are complete at the end.
    """
    reading, writing = os.pipe()
    lines: List[str] = []
    waiting = list(reactions)

    def read() -> None:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            for line in pipe:
                lines.append(line)
                if waiting and waiting[0][0] in line:
                    waiting.pop(0)[1](line)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with os.fdopen(writing, "w", encoding="utf-8") as stderr, watchdog():
            monkeypatch.setattr(sys, "stderr", stderr)
            yield lines
    finally:
        thread.join(WAIT_SECONDS)
    assert not waiting, f"not logged: {waiting[0][0]}"


def sending(number: int) -> Callable[[str], None]:
    """Sends this process a signal."""

    def send(_line: str) -> None:
        os.kill(os.getpid(), number)

    return send


SERVE = ["serve", "--listen", "127.0.0.1:0", "--root", "store"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_says_where_it_listens_and_ends_at_a_signal(
    user: User, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    answers: List[bytes] = []

    def react(line: str) -> None:
        with connect(address_of(line)) as sock:
            sock.sendall(request(USER, 202))
            answers.append(read_all(sock))
        sending(number)(line)

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with reacting(monkeypatch, ("", react)) as lines:
        assert main(SERVE) == 0
    assert answers == [response(212, b"", b"\0\0\0\0")]
    assert lines[1].startswith(f"[SERVER] user={USER} op=202 file= status=212 ")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
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


def test_commands_talk_to_a_unix_socket_by_option_variable_and_info_file(user: User) -> None:
    path = user.folder / "socket"
    server = Server(user.folder / "store", UnixSocket(str(path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert user.types("put", "a.txt", "--server", f"unix:{path}").code == 0
        user.set_variable("BACKUP_SERVER", f"unix:{path}")
        assert user.types("list").out == "a.txt\n"
        user.set_variable("BACKUP_SERVER", "")
        (user.folder / "server.info").write_text("unix:socket\n", encoding="ascii")
        assert user.types("list").out == "a.txt\n"
        (user.folder / "backup.info").write_text("a.txt\nb.txt\n", encoding="ascii")
        assert user.types("client").code == 0
    finally:
        server.stop()
        server.stop()
        thread.join(WAIT_SECONDS)
    out, err, code = user.types("list")
    assert (out, code) == ("", 1)
    assert err.startswith("backup: cannot connect to unix:socket: no such file or directory; is it")


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


def test_serve_in_a_store_that_cannot_be_written_says_so(user: User) -> None:
    out, err, code = user.types("serve", "--listen", "127.0.0.1:0", "--root", "a.txt/store")
    assert (out, code) == ("", 1)
    assert err.startswith(f"backup: {user.folder}/a.txt/store: cannot keep files: ")
    assert err.endswith("; check this folder and its disk\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "cannot read server.info: no such file or directory; make it with one line"),
        (["serve", "--server-info", "a.txt"], "a.txt, line 1: 'content of a' is not an address;"),
        (["serve", "--listen", "here"], "--listen: 'here' is not an address; expected HOST:PORT"),
        (["client"], "cannot read server.info: no such file or directory; make it with one line"),
        (["client", "--server-info", "."], "cannot read .: is a directory; make it with one line"),
    ],
)
def test_an_address_that_is_missing_or_malformed_is_one_line(
    user: User, arguments: List[str], message: str
) -> None:
    out, err, code = user.types(*arguments)
    assert (out, code) == ("", 2)
    assert err.startswith(f"backup: {message}")
    assert err.count("\n") == 1


# -- client -------------------------------------------------------------------


@pytest.fixture
def informed(user: User, served: RunningServer) -> User:
    """A user with both info files."""
    host, port = served.address
    (user.folder / "server.info").write_text(f"{host}:{port}\n", encoding="ascii")
    (user.folder / "backup.info").write_text("a.txt\nb.txt\n", encoding="ascii")
    return user


def test_client_runs_the_sequence(informed: User) -> None:
    out, err, code = informed.types("client", "--user-id", "7")
    assert out.startswith("User ID: 7\n=== LIST (initial) ===\nFiles on server: []\n")
    assert (err, code) == ("", 0)


def test_client_says_when_it_leaves_files_out(informed: User) -> None:
    (informed.folder / "backup.info").write_text("a.txt\nb.txt\nc.txt\n", encoding="ascii")
    _, err, code = informed.types("client")
    assert err == errors("backup.info names 3 files; the first two are used")
    assert code == 0


def test_client_without_a_server_ends_at_once(user: User) -> None:
    (user.folder / "backup.info").write_text("a.txt\nb.txt\n", encoding="ascii")
    sock, (host, port) = unused_address()
    (user.folder / "server.info").write_text(f"{host}:{port}\n", encoding="ascii")
    with sock:
        said = user.types("client", "--user-id", "7")
    assert said.out == "User ID: 7\n=== LIST (initial) ===\n"
    assert said.err.startswith(f"backup: cannot connect to {host}:{port}: connection refused; ")
    assert said.code == 1


def test_client_that_has_a_step_fail_fails(informed: User) -> None:
    (informed.folder / "a.txt").unlink()
    out, err, code = informed.types("client")
    assert "Backup failed (a.txt): cannot read " in out
    assert "Backup OK (b.txt)" in out
    assert (err, code) == ("", 1)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a.txt\n", [], "backup.info: it names 1 files; expected two, one a line"),
        ("a\nx/a\n", [], "backup.info: a and x/a have one base name; send them apart or rename"),
        ("a\nb\n", ["--user-id", "me"], "--user-id: 'me' is not a user id; expected 0 to"),
        ("a\nb\n", ["--backup-info", "no"], "cannot read no: no such file or directory; make it"),
    ],
)
def test_client_sends_nothing_before_all_is_clear(
    informed: User, served: RunningServer, content: str, arguments: List[str], message: str
) -> None:
    (informed.folder / "backup.info").write_text(content, encoding="ascii")
    out, err, code = informed.types("client", *arguments)
    assert (out, code) == ("", 2)
    assert err.startswith(f"backup: {message}")
    assert err.count("\n") == 1
    served.stop()
    assert not [line for line in served.lines if line.startswith("user=")]


# -- interrupts ---------------------------------------------------------------

HALF = response(212, b"large", file_payload(bytes(MIB)))[: MIB // 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_get_leaves_no_file(
    user: User, tmp_path: Path, number: signal.Signals
) -> None:
    before = user.content()
    with Terminal() as terminal, Scripted(staying(HALF)) as server:
        host, port = server.address
        process = subprocess.Popen(
            as_a_process("get", "large", "--server", f"{host}:{port}"),
            cwd=user.folder,
            env={**environment(), "NO_COLOR": "1"},
            stderr=terminal.stream,
        )
        terminal.wait_for("file 1 of 1")
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == 130
        assert on_screen(terminal.shown()) == ["backup: interrupted", ""]
    assert user.content() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_put_is_one_line(user: User, number: signal.Signals) -> None:
    sparse(user.folder / "large", 32 * MIB)
    left = threading.Event()
    with Terminal() as terminal, Scripted(deaf(b"", left)) as server, afterwards(left):
        host, port = server.address
        process = subprocess.Popen(
            as_a_process("put", "large", "--server", f"{host}:{port}"),
            cwd=user.folder,
            env={**environment(), "NO_COLOR": "1"},
            stderr=terminal.stream,
        )
        terminal.wait_for("file 1 of 1")
        process.send_signal(number)
        assert process.wait(WAIT_SECONDS) == 130
        assert on_screen(terminal.shown()) == ["backup: interrupted", ""]


@contextmanager
def interrupted_get(user: User, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A ``get`` in this process, which a signal interrupts in the middle."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt(terminal: Terminal) -> None:
        terminal.wait_for("file 1 of 1")
        signal.pthread_kill(main_thread, signal.SIGTERM)

    with Terminal() as terminal, Scripted(staying(HALF)) as server, watchdog():
        thread = threading.Thread(target=interrupt, args=(terminal,))
        thread.start()
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        host, port = server.address
        yield lambda: main(["get", "large", "--server", f"{host}:{port}"])
        thread.join(WAIT_SECONDS)


def test_an_interrupt_restores_what_was_there_before(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = user.content()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with interrupted_get(user, monkeypatch) as get:
        assert get() == 130
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert user.content() == files


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_user_leaves_no_file_either(
    user: User, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A second signal comes just when the first has what was received removed."""
    files = user.content()
    unlink = os.unlink

    def slow_unlink(path: str) -> None:
        signal.raise_signal(number)
        unlink(path)

    monkeypatch.setattr(os, "unlink", slow_unlink)
    with interrupted_get(user, monkeypatch) as get:
        assert get() == 130
    assert user.content() == files


def test_a_second_signal_while_the_first_is_reported_changes_nothing(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def script(sock: socket.socket) -> None:
        take(sock, take_head(sock))
        signal.pthread_kill(main_thread, signal.SIGINT)
        until_closed(sock)

    class Slow(io.StringIO):
        """What is written to it takes so long that the user interrupts once more."""

        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    stderr = Slow()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Scripted(script) as server, watchdog():
        host, port = server.address
        try:
            code = main(["list", "--server", f"{host}:{port}"])
        except KeyboardInterrupt:  # which would end all tests
            pytest.fail("main was interrupted")
    assert (stderr.getvalue(), code) == (errors("interrupted"), 130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_process_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        as_a_process(*SERVE),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    address_of(process.stderr.readline())
    process.send_signal(number)
    rest = process.communicate(timeout=WAIT_SECONDS)[1]
    assert process.returncode == 0
    assert all(line.startswith("[SERVER] ") for line in rest.splitlines())


def pestered(process: subprocess.Popen[str]) -> str:
    """Sends it every signal that ends a program, again and again until it is gone; its stderr."""
    with watchdog():
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    with process.stderr:
        return process.stderr.read()


def holding(asked: threading.Event, left: threading.Event, sock: socket.socket) -> None:
    """Takes the request up to its payload, says so, and reads nothing until ``left``."""
    take_head(sock)
    asked.set()
    assert left.wait(WAIT_SECONDS)


@pytest.mark.parametrize("inherited", ["trap '' INT TERM; ", ""])
def test_a_burst_of_signals_ends_a_command_in_one_line(user: User, inherited: str) -> None:
    """Even those that come while Python itself ends; and as a job that a script has put behind."""
    sparse(user.folder / "large", 32 * MIB)
    for _ in range(4):
        left, asked = threading.Event(), threading.Event()
        with Scripted(partial(holding, asked, left)) as server, afterwards(left):
            host, port = server.address
            command = as_a_process("put", "large", "--server", f"{host}:{port}")
            process = subprocess.Popen(
                ["sh", "-c", f'{inherited}exec "$0" "$@"', *command],
                cwd=user.folder,
                env=environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            assert asked.wait(WAIT_SECONDS)
            assert pestered(process) == errors("interrupted")
            assert process.returncode == 130


def test_a_burst_of_signals_ends_a_server_without_a_traceback(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            as_a_process(*SERVE),
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        address_of(process.stderr.readline())
        lines = pestered(process).splitlines()
        assert process.returncode in (0, 130)
        others = [line for line in lines if not line.startswith("[SERVER] ")]
        assert set(others) <= {"backup: interrupted"}


def test_a_signal_that_comes_before_it_is_waited_for_counts() -> None:
    interrupt = cli._Interrupt()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt.wait()
    interrupt()  # the second of an impatient user


def test_a_signal_that_comes_when_all_is_done_does_nothing(user: User) -> None:
    interrupt = cli._Interrupt()
    assert cli._main(["--version"], interrupt) == 0
    interrupt()


# -- streams that break -------------------------------------------------------


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """Puts a full disk in the place of stdout or stderr."""
    with suppress(OSError), open("/dev/full", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, name, stream)
        yield


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--help"], ["--version"]])
def test_a_full_disk_under_stdout_is_one_line(
    user: User, served: RunningServer, arguments: List[str]
) -> None:
    assert user.types("put", "a.txt").code == 0
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            as_a_process(*arguments),
            cwd=user.folder,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert done.stderr == errors("cannot write the output: no space left on device")
    assert done.returncode == 1


def test_a_full_disk_under_stdout_leaves_no_descriptor(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user.types("put", "a.txt").code == 0
    with full(monkeypatch, "stdout"):
        said = user.types("list")
    assert said.err == errors("cannot write the output: no space left on device")
    assert said.code == 1


def test_a_full_disk_under_stderr_changes_no_exit_code(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = []
    commands = (["put", "a.txt"], ["get", "none"], ["list", "--user-id", "me"], ["upload"])
    for command in commands:
        monkeypatch.setenv("BACKUP_USER_ID", "")
        with full(monkeypatch, "stderr"):
            codes.append(main(command))
    assert codes == [0, 10, 2, 2]


@pytest.mark.parametrize(("command", "code"), [(["get", "none"], 10), (["list"], 0)])
def test_a_process_whose_stderr_is_full_exits_as_ever(
    user: User, served: RunningServer, command: List[str], code: int
) -> None:
    user.set_variable("BACKUP_USER_ID", "")  # so that there is something to say
    with open("/dev/full", "w", encoding="utf-8") as full_disk:
        done = subprocess.run(
            as_a_process(*command),
            cwd=user.folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=full_disk,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert done.returncode == code


def test_a_reader_that_has_seen_enough_ends_a_list_silently(
    user: User, served: RunningServer
) -> None:
    """As ``backup list | head -1`` does, with more names than a pipe holds."""
    folder = served.root / str(USER)
    folder.mkdir()
    for number in range(1000):
        (folder / f"{number:0200}").touch()
    process = subprocess.Popen(
        as_a_process("list"),
        cwd=user.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == f"{0:0200}\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(WAIT_SECONDS) == 1


def test_a_reader_that_is_gone_leaves_no_descriptor(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert user.types("put", "a.txt").code == 0
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        said = user.types("list")
    assert (said.err, said.code) == ("", 1)


def closing(streams: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command that a shell has started without these streams."""
    return subprocess.run(
        ["sh", "-c", f'exec "$0" "$@" {streams}', *as_a_process(*arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("streams", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_without_its_streams(
    user: User, served: RunningServer, streams: str
) -> None:
    done = closing(streams, "put", "a.txt", "--user-id", str(USER))
    assert (done.stderr, done.returncode) == ("", 0)
    assert served.stored(USER) == ["a.txt"]


def test_paths_from_a_stdin_that_is_closed_are_one_line(user: User, served: RunningServer) -> None:
    done = closing("<&-", "put", "--files-from", "-")
    assert done.stderr.startswith("backup: ")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


def test_what_the_encoding_lacks_is_shown_escaped(user: User, served: RunningServer) -> None:
    (user.folder / "ä").write_bytes(b"x")
    assert user.types("put", "ä").code == 0
    done = subprocess.run(
        as_a_process("list"),
        env={**environment(), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (b"\\xe4\n", b"", 0)


def test_a_stdout_that_is_no_file_of_the_system_s_will_do(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["put", "a.txt"]) == 0
    assert out.getvalue() == "Backup OK (a.txt)\n"


def test_what_the_system_refuses_is_not_taken_for_the_output(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def socketpair() -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", socketpair)
    out, err, code = user.types("list")
    assert (out, code) == ("", 1)
    assert err.startswith("backup: ")
    assert "too many open files" in err.lower()
    assert "output" not in err
    assert err.count("\n") == 1
