"""How many threads numpy's matrix products take.

A BLAS splits even small products among all cores and waits for the slowest: where ONNX Runtime or
anyone else wants the same cores, a product of a millisecond takes thirty.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

SMALL = 1024
"""Rows and columns of a matrix up to which one thread does."""


def in_one_thread() -> AbstractContextManager[Any]:
    """Let numpy's BLAS, where it is one that can be told, compute in the thread that asks it to."""
    from threadpoolctl import threadpool_limits

    limited: AbstractContextManager[Any] = threadpool_limits(limits=1, user_api="blas")
    return limited
