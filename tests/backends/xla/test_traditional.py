"""``ai.onnx.ml``: labels looked up at run time, and refused where they are strings."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from trivium.backends.xla import onnx_backend
from trivium.compiler.errors import Unsupported

pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")


def encoder(kind: int, result: int, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node("LabelEncoder", ["x"], ["y"], domain="ai.onnx.ml", **attributes)
    x = helper.make_tensor_value_info("x", kind, [2, 3])
    y = helper.make_tensor_value_info("y", result, [2, 3])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.onnx.ml", 4)]
    return helper.make_model(
        helper.make_graph([node], "g", [x], [y]), opset_imports=opsets, ir_version=10
    )


@pytest.mark.parametrize(
    "attributes",
    [
        {"keys_int64s": [3, 1, 7], "values_floats": [0.5, -2.0, 4.0], "default_float": 9.0},
        {"keys_int64s": [2, 1], "values_int64s": [20, 10]},
    ],
)
def test_labels_are_looked_up_at_run_time(attributes: dict[str, Any]) -> None:
    floats = "values_floats" in attributes
    model = encoder(
        TensorProto.INT64, TensorProto.FLOAT if floats else TensorProto.INT64, **attributes
    )
    x = np.asarray([[1, 2, 3], [7, 5, 1]])
    (want,) = ReferenceEvaluator(model).run(None, {"x": x})
    rep = onnx_backend.prepare(model)
    np.testing.assert_array_equal(rep.run([x])[0], want)
    assert not rep.baked


def test_labels_that_are_strings_are_refused() -> None:
    model = encoder(TensorProto.INT64, TensorProto.STRING, keys_int64s=[1], values_strings=["one"])
    with pytest.raises(Unsupported, match="strings"):
        onnx_backend.prepare(model, bake=False).run([np.zeros((2, 3), np.int64)])
