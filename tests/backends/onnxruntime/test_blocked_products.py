"""Blocked weights run by ONNX Runtime's own operator, and mean the same there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from trivium.backends.onnxruntime.blocked_products import PackBlockedProducts
from trivium.compiler import model as models
from trivium.passes.quantize_weights import QuantizeWeights


def product(rows: int, columns: int) -> ir.Model:
    rng = np.random.default_rng(rows * columns)
    stored = rng.standard_normal((rows, columns)).astype(np.float32)
    x = ir.val("x", ir.DataType.FLOAT, [2, 3, rows])
    weight = ir.val("w", const_value=ir.tensor(stored, name="w"))
    node = ir.node("MatMul", [x, weight])
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([2, 3, columns])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=[weight], opset_imports={"": 24}, name="g"
    )
    return ir.Model(graph, ir_version=11)


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: np.ndarray = ort.InferenceSession(path, options).run(None, feed)[0]
    return result


@pytest.mark.parametrize("size", [16, 32, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(256, 64), (96, 33), (160, 20)])
def test_packed_products_compute_the_same(
    rows: int, columns: int, symmetric: bool, bits: int, size: int, tmp_path: Path
) -> None:
    model = product(rows, columns)
    QuantizeWeights(bits=bits, block_size=size, symmetric=symmetric, min_elements=1)(model)
    models.save(model, tmp_path / "plain.onnx")
    assert PackBlockedProducts()(model).modified
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
    models.save(model, tmp_path / "packed.onnx")
    x = np.random.default_rng(1).standard_normal((2, 3, rows)).astype(np.float32)
    want, have = (run(tmp_path / f"{name}.onnx", {"x": x}) for name in ("plain", "packed"))
    # The kernel rounds x to int8 in blocks.
    assert np.sqrt(np.mean((want - have) ** 2)) < 0.02 * np.sqrt(np.mean(want**2))
