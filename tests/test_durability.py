"""What is acknowledged is on the disk: proved from the server's own system calls.

Rules, to which this file holds the server:

- The order. Before a 210 leaves, every byte is written, the temporary file fsynced and renamed to
  its name, the user's folder fsynced, and the root too when that folder is new. Before a 211, the
  file is unlinked and the folder fsynced.
- What completes in one turn is made durable together: write-back started on all files, all fsynced,
  all renamed, each folder fsynced once, then all the answers. A batch is bounded.
- An error on one file (EIO, ENOSPC, EDQUOT) fails that file alone: 1001 (1002 for a removal), its
  temporary file gone, the older file whole. Only when a folder cannot be fsynced, its names may
  stand for the new files already: what has been renamed cannot be taken back.
- Killed at any moment, a server leaves what it acknowledged, whole; everything else is the older
  file or nothing or, once the rename has taken effect, the new file, never a part or a mixture.
  The next one lists nothing temporary and sweeps its temporary folder empty.

How that is seen: a real server, with strace attached once it listens, so that ``when=N`` counts
what it does for its clients and nothing of its start. It is stopped (SIGSTOP) while requests are
sent, so that they arrive in one turn and the same calls follow in every run. A first run says
which calls there are; the others let each of them fail, or kill the server as it is entered, which
is just after the call before it. SIGKILL is no power cut: that what was fsynced survives one is
the disk's promise, and that it was fsynced in time is what the trace tells.

The calls of a file of several MiB that differ in number from run to run are thinned (``THINNED``):
of its writes the first, some in the middle and the last, for which strace is attached late. All
others are hit, each of them.
"""

from __future__ import annotations

import ast
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple, Type

import pytest

from backup.settings import Settings
from tests.helpers import (
    ROOT,
    WAIT_SECONDS,
    RunningServer,
    ask,
    connect,
    file_payload,
    read_all,
    request,
    response,
)

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
STORED, DELETED, NOT_STORED, NOT_DELETED = 210, 211, 1001, 1002
KIB, MIB = 1 << 10, 1 << 20
NOBODY = 2**32 - 1  # a user who stores nothing
SIDE_BY_SIDE = 4  # servers that are killed, or told lies by strace, at the same time

# How many bytes of a request are sent while the server is stopped: what a socket surely holds.
HELD_BYTES = 16 * KIB

Files = Dict[Tuple[int, str], bytes]
"""What is stored: user and name, and the content."""


# What the clients ask for


class Wish(NamedTuple):
    """One request, and what is right to answer."""

    user_id: int
    op: int
    name: str
    content: bytes = b""

    @property
    def data(self) -> bytes:
        payload = self.content if self.op == BACKUP else None
        return request(self.user_id, self.op, self.name.encode(), payload)

    @property
    def success(self) -> bytes:
        return response(STORED if self.op == BACKUP else DELETED, self.name.encode())

    @property
    def failure(self) -> bytes:
        return response(NOT_STORED if self.op == BACKUP else NOT_DELETED, self.name.encode())

    def apply(self, files: Files) -> None:
        """Does to ``files`` what the server is to do to its store."""
        if self.op == BACKUP:
            files[self.user_id, self.name] = self.content
        else:
            del files[self.user_id, self.name]


class Scene(NamedTuple):
    """What is stored, and what is then asked for: turn by turn, all of a turn at once.

    No two users use one name, and no name is backed up twice: so a name tells what an answer or a
    call of the trace belongs to. ``late``: all of the one request but its last byte has arrived
    before strace is attached.
    """

    older: Files
    turns: List[List[Wish]]
    late: bool = False

    @property
    def wishes(self) -> List[Wish]:
        return [wish for turn in self.turns for wish in turn]

    @property
    def users(self) -> Set[int]:
        return {user_id for user_id, _ in self.older} | {wish.user_id for wish in self.wishes}

    @property
    def written(self) -> Dict[str, int]:
        """How many bytes of each file are written while strace looks on."""
        uploads = [wish for wish in self.wishes if wish.op == BACKUP]
        return {wish.name: 1 if self.late else len(wish.content) for wish in uploads}


def content(seed: str, size: int = 3000) -> bytes:
    return random.Random(seed).randbytes(size)


def alone(user: int) -> Scene:
    """A new user's first file, a file that replaces an older one, a removal: a turn for each."""
    older = {(user + 1, "replaced"): b"an older file", (user + 2, "removed"): b"in the way"}
    return Scene(
        older,
        [
            [Wish(user, BACKUP, "first", content("first"))],
            [Wish(user + 1, BACKUP, "replaced", content("replaced"))],
            [Wish(user + 2, DELETE, "removed")],
        ],
    )


def together(user: int) -> Scene:
    """Changes of three users in one turn; of two names, one comes and goes, one goes and comes."""
    older = {
        (user + 1, "replaced"): b"an older file",
        (user + 1, "removed"): b"in the way",
        (user + 1, "renewed"): b"an older file, too",
        (user + 1, "kept"): b"which nobody touches",
    }
    turn = [
        Wish(user, BACKUP, "größe", content("größe")),
        Wish(user + 1, BACKUP, "replaced", content("replaced")),
        Wish(user + 1, DELETE, "removed"),
        Wish(user + 2, BACKUP, "brief", content("brief")),
        Wish(user + 2, DELETE, "brief"),
        Wish(user + 1, DELETE, "renewed"),
        Wish(user + 1, BACKUP, "renewed", content("renewed")),
    ]
    return Scene(older, [turn])


def large(user: int, late: bool = False) -> Scene:
    """A file so large that a part of it is fsynced before the rest has come: once, after 4 MiB."""
    older = {(user, "large"): b"an older file"}
    return Scene(older, [[Wish(user, BACKUP, "large", content("large", 5 * MIB))]], late)


def end_of_large(user: int) -> Scene:
    """The same, from its last byte on."""
    return large(user, late=True)


every_scene = pytest.mark.parametrize("scene_of", [alone, together, large, end_of_large])


# The server, and strace

KINDS = {
    "create": ["open", "openat"],
    "write": ["write", "pwrite64", "writev"],
    "advise": ["fadvise64", "fadvise64_64"],
    "sync": ["fsync", "fdatasync"],
    "mkdir": ["mkdir", "mkdirat"],
    "rename": ["rename", "renameat", "renameat2"],
    "unlink": ["unlink", "unlinkat"],
    "answer": ["sendto", "sendmsg"],
    "end": ["shutdown"],
}
"""What the server does, and the system calls it may do that by."""

KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls}
CALLS = ",".join(f"?{call}" for call in KIND_OF)  # ?: some machines lack some of them


def must_be_allowed() -> bool:
    """Whether a process is traced by its parents alone, unless it allows it (Yama, scope 1)."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return scope.exists() and scope.read_text(encoding="ascii").strip() == "1"


# ``python -m backup``, which lets every process of this user trace it: PR_SET_PTRACER, ANY.
ALLOW_AND_RUN = """
import ctypes, runpy
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
runpy.run_module("backup", run_name="__main__")
"""


class Child:
    """A server in a process of its own, killed at the end if it still runs."""

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        # Without site, which the package does not need, a start takes less time.
        program = ["-c", ALLOW_AND_RUN] if must_be_allowed() else ["-m", "backup"]
        serve = ["serve", "--listen", "127.0.0.1:0", "--root", str(root), *options]
        command = [sys.executable, "-S", *program, *serve]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        self._log = self.process.stderr

    def __enter__(self) -> Child:
        try:
            self.address = ("127.0.0.1", int(self._log.readline().rsplit(b":", 1)[1]))
        except BaseException:
            self.close()
            raise
        os.set_blocking(self._log.fileno(), False)
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.close()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()

    def hold(self) -> bool:
        """Stops it; False if it is dead."""
        if self.process.poll() is not None:
            return False
        os.kill(self.process.pid, signal.SIGSTOP)
        options = os.WSTOPPED | os.WEXITED | os.WNOWAIT  # whoever waits for its end still finds it
        state = os.waitid(os.P_PID, self.process.pid, options)
        return state is not None and state.si_code == os.CLD_STOPPED

    def go_on(self) -> None:
        """Lets it go on after ``hold``."""
        os.kill(self.process.pid, signal.SIGCONT)

    def settle(self) -> None:
        """Returns when it has taken all that was sent before, and has written its log so far."""
        assert ask(self.address, request(NOBODY, LIST)) == response(212, b"", b"\0\0\0\0")

    def log(self) -> List[str]:
        """What it has written to its log since the last call, without what ``settle`` caused."""
        self.settle()
        lines = (self._log.read() or b"").decode().splitlines()
        return [line for line in lines if f" user={NOBODY} " not in line]


@contextmanager
def traced(process: subprocess.Popen[bytes], trace: Path, inject: str = "") -> Iterator[None]:
    """Writes to ``trace`` what the process does meanwhile; ``inject`` is strace's, see there."""
    command = ["strace", "-f", "-y", "-s", "300", "-e", "signal=none", "-e", f"trace={CALLS}"]
    if inject:
        command += ["-e", f"inject={inject}"]
    command += ["-o", str(trace), "-p", str(process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        try:
            said: List[str] = []
            while not said or not said[-1].endswith("attached"):
                line = strace.stderr.readline().decode()
                if not line:
                    raise CannotTrace("; ".join(said))
                said.append(line.strip())
            yield
        finally:
            if process.poll() is None:
                strace.terminate()  # then it lets go of the process; of a dead one it does anyway


class CannotTrace(Exception):
    """What strace says when it cannot."""


@pytest.fixture(scope="module", autouse=True)
def tracing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips these tests, and says why, where no process can be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not here; .ci/run installs it")
    folder = tmp_path_factory.mktemp("tracing")
    with Child(folder / "store") as child:
        try:
            with traced(child.process, folder / "trace"):
                pass
        except CannotTrace as error:
            pytest.skip(f"no process can be traced here: {error}")


# The trace


class Event(NamedTuple):
    """One system call that matters here."""

    kind: str
    """One of ``KINDS``."""
    call: str
    when: int
    """Which call of this name it was since strace was attached: for ``when=N``."""
    path: str
    """Of the file or folder; for a rename, its new name; for an answer and an end, the socket."""
    old_path: str
    """Of what is renamed."""
    data: bytes
    """The first bytes of what is sent."""
    result: int

    @property
    def good(self) -> bool:
        return self.result >= 0

    @property
    def user_id(self) -> int:
        """Whose folder this is about, or a name in it."""
        parts = Path(self.path).parts
        return int(parts[-1] if self.kind in ("mkdir", "sync") else parts[-2])

    @property
    def name(self) -> str:
        """What was renamed, removed or answered."""
        if self.kind != "answer":
            return os.path.basename(self.path)
        return self.data[9 : 9 + struct.unpack("<H", self.data[3:5])[0]].decode()

    @property
    def status(self) -> int:
        """What was answered; 0 for what is no answer, or has not left."""
        if self.kind != "answer" or self.result < len(self.data):
            return 0
        return int(struct.unpack("<H", self.data[1:3])[0])


# 15462 renameat(AT_FDCWD</work>, "/store/.tmp/x", 13</store/1>, "a") = 0
LINE = re.compile(r"\d+ +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
ARGUMENT = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"|(?:\d+|AT_FDCWD)<(?P<place>(?:->|[^>])*)>')


def parse(trace: str) -> List[Event]:
    """The calls of a trace that matter; one in which the server was killed has no result."""
    events: List[Event] = []
    counts: Dict[str, int] = Counter()
    for line in trace.splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        call, arguments = match["call"], match["arguments"]
        counts[call] += 1
        kind, place, paths, data = KIND_OF[call], "", [], b""
        for argument in ARGUMENT.finditer(arguments):
            if argument["place"] is not None:
                place = argument["place"]  # what a descriptor is open on
            else:  # strace's escapes are Python's
                data = ast.literal_eval(f'b"{argument["text"]}"')
                paths.append(os.path.join(place, os.fsdecode(data)))
        on_socket = place.startswith("socket:")
        if kind == "write" and on_socket:
            kind = "answer"
        if kind == "create" and "O_CREAT" not in arguments:
            continue  # a folder is opened
        if kind == "write" and not place.startswith("/"):
            continue  # to the log
        if kind == "answer" and len(data) < len(response(STORED)):
            continue  # the reactor wakes itself
        if kind in ("write", "advise", "sync", "answer", "end"):
            paths = [place]
        result = int(match["result"])
        sent = data if kind == "answer" else b""
        events.append(Event(kind, call, counts[call], paths[-1], paths[0], sent, result))
    return events


def position(events: List[Event], kind: str, path: str, after: int = -1) -> int:
    """Where the last such call is that succeeded, behind ``after``; -1 if there is none."""
    places = [
        place
        for place, event in enumerate(events)
        if event.kind == kind and event.path == path and event.good and place > after
    ]
    return places[-1] if places else -1


def violations(events: List[Event], written: Mapping[str, int]) -> List[str]:
    """What the trace lacks of what its answers promise; ``written`` says how long files are."""
    found: List[str] = []
    for place, event in enumerate(events):
        if event.status in (STORED, DELETED):
            lacks = lacking(events[:place], event, written)
            found += [f"{event.status} for {event.name} left, but {what}" for what in lacks]
    return found


def lacking(before: List[Event], answer: Event, written: Mapping[str, int]) -> Iterator[str]:
    """What this answer promises and what came before it does not keep."""
    kind = "rename" if answer.status == STORED else "unlink"
    changes = [event for event in before if event.kind == kind and event.good]
    changes = [event for event in changes if event.name == answer.name]
    if not changes:
        yield f"there was no {kind}"
        return
    change = changes[-1]
    changed = position(before, kind, change.path)
    if kind == "rename":
        synced = position(before[:changed], "sync", change.old_path)
        if synced < 0:
            yield "the file was not fsynced before its rename"
        writes = [
            (place, event.result)
            for place, event in enumerate(before)
            if event.kind == "write" and event.path in (change.path, change.old_path)
        ]
        if any(place > synced for place, _ in writes):
            yield "the file was written to after its fsync"
        if sum(count for _, count in writes) != written[answer.name]:
            yield "not every byte was written"
    folder = os.path.dirname(change.path)
    root = os.path.dirname(folder)
    if position(before, "sync", folder, after=changed) < 0:
        yield f"the folder was not fsynced after the {kind}"
    made = position(before, "mkdir", folder)
    if made >= 0 and position(before, "sync", root, after=made) < 0:
        yield "the root was not fsynced after the user's folder was made"


def ungrouped(events: List[Event]) -> List[str]:
    """Where the trace of one batch is not one step after the other, each for all."""
    files = {event.old_path for event in events if event.kind == "rename"}
    step_of = {"advise": 1, "rename": 3, "unlink": 3, "answer": 5}

    def step(event: Event) -> int:
        if event.kind == "sync":
            return 2 if event.path in files else 4
        return step_of.get(event.kind, 0)

    steps = [step(event) for event in events if step(event)]
    found = []
    if set(steps) != {1, 2, 3, 4, 5} or steps != sorted(steps):
        found.append(f"the steps were {steps}")
    for name, kind in (("write-back", "advise"), ("fsync of a file", "sync")):
        if not files <= {event.path for event in events if event.kind == kind}:
            found.append(f"a file had no {name}")
    changed = [event.path for event in events if event.kind in ("rename", "unlink", "mkdir")]
    folders = {os.path.dirname(path) for path in changed}  # of a new folder, that is the root
    syncs = Counter(event.path for event in events if event.kind == "sync")
    found += [f"{path} was fsynced {syncs[path]} times" for path in folders if syncs[path] != 1]
    return found


# A run


def prepare(root: Path, scene: Scene) -> None:
    """Lays the older files of a scene into a store, as a server of before would have left them."""
    root.mkdir(exist_ok=True)
    for (user_id, name), older in scene.older.items():
        (root / str(user_id)).mkdir(exist_ok=True)
        (root / str(user_id) / name).write_bytes(older)


def run(
    child: Child, scene: Scene, trace: Path, inject: str = "", dies: bool = False
) -> Tuple[List[bytes], List[Event]]:
    """Plays a scene while strace looks on; all answers, empty where there was none, and the trace.

    ``dies``: the server is to die of SIGKILL before all is done.
    """
    answers: List[bytes] = []
    with ExitStack() as stack:
        early = stack.enter_context(begun(child, scene)) if scene.late else None
        with traced(child.process, trace, inject):
            for turn in scene.turns:
                answers += play(child, turn, early)
            if dies:
                assert child.process.wait(WAIT_SECONDS) == -signal.SIGKILL
    return answers, parse(trace.read_text(encoding="ascii"))


def begun(child: Child, scene: Scene) -> socket.socket:
    """A connection that has sent all but the last byte of the one request, which are written."""
    (wish,) = scene.wishes
    sock = connect(child.address)
    try:
        sock.sendall(wish.data[:-1])
        size = 0
        while size < len(wish.content) - 1:
            child.settle()
            (path,) = (child.root / ".tmp").iterdir()
            size = path.stat().st_size
        child.settle()  # and now nothing is left to be done
    except BaseException:
        sock.close()
        raise
    return sock


def play(child: Child, turn: List[Wish], early: Optional[socket.socket]) -> List[bytes]:
    """Has one turn of the loop receive all these requests; the answers, in this order."""
    if not child.hold():
        return [b""] * len(turn)
    with ExitStack() as stack:
        rests: List[Tuple[socket.socket, bytes]] = []
        for wish in turn:
            data = wish.data[-1:] if early else wish.data
            sock = early or stack.enter_context(connect(child.address))
            sock.sendall(data[:HELD_BYTES])
            rests.append((sock, data[HELD_BYTES:]))
        child.go_on()
        for sock, rest in rests:
            with suppress(ConnectionError):  # it may die before it has read that, or refuse it
                sock.sendall(rest)
        return [answer_of(sock) for sock, _ in rests]


def answer_of(sock: socket.socket) -> bytes:
    try:
        return read_all(sock)
    except ConnectionError:
        return b""


def effect(scene: Scene, events: List[Event]) -> Files:
    """What is stored if exactly those changes took effect whose calls have succeeded."""
    contents = {wish.name: wish.content for wish in scene.wishes if wish.op == BACKUP}
    files = dict(scene.older)
    for event in events:
        if event.kind == "rename" and event.good:
            files[event.user_id, event.name] = contents[event.name]
        elif event.kind == "unlink" and event.good and ".tmp" not in Path(event.path).parts:
            del files[event.user_id, event.name]
    return files


def on_disk(root: Path, users: Set[int]) -> Files:
    """All files in these users' folders, read past the server."""
    files: Files = {}
    for user_id in users:
        folder = root / str(user_id)
        for path in folder.iterdir() if folder.exists() else ():
            files[user_id, path.name] = path.read_bytes()
    return files


def temporary(root: Path) -> List[str]:
    return sorted(path.name for path in (root / ".tmp").iterdir())


def check_served(address: Tuple[str, int], users: Set[int], files: Files) -> None:
    """These users have these files and no others, if one asks the server."""
    for user_id in users:
        names = sorted(name.encode() for owner, name in files if owner == user_id)
        listed = b"".join(struct.pack("<H", len(name)) + name for name in names)
        answer = response(212, b"", struct.pack("<I", len(names)) + listed)
        assert ask(address, request(user_id, LIST)) == answer
    for (user_id, name), stored in files.items():
        answer = response(212, name.encode(), file_payload(stored))
        assert ask(address, request(user_id, RETRIEVE, name.encode())) == answer


# 1. The order, from the trace


@every_scene
def test_no_answer_leaves_before_the_calls_it_promises(
    tmp_path: Path, scene_of: Callable[[int], Scene]
) -> None:
    scene, root = scene_of(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root) as child:
        answers, events = run(child, scene, tmp_path / "trace")
    assert answers == [wish.success for wish in scene.wishes]
    left = Counter((event.status, event.name) for event in events if event.kind == "answer")
    stored = {BACKUP: STORED, DELETE: DELETED}
    assert left == Counter((stored[wish.op], wish.name) for wish in scene.wishes)
    assert violations(events, scene.written) == []
    assert on_disk(root, scene.users) == effect(scene, events)


def test_what_completes_in_one_turn_is_made_durable_together(tmp_path: Path) -> None:
    scene, root = together(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root) as child:
        _, events = run(child, scene, tmp_path / "trace")
    assert ungrouped(events) == []
    folders = [event.path for event in events if event.kind == "sync" and ".tmp" not in event.path]
    assert sorted(folders) == [str(root), *(f"{root}/{user_id}" for user_id in (1, 2, 3))]


def test_a_batch_is_bounded(tmp_path: Path) -> None:
    most = Settings().commit_files
    wishes = [Wish(1, BACKUP, str(number), content(str(number), 100)) for number in range(most + 6)]
    with ExitStack() as stack:
        child = stack.enter_context(Child(tmp_path / "store"))
        socks = [stack.enter_context(connect(child.address)) for _ in wishes]
        for sock, wish in zip(socks, wishes):
            sock.sendall(wish.data[:-1])
        child.settle()
        with traced(child.process, tmp_path / "trace"):
            assert child.hold()
            for sock, wish in zip(socks, wishes):
                sock.sendall(wish.data[-1:])
            child.go_on()
            assert [read_all(sock) for sock in socks] == [wish.success for wish in wishes]
    events = parse((tmp_path / "trace").read_text(encoding="ascii"))
    assert violations(events, {wish.name: 1 for wish in wishes}) == []
    # One letter a call: all renames of a batch, then all its answers.
    shape = "".join(event.kind[0] for event in events if event.kind in ("rename", "answer"))
    assert re.fullmatch("(?:r+a+)+", shape)
    assert [len(renames) for renames in re.findall("r+", shape)] == [most, 6]


# The checks of a trace can fail


def test_a_trace_that_lacks_a_promised_call_or_has_it_too_late_is_complained_about(
    tmp_path: Path,
) -> None:
    scene, root = together(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root) as child:
        _, events = run(child, scene, tmp_path / "trace")
    promised = ("write", "sync", "rename", "unlink")
    doctored = 0
    for place, event in enumerate(events):
        rest = events[:place] + events[place + 1 :]
        failed = event._replace(result=-1)
        versions = {
            "is missing": rest,
            "has failed": [*events[:place], failed, *events[place + 1 :]],
            "comes last": [*rest, event],
        }
        if event.kind in ("sync", "rename"):
            versions["comes first"] = [event, *rest]
        if event.kind in promised:
            doctored += len(versions)
            for what, version in versions.items():
                assert violations(version, scene.written), f"{event} {what}"
        if event.status:
            assert violations([event, *rest], scene.written), f"{event} comes first"
        if event.kind in ("advise", "answer", "sync"):
            assert ungrouped([*rest, event] if event.kind != "answer" else [event, *rest]), event
        if event.kind in ("advise", "sync"):
            assert ungrouped(rest), f"{event} is missing"
        if event.kind == "sync" and ".tmp" not in event.path:
            assert ungrouped([*events[:place], event, *events[place:]]), f"{event} comes twice"
    assert doctored == 4 * 3 + (4 + 4) * 4 + 4 * 4 + 3 * 3


def test_a_trace_in_which_a_file_grows_after_its_early_fsync_is_complained_about(
    tmp_path: Path,
) -> None:
    scene, root = large(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root) as child:
        _, events = run(child, scene, tmp_path / "trace")
    early, last, _ = (event for event in events if event.kind == "sync")
    assert early.path == last.path
    events.remove(early)
    assert violations(events, scene.written) == []  # not what the answer promises
    events[events.index(last)] = early
    assert violations(events, scene.written) == []
    events.remove(early)
    between = next(place for place, event in enumerate(events) if event.kind == "write")
    events.insert(between + 1, early)
    assert violations(events, scene.written) == [
        "210 for large left, but the file was written to after its fsync"
    ]


def test_the_trace_of_a_server_that_does_not_fsync_is_complained_about(tmp_path: Path) -> None:
    scene, root = together(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root, "--no-fsync") as child:
        answers, events = run(child, scene, tmp_path / "trace")
    assert answers == [wish.success for wish in scene.wishes]
    complaints = violations(events, scene.written)
    for wish in scene.wishes:
        status = STORED if wish.op == BACKUP else DELETED
        assert any(f"{status} for {wish.name} left, but" in what for what in complaints), wish
    assert ungrouped(events)


# 2. Killed at every call

THINNED = {"write": {1, 2, 10, 20}, "advise": {1, 2, 3}}
"""Of calls of these kinds for one file, which are hit: in every run there are so many at least,
since 256 KiB are received at once and write-back is started after 1 MiB. Small files have one."""


def points(scene: Scene, events: List[Event]) -> List[Event]:
    """The calls of a run that are hit in others; of a late one, those that ``large`` cannot hit."""
    found: List[Event] = []
    seen: Dict[Tuple[str, str], int] = Counter()
    for event in events:
        seen[event.kind, event.path] += 1
        which = seen[event.kind, event.path]
        some = THINNED.get(event.kind, set() if scene.late else {which})
        if which in some:
            found.append(event)
    return found


def steady(events: List[Event]) -> List[str]:
    """What is the same in every run."""
    return [event.kind for event in events if event.kind not in THINNED]


def possible(scene: Scene, answers: List[bytes]) -> Iterator[Tuple[Tuple[int, str], Set[bytes]]]:
    """Of each name, what it may hold after these answers; ``b""`` for nothing.

    A client cannot know whether what was not acknowledged took effect: the server may have died
    between the rename and the answer. So it is what any number of those changes would leave.
    """
    changes: Dict[Tuple[int, str], List[Tuple[Wish, bool]]] = {key: [] for key in scene.older}
    for wish, answer in zip(scene.wishes, answers):
        changes.setdefault((wish.user_id, wish.name), []).append((wish, answer == wish.success))
    for key, wishes in changes.items():
        files = dict(scene.older)
        states = [files.get(key, b"")]
        for wish, acknowledged in wishes:
            wish.apply(files)
            if acknowledged:
                states.clear()
            states.append(files.get(key, b""))
        yield key, set(states)


@contextmanager
def restarted(root: Path, real: bool) -> Iterator[Tuple[str, int]]:
    """The next server of this root: in a process of its own if ``real``, which takes longer."""
    if real:
        with Child(root) as child:
            yield child.address
    else:
        with RunningServer(root) as server:
            yield server.address


@every_scene
def test_a_server_killed_at_any_call_keeps_what_it_acknowledged_and_no_part_of_anything(
    tmp_path: Path, scene_of: Callable[[int], Scene]
) -> None:
    scene = scene_of(1)

    def killed(number: int, point: Optional[Event] = None) -> List[Event]:
        """One run, killed at this point; without one, the whole run."""
        root, trace = tmp_path / f"store {number}", tmp_path / f"trace {number}"
        prepare(root, scene)
        inject = f"{point.call}:signal=SIGKILL:when={point.when}" if point else ""
        with Child(root) as child:
            answers, events = run(child, scene, trace, inject, dies=point is not None)

        if point is not None:  # it died there: entered that call as its last, and did not return
            calls = trace.read_text(encoding="ascii").splitlines()
            assert re.fullmatch(rf"\d+ +{point.call}\(.*= \?", calls[-1]), calls[-1]
            assert sum(f" {point.call}(" in line for line in calls) == point.when
        assert violations(events, scene.written) == []
        acknowledged = [
            wish.name for wish, answer in zip(scene.wishes, answers) if answer == wish.success
        ]
        assert acknowledged == [event.name for event in events if event.status]

        with restarted(root, real=number <= 1) as address:
            files = on_disk(root, scene.users)
            for key, states in possible(scene, answers):
                assert files.get(key, b"") in states, f"{key} after {acknowledged}"
            # And the new file is there only if its rename was done.
            assert files == effect(scene, events)
            check_served(address, scene.users, files)
            assert temporary(root) == []
        shutil.rmtree(root)  # some of them are large
        return events

    whole = killed(0)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        hit = points(scene, whole)
        runs = [pool.submit(killed, number, point) for number, point in enumerate(hit, 1)]
        for point, ended in zip(hit, runs):
            try:
                events = ended.result()
            except Exception as error:
                raise AssertionError(f"killed at {point}") from error
            assert steady(events) == steady(whole[: whole.index(point)])


# 3. Errors at every call


class Rehearsal(NamedTuple):
    """A run in which nothing went wrong."""

    scene: Scene
    events: List[Event]


def rehearse(tmp_path: Path, scene: Scene) -> Rehearsal:
    prepare(tmp_path / "rehearsal", scene)
    with Child(tmp_path / "rehearsal") as child:
        _, events = run(child, scene, tmp_path / "rehearsed")
    return Rehearsal(scene, events)


def blamed(rehearsal: Rehearsal, point: Event) -> Set[int]:
    """Which wishes an error at this call concerns, by their place in the scene."""
    scene, events = rehearsal
    is_new = {event.user_id for event in events if event.kind == "mkdir"}
    named = {event.old_path: event.name for event in events if event.kind == "rename"}
    found: Set[int] = set()
    for place, wish in enumerate(scene.wishes):
        upload = wish.op == BACKUP
        if point.path in named:  # the temporary file
            concerned = upload and wish.name == named[point.path]
        elif point.kind in ("rename", "unlink"):
            concerned = upload == (point.kind == "rename") and wish.name == point.name
        elif point.kind == "mkdir":
            concerned = upload and wish.user_id == point.user_id
        elif Path(point.path).name.isdigit():  # the user's folder is fsynced
            concerned = wish.user_id == point.user_id
        else:  # the root is
            concerned = wish.user_id in is_new
        if concerned:
            found.add(place)
    return found


def check_error(
    child: Child, scene: Scene, rehearsal: Rehearsal, point: Event, code: str, trace: Path
) -> None:
    """Plays the scene with this error at this point of it, as ``rehearsal`` has shown it."""
    prepare(child.root, scene)
    inject = f"{point.call}:error={code}:when={point.when}"
    answers, events = run(child, scene, trace, inject)
    assert "(INJECTED)" in trace.read_text(encoding="ascii")

    # Only those it concerns have failed, and whoever removes what is therefore not there.
    failing = blamed(rehearsal, point)
    assert failing
    right = dict(scene.older)
    for place, (wish, answer) in enumerate(zip(scene.wishes, answers)):
        in_vain = wish.op == DELETE and (wish.user_id, wish.name) not in right
        assert answer == (wish.failure if place in failing or in_vain else wish.success), wish
        if answer == wish.success:
            wish.apply(right)
    assert violations(events, scene.written) == []

    # Its name stands for the older file; where the folder could not be fsynced, perhaps for the
    # new one: what the trace says has been done.
    files = on_disk(child.root, scene.users)
    assert files == effect(scene, events)
    folder = point.kind == "sync" and ".tmp" not in Path(point.path).parts
    assert folder or files == right
    assert temporary(child.root) == []

    lines = child.log()
    for place, wish in enumerate(scene.wishes):
        about = f" user={wish.user_id} op={wish.op} file={wish.name} status="
        (line,) = (line for line in lines if about in line)
        assert line.endswith(" reason=store") == (place in failing), line
    check_served(child.address, scene.users, files)  # it serves on
    child.log()


FAILING = ("create", "write", "sync", "mkdir", "rename", "unlink")


@pytest.mark.parametrize(
    ("scene_of", "code"),
    [
        (alone, "EIO"),
        (alone, "ENOSPC"),
        (together, "EIO"),
        (together, "ENOSPC"),
        (together, "EDQUOT"),
    ],
)
def test_an_error_of_the_disk_fails_that_file_alone(
    tmp_path: Path, scene_of: Callable[[int], Scene], code: str
) -> None:
    rehearsal = rehearse(tmp_path, scene_of(1))
    hit = [point for point in points(*rehearsal) if point.kind in FAILING]
    assert {point.kind for point in hit} == set(FAILING)
    if code == "EDQUOT":  # handled as the other two are, and met where a quota is exceeded
        hit = [point for point in hit if point.kind in ("create", "write")]

    def share(number: int) -> None:
        """Every other of the points, with one server, and other users for each."""
        with Child(tmp_path / f"store {number}") as child:
            for place in range(number, len(hit), 2):
                scene = scene_of(10 * place + 1)
                trace = tmp_path / f"trace {place}"
                check_error(child, scene, rehearsal, hit[place], code, trace)
            child.process.terminate()
            assert child.process.wait(WAIT_SECONDS) == 0

    with ThreadPoolExecutor(2) as pool:
        for ended in [pool.submit(share, number) for number in range(2)]:
            ended.result()


@pytest.mark.parametrize("scene_of", [large, end_of_large])
def test_an_error_of_the_disk_fails_a_large_file_too(
    tmp_path: Path, scene_of: Callable[[int], Scene]
) -> None:
    scene = scene_of(1)
    rehearsal = rehearse(tmp_path, scene)
    hit = [point for point in points(*rehearsal) if point.kind in ("write", "sync")]
    hit = [point for point in hit if point.path != f"{tmp_path}/rehearsal/1"]  # no news there

    def one(number: int, point: Event, code: str) -> None:
        # A server for each: from the first file of this size a server learns how quick the disk
        # is, and it may fsync no second one early.
        with Child(tmp_path / f"store {number}") as child:
            check_error(child, scene, rehearsal, point, code, tmp_path / f"trace {number}")
        shutil.rmtree(child.root)

    cases = [(point, code) for point in hit for code in ("EIO", "ENOSPC")]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for ended in [pool.submit(one, number, *case) for number, case in enumerate(cases)]:
            ended.result()
    shutil.rmtree(tmp_path / "rehearsal")


@pytest.mark.parametrize("scene_of", [together, large])
def test_advice_that_the_system_does_not_take_fails_nothing(
    tmp_path: Path, scene_of: Callable[[int], Scene]
) -> None:
    scene, root = scene_of(1), tmp_path / "store"
    prepare(root, scene)
    with Child(root) as child:
        inject = "?fadvise64,?fadvise64_64:error=ENOSYS"
        answers, events = run(child, scene, tmp_path / "trace", inject)
    assert [event.result for event in events if event.kind == "advise"].count(-1) > 0
    assert answers == [wish.success for wish in scene.wishes]
    assert violations(events, scene.written) == []
