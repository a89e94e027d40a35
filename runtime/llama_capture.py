"""What every MoE block of a GGUF file did on a window of text, taken out of llama.cpp's own graph.

llama.cpp calls back for the nodes that are asked for (`cb_eval`), and computes the graph up to the
next of them in one go. The model runs at top_k + 1: the callback sets the weight of the expert
ranked last to zero and divides the others as the router does, so the block computes what it always
computes, and the output of the expert that would have been next comes with it.

Letters: T tokens of one piece of a window, H hidden_size, E experts, k top_k, K = k + 1 slots, or k
where no further expert can be chosen.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from edge_moe.errors import CheckpointError, InputError, MissingExtraError, SpecError
from edge_moe.formats import ggml_library
from edge_moe.measurement import usable_cores
from edge_moe.runtime.llama_log import llama_log
from edge_moe.runtime.llama_probe import override_array, require_loadable
from edge_moe.spec import ModelSpec

FloatArray = npt.NDArray[np.float32]

_GGML_TYPE_F32 = 0
_LOAD_MODE_MMAP = 1
_LOGIT_BYTES = 2**27
"""llama.cpp keeps a row of logits per token of a batch: pieces of a window stay below this."""
_FEWEST_TOKENS = 32
_SMALLEST_SUM = np.float32(6.103515625e-5)
"""llama.cpp divides by no smaller sum of weights."""


@dataclass(frozen=True)
class BlockNodes:
    """How the graph of one architecture names what goes into a MoE block and what comes out."""

    output: str
    """Sum of the routed and the shared experts."""
    inputs: str = "ffn_norm"
    hidden: str = "l_out"
    """The hidden state after the layer."""


# llama.cpp 0c1e57098, src/models/<architecture>.cpp; all call build_moe_ffn of src/llama-graph.cpp
# with SwiGLU. `ffn_out` is something else in `llama`: the residual stream behind the block.
ARCHITECTURES = {
    "qwen3moe": BlockNodes(output="ffn_moe_out"),
    "olmoe": BlockNodes(output="ffn_moe_out"),
    "llama": BlockNodes(output="ffn_moe_out"),
    "qwen2moe": BlockNodes(output="ffn_out"),
    "deepseek2": BlockNodes(output="ffn_out"),
}

# nodes of build_moe_ffn
_LOGITS, _RANKING = "ffn_moe_logits", "ffn_moe_argsort"
_WEIGHTS, _NORMED, _SCALED = "ffn_moe_weights", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"
_EXPERTS = "ffn_moe_down"
_FOREIGN = (
    "ffn_moe_logits_biased",
    "ffn_moe_weights_softmax",
    "ffn_moe_up_clamped",
    "ffn_moe_up_scaled",
    "ffn_moe_gate_scaled",
    "ffn_moe_down_scaled",
    "ffn_moe_up_biased",
    "ffn_moe_gate_biased",
    "ffn_moe_down_biased",
)
"""A graph with one of these computes more than the statistics know of."""


@dataclass(frozen=True)
class BlockCapture:
    """One MoE block on one piece of a window."""

    inputs: FloatArray
    """[T, H] what the block was given."""
    logits: FloatArray
    """[T, E] of the router."""
    expert_ids: npt.NDArray[np.int32]
    """[T, K] best first; the last one is chosen only when another is dropped, where K > k."""
    gates: FloatArray
    """[T, k] the weights that the outputs were multiplied with."""
    shares: FloatArray
    """[T, K] the weights when the router chooses K experts."""
    outputs: FloatArray
    """[T, K, H] un-gated."""
    block_output: FloatArray
    """[T, H] routed and shared experts."""
    hidden: FloatArray
    """[T, H] after the layer."""


TakeBlock = Callable[[int, slice, BlockCapture], None]
"""Is given (layer_id, tokens of the window, what its block did)."""


class LlamaCapture:
    """A GGUF file whose MoE blocks are watched. Runs on the CPU, weights mapped from the file."""

    def __init__(self, path: Path, spec: ModelSpec, architecture: str, window_tokens: int) -> None:
        """Load `path`, for which `require_capturable` holds (other files may end the process).

        Memory: the file, as pages that the system can drop; a float32 KV cache of `window_tokens`;
        logits and activations of `batch_tokens`.

        Raises:
            InputError: an architecture that has not been tested, or llama.cpp refuses the file.
            MissingExtraError: llama-cpp-python is not installed.
        """
        check_architecture(path, architecture, spec)
        self._path = path
        self._spec = spec
        self._api = _api(path)
        self._num_slots = num_slots(spec)
        self._nodes = _Nodes(ARCHITECTURES[architecture], spec)
        self._batch_tokens = batch_tokens(spec, window_tokens)
        self._window_tokens = window_tokens
        self._found: dict[str, npt.NDArray[Any]] = {}
        self._gates: FloatArray | None = None
        self._tokens = slice(0, 0)
        self._take: TakeBlock | None = None
        self._error: BaseException | None = None
        # ctypes keeps no reference: the library would call freed memory
        self._callback = self._api.llama.ggml_backend_sched_eval_callback(self._on_node)
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
        llama = self._api.llama
        batch = llama.llama_batch_init(len(token_ids), 0, 1)
        try:
            batch.n_tokens = len(token_ids)
            for index, token_id in enumerate(token_ids):
                batch.token[index] = token_id
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = 1  # the last layer drops tokens whose logits nobody wants
            self._error = None
            self._nodes.restart()
            with llama_log() as log:
                code = llama.llama_decode(self._context, batch)
        finally:
            llama.llama_batch_free(batch)
        if self._error is not None:
            raise self._error
        if code != 0:
            raise InputError(
                f"{self._path}: llama.cpp stops with code {code} ({log.last}): do the token ids "
                "belong to this file?"
            )
        self._nodes.require_all(self._path)

    def _on_node(self, tensor: int, is_asking: bool, _data: object) -> bool:
        """llama.cpp's callback: asked whether a node is wanted, then given it."""
        if self._error is not None:
            return False
        try:
            name = self._api.name(tensor)
            if is_asking:
                return self._nodes.wants(name)
            return self._receive(tensor, name)
        except BaseException as error:  # must not unwind through C
            self._error = error
            return False

    def _receive(self, tensor: int, name: str) -> bool:
        """Keep one node; False stops the graph once nothing more is needed of it."""
        num_tokens = self._tokens.stop - self._tokens.start
        kind, _, layer = name.rpartition("-")
        shape = self._nodes.shape(kind, num_tokens)
        dtype = np.int32 if kind == _RANKING else np.float32
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
        gates[:, :top_k] = real_gates(self._found[_WEIGHTS][:, :top_k], self._spec)
        self._api.write(tensor, gates)
        self._gates = gates[:, :top_k]

    def _block(self) -> BlockCapture:
        found, names = self._found, self._nodes.names
        assert self._gates is not None
        return BlockCapture(
            inputs=found[names.inputs],
            logits=found[_LOGITS],
            expert_ids=found[_RANKING][:, : self._num_slots],
            gates=self._gates,
            shares=found[self._nodes.final_weights],
            outputs=found[_EXPERTS],
            block_output=found[names.output],
            hidden=found[names.hidden],
        )


def num_slots(spec: ModelSpec) -> int:
    """K: one more than top_k where the router could choose another expert."""
    router = spec.router
    eligible = router.top_groups * (spec.num_experts // router.num_groups)
    return min(spec.top_k + 1, eligible)


def batch_tokens(spec: ModelSpec, window_tokens: int) -> int:
    """Tokens that llama.cpp computes at a time."""
    return min(window_tokens, max(_FEWEST_TOKENS, _LOGIT_BYTES // (4 * spec.vocab_size)))


def metadata_overrides(architecture: str, spec: ModelSpec) -> dict[str, int]:
    """Ask for one expert more; files that leave the expert width out derive it from top_k."""
    values = {f"{architecture}.expert_used_count": num_slots(spec)}
    if architecture not in ("olmoe", "llama"):  # whose expert width is feed_forward_length
        values[f"{architecture}.expert_feed_forward_length"] = spec.expert_width
    return values


def require_capturable(path: Path, spec: ModelSpec, architecture: str, window_tokens: int) -> None:
    """Refuse what `LlamaCapture` cannot open, before it ends this process.

    Raises:
        SpecError: as for `check_architecture`.
        InputError: llama.cpp refuses the file, or aborts on it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    check_architecture(path, architecture, spec)
    _api(path)
    overrides = metadata_overrides(architecture, spec)
    require_loadable(path, window_tokens, batch_tokens(spec, window_tokens), overrides)


def real_gates(weights: FloatArray, spec: ModelSpec) -> FloatArray:
    """[T, k] scores of the chosen experts -> the weights llama.cpp multiplies with, in float32."""
    gates = weights
    if spec.router.renormalises:
        sums = weights.sum(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        gates = gates / np.maximum(sums, _SMALLEST_SUM)
    if spec.router.scale != 1.0:
        gates = gates * np.float32(spec.router.scale)
    return gates


def check_architecture(path: Path, architecture: str, spec: ModelSpec) -> None:
    """Refuse what has not been tested.

    Raises:
        SpecError: names the architecture or the activation function.
    """
    if architecture not in ARCHITECTURES:
        raise SpecError(
            f"{path}: calibration on llama.cpp is tested for {', '.join(ARCHITECTURES)}, not for "
            f"{architecture!r}: calibrate the Hugging Face checkpoint"
        )
    if spec.hidden_act != "silu":
        raise SpecError(
            f"{path}: calibration on llama.cpp knows experts with SwiGLU (silu), not "
            f"{spec.hidden_act!r}: calibrate the Hugging Face checkpoint"
        )


class _Nodes:
    """Which nodes of the graph are wanted, and whether the graph is the expected one."""

    def __init__(self, names: BlockNodes, spec: ModelSpec) -> None:
        self.names = names
        self._spec = spec
        self._slots = num_slots(spec)
        router = spec.router
        self.final_weights = _NORMED if router.renormalises else _WEIGHTS
        if router.scale != 1.0:
            self.final_weights = _SCALED
        kinds = {names.inputs, _LOGITS, _RANKING, _WEIGHTS, self.final_weights, _EXPERTS}
        self._kinds = {*kinds, names.output, names.hidden}
        unexpected = {_NORMED, _SCALED, *_FOREIGN} - self._kinds
        if router.renormalises:
            unexpected.discard(_NORMED)
        self._unexpected = unexpected
        self._wanted = {
            f"{kind}-{layer_id}" for layer_id in spec.moe_layer_ids for kind in self._kinds
        }
        self._missing: set[str] = set()

    def restart(self) -> None:
        """A new graph is about to be computed."""
        self._missing = set(self._wanted)

    def wants(self, name: str) -> bool:
        """Whether the node is needed.

        Raises:
            CheckpointError: the graph computes what the metadata does not say.
        """
        if name.rpartition("-")[0] in self._unexpected:
            raise CheckpointError(
                f"llama.cpp's graph has a node {name!r}, which the model's metadata does not "
                f"explain ({self._spec.router.describe()}): calibrate the Hugging Face checkpoint"
            )
        if name not in self._wanted:
            return False
        self._missing.discard(name)
        return True

    def require_block(self, found: Iterable[str], name: str) -> None:
        """Refuse a layer that ends, with node `name`, before all its nodes were there.

        Raises:
            CheckpointError: names the first one.
        """
        missing = self._kinds.difference(found)
        if missing:
            raise CheckpointError(
                f"llama.cpp's graph has no node {min(missing)!r} before {name!r}: this version of "
                "llama-cpp-python is not known here, install 0.3.36"
            )

    def require_all(self, path: Path) -> None:
        """Refuse a graph that lacks a node.

        Raises:
            CheckpointError: names the first one.
        """
        if self._missing:
            raise CheckpointError(
                f"{path}: llama.cpp's graph has no node {min(self._missing)!r}: this version of "
                "llama-cpp-python is not known here, install 0.3.36"
            )

    def shape(self, kind: str, num_tokens: int) -> tuple[int, ...]:
        """numpy's shape of a node."""
        spec = self._spec
        if kind in (_LOGITS, _RANKING):
            return num_tokens, spec.num_experts
        if kind in (_WEIGHTS, _NORMED, _SCALED):
            return num_tokens, self._slots
        if kind == _EXPERTS:
            return num_tokens, self._slots, spec.hidden_size
        return num_tokens, spec.hidden_size


class _Api:
    """The C functions that are used, of llama-cpp-python's two libraries."""

    def __init__(self, llama: Any) -> None:
        self.llama = llama
        ggml = ggml_library.library()
        ggml.ggml_get_name.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_name.restype = ctypes.c_char_p
        ggml.ggml_nbytes.argtypes = [ctypes.c_void_p]
        ggml.ggml_nbytes.restype = ctypes.c_size_t
        for function in (ggml.ggml_backend_tensor_get, ggml.ggml_backend_tensor_set):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            function.restype = None
        self._ggml = ggml

    def name(self, tensor: int) -> str:
        found: bytes = self._ggml.ggml_get_name(tensor)
        return found.decode(errors="replace")

    def read(
        self, tensor: int, name: str, shape: tuple[int, ...], dtype: type, path: Path
    ) -> npt.NDArray[Any]:
        """A copy of a contiguous node.

        Raises:
            CheckpointError: it has another size.
        """
        values: npt.NDArray[Any] = np.empty(shape, dtype)
        found_bytes = self._ggml.ggml_nbytes(tensor)
        if found_bytes != values.nbytes:
            raise CheckpointError(
                f"{path}: llama.cpp's node {name!r} has {found_bytes} bytes, expected "
                f"{values.nbytes} for {list(shape)}: the file's metadata does not describe it"
            )
        self._ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        return values

    def write(self, tensor: int, values: npt.NDArray[Any]) -> None:
        """Replace what a node holds; same bytes."""
        self._ggml.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)


def _api(path: Path) -> _Api:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on a busy machine
    try:
        from llama_cpp import llama_cpp
    except ImportError:
        raise MissingExtraError("llama-cpp-python", "gguf", f"running {path}") from None
    return _Api(llama_cpp)
