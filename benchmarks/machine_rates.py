"""What this machine can do at most: reading and writing its disk, multiplying matrices."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from edge_moe.checkpoint import Checkpoint

DIRECT_CHUNK_BYTES = 8 * 2**20
WRITE_SAMPLE_BYTES = 256 * 2**20
MATRIX_ROWS = 1024
MATRIX_SECONDS = 1.5


def matrix_rate() -> float:
    """float32 operations per second of the best square matrix product, on torch's threads."""
    left, right = torch.randn(2, MATRIX_ROWS, MATRIX_ROWS)
    best = float("inf")
    end = time.perf_counter() + MATRIX_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX_ROWS**3 / best


def process_io() -> tuple[int, int]:
    """(read, written) bytes that this process has caused on the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["read_bytes"]), int(counts["write_bytes"])


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted({info.path.resolve() for info in checkpoint.tensors.values()})


def forget(checkpoint: Checkpoint) -> None:
    """Drop the checkpoint's files from the page cache."""
    for path in weight_files(checkpoint):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def direct_read_rate(checkpoint: Checkpoint) -> float:
    """Bytes per second of reading the weight files past the page cache, one request at a time."""
    buffer = mmap.mmap(-1, DIRECT_CHUNK_BYTES)  # page-aligned, as O_DIRECT needs
    num_bytes = 0
    start = time.perf_counter()
    for path in weight_files(checkpoint):
        with open_direct(path) as descriptor:
            while count := os.readv(descriptor, [buffer]):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)


@contextmanager
def open_direct(path: Path) -> Iterator[int]:
    """A descriptor that reads past the page cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def fsynced_write_rate(folder: Path) -> float:
    """Bytes per second of writing a new file and flushing it to the disk."""
    path = folder / "sample"
    chunk = os.urandom(DIRECT_CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb") as handle:
        for _ in range(WRITE_SAMPLE_BYTES // len(chunk)):
            handle.write(chunk)
        handle.flush()
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return WRITE_SAMPLE_BYTES / seconds
