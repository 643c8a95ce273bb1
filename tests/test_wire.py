"""Each layout against literal bytes, and a listing that lies against every check there is."""

from __future__ import annotations

import struct
from typing import List, Type

import pytest

from backup import errors
from backup.errors import BackupError, InvalidName, NotFound, ProtocolError
from backup.wire import (
    MAX_FILE_BYTES,
    MAX_SIZE,
    MAX_USER_ID,
    VERSION,
    Op,
    Request,
    Response,
    Status,
    check_count,
    decode_listing,
    encode_listing,
    encode_names,
    encode_request,
    encode_response,
    failure_status,
    listing_size,
)

EVERY_ERROR = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BackupError)
]
UNKNOWN_OPS = [0, 99, 101, 203, 255]


def listing(hexadecimal: str) -> List[str]:
    return decode_listing(bytes.fromhex(hexadecimal))


@pytest.mark.parametrize(
    ("request_", "hexadecimal"),
    [
        (Request(11, 1, Op.BACKUP, b"a", 3), "0b000000 01 64 0100 61 03000000"),
        (Request(11, 1, Op.RETRIEVE, b"a"), "0b000000 01 c8 0100 61"),
        (Request(11, 1, Op.DELETE, b"a"), "0b000000 01 c9 0100 61"),
        (Request(11, 1, Op.LIST, b""), "0b000000 01 ca 0000"),
        (Request(0, 1, Op.BACKUP, b"", 0), "00000000 01 64 0000 00000000"),
        (Request(0x12345678, 7, 9, b"ab", 5), "78563412 07 09 0200 6162"),
        (Request(MAX_USER_ID, 255, 255, b"\xff"), "ffffffff ff ff 0100 ff"),
        (
            Request(1, VERSION, Op.BACKUP, b"n" * 0x102, MAX_SIZE),
            "01000000 01 64 0201" + "6e" * 0x102 + "ffffffff",
        ),
    ],
)
def test_a_request_is_header_name_and_for_backup_a_size(
    request_: Request, hexadecimal: str
) -> None:
    assert encode_request(request_) == bytes.fromhex(hexadecimal)


@pytest.mark.parametrize(
    ("response", "hexadecimal"),
    [
        (Response(1, Status.STORED, b"a"), "01 d200 0100 00000000 61"),
        (Response(1, Status.DELETED, b"a"), "01 d300 0100 00000000 61"),
        (Response(1, Status.FOUND, b"a", 7), "01 d400 0100 07000000 61"),
        (Response(1, Status.FOUND, b"", 4), "01 d400 0000 04000000"),
        (Response(1, Status.FAILED, b"\xff/"), "01 e903 0200 00000000 ff2f"),
        (Response(1, Status.NOT_DELETED, b"a"), "01 ea03 0100 00000000 61"),
        (Response(1, Status.NOT_FOUND, b"a"), "01 eb03 0100 00000000 61"),
        (Response(255, 0xFFFF, b"a" * 0xFFFF, MAX_SIZE), "ff ffff ffff ffffffff" + "61" * 0xFFFF),
    ],
)
def test_a_response_is_header_with_the_size_and_name(response: Response, hexadecimal: str) -> None:
    assert encode_response(response) == bytes.fromhex(hexadecimal)


@pytest.mark.parametrize(
    "message",
    [
        Request(MAX_USER_ID + 1, 1, Op.LIST, b""),
        Request(-1, 1, Op.LIST, b""),
        Request(1, 1, 256, b""),
        Request(1, 1, Op.DELETE, b"n" * 0x10000),
        Request(1, 1, Op.BACKUP, b"n", MAX_SIZE + 1),
    ],
)
def test_what_does_not_fit_its_field_is_never_sent_as_something_else(message: Request) -> None:
    with pytest.raises(struct.error):
        encode_request(message)


def test_the_largest_file_is_the_one_whose_answer_still_has_a_size() -> None:
    assert MAX_FILE_BYTES == 2**32 - 5
    assert MAX_SIZE == 2**32 - 1


@pytest.mark.parametrize(
    ("names", "hexadecimal"),
    [
        ([], "00000000"),
        ([b"a"], "01000000 0100 61"),
        ([b"b", b"a", b"B"], "03000000 0100 42 0100 61 0100 62"),
        ([b"ab", b"a", b"\xc3\xa9", b"z"], "04000000 0100 61 0200 6162 0100 7a 0200 c3a9"),
        ([b"n" * 255], "01000000 ff00" + "6e" * 255),
    ],
)
def test_a_listing_counts_its_names_and_sorts_them_by_their_bytes(
    names: List[bytes], hexadecimal: str
) -> None:
    payload = bytes.fromhex(hexadecimal)
    assert encode_listing(iter(names)) == payload
    assert decode_listing(payload) == [name.decode() for name in sorted(names)]


@pytest.mark.parametrize(
    "names",
    [[], [b"a"], [b"b", b"a"], ["é".encode(), b"n" * 255, b"a b"], [b"%d" % n for n in range(999)]],
)
def test_a_listing_that_is_put_together_from_slices_is_the_same(names: List[bytes]) -> None:
    ordered = sorted(names)
    slices = [encode_names(iter(ordered[at : at + 10])) for at in range(0, len(ordered), 10)]
    payload = struct.pack("<I", len(names)) + b"".join(slices)
    assert payload == encode_listing(names)
    assert len(payload) == listing_size(len(names), sum(map(len, names)))
    assert decode_listing(payload) == [name.decode() for name in ordered]


def test_names_are_encoded_in_the_order_given_each_behind_its_length() -> None:
    assert encode_names([b"b", b"ac", b""]) == b"\1\0b" + b"\2\0ac" + b"\0\0"
    assert encode_names([b"n" * 0x102]) == b"\2\1" + b"n" * 0x102
    with pytest.raises(struct.error):
        encode_names([b"n" * 0x10000])


def test_a_listing_is_read_in_the_order_sent() -> None:
    assert listing("02000000 0100 62 0100 61") == ["b", "a"]


def test_a_listing_may_hold_names_that_this_file_system_reserves() -> None:
    assert listing("01000000 0300 636f6e") == ["con"]


@pytest.mark.parametrize(
    ("hexadecimal", "message"),
    [
        ("", "a listing of 0 bytes ends before the names it counts"),
        ("000000", "a listing of 3 bytes ends before the names it counts"),
        ("01000000", "a listing of 4 bytes ends before the names it counts"),
        ("01000000 01", "a listing of 5 bytes ends before the names it counts"),
        ("02000000 0100 61", "a listing of 7 bytes ends before the names it counts"),
        ("ffffffff 0100 61", "a listing of 7 bytes ends before the names it counts"),
        ("01000000 0100", "a listed name of 1 bytes passes the payload's end"),
        ("01000000 0300 6161", "a listed name of 3 bytes passes the payload's end"),
        ("02000000 0100 61 ffff 61", "a listed name of 65535 bytes passes the payload's end"),
        ("00000000 00", "1 bytes follow the last name of a listing"),
        ("01000000 0100 61 0100 62", "3 bytes follow the last name of a listing"),
    ],
)
def test_count_lengths_and_payload_must_agree(hexadecimal: str, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        listing(hexadecimal)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("count", "least", "most"), [(0, 4, 4), (1, 7, 261), (1 << 24, 4 + 3 * 2**24, 4 + 257 * 2**24)]
)
def test_so_many_names_have_so_many_bytes(count: int, least: int, most: int) -> None:
    check_count(count, least)
    check_count(count, most)
    text = f"^a listing of {least - 1} bytes ends before the names it counts$"
    with pytest.raises(ProtocolError, match=text):
        check_count(count, least - 1)
    text = "^at least 2 bytes follow the last name of a listing$"
    with pytest.raises(ProtocolError, match=text):
        check_count(count, most + 2)


@pytest.mark.parametrize("name", [b"", b".", b"..", b"../a", b"a\\b", b"\x1b[2J", b"\xff"])
def test_a_listed_name_that_breaks_the_rule_is_a_protocol_error(name: bytes) -> None:
    payload = struct.pack("<IH", 1, len(name)) + name
    with pytest.raises(ProtocolError, match=r"^the server lists ") as caught:
        decode_listing(payload)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", EVERY_ERROR)
def test_each_op_answers_a_failure_by_the_protocols_table(kind: Type[BackupError]) -> None:
    error = kind("it broke")
    assert failure_status(Op.BACKUP, error) == 1001
    assert failure_status(Op.DELETE, error) == 1002
    assert failure_status(Op.LIST, error) == 1001
    absent = kind in (NotFound, InvalidName)
    assert failure_status(Op.RETRIEVE, error) == (1003 if absent else 1001)


@pytest.mark.parametrize("op", UNKNOWN_OPS)
def test_an_unknown_op_is_answered_with_1001(op: int) -> None:
    assert failure_status(op, NotFound("it broke")) == 1001
