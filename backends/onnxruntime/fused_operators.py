"""Operators that ONNX Runtime has whole and would otherwise run in pieces.

They matter where a step is short: of a decoder of 110M parameters, whose token takes some 5 ms,
they save a tenth. Measured and left out, for they saved nothing there: rotary embeddings inside of
GroupQueryAttention, and one product for query, key and value, or for both sides of a gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import (
    NodePass,
    attribute,
    decline,
    dims,
    graph_of,
    is_constant,
    is_op,
    producer,
    replace,
    splice,
)
from trivium.compiler.types import Preserves

DOMAIN = "com.microsoft"

_WIDEST = 3
"""Dimensions of what is not the feature map of a convolution."""


@dataclass(frozen=True)
class FuseSwish(NodePass):
    """Rewrite ``Swish`` to QuickGelu, which is the same function.

    By its function body it would be five nodes, two of which pass the data once more.

    Left alone: feature maps, whose convolutions ONNX Runtime keeps in a layout of its own, in which
    it has the pieces and not the whole.
    """

    name: ClassVar[str] = "onnxruntime-fuse-swish"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        shape = dims(node.inputs[0]) if is_op(node, "Swish") else None
        if shape is None or node.inputs[0] is None or node.inputs[0].dtype != ir.DataType.FLOAT:
            return False
        if len(shape) > _WIDEST:
            return decline(node, "it may be one of feature maps")
        options = {"alpha": float(attribute(node, "alpha", 1.0))}
        splice(
            [node],
            ir.node("QuickGelu", [node.inputs[0]], options, domain=DOMAIN, name=node.name),
        )
        return True


@dataclass(frozen=True)
class FuseResidualNorm(NodePass):
    """Rewrite ``RMSNormalization(a + b)`` to SkipSimplifiedLayerNormalization, which gives the sum
    as well.

    Left alone: sums that more than one normalization reads, sums of different shapes, and
    normalization over several axes.
    """

    name: ClassVar[str] = "onnxruntime-fuse-residual-norm"
    preserves: ClassVar[Preserves] = "numeric"

    def rewrite(self, node: ir.Node) -> bool:
        add = producer(node.inputs[0], "Add") if is_op(node, "RMSNormalization") else None
        if add is None:
            return False
        (a, b), scale, total = add.inputs, node.inputs[1], add.outputs[0]
        if a is None or b is None or a.dtype != ir.DataType.FLOAT or not _agree(a, b):
            return decline(node, "what is added is no two rows of float features of one shape")
        if not is_constant(scale) or len(dims(scale) or ()) != 1:
            return decline(node, "its scale is no constant of one axis")
        if attribute(node, "axis", -1) not in (-1, len(dims(a) or ()) - 1):
            return decline(node, "it normalizes over several axes")
        if sum(is_op(user, "RMSNormalization") for user, _ in total.uses()) > 1:
            return decline(node, "another normalization reads the sum")
        made = ir.node(
            "SkipSimplifiedLayerNormalization",
            [a, b, scale],
            {"epsilon": float(attribute(node, "epsilon", 1e-5))},
            domain=DOMAIN,
            num_outputs=4,
            name=node.name,
        )
        for unused in made.outputs[1:3]:
            unused.name = ""
        pairs = [(node.outputs[0], made.outputs[0]), (total, made.outputs[3])]
        # Where the sum was: others may read it before it is normalized.
        graph_of(add).insert_before(add, [made])
        for before, after in pairs:
            replace(before, after)
        for old in (node, add):
            graph_of(old).remove(old, safe=True)
        return True


def _agree(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are rows of features of one shape, as far as that can be known."""
    if a.shape is None or b.shape is None or len(a.shape) not in (2, 3):
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in a.shape)
    return known and a.shape == b.shape
