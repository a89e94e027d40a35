"""What the system reads by itself is what is in the file, and nothing is lost."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_moe.errors import CheckpointError
from edge_moe.runtime import direct_queue, direct_reads
from edge_moe.runtime.direct_queue import DirectQueue, open_direct_queue
from edge_moe.runtime.direct_reads import DirectReads
from edge_moe.runtime.gguf_slices import Slice, SliceFiles
from edge_moe.runtime.read_queue import Read

PAGE = mmap.PAGESIZE
COUNT = 12


@dataclass
class Disk:
    """A file of slices, and memory for them."""

    path: Path
    files: SliceFiles
    slices: list[Slice]
    memory: mmap.mmap
    queue: DirectQueue

    def read(self, number: int, *, is_wanted: bool = True) -> Read[Slice]:
        return self.queue.submit(self.slices[number], is_wanted=is_wanted)

    def is_there(self, number: int) -> bool:
        at = number * 2 * PAGE
        return self.memory[at : at + 2 * PAGE] == content(number)


def content(number: int) -> bytes:
    return bytes([number + 1]) * (2 * PAGE)


def make_slices(path: Path, memory: mmap.mmap) -> list[Slice]:
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return [
        Slice(path, at * 2 * PAGE, start + at * 2 * PAGE, 2 * PAGE, 2 * PAGE, at)
        for at in range(COUNT)
    ]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "file"
    path.write_bytes(b"".join(map(content, range(COUNT))))
    files = SliceFiles([path])
    if not files.are_direct:
        pytest.skip(f"{tmp_path} cannot be read past the page cache")
    memory = mmap.mmap(-1, COUNT * 2 * PAGE)
    slices = make_slices(path, memory)
    reads = DirectReads(4)
    reads.set_list([(files.descriptor(path), e.offset, e.address, e.num_bytes) for e in slices])
    queue = DirectQueue(reads, files)
    yield Disk(path, files, slices, memory, queue)
    queue.close()
    files.close()


def test_more_are_read_than_can_be_under_way(disk: Disk) -> None:
    reads = [disk.read(number) for number in range(COUNT)]
    assert not any(read.is_started for read in reads)
    disk.queue.wait(reads)
    assert all(read.is_done and read.error is None for read in reads)
    assert all(disk.is_there(number) for number in range(COUNT))
    assert all(0 < read.start_seconds <= read.end_seconds for read in reads)


def test_guesses_begin_when_nothing_is_wanted_any_more(disk: Disk) -> None:
    guess, other = disk.read(0, is_wanted=False), disk.read(1, is_wanted=False)
    wanted = disk.read(2)
    disk.queue._begin(disk.queue._wanted)
    assert wanted.is_started and not wanted.is_done
    disk.queue.want(other)
    disk.queue.wait([other])
    assert disk.is_there(1) and other.is_wanted
    disk.queue.wait([wanted])
    assert guess.is_started
    disk.queue.wait([guess])
    assert disk.is_there(0) and disk.is_there(2)


def test_what_is_cancelled_is_not_read(disk: Disk) -> None:
    reads = [disk.read(number, is_wanted=number > 0) for number in range(3)]
    assert disk.queue.cancel(reads[0]) and disk.queue.cancel(reads[1])
    assert not disk.queue.cancel(reads[0])
    disk.queue.wait(reads)
    assert not disk.queue.cancel(reads[2])
    assert [disk.is_there(number) for number in range(3)] == [False, False, True]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(range(COUNT)),
            st.booleans(),
            st.sampled_from(["", "want", "cancel", "go_on", "wait"]),
        ),
        max_size=30,
        unique_by=lambda each: each[0],
    )
)
def test_every_slice_is_read_or_cancelled(disk: Disk, asked: list[tuple[int, bool, str]]) -> None:
    disk.memory[:] = bytes(len(disk.memory))
    reads, cancelled = {}, set()
    for number, is_wanted, then in asked:
        reads[number] = read = disk.read(number, is_wanted=is_wanted)
        if then == "want":
            disk.queue.want(read)
        elif then == "cancel" and disk.queue.cancel(read):
            cancelled.add(number)
        elif then == "go_on":
            disk.queue.go_on()
        elif then == "wait":
            disk.queue.wait([read])
            assert disk.is_there(number)
    disk.queue.wait(list(reads.values()))
    for number in range(COUNT):
        assert disk.is_there(number) == (number in reads.keys() - cancelled)
    assert not disk.queue._under_way and not disk.queue._wanted and not disk.queue._guessed


def test_errors_stay_with_their_reads(disk: Disk) -> None:
    os.truncate(disk.path, 5 * 2 * PAGE + 100)
    reads = [disk.read(number) for number in range(COUNT)]
    disk.queue.wait(reads)
    for number, read in enumerate(reads):
        assert (read.error is None) == (number < 5)
        assert disk.is_there(number) == (number < 5)
    assert isinstance(reads[5].error, CheckpointError) and "ended early" in str(reads[5].error)


@pytest.mark.parametrize("moment", ["begin", "over"])
def test_a_disk_that_fails(disk: Disk, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = disk.queue._reads
    real = getattr(reads, moment)

    def failing(argument: Any) -> Any:
        if moment == "begin" and argument[0] == 1:
            raise OSError(errno.EIO, "bad sector")
        if moment == "begin":
            return real(argument[:1])
        return [(at, -errno.EIO if at == 1 else result) for at, result in real(argument)]

    monkeypatch.setattr(reads, moment, failing)
    asked = [disk.read(number) for number in range(3)]
    disk.queue.wait(asked)
    assert asked[0].error is None and asked[2].error is None and disk.is_there(2)
    error = asked[1].error
    assert isinstance(error, OSError) and error.errno == errno.EIO
    assert str(disk.path) in str(error)


def test_a_short_read_is_gone_on_with(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk.queue._reads.over
    monkeypatch.setattr(
        disk.queue._reads, "over", lambda at_least: [(at, PAGE) for at, _ in real(at_least)]
    )
    read = disk.read(3)
    disk.queue.wait([read])
    assert read.error is None and disk.is_there(3)


def test_where_the_system_does_not_read_by_itself_threads_do(
    disk: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = DirectQueue.try_out

    def quick(self: DirectQueue, piece: Slice) -> float:
        assert 0 < real(self, piece) <= 1
        return 0.1

    monkeypatch.setattr(DirectQueue, "try_out", quick)
    opened = open_direct_queue(disk.files, disk.slices)
    assert opened is not None and disk.is_there(0)
    opened.close()
    monkeypatch.setattr(DirectQueue, "try_out", lambda *_: 0.9)  # waits for the disk
    assert open_direct_queue(disk.files, disk.slices) is None
    monkeypatch.setattr(direct_reads, "_NUMBERS", {})
    assert open_direct_queue(disk.files, disk.slices) is None
    monkeypatch.undo()
    monkeypatch.setattr(direct_queue, "_MOST_READS", 10**7)  # more than fs.aio-max-nr
    assert open_direct_queue(disk.files, disk.slices) is None


def test_files_in_memory_are_not_read_past_the_cache() -> None:
    path = Path("/dev/shm") / f"edge-moe-{os.getpid()}"
    if not path.parent.is_dir():
        pytest.skip("no file system in memory")
    try:
        path.write_bytes(bytes(COUNT * 2 * PAGE))
        files = SliceFiles([path])
        if not files.are_direct:  # Linux 6.5 grants it
            assert open_direct_queue(files, make_slices(path, mmap.mmap(-1, 2 * PAGE))) is None
        files.close()
    finally:
        path.unlink(missing_ok=True)
