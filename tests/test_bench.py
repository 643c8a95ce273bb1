"""The benchmark: its servers speak the protocol, its load counts right, and it runs to the end.

How fast anything is, no test asks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from backup.settings import MIB, Settings
from tests.helpers import (
    ROOT,
    WAIT_SECONDS,
    RunningServer,
    ask,
    examples,
    file_payload,
    request,
    response,
)
from tools import bench, load, tune
from tools.load import CONTENT, Failed, Load, Wrong, file_name
from tools.peers import launch
from tools.peers.launch import Running
from tools.report import TARGETS, Others, Row, Target, as_json, shown, text

BACKUP, RETRIEVE, DELETE, LIST = 100, 200, 201, 202
LARGE = bytes(range(256)) * 1000


@pytest.fixture(params=["threads", "streams"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    """One of the two reference servers."""
    with launch.peer(request.param, tmp_path / "store", tmp_path / "log") as running:
        yield running


def fill(server: RunningServer, user_id: int, count: int) -> None:
    """Gives a user the load's first files, past the server."""
    folder = server.root / str(user_id)
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / os.fsdecode(file_name(number))).write_bytes(CONTENT)


# The reference servers.


def test_a_reference_server_answers_the_examples_to_the_letter(peer: Running) -> None:
    for example in examples():
        assert ask(peer.address, example.request) == example.response, example.title


def test_a_reference_server_takes_a_request_byte_by_byte(peer: Running) -> None:
    message = request(11, BACKUP, b"a", b"xyz")
    pieces = [message[at : at + 1] for at in range(len(message))]
    assert ask(peer.address, *pieces) == response(210, b"a")


def test_a_reference_server_sends_large_files_whole(peer: Running) -> None:
    assert ask(peer.address, request(1, BACKUP, b"large", LARGE)) == response(210, b"large")
    expected = response(212, b"large", file_payload(LARGE))
    assert ask(peer.address, request(1, RETRIEVE, b"large")) == expected


@pytest.mark.parametrize(
    "name", [b"", b".", b"..", b"../7/a", b"a\\b", b"a\nb", b"\xff", b"x" * 256]
)
def test_a_reference_server_refuses_what_is_no_name(
    peer: Running, tmp_path: Path, name: bytes
) -> None:
    assert ask(peer.address, request(7, BACKUP, name, b"content")) == response(1001, name)
    assert ask(peer.address, request(7, RETRIEVE, name)) == response(1003, name)
    assert ask(peer.address, request(7, DELETE, name)) == response(1002, name)
    assert not list((tmp_path / "store" / ".tmp").iterdir())


def test_a_reference_server_stores_no_half_of_a_file(peer: Running, tmp_path: Path) -> None:
    ask(peer.address, request(7, BACKUP, b"a", b"older"))
    half = request(7, BACKUP, b"a", b"new", size=100)
    assert ask(peer.address, half, end=True) == response(1001, b"a")
    assert (tmp_path / "store" / "7" / "a").read_bytes() == b"older"
    assert not list((tmp_path / "store" / ".tmp").iterdir())


def test_a_reference_server_answers_an_unknown_op_and_another_version(peer: Running) -> None:
    assert ask(peer.address, request(7, 99, b"a")) == response(1001, b"a")
    assert ask(peer.address, request(7, LIST, version=9)) == response(212, b"", bytes(4))
    assert ask(peer.address, b"\x01\x02", end=True) == b""


@pytest.mark.parametrize("module", ["threads", "streams"])
def test_a_reference_server_logs_each_request(module: str, tmp_path: Path) -> None:
    with launch.peer(module, tmp_path / "store", tmp_path / "log") as running:
        ask(running.address, request(7, BACKUP, b"a", b"four"))
        ask(running.address, request(7, RETRIEVE, b"b"))
    _, *lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    expected = ["op=100 file=a status=210 bytes=4 ms=", "op=200 file=b status=1003 bytes=0 ms="]
    assert [line.startswith(f"[SERVER] user=7 {end}") for line, end in zip(lines, expected)] == [
        True,
        True,
    ]


def test_the_bare_server_moves_bytes(tmp_path: Path) -> None:
    with launch.peer("bare", tmp_path / "store", tmp_path / "log", "--fsync") as running:
        assert ask(running.address, request(7, BACKUP, b"a", LARGE)) == response(210, b"a")
        expected = response(212, b"a", file_payload(LARGE))
        assert ask(running.address, request(7, RETRIEVE, b"a")) == expected
        assert ask(running.address, request(7, LIST)) == response(212, b"", bytes(4))


@pytest.mark.parametrize("settings", [{}, {"fsync": False}, {"commit_files": 1, "fsync": False}])
def test_our_server_is_started_in_each_way(tmp_path: Path, settings: Dict[str, float]) -> None:
    with launch.ours(tmp_path / "store", tmp_path / "log", settings) as running:
        for example in examples():
            assert ask(running.address, example.request) == example.response, example.title
        assert running.memory("VmHWM") >= running.memory("VmRSS") > MIB
        assert running.descriptors() > 3


def test_a_server_that_does_not_start_is_an_error_with_its_words(tmp_path: Path) -> None:
    server = launch.peer("missing", tmp_path / "store", tmp_path / "log")
    with pytest.raises(launch.NotStarted, match=r"No module named tools\.peers\.missing"):
        server.__enter__()


# The load.


@pytest.mark.parametrize("connections", [1, 8])
@pytest.mark.parametrize("op", ["list", "retrieve", "backup"])
def test_the_load_counts_what_the_server_answered(
    server: RunningServer, op: str, connections: int
) -> None:
    fill(server, 7, 3)
    found = load.rate(server.address, op, 7, 3, connections, seconds=0.1, warm_up=0)
    server.stop()  # so that its log is whole
    code = {"list": LIST, "retrieve": RETRIEVE, "backup": BACKUP}[op]
    logged = [line for line in server.lines if f" op={code} " in line and "status=21" in line]
    assert len(logged) == found["count"] > 0
    assert found["cpu"] > 0
    assert found["seconds"] >= 0.1
    if op == "backup":
        stored = server.stored(7)
        assert stored == [file_name(n).decode() for n in range(max(3, found["count"]))]
        assert (server.root / "7" / stored[-1]).read_bytes() == CONTENT


@pytest.mark.parametrize("connections", [1, 8])
@pytest.mark.parametrize(("op", "files"), [("list", 4), ("list", 2), ("retrieve", 4)])
def test_the_load_notices_a_wrong_answer(
    server: RunningServer, op: str, files: int, connections: int
) -> None:
    fill(server, 7, 3)
    with pytest.raises(Wrong, match="the server answered 01 "):
        load.rate(server.address, op, 7, files, connections, seconds=WAIT_SECONDS, warm_up=0)


def scattered(listener: socket.socket, answers: List[bytes]) -> None:
    """Answers one connection after the other, each byte in a segment of its own."""
    for answer in answers:
        sock, _ = listener.accept()
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.recv(1000)
            for at in range(len(answer)):
                sock.send(answer[at : at + 1])
                time.sleep(0.002)


@pytest.mark.parametrize(("cut", "right"), [(0, True), (1, False)])
def test_the_load_puts_a_scattered_answer_together(cut: int, right: bool) -> None:
    whole = response(212, b"", bytes(4))
    answers = [whole, whole[: len(whole) - cut]]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=scattered, args=(listener, answers))
        thread.start()
        try:
            pending = load.exchanges("list", 7, 0)
            address = listener.getsockname()
            if right:
                assert load.side_by_side(address, pending, connections=2, seconds=0) == 2
            else:
                with pytest.raises(Wrong):
                    load.side_by_side(address, pending, connections=2, seconds=0)
        finally:
            thread.join()


def test_the_load_measures_latencies(server: RunningServer) -> None:
    fill(server, 7, 3)
    paced = load.pace(server.address, 7, 3, a_second=100, seconds=0.1)
    one_by_one = load.latency(server.address, 7, 3, seconds=0.05)
    for found in (paced, one_by_one):
        assert 0 < found["p50"] <= found["p99"] <= found["max"]
    server.stop()
    assert len(server.lines) > 10


def test_a_stall_is_charged_to_all_who_came_meanwhile() -> None:
    """Ten are due at once and the server takes 0.02 s for each: the last waits for all."""
    answer = response(212, b"", bytes(4))  # of 13 bytes, at 0.002 s each

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=scattered, args=(listener, [answer] * 10))
        thread.start()
        found = load.pace(listener.getsockname(), 7, 0, a_second=10_000, seconds=0.001)
        thread.join()
    assert found["max"] > 9 * 0.02


def test_what_others_use_is_a_share() -> None:
    others = Others()
    assert 0 <= others.share() <= 1


def test_the_load_moves_large_files(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(LARGE)
    source = str(tmp_path / "source")
    sent = load.upload(server.address, "backup", 9, source, len(LARGE))
    assert (len(sent["each"]), server.stored(9)) == (1, ["large-0"])
    assert (server.root / "9" / "large-0").read_bytes() == LARGE
    sent = load.upload(server.address, "backup", 9, source, 1000, seconds=0.01)
    assert sum(sent["each"]) >= 0.01
    load.download(server.address, "backup", 9, "large-0", 1000)
    with pytest.raises(Wrong):
        load.download(server.address, "backup", 9, "large-0", len(LARGE))
    with pytest.raises(Wrong, match="has only 256000 bytes"):
        load.upload(server.address, "backup", 9, source, len(LARGE) + 1)


def test_the_load_holds_connections_and_lets_them_go(server: RunningServer) -> None:
    assert load.hold(server.address, 300)["count"] == 300
    load.release(keep=100)
    assert load.hold(server.address, 0)["count"] == 100
    load.release()
    assert load.hold(server.address, 0)["count"] == 0


def test_a_load_process_does_what_it_is_told(server: RunningServer) -> None:
    arguments: Dict[str, Any] = {"address": server.address, "user": 7, "seconds": 0.01}
    with Load() as process:
        assert process.ask("latency", files=0, **arguments)["p50"] > 0
        with pytest.raises(Failed, match="Wrong: the server answered"):
            process.ask("latency", files=1, **arguments)
        process.begin("latency", files=0, **arguments)
        assert process.result()["p50"] > 0
        with pytest.raises(Failed, match="has ended"):
            process.ask("nonsense")


# What is made of the numbers.


def test_a_percentile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    found = [load.percentile(values, share) for share in (0.0, 0.5, 0.99, 0.991, 1.0)]
    assert found == [1, 50, 99, 100, 100]
    assert load.percentile([7.0], 0.99) == 7
    assert load.percentile([3.0, 1.0, 2.0], 0.5) == 2


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = Row("list-32", "LIST", "requests/s")
    for ours, other in ((10, 1), (20, 10), (90, 30)):
        row.add("ours", ours, load=0.95)
        row.add("asyncio", other, load=0.2)
    assert (row.median("ours"), row.ratio("ours", "asyncio")) == (20, 3)
    assert (row.median("threads"), row.ratio("ours", "threads")) == (None, None)
    series = row.as_json()["series"]
    assert series["ours"]["load is the bottleneck"]
    assert not series["asyncio"]["load is the bottleneck"]
    assert (series["ours"]["ratio"], series["asyncio"]["ratio"]) == (None, 3)


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (Target("r", "ours", "other", 2), 2.0, True),
        (Target("r", "ours", "other", 2.1), 2.0, False),
        (Target("r", "ours", None, 25, at_least=False), 20.0, True),
        (Target("r", "ours", None, 20, at_least=False), 20.0, False),
        (Target("r", "ours", "absent", 2), None, None),
        (Target("absent", "ours", None, 2), None, None),
    ],
)
def test_a_target_is_met_or_not_or_unknown(target: Target, measured: Any, met: Any) -> None:
    row = Row("r", "R", "requests/s")
    row.add("ours", 20)
    row.add("other", 10)
    found = target.as_json({"r": row})
    assert (found["measured"], found["met"]) == (measured, met)


def test_sizes_are_shown_in_the_largest_unit_that_divides_them() -> None:
    assert [shown(size) for size in (1024 * MIB, 4 * MIB, 3 * 1024, 1025)] == [
        "1 GiB",
        "4 MiB",
        "3 KiB",
        "1025 bytes",
    ]


def test_every_target_is_of_a_row_and_of_series_that_are_measured() -> None:
    measured = {name: set(small.servers) for name, small in bench.SMALL.items()}
    measured.update({name: set(servers) for name, servers in bench.LARGE.items()})
    for target in TARGETS:
        assert target.row in bench.TITLES
        wanted = {target.series, target.against or target.series}
        assert wanted <= measured.get(target.row, wanted)


# The whole.


def run_bench(*arguments: str) -> Tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=4 * WAIT_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_quick_run_measures_every_row_and_leaves_nothing(tmp_path: Path) -> None:
    output, work = tmp_path / "output", tmp_path / "work"
    code, said, errors = run_bench("--quick", "--output", str(output), "--work", str(work))
    assert code == 0, errors
    written = (output / "benchmark.json").read_text(encoding="utf-8")
    found = json.loads(written)
    assert [row["name"] for row in found["rows"]] == list(bench.TITLES)
    for row in found["rows"]:
        assert row["series"] or row["notes"], row["name"]
        assert f"{row['title']} ({row['unit']})" in said
        for series in row["series"].values():
            assert len(series["rounds"]) == found["scale"]["rounds"] == 1
            assert series["median"] == series["rounds"][0]
    rows = {row["name"]: row for row in found["rows"]}
    for name in ("pyftpdlib", "nginx"):
        absent = found["machine"][name] == "not installed"
        assert absent == (name not in rows["up"]["series"]) == (name not in rows["down"]["series"])
        assert absent == (f"{name} is not installed" in rows["up"]["notes"])
    assert {target["row"] for target in found["targets"]} == {target.row for target in TARGETS}
    for private in (str(ROOT), str(tmp_path), socket.gethostname()):
        assert private not in written
    assert not work.exists()


def test_a_row_says_which_peer_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "has_ftp", lambda: False)
    monkeypatch.setattr(launch, "nginx_program", lambda: None)
    scale = bench.QUICK._replace(size=10_000)
    found = bench.run(scale, tmp_path / "work", {"down"})
    (row,) = found["rows"]
    assert set(row["series"]) == {"ours", "limit"}
    assert row["notes"] == ["pyftpdlib is not installed", "nginx is not installed"]
    assert found["machine"]["nginx"] == "not installed"
    unknown = [target for target in found["targets"] if target["met"] is None]
    assert len(unknown) == len(TARGETS) - 1
    assert "  note: nginx is not installed" in text(found)


def test_rows_are_chosen_by_how_they_begin() -> None:
    assert bench.chosen_rows("list,up-memory") == {"list-1", "list-32", "up-memory"}
    for nonsense in ("list,,up", "retreive"):
        with pytest.raises(argparse.ArgumentTypeError, match="is none of ceiling, list-1"):
            bench.chosen_rows(nonsense)


def test_a_time_is_more_than_none() -> None:
    assert bench.more_than_none("0.5") == 0.5
    for nonsense in ("0", "-1", "inf", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no time"):
            bench.more_than_none(nonsense)


def test_without_matplotlib_there_is_no_drawing_but_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench.write({"rows": []}, tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().err
    assert json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8")) == {"rows": []}
    assert not (tmp_path / "benchmark.svg").exists()


def test_the_same_numbers_make_the_same_drawing(tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    row = Row("list-32", "LIST, 32 connections", "requests/s")
    row.add("ours", 2000, 0.5)
    row.add("asyncio", 1000, 0.5)
    found = {
        "date": "2020-01-02",
        "machine": {"processor": "8 × fast"},
        "scale": bench.QUICK._asdict(),
        **as_json({"list-32": row}),
    }
    (tmp_path / "json").write_text(json.dumps(found), encoding="utf-8")
    for name in ("one.svg", "two.svg"):  # in processes of their own: matplotlib keeps files open
        command = [sys.executable, str(ROOT / "tools" / "chart.py"), "json", name]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=WAIT_SECONDS)
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "two.svg").read_text(encoding="utf-8")
    for shown_there in ("2,000", "asyncio", "2020-01-02", "8 × fast"):
        assert shown_there in drawn


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_ends_what_it_started(tmp_path: Path, number: int) -> None:
    work = tmp_path / "work"
    command = [sys.executable, str(ROOT / "tools" / "bench.py"), "--quick", "--seconds", "60"]
    process = subprocess.Popen(
        [*command, "--only", "list-32", "--work", str(work), "--output", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + WAIT_SECONDS
    while not list(work.glob("run-*/ours.log")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(child) for child in _children(process.pid)]
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not work.exists()
    assert len(children) >= 2  # two loads, and perhaps the server
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def _children(pid: int) -> List[str]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text(encoding="ascii").split()


def test_a_server_is_ended_with_its_block(tmp_path: Path) -> None:
    with launch.peer("bare", tmp_path / "store", tmp_path / "log") as running:
        assert ask(running.address, request(7, LIST))
    with pytest.raises(ProcessLookupError):
        os.kill(running.pid, 0)


# The tunables.


@pytest.mark.parametrize("name", sorted(tune.TRIALS))
def test_every_trial_is_of_a_tunable_and_has_the_default_among_its_candidates(name: str) -> None:
    assert getattr(Settings(), name) in tune.TRIALS[name].candidates


def test_a_trial_prints_a_line_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "SECONDS", 0.05)
    monkeypatch.setattr(tune, "LARGE", MIB)
    tune.run("small_bytes", 1, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "small_bytes         0",
        "small_bytes     65536",
    ]
    assert all("retrieve/s" in line for line in lines)
    assert lines[1].endswith("(the default)")
    assert not list(tmp_path.glob("tune-*"))
