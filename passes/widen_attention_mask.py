"""Give attention masks the rows that some engines want to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trivium.compiler.passing import NodePass, dims, graph_of, initializer, is_op
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class WidenAttentionMask(NodePass):
    """Expand a mask with one row to one row for each query.

    The standard lets the mask of Attention broadcast; ONNX Runtime 1.32's kernel for the CPU does
    so over batch and heads only. Part of that backend's legalization, not of normal form.
    """

    name: ClassVar[str] = "widen-attention-mask"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Attention") or len(node.inputs) < 4:
            return False
        q, mask = node.inputs[0], node.inputs[3]
        known, queries = dims(mask), dims(q)
        if mask is None or q is None or known is None or queries is None or len(queries) != 4:
            return False
        if known[-2] != 1 or queries[2] == 1:
            return False
        made, shape = _rows(node, q, queries[2])
        wide = ir.node("Expand", [mask, shape])
        wide.outputs[0].type = mask.type
        if mask.shape is not None and q.shape is not None:
            wide.outputs[0].shape = ir.Shape([*mask.shape[:-2], q.shape[2], mask.shape[-1]])
        graph_of(node).insert_before(node, [*made, wide])
        node.replace_input_with(3, wide.outputs[0])
        return True


def _rows(node: ir.Node, q: ir.Value, count: int | None) -> tuple[list[ir.Node], ir.Value]:
    """The shape (queries, 1) to expand to, and the nodes that make it."""
    graph, stem = graph_of(node), f"{node.outputs[0].name}_mask"
    if count is not None:
        return [], initializer(graph, np.array([count, 1], np.int64), f"{stem}_shape")
    one = initializer(graph, np.array([1], np.int64), f"{stem}_one")
    queries = ir.node("Shape", [q], {"start": 2, "end": 3})
    shape = ir.node("Concat", [queries.outputs[0], one], {"axis": 0})
    return [queries, shape], shape.outputs[0]
