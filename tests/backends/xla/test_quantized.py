"""Quantized products compute on integers: the program says so, and the numbers agree."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from trivium.backends.xla.lowering import lower, precise
from trivium.compiler import model as models

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

_RESULT = re.compile(r"stablehlo\.(dot_general|convolution).*: \((.*)\) -> (\S+)")


def compiled(model: ir.Model, feed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the StableHLO of a model and its outputs."""
    lowered = lower(model)
    weights = lowered.read()
    with precise():
        jitted = jax.jit(lowered.function)
        # What a TPU gets: the CPU convolves the same integers as floats that hold them exactly.
        text = jitted.trace(weights, feed).lower(lowering_platforms=("tpu",)).as_text()
        return text, {name: np.asarray(v) for name, v in jitted(weights, feed).items()}


def reference(proto: onnx.ModelProto, feed: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The first output according to onnx's own evaluator."""
    results: Any = ReferenceEvaluator(proto).run(None, feed)
    return np.asarray(results[0])


def products(text: str) -> list[tuple[str, str]]:
    """Operand and result types of every product in a StableHLO text."""
    return [(match[2], match[3]) for match in _RESULT.finditer(text)]


def parse(text: str, **constants: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A model from ONNX's text form, with initializers."""
    model = onnx.parser.parse_model(text)
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


MATMUL = """<ir_version: 10, opset_import: ["": 21]>
main (float[4, 32] x) => (float[4, 16] y) {
   xq = QuantizeLinear(x, xs, xz)
   a = DequantizeLinear(xq, xs, xz)
   b = DequantizeLinear<axis = 1>(w, ws, wz)
   c = MatMul(a, b)
   yq = QuantizeLinear(c, ys, xz)
   y = DequantizeLinear(yq, ys, xz)
}"""


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("weight_zero", [0, 3])
def test_matmul_between_quantizations_multiplies_integers(kind: str, weight_zero: int) -> None:
    rng = np.random.default_rng(0)
    proto = parse(
        MATMUL,
        xs=np.asarray(0.02, np.float32),
        xz=np.asarray(5, kind),
        w=rng.integers(-100, 100, (32, 16)).astype(np.int8),
        ws=rng.uniform(0.01, 0.02, 16).astype(np.float32),
        wz=np.full(16, weight_zero, np.int8),
        ys=np.asarray(0.3, np.float32),
    )
    feed = {"x": rng.standard_normal((4, 32)).astype(np.float32)}
    text, actual = compiled(ir.from_proto(proto), feed)
    ((operands, result),) = products(text)
    assert operands == "tensor<4x32xi8>, tensor<32x16xi8>"
    assert result == "tensor<4x16xi32>"
    expected = reference(proto, feed)
    # A sum in another order may fall on the other side of a rounding: one step at most.
    np.testing.assert_allclose(actual["y"], expected, atol=0.3001)
    assert np.mean(actual["y"] != expected) < 0.05


@pytest.mark.parametrize(("kind", "block"), [("int8", 0), ("int4", 0), ("int4", 8), ("uint4", 8)])
def test_weight_only_matmul_keeps_the_weights_packed(kind: str, block: int) -> None:
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, kind) if kind != "int8" else np.int8)
    rng = np.random.default_rng(1)
    low = 0 if kind.startswith("u") else -8
    shape = (32 // block, 16) if block else (16,)
    axis = "axis = 0, block_size = 8" if block else "axis = 1"
    proto = parse(
        f"""<ir_version: 10, opset_import: ["": 21]>
        main (float[4, 32] x) => (float[4, 16] y) {{
           b = DequantizeLinear<{axis}>(w, ws, wz)
           y = MatMul(x, b)
        }}""",
        w=rng.integers(low, low + 16, (32, 16)).astype(dtype),
        ws=rng.uniform(0.01, 0.02, shape).astype(np.float32),
        wz=rng.integers(0, 4, shape).astype(dtype),
    )
    feed = {"x": rng.standard_normal((4, 32)).astype(np.float32)}
    text, actual = compiled(ir.from_proto(proto), feed)
    expected = reference(proto, feed)
    np.testing.assert_allclose(actual["y"], expected, rtol=1e-4, atol=1e-5)
    # The weights go into the product as they are, converted and nothing else: the scales come
    # after it, so no dequantized matrix of 32 by 16 (or of its blocks) is multiplied out.
    made = re.findall(r"stablehlo\.multiply .*: tensor<(32x16|4x8x16)xf32>", text)
    assert len(products(text)) == 1
    assert not made


@pytest.mark.parametrize("name", ["mlperf_ic_resnet8_int8_qdq", "mlperf_kws_dscnn_int8_qdq"])
def test_quantized_network_convolves_integers(
    name: str, shared_data: Callable[[str], Path]
) -> None:
    import onnxruntime as ort

    path = shared_data(f"models/{name}.onnx")
    model = models.load(path)
    info = models.signature(model)[0][0]
    shape = [dim if isinstance(dim, int) else 1 for dim in info.shape]
    feed = {info.name: np.random.default_rng(2).integers(-128, 128, shape).astype(np.int8)}
    text, actual = compiled(model, feed)
    found = products(text)
    assert len(found) == sum(n.op_type in ("Conv", "MatMul") for n in model.graph)
    assert all("xi8>" in operands and "xi32>" in result for operands, result in found)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (expected,) = ort.InferenceSession(path, options).run(None, feed)
    (logits,) = actual.values()
    assert np.argmax(logits) == np.argmax(expected)


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("kind", ["INT2", "UINT2", "INT4", "FLOAT4E2M1"])
def test_weights_of_less_than_a_byte(kind: str, block: int) -> None:
    dtype = ir.DataType[kind]
    rng = np.random.default_rng(0)
    codes = rng.choice([0.5, 1.5, 3, -6] if kind == "FLOAT4E2M1" else [0, 1], (64, 48))
    w = codes.astype(dtype.numpy())
    scales = rng.uniform(0.1, 0.2, (4, 48) if block else (48,)).astype(np.float32)
    node = helper.make_node(
        "DequantizeLinear", ["w", "s"], ["wide"], axis=0 if block else 1, block_size=block
    )
    graph = helper.make_graph(
        [node, helper.make_node("MatMul", ["x", "wide"], ["y"])],
        "low",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 48])],
        [ir.to_proto(ir.tensor(w, name="w")), onnx.numpy_helper.from_array(scales, "s")],
    )
    lowered = lower(ir.from_proto(helper.make_model(graph, opset_imports=[
        helper.make_opsetid("", 25)], ir_version=13)))  # fmt: skip
    x = rng.standard_normal((3, 64)).astype(np.float32)
    with precise():
        y = jax.jit(lowered.function)(lowered.read(), {"x": x})["y"]
    full = w.astype(np.float32) * (np.repeat(scales, block, 0) if block else scales)
    np.testing.assert_allclose(y, x @ full, rtol=1e-4, atol=1e-4)
