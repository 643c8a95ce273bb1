"""A listing is the folder as it was when its last slice was read, a slice of names at a time.

Every test runs twice: with what this system can do, and as if it could open nothing relative to a
descriptor. Where it matters what readdir(3) has seen of a change, the test says what.
"""

from __future__ import annotations

import errno
import gc
import os
import random
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple, cast

import pytest

from backup import disk
from backup.errors import StoreFailed
from backup.listing import Listing
from tests.conftest import open_descriptors

USER = 11
MUCH = 1000


@pytest.fixture(autouse=True, params=["as it is", "bare"])
def bare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether this test is run without the system's features."""
    if request.param == "bare":
        monkeypatch.setattr(disk, "HAS_DIR_FD", False)
        return True
    return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to list."""
    path = tmp_path / "place"
    path.mkdir()
    return path


def fill(place: Path, names: Sequence[bytes]) -> None:
    for name in names:
        with open(os.path.join(bytes(place), name), "wb"):
            pass


def some_names(count: int) -> List[bytes]:
    """So many names of all lengths, of which not all are ASCII, in no order."""
    chance = random.Random(count)
    names = [b"%d" % number + "é".encode() * (number % 4) for number in range(count)]
    chance.shuffle(names)
    return names


def listing_of(place: Path, slice_names: int) -> Listing:
    """The listing of a folder that is open for a moment, as the store's is."""
    with disk.open_folder(bytes(place)) as folder:
        listing = Listing(USER, bytes(place), folder.entries(), slice_names)
        listing.step()
    return listing


def to_the_end(listing: Listing) -> int:
    """Does what is left to do; how many steps that took."""
    steps = 0
    while not listing.done:
        listing.step()
        steps += 1
    return steps


def seen(place: Path, names: Sequence[bytes], error: Optional[OSError] = None) -> disk.Entries:
    """What readdir(3) finds: these, of what is in the folder now, in this order; then an error."""
    with os.scandir(place) as entries:
        found = {os.fsencode(entry.name): entry for entry in entries}

    def read() -> disk.Entries:
        for name in names:
            yield found[name]
        if error is not None:
            raise error

    return read()


# Read, sorted, counted.


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 7, 8, 9, 12, 50])
def test_all_names_come_out_sorted_by_their_bytes_and_counted(place: Path, size: int) -> None:
    names = some_names(size)
    fill(place, names)
    listing = listing_of(place, 4)
    assert listing.user_id == USER
    to_the_end(listing)
    assert listing.count == size
    assert listing.bytes == sum(map(len, names))
    assert [*listing] == sorted(names)


@pytest.mark.parametrize(
    ("size", "steps"),
    # As long as slices are full there may be more: as many steps to read as to sort, each.
    [(0, 0), (1, 0), (3, 0), (4, 3), (5, 3), (7, 3), (8, 5), (9, 5), (11, 5), (12, 7)],
)
def test_what_is_less_than_a_slice_is_done_at_once_and_more_in_two_rounds(
    place: Path, size: int, steps: int
) -> None:
    fill(place, some_names(size))
    listing = listing_of(place, 4)
    assert (listing.done, listing.reading) == (steps == 0, steps > 0)
    assert to_the_end(listing) == steps
    assert listing.reading is False


def test_no_step_takes_more_than_a_slice(place: Path) -> None:
    names = some_names(50)
    fill(place, names)
    taken = 0

    def counted(entries: disk.Entries) -> disk.Entries:
        nonlocal taken
        for entry in entries:
            taken += 1
            yield entry

    listing = Listing(USER, bytes(place), counted(seen(place, names)), 7)
    while not listing.done:
        before, counted_before = taken, listing.count
        listing.step()
        assert taken - before <= 7
        assert listing.count - counted_before <= 7
    assert [len(run) for run in listing._runs] == [7] * 7 + [1]


@pytest.mark.parametrize("size", [3, 9])
def test_once_it_is_done_names_are_held_once(place: Path, size: int) -> None:
    fill(place, some_names(size))
    listing = listing_of(place, 4)
    to_the_end(listing)
    assert not listing._names


def test_who_has_stored_nothing_has_an_empty_listing(tmp_path: Path) -> None:
    listing = Listing.of_nothing(USER, bytes(tmp_path))
    assert (listing.done, listing.reading, listing.user_id) == (True, False, USER)
    assert (listing.count, listing.bytes, [*listing]) == (0, 0, [])


@pytest.mark.parametrize("slice_names", [2, MUCH])
def test_what_is_no_file_or_has_no_lawful_name_is_left_out(place: Path, slice_names: int) -> None:
    fill(place, [b"plain", b".hidden", b"two words", "é".encode()])
    fill(place, [b"a\\b", b"new\nline", b"\xff", "\x9b".encode()])
    (place / "folder").mkdir()
    (place / "link").symlink_to("plain")
    os.mkfifo(place / "pipe")
    listing = listing_of(place, slice_names)
    to_the_end(listing)
    assert [*listing] == [b".hidden", b"plain", b"two words", "é".encode()]
    assert listing.count == 4


@pytest.mark.parametrize("slice_names", [3, MUCH])
def test_plain_names_alone_are_told_from_what_is_no_file_too(place: Path, slice_names: int) -> None:
    fill(place, [b"a", b"b", b"c", b"d", b"e"])
    (place / "folder").mkdir()
    (place / "link").symlink_to("a")
    listing = listing_of(place, slice_names)
    to_the_end(listing)
    assert [*listing] == [b"a", b"b", b"c", b"d", b"e"]


def test_a_slice_without_a_file_is_not_the_last(place: Path) -> None:
    fill(place, [b"a\\1", b"a\\2", b"a\\3", b"b", b"a"])
    listing = Listing(
        USER, bytes(place), seen(place, [b"a\\1", b"a\\2", b"a\\3", b"b", b"a"]), slice_names=2
    )
    to_the_end(listing)
    assert (listing.count, [*listing]) == (2, [b"a", b"b"])


# What changes meanwhile.

Changes = List[Tuple[bytes, bool]]  # a name, and whether it is there now


@pytest.mark.parametrize(
    "rest", [[b"c", b"d", b"e"], [b"c", b"d", b"e", b"x"]], ids=["unseen", "seen"]
)
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(b"x", True)], b"abcdex"),
        ([(b"x", True), (b"x", False)], b"abcde"),
        ([(b"x", True), (b"x", False), (b"x", True)], b"abcdex"),
        ([(b"x", False)], b"abcde"),  # it was there before
        ([(b"x", False), (b"x", True)], b"abcdex"),
    ],
)
def test_the_last_that_the_store_said_of_a_name_counts_whatever_the_system_has_seen(
    place: Path, changes: Changes, expected: bytes, rest: List[bytes]
) -> None:
    fill(place, [b"a", b"b", b"c", b"d", b"e", b"x"])
    listing = Listing(USER, bytes(place), seen(place, [b"b", b"a", *rest]), slice_names=2)
    listing.step()
    for name, there in changes:
        listing.changed(name, there)
    to_the_end(listing)
    assert b"".join(listing) == expected
    assert (listing.count, listing.bytes) == (len(expected), len(expected))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([(b"a", False)], b"bcd"),
        ([(b"a", False), (b"a", True)], b"abcd"),
        ([(b"a", True)], b"abcd"),  # replaced
        ([(b"a", False), (b"b", False), (b"c", False), (b"d", False)], b""),
    ],
)
def test_what_was_read_before_it_changed_is_right_too(
    place: Path, changes: Changes, expected: bytes
) -> None:
    fill(place, [b"a", b"b", b"c", b"d"])
    listing = Listing(USER, bytes(place), seen(place, [b"b", b"a", b"d", b"c"]), slice_names=2)
    listing.step()
    listing.step()
    for name, there in changes:
        listing.changed(name, there)
    to_the_end(listing)
    assert b"".join(listing) == expected


def test_what_changes_after_the_last_slice_was_read_does_not_count(place: Path) -> None:
    fill(place, [b"a", b"b", b"c", b"d", b"e"])
    listing = listing_of(place, 2)
    while listing.reading:
        assert not listing.done
        listing.step()
    listing.changed(b"x", True)
    listing.step()
    listing.changed(b"a", False)
    to_the_end(listing)
    assert b"".join(listing) == b"abcde"


def test_the_folder_itself_may_change_while_it_is_read(place: Path) -> None:
    names = some_names(500)
    fill(place, names)
    listing = listing_of(place, 50)
    for number, name in enumerate(names[:100]):
        (place / os.fsdecode(name)).unlink()
        listing.changed(name, False)
        fill(place, [b"new %d" % number])
        listing.changed(b"new %d" % number, True)
        if number % 10 == 9 and listing.reading:
            listing.step()
    to_the_end(listing)
    expected = names[100:] + [b"new %d" % number for number in range(100)]
    assert [*listing] == sorted(expected)


# Its end, and what fails.


def test_a_listing_that_is_closed_in_the_middle_leaves_nothing_open(place: Path) -> None:
    fill(place, some_names(9))
    before = open_descriptors()
    listing = listing_of(place, 4)
    assert open_descriptors() != before  # it goes on reading, though the folder is closed
    listing.close()
    assert open_descriptors() == before
    assert listing.reading is False
    listing.close()


def test_a_listing_that_was_read_leaves_nothing_open(place: Path) -> None:
    fill(place, some_names(9))
    before = open_descriptors()
    listing = listing_of(place, 4)
    while listing.reading:
        listing.step()
    gc.disable()
    try:
        assert open_descriptors() == before
    finally:
        gc.enable()
    to_the_end(listing)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_folder_that_fails_while_it_is_read_is_a_store_failure_and_closed(
    place: Path, after: int
) -> None:
    names = [b"a", b"b", b"c"]
    fill(place, names)
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    listing = Listing(USER, bytes(place), seen(place, names[:after], error), slice_names=2)
    with pytest.raises(StoreFailed) as caught:
        to_the_end(listing)
    assert str(caught.value) == (
        f"{place}: cannot list: input/output error; check this folder and its disk"
    )
    assert caught.value.__cause__ is error
    assert (listing.done, listing.reading) == (False, False)


class Unknown:
    """An entry of a file system that does not say what its entries are, on a disk that fails."""

    name = "b"

    def is_file(self, follow_symlinks: bool) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_an_entry_that_cannot_be_looked_at_is_a_store_failure_and_all_is_closed(
    place: Path,
) -> None:
    fill(place, [b"a"])
    closed: List[bool] = []

    def read() -> Iterator[object]:
        try:
            yield from seen(place, [b"a"])
            yield Unknown()
            yield Unknown()
        finally:
            closed.append(True)

    listing = Listing(USER, bytes(place), cast(disk.Entries, read()), slice_names=2)
    with pytest.raises(StoreFailed, match="cannot list: input/output error"):
        listing.step()
    assert closed == [True]
    assert listing.reading is False


def test_what_changes_while_no_file_was_found_yet_counts_too(place: Path) -> None:
    for number in range(4):
        (place / f"folder {number}").mkdir()
    fill(place, [b"gone"])
    names = [*(b"folder %d" % number for number in range(4)), b"gone"]
    some = Listing(USER, bytes(place), seen(place, names), 4)
    some.step()
    some.changed(b"gone", False)
    some.changed(b"new", True)
    to_the_end(some)
    assert [*some] == [b"new"]
