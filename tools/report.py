"""What the benchmark found: rows of series, the targets, the machine; and how all that is told."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from backup.settings import KIB, MIB
from tools.peers import launch

BUSY = 0.9
"""From this share of one processor on, a load process is called the bottleneck."""

MUCH = 0.1
"""From this share of all processors on, what others use is too much."""


class Row:
    """One thing that was measured, of several servers or in several ways: its series."""

    def __init__(self, name: str, title: str, unit: str) -> None:
        self.name = name
        self.title = title
        self.unit = unit
        self.values: Dict[str, List[float]] = {}  # a value a round
        self.load: Dict[str, List[float]] = {}
        self.notes: List[str] = []

    def add(self, series: str, value: float, load: Optional[float] = None) -> None:
        """One round's value; ``load`` is the load process's share of a processor."""
        self.values.setdefault(series, []).append(value)
        if load is not None:
            self.load.setdefault(series, []).append(load)

    def note(self, text: str) -> None:
        """Says something once."""
        if text not in self.notes:
            self.notes.append(text)

    def median(self, series: str) -> Optional[float]:
        """Over the rounds; None if it was not measured."""
        values = self.values.get(series)
        return median(values) if values else None

    def ratio(self, series: str, against: str) -> Optional[float]:
        """The median of the rounds' ratios; None if one of them was not measured."""
        pairs = list(zip(self.values.get(series, ()), self.values.get(against, ())))
        return median(one / other for one, other in pairs) if pairs else None

    def as_json(self) -> Dict[str, Any]:
        """All of it."""
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "notes": self.notes,
            "series": {name: self._series(name) for name in self.values},
        }

    def _series(self, name: str) -> Dict[str, Any]:
        first = next(iter(self.values))
        compared = name != first and self.unit.endswith("/s")
        load = self.load.get(name)
        return {
            "median": rounded(self.median(name)),
            "rounds": [rounded(value) for value in self.values[name]],
            # How many times as fast as this one the row's first series is.
            "ratio": rounded(self.ratio(first, name)) if compared else None,
            "load": rounded(median(load)) if load else None,
            "load is the bottleneck": bool(load) and median(load or [0]) > BUSY,
        }


def rounded(value: Optional[float]) -> Optional[float]:
    """Four digits are more than any of this is exact to."""
    return None if value is None else float(f"{value:.4g}")


class Target(NamedTuple):
    """What the project promises of a row."""

    row: str
    series: str
    against: Optional[str]  # another series; None: the value itself is meant
    bound: float
    at_least: bool = True  # or below
    unit: str = ""

    def measured(self, rows: Dict[str, Row]) -> Optional[float]:
        """None if it was not."""
        row = rows.get(self.row)
        if row is None:
            return None
        if self.against is None:
            return row.median(self.series)
        return row.ratio(self.series, self.against)

    def met(self, measured: Optional[float]) -> Optional[bool]:
        """None if nothing was measured."""
        if measured is None:
            return None
        return measured >= self.bound if self.at_least else measured < self.bound

    def as_json(self, rows: Dict[str, Row]) -> Dict[str, Any]:
        """With what was measured beside it."""
        measured = self.measured(rows)
        bound = f"{'≥' if self.at_least else '<'} {self.bound:g}"
        return {
            "row": self.row,
            "title": rows[self.row].title if self.row in rows else self.row,
            "target": f"{bound} × {self.against}" if self.against else f"{bound} {self.unit}",
            "measured": rounded(measured),
            "met": self.met(measured),
        }


TARGETS = [
    Target("list-32", "ours", "asyncio", 1.8),
    Target("list-32", "ours", "threads", 5),
    Target("retrieve-32", "ours", "asyncio", 1.8),
    Target("retrieve-32", "ours", "threads", 5),
    Target("durable-32", "ours", "batch of one", 2.2),
    Target("backup-32", "ours", "asyncio", 1.8),
    Target("up", "ours", "limit", 0.8),
    Target("up", "ours", "pyftpdlib", 1.3),
    Target("up", "ours", "nginx", 2),
    Target("down", "ours", "limit", 0.85),
    Target("down", "ours", "pyftpdlib", 1.2),
    Target("down", "ours", "nginx", 1),
    Target("beside-up", "p99", None, 25, at_least=False, unit="ms"),
    Target("beside-list", "p99", None, 25, at_least=False, unit="ms"),
    Target("idle-memory", "ours", None, 4, at_least=False, unit="KiB"),
    Target("idle-list", "with", "without", 1.5, at_least=False),
    Target("memory", "up and down", None, 8, at_least=False, unit="MiB"),
]


def as_json(rows: Dict[str, Row]) -> Dict[str, Any]:
    """What was measured, and what that says of the targets."""
    return {
        "rows": [row.as_json() for row in rows.values()],
        "targets": [target.as_json(rows) for target in TARGETS],
    }


class Others:
    """How much of the processors was used by what is not this process or its children's work.

    That is other programs, other machines on the same host, and the system's own
    threads, which write to the disk. Children count when they have ended. Interrupts
    are left out: most are for the packets that the benchmark itself sends.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._used = self._used_by_others()

    def share(self) -> float:
        """The share of all processors since it was made."""
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        used = self._used_by_others() - self._used  # in ticks, which a short while may exceed
        return round(min(1.0, max(0.0, used / seconds)), 3)

    @staticmethod
    def _used_by_others() -> float:
        line = _read("/proc/stat").split("\n", 1)[0]  # the columns are told in proc(5)
        user, nice, system, _idle, _iowait, _irq, _softirq, stolen = map(int, line.split()[1:9])
        busy = (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])


def text(found: Dict[str, Any]) -> Iterator[str]:
    """The same for a person, line by line."""
    yield f"{found['date']}: " + ", ".join(f"{key}: {is_}" for key, is_ in found["machine"].items())
    others = found["used by others"]
    doubt = ": too much for these numbers to be trusted" if others > MUCH else ""
    yield f"used by others meanwhile: {others:.0%} of the processors{doubt}"
    for row in found["rows"]:
        yield ""
        yield f"{row['title']} ({row['unit']})"
        yield from (f"  {_series_text(name, series)}" for name, series in row["series"].items())
        yield from (f"  note: {note}" for note in row["notes"])
    yield ""
    yield f"{'target':59}{'measured':>28}   met"
    for target in found["targets"]:
        met = {True: "yes", False: "NO", None: "-"}[target["met"]]
        measured = "-" if target["measured"] is None else number(target["measured"])
        yield f"{target['title']:59}{target['target']:20}{measured:>8}   {met}"


def _series_text(name: str, series: Dict[str, Any]) -> str:
    spread = f"({number(min(series['rounds']))} to {number(max(series['rounds']))})"
    line = f"{name:18}{number(series['median']):>9}  {spread:20}"
    if series["ratio"] is not None:
        line += f"{series['ratio']:>6.2f} ×"
    elif series["load"] is not None:
        line += " " * 8
    if series["load"] is not None:
        line += f"  load {series['load']:.2f}"
    if series["load is the bottleneck"]:
        line += ": the load generator is the bottleneck"
    return line.rstrip()


def machine(work: Path) -> Dict[str, str]:
    """What was measured on, without anything that tells whose it is."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    versions = {"nginx": launch.nginx_version() or "", "pyftpdlib": _version("pyftpdlib")}
    return {
        "processor": f"{os.cpu_count()} × {cpu.group(1) if cpu else platform.machine()}",
        "memory": f"{round(int(memory.group(1)) / MIB)} GiB" if memory else "",
        "system": f"{platform.system()} {platform.release()}",
        "file system": file_system(work),
        "Python": platform.python_version(),
        **{name: version or "not installed" for name, version in versions.items()},
    }


def file_system(path: Path) -> str:
    """The type of the file system that a path is on."""
    device = os.stat(path).st_dev
    number = f" {os.major(device)}:{os.minor(device)} "
    for line in _read("/proc/self/mountinfo").splitlines():
        if number in line:
            return line.partition(" - ")[2].split()[0]
    return "unknown"


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def shown(size: int) -> str:
    """A size in the largest unit that divides it."""
    for unit, name in ((1024 * MIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"
