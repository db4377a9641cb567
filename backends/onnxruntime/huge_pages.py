"""Weights on huge pages, by advice to the system from inside of the process.

A decoder reads all of its weights for every token; on pages of 4 KiB much of that time is spent on
finding them. ONNX Runtime takes memory from malloc, which in glibc is one growing heap if it is
told to put large blocks there: the heap is grown beforehand, the system is advised to use huge
pages for what was added, and the memory is given back to malloc, untouched.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

PAGE = 2 << 20
"""Bytes of a huge page on x86-64, and the commonest size elsewhere."""

_ADVISE_HUGE = 14  # MADV_HUGEPAGE
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
_LARGEST = 2**31 - 1
_AFTER = 32 << 20
"""What glibc's own thresholds grow to in a process that frees large blocks."""


@contextmanager
def heap(size: int) -> Iterator[None]:
    """Let what is allocated meanwhile lie on huge pages, up to about ``size`` bytes.

    Only on Linux with glibc, and from the main thread, whose heap is in one piece; elsewhere, and
    where the system has no huge pages to give, nothing happens.
    """
    libc = _libc()
    if libc is None or size < PAGE or threading.current_thread() is not threading.main_thread():
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _LARGEST)
    try:
        block = libc.malloc(size)
        if block:
            _advise(libc, block, size)
            libc.free(block)
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _AFTER)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _AFTER)


def advise(array: np.ndarray[Any, Any]) -> None:
    """Ask for huge pages where an array lies; its pages are taken as a whole when first written."""
    libc = _libc()
    if libc is not None:
        _advise(libc, array.ctypes.data, array.nbytes)


def _advise(libc: Any, start: int, size: int) -> None:
    first, last = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
    if last > first:
        libc.madvise(first, last - first, _ADVISE_HUGE)


@cache
def _libc() -> Any:
    """The C library, if it is glibc on Linux; None elsewhere."""
    import os

    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    try:
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        libc.malloc.argtypes = [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc
