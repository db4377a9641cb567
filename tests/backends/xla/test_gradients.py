"""Gradients of lowered models: automatic against numerical, operator by operator, and of whole
models down to the file that is written back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import trivium
from trivium.backends.xla.gradients import write_back
from trivium.backends.xla.lowering import lower, precise
from trivium.compiler.errors import BadInput

jax = pytest.importorskip("jax", reason="the xla backend needs the extra trivium[tpu]")

UNARY = tuple(
    """
    Abs Acosh Asinh Atan Ceil Cos Cosh Elu Erf Exp Gelu HardSigmoid HardSwish LeakyRelu Log Mish
    Neg Reciprocal Relu Selu Sigmoid Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh
    """.split()  # noqa: SIM905
)

SHAPED: tuple[tuple[str, dict[str, Any], tuple[tuple[int, ...], ...]], ...] = (
    ("Add", {}, ((3, 4), (4,))),
    ("Div", {}, ((3, 4), (3, 1))),
    ("Pow", {}, ((3, 4), (4,))),
    ("Max", {}, ((3, 4), (3, 4))),
    ("PRelu", {}, ((3, 4), (4,))),
    ("MatMul", {}, ((2, 3, 4), (4, 5))),
    ("Gemm", {"alpha": 0.5, "transB": 1}, ((3, 4), (5, 4), (5,))),
    ("Einsum", {"equation": "ij,jk->ik"}, ((3, 4), (4, 2))),
    ("Conv", {"pads": [1, 1, 1, 1], "strides": [2, 2]}, ((1, 2, 5, 5), (3, 2, 3, 3), (3,))),
    ("ConvTranspose", {"strides": [2, 2]}, ((1, 2, 3, 3), (2, 3, 3, 3))),
    ("MaxPool", {"kernel_shape": [2, 2]}, ((1, 2, 4, 4),)),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, ((1, 2, 4, 4),)),
    ("GlobalAveragePool", {}, ((1, 2, 4, 4),)),
    ("LayerNormalization", {}, ((3, 4), (4,), (4,))),
    ("RMSNormalization", {}, ((3, 4), (4,))),
    ("InstanceNormalization", {}, ((2, 3, 4), (3,), (3,))),
    ("GroupNormalization", {"num_groups": 2}, ((2, 4, 3), (4,), (4,))),
    ("LRN", {"size": 3}, ((1, 4, 2, 2),)),
    ("Softmax", {}, ((3, 4),)),
    ("LogSoftmax", {"axis": 0}, ((3, 4),)),
    ("ReduceLogSumExp", {}, ((3, 4),)),
    ("ReduceL2", {}, ((3, 4),)),
    ("ReduceProd", {}, ((3, 4),)),
    ("Concat", {"axis": 1}, ((3, 4), (3, 2))),
    ("Transpose", {"perm": [1, 0]}, ((3, 4),)),
    ("DepthToSpace", {"blocksize": 2}, ((1, 4, 2, 2),)),
    ("GridSample", {}, ((1, 2, 4, 4), (1, 3, 3, 2))),
    ("Attention", {"is_causal": 1}, ((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))),
    ("LSTM", {"hidden_size": 3}, ((4, 1, 2), (1, 12, 2), (1, 12, 3), (1, 24))),
    ("GRU", {"hidden_size": 3, "linear_before_reset": 1}, ((4, 1, 2), (1, 9, 2), (1, 9, 3))),
)


def model_of(op_type: str, attributes: dict[str, Any], shapes: Any) -> ir.Model:
    """A model of one operator over float64 inputs."""
    names = [f"x{index}" for index in range(len(shapes))]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)]
    graph = helper.make_graph([node], "one", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    return ir.from_proto(proto)


def check(op_type: str, attributes: dict[str, Any], shapes: Any) -> None:
    """Compare automatic with central-difference gradients, by every input."""
    lowered = lower(model_of(op_type, attributes, shapes))
    rng = np.random.default_rng(11)
    # Above one, where acosh, log and sqrt are defined, and away from the kinks at whole numbers.
    values = {f"x{i}": rng.uniform(1.1, 1.9, shape) for i, shape in enumerate(shapes)}
    with precise():
        shape = jax.eval_shape(lowered.function, {}, values)["y"].shape
        weight = rng.standard_normal(shape)

        def scalar(inputs: dict[str, Any]) -> Any:
            return (lowered.function({}, inputs)["y"] * weight).sum()

        jitted = jax.jit(scalar)
        automatic = jax.jit(jax.grad(scalar))(values)
        for name, value in values.items():
            flat = value.reshape(-1)
            for index in rng.choice(flat.size, min(4, flat.size), replace=False):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = flat.copy()
                    moved[index] += step
                    ends.append(float(jitted({**values, name: moved.reshape(value.shape)})))
                numerical = (ends[0] - ends[1]) / 2e-5
                found = float(np.asarray(automatic[name]).reshape(-1)[index])
                assert found == pytest.approx(numerical, rel=1e-4, abs=1e-6), (name, index)


@pytest.mark.parametrize("op_type", UNARY)
def test_gradient_of_unary_operator(op_type: str) -> None:
    check(op_type, {}, ((2, 3),))


@pytest.mark.parametrize(("op_type", "attributes", "shapes"), SHAPED, ids=[s[0] for s in SHAPED])
def test_gradient_of_operator(op_type: str, attributes: dict[str, Any], shapes: Any) -> None:
    check(op_type, attributes, shapes)


def fake_quantized() -> onnx.ModelProto:
    """``y = DQ(Q(x)) @ w`` with a scale of a quarter and eight bits."""
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 21]>
        main (float[1, 4] x) => (float[1, 2] y) {
           q = QuantizeLinear(x, s, z)
           d = DequantizeLinear(q, s, z)
           y = MatMul(d, w)
        }"""
    )
    constants: dict[str, np.ndarray[Any, Any]] = {
        "s": np.asarray(0.25, np.float32),
        "z": np.asarray(0, np.int8),
        "w": np.arange(8, dtype=np.float32).reshape(4, 2),
    }
    for name, array in constants.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def test_gradient_goes_straight_through_quantization_and_stops_where_it_clips() -> None:
    graph = trivium.differentiable(ir.from_proto(fake_quantized()))
    x = np.asarray([[0.3, -1.1, 100.0, 2.0]], np.float32)
    with graph.precise():
        value = graph(graph.weights, {"x": x})["y"]
        slope = jax.grad(lambda x: graph(graph.weights, {"x": x})["y"].sum())(x)
        by_weight = jax.grad(lambda w: graph(w, {"x": x})["y"].sum())(graph.weights)
    rounded = np.asarray([[0.25, -1.0, 127 * 0.25, 2.0]], np.float32)
    np.testing.assert_allclose(value, rounded @ np.arange(8.0).reshape(4, 2))
    np.testing.assert_allclose(slope, [[1.0, 5.0, 0.0, 13.0]])
    np.testing.assert_allclose(by_weight["w"], np.repeat(rounded.T, 2, axis=1))


@pytest.mark.slow
def test_training_reaches_every_weight_and_the_file_keeps_what_was_learned(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    import onnxruntime as ort

    graph = trivium.differentiable(shared_data("models/mlperf_ic_resnet8_fp32.onnx"))
    rng = np.random.default_rng(5)
    x = rng.uniform(0, 255, (4, 32, 32, 3)).astype(np.float32)
    target = np.eye(10, dtype=np.float32)[[1, 3, 5, 7]]
    (name,) = (info.name for info in graph.lowered.outputs)

    def loss(weights: Any) -> Any:
        y = graph(weights, {"input_1": x})[name]
        return -(target * jax.numpy.log(y + 1e-9)).sum(axis=1).mean()

    with graph.precise():
        before, gradients = jax.jit(jax.value_and_grad(loss))(graph.weights)
        assert all(np.abs(np.asarray(g)).max() > 0 for g in gradients.values())
        norm = np.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        step = float(0.01 / norm)
        moved = {key: w - step * gradients[key] for key, w in graph.weights.items()}
        after = loss(moved)
        expected = np.asarray(graph(moved, {"input_1": x})[name])
    assert float(after) < float(before)
    write_back(graph.model, moved)
    ir.save(graph.model, tmp_path / "tuned.onnx")
    (actual,) = ort.InferenceSession(tmp_path / "tuned.onnx").run(None, {"input_1": x})
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_model_without_float_weights_is_refused() -> None:
    with pytest.raises(BadInput, match="no float weights"):
        trivium.differentiable(model_of("Relu", {}, ((2,),)))


def test_write_back_refuses_another_shape() -> None:
    graph = trivium.differentiable(ir.from_proto(fake_quantized()))
    with pytest.raises(BadInput, match=r"\(3,\) where the weight 'w' is \(4, 2\)"):
        write_back(graph.model, {"w": np.zeros(3)})
