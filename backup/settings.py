"""Every tunable, in one place, with its unit and why it has the default it has."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Optional

from .errors import ConfigError

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Settings:
    """The tunables of both ends; make another with ``dataclasses.replace``.

    Bytes and seconds throughout. A cap is None, for none, or at least 1: raises ``ConfigError``.
    """

    scratch_bytes: int = 256 * KIB
    """The one receive buffer of a reactor, which all its connections share."""

    turn_bytes: int = 512 * KIB
    """What one connection may receive or send before the others have their turn."""

    backlog: int = 1024
    """Connections the kernel keeps for the server until it accepts them."""

    accepts_per_turn: int = 64
    """Connections the server accepts, and serves as far as they have come, in one turn."""

    fsync: bool = True
    """Whether an answer to BACKUP or DELETE waits until the disk has what it says."""

    commit_files: int = 64
    """Changes that are made durable together at the end of a turn; more wait for the next turn."""

    write_back_bytes: int = 1 * MIB
    """An upload that has grown by this much has the system begin to write it to the disk."""

    sync_seconds: float = 0.01
    """How long one piece of a long upload should keep the disk, and so the loop, busy."""

    sync_bytes: int = 32 * MIB
    """The largest piece of an upload that may wait to be made durable; a slow disk gets less."""

    reclaim_bytes: int = 4 * MIB
    """A file larger than this that is replaced or removed is freed by so much at a time."""

    small_bytes: int = 64 * KIB
    """A stored file of up to this size is read and leaves with the answer's fields, in one send."""

    listing_names: int = 1024
    """Names of a LIST that are read, sorted or sent at once."""

    turn_seconds: float = 0.002
    """How long the pieces of work that are put off to a turn's end may take, all together."""

    accept_pause_seconds: float = 0.1
    """How long the listener rests when the system is out of descriptors."""

    header_seconds: float = 10.0
    """Header and filename must have come this long after the connection, at the server; and at the
    client, so long after their first byte."""

    idle_seconds: float = 60.0
    """After that, the longest time in which not one byte moves, on either end."""

    min_rate_bytes: int = 1 * KIB
    """The fewest bytes a second of a payload, on average over ``rate_seconds``, on either end."""

    rate_seconds: float = 30.0
    """How long a payload may be slower than that before it is given up."""

    linger_seconds: float = 30.0
    """How long the server discards what comes after its answer, until the client closes."""

    max_connections: Optional[int] = None
    """Connections that are served at once; None is as many as there are descriptors for."""

    max_connections_per_address: Optional[int] = None
    """The same of one address; more are closed at once. None is no cap, here and below."""

    max_file_bytes: Optional[int] = None
    """The largest file that is taken."""

    user_bytes: Optional[int] = None
    """What one user may hold, in bytes."""

    user_files: Optional[int] = None
    """And in files."""

    total_bytes: Optional[int] = None
    """What all users together may hold, in bytes."""

    min_free_bytes: Optional[int] = None
    """Bytes that must stay free on the store's disk."""

    append_only: bool = False
    """Whether nothing that is stored may be replaced or removed."""

    drain_seconds: float = 10.0
    """How long running requests may go on after the server was told to stop."""

    connect_seconds: float = 10.0
    """How long the client waits for a connection to one address."""

    farewell_seconds: float = 1.0
    """How long the client waits, after a whole answer, for the server to close; and a server that
    was told to stop, after its answer, for the client."""

    parallel: int = 8
    """Requests the client has in flight at once, unless it is told otherwise."""

    max_listing_bytes: int = 64 * MIB
    """The largest LIST answer that the client takes; it is held in memory."""

    max_listing_names: int = 1024 * KIB
    """The most names in it; as text they take up to 20 times the room they had on the wire."""

    stale_seconds: float = 24 * 3600.0
    """Where files cannot be locked: the age from which a temporary file counts as left behind."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is None and value is not None and value < 1:
                raise ConfigError(
                    f"{field.name}={value} is no cap; take 1 or more, or None for none"
                )
