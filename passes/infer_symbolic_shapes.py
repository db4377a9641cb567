"""Name the dimensions that onnx's own inference leaves without a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from trivium.compiler.onnx_api import one_line
from trivium.compiler.passing import Pass, constant, decline, is_op
from trivium.compiler.types import Preserves

_ANONYMOUS = ("unk__", "_d")
"""How the names begin that onnx and the library invent for a dimension."""

_TO_THE_END = 2**31 - 1
"""At this and above, exporters mean the end of the axis."""


@dataclass(frozen=True)
class InferSymbolicShapes(Pass):
    """Follow sizes through arithmetic on shapes: ``reshape(x, [-1, shape(x)[1]])`` keeps its names.

    Exporters that trace (TorchScript) compute every Reshape's shape in the graph, and onnx's
    inference gives up there; patterns that need to know that two axes are the same then find
    nothing. Left alone: graphs in which nothing is anonymous.
    """

    name: ClassVar[str] = "infer-symbolic-shapes"
    preserves: ClassVar[Preserves] = "exact"

    def run(self, model: ir.Model) -> bool:
        guilty = {v.name: v for node in model.graph for v in node.outputs if _is_anonymous(v)}
        if not guilty:
            return False
        from onnx_shape_inference import infer_symbolic_shapes

        # On a copy: the library leaves notes on values, and believes the names that it finds.
        twin = model.clone()
        found = {v.name: v for node in twin.graph for v in node.outputs if v.name in guilty}
        for value in found.values():
            value.shape = None
        for node in twin.graph:
            if is_op(node, "Slice") and not _settled(node):
                _hide(node)
        try:
            infer_symbolic_shapes(twin, warn_on_missing=False)
        except Exception as error:  # the library, or sympy below it
            return decline(next(iter(guilty.values())), one_line(error))
        named = [_adopt(value, found[name]) for name, value in guilty.items() if name in found]
        return any(named)


def _settled(node: ir.Node) -> bool:
    """Whether the size of a Slice follows from what is known.

    The library takes a constant end for the size, however short the axis turns out to be.
    """
    starts, ends = constant(node.inputs[1]), constant(node.inputs[2])
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if node.inputs[0] is not None and node.inputs[0].shape is not None:
        shape = node.inputs[0].shape
        cut = range(len(shape)) if axes is None else [int(axis) for axis in axes]
        if all(isinstance(shape[axis], int) for axis in cut):
            return True
    if starts is None or ends is None:
        return False
    return bool((starts >= 0).all() and (ends >= _TO_THE_END).all())


def _hide(node: ir.Node) -> None:
    """Make a node one that the library does not know, so that its outputs stay anonymous."""
    node.op_type = f"Unsettled{node.op_type}"


def _is_anonymous(value: ir.Value) -> bool:
    return value.shape is None or any(_nameless(dim) for dim in value.shape)


def _nameless(dim: int | ir.SymbolicDim) -> bool:
    if isinstance(dim, int):
        return False
    return dim.value is None or any(part in str(dim.value) for part in _ANONYMOUS)


def _plain(dim: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A dimension; an expression that came out as a number is that number."""
    text = "" if isinstance(dim, int) else str(dim.value)
    return int(text) if text.isdigit() else dim


def _adopt(value: ir.Value, found: ir.Value) -> bool:
    """Take over what was found where it says more than what is known."""
    if found.shape is None:
        return False
    sizes = [_plain(dim) for dim in found.shape]
    if value.shape is None:
        value.shape = ir.Shape(None if _nameless(size) else size for size in sizes)
        return True
    if len(value.shape) != len(sizes):
        return False
    pairs = list(zip(value.shape, sizes, strict=True))
    dims = [new if _nameless(old) and not _nameless(new) else old for old, new in pairs]
    if dims == [old for old, _ in pairs]:
        return False
    value.shape = ir.Shape(dims)
    return True
