"""What a file may be called, and how a stranger's name is shown.

Rules (docs/PROTOCOL.md, "Names"): 1 to 255 bytes of valid UTF-8; not ``.`` or
``..``; no ``/``, ``\\``, NUL or control character (C0, DEL, C1). Where the file
system forbids more, that too. On the wire and on disk a name is bytes; in
between it is ``str``. ``decode`` and ``encode`` are the only ways across, so a
``str`` that came through here is safe to open inside a user's folder.

Nothing a peer sends is printed raw: ``escape`` first.
"""

from __future__ import annotations

import os
import re
from typing import List, Union

from .errors import InvalidName

MAX_NAME_BYTES = 255

# Printable ASCII without / and \: what most names are, told at once.
_PLAIN = re.compile(rb"[ -.0-\[\]-~]{1,%d}" % MAX_NAME_BYTES).fullmatch
_PLAIN_ENTRIES = re.compile(r"[ -\[\]-~]*").fullmatch  # a file system has its own bound of length

_FORBIDDEN = re.compile("[/\\\\\x00-\x1f\x7f-\x9f]")

# https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_WINDOWS_FORBIDDEN = re.compile('[<>:"|?*]|[. ]$')
_WINDOWS_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\..*)?$", re.IGNORECASE
)


def decode(raw: bytes, windows: bool = os.name == "nt") -> str:
    """The name that these bytes of the wire spell.

    ``windows`` adds the rules of file systems that reserve device names.
    Raises ``InvalidName`` when they break the rule.
    """
    if _PLAIN(raw) and not windows and raw not in (b".", b".."):
        return raw.decode("ascii")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _invalid(raw, "it is not UTF-8") from None
    fault = _fault(name, len(raw), windows)
    if fault:
        raise _invalid(raw, fault)
    return name


def lawful(found: List[str]) -> List[bytes]:
    """Those of a folder's entries that have a lawful name, as bytes; the rest is left out."""
    # The separator is in no entry's name, so one look at all of them is as good as one at each:
    # it took a third off a LIST of ten names.
    together = "/".join(found)
    if _PLAIN_ENTRIES(together) and os.name != "nt":
        return together.encode("ascii").split(b"/") if found else []
    return [raw for raw in map(os.fsencode, found) if _is_lawful(raw)]


def _is_lawful(raw: bytes) -> bool:
    try:
        decode(raw)
    except InvalidName:
        return False
    return True


def encode(name: str, windows: bool = os.name == "nt") -> bytes:
    """The bytes of a name, for the wire or the disk.

    Raises ``InvalidName`` when it breaks the rule.
    """
    raw = _bytes(name)
    decode(raw, windows)
    return raw


def of_path(path: Union[str, os.PathLike[str]]) -> str:
    """The name that a local file is backed up under: the last part of its path."""
    return os.path.basename(os.path.normpath(os.fspath(path)))


def _invalid(raw: bytes, fault: str) -> InvalidName:
    return InvalidName(f"not a name for a file: {fault}; use another", brief(raw))


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "surrogatepass")


def _fault(name: str, length: int, windows: bool) -> str:
    if not 1 <= length <= MAX_NAME_BYTES:
        return f"{length} bytes, not 1 to {MAX_NAME_BYTES}"
    if name in (".", ".."):
        return "it means a folder"
    found = _FORBIDDEN.search(name)
    if found:
        return f"{escape(found.group().encode())} is not allowed in it"
    if windows and (_WINDOWS_FORBIDDEN.search(name) or _WINDOWS_DEVICE.match(name)):
        return "this file system reserves it"
    return ""


def escape(raw: bytes, keep: str = "") -> str:
    r"""Bytes a peer chose, as text that can neither forge nor colour a line.

    Printable characters stay; everything else, and the space and the backslash
    unless ``keep`` names them, becomes ``\x1b``, ``\u202e`` or ``\\``, so that a
    field of a log line ends where the log says it does.
    """
    if _PLAIN(raw) and (b" " not in raw or " " in keep):
        return raw.decode("ascii")
    return "".join(
        char if (char.isprintable() and char not in " \\") or char in keep else _escaped(char)
        for char in raw.decode("utf-8", "surrogateescape")
    )


def brief(raw: bytes) -> str:
    """What a peer sent for a name, for a message: escaped, and no longer than a name may be."""
    more = "..." if len(raw) > MAX_NAME_BYTES else ""
    return escape(raw[:MAX_NAME_BYTES], keep=" ") + more


def _escaped(char: str) -> str:
    code = ord(char)
    if char == "\\":
        return "\\\\"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as surrogateescape holds it
        code -= 0xDC00
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def show(text: str) -> str:
    """A name or path as a person reads it in a message: spaces stay, the rest is escaped."""
    return escape(_bytes(text), keep=" ")
