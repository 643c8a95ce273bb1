"""Messages as peers may send them, lawful or not, and what docs/PROTOCOL.md says of them.

Rules: nothing here comes from the package. The layouts and the rules are spelled out anew from
the document, in the plainest way there is, on a message that is there as a whole.
"""

from __future__ import annotations

import struct
from typing import List, NamedTuple, Optional, Tuple

from .choices import Choices

BACKUP, RETRIEVE, DELETE, LIST = OPS = (100, 200, 201, 202)
SUCCESS = {BACKUP: 210, RETRIEVE: 212, DELETE: 211, LIST: 212}
FAILURES = {BACKUP: {1001}, RETRIEVE: {1001, 1003}, DELETE: {1002}, LIST: {1001}}
MAX_FILE_BYTES = 2**32 - 5

USERS = (11, 0, 2**32 - 1)
NAMES = (b"a", b"b", "é\u202e".encode(), b"n" * 255)
BAD_NAMES = (b"", b".", b"..", b"../a", b"a\\b", b"a\n", b"\x00", b"\xc2\x80", b"\xff", b"n" * 256)


def request(
    user: int,
    op: int,
    name: bytes,
    content: Optional[bytes] = None,
    size: int = -1,
    version: int = 1,
) -> bytes:
    """A request; ``size`` announces another number of bytes than ``content`` has."""
    head = struct.pack("<IBBH", user, version, op, len(name)) + name
    if content is None:
        return head
    return head + struct.pack("<I", len(content) if size < 0 else size) + content


def response(
    status: int, name: bytes, payload: bytes = b"", size: int = -1, version: int = 1
) -> bytes:
    """A response; ``size`` announces another number of bytes than ``payload`` has."""
    announced = len(payload) if size < 0 else size
    return struct.pack("<BHHI", version, status, len(name), announced) + name + payload


def lawful(name: bytes) -> bool:
    """The rule of names."""
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    if not 1 <= len(name) <= 255 or text in (".", ".."):
        return False
    return not any(char in "/\\" or ord(char) < 32 or 127 <= ord(char) < 160 for char in text)


class Call(NamedTuple):
    """What a peer asks for with the bytes that it has sent."""

    user: int
    op: int
    name: bytes
    content: bytes  # of a whole BACKUP
    refused: int  # the status, whatever the store holds; 0 for none


def call(sent: bytes, ended: bool) -> Optional[Call]:
    """What is to be answered to ``sent``; None for nothing, or nothing yet.

    ``ended``: the peer has ended its side.
    """
    if len(sent) < 8:
        return None
    user, _, op, length = struct.unpack_from("<IBBH", sent)
    name, rest = sent[8 : 8 + length], sent[8 + length :]
    if len(name) < length:
        return None
    if op not in OPS:
        return Call(user, op, name, b"", 1001)
    if op == LIST:
        return Call(user, op, b"", b"", 0)
    if op != BACKUP:
        return Call(user, op, name, b"", 0 if lawful(name) else {RETRIEVE: 1003, DELETE: 1002}[op])
    refused = Call(user, op, name, b"", 1001)
    if len(rest) < 4:
        return refused if ended else None
    (size,) = struct.unpack_from("<I", rest)
    if not lawful(name) or not 1 <= size <= MAX_FILE_BYTES:
        return refused
    content = rest[4 : 4 + size]
    if len(content) < size:
        return refused if ended else None
    return Call(user, op, name, content, 0)


def listed(payload: bytes) -> Optional[List[bytes]]:
    """The names in a payload of LIST, in the order sent; None if it is not one."""
    if len(payload) < 4:
        return None
    (count,), rest = struct.unpack_from("<I", payload), payload[4:]
    names: List[bytes] = []
    while rest and len(names) < count:
        if len(rest) < 2:
            return None
        (length,) = struct.unpack_from("<H", rest)
        name, rest = rest[2 : 2 + length], rest[2 + length :]
        if len(name) < length or not lawful(name):
            return None
        names.append(name)
    return names if len(names) == count and not rest else None


def listing(names: List[bytes], count: int = -1) -> bytes:
    """A payload of LIST; ``count`` lets it lie."""
    head = struct.pack("<I", len(names) if count < 0 else count)
    return head + b"".join(struct.pack("<H", len(name)) + name for name in names)


# Drawn


def a_name(choices: Choices) -> bytes:
    if choices.once_in(8):
        return choices.pick(BAD_NAMES)
    return choices.pick(NAMES) if choices.once_in(3) else choices.pick(NAMES[:2])


def a_user(choices: Choices) -> int:
    return choices.pick(USERS) if choices.once_in(4) else USERS[0]


def a_size(choices: Choices, length: int) -> int:
    """What a message announces for ``length`` bytes: the truth, mostly."""
    if not choices.once_in(8):
        return length
    return choices.pick((length + 1, max(length - 1, 0), 0, 1, 2**31, 2**32 - 4, 2**32 - 1))


def a_request(choices: Choices, large: int = 0) -> bytes:
    """A request, mostly a lawful one; ``large``: now and then with so many bytes of content."""
    op = choices.pick((*OPS, BACKUP, BACKUP)) if choices.integer(0, 9) else choices.integer(0, 255)
    version = choices.integer(0, 255) if choices.once_in(12) else 1
    user, name = a_user(choices), a_name(choices)
    if op != BACKUP:
        return request(user, op, name if op != LIST or choices.once_in(4) else b"", version=version)
    content = choices.data(200)
    if large and choices.once_in(6):
        content = (content or b"x") * (large // max(len(content), 1))
    return request(user, op, name, content, a_size(choices, len(content)), version)


def mutated(choices: Choices, data: bytes) -> bytes:
    """The same, mostly; or with something changed, cut out, put in or cut off."""
    kind = choices.integer(0, 11)
    if kind < 6:
        return data
    at = choices.integer(0, len(data))
    if kind == 6:
        return data[:at]
    if kind == 7:
        return data + choices.data(40)
    if kind == 8:
        return data[:at] + bytes([choices.integer(0, 255)]) + data[at + 1 :]
    if kind == 9:
        return data[:at] + choices.data(8) + data[at:]
    if kind == 10:
        return data[:at] + data[at + choices.integer(1, 8) :]
    return choices.data(60)


def cuts(choices: Choices, length: int, most: int = 4) -> Tuple[int, ...]:
    """How many bytes the pieces of a message have; together ``length``."""
    places = sorted(choices.integer(0, length) for _ in range(choices.integer(0, most)))
    edges = [0, *places, length]
    return tuple(end - start for start, end in zip(edges, edges[1:]) if end > start)
