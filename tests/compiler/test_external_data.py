"""Small weights that lie outside of the model's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from trivium.compiler import model as models


def test_small_external_tensor_is_checked_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = numpy_helper.from_array(np.arange(4, dtype=np.float32), "bias")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "bias"], ["y"])],
        "add",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [bias],
    )
    folder = tmp_path / "model"
    folder.mkdir()
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(proto, folder / "m.onnx", save_as_external_data=True, size_threshold=0)
    monkeypatch.chdir(tmp_path)
    model = models.load(folder / "m.onnx")
    tensor = model.graph.initializers["bias"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [0, 1, 2, 3]
    # Written elsewhere, it does not point to where it was.
    (tmp_path / "other").mkdir()
    models.save(model, tmp_path / "other" / "m.onnx", external=True)
    (folder / "m.onnx").unlink()
    again = models.load(tmp_path / "other" / "m.onnx").graph.initializers["bias"].const_value
    assert again is not None
    assert again.numpy().tolist() == [0, 1, 2, 3]
