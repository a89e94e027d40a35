"""Graphs on the CPU: what torch did is written down, and done again on the same memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from edge_moe.runtime.dense_graphs import Capture, Graph

_ASKING = {
    getattr(torch.ops.aten, name)
    for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select")
}
"""What waits for the device, or has a size that it decides."""


class RecordedGraph(Graph):
    """As a CUDA graph, but that recording does the work, too: the first replay is left out."""

    def __init__(self) -> None:
        self._mode = _Recorder()
        self._is_done = False

    def begin(self) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._is_done = True

    def replay(self) -> None:
        if self._is_done:
            self._is_done = False
            return
        for function, arguments, keywords, outputs in self._mode.calls:
            found, _ = tree_flatten(function(*arguments, **keywords))
            for old, new in zip(outputs, found, strict=True):
                if isinstance(old, Tensor) and not _is_same(old, new):
                    old.copy_(new)


class RecordedCapture(Capture):
    """Counts its graphs."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def around(self) -> AbstractContextManager[None]:
        return nullcontext()

    def new_graph(self) -> Graph:
        self.num_graphs += 1
        return RecordedGraph()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _ASKING:
            raise RuntimeError("the host asked for a value while it was captured")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_flatten(found)[0]))
        return found


def _is_same(old: Tensor, new: Tensor) -> bool:
    """Whether both are the same memory, as views and results in place are."""
    return old.data_ptr() == new.data_ptr()
