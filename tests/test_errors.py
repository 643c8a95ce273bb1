"""The tree of errors is what its docstring draws, and each knows its status and exit code."""

from __future__ import annotations

import inspect
from typing import Dict, List, Type

import pytest

from backup import errors
from backup.errors import BackupError, QuotaExceeded


def drawn() -> Dict[str, str]:
    """Each class in the docstring's drawing with its parent's name."""
    parents: Dict[str, str] = {}
    path: List[str] = []
    assert errors.__doc__ is not None
    lines = errors.__doc__.split("::\n\n")[1].splitlines()
    for line in lines:
        name = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()[0]
        depth = (line.index(name) - 4) // 4
        path[depth:] = [name]
        if depth:
            parents[name] = path[depth - 1]
    return parents


def classes() -> List[Type[BackupError]]:
    found = inspect.getmembers(errors, inspect.isclass)
    return [kind for _, kind in found if issubclass(kind, BackupError)]


def test_the_tree_is_as_drawn() -> None:
    real = {
        kind.__name__: kind.__mro__[1].__name__ for kind in classes() if kind is not BackupError
    }
    assert drawn() == real


@pytest.mark.parametrize("kind", classes())
def test_each_says_its_status_reason_and_exit_code(kind: Type[BackupError]) -> None:
    assert kind.__doc__
    assert kind.status in (1001, 1002, 1003)
    assert kind.exit_code in (1, 2, 10)
    assert kind.reason == kind.reason.lower()
    assert " " not in kind.reason


def test_only_a_missing_or_impossible_name_is_not_found() -> None:
    names = {kind.__name__ for kind in classes() if kind.status == 1003}
    assert names == {"NotFound", "InvalidName"}


def test_the_text_stands_behind_the_subject() -> None:
    assert str(BackupError("it broke")) == "it broke"
    assert str(BackupError("it broke", "a.txt")) == "a.txt: it broke"


def test_reasons_tell_errors_apart() -> None:
    reasons = [kind.reason for kind in classes()]
    assert len(set(reasons)) == len(reasons)


def test_a_cap_that_refuses_has_a_name() -> None:
    refusal = QuotaExceeded("user 1 may hold 2 files", "user-files")
    assert (str(refusal), refusal.cap) == ("user 1 may hold 2 files", "user-files")
