"""Sharding rules of products, convolutions, and of what scales their weights."""

from __future__ import annotations

import onnx_ir as ir

from trivium.compiler.passing import attribute
from trivium.passes.sharding.axes import Axes, Axis, rank, size
from trivium.passes.sharding.table import (
    block_axes,
    broadcast,
    operands,
    rule,
)


@rule("MatMul")
def _matmul(axes: Axes, node: ir.Node) -> None:
    left, right = operands(node, 2)
    result = node.outputs[0]
    inner = (right, max(rank(right) - 2, 0))
    axes.tie((left, rank(left) - 1), inner)
    axes.reduce(inner, result)
    if rank(right) > 1:
        axes.tie((right, rank(right) - 1), (result, rank(result) - 1))
    if rank(left) > 1:
        axes.tie((left, rank(left) - 2), (result, rank(result) - (2 if rank(right) > 1 else 1)))
    if rank(left) > 1 and rank(right) > 1:
        broadcast(axes, left, result, keep=2)
        broadcast(axes, right, result, keep=2)


@rule("Gemm")
def _gemm(axes: Axes, node: ir.Node) -> None:
    (left, right), result = operands(node, 2), node.outputs[0]
    over = attribute(node, "transA", 0), attribute(node, "transB", 0)
    inner = (right, 1 if over[1] else 0)
    axes.tie((left, 0 if over[0] else 1), inner)
    axes.reduce(inner, result)
    axes.tie((left, 1 if over[0] else 0), (result, 0))
    axes.tie((right, 0 if over[1] else 1), (result, 1))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        broadcast(axes, node.inputs[2], result)


@rule("Conv")
def _conv(axes: Axes, node: ir.Node) -> None:
    (x, weight), y = operands(node, 2), node.outputs[0]
    axes.tie((x, 0), (y, 0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    channels: list[Axis] = [(weight, 0), (y, 1), *([(bias, 0)] if bias is not None else [])]
    axes.tie(*channels)
    if attribute(node, "group", 1) == 1:
        axes.tie((x, 1), (weight, 1))
        axes.reduce((weight, 1), y)
    else:
        for axis in ((x, 1), (weight, 0), (weight, 1)):
            axes.block(axis, "its channels are in groups")
    for value in (x, weight):
        block_axes(axes, value, range(2, rank(value)), "a convolution slides along it")


@rule("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
def _pool(axes: Axes, node: ir.Node) -> None:
    x = operands(node, 1)[0]
    for y in node.outputs:
        axes.tie((x, 0), (y, 0))
        axes.tie((x, 1), (y, 1))
    block_axes(axes, x, range(2, rank(x)), "a window slides along it")


@rule("BatchNormalization")
def _batch_normalization(axes: Axes, node: ir.Node) -> None:
    x, *parameters = operands(node, 5)
    for axis in range(rank(x)):
        axes.tie((x, axis), (node.outputs[0], axis))
    for value in parameters:
        axes.tie((x, 1), (value, 0))


@rule("DequantizeLinear", "QuantizeLinear")
def _quantization(axes: Axes, node: ir.Node) -> None:
    x, y = operands(node, 1)[0], node.outputs[0]
    for axis in range(rank(x)):
        axes.tie((x, axis), (y, axis))
    for value in node.inputs[1:3]:
        if value is None or rank(value) == 0 or size((value, 0)) == 1 == rank(value):
            continue
        if rank(value) == 1:
            axes.tie((value, 0), (x, attribute(node, "axis", 1) % rank(x)))
            continue
        for axis in range(rank(x)):
            axes.tie((value, axis), (x, axis))
