"""Store the weights of matrix products as blocks of 4- or 8-bit integers; compute stays float."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import (
    Pass,
    attribute,
    decline,
    dims,
    initializer,
    is_constant,
    is_op,
    option,
    outline,
    sketching,
    unread,
    weight,
)
from trivium.compiler.types import Preserves
from trivium.passes.quantization import layers, linear
from trivium.passes.quantization.streaming import BlockedWeight

Array = np.ndarray[Any, np.dtype[Any]]

_BITS = (4, 8)
_BLOCKS = (16, 32, 64, 128, 256, 512)

_STREAMED_BYTES = 4 << 20
"""From this size on, a weight that lies in a file is quantized when it is written."""

_STRIPE = 1 << 22
"""Elements quantized at a time: temporaries stay small beside the largest weight."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Replace the weight of MatMul and Gemm by a DequantizeLinear of blocks.

    A block is ``block_size`` values along the axis that the product sums over, with a scale of its
    own (and a zero point if asymmetric). This is the form that ONNX Runtime turns into
    MatMulNBits and TensorRT into its weight-only kernels: axis 0 of a [K, N] weight; Gemm's
    transposed weights are stored the other way round for it. Large weights that lie in a file are
    quantized when the model is written, one at a time, and never whole in memory.

    Left alone: weights smaller than ``min_elements``, which gain nothing; those with NaN or
    infinity; weights that something besides MatMul and Gemm reads, since they would be stored
    twice.
    """

    name: ClassVar[str] = "quantize-weights"
    preserves: ClassVar[Preserves] = "lossy"

    bits: int = option(4, "Bits of a weight", choices=_BITS)
    block_size: int = option(128, "Values that share a scale", choices=_BLOCKS)
    symmetric: bool = option(True, "Whether blocks are symmetric about zero (no zero points)")
    min_elements: int = option(4096, "Weights with fewer elements stay as they are")
    exclude: tuple[str, ...] = option((), layers.EXCLUDE)
    precision: tuple[str, ...] = option(
        (),
        "Layers that differ: NAME=float, NAME=int8, NAME=int4/64; the last match counts",
    )

    def __post_init__(self) -> None:
        self._choices()

    def run(self, model: ir.Model) -> bool:
        layers.note_unmatched(model, self.exclude, self._choices())
        modified = False
        order = {node: index for index, node in enumerate(model.graph)}
        for value in list(model.graph.initializers.values()):
            readers = [node for node, index in value.uses() if self._reads(node, index)]
            if not readers or not self._fits(value, readers):
                continue
            modified |= self._quantize(model.graph, value, readers, order)
        return modified

    def _reads(self, node: ir.Node, index: int) -> bool:
        if index != 1 or not is_op(node, "MatMul", "Gemm"):
            return False
        choice = layers.chosen(node, self._choices())
        wanted = choice is None or choice.bits is not None
        return wanted and not layers.excluded(node, self.exclude)

    def _choices(self) -> tuple[layers.Choice, ...]:
        return layers.parse(self.precision, bits=_BITS, blocks=_BLOCKS)

    def _form(self, node: ir.Node) -> tuple[int, int]:
        """Bits and block size of a layer."""
        choice = layers.chosen(node, self._choices())
        if choice is None:
            return self.bits, self.block_size
        return choice.bits or self.bits, choice.block_size or self.block_size

    def _fits(self, value: ir.Value, readers: list[ir.Node]) -> bool:
        shape = dims(value)
        if not is_constant(value) or value.dtype != ir.DataType.FLOAT or shape is None:
            return False
        if len(shape) != 2:
            return decline(value, f"has {len(shape)} dimensions; blocks are made of matrices")
        if np.prod([size or 0 for size in shape]) < self.min_elements:
            return False
        if len(value.uses()) != len(readers) or value.is_graph_output():
            return decline(value, "something besides the products reads it")
        if len({_transposed(node) for node in readers}) > 1:
            return decline(value, "one product reads it transposed and another does not")
        return True

    def _quantize(
        self, graph: ir.Graph, value: ir.Value, readers: list[ir.Node], order: dict[ir.Node, int]
    ) -> bool:
        transposed = _transposed(readers[0])
        bits, block_size = self._form(readers[0])
        name = value.name or "weight"
        tensor = value.const_value
        assert tensor is not None
        if sketching():
            shape = value.shape.numpy() if value.shape is not None else ()
            parts = self._outline(shape[::-1] if transposed else shape, bits, block_size)
        elif (
            isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor))
            and tensor.nbytes >= _STREAMED_BYTES
        ):
            parts = BlockedWeight(
                tensor,
                transposed=transposed,
                grid=_grid(bits, self.symmetric),
                block_size=block_size,
                symmetric=self.symmetric,
                name=name,
            ).tensors()
        else:
            array = weight(value)
            assert array is not None
            if not np.isfinite(array).all():
                bad = array.size - int(np.count_nonzero(np.isfinite(array)))
                return decline(value, f"{bad} of {array.size} values are NaN or infinite")
            parts = self._blocks(array.T if transposed else array, bits, block_size)
        stored = [
            initializer(graph, part, f"{name}_{what}")
            for what, part in zip(("quantized", "scale", "zero_point"), parts, strict=False)
        ]
        restore = ir.node(
            "DequantizeLinear",
            stored,
            {"axis": 0, "block_size": block_size},
            name=f"{name}_dq",
        )
        result = restore.outputs[0]
        result.name = f"{name}_dequantized"
        result.shape, result.type = stored[0].shape, ir.TensorType(ir.DataType.FLOAT)
        inside = [node for node in readers if node.graph is not graph]
        anchor = graph[0] if inside else min(readers, key=order.__getitem__)
        graph.insert_before(anchor, [restore])
        for node in readers:
            node.replace_input_with(1, result)
            if transposed:
                node.attributes["transB"] = ir.AttrInt64("transB", 0)
        if unread(value):
            graph.initializers.pop(name)
        return True

    def _outline(
        self, shape: tuple[int, ...], bits: int, block_size: int
    ) -> list[ir.TensorProtocol]:
        """The form of what `_blocks` returns."""
        rows, columns = shape
        grid = _grid(bits, self.symmetric)
        wide = ir.DataType.INT8 if grid.signed else ir.DataType.UINT8
        narrow = ir.DataType.INT4 if grid.signed else ir.DataType.UINT4
        codes = wide if bits == 8 else narrow
        blocks = (-(-rows // block_size), columns)
        parts = [outline(codes, shape), outline(ir.DataType.FLOAT, blocks)]
        return parts if self.symmetric else [*parts, outline(codes, blocks)]

    def _blocks(self, matrix: Array, bits: int, block_size: int) -> list[ir.TensorProtocol]:
        """Quantize a [K, N] matrix along K: codes, scales and, if asymmetric, zero points."""
        grid = _grid(bits, self.symmetric)
        rows, columns = matrix.shape
        blocks = -(-rows // block_size)
        codes = np.empty((rows, columns), np.int8 if grid.signed else np.uint8)
        scales = np.empty((blocks, columns), np.float32)
        zeros = np.zeros((blocks, columns), codes.dtype)
        stripe = max(1, _STRIPE // max(1, columns * block_size))
        for start in range(0, blocks, stripe):
            end = min(start + stripe, blocks)
            top, bottom = start * block_size, min(end * block_size, rows)
            part = matrix[top:bottom]
            edges = np.arange(0, bottom - top, block_size)
            low, high = np.minimum.reduceat(part, edges), np.maximum.reduceat(part, edges)
            scale, zero = linear.fit(low, high, grid, symmetric=self.symmetric)
            scales[start:end], zeros[start:end] = scale, zero
            wide_scale = np.repeat(scale, block_size, axis=0)[: bottom - top]
            wide_zero = np.repeat(zero, block_size, axis=0)[: bottom - top]
            codes[top:bottom] = linear.quantize(part, wide_scale, wide_zero, grid)
        parts = [_tensor(codes, bits), ir.tensor(scales)]
        return parts if self.symmetric else [*parts, _tensor(zeros, bits)]


def _grid(bits: int, symmetric: bool) -> linear.Grid:
    if symmetric:
        return linear.grid(f"int{bits}")
    return linear.full(f"uint{bits}")


def _tensor(codes: Array, bits: int) -> ir.TensorProtocol:
    """A stored tensor of codes: two to a byte, the first in the low half, where bits is 4."""
    if bits == 8:
        return ir.tensor(codes)
    dtype = ir.DataType.INT4 if codes.dtype == np.int8 else ir.DataType.UINT4
    flat = codes.reshape(-1).view(np.uint8)
    packed = flat[0::2] & np.uint8(0xF)
    packed[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return ir.PackedTensor(packed, dtype, shape=ir.Shape(codes.shape))


def _transposed(node: ir.Node) -> bool:
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))
