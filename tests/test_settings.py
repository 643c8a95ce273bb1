"""Every tunable says what it is for, cannot be changed in place, and fits the others."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Dict

import pytest

from backup import settings
from backup.errors import ConfigError
from backup.settings import Settings

FIELDS = [field.name for field in dataclasses.fields(Settings)]


def explained() -> Dict[str, str]:
    """The text that stands below each field in the source."""
    (declared,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(declared, ast.ClassDef)
    found = {}
    for field, text in zip(declared.body, declared.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = str(ast.literal_eval(text.value))
    return found


def test_every_field_is_explained_in_a_sentence() -> None:
    assert list(explained()) == FIELDS
    assert all(text.endswith(".") for text in explained().values())


CAPS = [name for name in FIELDS if getattr(Settings(), name) is None]


def test_a_server_has_no_cap_that_nobody_asked_for() -> None:
    assert set(CAPS) == {
        "max_connections",
        "max_connections_per_address",
        "max_file_bytes",
        "user_bytes",
        "user_files",
        "total_bytes",
        "min_free_bytes",
    }
    assert Settings().append_only is False


@pytest.mark.parametrize("name", CAPS)
def test_a_cap_that_would_let_nothing_or_everything_pass_is_refused(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ConfigError, match=f"{name}={value} is no cap; take 1 or more, or None"):
            dataclasses.replace(Settings(), **{name: value})  # type: ignore[arg-type]
    assert getattr(dataclasses.replace(Settings(), **{name: 1}), name) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted({*FIELDS} - {*CAPS, "append_only"}))
def test_every_field_has_a_positive_value_that_nobody_changes_in_place(name: str) -> None:
    value = getattr(Settings(), name)
    assert value > 0
    assert isinstance(value, float) == name.endswith("_seconds")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Settings(), name, value)
    assert getattr(dataclasses.replace(Settings(), **{name: value * 2}), name) == value * 2


def test_the_values_fit_each_other() -> None:
    default = Settings()
    assert default.scratch_bytes <= default.turn_bytes < default.max_listing_bytes
    assert default.header_seconds <= default.idle_seconds
    assert default.write_back_bytes <= default.sync_bytes
    assert default.small_bytes <= default.turn_bytes
    # Two pieces of long uploads never come in one turn.
    assert default.turn_seconds <= default.sync_seconds < default.farewell_seconds
    # The client gives up before the server does, so that the server never waits for nobody.
    assert default.farewell_seconds < default.linger_seconds
    assert (settings.KIB, settings.MIB) == (1 << 10, 1 << 20)
