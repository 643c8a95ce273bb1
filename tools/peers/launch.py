"""Starts every server of the benchmark in a process of its own, and ends it.

Each listens on a free loopback port, writes its access log to a file, and is
ended by its process id, whatever happens to the benchmark meanwhile.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

HERE = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 20.0
STOP_SECONDS = 15.0

Address = Tuple[str, int]

_GREETING = re.compile(r"Listening on (\S+):(\d+)\n")

_NGINX_CONF = """\
{user}worker_processes 1;
daemon off;
pid nginx.pid;
error_log "{log}";
events {{ worker_connections 1024; }}
http {{
    access_log "{log}";
    sendfile on;
    tcp_nopush on;
    client_max_body_size 0;
    client_body_temp_path tmp/body;
    proxy_temp_path tmp/proxy;
    fastcgi_temp_path tmp/fastcgi;
    uwsgi_temp_path tmp/uwsgi;
    scgi_temp_path tmp/scgi;
    server {{
        listen 127.0.0.1:{port};
        root "{root}";
        location / {{ dav_methods PUT; }}
    }}
}}
"""


class NotStarted(Exception):
    """A server did not come up; what it said is in the message."""


class Running(NamedTuple):
    """A server that answers."""

    address: Address
    pid: int

    def memory(self, field: str) -> int:
        """Bytes of ``VmRSS``, what it has in memory, or ``VmHWM``, the most it ever had."""
        status = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii", errors="replace")
        (kib,) = re.findall(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
        return int(kib) * 1024

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def ours(root: Path, log: Path, settings: Mapping[str, float] = {}) -> Iterator[Running]:
    """This server: from its command line, unless these settings are what that does not offer."""
    command = ["-m", "backup", "serve", "--listen", "127.0.0.1:0"]
    more = [f"{name}={float(value)}" for name, value in settings.items()]
    if settings == {"fsync": False}:
        more = ["--no-fsync"]
    elif settings:
        command = ["-m", "tools.peers.ours"]
    with _started([sys.executable, *command, "--root", str(root), *more], log) as running:
        yield running


@contextmanager
def peer(module: str, root: Path, log: Path, *more: str) -> Iterator[Running]:
    """One of the modules beside this one: ``threads``, ``streams``, ``ftp`` or ``bare``."""
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"tools.peers.{module}", "--root", str(root), *more]
    with _started(command, log) as running:
        yield running


@contextmanager
def nginx(root: Path, log: Path) -> Iterator[Running]:
    """nginx with one worker, and with the log and the folders that its package would set up."""
    root.mkdir(parents=True, exist_ok=True)
    address = ("127.0.0.1", _free_port())
    configuration = _NGINX_CONF.format(
        # Started by root, its worker would be an account that may not write here.
        user="user root;\n" if os.geteuid() == 0 else "",
        log=log,
        root=root,
        port=address[1],
    )
    # Its temporary files are on the file system of their destination, as they would be.
    with tempfile.TemporaryDirectory(prefix="nginx-", dir=root.parent) as prefix:
        (Path(prefix) / "tmp").mkdir()
        (Path(prefix) / "nginx.conf").write_text(configuration, encoding="utf-8")
        command = [nginx_program() or "nginx", "-p", prefix, "-c", "nginx.conf", "-e", str(log)]
        with _started(command, log, lambda: address if _answers(address) else None) as running:
            yield running


def nginx_program() -> Optional[str]:
    """Where nginx is; None where it is not installed or has no DAV module."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if program is None or "http_dav_module" not in _says(program, "-V"):
        return None
    return program


def nginx_version() -> Optional[str]:
    """As it says itself; None where there is none."""
    program = nginx_program()
    found = re.search(r"nginx/(\S+)", _says(program, "-v")) if program else None
    return found.group(1) if found else None


def has_ftp() -> bool:
    """Whether pyftpdlib is installed."""
    return importlib.util.find_spec("pyftpdlib") is not None


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts SIGINT and SIGTERM off: a process that has just begun could not be ended yet."""
    came: List[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextmanager
def _started(
    command: List[str], log: Path, find: Optional[Callable[[], Optional[Address]]] = None
) -> Iterator[Running]:
    """Runs ``command`` until the block ends; ``find`` says where it listens, as soon as it does."""
    process: Optional[subprocess.Popen[bytes]] = None
    try:
        with open(log, "ab") as stderr, undisturbed():
            # A session of its own: Ctrl-C is for the benchmark, which then ends what it started.
            process = subprocess.Popen(
                command, cwd=HERE, stdout=stderr, stderr=stderr, start_new_session=True
            )
        address = _wait(process, find or (lambda: _greeting(log)))
        if address is None:
            said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise NotStarted(f"{' '.join(command[:4])} … did not start:\n{said}")
        yield Running(address, process.pid)
    finally:
        if process is not None:
            _end(process)


def _wait(
    process: subprocess.Popen[bytes], find: Callable[[], Optional[Address]]
) -> Optional[Address]:
    """Where the process listens; None if it ended, or took too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        address = find()
        if address is not None:
            return address
        time.sleep(0.005)
    return None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it may have forked
        process.wait()


def _greeting(log: Path) -> Optional[Address]:
    found = _GREETING.search(log.read_text(encoding="utf-8", errors="replace"))
    return (found.group(1), int(found.group(2))) if found else None


def _answers(address: Address) -> bool:
    try:
        socket.create_connection(address).close()
    except ConnectionRefusedError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _says(*command: str) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout
