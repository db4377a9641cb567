"""Models and targets that the backends' tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "trivium_test_transformer", Path(__file__).with_name("transformer.py")
)
assert _spec is not None
assert _spec.loader is not None
_transformer = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_transformer)


@pytest.fixture(scope="session")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-block transformer of the standard's own high-level operators, seeded weights."""
    path: Path = _transformer.write_transformer(
        tmp_path_factory.mktemp("transformer") / "transformer.onnx"
    )
    return path
