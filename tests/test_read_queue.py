"""What is wanted is read before what is guessed, and nothing is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_moe.runtime.read_queue import ThreadQueue


class Disk:
    """Reads nothing until it may; knows what was read, in order."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.may_go_on = threading.Event()
        self.has_begun = threading.Event()

    def __call__(self, piece: int) -> None:
        self.read.append(piece)
        self.has_begun.set()
        self.may_go_on.wait()
        if piece < 0:
            raise OSError(f"piece {piece}")


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def queue(disk: Disk) -> Iterator[ThreadQueue[int]]:
    made = ThreadQueue(disk, 1, "test")
    made.submit(0, is_wanted=True)
    disk.has_begun.wait()  # whatever comes now waits behind it
    yield made
    disk.may_go_on.set()
    made.close()


def test_guesses_wait_for_what_is_wanted(disk: Disk, queue: ThreadQueue[int]) -> None:
    reads = [queue.submit(piece, is_wanted=piece > 2) for piece in (1, 2, 3, 4)]
    disk.may_go_on.set()
    queue.wait(reads)
    assert disk.read == [0, 3, 4, 1, 2]


def test_a_guess_that_came_true_goes_before_the_others(disk: Disk, queue: ThreadQueue[int]) -> None:
    reads = [queue.submit(piece, is_wanted=False) for piece in (1, 2, 3)]
    queue.want(reads[2])
    queue.want(reads[2])
    disk.may_go_on.set()
    queue.wait(reads)
    assert disk.read == [0, 3, 1, 2]


def test_what_is_cancelled_is_not_read(disk: Disk, queue: ThreadQueue[int]) -> None:
    first, second = (queue.submit(piece, is_wanted=False) for piece in (1, 2))
    assert queue.cancel(first) and not queue.cancel(first)
    disk.may_go_on.set()
    queue.wait([second, first])
    assert disk.read == [0, 2] and not queue.cancel(second)


def test_an_error_stays_with_its_read(disk: Disk, queue: ThreadQueue[int]) -> None:
    bad, good = queue.submit(-1, is_wanted=True), queue.submit(1, is_wanted=True)
    disk.may_go_on.set()
    queue.wait([bad, good])
    assert str(bad.error) == "piece -1" and good.error is None
    assert bad.start_seconds <= bad.end_seconds <= good.start_seconds


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(["", "want", "cancel"])), max_size=20))
@settings(max_examples=50, deadline=None)
def test_every_piece_is_read_once_or_cancelled(pieces: list[tuple[bool, str]]) -> None:
    found: list[int] = []
    queue = ThreadQueue(found.append, 3, "test")
    expected = []
    for piece, (is_wanted, then) in enumerate(pieces):
        read = queue.submit(piece, is_wanted=is_wanted)
        if then == "want":
            queue.want(read)
        if then != "cancel" or not queue.cancel(read):
            expected.append(piece)
            queue.wait([read])
    queue.close()
    assert sorted(found) == expected
