"""The server as a process: where it listens, where its log goes, what signals do to it.

Rules: everything that is opened here is closed here, in the opposite order,
however it ends. Handlers of signals only ask the server to do something in its
loop. What a service manager wants to know it is told when it is so.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Iterator, Optional, Union

from . import config, systemd
from .address import Address
from .errors import FAILED, ConfigError, SetupFailed
from .fault import describe
from .log import FORMATS, Log, Sink, to_stream
from .output import LogFile, Output
from .pidfile import PidFile
from .server import Server, raise_descriptor_limit
from .settings import Settings
from .signals import INTERRUPTED, exit_at_the_latest, on_signals, wake_no_more, waking


def serve(options: argparse.Namespace) -> int:
    """Runs the server until SIGINT or SIGTERM; its exit code. Raises ``BackupError``."""
    fault: Optional[Exception] = None
    with ExitStack() as stack:
        stack.enter_context(_umask(0o077))
        _refuse_one_file_for_two(options)
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
        process = _Process(server, log, sink)
        stack.enter_context(on_signals(process.stop))
        stack.enter_context(on_signals(process.hang_up, "SIGHUP"))
        stack.enter_context(on_signals(lambda *_: server.report(), "SIGUSR1"))
        stack.enter_context(waking(server.wake_fd))
        if options.pid_file:
            stack.enter_context(PidFile(options.pid_file))
        # From its first line on, a signal drains it.
        if options.quiet:  # with port 0, this line alone tells which one it took
            log.answer(server.greeting)
        process.tell("READY=1")
        try:
            server.serve_forever()
        except Exception as error:  # everything of the server's is closed by now
            fault = error
            for line in describe("a fault of this program ends the server", error):
                log.add(logging.CRITICAL, line)
            log.flush()
    exit_at_the_latest(in_seconds=0)
    if fault is not None:
        return FAILED
    return 0 if process.signals < 2 else INTERRUPTED


class _Process:
    """What signals ask of a running server, and what its service manager is told."""

    def __init__(self, server: Server, log: Log, sink: Sink) -> None:
        self.signals = 0  # that ask it to end, so far
        self._server = server
        self._log = log
        self._sink = sink

    def tell(self, state: str) -> None:
        """Tells a service manager, if there is one."""
        try:
            systemd.notify(os.environ, state)
        except SetupFailed as error:
            self._log.add(logging.WARNING, str(error))

    def stop(self, *_: object) -> None:
        """The handler of signals that end it: the first lets requests finish, the second does not.

        Of further ones none does anything: all is done that can be, and a burst must not put the
        end off.
        """
        self.signals += 1
        if self.signals > 2:
            return
        if self.signals == 1:
            self._server.call(lambda: self.tell("STOPPING=1"))
        self._server.call(wake_no_more)  # each time: one may come in the middle of the other
        self._server.stop()
        if self.signals == 2:
            exit_at_the_latest(in_seconds=1)

    def hang_up(self, *_: object) -> None:
        """The handler of SIGHUP: a log file is opened anew; without one, the terminal is gone."""
        if isinstance(self._sink, LogFile):
            self._server.call(partial(self._reopen, self._sink))
        else:
            self.stop()

    def _reopen(self, file: LogFile) -> None:
        try:
            file.reopen()
        except SetupFailed as error:
            self._log.add(logging.WARNING, f"{error}; this goes on in the old one")


def _refuse_one_file_for_two(options: argparse.Namespace) -> None:
    """The pid file would take the place of the log. Raises ``ConfigError``."""
    files = options.log_file, options.pid_file
    if all(files) and os.path.realpath(files[0]) == os.path.realpath(files[1]):
        raise ConfigError("--log-file and --pid-file are one file; take another for one of them")


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


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """Files that are made meanwhile have the modes they were given, less this."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
