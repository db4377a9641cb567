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
    """Rewrite ``MatMul(x, DequantizeLinear(codes, scale))`` to MatMulNBits.

    ONNX Runtime does so itself when it loads a model, which then copies all weights; in this form
    they are mapped from the file. Weights are packed when they are written.

    Left alone: blocks that do not lie along the axis that is summed over, and sizes that the
    kernel lacks.
    """

    name: ClassVar[str] = "onnxruntime-pack-blocked-products"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "MatMul"):
            return False
        x, restored = node.inputs
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
        if not stored or len(shape) != 2 or attribute(dequantize, "axis", 1) != 0:
            return decline(node, "its blocks do not lie along the axis that is summed over")
        if size < 16 or size & (size - 1):
            return decline(node, f"blocks of {size}: MatMulNBits has powers of two from 16")
        bits, _ = BITS[codes.dtype]
        operands = _operands(graph_of(node), codes, scale, zero, size)
        product = ir.node(
            "MatMulNBits",
            [x, *operands],
            {
                "K": shape[0],
                "N": shape[1],
                "bits": bits,
                "block_size": size,
                "accuracy_level": INT8_ACTIVATIONS,
            },
            domain=DOMAIN,
            name=node.name,
        )
        splice([node, dequantize], product)
        return True


def _operands(
    graph: ir.Graph, codes: ir.Value, scale: ir.Value, zero: ir.Value | None, size: int
) -> list[ir.Value]:
    """B, scales and zero points as MatMulNBits wants them; one set for all readers of a weight."""
    stem = f"{codes.name}_packed"
    if stem in graph.initializers:
        made = [graph.initializers[stem], graph.initializers[f"{stem}_scale"]]
        return [*made, graph.initializers[f"{stem}_zero"]] if zero is not None else made
    made = [
        initializer(graph, _packed(codes.const_value, size), stem),
        initializer(graph, _turned(scale.const_value), f"{stem}_scale"),
    ]
    if zero is not None:
        made.append(initializer(graph, _packed_zeros(zero.const_value), f"{stem}_zero"))
    return made


def _packed(tensor: ir.TensorProtocol | None, size: int) -> ir.TensorProtocol:
    """Codes [K, N] as unsigned [N, blocks of K, bytes of a block]."""
    assert tensor is not None
    rows, columns = tensor.shape.numpy()
    bits, _ = BITS[tensor.dtype]
    blocks = -(-rows // size)

    def compute() -> ir.TensorProtocol:
        turned = _unsigned(tensor)
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


def _turned(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """Scales [blocks, N] as [N, blocks]."""
    assert tensor is not None
    return ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().T)),
        ir.DataType.FLOAT,
        ir.Shape(tensor.shape.numpy()[::-1]),
        cache=False,
    )


def _packed_zeros(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol:
    """Zero points [blocks, N] as unsigned [N, bytes of a row of blocks]."""
    assert tensor is not None
    blocks, columns = tensor.shape.numpy()
    bits, _ = BITS[tensor.dtype]

    def compute() -> ir.TensorProtocol:
        turned = _unsigned(tensor)
        if bits == 4:
            turned = np.pad(turned, ((0, 0), (0, blocks % 2)))
            turned = turned[:, 0::2] | (turned[:, 1::2] << np.uint8(4))
        return ir.tensor(turned)

    shape = ir.Shape((columns, -(-blocks * bits // 8)))
    return ir.LazyTensor(compute, ir.DataType.UINT8, shape, cache=False)


def _unsigned(tensor: ir.TensorProtocol) -> Array:
    """Codes [rows, columns] as unsigned bytes [columns, rows]; signed ones with zero in the middle.

    Turned a band of columns at a time, which stays within the cache.
    """
    rows, columns = tensor.shape.numpy()
    bits, signed = BITS[tensor.dtype]
    data = np.frombuffer(tensor.tobytes(), np.uint8)
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
