"""`DirectReads`: many reads at once without a thread for each, by Linux's own asynchronous I/O.

The kernel fills memory from files that were opened past the page cache (O_DIRECT) while the calling
thread goes on; no other thread wakes up, and none waits for the interpreter's lock. glibc has no
functions for these system calls, so they are made by number (linux/aio_abi.h, io_submit(2)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_NUMBERS = {
    "x86_64": {"io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209},
    "aarch64": {"io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_getevents": 4},
}
_READ = np.dtype(
    [
        ("data", "<u8"),
        ("key", "<u4"),
        ("rw_flags", "<u4"),
        ("opcode", "<u2"),  # 0: IOCB_CMD_PREAD
        ("priority", "<i2"),
        ("descriptor", "<u4"),
        ("address", "<u8"),
        ("num_bytes", "<u8"),
        ("offset", "<i8"),
        ("reserved", "<u8"),
        ("flags", "<u4"),
        ("event_descriptor", "<u4"),
    ]
)
"""struct iocb"""
_EVENT = np.dtype([("data", "<u8"), ("object", "<u8"), ("result", "<i8"), ("result2", "<i8")])
"""struct io_event"""


class DirectReads:
    """A fixed list of reads, each of which can be begun again when it is over.

    Memory: 64 bytes for each read on the list. Belongs to one thread.
    """

    def __init__(self, most: int) -> None:
        """At most `most` are under way at a time.

        Raises:
            OSError: the system has no such reads, or none left to give (fs.aio-max-nr).
        """
        numbers = _NUMBERS.get(platform.machine())
        if numbers is None or not sys.platform.startswith("linux"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._numbers = numbers
        self._libc: Any = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._context = ctypes.c_ulong(0)
        self._call("io_setup", ctypes.c_long(most), ctypes.byref(self._context))
        self.most = most
        self._events = np.zeros(most, _EVENT)
        self._events_address = ctypes.c_void_p(self._events.ctypes.data)
        self._batch: npt.NDArray[np.uint64] = np.zeros(most, np.uint64)
        self._batch_address = ctypes.c_void_p(self._batch.ctypes.data)
        self._reads = np.zeros(0, _READ)
        self._first = 0

    def set_list(self, reads: Sequence[tuple[int, int, int, int]]) -> None:
        """Reads as (descriptor, offset, address, num_bytes), all multiples of the page size.

        None may be under way. The memory must be there until `close`.
        """
        self._reads = np.zeros(len(reads), _READ)
        if reads:
            columns = np.array(reads, np.uint64).T
            names = ("descriptor", "offset", "address", "num_bytes")
            for name, column in zip(names, columns, strict=True):
                self._reads[name] = column
        self._reads["data"] = np.arange(len(reads))
        self._first = self._reads.ctypes.data

    def begin(self, indices: Sequence[int]) -> int:
        """Begin reads of the list, in this order; how many were: the system may take fewer.

        Raises:
            OSError: not even the first can be begun; EAGAIN: not before others are over.
        """
        count = min(len(indices), self.most)
        size = _READ.itemsize
        self._batch[:count] = [self._first + index * size for index in indices[:count]]
        return self._call("io_submit", self._context, ctypes.c_long(count), self._batch_address)

    def over(self, at_least: int = 0) -> list[tuple[int, int]]:
        """(index, bytes read or minus errno) of reads that are over since the last call.

        Waits until they are `at_least` so many, or `most`; those must be under way.
        """
        at_least = min(at_least, self.most)
        while True:
            try:
                count = self._call(
                    "io_getevents",
                    *(self._context, ctypes.c_long(at_least), ctypes.c_long(self.most)),
                    *(self._events_address, None if at_least else _NO_TIME),
                )
            except InterruptedError:
                continue
            events = self._events[:count]
            return list(zip(events["data"].tolist(), events["result"].tolist(), strict=True))

    def close(self) -> None:
        """Wait for what is under way; nothing can be begun afterwards."""
        if self._context.value:
            self._call("io_destroy", self._context)
        self._context.value = 0

    def _call(self, name: str, *arguments: Any) -> int:
        result: int = self._libc.syscall(ctypes.c_long(self._numbers[name]), *arguments)
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return result


_NO_TIME = ctypes.byref((ctypes.c_long * 2)(0, 0))
"""struct timespec"""
