"""Signals: a command that is interrupted, a server that is ended, and bursts of them."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, List

import pytest

from backup import cli
from backup.cli import main
from backup.signals import (
    INTERRUPTED,
    Interrupt,
    exit_at_the_latest,
    on_signals,
    present,
    wake_no_more,
    waking,
)
from tests.helpers import WAIT_SECONDS, file_payload, response, watchdog
from tests.test_client import (
    Scripted,
    afterwards,
    deaf,
    sparse,
    staying,
    take,
    take_head,
    until_closed,
)
from tests.test_console import Terminal, on_screen
from tests.user import SERVE, User, address_of, as_a_process, environment, errors

MIB = 1 << 20

HALF = response(212, b"large", file_payload(bytes(MIB)))[: MIB // 2]


def is_one_line(
    user: User, terminal: Terminal, server: Scripted, number: signal.Signals, *arguments: str
) -> None:
    """A command that a signal interrupts in the middle of its one file says so and no more."""
    host, port = server.address
    process = subprocess.Popen(
        as_a_process(*arguments, "--server", f"{host}:{port}"),
        cwd=user.folder,
        env={**environment(), "NO_COLOR": "1"},
        stderr=terminal.stream,
    )
    terminal.wait_for("file 1 of 1")
    process.send_signal(number)
    assert process.wait(WAIT_SECONDS) == 130
    assert on_screen(terminal.shown()) == ["backup: interrupted", ""]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_get_leaves_no_file(user: User, number: signal.Signals) -> None:
    before = user.content()
    with Terminal() as terminal, Scripted(staying(HALF)) as server:
        is_one_line(user, terminal, server, number, "get", "large")
    assert user.content() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_put_is_one_line(user: User, number: signal.Signals) -> None:
    sparse(user.folder / "large", 32 * MIB)
    left = threading.Event()
    with Terminal() as terminal, Scripted(deaf(b"", left)) as server, afterwards(left):
        is_one_line(user, terminal, server, number, "put", "large")


@contextmanager
def interrupted_get(user: User, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """A ``get`` in this process, which a signal interrupts in the middle."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def interrupt(terminal: Terminal) -> None:
        terminal.wait_for("file 1 of 1")
        signal.pthread_kill(main_thread, signal.SIGTERM)

    with Terminal() as terminal, Scripted(staying(HALF)) as server, watchdog():
        thread = threading.Thread(target=interrupt, args=(terminal,))
        thread.start()
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        host, port = server.address
        yield lambda: main(["get", "large", "--server", f"{host}:{port}"])
        thread.join(WAIT_SECONDS)


def test_an_interrupt_restores_what_was_there_before(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = user.content()
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with interrupted_get(user, monkeypatch) as get:
        assert get() == 130
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert user.content() == files


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_impatient_user_leaves_no_file_either(
    user: User, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """A second signal comes just when the first has what was received removed."""
    files = user.content()
    unlink = os.unlink

    def slow_unlink(path: str) -> None:
        signal.raise_signal(number)
        unlink(path)

    monkeypatch.setattr(os, "unlink", slow_unlink)
    with interrupted_get(user, monkeypatch) as get:
        assert get() == 130
    assert user.content() == files


def test_a_second_signal_while_the_first_is_reported_changes_nothing(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def script(sock: socket.socket) -> None:
        take(sock, take_head(sock))
        signal.pthread_kill(main_thread, signal.SIGINT)
        until_closed(sock)

    class Slow(io.StringIO):
        """What is written to it takes so long that the user interrupts once more."""

        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGINT)
            return super().write(text)

    stderr = Slow()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Scripted(script) as server, watchdog():
        host, port = server.address
        try:
            code = main(["list", "--server", f"{host}:{port}"])
        except KeyboardInterrupt:  # which would end all tests
            pytest.fail("main was interrupted")
    assert (stderr.getvalue(), code) == (errors("interrupted"), 130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_process_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        as_a_process(*SERVE), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    address_of(process.stderr.readline())
    process.send_signal(number)
    rest = process.communicate(timeout=WAIT_SECONDS)[1]
    assert process.returncode == 0
    assert all(line.startswith("[SERVER] ") for line in rest.splitlines())


def pestered(process: subprocess.Popen[str]) -> str:
    """Sends it every signal that ends a program, again and again until it is gone; its stderr."""
    with watchdog():
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    with process.stderr:
        return process.stderr.read()


def holding(asked: threading.Event, left: threading.Event, sock: socket.socket) -> None:
    """Takes the request up to its payload, says so, and reads nothing until ``left``."""
    take_head(sock)
    asked.set()
    assert left.wait(WAIT_SECONDS)


@pytest.mark.parametrize("inherited", ["trap '' INT TERM; ", ""])
def test_a_burst_of_signals_ends_a_command_in_one_line(user: User, inherited: str) -> None:
    """Even those that come while Python itself ends; and as a job that a script has put behind."""
    sparse(user.folder / "large", 32 * MIB)
    for _ in range(4):
        left, asked = threading.Event(), threading.Event()
        with Scripted(partial(holding, asked, left)) as server, afterwards(left):
            host, port = server.address
            command = as_a_process("put", "large", "--server", f"{host}:{port}")
            process = subprocess.Popen(
                ["sh", "-c", f'{inherited}exec "$0" "$@"', *command],
                cwd=user.folder,
                env=environment(),
                stderr=subprocess.PIPE,
                text=True,
            )
            assert asked.wait(WAIT_SECONDS)
            assert pestered(process) == errors("interrupted")
            assert process.returncode == 130


def test_a_burst_of_signals_ends_a_server_without_a_traceback(tmp_path: Path) -> None:
    for _ in range(3):
        process = subprocess.Popen(
            as_a_process(*SERVE), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        address_of(process.stderr.readline())
        lines = pestered(process).splitlines()
        assert process.returncode in (0, 130)
        others = [line for line in lines if not line.startswith("[SERVER] ")]
        assert set(others) <= {"backup: interrupted"}


def test_a_handler_is_there_meanwhile_and_then_what_was_before() -> None:
    heard: List[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    with on_signals(lambda number, _: heard.append(number), "SIGUSR1", "SIGNONE"):
        signal.raise_signal(signal.SIGUSR1)
    assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == before
    assert present("SIGNONE") == []
    assert present() == [signal.SIGINT, signal.SIGTERM]


def test_a_signal_wakes_a_loop_until_it_is_told_not_to() -> None:
    sender, receiver = socket.socketpair()
    with sender, receiver, on_signals(lambda *_: None, "SIGUSR1"):
        for end in (sender, receiver):
            end.setblocking(False)
        with waking(sender.fileno()):
            signal.raise_signal(signal.SIGUSR1)
            assert receiver.recv(9) == bytes([signal.SIGUSR1])
            wake_no_more()
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(BlockingIOError):
                receiver.recv(9)
        assert signal.set_wakeup_fd(-1) == -1


def test_what_holds_the_process_up_is_given_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: List[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGALRM)
    try:
        exit_at_the_latest(in_seconds=60)
        assert 0 < signal.alarm(0) <= 60
        signal.raise_signal(signal.SIGALRM)
        exit_at_the_latest(in_seconds=0)
        assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
        assert signal.alarm(0) == 0
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [INTERRUPTED]


def test_a_signal_that_comes_before_it_is_waited_for_counts() -> None:
    interrupt = Interrupt()
    interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt.wait()
    interrupt()  # the second of an impatient user


def test_a_signal_that_comes_when_all_is_done_does_nothing(user: User) -> None:
    interrupt = Interrupt()
    assert cli._main(["--version"], interrupt) == 0
    interrupt()
