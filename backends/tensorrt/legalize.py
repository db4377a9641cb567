"""Normal form -> a strongly typed graph that TensorRT 11's parser takes.

High-level operators stay whole where the parser has them (4-D Attention, TensorScatter,
RotaryEmbedding, ...); the others are opened through the function bodies that ONNX defines. Types
are never left to the builder: what it will compute in is what the graph says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trivium.backends.tensorrt.operators import attention, types_by_operator
from trivium.compiler.passing import (
    NodePass,
    attribute,
    constant,
    decline,
    dims,
    graph_of,
    initializer,
    is_op,
    producer,
    replace,
    splice,
)
from trivium.compiler.types import Preserves
from trivium.passes.decompose_functions import DecomposeFunctions


def passes() -> Sequence[ir.passes.PassBase]:
    """The passes of the backend, in order."""
    from onnx_ir.passes.common import RemoveInitializersFromInputsPass

    from trivium.backends.tensorrt.static_caches import MaskEmptySlots
    from trivium.passes.drop_empty_operands import DropEmptyOperands
    from trivium.passes.fold_constants import FoldConstants
    from trivium.passes.infer_shapes import InferShapes
    from trivium.passes.remove_dead_code import RemoveDeadCode

    return (
        RemoveInitializersFromInputsPass(),
        MaskEmptySlots(),
        CountInFloat(),
        SeparateHeads(),
        OpenUnsupported(),
        FoldBiasDequantization(),
        SignQuantization(),
        WidenPositions(),
        FoldConstants(),
        InferShapes(),
        DropEmptyOperands(),
        RemoveDeadCode(),
    )


@dataclass(frozen=True)
class OpenUnsupported(DecomposeFunctions):
    """Open what the parser has no importer for, and Attention in a form that it does not take."""

    name: ClassVar[str] = "tensorrt-open-unsupported"

    def wants(self, node: ir.Node) -> bool:
        if node.op_type == "Attention":
            return attention(node) is not None
        return node.op_type in _openable()


@dataclass(frozen=True)
class SeparateHeads(NodePass):
    """Give Attention its heads as an axis, where they lie side by side: so the parser takes it
    whole, and TensorRT has one kernel for it.

    Left alone: what the parser would not take with four dimensions either.
    """

    name: ClassVar[str] = "tensorrt-separate-heads"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Attention"):
            return False
        ranks = [len(shape) if (shape := dims(value)) is not None else 0 for value in node.inputs]
        if ranks[:3] != [3, 3, 3] or len(node.inputs) > 4 or len(node.outputs) > 1:
            return False
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if attribute(node, "softcap", 0.0) or (mask is not None and ranks[3] < 1):
            return False
        if any(value is not None and value.dtype is None for value in node.inputs):
            return False
        made: list[ir.Node] = []

        def add(
            op: str, inputs: list[ir.Value | None], like: ir.Value, rank: int, **options: Any
        ) -> ir.Value:
            """A node whose result has the type of a value; of its shape only the rank counts."""
            one = ir.node(op, inputs, options)
            assert like.dtype is not None
            one.outputs[0].dtype, one.outputs[0].shape = like.dtype, ir.Shape([None] * rank)
            made.append(one)
            return one.outputs[0]

        def sizes(name: str, *of: int) -> ir.Value:
            return initializer(graph_of(node), np.array(of, np.int64), f"{node.name}.{name}")

        kv_heads = attribute(node, "kv_num_heads", 0)
        heads = (attribute(node, "q_num_heads", 0), kv_heads, kv_heads)
        inputs: list[ir.Value | None] = []
        for value, count, what in zip(node.inputs[:3], heads, "qkv", strict=True):
            assert value is not None
            apart = add("Reshape", [value, sizes(f"{what}_heads", 0, 0, count, -1)], value, 4)
            inputs.append(add("Transpose", [apart], value, 4, perm=[0, 2, 1, 3]))
        if mask is not None:
            if ranks[3] < 4:
                axes = sizes("mask_axes", *range(4 - ranks[3]))
                mask = add("Unsqueeze", [mask, axes], mask, 4)
            inputs.append(mask)
        query = node.inputs[0]
        assert query is not None
        kept = {k: v for k, v in node.attributes.items() if not k.endswith("_num_heads")}
        attended = add("Attention", inputs, query, 4)
        made[-1].attributes.update(kept)
        made[-1].name = node.name
        together = add("Transpose", [attended], query, 4, perm=[0, 2, 1, 3])
        add("Reshape", [together, sizes("width", 0, 0, -1)], query, 3)
        splice([node], made)
        return True


@cache
def _openable() -> frozenset[str]:
    """Operators that ONNX defines by others and that the parser refuses."""
    import onnx.defs

    return frozenset(
        schema.name
        for schema in onnx.defs.get_all_schemas()
        if schema.domain == ""
        and (schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]  # absent from onnx's stubs
        and not types_by_operator().get(schema.name)
    )


@dataclass(frozen=True)
class FoldBiasDequantization(NodePass):
    """Turn ``DequantizeLinear`` of a constant int32 into the float constant that it stands for.

    That is how quantizers store a bias; TensorRT takes no int32 there and wants the bias in float.
    """

    name: ClassVar[str] = "tensorrt-fold-bias-dequantization"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "DequantizeLinear") or node.inputs[0] is None:
            return False
        if node.inputs[0].dtype != ir.DataType.INT32:
            return False
        codes, scale = constant(node.inputs[0]), constant(node.inputs[1])
        if codes is None or scale is None:
            return decline(node, "its int32 input or its scale is not a constant")
        if scale.ndim == 1 and codes.ndim > 1:
            shape = [1] * codes.ndim
            shape[attribute(node, "axis", 1)] = -1
            scale = scale.reshape(shape)
        values = (codes.astype(np.float64) * scale).astype(scale.dtype)
        name = f"{node.inputs[0].name}_float"
        replace(node.outputs[0], initializer(graph_of(node), values, name))
        graph_of(node).remove(node, safe=True)
        return True


@dataclass(frozen=True)
class SignQuantization(NodePass):
    """Shift uint8 quantization around 128 to int8 around 0, which is the same grid.

    Left alone: other zero points, which are not symmetric, and codes that something besides a
    DequantizeLinear reads.
    """

    name: ClassVar[str] = "tensorrt-sign-quantization"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "DequantizeLinear") or len(node.inputs) < 3 or node.inputs[0] is None:
            return False
        codes = node.inputs[0]
        if codes.dtype != ir.DataType.UINT8 or not _all_128(node.inputs[2]):
            return False
        readers = [user for user, _ in codes.uses()]
        if codes.is_graph_output() or not all(
            is_op(user, "DequantizeLinear") and len(user.inputs) > 2 and _all_128(user.inputs[2])
            for user in readers
        ):
            return decline(node, f"something besides DequantizeLinear reads {codes.name}")
        stored = constant(codes, limit=None)
        quantize = producer(codes, "QuantizeLinear")
        if stored is not None:
            signed = (stored.astype(np.int16) - 128).astype(np.int8)
            shifted = initializer(graph_of(node), signed, f"{codes.name}_signed")
            for user in readers:
                user.replace_input_with(0, shifted)
        elif quantize is not None and len(quantize.inputs) > 2 and _all_128(quantize.inputs[2]):
            _zero(quantize)
            quantize.attributes.pop("output_dtype", None)
            codes.type = ir.TensorType(ir.DataType.INT8)  # clones share the old type
        else:
            return decline(node, f"{codes.name} comes from outside of the graph")
        for user in readers:
            _zero(user)
        return True


def _all_128(zero_point: ir.Value | None) -> bool:
    array = constant(zero_point)
    return array is not None and array.dtype == np.uint8 and bool((array == 128).all())


def _zero(node: ir.Node) -> None:
    """Give a Q or DQ the int8 zero point 0 in the shape of the one that it has."""
    old = constant(node.inputs[2])
    assert old is not None
    name = f"{node.name or node.op_type}_zero"
    node.replace_input_with(2, initializer(graph_of(node), np.zeros(old.shape, np.int8), name))


@dataclass(frozen=True)
class CountInFloat(NodePass):
    """Take ``CumSum`` of integers in float32, the widest type that the parser has for it.

    Sums of up to 2**24 are exact; they are counts of tokens as a rule.
    """

    name: ClassVar[str] = "tensorrt-count-in-float"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        summed = node.inputs[0] if is_op(node, "CumSum") else None
        if summed is None or summed.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            return False
        kind, result = summed.dtype, node.outputs[0]
        wide = ir.node("Cast", [summed], {"to": ir.DataType.FLOAT.value})
        options = {name: attribute(node, name, 0) for name in ("exclusive", "reverse")}
        total = ir.node("CumSum", [wide.outputs[0], node.inputs[1]], options)
        back = ir.node("Cast", total.outputs, {"to": kind.value}, name=node.name)
        for made, dtype in ((wide, ir.DataType.FLOAT), (total, ir.DataType.FLOAT), (back, kind)):
            made.outputs[0].dtype, made.outputs[0].shape = dtype, result.shape
        splice([node], [wide, total, back])
        return True


@dataclass(frozen=True)
class WidenPositions(NodePass):
    """Cast the positions of ``RotaryEmbedding`` to int64, the only type that the parser takes."""

    name: ClassVar[str] = "tensorrt-widen-positions"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "RotaryEmbedding") or len(node.inputs) < 4 or node.inputs[3] is None:
            return False
        if node.inputs[3].dtype in (None, ir.DataType.INT64):
            return False
        cast = ir.node("Cast", [node.inputs[3]], {"to": ir.DataType.INT64.value})
        cast.outputs[0].dtype = ir.DataType.INT64
        cast.outputs[0].shape = node.inputs[3].shape
        graph_of(node).insert_before(node, cast)
        node.replace_input_with(3, cast.outputs[0])
        return True
