"""`storage_rate`: what a disk gives to pieces at random places, as the engines read them."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np

from edge_moe.errors import InputError
from edge_moe.runtime.direct_file import open_direct
from edge_moe.runtime.direct_reads import DirectReads
from edge_moe.runtime.read_queue import READERS

AT_ONCE = 12
"""Reads that the system is given at a time: a few experts of three matrices."""
_PAGE_BYTES = 4096
_SECONDS = 1.0
_PLACES = 4096

_Places = list[tuple[int, int]]
"""(descriptor, offset)"""
Piece = tuple[int, int, int]
"""(descriptor, offset, bytes), the last two multiples of a page."""


def storage_rate(files: Sequence[Path], piece_bytes: int) -> tuple[float, str]:
    """Bytes per second of reading pieces at random places of `files`, and how it was measured.

    Raises:
        InputError: a file that cannot be read.
    """
    size = max(_PAGE_BYTES, piece_bytes // _PAGE_BYTES * _PAGE_BYTES)
    what = f"pieces of {size} bytes"
    with ExitStack() as held:
        try:
            opened = [open_direct(file) for file in files]
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
        for descriptor, _ in opened:
            held.callback(os.close, descriptor)
        places = _random_places([descriptor for descriptor, _ in opened], size)
        is_direct = all(each for _, each in opened)
        with suppress(OSError):  # the system does not read without threads
            if is_direct:
                found, seconds = read_by_itself([(*place, size) for place in places], _SECONDS)
                return found / seconds, f"{AT_ONCE} {what} at a time past the page cache"
        past = "past" if is_direct else "through"
        how = f"{READERS} threads read {what} {past} the page cache"
        return _rate_of_threads(places, size), how


def read_by_itself(pieces: Sequence[Piece], seconds: float | None = None) -> tuple[int, float]:
    """(bytes, seconds) of reading without threads, `AT_ONCE` pieces at a time.

    In order, once; or again and again for so many seconds.

    Raises:
        OSError: the system does not read without threads, or cannot read a piece.
    """
    size = max(num_bytes for *_, num_bytes in pieces)
    with mmap.mmap(-1, AT_ONCE * size) as memory, closing(DirectReads(AT_ONCE)) as reads:
        memory.write(bytes(len(memory)))
        first = _address(memory)
        reads.set_list(
            [
                (descriptor, offset, first + at % AT_ONCE * size, num_bytes)
                for at, (descriptor, offset, num_bytes) in enumerate(pieces)
            ]
        )
        start = time.perf_counter()
        end = None if seconds is None else start + seconds
        num_bytes = _read_list(reads, len(pieces), end)
        return num_bytes, time.perf_counter() - start


def _read_list(reads: DirectReads, num_pieces: int, end: float | None) -> int:
    """Bytes of all pieces once, or again and again until `end`."""
    begun = under_way = num_bytes = 0
    while (is_on := _goes_on(begun, num_pieces, end)) or under_way:
        while is_on and under_way < AT_ONCE:
            under_way += reads.begin([begun % num_pieces])
            begun += 1
            is_on = _goes_on(begun, num_pieces, end)
        for _, result in reads.over(1):
            under_way -= 1
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            num_bytes += result
    return num_bytes


def _goes_on(begun: int, num_pieces: int, end: float | None) -> bool:
    return begun < num_pieces if end is None else time.perf_counter() < end


def _rate_of_threads(places: _Places, size: int) -> float:
    start = time.perf_counter()
    end = start + _SECONDS

    def read(first: int) -> int:
        done, at = 0, first
        with mmap.mmap(-1, size) as buffer:  # page-aligned, as O_DIRECT needs
            while time.perf_counter() < end:
                descriptor, offset = places[at % len(places)]
                done += os.preadv(descriptor, [buffer], offset)
                at += READERS
        return done

    with ThreadPoolExecutor(READERS) as pool:
        num_bytes = sum(pool.map(read, range(READERS)))
    return num_bytes / (time.perf_counter() - start)


def _random_places(descriptors: Sequence[int], size: int) -> _Places:
    """Pages from which on a piece can be read, of larger files more."""
    random = np.random.default_rng(0)
    lengths = np.array([os.fstat(each).st_size for each in descriptors])
    found = []
    for which in random.choice(len(lengths), _PLACES, p=lengths / lengths.sum()).tolist():
        pages = max(1, int(lengths[which] - size) // _PAGE_BYTES)
        found.append((descriptors[which], int(random.integers(pages)) * _PAGE_BYTES))
    return found


def _address(memory: mmap.mmap) -> int:
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    del view  # else the memory could not be closed
    return address
