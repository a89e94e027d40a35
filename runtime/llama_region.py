"""Memory of our own under llama.cpp's expert tensors: taken page by page, given back the same way.

llama.cpp asks a buffer type for memory (`tensor_buft_overrides`). This one reserves addresses
without memory behind them. An expert's first byte lies as far from a page's start as in its file,
so that O_DIRECT reads whole blocks into place. Where experts are to be paged they lie a page
further apart than there, so that no page belongs to two of them.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

from edge_moe.errors import InputError
from edge_moe.runtime.llama_api import TensorHead

PAGE_BYTES = mmap.PAGESIZE
_LARGE_PAGE_BYTES = 2 * 2**20
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15
_MREMAP_FLAGS = 1 | 2 | 4  # MAYMOVE, FIXED, DONTUNMAP (Linux 5.7)
_MAP_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_MAP_FAILED = ctypes.c_void_p(-1).value
_TENSOR_WORDS = 42
"""Of 8 bytes, in ggml_tensor; its pointer to the data is one of them."""

_NAME = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_SIZE = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p)
_TENSOR_SIZE = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p)
_FLAG = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)


class _BufferType(ctypes.Structure):
    """ggml_backend_buffer_type, ggml/src/ggml-backend-impl.h of GGML_BACKEND_API_VERSION 2."""

    _fields_ = (
        ("get_name", _NAME),
        ("alloc_buffer", _ALLOCATE),
        ("get_alignment", _SIZE),
        ("get_max_size", ctypes.c_void_p),
        ("get_alloc_size", _TENSOR_SIZE),
        ("is_host", _FLAG),
        ("device", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class ExpertRegion:
    """The addresses of all expert tensors. Keep it until the model is freed, then `close` it."""

    def __init__(self, ggml: Any) -> None:
        """`ggml` is libggml-base."""
        self._libc = _libc()
        self._ggml = ggml
        ggml.ggml_backend_cpu_buffer_from_ptr.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        ggml.ggml_backend_cpu_buffer_from_ptr.restype = ctypes.c_void_p
        ggml.ggml_get_data.argtypes = [ctypes.c_void_p]
        ggml.ggml_get_data.restype = ctypes.c_void_p
        self._tensors: dict[str, int] = {}
        self._places: dict[str, tuple[int, int]] = {}
        self._free = 0
        """Where the next tensor's pages begin."""
        self._ranges: list[tuple[int, int]] = []
        self._moved: set[int] = set()
        self._most_moved = _most_mappings() // 3
        self._name = ctypes.create_string_buffer(b"edge-moe")
        self._type = _BufferType(
            _NAME(lambda _: ctypes.addressof(self._name)),
            _ALLOCATE(self._allocate),
            _SIZE(lambda _: PAGE_BYTES),
            None,
            _TENSOR_SIZE(self._size),
            _FLAG(lambda _: True),
            None,
            None,
        )

    @property
    def buffer_type(self) -> int:
        """What llama.cpp takes as a buffer type."""
        return ctypes.addressof(self._type)

    @property
    def names(self) -> frozenset[str]:
        """The tensors that llama.cpp put here."""
        return frozenset(self._tensors)

    def tensor(self, name: str) -> int:
        """The ggml_tensor called `name`, one of `names`."""
        return self._tensors[name]

    def place(self, name: str, file_offset: int, *, are_apart: bool) -> tuple[int, int]:
        """Move the tensor `name` [E, rows, columns] to where O_DIRECT can read its experts.

        Returns its address, and how far its experts are from each other: further than llama.cpp
        puts them, if they are to be apart. Loading must be over; a second call changes nothing.

        Raises:
            InputError: another layout of ggml_tensor than is known.
        """
        if name not in self._places:
            tensor = self._tensors[name]
            head = TensorHead.from_address(tensor)
            start = self._free + file_offset % PAGE_BYTES
            self._point(tensor, start)
            distance = head.nb[2] + (PAGE_BYTES if are_apart else 0)
            head.nb[2], head.nb[3] = distance, distance * head.ne[2]
            self._free = _page_end(start + distance * head.ne[2])
            self._places[name] = start, distance
        return self._places[name]

    def _point(self, tensor: int, address: int) -> None:
        """Let a tensor's data be at `address`."""
        found = self._ggml.ggml_get_data(tensor)
        words = (ctypes.c_uint64 * _TENSOR_WORDS).from_address(tensor)
        indices = [index for index, word in enumerate(words) if word == found]
        if len(indices) == 1:
            words[indices[0]] = address
        if self._ggml.ggml_get_data(tensor) != address:
            raise InputError(
                "this version of llama-cpp-python keeps tensors in a way that is not known here: "
                "install the one that edge-moe[gguf] names"
            )

    def give_back(self, start: int, end: int) -> None:
        """Memory of the whole pages between two addresses; they read as zeros then."""
        if start < end:
            self._advise(start, end - start, _MADV_DONTNEED)

    def move(self, source: int, target: int, num_bytes: int) -> bool:
        """Put the memory of whole pages at other addresses, which had none; theirs have none then.

        Their bytes go with them. It is several times cheaper than to give memory back and take
        new. False, and nothing done, where the system cannot, or has no more mappings to give:
        every range that was moved once is one of its own, and so is what lies before the next.
        """
        moved = {source, target} - self._moved
        if len(self._moved) + len(moved) > self._most_moved:
            return False
        self._moved |= moved
        found = self._libc.mremap(source, num_bytes, num_bytes, _MREMAP_FLAGS, target)
        return bool(found == target)

    def give_back_all(self) -> None:
        """What loading has touched."""
        for start, num_bytes in self._ranges:
            self._advise(start, num_bytes, _MADV_DONTNEED)

    def settle(self) -> None:
        """Loading is over: from now on memory is taken in small pages, which can be counted."""
        self.give_back_all()
        for start, num_bytes in self._ranges:
            self._advise(start, num_bytes, _MADV_NOHUGEPAGE)

    def take_large_pages(self) -> None:
        """Everything that was placed will be read and stay: fewer, larger pages are faster."""
        start = -(-self._ranges[0][0] // _LARGE_PAGE_BYTES) * _LARGE_PAGE_BYTES
        num_bytes = (self._free - start) // _LARGE_PAGE_BYTES * _LARGE_PAGE_BYTES
        if num_bytes > 0:
            self._advise(start, num_bytes, _MADV_HUGEPAGE)

    def close(self) -> None:
        """Give addresses and memory back. Nothing may look at a tensor afterwards."""
        for start, num_bytes in self._ranges:
            self._libc.munmap(start, num_bytes)
        self._ranges, self._tensors = [], {}

    def _allocate(self, _type: int, num_bytes: int) -> int | None:
        num_bytes = _page_end(num_bytes)
        start = self._libc.mmap(
            None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, _MAP_FLAGS, -1, 0
        )
        if start == _MAP_FAILED:
            return None  # llama.cpp says how much it could not get
        self._advise(start, num_bytes, _MADV_HUGEPAGE)  # touched and given back while loading
        self._free = self._free or start
        self._ranges.append((start, num_bytes))
        buffer: int = self._ggml.ggml_backend_cpu_buffer_from_ptr(start, num_bytes)
        return buffer

    def _size(self, _type: int, tensor: int) -> int:
        self._tensors[self._ggml.ggml_get_name(tensor).decode()] = tensor
        apart = TensorHead.from_address(tensor).ne[2] * PAGE_BYTES
        return _page_end(int(self._ggml.ggml_nbytes(tensor)) + apart) + PAGE_BYTES

    def _advise(self, start: int, num_bytes: int, advice: int) -> None:
        self._libc.madvise(start, num_bytes, advice)


def _page_end(address: int) -> int:
    """The first page's start that is not before `address`."""
    return -(-address // PAGE_BYTES) * PAGE_BYTES


def _most_mappings() -> int:
    """What the system allows a process; malloc and threads need some, too."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 65530  # Linux's default


def _libc() -> Any:
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
    ]
    libc.mmap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
        *(ctypes.c_int, ctypes.c_void_p),
    ]
    libc.mremap.restype = ctypes.c_void_p
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
