"""The same integers from ONNX Runtime's kernels, from the interpreter, and from the C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.backends.fpga import qdq
from trivium.backends.fpga import cost, folding, interpret, ir, lower
from trivium.backends.fpga.hls import project, simulate


def onnx_runtime_s_own(
    layer: ir.Convolution | ir.Depthwise, flow: ir.Dataflow, x: Any, dtype: Any
) -> Any:
    """The layer as one QLinearConv, ONNX Runtime's integer kernel, on ``[h, w, c]`` integers.

    With scales of 1 for input and output the weight's scale is the whole factor, exactly.
    """
    how, window = layer.requantize, layer.window
    assert how is not None
    weight = layer.weight
    weight = weight.transpose(0, 3, 1, 2) if weight.ndim == 4 else weight[:, None]
    sums = weight.reshape(len(weight), -1).sum(1)
    source = flow.input_of(layer)
    stored = {
        "xs": np.float32(1),
        "xz": np.array(layer.padding, dtype),
        "w": weight.astype(np.int8),
        "ws": (how.multiplier / 2.0**how.shift).astype(np.float32),
        "wz": np.zeros(len(weight), np.int8),
        "ys": np.float32(1),
        "yz": np.array(how.zero_point, dtype),
        "b": (layer.bias + layer.padding * sums).astype(np.int32),
    }
    top, left = window.pads
    height, width = flow.output_of(layer).shape[:2]
    spans = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    ends = [
        (size - 1) * stride + span - start - given
        for size, stride, span, start, given in zip(
            (height, width), window.strides, spans, window.pads, source.shape, strict=False
        )
    ]
    cropped = x[: source.shape[0] + min(ends[0], 0), : source.shape[1] + min(ends[1], 0)]
    node = helper.make_node(
        "QLinearConv",
        ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"],
        ["y"],
        strides=window.strides,
        dilations=window.dilations,
        pads=[top, left, max(ends[0], 0), max(ends[1], 0)],
        group=1 if layer.weight.ndim == 4 else len(weight),
    )
    element = TensorProto.INT8 if dtype == np.int8 else TensorProto.UINT8
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", element, [1, source.channels, None, None])],
        [helper.make_tensor_value_info("y", element, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {"x": cropped.transpose(2, 0, 1)[None].astype(dtype)})
    # A Relu that the lowering folded into the range.
    return np.clip(y[0].transpose(1, 2, 0).astype(np.int64), how.lo, how.hi)


def lowered(seed: int) -> ir.Dataflow:
    found = lower.lower(qdq.loaded(qdq.network(seed)).graph)
    assert not found.refusals
    assert found.flow is not None
    return found.flow


def drawn(flow: ir.Dataflow, seed: int) -> Any:
    tensor = flow.tensors[flow.inputs[0].tensor]
    rng = np.random.default_rng(seed)
    return rng.integers(tensor.range.lo, tensor.range.hi + 1, tensor.shape)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_convolutions_equal_onnx_runtime_s_integer_kernel(seed: int) -> None:
    flow = lowered(seed)
    values = interpret.run(flow, {flow.inputs[0].tensor: drawn(flow, seed)})
    dtype, compared = np.int8 if seed % 2 else np.uint8, 0
    for layer in flow.layers:
        if not isinstance(layer, (ir.Convolution, ir.Depthwise)):
            continue
        expected = onnx_runtime_s_own(layer, flow, values[layer.inputs[0]], dtype)
        np.testing.assert_array_equal(values[layer.output], expected)
        compared += 1
    assert compared == 5


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_networks_are_what_the_graph_says(seed: int) -> None:
    """The whole graph in floats, node by node: at most a step away, and that rarely.

    Float arithmetic lands next to a tie now and then and falls to the other side.
    """
    model = qdq.network(seed)
    flow = lowered(seed)
    port = project.ports(flow)
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, *port["inputs"][0]["shape"])) * 4).astype(np.float32)
    (expected,) = qdq.run(model, x)
    from trivium.backends.fpga import host_ops

    streams = host_ops.prepare(port["inputs"][0], x)
    raw = [interpret.run(flow, {flow.inputs[0].tensor: frame}) for frame in streams]
    tensor = flow.outputs[0].tensor
    actual = host_ops.finish(port["outputs"][0], np.stack([values[tensor] for values in raw]))
    step = port["outputs"][0]["host"][0]["scale"]
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2.01 * step


def random_folding(flow: ir.Dataflow, seed: int) -> dict[str, folding.Fold]:
    rng = np.random.default_rng(seed)
    chosen = {}
    for port in flow.inputs:
        lanes = folding.divisors(flow.tensors[port.tensor].channels)
        chosen[port.tensor] = folding.Fold(int(rng.choice(lanes)))
    for layer in flow.layers:
        if isinstance(layer, ir.Table):
            chosen[layer.name] = chosen[layer.inputs[0]]
        else:
            legal = folding.choices(layer, flow)
            chosen[layer.name] = legal[int(rng.integers(len(legal)))]
    return chosen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_kernel_equals_interpreter_for_any_legal_folding(seed: int, tmp_path: Path) -> None:
    flow = lowered(seed)
    folds = random_folding(flow, seed)
    folding.check(flow, folds)
    frames = [drawn(flow, seed * 10 + i) for i in range(3)]
    name, tensor = flow.inputs[0].name, flow.inputs[0].tensor
    golden = []
    for frame in frames:
        values = interpret.run(flow, {tensor: frame})
        golden.append(({name: frame}, {p.name: values[p.tensor] for p in flow.outputs}))
    estimate = cost.estimate(flow, folds, qdq.ZCU104)
    project.write(tmp_path, flow, folds, qdq.ZCU104, estimate, golden)
    program = simulate.compile_bench(tmp_path)
    assert "3 frames, bit-exact" in simulate.check_golden(program, tmp_path)

    memory = flow.inputs[0].memory
    output = flow.outputs[0]
    size = flow.tensors[output.tensor].size
    (actual,) = simulate.run(program, [np.stack(frames).astype(memory)], [(output.memory, size)])
    expected = np.stack([want[output.name].ravel() for _, want in golden])
    np.testing.assert_array_equal(actual, expected)


def test_a_wrong_kernel_is_caught(tmp_path: Path) -> None:
    """The gate can fail: one changed weight, and the golden data no longer comes out."""
    from trivium.compiler.errors import BackendFailed

    flow = lowered(1)
    folds = random_folding(flow, 1)
    frame = drawn(flow, 1)
    values = interpret.run(flow, {flow.inputs[0].tensor: frame})
    golden = [({"x": frame}, {p.name: values[p.tensor] for p in flow.outputs})]
    project.write(tmp_path, flow, folds, qdq.ZCU104, cost.estimate(flow, folds, qdq.ZCU104), golden)
    weights = tmp_path / "hls" / "weights.h"
    text = weights.read_text()
    marker = "convolution2_bias"
    start = text.index("{", text.index(marker)) + 1
    first = text[start : text.index(",", start)]
    weights.write_text(text[:start] + str(int(first) + 20000) + text[start + len(first) :])
    program = simulate.compile_bench(tmp_path)
    with pytest.raises(BackendFailed, match="exit code 1"):
        simulate.check_golden(program, tmp_path)
