#!/usr/bin/env python3
"""Runs a server with a temporary store on a free loopback port, and the sequence against it.

    python3 tools/demo.py

Prints the client's transcript and the server's log, stops the server, and exits
as the sequence did.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
BACKUP = [sys.executable, "-m", "backup"]


def main() -> int:
    try:
        with tempfile.TemporaryDirectory(prefix="backup-demo-") as work:
            return show(Path(work))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def show(work: Path) -> int:
    """Both sides, with the store in the folder ``work``."""
    command = [*BACKUP, "serve", "--listen", "127.0.0.1:0", "--root", f"{work}/store"]
    server = subprocess.Popen(command, cwd=HERE, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        first_line = server.stderr.readline()
        print("$ backup serve --listen 127.0.0.1:0", flush=True)
        print(first_line, end="", flush=True)
        code = run_sequence(first_line, work)
    finally:
        server.terminate()
        log = server.communicate()[1]
    print(f"\nThe server's log:\n{log}", end="")
    return code


def run_sequence(first_line: str, work: Path) -> int:
    """Runs the client's sequence against the server that announced itself in this line."""
    if "Listening on " not in first_line:
        return 1
    info = work / "server.info"
    info.write_text(first_line.rpartition(" ")[2], encoding="ascii")
    print("\n$ backup client", flush=True)
    command = [*BACKUP, "client", "--server-info", str(info), "--output-dir", str(work)]
    return subprocess.run(command, cwd=HERE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
