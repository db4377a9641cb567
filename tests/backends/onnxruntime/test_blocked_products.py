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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(96, 33), (160, 20)])
def test_a_gemm_is_packed_as_well(
    rows: int, columns: int, biased: bool, turned: bool, symmetric: bool, bits: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(rows)
    shape = (columns, rows) if turned else (rows, columns)
    w = ir.tensor(rng.standard_normal(shape).astype(np.float32), name="w")
    c = ir.tensor(rng.standard_normal(columns).astype(np.float32), name="c")
    weights = [ir.val(one.name, const_value=one) for one in (w, c)[: 2 if biased else 1]]
    x = ir.val("x", ir.DataType.FLOAT, [5, rows])
    node = ir.node("Gemm", [x, *weights], {"transB": int(turned)})
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([5, columns])
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports={"": 24}, name="g")
    model = ir.Model(graph, ir_version=11)
    QuantizeWeights(bits=bits, block_size=32, symmetric=symmetric, min_elements=1)(model)
    models.save(model, tmp_path / "plain.onnx")
    assert PackBlockedProducts()(model).modified
    expected = ["MatMulNBits", "Add"] if biased else ["MatMulNBits"]
    assert [one.op_type for one in model.graph] == expected
    models.save(model, tmp_path / "packed.onnx")
    feed = {"x": rng.standard_normal((5, rows)).astype(np.float32)}
    want, have = (run(tmp_path / f"{name}.onnx", feed) for name in ("plain", "packed"))
    assert np.sqrt(np.mean((want - have) ** 2)) < 0.02 * np.sqrt(np.mean(want**2))


def test_a_scaled_gemm_is_left_as_it_is() -> None:
    rng = np.random.default_rng(0)
    w = ir.val("w", const_value=ir.tensor(rng.standard_normal((64, 32)).astype(np.float32)))
    x = ir.val("x", ir.DataType.FLOAT, [5, 64])
    node = ir.node("Gemm", [x, w], {"alpha": 0.5})
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([5, 32])
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports={"": 24}, name="g")
    model = ir.Model(graph, ir_version=11)
    QuantizeWeights(bits=4, block_size=32, min_elements=1)(model)
    assert not PackBlockedProducts()(model).modified
