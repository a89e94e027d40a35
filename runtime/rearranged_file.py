"""`rearranged_places`: the experts of a GGUF once more on disk, as the fastest kernels want them.

The file has the rearranged tensors one after the other, each from a page's start on, in the order
of the model's layers. It is made once, takes as many bytes as they do, and is checked against the
model whenever it is opened: first and last rows of every tensor are rearranged anew, so that
another CPU, llama.cpp or model is noticed. Files of what the model was before are removed.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge_moe.errors import CheckpointError, InputError
from edge_moe.file_lock import lock_if_possible
from edge_moe.files import require_free_disk
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.measurement import usable_cores
from edge_moe.overhead import cache_path
from edge_moe.runtime.gguf_slices import Place, layer_stacks
from edge_moe.runtime.llama_rearrange import Rearranger
from edge_moe.runtime.llama_region import PAGE_BYTES, ExpertRegion

OnBytes = Callable[[int, int], None]
"""(bytes done, bytes in all)"""
_CHUNK_BYTES = 2**20
"""Rearranged at a time by each thread."""


@dataclass(frozen=True)
class _Tensor:
    """A matrix of experts, in the model and in the file."""

    info: GgufTensorInfo
    offset: int

    @property
    def end(self) -> int:
        return self.offset + -(-self.info.num_bytes // PAGE_BYTES) * PAGE_BYTES


def default_folder() -> Path:
    """Where rearranged experts are kept; `XDG_CACHE_HOME` moves it."""
    return cache_path().with_name("rearranged")


def rearranged_places(
    model: GgufModel,
    region: ExpertRegion,
    rearranger: Rearranger,
    folder: Path,
    on_bytes: OnBytes | None = None,
) -> dict[str, Place]:
    """Turn the experts of a loaded model over to the faster kernels; where to read them from.

    Tensors whose type has none are left out. The file is made in `folder` if it is not there; a
    killed run goes on behind its last whole tensor. Memory: 2 MB for each core.

    Raises:
        InputError: no tensor has faster kernels on this CPU.
        DiskSpaceError, OSError: the file cannot be written.
        CheckpointError: the model's file ends early.
    """
    tensors = _layout(model, region, rearranger)
    if not tensors:
        raise InputError(
            f"{model.path}: llama.cpp has no faster kernels for its experts on this CPU: leave out "
            "--rearranged"
        )
    path = folder / f"{_name(model.path)}-{_identity(model)}.experts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_current(path, tensors, rearranger):
            with _alone(path.with_suffix(".lock")):  # another process may be making it
                if not _is_current(path, tensors, rearranger):
                    _remove_older(path, model.path)
                    _write(path, tensors, rearranger, on_bytes or (lambda *_: None))
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
    return {each.info.name: (path, each.offset) for each in tensors}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Of all processes that lock `path`, which is made for it and removed, where it can be."""
    with path.open("w") as handle:
        lock_if_possible(handle, waits=True)
        yield
        path.unlink(missing_ok=True)


def _layout(model: GgufModel, region: ExpertRegion, rearranger: Rearranger) -> list[_Tensor]:
    found: list[_Tensor] = []
    for layer_id in sorted(model.layers):
        for info in layer_stacks(model, layer_id):
            if rearranger.adopt(info.name, region.tensor(info.name)):
                found.append(_Tensor(info, found[-1].end if found else 0))
    return found


def _name(model: Path) -> str:
    """Of all files for the model at this place, whatever it is."""
    place = hashlib.sha256(str(model.resolve()).encode()).hexdigest()[:8]
    return f"{model.resolve().stem}-{place}"


def _remove_older(path: Path, model: Path) -> None:
    """Files of what the model was before it was written anew: nobody else will ever use them."""
    for each in path.parent.glob(f"{glob.escape(_name(model))}-*"):
        if each.stem != path.stem:
            each.unlink(missing_ok=True)


def _identity(model: GgufModel) -> str:
    """Of the file: its header, and when it was written."""
    found = hashlib.sha256(model.fingerprint.encode())
    for part in sorted({info.path for info in model.tensors.values()}):
        state = part.stat()
        found.update(f"{state.st_size} {state.st_mtime_ns}".encode())
    return found.hexdigest()[:12]


def _is_current(path: Path, tensors: list[_Tensor], rearranger: Rearranger) -> bool:
    if not path.exists() or path.stat().st_size != tensors[-1].end:
        return False
    with path.open("rb") as handle:
        return all(_is_alike(handle.fileno(), each, rearranger) for each in tensors)


def _is_alike(descriptor: int, tensor: _Tensor, rearranger: Rearranger) -> bool:
    """By its first and last rows: another model, CPU or llama.cpp, or not written to the end."""
    size = rearranger.row_bytes(tensor.info.name)
    with tensor.info.path.open("rb") as handle:
        for start in (0, tensor.info.num_bytes - size):
            expected = _rearranged(handle.fileno(), tensor, start, size, rearranger)
            if os.pread(descriptor, size, tensor.offset + start) != bytes(expected):
                return False
    return True


def _write(path: Path, tensors: list[_Tensor], rearranger: Rearranger, on_bytes: OnBytes) -> None:
    """Tensor after tensor, so that a file of another run can be gone on with."""
    partial, total = path.with_suffix(".part"), tensors[-1].end
    done = partial.stat().st_size if partial.exists() else 0
    require_free_disk(path.parent, total - done, "rearranging the experts")
    with partial.open("r+b" if done else "wb") as handle, _threads() as threads:
        descriptor = handle.fileno()
        for tensor in tensors:
            is_there = tensor.end <= done and _is_alike(descriptor, tensor, rearranger)
            if not is_there:
                done = 0  # what follows is of another run
                _write_tensor(descriptor, tensor, rearranger, threads)
            on_bytes(tensor.end, total)
    os.replace(partial, path)


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(usable_cores(), thread_name_prefix="edge-moe-rearrange")


def _write_tensor(
    descriptor: int, tensor: _Tensor, rearranger: Rearranger, threads: ThreadPoolExecutor
) -> None:
    """From front to back, so that the file's size says what is there."""

    def rearranged(chunk: tuple[int, int]) -> memoryview:
        return _rearranged(source.fileno(), tensor, *chunk, rearranger)

    chunks = list(_chunks(tensor, rearranger))
    with tensor.info.path.open("rb") as source:
        for at in range(0, len(chunks), usable_cores()):
            batch = chunks[at : at + usable_cores()]
            for (start, _), found in zip(batch, threads.map(rearranged, batch), strict=True):
                _write_all(descriptor, found, tensor.offset + start)
    os.ftruncate(descriptor, tensor.end)
    os.fsync(descriptor)


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """A disk that becomes full takes part of it first, and says so afterwards."""
    while len(content):
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def _chunks(tensor: _Tensor, rearranger: Rearranger) -> Iterator[tuple[int, int]]:
    """(start, size) of whole groups of rows."""
    rows = rearranger.row_bytes(tensor.info.name)
    size = max(1, _CHUNK_BYTES // rows) * rows
    for start in range(0, tensor.info.num_bytes, size):
        yield start, min(size, tensor.info.num_bytes - start)


def _rearranged(
    descriptor: int, tensor: _Tensor, start: int, size: int, rearranger: Rearranger
) -> memoryview:
    source, target = (mmap.mmap(-1, size) for _ in range(2))
    count = os.preadv(descriptor, [source], tensor.info.offset + start)
    if count != size:
        raise CheckpointError(
            f"{tensor.info.path} ended early: it was truncated while it was read; download it again"
        )
    rearranger.convert(tensor.info.name, _address(source), _address(target), size)
    return memoryview(target)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
