#!/usr/bin/env python3
"""Good clients beside bad ones, while the server is killed and its disk refuses: is anything lost?

    python3 tools/soak.py [--seconds N] [--seed N] [--clients N] [--bad-clients N]
                          [--kill-every SECONDS] [--fault-every SECONDS] [--work DIR]

Rules: the server is a real process (``lives``). What it acknowledges goes into a
``ledger``; each RETRIEVE and LIST is held against that, and, at each kill, before
the next start, the disk is, byte for byte. At the end all clients go, the
descriptors are counted (for which the last life is not cut short), and after a
last kill and a last start the store is held against the ledger twice more:
through the server, and on the disk.
A good client does one request at a time and repeats it when a kill cut it off.
Its names are changed by nobody else; other clients of its user read them.
A refusal needs a fault beside it, and a connection that breaks a kill; any other
counts as a failure. While there was a fault, "no such file" says nothing.

The exit code is 1 if an acknowledged file was lost, a descriptor leaked, or
anything else was not as it must be; then the store is left, for a look.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import (
    Backup,
    BackupError,
    Client,
    ConnectionFailed,
    Delete,
    Job,
    Listing,
    NotFound,
    Outcome,
    ProtocolError,
    Refused,
    Retrieve,
    Unreachable,
)
from backup.server import raise_descriptor_limit
from tools.common import at_least_one, run
from tools.ledger import Change, Content, Fate, Ledger, Reading
from tools.lives import Died, Fault, Lives, faults

HERE = Path(__file__).resolve().parent.parent
KIB, MIB = 1024, 1024 * 1024

MAX_CLIENTS = 300
CLIENTS_PER_USER = 4
NAMES = ("report-{}.pdf", "größe {} ✓", "-.{}")
"""The names of a client's files; {} is its number."""

SIZES = [(0.1, 1, 9), (0.5, 10, 16 * KIB), (0.3, 16 * KIB, 128 * KIB)]
SIZES += [(0.08, 128 * KIB, MIB), (0.02, MIB, 6 * MIB)]
"""How many files have how many bytes: share, from, to. Some 130 KB on average."""

FAULT_SECONDS = 1.5
"""How long a fault lasts, at the longest."""

SETTLE_SECONDS = 10.0
"""How long the server may take to let go of connections that are closed."""


class Operation:
    """One request of a good client's, from before it is sent until its outcome."""

    def __init__(self, job: Job, epoch: int, life: int) -> None:
        self.job = job
        self.epoch = epoch
        self.life = life
        self.change: Optional[Change] = None
        self.reading: Optional[Reading] = None
        self.content: Optional[Content] = None  # of a BACKUP


class GoodClient:
    """One request after the other, each drawn when the one before has ended."""

    def __init__(self, soak: Soak, number: int) -> None:
        self._soak = soak
        self._random = random.Random(f"{soak.seed} client {number}")
        self._number = number
        self.user_id = 1 + number // CLIENTS_PER_USER
        self._names = [name.format(number) for name in NAMES]
        self._serial = number << 32
        self._source = soak.work / f"source-{number}"
        self._copy = soak.work / f"copy-{number}"

    def begin(self, again: Optional[Operation] = None) -> None:
        """Begins a request: the one that was cut off, or a new one."""
        job, content = (again.job, again.content) if again is not None else self._draw()
        operation = self._soak.operation(job)
        operation.content = content
        key = (self.user_id, job.name)
        if isinstance(job, Backup):
            operation.change = self._soak.ledger.begin(key, content)
        elif isinstance(job, Delete):
            operation.change = self._soak.ledger.begin(key, None)
        elif isinstance(job, Retrieve):
            operation.reading = self._soak.ledger.read([key])
        else:
            names = self._soak.ledger.names(self.user_id)
            operation.reading = self._soak.ledger.read((self.user_id, name) for name in names)
        self._soak.client.submit(job, lambda outcome: self._ended(operation, outcome))

    def _draw(self) -> Tuple[Job, Optional[Content]]:
        name = self._random.choice(self._names)
        chance = self._random.random()
        if chance < 0.45:
            content = self._content()
            self._source.write_bytes(content.data())
            return Backup(self._source, name, self.user_id), content
        if chance < 0.6:
            return Delete(name, self.user_id), None
        if chance < 0.7:
            return Listing(self.user_id), None
        known = self._soak.ledger.names(self.user_id)
        if self._random.random() < 0.4 and known:
            name = self._random.choice(sorted(known))  # of a client beside this one, perhaps
        return Retrieve(name, self._copy, True, self.user_id), None

    def _content(self) -> Content:
        self._serial += 1
        shares = [share for share, _, _ in SIZES]
        _, least, most = self._random.choices(SIZES, shares)[0]
        return Content(self._serial, self._random.randint(least, most))

    def _ended(self, operation: Operation, outcome: Outcome) -> None:
        if self._soak.given_up:
            return
        again = self._soak.ended(operation, outcome, self.user_id)
        if self._soak.going_on:
            self.begin(operation if again else None)


class Soak:
    """One run: the server and its clients, what happens to them, and what was found."""

    def __init__(self, chosen: argparse.Namespace, work: Path) -> None:
        self.work = work
        self.seed: int = chosen.seed
        self.ledger = Ledger()
        self.lives = Lives(work / "store")
        self.client = Client(("127.0.0.1", 0), 0)  # with the server's address when there is one
        self.going_on = True
        self.given_up = False  # what is under way is cancelled, and says nothing of the server
        self._chosen = chosen
        self._random = random.Random(f"{chosen.seed} director")
        self._faults: List[Fault] = []
        self._fault: Optional[Fault] = None
        self._epoch = 0  # odd while there is a fault
        self._last_fault = ""
        self._began = time.monotonic()
        self.answers: Counter[Tuple[str, str]] = Counter()
        self.injected: Counter[str] = Counter()
        self.bites: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.mischief: Dict[str, int] = {}
        self.kills = 0
        self.slowest = self.slowest_at_peace = 0.0
        self.bytes = 0
        self.descriptors = [0, 0]  # at the start, and when all clients have gone
        self.memory = [0, 0, 0]  # at the first start, the last one, and the end

    @property
    def lost(self) -> int:
        """Acknowledged files that are not as they were acknowledged, and removals undone."""
        return len(self.ledger.findings)

    @property
    def leaked(self) -> int:
        """Descriptors that the server has more than at its start, without a client."""
        return max(0, self.descriptors[1] - self.descriptors[0])

    @property
    def good(self) -> bool:
        """Whether all was as it must be."""
        return not (self.lost or self.leaked or self.failures)

    # What the good clients ask of it.

    def operation(self, job: Job) -> Operation:
        """A request that is about to begin."""
        return Operation(job, self._epoch, self.lives.number)

    def ended(self, operation: Operation, outcome: Outcome, user_id: int) -> bool:
        """Enters into the ledger how a request has ended; whether it is to be repeated."""
        error = outcome.error
        killed = operation.life != self.lives.number
        trouble = operation.epoch % 2 == 1 or operation.epoch != self._epoch
        self.answers[type(operation.job).__name__, _status(operation.job, error)] += 1
        if error is None:
            self.bytes += outcome.bytes
        if not killed:
            self.slowest = max(self.slowest, outcome.seconds)
            if not trouble:
                self.slowest_at_peace = max(self.slowest_at_peace, outcome.seconds)
        if isinstance(error, ConnectionFailed) and not killed:
            self._fail(f"cut off without a kill: {error.text}")
        elif isinstance(error, Refused) and not _nothing_there(operation.job, error):
            if trouble:
                self.bites[self._last_fault] += 1
            else:
                self._fail(f"refused without a fault: {error.text}")
        elif error is not None and not isinstance(error, (ConnectionFailed, Refused)):
            kind = "not the protocol" if isinstance(error, ProtocolError) else "the soak's own"
            self._fail(f"{kind}: {error}")
        if operation.change is not None:
            self.ledger.end(operation.change, _fate(operation.job, error, trouble))
        if operation.reading is not None:
            self._read(operation.reading, outcome, user_id, trouble)
            self.ledger.end_reading(operation.reading)
        return isinstance(error, ConnectionFailed)

    def _read(self, reading: Reading, outcome: Outcome, user_id: int, trouble: bool) -> None:
        job, error = outcome.job, outcome.error
        if isinstance(job, Retrieve):
            key = (user_id, job.name)
            if error is None:
                self.ledger.saw(reading, key, Path(job.path).read_bytes(), "RETRIEVE")
            elif isinstance(error, NotFound) and not trouble:
                self.ledger.saw(reading, key, None, "RETRIEVE")
        elif error is None:
            self._saw_listing(reading, user_id, outcome.names, trouble)

    def _saw_listing(
        self, reading: Reading, user_id: int, names: List[str], trouble: bool = False
    ) -> None:
        known = {name for _, name in reading.possible}
        for name in names:
            if name in known:
                self.ledger.saw_name(reading, (user_id, name), True, "LIST")
            elif name not in self.ledger.names(user_id):  # or it was begun meanwhile
                self.ledger.saw_stray((user_id, name), "LIST")
        if not trouble:
            for name in known - {*names}:
                self.ledger.saw_name(reading, (user_id, name), False, "LIST")

    def _fail(self, text: str) -> None:
        self.failures[text] += 1

    # What happens.

    def run(self) -> None:
        """All of it. Raises ``Died``."""
        with ExitStack() as stack:
            stack.callback(self.client.close)
            stack.enter_context(self.lives)
            stack.callback(self._end_fault)  # first of all, so that the store is whole
            self.lives.start()
            self.descriptors[0] = self.lives.descriptors()
            self.memory[0] = self.memory[1] = self.lives.memory()
            self._faults = faults(self.lives, self.ledger.users, self._random)
            self._random.shuffle(self._faults)
            self.client.close()
            self.client = Client(self.lives.address, 0)
            stack.callback(self.client.close)
            mischief = self._mischief()
            stack.enter_context(mischief)
            stack.callback(mischief.kill)
            stack.callback(self._give_up)
            self._load()
            said, _ = mischief.communicate()
            self.mischief = json.loads(said or "{}")
            if mischief.returncode:
                self._fail("the soak's own: the bad clients ended by themselves")
            self._settle()
            self._end()

    def _give_up(self) -> None:
        self.given_up = True

    def _mischief(self) -> subprocess.Popen[bytes]:
        host, port = self.lives.address
        command = [sys.executable, str(HERE / "tools" / "mischief.py")]
        command += ["--server", f"{host}:{port}", "--seed", str(self.seed)]
        command += ["--clients", str(self._chosen.bad_clients)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _load(self) -> None:
        """All clients, kills and faults, until the time is over and every request has ended."""
        for number in range(self._chosen.clients):
            GoodClient(self, number).begin()
        self._began = now = time.monotonic()
        end = now + self._chosen.seconds
        next_kill = now + self._about(self._chosen.kill_every)
        next_fault = now + self._about(self._chosen.fault_every)
        next_line = now + self._chosen.line_every
        while self.client.busy:
            self.client.turn()
            self.lives.check()
            now = time.monotonic()
            if not self.going_on:
                continue
            if now >= end:
                self.going_on = False
                self._end_fault()
            elif now >= next_kill and now < end - self._chosen.kill_every:
                self._kill()
                next_kill = now + self._about(self._chosen.kill_every)
            elif now >= next_fault:
                if self._fault is None:
                    self._begin_fault()
                    length = min(FAULT_SECONDS, self._chosen.fault_every / 2)
                    next_fault = now + self._random.uniform(length / 4, length)
                else:
                    self._end_fault()
                    next_fault = now + self._about(self._chosen.fault_every)
            if now >= next_line:
                print(self._line(), flush=True)
                next_line += self._chosen.line_every

    def _about(self, seconds: float) -> float:
        return seconds * self._random.uniform(0.5, 1.5)

    def _begin_fault(self) -> None:
        fault = self._faults[sum(self.injected.values()) % len(self._faults)]
        self._epoch += 1
        self._last_fault = fault.name
        self.injected[fault.name] += 1
        self.ledger.happened(f"fault: {fault.name}")
        if fault.begin(self.lives):
            self._fault = fault
        else:
            self._epoch += 1

    def _end_fault(self) -> None:
        if self._fault is not None:
            fault, self._fault = self._fault, None
            fault.end(self.lives)
            self._epoch += 1
            self.ledger.happened(f"fault over: {fault.name}")

    def _kill(self) -> None:
        """SIGKILL, a look at the disk, and the next life. Raises ``Died``."""
        self.lives.kill()
        self.kills += 1
        self.ledger.server_died()
        self.ledger.happened(f"kill {self.kills}")
        self._end_fault()
        left = self._temporary()
        self._look_at_disk(f"on the disk, after kill {self.kills}")
        self.lives.start()
        self.memory[1] = self.lives.memory()
        unswept = left & self._temporary()
        if unswept:
            self._fail(f"temporary files that the next start did not sweep: {len(unswept)}")

    def _temporary(self) -> set[str]:
        return {path.name for path in (self.lives.root / ".tmp").iterdir()}

    def _look_at_disk(self, where: str) -> None:
        """Holds every file against the ledger, while no server changes any."""
        for user_id in list(self.ledger.users):
            folder = self.lives.root / str(user_id)
            found = {path.name for path in folder.iterdir()} if folder.exists() else set()
            known = set(self.ledger.names(user_id))
            reading = self.ledger.read((user_id, name) for name in known)
            for name in known:
                data = (folder / name).read_bytes() if name in found else None
                self.ledger.saw(reading, (user_id, name), data, where)
            self.ledger.end_reading(reading)
            for name in found - known:
                self.ledger.saw_stray((user_id, name), where)

    def _settle(self) -> None:
        """Without a client: counts what the server still has open."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            self.client.list()  # a whole request, in which the server takes some turns
            self.lives.check()
            self.descriptors[1] = self.lives.descriptors()
            if self.descriptors[1] <= self.descriptors[0] or time.monotonic() > end:
                break
            time.sleep(0.02)  # /proc tells of no event
        self.memory[2] = self.lives.memory()

    def _end(self) -> None:
        """The last kill, and all that was acknowledged: from the server, and on the disk."""
        self._kill()
        left = len(self._temporary())
        if left:
            self._fail(f"temporary files after the last start: {left}")
        for user_id in list(self.ledger.users):
            reading = self.ledger.read((user_id, name) for name in self.ledger.names(user_id))
            for outcome in self.client.run([Listing(user_id)]):
                if outcome.error is not None:
                    raise outcome.error
                self._saw_listing(reading, user_id, outcome.names)
            self.ledger.end_reading(reading)
        for outcome in self.client.run(self.everything()):
            assert outcome.job.user_id is not None
            reading = self.ledger.read([(outcome.job.user_id, outcome.job.name)])
            if outcome.error is not None and not isinstance(outcome.error, NotFound):
                raise outcome.error
            self._read(reading, outcome, outcome.job.user_id, trouble=False)
            self.ledger.end_reading(reading)
        self.lives.check()
        code = self.lives.stop(SETTLE_SECONDS)
        if code:
            self._fail(f"the server's exit code is {code} after SIGTERM")
        self._look_at_disk("on the disk, at the end")
        if self.lives.tracebacks:
            self._fail(f"tracebacks in the server's log: {self.lives.tracebacks}")

    def everything(self) -> Iterator[Job]:
        """A RETRIEVE of each name, to a place of its own: any number may overtake a large one."""
        for number, (user_id, name) in enumerate(list(self.ledger)):
            yield Retrieve(name, self.work / f"last-{number}", True, user_id)

    # What it says.

    def _line(self) -> str:
        return (
            f"{time.monotonic() - self._began:6.0f} s  {sum(self.answers.values())} requests, "
            f"{self.kills} kills, {sum(self.injected.values())} faults, {self.lost} lost, "
            f"server: {self.lives.descriptors()} descriptors, {_mib(self.lives.memory())}"
        )

    def table(self) -> Iterator[str]:
        """The last lines."""
        for op in ("Backup", "Retrieve", "Delete", "Listing"):
            counts = {status: n for (of, status), n in self.answers.items() if of == op}
            cells = "  ".join(f"{status}: {counts[status]}" for status in sorted(counts))
            yield f"{op.lower():10}{sum(counts.values()):8}  {cells}"
        yield f"{'bad ones':10}{sum(self.mischief.values()):8}  {_counts(self.mischief)}"
        rows: List[Tuple[str, Union[int, str]]] = [
            ("kills", self.kills),
            ("injected faults", _counts(self.injected) or "none"),
            ("refusals beside them", _counts(self.bites) or "none"),
            ("names in the ledger", len(list(self.ledger))),
            ("bytes of good clients", _mib(self.bytes)),
            ("acknowledged files lost", self.lost),
            (
                "leaked descriptors",
                f"{self.leaked} ({self.descriptors[0]} at the start, "
                f"{self.descriptors[1]} at the end)",
            ),
            (
                "server memory",
                f"{_mib(self.memory[0])} at the first start, {_mib(self.memory[1])} at the last, "
                f"{_mib(self.memory[2])} at the end",
            ),
            (
                "slowest answer to a good client",
                f"{self.slowest * 1000:.0f} ms; without a fault, "
                f"{self.slowest_at_peace * 1000:.0f} ms",
            ),
        ]
        for title, value in rows:
            yield f"{title:33}{value}"
        for finding in self.ledger.findings[:20]:
            yield f"FOUND  {finding}"
            for when, text in finding.history:
                yield f"       {when - self._began:9.3f} s  {text}"
        for text, count in self.failures.most_common(20):
            yield f"FAILED {count} × {text}"
        yield "all good" if self.good else "something FAILED"


def _status(job: Job, error: Optional[BackupError]) -> str:
    if error is None:
        return {"Backup": "210", "Delete": "211"}.get(type(job).__name__, "212")
    if isinstance(error, ConnectionFailed):
        return "cut off"
    if isinstance(error, Refused):
        if isinstance(error, NotFound):
            return "1003"
        return "1002" if isinstance(job, Delete) else "1001"
    return "wrong"


def _nothing_there(job: Job, error: Refused) -> bool:
    """Whether it may only say that there is no such file."""
    return isinstance(job, Delete) or isinstance(error, NotFound)


def _fate(job: Job, error: Optional[BackupError], trouble: bool) -> Fate:
    if error is None:
        return Fate.ACKNOWLEDGED
    if isinstance(error, Unreachable):
        return Fate.NOT_DONE
    if not isinstance(error, Refused):
        return Fate.UNANSWERED
    if trouble:  # if it was the folder's fsync that failed, the name may stand for either
        return Fate.REFUSED_IN_TROUBLE
    return Fate.NOTHING_THERE if isinstance(job, Delete) else Fate.NOT_DONE


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


def _counts(counts: Dict[str, int]) -> str:
    return ", ".join(f"{name} {counts[name]}" for name in sorted(counts))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _clients(text: str) -> int:
    value = at_least_one(text)
    if value > MAX_CLIENTS:
        raise argparse.ArgumentTypeError(f"{text} clients; at most {MAX_CLIENTS}")
    return value


def options(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description="Is anything lost?", allow_abbrev=False)
    parser.add_argument("--seconds", type=_seconds, default=120.0, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--clients", type=_clients, default=200, metavar="N")
    parser.add_argument("--bad-clients", type=_clients, default=60, metavar="N")
    parser.add_argument("--kill-every", type=_seconds, default=8.0, metavar="SECONDS")
    parser.add_argument("--fault-every", type=_seconds, default=2.0, metavar="SECONDS")
    parser.add_argument("--line-every", type=_seconds, default=10.0, metavar="SECONDS")
    parser.add_argument("--work", metavar="DIR", help="keeps its files there (default: drawn)")
    return parser.parse_args(arguments)


def main() -> int:
    chosen = options()
    raise_descriptor_limit()
    work = Path(tempfile.mkdtemp(prefix="backup-soak-", dir=chosen.work))
    soak = Soak(chosen, work)
    try:
        soak.run()
    except Died as error:
        soak.failures[str(error)] += 1
    except BaseException:
        shutil.rmtree(work)
        raise
    for row in soak.table():
        print(row)
    if soak.good:
        shutil.rmtree(work)
    else:
        print(f"the store is in {work}")
    return 0 if soak.good else 1


if __name__ == "__main__":
    run(main)
