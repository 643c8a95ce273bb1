"""The command line: what can be typed, what is printed, how it exits.

Rules: nothing else in the package prints; nothing else exits, but for a server
that a second signal has to end (``signals``). Whatever a user can cause ends in
one line that says what, where and what to do, and in one of the exit
codes below; a traceback is a fault of this program.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import signal
import sys
from contextlib import suppress
from typing import Any, Callable, NoReturn, Optional, Sequence, TextIO

from . import __version__, config
from .client import Client
from .commands import delete, get, list_names, put
from .console import Console
from .errors import FAILED, BackupError, OutputFailed, Unreachable
from .fault import describe
from .log import FORMATS
from .names import show
from .sequence import steps
from .serve import serve
from .signals import INTERRUPTED, Interrupt, on_signals, present

USAGE = 2

EXIT_CODES = """exit codes:
  0    all done
  1    failed
  2    wrong usage, or an info file that cannot be read
  3    some files done and some not
  10   not on the server
  130  interrupted
"""


# What caps the server, in what unit, and what it says; without it, nothing does.
_CAPS = [
    ("--max-connections", "N", "serve N connections at once; more wait"),
    ("--max-connections-per-address", "N", "close what an address opens beyond N connections"),
    ("--max-file-size", "SIZE", "take no larger file; 2M is 2 x 1024 x 1024 bytes"),
    ("--user-quota", "SIZE", "let a user hold SIZE"),
    ("--user-files", "N", "let a user hold N files"),
    ("--total-quota", "SIZE", "let all users together hold SIZE"),
    ("--min-free", "SIZE", "leave SIZE of the disk free"),
]
_UNCAPPED = {
    **{flag: "no limit" for flag, _, _ in _CAPS},
    "--max-connections": "what the descriptor limit allows",
    "--max-file-size": "4294967291, what the protocol allows",
    "--min-free": "nothing is kept free",
}


class Parser(argparse.ArgumentParser):
    """argparse, with its complaint in one line, and without shortened options."""

    def __init__(self, **named: Any) -> None:
        super().__init__(**{**named, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {show(message)}; see {self.prog} --help\n")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="backup",
        description="Back up files to a server, and get them back.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"backup {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int], text: str) -> Parser:
        sub: Parser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    _serve_options(
        command("serve", lambda options, _: serve(options), "run the server in the foreground")
    )
    _client_options(command("client", client, "run the seven-step sequence against a server"))

    sub = command("put", put, "back files up under their base names")
    sub.add_argument("files", nargs="*", metavar="FILE", help="a file to back up")
    sub.add_argument(
        "--files-from", metavar="FILE", help="read more paths from FILE, one a line; - is stdin"
    )
    sub.add_argument(
        "--parallel", type=_positive, metavar="N", help="files under way at once (default: 8)"
    )
    _user_options(sub)

    sub = command("get", get, "retrieve files")
    sub.add_argument("names", nargs="+", metavar="NAME", help="a name on the server")
    where = sub.add_mutually_exclusive_group()
    where.add_argument("-o", "--output", metavar="PATH", help="save the one NAME as PATH")
    where.add_argument(
        "--output-dir", metavar="DIR", default="", help="save in DIR (default: here)"
    )
    sub.add_argument("--force", action="store_true", help="overwrite files that are there already")
    _user_options(sub)

    sub = command("list", list_names, "list the names on the server, one a line")
    _user_options(sub)

    sub = command("delete", delete, "remove files from the server")
    sub.add_argument("names", nargs="+", metavar="NAME", help="a name on the server")
    _user_options(sub)
    return top


def _serve_options(sub: Parser) -> None:
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--server-info",
        metavar="FILE",
        default=config.SERVER_INFO,
        help="listen on the HOST:PORT in FILE (default: %(default)s)",
    )
    where.add_argument(
        "--listen", metavar="HOST:PORT", help="listen there; port 0 takes a free one; or unix:PATH"
    )
    sub.add_argument(
        "--root",
        metavar="DIR",
        help=f"keep the files in DIR (default: $BACKUP_BASE_DIR or {config.DEFAULT_ROOT})",
    )
    sub.add_argument(
        "--allow-anonymous",
        action="store_true",
        help="listen where other machines can reach it: there are no passwords",
    )
    for flag, unit, text in _CAPS:
        kind = _size if unit == "SIZE" else _positive
        sub.add_argument(flag, type=kind, metavar=unit, help=f"{text} (default: {_UNCAPPED[flag]})")
    sub.add_argument(
        "--append-only",
        action="store_true",
        help="let nobody replace or remove what is stored",
    )
    sub.add_argument(
        "--no-fsync",
        action="store_true",
        help="answer without waiting for the disk: a power cut then loses acknowledged files",
    )
    sub.add_argument(
        "--log-format",
        choices=sorted(FORMATS),
        default="text",
        help="how a line of the log is written (default: %(default)s)",
    )
    sub.add_argument(
        "--log-file",
        metavar="FILE",
        help="append the log to FILE, which SIGHUP opens anew (default: stderr)",
    )
    sub.add_argument(
        "--pid-file", metavar="FILE", help="keep the process id in FILE while the server runs"
    )
    volume = sub.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="log broken connections too")
    volume.add_argument("-q", "--quiet", action="store_true", help="log only what went wrong")


def _client_options(sub: Parser) -> None:
    sub.add_argument(
        "--server-info",
        metavar="FILE",
        default=config.SERVER_INFO,
        help="talk to the HOST:PORT in FILE (default: %(default)s)",
    )
    sub.add_argument(
        "--backup-info",
        metavar="FILE",
        default=config.BACKUP_INFO,
        help="use the first two files that FILE names, one a line (default: %(default)s)",
    )
    sub.add_argument("--user-id", metavar="N", help="the user to act as (default: drawn anew)")
    sub.add_argument(
        "--output-dir",
        metavar="DIR",
        default="",
        help="save what is retrieved in DIR (default: here)",
    )


def _user_options(sub: Parser) -> None:
    sub.add_argument(
        "--server",
        metavar="HOST:PORT",
        help=f"the server, or unix:PATH (default: $BACKUP_SERVER or {config.SERVER_INFO} here)",
    )
    sub.add_argument(
        "--user-id",
        metavar="N",
        help="the user to act as (default: $BACKUP_USER_ID or an id drawn once and kept in"
        " $XDG_CONFIG_HOME/backup/user-id)",
    )
    sub.add_argument("-q", "--quiet", action="store_true", help="no progress line and no notices")
    sub.add_argument(
        "--json", action="store_true", help="one JSON object a line on stdout, a summary last"
    )


def _size(text: str) -> int:
    found = re.fullmatch("0*([1-9][0-9]{0,14})([KMGT]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size from 1 on; whole bytes, or a capital K, M, G or T behind: 500M"
        )
    return int(found[1]) << 10 * " KMGT".index(found[2] or " ")


def _positive(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999999999")
    return int(text)


def client(options: argparse.Namespace, console: Console) -> int:
    """Runs the sequence."""
    address = config.read_server_info(options.server_info)
    files = config.read_backup_info(options.backup_info)
    config.check_folder(options.output_dir)
    if options.user_id is None:
        user_id = config.draw_user_id()
    else:
        user_id = config.parse_user_id(options.user_id, "--user-id")
    if len(files) > 2:
        console.notice(f"{options.backup_info} names {len(files)} files; the first two are used")
    console.result(f"User ID: {user_id}")
    good = True
    with Client(address, user_id) as backup_client:
        for number, step in enumerate(steps(backup_client, files, options.output_dir)):
            console.result(f"=== {step.title} ===")
            result = step.do()
            if number == 0 and isinstance(result.error, Unreachable):
                raise result.error
            console.result(result.line)
            good = good and result.ok
    return 0 if good else FAILED


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command line, by default this process's; its exit code."""
    interrupt = Interrupt()
    with on_signals(interrupt):  # until the last word is said
        return _main(arguments, interrupt)


def _main(arguments: Optional[Sequence[str]], interrupt: Interrupt) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is shown escaped rather than not at all.
            stream.reconfigure(errors="backslashreplace")
    console = Console(sys.stdout, sys.stderr, os.environ)
    try:
        interrupt.wait()
        code = _explaining(arguments, console)
        interrupt.ignore()
    except KeyboardInterrupt:
        console.error("interrupted")
        code = INTERRUPTED
    return code


def _explaining(arguments: Optional[Sequence[str]], console: Console) -> int:
    """Runs a command line; what goes wrong becomes a line and an exit code."""
    try:
        return _run(arguments, console)
    except OutputFailed as error:
        if not isinstance(error.__cause__, BrokenPipeError):  # head, say, has seen enough
            console.error(str(error))
        _abandon(sys.stdout)
        return error.exit_code
    except BackupError as error:
        console.error(str(error))
        return error.exit_code
    except OSError as error:
        console.error(f"the system refuses: {(error.strerror or str(error)).lower()}")
        return FAILED
    except Exception as fault:
        for line in describe("a fault of this program; please report it", fault):
            console.error(line)
        return FAILED


def _run(arguments: Optional[Sequence[str]], console: Console) -> int:
    try:
        options = parser().parse_args(arguments)
    except SystemExit as done:  # --help, --version, or Parser.error
        console.flush()
        return int(done.code or 0)
    console.choose(getattr(options, "quiet", False), getattr(options, "json", False))
    code: int = options.run(options, console)
    return code


def _abandon(stream: TextIO) -> None:
    """Lets Python's own flush of a stream at exit succeed; failing, it changes the exit code."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):  # one that is no file needs none of this
        os.dup2(devnull, stream.fileno())
    os.close(devnull)


def run() -> NoReturn:
    """The console script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the process was started without it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    interrupt = Interrupt()
    for number in present():  # for good: once the exit code is known, it is too late for one
        signal.signal(number, interrupt)
    code = _main(None, interrupt)
    if hasattr(signal, "pthread_sigmask"):  # Python gives its handlers up before the process ends
        signal.pthread_sigmask(signal.SIG_BLOCK, present())
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)
    sys.exit(code)
