"""Info files, variables and options: what they mean, which wins, and what each mistake is told."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List

import pytest

from backup import config
from backup.errors import ConfigError
from tests.helpers import ROOT, WAIT_SECONDS, stdin

EXPECTED = "expected HOST:PORT, for example 127.0.0.1:1234 or [::1]:1234, or unix:PATH"
MAKE_SERVER = "make it with one line HOST:PORT, for example 127.0.0.1:1234"
MAKE_BACKUP = "make it with one file a line, two or more"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# -- server.info --------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "address"),
    [
        (b"127.0.0.1:1234\n", ("127.0.0.1", 1234)),
        (b"127.0.0.1:1234", ("127.0.0.1", 1234)),
        (b"\r\n127.0.0.1:1234\r\n\r\n", ("127.0.0.1", 1234)),
        (b"\xef\xbb\xbf127.0.0.1:1234\r\n", ("127.0.0.1", 1234)),
        (b"  example.com:80 \n \n", ("example.com", 80)),
        (b"[::1]:1234\n", ("::1", 1234)),
        (b"localhost:0\n", ("localhost", 0)),
    ],
)
def test_server_info_holds_an_address(here: Path, content: bytes, address: object) -> None:
    (here / "server.info").write_bytes(content)
    assert config.read_server_info() == address


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"server.info: it is empty; {EXPECTED}"),
        (b"\n \r\n", f"server.info: it is empty; {EXPECTED}"),
        (b"\n\nlocalhost\n", f"server.info, line 3: 'localhost' is not an address; {EXPECTED}"),
        (b"localhost:\n", f"server.info, line 1: 'localhost:' is not an address; {EXPECTED}"),
        (b":1234\n", f"server.info, line 1: ':1234' is not an address; {EXPECTED}"),
        (b"::1:1234\n", f"server.info, line 1: '::1:1234' is not an address; {EXPECTED}"),
        (b"h:65536\n", f"server.info, line 1: 'h:65536' is not an address; {EXPECTED}"),
        (b"a:1\n\nb:2\n", "server.info, line 3: only one line is expected; remove it"),
        (b"\xff:1\n", f"server.info: it is not UTF-8 text; {MAKE_SERVER}"),
        (b"\xff\xfea\0:\x001\0", f"server.info: it is not UTF-8 text; {MAKE_SERVER}"),
    ],
)
def test_a_mistake_in_server_info_is_placed(here: Path, content: bytes, message: str) -> None:
    (here / "server.info").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.read_server_info()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("read", "advice"),
    [
        (config.read_server_info, MAKE_SERVER),
        (config.read_backup_info, MAKE_BACKUP),
        (config.read_file_list, "name a file with one path a line"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    here: Path, read: Callable[[str], object], advice: str
) -> None:
    (here / "folder").mkdir()
    (here / "file").touch()
    reasons = {
        "none": "no such file or directory",
        "folder": "is a directory",
        "file/below": "not a directory",
        "a\0b": "embedded null byte",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError) as caught:
            read(path)
        shown = path.replace("\0", "\\x00")
        assert str(caught.value) == f"cannot read {shown}: {reason}; {advice}"


# -- backup.info and other lists of files -------------------------------------


def test_backup_info_names_files_beside_it(here: Path) -> None:
    text = "\ufeffone.txt\r\n\r\nsub/two.txt\r\n/abs/three.txt\nа б.txt"
    (here / "sub.info").write_bytes(text.encode())
    expected = ["one.txt", "sub/two.txt", "/abs/three.txt", "а б.txt"]
    assert config.read_backup_info("sub.info") == expected
    folder = os.path.join("..", "here")
    assert config.read_backup_info(os.path.join(folder, "sub.info")) == [
        os.path.join(folder, path) for path in expected
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "backup.info: it names 0 files; expected two, one a line"),
        (b"one.txt\n\n", "backup.info: it names 1 files; expected two, one a line"),
        (
            b"a/x.txt\nb/x.txt\n",
            "backup.info: a/x.txt and b/x.txt have one base name; send them apart or rename one",
        ),
        (b"one\n\xe9\n", f"backup.info: it is not UTF-8 text; {MAKE_BACKUP}"),
    ],
)
def test_a_mistake_in_backup_info_is_placed(here: Path, content: bytes, message: str) -> None:
    (here / "backup.info").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.read_backup_info()
    assert str(caught.value) == message


def test_a_list_of_files_is_read_from_here(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "list").write_bytes(b"a\r\n\n sub/b \n")
    assert config.read_file_list("sub/list") == ["a", " sub/b "]


def test_a_list_of_files_may_come_from_stdin(here: Path) -> None:
    with stdin(b"\xef\xbb\xbfa\r\n\n sub/b \n"):
        assert config.read_file_list("-") == ["a", " sub/b "]
        assert os.read(0, 1) == b""  # it is read to its end, and left open
    with stdin(b""):
        assert config.read_file_list("-") == []


def test_a_stdin_that_cannot_be_read_is_named(here: Path) -> None:
    with stdin(None), pytest.raises(ConfigError) as caught:
        config.read_file_list("-")
    message = "cannot read stdin: bad file descriptor; name a file with one path a line"
    assert str(caught.value) == message


def test_only_a_line_feed_ends_a_line(here: Path) -> None:
    """A name may hold what Unicode calls a separator of lines, as docs/PROTOCOL.md has it."""
    names = ["a\u2028b", "c\u2029d"]
    (here / "list").write_text("\n".join(names), encoding="utf-8")
    assert config.read_file_list("list") == names
    assert config.read_backup_info("list") == names
    with stdin("\n".join(names).encode()):
        assert config.read_file_list("-") == names


def test_two_files_of_one_base_name_are_refused() -> None:
    config.check_distinct(["a/x", "a/y", "z"], "put")
    with pytest.raises(ConfigError, match=r"^put: a/x and \./b/x/ have one base name; send them"):
        config.check_distinct(["a/x", "y", "./b/x/"], "put")


def test_a_path_with_control_characters_is_shown_escaped(here: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        config.read_file_list("\x1b[31m\n")
    assert str(caught.value).isprintable()


# -- options, variables, files ------------------------------------------------


def test_an_option_beats_a_variable_and_a_variable_beats_a_file(here: Path) -> None:
    environ = {"BACKUP_SERVER": "variable:2", "BACKUP_BASE_DIR": "variable"}
    (here / "server.info").write_text("file:3", encoding="ascii")
    assert config.server_address("option:1", environ) == ("option", 1)
    assert config.server_address(None, environ) == ("variable", 2)
    assert config.server_address(None, {}) == ("file", 3)
    assert config.server_address(None, {"BACKUP_SERVER": ""}) == ("file", 3)
    assert config.store_root("option", environ) == "option"
    assert config.store_root(None, environ) == "variable"
    assert config.store_root(None, {}) == "backupsvr"
    assert config.listen_address("option:1", "server.info") == ("option", 1)
    assert config.listen_address(None, "server.info") == ("file", 3)


def test_without_any_address_the_three_ways_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        config.server_address(None, {})
    assert str(caught.value) == (
        "no server given: use --server HOST:PORT, set BACKUP_SERVER or write it into server.info"
        " here"
    )


@pytest.mark.parametrize(
    ("read", "source"),
    [
        (lambda text: config.server_address(text, {}), "--server"),
        (lambda text: config.server_address(None, {"BACKUP_SERVER": text}), "BACKUP_SERVER"),
        (lambda text: config.listen_address(text, "server.info"), "--listen"),
    ],
)
@pytest.mark.parametrize("text", ["localhost", "http://a:1", "a:b", "a:1" + "0" * 5000])
def test_a_malformed_address_is_told_with_its_source(
    read: Callable[[str], object], source: str, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value) == f"{source}: '{text}' is not an address; {EXPECTED}"


# -- user ids -----------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("0", 0), (" 7\n", 7), ("4294967295", 2**32 - 1)])
def test_a_user_id_is_a_number_of_32_bits(text: str, value: int) -> None:
    assert config.parse_user_id(text, "--user-id") == value
    assert config.user_id(text, {"BACKUP_USER_ID": "5"}) == (value, None)
    assert config.user_id(None, {"BACKUP_USER_ID": text}) == (value, None)


@pytest.mark.parametrize("text", ["", "-1", "+1", "1.0", "0x10", "4294967296", "٣", "1" * 5000])
def test_a_malformed_user_id_is_told_with_its_source(text: str) -> None:
    message = f"{text!r} is not a user id; expected 0 to 4294967295"
    with pytest.raises(ConfigError) as caught:
        config.user_id(text, {})
    assert str(caught.value) == f"--user-id: {message}"
    if text:
        with pytest.raises(ConfigError) as caught:
            config.user_id(None, {"BACKUP_USER_ID": text})
        assert str(caught.value) == f"BACKUP_USER_ID: {message}"


def test_a_drawn_user_id_is_never_0() -> None:
    drawn = {config.draw_user_id() for _ in range(1000)}
    assert len(drawn) > 990
    assert min(drawn) > 0
    assert max(drawn) < 2**32


def environment(folder: Path) -> Dict[str, str]:
    return {"XDG_CONFIG_HOME": str(folder)}


def kept(folder: Path) -> List[str]:
    """What there is where a user id is kept."""
    return sorted(path.name for path in (folder / "backup").iterdir())


def test_a_user_id_is_drawn_once_and_kept(here: Path) -> None:
    path = here / "backup" / "user-id"
    first = config.user_id(None, environment(here))
    assert first.kept_in == str(path)
    assert first.value == int(path.read_text(encoding="ascii"))
    assert config.user_id(None, environment(here)) == (first.value, None)
    assert kept(here) == ["user-id"]


def test_a_user_id_is_kept_in_the_home_folder_by_default(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    where = str(here / ".config" / "backup" / "user-id")
    assert config.user_id(None, {}).kept_in == where
    assert config.user_id(None, {"XDG_CONFIG_HOME": ""}).kept_in is None
    # The specification has a relative path ignored: it would be another id in every folder.
    assert config.user_id(None, {"XDG_CONFIG_HOME": "relative"}).kept_in is None


@pytest.mark.parametrize("content", [b"", b"\n", b"me\n", b"1 2\n", b"4294967296\n", b"\xff\xfe"])
def test_a_kept_user_id_that_is_malformed_is_told_with_its_file(here: Path, content: bytes) -> None:
    path = here / "backup" / "user-id"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.user_id(None, environment(here))
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(" is not a user id; expected 0 to 4294967295")
    assert str(caught.value).isprintable()
    assert path.read_bytes() == content


def test_where_nothing_can_be_kept_the_option_is_named(here: Path) -> None:
    (here / "file").touch()
    (here / "backup" / "user-id").mkdir(parents=True)
    for folder in (here / "file", here):
        with pytest.raises(ConfigError) as caught:
            config.user_id(None, environment(folder))
        message = str(caught.value)
        assert message.startswith(f"cannot keep a user id in {folder}/backup/user-id: ")
        assert message.endswith("; use --user-id N")


def no_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_a_user_id_is_kept_on_a_file_system_without_links(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    first = config.user_id(None, environment(here))
    assert first.kept_in
    assert config.user_id(None, environment(here)) == (first.value, None)
    assert kept(here) == ["user-id"]


def test_a_user_id_that_cannot_be_written_leaves_nothing(here: Path) -> None:
    """The disk is full, so to say: no file may grow."""
    program = (
        "import resource, sys; from backup import config\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "try: config.user_id(None, {'XDG_CONFIG_HOME': sys.argv[1]})\n"
        "except config.ConfigError as error: print(error)\n"
    )
    done = run_python(program, str(here))
    assert done.stdout.startswith(f"cannot keep a user id in {here}/backup/user-id: ")
    assert done.stdout.endswith("; use --user-id N\n")
    assert kept(here) == []


def python(program: str, *arguments: str) -> List[str]:
    return [sys.executable, "-c", program, *arguments]


def run_python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        python(program, *arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=True,
    )


def test_processes_that_draw_at_once_agree(here: Path) -> None:
    """All are ready before the first may begin; one id is kept, and all of them have it."""
    program = (
        "import sys; from backup import config\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(config.user_id(None, {'XDG_CONFIG_HOME': sys.argv[1]}).value)\n"
    )
    processes = [
        subprocess.Popen(
            python(program, str(here)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    drawn = {process.communicate(timeout=WAIT_SECONDS)[0] for process in processes}
    assert drawn == {(here / "backup" / "user-id").read_text(encoding="ascii")}
    assert kept(here) == ["user-id"]


def test_another_process_that_drew_first_counts(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does so at the last moment, between our look and our link."""
    link = os.link

    def late(source: str, target: str) -> None:
        Path(target).write_text("77\n", encoding="ascii")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert config.user_id(None, environment(here)).value == 77
    assert kept(here) == ["user-id"]


def test_an_option_that_is_empty_is_not_the_same_as_none() -> None:
    """As with ``--root "$UNSET"``: what is meant is somewhere else."""
    environ = {"BACKUP_SERVER": "variable:2", "BACKUP_BASE_DIR": "variable"}
    with pytest.raises(ConfigError, match=r"^--root is empty; name a folder$"):
        config.store_root("", environ)
    with pytest.raises(ConfigError, match=r"^--server: '' is not an address; "):
        config.server_address("", environ)
    with pytest.raises(ConfigError, match=r"^--listen: '' is not an address; "):
        config.listen_address("", "server.info")
