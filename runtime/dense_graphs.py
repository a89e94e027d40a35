"""What lies between a token's experts, captured once and replayed: CUDA graphs of dense segments.

A token's way through the model is cut where experts are computed: which of them, the host has to
know. Before, between and after those cuts nothing depends on the host, if the cache has a fixed
size and the token, its position and the mask are read from memory: that is captured while the
model's own code runs, and replayed for later tokens by launching as many graphs as there are MoE
layers, and one more.

Attention is over the first `length` places of the cache, those not reached yet masked: a power of
two, so that a few captures serve a whole context. Sums of softmax over zeros that the plain path
does not have are added in another order, so logits agree but for rounding.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edge_moe.runtime.interleaved_trial import InterleavedTrial
from edge_moe.runtime.kv_cache import PreallocatedLayer

SHORTEST_LENGTH = 256
MOST_DIFFERENCE = 0.05
"""Of the norm of logits: how far a replay may be from running the same code."""


class Graph(ABC):
    """Work of the device that can be launched again, on the same memory."""

    @abstractmethod
    def begin(self) -> None:
        """What is launched from here on is captured, not done."""

    @abstractmethod
    def end(self) -> None:
        """... until here."""

    @abstractmethod
    def replay(self) -> None:
        """Do it."""


class Capture(ABC):
    """Makes graphs that use memory together: replay them in the order of their capture."""

    @abstractmethod
    def around(self) -> AbstractContextManager[None]:
        """For everything that is captured one after another, and what is done in between."""

    @abstractmethod
    def new_graph(self) -> Graph:
        """An empty one."""


class _CudaGraph(Graph):
    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def begin(self) -> None:
        # only this thread's calls can spoil it: another one copies experts meanwhile
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class CudaCapture(Capture):
    """CUDA captures on a stream that is not the default one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def around(self) -> Iterator[None]:
        before = torch.cuda.current_stream(self._device)
        gc.collect()  # freeing a tensor of another stream would end the capture
        torch.cuda.synchronize(self._device)
        self._stream.wait_stream(before)
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            gc.enable()
            before.wait_stream(self._stream)

    def new_graph(self) -> Graph:
        return _CudaGraph(self._pool)


@dataclass(frozen=True)
class _Stop:
    """Where the experts of a layer are computed, between two segments. All memory is fixed."""

    experts: Any
    layer: int
    hidden: Tensor
    rows: Tensor
    weights: Tensor
    output: Tensor


class Segments:
    """One way through the model as graphs and stops; `pager` computes experts at the stops."""

    def __init__(self, pager: Any, modules: Sequence[Any], capture: Capture) -> None:
        """`modules` are the experts modules of all MoE layers."""
        self._pager = pager
        self._modules = modules
        self._capture = capture
        self._graphs: list[Graph] = []
        self._stops: list[_Stop] = []
        self._output: Tensor | None = None
        self.pager_error: BaseException | None = None
        """What computing experts raised while the rest was captured."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Capture what `run` launches, doing it as well; its output, in memory that stays.

        Raises what capturing raises where the model's code cannot be captured.
        """
        for module in self._modules:
            object.__setattr__(module, "edge_moe_pager", self)
        try:
            with self._capture.around():
                self._begin()
                try:
                    output: Tensor = run()
                except BaseException:
                    with suppress(RuntimeError):  # says again that the capture was spoilt
                        self._graphs[-1].end()
                    raise
                self._graphs[-1].end()
                self._graphs[-1].replay()
        finally:
            for module in self._modules:
                object.__setattr__(module, "edge_moe_pager", self._pager)
        self._output = output
        return output

    def replay(self) -> Tensor:
        """Do it again, with what is in the inputs' memory now."""
        if self._output is None:
            raise RuntimeError("nothing was captured")
        for graph, stop in zip(self._graphs, self._stops, strict=False):
            graph.replay()
            found = self._pager.forward(
                stop.experts, stop.layer, stop.hidden, stop.rows, stop.weights
            )
            stop.output.copy_(found)
        self._graphs[-1].replay()
        return self._output

    def forward(
        self, experts: Any, layer: int, hidden: Tensor, rows: Tensor, weights: Tensor
    ) -> Tensor:
        """In the pager's place while capturing: a segment ends here, and the next one begins."""
        self._graphs[-1].end()
        self._graphs[-1].replay()
        try:
            found = self._pager.forward(experts, layer, hidden, rows, weights)
            output: Tensor = found.clone()
        except BaseException as error:
            self.pager_error = error
            raise
        finally:
            self._begin()
        self._stops.append(_Stop(experts, layer, hidden, rows, weights, output))
        return output

    def _begin(self) -> None:
        self._graphs.append(self._capture.new_graph())
        self._graphs[-1].begin()


class GraphedStep:
    """Decodes single tokens of one sequence by replaying; belongs to the sequence's cache."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        pager: Any,
        modules: Sequence[Any],
        capture: Capture,
        context_tokens: int,
        shortest_length: int = SHORTEST_LENGTH,
    ) -> None:
        self._model = model
        self._cache = cache
        self._pager = pager
        self._modules = modules
        self._capture = capture
        self._context_tokens = context_tokens
        self._length = 0
        self._shortest = shortest_length
        self._segments: Segments | None = None
        self._is_checked = False
        self.reason = _unfit(cache)
        """Why the sequence cannot be decoded this way; empty while it can."""

    def step(self, token_id: int) -> Tensor | None:
        """Logits [V] after one token more; None, and nothing is done, where it cannot be.

        Raises what computing experts raises.
        """
        position = self._cache.layers[0].get_seq_length()
        if self.reason or not position or position >= self._context_tokens:
            return None
        if self._pager.recorder is not None:  # what runs twice would be written down twice
            return None
        if position >= self._length:
            self._start(position)
        self._token.fill_(token_id)
        self._position.fill_(position)
        self._mask[..., : position + 1] = 0
        with self._fixed_cache():
            logits = self._replayed() if self._segments is not None else self._captured()
        if logits is None:
            return None
        for layer in self._cache.layers:
            layer.advance()
        return logits[0, -1].clone()  # the next token overwrites it

    def _start(self, position: int) -> None:
        """Fixed memory for a cache that is looked at up to a length beyond `position`."""
        self._segments, self._is_checked = None, False
        length = self._shortest
        while length <= position:
            length *= 2
        self._length = min(length, self._context_tokens)
        keys = self._cache.layers[0].keys
        device, dtype = keys.device, keys.dtype
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._mask = torch.full(
            (1, 1, 1, self._length), torch.finfo(dtype).min, dtype=dtype, device=device
        )

    def _run(self) -> Tensor:
        logits: Tensor = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits

    def _captured(self) -> Tensor | None:
        segments = Segments(self._pager, self._modules, self._capture)
        try:
            self._run()  # libraries set themselves up on their first call, which is no work to keep
            logits = segments.capture(self._run)
        except Exception as error:
            if segments.pager_error is not None:
                raise segments.pager_error from None
            problem = (str(error) or repr(error)).splitlines()[0]
            self.reason = f"capturing failed: {problem}"
            return None
        self._segments = segments
        return logits

    def _replayed(self) -> Tensor | None:
        """The first time, also what the model's code gives, to be compared."""
        if self._segments is None:
            return None
        if self._is_checked:
            return self._segments.replay()
        wanted = self._run().float()
        logits = self._segments.replay()
        self._is_checked = True
        difference = torch.linalg.vector_norm(logits.float() - wanted)
        if not bool(difference <= MOST_DIFFERENCE * torch.linalg.vector_norm(wanted)):
            self.reason = "replayed logits differ from what the model's code gives"
            self._segments = None
            return None
        return logits

    @contextmanager
    def _fixed_cache(self) -> Iterator[None]:
        for layer in self._cache.layers:
            layer.fix(self._position, self._length)
        try:
            yield
        finally:
            for layer in self._cache.layers:
                layer.fix(None, 0)


class DenseGraphs:
    """Of one session: gives every sequence its `GraphedStep`, and knows why there is none."""

    def __init__(
        self,
        model: Any,
        pager: Any,
        modules: Sequence[Any],
        capture: Capture | None,
        context_tokens: int,
        *,
        trial: InterleavedTrial | None = None,
        reason: str = "",
    ) -> None:
        """`modules` are the experts modules of all MoE layers; `trial` says when to replay.

        `reason`: why nothing is captured, where that is clear from the start.
        """
        self._model = model
        self._pager = pager
        self._modules = modules
        self._capture = capture
        self._context_tokens = context_tokens
        self.trial = trial
        self._reason = reason
        self._last: GraphedStep | None = None

    def start(self, cache: Any) -> GraphedStep | None:
        """For a new sequence; None where it is to be decoded as usual."""
        if self.reason or self._capture is None:
            return None
        self._last = GraphedStep(
            *(self._model, cache, self._pager, self._modules, self._capture),
            context_tokens=self._context_tokens,
        )
        return self._last

    @property
    def is_on(self) -> bool:
        """Whether the next token is to be replayed, if it can."""
        return self.trial is None or self.trial.is_on

    @property
    def reason(self) -> str:
        """Why tokens are not replayed; empty where they can be."""
        if self._last is not None and self._last.reason:
            self._reason = self._last.reason
        return self._reason

    @property
    def label(self) -> str:
        """`on`, or `off` and why, for whoever reads the statistics."""
        if self.reason:
            return f"off ({self.reason})"
        verdict = self.trial.verdict if self.trial is not None else True
        if verdict is None:
            return "by turns: too few tokens to say what is faster"
        return "on" if verdict else "off (no faster here)"


def _unfit(cache: Any) -> str:
    """Why a cache has no fixed size; empty where it has."""
    other = next((each for each in cache.layers if type(each) is not PreallocatedLayer), None)
    if other is None:
        return ""
    return f"layers that keep a window or a state are not captured ({type(other).__name__})"
