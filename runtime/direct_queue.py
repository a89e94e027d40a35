"""`DirectQueue`: a `ReadQueue` of slices without threads, where the system reads by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence

from edge_moe.runtime.direct_reads import DirectReads
from edge_moe.runtime.gguf_slices import Slice, SliceFiles
from edge_moe.runtime.read_queue import Read, ReadQueue

_MOST_READS = 256
"""Under way at a time: more than a disk takes."""
_TRIALS = 10
"""Another process can make any of them look slow."""


def open_direct_queue(files: SliceFiles, slices: Sequence[Slice]) -> DirectQueue | None:
    """A queue for `slices` in the order of their numbers; None where it would wait for the disk.

    Files have to be open past the page cache, and the file system has to return before it has read:
    some network file systems do not.

    Raises:
        OSError, CheckpointError: the first slice cannot be read.
    """
    if not files.are_direct:
        return None
    try:
        reads = DirectReads(_MOST_READS)
    except OSError:  # another system, a container that forbids it, or too many in use
        return None
    reads.set_list([(files.descriptor(e.path), e.offset, e.address, e.num_bytes) for e in slices])
    queue = DirectQueue(reads, files)
    if any(queue.try_out(slices[0]) < 0.5 for _ in range(_TRIALS)):
        return queue
    queue.close()
    return None


class DirectQueue(ReadQueue[Slice]):
    """Belongs to one thread, which has to call `go_on` or `wait` for anything to be begun."""

    def __init__(self, reads: DirectReads, files: SliceFiles) -> None:
        """The list of `reads` has every slice at the place that is its number."""
        self._reads = reads
        self._files = files
        self._wanted: list[Read[Slice]] = []
        """To be begun next."""
        self._guessed: list[Read[Slice]] = []
        self._under_way: dict[int, Read[Slice]] = {}
        """By number."""

    def submit(self, piece: Slice, *, is_wanted: bool) -> Read[Slice]:
        read = Read(piece, is_wanted)
        (self._wanted if is_wanted else self._guessed).append(read)
        return read

    def want(self, read: Read[Slice]) -> None:
        if read.is_started or read.is_wanted:
            return
        read.is_wanted = True
        self._guessed.remove(read)
        self._wanted.append(read)

    def cancel(self, read: Read[Slice]) -> bool:
        if read.is_started:
            return False
        (self._wanted if read.is_wanted else self._guessed).remove(read)
        read.is_started = read.is_done = True
        return True

    def go_on(self) -> None:
        if self._under_way:
            self._note(0)
        self._begin(self._wanted)
        if self._guessed and not any(read.is_wanted for read in self._under_way.values()):
            self._begin(self._guessed)

    def wait(self, reads: Collection[Read[Slice]]) -> None:
        for read in reads:
            self.want(read)
        self.go_on()
        while missing := sum(not read.is_done for read in reads):
            self._note(missing)
        self.go_on()

    def close(self) -> None:
        self._reads.close()
        self._under_way.clear()
        self._wanted.clear()
        self._guessed.clear()

    def try_out(self, piece: Slice) -> float:
        """Read a slice: what share of its time went by before this thread could go on.

        Raises:
            OSError, CheckpointError: it cannot be read.
        """
        start = time.perf_counter()
        read = self.submit(piece, is_wanted=True)
        self.go_on()
        begun = time.perf_counter()
        self.wait([read])
        if read.error is not None:
            raise read.error
        return (begun - start) / (read.end_seconds - start)

    def _begin(self, reads: list[Read[Slice]]) -> None:
        """Begin all of `reads`, which is empty then."""
        while reads:
            start = time.perf_counter()
            try:
                count = self._reads.begin([read.piece.number for read in reads])
            except OSError as error:
                if isinstance(error, BlockingIOError) and self._under_way:
                    self._note(1)
                else:
                    self._finish(reads.pop(0), -(error.errno or 0), start)
                continue
            for read in reads[:count]:
                read.is_started, read.start_seconds = True, start
                self._under_way[read.piece.number] = read
            del reads[:count]

    def _note(self, at_least: int) -> None:
        """Wait for so many to be over, and note all that are."""
        over = self._reads.over(at_least)
        now = time.perf_counter()
        for number, result in over:
            read = self._under_way.pop(number)
            read.is_end_known = at_least > 0
            self._finish(read, result, now)

    def _finish(self, read: Read[Slice], result: int, now: float) -> None:
        """`result`: bytes read, or minus errno."""
        piece = read.piece
        read.is_started = True
        if result < 0:
            read.error = OSError(-result, os.strerror(-result), str(piece.path))
        elif result < piece.needed_bytes:
            try:
                self._files.read(piece)  # goes on where the disk stopped, or says what is wrong
            except BaseException as error:
                read.error = error
        read.end_seconds, read.is_done = now, True
