"""What users write down once: info files, environment variables, the kept user id.

Rules: whatever is missing or malformed is a ``ConfigError`` that names the file
or variable, the line, and what was expected there. An option beats a variable,
a variable beats a file.
"""

from __future__ import annotations

import os
import random
import re
from contextlib import suppress
from typing import Dict, Iterable, List, Mapping, NamedTuple, Optional, Tuple

from .address import EXPECTED, Address, parse
from .errors import ConfigError
from .files import name_new
from .names import of_path, show
from .wire import MAX_USER_ID

SERVER_INFO = "server.info"
BACKUP_INFO = "backup.info"
DEFAULT_ROOT = "backupsvr"


class UserId(NamedTuple):
    """A user id, and the file it was just drawn for, if it was."""

    value: int
    kept_in: Optional[str] = None


def read_server_info(path: str = SERVER_INFO) -> Address:
    """The address in an info file: one line, ``HOST:PORT``. Raises ``ConfigError``."""
    lines = _lines(path, "make it with one line HOST:PORT, for example 127.0.0.1:1234")
    if not lines:
        raise ConfigError(f"{show(path)}: it is empty; {EXPECTED}")
    number, text = lines[0]
    if len(lines) > 1:
        raise ConfigError(f"{show(path)}, line {lines[1][0]}: only one line is expected; remove it")
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{show(path)}, line {number}: {error.text}") from None


def read_backup_info(path: str = BACKUP_INFO) -> List[str]:
    """The paths in an info file, one a line, relative to the file's own folder.

    Raises ``ConfigError`` when it cannot be read, names fewer than two files, or
    two of one base name, which would become one file on the server.
    """
    lines = _lines(path, "make it with one file a line, two or more")
    folder = os.path.dirname(path)
    files = [os.path.join(folder, text) for _, text in lines]
    if len(files) < 2:
        raise ConfigError(f"{show(path)}: it names {len(files)} files; expected two, one a line")
    check_distinct(files, show(path))
    return files


def read_file_list(path: str) -> List[str]:
    """The paths in a file of paths, one a line, relative to the current folder.

    ``-`` is standard input. Raises ``ConfigError``.
    """
    return [line for _, line in _lines(path, "name a file with one path a line", "surrogateescape")]


def check_distinct(paths: Iterable[str], where: str) -> None:
    """Raises ``ConfigError`` when two paths have one base name, so one name on the server."""
    seen: Dict[str, str] = {}
    for path in paths:
        name = of_path(path)
        if name in seen:
            both = f"{show(seen[name])} and {show(path)}"
            raise ConfigError(f"{where}: {both} have one base name; send them apart or rename one")
        seen[name] = path


def check_folder(path: str) -> None:
    """Raises ``ConfigError`` when what is retrieved cannot go there; empty stands for here."""
    if path and not os.path.isdir(path):
        raise ConfigError(f"--output-dir: {show(path)} is not a folder; make it first")


def server_address(option: Optional[str], environ: Mapping[str, str]) -> Address:
    """The server to talk to: the option, ``BACKUP_SERVER``, or ``server.info`` here."""
    if option is not None:
        return _named("--server", option)
    variable = environ.get("BACKUP_SERVER")
    if variable:
        return _named("BACKUP_SERVER", variable)
    if not os.path.exists(SERVER_INFO):
        raise ConfigError(
            "no server given: use --server HOST:PORT, set BACKUP_SERVER"
            f" or write it into {SERVER_INFO} here"
        )
    return read_server_info()


def listen_address(option: Optional[str], server_info: str) -> Address:
    """The address to listen on: the option, or the info file."""
    return read_server_info(server_info) if option is None else _named("--listen", option)


def store_root(option: Optional[str], environ: Mapping[str, str]) -> str:
    """The store's root: the option, ``BACKUP_BASE_DIR``, or ``backupsvr`` here.

    Raises ``ConfigError`` for an option that is empty.
    """
    if option == "":
        raise ConfigError("--root is empty; name a folder")
    return option or environ.get("BACKUP_BASE_DIR") or DEFAULT_ROOT


def parse_user_id(text: str, where: str) -> int:
    """A user id in decimal. Raises ``ConfigError`` that names ``where`` it stood."""
    text = text.strip()
    if not re.fullmatch("[0-9]{1,10}", text) or int(text) > MAX_USER_ID:
        raise ConfigError(f"{where}: '{show(text)}' is not a user id; expected 0 to {MAX_USER_ID}")
    return int(text)


def draw_user_id() -> int:
    """A random user id, never 0."""
    return random.SystemRandom().randint(1, MAX_USER_ID)


def user_id(option: Optional[str], environ: Mapping[str, str]) -> UserId:
    """The user to act as: the option, ``BACKUP_USER_ID``, or an id drawn once and kept.

    It is kept in ``$XDG_CONFIG_HOME/backup/user-id`` (XDG Base Directory
    Specification: by default ``~/.config``). Raises ``ConfigError``.
    """
    if option is not None:
        return UserId(parse_user_id(option, "--user-id"))
    if environ.get("BACKUP_USER_ID"):
        return UserId(parse_user_id(environ["BACKUP_USER_ID"], "BACKUP_USER_ID"))
    base = environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(base):  # the specification: such a path is invalid and to be ignored
        base = os.path.join(os.path.expanduser("~"), ".config")
    path = os.path.join(base, "backup", "user-id")
    try:
        drawn = None if os.path.exists(path) else _keep(path, draw_user_id())
        with open(path, encoding="ascii", errors="replace") as file:
            return UserId(parse_user_id(file.read(), show(path)), drawn)
    except OSError as error:
        raise ConfigError(
            f"cannot keep a user id in {show(path)}: {error.strerror}; use --user-id N"
        ) from error


def _keep(path: str, value: int) -> str:
    """Writes a new id where none is yet, whole or not at all; where it is kept."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.{os.getpid()}"
    try:
        with open(part, "w", encoding="ascii") as file:
            os.chmod(part, 0o600)  # it is all that tells users apart
            file.write(f"{value}\n")
        with suppress(FileExistsError):  # another process drew first: its id counts
            name_new(part, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(part)
    return path


def _named(source: str, text: str) -> Address:
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.text}") from None


def _lines(path: str, advice: str, errors: str = "strict") -> List[Tuple[int, str]]:
    """The lines that are not blank, with their numbers; ``errors`` as ``bytes.decode`` has it."""
    from_stdin = path == "-"
    where = "stdin" if from_stdin else show(path)
    try:
        with open(0 if from_stdin else path, "rb", closefd=not from_stdin) as file:
            text = file.read().decode("utf-8-sig", errors)
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: it is not UTF-8 text; {advice}") from None
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"cannot read {where}: {reason}; {advice}") from error
    # Not splitlines: a name may hold U+2028.
    numbered = enumerate((line.rstrip("\r") for line in text.split("\n")), 1)
    return [(number, line) for number, line in numbered if line.strip()]
