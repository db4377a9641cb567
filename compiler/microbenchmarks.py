"""Small models that each ask for one thing: what `trivium calibrate` times on an engine.

Together they tell a call's cost from a kernel's, and products from depthwise convolutions,
elementwise work and products of int8. There are at most thirty of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

FLOAT = TensorProto.FLOAT


@dataclass
class _Graph:
    """A graph under construction, with seeded weights."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.last = "x"

    def op(self, kind: str, *more: str, **attributes: Any) -> _Graph:
        name = f"v{len(self.nodes)}"
        self.nodes.append(oh.make_node(kind, [self.last, *more], [name], **attributes))
        self.last = name
        return self

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.random.normal(0, 0.05, shape).astype(np.float32)
        self.weights.append(nh.from_array(values, name))
        return name

    def quantized(self, *shape: int) -> str:
        """A weight in int8, dequantized."""
        name = f"w{len(self.weights)}"
        values = self.random.integers(-127, 127, shape).astype(np.int8)
        self.weights.append(nh.from_array(values, name))
        scale, zero = self._scale(np.int8)
        self.nodes.append(oh.make_node("DequantizeLinear", [name, scale, zero], [name + ".d"]))
        return name + ".d"

    def narrow(self) -> _Graph:
        """The last value, rounded to uint8 and back."""
        scale, zero = self._scale(np.uint8)
        self.op("QuantizeLinear", scale, zero)
        return self.op("DequantizeLinear", scale, zero)

    def _scale(self, kind: type[np.generic]) -> tuple[str, str]:
        index = len(self.weights)
        self.weights.append(nh.from_array(np.array(0.05, np.float32), f"w{index}"))
        self.weights.append(nh.from_array(np.array(0, kind), f"w{index + 1}"))
        return f"w{index}", f"w{index + 1}"

    def model(self) -> onnx.ModelProto:
        x = oh.make_tensor_value_info("x", FLOAT, self.shape)
        y = oh.make_tensor_value_info(self.last, FLOAT, None)
        graph = oh.make_graph(self.nodes, "microbenchmark", [x], [y], self.weights)
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(proto)


def _chain(steps: int) -> _Graph:
    graph = _Graph((4, 8))
    for _ in range(steps):
        graph.op("MatMul", graph.weight(8, 8))
    return graph


def _product(m: int, k: int, n: int, times: int = 1) -> _Graph:
    graph = _Graph((m, k))
    for index in range(times):
        graph.op("MatMul", graph.weight(k, n) if index % 2 == 0 else graph.weight(n, k))
    return graph


def _convolution(
    channels: int, size: int, out: int, kernel: int, stride: int = 1, times: int = 1
) -> _Graph:
    graph = _Graph((1, channels, size, size))
    for _ in range(times):
        weight = graph.weight(out, channels, kernel, kernel)
        pads = [kernel // 2] * 4
        graph.op("Conv", weight, pads=pads, strides=[stride, stride]).op("Relu")
        channels = out
    return graph


def _depthwise(channels: int, size: int, times: int = 2) -> _Graph:
    graph = _Graph((1, channels, size, size))
    for _ in range(times):
        graph.op("Conv", graph.weight(channels, 1, 3, 3), group=channels, pads=[1] * 4).op("Relu")
    return graph


def _integer_convolution(channels: int, size: int, out: int, kernel: int) -> _Graph:
    graph = _Graph((1, channels, size, size)).narrow()
    weight = graph.quantized(out, channels, kernel, kernel)
    return graph.op("Conv", weight, pads=[kernel // 2] * 4).narrow()


def _integer_product(m: int, k: int, n: int) -> _Graph:
    graph = _Graph((m, k)).narrow()
    return graph.op("MatMul", graph.quantized(k, n)).narrow()


def _each(kind: str, *shape: int, **attributes: Any) -> _Graph:
    return _Graph(shape).op(kind, **attributes)


def _normalized(rows: int, width: int) -> _Graph:
    graph = _Graph((rows, width))
    return graph.op("LayerNormalization", graph.weight(width), graph.weight(width))


MICROBENCHMARKS: dict[str, Callable[[], _Graph]] = {
    "call": lambda: _each("Relu", 4),
    "small chain": lambda: _chain(8),
    "long chain": lambda: _chain(48),
    "product 1x256x256": lambda: _product(1, 256, 256, 4),
    "product 1x1024x1024": lambda: _product(1, 1024, 1024, 2),
    "product 8x128x640": lambda: _product(8, 640, 128, 2),
    "product 64x256x256": lambda: _product(64, 256, 256),
    "product 128x384x384": lambda: _product(128, 384, 384, 2),
    "product 128x384x1536": lambda: _product(128, 384, 1536, 2),
    "product 256x768x768": lambda: _product(256, 768, 768),
    "convolution 16x32 3x3": lambda: _convolution(16, 32, 16, 3, times=3),
    "convolution 32x16 3x3": lambda: _convolution(32, 16, 32, 3, times=3),
    "convolution 64x8 3x3": lambda: _convolution(64, 8, 64, 3, times=3),
    "convolution 32x56 3x3": lambda: _convolution(32, 56, 32, 3),
    "convolution 3x96 3x3 half": lambda: _convolution(3, 96, 16, 3, 2),
    "convolution 64x14 1x1": lambda: _convolution(64, 14, 64, 1, times=2),
    "convolution 32x48 1x1": lambda: _convolution(32, 48, 64, 1),
    "depthwise 64x16": lambda: _depthwise(64, 16),
    "depthwise 32x56": lambda: _depthwise(32, 56),
    "depthwise 192x14": lambda: _depthwise(192, 14),
    "gelu": lambda: _each("Sigmoid", 64, 1024),
    "softmax": lambda: _each("Softmax", 256, 128, axis=-1),
    "normalization": lambda: _normalized(128, 384),
    "pooling": lambda: _each("MaxPool", 1, 32, 56, 56, kernel_shape=[2, 2], strides=[2, 2]),
    "transpose": lambda: _each("Transpose", 64, 56, 56, perm=[1, 2, 0]),
    "integer convolution 32x16": lambda: _integer_convolution(32, 16, 32, 3),
    "integer convolution 64x28 1x1": lambda: _integer_convolution(64, 28, 96, 1),
    "integer product": lambda: _integer_product(128, 384, 384),
}
"""By name."""


def write(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write all models into a folder."""
    for index, (name, make) in enumerate(MICROBENCHMARKS.items()):
        path = folder / f"{index}.onnx"
        onnx.save(make().model(), path)
        yield name, path
