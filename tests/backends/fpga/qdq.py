"""Small quantized graphs, written by hand, for the tests of the FPGA backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from trivium.compiler.model import OPSET
from trivium.compiler.types import Target

ZCU104 = Target(
    name="amd-zcu104",
    family="fpga",
    backends=("fpga",),
    title="AMD ZCU104",
    clock_hz=200e6,
    resources={"lut": 230400, "ff": 460800, "dsp": 1728, "bram_18k": 624, "uram": 96},
    options={"part": "xczu7ev-ffvc1156-2-e", "platform": "zcu104_base", "memory_bank": "HP0"},
)


@dataclass
class Graph:
    """A Q/DQ graph under construction: each method appends and returns the value's name."""

    rng: np.random.Generator
    shape: tuple[int, ...]
    dtype: str = "int8"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def store(self, array: Any) -> str:
        name = f"c{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op_type.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name

    def parameters(self, scale: float | None = None, zero_point: int | None = None) -> list[str]:
        bounds = np.iinfo(self.dtype)
        if zero_point is None:
            zero_point = int(self.rng.integers(bounds.min, bounds.max + 1))
        if scale is None:
            scale = float(np.exp(self.rng.uniform(-4, -1)))
        return [self.store(np.float32(scale)), self.store(np.array(zero_point, self.dtype))]

    def quantized(self, x: str, parameters: list[str] | None = None) -> str:
        """QuantizeLinear and DequantizeLinear."""
        parameters = parameters or self.parameters()
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *parameters), *parameters)

    def weight(self, shape: tuple[int, ...], axis: int = 0) -> tuple[str, Any]:
        """A stored int8 weight with a scale for each output channel, and those scales."""
        integers = self.rng.integers(-127, 128, shape).astype(np.int8)
        scales = np.exp(self.rng.uniform(-7, -5, shape[axis])).astype(np.float32)
        zeros = self.store(np.zeros(shape[axis], np.int8))
        stored = [self.store(integers), self.store(scales), zeros]
        return self.op("DequantizeLinear", *stored, axis=axis), scales

    def bias(self, scales: Any) -> str:
        """An int32 bias; ``scales`` are those of the accumulator."""
        integers = self.rng.integers(-2000, 2000, len(scales)).astype(np.int32)
        stored = [self.store(integers), self.store(scales.astype(np.float32))]
        return self.op("DequantizeLinear", *stored, axis=0)

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = 11
        return onnx.shape_inference.infer_shapes(model, data_prop=True)


def loaded(model: onnx.ModelProto) -> ir.Model:
    return ir.from_proto(model)


def network(seed: int) -> onnx.ModelProto:
    """A random network with every kind of layer, and shapes, strides and pads of all kinds."""
    rng = np.random.default_rng(seed)
    channels, height, width = (int(n) for n in rng.integers([1, 7, 7], [5, 12, 12]))
    graph = Graph(rng, (channels, height, width), "int8" if seed % 2 else "uint8")
    first = graph.parameters(0.05)
    x = graph.quantized("x", first)
    outputs = int(rng.choice([4, 6, 8]))
    x = convolution(graph, x, channels, outputs, kernel=(3, 2), pads=(1, 0, 1, 1), strides=(1, 2))
    left = convolution(graph, x, outputs, outputs, kernel=(3, 3), pads=(1, 1, 1, 1), relu=True)
    right = convolution(graph, x, outputs, outputs, group=outputs, kernel=(3, 3), pads=(1,) * 4)
    x = graph.quantized(graph.op("Relu", graph.op("Add", left, right)))
    x = graph.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 1], pads=[0, 1, 1, 0])
    x = graph.quantized(graph.op("Tanh", graph.op("Mul", x, graph.store(np.float32(0.7)))))
    x = convolution(graph, x, outputs, 6, kernel=(2, 2), dilations=(2, 1), pads=(1, 1, 1, 1))
    x = graph.quantized(graph.op("GlobalAveragePool", x))
    x = graph.op("Flatten", x, axis=1)
    weight, _ = graph.weight((6, 5), axis=1)
    x = graph.quantized(graph.op("MatMul", x, weight), graph.parameters(0.05))
    return graph.model(x)


def convolution(
    graph: Graph,
    x: str,
    inputs: int,
    outputs: int,
    *,
    kernel: tuple[int, int] = (1, 1),
    group: int = 1,
    relu: bool = False,
    **attributes: Any,
) -> str:
    """A quantized Conv, with a Relu if wanted."""
    weight, scales = graph.weight((outputs, inputs // group, *kernel))
    y = graph.op("Conv", x, weight, graph.bias(0.05 * scales), group=group, **attributes)
    return graph.quantized(graph.op("Relu", y) if relu else y)


def run(model: onnx.ModelProto, x: Any, *, optimized: bool = False) -> list[Any]:
    """Run ONNX Runtime on the graph as it is written, node by node, unless ``optimized``."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    return list(session.run(None, {"x": x}))
