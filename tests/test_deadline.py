"""Deadlines are called once, in order of time; moving and cancelling them costs no growing heap."""

from __future__ import annotations

import gc
import random
import weakref
from typing import Callable, List, Optional

import pytest

from backup.deadline import NEVER, Deadline, Deadlines


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


class Alarms:
    """A queue, its clock, and the names of the deadlines that were called."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.queue = Deadlines(self.clock)
        self.called: List[str] = []

    def add(self, name: str, seconds: float) -> Deadline:
        return self.queue.add(seconds, lambda: self.called.append(name))

    def after(self, seconds: float) -> List[str]:
        """What is called when so much more time has passed."""
        self.clock.time += seconds
        self.called.clear()
        self.queue.fire(self.clock.time)
        return list(self.called)


@pytest.fixture
def alarms() -> Alarms:
    return Alarms()


def test_it_is_called_when_it_is_due_and_once(alarms: Alarms) -> None:
    alarms.add("tea", 5)
    assert alarms.after(4) == []
    assert alarms.after(1) == ["tea"]
    assert alarms.after(100) == []
    assert len(alarms.queue) == 0


def test_they_are_called_in_order_of_time(alarms: Alarms) -> None:
    for seconds in (3, 1, 5, 2, 4):
        alarms.add(str(seconds), seconds)
    assert alarms.after(4) == ["1", "2", "3", "4"]
    assert alarms.after(4) == ["5"]


def test_two_of_one_moment_are_called_in_the_order_they_were_added(alarms: Alarms) -> None:
    names = [str(number) for number in range(20)]
    for name in names:
        alarms.add(name, 1)
    assert alarms.after(1) == names


def test_one_that_moved_later_is_called_then(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    deadline.move(8)
    assert alarms.after(5) == []
    assert alarms.after(2.9) == []
    assert alarms.after(0.1) == ["tea"]
    assert alarms.after(100) == []


def test_one_that_moved_earlier_is_called_then_and_not_again(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    deadline.move(2)
    assert alarms.after(2) == ["tea"]
    assert alarms.after(100) == []


def test_one_that_moved_to_and_fro_is_called_at_the_last_time_it_was_given(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    for seconds in (9, 1, 5, 2, 7, 5):
        deadline.move(seconds)
    assert alarms.after(4.9) == []
    assert alarms.after(0.1) == ["tea"]
    assert alarms.after(100) == []


def test_one_that_moved_later_keeps_its_turn_among_those_that_are_due(alarms: Alarms) -> None:
    late = alarms.add("late", 1)
    alarms.add("early", 2)
    late.move(3)
    assert alarms.after(10) == ["early", "late"]


def test_moving_later_with_every_byte_adds_nothing_to_the_heap(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    for _ in range(1000):
        alarms.clock.time += 0.001
        deadline.move(5)
    assert len(alarms.queue) == 1


def test_one_that_was_called_can_be_moved_and_is_called_again(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    assert alarms.after(5) == ["tea"]
    deadline.move(5)
    assert alarms.after(4) == []
    assert alarms.after(1) == ["tea"]


def test_a_cancelled_one_is_not_called(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    alarms.add("coffee", 5)
    deadline.cancel()
    assert alarms.after(100) == ["coffee"]


def test_cancelling_twice_or_after_the_call_does_nothing(alarms: Alarms) -> None:
    cancelled, called = alarms.add("cancelled", 5), alarms.add("called", 5)
    cancelled.cancel()
    cancelled.cancel()
    assert alarms.after(5) == ["called"]
    called.cancel()
    assert alarms.after(100) == []
    assert alarms.queue.wait() is None
    assert len(alarms.queue) == 0


def test_a_cancelled_one_stays_silent_even_if_it_is_moved(alarms: Alarms) -> None:
    deadline = alarms.add("tea", 5)
    deadline.cancel()
    deadline.move(1)
    assert alarms.after(100) == []


def test_a_cancelled_one_lets_go_of_what_its_callback_refers_to(alarms: Alarms) -> None:
    class Connection:
        def missed(self) -> None:
            raise AssertionError("called")

    connection = Connection()
    gone = weakref.ref(connection)
    deadline = alarms.queue.add(5, connection.missed)
    deadline.cancel()
    del connection
    gc.collect()
    assert gone() is None
    assert len(alarms.queue) == 1  # though its entry is still there


def test_one_that_is_never_due_is_not_queued(alarms: Alarms) -> None:
    alarms.add("never", NEVER)
    assert alarms.queue.wait() is None
    assert len(alarms.queue) == 0
    assert alarms.after(1e9) == []


def test_one_that_was_moved_to_never_is_not_called(alarms: Alarms) -> None:
    alarms.add("never", 5).move(NEVER)
    assert alarms.after(1e9) == []
    assert alarms.queue.wait() is None


def test_a_callback_may_add_one(alarms: Alarms) -> None:
    def add() -> None:
        alarms.add("added", 1)

    alarms.queue.add(1, add)
    assert alarms.after(1) == []
    assert alarms.after(1) == ["added"]


def test_a_callback_may_move_its_own(alarms: Alarms) -> None:
    deadline: Optional[Deadline] = None

    def tick() -> None:
        alarms.called.append("tick")
        assert deadline is not None
        deadline.move(2)

    deadline = alarms.queue.add(1, tick)
    assert alarms.after(1) == ["tick"]
    assert alarms.after(1) == []
    assert alarms.after(1) == ["tick"]


def test_a_callback_may_cancel_one_that_is_due_with_it(alarms: Alarms) -> None:
    alarms.queue.add(1, lambda: second.cancel())
    second = alarms.add("second", 1)
    alarms.add("third", 1)
    assert alarms.after(1) == ["third"]


def test_a_callback_may_move_away_one_that_is_due_with_it(alarms: Alarms) -> None:
    alarms.queue.add(1, lambda: second.move(3))
    second = alarms.add("second", 1)
    alarms.add("third", 1)
    assert alarms.after(1) == ["third"]
    assert alarms.after(3) == ["second"]


def test_a_callback_may_bring_one_forward(alarms: Alarms) -> None:
    alarms.queue.add(1, lambda: later.move(2))
    later = alarms.add("later", 100)
    assert alarms.after(1) == []
    assert alarms.after(2) == ["later"]
    assert alarms.after(100) == []


def test_a_callback_may_cancel_so_many_that_the_heap_is_built_anew(alarms: Alarms) -> None:
    many = [alarms.add("cancelled", 1) for _ in range(500)]

    def cancel_many() -> None:
        for deadline in many:
            deadline.cancel()

    alarms.queue.add(0.5, cancel_many)
    alarms.add("kept", 1)
    alarms.add("kept later", 2)
    assert alarms.after(1) == ["kept"]
    assert alarms.after(1) == ["kept later"]


def test_those_that_are_left_when_the_heap_is_built_anew_are_called_in_order(
    alarms: Alarms,
) -> None:
    chance = random.Random(7)
    moments = chance.sample(range(1, 10_000), 1000)
    deadlines = {moment: alarms.add(str(moment), moment) for moment in moments}
    for moment in moments[:700]:
        deadlines[moment].cancel()
    assert len(alarms.queue) < 1000
    assert alarms.after(10_000) == [str(moment) for moment in sorted(moments[700:])]


def cancel_a_new_one(alarms: Alarms, _deadline: Deadline, _step: int) -> None:
    alarms.add("cancelled", 60).cancel()


def bring_forward(_alarms: Alarms, deadline: Deadline, step: int) -> None:
    deadline.move(10**6 - step)


@pytest.mark.parametrize("give_up", [cancel_a_new_one, bring_forward])
@pytest.mark.parametrize("live", [0, 500])
def test_the_heap_stays_small_however_many_entries_are_given_up(
    live: int, give_up: Callable[[Alarms, Deadline, int], None], alarms: Alarms
) -> None:
    names = [str(number) for number in range(live)]
    for name in names:
        alarms.add(name, 30)
    distant = alarms.add("distant", 10**6)
    largest = 0
    for step in range(100_000):
        give_up(alarms, distant, step)
        largest = max(largest, len(alarms.queue))
    assert largest <= 2 * live + 100
    assert alarms.after(30) == names
    assert alarms.after(10**6) == ["distant"]


def test_wait_is_the_time_until_the_first(alarms: Alarms) -> None:
    assert alarms.queue.wait() is None
    alarms.add("second", 7)
    alarms.add("first", 5)
    assert alarms.queue.wait() == 5
    alarms.clock.time += 2
    assert alarms.queue.wait() == 3


def test_wait_is_not_negative_for_one_that_is_overdue(alarms: Alarms) -> None:
    alarms.add("tea", 5)
    alarms.clock.time += 8
    assert alarms.queue.wait() == 0


def test_wait_passes_over_those_that_were_given_up(alarms: Alarms) -> None:
    alarms.add("cancelled", 1).cancel()
    alarms.add("moved", 7).move(2)
    alarms.add("cancelled", 3).cancel()
    assert alarms.queue.wait() == 2
    assert alarms.after(2) == ["moved"]
    assert alarms.queue.wait() is None


def test_wait_comes_back_for_one_that_moved_later_and_then_knows_its_time(alarms: Alarms) -> None:
    alarms.add("tea", 5).move(8)
    assert alarms.queue.wait() == 5
    assert alarms.after(5) == []
    assert alarms.queue.wait() == 3
