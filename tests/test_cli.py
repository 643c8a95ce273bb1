"""The command line around the commands: options, exit codes, signals, and streams that break."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Iterator, List, NoReturn, Tuple

import pytest

from backup import Server, UnixSocket, __version__, cli, config, serve
from backup.cli import main
from backup.errors import ListenFailed
from backup.log import Log
from backup.settings import Settings
from backup.wire import MAX_FILE_BYTES
from tests.helpers import WAIT_SECONDS, RunningServer, signals_put_back
from tests.test_client import unused_address
from tests.user import USER, User, as_a_process, environment, errors

COMMANDS = ["serve", "client", "put", "get", "list", "delete"]
MIB = 1 << 20


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
        patch.setattr(serve, "Server", make)
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
        expected = "is not a size from 1 on; whole bytes, or a capital K, M, G or T behind: 500M"
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


# -- where the server is ---------------------------------------------------------


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


def test_a_fault_of_this_program_is_reported_and_fails(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slip(*_: object) -> None:
        raise TypeError("a slip")

    monkeypatch.setattr(config, "read_server_info", slip)
    out, err, code = user.types("client")
    assert (out, code) == ("", 1)
    lines = err.splitlines()
    assert lines[0] == "backup: a fault of this program; please report it"
    assert lines[-1] == "backup: | TypeError: a slip"


def test_an_interrupted_command_says_so(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(config, "read_server_info", interrupted)
    assert user.types("client") == ("", errors("interrupted"), 130)
