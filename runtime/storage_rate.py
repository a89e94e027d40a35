"""`storage_rate`: what a disk gives to pieces at random places, as the engines read them."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

from edge_moe.errors import InputError
from edge_moe.runtime.direct_file import open_direct
from edge_moe.runtime.direct_reads import DirectReads

READERS = 4
"""Threads, where the system does not read by itself."""
AT_ONCE = 12
"""Reads that the system is given at a time: a few experts of three matrices."""
_PAGE_BYTES = 4096
_SECONDS = 1.0
_PLACES = 4096

_Places = list[tuple[int, int]]
"""(descriptor, offset)"""


def storage_rate(files: Sequence[Path], piece_bytes: int) -> tuple[float, str]:
    """Bytes per second of reading pieces at random places of `files`, and how it was measured.

    Raises:
        InputError: a file that cannot be read.
    """
    size = max(_PAGE_BYTES, piece_bytes // _PAGE_BYTES * _PAGE_BYTES)
    with ExitStack() as held:
        try:
            opened = [open_direct(file) for file in files]
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
        for descriptor, _ in opened:
            held.callback(os.close, descriptor)
        places = _random_places([descriptor for descriptor, _ in opened], size)
        is_direct = all(each for _, each in opened)
        rate = _rate_by_itself(places, size) if is_direct else None
        if rate is not None:
            how = f"{AT_ONCE} pieces of {size} bytes at a time past the page cache"
            return rate, how
        past = "past" if is_direct else "through"
        how = f"{READERS} threads read pieces of {size} bytes {past} the page cache"
        return _rate_of_threads(places, size), how


def _rate_by_itself(places: _Places, size: int) -> float | None:
    """None where the system does not read without threads."""
    try:
        reads = DirectReads(AT_ONCE)
    except OSError:
        return None
    with closing(reads), mmap.mmap(-1, AT_ONCE * size) as memory:
        memory.write(bytes(len(memory)))
        start = _address(memory)
        reads.set_list(
            [
                (descriptor, offset, start + at % AT_ONCE * size, size)
                for at, (descriptor, offset) in enumerate(places)
            ]
        )
        return _rate(reads, len(places))


def _rate(reads: DirectReads, num_places: int) -> float | None:
    begun = under_way = num_bytes = 0
    start = time.perf_counter()
    while (is_on := time.perf_counter() < start + _SECONDS) or under_way:
        while is_on and under_way < AT_ONCE:
            under_way += reads.begin([begun % num_places])
            begun += 1
        for _, result in reads.over(1):
            under_way -= 1
            if result < 0:
                return None
            num_bytes += result
    return num_bytes / (time.perf_counter() - start)


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
