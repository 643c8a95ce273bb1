"""What an example is drawn from, so that one generator serves ``random`` and hypothesis alike."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Sequence, TypeVar

T = TypeVar("T")


class Broken(AssertionError):
    """The invariant does not hold; the text says what of it."""


class Tally:
    """What the examples of a run added up to."""

    def __init__(self) -> None:
        self.examples = 0
        self.requests = 0
        self.answers: Counter[str] = Counter()


class Choices:
    """Two draws, and what is made of them; lower and shorter is simpler."""

    def integer(self, low: int, high: int) -> int:
        """A number from ``low`` to ``high``."""
        raise NotImplementedError

    def data(self, most: int) -> bytes:
        """Up to so many bytes, any bytes."""
        raise NotImplementedError

    def pick(self, options: Sequence[T]) -> T:
        """One of them; the first is the simplest."""
        return options[self.integer(0, len(options) - 1)]

    def once_in(self, count: int) -> bool:
        """True once in so many times."""
        return self.integer(1, count) == count


class FromRandom(Choices):
    """Draws that a seed repeats."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def data(self, most: int) -> bytes:
        # Short ones are as likely as long ones.
        count = self._random.randint(0, self._random.randint(0, most))
        return bytes(self._random.getrandbits(8) for _ in range(count))
