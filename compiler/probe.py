"""A node by itself, as a model: what a backend shows to its engine to ask whether it takes it."""

from __future__ import annotations

import onnx_ir as ir

from trivium.compiler.passing import opset_of

IR_VERSION = 11
"""That of opset 24."""


def one_node_model(node: ir.Node, *, largest: int | None = None) -> ir.Model:
    """Return a model of a copy of one node, its constants stored and its other inputs fed.

    Args:
        largest: Constants of more bytes than this are fed too, and so stay unread.
    """

    def like(value: ir.Value | None, name: str) -> ir.Value | None:
        if value is None:
            return None
        tensor = value.const_value
        if tensor is not None and largest is not None and tensor.nbytes > largest:
            tensor = None
        if isinstance(tensor, (ir.ExternalTensor, ir.LazyTensor)):
            tensor = ir.tensor(tensor.numpy(), dtype=tensor.dtype)
        return ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)

    inputs = [like(value, f"x{index}") for index, value in enumerate(node.inputs)]
    attributes = list(node.attributes.values())
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
    for index, (mine, value) in enumerate(zip(copy.outputs, node.outputs, strict=True)):
        mine.name, mine.type, mine.shape = f"y{index}", value.type, value.shape
    stored = [v for v in inputs if v is not None and v.const_value is not None]
    fed = [v for v in inputs if v is not None and v.const_value is None]
    graph = ir.Graph(
        fed,
        copy.outputs,
        nodes=[copy],
        initializers=stored,
        opset_imports={node.domain: opset_of(node)},
        name="probe",
    )
    return ir.Model(graph, ir_version=IR_VERSION)
