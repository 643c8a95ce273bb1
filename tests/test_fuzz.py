"""A slice of the campaign of ``tools/fuzz.py`` with seeds that do not change, and what it can find.

Whatever bytes come in whatever pieces: the invariant is told in ``tools/fuzzing``.
"""

from __future__ import annotations

from random import Random
from typing import Callable, List, Optional, Tuple, Union

import pytest

from backup.connection import Connection, Later, Outgoing
from backup.disk import Folder
from backup.exchange import Exchange
from backup.files import Target
from backup.protocol import Cut, Part, Receiver
from backup.session import Session
from backup.storage import Store
from backup.upload import Upload
from backup.wire import Response
from tools.fuzzing import TARGETS, Broken, Tally, machines, service
from tools.fuzzing.choices import FromRandom
from tools.fuzzing.history import ANY, FILE, NEVER, SAME, Event, explained
from tools.fuzzing.service import Act, Peer, Script, Step

EXAMPLES = {"requests": 3000, "responses": 3000, "listings": 3000, "answers": 300, "server": 350}
STATUSES = {"210", "211", "212", "1001", "1002", "1003", "none"}


def explore(name: str, count: int) -> Tally:
    """Checks so many examples; a failure names the one that it came from."""
    target, tally = TARGETS[name], Tally()
    for seed in range(count):
        example = target.example(FromRandom(Random(seed)))
        try:
            target.check(example, tally)
        except Exception as error:
            raise Broken(f"{name}, seed {seed}: {error!r} from {example!r}") from error
    return tally


@pytest.mark.parametrize("name", TARGETS)
def test_the_invariant_holds(name: str) -> None:
    tally = explore(name, EXAMPLES[name])
    if name == "server":  # whose examples are worth something only if they get everywhere
        assert set(tally.answers) == STATUSES
        assert min(tally.answers.values()) >= 5
    if name == "answers":
        assert tally.answers["believed"] >= 30


def test_an_example_is_made_again_by_its_repr() -> None:
    for name, target in TARGETS.items():
        example = target.example(FromRandom(Random(name)))
        assert eval(repr(example), {**vars(machines), **vars(service)}) == example


# What it can find: a bug is planted, and found.

Plant = Callable[[pytest.MonkeyPatch], None]


def drops_a_byte_at_a_boundary(patch: pytest.MonkeyPatch) -> None:
    feed = Receiver.feed

    def dropping(self: Receiver, data: memoryview) -> List[Part]:
        return feed(self, data[1:] if self._held and len(data) > 1 else data)

    patch.setattr(Receiver, "feed", dropping)


def answers_and_does_not_replace(patch: pytest.MonkeyPatch) -> None:
    put = Store._put_in_place

    def keeping(self: Store, folder: Folder, upload: Upload) -> None:
        if folder.status(upload.name) is None:
            put(self, folder, upload)

    patch.setattr(Store, "_put_in_place", keeping)


def stores_what_was_cut(patch: pytest.MonkeyPatch) -> None:
    cut = Session._cut

    def storing(self: Session, part: Cut) -> Union[Outgoing, Later, None]:
        return cut(self, part) if self.change is None else Later.COMMIT

    patch.setattr(Session, "_cut", storing)


def leaves_what_was_cut(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Upload, "abort", Upload.close)


def closes_after_its_answer(patch: pytest.MonkeyPatch) -> None:
    send = Connection._send_some

    def closing(self: Connection) -> None:
        send(self)
        if self._outgoing is None:
            self.close()

    patch.setattr(Connection, "_send_some", closing)


def never_closes_after_its_answer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Connection, "_look_again", lambda self: None)


def never_answers_a_removal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Store, "remove", lambda *_: None)


def raises_what_nobody_foresaw(patch: pytest.MonkeyPatch) -> None:
    def failing(self: Session, part: Part) -> None:
        raise RuntimeError("planted")

    patch.setattr(Session, "take", failing)


def believes_any_name(patch: pytest.MonkeyPatch) -> None:
    check = Exchange._check

    def trusting(self: Exchange, response: Response) -> None:
        check(self, response._replace(name=self._name))

    patch.setattr(Exchange, "_check", trusting)


def leaves_half_a_file(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Target, "abort", Target._close)


@pytest.mark.parametrize(
    ("plant", "names"),
    [
        (drops_a_byte_at_a_boundary, ("requests", "responses", "answers", "server")),
        (answers_and_does_not_replace, ("server",)),
        (stores_what_was_cut, ("server",)),
        (leaves_what_was_cut, ("server",)),
        (closes_after_its_answer, ("server",)),
        (never_closes_after_its_answer, ("server",)),
        (never_answers_a_removal, ("server",)),
        (raises_what_nobody_foresaw, ("server",)),
        (believes_any_name, ("answers",)),
        (leaves_half_a_file, ("answers",)),
    ],
)
def test_a_planted_bug_is_found(
    plant: Plant, names: Tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    monkeypatch.setattr(service, "_WAITS", 0)  # nothing comes that would be worth it
    for name in names:
        with pytest.raises(Broken):
            explore(name, EXAMPLES[name])


# What can have happened.

A, B = b"a", b"b"
WRITE_A, WRITE_B = Event(1, 2, ANY, A), Event(3, 4, ANY, B)


@pytest.mark.parametrize(
    ("events", "final", "possible"),
    [
        ((), None, True),
        ((), A, False),
        ((WRITE_A,), A, True),
        ((WRITE_A,), None, False),
        ((WRITE_A, WRITE_B), B, True),
        ((WRITE_A, WRITE_B), A, False),
        ((WRITE_A._replace(end=3.5), WRITE_B), A, True),  # they overlapped
        ((WRITE_A, WRITE_B._replace(end=NEVER)), A, True),  # nobody heard of the second
        ((WRITE_A, WRITE_B._replace(end=NEVER)), B, True),
        ((WRITE_A._replace(end=NEVER), WRITE_B), A, True),  # the first may be late
        ((WRITE_A, Event(3, 4, A, SAME)), A, True),
        ((WRITE_A, Event(3, 4, None, SAME)), A, False),
        ((WRITE_A, Event(1.5, 4, None, SAME)), A, True),
        ((WRITE_A, WRITE_B, Event(5, 6, A, SAME)), B, False),
        ((WRITE_A, Event(3, 4, FILE, None)), None, True),
        ((WRITE_A, Event(3, 4, FILE, None)), A, False),
        ((Event(1, 2, FILE, None),), None, False),
    ],
)
def test_what_was_seen_of_a_name_can_have_happened_or_not(
    events: Tuple[Event, ...], final: Optional[bytes], possible: bool
) -> None:
    assert explained(events, None, final) is possible


# What was found.


def test_two_listings_in_one_turn_see_all_names() -> None:
    """They shared their place in the folder, and the second had what the first had left."""
    store = b"\x0b\0\0\0\x01\x64\x01\0%b\x01\0\0\0x"
    peers = [Peer(store % name, False) for name in (b"a", b"b", b"c")]
    peers += [Peer(b"\x0b\0\0\0\x01\xca\0\0", False)] * 2
    steps = []
    for number in range(3):
        steps += [Step(Act.SEND, number, 14), Step(Act.TURN, 0, 5)]
    steps += [Step(Act.SEND, 3, 8), Step(Act.SEND, 4, 8)]
    tally = Tally()
    service.check(Script(True, tuple(peers), tuple(steps)), tally)
    assert tally.answers == {"210": 3, "212": 3}  # one LIST is the check's own
