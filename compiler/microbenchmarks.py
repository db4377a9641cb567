"""Small models of the pieces that real ones are made of: what `trivium calibrate` times.

A piece is a few operators as a model has them, since engines fuse, keep layouts and find weights in
caches across operators, and wake threads once for all. There are at most thirty, none of them a
model that the cost models are scored on, and none returns much: what is returned is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto
from onnx import helper as oh
from onnx import numpy_helper as nh

FLOAT = TensorProto.FLOAT


@dataclass
class Builder:
    """A graph under construction, with seeded weights; ``last`` is the value that grows."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)
        self.last = "x"

    def op(self, kind: str, *more: str, **attributes: Any) -> Builder:
        name = f"v{len(self.nodes)}"
        self.nodes.append(oh.make_node(kind, [self.last, *more], [name], **attributes))
        self.last = name
        return self

    def weight(self, *shape: int) -> str:
        return self.constant(self.random.normal(0, 0.05, shape).astype(np.float32))

    def constant(self, values: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(nh.from_array(np.asarray(values), name))
        return name

    def linear(self, inputs: int, outputs: int) -> Builder:
        return self.op("MatMul", self.weight(inputs, outputs)).op("Add", self.weight(outputs))

    def normalized(self, width: int) -> Builder:
        return self.op("LayerNormalization", self.weight(width), self.weight(width))

    def conv(
        self,
        inputs: int,
        outputs: int,
        *window: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        relu: bool = True,
    ) -> Builder:
        """A convolution with a bias that keeps the size, but for the stride."""
        rank = len(window)
        self.op(
            "Conv",
            self.weight(outputs, inputs // groups, *window),
            self.weight(outputs),
            pads=[dilation * (one // 2) for one in window] * 2,
            strides=[stride] * rank,
            dilations=[dilation] * rank,
            group=groups,
        )
        return self.op("Relu") if relu else self

    def model(self) -> onnx.ModelProto:
        x = oh.make_tensor_value_info("x", FLOAT, self.shape)
        y = oh.make_tensor_value_info(self.last, FLOAT, None)
        graph = oh.make_graph(self.nodes, "microbenchmark", [x], [y], self.weights)
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 23)], ir_version=11)
        return onnx.shape_inference.infer_shapes(proto)


def _each(kind: str, *shape: int) -> Builder:
    return Builder(shape).op(kind)


def _chain(steps: int) -> Builder:
    graph = Builder((4, 8))
    for _ in range(steps):
        graph.op("MatMul", graph.weight(8, 8))
    return graph


def _product(m: int, k: int, n: int, times: int = 1) -> Builder:
    graph = Builder((m, k))
    for index in range(times):
        graph.op("MatMul", graph.weight(k, n) if index % 2 == 0 else graph.weight(n, k))
    return graph


def _perceptron(rows: int, *widths: int) -> Builder:
    graph = Builder((rows, widths[0]))
    for inputs, outputs in pairwise(widths):
        graph.op("Gemm", graph.weight(inputs, outputs), graph.weight(outputs)).op("Relu")
    return graph


def _attention(heads: int, length: int, head: int) -> Builder:
    graph = Builder((1, length, heads * head))
    return graph.op("Attention", "x", "x", q_num_heads=heads, kv_num_heads=heads)


def _encoder(length: int, width: int, heads: int) -> Builder:
    """A layer of a transformer."""
    graph = Builder((1, length, width))
    projected = []
    for _ in range(3):
        graph.last = "x"
        projected.append(graph.linear(width, width).last)
    graph.last = projected[0]
    graph.op("Attention", *projected[1:], q_num_heads=heads, kv_num_heads=heads)
    inner = graph.linear(width, width).op("Add", "x").normalized(width).last
    graph.linear(width, 4 * width).op("Gelu").linear(4 * width, width)
    return graph.op("Add", inner).normalized(width)


def _convolutions(channels: int, size: int, times: int) -> Builder:
    graph = Builder((1, channels, size, size))
    for _ in range(times):
        graph.conv(channels, channels, 3, 3)
    return graph


def _residual(channels: int, size: int, times: int) -> Builder:
    graph = Builder((1, channels, size, size))
    for _ in range(times):
        kept = graph.last
        graph.conv(channels, channels, 3, 3).conv(channels, channels, 3, 3, relu=False)
        graph.op("Add", kept).op("Relu")
    return graph


def _narrowing(channels: int, size: int) -> Builder:
    graph = Builder((1, channels, size, size)).conv(channels, 2 * channels, 3, 3, stride=2)
    graph.conv(2 * channels, 2 * channels, 3, 3)
    return graph.conv(2 * channels, 4 * channels, 3, 3, stride=2)


def _separable(channels: int, height: int, width: int, times: int) -> Builder:
    graph = Builder((1, channels, height, width))
    for _ in range(times):
        graph.conv(channels, channels, 3, 3, groups=channels).conv(channels, channels, 1, 1)
    return graph


def _mobile(channels: int, height: int, width: int) -> Builder:
    graph, wide = Builder((1, channels, height, width)), 2 * channels
    graph.conv(channels, channels, 3, 3, stride=2, groups=channels).conv(channels, wide, 1, 1)
    return graph.conv(wide, wide, 3, 3, groups=wide).conv(wide, wide, 1, 1)


def _branches(channels: int, height: int, width: int) -> Builder:
    """Windows of three sizes side by side."""
    graph = Builder((1, channels, height, width))
    ends = []
    for dilation in (1, 2, 3):
        graph.last = "x"
        graph.conv(channels, 8, 1, 1, relu=False).conv(8, 16, 3, 3)
        ends.append(graph.conv(16, 16, 3, 3, dilation=dilation, relu=False).last)
    graph.last = ends[0]
    graph.op("Concat", *ends[1:], axis=1).conv(48, channels, 1, 1, relu=False)
    return graph.op("Add", "x").op("Relu")


def _detector(channels: int, height: int, width: int) -> Builder:
    """Scores and boxes for each place of a picture."""
    graph = Builder((1, channels, height, width))
    ends = []
    for outputs in (6, 12):
        graph.last = "x"
        graph.conv(channels, outputs, 3, 3, relu=False).op("Transpose", perm=[0, 2, 3, 1])
        flat = graph.constant(np.array([1, -1, outputs // 3], np.int64))
        ends.append(graph.op("Reshape", flat).last)
    graph.last = ends[0]
    return graph.op("Softmax", axis=-1).op("Concat", ends[1], axis=-1)


def _digits(size: int) -> Builder:
    graph = Builder((1, 1, size, size)).conv(1, 8, 5, 5)
    graph.op("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).conv(8, 16, 5, 5)
    return graph.op("MaxPool", kernel_shape=[3, 3], strides=[3, 3])


def _enlarging(size: int) -> Builder:
    graph = Builder((1, 3, size, size)).conv(3, 48, 5, 5).conv(48, 24, 3, 3)
    return graph.conv(24, 12, 3, 3, relu=False).op("DepthToSpace", blocksize=2)


def _sequence(channels: int, length: int, outputs: int, times: int = 1) -> Builder:
    graph = Builder((1, channels, length))
    for index in range(times):
        graph.conv(outputs if index else channels, outputs, 5)
    return graph


def _one_hot(rows: int, classes: int, width: int) -> Builder:
    graph = Builder((1, rows, 1)).op("Abs")
    graph.op("Equal", graph.constant(np.arange(classes, dtype=np.float32)))
    return graph.op("Cast", to=FLOAT).op("MatMul", graph.weight(classes, width))


def _standardized(rows: int, width: int) -> Builder:
    """A normalization, spelled out."""
    graph = Builder((1, rows, width))
    axes = graph.constant(np.array([-1], np.int64))
    share = graph.constant(np.float32(1 / width))
    mean = graph.op("ReduceSum", axes, keepdims=1).op("Mul", share).last
    graph.last = "x"
    squares = graph.op("Mul", "x").op("ReduceSum", axes, keepdims=1).op("Mul", share).last
    graph.last = mean
    squared = graph.op("Mul", mean).last
    graph.last = squares
    graph.op("Sub", squared).op("Add", graph.constant(np.float32(1e-5)))
    scale = graph.op("Sqrt").op("Reciprocal").last
    graph.last = "x"
    graph.op("Sub", mean).op("Mul", scale)
    return graph.op("Mul", graph.weight(width)).op("Add", graph.weight(width))


def _normalizations(rows: int, width: int, times: int) -> Builder:
    graph = Builder((rows, width))
    for _ in range(times):
        graph.normalized(width)
    return graph


MICROBENCHMARKS: dict[str, Callable[[], Builder]] = {
    "call": lambda: _each("Relu", 4),
    "small chain": lambda: _chain(8),
    "perceptron of one row": lambda: _perceptron(1, 512, 128, 128, 128, 512),
    "perceptron of 16 rows": lambda: _perceptron(16, 256, 256, 256, 256),
    "product 1x1024x1024": lambda: _product(1, 1024, 1024, 2),
    "product 64x256x256": lambda: _product(64, 256, 256),
    "product 128x384x384": lambda: _product(128, 384, 384, 2),
    "product 128x384x1536": lambda: _product(128, 384, 1536, 2),
    "encoder 64x256": lambda: _encoder(64, 256, 8),
    "encoder 96x312": lambda: _encoder(96, 312, 12),
    "encoder 128x512": lambda: _encoder(128, 512, 8),
    "attention 12x128x32": lambda: _attention(12, 128, 32),
    "convolutions 16x32": lambda: _convolutions(16, 32, 3),
    "residual 24x20": lambda: _residual(24, 20, 2),
    "residual 32x16": lambda: _residual(32, 16, 2),
    "residual 128x7": lambda: _residual(128, 7, 1),
    "narrowing 32x28": lambda: _narrowing(32, 28),
    "separable 64x20x10": lambda: _separable(64, 20, 10, 3),
    "separable 32x40x30": lambda: _separable(32, 40, 30, 2),
    "separable 128x14x14": lambda: _separable(128, 14, 14, 2),
    "mobile 16x64x48": lambda: _mobile(16, 64, 48),
    "branches 64x20x24": lambda: _branches(64, 20, 24),
    "detector 64x20x24": lambda: _detector(64, 20, 24),
    "digits 32": lambda: _digits(32),
    "enlarging 24": lambda: _enlarging(24),
    "sequence 64x256": lambda: _sequence(64, 256, 128, 2),
    "sequence 128x512": lambda: _sequence(128, 512, 256),
    "one hot 1024x128": lambda: _one_hot(1024, 128, 48),
    "standardized 256x96": lambda: _standardized(256, 96),
    "normalizations 128x384": lambda: _normalizations(128, 384, 4),
}
"""By name."""


def write(folder: Path) -> Iterator[tuple[str, Path]]:
    """Write all models into a folder."""
    for index, (name, make) in enumerate(MICROBENCHMARKS.items()):
        path = folder / f"{index}.onnx"
        onnx.save(make().model(), path)
        yield name, path
