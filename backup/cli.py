"""The command line: what can be typed, what is printed, how it exits.

Rules: nothing else in the package prints or exits. Whatever a user can cause
ends in one line that says what, where and what to do, and in one of the exit
codes below; a traceback is a fault of this program.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import signal
import socket
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Callable, Iterator, List, NoReturn, Optional, Sequence, TextIO, Union

from . import __version__, config, systemd
from .address import Address
from .client import Client
from .commands import delete, get, list_names, put
from .console import Console
from .errors import BackupError, ConfigError, OutputFailed, SetupFailed, Unreachable
from .fault import describe
from .log import FORMATS, Log, Sink, to_stream
from .names import show
from .output import LogFile, Output
from .pidfile import PidFile
from .sequence import steps
from .server import Server, raise_descriptor_limit
from .settings import Settings

FAILED, USAGE, INTERRUPTED = 1, 2, 130

_ENDING = ("SIGINT", "SIGTERM")  # the signals that end a program

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

    _serve_options(command("serve", serve, "run the server in the foreground"))
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
            f"{text!r} is not a size from 1 on; bytes, or a unit behind it: 500M, 2G (K, M, G, T)"
        )
    return int(found[1]) << 10 * " KMGT".index(found[2] or " ")


def _positive(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 999999999")
    return int(text)


def serve(options: argparse.Namespace, _: Console) -> int:
    """Runs the server until SIGINT or SIGTERM."""
    signals = 0
    fault: Optional[Exception] = None
    with ExitStack() as stack:
        stack.enter_context(_umask(0o077))
        address = _where_to_listen(options)
        sink = _log_sink(options, stack)
        level = logging.DEBUG if options.verbose else logging.INFO
        log = Log(sink, logging.WARNING if options.quiet else level)
        raise_descriptor_limit()
        settings = _settings(options)
        root = config.store_root(options.root, os.environ)
        server = stack.enter_context(
            Server(root, address, settings, log, allow_anonymous=options.allow_anonymous)
        )

        def tell(state: str) -> None:
            try:
                systemd.notify(os.environ, state)
            except SetupFailed as error:
                log.add(logging.WARNING, str(error))

        def reopen(file: LogFile) -> None:
            try:
                file.reopen()
            except SetupFailed as error:
                log.add(logging.WARNING, f"{error}; this goes on in the old one")

        def stop(*_: object) -> None:
            nonlocal signals
            signals += 1
            if signals > 2:  # all is done that can be; a burst must not put the end off
                return
            if signals == 1:
                server.call(lambda: tell("STOPPING=1"))
            server.call(_wake_no_more)  # each time: one may come in the middle of the other
            server.stop()
            if signals == 2:
                _exit_at_the_latest(in_seconds=1)

        stack.enter_context(_on_signals(stop))
        hang_up: Callable[..., None] = stop  # of the terminal
        if isinstance(sink, LogFile):
            again = partial(server.call, partial(reopen, sink))
            hang_up = lambda *_: again()  # noqa: E731
        stack.enter_context(_on_signals(hang_up, "SIGHUP"))
        stack.enter_context(_on_signals(lambda *_: server.report(), "SIGUSR1"))
        stack.enter_context(_waking(server.wake_fd))
        if options.pid_file:
            stack.enter_context(PidFile(options.pid_file))
        # From its first line on, a signal drains it.
        if options.quiet:  # with port 0, this line alone tells which one it took
            log.answer(server.greeting)
        tell("READY=1")
        try:
            server.serve_forever()
        except Exception as error:  # everything of the server's is closed by now
            fault = error
            for line in describe("a fault of this program ends the server", error):
                log.add(logging.CRITICAL, line)
            log.flush()
    _exit_at_the_latest(in_seconds=0)
    if fault is not None:
        return FAILED
    return 0 if signals < 2 else INTERRUPTED


def _where_to_listen(options: argparse.Namespace) -> Union[Address, socket.socket]:
    """The socket that a service manager has handed over, or an address."""
    inherited = systemd.inherited_socket(os.environ)
    if inherited is None:
        return config.listen_address(options.listen, options.server_info)
    if options.listen:
        inherited.close()
        raise ConfigError("LISTEN_FDS hands over a socket to listen on; leave out --listen")
    return inherited


def _log_sink(options: argparse.Namespace, stack: ExitStack) -> Sink:
    """What writes the log, until ``stack`` is done."""
    form = FORMATS[options.log_format]
    if options.log_file:
        sink: Output = LogFile(options.log_file, form)
    else:
        try:
            fd, encoding = sys.stderr.fileno(), sys.stderr.encoding
        except (OSError, ValueError):  # it is not a file of the system's, or closed
            return to_stream(sys.stderr, form)
        sink = Output(fd, form, encoding)
    stack.callback(sink.close)
    return sink


def _settings(options: argparse.Namespace) -> Settings:
    return Settings(
        fsync=not options.no_fsync,
        max_connections=options.max_connections,
        max_connections_per_address=options.max_connections_per_address,
        max_file_bytes=options.max_file_size,
        user_bytes=options.user_quota,
        user_files=options.user_files,
        total_bytes=options.total_quota,
        min_free_bytes=options.min_free,
        append_only=options.append_only,
    )


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


def _exit_at_the_latest(in_seconds: int) -> None:
    """Ends this process then, even if a disk or a pipe that nobody reads holds it up; 0: never."""
    if hasattr(signal, "alarm"):
        exit_now = (lambda *_: os._exit(INTERRUPTED)) if in_seconds else signal.SIG_DFL
        signal.alarm(0)
        signal.signal(signal.SIGALRM, exit_now)
        signal.alarm(in_seconds)


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Files that are made meanwhile have the modes they were given, less this."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def _on_signals(handler: Callable[..., None], *names: str) -> Iterator[None]:
    """These signals call ``handler`` meanwhile; by default those that end a program."""
    before = [(number, signal.signal(number, handler)) for number in _numbers(*names)]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)


@contextmanager
def _waking(fd: int) -> Iterator[None]:
    """A signal writes to ``fd`` meanwhile: on some systems it would not end the waiting alone."""
    before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)


def _wake_no_more() -> None:
    """Before a server closes the descriptor: Python complains of each signal that comes later."""
    signal.set_wakeup_fd(-1)


def _numbers(*names: str) -> List[int]:
    """The signals of these names, as far as this system has them; by default the ending ones."""
    return [getattr(signal, name) for name in names or _ENDING if hasattr(signal, name)]


class _Interrupt:
    """The handler of the signals that end a command: the first one that counts interrupts it.

    Later ones change nothing, so that an impatient second one does not cut the tidying up short.
    They are told by a flag: a handler that is replaced while its signal is pending makes Python
    print a traceback.
    """

    def __init__(self) -> None:
        self._waited_for = False
        self._came = False

    def __call__(self, *_: object) -> None:
        self._came = True
        self._look()

    def wait(self) -> None:
        """From now on a signal, or one that has come before, raises ``KeyboardInterrupt``."""
        self._waited_for = True
        if self._came:
            self._look()

    def ignore(self) -> None:
        """From now on no signal does anything."""
        self._waited_for = False

    def _look(self) -> None:
        if self._waited_for:
            self._waited_for = False
            raise KeyboardInterrupt


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Runs one command line, by default this process's; its exit code."""
    interrupt = _Interrupt()
    with _on_signals(interrupt):  # until the last word is said
        return _main(arguments, interrupt)


def _main(arguments: Optional[Sequence[str]], interrupt: _Interrupt) -> int:
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
    interrupt = _Interrupt()
    for number in _numbers():  # for good: once the exit code is known, it is too late for one
        signal.signal(number, interrupt)
    code = _main(None, interrupt)
    if hasattr(signal, "pthread_sigmask"):  # Python gives its handlers up before the process ends
        signal.pthread_sigmask(signal.SIG_BLOCK, _numbers())
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)
    sys.exit(code)
