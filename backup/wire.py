"""Bytes ↔ values of the wire protocol, version 1 (docs/PROTOCOL.md), and nothing else.

Rules: all integers are unsigned and little-endian. A request is a header, the
filename and, for BACKUP, a size; a response is a header, which holds the size,
and the filename. The payload follows either and is not this room's concern,
but for the payload of LIST. Names stay bytes here: an answer echoes what was
asked, lawful or not.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Iterable, List, NamedTuple

from .errors import BackupError, InvalidName, ProtocolError
from .names import MAX_NAME_BYTES, decode

VERSION = 1
MAX_USER_ID = 2**32 - 1
MAX_SIZE = 2**32 - 1
MAX_FILE_BYTES = MAX_SIZE - 4  # RETRIEVE puts four bytes of size before the file

REQUEST_HEADER = struct.Struct("<IBBH")
RESPONSE_HEADER = struct.Struct("<BHHI")
SIZE = struct.Struct("<I")
NAME_LENGTH = struct.Struct("<H")


class Op(IntEnum):
    """The four operations."""

    BACKUP = 100
    RETRIEVE = 200
    DELETE = 201
    LIST = 202


class Status(IntEnum):
    """What an answer says."""

    STORED = 210
    DELETED = 211
    FOUND = 212
    FAILED = 1001
    NOT_DELETED = 1002
    NOT_FOUND = 1003


class Request(NamedTuple):
    """One request without its payload; ``op`` is whatever the peer sent, ``size`` in bytes."""

    user_id: int
    version: int
    op: int
    name: bytes
    size: int = 0


class Response(NamedTuple):
    """One answer without its payload of ``size`` bytes; ``status`` is whatever the peer sent."""

    version: int
    status: int
    name: bytes
    size: int = 0


def encode_request(request: Request) -> bytes:
    """Header, filename and, for BACKUP, the size."""
    head = REQUEST_HEADER.pack(request.user_id, request.version, request.op, len(request.name))
    size = SIZE.pack(request.size) if request.op == Op.BACKUP else b""
    return head + request.name + size


def encode_response(response: Response) -> bytes:
    """Header and filename; the payload comes behind it."""
    name = response.name
    head = RESPONSE_HEADER.pack(response.version, response.status, len(name), response.size)
    return head + name


def failure_status(op: int, error: BackupError) -> int:
    """What a request of this op that ended in this error is answered (the answers' table).

    Only RETRIEVE tells one failure from another.
    """
    if op == Op.DELETE:
        return Status.NOT_DELETED
    return error.status if op == Op.RETRIEVE else Status.FAILED


def listing_size(count: int, name_bytes: int) -> int:
    """The size in bytes of a LIST payload of ``count`` names that have so many bytes together."""
    return SIZE.size + count * NAME_LENGTH.size + name_bytes


def encode_names(names: Iterable[bytes]) -> bytes:
    """Names as they stand in the payload of LIST: each behind its length."""
    length = NAME_LENGTH.pack
    return b"".join([length(len(name)) + name for name in names])


def encode_listing(names: Iterable[bytes]) -> bytes:
    """The payload of LIST: count, then the names, sorted by bytes."""
    ordered = sorted(names)
    return SIZE.pack(len(ordered)) + encode_names(ordered)


def check_count(count: int, size: int) -> None:
    """Refuses a LIST payload of ``size`` bytes that cannot hold ``count`` lawful names.

    The first four bytes tell, so that a listing that lies need not be received.
    Raises ``ProtocolError``.
    """
    if size < listing_size(count, count):
        raise ProtocolError(f"a listing of {size} bytes ends before the names it counts")
    most = listing_size(count, count * MAX_NAME_BYTES)
    if size > most:
        raise ProtocolError(f"at least {size - most} bytes follow the last name of a listing")


def decode_listing(payload: bytes) -> List[str]:
    """The names in a payload of LIST, in the order sent.

    Raises ``ProtocolError`` when count, lengths and payload do not agree, or a
    name breaks the rule of names.
    """
    try:
        (count,) = SIZE.unpack_from(payload)
        offset = SIZE.size
        names = []
        for _ in range(count):
            (length,) = NAME_LENGTH.unpack_from(payload, offset)
            offset += NAME_LENGTH.size
            raw = payload[offset : offset + length]
            if len(raw) < length:
                raise ProtocolError(f"a listed name of {length} bytes passes the payload's end")
            # What another system could hold is lawful here, though this one may not store it.
            names.append(decode(raw, windows=False))
            offset += length
    except struct.error:
        raise ProtocolError(
            f"a listing of {len(payload)} bytes ends before the names it counts"
        ) from None
    except InvalidName as error:
        raise ProtocolError(f"the server lists {error.subject!r}, which is no name") from None
    if offset != len(payload):
        raise ProtocolError(f"{len(payload) - offset} bytes follow the last name of a listing")
    return names
