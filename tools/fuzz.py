#!/usr/bin/env python3
"""Whatever bytes come in whatever pieces over whatever connections, every connection gets at most
one well-formed answer that its request calls for and is closed, the store holds for each name
exactly what the last acknowledged BACKUP sent, and the server goes on.

    python3 tools/fuzz.py [--seconds N] [--seed N] [--rounds N] [--target NAME ...]

A campaign with hypothesis, which also makes what it finds as small as it can. What is drawn and
how it is checked is in ``tools/fuzzing``. It ends in one line of totals; a failure is shown with
how to repeat it, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.common import at_least_one
from tools.fuzzing import TARGETS, Choices, Tally, Target

_ROUND = 100  # examples of one target, before the next has its turn


class Failure(Exception):
    """An example that breaks the invariant."""

    def __init__(self, example: object, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.example = example
        self.cause = cause

    @property
    def place(self) -> str:
        """What tells it from another: the kind of error, and the line that raised it."""
        last = traceback.extract_tb(self.cause.__traceback__)[-1]
        return f"{type(self.cause).__name__} at {os.path.relpath(last.filename)}:{last.lineno}"


def play(target: Target, seed: int, tally: Tally) -> Optional[Failure]:
    """One round; the smallest failure it has found."""
    import hypothesis
    from hypothesis import strategies

    class Drawn(Choices):
        def __init__(self, draw: Any) -> None:
            self._draw = draw

        def integer(self, low: int, high: int) -> int:
            return int(self._draw(strategies.integers(low, high)))

        def data(self, most: int) -> bytes:
            return bytes(self._draw(strategies.binary(max_size=most)))

    def example(draw: Any) -> object:
        return target.example(Drawn(draw))

    def examine(value: object) -> None:
        tally.examples += 1
        try:
            target.check(value, tally)
        except Exception as error:
            found.append(Failure(value, error))
            raise

    found: List[Failure] = []
    run = hypothesis.given(strategies.composite(example)())(examine)
    run = hypothesis.settings(
        database=None,
        deadline=None,
        max_examples=_ROUND,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )(run)
    try:
        hypothesis.seed(seed)(run)()
    except Exception:
        if not found:
            raise  # of hypothesis itself
        return found[-1]  # the smallest is tried last
    return None


def show(name: str, seed: int, failure: Failure) -> None:
    """Prints a failure and how to have it again."""
    print(f"FAILED {name}: {failure.place}: {failure}")
    print("".join(traceback.format_exception(None, failure.cause, failure.cause.__traceback__)))
    print(f"the smallest example, for TARGETS[{name!r}].check:\n{failure.example!r}")
    print(f"again: make fuzz OPTIONS='--target {name} --seed {seed} --rounds 1'\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Looks for what breaks server or client.")
    parser.add_argument("--seconds", type=at_least_one, default=60, help="how long (default: 60)")
    parser.add_argument("--seed", type=int, help="of the first round (default: drawn)")
    parser.add_argument("--rounds", type=at_least_one, help="and at most so many of each target")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS], help="only it")
    options = parser.parse_args()
    first = options.seed
    if first is None:
        first = int.from_bytes(os.urandom(4), "little")
    tally = Tally()
    failures: Dict[str, Failure] = {}
    began = time.monotonic()
    seed = first
    while time.monotonic() - began < options.seconds:
        for name in options.target:
            failure = play(TARGETS[name], seed, tally)
            if failure is not None and failure.place not in failures:
                failures[failure.place] = failure
                show(name, seed, failure)
        seed += 1
        if options.rounds is not None and seed - first >= options.rounds:
            break
    answers = " ".join(f"{status}={count}" for status, count in sorted(tally.answers.items()))
    print(
        f"seconds={time.monotonic() - began:.0f} examples={tally.examples} "
        f"requests={tally.requests} {answers} failures={len(failures)} seed={first}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    # What hypothesis keeps for another time is not wanted here.
    with tempfile.TemporaryDirectory() as kept:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = kept
        code = main()
    sys.exit(code)
