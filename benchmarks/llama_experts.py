"""llama.cpp's own graph of one MoE layer's experts, computed by the library that it brings.

The nodes are those of `build_moe_ffn` in src/llama-graph.cpp behind the router. Weights lie as a
GGUF stores them, or rearranged at loading, as llama.cpp keeps the types that it has kernels for.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_moe.formats import ggml_library
from edge_moe.formats.ggml_types import GGML_TYPES_BY_NAME
from edge_moe.runtime.kernels.ggml_products import InitParams, ggml_cpu
from edge_moe.runtime.llama_rearrange import rearranged_kernels

_P, _I, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
_F32, _I32 = 0, 26
_CONTEXT_BYTES = 2**20
FloatArray = npt.NDArray[np.float32]

_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_P, (_P, _P)),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (_P, _P)),
    "ggml_backend_reg_dev_get": (_P, (_P, _SIZE)),
    "ggml_backend_tensor_get": (None, (_P, _P, _SIZE, _SIZE)),
    "ggml_backend_tensor_set": (None, (_P, _P, _SIZE, _SIZE)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_new_graph": (_P, (_P,)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_view_2d": (_P, (_P, _P, *[_I64] * 2, *[_SIZE] * 2)),
}


class _Library:
    def __init__(self) -> None:
        base, cpu = ggml_library.library(), ggml_library.cpu_library()
        for name, (result, arguments) in _FUNCTIONS.items():
            function = base[name]
            function.restype, function.argtypes = result, list(arguments)
            setattr(self, name.removeprefix("ggml_"), function)
        registry = cpu["ggml_backend_cpu_reg"]
        registry.restype = _P
        self.registry = registry()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class LlamaLayer:
    """gate_exps, up_exps [I, H] and down_exps [H, I] of E experts, for T tokens and top_k."""

    def __init__(
        self,
        form: str,
        experts: list[tuple[bytes, bytes, bytes]],
        shape: tuple[int, int],
        *,
        backend: Any,
        num_tokens: int,
        top_k: int,
        is_rearranged: bool = False,
    ) -> None:
        """`experts` are packed (gate, up, down); `shape` is (H, I).

        Raises:
            NotImplementedError: llama.cpp does not rearrange this type on this CPU.
        """
        self._api, self._more, self._backend = ggml_cpu(), _Library(), backend
        hidden, width = shape
        self._shape = (num_tokens, hidden)
        kind = GGML_TYPES_BY_NAME[form.upper()]
        place = self._more.backend_cpu_buffer_type()
        if is_rearranged:
            place = rearranged_kernels().buffer_type
            if place is None:
                raise NotImplementedError("no such buffer")
        self._held: list[Any] = []
        weights_context = self._context()
        sizes = [(hidden, width), (hidden, width), (width, hidden)]
        self._weights = [
            self._api.new_tensor_3d(weights_context, kind.ggml_type, *size, len(experts))
            for size in sizes
        ]
        self._allocate(weights_context, place)
        context = self._context()
        self._inputs = self._api.new_tensor_3d(context, _F32, hidden, 1, num_tokens)
        self._ids = self._api.new_tensor_2d(context, _I32, top_k, num_tokens)
        self._scales = self._api.new_tensor_3d(context, _F32, 1, top_k, num_tokens)
        self._output = self._build(context, hidden, num_tokens, top_k)
        self._allocate(context, self._more.backend_cpu_buffer_type())
        if is_rearranged and not self._is_supported():
            self.close()
            raise NotImplementedError(f"{form} stays as it is")
        self._graph = self._more.new_graph(context)
        self._api.build_forward_expand(self._graph, self._output)
        for which, tensor in enumerate(self._weights):
            packed = b"".join(expert[which] for expert in experts)
            self._more.backend_tensor_set(tensor, packed, 0, len(packed))

    def __call__(
        self, hidden: FloatArray, rows: npt.NDArray[np.int32], weights: FloatArray
    ) -> FloatArray:
        """[T, H] for [T, H], [T, k] and [T, k], all contiguous."""
        given = ((self._inputs, hidden), (self._ids, rows), (self._scales, weights))
        for tensor, values in given:
            self._more.backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        if self._api.backend_graph_compute(self._backend.pointer, self._graph):
            raise MemoryError("libggml could not compute the graph")
        output = np.empty(self._shape, np.float32)
        self._more.backend_tensor_get(self._output, output.ctypes.data, 0, output.nbytes)
        return output

    def close(self) -> None:
        """Free what C allocated."""
        for free, pointer in reversed(self._held):
            free(pointer)
        self._held.clear()

    def _build(self, context: Any, hidden: int, num_tokens: int, top_k: int) -> Any:
        api, more = self._api, self._more
        gate, up, down = self._weights
        self._products = [
            api.mul_mat_id(context, matrices, self._inputs, self._ids) for matrices in (up, gate)
        ]
        inner = more.swiglu_split(context, self._products[1], self._products[0])
        self._products.append(api.mul_mat_id(context, down, inner, self._ids))
        scaled = more.mul(context, self._products[2], self._scales)
        row_bytes = 4 * hidden
        views = [
            more.view_2d(
                *(context, scaled, hidden, num_tokens),
                *(top_k * row_bytes, place * row_bytes),
            )
            for place in range(top_k)
        ]
        total = views[0]
        for view in views[1:]:
            total = more.add(context, total, view)
        return total

    def _is_supported(self) -> bool:
        device = self._more.backend_reg_dev_get(self._more.registry, 0)
        return all(self._more.backend_dev_supports_op(device, node) for node in self._products)

    def _context(self) -> Any:
        context = self._api.init(InitParams(_CONTEXT_BYTES, None, True))
        self._held.append((self._api.free, context))
        return context

    def _allocate(self, context: Any, kind: Any) -> None:
        buffer = self._more.backend_alloc_ctx_tensors_from_buft(context, kind)
        if not buffer:
            raise MemoryError("libggml could not allocate the layer")
        self._held.append((self._api.backend_buffer_free, buffer))
