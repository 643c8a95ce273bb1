"""The tools, as their user runs them: scripts beside a server in a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import List

import pytest

from tests.conftest import ServerFactory
from tests.helpers import ROOT, WAIT_SECONDS, RunningServer, signals_put_back
from tools import demo


def tool(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs ``tools/<name>.py`` from ``folder``."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path, server: RunningServer) -> Path:
    """A folder with a ``server.info`` for the running server."""
    host, port = server.address
    (tmp_path / "server.info").write_text(f"{host}:{port}\n", encoding="ascii")
    return tmp_path


def test_full_test_checks_everything_and_cleans_up(folder: Path, server: RunningServer) -> None:
    done = tool(folder, "full_test", "--root", str(server.root))
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines[-1]) == (0, "", "all good")
    assert all(line.startswith("ok ") for line in lines[1:-1])
    assert any("on disk" in line for line in lines)
    assert server.stored(int(lines[0].split()[-1])) == []


def test_full_test_finds_a_store_that_is_another(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    done = tool(folder, "full_test", "--root", str(tmp_path / "other"))
    assert done.returncode == 1
    assert "FAIL  'one.bin': on disk as sent" in done.stdout


def test_full_test_says_that_the_store_is_not_there(folder: Path) -> None:
    done = tool(folder, "full_test", "--root", "nosuch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--root: nosuch is not a folder; name the server's store\n"


def test_backup_only_and_list_only(folder: Path, server: RunningServer) -> None:
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text(name, encoding="ascii")
    (folder / "backup.info").write_text("b.txt\na.txt\n", encoding="ascii")
    done = tool(folder, "backup_only", "--user-id", "7")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [
        "Backup OK (a.txt)",
        "Backup OK (b.txt)",
        "User ID: 7",
    ]
    assert server.stored(7) == ["a.txt", "b.txt"]
    listed = tool(folder, "list_only", "--user-id", "7")
    assert (listed.stdout, listed.returncode) == ("Files on server: ['a.txt', 'b.txt']\n", 0)


def test_backup_only_says_what_it_could_not_back_up(folder: Path) -> None:
    (folder / "a.txt").write_text("a", encoding="ascii")
    (folder / "backup.info").write_text("missing.txt\na.txt\n", encoding="ascii")
    done = tool(folder, "backup_only")
    assert done.returncode == 1
    assert "Backup OK (a.txt)" in done.stdout
    assert "Backup failed (missing.txt): cannot read missing.txt: no such file" in done.stdout


def test_load_test_ends_in_a_table(folder: Path, server: RunningServer) -> None:
    done = tool(folder, "load_test", "--clients", "40", "--files", "2", "--size", "3000")
    assert (done.returncode, done.stderr) == (0, "")
    rows: List[List[str]] = [line.split() for line in done.stdout.splitlines()]
    columns = ["requests", "errors", "bytes", "req/s", "rate", "p50", "p90", "p99", "max"]
    assert columns in rows
    counts = {row[0]: (row[1], row[2]) for row in rows if row[0] in ("Backup", "Delete", "all")}
    assert counts == {"Backup": ("80", "0"), "Delete": ("80", "0"), "all": ("280", "0")}
    logged = [line for line in server.lines if " op=100 " in line]
    assert len(logged) == 80


@pytest.mark.parametrize("name", ["full_test", "backup_only", "list_only", "load_test"])
def test_without_a_server_each_says_so_in_one_line(
    name: str, tmp_path: Path, serve: ServerFactory
) -> None:
    server = serve()
    host, port = server.address
    server.stop()  # now nothing listens there
    (tmp_path / "server.info").write_text(f"{host}:{port}\n", encoding="ascii")
    for file in ("a", "b"):
        (tmp_path / file).write_text(file, encoding="ascii")
    (tmp_path / "backup.info").write_text("a\nb\n", encoding="ascii")
    more = {"list_only": ["--user-id", "1"], "load_test": ["--clients", "3"]}.get(name, [])
    done = tool(tmp_path, name, *more)
    assert done.returncode == 1
    assert "is it running? start it with: serve" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["full_test", "backup_only", "list_only", "load_test"])
def test_without_server_info_each_says_what_is_missing(name: str, tmp_path: Path) -> None:
    more = ["--user-id", "1"] if name == "list_only" else []
    done = tool(tmp_path, name, *more)
    assert done.returncode == 2
    assert done.stderr.startswith("cannot read server.info: no such file")
    assert done.stderr.count("\n") == 1


def test_the_demo_shows_both_sides_and_leaves_nothing(tmp_path: Path) -> None:
    done = tool(tmp_path, "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^\[SERVER\] Listening on 127\.0\.0\.1:\d+$", done.stdout, re.MULTILINE)
    assert "README.md not found on server\n" in done.stdout
    assert len(re.findall(r"^\[SERVER\] user=\d+ op=", done.stdout, re.MULTILINE)) == 7


def test_a_demo_that_is_interrupted_before_the_server_listens_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupting = "import os, signal; os.kill(os.getppid(), signal.SIGINT); signal.pause()"
    monkeypatch.setattr(demo, "BACKUP", [sys.executable, "-c", interrupting])
    with signals_put_back():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert demo.main() == 130
    assert capsys.readouterr() == ("", "interrupted\n")
