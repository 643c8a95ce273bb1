"""``make soak``: ledger, bad clients, faults, a short run, and a loss that it must see."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional

import pytest

from backup import Backup, Client, Delete, Job, Refused, Retrieve
from tests.helpers import ROOT, WAIT_SECONDS, RunningServer
from tools import lives as lives_module
from tools import mischief, soak
from tools.ledger import Content, Fate, Kind, Ledger, State
from tools.lives import Died, Lives

KEY = (7, "name")
A, B, C = Content(1, 100), Content(2, 100), Content(3, 50)


# The ledger.


def changed(ledger: Ledger, new: State, fate: Fate) -> None:
    ledger.end(ledger.begin(KEY, new), fate)


def look(ledger: Ledger, found: State) -> List[Kind]:
    """Looks at the name, finds that, and tells what is wrong with it."""
    before = len(ledger.findings)
    reading = ledger.read([KEY])
    ledger.saw(reading, KEY, None if found is None else found.data(), "a test")
    ledger.end_reading(reading)
    return [finding.kind for finding in ledger.findings[before:]]


@pytest.fixture
def ledger() -> Ledger:
    """One in which A is acknowledged."""
    made = Ledger()
    changed(made, A, Fate.ACKNOWLEDGED)
    return made


def test_contents_are_long_as_they_should_be_and_differ() -> None:
    sizes = [0, 1, 7, 8, 9, 1_000_003, 1_000_011, 1_000_012, 6 << 20]
    assert [len(Content(5, size).data()) for size in sizes] == sizes
    one, other = Content(1, 2_500_000).data(), Content(2, 2_500_000).data()
    assert one == Content(1, 2_500_000).data()
    for place in range(8, len(one) - 64, 99_991):  # so a mixture of two is neither
        assert one[place : place + 64] != other[place : place + 64]


@pytest.mark.parametrize(
    ("fate", "possible"),
    [
        (Fate.ACKNOWLEDGED, {B}),
        (Fate.NOT_DONE, {A}),
        (Fate.UNANSWERED, {A, B}),
        (Fate.REFUSED_IN_TROUBLE, {A, B}),
    ],
)
def test_what_is_possible_after_a_change(ledger: Ledger, fate: Fate, possible: object) -> None:
    change = ledger.begin(KEY, B)
    assert ledger.possible(KEY) == {A, B}
    ledger.end(change, fate)
    assert ledger.possible(KEY) == possible


def test_unanswered_changes_add_up_and_an_answer_settles_them(ledger: Ledger) -> None:
    changed(ledger, B, Fate.UNANSWERED)
    changed(ledger, None, Fate.UNANSWERED)
    assert ledger.possible(KEY) == {A, B, None}
    changed(ledger, C, Fate.NOT_DONE)
    assert ledger.possible(KEY) == {A, B, None}
    changed(ledger, C, Fate.ACKNOWLEDGED)
    assert ledger.possible(KEY) == {C}


def test_a_name_that_nobody_asked_for_is_not_there() -> None:
    assert Ledger().possible(KEY) == {None}
    assert look(Ledger(), None) == []
    assert look(Ledger(), A) == [Kind.UNDEAD]


@pytest.mark.parametrize(
    ("there", "found", "wrong"),
    [
        (A, A, []),
        (A, B, [Kind.CHANGED]),
        (A, None, [Kind.LOST]),
        (None, None, []),
        (None, A, [Kind.UNDEAD]),
    ],
)
def test_what_is_found(there: State, found: State, wrong: List[Kind]) -> None:
    ledger = Ledger()
    changed(ledger, there, Fate.ACKNOWLEDGED)
    assert look(ledger, found) == wrong
    assert look(ledger, found) == []  # once


def test_every_byte_counts(ledger: Ledger) -> None:
    for place in (0, 50, 99):
        ledger = Ledger()
        changed(ledger, A, Fate.ACKNOWLEDGED)
        data = bytearray(A.data())
        data[place] ^= 1
        ledger.saw(ledger.read([KEY]), KEY, bytes(data), "a test")
        assert [finding.kind for finding in ledger.findings] == [Kind.CHANGED]
    assert str(ledger.findings[0]) == "user 7, 'name': a file is not what was acknowledged (a test)"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (B.data(), f"seen: {B}; may be {A}"),
        (A.data()[:40], f"seen: {A._replace(size=40)}; may be {A}"),
        (A.data()[:40] + bytes(60), f"begin like {A}, like {A} up to byte 40; may be {A}"),
    ],
)
def test_a_finding_tells_what_was_seen_and_what_had_happened(found: bytes, told: str) -> None:
    clock = iter(range(100))
    ledger = Ledger(lambda: next(clock))
    changed(ledger, A, Fate.ACKNOWLEDGED)
    ledger.happened("kill 1")
    ledger.saw(ledger.read([KEY]), KEY, found, "a test")
    (finding,) = ledger.findings
    assert [when for when, _ in finding.history] == sorted(when for when, _ in finding.history)
    asked, done, kill, began, seen = [text for _, text in finding.history]
    assert asked == f"asked to be {A}"
    assert done == f"the server said that it is done; may be {A}"
    assert (kill, began) == ("kill 1", f"the look began; may be, until its end, {A}")
    assert told in seen


def test_a_name_counts_again_after_the_next_acknowledged_change(ledger: Ledger) -> None:
    assert look(ledger, None) == [Kind.LOST]
    changed(ledger, B, Fate.ACKNOWLEDGED)
    assert look(ledger, B) == []
    assert look(ledger, None) == [Kind.LOST]


def test_a_removal_that_finds_nothing_may_do_so_only_where_nothing_may_be(ledger: Ledger) -> None:
    changed(ledger, None, Fate.UNANSWERED)
    changed(ledger, None, Fate.NOTHING_THERE)  # the first was carried out
    assert ledger.findings == []
    assert ledger.possible(KEY) == {None}
    changed(ledger, B, Fate.ACKNOWLEDGED)
    changed(ledger, None, Fate.NOTHING_THERE)
    assert [finding.kind for finding in ledger.findings] == [Kind.LOST]


def test_a_reading_takes_every_state_that_was_possible_meanwhile(ledger: Ledger) -> None:
    readings = [ledger.read([KEY]) for _ in range(4)]
    changed(ledger, B, Fate.ACKNOWLEDGED)
    changed(ledger, C, Fate.ACKNOWLEDGED)
    for reading, found in zip(readings, (A, B, C)):
        ledger.saw(reading, KEY, found.data(), "a test")
        ledger.end_reading(reading)
    assert ledger.findings == []
    assert ledger.possible(KEY) == {C}  # and what an older look has seen changes nothing
    ledger.saw(readings[3], KEY, None, "a test")
    assert [finding.kind for finding in ledger.findings] == [Kind.LOST]


def test_what_was_seen_after_the_servers_death_is_so_from_then_on(ledger: Ledger) -> None:
    changed(ledger, B, Fate.UNANSWERED)
    early = ledger.read([KEY])  # answered by the server that may still do it
    assert look(ledger, A) == []
    assert ledger.possible(KEY) == {A, B}
    ledger.server_died()
    ledger.saw(early, KEY, A.data(), "a test")
    assert ledger.possible(KEY) == {A, B}
    assert look(ledger, B) == []
    assert ledger.possible(KEY) == {B}
    assert look(ledger, A) == [Kind.CHANGED]


def test_two_looks_at_one_time_see_one_state(ledger: Ledger) -> None:
    changed(ledger, None, Fate.UNANSWERED)
    ledger.server_died()
    one, other = ledger.read([KEY]), ledger.read([KEY])
    ledger.saw(one, KEY, A.data(), "a test")
    ledger.saw(other, KEY, None, "a test")
    assert [finding.kind for finding in ledger.findings] == [Kind.LOST]


def test_names_in_a_listing(ledger: Ledger) -> None:
    reading = ledger.read([KEY])
    ledger.saw_name(reading, KEY, True, "a test")
    assert ledger.findings == []
    ledger.saw_name(reading, KEY, False, "a test")
    changed(ledger, None, Fate.ACKNOWLEDGED)
    ledger.saw_name(ledger.read([KEY]), KEY, True, "a test")
    ledger.saw_stray((7, "other"), "a test")
    kinds = [finding.kind for finding in ledger.findings]
    assert kinds == [Kind.LOST, Kind.UNDEAD, Kind.STRAY]


def test_one_change_a_name_at_a_time(ledger: Ledger) -> None:
    ledger.begin(KEY, B)
    with pytest.raises(AssertionError, match="a second change"):
        ledger.begin(KEY, C)


class LyingServer:
    """A store in memory that acknowledges everything and, from some time on, forgets a change."""

    def __init__(self, honest: int) -> None:
        self._files: Dict[str, bytes] = {}
        self._honest = honest

    def change(self, name: str, data: Optional[bytes]) -> None:
        self._honest -= 1
        if self._honest == -1:
            return
        if data is None:
            self._files.pop(name, None)
        else:
            self._files[name] = data

    def read(self, name: str) -> Optional[bytes]:
        return self._files.get(name)


@pytest.mark.parametrize("honest", [0, 1, 17, 400, 10**9])
def test_one_lie_among_many_changes_is_found(honest: int) -> None:
    server, ledger, rng = LyingServer(honest), Ledger(), random.Random(honest)
    for serial in range(401):
        name = f"file-{rng.randrange(20)}"
        new = None if serial != honest and rng.random() < 0.3 else Content(serial, 64)
        change = ledger.begin((1, name), new)
        server.change(name, None if new is None else new.data())
        ledger.end(change, Fate.ACKNOWLEDGED)
        reading = ledger.read(list(ledger))
        for key in list(ledger):
            ledger.saw(reading, key, server.read(key[1]), "a test")
        ledger.end_reading(reading)
    assert len(ledger.findings) == (0 if honest > 400 else 1)


# The bad clients.


def test_bad_clients_do_all_they_can_and_touch_nobody_elses_files(server: RunningServer) -> None:
    host, port = server.address
    command = [sys.executable, str(ROOT / "tools" / "mischief.py"), "--server", f"{host}:{port}"]
    with subprocess.Popen(
        [*command, "--clients", "64"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        for shown in (
            lambda line: "op=100" in line and "status=210" in line,
            lambda line: "op=100" in line and "reason=cut" in line,
            lambda line: "op=100" in line and "reason=name" in line,
            lambda line: "reason=unknown-op" in line,
            lambda line: "reason=connection" in line,
        ):
            server.wait_for_line(shown)
        out, _ = process.communicate()
    assert process.returncode == 0
    done = json.loads(out)
    assert set(done) == set(mischief.KINDS)
    users = {int(user) for line in server.lines for user in re.findall(r"^user=(\d+) ", line)}
    assert users
    assert min(users) >= mischief.FIRST_USER > soak.MAX_CLIENTS


# The server's lives, and the faults.


@pytest.fixture
def lives(tmp_path: Path) -> Lives:
    return Lives(tmp_path / "store")


def test_a_server_has_one_port_in_all_its_lives_and_its_end_is_noticed(lives: Lives) -> None:
    with lives:
        lives.start()
        address = lives.address
        assert lives.descriptors() > 3
        assert lives.memory() > 1 << 20
        lives.kill()
        lives.start()
        assert (lives.address, lives.number) == (address, 2)
        assert lives.stop(WAIT_SECONDS) == 0
        lives.start()
        os.kill(lives.pid, signal.SIGKILL)
        os.waitid(os.P_PID, lives.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(Died, match="ended by itself"):
            lives.check()


def test_a_server_that_does_not_start_says_why(lives: Lives) -> None:
    lives.root.write_bytes(b"")
    with lives, pytest.raises(Died, match="cannot keep files"):
        lives.start()


def test_every_fault_makes_the_server_refuse_and_is_taken_back(
    lives: Lives, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(lives_module.FILE_BYTES + 1))
    names = [f"file-{number}" for number in range(8)]

    def refused(jobs: List[Job]) -> int:
        """How many of the jobs were; they arrive side by side."""
        errors = [outcome.error for outcome in client.run(jobs, parallel=16)]
        assert all(error is None or isinstance(error, Refused) for error in errors), errors
        return len(errors) - errors.count(None)

    everything: List[Job] = [Backup(file, name) for name in names]
    with lives:
        lives.start()
        with Client(lives.address, 1) as client:
            assert refused(everything) == 0
            kinds = lives_module.faults(lives, [1, 2], random.Random(0))
            assert {fault.name for fault in kinds} >= {"root away", "folder a link"}
            for fault in kinds:
                assert fault.begin(lives), fault.name
                try:
                    assert refused([*everything[4:], *map(Delete, names[:4])]) > 0, fault.name
                finally:
                    fault.end(lives)
                assert refused(everything) == 0, fault.name
                assert refused([Retrieve(name, tmp_path / "copy", True) for name in names]) == 0
                assert client.list() == names


# The whole.


def command(work: Path, *arguments: str) -> List[str]:
    work.mkdir()
    few = ["--clients", "16", "--bad-clients", "12", "--line-every", "0.4", "--work", str(work)]
    return [sys.executable, str(ROOT / "tools" / "soak.py"), *few, *arguments]


def number(text: str, title: str) -> int:
    """What a row of the table says."""
    (found,) = re.findall(rf"^{title} +(\d+)", text, re.MULTILINE)
    return int(found)


def test_at_the_end_every_name_is_read_to_a_place_of_its_own(tmp_path: Path) -> None:
    whole = soak.Soak(soak.options([]), tmp_path)
    for user_id, name in itertools.product(range(20), "abcdefghij"):
        whole.ledger.begin((user_id, name), A)
    jobs = list(whole.everything())
    whole.client.close()
    assert len({job.path for job in jobs if isinstance(job, Retrieve)}) == len(jobs) == 200


def test_a_short_run_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    quick = ["--seconds", "4", "--kill-every", "0.9", "--fault-every", "0.3", "--seed", "2"]
    done = subprocess.run(
        command(work, *quick),
        capture_output=True,
        text=True,
        timeout=2 * WAIT_SECONDS,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all good"
    assert re.fullmatch(r" +0 s  \d+ requests, 0 kills, \d+ faults, 0 lost, server: .*", lines[0])
    assert number(done.stdout, "kills") >= 3  # two while all run, and the last
    assert number(done.stdout, "acknowledged files lost") == 0
    assert number(done.stdout, "leaked descriptors") == 0
    for op in ("backup", "retrieve", "delete", "listing", "bad ones", "names in the ledger"):
        assert number(done.stdout, op) > 0
    (injected,) = re.findall(r"^injected faults +(.*)$", done.stdout, re.MULTILINE)
    assert {"root away", "folder a link"} <= set(re.findall(r"([a-zA-Z ]+) \d+(?:, |$)", injected))
    assert not list(work.iterdir())


def test_files_that_vanish_behind_the_servers_back_are_missed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with subprocess.Popen(
        command(work, "--seconds", "1.2", "--kill-every", "100", "--fault-every", "100"),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (store,) = work.glob("*/store")
        for path in store.glob("[1-9]/*"):
            path.unlink(missing_ok=True)  # the clients go on meanwhile
        out = process.stdout.read()
    assert process.returncode == 1
    assert number(out, "acknowledged files lost") > 0
    assert "an acknowledged file is not there" in out
    assert out.splitlines()[-2] == "something FAILED"
    assert store.is_dir()  # for a look


def test_more_clients_than_are_bearable_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--clients", "301"], ["--seconds", "0"], ["--kill-every", "x"]):
        with pytest.raises(SystemExit, match="2"):
            soak.options(wrong)
    assert "at most 300" in capsys.readouterr().err
