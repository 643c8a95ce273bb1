#!/usr/bin/env python3
"""Measures candidates for the tunables that cost or buy speed, this server against itself.

    python3 tools/tune.py [TUNABLE ...] [--rounds N] [--work DIR]

For each tunable, a server per candidate, in alternation; a line a candidate, with
the medians. What was chosen by it, and why, is in docs/DESIGN.md, "Measured".
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Callable, Dict, List, NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from backup.settings import KIB, MIB, Settings
from tools.common import at_least_one
from tools.load import CONTENT, Load, file_name
from tools.peers import launch
from tools.peers.launch import Running

SECONDS = 1.5  # of a measurement of small requests
WINDOW = 5.0  # of one of LISTs beside something large
LARGE = 1024 * MIB
FEW, MANY, LARGE_USER = 7, 8, 9  # users: of ten files, of 100,000, of a large one

Figures = Dict[str, float]


class Site(NamedTuple):
    """Where a measurement is made."""

    load: Load
    other_load: Load
    source: Path  # a large file
    root: Path  # the server's store


class Trial(NamedTuple):
    """A tunable's candidates, and what tells them apart."""

    candidates: List[float]
    measure: Callable[[Site, Running], Figures]


def _rate(op: str) -> Callable[[Site, Running], Figures]:
    def measure(site: Site, server: Running) -> Figures:
        os.sync()
        found = site.load.ask(
            "rate",
            address=server.address,
            op=op,
            user=FEW,
            files=10,
            connections=32,
            seconds=SECONDS,
            warm_up=0.3,
        )
        return {f"{op}/s": found["count"] / found["seconds"]}

    return measure


def _down(site: Site, server: Running) -> Figures:
    found = site.load.ask(
        "download",
        address=server.address,
        how="backup",
        user=LARGE_USER,
        name="source",
        size=LARGE,
        seconds=SECONDS,
    )
    return {"down MB/s": LARGE / 1e6 * len(found["each"]) / sum(found["each"])}


def _up_with_lists(site: Site, server: Running) -> Figures:
    os.sync()
    site.other_load.begin(
        "upload",
        address=server.address,
        how="backup",
        user=LARGE_USER,
        source=str(site.source),
        size=LARGE,
        seconds=WINDOW,
    )
    lists = _lists(site, server)
    each = site.other_load.result()["each"]
    return {"up MB/s": LARGE / 1e6 * len(each) / sum(each), **lists}


def _listing_with_lists(site: Site, server: Running) -> Figures:
    many = site.root / str(MANY)
    if not many.exists():
        many.mkdir()
        for number in range(100_000):
            (many / os.fsdecode(file_name(number))).touch()
    site.other_load.begin(
        "rate",
        address=server.address,
        op="list",
        user=MANY,
        files=100_000,
        connections=1,
        seconds=WINDOW,
        warm_up=0,
    )
    lists = _lists(site, server)
    found = site.other_load.result()
    return {"100,000 names ms": found["seconds"] / found["count"] * 1000, **lists}


def _lists(site: Site, server: Running) -> Figures:
    found = site.load.ask(
        "pace", address=server.address, user=FEW, files=10, a_second=200, seconds=WINDOW
    )
    return {f"LIST {name} ms": found[name] * 1000 for name in ("p50", "p99", "max")}


TRIALS: Dict[str, Trial] = {
    "accepts_per_turn": Trial([1, 4, 16, 64, 256], _rate("list")),
    "small_bytes": Trial([0, 64 * KIB], _rate("retrieve")),
    "commit_files": Trial([1, 4, 16, 64, 256], _rate("backup")),
    "turn_bytes": Trial([64 * KIB, 256 * KIB, 512 * KIB, 1 * MIB, 4 * MIB], _down),
    "scratch_bytes": Trial([64 * KIB, 128 * KIB, 256 * KIB, 1 * MIB], _up_with_lists),
    "write_back_bytes": Trial([256 * KIB, 1 * MIB, 4 * MIB], _up_with_lists),
    "sync_seconds": Trial([0.002, 0.005, 0.01, 0.02, 10], _up_with_lists),
    "listing_names": Trial([256, 1024, 4096], _listing_with_lists),
    "turn_seconds": Trial([0.001, 0.002, 0.005, 0.01, 0.02], _listing_with_lists),
}


def run(tunable: str, rounds: int, work: Path) -> None:
    """Measures all candidates and prints a line for each."""
    trial = TRIALS[tunable]
    found: Dict[float, List[Figures]] = {candidate: [] for candidate in trial.candidates}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-", dir=work)))
        source = folder / "source"
        with open(source, "wb") as file:
            for _ in range(LARGE // MIB):
                file.write(os.urandom(MIB))
        load, other_load = stack.enter_context(Load()), stack.enter_context(Load())
        for number in range(rounds):
            for candidate in trial.candidates:
                site = Site(load, other_load, source, folder / f"{candidate}-{number}")
                found[candidate].append(_measure(trial, tunable, candidate, site))
    default = getattr(Settings(), tunable)
    for candidate, figures in found.items():
        columns = (f"{name} {median(f[name] for f in figures):9.1f}" for name in figures[0])
        mark = "  (the default)" if candidate == default else ""
        print(f"{tunable} {candidate:>9g}: {'  '.join(columns)}{mark}", flush=True)


def _measure(trial: Trial, tunable: str, candidate: float, site: Site) -> Figures:
    for folder in (site.root / str(FEW), site.root / str(LARGE_USER)):
        folder.mkdir(parents=True)
    for number in range(10):
        (site.root / str(FEW) / os.fsdecode(file_name(number))).write_bytes(CONTENT)
    os.link(site.source, site.root / str(LARGE_USER) / "source")
    log = site.source.with_name("log")
    log.write_bytes(b"")
    with launch.ours(site.root, log, {tunable: candidate}) as server:
        figures = trial.measure(site, server)
    shutil.rmtree(site.root / str(LARGE_USER))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure candidates for tunables.")
    parser.add_argument("tunables", nargs="*", metavar="TUNABLE", help=f"of: {', '.join(TRIALS)}")
    parser.add_argument("--rounds", type=at_least_one, default=3, metavar="N")
    parser.add_argument("--work", type=Path, default=HERE / ".bench", metavar="DIR")
    chosen = parser.parse_args()
    unknown = set(chosen.tunables) - set(TRIALS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(TRIALS)}")
    chosen.work.mkdir(parents=True, exist_ok=True)
    for tunable in chosen.tunables or TRIALS:
        run(tunable, chosen.rounds, chosen.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
