"""What the tools share: their options, and how they end."""

from __future__ import annotations

import argparse
import sys
from typing import Callable

from backup import BackupError
from backup.cli import Parser
from backup.config import SERVER_INFO


def options(description: str) -> argparse.ArgumentParser:
    """A parser that knows which server the tool talks to."""
    parser = Parser(description=description)
    parser.add_argument(
        "--server-info",
        metavar="FILE",
        default=SERVER_INFO,
        help="talk to the HOST:PORT in FILE (default: %(default)s)",
    )
    return parser


def at_least_one(text: str) -> int:
    """A count from the command line."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def run(main: Callable[[], int]) -> None:
    """Ends the process with what ``main`` returns; a failure is one line."""
    try:
        sys.exit(main())
    except BackupError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
