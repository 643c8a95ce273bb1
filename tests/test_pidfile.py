"""A pid file is there as a whole while it is used, and nobody else's is ever removed."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from backup.errors import SetupFailed
from backup.pidfile import PidFile
from tests.helpers import ROOT


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_it_says_which_process_this_is_and_goes(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "pid"
    before = os.umask(umask)
    try:
        with PidFile(str(path)):
            assert path.read_text(encoding="ascii") == f"{os.getpid()}\n"
            assert stat.S_IMODE(path.stat().st_mode) == 0o644
            assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["pid"]
    finally:
        os.umask(before)
    assert not path.exists()


def test_it_is_never_seen_in_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pid"
    path.write_text("1\n", encoding="ascii")
    replace = os.replace
    seen = []

    def replacing(part: str, whole: str) -> None:
        seen.append((path.read_text(encoding="ascii"), Path(part).read_text(encoding="ascii")))
        replace(part, whole)

    monkeypatch.setattr(os, "replace", replacing)
    with PidFile(str(path)):
        assert seen == [("1\n", f"{os.getpid()}\n")]


def test_another_processs_stays(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with PidFile(str(path)):
        path.unlink()
        path.write_text("1\n", encoding="ascii")
    assert path.read_text(encoding="ascii") == "1\n"


def test_one_that_is_gone_already_is_not_missed(tmp_path: Path) -> None:
    with PidFile(str(tmp_path / "pid")):
        (tmp_path / "pid").unlink()


def test_it_is_found_again_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with PidFile("pid"):
        monkeypatch.chdir("/")
    assert not (tmp_path / "pid").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none/pid", "no such file or directory"),
        ("folder", "is a directory"),
        ("a\0b", "(open: )?embedded null (byte|character in path)"),
    ],
)
def test_one_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SetupFailed) as caught, PidFile(str(tmp_path / name)):
        pytest.fail("it went on")
    shown = name.replace("\0", "\\x00")
    file = re.escape(f"{tmp_path}/{shown}")
    expected = f"cannot write the pid file {file}: {reason}; take another: --pid-file FILE"
    assert re.fullmatch(expected, str(caught.value))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("content", [b"# a README\n", b"12 34\n", b"1" * 40, b"1\0", b"\xff"])
def test_a_file_that_is_none_is_not_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    expected = f"{path} is no pid file: what is in it is not a process id; take another: "
    with pytest.raises(SetupFailed, match=re.escape(expected)), PidFile(str(path)):
        pytest.fail("it went on")
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"4711", b" 4711\n"])
def test_what_another_program_has_left_is_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pid"
    path.write_bytes(content)
    with PidFile(str(path)):
        assert path.read_text(encoding="ascii") == f"{os.getpid()}\n"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_ = os.open

    def opening(path: str, flags: int, mode: int = 0o777) -> int:
        os.close(open_(path, flags, mode))
        return open_("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", opening)
    with pytest.raises(SetupFailed, match="no space left on device"), PidFile(f"{tmp_path}/pid"):
        pytest.fail("it went on")
    assert [each for each in tmp_path.iterdir() if each.is_file()] == []


def test_a_second_process_does_not_take_over_what_one_that_runs_holds(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    program = (
        "import sys; from backup.pidfile import PidFile\n"
        f"with PidFile({str(path)!r}): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(SetupFailed, match=f"is held by process {first.pid}, which runs"):
            PidFile(str(path)).__enter__()
        assert path.read_text(encoding="ascii") == f"{first.pid}\n"
        first.kill()
        first.communicate()
    with PidFile(str(path)):  # what a killed process has left is nobody's
        assert path.read_text(encoding="ascii") == f"{os.getpid()}\n"
    assert [*tmp_path.iterdir()] == [tmp_path / "TMPDIR"]
