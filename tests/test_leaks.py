"""The check that runs after every test does fail the test that leaves something behind."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

LEAKS = {
    "descriptor": "os.dup(0)",
    "socket": "keep.append(socket.socket())",
    "thread": "threading.Thread(target=stop.wait, daemon=True).start()",
    "child": "os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, '-S', '-c', ''])",
    "store": "(tmp_path / '.tmp').mkdir(); (tmp_path / '.tmp/x').touch()",
    "client": "(tmp_path / '.backup-1.part').touch()",
    "tmpdir": "os.close(tempfile.mkstemp()[0])",
    "nothing": "pass",
}

# The fixture that is outermost takes away what the test has left once that has been noticed.
HEAD = """
import os, socket, sys, tempfile, threading
import pytest

keep, stop = [], threading.Event()

@pytest.fixture(autouse=True)
def nothing_kept():
    yield
    for sock in keep:
        sock.close()
    keep.clear()
    stop.set()
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join()
    stop.clear()
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        pass

@pytest.fixture(autouse=True)
def nothing_left(nothing_kept, nothing_left):
    yield
"""


def test_what_is_left_fails_the_test_and_nothing_else_does(tmp_path: Path) -> None:
    tests = [f"\ndef test_{name}(tmp_path):\n    {leak}\n" for name, leak in LEAKS.items()]
    file = tmp_path / "test_that_leaks.py"
    file.write_text(HEAD + "".join(tests), encoding="utf-8")
    plugins = ["-p", "no:cacheprovider", "-p", "tests.conftest"]
    command = [sys.executable, "-m", "pytest", "-rA", *plugins, str(file)]
    inner = tmp_path / "inner"
    done = subprocess.run(
        [*command, f"--rootdir={ROOT}", f"--basetemp={inner}", "-c", str(ROOT / "pyproject.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(inner)
    for name in LEAKS:
        assert re.search(f"^PASSED .*::test_{name}$", done.stdout, re.MULTILINE), done.stdout
        failed = bool(re.search(f"^ERROR .*::test_{name} ", done.stdout, re.MULTILINE))
        assert failed == (name != "nothing"), done.stdout
