"""Small products stay in one thread, and the number of threads is put back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from trivium.passes.quantization import blas


@pytest.fixture
def threads() -> Iterator[tuple[object, str, str]]:
    library, setter = blas._openblas()
    if library is None:
        pytest.skip("numpy computes with something else than OpenBLAS here")
    getter = setter.replace("set", "get", 1)
    before = int(library[getter]())
    yield library, getter, setter
    library[setter](before)


def test_one_thread_inside_and_as_many_as_before_outside(
    threads: tuple[dict[str, object], str, str],
) -> None:
    library, getter, setter = threads
    library[setter](2)  # type: ignore[operator]
    with blas.in_one_thread():
        assert library[getter]() == 1  # type: ignore[operator]
        np.eye(300) @ np.eye(300)
    assert library[getter]() == 2  # type: ignore[operator]


def test_without_openblas_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_openblas", lambda: (None, ""))
    with blas.in_one_thread():
        assert (np.eye(3) @ np.eye(3)).sum() == 3
