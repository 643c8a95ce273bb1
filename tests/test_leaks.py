"""The check that runs after every test does fail the test that leaves something behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

LEAKS = {
    "descriptor": "os.dup(0)",
    "socket": "keep.append(socket.socket())",
    "thread": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "child": "os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, '-c', ''])",
    "temporary file of a store": "(tmp_path / '.tmp').mkdir(); (tmp_path / '.tmp/x').touch()",
    "temporary file of a client": "(tmp_path / '.backup-1.part').touch()",
    "file in TMPDIR": "os.close(tempfile.mkstemp()[0])",
}

TEST = """
import os, socket, sys, tempfile, threading
from tests.conftest import *

keep = []

def test_that_leaks(tmp_path):
    {leak}
"""


@pytest.mark.parametrize("leak", [*LEAKS.values(), "pass"], ids=[*LEAKS, "nothing"])
def test_what_is_left_fails_the_test(leak: str, tmp_path: Path) -> None:
    file = tmp_path / "test_that_leaks.py"
    file.write_text(TEST.format(leak=leak), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    inner = tmp_path / "inner"
    done = subprocess.run(
        [*command, f"--rootdir={ROOT}", f"--basetemp={inner}", "-c", str(ROOT / "pyproject.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(inner)
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert ("1 error" in done.stdout) == (leak != "pass"), done.stdout
