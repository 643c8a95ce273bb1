"""What the documents say is so: every command of the README runs, the drawings are current."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from backup import cli
from backup.settings import KIB, MIB, Settings
from tests.helpers import ROOT, WAIT_SECONDS
from tools import diagram

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
SERVER = "make serve"


def blocks(language: str) -> List[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run(command: str, folder: Path) -> str:
    """Runs one line as a user's shell would; its stdout."""
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=2 * WAIT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is tracked, with a port of its own."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "README.md", "backup.info", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    for name in ("backup", "docs", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "server.info").write_text(f"127.0.0.1:{free_port()}\n", encoding="ascii")
    # `make test` must not run this test again, nor fetch anything: one test, and this Python.
    (folder / "tests").mkdir()
    (folder / "tests" / "test_one.py").write_text("def test_one(): pass\n", encoding="ascii")
    (folder / ".venv" / "bin").mkdir(parents=True)
    python = folder / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    (folder / ".venv" / "ready").touch()
    return folder


@pytest.fixture
def serving(checkout: Path) -> Iterator[None]:
    """The README's server, as it says to start it."""
    make = SERVER.split()
    process = subprocess.Popen(make, cwd=checkout, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "Listening on" in process.stderr.readline()
    reader = threading.Thread(target=process.stderr.read)  # so that the log never has to wait
    reader.start()
    yield
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    for child in children.split():
        os.kill(int(child), signal.SIGTERM)
    reader.join(WAIT_SECONDS)
    process.stderr.close()
    assert process.wait(WAIT_SECONDS) == 0


@pytest.mark.usefixtures("serving")
def test_every_command_of_the_readme_runs(checkout: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert SERVER in commands
    said = {command: run(command, checkout) for command in commands if command != SERVER}
    shown = "\n".join(blocks("text"))
    for command in ("put report.pdf", "list", "get report.pdf", "delete report.pdf"):
        output = next(text for line, text in said.items() if f"-m backup {command}" in line)
        for line in output.splitlines():
            assert line in shown, f"the README does not show what {command!r} prints: {line}"


def test_the_library_example_of_the_readme_runs(checkout: Path) -> None:
    (checkout / "report.pdf").write_bytes(os.urandom(100))
    (example,) = blocks("python")
    output = run(f"{sys.executable} -c '{example}'", checkout)
    assert output == "['report.pdf']\nreport.pdf: not on the server\n"
    assert (checkout / "retrieved.pdf").read_bytes() == (checkout / "report.pdf").read_bytes()


def test_the_readme_has_every_option_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "client", "put", "get", "list", "delete"):
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        for option in re.findall(r"^  (-[-\w]+(?:, --[-\w]+)?)", text, re.MULTILINE):
            if option == "-h, --help":
                continue
            flags = [flag.strip() for flag in option.split(",")]
            assert any(f"`{flag}" in README for flag in flags), f"{command} {option}"
    for code, meaning in re.findall(r"^  (\d+) +(.*)$", cli.EXIT_CODES, re.MULTILINE):
        assert f"| {code} | {meaning} |" in README


def test_the_drawings_in_the_design_are_current() -> None:
    text = diagram.DESIGN.read_text(encoding="utf-8")
    assert diagram.redrawn(text) == text
    assert diagram.redrawn(text.replace("HEADER --> FILENAME", "HEADER --> LOST")) == text


def test_every_test_that_the_security_document_names_exists() -> None:
    """And each promise of it has one."""
    promises = re.split(
        r"^### (\d+)\. .*$", SECURITY.split("\n## What is not")[0], flags=re.MULTILINE
    )
    assert promises[1::2] == [str(number) for number in range(1, 14)]
    for number, promise in zip(promises[1::2], promises[2::2]):
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", promise)
        assert named, f"no test shows promise {number}"
        assert promise.count("tests/test_") == len(named)
        for path, name in named:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"


def test_the_limits_in_the_security_document_are_those_of_the_settings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    units = {"s": 1.0, "KiB": KIB, "MiB": MIB, "names": 1}
    said: Dict[str, object] = {"no limit": None, "what descriptors allow": None, "off": False}
    default = Settings()
    rows = re.findall(r"^\|.*\| (.*) \| `([a-z_]+)` \| (.*) \|$", SECURITY, re.MULTILINE)
    for _, field, text in rows:
        number, _, unit = text.partition(" ")
        value = said[text] if text in said else float(number) * units[unit]
        assert getattr(default, field) == value, field
    listed = {field: option for option, field, _ in rows}
    caps = {field.name for field in fields(default) if field.default in (None, False)}
    assert {field for field, option in listed.items() if option.startswith("`--")} == caps
    deadlines = {"header", "idle", "rate", "linger", "drain", "connect", "farewell", "accept_pause"}
    assert listed.keys() - caps == {
        "min_rate_bytes",
        "max_listing_bytes",
        "max_listing_names",
        *(f"{deadline}_seconds" for deadline in deadlines),
    }
    assert cli.main(["serve", "--help"]) == 0
    text = capsys.readouterr().out
    for field in caps:
        assert f"  {listed[field].strip('`')} " in text.replace("\n", " ")


def test_backup_info_names_two_files_of_this_repository() -> None:
    names = (ROOT / "backup.info").read_text(encoding="ascii").split()
    assert len(names) == 2
    assert all((ROOT / name).is_file() for name in names)
    assert (ROOT / "server.info").read_text(encoding="ascii") == "127.0.0.1:1234\n"


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    listed = re.findall(r"^make ([a-z-]+)", run("make", ROOT), re.MULTILINE)
    assert sorted(listed) == sorted(phony.split())
