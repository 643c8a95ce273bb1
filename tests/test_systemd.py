"""Sockets and readiness by the plain protocols, with a real parent and a real manager's socket."""

from __future__ import annotations

import configparser
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from backup import systemd
from backup.errors import SetupFailed
from tests.helpers import ROOT, WAIT_SECONDS, ask, request, response

EMPTY_LIST = response(212, b"", b"\0\0\0\0")


def variables(count: str = "1") -> Dict[str, str]:
    return {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": count,
        "LISTEN_FDNAMES": "backup.socket",
        "OTHER": "stays",
    }


# -- a socket that was handed over --------------------------------------------


def test_a_socket_is_taken_once_and_its_variables_with_it() -> None:
    environ = variables()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
        fd = os.dup(listener.fileno())
        os.set_inheritable(fd, True)
    taken = systemd.inherited_socket(environ, fd)
    assert taken is not None
    with taken:
        assert (taken.fileno(), taken.getsockname()) == (fd, place)
        assert not os.get_inheritable(fd)
    assert environ == {"OTHER": "stays"}
    assert systemd.inherited_socket(environ, fd) is None


@pytest.mark.parametrize("pid", ["1", "", "x"])
def test_what_is_meant_for_another_process_is_left_alone(pid: str) -> None:
    environ = {**variables(), "LISTEN_PID": pid}
    assert systemd.inherited_socket(environ, -1) is None
    assert environ == {"OTHER": "stays"}


@pytest.mark.parametrize("count", ["2", "0", "-1", "one", "1\x1b"])
def test_anything_but_one_socket_is_refused(count: str) -> None:
    with pytest.raises(SetupFailed) as caught:
        systemd.inherited_socket(variables(count), -1)
    assert str(caught.value) == (
        f"LISTEN_FDS hands over {count!a} sockets; expected 1: one ListenStream= a server"
    )


def not_listening(kind: str) -> int:
    """A descriptor of something else."""
    if kind == "closed":
        return 999_999
    if kind == "file":
        return os.open("/dev/null", os.O_RDONLY)
    sort = socket.SOCK_DGRAM if kind == "datagrams" else socket.SOCK_STREAM
    return socket.socket(socket.AF_INET, sort).detach()


@pytest.mark.parametrize("kind", ["closed", "file", "datagrams", "stream"])
def test_what_is_no_listening_socket_is_refused_and_said_so(kind: str) -> None:
    fd = not_listening(kind)
    with pytest.raises(SetupFailed, match=f"descriptor {fd}, which LISTEN_FDS hands over, "):
        systemd.inherited_socket(variables(), fd)
    if kind == "file":
        os.close(fd)


HANDING_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2])
os.execv(sys.executable, [sys.executable, "-m", "backup", "serve", *sys.argv[3:]])
"""


def activated(
    listener: socket.socket, tmp_path: Path, *options: str, count: int = 1
) -> subprocess.Popen[str]:
    """A server whose parent hands this socket over, as a manager would."""
    fd = str(listener.fileno())
    root = ["--root", str(tmp_path / "store")]
    return subprocess.Popen(
        [sys.executable, "-c", HANDING_OVER, fd, str(count), *root, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[listener.fileno()],
    )


def ended(process: subprocess.Popen[str]) -> Tuple[str, int]:
    """What it has said, and its exit code."""
    said = process.communicate(timeout=WAIT_SECONDS)[1]
    return said, process.returncode


def test_a_server_serves_on_the_socket_of_its_parent_which_stays(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for _ in range(2):
            process = activated(listener, tmp_path)
            assert ask(address, request(11, 202)) == EMPTY_LIST
            process.terminate()
            said, code = ended(process)
            assert said.startswith(f"[SERVER] Listening on 127.0.0.1:{address[1]}\n")
            assert code == 0


def test_a_unix_socket_that_was_handed_over_keeps_its_file(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        process = activated(listener, tmp_path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(WAIT_SECONDS)
            sock.connect(path)
            sock.sendall(request(11, 202))
            assert sock.recv(100) == EMPTY_LIST
        process.terminate()
        said, code = ended(process)
    assert f" peer=unix:{path}\n" in said
    assert code == 0
    assert os.path.exists(path)


@pytest.mark.parametrize(
    ("host", "options", "count", "code", "message"),
    [
        ("0.0.0.0", [], 1, 2, "will not listen on 0.0.0.0:"),
        ("127.0.0.1", ["--listen", "127.0.0.1:0"], 1, 2, "LISTEN_FDS hands over a socket to"),
        ("127.0.0.1", [], 2, 1, "LISTEN_FDS hands over '2' sockets; expected 1"),
    ],
)
def test_a_socket_that_cannot_be_served_is_one_line(
    tmp_path: Path, host: str, options: List[str], count: int, code: int, message: str
) -> None:
    with socket.create_server((host, 0)) as listener:
        said, returned = ended(activated(listener, tmp_path, *options, count=count))
    assert said.startswith(f"backup: {message}")
    assert (said.count("\n"), returned) == (1, code)


def test_a_socket_that_others_reach_is_served_when_that_is_allowed(tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        process = activated(listener, tmp_path, "--allow-anonymous")
        address = ("127.0.0.1", listener.getsockname()[1])
        assert ask(address, request(11, 202)) == EMPTY_LIST
        process.terminate()
        assert ended(process)[1] == 0


# -- readiness ----------------------------------------------------------------


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Tuple[socket.socket, str]]:
    """A service manager's socket, and the variable that names it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT_SECONDS)
        name = f"{tmp_path}/notify"
        sock.bind(name if request.param == "path" else f"\0{name}")
        yield sock, name if request.param == "path" else f"@{name}"


def test_a_state_is_told(manager: Tuple[socket.socket, str]) -> None:
    sock, name = manager
    systemd.notify({"NOTIFY_SOCKET": name}, "READY=1")
    assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}])
def test_without_a_manager_nobody_is_told(environ: Dict[str, str]) -> None:
    systemd.notify(environ, "READY=1")


def test_a_manager_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SetupFailed, match="cannot tell READY=1 to NOTIFY_SOCKET: No such file"):
        systemd.notify({"NOTIFY_SOCKET": str(tmp_path / "none")}, "READY=1")


def test_a_manager_that_does_not_listen_is_not_waited_for(
    manager: Tuple[socket.socket, str],
) -> None:
    _, name = manager
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(f"\0{name[1:]}" if name.startswith("@") else name)
        with suppress(BlockingIOError):
            while True:
                sock.send(b"much")
        with pytest.raises(SetupFailed, match="temporarily unavailable"):
            systemd.notify({"NOTIFY_SOCKET": name}, "READY=1")


def test_a_system_without_unix_sockets_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(SetupFailed, match="AF_UNIX"):
        systemd.notify({"NOTIFY_SOCKET": "x"}, "READY=1")


def serving(tmp_path: Path, notify_socket: str) -> subprocess.Popen[str]:
    options = ["--listen", "127.0.0.1:0", "--root", str(tmp_path / "store")]
    return subprocess.Popen(
        [sys.executable, "-m", "backup", "serve", *options, "--pid-file", str(tmp_path / "pid")],
        cwd=ROOT,
        env={**os.environ, "NOTIFY_SOCKET": notify_socket},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_server_tells_when_it_listens_and_when_it_drains(
    manager: Tuple[socket.socket, str], tmp_path: Path
) -> None:
    sock, name = manager
    process = serving(tmp_path, name)
    with ExitStack() as stack:
        assert sock.recv(100) == b"READY=1"
        assert int((tmp_path / "pid").read_text(encoding="ascii")) == process.pid
        assert process.stderr is not None
        port = int(process.stderr.readline().rpartition(":")[2])
        upload = stack.enter_context(socket.create_connection(("127.0.0.1", port), WAIT_SECONDS))
        upload.sendall(request(11, 100, b"a", b"x", size=2))
        assert ask(("127.0.0.1", port), request(11, 202)) == EMPTY_LIST
        process.send_signal(signal.SIGTERM)
        assert sock.recv(100) == b"STOPPING=1"
        upload.sendall(b"y")  # it is still served
        assert upload.recv(100) == response(210, b"a")
    assert ended(process)[1] == 0
    assert not (tmp_path / "pid").exists()


def test_a_manager_that_cannot_be_told_is_a_line_in_the_log(tmp_path: Path) -> None:
    process = serving(tmp_path, str(tmp_path / "none"))
    assert process.stderr is not None
    first = [process.stderr.readline() for _ in range(2)]
    assert any(text.startswith("[SERVER] cannot tell READY=1 to NOTIFY_SOCKET") for text in first)
    process.terminate()
    assert ended(process)[1] == 0


# -- the units ----------------------------------------------------------------


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "docs" / name, encoding="utf-8")
    return parser


def test_the_unit_starts_a_server_with_options_that_there_are(tmp_path: Path) -> None:
    service = unit("backup.service")["Service"]
    assert service["Type"] == "notify"
    _, _, pyz, *options = service["ExecStart"].split()
    assert pyz.endswith("/backup.pyz")
    assert options[options.index("--root") + 1] == "/var/lib/" + service["StateDirectory"]
    options[options.index("--root") + 1] = str(tmp_path / "store")
    options[options.index("--listen") + 1] = "127.0.0.1:0"
    process = subprocess.Popen(
        [sys.executable, "-m", "backup", *options], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert '"message": "Listening on 127.0.0.1:' in process.stderr.readline()
    process.terminate()
    assert ended(process)[1] == 0
    assert unit("backup.socket")["Socket"]["Accept"] == "no"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_finds_no_fault_in_the_units(tmp_path: Path) -> None:
    for name in ("backup.service", "backup.socket"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("/usr/bin/python3", sys.executable))
    units = [str(tmp_path / name) for name in ("backup.service", "backup.socket")]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
