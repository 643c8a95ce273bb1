#!/usr/bin/env python3
"""Measures this server against others on this machine, and against what the machine can do.

    python3 tools/bench.py [--rounds N] [--seconds S] [--size BYTES] [--only ROW,...] [--quick]

It starts every server itself, on loopback, and measures them in alternation,
several rounds long; ``tools/load.py`` makes the load in processes of its own.
Every server writes its access log to a file. It prints medians and ratios, and
beside each target whether it was met; the exit code does not depend on that.
``docs/benchmark.json`` has everything that was measured, ``docs/benchmark.svg``
is drawn from it by ``tools/chart.py``.

A ratio is the median of the rounds' ratios: what stands beside it in the same
round had the same weather.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Set

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from backup.settings import KIB, MIB, Settings
from tools import chart, report
from tools.common import at_least_one
from tools.load import CONTENT, Failed, Load, file_name
from tools.peers import launch
from tools.peers.launch import NotStarted, Running
from tools.report import Row, file_system, shown

MEMORY_DISK = Path("/dev/shm")

FEW, MANY, SENT, FETCHED = 7, 8, 9, 10
"""The users of the benchmark: of ten files, of 100,000, of what is sent and of what is fetched."""

SMALL_FILES = 10


class Scale(NamedTuple):
    """How much is measured."""

    rounds: int = 5
    seconds: float = 1.5  # each of the small rows
    warm_up: float = 0.3
    window: float = 5.0  # LIST beside something large
    calm: float = 3.0  # LIST beside idle connections
    a_second: float = 200.0  # how often a LIST is due in the window
    size: int = 1024 * MIB  # the large file
    names: int = 100_000  # the large folder
    idle: int = 10_000


QUICK = Scale(
    rounds=1,
    seconds=0.05,
    warm_up=0.01,
    window=0.2,
    calm=0.05,
    size=4 * MIB,
    names=1000,
    idle=100,
)


TITLES = {
    "ceiling": ("LIST, 32 connections, of bare sockets: what the load can do", "requests/s"),
    "list-1": ("LIST, 1 connection", "requests/s"),
    "list-32": ("LIST, 32 connections", "requests/s"),
    "retrieve-1": ("RETRIEVE 1 KiB, 1 connection", "requests/s"),
    "retrieve-32": ("RETRIEVE 1 KiB, 32 connections", "requests/s"),
    "backup-1": ("BACKUP 1 KiB without fsync, 1 connection", "requests/s"),
    "backup-32": ("BACKUP 1 KiB without fsync, 32 connections", "requests/s"),
    "durable-1": ("BACKUP 1 KiB durable, 1 connection", "requests/s"),
    "durable-32": ("BACKUP 1 KiB durable, 32 connections", "requests/s"),
    "up": ("BACKUP {size}, this server's durable", "MB/s"),
    "up-memory": ("BACKUP {size}, all on tmpfs", "MB/s"),
    "down": ("RETRIEVE {size}", "MB/s"),
    "beside-up": ("LIST while {size} goes up durably", "ms"),
    "beside-list": ("LIST while {names:,} names are listed", "ms"),
    "idle-memory": ("Server memory of an idle connection, {idle:,} of them", "KiB"),
    "idle-list": ("p99 of LIST without and with {idle:,} idle connections", "ms"),
    "memory": ("Growth of server memory over {size}", "MiB"),
}


START: Dict[str, Callable[[Path, Path], ContextManager[Running]]] = {
    "ours": launch.ours,
    "ours --no-fsync": lambda root, log: launch.ours(root, log, {"fsync": False}),
    "ours, batch of one": lambda root, log: launch.ours(root, log, {"commit_files": 1}),
    "threads": lambda root, log: launch.peer("threads", root, log),
    "asyncio": lambda root, log: launch.peer("streams", root, log),
    "bare": lambda root, log: launch.peer("bare", root, log),
    "bare --fsync": lambda root, log: launch.peer("bare", root, log, "--fsync"),
    "pyftpdlib": lambda root, log: launch.peer("ftp", root, log),
    "nginx": launch.nginx,
}

SPEAKS = {"pyftpdlib": "ftp", "nginx": "http"}
"""The protocol of a server; all others speak this project's."""


class Small(NamedTuple):
    """A row of small requests."""

    op: str
    connections: int
    servers: Dict[str, str]  # by series


_READ = {"ours": "ours", "asyncio": "asyncio", "threads": "threads"}
_WRITE = {"ours": "ours --no-fsync", "asyncio": "asyncio", "threads": "threads"}
_DURABLE = {"ours": "ours", "batch of one": "ours, batch of one"}

SMALL = {
    "ceiling": Small("list", 32, {"bare sockets": "bare"}),
    "list-1": Small("list", 1, _READ),
    "list-32": Small("list", 32, _READ),
    "retrieve-1": Small("retrieve", 1, _READ),
    "retrieve-32": Small("retrieve", 32, _READ),
    "backup-1": Small("backup", 1, _WRITE),
    "backup-32": Small("backup", 32, _WRITE),
    "durable-1": Small("backup", 1, _DURABLE),
    "durable-32": Small("backup", 32, _DURABLE),
}

LARGE = {
    "up": {
        "ours": "ours",
        "limit": "bare",
        "limit with fsync": "bare --fsync",
        "pyftpdlib": "pyftpdlib",
        "nginx": "nginx",
    },
    "up-memory": {"ours": "ours", "limit": "bare"},
    "down": {"ours": "ours", "limit": "bare", "pyftpdlib": "pyftpdlib", "nginx": "nginx"},
}


class Bench:
    """One run: ``measure`` fills ``rows``."""

    def __init__(self, scale: Scale, work: Path, wanted: Set[str], stack: ExitStack) -> None:
        self.scale = scale
        self.work = work
        self.rows: Dict[str, Row] = {}
        for name, (title, unit) in TITLES.items():
            if name in wanted:
                named = {"size": shown(scale.size), "names": scale.names, "idle": scale.idle}
                self.rows[name] = Row(name, title.format(**named), unit)
        self._stack = stack
        with launch.undisturbed():
            self._load = stack.enter_context(Load())
            self._other_load = stack.enter_context(Load())
        self._absent = set()
        if not launch.has_ftp():
            self._absent.add("pyftpdlib")
        if launch.nginx_program() is None:
            self._absent.add("nginx")

    def measure(self) -> None:
        """Everything that is wanted, a group of rows at a time."""
        for names, group in (
            (set(SMALL), self._small),
            (set(LARGE), self._large),
            ({"beside-up"}, self._beside_up),
            ({"beside-list"}, self._beside_list),
            ({"idle-memory", "idle-list"}, self._idle),
            ({"memory"}, self._memory),
        ):
            if names & set(self.rows):
                group()

    # Many small requests.

    def _small(self) -> None:
        for number in range(self.scale.rounds):
            with ExitStack() as stack:
                self._small_round(stack, number)

    def _small_round(self, stack: ExitStack, number: int) -> None:
        running: Dict[str, Running] = {}
        for name, small in SMALL.items():
            if name not in self.rows:
                continue
            for series in _turned(list(small.servers), number):
                server = small.servers[series]
                if server not in running:
                    running[server] = self._start_filled(stack, server, number)
                self._ask_many(name, series, running[server])
                self._say(number, name, series)

    def _start_filled(self, stack: ExitStack, server: str, number: int) -> Running:
        """A server of a new folder in each round, with the files of one user in it.

        A folder whose files were just deleted would not do: ext4 skips their
        inodes for minutes, and looks at each of them again for every new file.
        """
        root = self._folder(f"small-{number}", server)
        _fill(root / str(FEW), SMALL_FILES, CONTENT)
        return stack.enter_context(START[server](root, self._log(server)))

    def _ask_many(self, name: str, series: str, server: Running) -> None:
        small = SMALL[name]
        backup = small.op == "backup"
        if backup:
            os.sync()  # what others have left to be written is not this one's to wait for
        found = self._load.ask(
            "rate",
            address=server.address,
            op=small.op,
            user=1000 + list(SMALL).index(name) if backup else FEW,
            files=0 if name == "ceiling" else SMALL_FILES,
            connections=small.connections,
            seconds=self.scale.seconds,
            warm_up=self.scale.warm_up,
        )
        self.rows[name].add(series, found["count"] / found["seconds"], found["cpu"])

    # One large file.

    def _large(self) -> None:
        source = self._source()
        bases = {name: self.work for name in LARGE if name in self.rows}
        if "up-memory" in bases:
            memory_disk = self._memory_disk()
            if memory_disk is None:
                self.rows["up-memory"].note(f"not measured: no room in {MEMORY_DISK}")
                del bases["up-memory"]
            else:
                bases["up-memory"] = memory_disk
        for number in range(self.scale.rounds):
            for name, base in bases.items():
                for series in _turned(list(LARGE[name]), number):
                    if series in self._absent:
                        self.rows[name].note(f"{series} is not installed")
                        continue
                    self._large_one(name, series, source, base)
                    self._say(number, name, series)

    def _large_one(self, name: str, series: str, source: Path, base: Path) -> None:
        server = LARGE[name][series]
        how = SPEAKS.get(server, "backup")
        root = self._folder("large", server, base)
        if name == "down":  # a hard link: one file in the system's memory for all of them
            file = root / ("" if server in SPEAKS else str(FETCHED)) / "source"
            file.parent.mkdir(exist_ok=True)
            os.link(source, file)
        with START[server](root, self._log(server)) as running:
            os.sync()  # what others have left to be written is not this one's to wait for
            if name == "down":
                found = self._download(running, how, self.scale.seconds)
            else:
                found = self._upload(running, how, source)
        speed = self.scale.size * len(found["each"]) / sum(found["each"])
        self.rows[name].add(series, speed / 1e6, found["cpu"])
        shutil.rmtree(root)
        os.sync()

    def _upload(self, running: Running, how: str, source: Path) -> Dict[str, Any]:
        return self._load.ask(
            "upload",
            address=running.address,
            how=how,
            user=SENT,
            source=str(source),
            size=self.scale.size,
        )

    def _download(self, running: Running, how: str, seconds: float) -> Dict[str, Any]:
        return self._load.ask(
            "download",
            address=running.address,
            how=how,
            user=FETCHED,
            name="source",
            size=self.scale.size,
            seconds=seconds,
        )

    def _source(self) -> Path:
        """The large file that is sent, so new that all of it is in the system's memory."""
        path = self.work / "source"
        if not path.exists():
            with open(path, "wb") as file:
                for left in range(self.scale.size, 0, -MIB):
                    file.write(os.urandom(min(left, MIB)))
            os.sync()
        return path

    def _memory_disk(self) -> Optional[Path]:
        """A folder on a file system in memory that has room for the large file, if there is one."""
        if not MEMORY_DISK.is_dir() or file_system(MEMORY_DISK) != "tmpfs":
            return None
        if shutil.disk_usage(MEMORY_DISK).free < 2 * self.scale.size:
            return None
        made = tempfile.TemporaryDirectory(prefix="backup-bench-", dir=MEMORY_DISK)
        return Path(self._stack.enter_context(made))

    # LIST beside something large.

    def _beside_up(self) -> None:
        row = self.rows["beside-up"]
        source = self._source()
        uploads = 0
        for number in range(self.scale.rounds):
            root = self._folder("beside-up", "ours")
            _fill(root / str(FEW), SMALL_FILES, CONTENT)
            os.sync()
            with launch.ours(root, self._log("ours")) as running:
                self._other_load.begin(
                    "upload",
                    address=running.address,
                    how="backup",
                    user=SENT,
                    source=str(source),
                    size=self.scale.size,
                    seconds=self.scale.window,
                )
                self._pace(row, running)
                uploads += len(self._other_load.result()["each"])
            self._say(number, row.name, "p99")
            shutil.rmtree(root)
            os.sync()
        row.note(f"{uploads} uploads in all")

    def _beside_list(self) -> None:
        row = self.rows["beside-list"]
        listings = 0
        root = self._folder("beside-list", "ours")
        _fill(root / str(FEW), SMALL_FILES, CONTENT)
        _fill(root / str(MANY), self.scale.names, b"")
        os.sync()
        for number in range(self.scale.rounds):
            with launch.ours(root, self._log("ours")) as running:
                self._other_load.begin(
                    "rate",
                    address=running.address,
                    op="list",
                    user=MANY,
                    files=self.scale.names,
                    connections=1,
                    seconds=self.scale.window,
                    warm_up=0,
                )
                self._pace(row, running)
                listings += self._other_load.result()["count"]
            self._say(number, row.name, "p99")
        row.note(f"{listings} of them in all")

    def _pace(self, row: Row, running: Running) -> None:
        found = self._load.ask(
            "pace",
            address=running.address,
            user=FEW,
            files=SMALL_FILES,
            a_second=self.scale.a_second,
            seconds=self.scale.window,
        )
        for series in ("p99", "p50", "max"):
            row.add(series, found[series] * 1000)

    # Many connections that say nothing.

    def _idle(self) -> None:
        root = self._folder("idle", "ours")
        _fill(root / str(FEW), SMALL_FILES, CONTENT)
        for number in range(self.scale.rounds):
            with launch.ours(root, self._log("ours")) as running:
                without = self._calm(running)
                time.sleep(0.1)  # by then, the last of these connections is gone
                before, resident = running.descriptors(), running.memory("VmRSS")
                began = time.monotonic()
                accepted = self._hold(running, before)
                grown = running.memory("VmRSS") - resident
                held_back = self._calm(running)
                still = running.descriptors() - before
                lasted = time.monotonic() - began
                self._load.ask("release")
            self._note_idle(accepted, still, lasted)
            if "idle-memory" in self.rows:
                self.rows["idle-memory"].add("ours", grown / accepted / KIB)
            if "idle-list" in self.rows:
                self.rows["idle-list"].add("with", held_back)
                self.rows["idle-list"].add("without", without)
            self._say(number, "idle-list", "with")

    def _hold(self, running: Running, before: int) -> int:
        """Opens idle connections; how many the server has accepted and keeps."""
        opened = self._load.ask("hold", address=running.address, count=self.scale.idle)["count"]
        accepted, last = running.descriptors() - before, -1
        while last < accepted < opened:  # until there is no more to come
            time.sleep(0.1)
            accepted, last = running.descriptors() - before, accepted
        if accepted < opened:  # it is full: leaves room, or LIST would only wait for its turn
            self._load.ask("release", keep=accepted - 64)
            time.sleep(0.1)
        return accepted

    def _calm(self, running: Running) -> float:
        found = self._load.ask(
            "latency",
            address=running.address,
            user=FEW,
            files=SMALL_FILES,
            seconds=self.scale.calm,
        )
        return float(found["p99"]) * 1000

    def _note_idle(self, accepted: int, still: int, lasted: float) -> None:
        for name in {"idle-memory", "idle-list"} & set(self.rows):
            if accepted < self.scale.idle:
                self.rows[name].note(f"the server took only {accepted} connections")
            if still < accepted - 64:
                patience = Settings().header_seconds
                text = f"{accepted - still} were closed before the end"
                self.rows[name].note(f"{text}: it took {lasted:.1f} s, of {patience:g} s")

    # Memory.

    def _memory(self) -> None:
        row = self.rows["memory"]
        source = self._source()
        for number in range(self.scale.rounds):
            root = self._folder("memory", "ours")
            _fill(root / str(FEW), SMALL_FILES, CONTENT)
            (root / str(FETCHED)).mkdir()
            os.link(source, root / str(FETCHED) / "source")
            with launch.ours(root, self._log("ours")) as running:
                self._warm(running)
                before = running.memory("VmRSS")
                self._upload(running, "backup", source)
                up = running.memory("VmHWM") - before
                self._download(running, "backup", seconds=0)
                both = running.memory("VmHWM") - before
            row.add("up and down", both / MIB)
            row.add("up", up / MIB)
            self._say(number, row.name, "up and down")
            shutil.rmtree(root)
            os.sync()

    def _warm(self, running: Running) -> None:
        """A few small requests of each kind, so that what the server keeps for them is there."""
        for op in ("list", "retrieve", "backup"):
            self._load.ask(
                "rate",
                address=running.address,
                op=op,
                user=FEW,
                files=SMALL_FILES,
                connections=1,
                seconds=0.05,
                warm_up=0,
            )

    # All of them.

    def _folder(self, row: str, server: str, base: Optional[Path] = None) -> Path:
        folder = (base or self.work) / f"{row}-{re.sub('[^a-z]+', '-', server)}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _log(self, server: str) -> Path:
        """The access log of a server that is being started: an empty file."""
        path = self.work / f"{re.sub('[^a-z]+', '-', server)}.log"
        path.unlink(missing_ok=True)
        return path

    def _say(self, number: int, name: str, series: str) -> None:
        row = self.rows.get(name)
        if row is not None:
            value = f"{report.number(row.values[series][-1])} {row.unit}"
            text = f"round {number + 1} of {self.scale.rounds}: {name}, {series}: {value}"
            print(text, file=sys.stderr, flush=True)


def _turned(series: Sequence[str], number: int) -> List[str]:
    """Another one begins in each round."""
    first = number % len(series)
    return [*series[first:], *series[:first]]


def _fill(folder: Path, count: int, content: bytes) -> None:
    """Makes the first small files of a user, past the server."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / os.fsdecode(file_name(number))).write_bytes(content)


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure this server against others.",
        epilog=f"rows: {', '.join(TITLES)}",
    )
    parser.add_argument("--rounds", type=at_least_one, metavar="N", help="default: 5")
    parser.add_argument(
        "--seconds", type=more_than_none, metavar="S", help="of each measurement (default: 1.5)"
    )
    parser.add_argument(
        "--size", type=at_least_one, metavar="BYTES", help="of the large file (default: 1 GiB)"
    )
    parser.add_argument(
        "--only",
        type=chosen_rows,
        metavar="ROW,...",
        help="only these rows, or those that begin so",
    )
    parser.add_argument("--quick", action="store_true", help="only to see whether it works")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where benchmark.json and benchmark.svg go"
        " (default: docs, and nowhere with --only or --quick)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=HERE / ".bench",
        metavar="DIR",
        help="where the servers keep their files meanwhile: on the disk that is meant"
        " (default: .bench)",
    )
    return parser


def more_than_none(text: str) -> float:
    """A time from the command line, in seconds."""
    seconds = float(text)  # argparse tells what is wrong with a ValueError
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time")
    return seconds


def chosen_rows(text: str) -> Set[str]:
    """The rows that an ``--only`` names."""
    found = set()
    for start in text.split(","):
        rows = {name for name in TITLES if name.startswith(start)}
        if not start or not rows:
            raise argparse.ArgumentTypeError(f"{start!r} is none of {', '.join(TITLES)}")
        found |= rows
    return found


def main() -> int:
    """Measures, prints, writes and draws."""
    chosen = options().parse_args()
    if not sys.platform.startswith("linux"):
        print("what this measures, and how, is there on Linux only", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    given = {"rounds": chosen.rounds, "seconds": chosen.seconds, "size": chosen.size}
    scale = (QUICK if chosen.quick else Scale())._replace(
        **{name: value for name, value in given.items() if value is not None}
    )
    try:
        found = run(scale, chosen.work, chosen.only or set(TITLES))
    except (Failed, NotStarted) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n".join(report.text(found)))
    whole = not (chosen.only or chosen.quick)
    if chosen.output or whole:
        write(found, chosen.output or HERE / "docs")
    return 0


def _interrupt(*_: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one must not cut the tidying short
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(scale: Scale, work: Path, wanted: Set[str]) -> Dict[str, Any]:
    """All that was found. What it made in ``work`` is gone afterwards."""
    made = not work.exists()
    work.mkdir(parents=True, exist_ok=True)
    others = report.Others()
    try:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=work))
            bench = Bench(scale, Path(folder).resolve(), wanted, stack)
            bench.measure()
            machine = report.machine(bench.work)
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": machine,
            "scale": scale._asdict(),
            "used by others": others.share(),
            **report.as_json(bench.rows),
        }
    finally:
        if made:
            work.rmdir()


def write(found: Dict[str, Any], output: Path) -> None:
    """Writes the JSON and, where matplotlib is installed, the drawing."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=2, ensure_ascii=False)
    (output / "benchmark.json").write_text(f"{text}\n", encoding="utf-8")
    try:
        chart.draw(found, output / "benchmark.svg")
    except ImportError:
        hint = "pip install matplotlib, then: python3 tools/chart.py"
        print(f"no drawing, since matplotlib is not installed; {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
