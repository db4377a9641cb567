"""Products with blocked integer weights as ONNX Runtime's own operator, packed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    decline,
    dims,
    graph_of,
    initializer,
    is_constant,
    is_op,
    is_plain_product,
    producer,
    splice,
)
from trivium.compiler.types import Preserves

Array = np.ndarray[Any, np.dtype[Any]]

DOMAIN = "com.microsoft"
INT8_ACTIVATIONS = 4
"""The accuracy level at which the kernel quantizes what it multiplies to int8, block by block: with
any other it computes in float32, and takes 1.5 to 3.5 times as long."""

BITS = {
    ir.DataType.INT4: (4, True), ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True), ir.DataType.UINT8: (8, False),
}  # fmt: skip
"""Stored types: bits, and whether signed."""


@dataclass(frozen=True)
class PackBlockedProducts(NodePass):
    """Rewrite ``MatMul(x, DequantizeLinear(codes, scale))``, or such a Gemm, to MatMulNBits.

    ONNX Runtime does so itself with a MatMul when it loads a model, which then copies all weights;
    in this form they are mapped from the file. The weights of a Gemm it dequantizes at every call.
    Weights are packed when they are written.

    Left alone: blocks that do not lie along the axis that is summed over, sizes that the kernel
    lacks, and a Gemm that turns its input or scales an operand.
    """

    name: ClassVar[str] = "onnxruntime-pack-blocked-products"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "MatMul", "Gemm"):
            return False
        x, restored = node.inputs[:2]
        dequantize = producer(restored, "DequantizeLinear")
        if dequantize is None or x is None or x.dtype != ir.DataType.FLOAT:
            return False
        codes, scale = dequantize.inputs[:2]
        size = attribute(dequantize, "block_size", 0)
        zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
        shape = dims(codes)
        if not size or codes is None or scale is None or shape is None or codes.dtype not in BITS:
            return False
        stored = is_constant(codes) and is_constant(scale) and (zero is None or is_constant(zero))
        summed = 1 if attribute(node, "transB", 0) else 0
        if not stored or len(shape) != 2 or attribute(dequantize, "axis", 1) % 2 != summed:
            return decline(node, "its blocks do not lie along the axis that is summed over")
        if not is_plain_product(node):
            return decline(node, "a Gemm with a turned or scaled operand")
        if size < 16 or size & (size - 1):
            return decline(node, f"blocks of {size}: MatMulNBits has powers of two from 16")
        bits, _ = BITS[codes.dtype]
        operands = _operands(graph_of(node), codes, scale, zero, size, summed)
        product = ir.node(
            "MatMulNBits",
            [x, *operands],
            {
                "K": shape[summed],
                "N": shape[1 - summed],
                "bits": bits,
                "block_size": size,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            domain=DOMAIN,
            name=node.name,
        )
        made = [product]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = product.outputs[0]
            value.dtype, value.shape = x.dtype, node.outputs[0].shape
            made.append(ir.node("Add", [value, node.inputs[2]], name=f"{node.name}_bias"))
        splice([node, dequantize], made)
        return True


def _operands(
    graph: ir.Graph, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, size: int, summed: int
) -> list[ir.Value]:
    """B, scales and zero points as MatMulNBits wants them; one set for all readers of a weight."""
    stem = f"{codes.name}_packed" if not summed else f"{codes.name}_turned_packed"
    if stem in graph.initializers:
        made = [graph.initializers[stem], graph.initializers[f"{stem}_scale"]]
        return [*made, graph.initializers[f"{stem}_zero"]] if zero is not None else made
    made = [
        initializer(graph, _packed(codes.const_value, size, summed), stem),
        initializer(graph, _scales(scale.const_value, summed), f"{stem}_scale"),
    ]
    if zero is not None:
        made.append(initializer(graph, _packed_zeros(zero.const_value, summed), f"{stem}_zero"))
    return made


def _packed(tensor: ir.TensorProtocol | None, size: int, summed: int) -> ir.TensorProtocol:
    """Codes [K, N], or [N, K], as unsigned [N, blocks of K, bytes of a block]."""
    assert tensor is not None
    rows, columns = tensor.shape.numpy()[:: -1 if summed else 1]
    bits, _ = BITS[tensor.dtype]
    blocks = -(-rows // size)

    def compute() -> ir.TensorProtocol:
        turned = _unsigned(tensor, summed)
        missing = blocks * size - rows
        if missing:
            # What stands for zero, or for nothing where zero points say so: x is zero there.
            turned = np.pad(turned, ((0, 0), (0, missing)), constant_values=1 << (bits - 1))
        if bits == 4:
            low, high = turned[:, 0::2], turned[:, 1::2]
            turned = low | (high << np.uint8(4))
        return ir.tensor(turned.reshape(columns, blocks, size * bits // 8))

    shape = ir.Shape((columns, blocks, size * bits // 8))
    return ir.LazyTensor(compute, ir.DataType.UINT8, shape, cache=False)


def _scales(tensor: ir.TensorProtocol | None, summed: int) -> ir.TensorProtocol:
    """Scales [blocks, N], or [N, blocks], as [N, blocks]."""
    assert tensor is not None
    if summed:
        return tensor
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T)),
        ir.DataType.FLOAT,
        ir.Shape(tensor.shape.numpy()[::-1]),
        cache=False,
    )


def _packed_zeros(tensor: ir.TensorProtocol | None, summed: int) -> ir.TensorProtocol:
    """Zero points [blocks, N], or [N, blocks], as unsigned [N, bytes of a row of blocks]."""
    assert tensor is not None
    blocks, columns = tensor.shape.numpy()[:: -1 if summed else 1]
    bits, _ = BITS[tensor.dtype]

    def compute() -> ir.TensorProtocol:
        turned = _unsigned(tensor, summed)
        if bits == 4:
            turned = np.pad(turned, ((0, 0), (0, blocks % 2)))
            turned = turned[:, 0::2] | (turned[:, 1::2] << np.uint8(4))
        return ir.tensor(turned)

    shape = ir.Shape((columns, -(-blocks * bits // 8)))
    return ir.LazyTensor(compute, ir.DataType.UINT8, shape, cache=False)


def _unsigned(tensor: ir.TensorProtocol, summed: int) -> Array:
    """Codes as unsigned bytes, turned unless it is the last axis that is summed over; signed ones
    with zero in the middle.

    Turned a band of columns at a time, which stays within the cache.
    """
    rows, columns = tensor.shape.numpy()
    bits, signed = BITS[tensor.dtype]
    data = np.frombuffer(tensor.tobytes(), np.uint8)
    if summed:
        if bits == 4:
            data = np.stack([data & 0xF, data >> 4], axis=1).reshape(-1)[: rows * columns]
        middle = np.uint8((1 << (bits - 1)) if signed else 0)
        return data.reshape(rows, columns) ^ middle
    if bits == 4 and columns % 2:
        flat = np.empty(2 * data.size, np.uint8)
        flat[0::2], flat[1::2] = data & 0xF, data >> 4
        codes, bits = flat[: rows * columns].reshape(rows, columns), 8
        flip = 8 if signed else 0
    else:
        codes = data.reshape(rows, -1)
        flip = (1 << (bits - 1)) if signed else 0
    turned = np.empty((columns, rows), np.uint8)
    for start in range(0, codes.shape[1], 64):
        band = np.ascontiguousarray(codes[:, start : start + 64].T)
        if bits == 4:
            wide = turned[2 * start : 2 * (start + len(band))]
            wide[0::2], wide[1::2] = band & 0xF, band >> 4
        else:
            turned[start : start + len(band)] = band
    if flip:
        turned ^= np.uint8(flip)
    return turned
