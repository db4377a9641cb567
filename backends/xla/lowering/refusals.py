"""Why an operator cannot be lowered, told without jax and before anything is traced."""

from __future__ import annotations

import onnx_ir as ir

from trivium.backends.xla.lowering import registry
from trivium.backends.xla.lowering.functions import fixed_body, has_body, is_context_dependent

_DOMAINS = ("", "ai.onnx")

DATA_DEPENDENT = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators whose output size is in no operand: lowered where the model declares it."""


def refusal(node: ir.Node, opset: int) -> str | None:
    """Return why a node cannot be lowered, or None if it can.

    Args:
        opset: The version of the node's own domain that the model imports.

    A node inside a branch or loop body is to be asked about itself. What depends on values (a
    shape that only a computation yields) is found when the model is traced.
    """
    if any(_is_string(value) for value in (*node.inputs, *node.outputs)):
        return "works on strings, which XLA does not have"
    reason = _without_road(node.domain, node.op_type, opset)
    if reason is not None:
        return reason
    if node.domain in _DOMAINS and node.op_type in DATA_DEPENDENT and not _is_static(node):
        return "has an output whose shape depends on the data, and XLA needs it before it runs"
    return None


def _is_static(node: ir.Node) -> bool:
    shape = node.outputs[0].shape
    if shape is not None and shape.is_static():
        return True
    return all(v is None or ir.convenience.get_const_tensor(v) is not None for v in node.inputs)


def _is_string(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.STRING


def _without_road(domain: str, op_type: str, opset: int, depth: int = 0) -> str | None:
    if registry.find(domain, op_type, opset) is not None:
        return None
    if not has_body(domain, op_type, opset):
        where = domain or "ai.onnx"
        return f"no lowering for {where}.{op_type} at opset {opset}, and it has no function body"
    if is_context_dependent(domain, op_type, opset) or depth > 4:
        return None
    body = fixed_body(domain, op_type, opset)
    for inner in body.function if body is not None else ():
        version = body.opsets.get(inner.domain, 1) if body is not None else 1
        reason = _without_road(inner.domain, inner.op_type, version, depth + 1)
        if reason is not None:
            return f"its function body needs {inner.op_type}: {reason}"
    return None
