"""``python -m backup`` is the command line."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from typing import List

import pytest

from backup import __version__
from tests.helpers import ROOT, WAIT_SECONDS, signals_put_back


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is not loaded yet, as at the start of a process."""
    monkeypatch.delitem(sys.modules, "backup.__main__", raising=False)


@pytest.mark.parametrize(
    ("arguments", "code", "start"), [(["--version"], 0, "backup "), (["upload"], 2, "")]
)
def test_running_the_package_runs_a_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: List[str],
    code: int,
    start: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["backup", *arguments])
    with signals_put_back(), pytest.raises(SystemExit) as caught:
        runpy.run_module("backup", run_name="__main__")
    assert caught.value.code == code
    assert capsys.readouterr().out.startswith(start)


def test_importing_it_does_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["backup", "upload"])
    importlib.import_module("backup.__main__")
    assert capsys.readouterr() == ("", "")


def test_the_interpreter_runs_it_by_its_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "backup", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == (f"backup {__version__}\n", "", 0)
