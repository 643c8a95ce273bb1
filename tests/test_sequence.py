"""The seven steps print the transcript of docs/PROTOCOL.md to the letter, and go on when one fails.

They are run as a user runs them: by the command ``client``, with both info files.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import List, NamedTuple

import pytest

from backup.cli import main
from backup.client import Client
from backup.sequence import format_size, steps
from tests.helpers import ROOT, RunningServer, file_payload, response
from tests.test_client import Script, Scripted, answering, unused_address

USER = 2140383687
FIRST, SECOND = "mmn14.pdf", "terminator2.avi"
TITLES = [
    "LIST (initial)",
    "BACKUP file 1",
    "BACKUP file 2",
    "LIST (after backups)",
    "RETRIEVE file 1",
    "DELETE file 1",
    "RETRIEVE file 1 again",
]


def transcript() -> str:
    """What docs/PROTOCOL.md says that the client prints."""
    text = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
    return text.split("## The client's sequence")[1].split("```")[1].lstrip("\n")


class Said(NamedTuple):
    """What a run printed, and its exit code."""

    out: str
    err: str
    code: int

    def after(self, title: str) -> str:
        """The line under a step's title."""
        return self.out.split(f"=== {title} ===\n")[1].split("\n")[0]


class Work:
    """A folder with the two files and both info files, where the client is run."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        self.content = os.urandom(238_917)
        (folder / FIRST).write_bytes(self.content)
        (folder / SECOND).write_bytes(b"I'll be back.\r\n")
        self.names(FIRST, SECOND)

    def names(self, *paths: str) -> None:
        """What backup.info holds."""
        text = "".join(f"{path}\n" for path in paths)
        (self.folder / "backup.info").write_text(text, encoding="utf-8")

    def run(self, host: str, port: int, *options: str) -> Said:
        (self.folder / "server.info").write_text(f"{host}:{port}\n", encoding="ascii")
        code = main(["client", *options])
        return Said(*self._capsys.readouterr(), code)


@pytest.fixture
def work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Work:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Work(folder, capsys)


def test_the_output_is_the_documented_one_to_the_letter(server: RunningServer, work: Work) -> None:
    assert work.run(*server.address, "--user-id", str(USER)) == (transcript(), "", 0)
    assert (work.folder / f"retrieved_{FIRST}").read_bytes() == work.content
    assert server.stored(USER) == [SECOND]


def test_without_a_user_id_only_the_user_id_differs(server: RunningServer, work: Work) -> None:
    said = [work.run(*server.address) for _ in range(2)]
    drawn = {int(re.findall(r"\AUser ID: (\d+)\n", out)[0]) for out, _, _ in said}
    assert len(drawn) == 2
    assert all(0 < user_id < 2**32 for user_id in drawn)
    for out, err, code in said:
        same = re.sub(r"\AUser ID: \d+", f"User ID: {USER}", out)
        assert (same, err, code) == (transcript(), "", 0)


def test_the_server_logs_each_step_as_documented(server: RunningServer, work: Work) -> None:
    work.run(*server.address, "--user-id", str(USER))
    server.stop()
    ops = [202, 100, 100, 202, 200, 201, 200]
    files = ["", FIRST, SECOND, "", FIRST, FIRST, FIRST]
    lines = [line for line in server.lines if line.startswith("user=")]
    for line, op, name in zip(lines, ops, files):
        assert line.startswith(f"user={USER} op={op} file={name} ")
    assert len(lines) == 7


def test_the_titles_are_the_seven_steps(work: Work) -> None:
    with Client(("127.0.0.1", 1), USER) as client:
        assert [step.title for step in steps(client, [FIRST, SECOND], "")] == TITLES
    assert re.findall("=== (.*) ===", transcript()) == TITLES


def test_what_is_retrieved_goes_where_it_shall(server: RunningServer, work: Work) -> None:
    (work.folder / "out").mkdir()
    assert work.run(*server.address, "--output-dir", "out").code == 0
    assert (work.folder / "out" / f"retrieved_{FIRST}").read_bytes() == work.content
    assert not (work.folder / f"retrieved_{FIRST}").exists()


def test_what_an_earlier_run_retrieved_is_replaced(server: RunningServer, work: Work) -> None:
    (work.folder / f"retrieved_{FIRST}").write_bytes(b"of the last run")
    assert work.run(*server.address).code == 0
    assert (work.folder / f"retrieved_{FIRST}").read_bytes() == work.content


def test_files_past_the_second_are_left_alone(server: RunningServer, work: Work) -> None:
    work.names(FIRST, SECOND, "none.txt")
    out, _, code = work.run(*server.address, "--user-id", str(USER))
    assert (out, code) == (transcript(), 0)


# -- when a step fails --------------------------------------------------------


def test_an_empty_file_fails_with_the_documented_line(server: RunningServer, work: Work) -> None:
    (work.folder / "empty.txt").touch()
    work.names(FIRST, "empty.txt")
    said = work.run(*server.address)
    assert said.after("BACKUP file 2") == (
        "Backup failed (empty.txt): the server refuses an empty file"
    )
    assert said.after("LIST (after backups)") == f"Files on server: ['{FIRST}']"
    assert said.after("DELETE file 1") == f"Delete OK ({FIRST})"
    assert (said.err, said.code) == ("", 1)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("none.txt", "(none.txt): cannot read none.txt: no such file or directory; check the path"),
        ("folder", "(folder): cannot read folder: it is a folder; name a file"),
        ("b\\a", "(b\\\\a): not a name for a file: \\\\ is not allowed in it; use another"),
    ],
)
def test_a_file_that_cannot_be_sent_does_not_end_the_sequence(
    server: RunningServer, work: Work, path: str, line: str
) -> None:
    (work.folder / "folder").mkdir()
    work.names(path, SECOND)
    said = work.run(*server.address)
    name = line[1:].partition(")")[0]
    assert said.after("BACKUP file 1") == f"Backup failed {line}"
    assert said.after("BACKUP file 2") == f"Backup OK ({SECOND})"
    assert said.after("LIST (after backups)") == f"Files on server: ['{SECOND}']"
    assert said.after("DELETE file 1").startswith(f"Delete failed ({name}): not ")
    assert re.findall("=== (.*) ===", said.out) == TITLES
    assert (said.err, said.code) == ("", 1)


@pytest.mark.parametrize("folder", ["none", FIRST])
def test_without_a_place_for_what_is_retrieved_nothing_is_begun(
    server: RunningServer, work: Work, folder: str
) -> None:
    said = work.run(*server.address, "--output-dir", folder)
    assert said.err == f"backup: --output-dir: {folder} is not a folder; make it first\n"
    assert (said.out, said.code) == ("", 2)
    assert server.lines[1:] == []


def test_a_place_that_cannot_be_written_does_not_end_the_sequence(
    server: RunningServer, work: Work
) -> None:
    (work.folder / f"retrieved_{FIRST}").mkdir()
    said = work.run(*server.address)
    assert said.after("RETRIEVE file 1") == (
        f"Retrieve failed ({FIRST}): retrieved_{FIRST} is a folder; name a file in it"
    )
    assert said.after("DELETE file 1") == f"Delete OK ({FIRST})"
    assert (said.err, said.code) == ("", 1)


LISTED = b"\x02\0\0\0" + b"".join(
    struct.pack("<H", len(name)) + name.encode() for name in (FIRST, SECOND)
)
EMPTY = response(212, b"", b"\0\0\0\0")
GOOD = [
    EMPTY,
    response(210, FIRST.encode()),
    response(210, SECOND.encode()),
    response(212, b"", LISTED),
    response(212, FIRST.encode(), file_payload(bytes(238_917))),
    response(211, FIRST.encode()),
    response(1003, FIRST.encode()),
]


@pytest.mark.parametrize(
    ("step", "answer", "line"),
    [
        (0, response(1001), "List failed: the server could not do it; its log says why"),
        (
            1,
            response(1001, FIRST.encode()),
            f"Backup failed ({FIRST}): "
            "the server did not store it (a cap, append-only, or its disk); its log says why",
        ),
        (3, EMPTY, "Files on server: []"),
        (
            4,
            response(1001, FIRST.encode()),
            f"Retrieve failed ({FIRST}): the server could not do it; its log says why",
        ),
        (4, response(1003, FIRST.encode()), f"{FIRST} not found on server"),
        (4, response(212, FIRST.encode(), file_payload(b"other")), f"Retrieved: {FIRST} (5 bytes)"),
        (
            5,
            response(1002, FIRST.encode()),
            f"Delete failed ({FIRST}): not on the server, or it could not be removed there",
        ),
        (6, GOOD[4], f"Retrieved: {FIRST} (238 KB)"),
        (6, b"", f"Retrieve failed ({FIRST}): it closed without a whole answer;"),
    ],
)
def test_one_step_that_ends_otherwise_makes_the_whole_fail(
    work: Work, step: int, answer: bytes, line: str
) -> None:
    answers = [*GOOD[:step], answer, *GOOD[step + 1 :]]
    scripts: List[Script] = [answering(data) for data in answers]
    with Scripted(*scripts) as server:
        said = work.run(*server.address)
    assert said.after(TITLES[step]).startswith(line)
    assert re.findall("=== (.*) ===", said.out) == TITLES
    assert (said.err, said.code) == ("", 1)


def test_the_same_scripts_without_a_failure_succeed(work: Work) -> None:
    with Scripted(*[answering(data) for data in GOOD]) as server:
        assert work.run(*server.address).code == 0


def test_a_server_that_is_not_there_ends_the_sequence_at_once(work: Work) -> None:
    sock, (host, port) = unused_address()
    with sock:
        said = work.run(host, port, "--user-id", "7")
    assert said.out == "User ID: 7\n=== LIST (initial) ===\n"
    assert said.err == (
        f"backup: cannot connect to {host}:{port}: connection refused; "
        "is it running? start it with: serve\n"
    )
    assert said.code == 1


def test_a_server_that_goes_meanwhile_fails_every_further_step(work: Work) -> None:
    with Scripted(*[answering(data) for data in GOOD[:4]]) as server:
        said = work.run(*server.address)
    gone = f"cannot connect to {server.address[0]}:{server.address[1]}: connection refused"
    assert said.after("LIST (after backups)") == f"Files on server: ['{FIRST}', '{SECOND}']"
    assert said.after("RETRIEVE file 1").startswith(f"Retrieve failed ({FIRST}): {gone}")
    assert said.after("DELETE file 1").startswith(f"Delete failed ({FIRST}): {gone}")
    assert said.after("RETRIEVE file 1 again").startswith(f"Retrieve failed ({FIRST}): {gone}")
    assert (said.err, said.code) == ("", 1)


# -- sizes --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 bytes"),
        (15, "15 bytes"),
        (999, "999 bytes"),
        (1000, "1 KB"),
        (1024, "1 KB"),
        (1999, "1 KB"),
        (238_917, "238 KB"),
        (999_999, "999 KB"),
        (1_000_000, "1 MB"),
        (12_999_999, "12 MB"),
        (999_999_999, "999 MB"),
        (1_000_000_000, "1 GB"),
        (3_999_999_999, "3 GB"),
        (2**32, "4 GB"),
        (10**13, "10000 GB"),
    ],
)
def test_sizes_are_decimal_and_rounded_down(size: int, text: str) -> None:
    assert format_size(size) == text


def test_the_documented_sizes_are_written_so() -> None:
    text = (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8")
    documented = re.search(r"rounded down: (.*)\.", text)
    assert documented
    sizes = [15, 238_917, 12_500_000, 3_000_000_001]
    assert re.findall("`(.*?)`", documented.group(1)) == [format_size(size) for size in sizes]
