#!/usr/bin/env python3
"""Many clients at once on one reactor: each backs up, lists, retrieves, compares and deletes.

    python3 tools/load_test.py --clients 1000 [--files N] [--size N] [--server-info FILE]

It ends in a table: requests, errors, bytes, rate, and latency at p50, p90, p99 and the slowest.
The exit code is 1 if any request failed or any file came back changed.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backup import Backup, Client, Delete, Job, Listing, Outcome, Retrieve
from backup.config import draw_user_id, read_server_info
from backup.sequence import format_size
from backup.server import raise_descriptor_limit
from tools.common import at_least_one, options, run


class Tally:
    """What the requests of all clients added up to."""

    def __init__(self) -> None:
        self.latencies: Dict[str, List[float]] = {}
        self.bytes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.texts: Counter[str] = Counter()

    def add(self, outcome: Outcome) -> None:
        op = type(outcome.job).__name__
        self.latencies.setdefault(op, []).append(outcome.seconds)
        self.bytes[op] += outcome.bytes
        if outcome.error is not None:
            self.fail(op, outcome.error.text)

    def fail(self, op: str, text: str) -> None:
        self.errors[op] += 1
        self.texts[text] += 1

    def table(self, seconds: float) -> Iterator[str]:
        columns = ["requests", "errors", "bytes", "req/s", "rate", "p50", "p90", "p99", "max"]
        yield f"{'':10}" + "".join(f"{column:>11}" for column in columns)
        for op in self.latencies:
            yield self._row(op, self.latencies[op], self.errors[op], self.bytes[op], seconds)
        everything = [latency for latencies in self.latencies.values() for latency in latencies]
        errors, size = sum(self.errors.values()), sum(self.bytes.values())
        yield self._row("all", everything, errors, size, seconds)

    @staticmethod
    def _row(op: str, latencies: List[float], errors: int, size: int, seconds: float) -> str:
        ordered = sorted(latencies)
        cells = [str(len(ordered)), str(errors), format_size(size)]
        cells.append(f"{len(ordered) / seconds:.0f}")
        cells.append(f"{format_size(int(size / seconds))}/s")
        for share in (0.5, 0.9, 0.99, 1.0):
            index = min(len(ordered) - 1, int(share * len(ordered)))
            cells.append(f"{ordered[index] * 1000:.1f} ms")
        return f"{op:10}" + "".join(f"{cell:>11}" for cell in cells)


class OneClient:
    """One user's requests, one after the other; the next begins when the last has ended."""

    def __init__(
        self,
        client: Client,
        user_id: int,
        source: Path,
        content: bytes,
        files: int,
        tally: Tally,
    ) -> None:
        self._client = client
        self._user_id = user_id
        self._source = source
        self._copy = source.with_name(f"copy-{user_id}")
        self._tally = tally
        self._content = content
        self._jobs = self._all_jobs(files)

    def next(self) -> None:
        """Begins the next request, if there is one."""
        job = next(self._jobs, None)
        if job is not None:
            self._client.submit(job, self._done)

    def _all_jobs(self, files: int) -> Iterator[Job]:
        names = [f"file-{number}.bin" for number in range(files)]
        for name in names:
            yield Backup(self._source, name, user_id=self._user_id)
        yield Listing(user_id=self._user_id)
        for name in names:
            yield Retrieve(name, self._copy, user_id=self._user_id)
            yield Delete(name, user_id=self._user_id)

    def _done(self, outcome: Outcome) -> None:
        self._tally.add(outcome)
        if isinstance(outcome.job, Retrieve) and outcome.error is None:
            if self._copy.read_bytes() != self._content:
                self._tally.fail("Retrieve", "a file came back changed")
            self._copy.unlink()
        self.next()


def main() -> int:
    parser = options("Many clients at once on one reactor.")
    parser.add_argument("--clients", type=at_least_one, default=1000, metavar="N")
    parser.add_argument("--files", type=at_least_one, default=1, metavar="N", help="a client")
    parser.add_argument("--size", type=at_least_one, default=1024, metavar="N", help="bytes a file")
    chosen = parser.parse_args()
    address = read_server_info(chosen.server_info)
    raise_descriptor_limit()
    tally = Tally()
    first_user = draw_user_id() % (2**32 - chosen.clients)
    with tempfile.TemporaryDirectory() as work, Client(address, first_user) as client:
        source = Path(work) / "source"
        content = os.urandom(chosen.size)
        source.write_bytes(content)
        began = time.perf_counter()
        for number in range(chosen.clients):
            user_id = first_user + number
            OneClient(client, user_id, source, content, chosen.files, tally).next()
        while client.busy:
            client.turn()
        seconds = time.perf_counter() - began
    print(f"{chosen.clients} clients, {chosen.files} files of {chosen.size} bytes, {seconds:.2f} s")
    for row in tally.table(seconds):
        print(row)
    for text, count in tally.texts.most_common(5):
        print(f"{count} × {text}")
    return 1 if tally.errors else 0


if __name__ == "__main__":
    run(main)
