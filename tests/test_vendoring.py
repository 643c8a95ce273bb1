"""The package works from wherever it was copied to: as vendor/backup and as one zipapp file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from tests.helpers import ROOT, WAIT_SECONDS

EXPECTED = """\
User ID: 2140383687
=== LIST (initial) ===
Files on server: []
=== BACKUP file 1 ===
Backup OK (one.txt)
=== BACKUP file 2 ===
Backup OK (two.txt)
=== LIST (after backups) ===
Files on server: ['one.txt', 'two.txt']
=== RETRIEVE file 1 ===
Retrieved: one.txt (3 bytes)
=== DELETE file 1 ===
Delete OK (one.txt)
=== RETRIEVE file 1 again ===
one.txt not found on server
"""


def bare_environment() -> Dict[str, str]:
    """This environment without anything that could lead back to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


@contextmanager
def serving(command: List[str], folder: Path) -> Iterator[str]:
    """A server as a child process, on a free port; its ``HOST:PORT``."""
    process = subprocess.Popen(
        [*command, "serve", "--listen", "127.0.0.1:0"],
        cwd=folder,
        env=bare_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        first = process.stderr.readline()
        assert first.startswith("[SERVER] Listening on 127.0.0.1:"), first
        yield first.split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0


def run_sequence(command: List[str], folder: Path) -> None:
    """Serve and client, both from ``folder``, as a user of a copy would."""
    (folder / "one.txt").write_text("one", encoding="ascii")
    (folder / "two.txt").write_text("two", encoding="ascii")
    (folder / "backup.info").write_text("one.txt\ntwo.txt\n", encoding="ascii")
    with serving(command, folder) as address:
        (folder / "server.info").write_text(f"{address}\n", encoding="ascii")
        done = subprocess.run(
            [*command, "client", "--user-id", "2140383687"],
            cwd=folder,
            env=bare_environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
            check=False,
        )
    assert (done.stdout, done.stderr, done.returncode) == (EXPECTED, "", 0)
    assert (folder / "retrieved_one.txt").read_text(encoding="ascii") == "one"
    assert (folder / "backupsvr" / "2140383687" / "two.txt").read_text(encoding="ascii") == "two"


@pytest.fixture
def vendored(tmp_path: Path) -> Path:
    """An empty folder but for ``vendor/backup``."""
    folder = tmp_path / "project"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "backup", folder / "vendor" / "backup", ignore=ignored)
    return folder


def test_a_copy_in_vendor_serves_and_asks(vendored: Path) -> None:
    run_sequence([sys.executable, "-m", "vendor.backup"], vendored)


def test_a_copy_in_vendor_never_reaches_the_checkout(vendored: Path) -> None:
    program = (
        "import sys, vendor.backup.cli, vendor.backup.__main__;"
        "print([name for name in sys.modules if name.partition('.')[0] == 'backup'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=vendored,
        env=bare_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_the_zipapp_serves_and_asks(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "backup", checkout / "backup", ignore=ignored)
    shutil.copy(ROOT / "Makefile", checkout)
    subprocess.run(
        ["make", "zipapp", f"PYTHON={sys.executable}"],
        cwd=checkout,
        env=bare_environment(),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(checkout / "dist" / "backup.pyz", folder)
    shutil.rmtree(checkout)
    run_sequence([sys.executable, "backup.pyz"], folder)
