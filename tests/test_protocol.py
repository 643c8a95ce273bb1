"""However a message is cut, its parts are the same; every arrow of the table is taken by bytes."""

from __future__ import annotations

import random
import tracemalloc
from typing import Callable, Dict, Iterable, List, NamedTuple, Set, Tuple, Union

import pytest

from backup import protocol
from backup.protocol import (
    TRANSITIONS,
    Cut,
    Data,
    End,
    Event,
    Excess,
    Head,
    Part,
    Receiver,
    RequestReceiver,
    ResponseReceiver,
    State,
)
from backup.wire import Op, Request, Response
from tests.helpers import examples, file_payload, request, response

Arrow = Tuple[State, Event, State]
Joined = List[Union[Part, bytes]]
"""Parts in order, the data of neighbours joined, and likewise the lengths of excess."""


class Message(NamedTuple):
    """The bytes of one message, who receives it, and the parts that they make."""

    title: str
    receiver: Callable[[], Receiver]
    raw: bytes
    parts: Joined


def asked(title: str, raw: bytes, *fields: Union[int, bytes], payload: bytes = b"") -> Message:
    head = Head(Request(*fields))  # type: ignore[arg-type]
    return Message(title, RequestReceiver, raw, [head, *([payload] if payload else []), End()])


def answered(title: str, raw: bytes, *fields: Union[int, bytes], payload: bytes = b"") -> Message:
    head = Head(Response(*fields))  # type: ignore[arg-type]
    return Message(title, ResponseReceiver, raw, [head, *([payload] if payload else []), End()])


def documented() -> List[Message]:
    """The examples of docs/PROTOCOL.md, with the fields that they are meant to have."""
    a, e = b"a", b"e"
    xyz = file_payload(b"xyz")
    one = bytes.fromhex("01000000 0100 61")
    fields = [
        ((11, 1, 100, a, 3), b"xyz", (1, 210, a, 0), b""),
        ((11, 1, 200, a), b"", (1, 212, a, 7), xyz),
        ((11, 1, 202, b""), b"", (1, 212, b"", 7), one),
        ((11, 1, 201, a), b"", (1, 211, a, 0), b""),
        ((11, 1, 201, a), b"", (1, 1002, a, 0), b""),
        ((11, 1, 200, a), b"", (1, 1003, a, 0), b""),
        ((11, 1, 100, e, 0), b"", (1, 1001, e, 0), b""),
    ]
    found: List[Message] = []
    rows = examples()
    assert len(rows) == len(fields)
    for row, (sent, upload, back, download) in zip(rows, fields):
        found.append(asked(f"{row.title}: request", row.request, *sent, payload=upload))
        found.append(answered(f"{row.title}: response", row.response, *back, payload=download))
    return found


LONG = b"n" * 0xFFFF
MESSAGES = [
    *documented(),
    asked("a backup without a name", request(1, 100, b"", b"xy"), 1, 1, 100, b"", 2, payload=b"xy"),
    asked("the longest name", request(1, 201, LONG), 1, 1, 201, LONG),
    asked("a list with a name", request(1, 202, b"a"), 1, 1, 202, b"a"),
    asked("an unknown op", request(1, 9, b"a"), 1, 1, 9, b"a"),
    asked("another version", request(1, 200, b"a", version=7), 1, 7, 200, b"a"),
    asked("a name that is not lawful", request(1, 200, b"../\xff\0"), 1, 1, 200, b"../\xff\0"),
    answered("an unknown status", response(7, b"a", b"xy"), 1, 7, b"a", 2, payload=b"xy"),
    answered("another version back", response(210, version=9), 9, 210, b"", 0),
]
every_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.title)


def whole(raw: bytes) -> List[bytes]:
    return [raw]


def byte_by_byte(raw: bytes) -> List[bytes]:
    return [raw[i : i + 1] for i in range(len(raw))]


def at_random_cuts(raw: bytes) -> List[bytes]:
    chance = random.Random(len(raw))
    places = sorted(chance.randrange(len(raw) + 1) for _ in range(4))
    return [raw[i:j] for i, j in zip([0, *places], [*places, len(raw)])]


WAYS: List[Callable[[bytes], List[bytes]]] = [whole, byte_by_byte, at_random_cuts]


def join(parts: Iterable[Part]) -> Joined:
    joined: Joined = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Data):
            assert part.view, "a piece of payload without a byte"
            if isinstance(last, bytes):
                joined[-1] = last + bytes(part.view)
            else:
                joined.append(bytes(part.view))
        elif isinstance(part, Excess) and isinstance(last, Excess):
            joined[-1] = Excess(last.length + part.length)
        else:
            joined.append(part)
    return joined


def receive(receiver: Receiver, pieces: Iterable[bytes]) -> Joined:
    return join([part for piece in pieces for part in receiver.feed(memoryview(piece))])


@every_message
def test_the_parts_are_the_same_however_the_bytes_are_cut(message: Message) -> None:
    for way in WAYS:
        receiver = message.receiver()
        assert receive(receiver, way(message.raw)) == message.parts
        assert receiver.state is State.DONE
        assert receiver.close() == []


@every_message
def test_bytes_behind_the_message_are_counted_and_change_nothing(message: Message) -> None:
    behind = message.raw  # even if they look like another message
    for way in WAYS:
        receiver = message.receiver()
        parts = receive(receiver, way(message.raw + behind))
        assert parts == [*message.parts, Excess(len(behind))]
        assert receiver.state is State.DONE
        assert receiver.close() == []


@every_message
def test_a_head_comes_with_the_last_byte_before_the_payload_and_not_later(message: Message) -> None:
    payload = sum(len(part) for part in message.parts if isinstance(part, bytes))
    receiver = message.receiver()
    fields = message.raw[: len(message.raw) - payload]
    assert receive(receiver, [fields[:-1]]) == []
    assert receive(receiver, [fields[-1:]])[0] == message.parts[0]
    assert receiver.state is (State.PAYLOAD if payload else State.DONE)


def test_an_answer_of_another_version_ends_with_its_header() -> None:
    """A name and a payload are not waited for: only that version knows what they are."""
    raw = response(212, b"abc", b"xyz", version=9)
    receiver = ResponseReceiver()
    assert receive(receiver, [raw[:8]]) == []
    assert receive(receiver, [raw[8:9]]) == [Head(Response(9, 212, b"", 3)), End()]
    assert receive(receiver, [raw[9:]]) == [Excess(6)]


@pytest.mark.parametrize("receiver", [RequestReceiver(), ResponseReceiver()])
def test_no_bytes_make_no_parts(receiver: Receiver) -> None:
    assert receiver.feed(memoryview(b"")) == []
    assert receiver.state is State.HEADER


BACKUP = request(11, 100, b"abc", b"xyz")
FOUND = response(212, b"abc", b"xyz")
ENDS = [
    (RequestReceiver, BACKUP[:0], State.HEADER, Request(0, 0, 0, b"")),
    (RequestReceiver, BACKUP[:7], State.HEADER, Request(0, 0, 0, b"")),
    (RequestReceiver, BACKUP[:8], State.FILENAME, Request(11, 1, 100, b"")),
    (RequestReceiver, BACKUP[:10], State.FILENAME, Request(11, 1, 100, b"")),
    (RequestReceiver, BACKUP[:11], State.SIZE, Request(11, 1, 100, b"abc")),
    (RequestReceiver, BACKUP[:14], State.SIZE, Request(11, 1, 100, b"abc")),
    (RequestReceiver, BACKUP[:15], State.PAYLOAD, Request(11, 1, 100, b"abc", 3)),
    (RequestReceiver, BACKUP[:17], State.PAYLOAD, Request(11, 1, 100, b"abc", 3)),
    (ResponseReceiver, FOUND[:0], State.HEADER, Response(0, 0, b"")),
    (ResponseReceiver, FOUND[:8], State.HEADER, Response(0, 0, b"")),
    (ResponseReceiver, FOUND[:9], State.FILENAME, Response(1, 212, b"", 3)),
    (ResponseReceiver, FOUND[:11], State.FILENAME, Response(1, 212, b"", 3)),
    (ResponseReceiver, FOUND[:12], State.PAYLOAD, Response(1, 212, b"abc", 3)),
    (ResponseReceiver, FOUND[:14], State.PAYLOAD, Response(1, 212, b"abc", 3)),
]


@pytest.mark.parametrize(("kind", "raw", "state", "so_far"), ENDS)
def test_an_end_in_between_is_one_cut_with_the_state_and_the_fields_so_far(
    kind: Callable[[], Receiver], raw: bytes, state: State, so_far: Union[Request, Response]
) -> None:
    for way in WAYS:
        receiver = kind()
        receive(receiver, way(raw))
        assert receiver.state is state
        assert receiver.close() == [Cut(state, so_far)]
        assert receiver.state is State.CUT


@pytest.mark.parametrize(("kind", "raw"), [row[:2] for row in ENDS])
def test_after_a_cut_neither_bytes_nor_another_end_are_taken(
    kind: Callable[[], Receiver], raw: bytes
) -> None:
    receiver = kind()
    receive(receiver, [raw])
    receiver.close()
    with pytest.raises(KeyError):
        receiver.close()
    with pytest.raises(KeyError):
        receiver.feed(memoryview(bytes(64)))


def test_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(State)


class Watched(Dict[Event, State]):
    """One row of the table that notes which of its arrows are taken."""

    def __init__(self, state: State, taken: Set[Arrow]) -> None:
        super().__init__(TRANSITIONS[state])
        self._state = state
        self._taken = taken

    def __getitem__(self, event: Event) -> State:
        target = super().__getitem__(event)
        self._taken.add((self._state, event, target))
        return target


def test_every_arrow_is_taken_by_some_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Set[Arrow] = set()
    drawn = {(state, *arrow) for state, row in TRANSITIONS.items() for arrow in row.items()}
    monkeypatch.setattr(protocol, "TRANSITIONS", {state: Watched(state, taken) for state in State})
    for message in MESSAGES:
        receiver = message.receiver()
        receive(receiver, [message.raw])
        receiver.close()
    for kind, raw, _, _ in ENDS:
        receiver = kind()
        receive(receiver, [raw])
        receiver.close()
    assert taken == drawn


@pytest.mark.parametrize(
    ("state", "event"),
    [(state, event) for state in State for event in Event if event not in TRANSITIONS[state]],
)
def test_a_pair_that_is_not_in_the_table_is_a_key_error(state: State, event: Event) -> None:
    receiver = RequestReceiver()
    receiver.state = state
    with pytest.raises(KeyError):
        receiver._advance(event)
    assert receiver.state is state


def test_a_payload_leaves_as_views_of_the_callers_buffer() -> None:
    scratch = bytearray(4096)
    receiver = RequestReceiver()
    receive(receiver, [request(1, Op.BACKUP, b"a", b"", size=3 * len(scratch) + 10)])
    for number in range(3):
        scratch[:] = bytes([number]) * len(scratch)
        (part,) = receiver.feed(memoryview(scratch))
        assert isinstance(part, Data)
        assert part.view.obj is scratch
        assert part.view == scratch
    last, end, excess = receiver.feed(memoryview(scratch)[:100])
    assert isinstance(last, Data)
    assert last.view.obj is scratch
    assert (len(last.view), end, excess) == (10, End(), Excess(90))


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (RequestReceiver, request(1, Op.BACKUP, b"a", b"", size=2**32 - 1)),
        (ResponseReceiver, bytes.fromhex("01 d400 0100 ffffffff 61")),
    ],
)
def test_no_byte_of_a_payload_is_held(kind: Callable[[], Receiver], head: bytes) -> None:
    scratch = bytearray(1 << 18)
    receiver = kind()
    receive(receiver, [head])
    tracemalloc.start()
    try:
        for _ in range(64):
            receiver.feed(memoryview(scratch))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(scratch) // 2
    assert receiver.state is State.PAYLOAD
    scratch.clear()  # a view of it that somebody still held would forbid this
    assert receiver.close() != []


def test_a_machine_that_knows_no_fields_is_none() -> None:
    with pytest.raises(NotImplementedError):
        Receiver(1).feed(memoryview(b"x"))
    with pytest.raises(NotImplementedError):
        Receiver(1).close()
