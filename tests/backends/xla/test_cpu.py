"""What the lowering does for the CPU alone gives the same numbers as what it does for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from trivium.backends.xla import platforms
from trivium.backends.xla.lowering import Lowered, lower, precise

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")


def one_node(op_type: str, x: np.ndarray[Any, Any], *weights: Any, **attributes: Any) -> ir.Model:
    """A model of one node that reads ``x`` and weights."""
    names = [f"w{index}" for index in range(len(weights))]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node(op_type, ["x", *names], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(w, name) for name, w in zip(names, weights, strict=True)],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def run(lowered: Lowered, x: np.ndarray[Any, Any]) -> Any:
    with precise():
        return np.asarray(jax.jit(lowered.function)(lowered.read(), {"x": x})["y"])


@pytest.mark.parametrize(
    ("shape", "outputs", "groups", "attributes"),
    [
        ((2, 6, 9, 8), 6, 6, {"pads": [1, 1, 1, 1]}),
        ((1, 5, 9, 8), 10, 5, {"pads": [0, 2, 1, 0], "strides": [2, 1]}),
        ((1, 4, 11, 11), 4, 4, {"dilations": [2, 3], "strides": [1, 2]}),
        ((1, 4, 13), 4, 4, {"auto_pad": "SAME_LOWER", "strides": [2]}),
        ((1, 3, 5, 5, 5), 3, 3, {}),
        ((1, 8, 7, 7), 12, 4, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ((1, 6, 9, 9), 6, 1, {"pads": [1, 1, 1, 1]}),
        ((2, 16, 9, 8), 16, 1, {"pads": [1, 0, 2, 1]}),
        ((1, 16, 9, 11), 16, 1, {"dilations": [2, 3], "auto_pad": "SAME_LOWER"}),
        ((1, 16, 9, 9), 16, 1, {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_convolutions_agree(
    shape: tuple[int, ...], outputs: int, groups: int, attributes: dict[str, Any], dtype: Any
) -> None:
    generator = np.random.default_rng(0)
    rank = len(shape) - 2
    x = generator.standard_normal(shape).astype(dtype)
    w = generator.standard_normal((outputs, shape[1] // groups, *[3] * rank)).astype(dtype)
    bias = generator.standard_normal(outputs).astype(dtype)
    model = one_node("Conv", x, w, bias, group=groups, **attributes)
    plain, suited = lower(model), lower(model, platform="cpu", pack=True)
    assert suited.packed["w0"] == (*range(2, rank + 2), 1, 0)
    tolerance = 1e-5 if dtype == np.float32 else 4e-3
    np.testing.assert_allclose(run(suited, x), run(plain, x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "dilations": [2, 1], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [9, 9]},  # more places than are worth an operation each
    ],
)
def test_pooling_agrees(op_type: str, attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 10, 11)).astype(np.float32)
    model = one_node(op_type, x, **attributes)
    np.testing.assert_allclose(
        run(lower(model, platform="cpu"), x), run(lower(model), x), rtol=1e-5, atol=1e-6
    )


def test_a_convolution_to_few_channels_is_one_product() -> None:
    def operations(channels: int, size: int, **attributes: Any) -> tuple[int, int]:
        x = np.ones((1, channels, size, size), np.float32)
        model = one_node("Conv", x, np.ones((channels, channels, 3, 3), np.float32), **attributes)
        lowered = lower(model, platform="cpu", pack=True)
        with precise():
            text = jax.jit(lowered.function).lower(lowered.read(), {"x": x}).as_text()
        return text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")

    assert operations(16, 32, pads=[1, 1, 1, 1]) == (0, 1)
    assert operations(16, 32, strides=[2, 2]) == (1, 0)
    assert operations(32, 16) == (1, 0)
    assert operations(16, 112) == (1, 0)
    assert operations(8, 32) == (1, 0)


def test_packed_filters_are_convolved_as_they_lie() -> None:
    x = np.ones((1, 64, 8, 8), np.float32)
    w = np.ones((64, 64, 3, 3), np.float32)
    model = one_node("Conv", x, w)

    def compiled(lowered: Lowered) -> str:
        with precise():
            program = jax.jit(lowered.function, compiler_options=platforms.compiler_options("cpu"))
            text: str = program.lower(lowered.read(), {"x": x}).compile().as_text()
        return text

    # The input and the output are transposed either way; the filter only where it is not packed.
    packed, plain = (compiled(lower(model, platform="cpu", pack=p)) for p in (True, False))
    assert "f32[3,3,64,64]{3,2,1,0} parameter" in packed
    assert packed.count("transpose(") < plain.count("transpose(")


def test_transposed_weights_of_a_product_are_packed() -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((2, 5)).astype(np.float32)
    w = generator.standard_normal((7, 5)).astype(np.float32)
    model = one_node("Gemm", x, w, transB=1)
    suited = lower(model, pack=True)
    assert suited.packed == {"w0": (1, 0)}
    assert not lower(one_node("Gemm", x, w.T.copy()), pack=True).packed
    np.testing.assert_allclose(run(suited, x), x @ w.T, rtol=1e-5)


def test_what_is_not_only_a_filter_is_not_packed() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("ReduceSum", ["w"], ["s"], keepdims=0),
        helper.make_node("Add", ["c", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones((3, 2, 3, 3), np.float32), "w")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert not lower(model, pack=True).packed


def test_int8_filters_are_packed_through_their_dequantization() -> None:
    generator = np.random.default_rng(2)
    w = generator.integers(-9, 9, (4, 1, 3, 3)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "sw", "zw"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"], group=4, pads=[1, 1, 1, 1]),
    ]
    constants: dict[str, np.ndarray[Any, Any]] = {
        "sx": np.asarray(0.1, np.float32),
        "zx": np.asarray(3, np.int8),
        "w": w,
        "sw": np.asarray([0.5, 0.25, 1, 2], np.float32),
        "zw": np.zeros(4, np.int8),
    }
    x = generator.standard_normal((1, 4, 6, 6)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    suited = lower(model, platform="cpu", pack=True)
    assert set(suited.packed) == {"w"}
    np.testing.assert_allclose(run(suited, x), run(lower(model), x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("terms", [7, 256, 1000])
@pytest.mark.parametrize("zero", [None, 3, 255])
def test_products_of_integers_agree_to_the_last_bit(terms: int, zero: int | None) -> None:
    generator = np.random.default_rng(terms)
    x = generator.integers(200, 256, (3, 5, terms)).astype(np.uint8)
    w = generator.integers(-128, -90, (terms, 6)).astype(np.int8)
    zeros = [] if zero is None else [np.array(zero, np.uint8)]
    model = one_node("MatMulInteger", x, w, *zeros)
    lowered = lower(model, platform="cpu")
    have = run(lowered, x)
    want = np.matmul(x.astype(np.int64) - (zero or 0), w.astype(np.int64))
    assert have.dtype == np.int32
    np.testing.assert_array_equal(have, want)
    with precise():
        text = jax.jit(lowered.function).lower(lowered.read(), {"x": x}).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == -(-terms // 256)
    assert all("xf32>" in line for line in products)


def test_quantized_products_are_computed_on_floats() -> None:
    x = ir.val("x", ir.DataType.INT8, [4, 8])
    scale = ir.val("s", const_value=ir.tensor(np.float32(0.5), name="s"))
    w = ir.val("w", const_value=ir.tensor(np.arange(48, dtype=np.int8).reshape(8, 6), name="w"))
    read, weight = (ir.node("DequantizeLinear", [value, scale]) for value in (x, w))
    node = ir.node("MatMul", [read.outputs[0], weight.outputs[0]])
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([4, 6])
    graph = ir.Graph(
        [x], [y], nodes=[read, weight, node], initializers=[scale, w],
        opset_imports={"": 21}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    feed = np.arange(-16, 16, dtype=np.int8).reshape(4, 8)
    want = (feed * 0.5) @ (np.arange(48).reshape(8, 6) * 0.5)
    for lowered, kind in ((lower(model, platform="cpu"), "xf32>"), (lower(model), "xi32>")):
        np.testing.assert_array_equal(run(lowered, feed), want)
        with precise():
            text = jax.jit(lowered.function).lower(lowered.read(), {"x": feed}).as_text()
        assert [kind in line for line in text.splitlines() if "dot_general" in line] == [True]
