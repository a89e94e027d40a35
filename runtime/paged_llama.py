"""A GGUF model in llama.cpp whose routed experts are paged by us; the rest is llama.cpp's.

Loading reads everything but the experts. While a graph runs, llama.cpp's evaluation callback hands
over the choice of every router (`ffn_moe_topk`), and goes on when the chosen experts are there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_moe.errors import InputError
from edge_moe.formats import ggml_library
from edge_moe.gguf_model import GgufModel
from edge_moe.measurement import usable_cores
from edge_moe.runtime.gguf_experts import GgufExperts
from edge_moe.runtime.interleaved_trial import FastestOf
from edge_moe.runtime.llama_api import LlamaApi, llama_api
from edge_moe.runtime.llama_log import llama_log
from edge_moe.runtime.llama_predict import BlockInputs
from edge_moe.runtime.llama_rearrange import Rearranger
from edge_moe.runtime.llama_region import ExpertRegion
from edge_moe.runtime.llama_stream import ModelStream, c_stream, model_pieces
from edge_moe.runtime.llama_uses import ExpertUses
from edge_moe.runtime.llama_watch import WatchedGraph
from edge_moe.runtime.predictors import Predictor
from edge_moe.runtime.read_ahead import ReadAhead

if TYPE_CHECKING:
    from edge_moe.runtime.trace import TraceRecorder

TOPK = "ffn_moe_topk"
"""Node with the ids that a layer's router chose, int32 [T, k], rows apart in memory."""
_MOE_NODES = b"ffn_moe_"
"""How the names of nodes between a router and the sum over its experts begin."""
_LOAD_MODE_NONE = 0
_RECORDED_TOKENS = 32
"""Computed at once while routers are recorded: llama.cpp's last layer routes only tokens whose
logits are wanted, so all are, and they take room."""
_RELEASE_BYTES = 16 * 2**20
"""Loading touches so much of the experts' memory at most."""


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class LoadedModel:
    """llama.cpp's model, and the memory of its experts, which holds nothing yet."""

    def __init__(
        self, model: GgufModel, gpu_layers: int = 0, *, rearranges_dense: bool = False
    ) -> None:
        """Load `model`, for which `llama_probe.require_loadable` holds.

        All but the experts of the last `gpu_layers` layers goes to a GPU: see `llama_gpu`. With
        `rearranges_dense` llama.cpp puts dense matrices as its faster kernels want them, where it
        has some: as it does by default.

        Memory: the weights outside routed experts, and 16 MB of experts at a time.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            InputError: llama.cpp refuses the file, or keeps experts elsewhere.
            CheckpointError, OSError: the file cannot be read.
        """
        self.api: LlamaApi = llama_api(model.path)
        self.region = ExpertRegion(ggml_library.library())
        self._rearranger: Rearranger | None = None
        self._touched_bytes = 0
        names = model.expert_tensors
        stream = ModelStream(model_pieces(model, names), self._on_skipped)
        overrides = (_Override * 2)(
            _Override(_pattern(names), self.region.buffer_type), _Override(None, None)
        )
        llama = self.api.llama
        llama.llama_backend_init()
        parameters = llama.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        parameters.load_mode = _LOAD_MODE_NONE
        parameters.use_extra_bufts = rearranges_dense
        parameters.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        with c_stream(stream) as file, llama_log() as log:
            self.pointer = llama.llama_model_load_from_file_ptr(file, parameters)
        if stream.error is not None:
            self.close()
            raise stream.error
        if not self.pointer:
            self.close()
            raise InputError(
                f"{model.path}: llama.cpp cannot load it ({log.last}): download or export it again"
            )
        self._require_all(model, names)
        self.api.require_known_layout(self.region.tensor(min(names)))
        self.region.settle()

    def rearranger(self) -> Rearranger:
        """What turns experts over to faster kernels, before a context is made."""
        if self._rearranger is None:
            self._rearranger = Rearranger(self.api.llama)
        return self._rearranger

    def close(self) -> None:
        """Free the model, then the experts' memory."""
        if self.pointer:
            self.api.llama.llama_model_free(self.pointer)
        self.pointer = None
        self.region.close()
        if self._rearranger is not None:
            self._rearranger.close()

    def _on_skipped(self, num_bytes: int) -> None:
        self._touched_bytes += num_bytes
        if self._touched_bytes >= _RELEASE_BYTES:
            self.region.give_back_all()
            self._touched_bytes = 0

    def _require_all(self, model: GgufModel, names: frozenset[str]) -> None:
        elsewhere = names - self.region.names
        if elsewhere:
            self.close()
            raise InputError(
                f"{model.path}: llama.cpp did not put {min(elsewhere)!r} where experts can be "
                "paged: run it with llama.cpp itself"
            )


def _pattern(names: frozenset[str]) -> bytes:
    """A regular expression for exactly these tensors; layers differ by number alone."""
    endings = sorted({re.escape(name.split(".", 2)[2]) for name in names})
    return f"^blk\\.[0-9]+\\.({'|'.join(endings)})$".encode()


class PagedContext(WatchedGraph):
    """A sequence in llama.cpp; `decode` pages what the routers choose."""

    def __init__(
        self,
        model: GgufModel,
        loaded: LoadedModel,
        experts: GgufExperts,
        *,
        context_tokens: int,
        batch_tokens: int,
        is_watched: bool,
        inputs: BlockInputs,
        read_ahead: ReadAhead | None = None,
        may_cut: bool = True,
    ) -> None:
        """`batch_tokens` are computed at a time, so that their experts fit together.

        `may_cut`: no layer forgets tokens of its own accord, so that a sequence can be cut.
        `is_watched`: the routers' choices are paged in, or can be recorded; else llama.cpp computes
        whole graphs, and every expert has to be there.

        Raises:
            InputError: llama.cpp cannot make the context.
        """
        path = model.path
        super().__init__(loaded.api, path, (_MOE_NODES, *inputs.beginnings))
        self._experts = experts
        self._batch_tokens = batch_tokens
        self.inputs = inputs
        """What predictors can ask about, while routers are recorded or experts read ahead."""
        self._read_ahead = read_ahead
        self._may_cut = may_cut
        self._layers = {f"{TOPK}-{id_}": layer for layer, id_ in enumerate(experts.layer_ids)}
        self._recorder: TraceRecorder | None = None
        self._rankers: Mapping[str, Predictor] = {}
        self._seen: set[int] = set()
        self._uses = ExpertUses(loaded.api, loaded.region, experts, model)
        self._sequence: list[int] = []
        """Tokens in the KV cache."""
        self._num_new = 0
        llama = self._api.llama
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context_tokens
        parameters.n_batch = parameters.n_ubatch = batch_tokens
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = usable_cores()
        parameters.op_offload = False  # experts are where they are paged to
        parameters.swa_full = False  # sliding layers hold a window, as the bill says
        if is_watched:
            parameters.cb_eval = self._callback
        self._is_watched = is_watched
        with llama_log() as log:
            self._context = llama.llama_init_from_model(loaded.pointer, parameters)
        if not self._context:
            raise InputError(
                f"{path}: llama.cpp cannot run a context of {context_tokens} tokens ({log.last}): "
                "lower --ctx"
            )

    @property
    def prefetch_trial(self) -> FastestOf | None:
        """Whose guesses pay here, where that is being tried."""
        return None if self._read_ahead is None else self._read_ahead.trial

    def record(
        self, recorder: TraceRecorder | None, rankers: Mapping[str, Predictor] | None = None
    ) -> None:
        """Write every choice of a router into `recorder` from now on, and what `rankers` guess.

        Raises:
            InputError: the routers are not watched.
        """
        if recorder is not None and not self._is_watched:
            raise InputError(
                f"{self._path}: its routers are not watched: open it with can_trace, or a budget"
            )
        self._recorder, self._rankers = recorder, rankers or {}

    def clear(self) -> None:
        """Forget the sequence."""
        llama = self._api.llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._sequence = []

    def keep_prefix(self, token_ids: Sequence[int]) -> int:
        """Forget the sequence, but for what it has in common with the start of `token_ids`.

        Returns the number of tokens kept, 0 where the model's memory cannot be cut (recurrent
        states, sliding windows). At least the last of `token_ids` is left to be computed.
        """
        if not self._may_cut:
            self.clear()
            return 0
        pairs = zip(self._sequence, token_ids[:-1], strict=False)
        common = next((at for at, (old, new) in enumerate(pairs) if old != new), None)
        if common is None:
            common = min(len(self._sequence), len(token_ids) - 1)
        llama = self._api.llama
        memory = llama.llama_get_memory(self._context)
        if not common or not llama.llama_memory_seq_rm(memory, 0, common, -1):
            self.clear()
            return 0
        self._sequence = self._sequence[:common]
        return common

    def decode(self, token_ids: Sequence[int], start: int, *, keep_all: bool = False) -> Any:
        """Compute tokens at positions `start`...; float32 logits [1 or T, V].

        Raises:
            InputError: ids that the model does not know, or experts that do not fit together.
            CheckpointError, OSError: experts could not be read; `clear` before going on.
        """
        if len(token_ids) == 1 and self._read_ahead is not None:
            self._read_ahead.start_token(token_ids[0])
        rows = []
        step = self._batch_tokens
        if self._recorder is not None:
            step = min(step, _RECORDED_TOKENS)
        for at in range(0, len(token_ids), step):
            piece = token_ids[at : at + step]
            is_last = at + len(piece) == len(token_ids)
            rows.append(self._decode_piece(piece, start + at, keep_all, is_last))
        if len(token_ids) == 1 and self._read_ahead is not None:
            self._read_ahead.end_token()
        return np.concatenate([row for row in rows if row is not None])

    def close(self) -> None:
        if self._context:
            self._api.llama.llama_free(self._context)
        self._context = None

    def _decode_piece(
        self, token_ids: Sequence[int], start: int, keep_all: bool, is_last: bool
    ) -> npt.NDArray[np.float32] | None:
        llama, count = self._api.llama, len(token_ids)
        is_recorded = self._recorder is not None
        self._num_new, self._seen = count, set()
        self._uses.forget()
        held, self._sequence = self._sequence, []  # unknown, should it fail
        if self._recorder is not None:
            self._recorder.begin(token_ids)
        with self._interrupts.hold():  # not between two lines of bookkeeping, either
            self._compute(
                *(self._context, token_ids, start),
                lambda index: is_recorded or keep_all or (is_last and index == count - 1),
            )
            self._uses.end()
            self._experts.settle()
            self._require_all_seen()
            self._experts.require_unchanged()
        self._sequence = [*held[:start], *token_ids]
        if not keep_all and not is_last:
            return None
        width = llama.llama_vocab_n_tokens(
            llama.llama_model_get_vocab(llama.llama_get_model(self._context))
        )
        first = 0 if keep_all else count - 1
        found = [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, index), (width,)).copy()
            for index in range(first, count)
        ]
        return np.stack(found)

    def _require_all_seen(self) -> None:
        """A layer whose router was not seen would have computed with experts that are not there."""
        if self._is_watched and len(self._seen) < len(self._layers):
            missing = min(set(self._layers.values()) - self._seen)
            raise InputError(
                f"{self._path}: llama.cpp's graph has no node {TOPK} in layer "
                f"{self._experts.layer_ids[missing]}: its experts cannot be paged; give a budget "
                "that holds them all"
            )

    def _wants(self, name: str, tensor: int) -> bool:
        if self._recorder is not None or (self._read_ahead is not None and self._read_ahead.is_on):
            self.inputs.see(name, tensor)
        if name in self._layers:
            return True
        return self._uses.must_stop_after(name, tensor)

    def _receive(self, tensor: int, name: str) -> bool:
        layer = self._layers.get(name)
        if layer is not None:
            self._page_in(layer, self._api.strided_int32(tensor))
        return True

    def _page_in(self, layer: int, chosen: npt.NDArray[np.int32]) -> None:
        """Wait for the experts [T, k] of a layer, and start on those of the next."""
        self._seen.add(layer)
        is_known = self._uses.begin(layer)
        if self._recorder is not None:
            self._write(self._recorder, layer, chosen)
        rows = sorted(chosen[0].tolist()) if len(chosen) == 1 else np.unique(chosen).tolist()
        self._experts.require(layer, rows)
        if not is_known:
            self._experts.wait_for_all(layer)
        if self._read_ahead is not None and self._num_new == 1:
            guessed = self._read_ahead.guess(layer, rows)
            self._experts.prefetch(layer + 1, guessed, [(layer, row) for row in rows])

    def _write(self, recorder: TraceRecorder, layer: int, chosen: npt.NDArray[np.int32]) -> None:
        """The choice of a layer, and of single tokens the guess of the next."""
        recorder.add_rows(layer, chosen)
        if self._num_new > 1 or layer + 1 == len(self._layers):
            return
        for name, predictor in self._rankers.items():
            recorder.add_guess(name, layer + 1, predictor.guess(layer, []))
