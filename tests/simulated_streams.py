"""A device with two queues on the CPU, which runs what was launched as late as it may."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from edge_moe.runtime.streams import Streams


@dataclass(eq=False)
class SimulatedMark:
    is_reached: bool = False


class SimulatedStreams(Streams):
    """Runs queued work in any order that the marks allow, by the dice of `random`. Thread-safe."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._lock = threading.RLock()
        self._copies: deque[Callable[[], bool]] = deque()
        self._kernels: deque[Callable[[], bool]] = deque()
        self.host_bytes = 0
        self.is_closed = False

    def launch(self, kernel: Callable[[], None]) -> None:
        """A kernel of the model's."""
        self._kernels.append(_work(kernel))

    def run_some(self, most: int) -> None:
        """Let the device go on for up to `most` pieces of work."""
        for _ in range(self._random.randint(0, most)):
            self._step()

    def run_all(self) -> None:
        """Until nothing is left."""
        while self._copies or self._kernels:
            if not self._step():
                raise AssertionError("the queues wait for each other")

    def copy(self, source: Tensor, target: Tensor, after: SimulatedMark | None) -> SimulatedMark:
        with self._lock:
            if after is not None:
                self._copies.append(lambda: after.is_reached)
            self._copies.append(_work(lambda: target.copy_(source)))
            return self._mark(self._copies)

    def mark_compute(self) -> SimulatedMark:
        return self._mark(self._kernels)

    def compute_waits_for(self, mark: SimulatedMark) -> None:
        self._kernels.append(lambda: mark.is_reached)

    def is_reached(self, mark: SimulatedMark) -> bool:
        return mark.is_reached

    def wait(self, mark: SimulatedMark) -> None:
        while not mark.is_reached:
            with self._lock:
                if not mark.is_reached and not self._step():
                    raise AssertionError("nobody can reach what is waited for")

    def stalled_seconds(self) -> float:
        return 0.0

    def host_memory(self, num_bytes: int) -> Tensor:
        self.host_bytes += num_bytes
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def close(self) -> None:
        self.run_all()
        self.is_closed = True

    def _mark(self, queue: deque[Callable[[], bool]]) -> SimulatedMark:
        mark = SimulatedMark()

        def reach() -> bool:
            mark.is_reached = True
            return True

        queue.append(reach)
        return mark

    def _step(self) -> bool:
        """One piece of work of one queue; False where both are blocked."""
        queues = [self._copies, self._kernels]
        with self._lock:
            self._random.shuffle(queues)
            for queue in queues:
                if queue and queue[0]():
                    queue.popleft()
                    return True
            return False


def _work(action: Callable[[], object]) -> Callable[[], bool]:
    def run() -> bool:
        action()
        return True

    return run
