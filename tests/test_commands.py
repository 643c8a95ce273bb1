"""put, get, list and delete, as a user types them: what is printed, what is done, how they exit."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Dict, List, Sequence, Type

import pytest

from backup.cli import main
from backup.client import Client
from backup.commands import _explained, exit_code
from backup.errors import BackupError, LocalFileError, NotDeleted, NotFound, Refused, Unreachable
from backup.exchange import Delete, Outcome
from tests.helpers import RunningServer, response
from tests.test_client import Scripted, answering, resetting, sparse, unused_address
from tests.test_console import Terminal, on_screen
from tests.user import USER, User, errors

MIB = 1 << 20


# -- put ----------------------------------------------------------------------


def test_put_backs_files_up_under_their_base_names(user: User, served: RunningServer) -> None:
    (user.folder / "sub").mkdir()
    (user.folder / "sub" / "-c d").write_bytes(b"c")
    out, err, code = user.types("put", "a.txt", str(user.folder / "b.txt"), "sub/-c d")
    assert sorted(out.splitlines()) == [
        "Backup OK (-c d)",
        "Backup OK (a.txt)",
        "Backup OK (b.txt)",
    ]
    assert (err, code) == ("", 0)
    assert served.stored(USER) == ["-c d", "a.txt", "b.txt"]
    assert (served.root / str(USER) / "a.txt").read_bytes() == b"content of a"


def test_put_reads_paths_from_a_file(user: User, served: RunningServer) -> None:
    (user.folder / "list").write_bytes(b"\xef\xbb\xbfa.txt\r\n\r\n")
    assert user.types("put", "--files-from", "list") == ("Backup OK (a.txt)\n", "", 0)
    assert user.types("put", "b.txt", "--files-from", "list", "--parallel", "1").code == 0
    assert served.stored(USER) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("data", [b"a.txt\nb.txt\n", b"\xef\xbb\xbfa.txt\r\n\r\nb.txt"])
def test_put_reads_paths_from_stdin(user: User, served: RunningServer, data: bytes) -> None:
    assert user.pipes(data, "put", "--files-from", "-").code == 0
    assert served.stored(USER) == ["a.txt", "b.txt"]


def test_a_path_on_stdin_that_is_not_utf_8_fails_alone(user: User, served: RunningServer) -> None:
    out, err, code = user.pipes(b"a.txt\n\xff\n", "put", "--files-from", "-")
    assert (out, code) == ("Backup OK (a.txt)\n", 3)
    assert err == errors("\\xff: not a name for a file: it is not UTF-8; use another")
    assert served.stored(USER) == ["a.txt"]


def test_put_without_a_stdin_says_so(user: User, served: RunningServer) -> None:
    out, err, code = user.pipes(None, "put", "--files-from", "-")
    assert (out, code) == ("", 2)
    assert err.startswith("backup: cannot read stdin: ")
    assert err.count("\n") == 1
    assert served.stored(USER) == []


def test_put_of_an_empty_path_says_so(user: User) -> None:
    message = "put: one of the paths is empty; name a file"
    assert user.types("put", "a.txt", "") == ("", errors(message), 2)


@pytest.mark.parametrize("arguments", [(), ("--files-from", os.devnull)])
def test_put_without_a_file_says_what_to_name(user: User, arguments: Sequence[str]) -> None:
    assert user.types("put", *arguments) == (
        "",
        errors("put: no files given; name one, or a list of them with --files-from"),
        2,
    )


def test_put_of_a_list_that_is_missing_sends_nothing(user: User, served: RunningServer) -> None:
    said = user.types("put", "a.txt", "--files-from", "none")
    message = "cannot read none: no such file or directory; name a file with one path a line"
    assert said == ("", errors(message), 2)
    assert served.stored(USER) == []


FAULTS = [
    ("none", "cannot read none: no such file or directory; check the path", "local-file"),
    ("a.txt/x", "cannot read a.txt/x: not a directory; check the path", "local-file"),
    ("folder", "cannot read folder: it is a folder; name a file", "local-file"),
    ("pipe", "cannot read pipe: it is not a regular file; name a file", "local-file"),
    ("huge", "huge: 4294967292 bytes; the protocol carries 4294967291; split it", "too-large"),
    ("empty", "empty: the server refuses an empty file", "refused"),
    (
        "b\\c",
        "b\\\\c: not a name for a file: \\\\ is not allowed in it; use another",
        "name",
    ),
    (
        "\udcff",
        "\\xff: not a name for a file: it is not UTF-8; use another",
        "name",
    ),
    ("..", "..: not a name for a file: it means a folder; use another", "name"),
]


@pytest.fixture
def faulty(user: User) -> User:
    """A user with files that cannot be backed up."""
    (user.folder / "folder").mkdir()
    (user.folder / "empty").touch()
    os.mkfifo(user.folder / "pipe")
    sparse(user.folder / "huge", 2**32 - 4)
    return user


@pytest.mark.parametrize(("path", "message", "reason"), FAULTS)
def test_put_of_what_is_no_file_to_back_up_is_one_line(
    faulty: User, served: RunningServer, path: str, message: str, reason: str
) -> None:
    assert faulty.types("put", path) == ("", errors(message), 1)
    assert served.stored(USER) == []
    record = faulty.types("put", path, "--json").objects[0]
    assert (record["ok"], record["reason"], record["error"]) == (False, reason, message)


def test_one_file_that_fails_does_not_keep_the_others_from_being_put(
    faulty: User, served: RunningServer
) -> None:
    said = faulty.types("put", "none", "a.txt", "folder", "b.txt", "empty")
    assert sorted(said.out.splitlines()) == ["Backup OK (a.txt)", "Backup OK (b.txt)"]
    failed = [errors(message) for path, message, _ in FAULTS if path in ("none", "folder", "empty")]
    assert sorted(said.err.splitlines(True)) == sorted(failed)
    assert said.code == 3


def test_put_of_two_files_of_one_base_name_sends_nothing(user: User, served: RunningServer) -> None:
    (user.folder / "sub").mkdir()
    (user.folder / "sub" / "a.txt").touch()
    message = "put: a.txt and sub/a.txt have one base name; send them apart or rename one"
    assert user.types("put", "b.txt", "a.txt", "sub/a.txt") == ("", errors(message), 2)
    assert served.stored(USER) == []


def test_put_into_a_store_that_is_broken_points_to_its_log(
    user: User, served: RunningServer
) -> None:
    shutil.rmtree(served.root / ".tmp")
    message = (
        "a.txt: the server did not store it (a cap, append-only, or its disk); its log says why"
    )
    assert user.types("put", "a.txt") == ("", errors(message), 1)


# -- get ----------------------------------------------------------------------


@pytest.fixture
def filled(user: User, served: RunningServer) -> RunningServer:
    """A server that has the files, which are no longer here."""
    assert user.types("put", "a.txt", "b.txt").code == 0
    (user.folder / "a.txt").unlink()
    (user.folder / "b.txt").unlink()
    return served


def test_get_saves_files_under_their_names(user: User, filled: RunningServer) -> None:
    said = user.types("get", "a.txt", "b.txt")
    assert sorted(said.out.splitlines()) == [
        "Retrieved: a.txt (12 bytes)",
        "Retrieved: b.txt (16 bytes)",
    ]
    assert (said.err, said.code) == ("", 0)
    assert user.content() == {"a.txt": b"content of a", "b.txt": b"content of b too"}


def test_get_saves_one_file_elsewhere(user: User, filled: RunningServer) -> None:
    (user.folder / "sub").mkdir()
    assert user.types("get", "a.txt", "-o", "c").code == 0
    assert user.types("get", "a.txt", "b.txt", "--output-dir", "sub").code == 0
    assert user.content() == {"c": b"content of a"}
    assert sorted(path.name for path in (user.folder / "sub").iterdir()) == ["a.txt", "b.txt"]


def test_get_overwrites_nothing_unless_forced(user: User, filled: RunningServer) -> None:
    (user.folder / "a.txt").write_bytes(b"mine")
    out, err, code = user.types("get", "a.txt")
    assert (out, code) == ("", 1)
    assert err.startswith("backup: a.txt is there already; ")
    assert "--force" in err
    assert user.content() == {"a.txt": b"mine"}
    assert user.types("get", "--force", "a.txt").code == 0
    assert user.content() == {"a.txt": b"content of a"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "b", "-o", "c"], "get: -o takes one NAME, not 2; use --output-dir"),
        (["a", "-o", "-"], "get: -o - is not supported; save it as a file"),
        (["a", "b", "a"], "get: a is named twice; name it once"),
    ],
)
def test_get_refuses_what_it_cannot_mean(
    user: User, filled: RunningServer, arguments: List[str], message: str
) -> None:
    assert user.types("get", *arguments) == ("", errors(message), 2)
    assert user.content() == {}


@pytest.mark.parametrize(
    ("names", "lines", "code"),
    [
        (["c.txt"], ["c.txt: not on the server"], 10),
        (["c.txt", "d.txt"], ["c.txt: not on the server", "d.txt: not on the server"], 10),
        (["a.txt", "d.txt"], ["d.txt: not on the server"], 3),
        (["../a"], ["../a: not a name for a file: / is not allowed in it; use another"], 1),
        (
            ["c.txt", "a/b"],
            [
                "a/b: not a name for a file: / is not allowed in it; use another",
                "c.txt: not on the server",
            ],
            1,
        ),
    ],
)
def test_get_of_what_is_not_there_says_so(
    user: User, filled: RunningServer, names: List[str], lines: List[str], code: int
) -> None:
    said = user.types("get", *names)
    assert sorted(said.err.splitlines(True)) == [errors(line) for line in lines]
    assert said.code == code
    assert list(user.content()) == [name for name in names if name == "a.txt"]


@pytest.mark.parametrize("folder", ["none", "file"])
def test_get_into_a_place_that_is_no_folder_sends_nothing(
    user: User, filled: RunningServer, folder: str
) -> None:
    (user.folder / "file").touch()
    said = user.types("get", "a.txt", "b.txt", "--output-dir", folder)
    assert said == ("", errors(f"--output-dir: {folder} is not a folder; make it first"), 2)
    assert user.content() == {"file": b""}
    assert not any(" op=200 " in line for line in filled.lines)


def test_get_onto_a_folder_says_so(user: User, filled: RunningServer) -> None:
    (user.folder / "a.txt").mkdir()
    message = "a.txt is a folder; name a file in it"
    assert user.types("get", "a.txt", "--force") == ("", errors(message), 1)


# -- list and delete ----------------------------------------------------------


def test_list_prints_a_name_a_line(user: User, filled: RunningServer) -> None:
    (filled.root / str(USER) / "ä b\u202e").write_bytes(b"x")
    assert user.types("list") == ("a.txt\nb.txt\nä b\u202e\n", "", 0)


def test_list_of_nothing_prints_nothing(user: User, served: RunningServer) -> None:
    assert user.types("list") == ("", "", 0)
    assert user.types("list", "--user-id", "12") == ("", "", 0)


def test_list_escapes_on_a_terminal(
    user: User, filled: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (filled.root / str(USER) / "z\u202e").write_bytes(b"x")
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stdout", terminal.stream)
        assert main(["list"]) == 0
        assert terminal.shown() == "a.txt\nb.txt\nz\\u202e\n"


def test_delete_removes_files(user: User, filled: RunningServer) -> None:
    said = user.types("delete", "a.txt", "b.txt")
    assert sorted(said.out.splitlines()) == ["Delete OK (a.txt)", "Delete OK (b.txt)"]
    assert (said.err, said.code) == ("", 0)
    assert filled.stored(USER) == []


def test_delete_of_what_is_not_there_is_10(user: User, filled: RunningServer) -> None:
    assert user.types("delete", "c") == ("", errors("c: not on the server"), 10)
    assert user.types("delete", "c", "d").code == 10
    said = user.types("delete", "c", "a.txt")
    assert said == ("Delete OK (a.txt)\n", errors("c: not on the server"), 3)
    said = user.types("delete", "..")
    message = "..: not a name for a file: it means a folder; use another"
    assert said == ("", errors(message), 1)
    assert filled.stored(USER) == ["b.txt"]


def test_delete_wants_each_name_once(user: User, filled: RunningServer) -> None:
    message = "delete: a.txt is named twice; name it once"
    assert user.types("delete", "a.txt", "a.txt") == ("", errors(message), 2)
    assert filled.stored(USER) == ["a.txt", "b.txt"]


NOT_DELETED = response(1002, b"a")


@pytest.mark.parametrize(
    ("listing", "message", "code"),
    [
        (
            response(212, b"", b"\1\0\0\0\1\0a"),
            "a: the server did not remove it; its log says why",
            1,
        ),
        (response(212, b"", b"\1\0\0\0\1\0b"), "a: not on the server", 10),
        (response(1001), "a: not on the server, or it could not be removed there", 1),
    ],
)
def test_delete_finds_out_why_a_file_was_not_removed(
    user: User, listing: bytes, message: str, code: int
) -> None:
    with Scripted(answering(NOT_DELETED), answering(listing)) as server:
        host, port = server.address
        said = user.types("delete", "a", "--server", f"{host}:{port}")
    assert said == ("", errors(message), code)


# -- the server ---------------------------------------------------------------

COMMANDS = [
    ["put", "a.txt", "b.txt"],
    ["get", "c.txt", "d.txt"],
    ["list"],
    ["delete", "c.txt", "d.txt"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_that_is_not_running_is_one_line(user: User, command: List[str]) -> None:
    sock, (host, port) = unused_address()
    with sock:
        said = user.types(*command, "--server", f"{host}:{port}")
    message = (
        f"cannot connect to {host}:{port}: connection refused; is it running? start it with: serve"
    )
    assert said == ("", errors(message), 1)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_server_of_another_kind_is_one_line_and_no_file(user: User, command: List[str]) -> None:
    before = user.content()
    http = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with Scripted(*[answering(http)] * len(command[1:] or [1])) as server:
        host, port = server.address
        out, err, code = user.types(*command, "--server", f"{host}:{port}")
    assert (out, code) == ("", 1)
    assert len(err.splitlines()) == len(command[1:] or [1])
    assert all("the answer has version 72, not 1" in line for line in err.splitlines())
    assert user.content() == before


def test_a_connection_that_breaks_is_one_line(user: User) -> None:
    with Scripted(resetting(b"")) as server:
        host, port = server.address
        out, err, code = user.types("get", "c", "--server", f"{host}:{port}")
    assert (out, code) == ("", 1)
    assert err.startswith(f"backup: c: {host}:{port}: the connection broke: ")
    assert err.count("\n") == 1


def test_a_server_that_goes_in_between_ends_the_whole(user: User) -> None:
    """One file was done; the next finds nobody; the third is not tried any more."""
    (user.folder / "c.txt").write_bytes(b"c")
    with Scripted(answering(response(210, b"a.txt"))) as server:
        host, port = server.address
        files = ["a.txt", "b.txt", "c.txt"]
        said = user.types("put", *files, "--parallel", "1", "--server", f"{host}:{port}")
    assert said.out == "Backup OK (a.txt)\n"
    assert said.err.startswith(f"backup: cannot connect to {host}:{port}: ")
    assert said.err.count("\n") == 1
    assert said.code == 3


def test_without_a_server_the_three_ways_are_named(user: User) -> None:
    message = (
        "no server given: use --server HOST:PORT, set BACKUP_SERVER or write it into server.info"
        " here"
    )
    assert user.types("list") == ("", errors(message), 2)


def test_the_server_is_found_in_server_info(user: User, server: RunningServer) -> None:
    (user.folder / "server.info").write_text(f"127.0.0.1:{server.address[1]}", encoding="ascii")
    assert user.types("list").code == 0
    (user.folder / "server.info").write_text("nonsense", encoding="ascii")
    assert user.types("list").code == 2


# -- the user id --------------------------------------------------------------


def test_a_user_id_that_was_drawn_is_announced_once(
    user: User, served: RunningServer, tmp_path: Path
) -> None:
    user.set_variable("BACKUP_USER_ID", "")
    path = tmp_path / "config" / "backup" / "user-id"
    said = user.types("put", "a.txt")
    drawn = int(path.read_text(encoding="ascii"))
    assert said.err == errors(f"your user id is {drawn}, drawn now and kept in {path}")
    assert user.types("list") == ("a.txt\n", "", 0)
    assert served.stored(drawn) == ["a.txt"]


def test_quiet_leaves_the_announcement_out(user: User, served: RunningServer) -> None:
    user.set_variable("BACKUP_USER_ID", "")
    assert user.types("list", "-q") == ("", "", 0)


def test_the_option_beats_the_variable(user: User, served: RunningServer) -> None:
    assert user.types("put", "a.txt", "--user-id", "12").code == 0
    assert (served.stored(USER), served.stored(12)) == ([], ["a.txt"])
    message = "--user-id: 'me' is not a user id; expected 0 to 4294967295"
    assert user.types("list", "--user-id", "me") == ("", errors(message), 2)


def test_where_no_user_id_can_be_kept_the_option_is_named(
    user: User, served: RunningServer
) -> None:
    user.set_variable("BACKUP_USER_ID", "")
    user.set_variable("XDG_CONFIG_HOME", str(user.folder / "a.txt"))
    out, err, code = user.types("list")
    assert (out, code) == ("", 2)
    assert err.startswith(f"backup: cannot keep a user id in {user.folder}/a.txt/backup/user-id: ")
    assert err.endswith("; use --user-id N\n")


# -- for programs -------------------------------------------------------------


def without_seconds(objects: List[Dict[str, object]]) -> List[Dict[str, object]]:
    for fields in objects:
        if "seconds" in fields:
            seconds = fields.pop("seconds")
            assert isinstance(seconds, float)
            assert seconds >= 0
    return objects


def test_json_has_an_object_a_file_and_a_summary(user: User, served: RunningServer) -> None:
    said = user.types("put", "a.txt", "none", "--json")
    assert (said.err, said.code) == (errors(FAULTS[0][1]), 3)
    *records, summary = without_seconds(said.objects)
    assert sorted(records, key=lambda fields: str(fields["name"])) == [
        {"op": "put", "name": "a.txt", "path": "a.txt", "ok": True, "bytes": 12},
        {
            "op": "put",
            "name": "none",
            "path": "none",
            "ok": False,
            "reason": "local-file",
            "error": FAULTS[0][1],
        },
    ]
    assert summary == {
        "summary": True,
        "op": "put",
        "done": 1,
        "failed": 1,
        "bytes": 12,
        "exit_code": 3,
    }


def test_json_of_the_other_commands(user: User, filled: RunningServer) -> None:
    said = user.types("get", "a.txt", "-o", "x", "--json")
    assert without_seconds(said.objects) == [
        {"op": "get", "name": "a.txt", "path": "x", "ok": True, "bytes": 12},
        {"summary": True, "op": "get", "done": 1, "failed": 0, "bytes": 12, "exit_code": 0},
    ]
    said = user.types("list", "--json")
    assert without_seconds(said.objects) == [
        {"op": "list", "name": "a.txt"},
        {"op": "list", "name": "b.txt"},
        {"summary": True, "op": "list", "done": 1, "failed": 0, "bytes": 18, "exit_code": 0},
    ]
    said = user.types("delete", "a.txt", "--json")
    assert without_seconds(said.objects) == [
        {"op": "delete", "name": "a.txt", "ok": True, "bytes": 0},
        {"summary": True, "op": "delete", "done": 1, "failed": 0, "bytes": 0, "exit_code": 0},
    ]
    said = user.types("delete", "a.txt", "--json")
    assert (said.err, said.code) == (errors("a.txt: not on the server"), 10)
    assert without_seconds(said.objects) == [
        {
            "op": "delete",
            "name": "a.txt",
            "ok": False,
            "reason": "not-found",
            "error": "a.txt: not on the server",
        },
        {"summary": True, "op": "delete", "done": 0, "failed": 1, "bytes": 0, "exit_code": 10},
    ]


def test_json_counts_what_was_not_tried_as_failed(user: User) -> None:
    sock, (host, port) = unused_address()
    with sock:
        said = user.types("put", "a.txt", "b.txt", "--json", "--server", f"{host}:{port}")
    record, summary = said.objects
    assert record["reason"] == "unreachable"
    assert (summary["done"], summary["failed"], summary["exit_code"]) == (0, 2, 1)


@pytest.mark.parametrize(
    ("done", "kinds", "code"),
    [
        (1, [], 0),
        (0, [], 0),
        (0, [LocalFileError], 1),
        (0, [Refused, NotFound], 1),
        (0, [NotFound, NotFound], 10),
        (1, [NotFound], 3),
        (5, [Refused, LocalFileError], 3),
    ],
)
def test_the_exit_code_is_for_all_jobs_together(
    done: int, kinds: List[Type[BackupError]], code: int
) -> None:
    assert exit_code(done, [kind("text") for kind in kinds]) == code


# -- progress -----------------------------------------------------------------


def test_progress_is_shown_on_a_terminal_and_taken_away(
    user: User, served: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse(user.folder / "large", 8 * MIB)
    with Terminal() as terminal:
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["put", "large"]) == 0
        shown = terminal.shown()
        assert " of 8.3 MB  " in shown
        assert "  file 1 of 1  large" in shown
        assert on_screen(shown) == [""]
        assert main(["get", "large", "-o", "again"]) == 0
        assert " of 8.3 MB  " in terminal.shown()
        assert main(["get", "large", "-o", "again", "--force", "-q"]) == 0
        assert terminal.shown() == ""
    assert (user.folder / "again").stat().st_size == 8 * MIB


def test_what_1002_means_stays_open_when_the_server_is_gone(tmp_path: Path) -> None:
    unclear = Outcome(Delete("a"), NotDeleted("either"), 0, [], 0.0)
    gone = Outcome(Delete("b"), Unreachable("gone"), 0, [], 0.0)
    with Client(("127.0.0.1", 1), USER) as client:
        assert list(_explained(client, [unclear, gone])) == [unclear, gone]
