"""How many threads numpy's matrix products take.

OpenBLAS splits even small products among all cores and waits for the slowest: where ONNX Runtime or
anyone else wants the same cores, a product of a millisecond takes thirty.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

SMALL = 1024
"""Rows and columns of a matrix up to which one thread does."""

_PREFIXES, _SUFFIXES = ("scipy_openblas", "openblas"), ("64_", "")


@contextmanager
def in_one_thread() -> Iterator[None]:
    """Let OpenBLAS, where that is what numpy uses, compute in the thread that asks it to."""
    library, name = _openblas()
    if library is None:
        yield
        return
    before = int(library[name.replace("set", "get", 1)]())
    library[name](1)
    try:
        yield
    finally:
        library[name](before)


@cache
def _openblas() -> tuple[ctypes.CDLL | None, str]:
    """The library that is loaded, and its function that sets the number of threads."""
    names = [f"{prefix}_set_num_threads{suffix}" for prefix in _PREFIXES for suffix in _SUFFIXES]
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[2]
            if "openblas" not in path:
                continue
            library = ctypes.CDLL(f"/{path}")
            for name in names:
                if hasattr(library, name):
                    return library, name
    return None, ""
