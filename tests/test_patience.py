"""How long a connection waits: time passes when a test says so."""

from __future__ import annotations

from typing import Iterator, List

import pytest

from backup.patience import Patience
from backup.reactor import Reactor
from backup.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Bench:
    """A reactor whose time a test moves, and a patience that notes what was missed."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.reactor = Reactor(self.clock)
        self.missed: List[str] = []
        self.patience = Patience(self.reactor, Settings(), 10.0, self.missed.append)

    def after(self, seconds: float, moved: int = 0) -> List[str]:
        """One turn, so much later, in which so many bytes move first; what is missed by then."""
        self.clock.time += seconds
        self.reactor.next_turn(lambda: self.patience.moved(moved) if moved else None)
        self.reactor.turn()
        return self.missed


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.reactor.close()


SILENT = ["was silent for 60 s"]
SLOW = ["was slower than 1024 bytes a second for 30 s"]


def test_one_that_stands_is_missed_whatever_moves(bench: Bench) -> None:
    bench.patience.watch()
    for _ in range(9):
        assert bench.after(1, moved=1 << 20) == []
    assert bench.after(1, moved=1 << 20) == ["took more than 10 s"]
    assert bench.after(1000) == ["took more than 10 s"]


def test_before_it_is_watched_nothing_is_missed(bench: Bench) -> None:
    assert bench.after(1000) == []
    bench.patience.watch()
    assert bench.after(9) == []
    assert bench.after(1) == ["took more than 10 s"]


def test_one_that_stands_can_be_set_anew(bench: Bench) -> None:
    bench.patience.watch()
    bench.after(9)
    bench.patience.stand(5)
    assert bench.patience.seconds == 5
    assert bench.after(4) == []
    assert bench.after(1) == ["took more than 5 s"]


def test_silence_is_missed(bench: Bench) -> None:
    bench.patience.watch()
    bench.patience.keep_moving(paced=False)
    assert bench.after(30, moved=1) == []
    assert bench.after(59.9) == []
    assert bench.after(0.1) == SILENT


def test_silence_is_missed_by_who_must_keep_pace_too(bench: Bench) -> None:
    bench.patience.keep_moving(paced=True)
    bench.patience.watch()
    assert bench.after(60) == SILENT  # both are due: the plainer word


@pytest.mark.parametrize(
    ("a_second", "missed"), [(0, SLOW), (1, SLOW), (1023, SLOW), (1024, []), (5000, [])]
)
def test_the_rate_is_what_moves_on_average(a_second: int, missed: List[str], bench: Bench) -> None:
    bench.patience.keep_moving(paced=True)
    bench.patience.watch()
    for _ in range(29):
        assert bench.after(1, moved=a_second) == []
    assert bench.after(1, moved=a_second) == missed


def test_every_window_is_looked_at(bench: Bench) -> None:
    bench.patience.keep_moving(paced=True)
    bench.patience.watch()
    bench.after(29, moved=30 * 1024)
    for _ in range(30):
        assert bench.after(1) == []
    assert bench.after(1) == SLOW


def test_who_need_not_keep_pace_may_send_a_byte_now_and_then(bench: Bench) -> None:
    bench.patience.keep_moving(paced=False)
    bench.patience.watch()
    for _ in range(5):
        assert bench.after(59, moved=1) == []
    assert bench.after(60) == SILENT


def test_while_it_rests_nothing_is_missed_and_then_all_begins_anew(bench: Bench) -> None:
    bench.patience.keep_moving(paced=True)
    bench.patience.watch()
    bench.after(29)
    bench.patience.rest()
    assert bench.after(1000) == []
    bench.patience.keep_moving(paced=True)
    bench.patience.watch()
    assert bench.after(29) == []
    assert bench.after(1) == SLOW


def test_after_it_is_closed_nothing_is_missed(bench: Bench) -> None:
    bench.patience.watch()
    bench.patience.close()
    bench.patience.close()
    assert bench.after(1000) == []


def test_what_is_due_later_than_it_was_is_looked_at_again(bench: Bench) -> None:
    bench.patience.keep_moving(paced=False)
    bench.patience.watch()
    bench.after(30, moved=1)
    assert bench.after(30) == []
    assert bench.after(30) == SILENT
