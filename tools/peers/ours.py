"""This server, with tunables that the command line leaves alone.

    python3 -m tools.peers.ours --root DIR [NAME=VALUE ...]

Where ``python3 -m backup serve`` will do, the benchmark runs that instead.
"""

from __future__ import annotations

import argparse
import signal
import sys
from dataclasses import replace
from typing import Any, Tuple

from backup import Server, Settings
from backup.log import Log, to_stream
from backup.server import raise_descriptor_limit


def tunable(text: str) -> Tuple[str, Any]:
    """One of ``Settings``, with its value."""
    name, _, value = text.partition("=")
    return name, type(getattr(Settings(), name))(float(value))


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve with other tunables.")
    parser.add_argument("--root", required=True, metavar="DIR", help="keep the files in DIR")
    parser.add_argument("settings", nargs="*", type=tunable, metavar="NAME=VALUE")
    chosen = parser.parse_args()
    settings = replace(Settings(), **dict(chosen.settings))
    raise_descriptor_limit()
    log = Log(to_stream(sys.stderr))
    with Server(chosen.root, ("127.0.0.1", 0), settings, log) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        server.serve_forever()


if __name__ == "__main__":
    main()
