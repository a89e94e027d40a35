"""`ReadQueue`: reads pieces of files while others compute; what is wanted goes before guesses."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

READERS = 4
"""Threads that read, where the system does not by itself: enough to keep an NVMe disk busy with
pieces of half a megabyte."""

Piece = TypeVar("Piece")


class Read(Generic[Piece]):
    """One piece on its way. Only the queue changes it."""

    __slots__ = (
        *("end_seconds", "error", "is_done", "is_end_known", "is_started"),
        *("is_wanted", "piece", "start_seconds"),
    )

    def __init__(self, piece: Piece, is_wanted: bool) -> None:
        self.piece = piece
        self.is_wanted = is_wanted
        self.is_started = False
        self.start_seconds = 0.0
        """When it was begun, and over: `time.perf_counter`."""
        self.end_seconds = 0.0
        self.is_end_known = True
        """Else it was over before, but nobody looked."""
        self.is_done = False
        self.error: BaseException | None = None


class ReadQueue(ABC, Generic[Piece]):
    """Reads in the order of submission, but guesses only while nothing that is wanted waits.

    Started reads go on to their end. Reads belong to one thread, the one that submits them.
    """

    @abstractmethod
    def submit(self, piece: Piece, *, is_wanted: bool) -> Read[Piece]:
        """Queue a piece."""

    @abstractmethod
    def want(self, read: Read[Piece]) -> None:
        """A guess came true: it is read before all other guesses."""

    @abstractmethod
    def cancel(self, read: Read[Piece]) -> bool:
        """Whether it was not started yet, and now never will be."""

    @abstractmethod
    def go_on(self) -> None:
        """Begin what can be of what was submitted, and note what is over. Never waits."""

    @abstractmethod
    def wait(self, reads: Collection[Read[Piece]]) -> None:
        """Until they are there, whatever came of them."""

    @abstractmethod
    def close(self) -> None:
        """Finish what is being read; the rest is dropped."""


class ThreadQueue(ReadQueue[Piece]):
    """Threads read, each a piece at a time."""

    def __init__(self, read: Callable[[Piece], None], num_threads: int, name: str) -> None:
        """`read` fills the memory of one piece, or raises."""
        self._read = read
        self._changed = threading.Condition()
        self._done = threading.Condition(self._changed._lock)  # type: ignore[attr-defined]
        self._wanted: deque[Read[Piece]] = deque()
        self._guessed: deque[Read[Piece]] = deque()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, piece: Piece, *, is_wanted: bool) -> Read[Piece]:
        read = Read(piece, is_wanted)
        with self._changed:
            (self._wanted if is_wanted else self._guessed).append(read)
            self._changed.notify()
        return read

    def want(self, read: Read[Piece]) -> None:
        with self._changed:
            if read.is_started or read.is_wanted:
                return
            read.is_wanted = True
            self._wanted.append(read)  # its place among the guesses is skipped
            self._changed.notify()

    def cancel(self, read: Read[Piece]) -> bool:
        with self._changed:
            if read.is_started:
                return False
            read.is_started = read.is_done = True
            return True

    def go_on(self) -> None:
        """The threads do."""

    def wait(self, reads: Collection[Read[Piece]]) -> None:
        if all(read.is_done for read in reads):
            return
        with self._done:
            while not all(read.is_done for read in reads):
                self._done.wait()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._wanted.clear()
            self._guessed.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _next(self) -> Read[Piece] | None:
        """Under the lock: what to read now."""
        for queue in (self._wanted, self._guessed):
            while queue:
                read = queue.popleft()
                if not read.is_started:
                    return read
        return None

    def _take(self) -> Read[Piece] | None:
        """The next piece, which is started; None once closed."""
        with self._changed:
            while not self._is_closed:
                read = self._next()
                if read is not None:
                    read.is_started = True
                    return read
                self._changed.wait()
        return None

    def _run(self) -> None:
        while (read := self._take()) is not None:
            read.start_seconds = time.perf_counter()
            try:
                self._read(read.piece)
            except BaseException as error:
                read.error = error
            read.end_seconds = time.perf_counter()
            with self._done:
                read.is_done = True
                self._done.notify_all()
