"""Where the experts of a GGUF file lie, on disk and in memory, and how a piece of one is read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from edge_moe.errors import CheckpointError
from edge_moe.gguf_header import GgufTensorInfo
from edge_moe.gguf_model import GgufModel
from edge_moe.runtime.direct_file import open_direct
from edge_moe.runtime.gguf_allotment import num_pages
from edge_moe.runtime.llama_region import PAGE_BYTES, ExpertRegion
from edge_moe.runtime.policy import Key

Place = tuple[Path, int]
"""A file, and where in it something begins."""


@dataclass(frozen=True)
class Slice:
    """An expert's rows of one tensor, as whole pages in memory and in the file."""

    path: Path
    offset: int
    """In the file; a multiple of the page size, as `address` is."""
    address: int
    num_bytes: int
    needed_bytes: int
    """Up to the last byte of the rows: the file may end there."""
    number: int
    """Its place among all slices of a model."""

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.num_bytes


def layer_stacks(model: GgufModel, layer_id: int) -> list[GgufTensorInfo]:
    """The tensors that hold a layer's experts, in the order in which `expert_slices` names them."""
    return sorted(model.layers[layer_id].stacks, key=lambda each: each.offset)


def expert_slices(
    model: GgufModel, region: ExpertRegion, places: Mapping[str, Place], *, are_apart: bool
) -> dict[Key, list[Slice]]:
    """Where every expert lies: its rows of each tensor of its layer, in file order.

    The tensors named in `places` lie elsewhere on the disk. In memory no two that `are_apart` share
    a page.
    """
    numbers = count()
    found: dict[Key, list[Slice]] = {}
    for layer, layer_id in enumerate(sorted(model.layers)):
        for info in layer_stacks(model, layer_id):
            path, offset = places.get(info.name, (info.path, info.offset))
            stride = info.num_bytes // model.spec.num_experts
            address, distance = region.place(info.name, offset, are_apart=are_apart)
            for row in range(model.spec.num_experts):
                start = offset + row * stride
                skipped = start % PAGE_BYTES
                found.setdefault((layer, row), []).append(
                    Slice(
                        path,
                        start - skipped,
                        address + row * distance - skipped,
                        num_pages(offset, stride, row) * PAGE_BYTES,
                        skipped + stride,
                        next(numbers),
                    )
                )
    return found


class SliceFiles:
    """The open files of a model, past the page cache where the file system allows."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors: dict[Path, int] = {}
        self.are_direct = True
        """Whether all are read past the page cache."""
        for path in paths:
            self._descriptors[path], is_direct = open_direct(path)
            self.are_direct &= is_direct
        self._states = {path: _state(each) for path, each in self._descriptors.items()}

    def descriptor(self, path: Path) -> int:
        """Of one of the files; open until `close`."""
        return self._descriptors[path]

    def require_unchanged(self) -> None:
        """Raise CheckpointError if a file was written to since it was opened."""
        for path, descriptor in self._descriptors.items():
            if _state(descriptor) != self._states[path]:
                raise CheckpointError(
                    f"{path} has changed while the model was running: start again with a file that "
                    "nobody writes to"
                )

    def read(self, each: Slice) -> None:
        """Fill a slice's pages.

        Raises:
            CheckpointError: the file ends within it.
            OSError: it cannot be read; names the file.
        """
        descriptor, done = self._descriptors[each.path], 0
        while done < each.needed_bytes:
            target = (ctypes.c_char * (each.num_bytes - done)).from_address(each.address + done)
            try:
                count = os.preadv(descriptor, [target], each.offset + done)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(each.path)) from None
            if count == 0:
                raise CheckpointError(
                    f"{each.path} ended early: it was truncated while the model was running; "
                    "download it again"
                )
            done += count

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}


def _state(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns
