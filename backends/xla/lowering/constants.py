"""Which constants of a model are weights (arguments of the program, shared by all programs) and
which are known while tracing (shapes, axes, scalars), so that shape arithmetic folds.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from trivium.backends.xla.lowering import registry

SMALL = 1024
"""Elements up to which an integer or boolean constant is taken for shape arithmetic."""

_LARGE = 1 << 20
"""Bytes above which not even an operand that wants to be constant is made one."""

_FEW = 8
"""Elements up to which a constant of floats is taken for shape arithmetic, where it is part of it:
one for each axis."""

_ARITHMETIC = frozenset(
    {"Add", "Cast", "Ceil", "Concat", "Div", "Floor", "Gather", "Identity", "Max", "Min", "Mul",
     "Reshape", "Slice", "Split", "Squeeze", "Sub", "Unsqueeze"}
)  # fmt: skip

_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})


def weights_of(model: ir.Model) -> dict[ir.Value, ir.TensorProtocol]:
    """Return the constants that become arguments, in graph order; the rest are known.

    Those of subgraphs and functions are among them, so that no large constant is ever compiled
    into a program.
    """
    constants = dict(_constants(model))
    return {v: tensor for v, tensor in constants.items() if not _is_known(v, tensor, model)}


def _constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            attribute = node.attributes.get("value")
            if attribute is not None and not attribute.is_ref():
                yield node.outputs[0], attribute.value


def _is_known(value: ir.Value, tensor: ir.TensorProtocol, model: ir.Model) -> bool:
    if tensor.dtype == ir.DataType.STRING or tensor.size == 0:
        return True
    if tensor.size == 1 and len(tensor.shape) == 0:
        return True
    if tensor.dtype in _INTEGERS and tensor.size <= SMALL:
        return True
    few = tensor.dtype.is_floating_point() and tensor.size <= _FEW and len(tensor.shape) == 1
    if few and any(_is_of_shapes(node.outputs[0]) for node in value.consumers()):
        return True
    if tensor.nbytes > _LARGE:
        return False
    opset = model.opset_imports.get("", 1)
    return any(_wants_constant(node, slot, opset) for node, slot in value.uses())


def _is_of_shapes(value: ir.Value) -> bool:
    """Whether a value is computed from shapes and constants, and from shapes at least."""
    pending, seen, found = [value], {value}, False
    while pending:
        one = pending.pop()
        node = one.producer()
        if node is None:
            if one.const_value is None:
                return False
        elif node.op_type in ("Shape", "Size"):
            found = True
        elif node.op_type in _ARITHMETIC:
            new = {v for v in node.inputs if v is not None} - seen
            seen |= new
            pending += new
        elif node.op_type != "Constant":
            return False
    return found


def _wants_constant(node: ir.Node, slot: int, opset: int) -> bool:
    entry = registry.find(node.domain, node.op_type, opset)
    return entry is not None and slot in entry.constants
