"""Small products stay in one thread, and the number of threads is put back."""

from __future__ import annotations

import numpy as np
import pytest
import threadpoolctl

from trivium.passes.quantization import blas


def _threads() -> set[int]:
    """How many threads each BLAS of this process takes."""
    found = threadpoolctl.threadpool_info()
    return {one["num_threads"] for one in found if one["user_api"] == "blas"}


def test_one_thread_inside_and_as_many_as_before_outside() -> None:
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        if _threads() != {2}:
            pytest.skip("numpy computes with something that cannot be told how many threads")
        with blas.in_one_thread():
            assert _threads() == {1}
            np.eye(300) @ np.eye(300)
        assert _threads() == {2}


def test_without_a_known_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threadpoolctl.ThreadpoolController, "_load_libraries", lambda self: None)
    with blas.in_one_thread():
        assert not _threads()
        assert (np.eye(3) @ np.eye(3)).sum() == 3
