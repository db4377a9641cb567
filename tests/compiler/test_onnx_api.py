"""What the road through onnx's C++ side must not leave behind in a model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trivium.compiler.onnx_api import light_proto
from trivium.compiler.passing import is_constant


def test_weights_are_constants_again_afterwards() -> None:
    x = ir.val("x", ir.DataType.FLOAT, [1, 64])
    weight = ir.val("w", ir.DataType.FLOAT, [64, 64])
    weight.const_value = ir.tensor(np.ones((64, 64), np.float32), name="w")
    node = ir.node("MatMul", [x, weight])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], name="g")
    model = ir.Model(graph, ir_version=11)
    with light_proto(model) as proto:
        assert [value.name for value in proto.graph.input] == ["x", "w"]
    assert graph.inputs == [x]
    assert is_constant(weight)
