"""This server, with tunables that the command line leaves alone.

    python3 -m tools.peers.ours --root DIR [--no-fsync] [--batch N]

Where ``python3 -m backup serve`` will do, the benchmark runs that instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace

from backup import Server, Settings
from backup.log import Log, to_stream
from backup.server import raise_descriptor_limit


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Serve with other tunables.")
    parser.add_argument("--root", required=True, metavar="DIR", help="keep the files in DIR")
    parser.add_argument("--no-fsync", action="store_true", help="do not wait for the disk")
    parser.add_argument(
        "--batch",
        type=int,
        default=defaults.commit_files,
        metavar="N",
        help="files made durable together, at most (default: %(default)s)",
    )
    chosen = parser.parse_args()
    settings = replace(defaults, fsync=not chosen.no_fsync, commit_files=chosen.batch)
    raise_descriptor_limit()
    log = Log(to_stream(sys.stderr))
    with Server(chosen.root, ("127.0.0.1", 0), settings, log) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.serve_forever()


if __name__ == "__main__":
    main()
