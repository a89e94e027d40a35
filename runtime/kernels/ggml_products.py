"""Products with packed matrices by libggml's CPU kernels, which never expand a weight to a float.

The library is the one that llama-cpp-python brings (extra `gguf`); its functions here are all of
ggml's public interface. A product is a graph of one node, MUL_MAT_ID, over a stack of matrices that
lie at equal distances in memory, such as the gate_proj of every slot. As in llama.cpp, inputs are
rounded to blocks of 8 bits where weights are quantised, to the weights' type where they are 16-bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_moe.errors import InputError
from edge_moe.formats import ggml_library
from edge_moe.formats.ggml_types import GgmlType
from edge_moe.runtime.llama_api import TensorHead
from edge_moe.runtime.llama_rearrange import rearranged_kernels

Tensor = torch.Tensor
IntArray = npt.NDArray[np.int64]

_F32, _I32 = 0, 26  # numbers of ggml types
_ALIGNMENT_BYTES = 64
_MOST_NODES = 8
_MOST_TENSORS = 12
_P, _I, _I64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t


class InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


class _CpuTraits(ctypes.Structure):
    """`struct ggml_type_traits_cpu` of ggml-cpu.h."""

    _fields_ = (("from_float", _P), ("vec_dot", _P), ("vec_dot_type", _I), ("nrows", _I64))


_BASE_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _SIZE)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_backend_graph_compute": (_I, (_P, _P)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_view_init": (_I, (_P,)),
    "ggml_blck_size": (_I64, (_I,)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_free": (None, (_P,)),
    "ggml_get_data": (_P, (_P,)),
    "ggml_graph_overhead_custom": (_SIZE, (_SIZE, ctypes.c_bool)),
    "ggml_init": (_P, (InitParams,)),
    "ggml_mul_mat_id": (_P, (_P, _P, _P, _P)),
    "ggml_nbytes": (_SIZE, (_P,)),
    "ggml_new_graph_custom": (_P, (_P, _SIZE, ctypes.c_bool)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _I64)),
    "ggml_new_tensor_2d": (_P, (_P, _I, *[_I64] * 2)),
    "ggml_new_tensor_3d": (_P, (_P, _I, *[_I64] * 3)),
    "ggml_swiglu": (_P, (_P, _P)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_type_size": (_SIZE, (_I,)),
    "ggml_view_3d": (_P, (_P, _P, *[_I64] * 3, *[_SIZE] * 3)),
}
_CPU_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_get_type_traits_cpu": (ctypes.POINTER(_CpuTraits), (_I,)),
}


class GgmlCpu:
    """The C functions that are used, of libggml-base and libggml-cpu."""

    def __init__(self, base: ctypes.CDLL, cpu: ctypes.CDLL) -> None:
        """Raises InputError where the library lacks one of them."""
        missing = []
        for library, functions in ((base, _BASE_FUNCTIONS), (cpu, _CPU_FUNCTIONS)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name, None)
                if function is None:
                    missing.append(name)
                    continue
                function = library[name]  # an object of its own: others declare it their way
                function.restype, function.argtypes = result, list(arguments)
                setattr(self, name.removeprefix("ggml_"), function)
        if missing:
            raise InputError(
                f"llama-cpp-python's libggml has no {', '.join(missing)}: install the version of "
                "the extra gguf, or use --kernels exact"
            )
        self._check_layout()

    def _check_layout(self) -> None:
        """Fields that are written here must be where they are in ggml.h."""
        context = self.init(InitParams(4 * self.tensor_overhead(), None, True))
        memory = torch.empty(2**10, dtype=torch.uint8)
        address = memory.data_ptr() + -memory.data_ptr() % _ALIGNMENT_BYTES
        tensor = self.new_tensor_3d(context, _F32, 2, 3, 5)
        buffer = self.backend_cpu_buffer_from_ptr(address, 4 * 2 * 3 * 5)
        self.backend_tensor_alloc(buffer, tensor, address)
        head = TensorHead.from_address(tensor)
        found = head.ne[:3], head.nb[:3], head.buffer, head.data, self.get_data(tensor)
        self.backend_buffer_free(buffer)
        self.free(context)
        if found != ([2, 3, 5], [4, 8, 24], buffer, address, address):
            raise InputError(
                "llama-cpp-python's libggml lays its tensors out in another way: install the "
                "version of the extra gguf, or use --kernels exact"
            )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def can_multiply(self, kind: GgmlType) -> bool:
        """Whether the library has a product for the type, with blocks as they are known here."""
        number = kind.ggml_type
        blocks = (self.blck_size(number), self.type_size(number))
        if blocks != (kind.block_size, kind.block_bytes):
            return False
        return bool(self.get_type_traits_cpu(number).contents.vec_dot)


@cache
def ggml_cpu() -> GgmlCpu:
    """The loaded library.

    Raises:
        MissingExtraError: llama-cpp-python is not installed, or was built without it.
        InputError: another version of it.
    """
    return GgmlCpu(ggml_library.library(), ggml_library.cpu_library())


@dataclass(frozen=True)
class MatrixStack:
    """Matrices [rows, width] of one type, the first at `offset_bytes` of a uint8 buffer."""

    buffer: Tensor
    """uint8 [count, stride_bytes], contiguous, on the CPU."""
    kind: GgmlType
    rows: int
    width: int
    offset_bytes: int
    is_rearranged: bool = False
    """As `RearrangedStore` leaves them, for the kernels of `rearranged_kernels`."""

    def __post_init__(self) -> None:
        """The library aborts the process on what does not fit: refuse it here."""
        count, stride_bytes = self.buffer.shape
        end = self.offset_bytes + self.rows * self.kind.row_bytes(self.width)
        if min(count, self.rows, self.width) < 1 or end > stride_bytes:
            raise ValueError(f"{self.rows} rows end at byte {end} of {stride_bytes}")
        if not self.buffer.is_contiguous() or self.buffer.device.type != "cpu":
            raise ValueError("a stack of matrices must be contiguous, on the CPU")


class Backend:
    """libggml's CPU backend: threads, and a work buffer that grows to the largest product's."""

    def __init__(self, num_threads: int) -> None:
        self.api = ggml_cpu()
        self.pointer = self.api.backend_cpu_init()
        if not self.pointer:
            raise MemoryError("libggml could not start its CPU backend")
        self.api.backend_cpu_set_n_threads(self.pointer, num_threads)

    def close(self) -> None:
        """Free the work buffer; no product may be computed after it."""
        if self.pointer:
            self.api.backend_free(self.pointer)
            self.pointer = None


class _Window:
    """The part of a stack that a graph's tensor shows: MUL_MAT_ID takes time for every matrix.

    ggml has no function that moves a view, so two fields of `struct ggml_tensor` are written.
    """

    def __init__(self, tensor: int, stack: MatrixStack) -> None:
        self._stride_bytes = stack.buffer.shape[1]
        self._address = stack.buffer.data_ptr() + stack.offset_bytes
        self._head = TensorHead.from_address(tensor)
        self._counts = self._head.ne  # the same memory

    def move(self, first: int, stop: int) -> None:
        """Show the matrices from `first` to before `stop`."""
        self._head.data = self._address + first * self._stride_bytes
        self._counts[2] = stop - first


class Product:
    """Inputs [R, width], each times the matrix of a stack that is chosen for it: [R, rows].

    With `is_shared` one input row is multiplied with R matrices.
    """

    _context: int | None
    """A `struct ggml_context`, until `close`."""

    def __init__(
        self, backend: Backend, stack: MatrixStack, num_rows: int, *, is_shared: bool
    ) -> None:
        self._start(backend, num_rows, is_shared)
        inputs, chosen = self._new_inputs(stack.width)
        self._finish(self._multiply(stack, inputs, chosen), stack.rows)

    def __call__(self, inputs: Tensor, chosen: IntArray) -> Tensor:
        """[R, rows], overwritten by the next call.

        Args:
            inputs: float32 [R, width], or [1, width] if shared.
            chosen: [R] positions in the stack, each below its length; of a shared input each but
                once where matrices are rearranged.
        """
        if self._needs_distinct and len(set(chosen.tolist())) < len(chosen):
            raise ValueError("one input is multiplied with a rearranged matrix once")
        self._inputs.copy_(inputs)
        first, stop = int(chosen.min()), int(chosen.max()) + 1
        np.subtract(chosen, first, out=self._chosen, casting="unsafe")
        for window in self._windows:
            window.move(first, stop)
        status = self._api.backend_graph_compute(self._backend.pointer, self._graph)
        if status:
            raise MemoryError(f"libggml could not compute a product (status {status})")
        return self._outputs

    def close(self) -> None:
        """Free what C allocated."""
        for buffer in self._buffers:
            self._api.backend_buffer_free(buffer)
        self._buffers.clear()
        if self._context:
            self._api.free(self._context)
            self._context = None

    # -- building the graph -----------------------------------------------------------------------

    def _start(self, backend: Backend, num_rows: int, is_shared: bool) -> None:
        self._backend, self._api = backend, backend.api
        self._num_rows, self._num_inputs = num_rows, 1 if is_shared else num_rows
        self._buffers: list[int] = []
        self._windows: list[_Window] = []
        self._needs_distinct = False
        self._memory: list[Tensor] = []  # what the graph points to must stay alive
        api = self._api
        num_bytes = _MOST_TENSORS * api.tensor_overhead()
        num_bytes += api.graph_overhead_custom(_MOST_NODES, False)
        self._context = api.init(InitParams(num_bytes, None, True))
        if not self._context:
            raise MemoryError(f"libggml could not allocate {num_bytes} bytes for a graph")

    def _new_inputs(self, width: int) -> tuple[Any, Any]:
        """(inputs, chosen)"""
        api, num_inputs = self._api, self._num_inputs
        inputs = api.new_tensor_3d(self._context, _F32, width, 1, num_inputs)
        is_shared = num_inputs < self._num_rows
        shape = (self._num_rows, 1) if is_shared else (1, self._num_rows)  # [of a token, tokens]
        chosen = api.new_tensor_2d(self._context, _I32, *shape)
        self._inputs = self._allocate(inputs, torch.float32).view(num_inputs, width)
        self._chosen = self._allocate(chosen, torch.int32).numpy()
        return inputs, chosen

    def _finish(self, outputs: Any, rows: int) -> None:
        self._outputs = self._memory[-1].view(torch.float32).view(self._num_rows, rows)
        self._graph = self._api.new_graph_custom(self._context, _MOST_NODES, False)
        self._api.build_forward_expand(self._graph, outputs)

    def _multiply(self, stack: MatrixStack, inputs: Any, chosen: Any) -> Any:
        matrices = self._matrices(stack)
        outputs = self._api.mul_mat_id(self._context, matrices, inputs, chosen)
        self._allocate(outputs, torch.float32)
        return outputs

    def _matrices(self, stack: MatrixStack) -> Any:
        """The stack as a C tensor, which lies in the slots."""
        matrices = self._rearranged(stack) if stack.is_rearranged else self._as_stored(stack)
        self._windows.append(_Window(matrices, stack))
        return matrices

    def _rearranged(self, stack: MatrixStack) -> Any:
        """No view, which would be taken for one of matrices as they are stored."""
        count, stride_bytes = stack.buffer.shape
        matrices = self._api.new_tensor_3d(
            self._context, stack.kind.ggml_type, stack.width, stack.rows, count
        )
        head = TensorHead.from_address(matrices)
        head.nb[2:] = [stride_bytes, count * stride_bytes]
        if not rearranged_kernels().adopt(matrices):
            raise ValueError(f"no kernels for {stack.rows} rearranged rows of {stack.kind.name}")
        self._memory.append(stack.buffer)
        # libggml keeps a list for every matrix that has room for one place of each input
        self._needs_distinct = self._num_inputs < self._num_rows
        return matrices

    def _as_stored(self, stack: MatrixStack) -> Any:
        api, context = self._api, self._context
        count, stride_bytes = stack.buffer.shape
        number, row_bytes = stack.kind.ggml_type, stack.kind.row_bytes(stack.width)
        num_blocks = -(-count * stride_bytes // stack.kind.block_bytes)  # the last may be cut short
        base = api.new_tensor_1d(context, number, num_blocks * stack.kind.block_size)
        self._place(base, stack.buffer)
        matrices = api.view_3d(
            *(context, base, stack.width, stack.rows, count),
            *(row_bytes, stride_bytes, stack.offset_bytes),
        )
        api.backend_view_init(matrices)
        return matrices

    def _allocate(self, tensor: Any, dtype: torch.dtype) -> Tensor:
        """Memory for a C tensor, as a flat tensor of torch."""
        memory = torch.empty(self._api.nbytes(tensor), dtype=torch.uint8)
        self._place(tensor, memory)
        return memory.view(dtype)

    def _place(self, tensor: Any, memory: Tensor) -> None:
        """Put a C tensor into torch's memory, which it may exceed by less than a block.

        A C buffer only frames the memory: it starts aligned, and nothing is read but the tensor.
        """
        self._memory.append(memory)
        address = memory.data_ptr()
        before = address % _ALIGNMENT_BYTES
        num_bytes = before + self._api.nbytes(tensor)
        buffer = self._api.backend_cpu_buffer_from_ptr(address - before, num_bytes)
        self._buffers.append(buffer)
        self._api.backend_tensor_alloc(buffer, tensor, address)


class GatedProducts(Product):
    """silu(gate x) * (up x), times down: [R, H] -> [R, H] without leaving the library."""

    def __init__(
        self,
        backend: Backend,
        first: Sequence[MatrixStack],
        down: MatrixStack,
        num_rows: int,
        *,
        is_shared: bool,
    ) -> None:
        """`first` is gate_proj over up_proj in one stack, or the one and the other."""
        self._start(backend, num_rows, is_shared)
        inputs, chosen = self._new_inputs(first[0].width)
        hidden = [self._multiply(stack, inputs, chosen) for stack in first]
        gated = self._api.swiglu if len(hidden) == 1 else self._api.swiglu_split
        inner = gated(self._context, *hidden)
        self._allocate(inner, torch.float32)
        # pairs of one shared input are [k, 1], as the choice is
        self._finish(self._multiply(down, inner, chosen), down.rows)
