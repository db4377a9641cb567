"""Remove nodes that only rename a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.passing import NodePass, graph_of, is_op, replace
from trivium.compiler.types import Preserves


@dataclass(frozen=True)
class RemoveIdentities(NodePass):
    """Remove Identity nodes; the outputs of the model keep their names.

    Left alone: an Identity that makes an output of a graph from one of its inputs, from a
    constant, from a value of an outer graph, or from what is already an output under another name.
    """

    name: ClassVar[str] = "remove-identities"
    preserves: ClassVar[Preserves] = "exact"

    def rewrite(self, node: ir.Node) -> bool:
        if not is_op(node, "Identity") or node.inputs[0] is None:
            return False
        source, result = node.inputs[0], node.outputs[0]
        if result.is_graph_output():
            maker = source.producer()
            if maker is None or maker.graph is not node.graph or source.is_graph_output():
                return False
        replace(result, source)
        graph_of(node).remove(node, safe=True)
        return True
