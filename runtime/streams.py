"""A device's two queues, one of kernels and one of copies, and points in them to wait for.

What is launched in a queue runs in order, whenever the device gets to it; between the queues there
is no order but that of `Streams`' marks.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections import deque
from typing import Any

import torch
from torch import Tensor

from edge_moe.errors import InputError
from edge_moe.units import format_bytes

Mark = Any
"""A point in a queue; it is reached when all that was launched before it is done."""


class Streams(ABC):
    """Kernels are launched by the model's thread alone, copies by any thread."""

    @abstractmethod
    def copy(self, source: Tensor, target: Tensor, after: Mark | None) -> Mark:
        """Launch a copy into device memory, to run once `after` is reached; the mark of its end.

        `source` must come from `host_memory`, and stay as it is until then.
        """

    @abstractmethod
    def mark_compute(self) -> Mark:
        """The point after all kernels that were launched."""

    @abstractmethod
    def compute_waits_for(self, mark: Mark) -> None:
        """Kernels that are launched from now on run once `mark` is reached."""

    @abstractmethod
    def is_reached(self, mark: Mark) -> bool:
        """Whether what comes before `mark` is done; asks without waiting."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """Hold the calling thread until `mark` is reached."""

    @abstractmethod
    def stalled_seconds(self) -> float:
        """Time that kernels waited for copies, as far as it is known and was not told before."""

    @abstractmethod
    def host_memory(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of RAM that the device copies from; `close` frees it.

        Raises:
            InputError: the machine does not give so much.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for every copy, and free the host memory."""


class CudaStreams(Streams):
    """A stream for copies beside torch's current one.

    Make it after the tensors that copies will fill: their memory may have been used before by
    kernels that are still running, and the first copy waits for those.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copies.wait_stream(torch.cuda.current_stream(device))
        self._waits: deque[tuple[Any, Any]] = deque()
        self._pinned: list[_PinnedMemory] = []

    def copy(self, source: Tensor, target: Tensor, after: Mark | None) -> Mark:
        with torch.cuda.stream(self._copies):
            if after is not None:
                self._copies.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self._copies.record_event(_event(blocking=True))  # whoever waits may sleep

    def mark_compute(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def compute_waits_for(self, mark: Mark) -> None:
        if mark.query():
            return
        stream = torch.cuda.current_stream(self._device)
        before, after = _event(enable_timing=True), _event(enable_timing=True)
        before.record(stream)
        stream.wait_event(mark)
        after.record(stream)
        self._waits.append((before, after))

    def is_reached(self, mark: Mark) -> bool:
        return bool(mark.query())

    def wait(self, mark: Mark) -> None:
        mark.synchronize()

    def stalled_seconds(self) -> float:
        milliseconds = 0.0
        while self._waits and self._waits[0][1].query():
            before, after = self._waits.popleft()
            milliseconds += float(before.elapsed_time(after))
        return milliseconds / 1000

    def host_memory(self, num_bytes: int) -> Tensor:
        memory = _PinnedMemory(num_bytes)
        self._pinned.append(memory)
        return memory.tensor

    def close(self) -> None:
        self._copies.synchronize()
        while self._pinned:
            self._pinned.pop().close()


def _event(**options: bool) -> Any:
    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call]


def _runtime() -> Any:
    """CUDA's own functions."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _PinnedMemory:
    """RAM of exactly the size asked for, which CUDA keeps in place.

    torch's own pinned tensors are rounded up to a power of two: 9 GB would take 16.
    """

    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)
        status = int(_runtime().cudaHostRegister(self.tensor.data_ptr(), num_bytes, 0))
        if status:
            raise InputError(
                f"{format_bytes(num_bytes)} of RAM cannot be pinned for the GPU (CUDA error "
                f"{status}): lower --ram, or free RAM"
            )

    def close(self) -> None:
        """Let the system have it back, once nobody holds the tensor."""
        _runtime().cudaHostUnregister(self.tensor.data_ptr())
