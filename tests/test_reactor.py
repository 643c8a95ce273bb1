"""The loop keeps the rules of its docstring, with every selector a system may have.

Real sockets, threads and signals; a test whose loop waits for what never comes
is ended by an alarm.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Callable, Iterator, List, Optional, Tuple

import pytest

from backup.reactor import READ, WRITE, Reactor
from tests.conftest import open_descriptors

Pair = Tuple[socket.socket, socket.socket]
PairFactory = Callable[[], Pair]

ALARM_SECONDS = 10.0

SELECTORS = [selectors.DefaultSelector, selectors.PollSelector, selectors.SelectSelector]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """Ends a test that waits for ever."""

    def ring(_signal: int, _frame: Optional[FrameType]) -> None:
        raise AssertionError("the loop waits for what never comes")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, ALARM_SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=SELECTORS)
def selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes this selector for the one of the system."""
    monkeypatch.setattr(selectors, "DefaultSelector", request.param)


@pytest.fixture
def reactor(selector: None) -> Iterator[Reactor]:
    with Reactor() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[PairFactory]:
    """Makes connected sockets, which are closed when the test is over."""
    with ExitStack() as stack:

        def make() -> Pair:
            ours, theirs = socket.socketpair()
            return stack.enter_context(ours), stack.enter_context(theirs)

        yield make


def nothing(_events: int = 0) -> None:
    pass


def poke(reactor: Reactor) -> None:
    """A turn that does what is there and does not wait for more."""
    reactor.call(nothing)
    reactor.turn()


def ready(pair: PairFactory) -> socket.socket:
    """A socket that has something to read."""
    ours, theirs = pair()
    theirs.send(b"x")
    return ours


def turns_until_a_child_ends(reactor: Reactor, pair: PairFactory) -> int:
    """How often the loop turns until something happens outside this process."""
    ours, theirs = pair()
    ended: List[int] = []
    reactor.watch(ours, READ, ended.append)
    turns = 0
    with subprocess.Popen([sys.executable, "-S", "-c", ""], stdin=theirs.fileno()):
        theirs.close()  # the child's exit closes the last one of that end
        while not ended:
            reactor.turn()
            turns += 1
    reactor.unwatch(ours)
    return turns


# What a turn does, and in which order.


def test_a_turn_runs_ready_sockets_then_calls_then_deadlines_then_what_was_put_off(
    reactor: Reactor, pair: PairFactory
) -> None:
    done: List[str] = []
    reactor.at_turn_end(lambda: done.append("put off"))
    reactor.deadline(0, lambda: done.append("deadline"))
    reactor.watch(ready(pair), READ, lambda _: done.append("ready"))
    reactor.call(lambda: done.append("call"))
    reactor.turn()
    assert done == ["ready", "call", "deadline", "put off"]


def test_a_callback_hears_what_its_socket_is_ready_for(reactor: Reactor, pair: PairFactory) -> None:
    silent, readable = pair()[0], ready(pair)
    of_silent: List[int] = []
    of_readable: List[int] = []
    reactor.watch(silent, READ | WRITE, of_silent.append)
    reactor.watch(readable, READ | WRITE, of_readable.append)
    reactor.turn()
    assert (of_silent, of_readable) == ([WRITE], [READ | WRITE])


@pytest.mark.parametrize("interest", [READ, WRITE])
def test_a_callback_hears_nothing_beyond_its_interest(
    interest: int, reactor: Reactor, pair: PairFactory
) -> None:
    heard: List[int] = []
    reactor.watch(ready(pair), interest, heard.append)
    reactor.turn()
    assert heard == [interest]


def test_a_socket_is_called_in_each_turn_in_which_it_is_still_ready(
    reactor: Reactor, pair: PairFactory
) -> None:
    sock = ready(pair)
    heard: List[int] = []
    reactor.watch(sock, READ, heard.append)
    reactor.turn()
    reactor.turn()
    assert heard == [READ, READ]
    sock.recv(1)
    poke(reactor)
    assert heard == [READ, READ]


def test_a_hang_up_is_heard_whatever_the_interest(reactor: Reactor, pair: PairFactory) -> None:
    heard: List[int] = []
    for interest in (READ, WRITE):
        ours, theirs = pair()
        theirs.close()
        reactor.watch(ours, interest, heard.append)
    reactor.turn()
    assert sorted(heard) == [READ, WRITE]


# Watching and no longer watching.


def test_watching_again_replaces_the_callback(reactor: Reactor, pair: PairFactory) -> None:
    sock = ready(pair)
    first: List[int] = []
    second: List[int] = []
    reactor.watch(sock, READ, first.append)
    reactor.watch(sock, READ, second.append)
    reactor.turn()
    assert (first, second) == ([], [READ])


def test_watching_again_replaces_the_interest(reactor: Reactor, pair: PairFactory) -> None:
    sock = ready(pair)
    heard: List[int] = []
    reactor.watch(sock, READ, heard.append)
    reactor.watch(sock, WRITE, heard.append)
    reactor.turn()
    assert heard == [WRITE]


def test_what_is_watched_again_does_not_hear_of_an_event_of_its_former_interest(
    reactor: Reactor, pair: PairFactory
) -> None:
    socks = [ready(pair), ready(pair)]
    first: List[int] = []
    second: List[int] = []

    def watch_both_again(events: int) -> None:
        first.append(events)
        for sock in socks:
            reactor.watch(sock, WRITE, second.append)

    for sock in socks:
        reactor.watch(sock, READ, watch_both_again)
    reactor.turn()
    assert (first, second) == ([READ], [])
    reactor.turn()
    assert (first, second) == ([READ], [WRITE, WRITE])


def test_watching_again_with_the_same_method_changes_nothing(
    reactor: Reactor, pair: PairFactory
) -> None:
    class Listener:
        heard = 0

        def listen(self, _events: int) -> None:
            self.heard += 1

    sock, listener = ready(pair), Listener()
    reactor.watch(sock, READ, listener.listen)
    reactor.watch(sock, READ, listener.listen)
    poke(reactor)
    assert listener.heard == 1


def test_a_socket_that_is_no_longer_watched_is_not_called_though_its_event_is_here(
    reactor: Reactor, pair: PairFactory
) -> None:
    socks = [ready(pair), ready(pair)]
    called: List[int] = []

    def drop(other: socket.socket) -> Callable[[int], None]:
        def heard(_events: int) -> None:
            called.append(other.fileno())
            reactor.unwatch(other)

        return heard

    reactor.watch(socks[0], READ, drop(socks[1]))
    reactor.watch(socks[1], READ, drop(socks[0]))
    reactor.turn()
    assert len(called) == 1
    reactor.turn()
    assert called == [called[0]] * 2


def test_what_is_put_off_to_the_next_turn_waits_for_it_and_it_for_nothing(
    reactor: Reactor, pair: PairFactory
) -> None:
    done: List[str] = []

    def put_off() -> None:
        done.append("first")
        reactor.next_turn(lambda: done.append("second"))

    reactor.watch(pair()[0], READ, lambda _: done.append("ready"))  # it never is
    reactor.next_turn(put_off)
    reactor.turn()
    assert done == ["first"]
    reactor.turn()
    assert done == ["first", "second"]


def test_what_was_put_off_to_the_turns_end_runs_in_rounds(reactor: Reactor) -> None:
    done: List[str] = []

    def first(name: str) -> None:
        done.append(f"{name}1")
        reactor.at_turn_end(lambda: done.append(f"{name}2"))

    reactor.at_turn_end(lambda: first("a"))
    reactor.at_turn_end(lambda: first("b"))
    reactor.turn()
    assert done == ["a1", "b1", "a2", "b2"]


@pytest.mark.parametrize("shared", [False, True], ids=["another callback", "the same callback"])
def test_a_socket_does_not_hear_of_the_event_of_an_older_one_of_its_number(
    shared: bool, reactor: Reactor, pair: PairFactory
) -> None:
    socks = [ready(pair), ready(pair)]
    silent, far_end = pair()
    called: List[str] = []

    def heard(_events: int) -> None:
        called.append("old")
        while socks:  # whichever is called first renews both
            reactor.unwatch(socks[-1])
            number = socks.pop().detach()
            os.dup2(silent.fileno(), number)
            renewed.append(stack.enter_context(socket.socket(fileno=number)))
            callback = heard if shared else lambda _: called.append("new")
            reactor.watch(renewed[-1], READ, callback)

    with ExitStack() as stack:
        renewed: List[socket.socket] = []
        for sock in socks:
            reactor.watch(sock, READ, heard)
        reactor.turn()
        assert called == ["old"]
        far_end.send(b"x")
        reactor.turn()
        assert len(called) == 3
        for sock in renewed:
            reactor.unwatch(sock)


def test_what_an_interrupt_took_out_of_the_selector_is_unwatched_all_the_same(
    reactor: Reactor, pair: PairFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """selectors takes a socket out when changing its interest ends in an exception."""
    ours, _ = pair()

    def interrupted(sock: socket.socket, *_: object) -> None:
        reactor._selector.unregister(sock)
        raise KeyboardInterrupt

    reactor.watch(ours, READ, lambda _: None)
    monkeypatch.setattr(reactor._selector, "modify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reactor.watch(ours, WRITE, lambda _: None)
    reactor.unwatch(ours)
    reactor.watch(ours, READ, lambda _: None)  # nothing of it is left


def test_unwatching_what_is_not_watched_does_nothing(reactor: Reactor, pair: PairFactory) -> None:
    ours, _ = pair()
    reactor.unwatch(ours)
    reactor.watch(ours, READ, nothing)
    reactor.unwatch(ours)
    reactor.unwatch(ours)
    ours.close()
    reactor.unwatch(ours)


# Deadlines.


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_deadline_is_called_once_when_the_clock_says_so() -> None:
    clock = Clock()
    called: List[str] = []
    with Reactor(clock) as reactor:
        reactor.deadline(5, lambda: called.append("due"))
        clock.time = 4.9
        poke(reactor)
        assert called == []
        clock.time = 5
        reactor.turn()
        poke(reactor)
        assert called == ["due"]


def test_a_turn_waits_for_the_deadline(reactor: Reactor) -> None:
    called: List[float] = []
    began = reactor.now()
    reactor.deadline(0.02, lambda: called.append(reactor.now()))
    while not called:
        reactor.turn()
    assert called[0] >= began + 0.02


@pytest.mark.parametrize("seconds", [30 * 24 * 3600.0, 1e10, float("inf")])
def test_a_deadline_may_be_far_away(seconds: float, reactor: Reactor) -> None:
    called: List[str] = []
    reactor.deadline(seconds, lambda: called.append("due"))
    poke(reactor)
    assert called == []


def test_a_ready_socket_is_served_before_the_deadline_that_it_may_move(
    reactor: Reactor, pair: PairFactory
) -> None:
    called: List[str] = []
    deadline = reactor.deadline(0, lambda: called.append("missed"))
    reactor.watch(ready(pair), READ, lambda _: deadline.move(60))
    reactor.turn()
    assert called == []


@pytest.mark.parametrize("by", ["call", "socket", "deadline"])
def test_a_cancelled_deadline_is_not_called_though_it_is_due(
    by: str, reactor: Reactor, pair: PairFactory
) -> None:
    called: List[str] = []
    reactor.deadline(0, lambda: deadline.cancel() if by == "deadline" else None)
    deadline = reactor.deadline(0, lambda: called.append("due"))
    if by == "call":
        reactor.call(deadline.cancel)
    elif by == "socket":
        reactor.watch(ready(pair), READ, lambda _: deadline.cancel())
    reactor.turn()
    assert called == []


# Work put off to the turn's end.


def test_what_was_put_off_is_done_once_after_all_that_is_ready(
    reactor: Reactor, pair: PairFactory
) -> None:
    done: List[str] = []

    def put_off(_events: int) -> None:
        done.append("ready")
        if len(done) == 1:
            reactor.at_turn_end(lambda: done.append("put off"))

    for _ in range(3):
        reactor.watch(ready(pair), READ, put_off)
    reactor.turn()
    assert done == ["ready"] * 3 + ["put off"]
    reactor.turn()
    assert done.count("put off") == 1


def test_what_was_put_off_may_put_off_more_to_the_same_turns_end(reactor: Reactor) -> None:
    done: List[str] = []

    def first() -> None:
        done.append("first")
        reactor.at_turn_end(lambda: done.append("third"))

    reactor.at_turn_end(first)
    reactor.at_turn_end(lambda: done.append("second"))
    reactor.turn()
    assert done == ["first", "second", "third"]


def test_a_turn_does_not_wait_when_something_was_put_off_before_it(reactor: Reactor) -> None:
    done: List[str] = []
    reactor.at_turn_end(lambda: done.append("put off"))
    reactor.turn()
    assert done == ["put off"]


# Calls from elsewhere.


def test_calls_are_made_in_their_order_each_once(reactor: Reactor) -> None:
    done: List[int] = []
    for number in range(5):
        reactor.call(partial(done.append, number))
    reactor.turn()
    poke(reactor)
    assert done == [0, 1, 2, 3, 4]


class Waiting:
    """A reactor with nothing to do, and a thread that acts when it is about to wait."""

    def __init__(self) -> None:
        self._looked = threading.Event()
        self.reactor = Reactor(self._clock)
        self.reactor.deadline(3600, nothing)

    def turn_until(self, happened: List[str], act: Callable[[], object]) -> None:
        """Turns until there is an entry in ``happened``, while the thread does its act."""

        def act_then() -> None:
            if self._looked.wait(ALARM_SECONDS):
                act()

        self._looked.clear()
        thread = threading.Thread(target=act_then)
        thread.start()
        try:
            while not happened:
                self.reactor.turn()
        finally:
            thread.join()

    def _clock(self) -> float:
        self._looked.set()  # before it waits, the loop looks for how long it may
        return 0.0


@pytest.fixture
def waiting(selector: None) -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.reactor.close()


def test_a_call_from_another_thread_wakes_the_loop_and_runs_in_the_loops_thread(
    waiting: Waiting,
) -> None:
    threads: List[str] = []

    def note() -> None:
        threads.append(threading.current_thread().name)

    waiting.turn_until(threads, lambda: waiting.reactor.call(note))
    assert threads == [threading.main_thread().name]


def test_no_call_of_many_threads_is_lost(reactor: Reactor) -> None:
    done: List[int] = []

    def call_often(number: int) -> None:
        for _ in range(500):
            reactor.call(lambda: done.append(number))

    callers = [threading.Thread(target=call_often, args=[number]) for number in range(4)]
    for caller in callers:
        caller.start()
    while len(done) < 2000:
        reactor.turn()
    for caller in callers:
        caller.join()
    assert sorted(done) == sorted(list(range(4)) * 500)


@pytest.mark.parametrize("moment", ["socket", "deadline", "turn end"])
def test_a_call_that_comes_in_the_middle_of_a_turn_wakes_the_next(
    moment: str, reactor: Reactor, pair: PairFactory
) -> None:
    done: List[str] = []
    socks = [ready(pair), ready(pair)]  # one of them, perhaps, before the loop's own

    def call(_events: int = 0) -> None:
        reactor.call(lambda: done.append("called"))

    for sock in socks:
        reactor.watch(sock, READ, call if moment == "socket" else nothing)
    if moment == "deadline":
        reactor.deadline(0, call)
    if moment == "turn end":
        reactor.at_turn_end(call)
    reactor.call(nothing)
    reactor.turn()
    for sock in socks:
        reactor.unwatch(sock)
    reactor.turn()  # waits for ever if the call did not wake it
    assert done == ["called"] * (2 if moment == "socket" else 1)


def test_a_call_made_by_a_call_is_for_the_next_turn(reactor: Reactor) -> None:
    done: List[int] = []

    def again() -> None:
        done.append(len(done))
        if len(done) < 10:
            reactor.call(again)

    reactor.call(again)
    reactor.turn()
    assert done == [0]
    reactor.turn()
    assert done == [0, 1]


@pytest.fixture
def on_signal() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Sets what SIGUSR1 does."""
    before = signal.getsignal(signal.SIGUSR1)

    def set_action(act: Callable[[], None]) -> None:
        signal.signal(signal.SIGUSR1, lambda *_: act())

    yield set_action
    signal.signal(signal.SIGUSR1, before)


def send_signal() -> None:
    """To the main thread, which runs the loop."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGUSR1)


def test_a_call_from_a_signal_handler_wakes_the_loop_to_whose_wake_fd_signals_are_written(
    waiting: Waiting, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    done: List[str] = []
    on_signal(lambda: waiting.reactor.call(lambda: done.append("called")))
    before = signal.set_wakeup_fd(waiting.reactor.wake_fd)
    try:
        waiting.turn_until(done, send_signal)
    finally:
        signal.set_wakeup_fd(before)
    assert done == ["called"]


def test_a_call_from_a_signal_handler_in_the_middle_of_a_turn_wakes_the_next(
    reactor: Reactor, pair: PairFactory, on_signal: Callable[[Callable[[], None]], None]
) -> None:
    done: List[str] = []
    on_signal(lambda: reactor.call(lambda: done.append("called")))
    sock = ready(pair)

    def interrupted(_events: int) -> None:
        reactor.unwatch(sock)
        os.kill(os.getpid(), signal.SIGUSR1)

    reactor.watch(sock, READ, interrupted)
    poke(reactor)
    while not done:
        reactor.turn()


def test_a_byte_written_to_wake_fd_wakes_the_loop(waiting: Waiting) -> None:
    written: List[str] = []

    def write() -> None:
        written.append("written")  # first, so that the turn this ends is the last
        os.write(waiting.reactor.wake_fd, b"x")

    waiting.turn_until(written, write)


def test_thousands_of_calls_before_a_turn_are_all_made_and_leave_nothing_to_wake_for(
    reactor: Reactor, pair: PairFactory
) -> None:
    done: List[int] = []
    for number in range(10_000):
        reactor.call(partial(done.append, number))
    reactor.turn()
    assert done == list(range(10_000))
    assert turns_until_a_child_ends(reactor, pair) == 1


def test_thousands_of_bytes_in_wake_fd_wake_it_for_one_turn(
    reactor: Reactor, pair: PairFactory
) -> None:
    os.write(reactor.wake_fd, bytes(10_000))
    reactor.turn()
    assert turns_until_a_child_ends(reactor, pair) == 1


# No spinning.


def test_a_turn_with_nothing_to_do_waits(reactor: Reactor, pair: PairFactory) -> None:
    silent, _far_end = pair()
    reactor.watch(silent, READ, nothing)
    reactor.deadline(3600, nothing)
    reactor.deadline(0, nothing).cancel()
    reactor.deadline(0, nothing).move(3600)
    reactor.at_turn_end(nothing)
    poke(reactor)
    assert turns_until_a_child_ends(reactor, pair) == 1


def test_a_paused_socket_does_not_wake_the_loop_though_the_peer_has_hung_up(
    reactor: Reactor, pair: PairFactory
) -> None:
    ours, theirs = pair()
    theirs.close()
    reactor.watch(ours, READ, nothing)
    reactor.turn()
    reactor.unwatch(ours)
    assert turns_until_a_child_ends(reactor, pair) == 1


def test_it_has_room_for_a_few_hundred_sockets_where_there_is_only_select(
    reactor: Reactor,
) -> None:
    only_select = selectors.DefaultSelector.__name__ == "SelectSelector"
    assert (reactor.room <= 512) == only_select
    assert reactor.room > 100


# Its end.


@pytest.mark.usefixtures("selector")
def test_one_that_cannot_be_made_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted() -> Pair:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "socketpair", exhausted)
    before = open_descriptors()
    with pytest.raises(OSError, match="Too many open files") as caught:
        Reactor()
    assert open_descriptors() == before  # though the error still refers to all there was
    assert caught.value.errno == errno.EMFILE


def test_closing_lets_go_of_its_descriptors_and_of_no_others(
    pair: PairFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair()
    for selector in SELECTORS:
        monkeypatch.setattr(selectors, "DefaultSelector", selector)
        before = open_descriptors()
        reactor = Reactor()
        reactor.watch(ours, READ, nothing)
        reactor.close()
        assert open_descriptors() == before
    theirs.send(b"still open")
    assert ours.recv(100) == b"still open"


def test_after_closing_calls_and_unwatching_and_closing_again_do_nothing(
    reactor: Reactor, pair: PairFactory
) -> None:
    ours, _ = pair()
    reactor.watch(ours, READ, nothing)
    reactor.close()
    reactor.call(nothing)
    reactor.unwatch(ours)
    reactor.close()


def test_what_arrives_while_a_turn_works_is_heard_before_a_deadline_is_missed(
    pair: PairFactory,
) -> None:
    clock = Clock()
    ours, theirs = pair()
    happened: List[str] = []

    with Reactor(clock) as reactor:
        deadline = reactor.deadline(5, lambda: happened.append("missed"))

        def hear(_events: int) -> None:
            happened.append("heard")
            reactor.unwatch(ours)
            deadline.move(5)

        def stall() -> None:
            clock.time += 60  # a slow disk, say; meanwhile
            theirs.send(b"x")

        reactor.watch(ours, READ, hear)
        reactor.call(stall)
        reactor.turn()
        reactor.turn()
        assert happened == ["heard"]
        clock.time += 5
        reactor.turn()
        assert happened == ["heard", "missed"]


def test_the_slowest_turn_is_told_without_its_waiting() -> None:
    now = [100.0]
    with Reactor(lambda: now[0]) as reactor:
        assert reactor.slowest_turn == 0.0

        def work(seconds: float) -> None:
            now[0] += seconds

        for seconds in (0.25, 1.5, 0.5):
            reactor.next_turn(partial(work, seconds))
            reactor.at_turn_end(partial(work, seconds))
            reactor.turn()
            now[0] += 7.0  # between turns
    assert reactor.slowest_turn == 3.0
