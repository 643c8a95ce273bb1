"""What ``import backup`` brings, and that it does nothing else."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, List

import pytest

import backup
from backup import errors
from tests.helpers import ROOT, WAIT_SECONDS


def test_everything_promised_is_there() -> None:
    assert len(set(backup.__all__)) == len(backup.__all__)
    for name in backup.__all__:
        assert hasattr(backup, name), name


def test_everything_imported_is_promised() -> None:
    """Nothing comes in by accident."""
    tree = ast.parse((ROOT / "backup" / "__init__.py").read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert imported | {"__version__"} == set(backup.__all__)


def test_every_error_can_be_caught_by_its_name() -> None:
    kinds = [
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, errors.BackupError)
    ]
    assert set(kinds) <= set(backup.__all__)


def test_the_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", backup.__version__)


STATE = """
import json, logging, os, signal, sys, threading

def state():
    return {
        "signals": {
            number.name: str(signal.getsignal(number)) for number in signal.valid_signals()
            if isinstance(number, signal.Signals)
        },
        "wakeup": signal.set_wakeup_fd(-1),
        "threads": threading.active_count(),
        "descriptors": sorted(os.listdir("/proc/self/fd")),
        "root handlers": len(logging.getLogger().handlers),
        "handlers": len(logging.getLogger("backup").handlers),
        "level": logging.getLogger("backup").level,
        "propagate": logging.getLogger("backup").propagate,
        "excepthook": str(sys.excepthook),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "switch": sys.getswitchinterval(),
        "warnings": str(sys.warnoptions),
    }

sys.path.insert(0, sys.argv[1])
before = state()
import backup
json.dump([before, state()], sys.stdout)
"""


def run_bare(program: str) -> str:
    """Runs a program in a Python that finds the standard library and, if asked to, us."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", program, str(ROOT)],
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout


def test_importing_it_sets_nothing_up_and_needs_the_standard_library_alone() -> None:
    before, after = json.loads(run_bare(STATE))
    assert before == after


def paragraphs() -> List[str]:
    """The example in the package's docstring: imports, a server's lines, a client's lines."""
    assert backup.__doc__ is not None
    text = backup.__doc__.split("::\n\n")[1]
    lines = [line for line in text.splitlines() if line.startswith("    ") or not line]
    text = inspect.cleandoc("\n".join(lines)).strip()
    return re.sub(r"^(>>>|\.\.\.) ", "", text, flags=re.MULTILINE).split("\n\n")


def test_the_example_of_the_docstring_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's last line serves, so it is run beside the client's."""
    imports, server, client = paragraphs()
    making, serving = server.rsplit("\n", 1)
    assert serving.startswith("server.serve_forever()")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.pdf").write_bytes(b"a report")
    names: Dict[str, object] = {}
    exec(f"{imports}\n{making}", names)
    thread = threading.Thread(target=exec, args=(serving, names))
    thread.start()
    try:
        exec(client, names)
    finally:
        exec("server.stop()", names)
        thread.join(WAIT_SECONDS)
    assert (tmp_path / "backupsvr" / "7" / "report.pdf").read_bytes() == b"a report"
