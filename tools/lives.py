"""The server under soak: one root and one port, life after life, and the trouble it is given.

Rules: every life is ``python -m backup serve`` in a process of its own, which only
``kill`` and ``stop`` end. A ``Fault`` is begun and ended from outside while the
server runs, one at a time, and needs no rights but those over one's own process:
limits of the process (prlimit(2)), another name for the root for a moment, a
symbolic link in the place of a user's folder, and errors that strace puts in the
place of system calls. Which of them this system can do, ``faults`` finds out.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Collection, Deque, List, Optional, Sequence, Tuple

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

HERE = Path(__file__).resolve().parent.parent

FILE_BYTES = 32 * 1024
"""What a process may make of a file while it is short of space; more is EFBIG."""


class Died(Exception):
    """The server has ended without being told to, or did not start; says what it said last."""


class Lives:
    """A server process after another. Descriptors, memory and log are those of the present one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.address: Tuple[str, int] = ("127.0.0.1", 0)  # then the port that the first life took
        self.number = 0
        self.tracebacks = 0
        """Of all lives; each is a fault of the server's."""
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._last_lines: Deque[str] = deque(maxlen=20)
        self._rest = b""  # the beginning of a line of the log

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.kill()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._running().pid

    def start(self) -> None:
        """Starts the next life; returns when it listens. Raises ``Died``."""
        host, port = self.address
        serve = ["serve", "--listen", f"{host}:{port}", "--root", str(self.root), "--quiet"]
        command = [sys.executable, "-m", "backup", *serve]
        self._process = process = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE)
        self.number += 1
        assert process.stderr is not None
        line = b""
        while b"Listening on" not in line:
            line = process.stderr.readline()
            if not line:
                self._end()
                raise self._died()
            self._last_lines.append(line.decode(errors="replace").rstrip())
        self.address = (host, int(line.rsplit(b":", 1)[1]))
        os.set_blocking(process.stderr.fileno(), False)

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        self._running().kill()
        self._end()

    def stop(self, seconds: float) -> int:
        """Ends it with SIGTERM; its exit code. Raises ``subprocess.TimeoutExpired``."""
        self._running().terminate()
        code = self._running().wait(seconds)
        self._end()
        return code

    def check(self) -> None:
        """Takes what it has logged. Raises ``Died``."""
        self._read_log()
        if self._running().poll() is not None:
            self._end()
            raise self._died()

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Its resident memory, in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        (line,) = [line for line in text.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) * 1024

    def hold(self) -> bool:
        """Stops it until ``go_on``; False if it has died."""
        os.kill(self.pid, signal.SIGSTOP)
        state = os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return state is not None and state.si_code == os.CLD_STOPPED

    def go_on(self) -> None:
        """Lets it go on."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def running(self) -> bool:
        """Whether it was started and has not been seen to end."""
        return self._process is not None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise AssertionError("the server was not started")
        return self._process

    def _read_log(self) -> None:
        process = self._running()
        assert process.stderr is not None
        with suppress(BlockingIOError):
            while True:
                piece = os.read(process.stderr.fileno(), 1 << 16)
                if not piece:
                    break
                *lines, self._rest = (self._rest + piece).split(b"\n")
                self.tracebacks += sum(b"Traceback (most recent" in line for line in lines)
                self._last_lines.extend(line.decode(errors="replace") for line in lines)

    def _end(self) -> None:
        process = self._running()
        process.wait()
        self._read_log()
        assert process.stderr is not None
        process.stderr.close()
        self._process, self._rest = None, b""

    def _died(self) -> Died:
        return Died("the server has ended by itself; it said:\n" + "\n".join(self._last_lines))


class Fault:
    """One kind of trouble. ``begin`` it, then ``end`` it, whether the server lives or not."""

    name: str

    def begin(self, lives: Lives) -> bool:
        """Begins it; False if it cannot be done just now."""
        raise NotImplementedError

    def end(self, lives: Lives) -> None:
        """Takes it back."""
        raise NotImplementedError


class Limited(Fault):
    """The process may have less of something: an upload fails in the middle, or at its start."""

    def __init__(self, name: str, limit: int, spare: Optional[int] = None) -> None:
        """``limit`` is one of resource's; ``spare`` descriptors, or FILE_BYTES for None."""
        self.name = name
        self._limit = limit
        self._spare = spare
        self._before = (0, 0)

    def begin(self, lives: Lives) -> bool:
        few = FILE_BYTES if self._spare is None else lives.descriptors() + self._spare
        self._before = resource.prlimit(lives.pid, self._limit)
        resource.prlimit(lives.pid, self._limit, (few, self._before[1]))
        return True

    def end(self, lives: Lives) -> None:
        if lives.running:
            resource.prlimit(lives.pid, self._limit, self._before)


class RootAway(Fault):
    """The root has another name for a moment, as if its disk were not mounted."""

    name = "root away"

    def begin(self, lives: Lives) -> bool:
        os.rename(lives.root, self._elsewhere(lives))
        return True

    def end(self, lives: Lives) -> None:
        os.rename(self._elsewhere(lives), lives.root)

    @staticmethod
    def _elsewhere(lives: Lives) -> Path:
        return lives.root.with_name(lives.root.name + "-away")


class FolderLinked(Fault):
    """A user's folder is replaced by a symbolic link to somewhere else.

    The server is held meanwhile, so that it never sees neither: it would make a new folder.
    """

    name = "folder a link"

    def __init__(self, users: Collection[int], rng: random.Random) -> None:
        """One of ``users`` is drawn, of those who have a folder then."""
        self._users = users
        self._random = rng
        self._folder = self._elsewhere = Path()

    def begin(self, lives: Lives) -> bool:
        folders = [lives.root / str(user_id) for user_id in sorted(self._users)]
        folders = [folder for folder in folders if folder.is_dir()]
        if not folders or not lives.hold():
            return False
        self._folder = self._random.choice(folders)
        self._elsewhere = lives.root.with_name(f"elsewhere-{self._folder.name}")
        self._folder.rename(self._elsewhere)
        self._folder.symlink_to(self._elsewhere)
        lives.go_on()
        return True

    def end(self, lives: Lives) -> None:
        held = lives.running and lives.hold()
        self._folder.unlink()
        self._elsewhere.rename(self._folder)
        if held:
            lives.go_on()


class Injected(Fault):
    """strace lets some of the server's system calls fail."""

    def __init__(self, calls: str, error: str, when: str) -> None:
        self.name = f"{calls.split(',')[0]} {error}"
        self._calls = ",".join(f"?{call}" for call in calls.split(","))
        self._inject = f"inject={self._calls}:error={error}:when={when}"
        self._strace: Optional[subprocess.Popen[bytes]] = None

    def begin(self, lives: Lives) -> bool:
        command = ["strace", "-f", "-e", "signal=none", "-e", f"trace={self._calls}"]
        command += ["-e", self._inject, "-o", os.devnull, "-p", str(lives.pid)]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert strace.stderr is not None
        line = strace.stderr.readline()  # "attached", or why not
        self._strace = strace
        if line.rstrip().endswith(b"attached"):
            return True
        self.end(lives)
        return False

    def end(self, lives: Lives) -> None:  # noqa: ARG002
        strace, self._strace = self._strace, None
        assert strace is not None
        assert strace.stderr is not None
        strace.terminate()  # it lets the server go; of a dead one it has let go
        strace.communicate()


def faults(lives: Lives, users: Collection[int], rng: random.Random) -> List[Fault]:
    """The kinds of trouble that can be made here, for a server that runs and these users."""
    kinds: List[Fault] = [RootAway(), FolderLinked(users, rng)]
    if hasattr(resource, "prlimit"):
        kinds.append(Limited("file size EFBIG", resource.RLIMIT_FSIZE))
        kinds.append(Limited("descriptors EMFILE", resource.RLIMIT_NOFILE, spare=4))
    if shutil.which("strace") is not None:
        kinds += [fault for fault in _injected() if _works(fault, lives)]
    return kinds


def _injected() -> Sequence[Fault]:
    return [
        Injected("fsync,fdatasync", "EIO", "2+3"),
        Injected("rename,renameat,renameat2", "EDQUOT", "1+2"),
        Injected("unlinkat", "EROFS", "1+2"),
    ]


def _works(fault: Fault, lives: Lives) -> bool:
    """Whether a process may be traced here."""
    if not fault.begin(lives):
        return False
    fault.end(lives)
    return True
