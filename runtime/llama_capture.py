"""What every MoE block of a GGUF file did on a window of text, taken out of llama.cpp's own graph.

llama.cpp calls back for the nodes that are asked for (`cb_eval`), and computes the graph up to the
next of them in one go. The model runs at top_k + 1: the callback sets the weight of the expert
ranked last to zero and divides the others as the router does, so the block computes what it always
computes, and the output of the expert that would have been next comes with it.

Letters: T tokens of one piece of a window, H hidden_size, E experts, k top_k, K = k + 1 slots, or k
where no further expert can be chosen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError
from edge_moe.measurement import usable_cores
from edge_moe.runtime.llama_api import llama_api
from edge_moe.runtime.llama_graph import (
    ARCHITECTURES,
    RANKING,
    WEIGHTS,
    GraphNodes,
    batch_tokens,
    check_architecture,
    metadata_overrides,
    num_slots,
    real_gates,
)
from edge_moe.runtime.llama_log import llama_log
from edge_moe.runtime.llama_probe import override_array, require_loadable
from edge_moe.runtime.llama_watch import WatchedGraph
from edge_moe.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

_GGML_TYPE_F32 = 0
_LOAD_MODE_MMAP = 1


@dataclass(frozen=True)
class BlockCapture:
    """One MoE block on one piece of a window."""

    inputs: FloatArray
    """[T, H] what the block was given; where experts take a latent, what that is made of."""
    logits: FloatArray
    """[T, E] of the router."""
    expert_ids: npt.NDArray[np.int32]
    """[T, K] best first; the last one is chosen only when another is dropped, where K > k."""
    gates: FloatArray
    """[T, k] the weights that the outputs were multiplied with."""
    shares: FloatArray
    """[T, K] the weights when the router chooses K experts."""
    outputs: FloatArray
    """[T, K, what an expert gives] un-gated; times the expert's factor, where it has one."""
    block_output: FloatArray
    """[T, H] routed and shared experts."""
    hidden: FloatArray
    """[T, H] after the layer."""


TakeBlock = Callable[[int, slice, BlockCapture], None]
"""Is given (layer_id, tokens of the window, what its block did)."""


class LlamaCapture(WatchedGraph):
    """A GGUF file whose MoE blocks are watched. Runs on the CPU, weights mapped from the file."""

    def __init__(self, path: Path, spec: ModelSpec, architecture: str, window_tokens: int) -> None:
        """Load `path`, for which `require_capturable` holds (other files may end the process).

        Memory: the file, as pages that the system can drop; a float32 KV cache of `window_tokens`;
        logits and activations of `batch_tokens`.

        Raises:
            InputError: an architecture that has not been tested, or llama.cpp refuses the file.
            MissingExtraError: llama-cpp-python is not installed.
        """
        check_architecture(path, architecture)
        super().__init__(llama_api(path), path)
        self._spec = spec
        self._num_slots = num_slots(spec)
        self._nodes = GraphNodes(ARCHITECTURES[architecture], spec)
        self._batch_tokens = batch_tokens(spec, window_tokens)
        self._window_tokens = window_tokens
        self._found: dict[str, npt.NDArray[Any]] = {}
        self._gates: FloatArray | None = None
        self._tokens = slice(0, 0)
        self._take: TakeBlock | None = None
        self._model = self._context = None  # what `close` looks at, should loading fail
        self._model = self._load_model(architecture)
        self._context = self._make_context()

    def run(self, token_ids: Sequence[int], take: TakeBlock) -> None:
        """Run one window from an empty cache; `take` is called for every MoE layer and piece.

        Raises:
            InputError: a window that is too long, or token ids outside the vocabulary.
            CheckpointError: the file computes something else than its metadata says.
        """
        if len(token_ids) > self._window_tokens:
            raise InputError(
                f"{self._path}: a window of {len(token_ids)} tokens is longer than the "
                f"{self._window_tokens} that were asked for: use smaller windows"
            )
        llama = self._api.llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._take = take
        for start in range(0, len(token_ids), self._batch_tokens):
            piece = token_ids[start : start + self._batch_tokens]
            self._tokens = slice(start, start + len(piece))
            self._decode(piece, start)

    def close(self) -> None:
        """Give the model's memory back."""
        llama = self._api.llama
        if self._context is not None:
            llama.llama_free(self._context)
        if self._model is not None:
            llama.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ loading

    def _load_model(self, architecture: str) -> Any:
        llama = self._api.llama
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = _LOAD_MODE_MMAP
        parameters.use_extra_bufts = False  # repacked weights would be a copy in memory
        overrides = override_array(llama, metadata_overrides(architecture, self._spec))
        parameters.kv_overrides = overrides
        with llama_log() as log:
            model = llama.llama_model_load_from_file(os.fsencode(self._path), parameters)
        if not model:
            raise InputError(
                f"{self._path}: llama.cpp cannot load it ({log.last}): download or export it again"
            )
        return model

    def _make_context(self) -> Any:
        llama = self._api.llama
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = self._window_tokens
        parameters.n_batch = parameters.n_ubatch = self._batch_tokens
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = usable_cores()
        parameters.flash_attn_type = 0
        parameters.type_k = parameters.type_v = _GGML_TYPE_F32
        parameters.cb_eval = self._callback
        with llama_log() as log:
            context = llama.llama_init_from_model(self._model, parameters)
        if not context:
            self.close()
            raise InputError(
                f"{self._path}: llama.cpp cannot run windows of {self._window_tokens} tokens "
                f"({log.last}): use smaller windows"
            )
        return context

    # ------------------------------------------------------------------ running

    def _decode(self, token_ids: Sequence[int], start: int) -> None:
        self._nodes.restart()
        # the last layer drops tokens whose logits nobody wants
        self._compute(self._context, token_ids, start, lambda _: True)
        self._nodes.require_all(self._path)

    def _wants(self, name: str, tensor: int) -> bool:
        return self._nodes.wants(name)

    def _receive(self, tensor: int, name: str) -> bool:
        """Keep one node; False stops the graph once nothing more is needed of it."""
        num_tokens = self._tokens.stop - self._tokens.start
        kind, _, layer = name.rpartition("-")
        shape = self._nodes.shape(kind, num_tokens)
        dtype = np.int32 if kind == RANKING else np.float32
        self._found[kind] = self._api.read(tensor, name, shape, dtype, self._path)
        if kind == self._nodes.final_weights:
            self._set_gates(tensor)
        if kind != self._nodes.names.hidden:
            return True
        layer_id = int(layer)
        self._nodes.require_block(self._found, name)
        assert self._take is not None
        self._take(layer_id, self._tokens, self._block())
        self._found = {}
        return layer_id != self._spec.moe_layer_ids[-1]

    def _set_gates(self, tensor: int) -> None:
        """Compute the real gates and let the graph multiply with them, and the last with zero."""
        top_k = self._spec.top_k
        shares = self._found[self._nodes.final_weights]
        if self._num_slots == top_k:
            self._gates = shares
            return
        gates = np.zeros_like(shares)
        gates[:, :top_k] = real_gates(
            self._found[WEIGHTS][:, :top_k], self._nodes.names, self._spec
        )
        self._api.write(tensor, gates)
        self._gates = gates[:, :top_k]

    def _block(self) -> BlockCapture:
        found, names = self._found, self._nodes.names
        assert self._gates is not None
        return BlockCapture(
            inputs=found[names.inputs],
            logits=found[names.logits],
            expert_ids=found[RANKING][:, : self._num_slots],
            gates=self._gates,
            shares=found[self._nodes.final_weights],
            outputs=found[names.experts],
            block_output=found[names.output],
            hidden=found[names.hidden],
        )


def require_capturable(path: Path, spec: ModelSpec, architecture: str, window_tokens: int) -> None:
    """Refuse what `LlamaCapture` cannot open, before it ends this process.

    Raises:
        SpecError: as for `check_architecture`.
        InputError: llama.cpp refuses the file, or aborts on it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    check_architecture(path, architecture)
    llama_api(path)
    overrides = metadata_overrides(architecture, spec)
    require_loadable(path, window_tokens, batch_tokens(spec, window_tokens), overrides)
