"""What a server has done since it began, in numbers.

Rules: counting costs an addition or two a request. What is counted is what a
connection or a request came to, once, when it did.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

from .wire import Op


class Counters:
    """The numbers; whoever does a thing counts it. Bytes are of files and listings."""

    __slots__ = ("bytes_in", "bytes_out", "commits", "files", "opened", "refused", "requests")

    def __init__(self) -> None:
        self.opened = 0  # connections that were taken
        self.refused = 0  # connections that were not
        self.requests: Dict[Tuple[int, Optional[int]], int] = {}  # by op and status; None: broken
        self.bytes_in = 0
        self.bytes_out = 0
        self.commits = 0
        self.files = 0  # that they changed

    def request(self, op: int, status: Optional[int], count: int) -> None:
        """One request has ended, and has moved ``count`` bytes of its file or listing."""
        key = (op, status)
        self.requests[key] = self.requests.get(key, 0) + 1
        if op == _BACKUP:
            self.bytes_in += count
        else:
            self.bytes_out += count

    def commit(self, files: int) -> None:
        """So many changes have been committed together."""
        self.commits += 1
        self.files += files

    def fields(self, connections: int, slowest_turn_seconds: float) -> Dict[str, object]:
        """All numbers for one line of the log; ``connections`` are open now."""
        return {
            "open": connections,
            "total": self.opened,
            "refused": self.refused,
            **{
                f"requests_{op}_{'broken' if status is None else status}": count
                for (op, status), count in sorted(
                    self.requests.items(), key=lambda item: (item[0][0], item[0][1] or 0)
                )
            },
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "commits": self.commits,
            "files_per_commit": round(self.files / self.commits, 1) if self.commits else 0.0,
            "slowest_turn_ms": round(slowest_turn_seconds * 1000, 1),
        }


_BACKUP = int(Op.BACKUP)
