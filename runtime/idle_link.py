"""`IdleLink`: what can be read ahead without keeping anybody waiting."""

from __future__ import annotations

from collections.abc import Sequence

from edge_moe.runtime.gguf_slices import Slice
from edge_moe.runtime.read_queue import Read


class IdleLink:
    """How much the disk can read from a layer's last expert to the next router's choice.

    What is wanted goes before what is guessed, so guesses that fit there delay nothing, whether
    they come true or not. Means are exponential: threads, disks and contexts change.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self.bytes_per_second = 0.0
        """Of the pieces of a layer together; 0 before any was read."""
        self.idle_seconds = 0.0
        """... from the last wanted piece's arrival to the next choice."""
        self.layer_seconds = 0.0
        """... from choice to choice, where nothing was wanted."""
        self._start_seconds: float | None = None

    def begin(self, now: float) -> None:
        """A router has chosen, at this `time.perf_counter`."""
        self._start_seconds = now

    def forget(self) -> None:
        """What comes next is no router's choice."""
        self._start_seconds = None

    def end(self, reads: Sequence[Read[Slice]], now: float) -> None:
        """The next router has chosen, `now`; `reads` were wanted since `begin`.

        Some of them may be guesses that came true: those were begun before.
        """
        start, self._start_seconds = self._start_seconds, None
        if start is None:
            return
        reads = [read for read in reads if read.start_seconds >= start]
        if not reads:
            self.layer_seconds = self._mean(self.layer_seconds, now - start)
            return
        num_bytes = sum(read.piece.num_bytes for read in reads)
        first = min(read.start_seconds for read in reads)
        last_read = max(reads, key=lambda read: read.end_seconds)
        last = last_read.end_seconds
        if last_read.is_end_known:
            self._learn_rate(num_bytes, last - first)
        elif self.bytes_per_second:
            last = min(last, first + num_bytes / self.bytes_per_second)
        self.idle_seconds = self._mean(self.idle_seconds, max(0.0, now - last))

    def spare_bytes(self, *, is_reading: bool) -> int:
        """What a guess may read for the next layer; `is_reading`: this one waits for experts."""
        seconds = self.idle_seconds if is_reading else self.layer_seconds or self.idle_seconds
        return int(seconds * self.bytes_per_second)

    def _learn_rate(self, num_bytes: int, seconds: float) -> None:
        if seconds > 0:
            self.bytes_per_second = self._mean(self.bytes_per_second, num_bytes / seconds)

    def _mean(self, known: float, seen: float) -> float:
        return self._decay * known + (1 - self._decay) * seen if known else seen
