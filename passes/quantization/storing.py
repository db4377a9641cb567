"""Putting a quantized matrix into a graph: packed, and in memory one at a time.

The quantized weights of a small model are kept; those of a large one are computed when they are
asked for, or, where computing them took calibration data, lie in a temporary file that lives as
long as the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.compiler.passing import attribute, dims, initializer, outline, unread, weight
from trivium.passes.quantization.blocks import Blocks, Form
from trivium.passes.quantization.streaming import BlockedWeight

Array = np.ndarray[Any, np.dtype[Any]]

KEPT = 256 << 20
"""Bytes of weights, before they are quantized, whose quantized form is kept in memory."""

_SPILLED = "trivium.quantized"


def transposed(node: ir.Node) -> bool:
    """Whether a product reads its [N, K] weight transposed."""
    return node.op_type == "Gemm" and bool(attribute(node, "transB", 0))


def matrix(value: ir.Value, reader: ir.Node) -> Array:
    """A weight as [K, N]."""
    array = weight(value)
    assert array is not None
    return array.T if transposed(reader) else array


def nonfinite(array: Array) -> str | None:
    """What to say of a weight with NaN or infinity, or None."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(array.sum(dtype=np.float64)):
            return None
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    return f"{bad} of {array.size} values are NaN or infinite" if bad else None


def replace(
    graph: ir.Graph,
    value: ir.Value,
    readers: Sequence[ir.Node],
    form: Form,
    parts: Sequence[ir.TensorProtocol],
    order: dict[ir.Node, int],
) -> None:
    """Let products read a DequantizeLinear of stored codes instead of a float weight."""
    name = value.name or "weight"
    stored = [
        initializer(graph, part, f"{name}_{what}")
        for what, part in zip(("quantized", "scale", "zero_point"), parts, strict=False)
    ]
    restore = ir.node(
        "DequantizeLinear",
        stored,
        {"axis": 0, "block_size": form.block_size},
        name=f"{name}_dq",
    )
    result = restore.outputs[0]
    result.name = f"{name}_dequantized"
    result.shape, result.type = stored[0].shape, ir.TensorType(ir.DataType.FLOAT)
    inside = [node for node in readers if node.graph is not graph]
    anchor = graph[0] if inside else min(readers, key=order.__getitem__)
    graph.insert_before(anchor, [restore])
    for node in readers:
        if transposed(node):
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
        node.replace_input_with(1, result)
    if unread(value):
        graph.initializers.pop(name)


def outlined(value: ir.Value, reader: ir.Node, form: Form) -> list[ir.TensorProtocol]:
    """The form of what `eager` returns for a weight that is not read."""
    shape = [size or 0 for size in dims(value) or ()]
    rows, columns = reversed(shape) if transposed(reader) else shape
    few, codes = (-(-rows // form.block_size), columns), stored_type(form)
    parts = [outline(codes, (rows, columns)), outline(ir.DataType.FLOAT, few)]
    return parts if form.symmetric else [*parts, outline(codes, few)]


def eager(made: Blocks) -> list[ir.TensorProtocol]:
    """Codes, scales and, if asymmetric, zero points, in memory."""
    parts = [packed(made.codes, made.form), ir.tensor(made.scales)]
    return parts if made.form.symmetric else [*parts, packed(made.zeros, made.form)]


def streamed(
    value: ir.Value, reader: ir.Node, form: Form, *, signed: bool
) -> list[ir.TensorProtocol]:
    """The parts of a weight that is rounded to the nearest while it is written.

    Args:
        signed: Whether all codes are used, by scales that may be negative.
    """
    tensor = value.const_value
    assert tensor is not None
    return BlockedWeight(
        tensor,
        transposed=transposed(reader),
        grid=form.codes if signed else form.textbook,
        block_size=form.block_size,
        symmetric=form.symmetric,
        name=value.name or "weight",
    ).tensors()


class Deferred:
    """Quantizes a weight whenever one of its parts is read; the latest weight is remembered.

    A model is written part by part, so each weight is quantized once for each time it is written.
    """

    def __init__(self) -> None:
        self._latest: tuple[object, Blocks] | None = None

    def parts(
        self,
        value: ir.Value,
        reader: ir.Node,
        form: Form,
        quantize: Callable[[Array, Form], Blocks],
    ) -> list[ir.TensorProtocol]:
        tensor, turned, name = value.const_value, transposed(reader), value.name
        assert tensor is not None
        shape = [int(size) for size in tensor.shape.numpy()]
        rows, columns = reversed(shape) if turned else shape
        blocks = -(-rows // form.block_size)
        key = object()

        def made() -> Blocks:
            if self._latest is None or self._latest[0] is not key:
                self._latest = None
                held = ir.Value(name=name, const_value=tensor)
                array = weight(held)
                assert array is not None
                if (problem := nonfinite(array)) is not None:
                    raise BadInput(problem, about=str(name), remedy="give it to `exclude`")
                self._latest = key, quantize(array.T if turned else array, form)
            return self._latest[1]

        def codes() -> ir.TensorProtocol:
            return packed(made().codes, form)

        def scales() -> ir.TensorProtocol:
            return ir.tensor(made().scales)

        def zeros() -> ir.TensorProtocol:
            return packed(made().zeros, form)

        whole, few = ir.Shape([rows, columns]), ir.Shape([blocks, columns])
        parts: list[ir.TensorProtocol] = [
            ir.LazyTensor(codes, stored_type(form), whole, cache=False),
            ir.LazyTensor(scales, ir.DataType.FLOAT, few, cache=False),
        ]
        if not form.symmetric:
            parts.append(ir.LazyTensor(zeros, stored_type(form), few, cache=False))
        return parts


def spilled(model: ir.Model, made: Blocks) -> list[ir.TensorProtocol]:
    """Like `eager`, in a temporary file that lives as long as the model."""
    folder = model.meta.setdefault(_SPILLED, tempfile.TemporaryDirectory(prefix="trivium-"))
    path = Path(folder.name) / "quantized.data"
    found: list[ir.TensorProtocol] = []
    with path.open("ab") as stream:
        for tensor in eager(made):
            stream.write(b"\0" * (-stream.tell() % 64))
            offset = stream.tell()
            tensor.tofile(stream)  # type: ignore[attr-defined]  # both kinds that are made have it
            found.append(
                ir.ExternalTensor(
                    path.name,
                    offset,
                    stream.tell() - offset,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name="",
                    base_dir=path.parent,
                )
            )
    return found


def stored_type(form: Form) -> ir.DataType:
    return ir.DataType[form.codes.dtype.upper()]


def packed(codes: Array, form: Form) -> ir.TensorProtocol:
    """A stored tensor of codes: two to a byte, the first in the low half, where they have 4 bits.

    Codes of 2 and 3 bits are stored as 4: ONNX has no 3, and normal form's opset no 2.
    """
    if form.bits > 4:
        return ir.tensor(codes)
    flat = codes.reshape(-1).view(np.uint8)
    pairs = flat[0::2] & np.uint8(0xF)
    pairs[: flat.size // 2] |= flat[1::2] << np.uint8(4)
    return ir.PackedTensor(pairs, stored_type(form), shape=ir.Shape(codes.shape))
