"""What may be a file's name, rule by rule, and that nothing a peer chose is shown raw."""

from __future__ import annotations

import os
import random
import unicodedata
from pathlib import Path
from typing import Iterator, List, Optional

import pytest

from backup import names
from backup.errors import InvalidName
from backup.names import MAX_NAME_BYTES, brief, decode, encode, escape, lawful, of_path, show

LAWFUL = [
    "a",
    "mmn14.pdf",
    ".hidden",
    "...",
    "..a",
    " leading and trailing ",
    " ",
    "-rf",
    "~",
    "$(reboot)",
    "שלום.txt",
    "é",
    "e\u0301",
    "日本語",
    "😀",
    "\u00a0",  # the first character behind C1
    "\u200b",
    "\u202e",
    "\ufeff",
    "\ufffe",
]

# Names that only file systems with reserved names refuse.
RESERVED = [
    "con",
    "CON",
    "Con.txt",
    "con.tar.gz",
    "nul ",
    "nul .txt",
    "aux.",
    "prn",
    "com0",
    "com9",
    "COM¹",
    "lpt1",
    "LPT².x",
    "conin$",
    "CONOUT$.txt",
    "a:b",
    "C:",
    "a<b",
    "a>b",
    'a"b',
    "a|b",
    "a?b",
    "a*b",
    "a.",
    "a ",
    "...",
]


def is_lawful(raw: bytes) -> bool:
    """The rule as docs/PROTOCOL.md words it, by other means than the package's."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    harmless = all(unicodedata.category(char) != "Cc" and char not in "/\\" for char in name)
    return 1 <= len(raw) <= 255 and name not in (".", "..") and harmless


def random_names(count: int) -> Iterator[bytes]:
    """Byte strings near the rule: whole characters and broken ones, and pure noise."""
    chance = random.Random(20240229)
    pieces = [b"a", b".", b"..", b" ", b"/", b"\\", b"\0", b"\x1f", b"\x7f", b"~"]
    pieces += ["é".encode(), "€".encode(), "😀".encode(), "\x80".encode(), "\x9f".encode()]
    pieces += ["\xa0".encode(), b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf"]
    for _ in range(count):
        if chance.random() < 0.2:
            yield bytes(chance.randrange(256) for _ in range(chance.randrange(6)))
        else:
            few = chance.sample(pieces, chance.randrange(1, 4))
            yield b"".join(chance.choices(few, k=chance.choice([0, 1, 2, 3, 64, 127, 255])))


@pytest.mark.parametrize("name", LAWFUL)
def test_a_lawful_name_passes_both_ways(name: str) -> None:
    assert decode(name.encode(), windows=False) == name
    assert encode(name, windows=False) == name.encode()


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "0 bytes, not 1 to 255"),
        (b".", "it means a folder"),
        (b"..", "it means a folder"),
        (b"/", "/ is not allowed in it"),
        (b"../etc/passwd", "/ is not allowed in it"),
        (b"a\\b", "\\\\ is not allowed in it"),
        (b"a\0", "\\x00 is not allowed in it"),
        (b"\x1f", "\\x1f is not allowed in it"),
        (b"a\n", "\\x0a is not allowed in it"),
        (b"\x7f", "\\x7f is not allowed in it"),
        ("\x80".encode(), "\\x80 is not allowed in it"),
        ("\x9f".encode(), "\\x9f is not allowed in it"),
        (b"\xff", "it is not UTF-8"),
        (b"\xc3", "it is not UTF-8"),
        (b"\xc0\xaf", "it is not UTF-8"),  # a slash in two bytes
        (b"\xed\xa0\x80", "it is not UTF-8"),  # a surrogate
        (b"\xf4\x90\x80\x80", "it is not UTF-8"),  # beyond U+10FFFF
    ],
)
def test_an_unlawful_name_is_refused_with_its_fault(raw: bytes, fault: str) -> None:
    with pytest.raises(InvalidName) as caught:
        decode(raw)
    assert caught.value.text == f"not a name for a file: {fault}; use another"
    assert caught.value.subject == escape(raw, keep=" ")


@pytest.mark.parametrize("char", ["a", "é", "€", "😀"])
def test_the_length_that_counts_is_that_of_the_bytes(char: str) -> None:
    width = len(char.encode())
    longest = (char * (MAX_NAME_BYTES // width)).ljust(MAX_NAME_BYTES // width, "a")
    longest += "a" * (MAX_NAME_BYTES - len(longest.encode()))
    assert len(longest.encode()) == 255
    assert decode(longest.encode()) == longest
    assert encode(longest) == longest.encode()
    for refused in (longest + "a", char * (255 // width + 1)):
        with pytest.raises(InvalidName, match=r"25[6-9] bytes, not 1 to 255"):
            decode(refused.encode())
        with pytest.raises(InvalidName, match=r"25[6-9] bytes, not 1 to 255"):
            encode(refused)


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_name_is_refused_only_where_the_file_system_reserves_it(name: str) -> None:
    assert decode(name.encode(), windows=False) == name
    assert encode(name, windows=False) == name.encode()
    for across in (lambda: decode(name.encode(), windows=True), lambda: encode(name, windows=True)):
        with pytest.raises(InvalidName, match="this file system reserves it"):
            across()


@pytest.mark.parametrize(
    "name", ["console", "com", "com10", "lpt", "con-1", "a.con", ".con", "nulx.txt", "x.y z"]
)
def test_a_name_that_only_looks_reserved_is_lawful_everywhere(name: str) -> None:
    assert decode(name.encode(), windows=True) == name


def test_the_plain_rules_hold_where_names_are_reserved_too() -> None:
    for raw in (b"", b"..", b"a/b", b"a\\b", b"\xff"):
        with pytest.raises(InvalidName):
            decode(raw, windows=True)


def test_unless_told_otherwise_the_rules_are_those_of_this_system() -> None:
    if os.name == "nt":
        with pytest.raises(InvalidName):
            decode(b"con")
    else:
        assert encode(decode(b"con")) == b"con"


def test_whatever_the_bytes_the_rule_decides_and_lawful_names_come_back() -> None:
    lawful = 0
    for raw in random_names(4000):
        if is_lawful(raw):
            lawful += 1
            assert encode(decode(raw, windows=False), windows=False) == raw
        else:
            with pytest.raises(InvalidName):
                decode(raw, windows=False)
    assert 500 < lawful < 3500  # both kinds were among them


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], []),
        (["a"], [b"a"]),
        (["b", "a", "two words", ".hidden", "~", "-rf"], None),  # all, in their order
        (["a", "é", "b"], None),
        (["a", "a\\b", "b"], [b"a", b"b"]),
        (["a", "new\nline"], [b"a"]),
        (["\x7f", "a"], [b"a"]),
        (["\x9b31m", "a", "\xa0"], [b"a", "\xa0".encode()]),
        (["\udcff", "a", "\udcc3\udca9"], [b"a", "é".encode()]),  # bytes that are no UTF-8 here
        (["\udcff"], []),
        (["\\"], []),
        ([os.fsdecode(b"n" * 255), "a"], None),
    ],
)
def test_of_a_folders_entries_those_with_a_lawful_name_are_left(
    found: List[str], expected: Optional[List[bytes]]
) -> None:
    assert lawful(found) == ([name.encode() for name in found] if expected is None else expected)


def test_whatever_the_entries_what_is_left_is_what_the_rule_leaves() -> None:
    chance = random.Random(20240301)
    possible = [raw for raw in random_names(2000) if raw and b"/" not in raw and b"\0" not in raw]
    possible = [raw for raw in possible if len(raw) <= 255 and raw not in (b".", b"..")]
    plain = [raw for raw in possible if raw.isascii() and raw.decode().isprintable()]
    for _ in range(300):
        raws = chance.sample(chance.choice([possible, plain]), 5)
        expected = [raw for raw in raws if is_lawful(raw)]
        assert lawful([os.fsdecode(raw) for raw in raws]) == expected


class Windows:
    """The module ``os`` as it is there, as far as its name goes."""

    name = "nt"
    fsencode = staticmethod(os.fsencode)


def test_where_names_are_reserved_each_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: List[bytes] = []

    def look(raw: bytes) -> bool:
        looked_at.append(raw)
        return raw != b"con"

    monkeypatch.setattr(names, "os", Windows())
    monkeypatch.setattr(names, "_is_lawful", look)
    assert lawful(["a", "con", "b"]) == [b"a", b"b"]
    assert looked_at == [b"a", b"con", b"b"]


@pytest.mark.parametrize("name", [chr(0xD800), "a\udfff", "\udcff", "\udc80\ud800"])
def test_a_str_with_a_lone_surrogate_is_no_name(name: str) -> None:
    with pytest.raises(InvalidName, match="it is not UTF-8"):
        encode(name)


def test_an_argument_that_python_could_not_decode_still_spells_its_name() -> None:
    # In the C locale an argument arrives as surrogate escapes of its bytes.
    assert encode("caf\udcc3\udca9") == "café".encode()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a", "a"),
        ("./a", "a"),
        ("folder/a.txt", "a.txt"),
        ("/folder/.hidden", ".hidden"),
        ("folder/a/", "a"),
        ("folder/other/..", "folder"),
        ("folder/ a ", " a "),
        (Path("folder") / "a", "a"),
    ],
)
def test_a_file_is_backed_up_under_the_last_part_of_its_path(path: Path, name: str) -> None:
    assert of_path(path) == name


@pytest.mark.parametrize("path", ["", ".", "/", "..", "a/.."])
def test_a_path_without_a_last_part_has_no_name(path: str) -> None:
    with pytest.raises(InvalidName):
        encode(of_path(path))


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (b"mmn14.pdf", "mmn14.pdf"),
        ("שלום 日本語".encode(), "שלום\\x20日本語"),
        (b"a b", "a\\x20b"),
        (b"a status=210", "a\\x20status=210"),
        (b"a\n[SERVER] Listening", "a\\x0a[SERVER]\\x20Listening"),
        (b"\r", "\\x0d"),
        (b"\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m".encode(), "\\x9b31m"),
        ("\u0085\u2028\u2029".encode(), "\\x85\\u2028\\u2029"),
        ("\u00a0\u3000".encode(), "\\xa0\\u3000"),
        ("\u202etxt.exe".encode(), "\\u202etxt.exe"),
        ("\u2066\u200b\ufeff".encode(), "\\u2066\\u200b\\ufeff"),
        ("\U000e0041".encode(), "\\U000e0041"),
        (b"\\x1b", "\\\\x1b"),
        (b"\xff\xc3", "\\xff\\xc3"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
        (b"\0", "\\x00"),
        (b"", ""),
    ],
)
def test_escape_lets_a_name_neither_forge_nor_colour_a_line(raw: bytes, shown: str) -> None:
    assert escape(raw) == shown


def test_escape_keeps_what_it_is_told_to_keep() -> None:
    assert escape(b"a b\\c\n", keep=" ") == "a b\\\\c\\x0a"
    assert escape(b"a b\\c\n", keep=" \\") == "a b\\c\\x0a"


def test_whatever_the_bytes_what_escape_shows_is_one_printable_word() -> None:
    for raw in random_names(2000):
        shown = escape(raw)
        assert shown.isprintable()
        assert shown.split() == ([shown] if raw else [])
        shown.encode()  # no surrogate is left in it


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("my file.txt", "my file.txt"),
        ("a\nb", "a\\x0ab"),
        ("C:\\a", "C:\\\\a"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\xed\\xa0\\x80"),
    ],
)
def test_show_leaves_spaces_and_escapes_the_rest(text: str, shown: str) -> None:
    assert show(text) == shown


def test_a_name_in_a_message_is_escaped_and_no_longer_than_a_name_may_be() -> None:
    assert brief(b"a b\x1b") == "a b\\x1b"
    assert brief(b"n" * MAX_NAME_BYTES) == "n" * MAX_NAME_BYTES
    assert brief(b"n" * 0xFFFF) == "n" * MAX_NAME_BYTES + "..."
    with pytest.raises(InvalidName) as caught:
        decode(b"\n" * 0xFFFF)
    assert caught.value.subject == "\\x0a" * MAX_NAME_BYTES + "..."
